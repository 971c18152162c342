//! Key providers that record bindings and openings of volumes in the list of volumes, for a process that has the providers
//! itself.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{By, Index, Occasion};
use crate::keys::{Binding, KeyError, KeyId, KeyProvider, KeyState, Providers, Reach, Revocation};
use sealblk_secmem::arena::SecretBytes;

/// Providers as one volume uses them.
#[derive(Debug)]
pub struct Noting<P> {
    providers: P,
    index: Index,
    path: PathBuf,
}

#[derive(Debug)]
struct NotingProvider {
    provider: Arc<dyn KeyProvider>,
    index: Index,
    path: PathBuf,
}

impl<P> Noting<P> {
    /// `providers`, for the volume whose header is in `path`.
    pub fn new(providers: P, index: Index, path: &Path) -> Self {
        Self {
            providers,
            index,
            path: path.to_owned(),
        }
    }
}

impl<P: Providers> Providers for Noting<P> {
    fn provider(&self, name: &str) -> Result<Arc<dyn KeyProvider>, KeyError> {
        Ok(Arc::new(NotingProvider {
            provider: self.providers.provider(name)?,
            index: self.index.clone(),
            path: self.path.clone(),
        }))
    }

    fn default_name(&self) -> Result<Option<String>, KeyError> {
        self.providers.default_name()
    }
}

impl KeyProvider for NotingProvider {
    fn name(&self) -> &str {
        self.provider.name()
    }

    fn create_kek(&self) -> Result<KeyId, KeyError> {
        self.provider.create_kek()
    }

    fn wrap(&self, binding: &Binding<'_>, secret: &SecretBytes) -> Result<Vec<u8>, KeyError> {
        let wrapped = self.provider.wrap(binding, secret)?;
        // Before anything is stored: a note too many does less harm than one that is missing.
        let announced = self.index.announce(binding, &self.path, By::Owner);
        announced.map_err(|error| error.of(binding))?;
        Ok(wrapped)
    }

    fn settle(&self, binding: &Binding<'_>, stored: bool) -> Result<(), KeyError> {
        self.index.settle(binding, &self.path, stored, By::Owner);
        self.provider.settle(binding, stored)
    }

    fn unwrap(&self, binding: &Binding<'_>, wrapped: &[u8]) -> Result<SecretBytes, KeyError> {
        let secret = self.provider.unwrap(binding, wrapped)?;
        self.index.note(binding, &self.path, Occasion::Opened, By::Owner);
        Ok(secret)
    }

    fn state(&self, key_id: &KeyId) -> Result<KeyState, KeyError> {
        self.provider.state(key_id)
    }

    fn state_here(&self, key_id: &KeyId) -> Result<Option<KeyState>, KeyError> {
        self.provider.state_here(key_id)
    }

    fn destroys_keys(&self) -> bool {
        self.provider.destroys_keys()
    }

    fn check(&self) -> Result<(), KeyError> {
        self.provider.check()
    }

    fn takes_along(&self, key_id: &KeyId, other: &KeyId) -> bool {
        self.provider.takes_along(key_id, other)
    }

    fn revoke(&self, key_id: &KeyId, revocation: Revocation) -> Result<Reach, KeyError> {
        self.provider.revoke(key_id, revocation)
    }
}
