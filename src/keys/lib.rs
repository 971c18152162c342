//! Keys as a volume sees them: what a provider of keys is, how a volume is bound to its keys, and how another process is asked for
//! them.
//!
//! A provider owns key encryption keys (KEKs), each with a [`KeyId`]. Under a KEK it wraps the slot secret of one
//! LUKS2 keyslot. A [`Binding`] binds the wrapped secret to its volume and keyslot, so that it opens nothing in another
//! volume or keyslot. The wrapped secret is stored in the volume; a volume stores no KEK.
//!
//! ```text
//! binding    opens, makes and rekeys volumes by their providers
//! protocol   the messages about keys of the interface `org.sealblk.Agent`
//! remote     the agent, or a disk's key helper, as the providers of a volume
//! purpose    what a key is asked for
//! error      why a key is not available
//! ```
#![cfg_attr(
    not(test),
    warn(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_possible_wrap,
        clippy::cast_lossless
    )
)]
#![forbid(unsafe_code)]

pub mod binding;
mod error;
pub mod protocol;
mod purpose;
pub mod remote;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use sealblk_base::harmless::harmless;
use sealblk_secmem::arena::SecretBytes;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use error::{KeyError, KeyReason};
pub use purpose::RequestPurpose;

/// The name that a provider knows a KEK by. Its form is the provider's own affair.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct KeyId(pub String);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 128;
        // It may come from a hostile header.
        write!(f, "{}", harmless(&self.0, SHOWN))
    }
}

/// What a wrapped secret is bound to: it is unwrapped for exactly these, or not at all.
#[derive(Clone, Copy, Debug)]
pub struct Binding<'a> {
    /// The UUID in the volume's header.
    pub volume: Uuid,
    /// The provider's name, as the volume's token spells it.
    pub provider: &'a str,
    /// The KEK.
    pub key_id: &'a KeyId,
    /// The number of the LUKS2 keyslot that the secret opens.
    pub keyslot: u32,
}

/// What a KEK can be used for, as its provider sees it: the states that KMIP has (its attribute State), for
/// every provider, and what this host has done itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyState {
    /// It is there, and must not be used yet.
    PreActive,
    /// It wraps and unwraps.
    Active,
    /// It must not be used any more.
    Deactivated,
    /// This host does not use it any more, whatever its provider says.
    Revoked,
    /// Others may have it.
    Compromised,
    /// It was there; its record is.
    Destroyed,
    /// The provider does not have it.
    Missing,
}

/// How much of a KEK is taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Revocation {
    /// It is used no more.
    Deactivate,
    /// And nobody will ever have it again.
    Destroy,
}

/// Who knows of a revocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reach {
    /// This host: others that have the provider can use the KEK.
    Host,
    /// The provider's server, and so all hosts.
    Server,
}

/// A source of KEKs.
///
/// Implementations may block (a key server over a network) and are called from any thread. They keep nothing about
/// volumes, and give out no KEK. Every error says which provider, which key and which hop failed ([`KeyError`]).
pub trait KeyProvider: Send + Sync + fmt::Debug {
    /// The name that the operator gave it, unique on this host.
    fn name(&self) -> &str;

    /// Makes a new KEK.
    ///
    /// # Errors
    /// [`KeyError`]; then no KEK is left behind that anything would refer to.
    fn create_kek(&self) -> Result<KeyId, KeyError>;

    /// Wraps `secret` under the KEK that `binding` names. Wrapping twice gives different bytes.
    ///
    /// # Errors
    /// [`KeyError`], above all [`KeyReason::Missing`] if there is no such KEK.
    fn wrap(&self, binding: &Binding<'_>, secret: &SecretBytes) -> Result<Vec<u8>, KeyError>;

    /// Is told what became of what was wrapped for `binding`: it is in the volume's header, or will never be. Only who keeps
    /// a list of volumes needs to know.
    ///
    /// # Errors
    /// [`KeyError`], if it does not come to know; the binding is none the worse for it.
    fn settle(&self, _binding: &Binding<'_>, _stored: bool) -> Result<(), KeyError> {
        Ok(())
    }

    /// Unwraps what [`KeyProvider::wrap`] made for the same `binding`. `wrapped` may be anything at all.
    ///
    /// # Errors
    /// [`KeyError`]: [`KeyReason::Unauthentic`] if `wrapped` was altered or made for another binding,
    /// [`KeyReason::Missing`] if it cannot be told because there is no such KEK.
    fn unwrap(&self, binding: &Binding<'_>, wrapped: &[u8]) -> Result<SecretBytes, KeyError>;

    /// Looks for a KEK.
    ///
    /// # Errors
    /// [`KeyError`], if the provider cannot tell. That a KEK is missing is not an error here.
    fn state(&self, key_id: &KeyId) -> Result<KeyState, KeyError>;

    /// The same for who only shows it: what the KEK's source has told within the last `age` will do.
    ///
    /// # Errors
    /// As for [`KeyProvider::state`].
    fn state_within(&self, key_id: &KeyId, _age: Duration) -> Result<KeyState, KeyError> {
        self.state(key_id)
    }

    /// What this host knows of a KEK's state by itself, whether its provider answers or not.
    ///
    /// # Errors
    /// [`KeyError`], if this host's own record cannot be read.
    fn state_here(&self, _key_id: &KeyId) -> Result<Option<KeyState>, KeyError> {
        Ok(None)
    }

    /// Takes a KEK out of use: from then on its state is not [`KeyState::Active`], and it neither wraps nor unwraps on this
    /// host. Volumes that it alone opens are lost. What was done already is no error.
    ///
    /// # Errors
    /// [`KeyError`]; on this host nothing has changed then.
    fn revoke(&self, key_id: &KeyId, revocation: Revocation) -> Result<Reach, KeyError>;

    /// Whether a revocation of `key_id` may take `other` along, which was noted under any provider of this host: the same key of
    /// the same server can have several names. A provider that revokes on this host alone takes nothing along.
    fn takes_along(&self, _key_id: &KeyId, _other: &KeyId) -> bool {
        false
    }

    /// Whether it can destroy a single KEK: [`Revocation::Destroy`].
    fn destroys_keys(&self) -> bool {
        true
    }

    /// Proves that the provider works, by making a KEK, wrapping under it, and unwrapping.
    ///
    /// # Errors
    /// [`KeyError`], with what does not work.
    fn check(&self) -> Result<(), KeyError>;
}

/// Where a volume looks for the provider that its token names.
pub trait Providers {
    /// The provider of this name, ready for use.
    ///
    /// # Errors
    /// [`KeyError`], above all [`KeyReason::UnknownProvider`].
    fn provider(&self, name: &str) -> Result<Arc<dyn KeyProvider>, KeyError>;

    /// The name of the provider that new volumes take when none is named.
    ///
    /// # Errors
    /// [`KeyError`], if that cannot be told.
    fn default_name(&self) -> Result<Option<String>, KeyError>;
}

impl<P: Providers> Providers for &P {
    fn provider(&self, name: &str) -> Result<Arc<dyn KeyProvider>, KeyError> {
        (**self).provider(name)
    }

    fn default_name(&self) -> Result<Option<String>, KeyError> {
        (**self).default_name()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_key_id_is_shown_harmlessly() {
        assert_eq!(KeyId("1f.ab\x1b[2J".into()).to_string(), "1f.ab\\u{1b}[2J");
        assert_eq!(KeyId("k".repeat(1 << 20)).to_string().chars().count(), 129);
    }
}
