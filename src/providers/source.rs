//! Providers whose KEKs come to this host: one trait for their differences, and the common wrapping.
//!
//! A [`KekSource`] makes KEKs, fetches them by their key IDs and returns their states. [`HostProvider`] makes a
//! [`KeyProvider`] of it: it wraps secrets on this host, under the fetched KEK, in the same form for every kind of
//! source.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::revoked::Revoked;
use super::sealed_cache::SealedCache;
use super::{cache::Full, cache::KekCache, cache::Origin, cache::Wanted};
use super::{wrap, wrap::Kek, wrap::UnwrapError};
use crate::keys::{Binding, KeyError, KeyId, KeyProvider, KeyReason, KeyState, Reach, Revocation};
use sealblk_secmem::arena::SecretBytes;

/// The longest `timeout` that a source's settings may have, in seconds. Who asks the agent for a key gives up after 120
/// seconds, and should hear why there is none.
pub(super) const LONGEST_TIMEOUT: u16 = 100;

/// Where KEKs come from: a file of this host, or a server.
///
/// Implementations may block and are called from any thread. They hold credentials, but keep no KEK: who wants to ask
/// less often than once for each use keeps what was fetched (and says for how long).
pub(super) trait KekSource: Send + Sync + fmt::Debug {
    /// The name that the operator gave it, unique on this host.
    fn name(&self) -> &str;

    /// Where its keys come from: a path, or the servers' addresses.
    fn location(&self) -> String;

    /// Makes a new KEK, ready for use.
    ///
    /// # Errors
    /// [`KeyError`]; then no KEK is left behind that anything would refer to.
    fn create_kek(&self) -> Result<KeyId, KeyError>;

    /// Fetches a KEK. One that its server would let nobody wrap or unwrap with is not given out.
    ///
    /// # Errors
    /// [`KeyError`]: [`KeyReason::Missing`] if there is no such KEK, [`KeyReason::NotActive`] if its state forbids its
    /// use, else what kept the source from answering.
    fn fetch(&self, key_id: &KeyId) -> Result<Kek, KeyError>;

    /// Looks for a KEK.
    ///
    /// # Errors
    /// [`KeyError`], if the source cannot tell. That a KEK is missing is not an error here.
    fn state(&self, key_id: &KeyId) -> Result<KeyState, KeyError>;

    /// As [`KeyProvider::state_within`].
    fn state_within(&self, key_id: &KeyId, _age: Duration) -> Result<KeyState, KeyError> {
        self.state(key_id)
    }

    /// As [`KeyProvider::takes_along`].
    fn takes_along(&self, _key_id: &KeyId, _other: &KeyId) -> bool {
        false
    }

    /// Has the source's server take a KEK out of use, if it has a record of it. The caller sees to this host.
    ///
    /// # Errors
    /// [`KeyError`]. It is not asked to destroy a KEK that it cannot destroy.
    fn revoke(&self, _key_id: &KeyId, _revocation: Revocation) -> Result<Reach, KeyError> {
        Ok(Reach::Host)
    }

    /// As [`KeyProvider::destroys_keys`].
    fn destroys_keys(&self) -> bool {
        false
    }

    /// Takes note that a secret was wrapped for `binding`, if it has a place for that where its operator looks. That it
    /// cannot is no reason for the binding to fail.
    fn used(&self, _binding: &Binding<'_>) {}

    /// A KEK that no volume is bound to, to prove with that keys can be had. Where a KEK leaves a trace on a server it is
    /// the same one every time.
    ///
    /// # Errors
    /// As for [`KekSource::create_kek`].
    fn probe_kek(&self) -> Result<KeyId, KeyError> {
        self.create_kek()
    }
}

/// A provider that wraps on this host.
#[derive(Debug)]
pub(super) struct HostProvider {
    source: Box<dyn KekSource>,
    keks: KekCache,
    revoked: Revoked,
    /// What is kept for a reboot while the source is away.
    sealed: Option<Arc<SealedCache>>,
}

/// A source that gives another key than it gave before.
#[derive(Debug, thiserror::Error)]
#[error("a newly wrapped secret unwraps to another value")]
struct Fickle;

impl HostProvider {
    /// A provider that keeps a KEK for `time_to_live` after it was fetched.
    pub(super) fn new(source: Box<dyn KekSource>, time_to_live: Duration, revoked: Revoked) -> Self {
        Self {
            source,
            keks: KekCache::new(time_to_live),
            revoked,
            sealed: None,
        }
    }

