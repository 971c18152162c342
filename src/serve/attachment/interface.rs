//! The control socket of a served disk.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{Attachment, AttachmentError, Lock, OpenError};
use crate::cipher::Sector;
use crate::control::events::Event;
use crate::control::peer::Peer;
use crate::control::privilege::{Grants, Privilege};
use crate::control::rate_limit::RateLimit;
use crate::control::varlink::{self, MethodError, Reply, Request};
use crate::device::{self, Held, Standing};
use crate::error_chain::causes;
use crate::keys::{KeyId, KeyReason};
use crate::sandbox::{Measure, Missing, Sandbox};
use crate::timestamp::Timestamp;

/// The interface's name.
pub const INTERFACE: &str = "org.sealblk.Disk";

/// How a served disk is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// The disk's file or device, as [`crate::path_text`] writes it.
    pub disk: String,
    /// The UUID in its header.
    pub volume: Uuid,
    /// Whether it has its key.
    pub state: State,
    /// Why it has not.
    pub lock: Option<LockStatus>,
    /// In bytes.
    pub capacity: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether this process may do I/O on the storage. A process of an earlier version does not tell.
    pub claim: Option<ClaimStatus>,
    /// The guest's requests that wait for storage, if any does. A process of an earlier version does not tell.
    pub held: Option<HeldStatus>,
    /// Whether a front-end is connected. A process of an earlier version does not tell.
    pub front_end: Option<FrontEnd>,
    /// The release of the process that serves the disk. A process of an earlier version does not tell, nor the two after this.
    pub version: Option<String>,
    /// The process.
    pub process: Option<u32>,
    /// The process that served the disk before this one, if it took the disk over from one.
    pub before: Option<Before>,
    /// What the process has given up. One of an earlier version does not tell.
    pub sandbox: Option<Vec<Measure>>,
    /// What it could not give up, and why not.
    pub sandbox_missing: Option<Vec<Missing>>,
}

/// A process that has left its disk to another one (`sealblk upgrade`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Before {
    /// Its release.
    pub version: String,
    /// Which it was.
    pub process: u32,
    /// When it left.
    pub until: Timestamp,
}

/// Whether a process may do I/O on the storage of its disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClaimStatus {
    /// How its claim is.
    pub state: ClaimState,
    /// Why it was refused, for people.
    pub message: Option<String>,
}

/// How a claim is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClaimState {
    /// The process may do I/O.
    Held,
    /// No guest runs with the disk: none was started yet, or it has stopped, or migrated away.
    Released,
    /// The guest's requests wait: another process still has the disk, or writes of one that was killed have not landed.
    Waiting,
    /// The guest's requests wait until its front-end has stopped it and started it again.
    Refused,
}

impl From<Standing> for ClaimStatus {
    fn from(standing: Standing) -> Self {
        let (state, message) = match standing {
            Standing::Held => (ClaimState::Held, None),
            Standing::Released => (ClaimState::Released, None),
            Standing::Waiting => (ClaimState::Waiting, None),
            Standing::Refused(reason) => (ClaimState::Refused, Some(reason)),
        };
        Self { state, message }
    }
}

/// Requests of the guest that storage has failed, and that wait.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HeldStatus {
    /// How many transfers of them.
    pub transfers: usize,
    /// Why.
    pub by: HeldBy,
    /// The error, for people.
    pub message: String,
}

/// Why requests wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeldBy {
    /// Storage has no space; they continue when it has.
    Full,
    /// Another error; they continue at `Resume`.
    Error,
    /// It has not answered when the guest, or sealblk, was to stop. They continue when it has.
    Hung,
}

impl From<Held> for HeldStatus {
    fn from(held: Held) -> Self {
        Self {
            transfers: held.transfers,
            by: match held.by {
                device::HeldBy::Full => HeldBy::Full,
                device::HeldBy::Error => HeldBy::Error,
                device::HeldBy::Hung => HeldBy::Hung,
            },
            message: held.error,
        }
    }
}

