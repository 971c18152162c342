//! Files and block devices, the io_uring engine, and the buffer pool.

#![warn(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap,
    clippy::cast_lossless
)]

mod backing;
mod capabilities;
mod claim;
mod engine;
mod header_io;
mod loss;
mod pool;

pub use backing::{Access, Backing, DataFile, Kind, StorageError};
pub use capabilities::{Protection, opening_acts};
pub use engine::{Done, Engine, Event};
pub use pool::{Buffer, PAGE};
