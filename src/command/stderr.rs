//! Lines and records from a process to standard error or to the journal, which cannot block it.
//!
//! A separate thread writes lines to standard error, or sends records to the journal. If no process reads them, only this thread
//! waits; then lines are lost, and the log reports their number.

#![allow(unsafe_code)] // Signal masks have no safe interface.

use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::sync::{LazyLock, Mutex, OnceLock};
use std::thread;
use std::time::Duration;

use crate::text::printable;
use sealblk_base::mutex::lock;
use sealblk_control::datagram::Service;

/// Where the journal takes records.
const SOCKET: &str = "/run/systemd/journal/socket";

/// The lines that wait for the thread that writes them, once [`hold`] or [`begin`] was called.
static WAITING: OnceLock<Waiting> = OnceLock::new();

struct Waiting {
    send: SyncSender<Told>,
    /// Until the thread is there.
    receive: Mutex<Option<Receiver<Told>>>,
    lost: AtomicU64,
}

enum Told {
    Line(Vec<u8>),
    /// For the journal.
    Record(Vec<u8>),
    /// All lines before it are written.
    Flush(SyncSender<()>),
}

/// How many lines may wait.
const CAPACITY: usize = 1024;
/// How long the end of the process waits for the last lines.
const FLUSH: Duration = Duration::from_secs(1);

/// Has lines wait until [`begin`] or [`flush`], for a process that must not have a thread yet.
pub fn hold() {
    waiting();
}

fn waiting() -> &'static Waiting {
    WAITING.get_or_init(|| {
        let (send, receive) = mpsc::sync_channel(CAPACITY);
        Waiting {
            send,
            receive: Mutex::new(Some(receive)),
            lost: AtomicU64::new(0),
        }
    })
}

/// Starts the thread that writes lines. If it cannot be started, each caller writes its own lines.
pub fn begin() {
    if lock(&waiting().receive).is_none() {
        return;
    }
    let (ready, wait) = mpsc::sync_channel::<()>(1);
    let spawned = thread::Builder::new().name("log".into()).spawn(move || {
        block_signals();
        let receive = lock(&waiting().receive).take();
        drop(ready);
        if let Some(receive) = receive {
            run(&receive);
        }
    });
    if spawned.is_ok() {
        // Until it is out of the way of signals: those that end the process are awaited by the thread that began it.
        let _ = wait.recv();
    } else if let Some(receive) = lock(&waiting().receive).take() {
        receive.try_iter().for_each(|told| drop(told.out()));
    }
}

/// Prints a note to the user, in addition to the result, on one line. If standard error is closed, the note is lost.
pub fn note(text: &str) {
    write(format!("sealblk: {}\n", printable(text)).as_bytes());
}

/// Writes a line to standard error, without waiting where a thread does it.
pub fn write(line: &[u8]) {
    tell(Told::Line(line.to_vec()));
}

/// Sends a record to the journal, without waiting where a thread does it.
pub fn record(record: Vec<u8>) {
    tell(Told::Record(record));
}

fn tell(told: Told) {
    match WAITING.get() {
        Some(waiting) => match waiting.send.try_send(told) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => {
                waiting.lost.fetch_add(1, Ordering::Relaxed);
            }
            // There is no thread.
            Err(TrySendError::Disconnected(told)) => drop(told.out()),
        },
        // A failure cannot be reported.
        None => drop(told.out()),
    }
}

impl Told {
    fn out(self) -> io::Result<()> {
        match self {
            Self::Line(line) => io::stderr().write_all(&line),
            Self::Record(record) => send(&record),
            Self::Flush(done) => {
                let _ = done.try_send(());
                Ok(())
            }
        }
    }
}

/// Waits a while for what is not written yet.
pub fn flush() {
    if let Some(waiting) = WAITING.get() {
        begin();
        let (done, wait) = mpsc::sync_channel(1);
        if waiting.send.try_send(Told::Flush(done)).is_ok() {
            let _ = wait.recv_timeout(FLUSH);
        }
    }
}

fn run(receive: &Receiver<Told>) {
    for told in receive {
        let lost_now = u64::from(told.out().is_err());
        let lost_before = WAITING
            .get()
            .map_or(0, |waiting| waiting.lost.swap(0, Ordering::Relaxed));
        let lost = lost_before + lost_now;
        if lost > 0 {
            let text = format!("sealblk: {lost} log lines were lost, because no process read them\n");
            drop(io::stderr().write_all(text.as_bytes()));
        }
    }
}

static JOURNAL: LazyLock<Option<Service>> =
    LazyLock::new(|| SocketAddr::from_pathname(SOCKET).ok().map(Service::at));

/// Connects to the journal, which a confined process cannot do.
pub fn connect_to_journal() {
    LazyLock::force(&JOURNAL);
}

/// Sends a record to the journal; waits if the journal does not read.
fn send(record: &[u8]) -> io::Result<()> {
    let journal = JOURNAL.as_ref().ok_or(io::ErrorKind::NotConnected)?;
    journal.send(record)
}

/// Blocks all signals in this thread but that of the sandbox: a process ends if a thread that blocks it makes a call that is refused.
fn block_signals() {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigfillset initialises the set it is given.
    unsafe { libc::sigfillset(set.as_mut_ptr()) };
    // SAFETY: the set was initialised just above.
    unsafe { libc::sigdelset(set.as_mut_ptr(), libc::SIGSYS) };
    // SAFETY: the set was initialised just above, and the old mask is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut()) };
}

/// Whether standard error goes to the journal (systemd.exec(5), "JOURNAL_STREAM").
pub fn is_journal() -> bool {
    let stream = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    let is = |(device, inode): (&str, &str)| {
        let stderr = std::fs::metadata("/proc/self/fd/2");
        stderr.is_ok_and(|stderr| (device.parse(), inode.parse()) == (Ok(stderr.dev()), Ok(stderr.ino())))
    };
    stream.split_once(':').is_some_and(is)
}
