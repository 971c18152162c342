//! Files and block devices, the io_uring engine, and the buffer pool.

mod backing;
mod capabilities;
mod claim;
mod engine;
mod loss;
mod mounts;
mod pool;

pub use backing::{Access, Backing, DataFile, FileLock, Kind, StorageError};
pub use capabilities::{Protection, opening_acts};
pub use engine::{Done, Engine, Event};
pub use mounts::Mount;
pub use pool::{Buffer, PAGE};
