//! Secrets that come in from outside: from a file, a descriptor or a systemd credential, never from the command line
//! or the environment. They are read straight into the key arena.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{BorrowedFd, RawFd};
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use crate::keys::arena::{ArenaError, SecretBytes};

/// The longest secret that is read, in bytes. cryptsetup takes key files of up to 8 MiB; what is longer than
/// this is hardly a key, and the key arena, which is locked memory, must have room for it.
const MAX_LEN: usize = 1 << 20;

/// The size of the first piece that is read: nearly every secret is shorter.
const PIECE: usize = 8 << 10;

/// Where a secret is: a path, `-`, `fd:N` or `cred:NAME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretSource {
    /// A file.
    File(PathBuf),
    /// A descriptor that this process inherited.
    Descriptor(RawFd),
    /// A file in `$CREDENTIALS_DIRECTORY`, as systemd's `LoadCredential=` puts it there.
    Credential(String),
}

/// Why a secret cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The file or descriptor.
    #[error("cannot {action} the secret in {location}")]
    Io {
        /// "read" or "write".
        action: &'static str,
        /// Where.
        location: String,
        /// The answer.
        source: io::Error,
    },
    /// An empty passphrase protects nothing.
    #[error("the secret in {location} is empty; write one into it first")]
    Empty {
        /// Where.
        location: String,
    },
    /// More than a passphrase or a key.
    #[error("the secret in {location} is longer than {MAX_LEN} bytes; is it the right file?")]
    TooLong {
        /// Where.
        location: String,
    },
    /// There is no such directory.
    #[error(
        "{location}: CREDENTIALS_DIRECTORY is not set; load the credential with systemd's LoadCredential="
    )]
    NoCredentials {
        /// The credential.
        location: String,
    },
    /// No memory for it.
    #[error(transparent)]
    Arena(#[from] ArenaError),
}

/// What `fd:` and `cred:` need after them.
#[derive(Debug, thiserror::Error)]
pub enum SyntaxError {
    /// Not a descriptor number.
    #[error("after 'fd:' comes the number of an open descriptor")]
    Descriptor,
    /// Not a name.
    #[error("after 'cred:' comes the name of a file in $CREDENTIALS_DIRECTORY")]
    Credential,
}

impl FromStr for SecretSource {
    type Err = SyntaxError;

    fn from_str(text: &str) -> Result<Self, SyntaxError> {
        if text == "-" {
            return Ok(Self::Descriptor(0));
        }
        if let Some(number) = text.strip_prefix("fd:") {
            let number = number.parse().ok().filter(|&fd: &RawFd| fd >= 0);
            return number.map(Self::Descriptor).ok_or(SyntaxError::Descriptor);
        }
        if let Some(name) = text.strip_prefix("cred:") {
            let mut parts = Path::new(name).components();
            let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
            return if plain {
                Ok(Self::Credential(name.to_owned()))
            } else {
                Err(SyntaxError::Credential)
            };
        }
        Ok(Self::File(text.into()))
    }
}

impl fmt::Display for SecretSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Descriptor(0) => f.write_str("standard input"),
            Self::Descriptor(fd) => write!(f, "descriptor {fd}"),
            Self::Credential(name) => write!(f, "credential {name:?}"),
        }
    }
}

impl SecretSource {
    /// Reads the secret byte for byte, as `cryptsetup --key-file` does.
    ///
    /// # Errors
    /// [`SecretError`], if it cannot be read, is empty, or is too long to be one.
    pub fn read(&self) -> Result<SecretBytes, SecretError> {
        let location = self.to_string();
        let io = |source| SecretError::Io {
            action: "read",
            location: location.clone(),
            source,
        };
        let mut file = self.open(&location)?;
        let mut secret = SecretBytes::zeroed(PIECE)?;
        let mut len = 0;
        loop {
            if len == secret.len() && len <= MAX_LEN {
                let mut larger = SecretBytes::zeroed((2 * len).min(MAX_LEN + 1))?;
                larger[..len].copy_from_slice(&secret);
                secret = larger;
            }
            match file.read(&mut secret[len..]) {
                Ok(0) => break,
                Ok(n) => len += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(io(e)),
            }
        }
        match len {
            0 => Err(SecretError::Empty { location }),
            len if len > MAX_LEN => Err(SecretError::TooLong { location }),
            // Into a place of its own size: this one is given back.
            len => Ok(SecretBytes::take(&mut secret[..len])?),
        }
    }

