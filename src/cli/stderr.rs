//! The log of a process, with limits: guests, front-ends, callers, and hosts that ask a broker cause log lines.
//!
//! None of them can fill the log, or block this process by it. Each kind of line has its own rate limit, and the next line
//! reports the number of suppressed ones. A separate thread writes lines to standard error, or records to the journal. If no
//! process reads them, only this thread waits; then lines are lost, and the log reports their number.

#![allow(unsafe_code)] // Signal masks have no safe interface.

use std::fmt;
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread;
use std::time::Duration;

use tracing::callsite::Identifier;
use tracing::field::{Field, Visit};
use tracing::{Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use super::journal;
use crate::control::events;
use crate::control::rate_limit::RateLimit;

/// How many lines of a kind are written at once, and after what time one more is.
const AT_ONCE: u32 = 10;
const INTERVAL: Duration = Duration::from_secs(60);
/// The number of errors of a line that have separate limits.
const ERRORS: usize = 4;

/// Limits how often each line of the code is heard. An operator who asks for more than `info` gets all of that; events
/// have limits of their own, and each of the others was asked for by somebody with a privilege. A line with another error is
/// another one, as long as there are not too many of them.
#[derive(Debug)]
pub(super) struct Limit(RateLimit<Identifier, String>);

impl Limit {
    pub(super) fn new() -> Self {
        Self(RateLimit::new(AT_ONCE, INTERVAL).with_kinds(ERRORS))
    }
}

/// The error of a record.
#[derive(Default)]
struct ErrorOf(String);

impl Visit for ErrorOf {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "error" {
            self.0 = format!("{value:?}");
        }
    }
}

impl<S: Subscriber> Layer<S> for Limit {
    fn event_enabled(&self, event: &tracing::Event<'_>, _: Context<'_, S>) -> bool {
        let metadata = event.metadata();
        if *metadata.level() > Level::INFO || metadata.target() == events::TARGET {
            return true;
        }
        let mut error = ErrorOf::default();
        event.record(&mut error);
        let Some(suppressed) = self.0.admit(metadata.callsite(), error.0) else {
            return false;
        };
        if suppressed.count() > 0 {
            let text = format!(
                "sealblk: {} lines like the next one were suppressed\n",
                suppressed.count()
            );
            write(text.as_bytes());
        }
        true
    }
}

/// The lines that wait for the thread that writes them, once there is one.
static WAITING: OnceLock<Waiting> = OnceLock::new();

struct Waiting {
    send: SyncSender<Told>,
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

/// Starts the thread that writes lines. If it cannot be started, each caller writes its own lines.
pub(super) fn begin() {
    let (send, receive) = mpsc::sync_channel(CAPACITY);
    let (ready, wait) = mpsc::sync_channel::<()>(1);
    let spawned = thread::Builder::new().name("log".into()).spawn(move || {
        block_signals();
        drop(ready);
        run(&receive);
    });
    if spawned.is_ok() {
        // Until it is out of the way of signals: those that end the process are awaited by the thread that began it.
        let _ = wait.recv();
        let lost = AtomicU64::new(0);
        let _ = WAITING.set(Waiting { send, lost });
    }
}

/// Writes a line to standard error, without waiting where a thread does it.
pub(super) fn write(line: &[u8]) {
    tell(Told::Line(line.to_vec()));
}

/// Sends a record to the journal, without waiting where a thread does it.
pub(super) fn record(record: Vec<u8>) {
    tell(Told::Record(record));
}

fn tell(told: Told) {
    match WAITING.get() {
        Some(waiting) => {
            if waiting.send.try_send(told).is_err() {
                waiting.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
        // A failure cannot be reported.
        None => drop(told.out()),
    }
}

impl Told {
    fn out(self) -> io::Result<()> {
        match self {
            Self::Line(line) => io::stderr().write_all(&line),
            Self::Record(record) => journal::send(&record),
            Self::Flush(done) => {
                let _ = done.try_send(());
                Ok(())
            }
        }
    }
}

/// Waits a while for what is not written yet.
pub(super) fn flush() {
    if let Some(waiting) = WAITING.get() {
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

fn block_signals() {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigfillset initialises the set it is given.
    unsafe { libc::sigfillset(set.as_mut_ptr()) };
    // SAFETY: the set was initialised just above, and the old mask is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut()) };
}

/// Where the lines of `tracing` go. Each comes in one piece.
#[derive(Debug)]
pub(super) struct Lines;

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        write(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};
    use tracing_subscriber::layer::SubscriberExt;

    /// Records the levels of its input.
    struct Heard(Arc<Mutex<Vec<Level>>>);

    impl<S: Subscriber> Layer<S> for Heard {
        fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
            self.0.lock().unwrap().push(*event.metadata().level());
        }
    }

    #[test]
    fn a_line_is_left_out_when_it_comes_too_often_and_no_other_is() {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let registry = tracing_subscriber::registry()
            .with(Limit::new())
            .with(Heard(Arc::clone(&heard)));
        tracing::subscriber::with_default(registry, || {
            for _ in 0..100 {
                tracing::warn!("the guest breaks its queue");
                tracing::debug!("a request is refused");
                tracing::error!(error = %"the guest's memory is gone", "the session has ended");
                tracing::info!(target: events::TARGET, "a key was released");
            }
            // Another cause is not hidden by that; one that is another one each time fills no log.
            tracing::error!(error = %"the front-end hangs", "the session has ended");
            for n in 0..100 {
                tracing::warn!(error = %n, "the queue is broken");
            }
        });
        let heard = heard.lock().unwrap();
        let times = |level| heard.iter().filter(|heard| **heard == level).count();
        let expected = [
            (Level::WARN, 10 + 4 + 10),
            (Level::DEBUG, 100),
            (Level::INFO, 100),
            (Level::ERROR, 10 + 1),
        ];
        for (level, count) in expected {
            assert_eq!(times(level), count, "{level}");
        }
    }
}
