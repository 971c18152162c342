//! Messages of the varlink wire protocol on a Unix socket, and file descriptors that go with them.
//!
//! A message is one JSON object and a NUL byte (varlink, "Wire Protocol"). Descriptors are sent with its first byte
//! (`SCM_RIGHTS`), as sd-varlink does it; the message names them by their index. The sides take turns: the kernel can deliver
//! the descriptors of a message with the previous message, if that was not read yet. Input from the other side is
//! limited: the length of a message, the number of its descriptors, and the time for the whole message.
//!
//! No call here blocks on a descriptor: other processes may share the descriptor, and can change its O_NONBLOCK flag.

use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FileType;
use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, SendAncillaryBuffer, SendAncillaryMessage,
    SocketAddrUnix, SocketFlags, SocketType, connect, socket_with,
};
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::socket::MAX_PATH;
use sealblk_base::apart;
use sealblk_base::deadline::{self, Deadline};
use sealblk_base::parsing::{self, NotUnderstood};
use sealblk_secmem::arena::{ArenaError, SecretBytes};

/// No socket is there.
#[derive(Debug, thiserror::Error)]
#[error("the path has {0} bytes, but Linux allows only {MAX_PATH} for a socket")]
struct TooLong(usize);

/// The longest message: no call or answer comes near it, and what a caller sends is held several times over while it is
/// looked at.
const MAX_MESSAGE: usize = 64 << 10;
/// The most descriptors beside one message.
const MAX_DESCRIPTORS: usize = 4;
/// The longest secret: it fits into a pipe that nobody reads yet, whatever the limits on pipes are.
pub const MAX_SECRET: usize = 4096;

/// One end of a connection.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    timeout: Duration,
    /// Whether a message may be waited for longer than that; once it has begun, it may not.
    patient: bool,
    /// What was received behind the last message.
    ahead: Vec<u8>,
    descriptors: Vec<OwnedFd>,
    /// Whether this process had too few descriptors for those of the next message.
    lacks_descriptors: bool,
}

/// A message, and the descriptors beside it.
#[derive(Debug)]
pub struct Message<T> {
    /// What the JSON object holds.
    pub content: T,
    /// In the order of their indices.
    pub descriptors: Vec<OwnedFd>,
}

