//! The interceptor: every message of the front-end passes here before vhost-user-backend's handler sees it.
//!
//! Some messages change what I/O stands on: a ring's addresses, its kick and call, the memory table, features,
//! whether it is enabled at all. The crate's handler applies them at once and tells us of few. So the interceptor stops the
//! rings that a message concerns, which drains them, lets the message through, waits until the handler has applied
//! it, and starts the rings that should run by then. A message that changes nothing of the kind just passes.
//!
//! To know when the handler is done the interceptor has it acknowledge each message (REPLY_ACK, "Communication"), and keeps
//! the acknowledgement to itself unless the front-end asked for one. What the handler would get wrong is answered here.
//!
//! ```text
//! front-end  <-- socket -->  interceptor  <-- socket -->  handler (its own thread)
//!                                 |                          |
//!                                 +-------- the vrings ------+
//! ```

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost::vhost_user::message::FrontendReq;

use super::config::{self, Agreed, ConfigError, NotOffered};
use super::disk::Disk;
use super::foreign::{Foreign, Kind};
use super::message::{Incoming, Message, MessageError, Progress};
use super::rings::{Rings, Scope};
use super::sigbus::{self, MAX_REGIONS};
use super::uring;

/// Why a session ended other than by the front-end's leave.
#[derive(Debug, thiserror::Error)]
pub(super) enum InterceptError {
    #[error("messages cannot be waited for")]
    Wait(#[source] io::Error),
    #[error("the front-end does not speak vhost-user; give this socket to a vhost-user-blk device alone")]
    FrontEnd(#[source] MessageError),
    #[error("the front-end takes no reply: it hangs, or has ended")]
    Reply(#[source] io::Error),
    #[error("{} is not valid, or asks for what was not offered; the front-end has to be a vhost-user-blk device, as of QEMU 7.2", named(*.0))]
    Refused(u32),
    #[error(transparent)]
    Features(#[from] NotOffered),
    #[error("{} has a descriptor that is not {wanted}: {found}", named(*.message))]
    Descriptor {
        message: u32,
        wanted: &'static str,
        found: String,
    },
    #[error(
        "guest memory is in {found}, which is neither a memfd, nor a file of tmpfs or hugetlbfs, nor a DAX device; take one of these \
         in its place, for a virtual NVDIMM, too: {SHARED}"
    )]
    MemoryFile { found: String },
    #[error("guest memory is in {found}, which the front-end has opened read-only; {SHARED}")]
    MemoryReadOnly { found: String },
    #[error("a memory region does not lie within its file, or is not made of whole huge pages; {SHARED}")]
    MemoryBeyondFile,
    #[error("a queue does not lie in guest memory that the front-end has shared; {SHARED}")]
    MemoryNotShared,
    #[error(
        "guest memory is gone: its file was truncated, or there is no page left for it; look for free memory and huge pages"
    )]
    MemoryLost,
    #[error("more than {MAX_REGIONS} memory regions; have fewer NUMA nodes or DIMMs")]
    TooManyRegions,
    #[error("queue {index} is one too many: there are {queues} (--num-queues)")]
    QueueIndex { index: usize, queues: usize },
    #[error("a queue of {0} descriptors, which is not a power of two")]
    QueueSize(u32),
    #[error("there is no room for the descriptors of a message; raise the limit on open files")]
    Descriptors(#[source] io::Error),
    #[error("a queue cannot be served: {}", match .0.raw_os_error() {
        Some(libc::ENOMEM | libc::EAGAIN | libc::EMFILE | libc::ENFILE) => uring::remedy(.0),
        _ => "descriptors, threads or memory are exhausted; raise their limits".into(),
    })]
    Rings(#[source] io::Error),
    #[error("the protocol handler cannot be reached")]
    Handler(#[source] io::Error),
}

/// How all of a guest's memory comes to be shared.
pub(super) const SHARED: &str = "all memory of the guest has to be shared: in QEMU, \"-object memory-backend-memfd,id=mem,size=SIZE,share=on \
     -machine memory-backend=mem\", and share=on for each NUMA node and DIMM; in libvirt, \
     \"<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>\"";

/// A message as the specification names it.
fn named(message: u32) -> String {
    FrontendReq::try_from(message).map_or_else(
        |_| format!("message {message} of the front-end"),
        |known| format!("message {known:?} of the front-end"),
    )
}

/// Passes messages between the front-end and the handler until one of them leaves. When it returns, every ring is
/// stopped.
pub(super) fn relay(
    front_end: &UnixStream,
    handler: &UnixStream,
    disk: &Disk,
    rings: &mut Rings,
) -> Result<(), InterceptError> {
    let result = pass_messages(front_end, handler, disk, rings);
    rings.stop(Scope::All);
    result
}

fn pass_messages(
    front_end: &UnixStream,
    handler: &UnixStream,
    disk: &Disk,
    rings: &mut Rings,
) -> Result<(), InterceptError> {
    agree_on_acknowledgements(handler)?;
    let mut last = None;
    // The protocol features that the front-end has agreed on.
    let mut protocol = VhostUserProtocolFeatures::empty();
    // Nothing is said on it yet, but it stays open: QEMU takes its end for an error.
    let mut _back_end_channel = None;
    let mut incoming = Incoming::new(MESSAGE_TIMEOUT);
    loop {
        if !wait_for_bytes(front_end, &incoming, disk)? {
            disk.take_change();
            if sigbus::is_lost() {
                return Err(InterceptError::MemoryLost);
            }
            rings.start().map_err(InterceptError::Rings)?;
            continue;
        }
        let mut message = match incoming.advance(front_end).map_err(InterceptError::FrontEnd)? {
            Progress::Message(message) => message,
            Progress::Waiting => continue,
            Progress::End => {
                // Whoever goes on after that answer leaves for another reason.
                if last == Some(FrontendReq::GET_QUEUE_NUM) {
                    let queues = rings.count();
                    tracing::info!(
                        queues,
                        "it left when it heard how many queues there are; with more it may stay: --num-queues"
                    );
                }
                return Ok(());
            }
        };
        last = message.code();
        check(&message, rings)?;
        let (asks, wants_acknowledgement) = (asks_for_data(&message), message.needs_reply());
        if message.code() == Some(FrontendReq::SET_PROTOCOL_FEATURES)
            && let Some(features) = message.number_in_body()
        {
            protocol = VhostUserProtocolFeatures::from_bits_truncate(features) & config::protocol_features();
            message.body = (features | REPLY_ACK).to_ne_bytes().to_vec();
        }
        if !asks {
            message.demand_reply();
        }
        let reply = if message.code() == Some(FrontendReq::SET_BACKEND_REQ_FD) {
            _back_end_channel = Some(back_end_channel(&mut message, protocol)?);
            message.reply(&0_u64.to_ne_bytes())
        } else {
            apply(handler, message, disk, rings)?
        };
        if asks || (protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) && wants_acknowledgement) {
            reply
                .send(front_end, REPLY_TIMEOUT)
                .map_err(InterceptError::Reply)?;
        }
    }
}

