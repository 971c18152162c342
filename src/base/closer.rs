//! Closes descriptors whose close(2) another process can block.
//!
//! The close(2) of a descriptor from another process can wait for that process: the daemon of a FUSE file system flushes
//! the file, a TCP socket lingers until its peer has received all data, and unread messages of a Unix socket
//! can hold such descriptors. sealblk does not wait for that:
//!
//! - A thread that ends closes a socket: no socket lingers for an exiting thread (`PF_EXITING` in Linux'
//!   `inet_release`). For that the thread has a separate table of descriptors, with the last reference to the socket.
//! - A dedicated thread, which may wait for ever, closes all other descriptors. [`waiting`] returns the number of descriptors
//!   in its queue; modules that receive descriptors accept no more of them if there are too many.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Mutex;
use std::sync::mpsc;
use std::thread;

use rustix::io::{DupFlags, dup3};

use crate::apart::let_go_of_all_from;
use crate::mutex::lock;

/// Closes `fd`, and does not wait for it.
pub fn close(fd: OwnedFd) {
    let fd = match is_socket(&fd) {
        true => match close_with_a_thread(fd) {
            Ok(()) => return,
            Err(fd) => fd,
        },
        false => fd,
    };
    let mut queue = lock(&QUEUE);
    queue.fds.push(fd);
    if !queue.closing {
        // Without a thread they stay open, until the next one finds one.
        queue.closing = thread::Builder::new().name("closer".into()).spawn(run).is_ok();
    }
}

/// How many descriptors are not closed yet, but for the one that holds up the others.
pub fn waiting() -> usize {
    lock(&QUEUE).fds.len()
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

/// The link in /proc shows sockets by a name that no path can have, and no file system is asked for it.
fn is_socket(fd: &OwnedFd) -> bool {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    link.is_ok_and(|link| link.to_string_lossy().starts_with("socket:"))
}

/// The kernel copies as many descriptors at least for a thread that wants a table of its own (`BITS_PER_LONG` in `dup_fd`).
const COPIED: RawFd = 64;

/// The place by which a socket is handed over.
struct Slot {
    /// One of the numbers that are copied; of /dev/null, but for the moment when a socket is handed over.
    low: OwnedFd,
    /// What goes back there.
    null: OwnedFd,
    /// They keep what others pass out of the numbers that are copied: the copy of a FUSE file is flushed, too, when it is closed.
    _taken: Vec<OwnedFd>,
}

static SLOT: Mutex<Option<Slot>> = Mutex::new(None);

/// To be called before others can pass descriptors to this process. Where it may have too few, or has no /dev/null, its sockets
/// are closed as all else is.
pub fn prepare() {
    let mut slot = lock(&SLOT);
    if slot.is_none() {
        *slot = Slot::new().ok().flatten();
    }
}

impl Slot {
    fn new() -> io::Result<Option<Self>> {
        let null = OwnedFd::from(File::open("/dev/null")?);
        let mut taken = Vec::new();
        let null = loop {
            let next = null.try_clone()?;
            if next.as_raw_fd() >= COPIED {
                break next;
            }
            taken.push(next);
        };
        let low = taken.pop();
        Ok(low.map(|low| Self {
            low,
            null,
            _taken: taken,
        }))
    }
}

/// Gives the last reference to `socket` to a thread that ends; gives it back if there is no such thread.
fn close_with_a_thread(socket: OwnedFd) -> Result<(), OwnedFd> {
    prepare();
    let mut slot = lock(&SLOT);
    let Some(Slot { low, null, .. }) = slot.as_mut() else {
        return Err(socket);
    };
    if dup3(&socket, low, DupFlags::CLOEXEC).is_err() {
        return Err(socket);
    }
    let (has_it, it_has) = mpsc::sync_channel(1);
    let (let_go, may_end) = mpsc::sync_channel::<()>(1);
    let spawned = thread::Builder::new().name("closer".into()).spawn(move || {
        // Nothing is done from here on but to wait, and to end.
        let _ = has_it.send(let_go_of_all_from(COPIED));
        let _ = may_end.recv();
    });
    let handed_over = spawned.is_ok() && it_has.recv() == Ok(true);
    let result = match handed_over {
        true => {
            drop(socket);
            Ok(())
        }
        false => Err(socket),
    };
    if dup3(null, low, DupFlags::CLOEXEC).is_err() {
        // Should it ever happen: another slot is looked for the next time.
        *slot = None;
    }
    drop(let_go);
    result
}

/// A socket or another descriptor whose close nobody waits for.
pub struct ClosedElsewhere<T: Into<OwnedFd>>(Option<T>);

impl<T: Into<OwnedFd>> From<T> for ClosedElsewhere<T> {
    fn from(fd: T) -> Self {
        Self(Some(fd))
    }
}

impl<T: Into<OwnedFd>> ClosedElsewhere<T> {
    /// For a thread that others do not wait for.
    pub fn into_inner(mut self) -> T {
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use rustix::net::sockopt::set_socket_linger;

    /// A socket whose close would wait for its peer, which is the second one.
    fn lingering() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let lingering = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let peer = listener.accept().unwrap().0;
        set_socket_linger(&lingering, Some(Duration::from_secs(3600))).unwrap();
        lingering.set_nonblocking(true).unwrap();
        while (&lingering).write(&[0; 65536]).is_ok() {}
        (lingering, peer)
    }

    /// With one of them, no later one was ever closed.
    #[test]
    fn a_socket_that_lingers_is_closed_and_so_are_those_behind_it() {
        let (first, mut peer) = lingering();
        close(first.into());
        let (second, mut other) = UnixStream::pair().unwrap();
        close(second.into());
        other.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        assert_eq!(other.read(&mut [0]).unwrap(), 0);
        assert_eq!(waiting(), 0);
        // What was sent arrives all the same.
        io::copy(&mut peer, &mut io::sink()).unwrap();
    }

    #[test]
    fn what_is_closed_leaves_the_descriptors_of_other_threads_as_they_are() {
        let (mut mine, mut theirs) = UnixStream::pair().unwrap();
        for _ in 0..100 {
            let (one, mut other) = UnixStream::pair().unwrap();
            let number = one.as_raw_fd();
            close(one.into());
            assert_eq!(other.read(&mut [0]).unwrap(), 0, "descriptor {number}");
            mine.write_all(b"x").unwrap();
            theirs.read_exact(&mut [0]).unwrap();
        }
    }
}
