//! What the guest sees: a virtio-blk device (virtio 1.2 §5.2) over vhost-user (QEMU's vhost-user specification).
//!
//! # The files
//!
//! A file relies on files below it, never on one above it.
//!
//! ```text
//! server            the socket that front-ends connect to, one at a time, and signals
//! peers             which front-end may have the disk
//! session           one front-end's connection, from its first message to its end
//! interceptor       each message of the front-end: received, decoded, checked, passed on, answered
//! record            what it has said, as far as it holds
//! handover          another process continues a session
//! checks            messages that the protocol handler would accept and that we cannot serve
//! handler           the connection to vhost-user-backend's protocol handler: the one way to change what I/O stands on
//! rings             which rings are served, and the guard of those that are paused
//! vring             a vring as the protocol handler knows it, from which a ring is started
//! worker_thread     the thread that serves a ring
//! worker            its rounds: events, new chains, the notification, sleep
//! path              the path of a request
//! polling           how long a worker looks for work before it sleeps
//! task              requests in hand, and their pieces in flight
//! request           a descriptor chain becomes a request
//! guise             the disk as the guest sees it
//! config            feature bits, and the configuration space
//! disk              what all workers share; it has a segment table, or it is locked
//! claims            the claim on its storage, without which no ring is served
//! frontend_message  the front-end's messages, decoded, and the table of what each pauses
//! message           a message as bytes with descriptors
//! foreign           the descriptors that a front-end passes, and what is behind each
//! ring, call        a started virtqueue, and how its driver is notified
//! inflight          which chains are in flight, in memory that outlives this process
//! resumption        the chains that an earlier process has left in flight
//! left              their end, if nothing would carry them out any more
//! held              which transfers wait, since storage has failed them
//! guest, sigbus     guest memory, and a front-end that takes it away
//! dirty_log         the log of what was written to it, by which a front-end migrates the guest
//! uring             what an operator does where io_uring cannot be set up
//! hostile           guests and front-ends that do anything, for tests and fuzz targets alone
//! limits, blame     what guest and front-end may ask for at most; how loud the log is about what they do wrong
//! ```
//!
//! # The path of a request
//!
//! The driver writes a chain of descriptors into guest memory, puts the chain's head into the available ring, and kicks the
//! queue. The queue's worker wakes up, unless it was looking for work anyway. It takes the chain and parses it into a request: a
//! copy in our memory, so that the guest cannot change what was checked. A chain that is not valid is answered at once.
//!
//! A request is carried out in pieces of at most 128 KiB. For each piece, the worker asks the segment table once where the
//! sectors lie and under which key. The table's answer, an extent, travels with the piece to its end. A piece with data takes a
//! buffer from the queue's pool. For a write, the cipher reads guest memory and writes ciphertext into the buffer, and io_uring
//! writes the buffer to storage. For a read, io_uring fills the buffer. So guest memory never holds ciphertext, and a buffer of
//! an encrypted disk never holds plaintext.
//!
//! The worker learns that a piece has ended in the place where it also waits for kicks. The cipher decrypts a read's buffer into
//! guest memory, and the buffer goes back to the pool. After the last piece of a request the worker writes the status byte and
//! puts the head into the used ring. At the end of the round it notifies the driver by the queue's call, if the driver wants
//! that.
//!
//! While a front-end migrates the guest, each page of guest memory that was written to is marked in the front-end's dirty log, after
//! the write: by the type that stands for guest memory, so that no write can leave it out.
//!
//! When the pool or the table of requests is exhausted, chains wait in the available ring; nothing grows with what a guest
//! asks for.
//!
//! # What I/O stands on
//!
//! A worker serves a ring by the vring's addresses and descriptors, the mapped guest memory, the dirty log, the features that
//! front-end and driver agreed on, the disk's segment table, and the claim on its storage. While a ring runs, none of them changes.
//! The worker has the ring by value and gives it back when no I/O is under way. A message of the front-end that changes one of
//! these is applied while the rings are paused (`rings::Paused`). `lock` takes the segment table away, and waits until each worker
//! has given it back.

mod blame;
mod call;
mod checks;
mod claims;
mod config;
mod dirty_log;
mod disk;
mod foreign;
mod frontend_message;
mod guest;
mod guise;
mod handler;
mod handover;
mod held;
#[cfg(any(test, fuzzing))]
pub mod hostile;
mod inflight;
mod interceptor;
mod left;
mod limits;
mod message;
mod path;
mod peers;
mod polling;
mod record;
mod request;
mod resumption;
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

pub use claims::{ClaimPast, Claims, Kept, LentClaim, NotClaimed, NotLent, Observer, Standing};
pub use disk::{Disk, Loan};
pub use guise::{Guise, NotTheSame};
pub use handover::{Answer, Given, Handover, NotHandedOver, Served};
pub use held::{Held, HeldBy};
pub use limits::{DEFAULT_POLL_MAX, DEFAULT_POOL_PAGES, DEFAULT_STOP_LIMIT};
pub use message::{Message, MessageError};
pub use peers::{Peers, Registered};
pub use server::{Endpoint, Ready, ServeError, Server, Waited};
