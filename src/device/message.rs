//! vhost-user messages as bytes with descriptors, for the gate to pass on
//! (vhost-user specification, "Message Specification").

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use vhost::vhost_user::message::{FrontendReq, MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE};

/// The bits of a header's flags.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 0x3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// request, flags and size, each 32 bits in the host's byte order.
const HEADER: usize = 12;

/// A message, in either direction.
#[derive(Debug)]
pub(super) struct Message {
    request: u32,
    flags: u32,
    pub body: Vec<u8>,
    fds: Vec<OwnedFd>,
}

/// Why no message can be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum MessageError {
    #[error("the connection ended in the middle of a message")]
    Cut,
    #[error("version {0} of the protocol is not known")]
    Version(u32),
    #[error("a message of {0} bytes is longer than any of the protocol")]
    TooLong(u32),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Message {
    /// A request without descriptors.
    pub(super) fn request(request: FrontendReq, body: &[u8]) -> Self {
        Self {
            request: request.into(),
            flags: VERSION,
            body: body.to_vec(),
            fds: Vec::new(),
        }
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

    /// Its descriptors.
    pub(super) fn fds(&self) -> &[OwnedFd] {
        &self.fds
    }

    /// Its descriptors once more, as whoever receives it will have them.
    pub(super) fn duplicate_fds(&self) -> io::Result<Vec<OwnedFd>> {
        self.fds.iter().map(OwnedFd::try_clone).collect()
    }

    /// Which request it is, or replies to; none for one that the protocol library does not know.
    pub(super) fn code(&self) -> Option<FrontendReq> {
        FrontendReq::try_from(self.request).ok()
    }

    /// The number of the request.
    pub(super) fn number(&self) -> u32 {
        self.request
    }

    /// Whether the sender wants to hear how it went (REPLY_ACK).
    pub(super) fn needs_reply(&self) -> bool {
        self.flags & NEED_REPLY != 0
    }

    /// Asks to hear how it went.
    pub(super) fn demand_reply(&mut self) {
        self.flags |= NEED_REPLY;
    }

    /// The body as a number of 64 bits, if it is one.
    pub(super) fn number_in_body(&self) -> Option<u64> {
        self.body.as_slice().try_into().ok().map(u64::from_ne_bytes)
    }

    /// Waits for a message; none once the peer has closed the connection.
    pub(super) fn receive(mut stream: &UnixStream) -> Result<Option<Self>, MessageError> {
        let mut header = [0; HEADER];
        let mut fds = Vec::new();
        let mut received = 0;
        while received < HEADER {
            let len = receive_with_fds(stream, &mut header[received..], &mut fds)?;
            if len == 0 {
                return if received == 0 {
                    Ok(None)
                } else {
                    Err(MessageError::Cut)
                };
            }
            received += len;
        }
        let [r0, r1, r2, r3, f0, f1, f2, f3, s0, s1, s2, s3] = header;
        let flags = u32::from_ne_bytes([f0, f1, f2, f3]);
        if flags & VERSION_MASK != VERSION {
            return Err(MessageError::Version(flags & VERSION_MASK));
        }
        let size = u32::from_ne_bytes([s0, s1, s2, s3]);
        if size as usize > MAX_MSG_SIZE {
            return Err(MessageError::TooLong(size));
        }
        let mut body = vec![0; size as usize];
        stream.read_exact(&mut body).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => MessageError::Cut,
            _ => error.into(),
        })?;
        Ok(Some(Self {
            request: u32::from_ne_bytes([r0, r1, r2, r3]),
            flags,
            body,
            fds,
        }))
    }

    /// Sends it, and closes its descriptors on this side.
    pub(super) fn send(self, stream: &UnixStream) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(HEADER + self.body.len());
        for field in [self.request, self.flags, self.body.len() as u32] {
            bytes.extend_from_slice(&field.to_ne_bytes());
        }
        bytes.extend_from_slice(&self.body);

        let fds: Vec<_> = self.fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_ATTACHED_FD_ENTRIES))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        }
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            match sendmsg(stream, &[IoSlice::new(rest)], &mut ancillary, SendFlags::NOSIGNAL) {
                Ok(len) => {
                    rest = &rest[len..];
                    // They went with the first byte.
                    ancillary.clear();
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Whether it is a reply to `request`.
    pub(super) fn replies_to(&self, request: u32) -> bool {
        self.flags & REPLY != 0 && self.request == request
    }
}

fn receive_with_fds(stream: &UnixStream, bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_ATTACHED_FD_ENTRIES))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match recvmsg(
            stream,
            &mut [IoSliceMut::new(bytes)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result?,
        }
    };
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    // One message never carries more; what comes with later bytes of the header is closed.
    fds.truncate(MAX_ATTACHED_FD_ENTRIES);
    Ok(received.bytes)
}
