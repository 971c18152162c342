//! The control sockets: how other programs ask a process of ours to do something, and who may.
//!
//! They speak the varlink wire protocol: JSON objects over a Unix socket, each ended by a NUL byte, with an interface
//! that describes itself. Any varlink client can call what needs no descriptor.
//!
//! ```text
//! wire       messages, and descriptors beside them: a secret goes through a pipe, never through JSON
//! varlink    calls, replies and errors; what every service answers
//! events     what happens, told to the log and to whoever watches
//! server     callers, each with a thread, within bounds (places)
//! socket     where a process listens, and the signals that end it
//! manager    what the service manager is told
//! peer       who is at the other end, as the kernel knows it; privilege: what they may do
//! refusals   which refusals are told, since some may come without end
//! ```

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
