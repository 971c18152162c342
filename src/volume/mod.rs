//! LUKS2 on storage, and the segment table that maps sectors of a disk to it.

pub mod segment;
