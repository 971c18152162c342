//! The socket that front-ends connect to, one at a time, and the control thread: it accepts, ends sessions, and stops
//! on a signal. It follows QEMU's "Backend program conventions" (vhost-user specification).

#![allow(unsafe_code)] // --fd hands over a bare number.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, sockopt};
use sealblk_base::blame::Blame;
use vmm_sys_util::epoll::EventSet;

use super::blame::log_by_blame;
use super::disk::Disk;
use super::rings::{self, Urings};
use super::session::{self, Link};
use super::uring;
use crate::closer::{self, ClosedElsewhere};
use crate::control::manager;
use crate::control::socket::{BindError, Bound, Permissions, accept, bind, termination};
use crate::timestamp::Timestamp;

/// Where front-ends come from.
#[derive(Debug)]
pub enum Endpoint {
    /// A socket that we bind, and remove at our end.
    Path(PathBuf, Permissions),
    /// A socket that the process was started with: one that listens, or one that is connected to the only front-end.
    Fd(RawFd),
}

/// Why a disk is not served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(transparent)]
    Socket(#[from] BindError),
    #[error(
        "file descriptor {fd} is not an open Unix stream socket; --fd takes one that the process was started with, above 2"
    )]
    BadFd { fd: RawFd, source: io::Error },
    #[error(
        "file descriptor {fd} is a socket that neither listens nor is connected, so no front-end can reach it; call listen(2) \
         on it before it is passed on"
    )]
    IdleFd { fd: RawFd },
    #[error("io_uring cannot be set up: {}", uring::remedy(.0))]
    IoUring(#[source] io::Error),
    #[error("the control thread cannot be set up")]
    Control(#[source] io::Error),
}

impl ServeError {
    /// Where the cause lies.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Socket(error) => error.blame(),
            Self::BadFd { .. } | Self::IdleFd { .. } => Blame::Operator,
            Self::IoUring(_) | Self::Control(_) => Blame::Host,
        }
    }
}

/// A disk that is ready to be served.
pub struct Server {
    manager: EventManager<Control>,
    control: Control,
    bound: Option<Bound>,
}

/// What [`Server::wait_for`] has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// What it waited for.
    Came,
    /// SIGINT or SIGTERM.
    Stopped,
    /// Neither, in its time.
    TooLong,
}

enum Source {
    Listener {
        listener: UnixListener,
        bound: Option<Bound>,
    },
    Connected(UnixStream),
}

impl Server {
    /// Makes sure that a queue can be served, and takes the socket last: when the socket exists, the disk can be served. A
    /// front-end that connects waits until [`Server::run`].
    ///
    /// From here on SIGINT and SIGTERM wait for that, or for [`Server::wait_for`]; call it while there is one thread.
    pub fn new(disk: Arc<Disk>, num_queues: u16, endpoint: Endpoint) -> Result<Self, ServeError> {
        let urings = uring::patiently(|| Urings::new(num_queues)).map_err(ServeError::IoUring)?;
        drop(rings::engine(&disk, &urings).map_err(ServeError::IoUring)?);
        let manager = EventManager::new().map_err(|error| ServeError::Control(io::Error::other(error)))?;
        let signals = termination().map_err(ServeError::Control)?;
        let host = Host::new(disk, num_queues, urings).map_err(ServeError::Control)?;
        let source = match endpoint {
            Endpoint::Path(path, permissions) => {
                let (listener, bound) = bind(&path, permissions)?;
                Source::Listener {
                    listener,
                    bound: Some(bound),
                }
            }
            Endpoint::Fd(fd) => inherited(fd)?,
        };
        let (listener, next, bound) = match source {
            Source::Listener { listener, bound } => {
                listener.set_nonblocking(true).map_err(ServeError::Control)?;
                (Some(listener.into()), None, bound)
            }
            Source::Connected(stream) => (None, Some(stream.into()), None),
        };
        let control = Control {
            host: Arc::new(host),
            listener,
            signals,
            session: None,
            next,
            finished: false,
            failure: None,
        };
        Ok(Self {
            manager,
            control,
            bound,
        })
    }

    /// Makes the descriptors of this process its current directory, where sessions find their protocol handler; paths that are not
    /// absolute lead nowhere from then on. Gives the length of the one address that a session connects to.
    ///
    /// # Errors
    /// Where there is no `/proc`.
    pub fn settle(&self) -> io::Result<usize> {
        self.control.host.link.settle()
    }

