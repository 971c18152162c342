//! The check of a quote: a known attestation key has made it, for this session, and the registers hold their reference
//! values. All other data in it are untrusted.

use base16ct::lower;
use ring::signature::{RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents};

use super::state::Reference;
use crate::kbs::{Evidence, Malformed, ReportData};
use crate::tpm::attest::{Attested, NotAttested, RsaPublic};

/// Why evidence is not believed.
#[derive(Debug, thiserror::Error)]
pub enum Distrust {
    /// It is not of the form that it has to have.
    #[error("the evidence makes no sense: {0}")]
    Malformed(#[from] Malformed),
    /// What is signed is no quote.
    #[error("the quote makes no sense: {0}")]
    NotAttested(#[from] NotAttested),
    /// Somebody else has signed it.
    #[error("the quote is not signed by this host's attestation key")]
    Signature,
    /// It was made for another session.
    #[error(
        "the quote is not for this session's nonce and key: it is replayed, or the TPM's answer was altered"
    )]
    Replayed,
    /// The registers that are sent are not those that are signed.
    #[error("the registers' values differ from those that the TPM has signed")]
    Digest,
    /// There is nothing to compare with.
    #[error("this host has no reference values; set them at the broker")]
    NoReference,
    /// A register that counts is not in the quote.
    #[error("PCR {0} is not in the quote")]
    NotQuoted(u8),
    /// The host has booted something else.
    #[error("PCR {register} differs from its reference value: it holds {found}")]
    Register {
        /// Which one.
        register: u8,
        /// What it holds, in hexadecimal digits.
        found: String,
    },
}

/// Checks evidence for a session whose runtime data are `expected`, by the attestation key `key` (TPMT_PUBLIC).
///
/// # Errors
/// [`Distrust`], with the first thing that is wrong.
pub fn check(
    evidence: &Evidence,
    expected: &ReportData,
    key: &[u8],
    reference: &Reference,
) -> Result<Attested, Distrust> {
    let quote = evidence.quote()?;
    let key = RsaPublic::attestation(key)?;
    let exponent = key.exponent.to_be_bytes();
    let zeros = key.exponent.leading_zeros() as usize / 8;
    RsaPublicKeyComponents {
        n: &key.modulus,
        e: &exponent[zeros..].to_vec(),
    }
    .verify(&RSA_PKCS1_2048_8192_SHA256, &quote.message, &quote.signature)
    .map_err(|_| Distrust::Signature)?;
    let attested = Attested::parse(&quote.message)?;
    if attested.qualifying != expected {
        return Err(Distrust::Replayed);
    }
    if attested.digest != attested.pcrs.digest(&quote.pcrs) {
        return Err(Distrust::Digest);
    }
    let mut counted = 0;
    for (register, mut values) in reference.registers() {
        if !attested.pcrs.contains(register) {
            return Err(Distrust::NotQuoted(register));
        }
        let found = quote.pcrs[usize::from(register)];
        if !values.any(|value| value == found) {
            let found = lower::encode_string(&found);
            return Err(Distrust::Register { register, found });
        }
        counted += 1;
    }
    match counted {
        0 => Err(Distrust::NoReference),
        _ => Ok(attested),
    }
}
