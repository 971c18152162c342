//! vhost-user messages as bytes with descriptors, on their way between two sockets (vhost-user specification, "Message
//! Specification").

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
};
use sealblk_base::blame::Blame;
use vhost::vhost_user::message::{FrontendReq, MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE};

use super::foreign::Foreign;
use crate::deadline::{self, Deadline};

/// The bits of a header's flags.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 0x3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// request, flags and size, each 32 bits in the host's byte order.
const HEADER: usize = 12;

/// A message, in either direction.
#[derive(Debug)]
pub struct Message {
    request: u32,
    flags: u32,
    pub body: Vec<u8>,
    fds: Vec<Foreign>,
}

/// Why no message can be received.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    #[error("the connection ended in the middle of a message")]
    Cut,
    #[error("a message that has begun does not end")]
    Slow,
    #[error("version {0} of the protocol is not known")]
    Version(u32),
    #[error("a message of {0} bytes is longer than any of the protocol")]
    TooLong(u32),
    #[error(
        "descriptors have come with a message, and the kernel did not give them all: this process has too many open (see `ulimit -n`), or a \
         security module forbids them"
    )]
    LostDescriptors,
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl MessageError {
    /// Where the cause lies.
    pub(super) fn blame(&self) -> Blame {
        match self {
            Self::LostDescriptors => Blame::Host,
            Self::Cut | Self::Slow | Self::Version(_) | Self::TooLong(_) | Self::Io(_) => Blame::FrontEnd,
        }
    }
}

impl Message {
    /// A message between processes of sealblk, whose number no message of a front-end has.
    pub fn own(number: u32, body: Vec<u8>, fds: Vec<OwnedFd>) -> Self {
        Self {
            request: number,
            flags: VERSION,
            body,
            fds: fds.into_iter().map(Foreign::new).collect(),
        }
    }

    /// Takes its descriptors out of it; the caller closes them from then on.
    pub fn take_descriptors(&mut self) -> Vec<OwnedFd> {
        self.take_fds().into_iter().map(Foreign::into_inner).collect()
    }

    /// A request without descriptors.
    pub(super) fn request(request: FrontendReq, body: &[u8]) -> Self {
        Self {
            request: request.into(),
            flags: VERSION,
            body: body.to_vec(),
            fds: Vec::new(),
        }
    }

    /// The same message once more, with descriptors of its own.
    ///
    /// # Errors
    /// If descriptors are exhausted.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            request: self.request,
            flags: self.flags,
            body: self.body.clone(),
            fds: self
                .fds
                .iter()
                .map(Foreign::try_clone)
                .collect::<io::Result<_>>()?,
        })
    }

    /// A reply to this request.
    pub(super) fn reply(&self, body: &[u8]) -> Self {
        Self {
            request: self.request,
            flags: VERSION | REPLY,
            body: body.to_vec(),
            fds: Vec::new(),
        }
    }

    /// The same message with a descriptor.
    pub(super) fn with_fd(self, fd: OwnedFd) -> Self {
        self.with(Foreign::new(fd))
    }

    /// The same message with a descriptor of the front-end's.
    pub(super) fn with(mut self, fd: Foreign) -> Self {
        self.fds.push(fd);
        self
    }

    /// Its descriptors.
    pub(super) fn fds(&self) -> &[Foreign] {
        &self.fds
    }

    /// Takes its descriptors out of it.
    pub(super) fn take_fds(&mut self) -> Vec<Foreign> {
        std::mem::take(&mut self.fds)
    }

    /// Duplicates of its descriptors, as many as its receiver will have.
    pub(super) fn duplicate_fds(&self) -> io::Result<Vec<OwnedFd>> {
        self.fds
            .iter()
            .map(|fd| fd.as_fd().try_clone_to_owned())
            .collect()
    }

    /// The number of the request.
    pub fn number(&self) -> u32 {
        self.request
    }

    /// Whether the sender asks for an acknowledgement (REPLY_ACK).
    pub(super) fn needs_reply(&self) -> bool {
        self.flags & NEED_REPLY != 0
    }

    /// Asks for an acknowledgement.
    pub(super) fn demand_reply(&mut self) {
        self.flags |= NEED_REPLY;
    }

    /// The same message with this number as its body.
    pub(super) fn with_number(mut self, number: u64) -> Self {
        self.body = number.to_ne_bytes().to_vec();
        self
    }

    /// The body as a number of 64 bits, if it is one.
    pub(super) fn number_in_body(&self) -> Option<u64> {
        self.body.as_slice().try_into().ok().map(u64::from_ne_bytes)
    }

    /// Waits for a message, as a whole for no longer than `limit`; none once the peer has closed the connection.
    pub fn receive(stream: &UnixStream, limit: Duration) -> Result<Option<Self>, MessageError> {
        let deadline = Deadline::after(limit);
        let mut incoming = Incoming::new(limit);
        loop {
            match incoming.advance(stream)? {
                Progress::Message(message) => return Ok(Some(message)),
                Progress::End => return Ok(None),
                Progress::Waiting => deadline.poll(&mut [PollFd::new(stream, PollFlags::IN)])?,
            }
        }
    }

    /// Sends it, as a whole within `limit`, and closes its descriptors on this side.
    pub fn send(self, stream: &UnixStream, limit: Duration) -> io::Result<()> {
        let len = u32::try_from(self.body.len()).map_err(io::Error::other)?;
        let mut bytes = Vec::with_capacity(HEADER + self.body.len());
        for field in [self.request, self.flags, len] {
            bytes.extend_from_slice(&field.to_ne_bytes());
        }
        bytes.extend_from_slice(&self.body);

        let fds: Vec<_> = self.fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_ATTACHED_FD_ENTRIES))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        }
        deadline::send(stream, &bytes, &mut ancillary, Deadline::after(limit))
    }

    /// Whether it is a reply to `request`.
    pub(super) fn replies_to(&self, request: u32) -> bool {
        self.flags & REPLY != 0 && self.request == request
    }
}

