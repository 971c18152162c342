//! The sockets that a process of ours listens on, and the signals that end it.

#![allow(unsafe_code)] // Signals as a descriptor have no safe wrapper.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// Why a socket is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody else's.
    #[error("{}: a server is listening on this socket; stop it, or choose another path", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Not a socket.
    #[error("{}: is not a socket, so it is not replaced; choose another path", path.display())]
    NotASocket {
        /// What is there.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("{}: the socket cannot be bound; its directory has to exist and be writable", path.display())]
    Bind {
        /// The socket.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },
}

/// Binds a socket, in the place of one that nobody listens on any more.
///
/// # Errors
/// [`BindError`].
pub fn bind(path: &Path) -> Result<(UnixListener, Bound), BindError> {
    let bind_error = |source| BindError::Bind {
        path: path.into(),
        source,
    };
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let file_type = std::fs::symlink_metadata(path).map_err(bind_error)?.file_type();
            if !file_type.is_socket() {
                return Err(BindError::NotASocket { path: path.into() });
            }
            match UnixStream::connect(path) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                _ => return Err(BindError::InUse { path: path.into() }),
            }
            std::fs::remove_file(path).map_err(bind_error)?;
            UnixListener::bind(path)
        }
        result => result,
    }
    .map_err(bind_error)?;
    let inode = inode(path).map_err(bind_error)?;
    let bound = Bound {
        path: path.into(),
        inode,
    };
    Ok((listener, bound))
}

/// A socket that was bound: its name goes with us, if it is still ours.
#[derive(Debug)]
pub struct Bound {
    path: PathBuf,
    inode: (u64, u64),
}

impl Drop for Bound {
    fn drop(&mut self) {
        if inode(&self.path).is_ok_and(|inode| inode == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Has `accept` take each caller of `listener`, which does not block, until `ending` is readable. Meanwhile `tick` is called
/// about as often as it says.
///
/// # Errors
/// If it cannot wait for callers.
pub fn listen(
    listener: &impl AsFd,
    ending: &OwnedFd,
    tick: Option<(Duration, &dyn Fn())>,
    accept: impl Fn() -> io::Result<()>,
) -> io::Result<()> {
    let mut ticked = Instant::now();
    let timeout = tick.map(|(interval, _)| Timespec {
        tv_sec: interval.as_secs() as i64,
        tv_nsec: interval.subsec_nanos().into(),
    });
    loop {
        let mut fds = [
            PollFd::new(ending, PollFlags::IN),
            PollFd::new(listener, PollFlags::IN),
        ];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let [ended, called] = fds.map(|fd| !fd.revents().is_empty());
        if ended {
            return Ok(());
        }
        if let Some((interval, tick)) = tick
            && ticked.elapsed() >= interval
        {
            tick();
            ticked = Instant::now();
        }
        if !called {
            continue;
        }
        match accept() {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                tracing::warn!(%error, "a caller cannot be accepted");
                thread::sleep(Duration::from_millis(100));
            }
            _ => {}
        }
    }
}

/// SIGINT and SIGTERM as a descriptor; the threads started from here on do not get them.
///
/// # Errors
/// If descriptors are exhausted.
pub fn termination() -> io::Result<OwnedFd> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set it is given.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: it was initialised just above.
    let mut set = unsafe { set.assume_init() };
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: the set is initialised, and the signal is a valid one.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    // SAFETY: the set is initialised, and the old mask is not asked for.
    let blocked = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    if blocked != 0 {
        return Err(io::Error::from_raw_os_error(blocked));
    }
    // SAFETY: the set is initialised; -1 asks for a new descriptor.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
