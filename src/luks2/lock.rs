//! The lock on metadata: the same lock as cryptsetup's, so that both can work on one volume.
//!
//! A regular file is locked directly by flock(2). A block device is locked through the file
//! `/run/cryptsetup/L_<major>:<minor>`, because udev takes flock(2) on the device for its own purposes. The last
//! holder unlinks that file, so a process that gets the lock checks that the locked file is still in the directory.
//!
//! Only root can make that file, unless other users have access to the directory. A process without access reads without
//! the lock, and reads again if the result is not valid ([`read`](crate::read)): both copies
//! have checksums and a sequence number, so a half-written header is detected. sealblk writes nothing without the lock.
//!
//! The lock is held only while metadata are read or written, never while a key is derived or a disk is served.
//! It does not keep two servers off one disk: the storage has another lock for that, which is independent of flock(2).

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::MutexGuard;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{FlockOperation, Mode, OFlags, flock, fstat, major, minor, mkdir, openat, stat, unlink};
use rustix::io::Errno;

/// What is done under the lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockMode {
    Read,
    Write,
}

/// What keeps others from the metadata in a file while they are read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileLock {
    /// flock(2).
    Flock,
    /// The claim on the file, which keeps out flock(2) too.
    Claimed,
    /// Nothing: there is no claim, and flock(2) would wait for that of who serves the disk.
    None,
}

/// The lock on the metadata of one device, until it is dropped.
#[derive(Debug)]
pub struct MetadataLock<'file> {
    held: Held<'file>,
    _alone: Option<MutexGuard<'file, ()>>,
}

impl<'file> From<Held<'file>> for MetadataLock<'file> {
    fn from(held: Held<'file>) -> Self {
        Self { held, _alone: None }
    }
}

impl<'file> MetadataLock<'file> {
    /// Waits for the lock on `file`, but not for ever; a regular file is locked as `by` says. To read a block device without
    /// being allowed to lock it, it may be none: see [`MetadataLock::is_held`].
    ///
    /// # Errors
    /// Where there is no such lock to be had, or somebody else keeps it.
    pub fn acquire(file: &'file File, mode: LockMode, by: FileLock) -> io::Result<Self> {
        let metadata = file.metadata()?;
        if metadata.file_type().is_block_device() {
            let rdev = metadata.rdev();
            let name = format!("L_{}:{}", major(rdev), minor(rdev));
            return match ResourceFile::lock(Path::new(LOCK_DIRECTORY), &name, mode) {
                Ok(held) => Ok(Held::Resource(held).into()),
                Err(error) => match (error.kind(), mode) {
                    (io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem, LockMode::Read) => {
                        Ok(Held::Nothing.into())
                    }
                    (
                        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem,
                        LockMode::Write,
                    ) => Err(io::Error::new(io::ErrorKind::PermissionDenied, NOT_PERMITTED)),
                    _ => Err(error),
                },
            };
        }
        match by {
            FileLock::Flock => {
                wait_for(file.as_fd(), mode)?;
                Ok(Held::File(file.as_fd()).into())
            }
            FileLock::Claimed => Ok(Held::Unshared.into()),
            FileLock::None => Ok(Held::Nothing.into()),
        }
    }

    /// No lock at all, for what nobody else can open.
    pub fn unshared() -> Self {
        Held::Unshared.into()
    }

    /// The same, and no other thread has `alone` meanwhile: threads that share a description of the file share its flock(2), too.
    pub fn alone(mut self, alone: MutexGuard<'file, ()>) -> Self {
        self._alone = Some(alone);
        self
    }

    /// Whether nobody can be writing meanwhile.
    pub fn is_held(&self) -> bool {
        !matches!(self.held, Held::Nothing)
    }
}

impl Drop for MetadataLock<'_> {
    fn drop(&mut self) {
        if let Held::File(file) = &self.held {
            // Closing the file would release it too, but the disk stays open.
            let _ = flock(file, FlockOperation::Unlock);
        }
    }
}