    /// The socket that it has bound, if it has.
    pub fn bound(&self) -> Option<&Bound> {
        self.bound.as_ref()
    }

    /// Waits for `event`, a descriptor that becomes readable, but no longer than `limit`, and not after SIGINT or SIGTERM.
    pub fn wait_for(&self, event: impl AsFd, limit: Option<Duration>) -> io::Result<Waited> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        loop {
            let mut fds = [
                PollFd::new(&self.control.signals, PollFlags::IN),
                PollFd::new(&event, PollFlags::IN),
            ];
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let left = left
                .map(Timespec::try_from)
                .transpose()
                .map_err(io::Error::other)?;
            match poll(&mut fds, left.as_ref()) {
                Ok(0) => return Ok(Waited::TooLong),
                Ok(_) if !fds[0].revents().is_empty() => return Ok(Waited::Stopped),
                Ok(_) => return Ok(Waited::Came),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Serves front-ends until SIGINT or SIGTERM, or until the only one leaves.
    pub fn run(mut self) -> Result<(), ServeError> {
        let control_error = |error: event_manager::Error| ServeError::Control(io::Error::other(error));
        if let Some(stream) = self.control.next.take() {
            self.control.begin(stream);
        }
        let id = self.manager.add_subscriber(self.control);
        while !self.manager.subscriber_mut(id).map_err(control_error)?.finished {
            self.manager.run().map_err(control_error)?;
        }
        let control = self.manager.subscriber_mut(id).map_err(control_error)?;
        let failure = control.failure.take();
        drop(self.bound);
        failure.map_or(Ok(()), |error| Err(ServeError::Control(error)))
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("control", &self.control)
            .finish_non_exhaustive()
    }
}

/// What every session needs.
#[derive(Debug)]
struct Host {
    disk: Arc<Disk>,
    num_queues: u16,
    link: Link,
    urings: Urings,
    /// Signalled when a session has ended.
    ended: OwnedFd,
}

impl Host {
    fn new(disk: Arc<Disk>, num_queues: u16, urings: Urings) -> io::Result<Self> {
        let ended = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            disk,
            num_queues,
            link: Link::new()?,
            urings,
            ended,
        })
    }
}

#[derive(Debug)]
struct Control {
    host: Arc<Host>,
    listener: Option<ClosedElsewhere<UnixListener>>,
    signals: OwnedFd,
    session: Option<Session>,
    /// A front-end that is to be served next: it came while the one before was leaving, or with the process.
    next: Option<ClosedElsewhere<UnixStream>>,
    finished: bool,
    /// Why the only front-end was not served.
    failure: Option<io::Error>,
}

#[derive(Debug)]
struct Session {
    stream: ClosedElsewhere<UnixStream>,
    thread: JoinHandle<()>,
}

/// The most descriptors of earlier front-ends that may wait to be closed while a new one comes: far below what a process may have.
const MOST_UNCLOSED: usize = 256;

/// The numbers of the control thread's events.
const SIGNAL: u32 = 0;
const CONNECTION: u32 = 1;
const SESSION_ENDED: u32 = 2;

impl MutEventSubscriber for Control {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let listener = self
            .listener
            .as_ref()
            .map(|listener| (listener.as_raw_fd(), CONNECTION));
        let fds = [
            (self.signals.as_raw_fd(), SIGNAL),
            (self.host.ended.as_raw_fd(), SESSION_ENDED),
        ];
        for (fd, number) in fds.into_iter().chain(listener) {
            if let Err(error) = ops.add(Events::with_data_raw(fd, number, EventSet::IN)) {
                tracing::error!(%error, "the control thread cannot wait");
                self.finished = true;
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        match events.data() {
            CONNECTION => self.accept(),
            SESSION_ENDED => self.end(),
            _ => self.stop(),
        }
    }
}

impl Control {
    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        let stream = match accept(listener) {
            Ok(stream) => ClosedElsewhere::from(stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => {
                tracing::warn!(%error, "a front-end cannot be accepted");
                // Out of descriptors: the connection waits, and must not keep this thread busy.
                std::thread::sleep(Duration::from_millis(100));
                return;
            }
        };
        let unclosed = closer::waiting();
        if unclosed > MOST_UNCLOSED {
            tracing::warn!(
                unclosed,
                "a front-end is turned away: earlier ones have passed descriptors that cannot be closed, since the file system \
                 behind them, such as FUSE, does not answer; end it, or restart `sealblk serve`"
            );
            return;
        }
        match &self.session {
            None => self.begin(stream),
            Some(session)
                if has_hung_up(&session.stream)
                    && self.next.as_ref().is_none_or(|next| has_hung_up(next)) =>
            {
                self.next = Some(stream);
            }
            Some(_) => tracing::warn!("a second front-end is turned away: the disk has one"),
        }
    }