    /// The same, with what is kept for a reboot.
    pub(super) fn with_sealed_cache(mut self, sealed: Option<Arc<SealedCache>>) -> Self {
        self.sealed = sealed;
        self
    }

    /// The KEKs that it keeps.
    pub(super) fn keks(&self) -> &KekCache {
        &self.keks
    }

    fn kek(&self, key_id: &KeyId, wanted: Wanted) -> Result<(Arc<Kek>, Origin), KeyError> {
        // Before the cache: another process may have revoked it.
        self.check_revoked(key_id)?;
        self.keks.get(key_id, wanted, || self.fetch(key_id, wanted))
    }

    fn check_revoked(&self, key_id: &KeyId) -> Result<(), KeyError> {
        match self.revoked.find(key_id).map_err(|e| self.host(key_id, e))? {
            Some(revoked) => Err(self.fail(key_id, KeyReason::NotActive).because(revoked)),
            None => Ok(()),
        }
    }

    fn fetch(&self, key_id: &KeyId, wanted: Wanted) -> Result<(Kek, Origin), KeyError> {
        let fetched = self.source.fetch(key_id).map(|kek| (kek, Origin::Fetched));
        let Some(sealed) = &self.sealed else {
            return fetched;
        };
        let name = self.source.name();
        match fetched {
            Ok((kek, origin)) => {
                sealed.keep(name, key_id, &kek);
                // Who revokes it meanwhile has found nothing to forget.
                self.check_revoked(key_id)
                    .inspect_err(|_| sealed.forget(name, key_id))?;
                Ok((kek, origin))
            }
            Err(error) => match error.reason {
                reason if reason.is_no_verdict() && wanted == Wanted::Any => {
                    let kept = sealed.find(name, key_id);
                    kept.map(|(kek, until)| (kek, Origin::Sealed(until))).ok_or(error)
                }
                KeyReason::Missing | KeyReason::NotActive | KeyReason::Refused => {
                    sealed.forget(name, key_id);
                    Err(error)
                }
                _ => Err(error),
            },
        }
    }

    fn wrap_unnoted(&self, binding: &Binding<'_>, secret: &SecretBytes) -> Result<Vec<u8>, KeyError> {
        let (kek, _) = self.kek(binding.key_id, Wanted::Fetched)?;
        wrap::wrap(&kek, binding, secret).map_err(|e| self.fail(binding.key_id, KeyReason::Host).because(e))
    }

    /// Takes a KEK that somebody else has fetched, so that volumes open while this host cannot reach its source.
    pub(super) fn push(&self, key_id: &KeyId, key: SecretBytes) -> Result<(), KeyError> {
        self.check_revoked(key_id)?;
        let fail = |reason| self.fail(key_id, reason);
        let kek = Kek::new(key).map_err(|e| fail(KeyReason::Garbled).because(e))?;
        self.keks
            .push(key_id, kek)
            .map_err(|e: Full| fail(KeyReason::Host).because(e))
    }

    /// Unwraps with a KEK that is held for a volume that is served ([`KekCache::hold`]); none if none is held.
    ///
    /// # Errors
    /// As for [`KeyProvider::unwrap`].
    pub(super) fn unwrap_held(
        &self,
        binding: &Binding<'_>,
        wrapped: &[u8],
    ) -> Option<Result<SecretBytes, KeyError>> {
        let kek = self.keks.held(binding.key_id)?;
        // Another process may have revoked it.
        let unrevoked = self.check_revoked(binding.key_id);
        Some(unrevoked.and_then(|()| self.unwrap_with(&kek, binding, wrapped)))
    }

    fn unwrap_with(&self, kek: &Kek, binding: &Binding<'_>, wrapped: &[u8]) -> Result<SecretBytes, KeyError> {
        wrap::unwrap(kek, binding, wrapped).map_err(|e| match e {
            UnwrapError::Arena(e) => self.fail(binding.key_id, KeyReason::Host).because(e),
            e => self.fail(binding.key_id, KeyReason::Unauthentic).because(e),
        })
    }

