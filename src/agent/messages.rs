//! The messages of the interface `org.sealblk.Agent`, for both sides of the agent's socket.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::RequestPurpose;
use super::registered::Registrant;
use crate::control::wire;
use crate::error_chain::causes;
use crate::inventory;
use crate::inventory::{Disk, Share};
use crate::keys::{Binding, KeyError, KeyId, KeyReason, Revocation};

/// The interface's name.
pub const INTERFACE: &str = "org.sealblk.Agent";

/// The longest name of a provider that anybody has.
pub(crate) const MAX_NAME: usize = 64;
/// The longest key ID that anybody has: a server's identifier of 1 KiB and a wrapped key. What is longer must not fill the log.
const MAX_KEY_ID: usize = 2048;
/// The longest path of a volume (`PATH_MAX`).
pub(crate) const MAX_PATH: usize = 4096;
/// The longest wrapped secret. Memory for keys is scarce, and is taken before anything is authenticated.
pub(crate) const MAX_WRAPPED: usize = wire::MAX_SECRET + 256;

/// [`Binding`], as the interface has it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct WireBinding {
    pub(crate) volume: Uuid,
    pub(crate) provider: String,
    pub(crate) key_id: KeyId,
    pub(crate) keyslot: u32,
}

impl WireBinding {
    pub(crate) fn binding(&self) -> Binding<'_> {
        Binding {
            volume: self.volume,
            provider: &self.provider,
            key_id: &self.key_id,
            keyslot: self.keyslot,
        }
    }
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ListDisks {
    pub(crate) from: usize,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Disks {
    pub(crate) disks: Vec<Registrant>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) next: Option<usize>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct DefaultProvider {
    pub(crate) purpose: RequestPurpose,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct CreateKek {
    pub(crate) provider: String,
    pub(crate) purpose: RequestPurpose,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Wrap {
    pub(crate) binding: WireBinding,
    pub(crate) purpose: RequestPurpose,
    pub(crate) secret: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) path: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SettleBinding {
    pub(crate) binding: WireBinding,
    pub(crate) purpose: RequestPurpose,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) path: Option<String>,
    pub(crate) stored: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Unwrap {
    pub(crate) binding: WireBinding,
    pub(crate) purpose: RequestPurpose,
    pub(crate) wrapped: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) path: Option<String>,
    /// The process that serves the volume, if that is the caller's parent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) process: Option<u32>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Kek {
    pub(crate) provider: String,
    pub(crate) key_id: KeyId,
    /// In milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) max_age: Option<u64>,
    /// Only what the agent knows without asking the provider.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) here: bool,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PushKek {
    pub(crate) provider: String,
    pub(crate) key_id: KeyId,
    pub(crate) kek: usize,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct NamedProvider {
    pub(crate) provider: String,
}

/// [`KeyError`], as the interface has it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct KeyFailure {
    pub(crate) provider: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) key_id: Option<KeyId>,
    pub(crate) hop: String,
    pub(crate) reason: KeyReason,
    pub(crate) causes: Vec<String>,
}

impl KeyFailure {
    pub(crate) fn of(error: &KeyError) -> Self {
        Self {
            provider: error.provider.clone(),
            key_id: error.key_id.clone(),
            hop: error.hop.clone(),
            reason: error.reason,
            causes: causes(error).map(ToString::to_string).collect(),
        }
    }
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ListVolumes {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) volume: Option<Uuid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) provider: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) key_id: Option<KeyId>,
    pub(crate) from: usize,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Volumes {
    pub(crate) volumes: Vec<inventory::Entry>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) next: Option<usize>,
    pub(crate) full: bool,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) crowded: Vec<Share>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ScanVolumes {
    pub(crate) paths: Vec<String>,
    pub(crate) missing: bool,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct RevokeKek {
    pub(crate) provider: String,
    pub(crate) key_id: KeyId,
    pub(crate) revocation: Revocation,
    pub(crate) force: bool,
    pub(crate) dry_run: bool,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct RemoveProvider {
    pub(crate) provider: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) new_default: Option<String>,
    pub(crate) force: bool,
    pub(crate) dry_run: bool,
}

/// [`GuardError::InUse`], as the interface has it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct InUse {
    pub(crate) what: String,
    pub(crate) volumes: Vec<Disk>,
    pub(crate) count: usize,
    pub(crate) full: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct NotBackedUp {
    pub(crate) provider: String,
}

/// Whether a provider may have such a key: all key IDs are visible ASCII, which JSON writes as it is.
pub(crate) fn may_be(key_id: &KeyId) -> bool {
    key_id.0.len() <= MAX_KEY_ID && key_id.0.bytes().all(|byte| byte.is_ascii_graphic())
}
