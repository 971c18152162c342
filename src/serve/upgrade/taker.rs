//! The process that is to serve a disk, in the place of another one.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use sealblk_base::blame::Blame;
use serde_json::Value;

use super::{
    CONNECTION, CONTROL, ConnectError, END, GO, HandOver, IGNORABLE, INTERFACE, LIMIT, LISTENER, LOCKS,
    Locks, Next, OWN, Prepare, Prepared, READY, STATE, STOP, State, VERSIONS, connect, content, send,
};
use crate::attachment::{Attachment, Before, HeaderClaimPast, KeyState};
use crate::control::varlink::{self, CallError, reply};
use crate::control::wire::Connection;
use crate::deadline::Deadline;
use crate::device::{
    ClaimPast, Disk, Given, Message, MessageError, NotTheSame, Ready, ServeError, Served, Server,
};
use crate::storage::{Attached, Lent, NotBorrowed};
use crate::timestamp::Timestamp;

/// Why this process does not take the disk over.
#[derive(Debug, thiserror::Error)]
pub enum TakeError {
    #[error("the process that serves the disk cannot be reached by its control socket")]
    Connect(#[source] io::Error),
    #[error("{0}")]
    OtherUser(ConnectError),
    #[error("the process that serves the disk does not hand it over: {0}")]
    Refused(String),
    #[error("the process that serves the disk does not answer")]
    Call(#[source] CallError),
    #[error(
        "the process that serves the disk hands it over in versions {0} only, which this release does not know"
    )]
    Version(String),
    #[error("{0}")]
    NotTheSame(#[from] NotTheSame),
    #[error("this process has not got the key of the disk, which is open")]
    NoKey,
    #[error("the handover has failed")]
    Io(#[from] io::Error),
    #[error("the handover has message {0:#x}, which this release does not know")]
    Unknown(u32),
    #[error("the handover is incomplete")]
    Incomplete,
    #[error(transparent)]
    NotBorrowed(#[from] NotBorrowed),
    #[error("the process that serves the disk has stopped the handover, and continues")]
    Stopped,
    #[error(transparent)]
    Serve(#[from] ServeError),
}

impl TakeError {
    /// Where the cause lies.
    pub fn blame(&self) -> Blame {
        match self {
            Self::NotTheSame(_) | Self::NotBorrowed(NotBorrowed::OtherFile(_)) => Blame::Operator,
            Self::NoKey => Blame::Key,
            Self::Serve(error) => error.blame(),
            Self::Connect(_)
            | Self::OtherUser(_)
            | Self::Refused(_)
            | Self::Call(_)
            | Self::Version(_)
            | Self::Io(_)
            | Self::Unknown(_)
            | Self::Incomplete
            | Self::NotBorrowed(NotBorrowed::Incomplete)
            | Self::Stopped => Blame::Process,
        }
    }
}

/// The way to the process that serves the disk.
#[derive(Debug)]
pub struct Taker {
    connection: Connection,
    upgrade: u64,
    prepared: Prepared,
    /// The process that serves the disk: readable when it has ended.
    giver: OwnedFd,
    /// The socket of the handover: a confined process makes none.
    pair: Option<(UnixStream, UnixStream)>,
}

/// What came.
#[derive(Debug, Default)]
struct Came {
    state: Option<State>,
    locks: Vec<(Locks, Vec<OwnedFd>)>,
    control: Option<OwnedFd>,
    listener: Option<OwnedFd>,
    connection: Option<OwnedFd>,
    messages: Vec<Message>,
}

/// What was applied, and is this process' own when the other one leaves it.
#[derive(Debug)]
struct Taken {
    attached: Attached,
    claim: ClaimPast,
    header_claims: Option<HeaderClaimPast>,
    control: UnixListener,
}

/// A disk that is this process' from now on.
#[derive(Debug)]
pub struct Took {
    /// The socket that callers connect to.
    pub control: UnixListener,
    /// The names of the listening sockets.
    pub front_ends_name: Option<(u64, u64)>,
    pub control_name: Option<(u64, u64)>,
    /// The process that served the disk before.
    pub before: Before,
    /// How long the guest's requests waited at most.
    pub pause: Duration,
    /// How much of that the requests in flight took to end.
    pub drain: Duration,
}

/// How long the other process may take over an answer that it can give at once.
const CALL_LIMIT: Duration = Duration::from_secs(30);

impl Taker {
    /// Connects to the process that serves the disk, for the attempt `upgrade`. Call it before this process is confined.
    ///
    /// # Errors
    /// If that process is not there, or refuses.
    pub fn connect(socket: &Path, upgrade: u64) -> Result<Self, TakeError> {
        let mut connection = connect(socket, CALL_LIMIT).map_err(|error| match error {
            ConnectError::Io(error) => TakeError::Connect(error),
            other @ ConnectError::OtherUser { .. } => TakeError::OtherUser(other),
        })?;
        let versions = VERSIONS.to_vec();
        let prepared = varlink::call(
            &mut connection,
            &format!("{INTERFACE}.Prepare"),
            Prepare { upgrade, versions },
            &[],
        );
        let (prepared, _): (Prepared, _) = prepared.map_err(refused)?;
        let giver = Pid::from_raw(prepared.process.cast_signed()).ok_or(TakeError::Incomplete)?;
        Ok(Self {
            connection,
            upgrade,
            prepared,
            giver: pidfd_open(giver, PidfdFlags::empty())
                .map_err(|error| TakeError::Connect(error.into()))?,
            pair: Some(UnixStream::pair().map_err(TakeError::Connect)?),
        })
    }

    /// Whether the disk has its key.
    pub fn key(&self) -> KeyState {
        self.prepared.key
    }

    /// Checks that the guest finds the disk that it has seen.
    ///
    /// # Errors
    /// What is different.
    pub fn check(&self, disk: &Disk, num_queues: u16) -> Result<(), TakeError> {
        Ok(self.prepared.guest.check(disk, num_queues)?)
    }

    /// Takes the disk over. When this returns, `server` serves it.
    ///
    /// # Errors
    /// [`TakeError`]; the other process continues to serve then.
    pub fn take(mut self, served: &Attachment, server: &mut Server) -> Result<Took, TakeError> {
        let Some((ours, theirs)) = self.pair.take() else {
            return Err(TakeError::Incomplete);
        };
        let parameters = HandOver {
            upgrade: self.upgrade,
            version: self.prepared.version,
        };
        let method = format!("{INTERFACE}.HandOver");
        let start = Instant::now();
        varlink::begin(&mut self.connection, &method, parameters, &[theirs.as_fd()])
            .map_err(TakeError::Call)?;
        drop(theirs);
        let came = receive(&ours);
        let drain = start.elapsed();
        let taken = came.and_then(|came| came.apply(served, server));
        let (taken, ready) = match taken {
            Ok(taken) => taken,
            Err(error) => {
                // The other process learns of it by the end of the connection.
                drop(ours);
                return Err(match error {
                    TakeError::Incomplete => self.reason().unwrap_or(error),
                    error => error,
                });
            }
        };
        let next = Next {
            process: std::process::id(),
        };
        // If it cannot be sent, the other process has ended, or has said that it continues.
        let _ = send(&ours, READY, &next, &[]);
        match decision(&ours, 2 * LIMIT) {
            Ok(Some(message)) if message.number() == GO => {}
            Ok(Some(_)) => return Err(self.reason().unwrap_or(TakeError::Stopped)),
            Ok(None) | Err(_) if self.giver_has_ended() => {
                tracing::warn!(
                    process = self.prepared.process,
                    "the process that served the disk has ended during the handover; this process serves it"
                );
            }
            Ok(None) | Err(_) => return Err(TakeError::Incomplete),
        }
        let disk = served.disk();
        if let Some(past) = taken.header_claims {
            served.header_claim().take_over(past);
        }
        disk.take_claim(taken.attached, taken.claim);
        ready.go();
        let pause = start.elapsed();
        Ok(Took {
            control: taken.control,
            front_ends_name: self.prepared.sockets.front_ends,
            control_name: self.prepared.sockets.control,
            before: Before {
                version: self.prepared.release,
                process: self.prepared.process,
                until: Timestamp::now(),
            },
            pause,
            drain,
        })
    }

    /// Why the other process does not hand the disk over, if it says so.
    fn reason(&mut self) -> Option<TakeError> {
        match reply::<Value>(&mut self.connection) {
            Err(told @ CallError::Method(_)) => Some(refused(told)),
            _ => None,
        }
    }

    /// Whether the other process has ended, or does so soon.
    fn giver_has_ended(&self) -> bool {
        let mut fds = [PollFd::new(&self.giver, PollFlags::IN)];
        Deadline::after(Duration::from_secs(2)).poll(&mut fds).is_ok()
    }
}

/// The decision of the other process. If it does not come within `limit`, the other process cannot take it any more: what it has sent by
/// then is in force, and what it sends later fails on its side.
fn decision(stream: &UnixStream, limit: Duration) -> Result<Option<Message>, MessageError> {
    Message::receive(stream, limit).or_else(|_| {
        stream.shutdown(Shutdown::Both)?;
        Message::receive(stream, LIMIT)
    })
}

/// Receives all that comes.
fn receive(stream: &UnixStream) -> Result<Came, TakeError> {
    let mut came = Came::default();
    loop {
        // The other process waits for requests in flight no longer than the limit, and says why it refuses then.
        let message = Message::receive(stream, 2 * LIMIT).map_err(io::Error::other)?;
        let mut message = message.ok_or(TakeError::Incomplete)?;
        match message.number() {
            STATE => came.state = Some(content(&message)?),
            LOCKS => {
                let locks: Locks = content(&message)?;
                came.locks.push((locks, message.take_descriptors()));
            }
            LISTENER => came.listener = message.take_descriptors().pop(),
            CONTROL => came.control = message.take_descriptors().pop(),
            CONNECTION => came.connection = message.take_descriptors().pop(),
            END => return Ok(came),
            STOP => return Err(TakeError::Incomplete),
            number if number < OWN => came.messages.push(message),
            number if IGNORABLE.contains(&number) => {}
            number => return Err(TakeError::Unknown(number)),
        }
    }
}

/// Receives all that comes, and nothing is done with it.
#[cfg(any(test, fuzzing))]
pub(crate) fn received(stream: &UnixStream) {
    let _ = receive(stream);
}

impl Came {
    /// Does all with it that can fail.
    fn apply(self, served: &Attachment, server: &mut Server) -> Result<(Taken, Ready), TakeError> {
        let state = self.state.ok_or(TakeError::Incomplete)?;
        let control = self.control.ok_or(TakeError::Incomplete)?;
        match state.key {
            KeyState::LockedByOperator => served.stay_locked(),
            KeyState::Open if !served.is_open() => return Err(TakeError::NoKey),
            KeyState::Open | KeyState::NoKey => {}
        }
        let (disk, header) = served.backings();
        let lent = |(locks, descriptions): (Locks, _)| {
            let of = header.filter(|_| locks.of_header).unwrap_or(disk);
            Lent {
                path: of.path().to_owned(),
                range: locks.range,
                is_exclusive: locks.is_exclusive,
                descriptions,
            }
        };
        let attached = disk.borrow(header, self.locks.into_iter().map(lent).collect())?;
        let file = &served.disk().file;
        file.set_fence(attached.fence());
        if state.has_loss {
            file.record_loss();
        }
        let front_end = match (self.connection, state.front_end) {
            (Some(connection), Some(since)) => Some(Served {
                connection: connection.into(),
                since,
                messages: self.messages,
            }),
            _ => None,
        };
        let given = Given {
            listener: self.listener,
            served: front_end,
        };
        let taken = Taken {
            attached,
            claim: state.claim(),
            header_claims: state.header_claims,
            control: control.into(),
        };
        Ok((taken, server.take_over(given, LIMIT)?))
    }
}

/// Why the other process refuses.
fn refused(error: CallError) -> TakeError {
    let CallError::Method(told) = error else {
        return TakeError::Call(error);
    };
    let message = told.parameters.get("message").and_then(Value::as_str);
    match told.name.rsplit('.').next() {
        Some("NoCommonVersion") => {
            let versions = told.parameters.get("versions").map(Value::to_string);
            TakeError::Version(versions.unwrap_or_default())
        }
        Some("OutOfDate") => {
            TakeError::Refused("the upgrade was cancelled, or another one was begun".to_owned())
        }
        _ => TakeError::Refused(message.map_or_else(|| told.to_string(), str::to_owned)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upgrade::say;

    /// The other process could send "go" just after this one had given up: then neither served the disk.
    #[test]
    fn a_decision_that_comes_too_late_fails_where_it_was_taken() {
        let limit = Duration::from_millis(10);
        let number = |decision: Result<Option<Message>, MessageError>| {
            decision.unwrap().map(|message| message.number())
        };
        let (ours, theirs) = UnixStream::pair().unwrap();
        assert_eq!(number(decision(&ours, limit)), None);
        say(&theirs, GO).unwrap_err();
        // It came in time, and was not looked at in time.
        let (ours, theirs) = UnixStream::pair().unwrap();
        say(&theirs, GO).unwrap();
        assert_eq!(number(decision(&ours, Duration::ZERO)), Some(GO));
        let (ours, theirs) = UnixStream::pair().unwrap();
        say(&theirs, GO).unwrap();
        ours.shutdown(Shutdown::Both).unwrap();
        assert_eq!(number(decision(&ours, limit)), Some(GO));
    }
}
