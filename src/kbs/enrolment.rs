//! Enrolment of a host's attestation key at sealblk's broker: in addition to the KBS protocol, at the same address.
//!
//! ```text
//! Enrol     POST sealblk/v0/enrol     {host, token, endorsement key, attestation key} ->
//!           <- {session, credential}
//! Activate  POST sealblk/v0/activate  {session, what the credential holds} ->
//! ```
//! A host that returns the secret of a credential has both keys in one TPM.

use serde::{Deserialize, Serialize};

/// The path of [`Enrol`].
pub const ENROL: &str = "sealblk/v0/enrol";
/// The path of [`Activate`].
pub const ACTIVATE: &str = "sealblk/v0/activate";

/// A host that wants to be known. Keys and certificates are in base64.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Enrol<'a> {
    /// The name that the broker's operator has given it.
    pub host: String,
    /// What the operator has given it to show, if the endorsement key is not known already.
    pub token: Option<&'a str>,
    /// TPMT_PUBLIC of the endorsement key.
    pub endorsement_key: String,
    /// The maker's certificate for it.
    pub endorsement_certificate: Option<String>,
    /// TPMT_PUBLIC of the attestation key.
    pub attestation_key: String,
}

/// What the host has to open.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Challenge {
    /// This enrolment.
    pub session: String,
    /// TPM2B_ID_OBJECT, without its length, in base64.
    pub credential: String,
    /// TPM2B_ENCRYPTED_SECRET, without its length, in base64.
    pub secret: String,
}

/// What was in it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Activate<'a> {
    /// This enrolment.
    pub session: String,
    /// In base64.
    pub secret: &'a str,
}
