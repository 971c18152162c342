//! The providers behind the interface `org.sealblk.Agent`, as a volume sees providers, whichever way the calls take.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::RequestPurpose;
use crate::protocol::{
    CreateKek, DefaultProvider, INTERFACE, Kek, KeyFailure, MAX_NAME, MAX_WRAPPED, NamedProvider, RevokeKek,
    SettleBinding, Unwrap, WireBinding, Wrap, may_be,
};
use crate::{Binding, KeyError, KeyId, KeyProvider, KeyReason, KeyState, Providers, Reach, Revocation};
use sealblk_base::harmless::harmless;
use sealblk_base::parsing;
use sealblk_base::path_text;
use sealblk_control::varlink::{CallError, MethodError, object};
use sealblk_control::wire::{self, WireError};
use sealblk_secmem::arena::SecretBytes;

/// The way that calls take.
pub trait Route: Send + Sync + fmt::Debug {
    /// Calls a method, by its full name, and waits for the answer.
    ///
    /// # Errors
    /// [`CallError`].
    fn call(
        &self,
        method: &str,
        parameters: &Map<String, Value>,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(Map<String, Value>, Vec<OwnedFd>), CallError>;

    /// Where it leads, for people.
    fn hop(&self) -> String;

    /// Why there is no key when no answer comes.
    fn no_answer(&self) -> KeyReason;
}

/// Why there is no key when a call came to `error`, which is no answer.
pub fn unanswered(route: &dyn Route, error: &CallError) -> KeyReason {
    match lacks_descriptors(error) {
        true => KeyReason::Host,
        false => route.no_answer(),
    }
}

/// Whether this process had too few descriptors. A connection is good for another call then.
pub fn lacks_descriptors(error: &CallError) -> bool {
    let number = match error {
        CallError::Wire(WireError::Io(error)) => error.raw_os_error(),
        _ => None,
    };
    matches!(number, Some(libc::EMFILE | libc::ENFILE))
}

/// Calls of the interface: who is asked, and what for.
#[derive(Clone, Debug)]
pub struct Caller {
    route: Arc<dyn Route>,
    purpose: RequestPurpose,
    /// Where the volume is that the keys are for.
    path: Option<String>,
    /// The process that serves the volume, if that is not this one.
    process: Option<u32>,
}

/// One of the providers there.
#[derive(Debug)]
struct RemoteProvider {
    caller: Caller,
    name: String,
}

/// An answer that says no more than that it is done.
#[derive(Debug, Deserialize)]
pub struct Nothing {}

/// What another process says lies under a failure: each text is the cause of the one before.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct Cause {
    text: String,
    source: Option<Box<Cause>>,
}

impl Cause {
    /// The first of `texts`, with what lies under it.
    pub fn of(texts: Vec<String>) -> Option<Box<Self>> {
        let texts = texts.into_iter().rev();
        texts.fold(None, |source, text| Some(Box::new(Self { text, source })))
    }
}

/// What the agent's answer makes of a call.
#[derive(Debug, thiserror::Error)]
enum AgentRefusal {
    #[error(
        "user {user} lacks the privilege {privilege}{}",
        volume.map(|volume| format!(" for volume {volume}")).unwrap_or_default()
    )]
    NotPermitted {
        privilege: String,
        user: u64,
        volume: Option<Uuid>,
    },
    #[error("the agent refused: its audit log cannot be written: {reason}")]
    NotAudited { reason: String },
    #[error("the agent answers {0}")]
    Other(MethodError),
}

/// What came of a call: the agent refused it, or there was no answer.
#[derive(Debug)]
pub enum Failed {
    Method(MethodError),
    Key(KeyError),
}

