//! The log of a process, with limits: guests, front-ends, callers, and hosts that ask a broker cause log lines.
//!
//! None of them can fill the log. Each kind of line has its own rate limit, and the next line reports the number of
//! suppressed ones.

use std::fmt;
use std::io::{self, Write};
use std::time::Duration;

use tracing::callsite::Identifier;
use tracing::field::{Field, Visit};
use tracing::{Level, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::journal::Journal;
use crate::stderr::{self, note};
use crate::text::printable;
use sealblk_control::events;
use sealblk_control::rate_limit::RateLimit;

/// Lets the log go to standard error, which is the journal's for a service; SEALBLK_LOG says which, else `level` and up.
pub fn begin(level: &str) {
    let wanted = std::env::var("SEALBLK_LOG").unwrap_or_default();
    let filter = match wanted.parse() {
        Ok(filter) if names_levels(&wanted) => filter,
        _ => {
            if !wanted.is_empty() {
                note(&format!(
                    "SEALBLK_LOG={wanted:?} is neither a level (error, warn, info, debug, trace, off) nor TARGET=LEVEL; ignoring it"
                ));
            }
            EnvFilter::new(level)
        }
    };
    let registry = tracing_subscriber::registry().with(filter).with(Limit::new());
    if stderr::is_journal() {
        stderr::connect_to_journal();
        registry.with(Journal).init();
    } else {
        let lines = tracing_subscriber::fmt::layer().with_writer(|| OneLine(Lines));
        registry.with(lines.with_target(false)).init();
    }
}

/// Whether each part of a filter has a level: a typing error would count as a target's name, and silence all others.
fn names_levels(filter: &str) -> bool {
    // Nothing is a level too, for tracing.
    let level = |part: &str| {
        let level = part.rsplit('=').next().unwrap_or(part);
        !level.is_empty() && level.parse::<LevelFilter>().is_ok()
    };
    filter.split(',').all(|part| level(part.trim()))
}

/// How many lines of a kind are written at once, and after what time one more is.
const AT_ONCE: u32 = 10;
const INTERVAL: Duration = Duration::from_secs(60);
/// The number of errors of a line that have separate limits.
const ERRORS: usize = 4;

/// Limits how often each line of the code is heard. An operator who asks for more than `info` gets all of that; events
/// have limits of their own, and each of the others was asked for by somebody with a privilege. A line with another error is
/// another one, as long as there are not too many of them.
#[derive(Debug)]
struct Limit(RateLimit<Identifier, String>);

impl Limit {
    fn new() -> Self {
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
            stderr::write(text.as_bytes());
        }
        true
    }
}

/// Writes each record of the log on one line, whatever is in it.
struct OneLine<W>(W);

impl<W: Write> Write for OneLine<W> {
    /// A record is one call.
    fn write(&mut self, record: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(record);
        let line = printable(text.strip_suffix('\n').unwrap_or(&text));
        self.0.write_all((line + "\n").as_bytes())?;
        Ok(record.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Where the lines of `tracing` go. Each comes in one piece.
#[derive(Debug)]
struct Lines;

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        stderr::write(line);
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

    #[test]
    fn a_filter_that_would_silence_all_is_none() {
        for filter in [
            "info",
            "debug",
            "warn,sealblk::device=trace",
            "OFF",
            "sealblk=debug",
        ] {
            assert!(names_levels(filter), "{filter}");
        }
        for filter in ["", "verbose", "warning", "info,", "sealblk", "sealblk=loud"] {
            assert!(!names_levels(filter), "{filter}");
        }
    }

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

    #[test]
    fn a_record_is_one_line() {
        let mut log = OneLine(Vec::new());
        log.write_all(b"a record of disk x\ny\n").unwrap();
        assert_eq!(log.0, b"a record of disk x\\ny\n");
    }
}
