//! Enrolment: checks that a TPM is genuine, and to which host it belongs. The maker's certificate of the endorsement key proves
//! the TPM, and a token proves the host; or the operator has named the endorsement key. A credential proves that the
//! attestation key is in the same TPM.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use base16ct::lower;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime};
use sha2::{Digest, Sha256};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};

use super::state::Host;
use crate::kbs::enrolment::Enrol;
use crate::providers::{tls, tls::TlsFileError};
use crate::tpm::attest::{NotAttested, RsaPublic};

/// tcg-kp-EKCertificate, 2.23.133.8.1: what the certificate of an endorsement key is for.
const EK_CERTIFICATE: &[u8] = &[0x67, 0x81, 0x05, 0x08, 0x01];

/// TPMs' makers.
#[derive(Debug)]
pub(super) struct Makers(Vec<TrustAnchor<'static>>);

/// A host whose TPM is believed, if it opens a credential.
#[derive(Debug)]
pub(super) struct Candidate {
    pub(super) endorsement_key: RsaPublic,
    /// The SHA-256 of it.
    pub(super) endorsement: String,
    /// TPMT_PUBLIC of the attestation key.
    pub(super) attestation: Vec<u8>,
}

/// Why it is not.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unknown {
    #[error("no host of this name is waiting for enrolment")]
    Host,
    #[error("the token belongs to another host, was used, or has expired")]
    Token,
    #[error("the broker's settings for this host have changed in the meantime; enrol again")]
    Changed,
    #[error(
        "the TPM with the endorsement key {0} is enrolled as another host; remove that host at the broker first"
    )]
    OtherHost(String),
    #[error("the endorsement key, {0}, differs from the one that the broker has for this host")]
    OtherKey(String),
    #[error("a part of the request is not base64")]
    Base64,
    #[error("{0}")]
    Key(#[from] NotAttested),
    #[error("the TPM has no certificate; give the broker its endorsement key, {0}, for this host")]
    NoCertificate(String),
    #[error(
        "the broker trusts no maker of TPMs: set endorsement-authorities, or give the broker the endorsement key, {0}, for this host"
    )]
    NoMakers(String),
    #[error("no trusted maker issued the endorsement key's certificate: {0}")]
    Certificate(webpki::Error),
    #[error("the certificate belongs to another key")]
    OtherCertificate,
}

impl Makers {
    /// Reads their certificates. Those between a maker's root and its endorsement keys can be among them.
    pub(super) fn read(path: Option<&Path>) -> Result<Self, TlsFileError> {
        let Some(path) = path else {
            return Ok(Self(Vec::new()));
        };
        let certificates = tls::authorities(path)?;
        let anchor = |der: &CertificateDer<'_>| anchor_from_trusted_cert(der).map(|anchor| anchor.to_owned());
        let anchors = certificates.iter().filter_map(|der| anchor(der).ok());
        Ok(Self(anchors.collect()))
    }

    /// Looks whether a host is `host`, as far as it can be told without asking its TPM.
    pub(super) fn check(&self, request: &Enrol<'_>, host: Option<&Host>) -> Result<Candidate, Unknown> {
        let host = host.ok_or(Unknown::Host)?;
        let decode = |text: &str| BASE64_STANDARD.decode(text).map_err(|_| Unknown::Base64);
        let endorsement_key = RsaPublic::endorsement(&decode(&request.endorsement_key)?)?;
        let spki = endorsement_key.spki();
        let endorsement = lower::encode_string(&Sha256::digest(&spki));
        match (&host.endorsement, &host.token) {
            // Named, and not used yet; or known since it was enrolled, and enrolled anew with a token.
            (Some(named), token) if *named == endorsement => {
                let enrolled = host.attestation.is_some();
                let is_it = |token| is_token(token, request.token);
                if enrolled && !token.as_ref().is_some_and(is_it) {
                    return Err(Unknown::Token);
                }
            }
            (Some(_), _) => return Err(Unknown::OtherKey(endorsement)),
            (None, Some(token)) if is_token(token, request.token) => {
                let der = match &request.endorsement_certificate {
                    Some(text) => decode(text)?,
                    None => return Err(Unknown::NoCertificate(endorsement)),
                };
                self.certified(&der, &spki, &endorsement)?;
            }
            (None, _) => return Err(Unknown::Token),
        }
        let attestation = decode(&request.attestation_key)?;
        RsaPublic::attestation(&attestation)?;
        Ok(Candidate {
            endorsement_key,
            endorsement,
            attestation,
        })
    }

    fn certified(&self, der: &[u8], spki: &[u8], endorsement: &str) -> Result<(), Unknown> {
        if self.0.is_empty() {
            return Err(Unknown::NoMakers(endorsement.to_owned()));
        }
        let der = CertificateDer::from(der);
        let certificate = EndEntityCert::try_from(&der).map_err(Unknown::Certificate)?;
        let algorithms = rustls::crypto::ring::default_provider().signature_verification_algorithms;
        certificate
            .verify_for_usage(
                algorithms.all,
                &self.0,
                &[],
                UnixTime::now(),
                KeyUsage::required(EK_CERTIFICATE),
                None,
                None,
            )
            .map_err(Unknown::Certificate)?;
        match *certificate.subject_public_key_info() == *spki {
            true => Ok(()),
            false => Err(Unknown::OtherCertificate),
        }
    }
}

/// Digests are compared, so how long that takes tells nothing of the token.
fn is_token(kept: &super::state::Token, shown: Option<&str>) -> bool {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    shown.is_some_and(|shown| lower::encode_string(&Sha256::digest(shown)) == kept.sha256)
        && now.as_secs() < kept.until
}
