//! Who has a disk: locks that prevent two processes from attaching one disk, by any of its names, and from doing I/O on it at one
//! time.
//!
//! A process attaches a disk before it reads anything of it for good ([`Attached`]), and claims it before it does I/O for a guest
//! ([`Claim`]). The locks are open file description locks (fcntl(2)) on single bytes and on disjoint ranges, far behind all data, so
//! that one of them can be held without another. They are independent of the flock(2) that cryptsetup and sealblk hold while
//! they read or write LUKS2 metadata.
//!
//! ```text
//! bytes        a writer holds                            a reader holds                     both then look for
//! 100..=199    nothing                                   nothing                            writer: any; reader: 101, 103
//! 200..=299    all of them, shared                       201 and 203, shared                nothing
//! 2^60         shared, by all that writes, on NFS         nothing                            nothing
//! 2^61 + x     shared, while it has byte x attached;     nothing                            reader: any
//!              exclusively for a moment to begin with,
//!              unless it accepts others
//! 2^62 + x     exclusively, while it may do I/O on it    shared                             nothing
//! ```
//!
//! A migration's destination attaches a disk that its source has attached as well ([`Others::Accepted`]), so it takes that lock
//! shared from the start. The source gives its claim back when its guest has stopped ([`Claim::release`]), and the
//! destination claims the disk then. Third parties stay out all the time.
//!
//! The locks of a claim to write last longer than the process that took them. Writes that io_uring has in flight still land after
//! a process was killed, and one that lands late would overwrite what a successor has written since. So the descriptions that hold
//! these locks are registered with each io_uring that does I/O on the disk ([`Fence`]): the kernel closes them with the ring, which
//! is when the last request of the ring has ended. A process that finds a disk claimed which no process has attached waits for that.
//! All other locks end with the process.
//!
//! The first two rows are QEMU's (`raw_apply_lock_bytes` in its block/file-posix.c): a byte from 100 on says that its holder uses a
//! permission, and one from 200 on that its holder does not share it; 1 is "write", and 3 is "resize". Each party takes its bytes
//! first and looks for those of others then, so of two that come at one time at least one sees the other. sealblk itself uses
//! none of QEMU's permissions, so what it finds there is QEMU's. An earlier build of sealblk locks the whole file, which excludes
//! a writer of this release and is excluded by one.
//!
//! Such a lock belongs to an inode, and one disk can have several inodes. So all are locked that are found, each in the
//! range of bytes that belongs to the disk.
//!
//! ```text
//! opened                   also locked
//! block device             its node in /dev, if another node was named
//! partition                its range of the whole disk's node
//! loop device              its range of the file or device under it, and so on downwards
//! file of an overlayfs     the file in its upper directory
//! ```
//!
//! Loop devices over a file or device are searched for as well, since users of a loop device take no lock of this kind. On a
//! block device that is written, O_EXCL excludes mounts, device-mapper, and other nodes of the device in other
//! containers. It belongs to one process: the source of a migration gives it up with its claim if the destination is there by then.
//!
//! A network file system may have only one kind of lock ([`one_kind_of_lock`]). Then these locks also exclude flock(2). On NFS, the server
//! gives the locks of a host that is cut off to another one, so all I/O of the disk is tied to locks ([`tie_to_locks`]).
//!
//! Remaining gaps, because Linux does not report them or has nothing to lock:
//! - a device with two numbers (paths of a LUN without multipath); a device on two hosts, for which the header of a volume
//!   has a claim ([`Holder`](crate::luks2::Holder)); a network file system whose server keeps no locks;
//! - a loop device that is set up over a file after the claim: the claim excludes another sealblk, but not a mount;
//! - a reader of a device that device-mapper writes to, and readers of one device in containers with their own `/dev`;
//! - objects that this process cannot open or see: the file under a loop device of another user or mount namespace, the
//!   upper directory of a container. The log reports this if it applies;
//! - an earlier build of sealblk that serves the same disk by another name than this one.

