//! Encryption from a broker to a host's one-time key: JWE in its flattened form (RFC 7516, 7.2.2), by ECDH-ES+A256KW on P-256
//! (RFC 7518, 4.6) with A256GCM (5.3). Keys of both sides are used once.

use aes_kw::KwAes256;
use aes_kw::cipher::KeyInit;
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use ring::agreement::{ECDH_P256, EphemeralPrivateKey, UnparsedPublicKey, agree_ephemeral};
use ring::rand::SystemRandom;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::parsing;
use crate::providers::{wrap, wrap::KEK_LEN, wrap::Kek};
use sealblk_secmem::{arena::ArenaError, arena::SecretBytes, arena::on_wiped_stack};

const ALGORITHM: &str = "ECDH-ES+A256KW";
const ENCRYPTION: &str = "A256GCM";
const CURVE: &str = "P-256";
/// A wrapped key: eight bytes longer than the key (RFC 3394).
const WRAPPED: usize = KEK_LEN + 8;

/// The public key of a host (RFC 7518, 6.2). The fields are in the order of their names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublicKey {
    /// How it is used.
    #[serde(default)]
    alg: String,
    crv: String,
    kty: String,
    x: String,
    y: String,
}

/// The private key that belongs to one.
#[derive(Debug)]
pub struct OneTimeKey {
    private: EphemeralPrivateKey,
    public: PublicKey,
}

/// What is encrypted.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Response {
    /// The header, in base64.
    protected: String,
    encrypted_key: String,
    iv: String,
    ciphertext: String,
    tag: String,
}

#[derive(Serialize, Deserialize)]
struct Header {
    alg: String,
    enc: String,
    epk: Point,
}

#[derive(Serialize, Deserialize)]
struct Point {
    crv: String,
    kty: String,
    x: String,
    y: String,
}

