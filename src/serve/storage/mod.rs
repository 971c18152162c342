//! Files and block devices, the io_uring engine, and the buffer pool.

mod access;
mod backing;
mod capabilities;
mod claim;
mod engine;
mod header_io;
mod loss;
mod ofd_lock;
mod policy;
mod pool;
mod reopen;
mod ring_pool;
mod stacking;
mod this_host;

pub use access::{Access, StorageError};
pub use backing::{Backing, DataFile, NotBorrowed};
pub use capabilities::{Kind, Protection, opening_acts};
pub use claim::{Attached, Claim, Fence, Lent, Others, Unclaimed};
pub use engine::{Done, Engine, Event};
pub use policy::{Answer, Policy, is_full};
pub use pool::{Buffer, PAGE};
pub use ring_pool::{RingPool, restrict};
pub use this_host::ThisHost;
