//! Secrets wrapped under a KEK that is on this host: AES-256-GCM, bound to volume, provider, key ID and keyslot.
//!
//! ```text
//! offset  length
//!      0       1   version, 1
//!      1      12   nonce, random
//!     13       n   ciphertext, as long as the secret
//!   13+n      16   tag
//! ```
//! The associated data is [`LABEL`], the volume's UUID (16 bytes), the keyslot (32 bits, big-endian), then the
//! provider's name and the key ID, each after its length in bytes (32 bits, big-endian): no two bindings give the
//! same bytes. A KEK wraps a few secrets in its life, far from the 2^32 that random nonces allow.

use aes_gcm::aead::inout::InOutBuf;
use aes_gcm::{AeadInOut, Aes256Gcm, KeyInit, Nonce, Tag};

use crate::keys::Binding;
use sealblk_secmem::{arena::ArenaError, arena::SecretBox, arena::SecretBytes, arena::on_wiped_stack};

/// The length of a KEK, in bytes.
pub(crate) const KEK_LEN: usize = 32;

/// A key encryption key: 32 bytes, for AES-256-GCM.
#[derive(Debug)]
pub(crate) struct Kek(SecretBytes);

/// Key material that is none of AES-256.
#[derive(Debug, thiserror::Error)]
#[error("it has {} bits, but a KEK has {}", 8 * .0, 8 * KEK_LEN)]
pub(crate) struct KekLength(usize);

impl Kek {
    /// Takes key material for a KEK.
    ///
    /// # Errors
    /// If it is not [`KEK_LEN`] bytes long.
    pub(crate) fn new(key: SecretBytes) -> Result<Self, KekLength> {
        match key.len() {
            KEK_LEN => Ok(Self(key)),
            len => Err(KekLength(len)),
        }
    }

    /// The key itself, to be kept elsewhere.
    pub(crate) fn key(&self) -> &SecretBytes {
        &self.0
    }
}

const VERSION: u8 = 1;
const NONCE_LEN: usize = 12;
const TAG_LEN: usize = 16;
/// Sets these messages apart from all others that a key might ever authenticate.
const LABEL: &[u8] = b"sealblk wrapped slot secret\0";

/// Why a wrapped secret does not unwrap.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UnwrapError {
    #[error("not a wrapped key of version {VERSION}")]
    Format,
    #[error("it does not authenticate")]
    Unauthentic,
    #[error(transparent)]
    Arena(#[from] ArenaError),
}

/// Wraps `secret` under `kek`.
pub(super) fn wrap(kek: &Kek, binding: &Binding<'_>, secret: &SecretBytes) -> Result<Vec<u8>, ArenaError> {
    wrap_with(kek, &associated_data(binding), secret)
}

/// Unwraps what [`wrap`] made with the same KEK and binding.
pub(super) fn unwrap(kek: &Kek, binding: &Binding<'_>, wrapped: &[u8]) -> Result<SecretBytes, UnwrapError> {
    unwrap_with(kek, &associated_data(binding), wrapped)
}

/// Encrypts `secret` in the form above. `associated` begins with a label that no other use of a key has.
pub(crate) fn wrap_with(kek: &Kek, associated: &[u8], secret: &[u8]) -> Result<Vec<u8>, ArenaError> {
    let (nonce, ciphertext, tag) = encrypt(kek, associated, secret)?;
    Ok([&[VERSION][..], &nonce, &ciphertext, &tag].concat())
}

/// AES-256-GCM by itself: nonce, ciphertext and tag.
pub(crate) fn encrypt(
    kek: &Kek,
    associated: &[u8],
    secret: &[u8],
) -> Result<([u8; NONCE_LEN], Vec<u8>, Tag), ArenaError> {
    let mut nonce = [0; NONCE_LEN];
    getrandom::fill(&mut nonce).map_err(ArenaError::Random)?;
    let mut ciphertext = vec![0; secret.len()];
    let buffers = InOutBuf::new(secret, &mut ciphertext).expect("both are as long as the secret");
    let gcm = gcm(kek)?;
    let tag = on_wiped_stack(|| gcm.encrypt_inout_detached(&nonce.into(), associated, buffers))
        .expect("a secret in memory is shorter than AES-GCM's limit of 64 GiB");
    Ok((nonce, ciphertext, tag))
}

/// Decrypts what [`wrap_with`] made with the same KEK and associated data.
pub(crate) fn unwrap_with(kek: &Kek, associated: &[u8], wrapped: &[u8]) -> Result<SecretBytes, UnwrapError> {
    let (&version, rest) = wrapped.split_first().ok_or(UnwrapError::Format)?;
    if version != VERSION || rest.len() < NONCE_LEN + TAG_LEN {
        return Err(UnwrapError::Format);
    }
    let (nonce, rest) = rest.split_at(NONCE_LEN);
    let (ciphertext, tag) = rest.split_at(rest.len() - TAG_LEN);
    decrypt(kek, nonce, associated, ciphertext, tag).ok_or(UnwrapError::Unauthentic)?
}

