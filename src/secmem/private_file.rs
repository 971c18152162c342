//! Files with keys, or with settings that name keys: readable only by their owner, and written completely or not at all.
//!
//! A new file is written beside its final place, synced, renamed, and the directory synced: after a crash at any
//! point the directory has the old file, no file, or the complete new file.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};

/// A file or directory that others than its owner can get at.
#[derive(Debug, thiserror::Error)]
pub enum Exposed {
    #[error(
        "its mode {mode:04o} lets other users {verb} it; run `chmod go-{letters} {path}`, and consider that other users \
         may have done so"
    )]
    Mode {
        path: String,
        mode: u32,
        verb: &'static str,
        letters: &'static str,
    },
    #[error(
        "it belongs to user {owner}, but this process runs as user {user}; run as its owner, or `chown {user} {path}`"
    )]
    Owner { path: String, owner: u32, user: u32 },
}

/// A FIFO, a device or a directory.
#[derive(Debug, thiserror::Error)]
#[error("it is not a regular file")]
struct NotAFile;

/// What others must not be able to do.
#[derive(Clone, Copy, Debug)]
pub enum Forbid {
    /// Keys, and directories that hold keys.
    All,
    /// Settings: they may be read.
    Write,
}

/// Refuses what is not the user's own, or is open to others. Settings may be root's.
pub fn check(path: &Path, metadata: &fs::Metadata, forbid: Forbid) -> Result<(), Exposed> {
    check_of(path, metadata, forbid, None)
}

/// The same in a state directory. Its owner may be another user than root, who sets it up: the user that the agent runs as.
pub fn check_in_state(path: &Path, metadata: &fs::Metadata, forbid: Forbid) -> Result<(), Exposed> {
    let owner = match metadata.is_dir() && rustix::process::geteuid().is_root() {
        // Who owns the state directory is said by that itself.
        true => Some(metadata.uid()),
        false => owner_of_state(path).map(|(user, _)| user),
    };
    check_of(path, metadata, forbid, owner)
}

fn check_of(
    path: &Path,
    metadata: &fs::Metadata,
    forbid: Forbid,
    directory: Option<u32>,
) -> Result<(), Exposed> {
    let path = || path.display().to_string();
    let user = rustix::process::geteuid().as_raw();
    let trusted = metadata.uid() == user
        || matches!(forbid, Forbid::Write) && metadata.uid() == 0
        || directory == Some(metadata.uid());
    if !trusted {
        return Err(Exposed::Owner {
            path: path(),
            owner: metadata.uid(),
            user,
        });
    }
    let mode = metadata.mode() & 0o7777;
    let (bits, verb, letters) = match forbid {
        Forbid::All => (0o077, "read or change", "rwx"),
        Forbid::Write => (0o022, "change", "w"),
    };
    match mode & bits {
        0 => Ok(()),
        _ => Err(Exposed::Mode {
            path: path(),
            mode,
            verb,
            letters,
        }),
    }
}

/// Opens a file to read it. What is not a regular file is not waited for.
pub fn open(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, NotAFile)),
    }
}

/// Makes a directory with mode 0700, and its parents; one that exists is left as it is.
pub fn ensure_dir(path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    match DirBuilder::new().mode(0o700).create(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(e) => Err(e),
        Ok(()) => sync_dir_of(path),
    }
}

/// Makes a directory in a state directory, for the owner of that.
pub fn ensure_dir_in_state(path: &Path) -> io::Result<()> {
    let is_new = !path.exists();
    ensure_dir(path)?;
    match owner_of_state(path) {
        Some((user, group)) if is_new => std::os::unix::fs::lchown(path, Some(user), Some(group)),
        _ => Ok(()),
    }
}

/// The user and group that own the directory of `path`, if this process is root's and they are not root.
fn owner_of_state(path: &Path) -> Option<(u32, u32)> {
    let directory = path.parent().filter(|parent| *parent != Path::new(""));
    let directory = fs::metadata(directory.unwrap_or(Path::new("."))).ok()?;
    let is_others = rustix::process::geteuid().is_root() && directory.uid() != 0;
    is_others.then(|| (directory.uid(), directory.gid()))
}

/// [`create`] in a state directory, for the owner of that.
///
/// # Errors
/// As for [`create`].
pub fn create_in_state(path: &Path, content: &[u8]) -> io::Result<()> {
    write_beside(path, content, owner_of_state(path), |new| {
        renameat_with(CWD, new, CWD, path, RenameFlags::NOREPLACE)
    })
}