/// Why something cannot be encrypted or decrypted.
#[derive(Debug, thiserror::Error)]
pub enum JweError {
    /// It is not of this form.
    #[error("{0}")]
    Form(&'static str),
    /// It is for another key, or was altered.
    #[error("the broker's encrypted answer does not authenticate")]
    Unauthentic,
    /// This host has no random numbers.
    #[error("the random number generator fails")]
    Random,
    /// This host has no memory for it.
    #[error(transparent)]
    Arena(#[from] ArenaError),
}

impl OneTimeKey {
    /// A new one.
    ///
    /// # Errors
    /// [`JweError::Random`].
    pub fn new() -> Result<Self, JweError> {
        let private =
            EphemeralPrivateKey::generate(&ECDH_P256, &SystemRandom::new()).map_err(|_| JweError::Random)?;
        let point = private.compute_public_key().map_err(|_| JweError::Random)?;
        let (x, y) = coordinates(point.as_ref());
        let public = PublicKey {
            alg: ALGORITHM.to_owned(),
            crv: CURVE.to_owned(),
            kty: "EC".to_owned(),
            x,
            y,
        };
        Ok(Self { private, public })
    }

    /// What the broker is told.
    pub fn public(&self) -> &PublicKey {
        &self.public
    }

    /// Decrypts what was encrypted to it.
    ///
    /// # Errors
    /// [`JweError`].
    pub fn open(self, response: &Response) -> Result<SecretBytes, JweError> {
        const HEADER: JweError = JweError::Form("its header cannot be parsed");
        let header = BASE64_URL_SAFE_NO_PAD
            .decode(&response.protected)
            .map_err(|_| HEADER)?;
        let header: Header = parsing::json(&header).map_err(|_| HEADER)?;
        if header.alg != ALGORITHM || header.enc != ENCRYPTION {
            return Err(JweError::Form("it is not by ECDH-ES+A256KW with A256GCM"));
        }
        let theirs = point(&header.epk.kty, &header.epk.crv, &header.epk.x, &header.epk.y)?;
        let wrapped: [u8; WRAPPED] = bytes(&response.encrypted_key)?
            .try_into()
            .map_err(|_| JweError::Form("its encrypted key is not of 320 bits"))?;
        let mut key = SecretBytes::zeroed(KEK_LEN)?;
        with_shared_key(self.private, &theirs, |kw| {
            kw.unwrap_key(&wrapped, &mut key).map(drop).is_ok()
        })
        .filter(|unwrapped| *unwrapped)
        .ok_or(JweError::Unauthentic)?;
        let key = Kek::new(key).expect("it is as long");
        let [iv, ciphertext, tag] =
            [&response.iv, &response.ciphertext, &response.tag].map(|text| bytes(text));
        let opened = wrap::decrypt(&key, &iv?, response.protected.as_bytes(), &ciphertext?, &tag?);
        match opened {
            Some(Ok(secret)) => Ok(secret),
            Some(Err(wrap::UnwrapError::Arena(e))) => Err(e.into()),
            _ => Err(JweError::Unauthentic),
        }
    }
}

/// Encrypts `secret` to a host's key.
///
/// # Errors
/// [`JweError::Form`], if the key is no point of P-256; else this host's failures.
pub fn encrypt(to: &PublicKey, secret: &[u8]) -> Result<Response, JweError> {
    let theirs = point(&to.kty, &to.crv, &to.x, &to.y)?;
    let OneTimeKey { private, public } = OneTimeKey::new()?;
    let header = Header {
        alg: ALGORITHM.to_owned(),
        enc: ENCRYPTION.to_owned(),
        epk: Point {
            crv: public.crv,
            kty: public.kty,
            x: public.x,
            y: public.y,
        },
    };
    let header = serde_json::to_vec(&header).expect("texts are JSON");
    let protected = BASE64_URL_SAFE_NO_PAD.encode(header);
    let key = Kek::new(SecretBytes::random(KEK_LEN)?).expect("it is as long");
    let mut wrapped = [0; WRAPPED];
    with_shared_key(private, &theirs, |kw| {
        kw.wrap_key(key.key(), &mut wrapped).map(drop).is_ok()
    })
    .filter(|wrapped| *wrapped)
    .ok_or(JweError::Form("its key is not a point of P-256"))?;
    let (iv, ciphertext, tag) = wrap::encrypt(&key, protected.as_bytes(), secret)?;
    let text = |bytes: &[u8]| BASE64_URL_SAFE_NO_PAD.encode(bytes);
    Ok(Response {
        encrypted_key: text(&wrapped),
        iv: text(&iv),
        ciphertext: text(&ciphertext),
        tag: text(&tag),
        protected,
    })
}

/// Works with the key that both sides get by Concat KDF (RFC 7518, 4.6.2); none, if the other's is no point of P-256.
fn with_shared_key<T>(
    private: EphemeralPrivateKey,
    theirs: &[u8; 65],
    work: impl FnOnce(KwAes256) -> T,
) -> Option<T> {
    agree_ephemeral(private, &UnparsedPublicKey::new(&ECDH_P256, theirs), |z| {
        on_wiped_stack(|| {
            let len = |len: usize| (len as u32).to_be_bytes();
            let mut hash = Sha256::new();
            hash.update(1_u32.to_be_bytes());
            hash.update(z);
            hash.update(len(ALGORITHM.len()));
            hash.update(ALGORITHM);
            // Nobody's name, twice; the key's bits.
            hash.update(len(0));
            hash.update(len(0));
            hash.update(len(8 * KEK_LEN));
            let key = Zeroizing::new(<[u8; 32]>::from(hash.finalize()));
            work(KwAes256::new(&(*key).into()))
        })
    })
    .ok()
}

/// The coordinates of an uncompressed point.
fn coordinates(point: &[u8]) -> (String, String) {
    let (x, y) = point[1..].split_at(32);
    (BASE64_URL_SAFE_NO_PAD.encode(x), BASE64_URL_SAFE_NO_PAD.encode(y))
}

/// An uncompressed point.
fn point(kty: &str, crv: &str, x: &str, y: &str) -> Result<[u8; 65], JweError> {
    if kty != "EC" || crv != CURVE {
        return Err(JweError::Form("its key is not one of P-256"));
    }
    [&[4][..], &bytes(x)?, &bytes(y)?]
        .concat()
        .try_into()
        .map_err(|_| JweError::Form("its key is not a point of P-256"))
}

fn bytes(text: &str) -> Result<Vec<u8>, JweError> {
    BASE64_URL_SAFE_NO_PAD
        .decode(text)
        .map_err(|_| JweError::Form("a part of it is not base64"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_to_a_key_opens_with_it_and_no_other() {
        let key = OneTimeKey::new().unwrap();
        let response = encrypt(key.public(), b"the resource").unwrap();
        let other = OneTimeKey::new().unwrap();
        assert!(matches!(other.open(&response), Err(JweError::Unauthentic)));
        assert!(key.open(&response).unwrap().ct_eq(b"the resource"));
    }

    #[test]
    fn altered_parts_do_not_open() {
        for part in 0..5 {
            let key = OneTimeKey::new().unwrap();
            let mut altered = encrypt(key.public(), b"the resource").unwrap();
            let text = match part {
                0 => &mut altered.protected,
                1 => &mut altered.encrypted_key,
                2 => &mut altered.iv,
                3 => &mut altered.ciphertext,
                _ => &mut altered.tag,
            };
            let other = if text.starts_with('A') { "B" } else { "A" };
            text.replace_range(..1, other);
            assert!(key.open(&altered).is_err(), "part {part}");
        }
    }
}
