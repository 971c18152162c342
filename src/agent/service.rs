//! The agent's methods, and the check of its callers. Each use of a key, each refusal and each failure goes to the audit log
//! first.

use std::error::Error;
use std::path::PathBuf;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::Serialize;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::certificates::Certificates;
use super::listing::{LastListing, page};
use super::messages::{Disks, ListDisks, PushKek};
use super::registered::{Registered, serving};
use crate::audit::AuditLog;
use crate::control::events::{Event, Events};
use crate::control::peer::Peer;
use crate::control::privilege::{Grants, Privilege, has_all};
use crate::control::rate_limit::RateLimit;
use crate::control::varlink::{Interface, MethodError, Reply, Request};
use crate::control::wire;
use crate::inventory::{By, Index, Occasion};
use crate::keys::RequestPurpose;
use crate::keys::protocol::{
    CreateKek, DefaultProvider, Detach, INTERFACE, Kek, KeyFailure, MAX_NAME, MAX_PATH, MAX_WRAPPED,
    NamedProvider, SettleBinding, Unwrap, WireBinding, Wrap, may_be,
};
use crate::keys::{KeyError, KeyId, KeyReason, Providers};
use crate::path_text::from_text;
use crate::providers::SharedProviders;
use crate::timestamp::Timestamp;
use sealblk_secmem::arena::SecretBytes;

/// The agent's side of its socket.
#[derive(Debug)]
pub(super) struct Service {
    pub(super) providers: SharedProviders,
    pub(super) grants: Grants,
    audit: AuditLog,
    events: Events,
    pub(super) registered: Registered,
    certificates: Certificates,
    pub(super) index: Index,
    pub(super) listing: LastListing,
    /// By user.
    refusals: RateLimit<Option<u32>, ()>,
    /// Of those who have a privilege, since what they ask for need not be there. All disks of a host may be one user's, and of each
    /// it has to be told why it has no key.
    failures: RateLimit<u32, (Option<Uuid>, KeyReason)>,
}

pub(super) type Answered = Result<Reply, MethodError>;

impl Service {
    pub(super) fn new(
        providers: SharedProviders,
        kek_grace: Duration,
        grants: Grants,
        audit: AuditLog,
    ) -> Self {
        Self {
            index: Index::of(providers.dir()),
            listing: LastListing::default(),
            registered: Registered::open(providers.dir(), kek_grace),
            providers,
            grants,
            audit,
            events: Events::default(),
            certificates: Certificates::default(),
            refusals: RateLimit::new(100, Duration::from_secs(60)),
            failures: RateLimit::new(10, Duration::from_secs(3600)),
        }
    }

    /// Lets go of KEKs whose time has come.
    pub(super) fn drop_expired(&self) {
        self.providers.drop_expired();
    }

    /// Tells of certificates that are about to expire.
    pub(super) fn tell_expiring(&self) {
        let expiring = self
            .certificates
            .due(|| self.providers.list().unwrap_or_default());
        for (provider, expiring) in expiring {
            let days = expiring.days();
            let fields = serde_json::to_value(&expiring).expect("texts are JSON");
            let _ = self.audit(
                Event::CertificateExpiring,
                with(with(fields, "provider", provider), "days", days),
            );
        }
    }

    /// Lets go of KEKs whose last volume is not served any more, and tells of all volumes that are not.
    pub(super) fn tell_ended(&self) {
        let ended = self.registered.ended();
        for (volume, _) in ended.iter().filter(|(_, last)| *last) {
            self.providers.forget(&volume.provider, &volume.key_id);
        }
        for (volume, last) in &ended {
            let mut fields = serde_json::to_value(volume).expect("texts and numbers are JSON");
            fields = with(fields, "keyDropped", last);
            // There is nobody to tell that the log cannot be written.
            let _ = self.audit(Event::DiskUnregistered, fields);
            // Until it is told, it is listed, also after a crash.
            self.registered.forget(volume);
        }
    }

    fn list_disks(&self, mut request: Request<'_>) -> Answered {
        let ListDisks { from } = request.parameters()?;
        self.permit(request.peer, Privilege::ReadKeyServersInfo, None, json!({}))?;
        let (disks, next) = page(self.registered.list().into_iter(), from);
        Ok(Reply::of(Disks { disks, next }))
    }

