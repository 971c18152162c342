//! What Landlock refuses (landlock(7)): files other than those that are allowed, TCP, and the
//! abstract sockets of other processes.
//!
//! The rules bind the calling thread and the threads that it starts. So the process enters them while it has one thread.
//!
//! A rule belongs to an inode, and to all that is below a directory: other paths that lead to the same file are allowed as well, and
//! the file behind a path may be exchanged. Each measure has its own set of rules, so that an older kernel has at least those that
//! it knows.
//!
//! Landlock does not check descriptors that are open already, and neither reads of attributes nor descriptors that only name a
//! file (`O_PATH`). [`files`] comes last, since the others read /proc.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, Scope,
};
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;

use super::NotTaken;

/// What a confined process can reach: files, by their inodes, and one socket.
#[derive(Debug, Default)]
pub struct Allowed {
    files: Vec<(OwnedFd, BitFlags<AccessFs>)>,
    /// The length of the socket's address.
    pub(super) address_len: usize,
}

impl Allowed {
    /// To open this file again.
    ///
    /// # Errors
    /// If descriptors are exhausted.
    pub fn reopen(&mut self, file: impl AsFd, writable: bool) -> io::Result<()> {
        let mut access = BitFlags::from(AccessFs::ReadFile);
        if writable {
            access |= AccessFs::WriteFile;
        }
        self.add(file, access)
    }

    /// To read this file, or the files in this directory and below it.
    pub fn read(&mut self, path: &Path) {
        self.named(path, AccessFs::ReadFile.into());
    }

    /// To make files in this directory, lock them, and remove them.
    pub fn lock_files_in(&mut self, directory: &Path) {
        let access = AccessFs::ReadDir
            | AccessFs::ReadFile
            | AccessFs::WriteFile
            | AccessFs::MakeReg
            | AccessFs::RemoveFile;
        self.named(directory, access);
    }

    /// To remove files in this directory.
    ///
    /// # Errors
    /// If descriptors are exhausted.
    pub fn remove_from(&mut self, directory: impl AsFd) -> io::Result<()> {
        self.add(directory, AccessFs::RemoveFile.into())
    }

    /// To connect to the Unix socket whose address is this long, and to others of which that is true: no filter sees more of an address.
    pub fn connect(&mut self, address_len: usize) {
        self.address_len = address_len;
    }

    /// Whether this thread has access to all of the files as it is.
    pub(super) fn is_open(&self) -> bool {
        self.files.iter().all(|(file, access)| {
            let mut wanted = rustix::fs::Access::empty();
            wanted.set(rustix::fs::Access::READ_OK, access.contains(AccessFs::ReadFile));
            wanted.set(
                rustix::fs::Access::WRITE_OK,
                access.intersects(AccessFs::WriteFile | AccessFs::RemoveFile),
            );
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            rustix::fs::accessat(CWD, path, wanted, AtFlags::EACCESS) != Err(Errno::ACCESS)
        })
    }

    fn add(&mut self, file: impl AsFd, access: BitFlags<AccessFs>) -> io::Result<()> {
        self.files.push((file.as_fd().try_clone_to_owned()?, access));
        Ok(())
    }

    /// What is not there cannot be opened.
    fn named(&mut self, path: &Path, access: BitFlags<AccessFs>) {
        if let Ok(file) = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
            self.files.push((file, access));
        }
    }
}

/// The rights to files of the first Landlock, and of the last that this was tried with.
const FIRST: ABI = ABI::V1;
const LAST: ABI = ABI::V6;

/// Refuses to open, make and remove files other than the allowed ones, and to execute any.
pub(super) fn files(allowed: &Allowed) -> Result<(), NotTaken> {
    single_thread()?;
    let rules = new()
        .handle_access(AccessFs::from_all(FIRST))
        .and_then(|rules| {
            rules
                .set_compatibility(CompatLevel::BestEffort)
                .handle_access(AccessFs::from_all(LAST))
        })
        .and_then(Ruleset::create);
    let rules = allowed
        .files
        .iter()
        .try_fold(rules.map_err(no)?, |rules, (file, access)| {
            rules.add_rule(PathBeneath::new(file, *access)).map_err(no)
        })?;
    rules.restrict_self().map_err(no)?;
    Ok(())
}

/// Refuses to bind and connect TCP sockets.
pub(super) fn network() -> Result<(), NotTaken> {
    single_thread()?;
    let rules = new().handle_access(AccessNet::from_all(ABI::V4));
    rules
        .and_then(Ruleset::create)
        .and_then(|rules| rules.restrict_self())
        .map_err(no)?;
    Ok(())
}

/// Refuses to connect to the abstract Unix sockets of other processes.
///
/// Landlock could refuse signals to them as well. It would also keep the kernel from killing the key helper when this process
/// ends (`PR_SET_PDEATHSIG`), since that signal counts as this process'. The filter of system calls refuses signals instead.
pub(super) fn abstract_sockets() -> Result<(), NotTaken> {
    single_thread()?;
    let rules = new().scope(Scope::AbstractUnixSocket);
    rules
        .and_then(Ruleset::create)
        .and_then(|rules| rules.restrict_self())
        .map_err(no)?;
    Ok(())
}

/// Rules of which the kernel knows all, or none is taken.
fn new() -> Ruleset {
    Ruleset::default().set_compatibility(CompatLevel::HardRequirement)
}

fn no(error: RulesetError) -> NotTaken {
    NotTaken::Landlock(error)
}

fn single_thread() -> Result<(), NotTaken> {
    let threads = fs::read_dir("/proc/self/task")
        .map_err(NotTaken::Threads)?
        .count();
    match threads {
        1 => Ok(()),
        threads => Err(NotTaken::HasThreads(threads)),
    }
}