/// Whether a front-end is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrontEnd {
    /// Whether one is.
    pub connected: bool,
    /// Then: since when.
    pub since: Option<Timestamp>,
}

/// Whether a disk has its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// The guest reads and writes.
    Open,
    /// What is in flight is being finished; all else waits already.
    Locking,
    /// The guest's requests wait, and nothing of the key is in the process.
    Locked,
}

/// Why a disk is locked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LockStatus {
    /// Who or what has it locked.
    pub by: LockedBy,
    /// For people.
    pub message: Option<String>,
    /// The key provider that was asked.
    pub provider: Option<String>,
    /// The key that was wanted.
    pub key_id: Option<KeyId>,
    /// Where it failed.
    pub hop: Option<String>,
    /// Why.
    pub reason: Option<KeyReason>,
}

/// Who or what has a disk locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LockedBy {
    /// Somebody who may.
    Operator,
    /// The key is not to be had.
    NoKey,
}

impl LockStatus {
    pub(super) fn of(lock: &Lock) -> Self {
        let (by, error) = match lock {
            Lock::Operator => (LockedBy::Operator, None),
            Lock::NoKey(error) => (LockedBy::NoKey, Some(error)),
            Lock::Asked => {
                return Self {
                    by: LockedBy::NoKey,
                    message: Some("its source has not answered yet".to_owned()),
                    provider: None,
                    key_id: None,
                    hop: None,
                    reason: None,
                };
            }
        };
        let key = error.and_then(OpenError::key);
        Self {
            by,
            message: error.map(|error| describe(error)),
            provider: key.map(|key| key.provider.clone()),
            key_id: key.and_then(|key| key.key_id.clone()),
            hop: key.map(|key| key.hop.clone()),
            reason: key.map(|key| key.reason),
        }
    }
}

/// What a served disk answers, to whom.
#[derive(Debug)]
pub struct Interface {
    served: Arc<Attachment>,
    grants: Grants,
    sandbox: Sandbox,
    before: Option<Before>,
    /// By user.
    refusals: RateLimit<Option<u32>, ()>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rekey {
    provider: Option<String>,
    if_older_than: Option<u64>,
}

#[derive(Deserialize)]
struct Resize {
    capacity: Option<u64>,
}

type Answered = Result<Reply, MethodError>;

impl Interface {
    /// Answers for `served`, whose process has given up `sandbox`, and took the disk over from `before`, to those who have `grants`.
    pub fn new(served: Arc<Attachment>, grants: Grants, sandbox: Sandbox, before: Option<Before>) -> Self {
        Self {
            served,
            grants,
            sandbox,
            before,
            refusals: RateLimit::new(100, Duration::from_secs(60)),
        }
    }

    fn status(&self) -> Answered {
        let served = &self.served;
        let (state, lock) = served.state();
        let since = served.disk.front_end();
        Ok(Reply::of(Status {
            disk: served.path.clone(),
            volume: served.uuid,
            state,
            lock,
            capacity: served.disk.sectors() * Sector::LEN,
            read_only: served.disk.read_only,
            claim: Some(served.disk.claimed().into()),
            held: served.disk.held().map(HeldStatus::from),
            front_end: Some(FrontEnd {
                connected: since.is_some(),
                since,
            }),
            version: Some(env!("CARGO_PKG_VERSION").to_owned()),
            process: Some(std::process::id()),
            before: self.before.clone(),
            sandbox: Some(self.sandbox.in_force.clone()),
            sandbox_missing: Some(self.sandbox.missing.clone()),
        }))
    }

    fn lock(&self, peer: &Peer) -> Answered {
        self.permit(peer, Privilege::RegisterVM)?;
        self.served.lock().map_err(|error| failed(&error))?;
        Ok(Reply::default())
    }