/// Waits for the front-end, also in the middle of a message; it is not its turn if the disk was locked or unlocked.
fn wait_for_bytes(front_end: &UnixStream, incoming: &Incoming, disk: &Disk) -> Result<bool, InterceptError> {
    let mut fds = [
        PollFd::new(disk.changed(), PollFlags::IN),
        PollFd::new(front_end, PollFlags::IN),
    ];
    match incoming.deadline().poll(&mut fds) {
        Ok(()) => Ok(fds[0].revents().is_empty()),
        Err(error) if error.kind() == io::ErrorKind::TimedOut => {
            Err(InterceptError::FrontEnd(MessageError::Slow))
        }
        Err(error) => Err(InterceptError::Wait(error)),
    }
}

/// Has a message applied, while the rings that it concerns are stopped.
fn apply(
    handler: &UnixStream,
    mut message: Message,
    disk: &Disk,
    rings: &mut Rings,
) -> Result<Message, InterceptError> {
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
        rings.start().map_err(InterceptError::Rings)?;
    }
    Ok(reply)
}

/// The socket for what a back-end has to say. We keep it ourselves: the handler would close it where others can hold it up.
fn back_end_channel(
    message: &mut Message,
    protocol: VhostUserProtocolFeatures,
) -> Result<Foreign, InterceptError> {
    match message.take_fds().pop() {
        Some(socket)
            if protocol.contains(VhostUserProtocolFeatures::BACKEND_REQ) && message.body.is_empty() =>
        {
            Ok(socket)
        }
        _ => Err(InterceptError::Refused(message.number())),
    }
}

