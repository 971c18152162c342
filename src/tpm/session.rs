//! Authorisation sessions that encrypt a secret on its way through the TPM's bus (TPM 2.0 Library, part 1, 19 and 21).
//!
//! The session's key comes from a salt that only the TPM's storage key can read; every command and answer of it carries an
//! HMAC, and its first parameter, the secret, is encrypted by AES-128-CFB. So an eavesdropper on the bus between processor and
//! TPM learns nothing, and a change of the data is detected.

use aes::cipher::KeyIvInit;
use hmac::{Hmac, KeyInit, Mac};
use ring::agreement::{ECDH_P256, EphemeralPrivateKey, UnparsedPublicKey, agree_ephemeral};
use ring::rand::SystemRandom;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tpm2_protocol::basic::TpmUint16;
use tpm2_protocol::data::{TpmAlgId, TpmtSymDef, TpmuSymKeyBits, TpmuSymMode};
use zeroize::Zeroizing;

use super::TpmFailure;
use super::codec::{Marshal, Reader};
use sealblk_secmem::arena::on_wiped_stack;

/// TPMA_SESSION: it goes on after the command; the first parameter of the command, and of the answer, is encrypted.
pub(super) const CONTINUE: u8 = 0x01;
pub(super) const DECRYPT: u8 = 0x20;
pub(super) const ENCRYPT: u8 = 0x40;

/// AES of 128 bits in CFB mode: how TPMs encrypt parameters, and objects under their parent.
pub(super) const AES_128_CFB: TpmtSymDef = TpmtSymDef {
    algorithm: TpmAlgId::Aes,
    key_bits: TpmuSymKeyBits::Aes(TpmUint16::new(128)),
    mode: TpmuSymMode::Aes(TpmAlgId::Cfb),
};

/// A key that encrypts nothing.
pub(super) const NO_CIPHER: TpmtSymDef = TpmtSymDef {
    algorithm: TpmAlgId::Null,
    key_bits: TpmuSymKeyBits::Null,
    mode: TpmuSymMode::Null,
};

/// TPM_SE.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    Hmac = 0,
    Policy = 1,
}

const NONCE: usize = 32;

/// A session of ours in the TPM.
pub(super) struct Session {
    pub(super) handle: u32,
    key: Zeroizing<[u8; 32]>,
    nonce_caller: [u8; NONCE],
    nonce_tpm: Vec<u8>,
    encrypts_answer: bool,
}

/// A session that the TPM does not have yet.
pub(super) struct Start {
    kind: Kind,
    nonce_caller: [u8; NONCE],
    /// TPMS_ECC_POINT of a key that is used once. The salt is what it agrees on with the storage key.
    point: Vec<u8>,
    salt: Zeroizing<[u8; 32]>,
}

impl Start {
    /// A session with a salt that only the TPM with the storage key at the point (`x`, `y`) can read.
    pub(super) fn new(kind: Kind, x: &[u8], y: &[u8]) -> Result<Self, TpmFailure> {
        let host = || TpmFailure::Host(std::io::Error::other("the random number generator fails").into());
        let mut nonce_caller = [0; NONCE];
        getrandom::fill(&mut nonce_caller).map_err(|_| host())?;
        let private = EphemeralPrivateKey::generate(&ECDH_P256, &SystemRandom::new()).map_err(|_| host())?;
        let public = private.compute_public_key().map_err(|_| host())?;
        // An uncompressed point: 4, x, y.
        let (our_x, our_y) = public.as_ref()[1..].split_at(32);
        let peer = [&[4][..], x, y].concat();
        let salt = agree_ephemeral(private, &UnparsedPublicKey::new(&ECDH_P256, peer), |z| {
            on_wiped_stack(|| kdfe(z, "SECRET", our_x, x))
        });
        let salt = salt.map_err(|_| TpmFailure::Changed("its storage key is not a point of P-256"))?;
        let mut point = Vec::new();
        point.sized(our_x);
        point.sized(our_y);
        Ok(Self {
            kind,
            nonce_caller,
            point,
            salt,
        })
    }

    /// The parameters of TPM2_StartAuthSession.
    pub(super) fn parameters(&self) -> Vec<u8> {
        let mut parameters = Vec::new();
        parameters.sized(&self.nonce_caller);
        parameters.sized(&self.point);
        parameters.push(self.kind as u8);
        parameters.put(&AES_128_CFB);
        parameters.put(&TpmAlgId::Sha256);
        parameters
    }

    /// The session by its handle and the nonce of the TPM's answer.
    pub(super) fn answered(self, handle: u32, nonce_tpm: Vec<u8>) -> Session {
        let key = on_wiped_stack(|| kdfa(&self.salt[..], "ATH", &nonce_tpm, &self.nonce_caller, 256));
        Session {
            handle,
            key,
            nonce_caller: self.nonce_caller,
            nonce_tpm,
            encrypts_answer: false,
        }
    }
}

