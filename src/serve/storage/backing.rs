//! A file or block device that holds a header, a payload, or both.
//!
//! A [`Backing`] is open, and no more: other processes can have the same disk open. [`Backing::claim`] takes it for this process
//! alone; what is read without a claim can change at any time. [`Backing::data_file`] opens the same inode again for the data
//! path, with direct I/O if the file allows it. [`capabilities`](super::capabilities) checks what the storage supports.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Advice, FileType, Mode, OFlags, Stat, fadvise, fstat};
use rustix::io::Errno;

use super::access::{Access, StorageError};
use super::capabilities::{self, Kind, Protection, block_device_size, direct_alignment, logical_block_size};
use super::claim::{self, Attached, Changers, Claim, Fence, Lent, Others};
use super::loss::Losses;
use super::policy::Policy;
use super::pool::PAGE_U32;
use super::reopen::reopen;
use crate::luks2::{FileLock, LOCK_DIRECTORY};
use crate::mutex::lock;

/// Why what another process has lent is not borrowed.
#[derive(Debug, thiserror::Error)]
pub enum NotBorrowed {
    /// Locks are missing.
    #[error("the locks of the disk are not all there")]
    Incomplete,
    /// The path leads elsewhere by now.
    #[error(
        "{} names another file or device than the one that is served: if that is to be served, end `sealblk serve` and start it again; else put \
         the served one back",
        .0.display()
    )]
    OtherFile(PathBuf),
}

/// How long locks are waited for when a disk is attached. A process that was killed during an upgrade may have locks of the disk in a socket's
/// queue; the kernel closes those a little after the process has ended.
const CLOSED_LATE: Duration = Duration::from_millis(200);

/// An opened file or block device. See the module's header.
#[derive(Debug)]
pub struct Backing {
    file: File,
    path: PathBuf,
    access: Access,
    kind: Kind,
    losses: Arc<Losses>,
    /// See [`Backing::direct`].
    direct: OnceLock<Option<File>>,
    /// Whether it is claimed, and who changes metadata then.
    changers: Arc<Changers>,
    /// Held by the thread that changes metadata.
    changing: Mutex<()>,
}

impl Backing {
    /// Opens `path`, and claims it.
    ///
    /// # Errors
    /// Those of [`Backing::open`] and [`Backing::claim`].
    pub fn claimed(path: &Path, access: Access) -> Result<(Self, Claim), StorageError> {
        let backing = Self::open(path, access)?;
        let claim = backing.claim()?;
        Ok((backing, claim))
    }

    /// Opens `path`.
    ///
    /// # Errors
    /// Where it cannot be opened, is neither a regular file nor a block device, or is to be written and takes no writes.
    pub fn open(path: &Path, access: Access) -> Result<Self, StorageError> {
        let flags = match access {
            Access::ReadOnly | Access::Inspect => OFlags::RDONLY,
            Access::ReadWrite => OFlags::RDWR,
        } | OFlags::CLOEXEC
            | OFlags::NOCTTY;
        let protected = |by| StorageError::WriteProtected {
            path: path.into(),
            by,
        };
        let open_error = |error: Errno| {
            let by = match access {
                Access::ReadWrite => capabilities::protection(path, error),
                Access::ReadOnly | Access::Inspect => None,
            };
            by.map_or_else(
                || StorageError::Open {
                    path: path.into(),
                    access,
                    source: error.into(),
                },
                protected,
            )
        };

        // O_NONBLOCK, so that a FIFO put in the disk's place cannot hang us.
        let file =
            File::from(rustix::fs::open(path, flags | OFlags::NONBLOCK, Mode::empty()).map_err(open_error)?);
        let file_type = file
            .metadata()
            .map_err(|source| StorageError::Open {
                path: path.into(),
                access,
                source,
            })?
            .file_type();
        let (file, kind) = if file_type.is_file() {
            (file, Kind::File)
        } else if file_type.is_block_device() && access == Access::Inspect {
            // A drive is not asked for its medium.
            (file, Kind::BlockDevice)
        } else if file_type.is_block_device() {
            let opened = reopen(&file, flags).map_err(|error| match error {
                // Kernels that keep the devices of mounted file systems from being written.
                Errno::BUSY => StorageError::InUse { path: path.into() },
                error => open_error(error),
            })?;
            (opened, Kind::BlockDevice)
        } else {
            return Err(StorageError::NotStorage { path: path.into() });
        };

        // Linux lets it be opened for writing all the same.
        if access == Access::ReadWrite
            && kind == Kind::BlockDevice
            && capabilities::is_read_only(&file).unwrap_or(false)
        {
            return Err(protected(Protection::Device));
        }
        if access == Access::ReadWrite {
            claim::tie_to_locks(&file).map_err(|source| StorageError::Lock {
                path: path.into(),
                source,
            })?;
        }
        let witness = match access {
            Access::ReadWrite => Some(reopen(&file, OFlags::RDONLY).map_err(open_error)?),
            Access::ReadOnly | Access::Inspect => None,
        };
        Ok(Self {
            file,
            path: path.into(),
            access,
            kind,
            losses: Arc::new(Losses::new(witness)),
            direct: OnceLock::new(),
            changers: Arc::default(),
            changing: Mutex::default(),
        })
    }

