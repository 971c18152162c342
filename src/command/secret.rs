//! Secrets from outside: from a file, a descriptor or a systemd credential, never from the command line or the environment.
//! They are read directly into the key arena.
//!
//! A passphrase or key for a volume or a backup is a [`Key`]. All verbs read it by one rule: a text is a passphrase, without a
//! newline at its end, since a typed passphrase has none; any other content counts byte for byte, as in
//! `cryptsetup --key-file`. If one form opens nothing, the other form is tried.

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{BorrowedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use clap::builder::{OsStringValueParser, TypedValueParser, ValueParser, ValueParserFactory};
use rustix::io::FdFlags;

use crate::{stderr, text};
use sealblk_base::blame::Blame;
use sealblk_secmem::{arena::ArenaError, arena::SecretBytes};
use sealblk_secmem::{private_file, private_file::Exposed, private_file::Forbid};

/// The longest secret that is read, in bytes: that of cryptsetup's key files.
pub const MAX_SECRET: usize = 8 << 20;

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
    #[error(
        "cannot {action} the secret in {location}; name a file or an open descriptor that this user can {action}"
    )]
    Io {
        /// "read" or "write".
        action: &'static str,
        /// Where.
        location: String,
        /// The answer.
        source: io::Error,
    },
    /// An empty passphrase protects nothing.
    #[error("the secret in {location} is empty; is it the right file?")]
    Empty {
        /// Where.
        location: String,
    },
    /// More than a passphrase or a key.
    #[error("the secret in {location} is longer than {MAX_SECRET} bytes; is it the right file?")]
    TooLong {
        /// Where.
        location: String,
    },
    /// The directory does not exist.
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

impl SecretError {
    /// Where the cause lies.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Io { .. } => Blame::Storage,
            Self::Empty { .. } | Self::TooLong { .. } => Blame::Key,
            Self::NoCredentials { .. } => Blame::Operator,
            Self::Arena(_) => Blame::Host,
        }
    }
}

/// What `fd:` and `cred:` need after them.
#[derive(Debug, thiserror::Error)]
pub enum SyntaxError {
    /// Not a descriptor number.
    #[error("'fd:' must be followed by the number of an open descriptor")]
    Descriptor,
    /// Not a name.
    #[error("'cred:' must be followed by the name of a file in $CREDENTIALS_DIRECTORY")]
    Credential,
}

/// On the command line; a file's name need not be text.
impl ValueParserFactory for SecretSource {
    type Parser = ValueParser;

    fn value_parser() -> ValueParser {
        ValueParser::new(OsStringValueParser::new().try_map(|name| match name.to_str() {
            Some(text) => text.parse(),
            None => Ok(Self::File(name.into())),
        }))
    }
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
            Self::File(path) => f.write_str(&text::shown(path)),
            Self::Descriptor(0) => f.write_str("standard input"),
            Self::Descriptor(fd) => write!(f, "descriptor {fd}"),
            Self::Credential(name) => write!(f, "credential {name:?}"),
        }
    }
}

impl SecretSource {
    /// As it is written on the command line.
    pub fn argument(&self) -> OsString {
        match self {
            Self::File(path) => path.into(),
            Self::Descriptor(fd) => format!("fd:{fd}").into(),
            Self::Credential(name) => format!("cred:{name}").into(),
        }
    }

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
        let metadata = file.metadata().map_err(io)?;
        if let Self::File(path) = self
            && metadata.is_file()
            && let Err(open_to_others @ Exposed::Mode { .. }) =
                private_file::check(path, &metadata, Forbid::All)
        {
            stderr::note(&format!("{location}: {open_to_others}"));
        }
        // A file tells how long it is. One byte more is for its end.
        let expected = metadata.len();
        let expected = usize::try_from(expected).unwrap_or(MAX_SECRET).min(MAX_SECRET) + 1;
        let mut secret = SecretBytes::zeroed(expected.max(PIECE))?;
        let mut len = 0;
        loop {
            if len == secret.len() && len <= MAX_SECRET {
                let mut larger = SecretBytes::zeroed((2 * len).min(MAX_SECRET + 1))?;
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
            len if len > MAX_SECRET => Err(SecretError::TooLong { location }),
            // Into a place of its own size: this one is given back.
            len => Ok(SecretBytes::take(&mut secret[..len])?),
        }
    }

