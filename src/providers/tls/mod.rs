//! TLS with a key server: the authorities that this host trusts, and its own certificate.
//!
//! The operator names PEM files. They are read at each new connection, so that a renewed certificate needs no restart.
//! TLS 1.2 and 1.3.
//!
//! ```text
//! client       connections to a server, and the check of its certificate
//! failure      failures of connections: the only module that translates errors of rustls
//! certificate  the content of a certificate, for error messages
//! pem          files of certificates and keys
//! ```

mod certificate;
mod client;
mod failure;
mod pem;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

pub(super) use self::certificate::Certificate;
pub(super) use self::client::Client;
pub(super) use self::failure::TlsFailure;
use self::pem::BadPem;
use super::{settings_file, settings_file::Unreadable};
use crate::keys::KeyReason;

/// The most that is read of a file of certificates; a bundle of all public authorities has a fifth of that.
const CERTIFICATES_LIMIT: usize = 1 << 20;
/// The most that is read of a key's file.
const KEY_LIMIT: usize = 64 << 10;

/// Where this host's side of TLS lies: PEM files, by absolute path.
#[derive(Clone, Debug)]
pub(super) struct TlsFiles {
    /// The certificates of the authorities that are believed.
    pub(super) ca: PathBuf,
    /// What this host shows, where TLS is mutual.
    pub(super) identity: Option<Identity>,
}

/// Whom this host says it is.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    /// This host's certificate, and those between it and an authority that the server believes.
    pub(crate) certificate: PathBuf,
    /// The certificate's private key, readable by its owner alone.
    pub(crate) key: PathBuf,
}

/// A file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{} cannot be used", path.display())]
pub(crate) struct TlsFileError {
    /// The file.
    pub(crate) path: PathBuf,
    /// Why.
    #[source]
    cause: Unusable,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum Unusable {
    #[error(transparent)]
    Unreadable(#[from] Unreadable),
    #[error(transparent)]
    Pem(#[from] BadPem),
    #[error(transparent)]
    Tls(TlsFailure),
}

impl TlsFiles {
    /// Reads them.
    ///
    /// # Errors
    /// [`TlsFileError`], with the file that is at fault.
    pub(super) fn load(&self) -> Result<Client, TlsFileError> {
        Client::load(self)
    }
}

impl Identity {
    /// Reads it for a server of ours, which asks its clients for no certificate.
    ///
    /// # Errors
    /// [`TlsFileError`], with the file that is at fault.
    pub(crate) fn load(&self) -> Result<Arc<ServerConfig>, TlsFileError> {
        let chain = at(&self.certificate, certificates(&self.certificate))?;
        let key = at(&self.key, private_key(&self.key))?;
        let own = chain.first().cloned().unwrap_or_else(|| Vec::new().into());
        let config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .expect("ring has cipher suites for every version of TLS that is built in")
            .with_no_client_auth()
            .with_single_cert(chain, key);
        let failure = |e| Unusable::Tls(TlsFailure::of_identity(&e, self, &own));
        Ok(Arc::new(at(&self.key, config.map_err(failure))?))
    }
}

/// What all TLS here is done by.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// The certificates in a PEM file.
pub(crate) fn authorities(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsFileError> {
    at(path, certificates(path))
}

impl TlsFileError {
    /// What an operator would act on.
    pub(super) fn reason(&self) -> KeyReason {
        match &self.cause {
            Unusable::Unreadable(error) => error.reason(),
            _ => KeyReason::Invalid,
        }
    }
}

fn at<T>(path: &Path, result: Result<T, Unusable>) -> Result<T, TlsFileError> {
    result.map_err(|cause| TlsFileError {
        path: path.to_owned(),
        cause,
    })
}

pub(super) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Unusable> {
    Ok(pem::certificates(&settings_file::read_public(
        path,
        CERTIFICATES_LIMIT,
    )?)?)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, Unusable> {
    Ok(pem::private_key(&settings_file::read(path, KEY_LIMIT)?)?)
}