use std::fs::{self, File, Metadata};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::access::{Access, StorageError};
use super::capabilities::{NFS, file_system, sysfs};
use super::ofd_lock::{EVERYTHING, Holder, Kind, holder, set};
use super::reopen::reopen;
use super::stacking::{LoopBacking, Partition, WHOLE, loops_over, node, shifted};
use crate::mutex::lock;
use sealblk_base::mounts::{Mount, overlay_upper};

/// A disk that this process has attached, until this is dropped: no other process attaches it to write, and if this one writes,
/// none to read. No I/O is done for a guest yet.
#[derive(Debug)]
pub struct Attached {
    parts: Vec<Part>,
}

/// A disk on which this process does I/O, alone or together with other readers, until this is dropped. A ring of the disk is
/// served only while there is one.
#[derive(Debug)]
pub struct Claim {
    attached: Attached,
}

impl Attached {
    /// Attaches `file`, which `path` names, and all that is found to lead to the same bytes.
    pub(super) fn to(
        file: &File,
        path: &Path,
        access: Access,
        others: Others,
        changers: Arc<Changers>,
    ) -> Result<Self, StorageError> {
        let mut attaching = Attaching {
            path,
            access,
            others,
            changers,
            parts: Vec::new(),
        };
        let is_device = file
            .metadata()
            .is_ok_and(|found| found.file_type().is_block_device());
        let mut named = attaching.part(attaching.reopen(file)?, WHOLE)?;
        named.is_exclusive = is_device && access == Access::ReadWrite;
        attaching.below(&named, None, MOST_LAYERS)?;
        let mut parts = attaching.parts;
        parts.push(named);
        Ok(Self { parts })
    }

    /// Attached to nothing: null storage ([`DataFile::null`](super::DataFile::null)) has no other users.
    pub fn to_nothing() -> Self {
        Self { parts: Vec::new() }
    }

    /// Makes both one: a disk and its header.
    pub fn add(&mut self, mut other: Self) {
        self.parts.append(&mut other.parts);
    }

    /// Whether another process has attached the disk to write: the other side of a migration.
    pub fn is_attached_by_others(&self) -> bool {
        let mut parts = self.parts.iter();
        parts.any(|part| part.is_attached_by_others().unwrap_or(true))
    }

    /// The descriptions that hold the locks, for another process that takes the disk over. Both hold the locks then, until one of them is
    /// told that it does not ([`Attached::leave`]).
    ///
    /// # Errors
    /// If descriptors are exhausted.
    pub fn lend(&self) -> io::Result<Vec<Lent>> {
        self.parts.iter().map(Part::lend).collect()
    }

    /// What another process has lent; `of` gives what the file or device at a path is open for, and who changes its header. None if a part
    /// lacks a description: without one of its locks the disk is not this process' own.
    pub(super) fn borrowed(lent: Vec<Lent>, of: impl Fn(&Path) -> (Access, Arc<Changers>)) -> Option<Self> {
        let part = |lent: Lent| {
            let (access, changers) = of(&lent.path);
            Part::borrowed(lent, access, changers)
        };
        let parts = lent.into_iter().map(part).collect::<Option<_>>()?;
        Some(Self { parts })
    }

    /// Has the locks end with this, since the other process has left them to this one.
    pub fn take(&self) {
        self.parts
            .iter()
            .for_each(|part| part.is_borrowed.store(false, Ordering::Release));
    }

    /// Leaves the locks to another process: they do not end with this, and this process has no claim any more.
    pub fn leave(&self) {
        for part in &self.parts {
            part.changers.set(Who::Nobody);
            part.is_borrowed.store(true, Ordering::Release);
        }
    }

    /// As claimed: the process that has lent it had the claim.
    pub fn claimed(self) -> Claim {
        self.parts
            .iter()
            .for_each(|part| part.changers.set(Who::AllThreads));
        Claim { attached: self }
    }

