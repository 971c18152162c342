//! Hostile callers of the agent's socket: JSON messages, or bytes that are none, with descriptors. It is the body of a fuzz target and
//! of a test; nothing of it is in a build of the program.
//!
//! The agent is real, with a native provider. The caller has all privileges, so that each method's parameters are read; it says all
//! before the first byte is read, and then ends.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::audit_log;
use super::service::Service;
use crate::audit::AuditLog;
use crate::control::peer::Peer;
use crate::control::privilege::Grants;
use crate::control::varlink;
use crate::control::wire::Connection;
use crate::providers::SharedProviders;
use crate::providers::registry::{Backup, Registry, Source};

/// Has a caller say what `input` holds.
///
/// # Panics
/// If the agent does what it must not.
pub fn calls(input: &[u8]) {
    HOST.with_borrow_mut(|host| host.get_or_insert_with(Host::new).play(input));
}

thread_local! {
    static HOST: RefCell<Option<Host>> = const { RefCell::new(None) };
}

const LIMIT: Duration = Duration::from_secs(5);
/// What makes the agent look at files that a caller names: it would look at those of the machine that the test runs on.
const LOOKS_AT_FILES: &[u8] = b"ScanVolumes";

/// An agent's state, in memory as far as the machine allows that.
struct Host {
    dir: PathBuf,
    settings: Vec<(PathBuf, Vec<u8>)>,
    service: Service,
    calls: u32,
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl Host {
    fn new() -> Self {
        let memory = PathBuf::from("/dev/shm");
        let base = if memory.is_dir() {
            memory
        } else {
            std::env::temp_dir()
        };
        let dir = base.join(format!("sealblk-agent-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let mut registry = Registry::open(&dir).unwrap();
        let source = Source::Native {
            backup: Backup::Waived,
        };
        registry.add("native", source, true).unwrap();
        drop(registry);
        let files = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path());
        let settings = files
            .filter(|path| path.is_file())
            .map(|path| (path.clone(), fs::read(path).unwrap()));
        Self {
            settings: settings.collect(),
            service: Self::service(&dir),
            dir,
            calls: 0,
        }
    }

    fn service(dir: &Path) -> Service {
        let audit = AuditLog::open(&audit_log(dir)).unwrap();
        let providers = SharedProviders::new(dir, LIMIT);
        Service::new(providers, LIMIT, Grants::default(), audit)
    }

    fn play(&mut self, mut input: &[u8]) {
        self.begin_anew();
        let (ours, theirs) = UnixStream::pair().unwrap();
        while let Some((message, rest)) = message(input) {
            input = rest;
            message.send(&ours);
        }
        ours.shutdown(Shutdown::Write).unwrap();
        let peer = Peer::of(&theirs).unwrap();
        let mut connection = Connection::new(theirs, LIMIT);
        let _ = varlink::serve(&mut connection, &peer, &[&self.service]);
    }

    /// What earlier inputs have removed is there again, and what they have written does not grow.
    fn begin_anew(&mut self) {
        for (path, content) in &self.settings {
            if fs::read(path).ok().as_ref() != Some(content) {
                fs::write(path, content).unwrap();
            }
        }
        self.calls += 1;
        if self.calls.is_multiple_of(2000) {
            fs::remove_file(audit_log(&self.dir)).unwrap();
            self.service = Self::service(&self.dir);
        }
    }
}

/// A message of a caller.
struct Message<'i> {
    text: &'i [u8],
    /// Whether it ends as messages do.
    is_whole: bool,
    /// What is behind each of its descriptors.
    kinds: &'i [u8],
}

/// A byte for how it ends and how many descriptors it has, one for each of these, two bytes for its length, and its text.
fn message(input: &[u8]) -> Option<(Message<'_>, &[u8])> {
    let (first, rest) = input.split_first()?;
    let (kinds, rest) = rest.split_at_checked(usize::from(first & 7).min(5))?;
    let (len, rest) = rest.split_at_checked(2)?;
    let len = usize::from(u16::from_le_bytes([len[0], len[1]]));
    let (text, rest) = rest.split_at(len.min(rest.len()));
    let is_whole = first & 0x80 == 0;
    let message = Message {
        text,
        is_whole,
        kinds,
    };
    Some((message, rest))
}

impl Message<'_> {
    fn send(&self, stream: &UnixStream) {
        let looks = |part: &[u8]| part == LOOKS_AT_FILES;
        if self.text.windows(LOOKS_AT_FILES.len()).any(looks) {
            return;
        }
        let pipe = |content: &[u8]| {
            let (take, mut give) = std::io::pipe().unwrap();
            give.write_all(content).unwrap();
            OwnedFd::from(take)
        };
        let thing = |kind: &u8| match kind % 5 {
            0 => pipe(&[7; 32]),
            1 => pipe(&[]),
            2 => pipe(&[7; 4097]),
            3 => File::open("/dev/zero").unwrap().into(),
            _ => UnixStream::pair().unwrap().0.into(),
        };
        let things: Vec<_> = self.kinds.iter().map(thing).collect();
        let fds: Vec<_> = things.iter().map(AsFd::as_fd).collect();
        let end: &[u8] = if self.is_whole { &[0] } else { &[] };
        let bytes = [self.text, end].concat();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(5))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        }
        // What does not fit into the socket is lost.
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let _ = rustix::net::sendmsg(stream, &[IoSlice::new(&bytes)], &mut control, flags);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    #[test]
    fn no_caller_breaks_the_agent() {
        inputs::run("agent", Duration::from_secs(5), super::calls);
    }
}
