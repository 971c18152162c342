//! The agent's providers, as a volume sees providers.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use super::Purpose;
use super::erasure::Erasure;
use super::messages::{
    CreateKek, DefaultProvider, Disks, INTERFACE, InUse, Kek, KeyFailure, ListDisks, ListVolumes,
    MAX_WRAPPED, NamedProvider, NotBackedUp, PushKek, RemoveProvider, RevokeKek, ScanVolumes, SettleBinding,
    Unwrap, Volumes, WireBinding, Wrap, may_be,
};
use super::registered::Registrant;
use crate::control::varlink::{CallError, MethodError, call};
use crate::control::wire::{self, Connection, WireError};
use crate::inventory;
use crate::inventory::verify::Scanned;
use crate::inventory::{GuardError, Removal, Share, Uses};
use crate::keys::arena::SecretBytes;
use crate::keys::registry::Entry;
use crate::keys::{Binding, KeyError, KeyId, KeyProvider, KeyReason, KeyState, Providers, Reach, Revocation};
use crate::parsing;
use crate::path_text;

/// How long the agent may take: it may have to wait for several servers, one after the other.
const TIMEOUT: Duration = Duration::from_secs(120);

/// How long, and how often, a busy agent is asked again.
const TURNED_AWAY: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_millis(50);

/// The agent at a socket. Each call is a connection of its own.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
    purpose: Purpose,
    /// Where the volume is that the keys are for.
    path: Option<String>,
}

/// One of the agent's providers.
#[derive(Debug)]
struct AgentProvider {
    client: Client,
    name: String,
}

/// An answer that says no more than that it is done.
#[derive(Deserialize)]
struct Nothing {}

/// What the agent says lies under a failure: each text is the cause of the one before.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
struct Cause {
    text: String,
    source: Option<Box<Cause>>,
}

/// What the agent's answer makes of a call.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error(
        "user {user} lacks the privilege {privilege}{}",
        volume.map(|volume| format!(" for volume {volume}")).unwrap_or_default()
    )]
    NotPermitted {
        privilege: String,
        user: u32,
        volume: Option<Uuid>,
    },
    #[error("it gives out nothing that its audit log does not tell of, and that cannot be written: {reason}")]
    NotAudited { reason: String },
    #[error("the agent says {0}")]
    Other(MethodError),
}

/// What came of a call: the agent refused it, or there was no answer.
enum Failed {
    Method(MethodError),
    Key(KeyError),
}

impl Client {
    /// The agent that listens at `socket`, asked for keys for `purpose`.
    pub fn new(socket: &Path, purpose: Purpose) -> Self {
        Self {
            socket: socket.to_owned(),
            purpose,
            path: None,
        }
    }

    /// The same, for the volume whose header is in `path`.
    pub fn at(self, path: &Path) -> Self {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        Self {
            path: Some(path_text::to_text(&path)),
            ..self
        }
    }

    /// All providers, by name.
    ///
    /// # Errors
    /// [`KeyError`], above all [`KeyReason::NoAgent`] and [`KeyReason::NotPermitted`].
    pub fn list(&self) -> Result<Vec<Entry>, KeyError> {
        #[derive(Deserialize)]
        struct Listed {
            providers: Vec<Entry>,
        }
        let (listed, _) = self.ask::<Listed>("", "ListProviders", json!({}), &[])?;
        Ok(listed.providers)
    }

    /// The volumes that are being served on this host, by the time since when they are.
    ///
    /// # Errors
    /// As for [`Client::list`].
    pub fn disks(&self) -> Result<Vec<Registrant>, KeyError> {
        all_pages(|from| {
            let (page, _) = self.ask::<Disks>("", "ListDisks", ListDisks { from }, &[])?;
            Ok((page.disks, page.next))
        })
    }

