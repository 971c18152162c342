//! The process that reads the headers of volumes for this one.
//!
//! Other users name the volumes and can write their headers, and this process, often the agent, holds KEKs. So it neither opens
//! such a file nor parses a header. It executes its own program with a hidden verb, and the new process answers over a pair of
//! sockets ([`process`] is its side). The two share nothing but the user: the new one begins without the memory, the environment
//! and the descriptors of this one. An answer has at most [`LONGEST`] bytes, is parsed strictly, and brings no descriptors.
//!
//! Each header is read by a process of its own, so that a hostile one decides nothing about another volume. If it does not answer in time, the probe abandons it. It can wait
//! for [`LEFT_ALONE`] longer: until it ends, no other process is started for its path, and once the path answers, it ends. After
//! that time it is killed. If the kernel cannot end it, it keeps its seat in the pool until the path answers. So the number of
//! these processes is limited.

mod process;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::net::{RecvAncillaryBuffer, SendAncillaryBuffer};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::deadline::{self, Deadline};
use crate::harmless::harmless;
use crate::keys::binding::Bindings;
use crate::parsing;
use crate::path_text::{from_text, to_text};
use crate::probe::{LIMIT, Looker, Lost, Pool, Probe, Seat};

pub(crate) use process::run;

static POOL: Pool = Pool::new();

/// How long the process may take to begin, on a host that has much else to do.
const START: Duration = Duration::from_secs(30);
/// How long a process that does not answer is left alone.
const LEFT_ALONE: Duration = Duration::from_secs(60);
/// The longest message.
const LONGEST: usize = 64 << 10;
/// The stack of the thread that waits for the process, and does little else.
const STACK: usize = 128 << 10;

/// What is asked. Paths are absolute.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Question {
    /// To wait until this file system answers.
    Mount(String),
    /// Whether nothing is at a path.
    Missing(String),
    /// What is at a path.
    Header(String, Caution),
    /// The path without links, if it can be told.
    Canonical(String),
}

/// How a path is looked at, which is done with the rights of this process, whichever user has named it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Caution {
    /// The owner of the state directory has named it.
    None,
    /// Another user has: no device is opened where that may do something.
    Others,
}

/// What is at a path.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Found {
    Volume(Bindings),
    Missing,
    /// What is there is no volume, and was not damaged into that.
    NoVolume,
    /// It cannot be told, and why.
    Nothing(String),
}

/// The process, until this is dropped.
#[derive(Debug)]
pub(super) struct Reader {
    stream: UnixStream,
    /// How long the thread that waits for it leaves it alone. If it hears nothing: not at all.
    patience: Sender<Duration>,
}

impl Reader {
    pub(super) fn probe() -> Probe<Self> {
        Probe::of(&POOL)
    }

    /// Whether nothing is there. No content is read for that.
    pub(super) fn is_missing(&mut self, path: &Path) -> Result<bool, Lost> {
        self.ask(&Question::Missing(text_of(path)))
    }

    pub(super) fn header(&mut self, path: &Path, caution: Caution) -> Result<Found, Lost> {
        Ok(match self.ask(&Question::Header(text_of(path), caution))? {
            Found::Nothing(why) => Found::Nothing(harmless(&why, 1024)),
            found => found,
        })
    }

    /// The path without links, if it can be told.
    pub(super) fn canonical(&mut self, path: &Path) -> Result<Option<PathBuf>, Lost> {
        let canonical: Option<String> = self.ask(&Question::Canonical(text_of(path)))?;
        Ok(canonical.map(|text| from_text(&text)))
    }

    fn ask<T: DeserializeOwned>(&mut self, question: &Question) -> Result<T, Lost> {
        let deadline = Deadline::after(LIMIT);
        let answer = send(&self.stream, question, deadline).and_then(|()| receive(&self.stream, deadline));
        answer.map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut => {
                // Without the thread there is no process either.
                let _ = self.patience.send(LEFT_ALONE);
                Lost::Waits
            }
            _ => Lost::Failed,
        })
    }
}

