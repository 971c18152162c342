//! What goes over the agent's socket, as the interface `org.sealblk.Agent` has it: both sides write and read these.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Purpose;
use super::registered::Registrant;
use crate::control::wire;
use crate::error_chain::causes;
use crate::inventory;
use crate::inventory::{Disk, Share};
use crate::keys::{Binding, KeyError, KeyId, KeyReason, Revocation};

/// The interface's name.
pub const INTERFACE: &str = "org.sealblk.Agent";

/// The longest key ID that anybody has: a server's identifier of 1 KiB and a wrapped key. What is longer must not fill the log.
const MAX_KEY_ID: usize = 2048;
/// The longest path of a volume (`PATH_MAX`).
pub(super) const MAX_PATH: usize = 4096;
/// The longest wrapped secret. Memory for keys is scarce, and is taken before anything is authenticated.
pub(super) const MAX_WRAPPED: usize = wire::MAX_SECRET + 256;

/// [`Binding`], as the interface has it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct WireBinding {
    pub(super) volume: Uuid,
    pub(super) provider: String,
    pub(super) key_id: KeyId,
    pub(super) keyslot: u32,
}

impl WireBinding {
    pub(super) fn binding(&self) -> Binding<'_> {
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
pub(super) struct ListDisks {
    pub(super) from: usize,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Disks {
    pub(super) disks: Vec<Registrant>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) next: Option<usize>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct DefaultProvider {
    pub(super) purpose: Purpose,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct CreateKek {
    pub(super) provider: String,
    pub(super) purpose: Purpose,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Wrap {
    pub(super) binding: WireBinding,
    pub(super) purpose: Purpose,
    pub(super) secret: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) path: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SettleBinding {
    pub(super) binding: WireBinding,
    pub(super) purpose: Purpose,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) path: Option<String>,
    pub(super) stored: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Unwrap {
    pub(super) binding: WireBinding,
    pub(super) purpose: Purpose,
    pub(super) wrapped: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) path: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Kek {
    pub(super) provider: String,
    pub(super) key_id: KeyId,
    /// In milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) max_age: Option<u64>,
    /// Only what the agent knows without asking the provider.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) here: bool,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PushKek {
    pub(super) provider: String,
    pub(super) key_id: KeyId,
    pub(super) kek: usize,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct NamedProvider {
    pub(super) provider: String,
}

/// [`KeyError`], as the interface has it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct KeyFailure {
    pub(super) provider: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) key_id: Option<KeyId>,
    pub(super) hop: String,
    pub(super) reason: KeyReason,
    pub(super) causes: Vec<String>,
}

impl KeyFailure {
    pub(super) fn of(error: &KeyError) -> Self {
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
pub(super) struct ListVolumes {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) volume: Option<Uuid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) provider: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) key_id: Option<KeyId>,
    pub(super) from: usize,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Volumes {
    pub(super) volumes: Vec<inventory::Entry>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) next: Option<usize>,
    pub(super) full: bool,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) crowded: Vec<Share>,
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

/// Whether a provider may have such a key: all key IDs are visible ASCII, which JSON writes as it is.
pub(super) fn may_be(key_id: &KeyId) -> bool {
    key_id.0.len() <= MAX_KEY_ID && key_id.0.bytes().all(|byte| byte.is_ascii_graphic())
}
