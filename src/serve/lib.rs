//! The process that serves a disk to a guest.
//!
//! ```text
//! command      the command `vhost-user-sealblk`
//! attachment   a volume that is being served: its key comes, goes and is changed
//! upgrade      another process continues to serve the disk
//! key_helper   the process that gets a served disk's keys, and the way to it
//! sandbox      confines a process that serves a disk
//! device       what the guest sees: virtio-blk over vhost-user
//! map          where each sector of a disk lies in its file, and what is done to it on the way
//! hostile      callers, key helpers and other processes that say anything, for tests and fuzz targets alone
//! storage      files and block devices: claims on them, what they can do, and the io_uring engine
//! ```
//!
//! A guest and a front-end can attack this process. So this package links no TLS, HTTP, KMIP, TPM or name service code, and none
//! that reads a configuration: keys, grants and the numbers of groups come from another process, by one socket.
#![cfg_attr(
    not(test),
    warn(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_possible_wrap,
        clippy::cast_lossless
    )
)]

pub mod attachment;
pub mod command;
pub mod device;
#[cfg(any(test, fuzzing))]
pub mod hostile;
pub mod key_helper;
pub mod map;
pub mod sandbox;
pub mod storage;
pub mod upgrade;

use sealblk_base::{closer, deadline, error_chain, mutex, parsing, path_text, timestamp};
use sealblk_control as control;
use sealblk_keys as keys;
use sealblk_luks2 as luks2;
use sealblk_xts as cipher;
