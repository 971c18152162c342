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
//! disks        the disks that a host has defined
//! inventory    the volumes that this host has bound or opened: hints, each checked against the volume itself
//! providers    the key providers of a host: native, KMIP, transit, trusted
//! tpm          the TPM of a host
//! toml_file    how settings are written; probe: looks at paths that may never answer
//!
//! and packages of their own, which know nothing of the above:
//! sealblk-serve    what a guest sees of a disk, its storage, its key's life and confinement (here `device`, `storage`, `map`,
//!                  `attachment`, `key_helper`, `sandbox`); it is also the program `vhost-user-sealblk`, which `sealblk serve` executes
//! sealblk-command  what the two programs have in common: arguments, output, log
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
mod audit;
pub mod broker;
pub mod cli;
pub mod disks;
pub mod inventory;
pub mod kbs;
mod probe;
pub mod providers;
mod toml_file;
pub mod tpm;

pub use sealblk_base::{
    apart, boot_time, closer, deadline, error_chain, harmless, mutex, parsing, path_text, timestamp,
};
pub use sealblk_control as control;
pub use sealblk_keys as keys;
pub use sealblk_luks2 as luks2;
#[cfg(fuzzing)]
pub use sealblk_serve::hostile;
pub use sealblk_serve::{attachment, device, key_helper, map, sandbox, storage, upgrade};
pub use sealblk_xts as cipher;