    fn watch(&self, request: &Request<'_>) -> Answered {
        self.permit(request.peer, Privilege::ReadKeyServersInfo, None, json!({}))?;
        request.watch(INTERFACE, &self.events)
    }

    fn push_kek(&self, mut request: Request<'_>) -> Answered {
        let PushKek {
            provider,
            key_id,
            kek,
        } = request.parameters()?;
        check_names(&provider, Some(&key_id))?;
        let subject = json!({ "provider": provider, "keyId": key_id });
        self.permit(request.peer, Privilege::ManageKeys, None, subject.clone())?;
        let kek = secret_of(&request, kek, "kek")?;
        let pushed = self.providers.push(&provider, &key_id, kek);
        self.judged(request.peer, &subject, pushed)?;
        // What no record tells of must open nothing.
        self.audited(Event::KeyPushed, request.peer, subject)
            .inspect_err(|_| self.providers.forget(&provider, &key_id))?;
        Ok(Reply::default())
    }

    fn list_providers(&self, request: &Request<'_>) -> Answered {
        self.permit(request.peer, Privilege::ReadKeyServersInfo, None, json!({}))?;
        let entries = self.providers.list().map_err(|error| {
            let error = KeyError::new("", "the agent's settings", KeyReason::Invalid).because(error);
            failure(&error)
        })?;
        Ok(Reply::of(json!({ "providers": entries })))
    }

    fn default_provider(&self, mut request: Request<'_>) -> Answered {
        let DefaultProvider { purpose } = request.parameters()?;
        let purposes = [
            RequestPurpose::Create,
            RequestPurpose::Recrypt,
            RequestPurpose::Check,
        ];
        self.permit_for(&request, purpose, &purposes, None, &json!({ "purpose": purpose }))?;
        let name = self.providers.default_name().map_err(|error| failure(&error))?;
        Ok(Reply::of(json!({ "name": name })))
    }

    fn create_kek(&self, mut request: Request<'_>) -> Answered {
        let CreateKek { provider, purpose } = request.parameters()?;
        check_names(&provider, None)?;
        let subject = json!({ "provider": provider, "purpose": purpose });
        let purposes = [RequestPurpose::Create, RequestPurpose::Recrypt];
        self.permit_for(&request, purpose, &purposes, None, &subject)?;
        let made = self
            .providers
            .provider(&provider)
            .and_then(|provider| provider.create_kek());
        let key_id = self.judged(request.peer, &subject, made)?;
        self.audited(Event::KeyCreated, request.peer, with(subject, "keyId", &key_id))?;
        Ok(Reply::of(json!({ "keyId": key_id })))
    }

    fn wrap(&self, mut request: Request<'_>) -> Answered {
        let Wrap {
            binding,
            purpose,
            secret,
            path,
        } = request.parameters()?;
        check_names(&binding.provider, Some(&binding.key_id))?;
        let subject = about(&binding, purpose);
        let purposes = [RequestPurpose::Create, RequestPurpose::Recrypt];
        self.permit_for(&request, purpose, &purposes, Some(binding.volume), &subject)?;
        let secret = secret_of(&request, secret, "secret")?;
        let wrapped = self
            .providers
            .provider(&binding.provider)
            .and_then(|provider| provider.wrap(&binding.binding(), &secret));
        let by = by(request.peer);
        let (place, bound) = (place(path.as_deref()), binding.binding());
        let wrapped = wrapped.and_then(|wrapped| {
            let announced = self.index.announce(&bound, &place, by);
            announced.map(|()| wrapped).map_err(|error| error.of(&bound))
        });
        let wrapped = self.judged(request.peer, &subject, wrapped)?;
        self.audited(Event::KeyBound, request.peer, subject)
            .inspect_err(|_| self.index.settle(&bound, &place, false, by))?;
        Ok(Reply::of(json!({ "wrapped": BASE64_STANDARD.encode(wrapped) })))
    }

