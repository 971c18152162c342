//! What the commands of sealblk have in common.
//!
//! ```text
//! usage        wrong arguments
//! secret       secrets from files and descriptors; size, socket_args: other arguments
//! output       a command's result and its failure
//! log          the log; stderr: lines that cannot block; journal: records for the journal; text: one line, without control characters
//! host_args    where the settings of the host are
//! process      settings of a process; executable: where the other one is
//! ```
#![cfg_attr(
    not(test),
    warn(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_possible_wrap,
        clippy::cast_lossless
    )
)]

pub mod executable;
pub mod host_args;
mod journal;
pub mod log;
pub mod output;
pub mod process;
pub mod secret;
pub mod size;
pub mod socket_args;
pub mod stderr;
pub mod text;
pub mod usage;