/// A message that is being received. Its sender may take some time, up to a limit; the caller does not wait meanwhile.
#[derive(Debug)]
pub(super) struct Incoming {
    header: [u8; HEADER],
    /// As long as the header says, once that is there.
    body: Vec<u8>,
    fds: Vec<Foreign>,
    /// How many bytes of both there are.
    received: usize,
    limit: Duration,
    deadline: Deadline,
}

/// How much has come.
#[derive(Debug)]
pub(super) enum Progress {
    /// All of a message.
    Message(Message),
    /// Not as much yet.
    Waiting,
    /// The peer has closed the connection between two messages.
    End,
}

impl Incoming {
    /// Nothing of the message is there yet. Once it has begun, it may take `limit`.
    pub(super) fn new(limit: Duration) -> Self {
        Self {
            header: [0; HEADER],
            body: Vec::new(),
            fds: Vec::new(),
            received: 0,
            limit,
            deadline: Deadline::NEVER,
        }
    }

    /// Whether nothing of it has come yet.
    pub(super) fn is_empty(&self) -> bool {
        self.received == 0
    }

    /// Until when more of it has to come.
    pub(super) fn deadline(&self) -> Deadline {
        self.deadline
    }

    /// Takes the bytes that have come, without waiting for more. After a message the next one can begin.
    pub(super) fn advance(&mut self, stream: &UnixStream) -> Result<Progress, MessageError> {
        self.deadline.left().map_err(|_| MessageError::Slow)?;
        loop {
            let received = match self.received.checked_sub(HEADER) {
                None => receive_with_fds(stream, &mut self.header[self.received..], &mut self.fds),
                Some(of_body) if of_body < self.body.len() => {
                    // Descriptors that come with a later byte than the header's are closed.
                    receive_with_fds(stream, &mut self.body[of_body..], &mut Vec::new())
                }
                Some(_) => {
                    let message = std::mem::replace(self, Self::new(self.limit));
                    return Ok(Progress::Message(message.finished()));
                }
            };
            match received {
                Ok((_, Descriptors::Lost)) => return Err(MessageError::LostDescriptors),
                Ok((0, _)) if self.received == 0 => return Ok(Progress::End),
                Ok((0, _)) => return Err(MessageError::Cut),
                Ok((len, Descriptors::All)) => {
                    if self.received == 0 {
                        self.deadline = Deadline::after(self.limit);
                    }
                    self.received += len;
                    if self.received == HEADER {
                        self.body = vec![0; self.check_header()?];
                    }
                }
                Err(Errno::AGAIN) => return Ok(Progress::Waiting),
                Err(Errno::INTR) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
    }

    /// The length of the body.
    fn check_header(&self) -> Result<usize, MessageError> {
        let [_, flags, size] = self.fields();
        if flags & VERSION_MASK != VERSION {
            return Err(MessageError::Version(flags & VERSION_MASK));
        }
        match size as usize {
            len if len > MAX_MSG_SIZE => Err(MessageError::TooLong(size)),
            len => Ok(len),
        }
    }

    fn finished(self) -> Message {
        let [request, flags, _] = self.fields();
        Message {
            request,
            flags,
            body: self.body,
            fds: self.fds,
        }
    }

    /// request, flags and size.
    fn fields(&self) -> [u32; 3] {
        let [r0, r1, r2, r3, f0, f1, f2, f3, s0, s1, s2, s3] = self.header;
        [[r0, r1, r2, r3], [f0, f1, f2, f3], [s0, s1, s2, s3]].map(u32::from_ne_bytes)
    }
}

/// The most descriptors that the kernel passes at once. There is room for all of them: the kernel closes those that find none
/// in our call, and that close can wait for the peer.
const SCM_MAX_FD: usize = 253;

/// Whether the kernel gave all descriptors that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Descriptors {
    All,
    /// It closes those for which this process has no number, or no permission.
    Lost,
}

fn receive_with_fds(
    stream: &UnixStream,
    bytes: &mut [u8],
    fds: &mut Vec<Foreign>,
) -> rustix::io::Result<(usize, Descriptors)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SCM_MAX_FD))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = deadline::receive_now(stream, bytes, &mut ancillary)?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights.map(Foreign::new));
        }
    }
    // One message never carries more; descriptors that come with later bytes of the header are closed.
    fds.truncate(MAX_ATTACHED_FD_ENTRIES);
    let descriptors = match received.flags.contains(ReturnFlags::CTRUNC) {
        false => Descriptors::All,
        true => Descriptors::Lost,
    };
    Ok((received.bytes, descriptors))
}
