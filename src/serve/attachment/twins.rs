//! Detects byte-for-byte copies of a volume that are served on this host at the same time: they have the same UUID and the
//! same key. This can be intended, for instance to inspect a backup. sealblk warns, since an observer of both storages learns
//! where they differ, and guests take the copies for one disk.
//!
//! Each process that serves a volume has a socket whose abstract name (unix(7)) has the volume, and the file or device of its
//! header. The socket needs no directory, and ends with the process. Every user can make such a name, so names of other
//! users count only if that user is root. The name ends in a random number, so that another process cannot take it first.
//!
//! Volumes that are served in another network namespace, such as a container's, are not detected.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use base16ct::lower;
use rustix::fd::OwnedFd;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};
use uuid::Uuid;

use crate::control::peer::credentials;
use crate::storage::Backing;

/// What tells others that the volume is served, until it is dropped.
#[derive(Debug)]
pub(super) struct Announcement {
    _socket: OwnedFd,
}

/// Tells other processes that the volume of this header is served here, and the log whether a copy of it is.
pub(super) fn announce(volume: Uuid, header: &Backing) -> io::Result<Announcement> {
    let volume = format!("sealblk/{volume}/");
    let own = format!("{volume}{}/", place(header)?);
    let mut random = [0; 8];
    getrandom::fill(&mut random)?;
    let socket = stream()?;
    let name = own.clone() + &lower::encode_string(&random);
    bind(&socket, &SocketAddrUnix::new_abstract_name(name.as_bytes())?)?;
    listen(&socket, MOST_LOOKS)?;
    // Of two that start at a time, one at least sees the other.
    let table = fs::read("/proc/net/unix").unwrap_or_default();
    let names = String::from_utf8_lossy(&table);
    let others = names
        .lines()
        .filter_map(|line| line.rsplit(' ').next()?.strip_prefix('@'));
    let of_copies = others.filter(|name| name.starts_with(&volume) && !name.starts_with(&own));
    if let Some(process) = of_copies.into_iter().find_map(owner) {
        tracing::warn!(
            process,
            "another process serves a copy of this volume with the same UUID: both have the same key, and guests take them for one \
             disk; if this should be a separate disk, make a new volume with `sealblk create`, and copy the data"
        );
    }
    Ok(Announcement { _socket: socket })
}

/// How many may look before an announcement is told of no more: each leaves a connection that nobody takes.
const MOST_LOOKS: i32 = 1024;

/// The file or device of a header, as it is named in an announcement.
fn place(header: &Backing) -> io::Result<String> {
    let metadata = header.file().metadata()?;
    Ok(match metadata.file_type().is_block_device() {
        true => format!("device-{:x}", metadata.rdev()),
        false => format!("file-{:x}-{:x}", metadata.dev(), metadata.ino()),
    })
}

/// The process that listens at an abstract name, if it is of this user or root: 0 if it is in a PID name space of its own.
fn owner(name: &str) -> Option<i32> {
    let socket = stream().ok()?;
    connect(&socket, &SocketAddrUnix::new_abstract_name(name.as_bytes()).ok()?).ok()?;
    let owner = credentials(&socket).ok()?;
    let is_trusted = owner.uid == 0 || owner.uid == rustix::process::geteuid().as_raw();
    is_trusted.then_some(owner.pid)
}

/// One whose calls do not wait.
fn stream() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?)
}