#[derive(Debug)]
enum Held<'file> {
    File(BorrowedFd<'file>),
    Resource(#[allow(dead_code, reason = "held for its drop")] ResourceFile),
    Unshared,
    Nothing,
}

/// A lock on a file that stands for a block device.
#[derive(Debug)]
struct ResourceFile {
    file: OwnedFd,
    path: PathBuf,
}

impl ResourceFile {
    fn lock(directory: &Path, name: &str, mode: LockMode) -> io::Result<Self> {
        match mkdir(directory, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory_fd = rustix::fs::open(directory, flags, Mode::empty())?;
        loop {
            let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mode_of_new = Mode::from_raw_mode(0o644);
            let file = match openat(
                &directory_fd,
                name,
                flags | OFlags::CREATE | OFlags::RDWR,
                mode_of_new,
            ) {
                // Another user's, which can be locked all the same, unless it is unlinked meanwhile.
                Err(Errno::ACCESS) => {
                    match openat(&directory_fd, name, flags | OFlags::RDONLY, Mode::empty()) {
                        Err(Errno::NOENT) => continue,
                        file => file?,
                    }
                }
                file => file?,
            };
            wait_for(file.as_fd(), mode)?;
            let held = Self {
                file,
                path: directory.join(name),
            };
            if held.is_current() {
                return Ok(held);
            }
            // Its last holder unlinked it between our open and our lock: what we hold locks out nobody.
        }
    }

    fn is_current(&self) -> bool {
        match (fstat(&self.file), stat(&self.path)) {
            (Ok(held), Ok(named)) => (held.st_dev, held.st_ino) == (named.st_dev, named.st_ino),
            _ => false,
        }
    }
}

impl Drop for ResourceFile {
    fn drop(&mut self) {
        // Only he who holds it alone may take the file away; those who wait for it notice.
        if flock(&self.file, FlockOperation::NonBlockingLockExclusive).is_ok() && self.is_current() {
            let _ = unlink(&self.path);
        }
    }
}

fn wait_for(file: BorrowedFd<'_>, mode: LockMode) -> io::Result<()> {
    let operation = match mode {
        LockMode::Read => FlockOperation::NonBlockingLockShared,
        LockMode::Write => FlockOperation::NonBlockingLockExclusive,
    };
    let deadline = Instant::now() + PATIENCE;
    loop {
        match flock(file, operation) {
            Ok(()) => return Ok(()),
            Err(Errno::AGAIN | Errno::INTR) if Instant::now() < deadline => thread::sleep(PAUSE),
            Err(Errno::AGAIN) => {
                let text = "another program keeps the lock on the LUKS2 metadata; find it with `lslocks`";
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

const NOT_PERMITTED: &str = "this user cannot lock the metadata of a block device, which needs a file in /run/cryptsetup, as in \
    cryptsetup: run this as root, or give a group of the user access (`install -d -m 770 -g GROUP /run/cryptsetup`; \
    tmpfiles.d(5) does that at each boot)";

/// The directory of the files by which the metadata of block devices are locked. It is cryptsetup's own, as compiled into every
/// distribution's.
pub const LOCK_DIRECTORY: &str = "/run/cryptsetup";

/// Metadata I/O takes milliseconds. cryptsetup waits for ever; an attach that hangs helps nobody.
const PATIENCE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_share_a_file_and_a_writer_is_kept_out_until_they_are_done() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (one, two, three) = (
            file.reopen().unwrap(),
            file.reopen().unwrap(),
            file.reopen().unwrap(),
        );
        let first = MetadataLock::acquire(&one, LockMode::Read, FileLock::Flock).unwrap();
        let second = MetadataLock::acquire(&two, LockMode::Read, FileLock::Flock).unwrap();
        assert_eq!(
            flock(&three, FlockOperation::NonBlockingLockExclusive),
            Err(Errno::AGAIN)
        );
        drop((first, second));
        let _third = MetadataLock::acquire(&three, LockMode::Write, FileLock::Flock).unwrap();
        assert_eq!(
            flock(&one, FlockOperation::NonBlockingLockShared),
            Err(Errno::AGAIN)
        );
    }

    #[test]
    fn the_file_that_stands_for_a_device_goes_with_its_last_holder() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path().join("cryptsetup");
        let first = ResourceFile::lock(&directory, "L_8:1", LockMode::Read).unwrap();
        let second = ResourceFile::lock(&directory, "L_8:1", LockMode::Read).unwrap();
        drop(first);
        assert!(directory.join("L_8:1").exists());
        drop(second);
        assert!(!directory.join("L_8:1").exists());
        assert_eq!(directory.metadata().unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn a_waiter_whose_file_was_unlinked_locks_the_new_one() {
        let directory = tempfile::tempdir().unwrap();
        let holder = ResourceFile::lock(directory.path(), "L_8:1", LockMode::Write).unwrap();
        let path = directory.path().to_owned();
        let waiter = thread::spawn(move || ResourceFile::lock(&path, "L_8:1", LockMode::Write).unwrap());
        thread::sleep(Duration::from_millis(50));
        drop(holder);
        let held = waiter.join().unwrap();
        assert!(held.is_current());
    }
}