impl Caller {
    /// Calls that take `route`, for keys for `purpose`.
    pub fn new(route: Arc<dyn Route>, purpose: RequestPurpose) -> Self {
        Self {
            route,
            purpose,
            path: None,
            process: None,
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

    /// The process that serves the volume, if that is not this one.
    pub fn process(&self) -> Option<u32> {
        self.process
    }

    /// The same, for a volume that `process` serves, whose child this process is.
    pub fn on_behalf_of(self, process: u32) -> Self {
        Self {
            process: Some(process),
            ..self
        }
    }

    pub fn ask<T: DeserializeOwned>(
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

    pub fn call<T: DeserializeOwned>(
        &self,
        provider: &str,
        method: &str,
        parameters: impl Serialize,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(T, Vec<OwnedFd>), Failed> {
        let method = format!("{INTERFACE}.{method}");
        let called = self.route.call(&method, &object(parameters), descriptors);
        let answered = called.and_then(|(answer, descriptors)| {
            let answer = parsing::json_value(Value::Object(answer)).map_err(WireError::Json)?;
            Ok((answer, descriptors))
        });
        answered.map_err(|error| match error {
            CallError::Method(error) => Failed::Method(error),
            error => Failed::Key(
                self.fail(provider, unanswered(&*self.route, &error))
                    .because(error),
            ),
        })
    }

    pub fn refused(&self, provider: &str, error: MethodError) -> KeyError {
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
                let user = field("user").and_then(Value::as_u64).unwrap_or(0);
                let volume = field("volume").and_then(Value::as_str);
                let refusal = AgentRefusal::NotPermitted {
                    privilege,
                    user,
                    volume: volume.and_then(|uuid| uuid.parse().ok()),
                };
                return self.fail(provider, KeyReason::NotPermitted).because(refusal);
            }
            ".InUse" => {
                return self
                    .fail(provider, KeyReason::Refused)
                    .because(AgentRefusal::Other(error));
            }
            ".NotAudited" => {
                let reason = error.parameters.get("reason").and_then(Value::as_str);
                let reason = reason.unwrap_or("?").to_owned();
                return self
                    .fail(provider, KeyReason::Failed)
                    .because(AgentRefusal::NotAudited { reason });
            }
            _ => {}
        }
        self.fail(provider, KeyReason::Failed)
            .because(AgentRefusal::Other(error))
    }

    fn failure(&self, failure: KeyFailure) -> KeyError {
        let mut error = KeyError::new(&failure.provider, failure.hop, failure.reason);
        error.key_id = failure.key_id;
        match Cause::of(failure.causes) {
            Some(cause) => error.because(*cause),
            None => error,
        }
    }

    pub fn fail(&self, provider: &str, reason: KeyReason) -> KeyError {
        KeyError::new(provider, self.route.hop(), reason)
    }
}

impl Providers for Caller {
    fn provider(&self, name: &str) -> Result<Arc<dyn KeyProvider>, KeyError> {
        // No host has such a provider, and no message has room for any name that a header holds.
        if name.len() > MAX_NAME {
            let name = harmless(name, MAX_NAME);
            return Err(self.fail(&name, KeyReason::UnknownProvider));
        }
        Ok(Arc::new(RemoteProvider {
            caller: self.clone(),
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

impl RemoteProvider {
    fn ask<T: DeserializeOwned>(
        &self,
        method: &str,
        parameters: impl Serialize,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(T, Vec<OwnedFd>), KeyError> {
        self.caller.ask(&self.name, method, parameters, descriptors)
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
        self.caller.fail(&self.name, reason).of(key_id)
    }
}

impl KeyProvider for RemoteProvider {
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
            purpose: self.caller.purpose,
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
            purpose: self.caller.purpose,
            secret: 0,
            path: self.caller.path.clone(),
        };
        let (answer, _) = self.ask::<Wrapped>("Wrap", parameters, &[pipe.as_fd()])?;
        BASE64_STANDARD
            .decode(answer.wrapped)
            .map_err(|error| self.fail(binding.key_id, KeyReason::Garbled).because(error))
    }

    fn settle(&self, binding: &Binding<'_>, stored: bool) -> Result<(), KeyError> {
        let parameters = SettleBinding {
            binding: self.on_the_wire(binding)?,
            purpose: self.caller.purpose,
            path: self.caller.path.clone(),
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
            purpose: self.caller.purpose,
            wrapped: BASE64_STANDARD.encode(wrapped),
            path: self.caller.path.clone(),
            process: self.caller.process,
        };
        let (answer, descriptors) = self.ask::<Unwrapped>("Unwrap", parameters, &[])?;
        let garbled = || self.fail(binding.key_id, KeyReason::Garbled);
        let descriptor = descriptors
            .into_iter()
            .nth(answer.secret)
            .ok_or_else(|| garbled().because(io::Error::from(io::ErrorKind::UnexpectedEof)))?;
        wire::take_from_trusted(descriptor).map_err(|error| garbled().because(error))
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
        #[derive(Deserialize)]
        struct Revoked {
            #[serde(default)]
            reach: Option<Reach>,
        }
        if !may_be(key_id) {
            return Err(self.fail(key_id, KeyReason::Missing));
        }
        let parameters = RevokeKek {
            provider: self.name.clone(),
            key_id: key_id.clone(),
            revocation,
            force: false,
            dry_run: false,
        };
        let (revoked, _) = self.ask::<Revoked>("RevokeKek", parameters, &[])?;
        Ok(revoked.reach.unwrap_or(Reach::Host))
    }

    fn check(&self) -> Result<(), KeyError> {
        let parameters = NamedProvider {
            provider: self.name.clone(),
        };
        self.ask::<Nothing>("CheckProvider", parameters, &[]).map(drop)
    }
}
