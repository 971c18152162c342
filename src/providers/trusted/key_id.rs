//! Key IDs of trusted: the path of the broker's resource, and the KEK's ciphertext under it.
//!
//! ```text
//! REPOSITORY/TYPE/TAG:v1:BASE64
//! ```
//!
//! So the wrapped KEK is stored with the data, and only a host with the released resource can use it. A key ID comes from a
//! volume's header, which is untrusted: a key ID that does not have exactly this form never gets into a request.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use crate::kbs::ResourcePath;
use crate::keys::KeyId;
use crate::providers::{wrap, wrap::KEK_LEN, wrap::Kek, wrap::UnwrapError};
use sealblk_secmem::{arena::ArenaError, arena::SecretBytes};

/// Sets wrapped KEKs apart from all others that a key might ever authenticate.
const LABEL: &[u8] = b"sealblk trusted KEK\0";
const VERSION: &str = "v1";
/// The longest text: a path of three names, and 61 bytes in base64.
const LIMIT: usize = 512;

/// A KEK under the broker's resource.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct WrappedKek {
    pub(super) resource: ResourcePath,
    wrapped: Vec<u8>,
}

/// A key ID that is none of this kind.
#[derive(Debug, thiserror::Error)]
#[error("it is not a key ID of a trusted provider")]
pub(super) struct Foreign;

impl WrappedKek {
    /// A new KEK under the resource at `path`, which is `released`.
    pub(super) fn new(path: &ResourcePath, released: &Kek) -> Result<Self, ArenaError> {
        let kek = SecretBytes::random(KEK_LEN)?;
        Ok(Self {
            resource: path.clone(),
            wrapped: wrap::wrap_with(released, &associated(path), &kek)?,
        })
    }

    pub(super) fn parse(key_id: &KeyId) -> Result<Self, Foreign> {
        let text = Some(key_id.0.as_str()).filter(|text| text.len() <= LIMIT);
        let mut parts = text.ok_or(Foreign)?.split(':');
        let (Some(path), Some(VERSION), Some(base64), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(Foreign);
        };
        Ok(Self {
            resource: path.parse().map_err(|_| Foreign)?,
            wrapped: BASE64_STANDARD.decode(base64).map_err(|_| Foreign)?,
        })
    }

    pub(super) fn key_id(&self) -> KeyId {
        let base64 = BASE64_STANDARD.encode(&self.wrapped);
        KeyId(format!("{}:{VERSION}:{base64}", self.resource))
    }

    /// The KEK, if it is under the resource that is `released`.
    pub(super) fn open(&self, released: &Kek) -> Result<Kek, UnwrapError> {
        let kek = wrap::unwrap_with(released, &associated(&self.resource), &self.wrapped)?;
        Kek::new(kek).map_err(|_| UnwrapError::Format)
    }
}

fn associated(path: &ResourcePath) -> Vec<u8> {
    [LABEL, path.as_ref().as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn released(fill: u8) -> Kek {
        Kek::new(SecretBytes::take(&mut [fill; KEK_LEN]).unwrap()).unwrap()
    }

    #[test]
    fn key_ids_hold_the_kek_for_who_was_released_the_resource() {
        let path: ResourcePath = "sealblk/kek/1".parse().unwrap();
        let wrapped = WrappedKek::new(&path, &released(1)).unwrap();
        let back = WrappedKek::parse(&wrapped.key_id()).unwrap();
        assert_eq!(back, wrapped);
        back.open(&released(1)).unwrap();
        assert!(matches!(back.open(&released(2)), Err(UnwrapError::Unauthentic)));
        let moved = WrappedKek {
            resource: "sealblk/kek/2".parse().unwrap(),
            ..back
        };
        assert!(matches!(moved.open(&released(1)), Err(UnwrapError::Unauthentic)));
    }

    #[test]
    fn what_is_not_of_the_form_is_foreign() {
        let long = format!("a/b/c:v1:{}", "A".repeat(600));
        for text in [
            "",
            "a/b/c",
            "a/b/c:v1",
            "a/b/c:v2:AAAA",
            "a/b:v1:AAAA",
            "a/b/c/d:v1:AAAA",
            "a/../c:v1:AAAA",
            "a/b/c?x:v1:AAAA",
            "a/b/c:v1:A",
            "a/b/c:v1:AAAA:",
            &long,
        ] {
            assert!(WrappedKek::parse(&KeyId(text.into())).is_err(), "{text}");
        }
    }
}
