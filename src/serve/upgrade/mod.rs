//! Upgrade in place: another process, of another version, continues to serve a disk, and neither guest nor front-end connects again.
//!
//! ```text
//! sealblk upgrade              the process that serves             the next process
//!   Begin       ------------>  its arguments, its log
//!   starts  ------------------------------------------------------>  opens the disk, gets the key,
//!                                                                     enters its sandbox
//!                              what the guest sees    <-- Prepare --  compares it with its own
//!                              stops the rings        <-- HandOver -
//!                              state, locks, sockets, messages ---->  applies them
//!                                                     <------ ready
//!                              go --------------------------------->  serves
//!                              ends
//!   prints  <------------------------------------------------------  "serving"
//! ```
//!
//! All that takes time or can fail without the old process comes before `HandOver`. From there to "go" the guest's requests wait.
//!
//! **One of the two serves.** The old process decides, by "go". Before that it can continue at any time, and says so ("stop") before it
//! starts a ring; the new one ends then. After that it does no I/O any more. If the connection ends without either, the new one serves if
//! the old one has ended, and else ends itself. The old process sends the locks when nothing of it is in flight any more. So the new one
//! has nothing to wait for, and if the old one is killed from then on, nothing is lost.
//!
//! **Locks.** The descriptions that hold the locks go to the new process: both hold them for a while, and no third process gets in. Until
//! "go" they are the old one's, then the new one's: the other one closes them without unlocking.
//!
//! **Versions.** A release says which versions of the handover it understands, and the latest that both do is taken. In the JSON objects
//! of a message, unknown fields are ignored. A message whose number is in [`IGNORABLE`] may be ignored; any other unknown one is refused.
//!
//! **Rights.** The new process gets guest memory, and with it all that the guest knows. So only root, and the user that the old process
//! runs as, can ask for it; no grant gives the right to others. The other way round, what the old process answers decides what is
//! executed, and with what environment. So both sides of `sealblk upgrade` ask only a process of their own user ([`connect`]): the kernel
//! says who has made the socket, and no answer is needed for that.

mod giver;
mod taker;

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::attachment::{HeaderClaimPast, KeyState};
use crate::control::peer::credentials;
use crate::control::wire::Connection;
use crate::device::{ClaimPast, Guise, Message};
use crate::parsing;
use crate::timestamp::Timestamp;

pub use giver::{Giver, Origin};
#[cfg(any(test, fuzzing))]
pub(crate) use taker::received;
pub use taker::{TakeError, Taker};

/// The interface's name.
pub const INTERFACE: &str = "org.sealblk.Upgrade";

/// The versions of the handover that this release understands.
const VERSIONS: [u32; 1] = [1];

/// Why there is no way to the process that serves the disk.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(
        "the disk is served as user {served}, and this is user {own}: run `sealblk upgrade` as that user"
    )]
    OtherUser { served: u32, own: u32 },
}

/// Connects to the control socket of the process that serves a disk, if that is of the same user. Nothing is sent to one that is not.
///
/// # Errors
/// [`ConnectError`].
pub fn connect(socket: &Path, timeout: Duration) -> Result<Connection, ConnectError> {
    let connection = Connection::to(socket, timeout)?;
    let served = credentials(connection.stream())?.uid;
    let own = rustix::process::geteuid().as_raw();
    match served == own {
        true => Ok(connection),
        false => Err(ConnectError::OtherUser { served, own }),
    }
}

/// What `Begin` answers. Texts that may be no UTF-8 are in hexadecimal.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Begun {
    /// Names this attempt: a later one, or `End`, puts an end to it.
    pub upgrade: u64,
    /// The process that serves the disk, and its effective user.
    pub process: u32,
    pub user: u32,
    /// Its release.
    pub version: String,
    /// The arguments that it was started with, its own name first.
    pub arguments: Vec<String>,
    /// The directory that it was started in.
    pub directory: String,
    /// What it found in its environment of what sealblk looks at, as NAME=VALUE.
    pub environment: Vec<String>,
    /// Whether the passphrase comes from a source that can be read once only.
    pub reads_once: bool,
}