    /// Waits until no other thread of this process changes metadata.
    pub(super) fn change_alone(&self) -> MutexGuard<'_, ()> {
        lock(&self.changing)
    }

    /// Attaches the disk: no other process can attach it, unless `others` are accepted on both sides; where this one only reads, others can to
    /// read.
    ///
    /// # Errors
    /// Where it is attached elsewhere, or cannot be locked.
    pub fn attach(&self, others: Others) -> Result<Attached, StorageError> {
        let start = Instant::now();
        loop {
            let changers = Arc::clone(&self.changers);
            match Attached::to(&self.file, &self.path, self.access, others, changers) {
                Err(StorageError::InUse { .. }) if start.elapsed() < CLOSED_LATE => {
                    thread::sleep(Duration::from_millis(10));
                }
                attached => return attached,
            }
        }
    }

    /// What another process has attached and lent, of this disk and its `header`. The locks are not this process' own before
    /// [`Attached::take`].
    ///
    /// # Errors
    /// If the locks are not all there, or are of another file: the path may have got another one since the other process opened it.
    pub fn borrow(&self, header: Option<&Self>, lent: Vec<Lent>) -> Result<Attached, NotBorrowed> {
        for of in std::iter::once(self).chain(header) {
            let own = lent.iter().filter(|lent| lent.path == of.path);
            let named: Vec<_> = own.filter_map(|lent| lent.descriptions.first()).collect();
            if named.is_empty() {
                return Err(NotBorrowed::Incomplete);
            }
            // The others are of what the file or device stands on.
            if !named.into_iter().any(|named| is_same(&of.file, named)) {
                return Err(NotBorrowed::OtherFile(of.path.clone()));
            }
        }
        let attached = Attached::borrowed(lent, |path| {
            let of = header.filter(|header| header.path == path).unwrap_or(self);
            (of.access, Arc::clone(&of.changers))
        });
        attached.ok_or(NotBorrowed::Incomplete)
    }

    /// Attaches and claims the disk.
    ///
    /// # Errors
    /// Those of [`Backing::attach`] and [`Attached::claim_in_turn`].
    pub fn claim(&self) -> Result<Claim, StorageError> {
        let claimed = self.attach(Others::Refused)?.claim_in_turn(Duration::ZERO);
        claimed.map_err(|unclaimed| unclaimed.error)
    }

    /// The file for headers: buffered, without O_DIRECT's alignment rules.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The same for transfers of whole pages from and to memory that begins at a page, by which no cache of this host is
    /// asked; none where the file has no direct I/O.
    pub fn direct(&self) -> Option<&File> {
        self.direct.get_or_init(|| self.open_direct(PAGE_U32)).as_ref()
    }

    /// Opens the same inode with O_DIRECT, if transfers of `unit` bytes at multiples of `unit` satisfy its alignment.
    fn open_direct(&self, unit: u32) -> Option<File> {
        let file = reopen(&self.file, self.data_flags() | OFlags::DIRECT).ok()?;
        let align = direct_alignment(&file, self.kind)?;
        let is_usable =
            unit.is_multiple_of(align) && (self.read_only() || claim::tie_to_locks(&file).is_ok());
        is_usable.then_some(file)
    }

    fn data_flags(&self) -> OFlags {
        match self.access {
            Access::Inspect => OFlags::RDONLY | OFlags::NONBLOCK,
            Access::ReadOnly => OFlags::RDONLY,
            Access::ReadWrite => OFlags::RDWR,
        }
    }

    /// Puts on stable storage all that was written.
    ///
    /// # Errors
    /// A failure is kept for the guest, if one is served: the data that were lost may be its own.
    pub fn sync(&self) -> io::Result<()> {
        let result = self.file.sync_all();
        if result.is_err() {
            self.losses.record();
        }
        result
    }

    /// The same file or device, to be read by another process: its description shares no lock with the claim.
    ///
    /// # Errors
    /// If this user may not read it, or descriptors are exhausted.
    pub fn reopen_to_read(&self) -> Result<File, StorageError> {
        reopen(&self.file, OFlags::RDONLY | OFlags::NONBLOCK).map_err(|error| StorageError::Reopen {
            path: self.path.clone(),
            source: error.into(),
        })
    }

    /// Whether this process has claimed it.
    pub fn is_claimed(&self) -> bool {
        self.changers.is_claimed()
    }

    /// Whether this thread may change metadata. That can change as long as it does not have the lock on them.
    pub(super) fn may_change(&self) -> bool {
        self.changers.include_this_thread()
    }

    /// How to lock metadata, which lie in a file: by flock(2), or not at all.
    pub fn metadata_lock(&self) -> FileLock {
        match (claim::one_kind_of_lock(&self.file), self.is_claimed()) {
            (false, _) => FileLock::Flock,
            (true, true) => FileLock::Claimed,
            (true, false) => FileLock::None,
        }
    }

    /// The directory with the files by which a device's metadata are locked ([`crate::luks2::MetadataLock`]); none for a file, which
    /// is locked itself.
    pub fn lock_files(&self) -> Option<&'static Path> {
        match self.kind {
            Kind::File => None,
            Kind::BlockDevice => Some(Path::new(LOCK_DIRECTORY)),
        }
    }

    /// The path that it was opened by, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is a file or a block device.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether it was opened for reading only.
    pub fn read_only(&self) -> bool {
        self.access != Access::ReadWrite
    }

    /// Its size in bytes as of now: a file can be extended and a logical volume resized while it is open.
    pub fn len(&self) -> Result<u64, StorageError> {
        let size_error = |source| StorageError::Size {
            path: self.path.clone(),
            source,
        };
        match self.kind {
            Kind::File => self
                .file
                .metadata()
                .map(|metadata| metadata.size())
                .map_err(size_error),
            Kind::BlockDevice => block_device_size(&self.file).map_err(size_error),
        }
    }

    /// Whether it has no bytes at all.
    pub fn is_empty(&self) -> Result<bool, StorageError> {
        self.len().map(|len| len == 0)
    }

    /// Opens the same inode for the data path: with O_DIRECT if transfers of `unit` bytes at multiples of `unit`
    /// satisfy its alignment, else through the page cache. Whatever does I/O on it has to register `fence`, of what was attached.
    pub fn data_file(&self, unit: u32, fence: &Fence) -> Result<DataFile, StorageError> {
        let (file, direct) = match self.open_direct(unit) {
            Some(file) => (file, true),
            None => {
                let file = reopen(&self.file, self.data_flags()).map_err(|error| StorageError::Reopen {
                    path: self.path.clone(),
                    source: error.into(),
                })?;
                if !self.read_only() {
                    claim::tie_to_locks(&file).map_err(|source| StorageError::Lock {
                        path: self.path.clone(),
                        source,
                    })?;
                }
                // Where a write-back has failed, the cache may hold what storage never got. What is still to be written stays.
                fadvise(&file, 0, None, Advice::DontNeed).map_err(|error| StorageError::Reopen {
                    path: self.path.clone(),
                    source: error.into(),
                })?;
                (file, false)
            }
        };
        let discard_granule = match self.kind {
            Kind::File => 1,
            Kind::BlockDevice => logical_block_size(&file).map_err(|source| StorageError::Size {
                path: self.path.clone(),
                source,
            })?,
        };
        Ok(DataFile {
            file,
            direct,
            kind: self.kind,
            null: false,
            discard_granule: discard_granule.into(),
            losses: Arc::clone(&self.losses),
            policy: Policy::default(),
            fence: Mutex::new(fence.clone()),
            discard_alignment: capabilities::discard_granularity(&self.file, self.kind),
        })
    }
}

