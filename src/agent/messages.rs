//! The messages of the interface `org.sealblk.Agent` for the management of keys and disks. Those about a volume's keys are in
//! [`crate::providers::protocol`].

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::registered::Registrant;
use crate::inventory::{Disk, Entry, Share};
use crate::keys::KeyId;

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
#[serde(rename_all = "camelCase")]
pub(crate) struct PushKek {
    pub(crate) provider: String,
    pub(crate) key_id: KeyId,
    pub(crate) kek: usize,
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
    pub(crate) volumes: Vec<Entry>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) next: Option<usize>,
    pub(crate) full: bool,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) crowded: Vec<Share>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ForgetVolume {
    pub(crate) volume: Uuid,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ScanVolumes {
    pub(crate) paths: Vec<String>,
    pub(crate) missing: bool,
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
