//! sealblk: VM encryption for QEMU/KVM.
//!
//! A vhost-user-blk backend that stands between a guest's virtio disk and the storage under it. Upper modules know
//! the lower ones, never the reverse:
//!
//! ```text
//! cli          a file for each verb
//! agent        the host's key agent, and its client
//! broker       releases keys to hosts that attest an allowed state; kbs: the protocol that they speak
//! audit        a log that shows tampering
//! control      the sockets on which sealblk's processes answer, and what each caller may ask for
//! attachment   a volume that is being served: its key comes, goes and is changed
//! device       what the guest sees: virtio-blk over vhost-user
//! inventory    the volumes that this host has bound or opened: hints, each checked against the volume itself
//! volume       LUKS2 on storage, and the segment table that maps sectors to it
//! cipher, storage, keys, tpm
//! timestamp, toml_file, path_text   how bytes, points in time, settings and paths are written
//! boot_time                the clock that limits the life of secrets
//! apart, probe             threads that wait for files that may never answer
//! error_chain, mutex, deadline, closer   the causes of an error; a lock after a panic; a time limit for a whole message;
//!                                        a thread that closes what others can hold up
//! parsing                  JSON and TOML, read so that no error quotes them
//! ```
//!
//! To begin with: a guest's request from end to end is `device::path`; what becomes of a volume's key while it is served,
//! [`attachment`]; what opens a keyslot, [`keys`]; what the agent is asked, [`agent`].

pub mod agent;
mod apart;
pub mod attachment;
mod audit;
mod boot_time;
pub mod broker;
pub mod cipher;
pub mod cli;
mod closer;
pub mod control;
mod deadline;
pub mod device;
mod error_chain;
pub mod inventory;
pub mod kbs;
pub mod keys;
mod mutex;
mod parsing;
pub mod path_text;
mod probe;
pub mod storage;
pub mod timestamp;
mod toml_file;
pub mod tpm;
pub mod volume;
