//! A front-end's connection, from its first message to its end: the protocol handler, the interceptor in front of it, and
//! the rings behind it. The next connection gets a new one of each.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};

use rustix::fs::{Mode, OFlags};
use sealblk_base::blame::Blame;
use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;

use super::config;
use super::disk::Disk;
use super::guest::SharedMemory;
use super::handover::Desk;
use super::inflight::MapError;
use super::interceptor::{Ended, InterceptError, Interceptor};
use super::limits::MAX_QUEUE_SIZE;
use super::message::Message;
use super::rings::{Rings, Urings};
use super::vring::{self, Vring};

/// Why a session ended, unless the front-end left.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error("the session cannot be set up")]
    Setup(#[from] io::Error),
    #[error("the protocol handler cannot be set up: {0}")]
    Handler(vhost_user_backend::Error),
    #[error(transparent)]
    Inflight(#[from] MapError),
    #[error(transparent)]
    Interceptor(#[from] InterceptError),
}

impl SessionError {
    /// Where the cause lies.
    pub(super) fn blame(&self) -> Blame {
        match self {
            Self::Setup(_) | Self::Handler(_) => Blame::Host,
            Self::Inflight(error) => error.blame(),
            Self::Interceptor(error) => error.blame(),
        }
    }
}

/// A session that another process has begun.
#[derive(Debug)]
pub(super) struct Continued {
    /// What the front-end has said to it.
    pub messages: Vec<Message>,
    /// Told when all is applied, and the rings can start.
    pub ready: SyncSender<Result<(), SessionError>>,
    /// Says that they are to start.
    pub go: Receiver<()>,
}

/// What a session works with.
pub(super) struct Tools<'h> {
    pub disk: &'h Arc<Disk>,
    pub num_queues: u16,
    pub link: &'h Link,
    pub urings: &'h Urings,
    /// Where the session is asked for what another process needs to continue it.
    pub desk: &'h Desk<Vec<Message>>,
}

/// Serves a disk to a front-end until it leaves, or another process serves it.
pub(super) fn run(
    front_end: &UnixStream,
    tools: &Tools<'_>,
    continued: Option<Continued>,
) -> Result<Ended, SessionError> {
    let Tools { disk, num_queues, .. } = *tools;
    let memory = SharedMemory::new(GuestMemoryMmap::new());
    let backend = Arc::new(Backend {
        disk: Arc::clone(disk),
        num_queues,
    });
    let (daemon, vrings) =
        vring::collect(|| VhostUserDaemon::new("vhost-user".into(), backend, memory.clone()));
    let mut daemon = daemon.map_err(SessionError::Handler)?;
    let mut rings = Rings::new(Arc::clone(disk), tools.urings.clone(), memory, vrings)?;
    let handler = tools.link.connect(&mut daemon)?;

    let result = relay(front_end, handler, tools, &mut rings, continued);
    if let Err(error) = daemon.wait() {
        tracing::debug!(%error, "the protocol handler ended");
    }
    result
}

fn relay(
    front_end: &UnixStream,
    handler: UnixStream,
    tools: &Tools<'_>,
    rings: &mut Rings,
    continued: Option<Continued>,
) -> Result<Ended, SessionError> {
    let mut interceptor = Interceptor::new(front_end, handler, tools.disk, rings, tools.desk)?;
    if let Some(continued) = continued {
        let repeated = interceptor.repeat(continued.messages);
        let is_ready = repeated.is_ok();
        let told = continued.ready.send(repeated.map_err(SessionError::from));
        // Without that, the process before this one goes on.
        if !is_ready || told.is_err() || continued.go.recv().is_err() {
            return Ok(Ended::HandedOver);
        }
    }
    Ok(interceptor.relay()?)
}

/// The socket by which a session's protocol handler and its interceptor find each other. The crate connects by path only;
/// this path leads through a descriptor of ours, so that no other process can connect by it. See [`Link::settle`].
#[derive(Debug)]
pub(super) struct Link {
    listener: UnixListener,
    inode: OwnedFd,
}

impl Link {
    pub(super) fn new() -> io::Result<Self> {
        let (dir, entry) = tempdir()?;
        let path = format!("/proc/self/fd/{}/link", entry.as_raw_fd());
        let link = UnixListener::bind(&path).and_then(|listener| {
            let inode = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
            listener.set_nonblocking(true)?;
            Ok(Self { listener, inode })
        });
        // The inode is all that is needed; its name goes at once.
        let _ = std::fs::remove_file(&path);
        let _ = std::fs::remove_dir(&dir);
        link
    }

    /// Makes the descriptors of this process its current directory: there the socket has a name that is shorter than the path of any
    /// socket elsewhere. Gives the length of its address, by which a filter of system calls knows it.
    pub(super) fn settle(&self) -> io::Result<usize> {
        std::env::set_current_dir("/proc/self/fd")?;
        // The family, the name, and a zero byte.
        Ok(size_of::<libc::sa_family_t>() + self.name().len() + 1)
    }

    /// See [`Link::settle`].
    fn name(&self) -> String {
        self.inode.as_raw_fd().to_string()
    }

    /// Starts the handler, and gives the interceptor's end of its connection.
    fn connect(&self, daemon: &mut VhostUserDaemon<Arc<Backend>>) -> Result<UnixStream, SessionError> {
        // A session that could not accept its handler, since descriptors were exhausted, leaves that connection behind.
        while self.listener.accept().is_ok() {}
        daemon.start_client(&self.name()).map_err(SessionError::Handler)?;
        let accepted = self.listener.accept();
        if accepted.is_err() {
            daemon.request_shutdown();
        }
        Ok(accepted?.0)
    }
}

/// A directory that no other user can enter, and a descriptor of it: if others can write to the directory around it, its path
/// may soon lead elsewhere.
fn tempdir() -> io::Result<(PathBuf, OwnedFd)> {
    let mut name = [0; 8];
    getrandom::fill(&mut name)?;
    let dir = std::env::temp_dir().join(format!("sealblk-{:016x}", u64::from_ne_bytes(name)));
    rustix::fs::mkdir(&dir, Mode::RWXU)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let entry = rustix::fs::open(&dir, flags, Mode::empty())?;
    let status = rustix::fs::fstat(&entry)?;
    if status.st_uid != rustix::process::geteuid().as_raw() || status.st_mode & 0o077 != 0 {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    Ok((dir, entry))
}

/// What the protocol handler asks of us.
struct Backend {
    disk: Arc<Disk>,
    num_queues: u16,
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        usize::from(self.num_queues)
    }

    fn max_queue_size(&self) -> usize {
        usize::from(MAX_QUEUE_SIZE)
    }

    fn features(&self) -> u64 {
        config::features(&self.disk)
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        config::protocol_features()
    }

    /// The handler sets it in the vrings, from where it comes to the workers.
    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        config::read(&self.disk, self.num_queues, offset, size)
    }

    /// The rings are started again after each change, with the memory of then.
    fn update_memory(&self, _memory: SharedMemory) -> io::Result<()> {
        Ok(())
    }

    /// The queues are served by our workers, so the handler needs no threads.
    fn queues_per_thread(&self) -> Vec<u64> {
        Vec::new()
    }

    fn handle_event(&self, _event: u16, _: EventSet, _: &[Vring], _thread: usize) -> io::Result<()> {
        Ok(())
    }
}
