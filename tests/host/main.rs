//! The processes of a host: how they start, confine themselves and end, who may ask them for what, and what they tell.

mod agent;
#[path = "../providers/certificates.rs"]
mod certificates;
mod deployment;
mod disks;
mod events;
mod executables;
mod header_reader;
mod key_helper;
mod locking;
mod mistakes;
mod parsers;
mod privileges;
mod readiness;
mod sandbox;
mod sealing;
mod secrets;
mod serve_failures;
mod sockets;
#[cfg(target_arch = "x86_64")]
mod taken_over;
