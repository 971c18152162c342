//! The messages about keys of the interface `org.sealblk.Agent`, for both sides: the host's agent, or a disk's key helper, and those
//! who ask them.

use sealblk_base::error_chain::causes;
use sealblk_control::wire;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Binding, KeyError, KeyId, KeyReason, RequestPurpose, Revocation};

/// The interface's name.
pub const INTERFACE: &str = "org.sealblk.Agent";

/// The longest name of a provider that anybody has.
pub const MAX_NAME: usize = 64;
/// The longest key ID that anybody has: a server's identifier of 1 KiB and a wrapped key. What is longer must not fill the log.
const MAX_KEY_ID: usize = 2048;
/// The longest path of a volume (`PATH_MAX`).
pub const MAX_PATH: usize = 4096;
/// The longest wrapped secret. Memory for keys is scarce, and is taken before anything is authenticated.
pub const MAX_WRAPPED: usize = wire::MAX_SECRET + 256;

/// [`Binding`], as the interface has it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WireBinding {
    pub volume: Uuid,
    pub provider: String,
    pub key_id: KeyId,
    pub keyslot: u32,
}

impl WireBinding {
    pub fn binding(&self) -> Binding<'_> {
        Binding {
            volume: self.volume,
            provider: &self.provider,
            key_id: &self.key_id,
            keyslot: self.keyslot,
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
pub struct DefaultProvider {
    pub purpose: RequestPurpose,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct CreateKek {
    pub provider: String,
    pub purpose: RequestPurpose,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Wrap {
    pub binding: WireBinding,
    pub purpose: RequestPurpose,
    pub secret: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct SettleBinding {
    pub binding: WireBinding,
    pub purpose: RequestPurpose,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    pub stored: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Unwrap {
    pub binding: WireBinding,
    pub purpose: RequestPurpose,
    pub wrapped: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// The process that serves the volume, if that is the caller's parent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<u32>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Detach {
    pub volume: Uuid,
    /// As for [`Unwrap`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<u32>,
    /// Whether it has served the volume; earlier builds do not say.
    #[serde(default)]
    pub served: Option<bool>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Kek {
    pub provider: String,
    pub key_id: KeyId,
    /// In milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_age: Option<u64>,
    /// Only what the agent knows without asking the provider.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub here: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct NamedProvider {
    pub provider: String,
}

/// [`KeyError`], as the interface has it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KeyFailure {
    pub provider: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_id: Option<KeyId>,
    pub hop: String,
    pub reason: KeyReason,
    pub causes: Vec<String>,
}

impl KeyFailure {
    pub fn of(error: &KeyError) -> Self {
        Self {
            provider: error.provider.clone(),
            key_id: error.key_id.clone(),
            hop: error.hop.clone(),
            reason: error.reason,
            causes: causes(error).map(ToString::to_string).collect(),
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RevokeKek {
    pub provider: String,
    pub key_id: KeyId,
    pub revocation: Revocation,
    pub force: bool,
    pub dry_run: bool,
}

/// Whether a provider may have such a key: all key IDs are visible ASCII, which JSON writes as it is.
pub fn may_be(key_id: &KeyId) -> bool {
    key_id.0.len() <= MAX_KEY_ID && key_id.0.bytes().all(|byte| byte.is_ascii_graphic())
}
