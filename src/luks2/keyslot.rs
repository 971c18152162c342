//! Keyslots of type `luks2`: a key, split by the anti-forensic splitter, encrypted under a key derived from a
//! passphrase (LUKS2 1.1, "Keyslots Object"), and the digest that verifies the decrypted key ("Digests Object").
//!
//! ```text
//! passphrase --kdf--> area key --+
//!                                | aes-xts-plain64, 512-byte sectors numbered from 0 at the start of the area
//! key --split--> 4000 stripes ---+--> 256000 bytes in the keyslots area
//! ```

use std::fmt;
use std::io;

use aes::Aes256;
use aes::cipher::KeyInit;
use xts_mode::{Xts128, get_tweak_default};

use crate::af;
use crate::hash::Hash;
use crate::header_io::HeaderIo;
use crate::kdf::{self, Argon2Cost, KdfError, derive};
use crate::lock::LockMode;
use crate::metadata::{Af, Area, Base64, Decimal, Digest, Id, Kdf, Luks2Keyslot, Other, Pbkdf2Digest};
use sealblk_secmem::arena::{ArenaError, SecretBox, SecretBytes};

/// Recovers the key that `slot` holds. Any passphrase gives some key: ask [`verify`].
pub(crate) fn open(
    io: &dyn HeaderIo,
    slot: &Luks2Keyslot,
    passphrase: &[u8],
) -> Result<SecretBytes, KeyslotError> {
    let hash = usable(slot)?;
    let mut area_key = SecretBytes::zeroed(KEY_LEN)?;
    derive(&slot.kdf, passphrase, &mut area_key)?;
    let mut material = SecretBytes::zeroed(MATERIAL_LEN)?;
    {
        let _lock = io.lock(LockMode::Read).map_err(KeyslotError::Lock)?;
        io.read_at(&mut material, slot.area.offset.0)
            .map_err(KeyslotError::Read)?;
    }
    area_cipher(&area_key)?.decrypt_area(&mut material, SECTOR, 0, get_tweak_default);
    let mut key = SecretBytes::zeroed(KEY_LEN)?;
    af::merge(hash, &material, &mut key);
    Ok(key)
}

/// A keyslot that is not in any header yet: it has neither number nor area.
pub struct NewKeyslot {
    /// What it holds: the header that takes it verifies this key.
    key: SecretBytes,
    kdf: Kdf,
    material: Vec<u8>,
}

impl fmt::Debug for NewKeyslot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewKeyslot").finish_non_exhaustive()
    }
}

impl NewKeyslot {
    /// Encrypts `key` with a passphrase that a person remembers or keeps, so that each try costs an attacker `cost`.
    ///
    /// # Errors
    /// If this host lacks the memory for it, or `key` has another length than [`KEY_LEN`].
    pub fn for_passphrase(
        key: &SecretBytes,
        passphrase: &SecretBytes,
        cost: Argon2Cost,
    ) -> Result<Self, KeyslotError> {
        Self::new(key, cost.to_kdf()?, passphrase)
    }

    /// Encrypts `key` with a passphrase that has 256 random bits: a derivation that costs more would protect nothing.
    ///
    /// # Errors
    /// If the key arena is full, there are no random numbers, or `key` has another length than [`KEY_LEN`].
    pub fn for_random_secret(key: &SecretBytes, passphrase: &SecretBytes) -> Result<Self, KeyslotError> {
        Self::new(key, kdf::cheap()?, passphrase)
    }

    fn new(key: &SecretBytes, kdf: Kdf, passphrase: &[u8]) -> Result<Self, KeyslotError> {
        if key.len() != KEY_LEN {
            return Err(KeyslotError::KeySize {
                bits: 8 * key.len() as u64,
            });
        }
        let mut area_key = SecretBytes::zeroed(KEY_LEN)?;
        derive(&kdf, passphrase, &mut area_key)?;
        let mut material = SecretBytes::random(MATERIAL_LEN)?;
        af::split(AF_HASH, key, &mut material);
        area_cipher(&area_key)?.encrypt_area(&mut material, SECTOR, 0, get_tweak_default);
        // Encrypted it is no secret any more.
        Ok(Self {
            key: SecretBytes::copy_of(key)?,
            kdf,
            material: material.to_vec(),
        })
    }

    /// The key that it holds.
    pub(crate) fn key(&self) -> &SecretBytes {
        &self.key
    }

    /// The keyslot as the metadata describes it with its area at `offset`, and the bytes that go there.
    pub(crate) fn at(self, offset: u64) -> (Luks2Keyslot, Vec<u8>) {
        let slot = Luks2Keyslot {
            key_size: KEY_SIZE,
            priority: None,
            af: Af {
                kind: "luks1".to_owned(),
                stripes: af::STRIPES,
                hash: AF_HASH.name().to_owned(),
                other: Other::new(),
            },
            area: Area {
                kind: "raw".to_owned(),
                offset: Decimal(offset),
                size: Decimal(AREA_LEN),
                encryption: ENCRYPTION.to_owned(),
                key_size: KEY_SIZE,
                other: Other::new(),
            },
            kdf: self.kdf,
            other: Other::new(),
        };
        (slot, self.material)
    }
}

/// Whether `key` is the one that `digest` was made of.
pub(crate) fn verify(digest: &Pbkdf2Digest, key: &SecretBytes) -> Result<bool, KeyslotError> {
    let hash = Hash::by_name(&digest.hash).ok_or_else(|| KdfError::Hash {
        name: digest.hash.clone(),
    })?;
    // LUKS1's digests, which a converted header keeps, have 20 bytes of whatever hash.
    let len = digest.digest.0.len();
    if len != LUKS1_DIGEST_LEN && len != hash.len() {
        return Err(KeyslotError::DigestLength { len });
    }
    let mut computed = SecretBytes::zeroed(len)?;
    kdf::pbkdf2(hash, key, &digest.salt.0, digest.iterations, &mut computed)?;
    Ok(computed.ct_eq(&digest.digest.0))
}

