//! What the agent answers to who manages keys and providers: which volumes a key opens, and the taking away of both.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use super::audit_log;
use super::service::{Answered, INTERFACE, MAX_PATH, Service, check_names, failure, with};
use crate::audit::{AuditError, AuditLog};
use crate::control::events::Event;
use crate::control::privilege::Privilege;
use crate::control::varlink::{Answer, MethodError, Request};
use crate::keys::registry::{Registry, RegistryError};
use crate::keys::{KeyError, KeyId, KeyReason, Providers, Revocation};
use crate::known::survey::{Scanned, Sighting, survey};
use crate::known::{Disk, GuardError, Known, Removal, Uses, remove_provider, revoke};

/// How much of a list one answer has, in bytes of its JSON, and what is told of an entry beside what it holds itself.
const PAGE_BYTES: usize = 24 << 10;
const ENTRY_BYTES: usize = 600;

/// How long a SHA-256 is, as text.
const SHA256_DIGITS: usize = 64;

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct ListVolumes {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) provider: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) key_id: Option<KeyId>,
    pub(super) from: usize,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Volumes {
    pub(super) volumes: Vec<Sighting>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) next: Option<usize>,
    pub(super) full: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ScanVolumes {
    pub(super) paths: Vec<String>,
    pub(super) missing: bool,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RevokeKek {
    pub(super) provider: String,
    pub(super) key_id: KeyId,
    pub(super) revocation: Revocation,
    pub(super) force: bool,
    pub(super) dry_run: bool,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RemoveProvider {
    pub(super) provider: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) new_default: Option<String>,
    pub(super) force: bool,
    pub(super) dry_run: bool,
}

/// [`GuardError::InUse`], as the interface has it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct InUse {
    pub(super) what: String,
    pub(super) volumes: Vec<Disk>,
    pub(super) count: usize,
    pub(super) full: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct NotBackedUp {
    pub(super) provider: String,
}

/// How far somebody has come with the erasure of a volume.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Erasure {
    /// The volume's UUID.
    pub volume: Uuid,
    /// What holds its header, from / on.
    pub path: String,
    /// How far.
    #[serde(flatten)]
    pub step: ErasureStep,
}

/// A step of an erasure.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "snake_case", rename_all_fields = "camelCase")]
pub enum ErasureStep {
    /// The volume is about to be erased.
    Begun,
    /// It is no more.
    Erased {
        /// SHA-256 of its header, as it was.
        header_sha256: String,
        /// SHA-256 of what it was written over with.
        written_sha256: String,
    },
    /// Its receipt is complete.
    Receipted {
        /// SHA-256 of the receipt.
        receipt_sha256: String,
    },
}

impl Erasure {
    /// The event that it is, and what that tells.
    fn told(&self) -> (Event, Value) {
        let event = match self.step {
            ErasureStep::Begun => Event::ErasureBegun,
            ErasureStep::Erased { .. } => Event::VolumeErased,
            ErasureStep::Receipted { .. } => Event::ReceiptIssued,
        };
        let mut fields = serde_json::to_value(self).expect("texts are JSON");
        fields.as_object_mut().map(|fields| fields.remove("step"));
        (event, fields)
    }

    fn is_too_long(&self) -> bool {
        let sums: [&str; 2] = match &self.step {
            ErasureStep::Begun => [""; 2],
            ErasureStep::Erased {
                header_sha256,
                written_sha256,
            } => [header_sha256, written_sha256],
            ErasureStep::Receipted { receipt_sha256 } => [receipt_sha256, ""],
        };
        self.path.len() > MAX_PATH || sums.iter().any(|sum| sum.len() > SHA256_DIGITS)
    }
}

/// Writes a step to the audit log of a state directory, where there is no agent.
///
/// # Errors
/// [`AuditError`], above all if an agent has the log.
pub fn record_erasure(state_dir: &Path, erasure: &Erasure) -> Result<(), AuditError> {
    let user = rustix::process::geteuid().as_raw();
    let (event, fields) = erasure.told();
    AuditLog::open(&audit_log(state_dir))?.record(
        event,
        &with(with(fields, "user", user), "process", std::process::id()),
    )
}

/// What one answer has of a list, from the entry of that number on, and where the next one goes on.
pub(super) fn page<T: Serialize>(list: impl Iterator<Item = T>, from: usize) -> (Vec<T>, Option<usize>) {
    let mut left = list.skip(from).peekable();
    let mut bytes = 0;
    let mut page = Vec::new();
    while let Some(entry) = left.next_if(|entry| {
        bytes += ENTRY_BYTES + serde_json::to_vec(entry).map_or(0, |json| json.len());
        page.is_empty() || bytes <= PAGE_BYTES
    }) {
        page.push(entry);
    }
    let next = left.peek().map(|_| from + page.len());
    (page, next)
}

