//! The socket that front-ends connect to, one at a time, and the control thread: it accepts, ends sessions, and stops
//! on a signal. It follows QEMU's "Backend program conventions" (vhost-user specification).

#![allow(unsafe_code)] // --fd hands over a bare number.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, sockopt};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};
use sealblk_base::blame::Blame;
use vmm_sys_util::epoll::EventSet;

use super::blame::log_by_blame;
use super::disk::Disk;
use super::handover::{Asked, Desk, Given, Handover, NotHandedOver, Served};
use super::interceptor::Ended;
use super::message::Message;
use super::peers::Peers;
use super::rings::{self, Urings};
use super::session::{self, Continued, Link, Tools};
use super::uring;
use crate::closer::{self, ClosedElsewhere};
use crate::control::manager;
use crate::control::socket::{BindError, Bound, Permissions, accept, bind, termination};
use crate::error_chain::causes;
use crate::timestamp::Timestamp;

/// Where front-ends come from.
#[derive(Debug)]
pub enum Endpoint {
    /// A socket that we bind, and remove at our end.
    Path(PathBuf, Permissions),
    /// A socket that the process was started with: one that listens, or one that is connected to the only front-end.
    Fd(RawFd),
    /// Those of another process, which may have bound a socket to this path: [`Server::take_over`].
    OtherProcess(Option<PathBuf>),
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
    #[error("the front-end cannot be served by this process: {0}")]
    Session(String, Blame),
}

