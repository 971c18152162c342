//! Closing what others can hold up.
//!
//! The close(2) of a descriptor that another process has passed to us can wait for that process: a file of a FUSE file
//! system is flushed by its daemon, a TCP socket lingers until its peer has taken all that was sent, and messages that
//! nobody has read from a Unix socket hold descriptors of either kind. So such descriptors are closed on a thread of their
//! own, which nobody waits for. It is there only while it has something to close.

use std::fmt;
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::thread;

use crate::mutex::lock;

/// Closes `fd`, and does not wait for it.
pub(crate) fn close(fd: OwnedFd) {
    let mut queue = lock(&QUEUE);
    queue.fds.push(fd);
    if !queue.closing {
        // Without a thread they stay open, until the next one finds one.
        queue.closing = thread::Builder::new().name("closer".into()).spawn(run).is_ok();
    }
}

static QUEUE: Mutex<Queue> = Mutex::new(Queue {
    fds: Vec::new(),
    closing: false,
});

struct Queue {
    fds: Vec<OwnedFd>,
    /// Whether a thread closes them.
    closing: bool,
}

fn run() {
    loop {
        let mut queue = lock(&QUEUE);
        let Some(fd) = queue.fds.pop() else {
            queue.closing = false;
            return;
        };
        drop(queue);
        drop(fd);
    }
}

/// A socket or another descriptor whose close nobody waits for.
pub(crate) struct ClosedElsewhere<T: Into<OwnedFd>>(Option<T>);

impl<T: Into<OwnedFd>> From<T> for ClosedElsewhere<T> {
    fn from(fd: T) -> Self {
        Self(Some(fd))
    }
}

impl<T: Into<OwnedFd>> ClosedElsewhere<T> {
    /// For a thread that others do not wait for.
    pub(crate) fn into_inner(mut self) -> T {
        self.0.take().expect("it is taken when this is dropped")
    }
}

impl<T: Into<OwnedFd>> Deref for ClosedElsewhere<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_ref().expect("it is taken when this is dropped")
    }
}

impl<T: Into<OwnedFd>> Drop for ClosedElsewhere<T> {
    fn drop(&mut self) {
        if let Some(fd) = self.0.take() {
            close(fd.into());
        }
    }
}

impl<T: Into<OwnedFd> + fmt::Debug> fmt::Debug for ClosedElsewhere<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