/// Whether both are open for the same inode, or for the same device, which may have several.
fn is_same(file: &File, other: &OwnedFd) -> bool {
    let is_device = |stat: &Stat| FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
    match (fstat(file), fstat(other)) {
        (Ok(one), Ok(two)) if is_device(&one) && is_device(&two) => one.st_rdev == two.st_rdev,
        (Ok(one), Ok(two)) => (one.st_dev, one.st_ino) == (two.st_dev, two.st_ino),
        _ => false,
    }
}

const LOST: &str = "the storage has lost data that were written before; check it, then restart `sealblk serve` and the guest";

/// The payload's file as the data path uses it.
#[derive(Debug)]
pub struct DataFile {
    file: File,
    direct: bool,
    kind: Kind,
    null: bool,
    discard_granule: u64,
    losses: Arc<Losses>,
    policy: Policy,
    fence: Mutex<Fence>,
    discard_alignment: u64,
}

impl DataFile {
    /// Storage that costs nothing, to measure all else by: transfers end at once, what is written is gone, and what is
    /// read is whatever the buffer held.
    ///
    /// # Errors
    /// Where there is no `/dev/null`, which stands for the file that io_uring wants to know of.
    pub fn null() -> io::Result<Self> {
        let file = File::options().read(true).write(true).open("/dev/null")?;
        Ok(Self {
            file,
            direct: true,
            kind: Kind::File,
            null: true,
            discard_granule: 1,
            losses: Arc::new(Losses::new(None)),
            policy: Policy::default(),
            fence: Mutex::default(),
            discard_alignment: 1,
        })
    }