impl ServeError {
    /// Where the cause lies.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Socket(error) => error.blame(),
            Self::BadFd { .. } | Self::IdleFd { .. } => Blame::Operator,
            Self::IoUring(_) | Self::Control(_) => Blame::Host,
            Self::Session(_, blame) => *blame,
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

/// A front-end of another process, which this one is ready to serve.
#[must_use = "the other process continues if this is dropped"]
#[derive(Debug)]
pub struct Ready(Option<SyncSender<()>>);

impl Ready {
    /// Serves it: the other process does not do so any more.
    pub fn go(self) {
        if let Some(go) = self.0 {
            let _ = go.send(());
        }
    }
}

enum Source {
    None(Option<Bound>),
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
            Endpoint::OtherProcess(path) => {
                let bound = path.as_deref().map(Bound::of_other).transpose();
                Source::None(bound.map_err(ServeError::Control)?)
            }
        };
        let (listener, next, bound) = match source {
            Source::Listener { listener, bound } => {
                listener.set_nonblocking(true).map_err(ServeError::Control)?;
                (Some(listener.into()), None, bound)
            }
            Source::Connected(stream) => (None, Some(stream.into()), None),
            Source::None(bound) => (None, None, bound),
        };
        let control = Control {
            handover: Handover::new().map_err(ServeError::Control)?,
            peers: None,
            alive: alive_timer().map_err(ServeError::Control)?,
            is_handed_over: false,
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

    /// Accepts only the front-end that is registered.
    pub fn only(mut self, peers: Peers) -> Self {
        self.control.peers = Some(peers);
        self
    }

    /// Makes the descriptors of this process its current directory, where sessions find their protocol handler; paths that are not
    /// absolute lead nowhere from then on. Gives the length of the one address that a session connects to.
    ///
    /// # Errors
    /// Where there is no `/proc`.
    pub fn settle(&self) -> io::Result<usize> {
        self.control.host.link.settle()
    }

    /// The way to ask for all that another process needs to serve the front-ends.
    pub fn handover(&self) -> Handover {
        self.control.handover.clone()
    }

    /// Takes what another process serves front-ends with, and does all that can fail. That process has stopped its rings.
    ///
    /// # Errors
    /// If descriptors, threads or memory are exhausted, or this process does not understand what the front-end has said.
    pub fn take_over(&mut self, given: Given, limit: Duration) -> Result<Ready, ServeError> {
        self.control.listener = given.listener.map(|listener| UnixListener::from(listener).into());
        let Some(served) = given.served else {
            return Ok(Ready(None));
        };
        let (ready, wait) = sync_channel(0);
        let (go, start) = sync_channel(1);
        let continued = Continued {
            messages: served.messages,
            ready,
            go: start,
        };
        self.control
            .begin(served.connection.into(), Some((served.since, continued)));
        match wait.recv_timeout(limit) {
            Ok(Ok(())) => Ok(Ready(Some(go))),
            Ok(Err(error)) => {
                let text = causes(&error).fold(error.to_string(), |text, cause| format!("{text}: {cause}"));
                Err(ServeError::Session(text, error.blame()))
            }
            Err(error) => Err(ServeError::Session(error.to_string(), Blame::Host)),
        }
    }

    /// Takes the name of the listening socket of another process, to be removed at the end.
    pub fn take_name(&mut self, inode: Option<(u64, u64)>) {
        if let Some(bound) = &mut self.bound {
            bound.take(inode);
        }
    }

    /// The disk.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.control.host.disk
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

    /// Serves front-ends until SIGINT or SIGTERM, until the only one leaves, or until another process serves them; tells whether one does.
    pub fn run(mut self) -> Result<bool, ServeError> {
        let control_error = |error: event_manager::Error| ServeError::Control(io::Error::other(error));
        if let Some(stream) = self.control.next.take() {
            self.control.begin(stream, None);
        }
        let id = self.manager.add_subscriber(self.control);
        while !self.manager.subscriber_mut(id).map_err(control_error)?.finished {
            self.manager.run().map_err(control_error)?;
        }
        let control = self.manager.subscriber_mut(id).map_err(control_error)?;
        let failure = control.failure.take();
        let is_handed_over = control.is_handed_over;
        if is_handed_over && let Some(bound) = self.bound.take() {
            bound.keep();
        }
        drop(self.bound);
        failure.map_or(Ok(is_handed_over), |error| Err(ServeError::Control(error)))
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
    /// Where a session is asked for what another process needs to continue it.
    desk: Desk<Vec<Message>>,
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
            desk: Desk::default(),
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
    /// Where this thread is asked for all that another process needs.
    handover: Handover,
    /// Who may be a front-end; none if everybody who can connect.
    peers: Option<Peers>,
    /// Readable when the service manager is to hear that this thread works; none if it does not ask for that.
    alive: Option<OwnedFd>,
    /// Whether another process serves the front-ends.
    is_handed_over: bool,
}

#[derive(Debug)]
struct Session {
    stream: ClosedElsewhere<UnixStream>,
    since: Timestamp,
    thread: JoinHandle<()>,
}

/// The most descriptors of earlier front-ends that may wait to be closed while a new one comes: far below what a process may have.
const MOST_UNCLOSED: usize = 256;

/// The numbers of the control thread's events.
const SIGNAL: u32 = 0;
const CONNECTION: u32 = 1;
const SESSION_ENDED: u32 = 2;
const HANDOVER: u32 = 3;
const ALIVE: u32 = 4;

/// How long requests in flight may take to end before another process serves the front-end.
/// The process that has asked waits for somewhat longer, and learns why not.
const DRAIN_LIMIT: Duration = Duration::from_secs(4);

impl MutEventSubscriber for Control {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let listener = self
            .listener
            .as_ref()
            .map(|listener| (listener.as_raw_fd(), CONNECTION));
        let alive = self.alive.as_ref().map(|timer| (timer.as_raw_fd(), ALIVE));
        let fds = [
            (self.signals.as_raw_fd(), SIGNAL),
            (self.host.ended.as_raw_fd(), SESSION_ENDED),
            (self.handover.asked().as_raw_fd(), HANDOVER),
        ];
        for (fd, number) in fds.into_iter().chain(listener).chain(alive) {
            if let Err(error) = ops.add(Events::with_data_raw(fd, number, EventSet::IN)) {
                tracing::error!(%error, "the control thread cannot wait");
                self.finished = true;
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        // Of events that came at once, one may have been the last: then a front-end that waits is another process' to accept.
        if self.finished {
            return;
        }
        match events.data() {
            CONNECTION => self.accept(),
            SESSION_ENDED => self.end(),
            HANDOVER => {
                if let Some(asked) = self.handover.take() {
                    self.hand_over(asked);
                }
            }
            ALIVE => {
                if let Some(timer) = &self.alive {
                    let _ = rustix::io::read(timer, &mut [0; 8]);
                }
                manager::alive();
            }
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
        if let Some(Err(reason)) = self.peers.as_ref().map(|peers| peers.check(&stream)) {
            tracing::warn!("a front-end is turned away: {reason}");
            return;
        }
        match &self.session {
            None => self.begin(stream, None),
            Some(session)
                if has_hung_up(&session.stream)
                    && self.next.as_ref().is_none_or(|next| has_hung_up(next)) =>
            {
                self.next = Some(stream);
            }
            Some(_) => tracing::warn!("a second front-end is turned away: the disk has one"),
        }
    }

    fn begin(&mut self, stream: ClosedElsewhere<UnixStream>, continued: Option<(Timestamp, Continued)>) {
        let host = Arc::clone(&self.host);
        let (since, continued) = match continued {
            Some((since, continued)) => (since, Some(continued)),
            None => {
                tracing::info!("a front-end has connected");
                (Timestamp::now(), None)
            }
        };
        let session = stream.try_clone().and_then(|front_end| {
            let thread = std::thread::Builder::new()
                .name("session".into())
                .spawn(move || {
                    host.disk.set_front_end(Some(since));
                    let tools = Tools {
                        disk: &host.disk,
                        num_queues: host.num_queues,
                        link: &host.link,
                        urings: &host.urings,
                        desk: &host.desk,
                    };
                    let ended = session::run(&front_end, &tools, continued);
                    host.disk.set_front_end(None);
                    match ended {
                        // The connection is another process' as well.
                        Ok(Ended::HandedOver) => return,
                        Ok(Ended::Left) => tracing::info!("the front-end has left"),
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
            Ok(Session {
                stream,
                since,
                thread,
            })
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
            Some(stream) => self.begin(stream, None),
            None => self.finished |= self.listener.is_none(),
        }
    }

    /// Gives what another process needs, and waits for the decision. Meanwhile nobody is served.
    fn hand_over(&mut self, asked: Asked<Given>) {
        let host = &self.host;
        let session = match &self.session {
            _ if self.next.is_some() => Err(NotHandedOver::Changing),
            None => Ok(None),
            Some(session) => {
                let is_there = || !session.thread.is_finished();
                let tell = || host.disk.tell();
                let messages = host.desk.ask(tell, is_there, DRAIN_LIMIT);
                messages.map(|messages| Some((session, messages)))
            }
        };
        let (answer, session) = match session {
            Ok(Some((session, answer))) => {
                let served = session.stream.try_clone().map(|connection| Served {
                    connection,
                    since: session.since,
                    messages: answer.given,
                });
                (served.map(Some).map_err(NotHandedOver::from), Some(answer.leaves))
            }
            Ok(None) => (Ok(None), None),
            Err(error) => (Err(error), None),
        };
        let given = answer.and_then(|served| {
            let listener = self.listener.as_ref().map(|listener| listener.try_clone());
            Ok(Given {
                listener: listener.transpose()?.map(OwnedFd::from),
                served,
            })
        });
        if !asked.answer(given) {
            return;
        }
        if let (Some(leaves), Some(session)) = (session, self.session.take()) {
            let _ = leaves.send(());
            let _ = session.thread.join();
        }
        self.is_handed_over = true;
        self.finished = true;
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

/// A timer at which the service manager is to hear of this process, if it wants to.
fn alive_timer() -> io::Result<Option<OwnedFd>> {
    let Some(every) = manager::watchdog() else {
        return Ok(None);
    };
    let timer = timerfd_create(
        TimerfdClockId::Monotonic,
        TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
    )?;
    let every = Timespec::try_from(every).map_err(io::Error::other)?;
    let times = Itimerspec {
        it_interval: every,
        it_value: every,
    };
    timerfd_settime(&timer, TimerfdTimerFlags::empty(), &times)?;
    Ok(Some(timer))
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
