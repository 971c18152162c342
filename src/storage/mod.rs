//! Files and block devices, the io_uring engine, and the buffer pool.

mod backing;
mod engine;
mod loss;
mod pool;

pub use backing::{Access, Backing, DataFile, Kind, StorageError};
pub use engine::{Done, Engine, Event};
pub use pool::{Buffer, PAGE};