    /// Reads what opens a volume or a backup, or shall open one.
    ///
    /// # Errors
    /// As for [`SecretSource::read`].
    pub fn read_key(&self) -> Result<Key, SecretError> {
        Key::new(self.read()?).map_err(|error| match error {
            None => SecretError::Empty {
                location: self.to_string(),
            },
            Some(error) => error.into(),
        })
    }

    /// Whether it is gone once it has been read: an inherited descriptor's offset stays at the end of what was read, and the pipe
    /// of a shell's `<(...)` gives nothing more. A FIFO with a name is opened again, also by its next writer.
    pub fn can_be_read_once(&self) -> bool {
        match self {
            Self::Descriptor(_) => true,
            Self::File(path) => match fs::metadata(path).map(|metadata| metadata.file_type()) {
                Ok(kind) if kind.is_fifo() => !has_name(path),
                Ok(kind) => !kind.is_file(),
                Err(_) => false,
            },
            Self::Credential(_) => false,
        }
    }

    /// The descriptors, inherited by this process, that it is read from: one that was named, or that of the pipe of a shell's `<(...)`.
    ///
    /// # Errors
    /// If the one that was named was not inherited.
    pub fn inherited(&self) -> Result<Vec<RawFd>, SecretError> {
        let pipe = match self {
            Self::Descriptor(fd) if is_inherited(*fd) => return Ok(vec![*fd]),
            Self::Descriptor(_) => {
                return Err(SecretError::Io {
                    action: "read",
                    location: self.to_string(),
                    source: io::Error::from_raw_os_error(libc::EBADF),
                });
            }
            Self::Credential(_) => return Ok(Vec::new()),
            Self::File(path) => fs::metadata(path)
                .ok()
                .filter(|found| found.file_type().is_fifo()),
        };
        let (Some(pipe), true) = (pipe, self.can_be_read_once()) else {
            let named = self.descriptor_of_path().filter(|fd| is_inherited(*fd));
            return Ok(named.into_iter().collect());
        };
        let leads_there = |fd: &RawFd| {
            let found = fs::metadata(format!("/proc/self/fd/{fd}"));
            found.is_ok_and(|found| (found.dev(), found.ino()) == (pipe.dev(), pipe.ino()))
        };
        let numbers = fs::read_dir("/proc/self/fd").into_iter().flatten();
        let numbers = numbers.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<RawFd>().ok());
        Ok(numbers
            .filter(|fd| is_inherited(*fd) && leads_there(fd))
            .collect())
    }

    /// The descriptor that the path of a file names, as `/dev/stdin` does.
    fn descriptor_of_path(&self) -> Option<RawFd> {
        let Self::File(path) = self else {
            return None;
        };
        let path = path.to_str()?;
        let number = ["/dev/fd/", "/proc/self/fd/"]
            .iter()
            .find_map(|directory| path.strip_prefix(directory));
        match path {
            "/dev/stdin" => Some(0),
            _ => number?.parse().ok(),
        }
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

/// A passphrase or key, in the form that it is likely meant in, and in the other.
#[derive(Debug)]
pub struct Key {
    first: SecretBytes,
    second: Option<SecretBytes>,
}

impl Key {
    /// Nothing, if there is nothing but a newline, or no memory.
    fn new(given: SecretBytes) -> Result<Self, Option<ArenaError>> {
        let without = match &*given {
            [before @ .., b'\n'] if !before.is_empty() => Some(SecretBytes::copy_of(before)?),
            b"\n" => return Err(None),
            _ => None,
        };
        Ok(match without {
            Some(without) if is_text(&given) => Self {
                first: without,
                second: Some(given),
            },
            second => Self { first: given, second },
        })
    }

    /// One that is meant in this form alone.
    pub fn of(secret: SecretBytes) -> Self {
        Self {
            first: secret,
            second: None,
        }
    }

    /// The form that is likely meant, then the other, if there is one.
    pub fn into_forms(self) -> impl Iterator<Item = SecretBytes> {
        [Some(self.first), self.second].into_iter().flatten()
    }

    /// The form that a volume or backup is to open with.
    pub fn first(&self) -> &SecretBytes {
        &self.first
    }

    /// Opens something with it: with one form after the other, until one opens.
    ///
    /// # Errors
    /// Why the first form does not.
    pub fn open<T, E>(&self, open: impl Fn(&SecretBytes) -> Result<T, E>) -> Result<T, E> {
        open(&self.first).or_else(|error| match &self.second {
            Some(second) => open(second).map_err(|_| error),
            None => Err(error),
        })
    }
}

/// Whether a user could have typed `secret`, with a newline after it.
pub fn is_text(secret: &[u8]) -> bool {
    let line = secret.strip_suffix(b"\n").unwrap_or(secret);
    std::str::from_utf8(line).is_ok_and(|line| !line.chars().any(char::is_control))
}

/// Whether a file system keeps this FIFO, and not the kernel alone (pipe(7)).
fn has_name(fifo: &Path) -> bool {
    /// What statfs(2) says of pipes without a name.
    const PIPEFS_MAGIC: u64 = 0x5049_5045;
    // Its type differs from machine to machine.
    let magic = |stat: rustix::fs::StatFs| u64::try_from(stat.f_type).ok();
    rustix::fs::statfs(fifo).is_ok_and(|stat| magic(stat) != Some(PIPEFS_MAGIC))
}

/// Whether a descriptor is open that this process did not open itself: those are closed at the execution of another program.
#[allow(unsafe_code)] // Borrows a descriptor by a number.
fn is_inherited(fd: RawFd) -> bool {
    // SAFETY: the number is only handed to `fcntl`, which says whether it is open. It is not -1.
    let descriptor = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_getfd(descriptor).is_ok_and(|flags| !flags.contains(FdFlags::CLOEXEC))
}

/// Another descriptor of what an inherited one refers to; that one stays open.
#[allow(unsafe_code)] // Borrows a descriptor by the number that the user gave.
pub fn duplicate(fd: RawFd) -> io::Result<File> {
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
    fn pipes_without_a_name_and_descriptors_can_be_read_once() {
        let (file, source) = file(b"open sesame");
        assert!(!source.can_be_read_once());
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU).unwrap();
        let named: SecretSource = fifo.to_str().unwrap().parse().unwrap();
        assert!(!named.can_be_read_once());
        let (reader, _writer) = io::pipe().unwrap();
        let number = reader.as_raw_fd();
        for once in [
            "-".to_owned(),
            format!("fd:{number}"),
            format!("/dev/fd/{number}"),
        ] {
            assert!(once.parse::<SecretSource>().unwrap().can_be_read_once(), "{once}");
        }
        drop(file);
    }

    #[test]
    fn newline_belongs_to_a_key_and_not_to_a_text_and_both_are_tried() {
        let forms = |content: &[u8]| -> Vec<Vec<u8>> {
            let key = file(content).1.read_key();
            let Key { first, second } = key.unwrap();
            [Some(first), second]
                .iter()
                .flatten()
                .map(|form| form.to_vec())
                .collect()
        };
        assert_eq!(forms(b"open sesame"), [b"open sesame"]);
        assert_eq!(forms(b"open sesame\n"), [&b"open sesame"[..], b"open sesame\n"]);
        assert_eq!(forms("s\u{e9}same\n".as_bytes())[0], "s\u{e9}same".as_bytes());
        // Two lines, or a random key: byte for byte.
        assert_eq!(
            forms(b"open\nsesame\n"),
            [&b"open\nsesame\n"[..], b"open\nsesame"]
        );
        assert_eq!(
            forms(b"\x00\xff\x07\n"),
            [&b"\x00\xff\x07\n"[..], b"\x00\xff\x07"]
        );
        assert_eq!(forms(b"\x00\xff\x07"), [b"\x00\xff\x07"]);
    }

    #[test]
    fn empty_and_overlong_secrets_are_refused() {
        let (_file, source) = file(b"");
        assert!(matches!(source.read(), Err(SecretError::Empty { .. })));
        let (_file, source) = file(b"\n");
        assert!(matches!(source.read_key(), Err(SecretError::Empty { .. })));
        let (_file, source) = file(&[1; MAX_SECRET]);
        assert_eq!(source.read().unwrap().len(), MAX_SECRET);
        let (_file, source) = file(&[1; MAX_SECRET + 1]);
        assert!(matches!(source.read(), Err(SecretError::TooLong { .. })));
        let (mut reader, mut writer) = io::pipe().unwrap();
        let write = std::thread::spawn(move || writer.write_all(&[1; MAX_SECRET]));
        assert_eq!(
            SecretSource::Descriptor(reader.as_raw_fd()).read().unwrap().len(),
            MAX_SECRET
        );
        write.join().unwrap().unwrap();
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
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
