//! The broker's answers. Each release and each refusal goes to the audit log first.

use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::enrolment::{Makers, Unknown};
use super::evidence::{self, Distrust};
use super::http::{Request, Response};
use super::session::{Attested, Enrolling, Issued, NoSession, Sessions};
use super::state::{Host, Kept, State, StateError};
use super::{BrokerError, Settings};
use crate::audit::{AuditError, AuditLog};
use crate::control::events::{Event, Events};
use crate::kbs::enrolment::{ACTIVATE, Activate, Challenge as Credential, ENROL, Enrol};
use crate::kbs::{self, ATTEST, AUTH, Attestation, COOKIE, Challenge, ErrorInformation, RESOURCE, jwe};
use crate::mutex::lock;
use crate::parsing;
use crate::tpm::attest::RsaPublic;
use crate::tpm::credential;
use crate::tpm::object_name;

/// Strangers must not fill the audit log: of what is refused, one is told in this time, with the number of the others.
const REFUSALS_EVERY: Duration = Duration::from_secs(1);

/// The service of a broker.
#[derive(Debug)]
pub(super) struct Service {
    state: State,
    makers: Makers,
    sessions: Sessions,
    audit: AuditLog,
    events: Events,
    refusals: Mutex<RateLimit>,
}

#[derive(Debug, Default)]
struct RateLimit {
    told: Option<Instant>,
    suppressed: u64,
}

