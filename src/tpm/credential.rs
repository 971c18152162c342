//! Credentials: an encrypted secret that only the TPM with a given endorsement key decrypts, and only if it also has a given
//! attestation key (TPM 2.0 Library, part 1, 24; part 3, 12.6, TPM2_MakeCredential). Making a credential needs no TPM.

use aes::cipher::KeyIvInit;
use crypto_bigint::modular::{BoxedMontyForm, BoxedMontyParams};
use crypto_bigint::{BoxedUint, Odd};
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::attest::RsaPublic;
use super::session::kdfa;

/// The digest's length, and that of a seed.
const HASH: usize = 32;

/// What [`super::Tpm::activate`] takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credential {
    /// TPM2B_ID_OBJECT, without its length.
    pub object: Vec<u8>,
    /// TPM2B_ENCRYPTED_SECRET, without its length.
    pub secret: Vec<u8>,
}

/// Why no credential can be made.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// This host has no random numbers.
    #[error("the random number generator fails")]
    Random(#[from] getrandom::Error),
    /// No RSA key has such a modulus.
    #[error("the endorsement key is not an RSA key")]
    Key,
}

/// Makes a credential for the TPM with the endorsement key `ek` and an attestation key whose Name is `name`
/// ([`super::object_name`]).
///
/// # Errors
/// [`CredentialError`].
pub fn make(ek: &RsaPublic, name: &[u8; 34], secret: &[u8; 32]) -> Result<Credential, CredentialError> {
    let mut seed = Zeroizing::new([0; HASH]);
    getrandom::fill(&mut seed[..])?;

    let mut identity = Zeroizing::new([&(HASH as u16).to_be_bytes()[..], secret].concat());
    let key = kdfa(&seed[..], "STORAGE", name, &[], 128);
    cfb_mode::Encryptor::<aes::Aes128>::new_from_slices(&key[..16], &[0; 16])
        .expect("both have the same length")
        .encrypt(&mut identity);
    let key = kdfa(&seed[..], "INTEGRITY", &[], &[], 256);
    let mut hmac = Hmac::<Sha256>::new_from_slice(&key[..]).expect("any length will do");
    hmac.update(&identity);
    hmac.update(name);
    let hmac = hmac.finalize().into_bytes();

    Ok(Credential {
        object: [&(HASH as u16).to_be_bytes()[..], &hmac, &identity].concat(),
        secret: encrypt(ek, &seed)?,
    })
}

/// RSAES-OAEP with SHA-256 (RFC 8017, 7.1.1; part 1, B.4 and B.10.4).
fn encrypt(key: &RsaPublic, message: &[u8; HASH]) -> Result<Vec<u8>, CredentialError> {
    const LABEL: &[u8] = b"IDENTITY\0";
    let len = key.modulus.len();
    let mut encoded = Zeroizing::new(vec![0; len]);
    let (seed, block) = encoded[1..]
        .split_at_mut_checked(HASH)
        .ok_or(CredentialError::Key)?;
    // The label's hash, zeros, a one, the message.
    let at = block
        .len()
        .checked_sub(HASH)
        .filter(|at| *at > HASH)
        .ok_or(CredentialError::Key)?;
    block[..HASH].copy_from_slice(&Sha256::digest(LABEL));
    block[at - 1] = 1;
    block[at..].copy_from_slice(message);
    getrandom::fill(seed)?;
    mask(seed, block);
    mask(block, seed);

    let bits = 8 * len as u32;
    let number = |bytes: &[u8]| BoxedUint::from_be_slice(bytes, bits).map_err(|_| CredentialError::Key);
    let modulus: Option<Odd<BoxedUint>> = Odd::new(number(&key.modulus)?).into();
    let parameters = BoxedMontyParams::new(modulus.ok_or(CredentialError::Key)?);
    let exponent = BoxedUint::from(key.exponent);
    let power = BoxedMontyForm::new(number(&encoded)?, &parameters).pow(&exponent);
    Ok(power.retrieve().to_be_bytes().into_vec())
}

/// MGF1 with SHA-256 of `seed`, by which `bytes` are masked.
fn mask(seed: &[u8], bytes: &mut [u8]) {
    for (counter, part) in bytes.chunks_mut(HASH).enumerate() {
        let hash = Sha256::new()
            .chain_update(seed)
            .chain_update((counter as u32).to_be_bytes())
            .finalize();
        part.iter_mut().zip(hash).for_each(|(byte, mask)| *byte ^= mask);
    }
}