    /// The record of what was revoked cannot be read or written.
    fn host(&self, key_id: &KeyId, error: std::io::Error) -> KeyError {
        let at = self.revoked.location().display();
        KeyError::new(self.source.name(), at, KeyReason::Invalid)
            .of(key_id)
            .because(error)
    }

    fn fail(&self, key_id: &KeyId, reason: KeyReason) -> KeyError {
        KeyError::new(self.source.name(), self.source.location(), reason).of(key_id)
    }
}

impl KeyProvider for HostProvider {
    fn name(&self) -> &str {
        self.source.name()
    }

    fn create_kek(&self) -> Result<KeyId, KeyError> {
        self.source.create_kek()
    }

    fn wrap(&self, binding: &Binding<'_>, secret: &SecretBytes) -> Result<Vec<u8>, KeyError> {
        let wrapped = self.wrap_unnoted(binding, secret)?;
        self.source.used(binding);
        Ok(wrapped)
    }

    fn unwrap(&self, binding: &Binding<'_>, wrapped: &[u8]) -> Result<SecretBytes, KeyError> {
        let (kek, origin) = self.kek(binding.key_id, Wanted::Any)?;
        let unwrapped = self.unwrap_with(&kek, binding, wrapped);
        if unwrapped.is_err() && origin == Origin::Pushed {
            // It may have been the wrong one.
            let (kek, _) = self.kek(binding.key_id, Wanted::Fetched)?;
            return self.unwrap_with(&kek, binding, wrapped);
        }
        unwrapped
    }

    fn state(&self, key_id: &KeyId) -> Result<KeyState, KeyError> {
        self.state_within(key_id, Duration::ZERO)
    }

    fn state_within(&self, key_id: &KeyId, age: Duration) -> Result<KeyState, KeyError> {
        let revoked = self.revoked.find(key_id).map_err(|e| self.host(key_id, e))?;
        match (revoked, self.source.state_within(key_id, age)) {
            (Some(_), Ok(KeyState::Active | KeyState::PreActive | KeyState::Deactivated) | Err(_)) => {
                Ok(KeyState::Revoked)
            }
            (_, state) => state,
        }
    }

    fn state_here(&self, key_id: &KeyId) -> Result<Option<KeyState>, KeyError> {
        let revoked = self.revoked.find(key_id).map_err(|e| self.host(key_id, e))?;
        Ok(revoked.map(|_| KeyState::Revoked))
    }

    fn takes_along(&self, key_id: &KeyId, other: &KeyId) -> bool {
        self.source.takes_along(key_id, other)
    }

    fn destroys_keys(&self) -> bool {
        self.source.destroys_keys()
    }

    fn revoke(&self, key_id: &KeyId, revocation: Revocation) -> Result<Reach, KeyError> {
        if revocation == Revocation::Destroy && !self.destroys_keys() {
            let name = self.source.name();
            return Err(KeyError::new(name, name, KeyReason::Indestructible).of(key_id));
        }
        if self.source.state(key_id)? == KeyState::Missing {
            return Err(self.fail(key_id, KeyReason::Missing));
        }
        let reach = self.source.revoke(key_id, revocation)?;
        self.revoked.add(key_id).map_err(|e| self.host(key_id, e))?;
        self.keks.forget(key_id);
        if let Some(sealed) = &self.sealed {
            sealed.forget(self.source.name(), key_id);
        }
        Ok(reach)
    }

    fn check(&self) -> Result<(), KeyError> {
        let key_id = self.source.probe_kek()?;
        let binding = Binding {
            volume: Uuid::new_v4(),
            provider: self.source.name(),
            key_id: &key_id,
            keyslot: 0,
        };
        let secret = SecretBytes::random(32).map_err(|e| self.fail(&key_id, KeyReason::Host).because(e))?;
        let back = self.unwrap(&binding, &self.wrap_unnoted(&binding, &secret)?)?;
        if back.ct_eq(&secret) {
            Ok(())
        } else {
            Err(self.fail(&key_id, KeyReason::Invalid).because(Fickle))
        }
    }
}
