//! The control sockets: other programs send calls to a process of sealblk, which checks their privileges.
//!
//! They speak the varlink wire protocol: JSON objects over a Unix socket, each ended by a NUL byte, with an interface
//! that describes itself. Any varlink client can call the methods that need no descriptor.
//!
//! ```text
//! wire       messages, and descriptors with them: a secret goes through a pipe, never through JSON
//! varlink    calls, replies and errors; the methods of every service
//! events     events, for the log and for watchers
//! server     callers, each with a thread, within limits (quota)
//! socket     the sockets of a process, and the signals that end it
//! manager    notifications to the service manager
//! datagram   how they, and records of the journal, are sent
//! peer       the credentials of the caller, from the kernel; privilege: its privileges
//! rate_limit the rate limit of refusal records
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

pub mod datagram;
pub mod events;
pub mod manager;
pub mod peer;
pub mod privilege;
pub mod quota;
pub mod rate_limit;
pub mod server;
pub mod socket;
pub mod varlink;
pub mod wire;
