//! Key IDs of transit: the name of the server's key, and the KEK's ciphertext under it.
//!
//! ```text
//! NAME:vault:vVERSION:BASE64
//! ```
//!
//! A key ID comes from a volume's header, which is untrusted: a key ID that does not have exactly this form never gets into
//! a request.

use std::fmt;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use crate::keys::KeyId;

/// The longest ciphertext that is believed, in base64: RSA with 4096 bits gives half of it.
const CIPHERTEXT_LIMIT: usize = 1408;
const NAME_LIMIT: usize = 128;

/// A KEK that the server has wrapped.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct WrappedKek<'a> {
    /// The server's key.
    pub(super) name: &'a str,
    /// The version of it that the KEK is wrapped under.
    pub(super) version: u32,
    /// What the server calls ciphertext, its prefix and version in front.
    pub(super) ciphertext: &'a str,
}

/// It is no key ID of transit.
#[derive(Debug, thiserror::Error)]
#[error("a transit provider does not make key IDs of this form")]
pub(super) struct ForeignForm;

impl<'a> WrappedKek<'a> {
    /// What `key_id` says.
    pub(super) fn parse(key_id: &'a KeyId) -> Result<Self, ForeignForm> {
        let (name, ciphertext) = key_id.0.split_once(':').ok_or(ForeignForm)?;
        match is_key_name(name) {
            true => Self::new(name, ciphertext),
            false => Err(ForeignForm),
        }
    }

    /// What the server has made under its key `name`.
    pub(super) fn new(name: &'a str, ciphertext: &'a str) -> Result<Self, ForeignForm> {
        let (version, base64) = ciphertext
            .strip_prefix("vault:v")
            .and_then(|rest| rest.split_once(':'))
            .ok_or(ForeignForm)?;
        let number: u32 = version.parse().map_err(|_| ForeignForm)?;
        let canonical = number > 0 && number.to_string() == version;
        let plausible = !base64.is_empty() && base64.len() <= CIPHERTEXT_LIMIT;
        if !canonical || !plausible || BASE64_STANDARD.decode(base64).is_err() {
            return Err(ForeignForm);
        }
        Ok(Self {
            name,
            version: number,
            ciphertext,
        })
    }

    pub(super) fn key_id(&self) -> KeyId {
        KeyId(self.to_string())
    }
}

impl fmt::Display for WrappedKek<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name, self.ciphertext)
    }
}

/// Whether the server would let a key be called that: it goes into the paths of requests as it is.
pub(super) fn is_key_name(name: &str) -> bool {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    !name.is_empty()
        && name.len() <= NAME_LIMIT
        && name.starts_with(word)
        && name.ends_with(word)
        && name.chars().all(|c| word(c) || c == '-' || c == '.')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str =
        "sealblk:vault:v12:O4WseEZXn6v448xXH4Brl7iXCl6YhKnoPa1z3zlRdDxhKm5BD84ZwlKi6XDktV2cY3YV8BZol5gZ1Jn0";

    #[test]
    fn key_id_is_read_and_written_alike() {
        let key_id = KeyId(GOOD.into());
        let kek = WrappedKek::parse(&key_id).unwrap();
        assert_eq!((kek.name, kek.version), ("sealblk", 12));
        assert_eq!(kek.key_id(), key_id);
        assert_eq!(WrappedKek::new("sealblk", kek.ciphertext).unwrap(), kek);
    }

    #[test]
    fn other_forms_are_foreign() {
        let ciphertext = GOOD.split_once(':').unwrap().1;
        let long = format!("k:vault:v1:{}", "A".repeat(CIPHERTEXT_LIMIT + 4));
        for text in [
            "",
            ciphertext,
            &format!(":{ciphertext}"),
            &format!("../sys/seal:{ciphertext}"),
            &format!("a/b:{ciphertext}"),
            &format!("a?b:{ciphertext}"),
            &format!("..:{ciphertext}"),
            &format!("a%2e:{ciphertext}"),
            &format!("a :{ciphertext}"),
            &format!("{}:{ciphertext}", "k".repeat(NAME_LIMIT + 1)),
            "k:vault:v1:",
            "k:vault:v0:AAAA",
            "k:vault:v01:AAAA",
            "k:vault:v+1:AAAA",
            "k:vault:v-1:AAAA",
            "k:vault:v4294967296:AAAA",
            "k:vault:v1:AAA",
            "k:vault:v1:AAAA\n",
            "k:vault:v1:AAB=",
            "k:vault:v1:AA\"A",
            "k:vault:1:AAAA",
            "k:VAULT:v1:AAAA",
            &long,
        ] {
            assert!(WrappedKek::parse(&KeyId(text.into())).is_err(), "{text}");
        }
    }

    proptest! {
        /// Whatever is let through can stand in a path, and is what it was.
        #[test]
        fn nothing_that_passes_can_change_a_request(text in ".{0,8}(:|/|\\.|%)?vault:v[0-9]{1,3}:[A-Za-z0-9+/=]{0,12}") {
            let key_id = KeyId(text);
            if let Ok(kek) = WrappedKek::parse(&key_id) {
                prop_assert!(kek.name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)));
                prop_assert!(kek.name != "." && kek.name != "..");
                prop_assert_eq!(kek.key_id(), key_id.clone());
            }
        }
    }
}