impl Service {
    pub(super) fn list_volumes(&self, mut request: Request<'_>) -> Answered {
        let ListVolumes {
            provider,
            key_id,
            from,
        } = request.parameters()?;
        let either = [Privilege::ManageKeys, Privilege::ReadKeyServersInfo];
        self.permit_any(request.peer, &either, json!({}))?;
        let listing = self.index.list().map_err(|error| unreadable(&error))?;
        let matches = |known: &Known| {
            provider
                .as_ref()
                .is_none_or(|provider| known.provider == *provider)
                && key_id.as_ref().is_none_or(|key_id| known.key_id == *key_id)
        };
        let (known, next) = page(listing.known.into_iter().filter(matches), from);
        Ok(Answer::of(Volumes {
            volumes: survey(known),
            next,
            full: listing.full,
        }))
    }

    pub(super) fn scan_volumes(&self, mut request: Request<'_>) -> Answered {
        let ScanVolumes { paths, missing } = request.parameters()?;
        self.permit(request.peer, Privilege::ManageKeys, json!({}))?;
        if paths.is_empty() {
            let dropped = self.index.sweep(missing).map_err(|error| unreadable(&error))?;
            return Ok(Answer::of(Scanned {
                dropped,
                ..Scanned::default()
            }));
        }
        let paths = paths.iter().map(Path::new).filter(|path| path.is_absolute());
        Ok(Answer::of(self.index.scan(paths)))
    }

    pub(super) fn revoke_kek(&self, mut request: Request<'_>) -> Answered {
        let RevokeKek {
            provider,
            key_id,
            revocation,
            force,
            dry_run,
        } = request.parameters()?;
        check_names(&provider, Some(&key_id))?;
        let subject = json!({
            "provider": provider, "keyId": key_id, "revocation": revocation, "force": force,
        });
        self.permit(request.peer, Privilege::ManageKeys, subject.clone())?;
        let provider = self
            .providers
            .provider(&provider)
            .map_err(|error| failure(&error))?;
        let take_away = |removal| revoke(&*provider, &self.index, &key_id, revocation, &removal);
        let guarded = Removal {
            force,
            dry_run: true,
            ..Removal::default()
        };
        take_away(guarded).map_err(|error| self.guarded(error))?;
        if dry_run {
            return Ok(Answer::of(json!({})));
        }
        self.audited(Event::KeyRevoked, request.peer, subject.clone())?;
        // What was seen just now need not be seen again.
        let reach = match take_away(Removal {
            force: true,
            ..Removal::default()
        }) {
            Err(GuardError::Key(error)) => self.judged(request.peer, &subject, Err(error))?,
            result => result.map_err(|error| self.guarded(error))?,
        };
        Ok(Answer::of(json!({ "reach": reach })))
    }

    pub(super) fn remove_provider(&self, mut request: Request<'_>) -> Answered {
        let RemoveProvider {
            provider,
            new_default,
            force,
            dry_run,
        } = request.parameters()?;
        check_names(&provider, None)?;
        let subject = json!({ "provider": provider, "force": force });
        self.permit(request.peer, Privilege::ManageKeyServers, subject.clone())?;
        let mut registry =
            Registry::open(self.providers.dir()).map_err(|error| self.guarded(error.into()))?;
        let mut take_away = |removal| remove_provider(&mut registry, &provider, &removal);
        let removal = Removal {
            new_default: new_default.as_deref(),
            force,
            dry_run: true,
        };
        take_away(removal).map_err(|error| self.guarded(error))?;
        if !dry_run {
            self.audited(Event::ProviderRemoved, request.peer, subject)?;
            take_away(Removal {
                dry_run: false,
                ..removal
            })
            .map_err(|error| self.guarded(error))?;
            self.providers.refresh();
        }
        Ok(Answer::of(json!({})))
    }

    /// Takes the caller's word for it: that somebody says so, stands in the log with who it was.
    pub(super) fn report_erasure(&self, mut request: Request<'_>) -> Answered {
        let erasure: Erasure = request.parameters()?;
        if erasure.is_too_long() {
            return Err(MethodError::invalid_parameter("path"));
        }
        let any = [Privilege::Access, Privilege::ManageKeys, Privilege::EncryptNew];
        self.permit_any(request.peer, &any, json!({}))?;
        let (event, fields) = erasure.told();
        self.audited(event, request.peer, fields)?;
        if let ErasureStep::Erased { .. } = erasure.step {
            self.index.erased(erasure.volume, Path::new(&erasure.path));
        }
        Ok(Answer::of(json!({})))
    }

    /// A refusal on the wire.
    fn guarded(&self, error: GuardError) -> MethodError {
        match error {
            GuardError::InUse { what, uses } => {
                let Uses { volumes, count, full } = uses;
                let told = InUse {
                    what,
                    volumes,
                    count,
                    full,
                };
                MethodError::new(INTERFACE, "InUse", told)
            }
            GuardError::NotBackedUp(provider) => {
                MethodError::new(INTERFACE, "NotBackedUp", NotBackedUp { provider })
            }
            GuardError::Key(error) | GuardError::Registry(RegistryError::Key(error)) => failure(&error),
            GuardError::Registry(error) => {
                let location = self.providers.dir().display();
                failure(&KeyError::new("", location, KeyReason::Invalid).because(error))
            }
            GuardError::Index { source, .. } => unreadable(&source),
        }
    }
}

fn unreadable(error: &std::io::Error) -> MethodError {
    let why: Value = with(json!({}), "reason", error.to_string());
    MethodError::new(INTERFACE, "NoVolumes", why)
}
