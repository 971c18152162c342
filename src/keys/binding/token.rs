//! The token `sealblk`: a keyslot's slot secret, wrapped under a provider's KEK.
//!
//! ```json
//! {"type": "sealblk", "keyslots": ["0"], "provider": "native", "key_id": "…", "wrapped_slot_secret": "<base64>",
//!  "bound": "2026-11-23T10:44:14Z"}
//! ```
//!
//! `bound` is the time of the binding to the KEK, by the clock of the host that made it. It is not authenticated, and
//! tokens of earlier versions do not have it.
//!
//! During a rekey, the new token also has the numbers of the tokens that it replaces: `"replaces": ["0"]`.
//!
//! The slot secret is 32 random bytes. The passphrase of the keyslot is their base64 text (44
//! characters, with padding), as in the tokens of systemd-cryptenroll: an operator who unwraps the secret by other
//! means can type it into `cryptsetup open`, which would stop at a newline or a NUL in the raw bytes.
//!
//! The wrapping authenticates the volume's UUID, the provider's name, the key ID and the keyslot's number, so that a
//! token that was moved to another volume or keyslot does not open. It also binds the volume to its UUID: after
//! `cryptsetup luksUUID --uuid` only a recovery key opens the volume.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::KeyId;
use sealblk_base::parsing;
use sealblk_base::timestamp::Timestamp;
use sealblk_luks2::metadata::{Base64, Id, Metadata, Other, Token};
use sealblk_secmem::{arena::ArenaError, arena::SecretBytes};

/// What a token of type [`TYPE`] holds beside its keyslots.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct SealblkToken {
    pub(super) provider: String,
    pub(super) key_id: KeyId,
    pub(super) wrapped_slot_secret: Base64,
    #[serde(default)]
    pub(super) replaces: Vec<Id>,
    #[serde(default, deserialize_with = "known_timestamp")]
    pub(super) bound: Option<Timestamp>,
}

impl SealblkToken {
    /// Reads `token`, if it is one of ours. `Some(Err)` is one that was broken.
    pub(super) fn of(token: &Token) -> Option<Result<Self, String>> {
        is_ours(token).then(|| {
            let fields = Value::Object(token.other.clone());
            let sealblk: Self = parsing::json_value(fields).map_err(|error| error.to_string())?;
            match token.keyslots[..] {
                [_] => Ok(sealblk),
                _ => Err(format!("it names {} keyslots, not one", token.keyslots.len())),
            }
        })
    }

    /// The token in the metadata, for `keyslot`.
    pub(super) fn into_token(self, keyslot: Id) -> Token {
        let field = |text: String| Value::String(text);
        let mut other = Other::new();
        other.insert("provider".to_owned(), field(self.provider));
        other.insert("key_id".to_owned(), field(self.key_id.0));
        other.insert(
            "wrapped_slot_secret".to_owned(),
            field(BASE64_STANDARD.encode(&self.wrapped_slot_secret.0)),
        );
        if let Some(bound) = self.bound {
            other.insert("bound".to_owned(), field(bound.to_string()));
        }
        if !self.replaces.is_empty() {
            let replaces = self.replaces.into_iter().map(|id| field(id.0.to_string()));
            other.insert("replaces".to_owned(), replaces.collect());
        }
        Token {
            kind: TYPE.to_owned(),
            keyslots: vec![keyslot],
            other,
        }
    }
}

/// A date that cannot be read is none: the token opens its keyslot as well.
fn known_timestamp<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Timestamp>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    Ok(value.as_str().and_then(|text| text.parse().ok()))
}

/// The passphrase that `slot_secret` is to its keyslot.
pub(super) fn passphrase_of(slot_secret: &SecretBytes) -> Result<SecretBytes, ArenaError> {
    let mut text = SecretBytes::zeroed(slot_secret.len().div_ceil(3) * 4)?;
    let written = BASE64_STANDARD.encode_slice(&slot_secret[..], &mut text[..]);
    written.expect("base64 has four characters for every three bytes");
    Ok(text)
}

pub(super) const TYPE: &str = "sealblk";
pub(super) const SLOT_SECRET_LEN: usize = 32;

/// Whether `token` is one of ours: it tells which key opens the volume.
pub fn is_ours(token: &Token) -> bool {
    token.kind == TYPE
}

