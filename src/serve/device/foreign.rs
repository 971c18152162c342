//! Descriptors that the front-end passes, and what each of them is.
//!
//! The front-end chooses what is behind a descriptor. A file of a FUSE file system has a daemon, perhaps the front-end
//! itself: fstat(2), fstatfs(2), lseek(2), mmap(2), a page fault and close(2) wait for its answer, and for ever if it does not
//! answer. So the kind of a descriptor is found out by calls that no file system answers, before any other call:
//!
//! - fcntl(F_GET_SEALS) succeeds for memfds and for files of tmpfs and hugetlbfs, and for no others.
//! - The link /proc/self/fd/N shows an eventfd and a socket by names that no path can have, since paths begin with '/'.
//! - statx(2) with AT_STATX_DONT_SYNC tells what the kernel knows of a file already: whether it is a device, and which one.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, OFlags, StatxFlags};
use rustix::net::{AddressFamily, SocketType, sockopt};

use crate::closer;

/// A descriptor of the front-end.
#[derive(Debug)]
pub(super) struct Foreign {
    /// There until this is dropped.
    fd: Option<OwnedFd>,
    kind: Kind,
}

/// What is behind a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A memfd, or a file of tmpfs or hugetlbfs.
    Memory,
    /// A DAX device: persistent memory, or memory that was set aside. Its size in bytes.
    Dax { size: u64 },
    /// An eventfd.
    Event,
    /// A Unix stream socket.
    Socket,
    /// Anything else.
    Other,
}

impl Foreign {
    pub(super) fn new(fd: OwnedFd) -> Self {
        let kind = kind(fd.as_fd());
        Self { fd: Some(fd), kind }
    }

    /// One more descriptor of the same.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            fd: Some(self.as_fd().try_clone_to_owned()?),
            kind: self.kind,
        })
    }

    /// The descriptor, which the caller closes from then on.
    pub(super) fn into_inner(mut self) -> OwnedFd {
        self.fd.take().expect("it is taken when this is dropped")
    }

    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether it can be read and written by its open file description.
    pub(super) fn is_writable(&self) -> bool {
        rustix::fs::fcntl_getfl(self).is_ok_and(|flags| flags & OFlags::RWMODE == OFlags::RDWR)
    }

    /// Where it leads, as the kernel names it.
    pub(super) fn name(&self) -> String {
        link(self.as_fd()).map_or_else(|| "?".into(), |link| link.to_string_lossy().into_owned())
    }
}

impl AsFd for Foreign {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd
            .as_ref()
            .expect("it is taken when this is dropped")
            .as_fd()
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        if let (Kind::Socket | Kind::Other, Some(fd)) = (self.kind, self.fd.take()) {
            closer::close(fd);
        }
    }
}

fn kind(fd: BorrowedFd<'_>) -> Kind {
    if rustix::fs::fcntl_get_seals(fd).is_ok() {
        return Kind::Memory;
    }
    let Some(link) = link(fd) else { return Kind::Other };
    match link.to_string_lossy() {
        name if name == "anon_inode:[eventfd]" => Kind::Event,
        name if name.starts_with("socket:") && is_unix_stream(fd) => Kind::Socket,
        _ => dax_size(fd).map_or(Kind::Other, |size| Kind::Dax { size }),
    }
}

fn link(fd: BorrowedFd<'_>) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok()
}

fn is_unix_stream(fd: BorrowedFd<'_>) -> bool {
    sockopt::socket_domain(fd) == Ok(AddressFamily::UNIX)
        && sockopt::socket_type(fd) == Ok(SocketType::STREAM)
}

/// The size of a DAX device, or none for anything else.
fn dax_size(fd: BorrowedFd<'_>) -> Option<u64> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = rustix::fs::statx(fd, c"", flags, StatxFlags::empty()).ok()?;
    if FileType::from_raw_mode(stat.stx_mode.into()) != FileType::CharacterDevice {
        return None;
    }
    let device = format!("/sys/dev/char/{}:{}", stat.stx_rdev_major, stat.stx_rdev_minor);
    let subsystem = std::fs::read_link(Path::new(&device).join("subsystem")).ok()?;
    if subsystem.file_name()? != "dax" {
        return None;
    }
    let size = std::fs::read_to_string(Path::new(&device).join("size")).ok()?;
    size.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::{MemfdFlags, memfd_create};
    use std::fs::File;
    use std::net::TcpListener;
    use std::os::unix::net::{UnixDatagram, UnixStream};

    #[test]
    fn descriptors_are_known_by_what_is_behind_them_and_not_by_their_names() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let named = |name: &str| File::create(elsewhere.path().join(name)).unwrap().into();
        let cases: [(OwnedFd, Kind); 10] = [
            (memfd_create("m", MemfdFlags::CLOEXEC).unwrap(), Kind::Memory),
            (memfd_create("m", MemfdFlags::HUGETLB).unwrap(), Kind::Memory),
            (File::create(dir.path().join("ram")).unwrap().into(), Kind::Memory),
            (eventfd(0, EventfdFlags::CLOEXEC).unwrap(), Kind::Event),
            (UnixStream::pair().unwrap().0.into(), Kind::Socket),
            (UnixDatagram::pair().unwrap().0.into(), Kind::Other),
            (TcpListener::bind("127.0.0.1:0").unwrap().into(), Kind::Other),
            (File::open("/dev/zero").unwrap().into(), Kind::Other),
            (named("anon_inode:[eventfd]"), Kind::Other),
            (named("memfd:m (deleted)"), Kind::Other),
        ];
        for (fd, kind) in cases {
            let foreign = Foreign::new(fd);
            assert_eq!(foreign.kind(), kind, "{}", foreign.name());
        }
    }
}