    /// What each io_uring has to register that writes to the disk.
    pub fn fence(&self) -> Fence {
        let writers = self.parts.iter().filter(|part| part.access == Access::ReadWrite);
        Fence(writers.map(|part| Arc::clone(&part.io)).collect())
    }

    /// Claims what is attached.
    ///
    /// # Errors
    /// What is attached, and why it cannot be claimed now.
    pub fn claim(mut self) -> Result<Claim, Unclaimed> {
        let claimed = self.parts.iter_mut().try_for_each(Part::claim);
        match claimed {
            Ok(()) => Ok(self.claimed()),
            Err(error) => {
                self.parts.iter().for_each(Part::disclaim);
                Err(Unclaimed {
                    attached: self,
                    error,
                })
            }
        }
    }

    /// Claims what is attached, once the writes of a process that was killed have landed. If another process has it in use, this
    /// waits no longer than `patience` for that.
    ///
    /// # Errors
    /// As [`Attached::claim`].
    pub fn claim_in_turn(mut self, patience: Duration) -> Result<Claim, Unclaimed> {
        let (start, mut is_told) = (Instant::now(), false);
        loop {
            let unclaimed = match self.claim() {
                Ok(claim) => {
                    if is_told {
                        let seconds = start.elapsed().as_secs_f32();
                        tracing::info!(
                            seconds,
                            "the writes of the killed process have reached the storage"
                        );
                    }
                    return Ok(claim);
                }
                Err(unclaimed) => unclaimed,
            };
            match &unclaimed.error {
                error @ StorageError::Landing { .. } => {
                    if !is_told && start.elapsed() > SOON {
                        tracing::warn!("{error}");
                        is_told = true;
                    }
                }
                // A reader that has come since sees that the disk is attached, and leaves.
                StorageError::InUse { .. } if is_told || start.elapsed() < patience => {}
                _ => return Err(unclaimed),
            }
            self = unclaimed.attached;
            // On NFS each look is several requests to the server.
            thread::sleep((start.elapsed() / 16).clamp(TICK, SLOW_TICK));
        }
    }
}

impl Claim {
    /// What is attached by it.
    pub fn attached(&self) -> &Attached {
        &self.attached
    }

    /// See [`Attached::is_attached_by_others`].
    pub fn is_attached_by_others(&self) -> bool {
        self.attached.is_attached_by_others()
    }

    /// Has only this thread change the headers from now on. The others must not, once the header does not say any more that this host has
    /// the disk; the lock on the metadata says when they are done ([`Changers`]).
    pub fn leave_changes_to_this_thread(&self) {
        let this = Who::Thread(thread::current().id());
        self.attached
            .parts
            .iter()
            .for_each(|part| part.changers.set(this));
    }

    /// Gives the claim back; what is attached stays attached. Nothing of this process may be in flight.
    pub fn release(mut self) -> Attached {
        for part in &mut self.attached.parts {
            // The other side of a migration opens a device exclusively when it claims it.
            if part.is_attached_by_others().unwrap_or(true) {
                part.exclusive = None;
            }
            part.disclaim();
        }
        self.attached
    }
}

/// Which threads of this process may change the metadata of a disk, or of a header. A thread asks when it has the lock on the metadata: until
/// then another one can give the claim back.
#[derive(Debug, Default)]
pub(super) struct Changers(Mutex<Who>);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Who {
    /// It is not claimed.
    #[default]
    Nobody,
    /// It is claimed.
    AllThreads,
    /// It is claimed, and this one gives the claim back.
    Thread(ThreadId),
}

impl Changers {
    fn set(&self, who: Who) {
        *lock(&self.0) = who;
    }

    /// Whether this process has the claim.
    pub(super) fn is_claimed(&self) -> bool {
        *lock(&self.0) != Who::Nobody
    }

    /// Whether this thread may change metadata.
    pub(super) fn include_this_thread(&self) -> bool {
        match *lock(&self.0) {
            Who::Nobody => false,
            Who::AllThreads => true,
            Who::Thread(id) => id == thread::current().id(),
        }
    }
}