impl Session {
    pub(super) fn nonce_caller(&self) -> &[u8] {
        &self.nonce_caller
    }

    /// Begins a command: a fresh nonce, and, with [`DECRYPT`], its first parameter encrypted.
    pub(super) fn begin(&mut self, attributes: u8, parameters: &mut [u8]) -> Result<(), TpmFailure> {
        getrandom::fill(&mut self.nonce_caller).map_err(|e| TpmFailure::Host(e.into()))?;
        self.encrypts_answer = attributes & ENCRYPT != 0;
        if attributes & DECRYPT != 0 {
            let first = first_parameter(parameters).expect("it has one");
            self.cipher(&self.nonce_caller, &self.nonce_tpm, first, Direction::Encrypt);
        }
        Ok(())
    }

    /// The HMAC of a command.
    pub(super) fn authorise(&self, code: u32, names: &[u8], parameters: &[u8], attributes: u8) -> [u8; 32] {
        let digest = Sha256::new()
            .chain_update(code.to_be_bytes())
            .chain_update(names)
            .chain_update(parameters)
            .finalize();
        self.hmac(&digest, &self.nonce_caller, &self.nonce_tpm, attributes)
    }

    /// Takes an answer: its HMAC is checked, and its first parameter decrypted, if that was asked for.
    pub(super) fn end(
        &mut self,
        code: u32,
        parameters: &mut [u8],
        nonce: &[u8],
        attributes: u8,
        hmac: &[u8],
    ) -> Option<()> {
        let digest = Sha256::new()
            .chain_update(0_u32.to_be_bytes())
            .chain_update(code.to_be_bytes())
            .chain_update(&*parameters)
            .finalize();
        nonce.clone_into(&mut self.nonce_tpm);
        let expected = self.hmac(&digest, &self.nonce_tpm, &self.nonce_caller, attributes);
        if !bool::from(expected[..].ct_eq(hmac)) {
            return None;
        }
        if self.encrypts_answer {
            let first = first_parameter(parameters)?;
            self.cipher(&self.nonce_tpm, &self.nonce_caller, first, Direction::Decrypt);
        }
        Some(())
    }

    fn hmac(&self, digest: &[u8], newer: &[u8], older: &[u8], attributes: u8) -> [u8; 32] {
        on_wiped_stack(|| {
            let mut hmac = Hmac::<Sha256>::new_from_slice(&self.key[..]).expect("any length will do");
            for part in [digest, newer, older, &[attributes]] {
                hmac.update(part);
            }
            hmac.finalize().into_bytes().into()
        })
    }

    fn cipher(&self, newer: &[u8], older: &[u8], bytes: &mut [u8], direction: Direction) {
        on_wiped_stack(|| {
            let secret = kdfa(&self.key[..], "CFB", newer, older, 256);
            let (key, iv) = secret.split_at(16);
            match direction {
                Direction::Encrypt => cfb_mode::Encryptor::<aes::Aes128>::new_from_slices(key, iv)
                    .expect("both have the same length")
                    .encrypt(bytes),
                Direction::Decrypt => cfb_mode::Decryptor::<aes::Aes128>::new_from_slices(key, iv)
                    .expect("both have the same length")
                    .decrypt(bytes),
            }
        });
    }
}

#[derive(Clone, Copy)]
enum Direction {
    Encrypt,
    Decrypt,
}

/// The bytes of the first parameter, which is a TPM2B.
fn first_parameter(parameters: &mut [u8]) -> Option<&mut [u8]> {
    let len = Reader(parameters).u16()?;
    parameters[2..].get_mut(..len.into())
}

/// KDFa of up to 256 bits (part 1, 11.4.10.2): one block of HMAC-SHA256, of which fewer are the first ones.
pub(super) fn kdfa(key: &[u8], label: &str, u: &[u8], v: &[u8], bits: u32) -> Zeroizing<[u8; 32]> {
    let mut hmac = Hmac::<Sha256>::new_from_slice(key).expect("any length will do");
    for part in [
        &1_u32.to_be_bytes(),
        label.as_bytes(),
        &[0],
        u,
        v,
        &bits.to_be_bytes(),
    ] {
        hmac.update(part);
    }
    Zeroizing::new(hmac.finalize().into_bytes().into())
}

/// KDFe of 256 bits (part 1, 11.4.10.3): one block of SHA-256.
fn kdfe(z: &[u8], label: &str, u: &[u8], v: &[u8]) -> Zeroizing<[u8; 32]> {
    let mut hash = Sha256::new();
    for part in [&1_u32.to_be_bytes(), z, label.as_bytes(), &[0], u, v] {
        hash.update(part);
    }
    Zeroizing::new(hash.finalize().into())
}