/// The digest of a new `key`, for these keyslots and segments.
pub(crate) fn digest_of(
    key: &SecretBytes,
    keyslots: Vec<Id>,
    segments: Vec<Id>,
) -> Result<Digest, KeyslotError> {
    let salt = kdf::fresh_salt()?;
    let mut digest = vec![0; AF_HASH.len()];
    // The key is 512 random bits: there is nothing that more iterations would protect.
    kdf::pbkdf2(AF_HASH, key, &salt.0, kdf::MIN_ITERATIONS, &mut digest)?;
    Ok(Digest::Pbkdf2(Pbkdf2Digest {
        keyslots,
        segments,
        hash: AF_HASH.name().to_owned(),
        iterations: kdf::MIN_ITERATIONS,
        salt,
        digest: Base64(digest),
        other: Other::new(),
    }))
}

/// Looks for anything about `slot` that is not known here, and gives the hash of its splitter.
fn usable(slot: &Luks2Keyslot) -> Result<Hash, KeyslotError> {
    let area = &slot.area;
    if area.kind != "raw" || area.encryption != ENCRYPTION || area.key_size as usize != KEY_LEN {
        let bits = u64::from(area.key_size) * 8;
        return Err(KeyslotError::Area {
            kind: area.kind.clone(),
            encryption: area.encryption.clone(),
            bits,
        });
    }
    if slot.af.kind != "luks1" || slot.af.stripes != af::STRIPES {
        return Err(KeyslotError::Af {
            kind: slot.af.kind.clone(),
            stripes: slot.af.stripes,
        });
    }
    if slot.key_size as usize != KEY_LEN {
        return Err(KeyslotError::KeySize {
            bits: u64::from(slot.key_size) * 8,
        });
    }
    Hash::by_name(&slot.af.hash).ok_or_else(|| {
        KdfError::Hash {
            name: slot.af.hash.clone(),
        }
        .into()
    })
}

fn area_cipher(key: &SecretBytes) -> Result<SecretBox<Xts128<Aes256>>, ArenaError> {
    let (data, tweak) = key.split_at(KEY_LEN / 2);
    let cipher = |half: &[u8]| Aes256::new_from_slice(half).expect("half of 64 bytes is an AES-256 key");
    SecretBox::new(|| Xts128::new(cipher(data), cipher(tweak)))
}

/// Why a keyslot does not open, apart from a wrong passphrase.
#[derive(Debug, thiserror::Error)]
pub enum KeyslotError {
    #[error(
        "its area is {kind} under {encryption} with a {bits}-bit key, not raw under {ENCRYPTION} with 512 bits"
    )]
    Area {
        kind: String,
        encryption: String,
        bits: u64,
    },
    #[error("its anti-forensic splitter is {kind} with {stripes} stripes, not luks1 with 4000")]
    Af { kind: String, stripes: u32 },
    #[error("it holds a key of {bits} bits, not 512")]
    KeySize { bits: u64 },
    #[error("the digest of its key has {len} bytes, which matches no hash")]
    DigestLength { len: usize },
    #[error("{0}")]
    Kdf(#[from] KdfError),
    #[error("its area cannot be locked")]
    Lock(#[source] io::Error),
    #[error("its area cannot be read")]
    Read(#[source] io::Error),
    #[error(transparent)]
    Arena(#[from] ArenaError),
}

/// The one cipher that sealblk reads and writes, for keyslots and payload alike.
pub(crate) const ENCRYPTION: &str = "aes-xts-plain64";

/// Length of its key in bytes: one AES-256 key for the data, one for the tweak.
pub const KEY_LEN: usize = 64;

/// The same as the metadata have it.
const KEY_SIZE: u32 = 64;
const _: () = assert!(KEY_SIZE as usize == KEY_LEN);

/// Length of a keyslot's area: its material, rounded up to where the next may start.
pub(crate) const AREA_LEN: u64 = (MATERIAL_LEN as u64).next_multiple_of(crate::metadata::AREA_ALIGNMENT);

/// How long the anti-forensic material of a keyslot is, while it is opened in memory for keys.
pub const MATERIAL_LEN: usize = KEY_LEN * af::STRIPES as usize;
const SECTOR: usize = 512;
const AF_HASH: Hash = Hash::Sha256;
const LUKS1_DIGEST_LEN: usize = 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_tells_its_key_from_every_other() {
        let key = SecretBytes::random(KEY_LEN).unwrap();
        let Digest::Pbkdf2(digest) = digest_of(&key, vec![], vec![]).unwrap() else {
            unreachable!()
        };
        assert!(verify(&digest, &key).unwrap());
        let other = SecretBytes::random(KEY_LEN).unwrap();
        assert!(!verify(&digest, &other).unwrap());
    }

    #[test]
    fn a_digest_of_no_length_or_a_strange_one_is_no_proof() {
        let key = SecretBytes::random(KEY_LEN).unwrap();
        let Digest::Pbkdf2(mut digest) = digest_of(&key, vec![], vec![]).unwrap() else {
            unreachable!()
        };
        for len in [0, 1, 19, 21, 31] {
            digest.digest.0.truncate(len);
            digest.digest.0.resize(len, 0);
            assert!(
                matches!(verify(&digest, &key), Err(KeyslotError::DigestLength { .. })),
                "{len}"
            );
        }
    }
}