    fn begin(&mut self, stream: ClosedElsewhere<UnixStream>) {
        let host = Arc::clone(&self.host);
        let session = stream.try_clone().and_then(|front_end| {
            let thread = std::thread::Builder::new()
                .name("session".into())
                .spawn(move || {
                    tracing::info!("a front-end has connected");
                    host.disk.set_front_end(Some(Timestamp::now()));
                    let ended =
                        session::run(&front_end, &host.disk, host.num_queues, &host.link, &host.urings);
                    host.disk.set_front_end(None);
                    match ended {
                        Ok(()) => tracing::info!("the front-end has left"),
                        Err(error) => {
                            let blame = error.blame();
                            let error: &dyn std::error::Error = &error;
                            log_by_blame!(blame, error, "the session has ended");
                        }
                    }
                    // The front-end learns of the end when the last descriptor of its connection goes.
                    let _ = front_end.shutdown(std::net::Shutdown::Both);
                    rustix::io::write(&host.ended, &1_u64.to_ne_bytes()).expect("an eventfd takes a 1");
                })?;
            Ok(Session { stream, thread })
        });
        match session {
            Ok(session) => self.session = Some(session),
            Err(error) if self.listener.is_none() => {
                self.failure = Some(error);
                self.finished = true;
            }
            Err(error) => tracing::error!(%error, "a front-end cannot be served"),
        }
    }

    fn end(&mut self) {
        let _ = rustix::io::read(&self.host.ended, &mut [0; 8]);
        if let Some(session) = self.session.take() {
            let _ = session.thread.join();
        }
        match self.next.take() {
            Some(stream) => self.begin(stream),
            None => self.finished |= self.listener.is_none(),
        }
    }

    /// Ends the session, which drains its rings, and then the control thread.
    fn stop(&mut self) {
        tracing::info!("stopping");
        manager::stopping();
        if let Some(session) = self.session.take() {
            // For the session this is the end of its messages. The front-end must not see an end before the rings are
            // drained: it would take the used ring of that moment as final.
            let _ = session.stream.shutdown(std::net::Shutdown::Read);
            let _ = session.thread.join();
        }
        self.finished = true;
    }
}

fn has_hung_up(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

/// The socket that the process was started with.
fn inherited(fd: RawFd) -> Result<Source, ServeError> {
    let bad = |source: io::Error| ServeError::BadFd { fd, source };
    let refused = |error: Errno| bad(error.into());
    if fd <= libc::STDERR_FILENO {
        return Err(bad(io::ErrorKind::InvalidInput.into()));
    }
    // SAFETY: only asks whether the number is an open descriptor.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    if flags < 0 {
        return Err(bad(io::Error::last_os_error()));
    }
    // This process closes those that it has opened itself at the execution of another program. They are not for the user to name.
    if flags & libc::FD_CLOEXEC != 0 {
        return Err(refused(Errno::BADF));
    }
    // SAFETY: the descriptor is open, and by the contract of --fd it was passed on for us to own.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC).map_err(refused)?;
    if sockopt::socket_domain(&socket).map_err(refused)? != AddressFamily::UNIX
        || sockopt::socket_type(&socket).map_err(refused)? != SocketType::STREAM
    {
        return Err(bad(io::ErrorKind::InvalidInput.into()));
    }
    if sockopt::socket_acceptconn(&socket).map_err(refused)? {
        return Ok(Source::Listener {
            listener: socket.into(),
            bound: None,
        });
    }
    match rustix::net::getpeername(&socket) {
        Err(Errno::NOTCONN) => return Err(ServeError::IdleFd { fd }),
        Err(error) => return Err(refused(error)),
        Ok(_) => {}
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false).map_err(bad)?;
    Ok(Source::Connected(stream))
}