    fn unlock(&self, peer: &Peer) -> Answered {
        self.permit(peer, Privilege::RegisterVM)?;
        self.served.unlock().map_err(|error| failed(&error))?;
        Ok(Reply::default())
    }

    fn rekey(&self, mut request: Request<'_>) -> Answered {
        let Rekey {
            provider,
            if_older_than,
        } = request.parameters()?;
        self.permit(request.peer, Privilege::Recrypt)?;
        let older = if_older_than.map(Duration::from_secs);
        let rekeyed = self.served.rekey(provider.as_deref(), older).map_err(|error| {
            let failed = failed(&error);
            self.served
                .tell(Event::RekeyFailed, Value::Object(failed.parameters.clone()));
            failed
        })?;
        let rekeyed = rekeyed.ok_or_else(|| MethodError::new(INTERFACE, "NotDue", json!({})))?;
        let replaced = rekeyed.replaced.into_iter();
        let replaced: Vec<_> = replaced
            .map(|(provider, key_id)| json!({ "provider": provider, "keyId": key_id }))
            .collect();
        Ok(Reply::of(json!({
            "provider": rekeyed.provider,
            "keyId": rekeyed.key_id,
            "keyslot": rekeyed.keyslot,
            "replaced": replaced,
        })))
    }

    fn resize(&self, mut request: Request<'_>) -> Answered {
        let Resize { capacity } = request.parameters()?;
        self.permit(request.peer, Privilege::RegisterVM)?;
        let resized = self.served.resize(capacity).map_err(|error| failed(&error))?;
        Ok(Reply::of(
            json!({ "before": resized.from, "capacity": resized.to }),
        ))
    }

    fn resume(&self, peer: &Peer) -> Answered {
        self.permit(peer, Privilege::RegisterVM)?;
        Ok(Reply::of(json!({ "transfers": self.served.resume() })))
    }

    fn watch(&self, request: &Request<'_>) -> Answered {
        self.permit(request.peer, Privilege::ReadKeyServersInfo)?;
        request.watch(INTERFACE, &self.served.events)
    }

    fn permit(&self, peer: &Peer, privilege: Privilege) -> Result<(), MethodError> {
        let used = json!({ "user": peer.user, "process": peer.process, "privilege": privilege });
        if self.grants.allow(peer, privilege, Some(self.served.uuid)) {
            self.served.tell(Event::PrivilegeUsed, used);
            return Ok(());
        }
        if let Some(suppressed) = self.refusals.admit(self.grants.caller(peer), ()) {
            self.served
                .tell(Event::PrivilegeRefused, suppressed.told_in(used));
        }
        let told = json!({ "privilege": privilege, "user": peer.user });
        Err(MethodError::new(INTERFACE, "NotPermitted", told))
    }
}

impl varlink::Interface for Interface {
    fn name(&self) -> &'static str {
        INTERFACE
    }

    fn description(&self) -> &'static str {
        include_str!("org.sealblk.Disk.varlink")
    }

    fn knows(&self, peer: &Peer) -> bool {
        self.grants.know(peer)
    }

    fn call(&self, method: &str, request: Request<'_>) -> Option<Answered> {
        Some(match method {
            "GetStatus" => self.status(),
            "Lock" => self.lock(request.peer),
            "Unlock" => self.unlock(request.peer),
            "Rekey" => self.rekey(request),
            "Resize" => self.resize(request),
            "Resume" => self.resume(request.peer),
            "Watch" => self.watch(&request),
            _ => return None,
        })
    }
}

fn failed(error: &AttachmentError) -> MethodError {
    let reason = match error {
        AttachmentError::Open(error) => error.key().map(|key| key.reason),
        AttachmentError::NoHelper(error) => Some(error.reason),
        _ => None,
    };
    let told = json!({ "message": describe(error), "reason": reason });
    MethodError::new(INTERFACE, "Failed", told)
}

/// An error with what lies under it, on one line.
pub fn describe(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    for cause in causes(error) {
        let said = cause.to_string();
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
    }
    text
}
