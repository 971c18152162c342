//! Another process continues a session: what this process is asked for, and what the other one gets.
//!
//! The process that serves a disk is asked for all that the next one needs ([`Handover::ask`]). It stops its rings between two messages
//! of the front-end, and answers when nothing is in flight any more. Then it waits for the decision: it continues, or it leaves the
//! front-end to the other process. After that it touches nothing that both have.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use super::message::Message;
use crate::mutex::lock;
use crate::timestamp::Timestamp;

/// A front-end, as another process serves it on.
#[derive(Debug)]
pub struct Served {
    /// The connection. Both processes have it, so none of them may shut it down.
    pub connection: UnixStream,
    /// Since when it is connected.
    pub since: Timestamp,
    /// What it has said.
    pub messages: Vec<Message>,
}

/// All that another process needs to serve the disk's front-ends.
#[derive(Debug)]
pub struct Given {
    /// The socket that they connect to; none where there is one front-end only.
    pub listener: Option<OwnedFd>,
    /// The front-end that is connected.
    pub served: Option<Served>,
}

/// Why no other process can continue now.
#[derive(Debug, thiserror::Error)]
pub enum NotHandedOver {
    /// The session has just ended, or the next one is to begin.
    #[error("a front-end is connecting or leaving: try again")]
    Changing,
    /// It is in the middle of a message, or waits for the answer to one.
    #[error("the front-end is just asking for something, such as to stop the guest: try again")]
    Asking,
    /// What is in flight does not end.
    #[error(
        "requests in flight have not ended in time: see whether the storage is slow or hangs (`sealblk status`), or try again"
    )]
    InFlight,
    /// What waits for storage would be lost: it is in the memory of this process.
    #[error(
        "requests wait for the storage, and this front-end keeps no record of them, by which another process could carry them out: repair \
         the storage first (`sealblk status`)"
    )]
    NoRecord,
    #[error("the front-end cannot be passed on")]
    Io(#[from] io::Error),
}

/// A request, and where its answer and the decision about it go.
#[derive(Debug)]
pub(super) struct Asked<T> {
    answer: SyncSender<Result<T, NotHandedOver>>,
    leaves: Receiver<()>,
}

impl<T> Asked<T> {
    /// Answers, and waits for the decision; whether this process leaves.
    pub(super) fn answer(self, answer: Result<T, NotHandedOver>) -> bool {
        self.answer.send(answer).is_ok() && self.leaves.recv().is_ok()
    }
}

/// What was answered. This process goes on when it is dropped.
#[derive(Debug)]
pub struct Answer<T> {
    pub given: T,
    pub(super) leaves: SyncSender<()>,
}

impl<T> Answer<T> {
    /// Has this process leave.
    pub fn leave(self) {
        let _ = self.leaves.send(());
    }
}

/// Where a thread is asked.
#[derive(Debug)]
pub(super) struct Desk<T>(Mutex<Option<Asked<T>>>);

impl<T> Default for Desk<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Desk<T> {
    /// Takes what was asked for.
    pub(super) fn take(&self) -> Option<Asked<T>> {
        lock(&self.0).take()
    }

    /// Asks, has the thread told of that, and waits for the answer, no longer than `limit`, and as long as the thread `is_there`.
    pub(super) fn ask(
        &self,
        tell: impl FnOnce(),
        is_there: impl Fn() -> bool,
        limit: Duration,
    ) -> Result<Answer<T>, NotHandedOver> {
        let (answer, answered) = sync_channel(0);
        let (leaves, decision) = sync_channel(1);
        *lock(&self.0) = Some(Asked {
            answer,
            leaves: decision,
        });
        tell();
        let end = Instant::now() + limit;
        let given = loop {
            match answered.recv_timeout(TICK) {
                Ok(given) => break given,
                Err(_) if is_there() && Instant::now() < end => match answered.try_recv() {
                    Ok(given) => break given,
                    Err(TryRecvError::Empty) => {}
                    Err(TryRecvError::Disconnected) => break Err(NotHandedOver::Changing),
                },
                Err(_) if !is_there() => break Err(NotHandedOver::Changing),
                Err(_) => break Err(NotHandedOver::InFlight),
            }
        };
        // One that was not answered is answered no more. Is it still there, the thread was busy with something else.
        let given = match (self.take(), given) {
            (Some(_), Err(NotHandedOver::InFlight)) => Err(NotHandedOver::Asking),
            (_, given) => given,
        };
        given.map(|given| Answer { given, leaves })
    }
}

/// How often it is looked whether a thread is still there.
const TICK: Duration = Duration::from_millis(20);

/// The way to the thread that serves front-ends.
#[derive(Clone, Debug)]
pub struct Handover(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    desk: Desk<Given>,
    /// Signalled when something was asked for.
    asked: OwnedFd,
}

impl Handover {
    pub(super) fn new() -> io::Result<Self> {
        let asked = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let desk = Desk::default();
        Ok(Self(Arc::new(Inner { desk, asked })))
    }

    /// Stops the rings, and gives all that another process needs, within `limit`. The rings go on when the answer is dropped.
    ///
    /// # Errors
    /// If requests in flight do not end in time, a front-end is just coming or leaving, or descriptors are exhausted.
    pub fn ask(&self, limit: Duration) -> Result<Answer<Given>, NotHandedOver> {
        let tell = || {
            // A counter that is full is readable already.
            let _ = rustix::io::write(&self.0.asked, &1_u64.to_ne_bytes());
        };
        self.0.desk.ask(tell, || true, limit)
    }

    /// Readable when something was asked for.
    pub(super) fn asked(&self) -> &OwnedFd {
        &self.0.asked
    }

    /// Takes what was asked for.
    pub(super) fn take(&self) -> Option<Asked<Given>> {
        let _ = rustix::io::read(&self.0.asked, &mut [0; 8]);
        self.0.desk.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_millis(30);

    #[test]
    fn why_a_session_is_not_handed_over_is_told_apart() {
        let why = |tell: &dyn Fn(&Desk<()>), is_there: bool| {
            let desk = Desk::default();
            desk.ask(|| tell(&desk), || is_there, LIMIT).unwrap_err()
        };
        assert!(matches!(why(&|_| {}, false), NotHandedOver::Changing));
        assert!(matches!(why(&|_| {}, true), NotHandedOver::Asking));
        // It was taken, and dropped.
        assert!(matches!(
            why(&|desk| drop(desk.take()), true),
            NotHandedOver::Changing
        ));
        let taken = Mutex::new(None);
        let keep = |desk: &Desk<()>| *lock(&taken) = desk.take();
        assert!(matches!(why(&keep, true), NotHandedOver::InFlight));
    }
}
