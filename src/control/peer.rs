//! The peer of a Unix socket: its credentials at the time of the connection, from the kernel.

#![allow(unsafe_code)] // SO_PEERCRED and SO_PEERGROUPS have no wrapper that takes all that the kernel may answer.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

/// The process that connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its effective user.
    pub user: u32,
    /// Its effective group, and the supplementary ones.
    pub groups: Vec<u32>,
    /// Its number, for people: it may have ended since. 0 is that of a process outside of our namespace.
    pub process: i32,
}

impl Peer {
    /// Who connected to `stream`.
    ///
    /// # Errors
    /// If it is no Unix socket.
    pub fn of(stream: &UnixStream) -> io::Result<Self> {
        let credentials = credentials(stream)?;
        let mut groups = groups(stream)?;
        if !groups.contains(&credentials.gid) {
            groups.insert(0, credentials.gid);
        }
        Ok(Self {
            user: credentials.uid,
            groups,
            process: credentials.pid,
        })
    }
}

/// Who made the other end of `socket`. rustix takes the process for a number that is not 0, which it is for one outside of our
/// namespace.
pub fn credentials(socket: &impl AsRawFd) -> io::Result<libc::ucred> {
    let mut credentials = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut bytes = socklen(size_of::<libc::ucred>())?;
    // SAFETY: the kernel writes at most `bytes` bytes to the structure, which is as long, and the length to `bytes`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut bytes,
        )
    };
    match result {
        0 if bytes as usize == size_of::<libc::ucred>() => Ok(credentials),
        0 => Err(io::ErrorKind::InvalidData.into()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The most supplementary groups that Linux lets a process have (`NGROUPS_MAX`).
const MAX_GROUPS: usize = 65536;

fn socklen(bytes: usize) -> io::Result<libc::socklen_t> {
    bytes.try_into().map_err(io::Error::other)
}

fn groups(stream: &UnixStream) -> io::Result<Vec<u32>> {
    let mut groups: Vec<libc::gid_t> = vec![0; 64];
    loop {
        let mut bytes = socklen(std::mem::size_of_val(&groups[..]))?;
        // SAFETY: the kernel writes at most `bytes` bytes to the vector, which is as long, and the length to `bytes`.
        let result = unsafe {
            libc::getsockopt(
                stream.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut bytes,
            )
        };
        let count = bytes as usize / size_of::<libc::gid_t>();
        if result == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        // With ERANGE the kernel tells how many there are.
        if error.raw_os_error() != Some(libc::ERANGE) || count <= groups.len() || count > MAX_GROUPS {
            return Err(error);
        }
        groups.resize(count, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peer_of_a_pair_is_this_process() {
        let (one, _two) = UnixStream::pair().unwrap();
        let peer = Peer::of(&one).unwrap();
        assert_eq!(peer.user, rustix::process::geteuid().as_raw());
        assert_eq!(peer.process, std::process::id() as i32);
        assert!(peer.groups.contains(&rustix::process::getegid().as_raw()));
        for group in rustix::process::getgroups().unwrap() {
            assert!(peer.groups.contains(&group.as_raw()));
        }
    }
}
