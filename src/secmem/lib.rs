//! Memory and files for keys: the arena that keys live in, private files, and what the process forbids others.
#![cfg_attr(
    not(test),
    warn(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_possible_wrap,
        clippy::cast_lossless
    )
)]

pub mod arena;
pub mod harden;
pub mod private_file;