/// Of the environment: what sealblk, its key helper and its log look at.
pub const ENVIRONMENT: [&str; 10] = [
    "CREDENTIALS_DIRECTORY",
    "HOME",
    "JOURNAL_STREAM",
    "NOTIFY_SOCKET",
    "SEALBLK_CONFIG",
    "SEALBLK_LOG",
    "SEALBLK_STATE_DIR",
    "TMPDIR",
    "WATCHDOG_USEC",
    "XDG_STATE_HOME",
];

/// `Prepare`, as the interface has it.
#[derive(Debug, Serialize, Deserialize)]
struct Prepare {
    upgrade: u64,
    versions: Vec<u32>,
}

/// What it answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Prepared {
    version: u32,
    /// The process that serves, and its release. The peer of its socket is the process that has bound the socket, which may be an earlier
    /// one.
    process: u32,
    release: String,
    guest: Guise,
    key: KeyState,
    /// The names of the two listening sockets, by device and inode.
    sockets: Names,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Names {
    front_ends: Option<(u64, u64)>,
    control: Option<(u64, u64)>,
}

/// `HandOver`, as the interface has it, and `End`.
#[derive(Debug, Serialize, Deserialize)]
struct HandOver {
    upgrade: u64,
    #[serde(default)]
    version: u32,
}

/// How the disk is, at the begin of a handover.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct State {
    key: KeyState,
    is_claimed: bool,
    was_claimed: bool,
    /// See [`ClaimPast`]. An earlier release does not tell.
    #[serde(default)]
    is_used: Option<bool>,
    #[serde(default)]
    guest_ran: Option<bool>,
    has_loss: bool,
    /// An earlier release does not tell.
    #[serde(default)]
    header_claims: Option<HeaderClaimPast>,
    /// Since when a front-end is connected.
    front_end: Option<Timestamp>,
}

impl State {
    fn claim(&self) -> ClaimPast {
        ClaimPast {
            is_claimed: self.is_claimed,
            was_claimed: self.was_claimed,
            // It may have run by then.
            is_used: self.is_used.unwrap_or(true),
            guest_ran: self.guest_ran.unwrap_or(self.was_claimed),
        }
    }
}

/// Locks on a part of the disk.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Locks {
    /// Whether it is a part of the header's file, where that is detached.
    of_header: bool,
    range: Range<u64>,
    is_exclusive: bool,
}

/// The next process, when it is ready.
#[derive(Debug, Serialize, Deserialize)]
struct Next {
    process: u32,
}

/// The numbers of the messages of a handover, which are far above those of front-ends. A message of a front-end is repeated as it was.
const STATE: u32 = 0x5ea1_0001;
const LOCKS: u32 = 0x5ea1_0002;
const LISTENER: u32 = 0x5ea1_0003;
const CONTROL: u32 = 0x5ea1_0004;
const CONNECTION: u32 = 0x5ea1_0005;
const END: u32 = 0x5ea1_0006;
const READY: u32 = 0x5ea1_0007;
const GO: u32 = 0x5ea1_0008;
const STOP: u32 = 0x5ea1_0009;
/// Those of front-ends are below.
const OWN: u32 = 0x5ea1_0000;
/// Those that a release may send to one that does not know them.
const IGNORABLE: Range<u32> = 0x5ea2_0000..0x5ea3_0000;

/// How long one of the two waits for the other from `HandOver` to "go". The guest's requests wait as long.
const LIMIT: Duration = Duration::from_secs(5);

/// A message with a JSON object, and with descriptors.
fn message(number: u32, content: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<Message> {
    let body = serde_json::to_vec(content)?;
    let fds = fds.iter().map(|fd| fd.try_clone_to_owned());
    Ok(Message::own(number, body, fds.collect::<io::Result<_>>()?))
}

/// What a message holds.
fn content<T: DeserializeOwned>(message: &Message) -> io::Result<T> {
    parsing::json(&message.body).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

fn send(
    stream: &UnixStream,
    number: u32,
    content: &impl Serialize,
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    message(number, content, fds)?.send(stream, LIMIT)
}

/// Sends a message that only has a number.
fn say(stream: &UnixStream, number: u32) -> io::Result<()> {
    send(stream, number, &Value::Object(serde_json::Map::new()), &[])
}

fn borrowed(fds: &[impl AsFd]) -> Vec<BorrowedFd<'_>> {
    fds.iter().map(AsFd::as_fd).collect()
}