impl Looker for Reader {
    fn start(seat: Seat) -> io::Result<Self> {
        let (stream, theirs) = UnixStream::pair()?;
        let watched = stream.try_clone()?;
        let (started, has_started) = mpsc::sync_channel(1);
        let (patience, left_alone) = mpsc::channel();
        // The kernel kills the process when the thread ends that has started it.
        let watch = move || {
            let _seat = seat;
            let mut child = match start(theirs.into()) {
                Ok(child) => child,
                Err(error) => return drop(started.send(Err(error))),
            };
            let _ = started.send(Ok(()));
            let patience = left_alone.recv().unwrap_or_default();
            let _ = Deadline::after(patience).poll(&mut [PollFd::new(&watched, PollFlags::IN)]);
            drop(watched);
            // It may have ended.
            let _ = child.kill();
            let _ = child.wait();
        };
        let thread = thread::Builder::new().name("reader".into()).stack_size(STACK);
        thread.spawn(watch)?;
        let too_slow = |_| io::Error::from(io::ErrorKind::TimedOut);
        has_started.recv_timeout(START).map_err(too_slow)??;
        // It says when it can be asked: the time that a path has is not that of its start.
        receive::<()>(&stream, Deadline::after(START))?;
        Ok(Self { stream, patience })
    }

    fn wait_for(&mut self, mount: &Path) -> Result<(), Lost> {
        self.ask(&Question::Mount(text_of(mount)))
    }
}

/// Starts the process.
#[cfg(not(test))]
fn start(theirs: OwnedFd) -> io::Result<std::process::Child> {
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};

    // This process' own executable, whatever has become of its file.
    let mut command = Command::new("/proc/self/exe");
    command.arg0("sealblk").arg("header-reader").env_clear();
    command
        .stdin(theirs)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
}

/// A thread, since the executable of unit tests has no verbs.
#[cfg(test)]
fn start(theirs: OwnedFd) -> io::Result<InThisProcess> {
    Ok(InThisProcess(Some(thread::spawn(|| {
        process::answer(&theirs.into())
    }))))
}

#[cfg(test)]
struct InThisProcess(Option<thread::JoinHandle<()>>);

#[cfg(test)]
impl InThisProcess {
    fn kill(&self) -> io::Result<()> {
        Ok(())
    }

    fn wait(&mut self) -> thread::Result<()> {
        self.0.take().map_or(Ok(()), thread::JoinHandle::join)
    }
}

fn text_of(path: &Path) -> String {
    to_text(&std::path::absolute(path).unwrap_or_else(|_| path.to_owned()))
}

/// Sends a message: JSON and a NUL byte.
fn send(stream: &UnixStream, content: &impl Serialize, deadline: Deadline) -> io::Result<()> {
    let mut message = serde_json::to_vec(content)?;
    message.push(0);
    if message.len() > LONGEST {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    deadline::send(stream, &message, &mut SendAncillaryBuffer::default(), deadline)
}

/// Waits for a message.
fn receive<T: DeserializeOwned>(stream: &UnixStream, deadline: Deadline) -> io::Result<T> {
    let mut message = Vec::new();
    while message.last() != Some(&0) {
        let mut bytes = [0; 4096];
        // There is no room for descriptors: the kernel drops any that come.
        let mut none = RecvAncillaryBuffer::default();
        let received = deadline::receive(stream, &mut bytes, &mut none, deadline)?;
        // However little comes at a time.
        deadline.left()?;
        if received.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        message.extend(bytes.iter().take(received.bytes));
        if message.len() > LONGEST {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
    }
    message.pop();
    parsing::json(&message).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn an_answer_is_short_and_whole_and_nothing_else() {
        let received = |message: &[u8]| {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(message).unwrap();
            drop(theirs);
            receive::<Found>(&ours, Deadline::after(LIMIT))
        };
        assert!(matches!(received(b"\"missing\"\0"), Ok(Found::Missing)));
        let long = [&b"{\"nothing\":\""[..], &[b'x'; LONGEST], b"\"}\0"].concat();
        let volume = |fields: &str| format!("{{\"volume\":{{{fields}}}}}\0").into_bytes();
        let uuid = format!("\"uuid\":\"{}\",\"to\":[]", uuid::Uuid::nil());
        assert!(matches!(received(&volume(&uuid)), Ok(Found::Volume(_))));
        let more = volume(&format!("{uuid},\"key\":1"));
        for message in [
            &b""[..],
            b"\"missing\"",
            b"\"missing\"\0\"missing\"\0",
            b"{}\0",
            &long,
            &more,
        ] {
            let received = received(message);
            assert!(received.is_err(), "{received:?}");
        }
    }
}