/// Whether other processes may have attached what a process attaches to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Others {
    /// None may.
    Refused,
    /// The other side of a migration may.
    Accepted,
}

/// The descriptions of a part of what is attached. See [`Attached::lend`].
#[derive(Debug)]
pub struct Lent {
    /// The disk or header that it is a part of.
    pub path: PathBuf,
    /// Which bytes of the file lead to that.
    pub range: Range<u64>,
    /// Whether a claim opens it with O_EXCL.
    pub is_exclusive: bool,
    /// The description with the locks of what is attached, that of what is claimed, and the one that was opened with O_EXCL, if there is
    /// one.
    pub descriptions: Vec<OwnedFd>,
}

/// Storage that is attached and could not be claimed.
#[derive(Debug)]
pub struct Unclaimed {
    /// As it was.
    pub attached: Attached,
    /// Why not.
    pub error: StorageError,
}

/// The descriptions whose locks have to last as long as I/O: they are registered with what does it.
#[derive(Clone, Debug, Default)]
pub struct Fence(Vec<Arc<File>>);

impl Fence {
    /// Their descriptors.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        self.0.iter().map(|file| file.as_raw_fd())
    }
}

/// How often a process looks whether it can claim a disk, at first and after a while, and after how long it says that it waits.
const TICK: Duration = Duration::from_millis(5);
const SLOW_TICK: Duration = Duration::from_millis(100);
const SOON: Duration = Duration::from_millis(100);

/// Whether flock(2) is a lock of the whole file by fcntl(2) here: on NFS and SMB (flock(2), "NFS details", "CIFS details"), and
/// on 9p (`v9fs_file_flock_dotl` in Linux' fs/9p/vfs_file.c).
pub(super) fn one_kind_of_lock(file: &File) -> bool {
    const SMB: [u32; 3] = [0x517b, 0xfe53_4d42, 0xff53_4d42];
    const V9FS: u32 = 0x0102_1997;
    let kind = file_system(file);
    kind == NFS || SMB.contains(&kind) || kind == V9FS
}

/// Has I/O by the description of `file` fail once the locks of this host are lost. An NFSv4 server gives the locks of a host that it does not
/// hear from to another one. I/O by a description that has a lock names the lock, so the server refuses it then, also what was in flight,
/// and the client of Linux refuses what comes later (`nfs4_copy_lock_stateid` in its fs/nfs/nfs4state.c). I/O by a description without a
/// lock would go on. This lock is shared, and excludes nobody.
pub(super) fn tie_to_locks(file: &File) -> io::Result<()> {
    match file_system(file) {
        NFS => set(file, Kind::Shared, &TIED).map(drop),
        _ => Ok(()),
    }
}

/// The byte of [`tie_to_locks`].
const TIED: Range<u64> = 1 << 60..(1 << 60) + 1;

/// Where the locks on the bytes of what is attached begin, and where those of what is claimed.
const ATTACHED: u64 = 1 << 61;
const CLAIMED: u64 = 1 << 62;

/// The bytes by which QEMU says that it uses a permission, and those by which it says that it does not share it.
const USED: Range<u64> = 100..200;
const UNSHARED: Range<u64> = 200..300;
/// The permissions that a reader does not share: "write" and "resize".
const UNSHARED_BY_READERS: [u64; 2] = [1, 3];

/// The ranges are disjoint.
const _: () = assert!(USED.end <= UNSHARED.start && UNSHARED.end <= TIED.start && TIED.end <= ATTACHED);
const _: () = assert!(ATTACHED + WHOLE.end <= CLAIMED && CLAIMED + WHOLE.end <= EVERYTHING.end);

/// The most that one thing stands on another.
const MOST_LAYERS: u32 = 16;

