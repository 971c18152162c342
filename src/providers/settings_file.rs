//! Files that settings name: keys, certificates and tokens.
//!
//! The storage of such a file may never answer. A regular file is read by a thread that can be abandoned
//! ([`crate::probe`]); a FIFO, a device or a directory is not read at all. No other process reads them, as it does headers of volumes:
//! their content, which is secret, would be in two processes instead of one, and only this host's administrators can change it.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use crate::keys::KeyReason;
use crate::probe::{Pool, Probe, Silence, Thread};
use sealblk_secmem::{arena::ArenaError, arena::SecretBytes};
use sealblk_secmem::{
    private_file::Exposed, private_file::Forbid, private_file::check_in_state, private_file::open,
};

static POOL: Pool = Pool::new();

/// A file that settings name and that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unreadable {
    #[error("it cannot be read")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Silent(#[from] Silence),
    #[error(transparent)]
    Exposed(#[from] Exposed),
    #[error("it is longer than {0} bytes")]
    TooLong(usize),
    #[error(transparent)]
    Arena(#[from] ArenaError),
}

impl Unreadable {
    /// What an operator would act on.
    pub(super) fn reason(&self) -> KeyReason {
        match self {
            Self::Arena(_) => KeyReason::Host,
            Self::Silent(_) => KeyReason::Unreachable,
            Self::Io(_) | Self::Exposed(_) | Self::TooLong(_) => KeyReason::Invalid,
        }
    }
}

/// What `read` brings of a file, unless its storage does not answer.
fn answered<T: Send + 'static>(
    path: &Path,
    read: impl FnOnce(&Path, File) -> Result<T, Unreadable> + Send + 'static,
) -> Result<T, Unreadable> {
    let named = path.to_owned();
    Probe::of(&POOL).at(path, |thread: &mut Thread| {
        thread.run(move || read(&named, open(&named)?))
    })?
}

/// Reads a file that has at most `longest` bytes, and that anybody may know.
pub(crate) fn read_public(path: &Path, longest: usize) -> Result<Vec<u8>, Unreadable> {
    answered(path, move |_, file| {
        let mut content = Vec::new();
        file.take(longest as u64 + 1).read_to_end(&mut content)?;
        match content.len() > longest {
            true => Err(Unreadable::TooLong(longest)),
            false => Ok(content),
        }
    })
}

/// Reads a file that its owner alone can get at, and that has at most `longest` bytes, into the key arena.
pub(crate) fn read(path: &Path, longest: usize) -> Result<SecretBytes, Unreadable> {
    answered(path, move |path, mut file| {
        let metadata = file.metadata()?;
        check_in_state(path, &metadata, Forbid::All)?;
        let expected = longest.min(metadata.len() as usize);
        // One byte more shows that there are too many.
        let mut content = SecretBytes::zeroed(expected + 1)?;
        let mut len = 0;
        while len <= expected {
            match file.read(&mut content[len..]) {
                Ok(0) => {
                    content.truncate(len);
                    return Ok(content);
                }
                Ok(read) => len += read,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        Err(Unreadable::TooLong(longest))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use sealblk_secmem::private_file::create;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn private_file_is_read_up_to_its_longest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        assert!(matches!(read(&path, 3), Err(Unreadable::Io(_))));
        create(&path, b"one").unwrap();
        assert_eq!(&*read(&path, 3).unwrap(), b"one");
        assert_eq!(&*read(&path, 100).unwrap(), b"one");
        assert!(matches!(read(&path, 2), Err(Unreadable::TooLong(2))));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(read(&path, 3), Err(Unreadable::Exposed(_))));
    }
}
