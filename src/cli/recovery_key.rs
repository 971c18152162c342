//! Recovery keys: passphrases with the strength of a key, which people can write down, type, and give to cryptsetup.
//!
//! A recovery key has 256 bits, in the form of systemd's recovery keys: eight groups of eight letters in modhex, whose 16
//! letters have the same positions on nearly every keyboard. The file holds these 71 characters and no newline, so
//! that it is the passphrase byte for byte, also for `cryptsetup --key-file`.

use std::path::{Path, PathBuf};

use super::failure::Failure;
use super::secret::{Key, SecretError, SecretSource};
use super::strength;
use sealblk_secmem::private_file;
use sealblk_secmem::{arena::ArenaError, arena::SecretBytes};

const MODHEX: &[u8; 16] = b"cbdefghijklnrtuv";
const RANDOM_LEN: usize = 32;
/// Letters in a group.
const GROUP: usize = 8;

/// A recovery key, and the file that was made for it, if there was none.
pub(super) struct RecoveryKey {
    pub(super) key: Key,
    pub(super) made: Option<PathBuf>,
}

impl RecoveryKey {
    /// Reads the recovery key; or makes one, and the file that is named, if there is no such file. One that somebody would guess
    /// is refused, unless `weak` is insisted on.
    pub(super) fn read_or_make(source: &SecretSource, weak: bool) -> Result<Self, Failure> {
        match source {
            SecretSource::File(path) if !exists(path) => {
                let passphrase = generate().map_err(SecretError::from)?;
                private_file::create(path, &passphrase).map_err(|e| SecretError::Io {
                    action: "write",
                    location: path.display().to_string(),
                    source: e,
                })?;
                Ok(Self {
                    key: Key::of(passphrase),
                    made: Some(path.clone()),
                })
            }
            source => {
                let key = source.read_key()?;
                strength::demand(key.first(), source, weak)?;
                Ok(Self { key, made: None })
            }
        }
    }
}

/// A dangling link counts as well: nothing is made through it.
fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

fn generate() -> Result<SecretBytes, ArenaError> {
    let random = SecretBytes::random(RANDOM_LEN)?;
    let letters = 2 * RANDOM_LEN;
    let mut key = SecretBytes::zeroed(letters + letters / GROUP - 1)?;
    key.fill(b'-');
    for i in 0..letters {
        let nibble = random[i / 2] >> (4 * (i % 2)) & 0xf;
        key[i + i / GROUP] = MODHEX[usize::from(nibble)];
    }
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn made_key_has_the_form_of_systemds() {
        let key = generate().unwrap();
        let text = std::str::from_utf8(&key).unwrap();
        let groups: Vec<_> = text.split('-').collect();
        assert_eq!(groups.len(), 8);
        assert!(
            groups
                .iter()
                .all(|group| group.len() == 8 && group.bytes().all(|letter| MODHEX.contains(&letter)))
        );
        assert!(!key.ct_eq(&generate().unwrap()));
    }

    #[test]
    fn key_is_made_once_and_read_from_then_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.key");
        let source = SecretSource::File(path.clone());
        let made = RecoveryKey::read_or_make(&source, false).unwrap();
        assert_eq!(made.made.as_deref(), Some(&*path));
        assert!(made.key.first().ct_eq(&fs::read(&path).unwrap()));
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        let read = RecoveryKey::read_or_make(&source, false).unwrap();
        assert!(read.made.is_none());
        assert!(read.key.first().ct_eq(made.key.first()));
    }
}