    fn settle_binding(&self, mut request: Request<'_>) -> Answered {
        let SettleBinding {
            binding,
            purpose,
            path,
            stored,
        } = request.parameters()?;
        check_names(&binding.provider, Some(&binding.key_id))?;
        let subject = about(&binding, purpose);
        let purposes = [RequestPurpose::Create, RequestPurpose::Recrypt];
        self.permit_for(&request, purpose, &purposes, Some(binding.volume), &subject)?;
        let place = place(path.as_deref());
        self.index
            .settle(&binding.binding(), &place, stored, by(request.peer));
        Ok(Reply::default())
    }

    fn unwrap(&self, mut request: Request<'_>) -> Answered {
        let Unwrap {
            binding,
            purpose,
            wrapped,
            path,
            process,
        } = request.parameters()?;
        check_names(&binding.provider, Some(&binding.key_id))?;
        let subject = about(&binding, purpose);
        let purposes = [
            RequestPurpose::Attach,
            RequestPurpose::Migrate,
            RequestPurpose::Access,
            RequestPurpose::Recrypt,
        ];
        self.permit_for(&request, purpose, &purposes, Some(binding.volume), &subject)?;
        let peer = &serving(request.peer, process);
        let wrapped = BASE64_STANDARD
            .decode(&wrapped)
            .ok()
            .filter(|wrapped| wrapped.len() <= MAX_WRAPPED)
            .ok_or_else(|| MethodError::invalid_parameter("wrapped"))?;
        let secret = self
            .providers
            .provider(&binding.provider)
            .and_then(|provider| provider.unwrap(&binding.binding(), &wrapped));
        let kek = (&*binding.provider, &binding.key_id);
        let held = match &secret {
            // Its process was killed, perhaps, and the guest waits.
            Err(error) if error.reason.is_no_verdict() && purpose.is_to_serve() => self
                .registered
                .serves(peer.user, binding.volume, kek)
                .then(|| self.providers.unwrap_held(&binding.binding(), &wrapped))
                .flatten(),
            _ => None,
        };
        let subject = match held {
            Some(Ok(_)) => with(subject, "held", true),
            _ => subject,
        };
        let secret = self.judged(peer, &subject, held.unwrap_or(secret))?;
        let pipe = wire::pass(&secret).map_err(|error| {
            let error = KeyError::new(&binding.provider, "the agent", KeyReason::Host).because(error);
            failure(&error)
        })?;
        let grace = self
            .providers
            .grace(&binding.provider, &binding.key_id)
            .map(Timestamp::of);
        let subject = match grace {
            Some(grace) => with(subject, "grace", grace),
            None => subject,
        };
        self.audited(Event::KeyReleased, peer, subject)?;
        // The volume's place is what the caller says: whoever opens volumes could say anything.
        let place = place(path.as_deref());
        self.index
            .note(&binding.binding(), &place, Occasion::Opened, by(peer));
        if purpose.is_to_serve() {
            let WireBinding {
                volume,
                provider,
                key_id,
                ..
            } = &binding;
            let before = self.registered.add(peer, *volume, (provider, key_id), grace);
            if let Some(before) = before {
                self.providers.forget(&before.provider, &before.key_id);
            }
            self.providers.hold(provider, key_id);
        }
        Ok(Reply::of(json!({ "secret": 0 })).with(pipe))
    }

    fn detach(&self, mut request: Request<'_>) -> Answered {
        let Detach {
            volume,
            process,
            served,
        } = request.parameters()?;
        self.registered
            .detach(&serving(request.peer, process), volume, served != Some(false));
        Ok(Reply::default())
    }

    fn kek_state(&self, mut request: Request<'_>) -> Answered {
        let Kek {
            provider,
            key_id,
            max_age,
            here,
        } = request.parameters()?;
        let max_age = Duration::from_millis(max_age.unwrap_or(0));
        check_names(&provider, Some(&key_id))?;
        let subject = json!({ "provider": provider, "keyId": key_id });
        let any = [Privilege::Recrypt, Privilege::Access, Privilege::ManageKeys];
        self.permit_any(request.peer, &any, None, subject.clone())?;
        let provider = self.providers.provider(&provider);
        let state = provider.and_then(|provider| match here {
            true => provider.state_here(&key_id),
            false => provider.state_within(&key_id, max_age).map(Some),
        });
        let state = self.judged(request.peer, &subject, state)?;
        self.audited(Event::KeyLookedUp, request.peer, with(subject, "state", state))?;
        Ok(Reply::of(json!({ "state": state })))
    }