/// AES-256-GCM by itself. None, if it does not authenticate, or `nonce` or `tag` has not its length.
pub(crate) fn decrypt(
    kek: &Kek,
    nonce: &[u8],
    associated: &[u8],
    ciphertext: &[u8],
    tag: &[u8],
) -> Option<Result<SecretBytes, UnwrapError>> {
    let (nonce, tag) = (Nonce::try_from(nonce).ok()?, Tag::try_from(tag).ok()?);
    let decrypt = || -> Result<Option<SecretBytes>, ArenaError> {
        let mut secret = SecretBytes::zeroed(ciphertext.len())?;
        let buffers = InOutBuf::new(ciphertext, &mut secret).expect("both are as long as the ciphertext");
        let gcm = gcm(kek)?;
        let opened = on_wiped_stack(|| gcm.decrypt_inout_detached(&nonce, associated, buffers, &tag));
        Ok(opened.is_ok().then_some(secret))
    };
    decrypt().map_err(UnwrapError::from).transpose()
}

fn gcm(kek: &Kek) -> Result<SecretBox<Aes256Gcm>, ArenaError> {
    SecretBox::new(|| Aes256Gcm::new_from_slice(&kek.0).expect("a KEK has KEK_LEN bytes"))
}

fn associated_data(binding: &Binding<'_>) -> Vec<u8> {
    let mut data = LABEL.to_vec();
    data.extend_from_slice(binding.volume.as_bytes());
    data.extend_from_slice(&binding.keyslot.to_be_bytes());
    for text in [binding.provider, &binding.key_id.0] {
        let len =
            u32::try_from(text.len()).expect("names that came out of a LUKS2 header are shorter than 4 GiB");
        data.extend_from_slice(&len.to_be_bytes());
        data.extend_from_slice(text.as_bytes());
    }
    data
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::KeyId;
    use uuid::Uuid;

    fn secret(fill: u8) -> SecretBytes {
        SecretBytes::take(&mut [fill; 32]).unwrap()
    }

    fn kek(fill: u8) -> Kek {
        Kek::new(secret(fill)).unwrap()
    }

    fn binding(key_id: &KeyId) -> Binding<'_> {
        Binding {
            volume: Uuid::from_u128(7),
            provider: "native",
            key_id,
            keyslot: 1,
        }
    }

    #[test]
    fn associated_data_tells_every_binding_apart() {
        let ids = [KeyId("bc".into()), KeyId("c".into()), KeyId("".into())];
        let bindings = [
            Binding {
                volume: Uuid::nil(),
                provider: "a",
                key_id: &ids[0],
                keyslot: 0,
            },
            Binding {
                volume: Uuid::nil(),
                provider: "ab",
                key_id: &ids[1],
                keyslot: 0,
            },
            Binding {
                volume: Uuid::nil(),
                provider: "abc",
                key_id: &ids[2],
                keyslot: 0,
            },
            Binding {
                volume: Uuid::nil(),
                provider: "a",
                key_id: &ids[0],
                keyslot: 1,
            },
            Binding {
                volume: Uuid::from_u128(1),
                provider: "a",
                key_id: &ids[0],
                keyslot: 0,
            },
        ];
        let distinct: std::collections::HashSet<_> = bindings.iter().map(associated_data).collect();
        assert_eq!(distinct.len(), bindings.len());
    }

    /// Made by OpenSSL 3, from the layout above. If it stops unwrapping, no volume in the field opens any more.
    #[test]
    fn format_stays_as_it_is() {
        let key_id = KeyId("0011223344556677.a5".into());
        let wrapped = include_bytes!("testdata/wrapped-v1.bin");
        let secret = unwrap(&kek(0x4b), &binding(&key_id), wrapped).unwrap();
        assert!(secret.ct_eq(&[0x5e; 32]));
    }

    #[test]
    fn every_altered_byte_is_noticed() {
        let key_id = KeyId("k".into());
        let kek = kek(1);
        let wrapped = wrap(&kek, &binding(&key_id), &secret(2)).unwrap();
        assert!(unwrap(&kek, &binding(&key_id), &wrapped).unwrap().ct_eq(&[2; 32]));
        for at in 0..wrapped.len() {
            let mut altered = wrapped.clone();
            altered[at] ^= 0x10;
            assert!(unwrap(&kek, &binding(&key_id), &altered).is_err(), "byte {at}");
            assert!(
                unwrap(&kek, &binding(&key_id), &wrapped[..at]).is_err(),
                "cut at {at}"
            );
        }
    }
}
