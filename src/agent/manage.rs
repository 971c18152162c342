//! What the agent answers to who manages keys and providers: which volumes a key opens, and the taking away of both.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use super::audit_log;
use super::service::{Answered, INTERFACE, MAX_PATH, Service, check_lengths, failure, with};
use crate::audit::{AuditError, AuditLog};
use crate::control::events::Event;
use crate::control::privilege::Privilege;
use crate::control::varlink::{Answer, MethodError, Request};
use crate::keys::registry::{Registry, RegistryError};
use crate::keys::{KeyError, KeyId, KeyReason, Providers, Revocation};
use crate::known::survey::{Scanned, Sighting, survey};
use crate::known::{Disk, GuardError, Known, Removal, Uses, remove_provider, revoke};

/// How much of the list of volumes one answer has: in notes, and in bytes of them.
const PAGE: usize = 200;
const PAGE_BYTES: usize = 24 << 10;

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

/// A volume that is no more, and what its receipt says of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ErasedVolume {
    /// Its UUID.
    pub volume: Uuid,
    /// What held its header, from / on.
    pub path: String,
    /// SHA-256 of its header, as it was.
    pub header_sha256: String,
    /// SHA-256 of what it was written over with.
    pub written_sha256: String,
}

/// Writes to the audit log of a state directory that a volume is no more, where there is no agent.
///
/// # Errors
/// [`AuditError`], above all if an agent has the log.
pub fn record_erased(state_dir: &Path, erased: &ErasedVolume) -> Result<(), AuditError> {
    let user = rustix::process::geteuid().as_raw();
    let subject = serde_json::to_value(erased).expect("texts are JSON");
    AuditLog::open(&audit_log(state_dir))?.record(
        Event::VolumeErased,
        &with(with(subject, "user", user), "process", std::process::id()),
    )
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
        let mut left = listing.known.into_iter().filter(matches).skip(from).peekable();
        let mut bytes = 0;
        let mut page = Vec::new();
        while page.len() < PAGE
            && let Some(known) = left.next_if(|known| {
                bytes += known.key_id.0.len() + known.path.len() + 200;
                page.is_empty() || bytes <= PAGE_BYTES
            })
        {
            page.push(known);
        }
        let next = left.peek().map(|_| from + page.len());
        Ok(Answer::of(Volumes {
            volumes: survey(page),
            next,
            full: listing.full,
        }))
    }

    pub(super) fn scan_volumes(&self, mut request: Request<'_>) -> Answered {
        let ScanVolumes { paths, missing } = request.parameters()?;
        self.permit(request.peer, Privilege::ManageKeys, json!({}))?;
        let paths = paths.iter().map(Path::new).filter(|path| path.is_absolute());
        let scanned: Scanned = self
            .index
            .scan(paths, missing)
            .map_err(|error| unreadable(&error))?;
        Ok(Answer::of(scanned))
    }

    pub(super) fn revoke_kek(&self, mut request: Request<'_>) -> Answered {
        let RevokeKek {
            provider,
            key_id,
            revocation,
            force,
            dry_run,
        } = request.parameters()?;
        check_lengths(&provider, Some(&key_id))?;
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
        check_lengths(&provider, None)?;
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
    pub(super) fn report_erased(&self, mut request: Request<'_>) -> Answered {
        let erased: ErasedVolume = request.parameters()?;
        let lengths = [
            erased.path.len(),
            erased.header_sha256.len(),
            erased.written_sha256.len(),
        ];
        if lengths.iter().any(|len| *len > MAX_PATH) {
            return Err(MethodError::invalid_parameter("path"));
        }
        let any = [Privilege::Access, Privilege::ManageKeys, Privilege::EncryptNew];
        self.permit_any(request.peer, &any, json!({}))?;
        self.audited(
            Event::VolumeErased,
            request.peer,
            serde_json::to_value(&erased).expect("texts are JSON"),
        )?;
        self.index.erased(erased.volume, Path::new(&erased.path));
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
