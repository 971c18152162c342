//! The sockets that a process of sealblk listens on, and the signals that end it.

#![allow(unsafe_code)] // Signals as a descriptor have no safe wrapper.

use std::ffi::{OsStr, OsString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Stat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use sealblk_base::blame::Blame;

use super::manager;
use super::peer::Peer;

/// The longest path of a socket: `sun_path` of unix(7), less the byte that ends it.
pub const MAX_PATH: usize = 107;

/// Who may connect to a socket that we bind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permissions {
    /// The mode of its file; to connect takes write permission.
    pub mode: u32,
    /// The group that its file is given to, if not to that of this process.
    pub group: Option<u32>,
}

impl Permissions {
    /// `mode`; by default the owner alone may connect, and the members of a group that is named.
    pub fn new(mode: Option<u32>, group: Option<u32>) -> Self {
        let default = if group.is_some() { 0o660 } else { 0o600 };
        Self {
            mode: mode.unwrap_or(default),
            group,
        }
    }
}

/// Why a socket cannot be bound.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody else's.
    #[error("{}: another process listens on this socket; stop it, or choose another path", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Not a socket.
    #[error("{}: is not a socket, so sealblk does not replace it; choose another path", path.display())]
    NotASocket {
        /// What is there.
        path: PathBuf,
    },
    /// No address of a socket is as long.
    #[error(
        "{}: the path has {} bytes, but Linux allows only {MAX_PATH} for a socket; choose a shorter one",
        path.display(),
        path.as_os_str().len()
    )]
    TooLong {
        /// The socket.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("{}: cannot bind the socket; its directory must exist and be writable", path.display())]
    Bind {
        /// The socket.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },
    /// The kernel gives files to groups that one belongs to.
    #[error(
        "{}: the socket cannot be given to group {group}; run as root, or as a member of that group",
        path.display()
    )]
    Group {
        /// The socket.
        path: PathBuf,
        /// The group.
        group: u32,
        /// The answer.
        source: io::Error,
    },
    /// Somebody who may write to the directory works against us.
    #[error(
        "{}: another process replaced the socket during its setup; choose a directory that no other user can write to",
        path.display()
    )]
    Replaced {
        /// The socket.
        path: PathBuf,
    },
}

impl BindError {
    /// Where the cause lies.
    pub fn blame(&self) -> Blame {
        match self {
            Self::InUse { .. } => Blame::Use,
            Self::NotASocket { .. } | Self::TooLong { .. } => Blame::Operator,
            Self::Bind { .. } | Self::Group { .. } | Self::Replaced { .. } => Blame::Storage,
        }
    }
}

/// Binds a socket that does not block, in the place of one that nobody listens on any more. From the first moment of its file nobody can connect
/// to it whom `permissions` keep out.
///
/// Other users may be able to write to its directory, so nothing is changed or removed by path: the file is looked up in a
/// directory that stays the same, links are not followed, and what was found is proved to be our socket.
///
/// # Errors
/// [`BindError`].
pub fn bind(path: &Path, permissions: Permissions) -> Result<(UnixListener, Bound), BindError> {
    if path.as_os_str().len() > MAX_PATH {
        return Err(BindError::TooLong { path: path.into() });
    }
    let bind_error = |source: io::Error| BindError::Bind {
        path: path.into(),
        source,
    };
    let place = SocketPath::of(path).map_err(bind_error)?;
    let address = SocketAddrUnix::new(path).map_err(|error| bind_error(error.into()))?;
    let socket = stream_socket().map_err(|error| bind_error(error.into()))?;
    // The file gets the mode of the socket, less the umask: it is its owner's alone until its group is set.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(|error| bind_error(error.into()))?;
    match rustix::net::bind(&socket, &address) {
        Err(Errno::ADDRINUSE) => {
            place.remove_stale(path)?;
            rustix::net::bind(&socket, &address)
        }
        result => result,
    }
    .map_err(|error| bind_error(error.into()))?;
    let replaced = || BindError::Replaced { path: path.into() };
    let inode = place.inode().map_err(|_| replaced())?;
    let bound = Bound {
        place,
        inode: Some(inode),
    };
    rustix::net::listen(&socket, BACKLOG).map_err(|error| bind_error(error.into()))?;
    let listener = UnixListener::from(socket);
    let file = bound.place.open().map_err(bind_error)?;
    if !leads_to(&file, &listener).map_err(bind_error)? {
        return Err(replaced());
    }
    if let Some(group) = permissions.group {
        rustix::fs::chownat(&file, "", None, Some(Gid::from_raw(group)), AtFlags::EMPTY_PATH).map_err(
            |error| BindError::Group {
                path: path.into(),
                group,
                source: error.into(),
            },
        )?;
    }
    rustix::fs::chmod(through(&file), Mode::from_raw_mode(permissions.mode))
        .map_err(|error| bind_error(error.into()))?;
    Ok((listener, bound))
}

