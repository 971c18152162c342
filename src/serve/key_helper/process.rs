//! The helper as a child of this process: how it begins, and how it ends.

#![allow(unsafe_code)] // What a child does between fork and exec, and closing descriptors by number.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use sealblk_base::blame::Blame;

use super::HelperFailure;
use crate::control::wire::Connection;
use crate::mutex::lock;

/// How a helper is to get keys.
#[derive(Debug)]
pub struct Settings {
    /// The command `sealblk`.
    pub executable: PathBuf,
    /// As `--state-dir`.
    pub state_dir: Option<PathBuf>,
    /// As `--config`.
    pub config: Option<PathBuf>,
    /// As `--passphrase-file`.
    pub passphrase: Option<OsString>,
    /// The descriptors that lead to the passphrase: the helper inherits them, and this process closes them.
    pub inherited: Vec<RawFd>,
}

/// How long a message may take that has begun. An answer may be waited for for as long as a key server, or whoever writes to a
/// passphrase's FIFO, takes.
const TIMEOUT: Duration = Duration::from_secs(30);
/// The thread that waits for the helper does little else.
const STACK: usize = 64 << 10;

/// The helper's process.
pub(super) struct Process {
    id: u32,
    /// Until a thread waits for it.
    child: Mutex<Option<Child>>,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    ended: AtomicBool,
    /// This process lets go of it.
    dismissed: AtomicBool,
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Process").field(&self.id).finish()
    }
}

impl Process {
    /// Starts it. The calling thread has to live as long as this process: the kernel kills the helper when it ends.
    pub(super) fn start(settings: Settings) -> io::Result<(Self, Connection)> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut kept = settings.inherited.clone();
        kept.retain(|&fd| fd > libc::STDERR_FILENO);
        let stdin = match settings.inherited.contains(&libc::STDIN_FILENO) {
            true => Stdio::inherit(),
            false => Stdio::null(),
        };
        let mut command = Command::new(&settings.executable);
        command.arg0("sealblk");
        for (option, path) in [
            ("--state-dir", &settings.state_dir),
            ("--config", &settings.config),
        ] {
            if let Some(path) = path {
                command.arg(with_value(option, path.as_os_str()));
            }
        }
        command.arg(VERB);
        command.arg(format!("--fd={}", theirs.as_raw_fd()));
        if let Some(passphrase) = &settings.passphrase {
            command.arg(with_value("--passphrase-file", passphrase));
        }
        command.stdin(stdin).stdout(Stdio::null());
        // The manager hears of the serving process, and of no other.
        command.env_remove("NOTIFY_SOCKET");
        kept.push(theirs.as_raw_fd());
        // SAFETY: the closure makes system calls alone, on values that were there before the fork.
        unsafe { command.pre_exec(move || prepare_child(&kept)) };
        let child = command.spawn()?;
        drop(theirs);
        let process = Self {
            id: child.id(),
            child: Mutex::new(Some(child)),
            state: Arc::default(),
        };
        for &fd in &settings.inherited {
            let_go_of(fd)?;
        }
        let mut connection = Connection::new(ours, TIMEOUT);
        connection.wait_for_ever();
        Ok((process, connection))
    }

    /// None at all: a test answers in its place.
    #[cfg(any(test, fuzzing))]
    pub(super) fn none() -> Self {
        Self {
            id: 0,
            child: Mutex::default(),
            state: Arc::default(),
        }
    }

    pub(super) fn id(&self) -> u32 {
        self.id
    }

    /// Has a thread wait for its end. To be called once threads do not get the signals that end this process.
    pub(super) fn watch(&self) -> io::Result<()> {
        let Some(mut child) = lock(&self.child).take() else {
            return Ok(());
        };
        let state = Arc::clone(&self.state);
        let watcher = thread::Builder::new().name("key-helper".into()).stack_size(STACK);
        watcher.spawn(move || {
            let ended = child.wait();
            state.ended.store(true, Ordering::Release);
            if state.dismissed.load(Ordering::Acquire) {
                return;
            }
            let how = ended.map_or_else(|error| error.to_string(), |status| status.to_string());
            tracing::error!(
                process = child.id(),
                %how,
                "the key helper has ended: an open disk stays open, but can be neither locked nor rekeyed, and a locked disk stays \
                 locked; end `sealblk serve` (SIGTERM) and start it again"
            );
        })?;
        Ok(())
    }

    /// Why it has ended by itself before a thread waited for it; it has said more on standard error.
    pub(super) fn failure(&self) -> Option<HelperFailure> {
        let code = lock(&self.child).take()?.wait().ok()?.code()?;
        let code = u8::try_from(code).ok().filter(|&code| code > 0)?;
        Some(HelperFailure::of(
            "the process that gets the disk's keys has ended",
            Blame::of_exit_code(code),
        ))
    }

    /// Nothing is asked of it any more.
    pub(super) fn give_up(&self) {
        self.state.ended.store(true, Ordering::Release);
    }

    pub(super) fn has_ended(&self) -> bool {
        self.state.ended.load(Ordering::Acquire)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.state.dismissed.store(true, Ordering::Release);
        // One that is watched ends with the socket.
        if let Some(mut child) = lock(&self.child).take() {
            // The sandbox refuses signals to others; the helper ends with the socket then, and init reaps it.
            if child.kill().is_ok() {
                drop(child.wait());
            }
        }
    }
}

/// The helper's verb.
const VERB: &str = "key-helper";

/// An option with its value in one argument: a value may begin with a hyphen.
fn with_value(option: &str, value: &OsStr) -> OsString {
    let mut argument = OsString::from(option);
    argument.push("=");
    argument.push(value);
    argument
}

/// Leaves the child these descriptors and the standard ones, and lets nothing end it but the end of its parent.
fn prepare_child(kept: &[RawFd]) -> io::Result<()> {
    let all = |result: libc::c_int| match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    };
    // SAFETY: it only sets a flag of descriptors of this child, which is about to execute another program.
    all(unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC.cast_signed()) })?;
    for &fd in kept {
        // SAFETY: it only clears that flag again.
        all(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) })?;
    }
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM] {
        // SAFETY: ignoring a signal runs no code of ours.
        if unsafe { libc::signal(signal, libc::SIG_IGN) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: the call takes numbers alone. It lasts through the execution of another program.
    all(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) })
}

/// Closes an inherited descriptor that only the helper needs. Standard input is that of /dev/null then; standard output and
/// error stay.
fn let_go_of(fd: RawFd) -> io::Result<()> {
    match fd {
        libc::STDIN_FILENO => {
            let null = File::open(Path::new("/dev/null"))?;
            // SAFETY: standard input stays open, and nothing here owns it.
            match unsafe { libc::dup2(null.as_raw_fd(), libc::STDIN_FILENO) } {
                -1 => Err(io::Error::last_os_error()),
                _ => Ok(()),
            }
        }
        libc::STDOUT_FILENO | libc::STDERR_FILENO => Ok(()),
        fd => {
            // SAFETY: it was inherited for the passphrase, and nothing in this process owns it.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
            Ok(())
        }
    }
}