/// Why a connection is of no use any more.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The socket.
    #[error("the connection failed")]
    Io(#[from] io::Error),
    /// The other side left in the middle of a message.
    #[error("the connection ended in the middle of a message")]
    Truncated,
    /// The other side sends without an end.
    #[error("a message is longer than {MAX_MESSAGE} bytes")]
    TooLong,
    /// The other side sends more descriptors than any message has.
    #[error("more than {MAX_DESCRIPTORS} descriptors came with a message")]
    TooManyDescriptors,
    /// The other side does not speak varlink.
    #[error("a message is not valid: {0}")]
    Json(#[from] NotUnderstood),
    /// A message of this side's holds what JSON cannot.
    #[error("a message cannot be written as JSON")]
    Unwritable,
}

impl Connection {
    /// Speaks over `stream`. A message that does not come, or does not go, within `timeout` is an error.
    pub fn new(stream: UnixStream, timeout: Duration) -> Self {
        Self {
            stream,
            timeout,
            patient: false,
            ahead: Vec::new(),
            descriptors: Vec::new(),
            lacks_descriptors: false,
        }
    }

    /// Connects to the socket at `path`. Who listens there may have too much to do to take one more within `timeout`.
    ///
    /// # Errors
    /// If nobody listens, or takes the connection in time.
    pub fn to(path: &Path, timeout: Duration) -> io::Result<Self> {
        let len = path.as_os_str().len();
        if len > MAX_PATH {
            return Err(io::Error::new(io::ErrorKind::InvalidFilename, TooLong(len)));
        }
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        sockopt::set_socket_timeout(&socket, Timeout::Send, Some(timeout))?;
        connect(&socket, &SocketAddrUnix::new(path)?).map_err(|error| match error {
            Errno::AGAIN => io::ErrorKind::TimedOut.into(),
            error => io::Error::from(error),
        })?;
        Ok(Self::new(socket.into(), timeout))
    }

    /// The socket.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends a message.
    ///
    /// # Errors
    /// [`WireError`]; the connection is of no use then.
    pub fn send(
        &mut self,
        content: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), WireError> {
        let mut bytes = serde_json::to_vec(content).map_err(|_| WireError::Unwritable)?;
        bytes.push(0);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if descriptors.len() > MAX_DESCRIPTORS {
            return Err(WireError::TooManyDescriptors);
        }
        if !descriptors.is_empty() {
            let fits = ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
            assert!(fits, "the space is for as many");
        }
        let deadline = Deadline::after(self.timeout);
        Ok(deadline::send(&self.stream, &bytes, &mut ancillary, deadline)?)
    }

    /// Waits for a message; there is none when the other side has left.
    ///
    /// # Errors
    /// [`WireError`]; the connection is of no use then, unless this process had too few descriptors (`EMFILE`).
    pub fn receive<T: DeserializeOwned>(&mut self) -> Result<Option<Message<T>>, WireError> {
        let mut searched = 0;
        let mut deadline = match self.patient && self.ahead.is_empty() {
            true => Deadline::NEVER,
            false => Deadline::after(self.timeout),
        };
        loop {
            if let Some(end) = self.ahead[searched..].iter().position(|&byte| byte == 0) {
                let message: Vec<u8> = self.ahead.drain(..=searched + end).collect();
                let content = parsing::json(&message[..message.len() - 1])?;
                let descriptors = std::mem::take(&mut self.descriptors);
                if std::mem::take(&mut self.lacks_descriptors) {
                    return Err(WireError::Io(Errno::MFILE.into()));
                }
                return Ok(Some(Message { content, descriptors }));
            }
            searched = self.ahead.len();
            if searched > MAX_MESSAGE {
                return Err(WireError::TooLong);
            }
            let begins = self.ahead.is_empty();
            if self.receive_some(deadline)? == 0 {
                return match begins {
                    true => Ok(None),
                    false => Err(WireError::Truncated),
                };
            }
            // Byte by byte a message could take for ever.
            if begins {
                deadline = Deadline::after(self.timeout);
            }
        }
    }

    /// Whether the other side has left, whatever it has sent before.
    ///
    /// # Errors
    /// If the socket fails.
    pub fn has_ended(&self) -> io::Result<bool> {
        let ended = PollFlags::HUP | PollFlags::RDHUP | PollFlags::ERR;
        let mut fds = [PollFd::new(&self.stream, PollFlags::RDHUP)];
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        match poll(&mut fds, Some(&at_once)) {
            Ok(_) => Ok(fds[0].revents().intersects(ended)),
            Err(Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Ends the connection, for both sides: no message of it is read any more.
    pub fn shut_down(&self) {
        // One that has ended already is as good.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }

    /// Waits for messages without a limit from now on.
    pub fn wait_for_ever(&mut self) {
        self.patient = true;
    }

    fn receive_some(&mut self, deadline: Deadline) -> Result<usize, WireError> {
        // However little comes at a time.
        deadline.left()?;
        let mut bytes = [0; 8192];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = deadline::receive(&self.stream, &mut bytes, &mut ancillary, deadline)?;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                self.descriptors.extend(descriptors);
            }
        }
        // What did not fit into the space, or into this process, was closed by the kernel.
        let is_short = received.flags.contains(rustix::net::ReturnFlags::CTRUNC);
        match self.descriptors.len() {
            MAX_DESCRIPTORS if is_short => return Err(WireError::TooManyDescriptors),
            0..=MAX_DESCRIPTORS => self.lacks_descriptors |= is_short,
            _ => return Err(WireError::TooManyDescriptors),
        }
        self.ahead.extend_from_slice(&bytes[..received.bytes]);
        Ok(received.bytes)
    }
}

/// A secret on its way: the end of a pipe, in which the kernel keeps it out of every file and of swap.
///
/// # Errors
/// If descriptors are exhausted.
pub fn pass(secret: &SecretBytes) -> io::Result<OwnedFd> {
    if secret.len() > MAX_SECRET {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let (take, give) = pipe_with(PipeFlags::CLOEXEC)?;
    std::fs::File::from(give).write_all(secret)?;
    Ok(take)
}

/// Why a secret did not arrive.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// It is not there, or does not come.
    #[error("the descriptor of a secret cannot be read")]
    Io(#[from] io::Error),
    /// It is no pipe: whoever sends something else could have it read for ever.
    #[error("expected a pipe with a secret, but got another descriptor")]
    NoPipe,
    /// There is none: it was taken already.
    #[error("expected a secret, but got none")]
    Empty,
    /// It is longer than any secret.
    #[error("the secret is longer than {MAX_SECRET} bytes")]
    TooLong,
    /// There is no memory for it.
    #[error(transparent)]
    Arena(#[from] ArenaError),
}

/// Takes a secret that [`pass`] has sent. The whole of it is there already, so nobody has to be waited for.
///
/// A hostile sender could keep both ends, write nothing, and clear O_NONBLOCK as often as it is set. So what is in the pipe
/// moves to one that nobody else has, which splice(2) does without waiting whatever the flags are. (Kernels before 6.4 know no
/// RWF_NOWAIT for pipes, and later ones not for all.)
///
/// Nothing helps against a sender that holds the kernel's lock of its pipe, by writing to it from memory whose page does not
/// come: whatever is done to that pipe waits. So a thread does it that keeps nothing else; who waits for it is the sender's caller.
///
/// # Errors
/// [`ReceiveError`].
pub fn take(descriptor: &OwnedFd) -> Result<SecretBytes, ReceiveError> {
    apart::on(descriptor, take_now)?
}

/// The same from a process that gives this one its keys, and so could do worse than to have it wait. No thread is needed, which would
/// copy all descriptors and close them: a file that a front-end has passed can be one whose close waits for ever.
///
/// # Errors
/// [`ReceiveError`].
pub fn take_from_trusted(descriptor: OwnedFd) -> Result<SecretBytes, ReceiveError> {
    let mut pipe = std::fs::File::from(descriptor);
    let mut secret = SecretBytes::zeroed(MAX_SECRET + 1)?;
    let mut len = 0;
    while len < secret.len() {
        match pipe.read(&mut secret[len..]) {
            Ok(0) => break,
            Ok(read) => len += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    match len {
        0 => Err(ReceiveError::Empty),
        len if len > MAX_SECRET => Err(ReceiveError::TooLong),
        len => {
            secret.truncate(len);
            Ok(secret)
        }
    }
}

fn take_now(descriptor: &OwnedFd) -> Result<SecretBytes, ReceiveError> {
    let stat = rustix::fs::fstat(descriptor).map_err(io::Error::from)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Fifo {
        return Err(ReceiveError::NoPipe);
    }
    let mut secret = SecretBytes::zeroed(MAX_SECRET)?;
    let mut len = 0;
    loop {
        let (own, moved) = {
            let (own, into) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(io::Error::from)?;
            // One byte more shows that it is too long.
            let room = secret.len() - len + 1;
            (own, splice_now(descriptor, &into, room)?)
        };
        match moved {
            0 if len == 0 => return Err(ReceiveError::Empty),
            0 => {
                secret.truncate(len);
                return Ok(secret);
            }
            moved if moved > secret.len() - len => return Err(ReceiveError::TooLong),
            moved => {
                std::fs::File::from(own).read_exact(&mut secret[len..len + moved])?;
                len += moved;
            }
        }
    }
}

/// Moves what is in a pipe into another one, without waiting for more.
fn splice_now(from: &OwnedFd, into: &OwnedFd, len: usize) -> io::Result<usize> {
    loop {
        match splice(from, None, into, None, len, SpliceFlags::NONBLOCK) {
            Err(Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{SendFlags, sendmsg};
    use serde_json::{Value, json};
    use std::io::IoSlice;
    use std::os::fd::AsFd;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    const SHORT: Duration = Duration::from_millis(100);

    fn pair() -> (Connection, Connection) {
        let (one, two) = UnixStream::pair().unwrap();
        let connection = |stream| Connection::new(stream, Duration::from_secs(10));
        (connection(one), connection(two))
    }

    fn timed_out(result: Result<impl std::fmt::Debug, WireError>) {
        match result {
            Err(WireError::Io(error)) => assert_eq!(error.kind(), io::ErrorKind::TimedOut),
            other => panic!("{other:?}"),
        }
    }

    fn content(message: Option<Message<Value>>) -> Value {
        message.unwrap().content
    }

    #[test]
    fn messages_come_one_by_one_however_they_are_cut() {
        let (mut one, mut two) = pair();
        let bytes = b"{\"n\":1}\0{\"n\":2}\0{\"n\":3}\0";
        for byte in bytes {
            one.stream.write_all(&[*byte]).unwrap();
        }
        one.stream.write_all(bytes).unwrap();
        for n in [1, 2, 3, 1, 2, 3] {
            assert_eq!(content(two.receive().unwrap()), json!({ "n": n }));
        }
        drop(one);
        assert!(two.receive::<Value>().unwrap().is_none());
    }

    #[test]
    fn who_has_left_is_seen_to_have_left_whatever_was_sent_before() {
        let (mut one, two) = pair();
        assert!(!two.has_ended().unwrap());
        one.stream.write_all(b"{").unwrap();
        assert!(!two.has_ended().unwrap());
        drop(one);
        assert!(two.has_ended().unwrap());
    }

    #[test]
    fn long_messages_pass_and_endless_ones_do_not() {
        let (mut one, mut two) = pair();
        let text = "x".repeat(MAX_MESSAGE - 100);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                one.send(&text, &[]).unwrap();
                // Until the other side has had enough.
                let _ = one.send(&"y".repeat(2 * MAX_MESSAGE), &[]);
            });
            assert_eq!(content(two.receive().unwrap()), text);
            assert!(matches!(two.receive::<Value>(), Err(WireError::TooLong)));
            drop(two);
        });
    }

    #[test]
    fn who_takes_no_connection_is_not_waited_for_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        rustix::net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        assert!(
            Connection::to(&path, Duration::from_millis(50)).is_err(),
            "nobody listens"
        );
        rustix::net::listen(&listener, 0).unwrap();
        let short = Duration::from_millis(50);
        let first = Connection::to(&path, short).unwrap();
        let error = Connection::to(&path, short).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(first);
    }

    #[test]
    fn what_is_no_message_ends_the_connection() {
        let (mut one, mut two) = pair();
        one.stream.write_all(b"{]\0").unwrap();
        assert!(matches!(two.receive::<Value>(), Err(WireError::Json(_))));
        one.stream.write_all(b"{").unwrap();
        drop(one);
        assert!(matches!(two.receive::<Value>(), Err(WireError::Truncated)));
    }

    #[test]
    fn descriptors_come_with_their_message_and_too_many_are_refused() {
        let (mut one, mut two) = pair();
        let secret = SecretBytes::random(32).unwrap();
        let pipe = pass(&secret).unwrap();
        let mut pass_on = |content: u8, descriptors: &[BorrowedFd<'_>]| {
            one.send(&content, descriptors).unwrap();
            let message = two.receive::<u8>().unwrap().unwrap();
            assert_eq!(
                (message.content, message.descriptors.len()),
                (content, descriptors.len())
            );
            message.descriptors
        };
        pass_on(1, &[]);
        let received = pass_on(2, &[pipe.as_fd(), pipe.as_fd()]);
        assert!(take(&received[1]).unwrap().ct_eq(&secret));
        pass_on(3, &[]);

        assert!(matches!(
            one.send(&4, &[pipe.as_fd(); 5]),
            Err(WireError::TooManyDescriptors)
        ));
        let five = [pipe.as_fd(); 5];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(5))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&five)));
        sendmsg(
            &one.stream,
            &[IoSlice::new(b"5\0")],
            &mut ancillary,
            SendFlags::empty(),
        )
        .unwrap();
        assert!(matches!(
            two.receive::<Value>(),
            Err(WireError::TooManyDescriptors)
        ));
    }

    // Only receiving had a limit for the whole of a message, and who waited for an answer or for events had none.
    #[test]
    fn no_message_takes_longer_than_its_limit_however_it_is_cut() {
        let (one, two) = UnixStream::pair().unwrap();
        let mut slow = Connection::new(one, SHORT);
        slow.wait_for_ever();
        thread::scope(|scope| {
            scope.spawn(|| while (&two).write_all(b" ").is_ok() {});
            timed_out(slow.receive::<Value>());
            drop(slow);
        });
        let (one, two) = UnixStream::pair().unwrap();
        let mut slow = Connection::new(one, SHORT);
        let text = "x".repeat(16 << 20);
        thread::scope(|scope| {
            scope.spawn(|| while (&two).read(&mut [0]).is_ok_and(|read| read == 1) {});
            timed_out(slow.send(&text, &[]));
            drop(slow);
        });
    }

    // The flag was set and then relied on. It belongs to the open file description, which the sender shares.
    #[test]
    fn a_sender_that_makes_its_pipe_or_socket_block_again_and_again_is_not_waited_for() {
        let (one, _two) = UnixStream::pair().unwrap();
        let mut connection = Connection::new(one.try_clone().unwrap(), SHORT);
        let (end, _kept) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    rustix::io::ioctl_fionbio(&end, false).unwrap();
                    rustix::io::ioctl_fionbio(&one, false).unwrap();
                }
            });
            for _ in 0..2000 {
                assert!(matches!(take(&end), Err(ReceiveError::Io(_))), "nobody writes");
            }
            timed_out(connection.receive::<Value>());
            done.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn a_secret_may_come_in_as_many_pieces_as_a_pipe_takes() {
        let (take_end, give) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        rustix::pipe::fcntl_setpipe_size(&take_end, 64 * 4096).unwrap();
        let secret = SecretBytes::random(64).unwrap();
        // A packet each (O_DIRECT), so that they are not joined.
        rustix::fs::fcntl_setfl(&give, rustix::fs::OFlags::DIRECT).unwrap();
        for byte in secret.iter() {
            rustix::io::write(&give, &[*byte]).unwrap();
        }
        drop(give);
        assert!(take(&take_end).unwrap().ct_eq(&secret));
    }

    #[test]
    fn secrets_that_do_not_end_or_do_not_come_are_errors() {
        let longest = SecretBytes::random(MAX_SECRET).unwrap();
        assert!(take(&pass(&longest).unwrap()).unwrap().ct_eq(&longest));
        assert!(pass(&SecretBytes::zeroed(MAX_SECRET + 1).unwrap()).is_err());
        let (end, kept) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        assert!(matches!(take(&end), Err(ReceiveError::Io(_))), "nobody writes");
        drop(kept);
        assert!(matches!(take(&end), Err(ReceiveError::Empty)));
        let zeros = std::fs::File::open("/dev/zero").unwrap().into();
        assert!(matches!(take(&zeros), Err(ReceiveError::NoPipe)));
        let (end, mut long) = pipe_with(PipeFlags::CLOEXEC)
            .map(|(end, give)| (end, std::fs::File::from(give)))
            .unwrap();
        long.write_all(&[1; MAX_SECRET + 1]).unwrap();
        assert!(matches!(take(&end), Err(ReceiveError::TooLong)));
    }
}
