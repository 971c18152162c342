//! The connection to vhost-user-backend's protocol handler, which keeps the protocol's state, the memory table and the
//! vrings.
//!
//! The handler applies a message at once, also while I/O stands on what it changes. So there is one way to the handler,
//! [`Handler::pass`], which pauses
//! the rings that the table names for the message, and resumes them when the handler has applied it. To know when that is,
//! the handler is made to acknowledge each message (REPLY_ACK, "Communication").

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use sealblk_base::blame::Blame;
use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost::vhost_user::message::{FrontendReq, VhostUserVringAddrFlags};

use super::config::{Agreed, NotOffered};
use super::frontend_message::{FrontendMessage, Refused, Reply};
use super::guest::HOW_TO_SHARE;
use super::message::{Message, MessageError};
use super::rings::{Paused, Rings};
use super::uring;

/// How long the handler may take over a message. It only maps memory and keeps state; if it ever waits for something,
/// the session ends.
const TIMEOUT: Duration = Duration::from_secs(10);

const REPLY_ACK: u64 = VhostUserProtocolFeatures::REPLY_ACK.bits();

/// Why a message was not applied.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandlerError {
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error(transparent)]
    Features(#[from] NotOffered),
    #[error("a queue does not lie in guest memory that the front-end has shared; {HOW_TO_SHARE}")]
    MemoryNotShared,
    #[error("there is no room for the descriptors of a message; raise the limit on open files")]
    Descriptors(#[source] io::Error),
    #[error(transparent)]
    Rings(#[from] NoResources),
    #[error("the protocol handler cannot be reached")]
    Unreachable(#[source] io::Error),
}

impl HandlerError {
    /// Where the cause lies.
    pub(super) fn blame(&self) -> Blame {
        match self {
            Self::Refused(_) => Blame::FrontEnd,
            Self::Features(_) | Self::MemoryNotShared => Blame::Operator,
            Self::Descriptors(_) | Self::Rings(_) | Self::Unreachable(_) => Blame::Host,
        }
    }
}

/// A queue cannot be served, since descriptors, threads or memory are exhausted.
#[derive(Debug, thiserror::Error)]
#[error("a queue cannot be served: {}", match .0.raw_os_error() {
    Some(libc::ENOMEM | libc::EAGAIN | libc::EMFILE | libc::ENFILE) => uring::remedy(.0),
    _ => "descriptors, threads or memory are exhausted; raise their limits".into(),
})]
pub(super) struct NoResources(#[source] pub io::Error);

/// See the module's header. The handler ends when this is dropped.
pub(super) struct Handler(UnixStream);

impl Handler {
    /// Takes the connection, and has the handler acknowledge messages from the first one on, also if the front-end will not
    /// ask for that.
    pub(super) fn new(stream: UnixStream) -> Result<Self, HandlerError> {
        let handler = Self(stream);
        // The handler accepts protocol features once it has been asked for its features.
        handler.exchange(Message::request(FrontendReq::GET_FEATURES, &[]), Reply::Data)?;
        let features = Message::request(FrontendReq::SET_PROTOCOL_FEATURES, &REPLY_ACK.to_ne_bytes());
        handler.exchange(features, Reply::Acknowledgement)?;
        Ok(handler)
    }

    /// Has `message`, which was decoded as `content`, applied while the rings that it concerns are paused, and gives the
    /// answer. After an error they stay stopped.
    pub(super) fn pass(
        &self,
        message: Message,
        content: &FrontendMessage,
        rings: &mut Rings,
    ) -> Result<Message, HandlerError> {
        let rule = content.rule();
        let Some(scope) = rule.pauses else {
            return match content {
                FrontendMessage::SetProtocolFeatures(features) => {
                    self.exchange(message.with_number(features | REPLY_ACK), rule.reply)
                }
                _ => self.exchange(message, rule.reply),
            };
        };
        let mut paused = rings.pause(scope);
        let answer = self.change(message, content, &mut paused)?;
        paused.resume().map_err(NoResources)?;
        Ok(answer)
    }

    /// Has a message applied that changes what I/O stands on.
    fn change(
        &self,
        message: Message,
        content: &FrontendMessage,
        paused: &mut Paused<'_>,
    ) -> Result<Message, HandlerError> {
        let reply = content.rule().reply;
        match content {
            FrontendMessage::SetFeatures(features) => {
                let agreed = Agreed::on(*features, paused.disk())?;
                let answer = self.exchange(message.with_number(agreed.of_handler()), reply)?;
                paused.agree(agreed);
                Ok(answer)
            }
            FrontendMessage::SetVringAddr(addresses) => {
                let flags = VhostUserVringAddrFlags::from_bits_truncate(addresses.flags);
                let is_logged = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG);
                let (index, log) = (addresses.index, addresses.log);
                let answer = self.exchange(message, reply)?;
                paused.log_used(index, is_logged.then_some(log));
                Ok(answer)
            }
            FrontendMessage::SetMemTable(_) | FrontendMessage::AddMemReg(_) | FrontendMessage::RemMemReg => {
                let answer = self.exchange(message, reply)?;
                paused.memory_changed();
                Ok(answer)
            }
            FrontendMessage::ResetOwner | FrontendMessage::ResetDevice => {
                paused.answer_left();
                self.exchange(message, reply)
            }
            FrontendMessage::GetVringBase(_) => {
                paused.answer_left();
                let answer = self.exchange(message, reply)?;
                paused.vring_stopped();
                Ok(answer)
            }
            _ => self.exchange(message, reply),
        }
    }

    /// Sends a message, and waits for the answer.
    fn exchange(&self, mut message: Message, reply: Reply) -> Result<Message, HandlerError> {
        let number = message.number();
        let is_acknowledged = reply == Reply::Acknowledgement;
        if is_acknowledged {
            message.demand_reply();
        }
        // The handler would lose descriptors that it has no room for without a word, and wait for the next message.
        message.duplicate_fds().map_err(HandlerError::Descriptors)?;
        message.send(&self.0, TIMEOUT).map_err(|_| refused(number))?;
        match Message::receive(&self.0, TIMEOUT) {
            // It leaves then too.
            Ok(Some(answer)) if is_acknowledged && answer.number_in_body() != Some(0) => Err(refused(number)),
            Ok(Some(answer)) if answer.replies_to(number) => Ok(answer),
            // The handler leaves when it does not like a message.
            Ok(None) | Err(MessageError::Cut) => Err(refused(number)),
            Ok(Some(_)) => Err(HandlerError::Unreachable(io::ErrorKind::InvalidData.into())),
            Err(MessageError::Io(error)) if error.kind() == io::ErrorKind::ConnectionReset => {
                Err(refused(number))
            }
            Err(error) => Err(HandlerError::Unreachable(io::Error::other(error))),
        }
    }
}

/// What is wrong with a message that the handler does not like.
fn refused(message: u32) -> HandlerError {
    match FrontendReq::try_from(message) {
        Ok(FrontendReq::SET_VRING_ADDR) => HandlerError::MemoryNotShared,
        _ => Refused(message).into(),
    }
}
