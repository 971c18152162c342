//! The interceptor: each message of the front-end passes here before vhost-user-backend's handler sees it.
//!
//! A message is received whole, decoded once ([`super::frontend_message`]) and checked ([`super::checks`]). Then it goes to the
//! handler ([`super::handler`]), with the rings paused that the table names for it. The interceptor itself answers the messages
//! that the handler would get wrong, SET_LOG_BASE, SET_CONFIG, SET_BACKEND_REQ_FD, GET_INFLIGHT_FD and SET_INFLIGHT_FD, and keeps
//! acknowledgements to itself that the front-end did not ask for. It tells the front-end when the disk has another capacity.
//!
//! ```text
//! front-end  <-- socket -->  interceptor  <-- socket -->  handler (its own thread)
//!                                 |                          |
//!                               rings                        |
//!                                 +-------- the vrings ------+
//! ```

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::SendFlags;
use sealblk_base::blame::Blame;
use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserLog};
use vm_memory::ByteValued;

use super::checks::{self, CheckError};
use super::config;
use super::dirty_log::DirtyLog;
use super::disk::Disk;
use super::foreign::Foreign;
use super::frontend_message::{FrontendMessage, Refused, Reply, Scope};
use super::handler::{Handler, HandlerError, NoResources};
use super::handover::Desk;
use super::inflight::{self, InflightMemory, MapError};
use super::message::{Incoming, Message, MessageError, Progress};
use super::record::Record;
use super::rings::Rings;
use super::sigbus;

/// How long the front-end may take over a message that it has begun.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long it may take over a reply, when the socket's buffer is full. Meanwhile the disk is neither locked nor stopped.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);

/// The configuration has changed (VHOST_USER_BACKEND_CONFIG_CHANGE_MSG): request 2, protocol version 1 and no wish for an answer, no
/// payload.
const CONFIG_CHANGED: [u8; 12] = {
    let ([r0, r1, r2, r3], [f0, f1, f2, f3]) = (2_u32.to_ne_bytes(), 1_u32.to_ne_bytes());
    [r0, r1, r2, r3, f0, f1, f2, f3, 0, 0, 0, 0]
};