/// Refuses what the handler would accept, or accept and ignore, and we cannot live with.
fn check(message: &Message, rings: &Rings) -> Result<(), InterceptError> {
    check_descriptors(message)?;
    if let Some(Scope::One(index @ 0..=0xff)) = scope_of(message)
        && index >= rings.count()
    {
        let queues = rings.count();
        return Err(InterceptError::QueueIndex { index, queues });
    }
    match message.code() {
        Some(FrontendReq::SET_MEM_TABLE | FrontendReq::ADD_MEM_REG) if !regions_are_mappable(message) => {
            Err(InterceptError::MemoryBeyondFile)
        }
        Some(FrontendReq::ADD_MEM_REG) if rings.memory_regions() >= MAX_REGIONS => {
            Err(InterceptError::TooManyRegions)
        }
        Some(FrontendReq::SET_VRING_NUM) => match message.body.as_slice() {
            // The ring's index, then its size.
            &[_, _, _, _, s0, s1, s2, s3] => match u32::from_ne_bytes([s0, s1, s2, s3]) {
                size if size.is_power_of_two() => Ok(()),
                size => Err(InterceptError::QueueSize(size)),
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

/// Refuses descriptors of another kind than the message has. Nothing else is done with a descriptor before.
fn check_descriptors(message: &Message) -> Result<(), InterceptError> {
    let wrong = |fd: &Foreign, wanted| InterceptError::Descriptor {
        message: message.number(),
        wanted,
        found: fd.name(),
    };
    message
        .fds()
        .iter()
        .try_for_each(|fd| match (message.code(), fd.kind()) {
            (
                Some(FrontendReq::SET_MEM_TABLE | FrontendReq::ADD_MEM_REG | FrontendReq::REM_MEM_REG),
                Kind::Memory | Kind::Dax { .. },
            ) => match fd.is_writable() {
                true => Ok(()),
                false => Err(InterceptError::MemoryReadOnly { found: fd.name() }),
            },
            (Some(FrontendReq::SET_MEM_TABLE | FrontendReq::ADD_MEM_REG | FrontendReq::REM_MEM_REG), _) => {
                Err(InterceptError::MemoryFile { found: fd.name() })
            }
            (
                Some(FrontendReq::SET_VRING_KICK | FrontendReq::SET_VRING_CALL | FrontendReq::SET_VRING_ERR),
                Kind::Event,
            )
            | (Some(FrontendReq::SET_BACKEND_REQ_FD), Kind::Socket) => Ok(()),
            (
                Some(FrontendReq::SET_VRING_KICK | FrontendReq::SET_VRING_CALL | FrontendReq::SET_VRING_ERR),
                _,
            ) => Err(wrong(fd, "an eventfd")),
            (Some(FrontendReq::SET_BACKEND_REQ_FD), _) => Err(wrong(fd, "a Unix stream socket")),
            _ => Err(InterceptError::Refused(message.number())),
        })
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

/// Whether each memory region of a message lies within its file, and is made of whole pages of it: to touch what lies beyond
/// would be a SIGBUS, and a part of a huge page cannot be unmapped.
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
        let (size, offset) = (field(8), field(24));
        let end = size.checked_add(offset);
        let within = |len| end.is_some_and(|end| end <= len);
        match fd.kind() {
            Kind::Memory => huge_page(fd).is_some_and(|page| {
                rustix::fs::fstat(fd).is_ok_and(|stat| within(stat.st_size as u64))
                    && size.is_multiple_of(page)
                    && offset.is_multiple_of(page)
            }),
            Kind::Dax { size } => within(size),
            _ => false,
        }
    })
}

/// The size of the huge pages that a memory file is made of; 1 if it is not.
fn huge_page(file: &Foreign) -> Option<u64> {
    let stat = rustix::fs::fstatfs(file).ok()?;
    match stat.f_type {
        HUGETLBFS_MAGIC => u64::try_from(stat.f_bsize).ok().filter(|page| *page > 0),
        _ => Some(1),
    }
}

/// What statfs(2) says of hugetlbfs.
const HUGETLBFS_MAGIC: libc::__fsword_t = 0x9584_58f6;

/// How long the front-end may take over a message that it has begun.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long it may take over a reply, when the socket's buffer is full. Meanwhile the disk is neither locked nor stopped.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the handler may take over a message. It only maps memory and keeps notes; should it ever wait for something,
/// the session ends instead of waiting with it.
const HANDLER_TIMEOUT: Duration = Duration::from_secs(10);

const REPLY_ACK: u64 = VhostUserProtocolFeatures::REPLY_ACK.bits();

/// Has the handler acknowledge messages from the first one on, whatever the front-end will want.
fn agree_on_acknowledgements(handler: &UnixStream) -> Result<(), InterceptError> {
    // The handler accepts protocol features once it has been asked for its features.
    ask(handler, Message::request(FrontendReq::GET_FEATURES, &[]))?;
    let mut features = Message::request(FrontendReq::SET_PROTOCOL_FEATURES, &REPLY_ACK.to_ne_bytes());
    features.demand_reply();
    ask(handler, features)?;
    Ok(())
}

fn ask(handler: &UnixStream, message: Message) -> Result<Message, InterceptError> {
    let number = message.number();
    let is_acknowledged = message.needs_reply() && !asks_for_data(&message);
    // The handler would lose descriptors that it has no room for without a word, and wait for the next message.
    message.duplicate_fds().map_err(InterceptError::Descriptors)?;
    message
        .send(handler, HANDLER_TIMEOUT)
        .map_err(|_| refused(number))?;
    match Message::receive(handler, HANDLER_TIMEOUT) {
        // It leaves then too.
        Ok(Some(reply)) if is_acknowledged && reply.number_in_body() != Some(0) => Err(refused(number)),
        Ok(Some(reply)) if reply.replies_to(number) => Ok(reply),
        // The handler leaves when it does not like a message.
        Ok(None) | Err(MessageError::Cut) => Err(refused(number)),
        Ok(Some(_)) => Err(InterceptError::Handler(io::ErrorKind::InvalidData.into())),
        Err(MessageError::Io(error)) if error.kind() == io::ErrorKind::ConnectionReset => {
            Err(refused(number))
        }
        Err(error) => Err(InterceptError::Handler(io::Error::other(error))),
    }
}

/// What is wrong with a message that the handler does not like.
fn refused(message: u32) -> InterceptError {
    match FrontendReq::try_from(message) {
        Ok(FrontendReq::SET_VRING_ADDR) => InterceptError::MemoryNotShared,
        _ => InterceptError::Refused(message),
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