/// The descriptor of the first socket that a service manager starts a process with (sd_listen_fds(3)).
pub const ACTIVATED: RawFd = 3;

/// Whether the service manager has started this process with one socket.
pub fn is_activated() -> bool {
    let own = std::process::id().to_string();
    std::env::var_os("LISTEN_PID").is_some_and(|process| process == *own)
        && std::env::var_os("LISTEN_FDS").is_some_and(|sockets| sockets == "1")
}

/// That socket, which does not block from now on. None if there is none; call it once.
///
/// # Errors
/// If it is not a listening Unix socket.
pub fn activated() -> io::Result<Option<UnixListener>> {
    if !is_activated() {
        return Ok(None);
    }
    // SAFETY: the manager passed this descriptor on for us to own, and this is called once.
    let socket = unsafe { OwnedFd::from_raw_fd(ACTIVATED) };
    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC)?;
    if sockopt::socket_domain(&socket)? != AddressFamily::UNIX || !sockopt::socket_acceptconn(&socket)? {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let listener = UnixListener::from(socket);
    listener.set_nonblocking(true)?;
    Ok(Some(listener))
}

/// How many callers may wait; the kernel takes fewer if `net.core.somaxconn` says so.
const BACKLOG: i32 = 4096;

/// A socket that was bound: its name goes with us, if it is still ours.
#[derive(Debug)]
pub struct Bound {
    place: SocketPath,
    /// None if another process has it by now.
    inode: Option<(u64, u64)>,
}

impl Bound {
    /// Leaves the name to another process, which has the socket as well.
    pub fn keep(mut self) {
        self.inode = None;
    }

    /// The name of a socket that another process has bound. It stays that process' before [`Bound::take`].
    ///
    /// # Errors
    /// If the directory cannot be opened.
    pub fn of_other(path: &Path) -> io::Result<Self> {
        Ok(Self {
            place: SocketPath::of(path)?,
            inode: None,
        })
    }

    /// Takes over the name, which the other process has told by its device and inode.
    pub fn take(&mut self, inode: Option<(u64, u64)>) {
        self.inode = inode;
    }

    /// The device and the inode of its name.
    pub fn inode(&self) -> Option<(u64, u64)> {
        self.inode
    }

    /// The directory that has its name.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.place.directory.as_fd()
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        if let Some(inode) = self.inode {
            self.place.remove(inode);
        }
    }
}

/// Where a socket's file is: a directory, whatever becomes of its path, and a name in it.
#[derive(Debug)]
struct SocketPath {
    directory: OwnedFd,
    name: OsString,
}