/// Why a session ended, unless the front-end left.
#[derive(Debug, thiserror::Error)]
pub(super) enum InterceptError {
    #[error("messages cannot be waited for")]
    Wait(#[source] io::Error),
    #[error("the front-end does not speak vhost-user; give this socket to a vhost-user-blk device alone")]
    FrontEnd(#[source] MessageError),
    #[error("the front-end takes no reply: it hangs, or has ended")]
    Reply(#[source] io::Error),
    #[error(
        "guest memory is gone, or the log of a migration: its file was truncated, or there is no page left for it; look for free memory \
         and huge pages"
    )]
    MemoryLost,
    #[error(
        "the log of a migration cannot be mapped; descriptors, memory or mappings (vm.max_map_count) are exhausted"
    )]
    Log(#[source] io::Error),
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error(transparent)]
    Check(#[from] CheckError),
    #[error(transparent)]
    Handler(#[from] HandlerError),
    #[error(transparent)]
    Inflight(#[from] MapError),
    #[error(transparent)]
    Rings(#[from] NoResources),
}

impl InterceptError {
    /// Where the cause lies.
    pub(super) fn blame(&self) -> Blame {
        match self {
            Self::Wait(_) | Self::Log(_) | Self::Rings(_) => Blame::Host,
            Self::FrontEnd(error) => error.blame(),
            Self::Reply(_) | Self::Refused(_) => Blame::FrontEnd,
            // Of the host or of the front-end: both run by an operator, who reads what to look for.
            Self::MemoryLost => Blame::Operator,
            Self::Check(error) => error.blame(),
            Self::Handler(error) => error.blame(),
            Self::Inflight(error) => error.blame(),
        }
    }
}

/// How a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// The front-end has left.
    Left,
    /// Another process serves it on.
    HandedOver,
}

pub(super) struct Interceptor<'s> {
    front_end: &'s UnixStream,
    handler: Handler,
    disk: &'s Arc<Disk>,
    rings: &'s mut Rings,
    /// The protocol features that the front-end has agreed on.
    protocol: VhostUserProtocolFeatures,
    /// The socket for what a back-end has to say. It stays open: QEMU takes its end for an error. It is kept here, since the
    /// handler's type for it has no message of a changed configuration, and would close it where others can hold the close up.
    back_end_channel: Option<Foreign>,
    /// The capacity that the front-end asked for last.
    asked_capacity: Option<u64>,
    /// The capacity that was reported to it since rings are served.
    told_capacity: Option<u64>,
    record: Record,
    /// Where this session is asked for what another process needs to continue it.
    desk: &'s Desk<Vec<Message>>,
}

impl<'s> Interceptor<'s> {
    /// Of a front-end that has said nothing yet.
    pub(super) fn new(
        front_end: &'s UnixStream,
        handler: UnixStream,
        disk: &'s Arc<Disk>,
        rings: &'s mut Rings,
        desk: &'s Desk<Vec<Message>>,
    ) -> Result<Self, InterceptError> {
        Ok(Self {
            front_end,
            handler: Handler::new(handler)?,
            disk,
            rings,
            protocol: VhostUserProtocolFeatures::empty(),
            back_end_channel: None,
            asked_capacity: None,
            told_capacity: None,
            record: Record::default(),
            desk,
        })
    }

    /// Applies what the front-end has said to the process before this one; no ring is served yet.
    pub(super) fn repeat(&mut self, messages: Vec<Message>) -> Result<(), InterceptError> {
        self.rings.hold();
        for message in messages {
            let content = FrontendMessage::decode(&message)?;
            self.apply(message, &content)?;
        }
        Ok(self.rings.prepare().map_err(NoResources)?)
    }

    /// Passes messages between the front-end and the handler until one of them leaves, or another process serves the front-end. When it
    /// returns, each ring is stopped, and the handler ends.
    pub(super) fn relay(mut self) -> Result<Ended, InterceptError> {
        let result = self.rings.let_go().map_err(|error| NoResources(error).into());
        let result = result.and_then(|()| self.pass_messages());
        if matches!(result, Ok(Ended::HandedOver)) {
            return result;
        }
        // Before the handler goes, whose vrings they are.
        self.rings.leave();
        self.disk.front_end_left();
        result
    }

    fn pass_messages(&mut self) -> Result<Ended, InterceptError> {
        let mut incoming = Incoming::new(MESSAGE_TIMEOUT);
        let mut asked_for_queues = false;
        loop {
            self.tell_capacity();
            if !self.wait_for_bytes(&incoming)? {
                self.disk.take_change();
                if sigbus::is_lost() {
                    return Err(InterceptError::MemoryLost);
                }
                self.rings.start().map_err(NoResources)?;
            } else if self.advance(&mut incoming, &mut asked_for_queues)? {
                return Ok(Ended::Left);
            }
            if incoming.is_empty() && self.hand_over()? {
                return Ok(Ended::HandedOver);
            }
        }
    }

    /// Takes what the front-end has sent; tells whether it has left.
    fn advance(
        &mut self,
        incoming: &mut Incoming,
        asked_for_queues: &mut bool,
    ) -> Result<bool, InterceptError> {
        match incoming
            .advance(self.front_end)
            .map_err(InterceptError::FrontEnd)?
        {
            Progress::Message(message) => {
                let content = FrontendMessage::decode(&message)?;
                *asked_for_queues = matches!(content, FrontendMessage::GetQueueNum);
                self.handle(message, &content)?;
            }
            Progress::Waiting => {}
            Progress::End => {
                // A front-end that sends more after that answer leaves for another reason.
                if *asked_for_queues {
                    let queues = self.rings.count();
                    tracing::info!(
                        queues,
                        "it left when it heard how many queues there are; with more it may stay: --num-queues"
                    );
                }
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// If another process is to serve the front-end, gives what it needs, with no request in flight, and waits for the decision; whether
    /// this process leaves.
    fn hand_over(&mut self) -> Result<bool, InterceptError> {
        let Some(asked) = self.desk.take() else {
            return Ok(false);
        };
        self.rings.hold();
        self.rings.drop_engines();
        let finished = self.rings.check_finished();
        let messages = finished.and_then(|()| Ok(self.record.repeated(&self.rings.bases())?));
        if asked.answer(messages) {
            return Ok(true);
        }
        self.rings.let_go().map_err(NoResources)?;
        Ok(false)
    }

    /// Waits for the front-end, also in the middle of a message; it is not its turn if the disk was locked or unlocked.
    fn wait_for_bytes(&self, incoming: &Incoming) -> Result<bool, InterceptError> {
        let mut fds = [
            PollFd::new(self.disk.changed(), PollFlags::IN),
            PollFd::new(self.front_end, PollFlags::IN),
        ];
        match incoming.deadline().poll(&mut fds) {
            Ok(()) => Ok(fds[0].revents().is_empty()),
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                Err(InterceptError::FrontEnd(MessageError::Slow))
            }
            Err(error) => Err(InterceptError::Wait(error)),
        }
    }

    /// Has the front-end ask for the configuration if it knows another capacity than the disk has (VHOST_USER_BACKEND_CONFIG_CHANGE_MSG).
    /// A front-end that connects again does not ask by itself, and QEMU ignores it while the guest is stopped: sealblk
    /// repeats the message whenever rings are served again.
    fn tell_capacity(&mut self) {
        if !self.rings.any_is_served() {
            self.told_capacity = None;
            return;
        }
        let capacity = Some(self.disk.shown());
        if [self.asked_capacity, self.told_capacity].contains(&capacity)
            || !self.protocol.contains(VhostUserProtocolFeatures::CONFIG)
        {
            return;
        }
        let Some(channel) = &self.back_end_channel else {
            return;
        };
        // QEMU 7.2 can take the answer to a message of its own for the configuration, if it asks for that meanwhile.
        let mut fds = [PollFd::new(self.front_end, PollFlags::IN)];
        if poll(&mut fds, Some(&Timespec::default())) != Ok(0) {
            return;
        }
        match rustix::net::send(
            channel,
            &CONFIG_CHANGED,
            SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
        ) {
            Ok(_) => self.told_capacity = capacity,
            Err(error) => {
                tracing::debug!(%error, "the front-end does not take the message that the capacity has changed")
            }
        }
    }

    /// Checks a message, has it applied, and answers it.
    fn handle(&mut self, message: Message, content: &FrontendMessage) -> Result<(), InterceptError> {
        let wants_acknowledgement = message.needs_reply();
        let answer = self.apply(message, content)?;
        let is_wanted = match content.rule().reply {
            Reply::Data => true,
            Reply::Acknowledgement => {
                wants_acknowledgement && self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK)
            }
        };
        if is_wanted {
            let sent = answer.send(self.front_end, REPLY_TIMEOUT);
            sent.map_err(InterceptError::Reply)?;
        }
        Ok(())
    }

    /// Checks a message, has it applied, and gives the answer.
    fn apply(&mut self, mut message: Message, content: &FrontendMessage) -> Result<Message, InterceptError> {
        checks::check(&message, content, self.rings)?;
        let copy = Record::copy(&message, content).map_err(HandlerError::Descriptors)?;
        let body = message.body.clone();
        let answer = match content {
            FrontendMessage::SetLogBase(log) => self.set_log(&mut message, *log)?,
            FrontendMessage::SetConfig { offset, bytes } => self.set_config(&message, *offset, bytes),
            FrontendMessage::SetBackendReqFd => self.set_back_end_channel(&mut message)?,
            FrontendMessage::GetInflightFd(wanted) => self.make_inflight_memory(&message, wanted)?,
            FrontendMessage::SetInflightFd(kept) => self.set_inflight_memory(&mut message, kept)?,
            _ => self.handler.pass(message, content, self.rings)?,
        };
        match content {
            FrontendMessage::SetProtocolFeatures(features) => {
                let asked = VhostUserProtocolFeatures::from_bits_truncate(*features);
                self.protocol = asked & config::protocol_features();
            }
            FrontendMessage::GetConfig => self.asked_capacity = Some(self.disk.shown()),
            _ => {}
        }
        self.disk
            .set_agreed(self.rings.agreed().bits(), self.protocol.bits());
        self.record.keep(content, copy, &body);
        Ok(answer)
    }

    /// Writes to the configuration space. The handler would leave if it were refused, and it is the guest's to try.
    fn set_config(&self, message: &Message, offset: u32, bytes: &[u8]) -> Message {
        let result = config::write(self.rings.agreed(), offset, bytes);
        if let Err(error) = &result {
            let error: &dyn std::error::Error = error;
            tracing::debug!(error, "a write to the configuration space is refused");
        }
        message.reply(&u64::from(result.is_err()).to_ne_bytes())
    }

    /// Has writes to guest memory marked in another log. The handler would map it unchecked, and forget it with the next memory table.
    fn set_log(&mut self, message: &mut Message, place: VhostUserLog) -> Result<Message, InterceptError> {
        let is_agreed = self.protocol.contains(VhostUserProtocolFeatures::LOG_SHMFD);
        let file = message.take_fds().pop().filter(|_| is_agreed);
        let file = file.ok_or(Refused(message.number()))?;
        let log = DirtyLog::map(&file, place).map_err(InterceptError::Log)?;
        let mut paused = self.rings.pause(Scope::All);
        paused.log_to(log);
        paused.resume().map_err(NoResources)?;
        // QEMU takes any answer; the front-ends that use crate vhost, Cloud Hypervisor among them, take this one.
        Ok(message.reply(&message.body))
    }

    /// Makes memory for the front-end to keep, by which requests in flight are tracked.
    fn make_inflight_memory(
        &self,
        message: &Message,
        wanted: &VhostUserInflight,
    ) -> Result<Message, InterceptError> {
        let queues = self.tracked_queues(message, wanted)?;
        let memory = InflightMemory::create(queues)?;
        let made = VhostUserInflight::new(inflight::len_for(queues) as u64, 0, queues, wanted.queue_size);
        let body = made.as_slice().get(..message.body.len()).unwrap_or_default();
        Ok(message.reply(body).with_fd(memory))
    }

    fn set_inflight_memory(
        &mut self,
        message: &mut Message,
        kept: &VhostUserInflight,
    ) -> Result<Message, InterceptError> {
        let queues = self.tracked_queues(message, kept)?;
        let is_too_small = kept.mmap_size < inflight::len_for(queues) as u64;
        let memory = match message.take_fds().pop() {
            Some(memory) if !is_too_small => InflightMemory::map(memory, kept.mmap_offset, queues)?,
            _ => return Err(Refused(message.number()).into()),
        };
        let mut paused = self.rings.pause(Scope::All);
        paused.track_in(memory);
        paused.resume().map_err(NoResources)?;
        Ok(message.reply(&0_u64.to_ne_bytes()))
    }

    /// For how many queues a message has or wants memory. Their size makes no difference to what sealblk makes.
    fn tracked_queues(&self, message: &Message, memory: &VhostUserInflight) -> Result<u16, InterceptError> {
        let is_agreed = self.protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
        match memory.num_queues {
            queues if is_agreed && (1..=self.rings.count()).contains(&usize::from(queues)) => Ok(queues),
            _ => Err(Refused(message.number()).into()),
        }
    }

    fn set_back_end_channel(&mut self, message: &mut Message) -> Result<Message, InterceptError> {
        let is_agreed = self.protocol.contains(VhostUserProtocolFeatures::BACKEND_REQ);
        match message.take_fds().pop() {
            Some(socket) if is_agreed && message.body.is_empty() => self.back_end_channel = Some(socket),
            _ => return Err(Refused(message.number()).into()),
        }
        Ok(message.reply(&0_u64.to_ne_bytes()))
    }
}