    /// Gives the agent a KEK, which somebody has fetched for this host.
    ///
    /// # Errors
    /// As for [`Client::list`], and if it is no KEK of a provider there.
    pub fn push(&self, provider: &str, key_id: &KeyId, kek: &SecretBytes) -> Result<(), KeyError> {
        if !may_be(key_id) {
            return Err(self.fail(provider, KeyReason::Missing).of(key_id));
        }
        let pipe = wire::pass(kek)
            .map_err(|error| self.fail(provider, KeyReason::Host).of(key_id).because(error))?;
        let parameters = PushKek {
            provider: provider.to_owned(),
            key_id: key_id.clone(),
            kek: 0,
        };
        self.ask::<Nothing>(provider, "PushKek", parameters, &[pipe.as_fd()])?;
        Ok(())
    }

    /// The volumes that are known, or one of them, of one provider or one KEK, whether there may be others, and whose room runs out.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn volumes(
        &self,
        volume: Option<Uuid>,
        provider: Option<&str>,
        key_id: Option<&KeyId>,
    ) -> Result<(Vec<inventory::Entry>, bool, Vec<Share>), KeyError> {
        let (mut full, mut crowded) = (false, Vec::new());
        let all = all_pages(|from| {
            let parameters = ListVolumes {
                volume,
                provider: provider.map(str::to_owned),
                key_id: key_id.cloned(),
                from,
            };
            let (page, _) = self.ask::<Volumes>("", "ListVolumes", parameters, &[])?;
            (full, crowded) = (page.full, page.crowded);
            Ok((page.volumes, page.next))
        })?;
        Ok((all, full, crowded))
    }

    /// Has the agent look at the volumes in `paths`, which are absolute, and at all that it knows.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn scan(&self, paths: &[PathBuf], missing: bool) -> Result<Scanned, KeyError> {
        let mut all = Scanned::default();
        let texts: Vec<String> = paths.iter().map(|path| path_text::to_text(path)).collect();
        // Paths and what is told of them have to go into one message.
        let mut pieces: Vec<&[String]> = texts.chunks(8).collect();
        // What is known is looked at once, after the last.
        pieces.push(&[]);
        for piece in pieces {
            let parameters = ScanVolumes {
                paths: piece.to_vec(),
                missing,
            };
            let (scanned, _) = self.ask::<Scanned>("", "ScanVolumes", parameters, &[])?;
            all.found.extend(scanned.found);
            all.passed_over.extend(scanned.passed_over);
            all.dropped += scanned.dropped;
        }
        Ok(all)
    }

    /// Takes a KEK out of use.
    ///
    /// # Errors
    /// [`GuardError`]; the KEK can be used as before then.
    pub fn revoke(
        &self,
        provider: &str,
        key_id: &KeyId,
        revocation: Revocation,
        removal: &Removal<'_>,
    ) -> Result<Option<Reach>, GuardError> {
        #[derive(Deserialize)]
        struct Revoked {
            #[serde(default)]
            reach: Option<Reach>,
        }
        // Nobody has such a key, and the agent hears of none.
        if !may_be(key_id) {
            return Err(self.fail(provider, KeyReason::Missing).of(key_id).into());
        }
        let parameters = RevokeKek {
            provider: provider.to_owned(),
            key_id: key_id.clone(),
            revocation,
            force: removal.force,
            dry_run: removal.dry_run,
        };
        Ok(self.manage::<Revoked>(provider, "RevokeKek", parameters)?.reach)
    }

    /// Removes a provider.
    ///
    /// # Errors
    /// [`GuardError`].
    pub fn remove_provider(&self, name: &str, removal: &Removal<'_>) -> Result<(), GuardError> {
        let parameters = RemoveProvider {
            provider: name.to_owned(),
            new_default: removal.new_default.map(str::to_owned),
            force: removal.force,
            dry_run: removal.dry_run,
        };
        self.manage::<Nothing>(name, "RemoveProvider", parameters)
            .map(drop)
    }

    /// Has the agent write down how far the erasure of a volume has come.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn report_erasure(&self, erasure: &Erasure) -> Result<(), KeyError> {
        self.ask::<Nothing>("", "ReportErasure", erasure, &[]).map(drop)
    }

    /// Asks for what the agent may refuse for the sake of volumes.
    fn manage<T: DeserializeOwned>(
        &self,
        provider: &str,
        method: &str,
        parameters: impl Serialize,
    ) -> Result<T, GuardError> {
        let error = match self.call(provider, method, parameters, &[]) {
            Ok((answer, _)) => return Ok(answer),
            Err(Failed::Method(error)) => error,
            Err(Failed::Key(error)) => return Err(error.into()),
        };
        let told = Value::Object(error.parameters.clone());
        match error.name.strip_prefix(INTERFACE) {
            Some(".InUse") => {
                if let Ok(InUse {
                    what,
                    volumes,
                    count,
                    full,
                }) = parsing::json_value(told)
                {
                    let uses = Uses { volumes, count, full };
                    return Err(GuardError::InUse { what, uses });
                }
            }
            Some(".NotBackedUp") => {
                if let Ok(NotBackedUp { provider }) = parsing::json_value(told) {
                    return Err(GuardError::NotBackedUp(provider));
                }
            }
            _ => {}
        }
        Err(self.refused(provider, error).into())
    }

    fn ask<T: DeserializeOwned>(
        &self,
        provider: &str,
        method: &str,
        parameters: impl Serialize,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(T, Vec<OwnedFd>), KeyError> {
        self.call(provider, method, parameters, descriptors)
            .map_err(|error| match error {
                Failed::Method(error) => self.refused(provider, error),
                Failed::Key(error) => error,
            })
    }

    fn call<T: DeserializeOwned>(
        &self,
        provider: &str,
        method: &str,
        parameters: impl Serialize,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(T, Vec<OwnedFd>), Failed> {
        let method = format!("{INTERFACE}.{method}");
        let ask = || {
            let mut connection = Connection::to(&self.socket, TIMEOUT)?;
            call(&mut connection, &method, &parameters, descriptors)
        };
        let mut patience = TURNED_AWAY;
        loop {
            let error = match ask() {
                Ok(answer) => return Ok(answer),
                Err(CallError::Method(error)) => return Err(Failed::Method(error)),
                Err(error) => error,
            };
            // An agent that has too many callers of this user hangs up.
            if !has_hung_up(&error) || patience.is_zero() {
                return Err(Failed::Key(
                    self.fail(provider, KeyReason::NoAgent).because(error),
                ));
            }
            std::thread::sleep(RETRY);
            patience = patience.saturating_sub(RETRY);
        }
    }

    fn refused(&self, provider: &str, error: MethodError) -> KeyError {
        let name = error.name.strip_prefix(INTERFACE).unwrap_or(&error.name);
        let parameters = Value::Object(error.parameters.clone());
        match name {
            ".KeyFailure" => {
                if let Ok(failure) = parsing::json_value::<KeyFailure>(parameters) {
                    return self.failure(failure);
                }
            }
            ".NotPermitted" => {
                let field = |name| error.parameters.get(name);
                let privilege = field("privilege")
                    .and_then(Value::as_str)
                    .unwrap_or("?")
                    .to_owned();
                let user = field("user").and_then(Value::as_u64).unwrap_or(0) as u32;
                let volume = field("volume").and_then(Value::as_str);
                let refusal = Refusal::NotPermitted {
                    privilege,
                    user,
                    volume: volume.and_then(|uuid| uuid.parse().ok()),
                };
                return self.fail(provider, KeyReason::NotPermitted).because(refusal);
            }
            ".NotAudited" => {
                let reason = error.parameters.get("reason").and_then(Value::as_str);
                let reason = reason.unwrap_or("?").to_owned();
                return self
                    .fail(provider, KeyReason::Failed)
                    .because(Refusal::NotAudited { reason });
            }
            _ => {}
        }
        self.fail(provider, KeyReason::Failed)
            .because(Refusal::Other(error))
    }

    fn failure(&self, failure: KeyFailure) -> KeyError {
        let mut error = KeyError::new(&failure.provider, failure.hop, failure.reason);
        error.key_id = failure.key_id;
        let causes = failure.causes.into_iter().rev();
        let cause = causes.fold(None, |source, text| Some(Box::new(Cause { text, source })));
        match cause {
            Some(cause) => error.because(*cause),
            None => error,
        }
    }

    fn fail(&self, provider: &str, reason: KeyReason) -> KeyError {
        KeyError::new(provider, self.socket.display(), reason)
    }
}

impl Providers for Client {
    fn provider(&self, name: &str) -> Result<Arc<dyn KeyProvider>, KeyError> {
        Ok(Arc::new(AgentProvider {
            client: self.clone(),
            name: name.to_owned(),
        }))
    }

    fn default_name(&self) -> Result<Option<String>, KeyError> {
        #[derive(Deserialize)]
        struct Default {
            name: Option<String>,
        }
        let purpose = self.purpose;
        let (default, _) = self.ask::<Default>("", "GetDefaultProvider", DefaultProvider { purpose }, &[])?;
        Ok(default.name)
    }
}

impl AgentProvider {
    fn ask<T: DeserializeOwned>(
        &self,
        method: &str,
        parameters: impl Serialize,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(T, Vec<OwnedFd>), KeyError> {
        self.client.ask(&self.name, method, parameters, descriptors)
    }

    /// The agent finds the provider by the binding; one that names another is not for this one.
    fn on_the_wire(&self, binding: &Binding<'_>) -> Result<WireBinding, KeyError> {
        if binding.provider != self.name {
            return Err(self.fail(binding.key_id, KeyReason::Unauthentic));
        }
        // No provider has such a key, and the agent hears of none.
        if !may_be(binding.key_id) {
            return Err(self.fail(binding.key_id, KeyReason::Missing));
        }
        Ok(WireBinding {
            volume: binding.volume,
            provider: self.name.clone(),
            key_id: binding.key_id.clone(),
            keyslot: binding.keyslot,
        })
    }

    fn fail(&self, key_id: &KeyId, reason: KeyReason) -> KeyError {
        self.client.fail(&self.name, reason).of(key_id)
    }
}

impl KeyProvider for AgentProvider {
    fn name(&self) -> &str {
        &self.name
    }

    fn create_kek(&self) -> Result<KeyId, KeyError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Created {
            key_id: KeyId,
        }
        let parameters = CreateKek {
            provider: self.name.clone(),
            purpose: self.client.purpose,
        };
        let (created, _) = self.ask::<Created>("CreateKek", parameters, &[])?;
        Ok(created.key_id)
    }

    fn wrap(&self, binding: &Binding<'_>, secret: &SecretBytes) -> Result<Vec<u8>, KeyError> {
        #[derive(Deserialize)]
        struct Wrapped {
            wrapped: String,
        }
        let pipe =
            wire::pass(secret).map_err(|error| self.fail(binding.key_id, KeyReason::Host).because(error))?;
        let parameters = Wrap {
            binding: self.on_the_wire(binding)?,
            purpose: self.client.purpose,
            secret: 0,
            path: self.client.path.clone(),
        };
        let (answer, _) = self.ask::<Wrapped>("Wrap", parameters, &[pipe.as_fd()])?;
        BASE64_STANDARD
            .decode(answer.wrapped)
            .map_err(|error| self.fail(binding.key_id, KeyReason::Garbled).because(error))
    }

    fn settle(&self, binding: &Binding<'_>, stored: bool) -> Result<(), KeyError> {
        let parameters = SettleBinding {
            binding: self.on_the_wire(binding)?,
            purpose: self.client.purpose,
            path: self.client.path.clone(),
            stored,
        };
        self.ask::<Nothing>("SettleBinding", parameters, &[]).map(drop)
    }

    fn unwrap(&self, binding: &Binding<'_>, wrapped: &[u8]) -> Result<SecretBytes, KeyError> {
        #[derive(Deserialize)]
        struct Unwrapped {
            secret: usize,
        }
        // Nothing that was ever wrapped is as long.
        if wrapped.len() > MAX_WRAPPED {
            return Err(self.fail(binding.key_id, KeyReason::Unauthentic));
        }
        let parameters = Unwrap {
            binding: self.on_the_wire(binding)?,
            purpose: self.client.purpose,
            wrapped: BASE64_STANDARD.encode(wrapped),
            path: self.client.path.clone(),
        };
        let (answer, descriptors) = self.ask::<Unwrapped>("Unwrap", parameters, &[])?;
        let garbled = || self.fail(binding.key_id, KeyReason::Garbled);
        let descriptor = descriptors
            .get(answer.secret)
            .ok_or_else(|| garbled().because(io::Error::from(io::ErrorKind::UnexpectedEof)))?;
        wire::take(descriptor).map_err(|error| garbled().because(error))
    }

    fn state(&self, key_id: &KeyId) -> Result<KeyState, KeyError> {
        self.state_within(key_id, Duration::ZERO)
    }

    fn state_within(&self, key_id: &KeyId, age: Duration) -> Result<KeyState, KeyError> {
        #[derive(Deserialize)]
        struct State {
            state: KeyState,
        }
        if !may_be(key_id) {
            return Ok(KeyState::Missing);
        }
        let age = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
        let parameters = Kek {
            provider: self.name.clone(),
            key_id: key_id.clone(),
            max_age: (age > 0).then_some(age),
            here: false,
        };
        Ok(self.ask::<State>("GetKekState", parameters, &[])?.0.state)
    }

    fn state_here(&self, key_id: &KeyId) -> Result<Option<KeyState>, KeyError> {
        #[derive(Deserialize)]
        struct State {
            state: Option<KeyState>,
        }
        if !may_be(key_id) {
            return Ok(None);
        }
        let parameters = Kek {
            provider: self.name.clone(),
            key_id: key_id.clone(),
            max_age: None,
            here: true,
        };
        Ok(self.ask::<State>("GetKekState", parameters, &[])?.0.state)
    }

    /// The agent looks for volumes that need the KEK first.
    fn revoke(&self, key_id: &KeyId, revocation: Revocation) -> Result<Reach, KeyError> {
        let removal = Removal::default();
        match self.client.revoke(&self.name, key_id, revocation, &removal) {
            Ok(reach) => Ok(reach.unwrap_or(Reach::Host)),
            Err(GuardError::Key(error)) => Err(error),
            Err(error) => Err(self.fail(key_id, KeyReason::Refused).because(error)),
        }
    }

    fn check(&self) -> Result<(), KeyError> {
        let parameters = NamedProvider {
            provider: self.name.clone(),
        };
        self.ask::<Nothing>("CheckProvider", parameters, &[]).map(drop)
    }
}

/// All of a list, of which `page` tells what begins at an entry, and where to go on.
fn all_pages<T>(
    mut page: impl FnMut(usize) -> Result<(Vec<T>, Option<usize>), KeyError>,
) -> Result<Vec<T>, KeyError> {
    let (mut all, mut from) = (Vec::new(), 0);
    loop {
        let (entries, next) = page(from)?;
        all.extend(entries);
        match next {
            Some(next) if next > from => from = next,
            _ => return Ok(all),
        }
    }
}

/// Whether the connection ended before an answer. A call that was heard nevertheless may be made again: a KEK too many, or
/// a secret once more.
fn has_hung_up(error: &CallError) -> bool {
    match error {
        CallError::NoAnswer => true,
        CallError::Wire(WireError::Io(error)) => {
            matches!(
                error.kind(),
                io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
            )
        }
        _ => false,
    }
}
