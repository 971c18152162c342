//! The records of an erasure in the audit log: the caller reports each step.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use super::audit_log;
use super::service::with;
use crate::audit::{AuditError, AuditLog};
use crate::control::events::Event;
use crate::keys::protocol::MAX_PATH;
use crate::path_text::from_text;

/// How long a SHA-256 is, as text.
const SHA256_DIGITS: usize = 64;

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
    pub(super) fn told(&self) -> (Event, Value) {
        let event = match self.step {
            ErasureStep::Begun => Event::ErasureBegun,
            ErasureStep::Erased { .. } => Event::VolumeErased,
            ErasureStep::Receipted { .. } => Event::ReceiptIssued,
        };
        let mut fields = serde_json::to_value(self).expect("texts are JSON");
        fields.as_object_mut().map(|fields| fields.remove("step"));
        (event, fields)
    }

    pub(super) fn is_too_long(&self) -> bool {
        let sums: [&str; 2] = match &self.step {
            ErasureStep::Begun => [""; 2],
            ErasureStep::Erased {
                header_sha256,
                written_sha256,
            } => [header_sha256, written_sha256],
            ErasureStep::Receipted { receipt_sha256 } => [receipt_sha256, ""],
        };
        from_text(&self.path).as_os_str().len() > MAX_PATH || sums.iter().any(|sum| sum.len() > SHA256_DIGITS)
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