/// What is answered instead.
#[derive(Debug, thiserror::Error)]
enum BrokerRefusal {
    #[error("there is nothing at this path")]
    NoPath,
    #[error("the request cannot be parsed")]
    Request,
    #[error("this broker supports only TPMs, not {0:?}")]
    Tee(String),
    #[error("the session is unknown, was used, or has expired")]
    Session,
    #[error("the settings or reference values of this host have changed since its attestation")]
    Changed,
    #[error("the evidence is for another session's nonce")]
    Nonce,
    #[error("no host is enrolled with this attestation key")]
    UnknownKey,
    #[error(transparent)]
    Distrust(#[from] Distrust),
    #[error("this host is not allowed to have this resource")]
    NotPermitted,
    #[error("this resource does not exist")]
    NoResource,
    #[error(transparent)]
    Enrolment(#[from] Unknown),
    #[error("the credential was not decrypted: the two keys are not in one TPM")]
    Credential,
    #[error("too many hosts at once; try again")]
    Full,
    /// The broker's own trouble, which is told in its log alone.
    #[error("the broker failed; its log has the reason")]
    Broker(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl BrokerRefusal {
    fn status(&self) -> u16 {
        match self {
            Self::NoPath | Self::NoResource => 404,
            Self::Request | Self::Tee(_) => 400,
            Self::Session | Self::Changed | Self::Nonce | Self::Distrust(_) => 401,
            Self::UnknownKey | Self::NotPermitted | Self::Enrolment(_) | Self::Credential => 403,
            Self::Full => 503,
            Self::Broker(_) => 500,
        }
    }

    /// As KBS names kinds of errors: by a URL.
    fn kind(&self) -> &'static str {
        match self.status() {
            401 => "https://github.com/confidential-containers/kbs/errors/AttestationFailed",
            403 => "https://github.com/confidential-containers/kbs/errors/PolicyDeny",
            404 => "https://github.com/confidential-containers/kbs/errors/NotFound",
            _ => "https://github.com/confidential-containers/kbs/errors/RequestFailed",
        }
    }
}

impl From<StateError> for BrokerRefusal {
    fn from(error: StateError) -> Self {
        Self::Broker(error.into())
    }
}

impl From<AuditError> for BrokerRefusal {
    fn from(error: AuditError) -> Self {
        Self::Broker(error.into())
    }
}

impl From<NoSession> for BrokerRefusal {
    fn from(none: NoSession) -> Self {
        match none {
            NoSession::Full => Self::Full,
            NoSession::Used => Self::Session,
        }
    }
}

impl From<getrandom::Error> for BrokerRefusal {
    fn from(error: getrandom::Error) -> Self {
        Self::Broker(error.into())
    }
}

/// Who asks, as far as it is known.
struct Caller {
    peer: SocketAddr,
    host: Option<String>,
}

impl Caller {
    fn fields(&self, more: Value) -> Value {
        let mut fields = Map::new();
        if let Some(host) = &self.host {
            fields.insert("host".into(), host.as_str().into());
        }
        fields.insert("peer".into(), self.peer.to_string().into());
        if let Value::Object(more) = more {
            fields.extend(more);
        }
        Value::Object(fields)
    }
}

impl Service {
    pub(super) fn new(settings: &Settings, state: State, audit: AuditLog) -> Result<Self, BrokerError> {
        state.read()?;
        Ok(Self {
            state,
            makers: Makers::read(settings.endorsement_authorities.as_deref())?,
            sessions: Sessions::new(settings.session_lifetime()).map_err(BrokerError::Random)?,
            audit,
            events: Events::default(),
            refusals: Mutex::default(),
        })
    }

    /// Answers a request.
    pub(super) fn answer(&self, peer: SocketAddr, request: &Request) -> Response {
        let mut caller = Caller { peer, host: None };
        let answer = match (request.method.as_str(), request.path.as_str()) {
            ("POST", AUTH) => self.challenge(request),
            ("POST", ATTEST) => self.attest(request, &mut caller),
            ("POST", ENROL) => self.enrol(request, &mut caller),
            ("POST", ACTIVATE) => self.activate(request, &mut caller),
            ("GET", path) => match path.strip_prefix(RESOURCE) {
                Some(path) => self.resource(request, path, &mut caller),
                None => Err(BrokerRefusal::NoPath),
            },
            _ => Err(BrokerRefusal::NoPath),
        };
        answer.unwrap_or_else(|refusal| {
            self.refused(&caller, &refusal);
            let information = ErrorInformation {
                error_type: refusal.kind().to_owned(),
                detail: refusal.to_string(),
            };
            Response::new(refusal.status(), &information)
        })
    }

    fn challenge(&self, request: &Request) -> Result<Response, BrokerRefusal> {
        let request: kbs::Request = parse(request)?;
        if request.tee != kbs::TEE {
            return Err(BrokerRefusal::Tee(crate::harmless::harmless(&request.tee, 32)));
        }
        let Issued { session, nonce } = self.sessions.challenge()?;
        let challenge = Challenge {
            nonce,
            extra_params: "".into(),
        };
        Ok(Response::new(200, &challenge).with_cookie(COOKIE, &session))
    }

    fn attest(&self, request: &Request, caller: &mut Caller) -> Result<Response, BrokerRefusal> {
        let id = session_of(request).ok_or(BrokerRefusal::Session)?;
        let nonce = self.sessions.challenged(id).ok_or(BrokerRefusal::Session)?;
        let Attestation {
            runtime_data,
            tee_evidence,
            ..
        } = parse(request)?;
        if runtime_data.nonce != nonce {
            return Err(BrokerRefusal::Nonce);
        }
        let evidence = tee_evidence.primary_evidence;
        let kept = self.state.read()?;
        let (name, key) = known(&kept, &evidence.spki().map_err(Distrust::from)?)?;
        caller.host = Some(name.to_owned());
        let as_known = kept.hosts[name].clone();
        let reference = kept.references.get(&as_known.reference);
        let reference = reference.ok_or(Distrust::NoReference)?;
        let report_data = runtime_data
            .report_data(&Value::Null)
            .expect("the default is a hash that there is");
        evidence::check(&evidence, &report_data, &key, reference)?;
        let attested = Attested {
            host: name.to_owned(),
            reference: reference.clone(),
            as_known,
            key: runtime_data.tee_pubkey,
        };
        self.sessions.put(id, attested)?;
        Ok(Response::new(200, &kbs::Token { token: id.to_owned() }))
    }

    fn resource(
        &self,
        request: &Request,
        path: &str,
        caller: &mut Caller,
    ) -> Result<Response, BrokerRefusal> {
        // One attestation is for one release.
        let attested = session_of(request).and_then(|id| self.sessions.take(id));
        let Some(Attested {
            host,
            as_known,
            reference,
            key,
        }) = attested
        else {
            return Err(BrokerRefusal::Session);
        };
        caller.host = Some(host.clone());
        let path = path
            .trim_start_matches('/')
            .parse()
            .map_err(|_| BrokerRefusal::NoResource)?;
        let kept = self.state.read()?;
        // What its operator has changed since is in force at once.
        let known = kept.hosts.get(&host).ok_or(BrokerRefusal::NotPermitted)?;
        if !known.resources.contains(&path) {
            return Err(BrokerRefusal::NotPermitted);
        }
        if *known != as_known || kept.references.get(&known.reference) != Some(&reference) {
            return Err(BrokerRefusal::Changed);
        }
        let sealed = kept.resources.get(&path).ok_or(BrokerRefusal::NoResource)?;
        let secret = self.state.unwrap(&path, sealed)?;
        let response = jwe::encrypt(&key, &secret).map_err(|e| match e {
            jwe::JweError::Form(_) => BrokerRefusal::Request,
            e => BrokerRefusal::Broker(e.into()),
        })?;
        self.record(Event::ResourceReleased, caller, json!({ "resource": path }))?;
        Ok(Response::new(200, &response))
    }

    fn enrol(&self, request: &Request, caller: &mut Caller) -> Result<Response, BrokerRefusal> {
        let request: Enrol<'_> = parse(request)?;
        let kept = self.state.read()?;
        let host = kept.hosts.get(&request.host);
        let candidate = self.makers.check(&request, host)?;
        caller.host = Some(request.host.clone());
        let as_known = host.ok_or(Unknown::Host)?;
        let (session, secret) = self.sessions.enrol(&Enrolling {
            host: request.host,
            endorsement: candidate.endorsement,
            attestation: BASE64_STANDARD.encode(&candidate.attestation),
            as_known: self.sessions.mark(as_known),
        })?;
        let name = object_name(&candidate.attestation);
        let credential = credential::make(&candidate.endorsement_key, &name, &secret)
            .map_err(|e| BrokerRefusal::Broker(e.into()))?;
        let challenge = Credential {
            session,
            credential: BASE64_STANDARD.encode(credential.object),
            secret: BASE64_STANDARD.encode(credential.secret),
        };
        Ok(Response::new(200, &challenge))
    }

    fn activate(&self, request: &Request, caller: &mut Caller) -> Result<Response, BrokerRefusal> {
        let request: Activate<'_> = parse(request)?;
        let begun = self.sessions.enrolling(&request.session);
        let (enrolling, secret) = begun.ok_or(BrokerRefusal::Session)?;
        let Enrolling {
            host: name,
            endorsement,
            attestation,
            as_known,
        } = enrolling;
        caller.host = Some(name.clone());
        let opened = BASE64_STANDARD
            .decode(request.secret)
            .map(Zeroizing::new)
            .map_err(|_| BrokerRefusal::Request)?;
        if !bool::from(opened[..].ct_eq(&secret[..])) {
            return Err(BrokerRefusal::Credential);
        }
        self.state.change(|kept| {
            // Somebody else may have enrolled by the same token meanwhile, or the operator may have said something else.
            let host = kept.hosts.get(&name).cloned().ok_or(Unknown::Host)?;
            if self.sessions.mark(&host) != as_known {
                return Err(BrokerRefusal::from(Unknown::Changed));
            }
            let is_other = |(other, host): (&String, &Host)| {
                *other != name
                    && host.attestation.is_some()
                    && host.endorsement.as_ref() == Some(&endorsement)
            };
            if kept.hosts.iter().any(is_other) {
                return Err(Unknown::OtherHost(endorsement.clone()).into());
            }
            self.record(Event::HostEnrolled, caller, json!({ "endorsement": endorsement }))?;
            let enrolled = Host {
                endorsement: Some(endorsement),
                attestation: Some(attestation),
                token: None,
                ..host
            };
            kept.hosts.insert(name, enrolled);
            Ok(())
        })?;
        Ok(Response::new(200, &json!({})))
    }

    fn record(&self, event: Event, caller: &Caller, more: Value) -> Result<(), AuditError> {
        let fields = caller.fields(more);
        self.audit.record(event, &fields)?;
        self.events.tell(event, &fields);
        Ok(())
    }

    fn refused(&self, caller: &Caller, refusal: &BrokerRefusal) {
        if let BrokerRefusal::Broker(cause) = refusal {
            tracing::error!(peer = %caller.peer, %cause, "a host got no answer");
        }
        let suppressed = {
            let mut refusals = lock(&self.refusals);
            if refusals.told.is_some_and(|told| told.elapsed() < REFUSALS_EVERY) {
                refusals.suppressed += 1;
                return;
            }
            refusals.told = Some(Instant::now());
            std::mem::take(&mut refusals.suppressed)
        };
        let more = json!({ "message": refusal.to_string(), "suppressed": suppressed });
        if let Err(error) = self.record(Event::HostRefused, caller, more) {
            tracing::error!(%error, "cannot record a refusal in the audit log");
        }
    }
}

fn parse<'a, T: Deserialize<'a>>(request: &'a Request) -> Result<T, BrokerRefusal> {
    parsing::json(&request.body).map_err(|_| BrokerRefusal::Request)
}

/// The session that a request is of: by its cookie, or by the token that stands for it.
fn session_of(request: &Request) -> Option<&str> {
    let cookies = request.cookie.as_deref().unwrap_or_default().split(';');
    let mut named = cookies.filter_map(|cookie| cookie.trim().strip_prefix(COOKIE)?.strip_prefix('='));
    named
        .next()
        .or_else(|| request.authorization.as_deref()?.strip_prefix("Bearer "))
}

/// The host whose attestation key it is, with that key's TPMT_PUBLIC.
fn known<'a>(kept: &'a Kept, spki: &[u8]) -> Result<(&'a str, Vec<u8>), BrokerRefusal> {
    let of = |text: &str| {
        let public = BASE64_STANDARD.decode(text).ok()?;
        let key = RsaPublic::attestation(&public).ok()?;
        (key.spki() == spki).then_some(public)
    };
    let mut found = kept
        .hosts
        .iter()
        .filter_map(|(name, host)| Some((name.as_str(), of(host.attestation.as_deref()?)?)));
    found.next().ok_or(BrokerRefusal::UnknownKey)
}
