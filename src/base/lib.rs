//! What every package of sealblk stands on, and what knows nothing of disks and keys.

pub mod apart;
pub mod boot_time;
pub mod closer;
pub mod deadline;
pub mod error_chain;
pub mod harmless;
pub mod mounts;
pub mod mutex;
pub mod parsing;
pub mod path_text;
pub mod sector;
pub mod timestamp;