/// A range of an inode that leads to the disk, and the descriptions that hold the locks on it.
#[derive(Debug)]
struct Part {
    /// The disk's, for messages.
    path: PathBuf,
    access: Access,
    range: Range<u64>,
    /// For the locks of what is attached.
    process: File,
    /// For the locks of what is claimed. See [`Fence`].
    io: Arc<File>,
    /// Whether a claim opens it with O_EXCL, and what it has opened so.
    is_exclusive: bool,
    exclusive: Option<File>,
    /// Those of the disk or header that it is a part of.
    changers: Arc<Changers>,
    /// Whether another process has the same descriptions, and the locks are its own.
    is_borrowed: AtomicBool,
}

impl Part {
    fn lend(&self) -> io::Result<Lent> {
        let descriptions = [Some(&self.process), Some(&*self.io), self.exclusive.as_ref()];
        let copies = descriptions
            .into_iter()
            .flatten()
            .map(|file| file.as_fd().try_clone_to_owned());
        Ok(Lent {
            path: self.path.clone(),
            range: self.range.clone(),
            is_exclusive: self.is_exclusive,
            descriptions: copies.collect::<io::Result<_>>()?,
        })
    }

    fn borrowed(lent: Lent, access: Access, changers: Arc<Changers>) -> Option<Self> {
        let mut files = lent.descriptions.into_iter().map(File::from);
        Some(Self {
            process: files.next()?,
            io: Arc::new(files.next()?),
            exclusive: files.next(),
            path: lent.path,
            access,
            range: lent.range,
            is_exclusive: lent.is_exclusive,
            changers,
            is_borrowed: AtomicBool::new(true),
        })
    }

    /// Takes the locks of what is attached.
    fn attach(&self, others: Others) -> Result<(), StorageError> {
        self.exclude_qemu(&self.process)?;
        if self.access != Access::ReadWrite {
            return match self.is_attached_by_others()? {
                true => Err(self.in_use()),
                false => Ok(()),
            };
        }
        if others == Others::Refused {
            self.take(&self.process, Kind::Exclusive, ATTACHED)?;
        }
        // An exclusive lock becomes a shared one, and there is no moment without either.
        self.take(&self.process, Kind::Shared, ATTACHED)
    }

    /// Takes the locks of what is claimed.
    fn claim(&mut self) -> Result<(), StorageError> {
        if self.is_exclusive && self.exclusive.is_none() {
            self.exclusive = self.open_exclusively()?;
        }
        self.exclude_qemu(&self.io)?;
        let claimed = self.from(CLAIMED);
        let is_writer = self.access == Access::ReadWrite;
        let kind = if is_writer { Kind::Exclusive } else { Kind::Shared };
        if !set(&self.io, kind, &claimed).map_err(|error| self.no_locks(error))? {
            let holder = self.holder(&claimed)?;
            // A reader that has ended holds nothing.
            let is_read = holder.is_some_and(|holder| holder.is_shared);
            return Err(match is_read || self.is_attached_by_others()? {
                true => self.in_use(),
                false => StorageError::Landing {
                    path: self.path.clone(),
                },
            });
        }
        match !is_writer && self.is_attached_by_others()? {
            true => Err(self.in_use()),
            false => Ok(()),
        }
    }

    /// Gives back the locks of what is claimed.
    fn disclaim(&self) {
        self.changers.set(Who::Nobody);
        if self.is_borrowed.load(Ordering::Acquire) {
            return;
        }
        let _ = set(&self.io, Kind::None, &EVERYTHING);
    }

    /// Whether another process has it attached, to write.
    fn is_attached_by_others(&self) -> Result<bool, StorageError> {
        let holder = self.holder(&self.from(ATTACHED))?;
        Ok(holder.is_some_and(|holder| !holder.is_earlier_reader()))
    }

