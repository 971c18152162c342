//! Files and block devices, the io_uring engine, and the buffer pool.

mod backing;

pub use backing::{Access, Backing, DataFile, Kind, StorageError};
