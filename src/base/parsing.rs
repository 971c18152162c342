//! JSON, read so that no error quotes what was read.
//!
//! The errors of serde_json quote their input: the value that has the wrong type, the name of an unknown field, the whole line.
//! That can be a private key that was pasted into the wrong place. So no other module calls this parser, which a test checks, and
//! its errors become a [`NotUnderstood`]: the kind of error, its line and column, and what this program expected there. Names
//! of unknown fields are not shown either: a check of their shape would pass passwords.
//!
//! TOML, PEM and certificates are read in the same way where they are used.

use std::fmt;

use serde::Deserialize;
use serde::de::{self, DeserializeOwned};

/// What a type of ours wants where it cannot be read. Only these texts of a `Deserialize` are shown: they are constants.
pub mod rule {
    /// A length of time.
    pub const AGE: &str = "an age is a length of time, as in '90d' or '12h'";
    /// Registers of a TPM.
    pub const REGISTERS: &str = "registers are numbers from 0 to 23 with commas between them, as in 0,4,7";
    /// A resource of a broker.
    pub const RESOURCE: &str =
        "a resource's path is REPOSITORY/TYPE/TAG, each of up to 64 letters, digits, '-', '_' and '.'";
    /// A point in time.
    pub const TIMESTAMP: &str = "a point in time is written as in 2026-11-23T10:44:14Z";
    /// An object of LUKS2's.
    pub const NO_TYPE: &str = "an object has no `type`";
    /// A number of LUKS2's.
    pub const NUMBER: &str = "a number is a string of decimal digits, as in \"0\"";
    /// A segment's size.
    pub const SEGMENT_SIZE: &str = "a segment's size is \"dynamic\" or a string of decimal digits";
    /// Bytes.
    pub const BASE64: &str = "bytes are written in base64";
    /// A file's mode.
    pub const MODE: &str = "a mode is three octal digits, as in 660";
    /// A user or a group.
    pub const USER_OR_GROUP: &str = "a user or group is a number or a name";
    /// A volume.
    pub const VOLUME: &str = "a volume is named by its UUID, as `sealblk info` shows it";

    /// An option of a disk's definition.
    pub const DISK_OPTION: &str = "this is no option of `sealblk serve`, or one that a disk's definition cannot have: see `sealblk define --help`";

    pub(super) const ALL: [&str; 12] = [
        AGE,
        MODE,
        REGISTERS,
        RESOURCE,
        TIMESTAMP,
        NO_TYPE,
        NUMBER,
        SEGMENT_SIZE,
        BASE64,
        USER_OR_GROUP,
        VOLUME,
        DISK_OPTION,
    ];
}

/// Why a text cannot be understood, without a byte of the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotUnderstood {
    problem: Problem,
    /// Line and column, from 1 on, if there are lines.
    place: Option<(usize, usize)>,
}

