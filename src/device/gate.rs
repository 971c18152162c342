//! The gate: every message of the front-end passes here before vhost-user-backend's handler sees it.
//!
//! Some messages change what I/O stands on: a ring's addresses, its kick and call, the memory table, features,
//! whether it is enabled at all. The crate's handler applies them at once and tells us of few. So the gate stops the
//! rings that a message concerns, which drains them, lets the message through, waits until the handler has applied
//! it, and starts the rings that should run by then. A message that changes nothing of the kind just passes.
//!
//! To know when the handler is done the gate has it acknowledge each message (REPLY_ACK, "Communication"), and keeps
//! the acknowledgement to itself unless the front-end asked for one. What the handler would get wrong is answered here.
//!
//! ```text
//! front-end  <-- socket -->  gate  <-- socket -->  handler (its own thread)
//!                             |                       |
//!                             +------ the vrings -----+
//! ```

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::fs::FileType;
use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost::vhost_user::message::FrontendReq;

use super::config::{self, Agreed, ConfigError, NotOffered};
use super::disk::Disk;
use super::message::{Incoming, Message, MessageError, Progress};
use super::rings::{Rings, Scope};
use super::sigbus::MAX_REGIONS;

/// Why a session ended other than by the front-end's leave.
#[derive(Debug, thiserror::Error)]
pub(super) enum GateError {
    #[error("messages cannot be waited for")]
    Wait(#[source] io::Error),
    #[error("the front-end does not speak vhost-user")]
    FrontEnd(#[source] MessageError),
    #[error("the front-end takes no reply")]
    Reply(#[source] io::Error),
    #[error("message {0} of the front-end is not valid or not offered")]
    Refused(u32),
    #[error(transparent)]
    Features(#[from] NotOffered),
    #[error("a memory region reaches beyond the end of its file")]
    MemoryBeyondFile,
    #[error("more than {MAX_REGIONS} memory regions")]
    TooManyRegions,
    #[error("queue {index} is one too many: there are {queues} (--num-queues)")]
    QueueIndex { index: usize, queues: usize },
    #[error("a queue of {0} descriptors, which is not a power of two")]
    QueueSize(u32),
    #[error("there is no room for the descriptors of a message")]
    Descriptors(#[source] io::Error),
    #[error("a queue cannot be served: descriptors, threads or memory are exhausted")]
    Rings(#[source] io::Error),
    #[error("the protocol handler cannot be reached")]
    Handler(#[source] io::Error),
}

/// Passes messages between the front-end and the handler until one of them leaves. When it returns, every ring is
/// stopped.
pub(super) fn relay(
    front_end: &UnixStream,
    handler: &UnixStream,
    disk: &Disk,
    rings: &mut Rings,
) -> Result<(), GateError> {
    let result = pass_messages(front_end, handler, disk, rings);
    rings.stop(Scope::All);
    result
}

fn pass_messages(
    front_end: &UnixStream,
    handler: &UnixStream,
    disk: &Disk,
    rings: &mut Rings,
) -> Result<(), GateError> {
    agree_on_acknowledgements(handler)?;
    // Whether the front-end has agreed on them.
    let mut acknowledging = false;
    let (mut asked_for_queues, mut agreed) = (false, false);
    let mut incoming = Incoming::new(MESSAGE_TIMEOUT);
    loop {
        if !wait_for_bytes(front_end, &incoming, disk)? {
            disk.take_change();
            rings.start().map_err(GateError::Rings)?;
            continue;
        }
        let mut message = match incoming.advance(front_end).map_err(GateError::FrontEnd)? {
            Progress::Message(message) => message,
            Progress::Waiting => continue,
            Progress::End => {
                if asked_for_queues && !agreed {
                    let queues = rings.count();
                    tracing::info!(
                        queues,
                        "it left when it heard how many queues there are; with more it may stay: --num-queues"
                    );
                }
                return Ok(());
            }
        };
        asked_for_queues |= message.code() == Some(FrontendReq::GET_QUEUE_NUM);
        agreed |= message.code() == Some(FrontendReq::SET_FEATURES);
        check(&message, rings)?;
        let (asks, wants_acknowledgement) = (asks_for_data(&message), message.needs_reply());
        if message.code() == Some(FrontendReq::SET_PROTOCOL_FEATURES)
            && let Some(features) = message.number_in_body()
        {
            acknowledging = features & REPLY_ACK != 0;
            message.body = (features | REPLY_ACK).to_ne_bytes().to_vec();
        }
        if !asks {
            message.demand_reply();
        }
        let reply = apply(handler, message, disk, rings)?;
        if asks || (acknowledging && wants_acknowledgement) {
            reply.send(front_end, REPLY_TIMEOUT).map_err(GateError::Reply)?;
        }
    }
}

/// Waits for the front-end, also in the middle of a message; it is not its turn if the disk was locked or unlocked.
fn wait_for_bytes(front_end: &UnixStream, incoming: &Incoming, disk: &Disk) -> Result<bool, GateError> {
    let mut fds = [
        PollFd::new(disk.changed(), PollFlags::IN),
        PollFd::new(front_end, PollFlags::IN),
    ];
    match incoming.deadline().poll(&mut fds) {
        Ok(()) => Ok(fds[0].revents().is_empty()),
        Err(error) if error.kind() == io::ErrorKind::TimedOut => Err(GateError::FrontEnd(MessageError::Slow)),
        Err(error) => Err(GateError::Wait(error)),
    }
}

/// Has a message applied, while the rings that it concerns are stopped.
fn apply(
    handler: &UnixStream,
    mut message: Message,
    disk: &Disk,
    rings: &mut Rings,
) -> Result<Message, GateError> {
    let (code, scope) = (message.code(), scope_of(&message));
    if let Some(scope) = scope {
        rings.stop(scope);
    }
    let reply = match (code, message.number_in_body()) {
        (Some(FrontendReq::SET_CONFIG), _) => set_config(rings.agreed(), &message),
        (Some(FrontendReq::SET_FEATURES), Some(features)) => {
            let agreed = Agreed::on(features, disk)?;
            message.body = agreed.offered().to_ne_bytes().to_vec();
            let reply = ask(handler, message)?;
            rings.agree(agreed);
            reply
        }
        _ => ask(handler, message)?,
    };
    if changes_memory(code) {
        rings.memory_changed();
    }
    if scope.is_some() {
        rings.start().map_err(GateError::Rings)?;
    }
    Ok(reply)
}

/// Refuses what the handler would accept, or accept and ignore, and we cannot live with.
fn check(message: &Message, rings: &Rings) -> Result<(), GateError> {
    if let Some(Scope::One(index @ 0..=0xff)) = scope_of(message)
        && index >= rings.count()
    {
        let queues = rings.count();
        return Err(GateError::QueueIndex { index, queues });
    }
    match message.code() {
        Some(FrontendReq::SET_MEM_TABLE | FrontendReq::ADD_MEM_REG) if !regions_are_mappable(message) => {
            Err(GateError::MemoryBeyondFile)
        }
        Some(FrontendReq::ADD_MEM_REG) if rings.memory_regions() >= MAX_REGIONS => {
            Err(GateError::TooManyRegions)
        }
        Some(FrontendReq::SET_VRING_NUM) => match message.body.as_slice() {
            // The ring's index, then its size.
            &[_, _, _, _, s0, s1, s2, s3] => match u32::from_ne_bytes([s0, s1, s2, s3]) {
                size if size.is_power_of_two() => Ok(()),
                size => Err(GateError::QueueSize(size)),
            },
            _ => Ok(()),
        },
        Some(FrontendReq::SET_VRING_KICK)
            if message.number_in_body().is_some_and(|number| number & NO_FD != 0) =>
        {
            tracing::warn!(
                "a queue without a kick has to be polled, which sealblk does not do: it is not served"
            );
            Ok(())
        }
        _ => Ok(()),
    }
}

/// The flag of a message about a ring's descriptor that there is none.
const NO_FD: u64 = 1 << 8;

fn changes_memory(code: Option<FrontendReq>) -> bool {
    use FrontendReq::{ADD_MEM_REG, REM_MEM_REG, SET_MEM_TABLE};
    matches!(code, Some(SET_MEM_TABLE | ADD_MEM_REG | REM_MEM_REG))
}

/// Writes to the configuration space. The handler would leave if it were refused, and it is the guest's to try.
fn set_config(agreed: Agreed, message: &Message) -> Message {
    // offset, size and flags, each of 32 bits, then the bytes ("Virtio device config space").
    let result = match message.body.as_slice() {
        [o0, o1, o2, o3, s0, s1, s2, s3, _, _, _, _, bytes @ ..]
            if u32::from_ne_bytes([*s0, *s1, *s2, *s3]) as usize == bytes.len() =>
        {
            config::write(agreed, u32::from_ne_bytes([*o0, *o1, *o2, *o3]), bytes)
        }
        body => Err(ConfigError::Malformed { len: body.len() }),
    };
    if let Err(error) = &result {
        let error: &dyn std::error::Error = error;
        tracing::debug!(error, "a write to the configuration space is refused");
    }
    message.reply(&u64::from(result.is_err()).to_ne_bytes())
}

/// Whether each memory region of a message lies within its file: to touch what lies beyond would be a SIGBUS.
fn regions_are_mappable(message: &Message) -> bool {
    // A number of regions or padding, 64 bits in all, then the regions: guest address, size, user address, offset in
    // the file, each of 64 bits ("Memory regions description", "Single memory region description"). What else may be
    // wrong with them the handler finds.
    let regions = message.body.get(8..).unwrap_or_default();
    regions.chunks_exact(32).zip(message.fds()).all(|(region, fd)| {
        let field = |at: usize| {
            region[at..]
                .first_chunk()
                .copied()
                .map_or(u64::MAX, u64::from_ne_bytes)
        };
        let end = field(8).checked_add(field(24));
        rustix::fs::fstat(fd).is_ok_and(|stat| {
            // A device for persistent memory has no size that fstat(2) would tell.
            FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile
                || end.is_some_and(|end| end <= stat.st_size as u64)
        })
    })
}

/// How long the front-end may take over a message that it has begun.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long it may take over a reply, when the socket's buffer is full. Meanwhile the disk is neither locked nor stopped.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the handler may take over a message. It only maps memory and keeps notes; should it ever wait for something,
/// the session ends instead of waiting with it.
const HANDLER_TIMEOUT: Duration = Duration::from_secs(10);

const REPLY_ACK: u64 = VhostUserProtocolFeatures::REPLY_ACK.bits();

/// Has the handler acknowledge messages from the first one on, whatever the front-end will want.
fn agree_on_acknowledgements(handler: &UnixStream) -> Result<(), GateError> {
    // The handler accepts protocol features once it has been asked for its features.
    ask(handler, Message::request(FrontendReq::GET_FEATURES, &[]))?;
    let mut features = Message::request(FrontendReq::SET_PROTOCOL_FEATURES, &REPLY_ACK.to_ne_bytes());
    features.demand_reply();
    ask(handler, features)?;
    Ok(())
}

fn ask(handler: &UnixStream, message: Message) -> Result<Message, GateError> {
    let number = message.number();
    // The handler would lose descriptors that it has no room for without a word, and wait for the next message.
    message.duplicate_fds().map_err(GateError::Descriptors)?;
    message
        .send(handler, HANDLER_TIMEOUT)
        .map_err(|_| GateError::Refused(number))?;
    match Message::receive(handler, HANDLER_TIMEOUT) {
        Ok(Some(reply)) if reply.replies_to(number) => Ok(reply),
        // The handler leaves when it does not like a message.
        Ok(None) | Err(MessageError::Cut) => Err(GateError::Refused(number)),
        Ok(Some(_)) => Err(GateError::Handler(io::ErrorKind::InvalidData.into())),
        Err(MessageError::Io(error)) if error.kind() == io::ErrorKind::ConnectionReset => {
            Err(GateError::Refused(number))
        }
        Err(error) => Err(GateError::Handler(io::Error::other(error))),
    }
}

/// Whether the answer to a message is data, which the handler sends without being asked to acknowledge.
fn asks_for_data(message: &Message) -> bool {
    matches!(
        message.code(),
        Some(
            FrontendReq::GET_FEATURES
                | FrontendReq::GET_PROTOCOL_FEATURES
                | FrontendReq::GET_QUEUE_NUM
                | FrontendReq::GET_MAX_MEM_SLOTS
                | FrontendReq::GET_CONFIG
                | FrontendReq::GET_VRING_BASE
        )
    )
}

/// Which rings have to be stopped while a message is applied; none for one that no I/O stands on.
fn scope_of(message: &Message) -> Option<Scope> {
    match message.code()? {
        FrontendReq::GET_FEATURES
        | FrontendReq::GET_PROTOCOL_FEATURES
        | FrontendReq::SET_PROTOCOL_FEATURES
        | FrontendReq::GET_QUEUE_NUM
        | FrontendReq::GET_MAX_MEM_SLOTS
        | FrontendReq::GET_CONFIG
        | FrontendReq::SET_CONFIG
        | FrontendReq::SET_BACKEND_REQ_FD
        | FrontendReq::SET_OWNER => None,
        FrontendReq::SET_VRING_NUM
        | FrontendReq::SET_VRING_ADDR
        | FrontendReq::SET_VRING_BASE
        | FrontendReq::GET_VRING_BASE
        | FrontendReq::SET_VRING_ENABLE => Some(Scope::One(index(message, u32::MAX))),
        // The index shares its number with a flag for "no descriptor".
        FrontendReq::SET_VRING_KICK | FrontendReq::SET_VRING_CALL | FrontendReq::SET_VRING_ERR => {
            Some(Scope::One(index(message, 0xff)))
        }
        _ => Some(Scope::All),
    }
}

/// The ring that a message names in its first 32 bits.
fn index(message: &Message, mask: u32) -> usize {
    match message.body.first_chunk() {
        Some(bytes) => (u32::from_ne_bytes(*bytes) & mask) as usize,
        // The handler will refuse it, and no ring has this number.
        None => usize::MAX,
    }
}
