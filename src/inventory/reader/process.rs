//! The side of the process that reads: it confines itself, and answers questions until the other side closes the socket.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::process::{Resource, Rlimit, Signal, set_parent_process_death_signal, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_name, set_no_new_privs,
};
use serde::Serialize;

use super::{Caution, Found, Question, receive, send};
use crate::apart::let_go_of_descriptors;
use crate::deadline::Deadline;
use crate::keys::binding::Bindings;
use crate::luks2::HeaderError;
use crate::path_text::{from_text, to_text};
use crate::probe::{LIMIT, wait_for};
use crate::storage::{Access, Backing, opening_acts};

/// Answers on standard input, which is the socket.
///
/// # Errors
/// If the process cannot be confined.
pub(crate) fn run() -> io::Result<()> {
    // Those that the parent has inherited and not closed on execution.
    let_go_of_descriptors();
    // Its file is /proc/self/exe, which would be its name in lists of processes. Without one it does as well.
    let _ = set_name(c"sealblk-headers");
    set_parent_process_death_signal(Some(Signal::KILL))?;
    confine()?;
    answer(&io::stdin().as_fd().try_clone_to_owned()?.into());
    Ok(())
}

/// Gives up some of what it does not need to read files as its parent would: it makes no file longer, has no privileges of root except
/// access to other users' files, and as an ordinary user it starts no processes (RLIMIT_NPROC does not hold for root). What takes it
/// over has the rest of its user's rights.
fn confine() -> io::Result<()> {
    set_no_new_privs(true)?;
    for resource in [Resource::Fsize, Resource::Nproc] {
        let none = Rlimit {
            current: Some(0),
            maximum: Some(0),
        };
        setrlimit(resource, none)?;
    }
    let to_read = CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH;
    let held = capabilities(None)?;
    let kept = CapabilitySets {
        effective: held.effective & to_read,
        permitted: held.permitted & to_read,
        inheritable: CapabilitySet::empty(),
    };
    Ok(set_capabilities(None, kept)?)
}

/// Answers until the other side has left.
pub(super) fn answer(stream: &UnixStream) {
    // It can be asked.
    let mut sent = reply(stream, &());
    while sent.is_ok() {
        let Ok(question) = receive(stream, Deadline::NEVER) else {
            return;
        };
        sent = match question {
            Question::Mount(path) => {
                wait_for(&from_text(&path));
                reply(stream, &())
            }
            Question::Missing(path) => {
                let found = std::fs::metadata(from_text(&path));
                let missing = found.is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
                reply(stream, &missing)
            }
            Question::Header(path, caution) => match reply(stream, &find(&from_text(&path), caution)) {
                Err(error) if error.kind() == io::ErrorKind::FileTooLarge => reply(
                    stream,
                    &Found::Nothing("its header names too many keys".to_owned()),
                ),
                sent => sent,
            },
            Question::Canonical(path) => {
                let canonical = fs::canonicalize(from_text(&path)).ok();
                reply(stream, &canonical.map(|canonical| to_text(&canonical)))
            }
        };
    }
}

fn reply(stream: &UnixStream, content: &impl Serialize) -> io::Result<()> {
    send(stream, content, Deadline::after(LIMIT))
}

/// Reads the header at `path`. What is neither a file nor a block device is not opened, since with some devices that alone does
/// something. It may never come back.
fn find(path: &Path, caution: Caution) -> Found {
    let there = match rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
        Ok(there) => File::from(there),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Found::Missing,
        Err(error) => return Found::Nothing(io::Error::from(error).to_string()),
    };
    let looked = || -> Result<Found, String> {
        let metadata = there.metadata().map_err(|error| error.to_string())?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err("it is neither a regular file nor a block device".to_owned());
        }
        if kind.is_block_device() && caution == Caution::Others && opening_acts(metadata.rdev()) {
            return Err(
                "it is a removable or network block device, which sealblk does not open for an entry of another user"
                    .to_owned(),
            );
        }
        // The very thing that was looked at, whatever its path names by now.
        let same = format!("/proc/thread-self/fd/{}", there.as_raw_fd());
        let backing = Backing::open(Path::new(&same), Access::Inspect).map_err(|error| {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            cause.unwrap_or_else(|| error.to_string())
        })?;
        match Bindings::read(&backing) {
            Ok(bindings) => Ok(Found::Volume(bindings)),
            Err(HeaderError::NotLuks { .. }) => Ok(Found::NoVolume),
            Err(error) => Err(error.to_string()),
        }
    };
    looked().unwrap_or_else(Found::Nothing)
}