    /// Reads a passphrase: as [`SecretSource::read`], without one newline at the end.
    ///
    /// # Errors
    /// As for [`SecretSource::read`].
    pub fn read_passphrase(&self) -> Result<SecretBytes, SecretError> {
        let mut secret = self.read()?;
        if secret.last() == Some(&b'\n') {
            secret.truncate(secret.len() - 1);
        }
        if secret.is_empty() {
            return Err(SecretError::Empty {
                location: self.to_string(),
            });
        }
        Ok(secret)
    }

    fn open(&self, location: &str) -> Result<File, SecretError> {
        let io = |source| SecretError::Io {
            action: "read",
            location: location.to_owned(),
            source,
        };
        match self {
            Self::File(path) => File::open(path).map_err(io),
            Self::Descriptor(fd) => duplicate(*fd).map_err(io),
            Self::Credential(name) => match std::env::var_os("CREDENTIALS_DIRECTORY") {
                Some(dir) => File::open(Path::new(&dir).join(name)).map_err(io),
                None => Err(SecretError::NoCredentials {
                    location: location.to_owned(),
                }),
            },
        }
    }
}

/// Another descriptor of what an inherited one refers to; that one stays open.
#[allow(unsafe_code)] // Borrows a descriptor by the number that the user gave.
fn duplicate(fd: RawFd) -> io::Result<File> {
    // SAFETY: the number is only handed to `fcntl`, which says whether it is open. It is not -1.
    let inherited = unsafe { BorrowedFd::borrow_raw(fd) };
    Ok(inherited.try_clone_to_owned()?.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsRawFd;

    fn file(content: &[u8]) -> (tempfile::NamedTempFile, SecretSource) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        let source = file.path().to_str().unwrap().parse().unwrap();
        (file, source)
    }

    #[test]
    fn forms_are_told_apart() {
        let parse = |text: &str| text.parse::<SecretSource>();
        assert_eq!(parse("-").unwrap(), SecretSource::Descriptor(0));
        assert_eq!(parse("fd:7").unwrap(), SecretSource::Descriptor(7));
        assert_eq!(
            parse("cred:disk").unwrap(),
            SecretSource::Credential("disk".into())
        );
        assert_eq!(parse("a/b").unwrap(), SecretSource::File("a/b".into()));
        for wrong in [
            "fd:",
            "fd:-1",
            "fd:x",
            "cred:",
            "cred:../x",
            "cred:a/b",
            "cred:/etc/shadow",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn passphrase_loses_one_newline_and_a_key_none() {
        let (_file, source) = file(b"open sesame\n\n");
        assert!(source.read_passphrase().unwrap().ct_eq(b"open sesame\n"));
        assert!(source.read().unwrap().ct_eq(b"open sesame\n\n"));
    }

    #[test]
    fn empty_and_overlong_secrets_are_refused() {
        let (_file, source) = file(b"");
        assert!(matches!(source.read(), Err(SecretError::Empty { .. })));
        let (_file, source) = file(b"\n");
        assert!(matches!(source.read_passphrase(), Err(SecretError::Empty { .. })));
        let (_file, source) = file(&[1; MAX_LEN]);
        assert_eq!(source.read().unwrap().len(), MAX_LEN);
        let (_file, source) = file(&[1; MAX_LEN + 1]);
        assert!(matches!(source.read(), Err(SecretError::TooLong { .. })));
    }

    #[test]
    fn secret_comes_through_a_pipe() {
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(b"open ").unwrap();
        writer.write_all(b"sesame").unwrap();
        drop(writer);
        assert!(
            SecretSource::Descriptor(reader.as_raw_fd())
                .read()
                .unwrap()
                .ct_eq(b"open sesame")
        );
    }

    #[test]
    fn closed_descriptor_is_refused() {
        assert!(matches!(
            SecretSource::Descriptor(i32::MAX).read(),
            Err(SecretError::Io { .. })
        ));
    }
}