/// The sealblk tokens that can be read, with their keyslots.
pub(super) fn sealblk_tokens(metadata: &Metadata) -> Vec<(Id, Id, SealblkToken)> {
    let ids = metadata.tokens.keys();
    ids.filter_map(|&id| ours(metadata, id).map(|(keyslot, token)| (id, keyslot, token)))
        .collect()
}

/// The keyslot of sealblk token `id`, and the token, if it is one that can be read.
pub(super) fn ours(metadata: &Metadata, id: Id) -> Option<(Id, SealblkToken)> {
    let token = metadata.tokens.get(&id)?;
    let sealblk = SealblkToken::of(token)?.ok()?;
    Some((token.keyslots[0], sealblk))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn token() -> SealblkToken {
        SealblkToken {
            provider: "native".to_owned(),
            key_id: KeyId("k1".to_owned()),
            wrapped_slot_secret: Base64(vec![1, 2, 3]),
            replaces: Vec::new(),
            bound: None,
        }
    }

    #[test]
    fn a_token_survives_the_metadata() {
        let stored = token().into_token(Id(3));
        assert_eq!(stored.keyslots, [Id(3)]);
        assert_eq!(SealblkToken::of(&stored), Some(Ok(token())));
        let text = serde_json::to_string(&stored).unwrap();
        let (common, ours) = (
            r#""type":"sealblk","keyslots":["3"]"#,
            r#""provider":"native","key_id":"k1","wrapped_slot_secret":"AQID""#,
        );
        assert_eq!(text, format!("{{{common},{ours}}}"));

        let replacing = SealblkToken {
            replaces: vec![Id(0), Id(2)],
            ..token()
        };
        let stored = replacing.clone().into_token(Id(3));
        assert_eq!(SealblkToken::of(&stored), Some(Ok(replacing)));
        let text = serde_json::to_string(&stored).unwrap();
        assert_eq!(text, format!(r#"{{{common},{ours},"replaces":["0","2"]}}"#));
    }

    #[test]
    fn a_token_tells_when_it_was_bound_and_opens_if_that_makes_no_sense() {
        let dated = SealblkToken {
            bound: Some("2026-11-23T10:44:14Z".parse().unwrap()),
            ..token()
        };
        let mut stored = dated.clone().into_token(Id(3));
        assert_eq!(stored.other["bound"], "2026-11-23T10:44:14Z");
        assert_eq!(SealblkToken::of(&stored), Some(Ok(dated)));
        for bound in [Value::from("once upon a time"), Value::from(7), Value::Null] {
            stored.other.insert("bound".to_owned(), bound);
            assert_eq!(SealblkToken::of(&stored), Some(Ok(token())));
        }
    }

    #[test]
    fn tokens_of_others_are_theirs_and_a_broken_one_says_so() {
        let mut stored = token().into_token(Id(3));
        stored.other.remove("key_id");
        assert!(SealblkToken::of(&stored).unwrap().unwrap_err().contains("key_id"));
        stored.kind = "systemd-tpm2".to_owned();
        assert_eq!(SealblkToken::of(&stored), None);
    }

    proptest! {
        /// Whoever can write a header chooses every value in it.
        #[test]
        fn no_value_in_a_token_makes_reading_it_panic(
            field in prop_oneof!["provider", "key_id", "wrapped_slot_secret", "bound", "replaces", "keyslots"]
                .prop_map(|name: String| name),
            value in prop_oneof![
                Just(Value::Null),
                Just(Value::from(Vec::<Value>::new())),
                Just(serde_json::json!(["0", "0", "x"])),
                Just(serde_json::json!({ "type": "sealblk" })),
                any::<i64>().prop_map(Value::from),
                any::<f64>().prop_map(Value::from),
                ".{0,40}".prop_map(Value::from),
            ],
            keyslots in prop::collection::vec(any::<u32>().prop_map(Id), 0..3),
        ) {
            let mut stored = token().into_token(Id(3));
            stored.other.insert(field, value);
            stored.keyslots = keyslots;
            if let Some(Ok(read)) = SealblkToken::of(&stored) {
                prop_assert_eq!(stored.keyslots.len(), 1);
                let again = read.clone().into_token(stored.keyslots[0]);
                prop_assert_eq!(SealblkToken::of(&again), Some(Ok(read)));
            }
        }
    }

    #[test]
    fn the_passphrase_is_the_secret_in_base64() {
        let secret = SecretBytes::take(&mut [0; 32]).unwrap();
        assert_eq!(
            &passphrase_of(&secret).unwrap()[..],
            b"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
        );
    }
}