    /// The same file opened once more, for a queue of its own, which is told of write-backs that fail from then on.
    pub(super) fn reopen(&self) -> io::Result<File> {
        let kept = OFlags::RWMODE | OFlags::DIRECT;
        let flags = rustix::fs::fcntl_getfl(&self.file)? & kept;
        let file = reopen(&self.file, flags)?;
        if flags.contains(OFlags::RDWR) {
            claim::tie_to_locks(&file)?;
        }
        // What failed before the file was open.
        self.losses.look();
        Ok(file)
    }

    /// Has data read anew that another process may have changed since they were read: they are not claimed, or were not until now.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn forget_cached(&self) -> io::Result<()> {
        match self.direct || self.null {
            true => Ok(()),
            // What is still to be written stays.
            false => Ok(fadvise(&self.file, 0, None, Advice::DontNeed)?),
        }
    }

    /// What has to be registered with an io_uring that does I/O on the file.
    pub(super) fn fence(&self) -> Fence {
        lock(&self.fence).clone()
    }

    /// Has `fence` registered with each io_uring that begins with the file from now on.
    pub fn set_fence(&self, fence: Fence) {
        *lock(&self.fence) = fence;
    }

    /// Whether there is a loss that the guest was not told of.
    pub fn has_loss(&self) -> bool {
        self.losses.look();
        self.losses.is_untold()
    }

    /// Whether there is a loss that the guest does not know of.
    pub fn has_unknown_loss(&self) -> bool {
        self.losses.look();
        self.losses.is_unknown()
    }

    /// Keeps a loss for the guest that another process has found.
    pub fn record_loss(&self) {
        self.losses.record();
    }

    /// Puts on stable storage what was written, where no guest asked for it.
    ///
    /// # Errors
    /// A failure here is kept for the guest's next flush or durable write.
    pub fn sync(&self) -> io::Result<()> {
        if self.null {
            return Ok(());
        }
        let result = rustix::fs::fdatasync(&self.file);
        if result.is_err() {
            self.losses.record();
        }
        Ok(result?)
    }

    /// The same file, with what becomes of reads and writes that it fails.
    pub fn with_policy(mut self, policy: Policy) -> Self {
        self.policy = policy;
        self
    }

    /// What becomes of reads and writes that it fails.
    pub(super) fn policy(&self) -> Policy {
        self.policy
    }

    /// The loss that the guest is to be told of at a flush or a durable write.
    pub(super) fn loss(&self) -> Option<io::Error> {
        let lost = self.losses.any(self.direct);
        lost.then(|| io::Error::other(LOST))
    }

    /// The guest is being told that its flush has failed.
    pub(super) fn flush_failed(&self) {
        match self.direct {
            true => self.losses.told(),
            false => self.losses.record_known(),
        }
    }

    /// The guest is being told that a durable write has failed. If that is because of data that were written before, and not
    /// of its own, these are another matter.
    pub(super) fn durable_write_failed(&self) {
        if !self.direct {
            self.losses.look();
        }
    }

    /// Whether transfers bypass the page cache.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Whether it is a file or a block device.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether nothing is stored: see [`DataFile::null`].
    pub fn is_null(&self) -> bool {
        self.null
    }

    /// Whether it takes discards, asked of it: it is open for writing.
    ///
    /// # Errors
    /// Why it takes none.
    pub fn takes_discards(&self) -> io::Result<()> {
        match self.null {
            true => Ok(()),
            false => capabilities::takes_discards(&self.file, self.kind),
        }
    }

    /// What a discard should be aligned to, in bytes, for storage to give anything back.
    pub fn discard_alignment(&self) -> u64 {
        self.discard_alignment
    }

    /// What a discard of a range of bytes can be asked of it for, as start and end: the whole blocks in the range.
    pub fn discardable(&self, offset: u64, len: u64) -> Option<(u64, u64)> {
        let granule = self.discard_granule;
        let (start, end) = (
            offset.next_multiple_of(granule),
            (offset + len) / granule * granule,
        );
        (start < end).then_some((start, end))
    }
}

