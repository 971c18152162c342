//! TOML files of an operator: read strictly, and only if no other user could have written them.

use std::fs::Metadata;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use sealblk_base::blame::Blame;
use serde::de::DeserializeOwned;

use crate::error_chain::remedy;
use crate::parsing::NotUnderstood;
use sealblk_secmem::{private_file, private_file::Exposed, private_file::Forbid};

/// Why such a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TomlFileError {
    /// The file system refused.
    #[error("cannot read {}{}", path.display(), remedy(source))]
    Read {
        /// The file.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },
    /// Others could have written it.
    #[error("{} is not safe to use", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Who can do what with it.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It is not TOML, or holds what is not known.
    #[error("{} cannot be parsed; correct it, or restore it from a backup", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and what.
        source: NotUnderstood,
    },
}

impl TomlFileError {
    /// Where the cause lies.
    pub fn blame(&self) -> Blame {
        match self {
            // A file that cannot be read, and not one with wrong content.
            Self::Read { .. } | Self::Exposed { .. } => Blame::Storage,
            Self::Syntax { .. } => Blame::Operator,
        }
    }
}

/// What the file at `path` says; nothing, if there is no file.
///
/// # Errors
/// [`TomlFileError`].
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, TomlFileError> {
    read_checked(path, private_file::check)
}

/// The same in a state directory, which may be another user's than root, who reads it.
///
/// # Errors
/// [`TomlFileError`].
pub(crate) fn read_in_state<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, TomlFileError> {
    read_checked(path, private_file::check_in_state)
}

fn read_checked<T: DeserializeOwned>(
    path: &Path,
    check: fn(&Path, &Metadata, Forbid) -> Result<(), Exposed>,
) -> Result<Option<T>, TomlFileError> {
    let own = || path.to_owned();
    let failed = |source| TomlFileError::Read { path: own(), source };
    let mut file = match private_file::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(failed)?,
    };
    let metadata = file.metadata().map_err(failed)?;
    check(path, &metadata, Forbid::Write).map_err(|error| TomlFileError::Exposed {
        path: own(),
        source: error.into(),
    })?;
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(failed)?;
    let content = understand(&text).map_err(|source| TomlFileError::Syntax { path: own(), source })?;
    Ok(Some(content))
}

/// Reads TOML, so that no error quotes what was read ([`crate::parsing`]).
fn understand<T: DeserializeOwned>(text: &str) -> Result<T, NotUnderstood> {
    toml::from_str(text).map_err(|error| {
        let place = error.span().and_then(|span| place(text, span.start));
        match text.parse::<toml::Table>() {
            Ok(_) => NotUnderstood::of_data(error.message(), place),
            Err(syntax) => NotUnderstood::of_syntax("TOML", toml_problem(syntax.message()), place),
        }
    })
}

/// One of the usual slips.
fn toml_problem(message: &str) -> Option<&'static str> {
    let problem = message.split(", expected ").next();
    TOML_PROBLEMS.into_iter().find(|known| Some(*known) == problem)
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

/// The line and column of a byte.
fn place(text: &str, at: usize) -> Option<(usize, usize)> {
    let before = text.get(..at)?;
    let line = before.rsplit('\n').next().unwrap_or_default();
    Some((before.matches('\n').count() + 1, line.chars().count() + 1))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;

    use super::*;
    use crate::parsing::rule;

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
        let told = |text: &str| understand::<Settings>(text).unwrap_err().to_string();
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
                let error = understand::<Settings>(&toml_text).unwrap_err();
                let told = format!("{error} {error:?}");
                assert!(!told.contains("kN8x2QmV7rTz"), "{toml_text}: {told}");
            }
        }
    }
}