impl std::error::Error for NotUnderstood {}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Problem {
    /// The format that it is not, and why.
    Syntax(&'static str, Option<&'static str>),
    /// It stops in the middle.
    Incomplete(&'static str),
    /// One of [`rule::ALL`].
    Rule(&'static str),
    /// A field of a struct of ours is not there.
    Missing(String),
    /// One of [`KINDS`], and what this program expected.
    Unexpected {
        kind: &'static str,
        expected: Option<String>,
    },
    /// A value that is none of those that can be there.
    Value,
}

/// How the texts of serde begin that go on with something of the input.
const KINDS: [&str; 7] = [
    "unknown field",
    "unknown variant",
    "invalid type",
    "invalid value",
    "invalid length",
    "duplicate field",
    "duplicate key",
];

/// The error of a `Deserialize` of ours: one of the texts in [`rule`].
pub fn broken<E: de::Error>(rule: &'static str) -> E {
    E::custom(rule)
}

impl NotUnderstood {
    /// An error of a `Deserialize` that reads another format than JSON: of its `message`, only what serde and sealblk say is kept.
    pub fn of_data(message: &str, place: Option<(usize, usize)>) -> Self {
        Self {
            problem: Problem::of(message),
            place,
        }
    }

    /// A text that is not `format`, and `why`.
    pub fn of_syntax(format: &'static str, why: Option<&'static str>, place: Option<(usize, usize)>) -> Self {
        Self {
            problem: Problem::Syntax(format, why),
            place,
        }
    }

    /// The error of a `Deserialize` of ours that reads a part of its own: it is understood again where that is read.
    pub fn within<E: de::Error>(self) -> E {
        E::custom(self)
    }
}

/// Reads JSON. Texts without escapes can be borrowed from `bytes`.
pub fn json<'de, T: Deserialize<'de>>(bytes: &'de [u8]) -> Result<T, NotUnderstood> {
    serde_json::from_slice(bytes).map_err(|error| of_json(&error))
}

/// Reads JSON that was taken apart already.
pub fn json_value<T: DeserializeOwned>(value: serde_json::Value) -> Result<T, NotUnderstood> {
    serde_json::from_value(value).map_err(|error| of_json(&error))
}

fn of_json(error: &serde_json::Error) -> NotUnderstood {
    use serde_json::error::Category;
    let problem = match error.classify() {
        Category::Data => {
            let text = error.to_string();
            let end = match error.line() {
                0 => text.len(),
                _ => text.rfind(" at line ").unwrap_or(text.len()),
            };
            Problem::of(&text[..end])
        }
        Category::Eof => Problem::Incomplete("JSON"),
        Category::Syntax | Category::Io => Problem::Syntax("JSON", None),
    };
    let place = (error.line() > 0).then(|| (error.line(), error.column()));
    NotUnderstood { problem, place }
}

impl Problem {
    /// What can be told of an error of a `Deserialize`.
    fn of(message: &str) -> Self {
        if let Some(rule) = rule::ALL.into_iter().find(|rule| *rule == message) {
            return Self::Rule(rule);
        }
        let missing = message
            .strip_prefix("missing field `")
            .and_then(|rest| rest.strip_suffix('`'));
        if let Some(name) = missing.filter(|name| are_words_of_ours(name)) {
            return Self::Missing(name.to_owned());
        }
        match KINDS.into_iter().find(|kind| message.starts_with(kind)) {
            Some(kind) => {
                // It comes last, and is this program's: a quoted text with the same words in it is passed over.
                let expected = message.rsplit_once(", expected ").map(|(_, expected)| expected);
                let expected = expected.filter(|text| are_words_of_ours(text)).map(str::to_owned);
                Self::Unexpected { kind, expected }
            }
            None => Self::Value,
        }
    }
}

/// Whether a text can be names of fields, or what a visitor of serde's expects.
fn are_words_of_ours(text: &str) -> bool {
    let can_be = |c: char| c.is_ascii_alphanumeric() || "_-`,. ()".contains(c);
    text.len() <= 512 && text.chars().all(can_be)
}

impl fmt::Display for NotUnderstood {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((line, column)) = self.place {
            write!(f, "line {line}, column {column}: ")?;
        }
        // A `Deserialize` that reads a part of its own passes these texts on, and they are understood again.
        match &self.problem {
            Problem::Syntax(format, None) => write!(f, "this is not {format}"),
            Problem::Syntax(format, Some(why)) => write!(f, "this is not {format}: {why}"),
            Problem::Incomplete(format) => write!(f, "the {format} ends too early"),
            Problem::Rule(rule) => f.write_str(rule),
            Problem::Missing(name) => write!(f, "missing field `{name}`"),
            Problem::Unexpected { kind, expected: None } => f.write_str(kind),
            Problem::Unexpected {
                kind,
                expected: Some(expected),
            } => write!(f, "{kind}, expected {expected}"),
            Problem::Value => f.write_str("invalid value"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)] // It is read, and that is all.
    struct Settings {
        port: u16,
        #[serde(default)]
        mode: Option<Mode>,
        #[serde(default)]
        id: Option<uuid::Uuid>,
        #[serde(default)]
        at: Option<crate::timestamp::Timestamp>,
        #[serde(default)]
        part: BTreeMap<String, u8>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Mode {
        Fast,
        Slow,
    }

    #[test]
    fn errors_say_what_was_expected_where() {
        let told = |text: &str| json::<Settings>(text.as_bytes()).unwrap_err().to_string();
        assert_eq!(
            told("{\"port\": \"x\"}"),
            "line 1, column 12: invalid type, expected u16"
        );
        assert_eq!(
            told("{\"port\":1,\"at\":\"x\"}"),
            format!("line 1, column 19: {}", rule::TIMESTAMP)
        );
        assert_eq!(
            told("{\"port\":1,\"mode\":\"x\"}"),
            "line 1, column 20: unknown variant, expected `fast` or `slow`"
        );
        assert_eq!(told("{"), "line 1, column 1: the JSON ends too early");
        assert_eq!(told("{]"), "line 1, column 2: this is not JSON");
        let value = serde_json::json!({ "port": 1, "x": 2 });
        assert_eq!(
            json_value::<Settings>(value).unwrap_err().to_string(),
            "unknown field, expected one of `port`, `mode`, `id`, `at`, `part`"
        );
    }

    #[test]
    fn errors_quote_nothing_of_what_was_read() {
        // Some of these look like what serde says, so that they would pass for it.
        let secrets = [
            "kN8x2QmV7rTz",
            "missing field `kN8x2QmV7rTz`",
            "x`, expected kN8x2QmV7rTz",
            "x, expected kN8x2QmV7rTz",
            "a\n, expected kN8x2QmV7rTz",
            "-----BEGIN PRIVATE KEY-----kN8x2QmV7rTz",
        ];
        for secret in secrets {
            let quoted = serde_json::to_string(secret).unwrap();
            for text in [
                format!("{{\"port\":{quoted}}}"),
                format!("{{\"port\":1,{quoted}:1}}"),
                format!("{{\"port\":1,\"mode\":{quoted}}}"),
                format!("{{\"port\":1,\"mode\":{{{quoted}:1}}}}"),
                format!("{{\"port\":1,\"id\":{quoted}}}"),
                format!("{{\"port\":1,\"pcrs\":{quoted}}}"),
                format!("{{\"port\":1,\"part\":{{{quoted}:{quoted}}}}}"),
                format!("{{\"port\":1 {quoted}"),
                secret.to_owned(),
                quoted.clone(),
            ] {
                let mut errors = vec![json::<Settings>(text.as_bytes()).unwrap_err()];
                if let Ok(value) = serde_json::from_str(&text) {
                    errors.push(json_value::<Settings>(value).unwrap_err());
                }
                for error in errors {
                    let told = format!("{error} {error:?}");
                    assert!(!told.contains("kN8x2QmV7rTz"), "{text}: {told}");
                }
            }
        }
    }
}