impl AsFd for DataFile {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file_of(size: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        file
    }

    #[test]
    fn a_second_writer_is_refused_even_through_another_name() {
        let file = file_of(4096);
        let link = file.path().with_extension("link");
        std::os::unix::fs::symlink(file.path(), &link).unwrap();
        let first = Backing::claimed(file.path(), Access::ReadWrite).unwrap();
        assert!(matches!(
            Backing::claimed(&link, Access::ReadWrite),
            Err(StorageError::InUse { .. })
        ));
        assert!(matches!(
            Backing::claimed(&link, Access::ReadOnly),
            Err(StorageError::InUse { .. })
        ));
        drop(first);
        Backing::claimed(&link, Access::ReadWrite).unwrap();
        std::fs::remove_file(link).unwrap();
    }

    // Killed in the middle of an upgrade, both processes had ended, and the disk was refused as one that is in use.
    #[test]
    fn locks_that_are_closed_a_little_late_are_waited_for() {
        let file = file_of(4096);
        let first = Backing::claimed(file.path(), Access::ReadWrite).unwrap();
        let closing = thread::spawn(|| {
            thread::sleep(CLOSED_LATE / 4);
            drop(first);
        });
        Backing::claimed(file.path(), Access::ReadWrite).unwrap();
        closing.join().unwrap();
    }

    #[test]
    fn readers_share() {
        let file = file_of(4096);
        let _first = Backing::claimed(file.path(), Access::ReadOnly).unwrap();
        let _second = Backing::claimed(file.path(), Access::ReadOnly).unwrap();
        assert!(matches!(
            Backing::claimed(file.path(), Access::ReadWrite),
            Err(StorageError::InUse { .. })
        ));
    }

    #[test]
    fn inspection_claims_nothing() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let _attached = Backing::claimed(file.path(), Access::ReadWrite).unwrap();
        let inspected = Backing::open(file.path(), Access::Inspect).unwrap();
        assert!(inspected.read_only());
    }

    #[test]
    fn a_directory_is_not_storage() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(
            Backing::open(dir.path(), Access::ReadOnly),
            Err(StorageError::NotStorage { .. })
        ));
    }

    #[test]
    fn size_follows_the_file() {
        let file = file_of(8192);
        let backing = Backing::open(file.path(), Access::ReadWrite).unwrap();
        assert_eq!(backing.len().unwrap(), 8192);
        file.as_file().set_len(12288).unwrap();
        assert_eq!(backing.len().unwrap(), 12288);
    }

    #[test]
    fn a_file_whose_alignment_exceeds_the_unit_is_not_opened_direct() {
        let file = file_of(1 << 20);
        let backing = Backing::open(file.path(), Access::ReadWrite).unwrap();
        // No file system asks for an alignment that divides 1.
        assert!(!backing.data_file(1, &Fence::default()).unwrap().is_direct());
    }

    fn backing() -> (tempfile::NamedTempFile, Backing) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let backing = Backing::open(file.path(), Access::ReadWrite).unwrap();
        (file, backing)
    }

    #[test]
    fn locks_that_are_not_all_there_are_not_borrowed() {
        let [(_one, disk), (_two, header)] = [backing(), backing()];
        let mut attached = disk.attach(Others::Refused).unwrap();
        attached.add(header.attach(Others::Refused).unwrap());
        let borrow = |lent| disk.borrow(Some(&header), lent);
        borrow(attached.lend().unwrap()).unwrap();
        let incomplete = |change: &dyn Fn(&mut Vec<Lent>)| {
            let mut lent = attached.lend().unwrap();
            change(&mut lent);
            let error = borrow(lent).unwrap_err();
            assert!(matches!(error, NotBorrowed::Incomplete), "{error}");
        };
        incomplete(&Vec::clear);
        // None of the disk, none of the header.
        for part in 0..2 {
            incomplete(&|lent| drop(lent.remove(part)));
            incomplete(&|lent| lent[part].descriptions.truncate(1));
            incomplete(&|lent| lent[part].descriptions.clear());
        }
    }
}
