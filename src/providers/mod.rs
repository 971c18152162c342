//! The key providers of a host.
//!
//! ```text
//! registry   the providers of this host, by name, in the state directory
//! shared     the same for a long-running process, with a cache of KEKs (cache)
//! source     providers whose KEKs come to this host: a trait for their differences, and the common wrapping
//! native     KEKs derived from a primary key in a file
//! kmip       key servers by the standard protocol, over mutual TLS
//! transit    keys that an OpenBao or Vault server wraps
//! trusted    a resource that a broker releases after a proof of what this host has booted
//! https      requests to servers with a JSON API
//! tls        a server's certificates, and this host's
//! expiry     certificates that are about to expire
//! revoked    KEKs that were revoked on this host; sealed_cache: KEKs that it keeps for a reboot
//! wrap       AES-256-GCM under a KEK that is on this host
//! ```
//!
//! [`crate::keys`] says what a provider is.

mod backup;
mod cache;
mod expiry;
mod https;
pub mod kmip;
mod native;
pub mod registry;
mod revoked;
mod sealed_cache;
pub(crate) mod settings_file;
mod shared;
mod source;
pub(crate) mod tls;
pub mod transit;
pub mod trusted;
pub(crate) mod wrap;

use base16ct::lower;
use sha2::{Digest, Sha256};

use crate::keys::KeyId;

pub use expiry::{Expiring, Step, Whose};
pub use native::PRIMARY_LEN;
pub use sealed_cache::{SealedCache, SealedCacheError, SealedCacheSettings};
pub use shared::SharedProviders;

/// The name of a file for what is kept about a KEK: the SHA-256 of provider and key ID, since a key ID may hold anything.
fn file_name(provider: &str, key_id: &KeyId) -> String {
    let hash = Sha256::new()
        .chain_update((provider.len() as u64).to_be_bytes())
        .chain_update(provider)
        .chain_update(&key_id.0)
        .finalize();
    lower::encode_string(&hash)
}