    /// Takes the bytes that keep QEMU out, and looks for a QEMU that was there before.
    fn exclude_qemu(&self, file: &File) -> Result<(), StorageError> {
        if self.access == Access::ReadWrite {
            self.demand(set(file, Kind::Shared, &UNSHARED))?;
            return match self.holder(&USED)? {
                Some(_) => Err(self.in_use()),
                None => Ok(()),
            };
        }
        let byte = |of: &Range<u64>, permission: u64| of.start + permission..of.start + permission + 1;
        for permission in UNSHARED_BY_READERS {
            self.demand(set(file, Kind::Shared, &byte(&UNSHARED, permission)))?;
        }
        for permission in UNSHARED_BY_READERS {
            match self.holder(&byte(&USED, permission))? {
                Some(holder) if !holder.is_earlier_reader() => return Err(self.in_use()),
                _ => {}
            }
        }
        Ok(())
    }

    /// Takes the locks on the part's bytes that begin at `base`.
    fn take(&self, file: &File, kind: Kind, base: u64) -> Result<(), StorageError> {
        self.demand(set(file, kind, &self.from(base)))
    }

    fn from(&self, base: u64) -> Range<u64> {
        base + self.range.start..base + self.range.end
    }

    fn demand(&self, taken: io::Result<bool>) -> Result<(), StorageError> {
        match taken {
            Ok(true) => Ok(()),
            Ok(false) => Err(self.in_use()),
            Err(source) => Err(self.no_locks(source)),
        }
    }

    /// Another process that holds a lock on any of these bytes. The part's own descriptions hold none of them.
    fn holder(&self, range: &Range<u64>) -> Result<Option<Holder>, StorageError> {
        holder(&self.process, range).map_err(|source| self.no_locks(source))
    }

    /// Opens a device so that neither a mount nor device-mapper can have it, unless the other side of a migration has done that.
    fn open_exclusively(&self) -> Result<Option<File>, StorageError> {
        match reopen(&self.process, mode(self.access) | OFlags::EXCL) {
            Ok(file) => Ok(Some(file)),
            Err(Errno::BUSY) if self.is_attached_by_others()? => Ok(None),
            Err(Errno::BUSY) => Err(self.in_use()),
            Err(error) => Err(StorageError::Reopen {
                path: self.path.clone(),
                source: error.into(),
            }),
        }
    }

    fn in_use(&self) -> StorageError {
        StorageError::InUse {
            path: self.path.clone(),
        }
    }

    fn no_locks(&self, source: io::Error) -> StorageError {
        StorageError::Lock {
            path: self.path.clone(),
            source,
        }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if self.is_borrowed.load(Ordering::Acquire) {
            return;
        }
        // To close them is not enough: a child that has not executed its program yet has copies of the descriptors.
        self.disclaim();
        let _ = set(&self.process, Kind::None, &EVERYTHING);
    }
}

struct Attaching<'a> {
    path: &'a Path,
    access: Access,
    others: Others,
    changers: Arc<Changers>,
    parts: Vec<Part>,
}