    fn check_provider(&self, mut request: Request<'_>) -> Answered {
        let NamedProvider { provider } = request.parameters()?;
        check_names(&provider, None)?;
        let subject = json!({ "provider": provider, "purpose": RequestPurpose::Check });
        self.permit_for(
            &request,
            RequestPurpose::Check,
            &[RequestPurpose::Check],
            None,
            &subject,
        )?;
        let checked = self
            .providers
            .provider(&provider)
            .and_then(|provider| provider.check());
        self.judged(request.peer, &subject, checked)?;
        self.audited(Event::ProviderChecked, request.peer, subject)?;
        Ok(Reply::default())
    }

    /// Lets through who may do this for `purpose`, if that is one of `purposes`.
    fn permit_for(
        &self,
        request: &Request<'_>,
        purpose: RequestPurpose,
        purposes: &[RequestPurpose],
        volume: Option<Uuid>,
        subject: &Value,
    ) -> Result<(), MethodError> {
        if !purposes.contains(&purpose) {
            return Err(MethodError::new(
                INTERFACE,
                "WrongPurpose",
                json!({ "purpose": purpose }),
            ));
        }
        self.permit(request.peer, purpose.privilege(), volume, subject.clone())
    }

    pub(super) fn permit(
        &self,
        peer: &Peer,
        privilege: Privilege,
        volume: Option<Uuid>,
        subject: Value,
    ) -> Result<(), MethodError> {
        self.permit_any(peer, &[privilege], volume, subject)
    }

    /// Lets through who has one of the privileges, for `volume` if it is about one; others are told of the last.
    pub(super) fn permit_any(
        &self,
        peer: &Peer,
        privileges: &[Privilege],
        volume: Option<Uuid>,
        subject: Value,
    ) -> Result<(), MethodError> {
        let allowed = |privilege: &Privilege| self.grants.allow(peer, *privilege, volume);
        if privileges.iter().any(allowed) {
            return Ok(());
        }
        let privilege = privileges.last();
        if let Some(suppressed) = self.refusals.admit(self.grants.caller(peer), ()) {
            let fields = with(subject, "privilege", privilege);
            self.audited(Event::KeyRefused, peer, suppressed.told_in(fields))?;
        }
        let mut told = json!({ "privilege": privilege, "user": peer.user });
        // Who has it for others asks in vain for this one alone.
        if let Some(volume) =
            volume.filter(|_| privilege.is_some_and(|it| self.grants.allow(peer, *it, None)))
        {
            told = with(told, "volume", volume);
        }
        Err(MethodError::new(INTERFACE, "NotPermitted", told))
    }

    /// What a provider brought; a failure is told to the log as well.
    pub(super) fn judged<T>(
        &self,
        peer: &Peer,
        subject: &Value,
        result: Result<T, KeyError>,
    ) -> Result<T, MethodError> {
        let error = match result {
            Ok(brought) => return Ok(brought),
            Err(error) => error,
        };
        let told = KeyFailure::of(&error);
        let mut fields = with(subject.clone(), "reason", told.reason);
        fields = with(fields, "hop", &told.hop);
        fields = with(fields, "causes", &told.causes);
        let event = match told.reason {
            KeyReason::Missing => Event::KeyMissing,
            KeyReason::Unreachable => Event::KeyServerUnreachable,
            KeyReason::Host => Event::KeyRefusedByHost,
            _ => Event::KeyFailed,
        };
        let volume = subject["volume"].as_str().and_then(|uuid| uuid.parse().ok());
        if let Some(suppressed) = self.failures.admit(peer.user, (volume, told.reason)) {
            self.audited(event, peer, suppressed.told_in(fields))?;
        }
        Err(failure(&error))
    }

    pub(super) fn audited(&self, event: Event, peer: &Peer, subject: Value) -> Result<(), MethodError> {
        let mut fields = Map::new();
        fields.insert("user".into(), peer.user.into());
        fields.insert("process".into(), peer.process.into());
        if let Value::Object(subject) = subject {
            fields.extend(subject);
        }
        self.audit(event, Value::Object(fields))
    }