impl SocketPath {
    fn of(path: &Path) -> io::Result<Self> {
        let name: &OsStr = path.file_name().ok_or(io::ErrorKind::InvalidFilename)?;
        let directory = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            directory: rustix::fs::open(directory, flags, Mode::empty())?,
            name: name.to_owned(),
        })
    }

    /// The file itself, be it a link.
    fn open(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(
            &self.directory,
            &self.name,
            flags,
            Mode::empty(),
        )?)
    }

    fn inode(&self) -> io::Result<(u64, u64)> {
        let status = rustix::fs::statat(&self.directory, &self.name, AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(inode(&status))
    }

    /// Removes a socket that nobody listens on.
    fn remove_stale(&self, path: &Path) -> Result<(), BindError> {
        let bind_error = |source| BindError::Bind {
            path: path.into(),
            source,
        };
        let file = match self.open() {
            // Its server has just ended.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            opened => opened.map_err(bind_error)?,
        };
        let status = rustix::fs::fstat(&file).map_err(|error| bind_error(error.into()))?;
        if FileType::from_raw_mode(status.st_mode) != FileType::Socket {
            return Err(BindError::NotASocket { path: path.into() });
        }
        match connect(&file) {
            Err(Errno::CONNREFUSED) => {}
            // It answers, it has more callers than it can take, or it is another kind of socket.
            _ => return Err(BindError::InUse { path: path.into() }),
        }
        self.remove(inode(&status));
        Ok(())
    }

    /// Removes the file if it is this one.
    fn remove(&self, wanted: (u64, u64)) {
        if self.inode().is_ok_and(|inode| inode == wanted) {
            let _ = rustix::fs::unlinkat(&self.directory, &self.name, AtFlags::empty());
        }
    }
}

fn inode(status: &Stat) -> (u64, u64) {
    (status.st_dev, status.st_ino)
}

/// A path to a file that was opened, for calls that take no descriptor.
fn through(file: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

fn stream_socket() -> rustix::io::Result<OwnedFd> {
    rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
}

/// Connects to a socket's file, or fails at once.
fn connect(file: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    let socket = stream_socket()?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(through(file))?)?;
    Ok(socket)
}

/// Whether who connects to `file` comes to `listener`. The connection stays in its queue, where others may be before it;
/// [`accept`] passes it over.
fn leads_to(file: &OwnedFd, listener: &UnixListener) -> io::Result<bool> {
    let caller = match connect(file) {
        // It is no socket, nobody listens there, or somebody else does.
        Err(
            Errno::NOTSOCK
            | Errno::CONNREFUSED
            | Errno::ACCESS
            | Errno::AGAIN
            | Errno::PROTOTYPE
            | Errno::LOOP,
        ) => {
            return Ok(false);
        }
        caller => caller?,
    };
    let mut fds = [PollFd::new(listener, PollFlags::IN)];
    let waiting = poll(&mut fds, Some(&Timespec::default()))? > 0;
    // Of a socket that listens, the peer is who had it listen.
    Ok(waiting && is_own(&caller.into()))
}

fn is_own(stream: &UnixStream) -> bool {
    Peer::of(stream).is_ok_and(|peer| u32::try_from(peer.process) == Ok(std::process::id()))
}

/// Takes the next caller of a socket, be it one of [`bind`].
///
/// # Errors
/// `WouldBlock`, if there is none, and if descriptors are exhausted.
pub fn accept(listener: &UnixListener) -> io::Result<UnixStream> {
    loop {
        let (stream, _) = listener.accept()?;
        if !is_own(&stream) {
            return Ok(stream);
        }
    }
}

/// Has `accept`, which must not block, take each caller of `listener` until `ending` is readable. Tells the service manager every `alive` that
/// this goes on.
///
/// # Errors
/// If it cannot wait for callers.
pub fn listen(
    listener: &impl AsFd,
    ending: &OwnedFd,
    alive: Option<Duration>,
    accept: impl Fn() -> io::Result<()>,
) -> io::Result<()> {
    let timeout = alive
        .map(Timespec::try_from)
        .transpose()
        .map_err(io::Error::other)?;
    let mut told = Instant::now();
    loop {
        if alive.is_some_and(|every| told.elapsed() >= every) {
            manager::alive();
            told = Instant::now();
        }
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