/// [`replace`] in a state directory, for the owner of that.
pub fn replace_in_state(path: &Path, content: &[u8]) -> io::Result<()> {
    write_beside(path, content, owner_of_state(path), |new| {
        rustix::fs::rename(new, path)
    })
}

/// Makes the file `path` with mode 0600.
///
/// # Errors
/// `AlreadyExists`, if something has that name, which then stays as it is.
pub fn create(path: &Path, content: &[u8]) -> io::Result<()> {
    write_beside(path, content, None, |new| {
        renameat_with(CWD, new, CWD, path, RenameFlags::NOREPLACE)
    })
}

/// Makes the file `path` with mode 0600, or replaces it.
pub fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    write_beside(path, content, None, |new| rustix::fs::rename(new, path))
}

/// As [`replace_in_state`]; what was there is written over, and so is what a crash has left of writing it. Nobody else may write `path`
/// meanwhile.
pub fn replace_wiping(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut old = open_to_wipe(path)?;
    replace_in_state(path, content)?;
    write_over(&mut old)?;
    let Some((dir, name)) = path.parent().zip(path.file_name()) else {
        return Ok(());
    };
    for entry in fs::read_dir(dir)? {
        let other = entry?.file_name();
        let unique = other.as_bytes().strip_prefix(name.as_bytes());
        if unique.is_some_and(|unique| unique.starts_with(b".") && unique.ends_with(NEW.as_bytes())) {
            wipe(&dir.join(other))?;
        }
    }
    Ok(())
}

/// Writes over the file `path` and removes it. What its file system or a flash translation layer keeps of earlier blocks
/// is beyond reach.
pub fn wipe(path: &Path) -> io::Result<()> {
    if fs::symlink_metadata(path)?.is_file() {
        write_over(&mut open_to_wipe(path)?)?;
    }
    fs::remove_file(path)
}

/// The directory may be another user's, who could have made a link of the file.
fn open_to_wipe(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).custom_flags(libc::O_NOFOLLOW).open(path)
}

fn write_over(file: &mut File) -> io::Result<()> {
    let mut noise = vec![0; usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?];
    getrandom::fill(&mut noise).map_err(io::Error::other)?;
    file.write_all(&noise)?;
    file.sync_all()
}

fn write_beside(
    path: &Path,
    content: &[u8],
    owner: Option<(u32, u32)>,
    publish: impl FnOnce(&Path) -> rustix::io::Result<()>,
) -> io::Result<()> {
    let new = beside(path);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&new)?;
    let owned = owner.map_or(Ok(()), |(user, group)| {
        std::os::unix::fs::fchown(&file, Some(user), Some(group))
    });
    let written = owned
        .and_then(|()| file.write_all(content))
        .and_then(|()| file.sync_all())
        .and_then(|()| publish(&new).map_err(io::Error::from));
    if let Err(e) = written {
        let _ = fs::remove_file(&new);
        return Err(e);
    }
    sync_dir_of(path)
}

/// How the name of what is not written yet ends.
const NEW: &str = ".new";

/// A name in the same directory that nobody else uses.
fn beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}{NEW}", uuid::Uuid::new_v4().simple()));
    path.with_file_name(name)
}

pub fn sync_dir_of(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if parent != Path::new("") => File::open(parent)?.sync_all(),
        _ => File::open(".")?.sync_all(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn created_file_is_private_and_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        create(&path, b"one").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(
            create(&path, b"two").unwrap_err().kind(),
            io::ErrorKind::AlreadyExists
        );
        assert_eq!(fs::read(&path).unwrap(), b"one");
        replace(&path, b"three").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"three");
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            1,
            "nothing is left beside it"
        );
    }

    #[test]
    fn exposed_file_is_told_from_a_private_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        create(&path, b"").unwrap();
        let verdict = |mode, forbid| {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            check(&path, &fs::metadata(&path).unwrap(), forbid)
        };
        assert!(verdict(0o600, Forbid::All).is_ok());
        assert!(verdict(0o640, Forbid::All).is_err());
        assert!(verdict(0o644, Forbid::Write).is_ok());
        assert!(verdict(0o664, Forbid::Write).is_err());
    }
}
