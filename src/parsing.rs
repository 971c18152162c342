//! JSON and TOML, read so that no error quotes what was read.
//!
//! The errors of serde_json and toml quote their input: the value that has the wrong type, the name of an unknown field, the
//! whole line. In a file of settings that can be a private key that was pasted into the wrong place. So nothing outside this
//! module calls those parsers, which a test sees to, and what leaves it is a [`NotUnderstood`]: what kind of error, where, and
//! what this program expected there. Names of unknown fields are not shown either, for a test of their shape would pass
//! passwords; line and column find them.
//!
//! PEM and certificates are read in the same way in `keys::tls`.

use std::fmt;

use serde::Deserialize;
use serde::de::{self, DeserializeOwned};

/// What a type of ours wants where it cannot be read. Only these texts of a `Deserialize` are shown: they are constants.
pub(crate) mod rule {
    /// A length of time.
    pub(crate) const AGE: &str = "an age is a length of time, as in '90d' or '12h'";
    /// Registers of a TPM.
    pub(crate) const REGISTERS: &str =
        "registers are numbers from 0 to 23 with commas between them, as in 0,4,7";
    /// A resource of a broker.
    pub(crate) const RESOURCE: &str =
        "a resource's path is REPOSITORY/TYPE/TAG, each of up to 64 letters, digits, '-', '_' and '.'";
    /// A point in time.
    pub(crate) const TIMESTAMP: &str = "a point in time is written as in 2026-11-23T10:44:14Z";
    /// An object of LUKS2's.
    pub(crate) const NO_TYPE: &str = "an object has no `type`";
    /// A number of LUKS2's.
    pub(crate) const NUMBER: &str = "a number is a string of decimal digits, as in \"0\"";
    /// A segment's size.
    pub(crate) const SEGMENT_SIZE: &str = "a segment's size is \"dynamic\" or a string of decimal digits";
    /// Bytes.
    pub(crate) const BASE64: &str = "bytes are written in base64";
    /// A file's mode.
    pub(crate) const MODE: &str = "a mode is three octal digits, as in 660";
    /// A user or a group.
    pub(crate) const USER_OR_GROUP: &str = "a user or group is a number or a name";
    /// A volume.
    pub(crate) const VOLUME: &str = "a volume is named by its UUID, as `sealblk info` shows it";