    /// Writes down what happened, then tells it. What is not written down is not done.
    pub(super) fn audit(&self, event: Event, fields: Value) -> Result<(), MethodError> {
        let recorded = self
            .audit
            .record(event, &fields)
            .inspect(|()| self.events.tell(event, &fields));
        recorded.map_err(|error| {
            let cause = error
                .source()
                .map(|cause| format!(": {cause}"))
                .unwrap_or_default();
            tracing::error!(unrecorded = %event, %fields, "{error}{cause}");
            MethodError::new(
                INTERFACE,
                "NotAudited",
                json!({ "reason": format!("{error}{cause}") }),
            )
        })
    }
}

impl Interface for Service {
    fn name(&self) -> &'static str {
        INTERFACE
    }

    fn description(&self) -> &'static str {
        include_str!("org.sealblk.Agent.varlink")
    }

    fn knows(&self, peer: &Peer) -> bool {
        self.grants.know(peer)
    }

    fn call(&self, method: &str, request: Request<'_>) -> Option<Answered> {
        Some(match method {
            "ListProviders" => self.list_providers(&request),
            "GetDefaultProvider" => self.default_provider(request),
            "CreateKek" => self.create_kek(request),
            "Wrap" => self.wrap(request),
            "SettleBinding" => self.settle_binding(request),
            "Unwrap" => self.unwrap(request),
            "Detach" => self.detach(request),
            "GetKekState" => self.kek_state(request),
            "CheckProvider" => self.check_provider(request),
            "ListDisks" => self.list_disks(request),
            "Watch" => self.watch(&request),
            "PushKek" => self.push_kek(request),
            "ListVolumes" => self.list_volumes(request),
            "ScanVolumes" => self.scan_volumes(request),
            "ForgetVolume" => self.forget_volume(request),
            "RevokeKek" => self.revoke_kek(request),
            "ReportErasure" => self.report_erasure(request),
            "RemoveProvider" => self.remove_provider(request),
            _ => return None,
        })
    }
}

/// The place that a note names: none, if a caller names none that can be.
fn place(path: Option<&str>) -> PathBuf {
    let path = path.map(from_text);
    let usable = path.filter(|path| path.as_os_str().len() <= MAX_PATH && path.is_absolute());
    usable.unwrap_or_default()
}

/// Whose notes a caller's are.
pub(super) fn by(peer: &Peer) -> By {
    match has_all(peer) {
        true => By::Owner,
        false => By::User(peer.user),
    }
}

pub(crate) fn failure(error: &KeyError) -> MethodError {
    MethodError::new(INTERFACE, "KeyFailure", KeyFailure::of(error))
}

/// The secret that came beside a call.
fn secret_of(request: &Request<'_>, index: usize, parameter: &str) -> Result<SecretBytes, MethodError> {
    let descriptor = request.descriptors.get(index);
    descriptor
        .and_then(|descriptor| wire::take(descriptor).ok())
        .ok_or_else(|| MethodError::invalid_parameter(parameter))
}

/// Refuses names that nobody has, and that would fill the log.
pub(super) fn check_names(provider: &str, key_id: Option<&KeyId>) -> Result<(), MethodError> {
    if provider.len() > MAX_NAME || provider.chars().any(char::is_control) {
        return Err(MethodError::invalid_parameter("provider"));
    }
    match key_id {
        Some(key_id) if !may_be(key_id) => Err(MethodError::invalid_parameter("keyId")),
        _ => Ok(()),
    }
}

/// What a record says of a binding.
fn about(binding: &WireBinding, purpose: RequestPurpose) -> Value {
    let fields = serde_json::to_value(binding).expect("texts and numbers are JSON");
    with(fields, "purpose", purpose)
}

pub(super) fn with(mut fields: Value, name: &str, value: impl Serialize) -> Value {
    fields[name] = serde_json::to_value(value).expect("texts and lists are JSON");
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_stands_in_the_interface() {
        let description = include_str!("org.sealblk.Agent.varlink");
        for reason in KeyReason::ALL {
            let name = serde_json::to_value(reason).unwrap();
            let line = format!("\n  {}", name.as_str().unwrap());
            assert!(description.contains(&line), "{line}");
        }
    }
}
