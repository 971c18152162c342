//! RCAR: the attestation of a host and the release of a resource, by the protocol of Confidential Containers' Key Broker
//! Service (KBS).
//!
//! ```text
//! host                                              broker
//!   Request     POST kbs/v0/auth    {version, tee} ->
//!               <- {nonce}, a session's cookie        Challenge
//!   Attestation POST kbs/v0/attest  {runtime-data, tee-evidence} ->
//!               <- {token}                            the evidence is accepted
//!   Resource    GET  kbs/v0/resource/REPO/TYPE/TAG ->
//!               <- JWE to the key in runtime-data     Response
//! ```
//!
//! The messages are those of the crate kbs-types; the tests compare them. The evidence is that of Trustee's
//! verifier `tpm`: a quote of all registers of SHA-256. Its qualifying data are a hash over the runtime data, and so over
//! the broker's nonce and the key that the answer is encrypted to.

pub mod enrolment;
pub mod jwe;

use std::fmt;

use base16ct::lower;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256, Sha384, Sha512};

use self::jwe::PublicKey;
use crate::parsing::rule;
use crate::tpm::attest::Quote;
use crate::tpm::pcr::{self, COUNT, Value};

/// The version of the protocol.
pub const VERSION: &str = "0.4.0";
/// What evidence is of.
pub const TEE: &str = "tpm";
/// The cookie that names a session.
pub const COOKIE: &str = "kbs-session-id";
/// The paths of the protocol, from the server's address on.
pub const AUTH: &str = "kbs/v0/auth";
/// See [`AUTH`].
pub const ATTEST: &str = "kbs/v0/attest";
/// See [`AUTH`]; a resource's own path follows.
pub const RESOURCE: &str = "kbs/v0/resource";

/// TPM_ALG_RSASSA and TPM_ALG_SHA256, before a signature (TPMT_SIGNATURE).
const SIGNATURE: [u8; 4] = [0x00, 0x14, 0x00, 0x0b];

/// What is asked for first.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Request {
    /// [`VERSION`].
    pub version: String,
    /// [`TEE`].
    pub tee: String,
    /// Nothing of ours.
    #[serde(default)]
    pub extra_params: serde_json::Value,
}

/// What the broker wants to see in the evidence.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Challenge {
    /// Never used before.
    pub nonce: String,
    /// Which hash is taken over the runtime data, if it is not SHA-384.
    #[serde(default)]
    pub extra_params: serde_json::Value,
}

/// What the evidence vouches for. The fields are in the order of their names, which is that of their hash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RuntimeData {
    /// The broker's.
    pub nonce: String,
    /// What the answer is to be encrypted to.
    pub tee_pubkey: PublicKey,
}

/// What proves the host's state.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Attestation {
    /// None.
    #[serde(default)]
    pub init_data: Option<serde_json::Value>,
    /// What it vouches for.
    pub runtime_data: RuntimeData,
    /// The proof.
    pub tee_evidence: CompositeEvidence,
}

/// The evidence of a host, and of its devices, of which we ask none.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CompositeEvidence {
    /// The TPM's.
    pub primary_evidence: Evidence,
    /// A map in JSON.
    pub additional_evidence: String,
}

/// What a TPM has signed, as Trustee's verifier `tpm` takes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// The form's version, "1".
    pub svn: String,
    /// What the quote is over, in base64.
    pub report_data: String,
    /// The quote.
    pub tpm_quote: TpmQuote,
    /// The attestation key: SubjectPublicKeyInfo in DER, in base64.
    pub ak_public: String,
}

/// A quote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TpmQuote {
    /// TPMT_SIGNATURE, in base64.
    pub signature: String,
    /// TPMS_ATTEST, in base64.
    pub message: String,
    /// What the registers hold, in hexadecimal digits.
    pub pcrs: Vec<String>,
}

/// The answer to an attestation that is believed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Token {
    /// By which the broker knows the session, beside its cookie.
    pub token: String,
}

/// The answer to what is refused.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ErrorInformation {
    /// A URL that names the kind of error.
    #[serde(rename = "type")]
    pub error_type: String,
    /// The reason.
    pub detail: String,
}

/// Evidence that is not of the form that it has to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(&'static str);

/// What a session's evidence is over. A TPM takes no more qualifying data than its longest hash has, and many have none beyond
/// SHA-256 (TPM2B_DATA); Trustee's verifier takes as much since its pull request 1021.
pub type ReportData = [u8; 32];