    pub(super) const ALL: [&str; 11] = [
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
    /// "JSON" or "TOML", which it is not; and one of [`TOML_PROBLEMS`].
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

/// The error of a `Deserialize` of ours: one of [`rule::ALL`].
pub(crate) fn broken<E: de::Error>(rule: &'static str) -> E {
    E::custom(rule)
}

impl NotUnderstood {
    /// The error of a `Deserialize` of ours that reads a part of its own: it is understood again where that is read.
    pub(crate) fn within<E: de::Error>(self) -> E {
        E::custom(self)
    }
}

/// What toml says of the usual slips, without what it says next.
const TOML_PROBLEMS: [&str; 10] = [
    "string values must be quoted",
    "duplicate key",
    "key with no value",
    "invalid unquoted key",
    "missing opening quote",
    "missing value",
    "extra `=`",
    "unclosed table",
    "unclosed array",
    "unexpected key or value",
];

/// Reads JSON. Texts without escapes can be borrowed from `bytes`.
pub(crate) fn json<'de, T: Deserialize<'de>>(bytes: &'de [u8]) -> Result<T, NotUnderstood> {
    serde_json::from_slice(bytes).map_err(|error| of_json(&error))
}

/// Reads JSON that was taken apart already.
pub(crate) fn json_value<T: DeserializeOwned>(value: serde_json::Value) -> Result<T, NotUnderstood> {
    serde_json::from_value(value).map_err(|error| of_json(&error))
}

/// Reads TOML.
pub(crate) fn toml<T: DeserializeOwned>(text: &str) -> Result<T, NotUnderstood> {
    toml::from_str(text).map_err(|error| {
        let problem = match text.parse::<toml::Table>() {
            Ok(_) => Problem::of(error.message()),
            Err(syntax) => Problem::Syntax("TOML", toml_problem(syntax.message())),
        };
        let place = error.span().and_then(|span| place(text, span.start));
        NotUnderstood { problem, place }
    })
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

/// One of the usual slips.
fn toml_problem(message: &str) -> Option<&'static str> {
    let problem = message.split(", expected ").next();
    TOML_PROBLEMS.into_iter().find(|known| Some(*known) == problem)
}

/// The line and column of a byte.
fn place(text: &str, at: usize) -> Option<(usize, usize)> {
    let before = text.get(..at)?;
    let line = before.rsplit('\n').next().unwrap_or_default();
    Some((before.matches('\n').count() + 1, line.chars().count() + 1))
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
    use std::fs;
    use std::path::Path;

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
        pcrs: Option<crate::tpm::pcr::Selection>,
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
        let told = |text: &str| toml::<Settings>(text).unwrap_err().to_string();
        assert_eq!(
            told("port = 1\nports = 2"),
            "line 2, column 1: unknown field, expected one of `port`, `mode`, `id`, `pcrs`, `part`"
        );
        assert_eq!(told("port = 'x'"), "line 1, column 8: invalid type, expected u16");
        assert_eq!(
            told("port = 70000"),
            "line 1, column 8: invalid value, expected u16"
        );
        assert_eq!(told(""), "line 1, column 1: missing field `port`");
        assert_eq!(
            told("port = 1\nmode = 'x'"),
            "line 2, column 8: unknown variant, expected `fast` or `slow`"
        );
        assert_eq!(
            told("port = 1\npcrs = 'x'"),
            format!("line 2, column 8: {}", rule::REGISTERS)
        );
        assert_eq!(
            told("port = 1\nport = 2"),
            "line 2, column 1: this is not TOML: duplicate key"
        );
        assert_eq!(
            told("port 1"),
            "line 1, column 6: this is not TOML: key with no value"
        );

        let told = |text: &str| json::<Settings>(text.as_bytes()).unwrap_err().to_string();
        assert_eq!(
            told("{\"port\": \"x\"}"),
            "line 1, column 12: invalid type, expected u16"
        );
        assert_eq!(told("{"), "line 1, column 1: the JSON ends too early");
        assert_eq!(told("{]"), "line 1, column 2: this is not JSON");
        let value = serde_json::json!({ "port": 1, "x": 2 });
        assert_eq!(
            json_value::<Settings>(value).unwrap_err().to_string(),
            "unknown field, expected one of `port`, `mode`, `id`, `pcrs`, `part`"
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
            for toml_text in [
                format!("port = {quoted}"),
                format!("port = 1\n{quoted} = 1"),
                format!("port = 1\nmode = {quoted}"),
                format!("port = 1\nmode.{quoted} = 1"),
                format!("port = 1\nid = {quoted}"),
                format!("port = 1\npcrs = {quoted}"),
                format!("port = 1\npart.{quoted} = {quoted}"),
                format!("port = 1\npart.{quoted} = 7000"),
                format!("port = 1\n{quoted}\n"),
                format!("port = 1\n{secret}\n"),
                format!("[{quoted}]\nport = 1\n[{quoted}]"),
            ] {
                let error = toml::<Settings>(&toml_text).unwrap_err();
                let told = format!("{error} {error:?}");
                assert!(!told.contains("kN8x2QmV7rTz"), "{toml_text}: {told}");
            }
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

    /// What calls a parser whose errors quote, or names such an error, and where that is allowed.
    const QUOTING: [(&str, &[&str]); 15] = [
        ("serde_json::from_", &["parsing.rs", "volume/testing.rs"]),
        ("serde_json::Error", &["parsing.rs"]),
        ("serde_json::error", &["parsing.rs"]),
        ("toml::from_", &["parsing.rs"]),
        ("toml::de::", &["parsing.rs"]),
        ("parse::<toml", &["parsing.rs"]),
        ("Error::custom", &[]),
        ("E::custom", &["parsing.rs"]),
        ("from_pem_", &[]),
        ("pem_slice_iter", &["keys/tls/pem.rs"]),
        ("pem::Error", &[]),
        ("rustls::Error", &[]),
        ("FromUtf8Error", &[]),
        ("DecodeError", &[]),
        (
            "ureq::Error",
            &["keys/https/failure.rs", "keys/https/connector.rs"],
        ),
    ];

    #[test]
    fn nothing_else_calls_a_parser_whose_errors_quote() {
        fn look(dir: &Path, root: &Path, found: &mut Vec<String>) {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    look(&path, root, found);
                    continue;
                }
                if path.extension().is_none_or(|extension| extension != "rs") {
                    continue;
                }
                let text = fs::read_to_string(&path).unwrap();
                let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
                let program = text.split("#[cfg(test)]\nmod tests").next().unwrap();
                for (line, number) in program.lines().zip(1..) {
                    let code = line.split("//").next().unwrap();
                    for (what, allowed) in QUOTING {
                        if code.contains(what) && !allowed.contains(&name.as_str()) {
                            found.push(format!("{name}:{number}: {what}"));
                        }
                    }
                }
            }
        }
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut found = Vec::new();
        look(&root, &root, &mut found);
        assert!(found.is_empty(), "{found:#?}");
    }
}
