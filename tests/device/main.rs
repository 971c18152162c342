//! What a guest and a front-end see of a served disk: requests, messages, memory, sessions, and what reaches storage.

mod config;
mod content;
mod dirty_log;
mod discard;
mod drain;
mod driver;
mod killed;
mod libblkio;
mod lifecycle;
mod log;
mod null;
mod plain;
mod protocol;
mod requests;
mod sessions;
mod shared;
mod soak;
mod storage;
mod upgrade;