impl RuntimeData {
    /// The first bytes of the hash of the runtime data as JSON in its canonical form; none, if the challenge wants a hash that
    /// this host does not have.
    pub fn report_data(&self, challenge: &serde_json::Value) -> Option<ReportData> {
        let json = serde_json::to_vec(self).expect("texts are JSON");
        let algorithm = challenge.get("selected-hash-algorithm");
        let hash = match algorithm.map(|name| name.as_str().unwrap_or_default()) {
            None | Some("sha384") => Sha384::digest(json).to_vec(),
            Some("sha256") => Sha256::digest(json).to_vec(),
            Some("sha512") => Sha512::digest(json).to_vec(),
            Some(_) => return None,
        };
        hash.first_chunk().copied()
    }
}

impl Evidence {
    /// The evidence of a quote by the attestation key whose SubjectPublicKeyInfo is `spki`.
    pub fn new(quote: &Quote, report_data: &ReportData, spki: &[u8]) -> Self {
        let len = u16::try_from(quote.signature.len()).expect("a TPM's answer is shorter");
        let signature = [&SIGNATURE[..], &len.to_be_bytes(), &quote.signature].concat();
        Self {
            svn: "1".to_owned(),
            report_data: BASE64_STANDARD.encode(report_data),
            tpm_quote: TpmQuote {
                signature: BASE64_STANDARD.encode(signature),
                message: BASE64_STANDARD.encode(&quote.message),
                pcrs: quote
                    .pcrs
                    .iter()
                    .map(|value| lower::encode_string(value))
                    .collect(),
            },
            ak_public: BASE64_STANDARD.encode(spki),
        }
    }

    /// The quote, of which nothing is believed yet.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn quote(&self) -> Result<Quote, Malformed> {
        let quote = &self.tpm_quote;
        let signature = decode(&quote.signature, "the signature is not base64")?;
        let message = decode(&quote.message, "the quote is not base64")?;
        let wrong = Malformed("the signature is not by RSASSA with SHA-256");
        let (len, signature) = signature
            .strip_prefix(&SIGNATURE)
            .and_then(|rest| rest.split_first_chunk::<2>())
            .ok_or(wrong)?;
        if usize::from(u16::from_be_bytes(*len)) != signature.len() {
            return Err(wrong);
        }
        let mut pcrs = [Value::default(); COUNT as usize];
        if quote.pcrs.len() != pcrs.len() {
            return Err(Malformed("it does not have the values of 24 registers"));
        }
        for (value, text) in pcrs.iter_mut().zip(&quote.pcrs) {
            *value = pcr::parse_value(text)
                .ok_or(Malformed("a register's value is not of 64 hexadecimal digits"))?;
        }
        Ok(Quote {
            message,
            signature: signature.to_vec(),
            pcrs,
        })
    }

    /// The attestation key's SubjectPublicKeyInfo.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn spki(&self) -> Result<Vec<u8>, Malformed> {
        decode(&self.ak_public, "the attestation key is not base64")
    }
}

fn decode(text: &str, what: &'static str) -> Result<Vec<u8>, Malformed> {
    BASE64_STANDARD.decode(text).map_err(|_| Malformed(what))
}

/// A resource's path, `REPO/TYPE/TAG`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ResourcePath(String);

/// A text that is none.
#[derive(Debug, thiserror::Error)]
#[error("{}", rule::RESOURCE)]
pub struct NoPath;

impl TryFrom<String> for ResourcePath {
    type Error = NoPath;

    fn try_from(text: String) -> Result<Self, NoPath> {
        let is_name = |name: &str| {
            (1..=64).contains(&name.len())
                && name
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
                && name.bytes().any(|b| b != b'.')
        };
        match text.split('/').count() == 3 && text.split('/').all(is_name) {
            true => Ok(Self(text)),
            false => Err(NoPath),
        }
    }
}

impl std::str::FromStr for ResourcePath {
    type Err = NoPath;

    fn from_str(text: &str) -> Result<Self, NoPath> {
        text.to_owned().try_into()
    }
}

impl From<ResourcePath> for String {
    fn from(path: ResourcePath) -> Self {
        path.0
    }
}

impl AsRef<str> for ResourcePath {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ResourcePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
