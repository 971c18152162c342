//! What every package of sealblk stands on, and what knows nothing of disks and keys.
#![cfg_attr(
    not(test),
    warn(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_possible_wrap,
        clippy::cast_lossless
    )
)]

pub mod apart;
pub mod blame;
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
pub mod size;
pub mod timestamp;
