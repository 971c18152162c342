//! sealblk: VM encryption for QEMU/KVM.
//!
//! A vhost-user-blk back-end between a guest's virtio disk and the storage under it. Upper modules know
//! the lower ones, never the reverse:
//!
//! ```text
//! cli          a file for each verb
//! agent        the host's key agent, and its client
//! broker       releases keys to hosts that attest an allowed state; kbs: the protocol that they speak
//! audit        a log that shows tampering
//! control      the sockets on which sealblk's processes answer, and what each caller may ask for
//! attachment   a volume that is being served: its key comes, goes and is changed
//! key_helper   the process that gets a served disk's keys, and the way to it
//! device       what the guest sees: virtio-blk over vhost-user
//! inventory    the volumes that this host has bound or opened: hints, each checked against the volume itself
//! storage      files and block devices: claims on them, what they can do, and the io_uring engine
//! volume       LUKS2, and the segment table that maps sectors to it
//! keys, tpm
//! toml_file    how settings are written; probe: threads that wait for files that may never answer
//!
//! and packages of their own, which know nothing of the above:
//! sealblk-xts      XTS-AES-256 over sectors (here `cipher`)
//! sealblk-secmem   memory and files for keys (in `keys`)
//! sealblk-base     what every package stands on: errors, JSON, time, threads
//! ```
//!
//! To begin with: a guest's request from end to end is `device::path`; what becomes of a volume's key while it is served,
//! [`attachment`]; where it comes from, [`key_helper`]; what opens a keyslot, [`keys`]; what the agent is asked, [`agent`].

pub mod agent;
pub mod attachment;
mod audit;
pub mod broker;
pub mod cli;
pub mod control;
pub mod device;
pub mod inventory;
pub mod kbs;
pub mod key_helper;
pub mod keys;
mod probe;
pub mod storage;
mod toml_file;
pub mod tpm;
pub mod volume;

pub use sealblk_base::{
    apart, boot_time, closer, deadline, error_chain, mutex, parsing, path_text, timestamp,
};
pub use sealblk_xts as cipher;
