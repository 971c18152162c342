//! One time limit for a whole message, in any number of pieces.
//!
//! A timeout of the socket (SO_RCVTIMEO) limits each call: with one byte every few seconds, a message could last for hours.
//! O_NONBLOCK belongs to the open file description, which other processes may share and change. So every call here is
//! non-blocking for any flags of the descriptor, and poll(2) waits for the remaining time.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvFlags, RecvMsg, SendAncillaryBuffer, SendFlags, recvmsg, sendmsg,
};

/// When something has to be done; or never.
#[derive(Clone, Copy, Debug)]
pub struct Deadline(Option<Instant>);

impl Deadline {
    /// In so much time from now.
    pub fn after(limit: Duration) -> Self {
        // What is too far away to be told never comes.
        Self(Instant::now().checked_add(limit))
    }

    /// At this time.
    pub fn at(time: Instant) -> Self {
        Self(Some(time))
    }

    /// Nobody waits for it.
    pub const NEVER: Self = Self(None);

    /// How much time is left, which is not zero; none if there is no limit.
    ///
    /// # Errors
    /// `TimedOut`.
    pub fn left(self) -> io::Result<Option<Duration>> {
        let Some(at) = self.0 else { return Ok(None) };
        match at.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
            left => Ok(Some(left)),
        }
    }

    /// Waits until one of `fds` is ready, or has failed.
    ///
    /// # Errors
    /// `TimedOut`, and those of poll(2).
    pub fn poll(self, fds: &mut [PollFd<'_>]) -> io::Result<()> {
        loop {
            let left = self.left()?.map(Timespec::try_from).transpose();
            let left = left.map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
            match poll(fds, left.as_ref()) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Tries again whenever `fd` is ready, until `attempt` does not say that it would have to wait.
    fn retry<T>(
        self,
        fd: &impl AsFd,
        flags: PollFlags,
        mut attempt: impl FnMut() -> rustix::io::Result<T>,
    ) -> io::Result<T> {
        loop {
            match attempt() {
                Ok(done) => return Ok(done),
                Err(Errno::AGAIN) => self.poll(&mut [PollFd::new(fd, flags)])?,
                // A signal must not make it last longer.
                Err(Errno::INTR) => self.left().map(drop)?,
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Receives what is there, or the first that comes.
pub fn receive(
    socket: &impl AsFd,
    bytes: &mut [u8],
    ancillary: &mut RecvAncillaryBuffer<'_>,
    deadline: Deadline,
) -> io::Result<RecvMsg> {
    deadline.retry(socket, PollFlags::IN, || receive_now(socket, bytes, ancillary))
}

/// Receives what is there; `AGAIN` if nothing is.
pub fn receive_now(
    socket: &impl AsFd,
    bytes: &mut [u8],
    ancillary: &mut RecvAncillaryBuffer<'_>,
) -> rustix::io::Result<RecvMsg> {
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    recvmsg(socket, &mut [IoSliceMut::new(bytes)], ancillary, flags)
}

/// Sends all of `bytes`, and what is in `ancillary` with the first of them. A peer that has left is an error, and no signal.
pub fn send(
    socket: &impl AsFd,
    mut bytes: &[u8],
    ancillary: &mut SendAncillaryBuffer<'_, '_, '_>,
    deadline: Deadline,
) -> io::Result<()> {
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    while !bytes.is_empty() {
        // However readily the peer takes little pieces.
        deadline.left()?;
        let sent = deadline.retry(socket, PollFlags::OUT, || {
            sendmsg(socket, &[IoSlice::new(bytes)], ancillary, flags)
        })?;
        ancillary.clear();
        bytes = &bytes[sent..];
    }
    Ok(())
}

/// A stream socket that is done with at a certain time, however slowly the other side goes on.
#[derive(Debug)]
pub struct Timed<S> {
    socket: S,
    deadline: Deadline,
}

impl<S> Timed<S> {
    pub fn new(socket: S, deadline: Deadline) -> Self {
        Self { socket, deadline }
    }
}

impl<S: AsFd> Read for Timed<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.deadline.left()?;
        let mut none = RecvAncillaryBuffer::default();
        receive(&self.socket, buffer, &mut none, self.deadline).map(|received| received.bytes)
    }
}

impl<S: AsFd> Write for Timed<S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        send(
            &self.socket,
            bytes,
            &mut SendAncillaryBuffer::default(),
            self.deadline,
        )?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use std::thread;

    const LIMIT: Duration = Duration::from_millis(100);

    fn timed_out(result: io::Result<impl std::fmt::Debug>) {
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }

    // The time was one for each call: a peer that went on forever was listened to for ever.
    #[test]
    fn a_message_takes_no_longer_than_its_limit_in_however_many_pieces_it_comes_and_goes() {
        let (one, two) = UnixStream::pair().unwrap();
        let mut reading = Timed::new(one, Deadline::after(LIMIT));
        thread::scope(|scope| {
            scope.spawn(|| while (&two).write_all(&[0]).is_ok() {});
            timed_out((&mut reading).take(u64::MAX).read_to_end(&mut Vec::new()));
            drop(reading);
        });
        let (one, two) = UnixStream::pair().unwrap();
        let mut writing = Timed::new(one, Deadline::after(LIMIT));
        thread::scope(|scope| {
            scope.spawn(|| while (&two).read(&mut [0]).is_ok_and(|read| read == 1) {});
            timed_out(loop {
                if let Err(error) = writing.write(&[0; 4096]) {
                    break Err::<(), _>(error);
                }
            });
            drop(writing);
        });
    }

    #[test]
    fn a_descriptor_that_others_make_blocking_does_not_block() {
        let (one, _two) = UnixStream::pair().unwrap();
        for nonblocking in [true, false] {
            one.set_nonblocking(nonblocking).unwrap();
            let mut timed = Timed::new(&one, Deadline::after(LIMIT));
            timed_out(timed.read(&mut [0]));
            let mut timed = Timed::new(&one, Deadline::after(LIMIT));
            timed_out(timed.write_all(&vec![0; 16 << 20]));
        }
    }
}