impl Attaching<'_> {
    fn reopen(&self, file: &File) -> Result<File, StorageError> {
        reopen(file, mode(self.access)).map_err(|source| StorageError::Reopen {
            path: self.path.into(),
            source: source.into(),
        })
    }

    /// Attaches what was opened as `process`, of which `range` leads to the disk.
    fn part(&self, process: File, range: Range<u64>) -> Result<Part, StorageError> {
        let part = Part {
            path: self.path.into(),
            access: self.access,
            range,
            io: Arc::new(self.reopen(&process)?),
            process,
            is_exclusive: false,
            exclusive: None,
            changers: Arc::clone(&self.changers),
            is_borrowed: AtomicBool::new(false),
        };
        part.attach(self.others)?;
        Ok(part)
    }

    /// Attaches what lies under `part`, and looks for loop devices over it other than `from`.
    fn below(&mut self, part: &Part, from: Option<u64>, layers: u32) -> Result<(), StorageError> {
        let (file, range) = (&part.process, &part.range);
        let metadata = file.metadata().map_err(|source| part.no_locks(source))?;
        let mounts = Mount::all();
        self.refuse_loop_over(file, &metadata, range, from, &mounts)?;
        if layers == 0 {
            return Ok(());
        }
        if !metadata.file_type().is_block_device() {
            if let Some(upper) = overlay_upper(file, &mounts)
                && let Some(upper) = self.also(&upper, range.clone(), |found| found.is_file())?
            {
                self.below(&upper, None, layers - 1)?;
                self.parts.push(upper);
            }
            return Ok(());
        }

        let rdev = metadata.rdev();
        let is = |number: u64| {
            move |found: &Metadata| found.file_type().is_block_device() && found.rdev() == number
        };
        let identity = |metadata: &Metadata| (metadata.dev(), metadata.ino());
        // The one in /dev, unless it is the one that is locked already.
        if let Some(node) = node(&sysfs(rdev))
            && fs::metadata(&node).is_ok_and(|node| identity(&node) != identity(&metadata))
            && let Some(node) = self.also(&node, range.clone(), is(rdev))?
        {
            self.parts.push(node);
        }
        if let Some(partition) = Partition::of(rdev) {
            let range = shifted(range, partition.start, partition.len);
            if let Some(disk) = self.also(&partition.disk, range, is(partition.rdev))? {
                self.below(&disk, None, layers - 1)?;
                self.parts.push(disk);
            }
        }
        if let Some(backing) = LoopBacking::of(file, rdev) {
            let range = shifted(range, backing.offset, backing.len);
            if let Some(under) = self.also(&backing.path, range, |found| backing.is(found))? {
                self.below(&under, Some(rdev), layers - 1)?;
                self.parts.push(under);
            }
        }
        Ok(())
    }

    /// Opens and attaches what is the disk by another name, if it is what `is` says; nothing, and a warning, if it cannot be.
    fn also(
        &self,
        name: &Path,
        range: Range<u64>,
        is: impl Fn(&Metadata) -> bool,
    ) -> Result<Option<Part>, StorageError> {
        let flags = mode(self.access) | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
        let opened = rustix::fs::open(name, flags, Mode::empty()).map(File::from);
        let opened = opened
            .map_err(io::Error::from)
            .and_then(|file| match is(&file.metadata()?) {
                true => Ok(file),
                false => Err(io::Error::new(
                    io::ErrorKind::NotFound,
                    "it was replaced in the meantime",
                )),
            });
        match opened {
            Ok(file) => self.part(file, range).map(Some),
            Err(error) => {
                tracing::warn!(
                    %error,
                    "{}: cannot also lock {}, which it is stored on: make sure that no other process uses that",
                    self.path.display(),
                    name.display()
                );
                Ok(None)
            }
        }
    }

    /// Refuses what a loop device stands over, other than `from`, if either can be written.
    fn refuse_loop_over(
        &self,
        file: &File,
        metadata: &Metadata,
        range: &Range<u64>,
        from: Option<u64>,
        mounts: &[Mount],
    ) -> Result<(), StorageError> {
        for over in loops_over(file, metadata, range, mounts) {
            let is_from = from.is_some() && over.rdev == from;
            if !is_from && (self.access == Access::ReadWrite || !over.is_read_only) {
                return Err(StorageError::UnderLoop {
                    path: self.path.into(),
                    device: over.node,
                });
            }
        }
        Ok(())
    }
}

fn mode(access: Access) -> OFlags {
    match access {
        Access::ReadWrite => OFlags::RDWR,
        Access::ReadOnly | Access::Inspect => OFlags::RDONLY,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_one_file_are_attached_each_by_itself_and_the_whole_by_none() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let attaching = Attaching {
            path: file.path(),
            access: Access::ReadWrite,
            others: Others::Refused,
            changers: Arc::default(),
            parts: Vec::new(),
        };
        let take = |range: Range<u64>| {
            let file = File::options().read(true).write(true).open(file.path()).unwrap();
            let mut part = attaching.part(file, range)?;
            part.claim().unwrap();
            Ok::<_, StorageError>(part)
        };
        let _first = take(0..4096).unwrap();
        let _second = take(4096..8192).unwrap();
        take(4095..4097).unwrap_err();
        take(WHOLE).unwrap_err();
        take(8192..WHOLE.end).unwrap();
    }
}
