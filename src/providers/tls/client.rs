//! Connections to a server: webpki checks the server's certificate, and errors describe its problem.

use std::fmt;
use std::io::Read;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};

use super::failure::{Circumstances, TlsFailure};
use super::{Identity, TlsFileError, TlsFiles, Unusable, at, certificates, private_key, provider};
use crate::mutex::lock;

/// What connections to a server are made with: the files as they were when they were read.
#[derive(Clone)]
pub(in crate::providers) struct Client {
    config: Arc<ClientConfig>,
    verifier: Arc<Verifier>,
    ca: PathBuf,
    roots: Arc<[CertificateDer<'static>]>,
    own: Option<(Identity, CertificateDer<'static>)>,
}

/// Leaves the checks to webpki, and keeps what the last server has shown: the error alone does not tell enough.
struct Verifier {
    webpki: Arc<WebPkiServerVerifier>,
    shown: Mutex<Shown>,
}

#[derive(Default)]
struct Shown {
    chain: Vec<CertificateDer<'static>>,
    name: Option<ServerName<'static>>,
}

impl Client {
    pub(super) fn load(files: &TlsFiles) -> Result<Self, TlsFileError> {
        let roots = at(&files.ca, certificates(&files.ca))?;
        let mut store = RootCertStore::empty();
        for root in &roots {
            let added = store.add(root.clone());
            let failure = |e| Unusable::Tls(TlsFailure::of_authority(&e, root));
            at(&files.ca, added.map_err(failure))?;
        }
        let webpki = WebPkiServerVerifier::builder_with_provider(Arc::new(store), provider()).build();
        let verifier = Arc::new(Verifier {
            webpki: webpki.expect("there is a root at least, and no revocation list"),
            shown: Mutex::default(),
        });
        let config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .expect("ring has cipher suites for every version of TLS that is built in")
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(&verifier) as _);
        let (mut config, own) = match &files.identity {
            None => (config.with_no_client_auth(), None),
            Some(identity) => {
                let chain = at(&identity.certificate, certificates(&identity.certificate))?;
                let key = at(&identity.key, private_key(&identity.key))?;
                let own = chain.first().cloned().unwrap_or_else(|| Vec::new().into());
                let config = config.with_client_auth_cert(chain, key);
                let failure = |e| Unusable::Tls(TlsFailure::of_identity(&e, identity, &own));
                let config = at(&identity.key, config.map_err(failure))?;
                (config, Some((identity.clone(), own)))
            }
        };
        // Each connection reads the files anew, and has no session to go on with.
        config.resumption = Resumption::disabled();
        Ok(Self {
            config: Arc::new(config),
            verifier,
            ca: files.ca.clone(),
            roots: roots.into(),
            own,
        })
    }

    /// A new connection, to the server of that name.
    pub(in crate::providers) fn connect(
        &self,
        name: ServerName<'static>,
    ) -> Result<ClientConnection, TlsFailure> {
        *lock(&self.verifier.shown) = Shown::default();
        ClientConnection::new(Arc::clone(&self.config), name).map_err(|error| self.explain(&error))
    }

    /// What an error of the last connection means.
    pub(in crate::providers) fn explain(&self, error: &Error) -> TlsFailure {
        let shown = lock(&self.verifier.shown);
        let circumstances = Circumstances {
            shown: &shown.chain,
            name: shown.name.as_ref(),
            ca: &self.ca,
            roots: &self.roots,
            own: self.own.as_ref().map(|(identity, own)| (identity, own)),
        };
        TlsFailure::of_connection(error, &circumstances)
    }

    /// The same for an error of reading or writing, if it is one of TLS.
    pub(in crate::providers) fn explain_io(&self, error: &std::io::Error) -> Option<TlsFailure> {
        let error = error.get_ref()?.downcast_ref::<Error>()?;
        Some(self.explain(error))
    }

    /// What the server had to say before a write to it failed. A server that refuses a certificate says so and closes, while this
    /// side may still be sending: what it has said is there to be read.
    pub(in crate::providers) fn last_words(
        &self,
        connection: &mut ClientConnection,
        socket: &mut impl Read,
    ) -> Option<TlsFailure> {
        while let Ok(1..) = connection.read_tls(socket) {
            if let Err(error) = connection.process_new_packets() {
                return Some(self.explain(&error));
            }
        }
        None
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let chain = [end_entity].into_iter().chain(intermediates);
        *lock(&self.shown) = Shown {
            chain: chain.map(|der| der.clone().into_owned()).collect(),
            name: Some(server_name.to_owned()),
        };
        self.webpki
            .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.webpki.supported_verify_schemes()
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Verifier")
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Client")
    }
}
