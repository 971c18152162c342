//! What is known of the backup of a native provider's primary key.

use serde::{Deserialize, Serialize};

/// Whether a primary key was backed up. Until it was, it is for no new volumes, unless somebody has waived that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backup {
    /// It was not.
    #[default]
    None,
    /// It was, and what was written was seen to hold the key.
    Taken,
    /// It was not, and somebody does without.
    Waived,
}
