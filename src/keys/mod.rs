//! Keys: where they come from (providers), how they are wrapped, and the memory that they live in.

pub mod arena;
pub mod harden;
