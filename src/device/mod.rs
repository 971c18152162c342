//! What the guest sees: virtio-blk over vhost-user (virtio 1.2 §5.2, and QEMU's vhost-user specification).
//!
//! A request's path is [`path`], and is one page; what lies around it:
//!
//! ```text
//! server    accepts front-ends, one at a time, and handles signals
//! session   one front-end's connection
//! interceptor  its messages: stops the rings before a message that changes what I/O stands on
//! foreign   its descriptors, and what is behind each
//! rings     which rings are served
//! worker    one thread for each: the data path
//! polling   when it looks for work, and when it sleeps          call      how it notifies the driver
//! request   descriptor chain -> validated request        guest     its buffers
//! uring     what to do where io_uring cannot be set up
//! config    features and configuration space             disk      what all workers share
//! ```

mod call;
mod checks;
mod config;
mod disk;
mod foreign;
mod frontend_message;
mod guest;
mod handler;
mod interceptor;
mod limits;
mod message;
mod path;
mod polling;
mod request;
mod ring;
mod rings;
mod server;
mod session;
mod sigbus;
mod task;
mod uring;
mod vring;
mod worker;
mod worker_thread;

pub use disk::Disk;
pub use limits::{DEFAULT_POLL_MAX, DEFAULT_POOL_PAGES};
pub use server::{Endpoint, ServeError, Server, Waited};
