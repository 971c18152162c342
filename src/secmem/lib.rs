//! Memory and files for keys: the arena that keys live in, private files, and what the process forbids others.

pub mod arena;
pub mod harden;
pub mod private_file;
