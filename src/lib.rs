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
//! attachment   a volume that is being served: its key comes, goes and is changed
//! key_helper   the process that gets a served disk's keys, and the way to it
//! sandbox      confines a process that serves a disk
//! device       what the guest sees: virtio-blk over vhost-user
//! inventory    the volumes that this host has bound or opened: hints, each checked against the volume itself
//! storage      files and block devices: claims on them, what they can do, and the io_uring engine
//! map          where each sector of a disk lies in its file, and what is done to it on the way
//! providers    the key providers of a host: native, KMIP, transit, trusted
//! tpm          the TPM of a host
//! toml_file    how settings are written; probe: threads that wait for files that may never answer
//!
//! and packages of their own, which know nothing of the above:
//! sealblk-control  the sockets on which sealblk's processes answer, and what each caller may ask for (here `control`)
//! sealblk-keys     what a key provider is; volumes and the KEKs that open them; the protocol between processes (here `keys`)
//! sealblk-luks2    LUKS2 headers (here `luks2`)
//! sealblk-xts      XTS-AES-256 over sectors (here `cipher`)
//! sealblk-secmem   memory and files for keys
//! sealblk-base     what every package stands on: errors, JSON, time, threads
//! ```
//!
//! Where to begin: `device::path` has the whole path of a guest's request, [`attachment`] the life of a volume's key while
//! the volume is served, [`key_helper`] the way to that key, [`keys`] the keys that open keyslots, and [`agent`] the agent's
//! methods.

pub mod agent;
pub mod attachment;
mod audit;
pub mod broker;
pub mod cli;
pub mod device;
pub mod inventory;
pub mod kbs;
pub mod key_helper;
pub mod map;
mod probe;
pub mod providers;
pub mod sandbox;
pub mod storage;
mod toml_file;
pub mod tpm;

pub use sealblk_base::{
    apart, boot_time, closer, deadline, error_chain, harmless, mutex, parsing, path_text, timestamp,
};
pub use sealblk_control as control;
pub use sealblk_keys as keys;
pub use sealblk_luks2 as luks2;
pub use sealblk_xts as cipher;
