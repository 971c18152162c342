//! Output to standard output and to standard error.
//!
//! Names, paths and the texts of servers are untrusted. Both outputs show them on one line, without control characters:
//! [`table`], [`note`], [`complain`] and the log escape them, and callers of [`print`] escape parts of their results by
//! [`printable`] and [`shown`].

use std::error::Error;
use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use super::failure::Failure;
use super::journal::{self, Journal};
use super::stderr::{self, Limit, Lines};
use crate::error_chain::causes;
use crate::keys::harmless;

/// Prints a verb's whole answer. A reader that closed the pipe has seen enough: that is no failure.
///
/// # Errors
/// [`Failure::Output`], for instance if the answer goes to a file on a full disk.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(Failure::Output(e)),
        _ => Ok(()),
    }
}

/// Prints one of several lines at once. Returns whether a reader is left.
///
/// # Errors
/// As for [`print`].
pub fn line(text: &str) -> Result<bool, Failure> {
    let mut stdout = io::stdout().lock();
    match writeln!(stdout, "{text}").and_then(|()| stdout.flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(Failure::Output(e)),
        Ok(()) => Ok(true),
    }
}

/// Prints a verb's whole answer as JSON.
///
/// # Errors
/// As for [`print`].
pub fn print_json(answer: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(answer).expect("numbers, texts and lists are JSON");
    print(&(text + "\n"))
}

/// Untrusted text, for instance from a header: control characters are escaped.
pub fn printable(text: &str) -> String {
    harmless(text, usize::MAX)
}

/// The same of a path.
pub fn shown(path: &Path) -> String {
    printable(&path.to_string_lossy())
}

/// Prints a note to the user, in addition to the result, on one line. If standard error is closed, the note is lost.
pub fn note(text: &str) {
    stderr::write(format!("sealblk: {}\n", printable(text)).as_bytes());
}

/// Lets the log go to standard error, which is the journal's for a service; SEALBLK_LOG says which, else `level` and up.
pub(super) fn log_events(level: &str) {
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
    if journal::is_standard_error() {
        registry.with(Journal).init();
    } else {
        let lines = tracing_subscriber::fmt::layer().with_writer(|| OneLine(Lines));
        registry.with(lines.with_target(false)).init();
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

/// Whether each part of a filter has a level: a typing error would count as a target's name, and silence all others.
fn names_levels(filter: &str) -> bool {
    // Nothing is a level too, for tracing.
    let level = |part: &str| {
        let level = part.rsplit('=').next().unwrap_or(part);
        !level.is_empty() && level.parse::<LevelFilter>().is_ok()
    };
    filter.split(',').all(|part| level(part.trim()))
}

/// Prints an error and its causes, each on a line.
pub fn complain(error: &dyn Error) {
    stderr::write(format!("sealblk: {}\n", describe(error)).as_bytes());
}

/// The same of a failure, with the list that goes with it.
pub(super) fn complain_of(failure: &Failure) {
    let list: String = failure
        .list()
        .iter()
        .map(|line| format!("\n    {}", printable(line)))
        .collect();
    stderr::write(format!("sealblk: {}{list}\n", describe(failure)).as_bytes());
}

/// Rows of text as columns, each as wide as its widest cell.
pub fn table<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) -> String {
    let rows: Vec<_> = rows
        .iter()
        .map(|row| row.each_ref().map(|cell| printable(cell)))
        .collect();
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: [usize; COLUMNS] = std::array::from_fn(width);
    let line = |row: &[String; COLUMNS]| {
        let cells: String = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}  "))
            .collect();
        cells.trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

/// The error's text, then each cause that says something new, on a line of its own.
fn describe(error: &dyn Error) -> String {
    let mut last = error.to_string();
    let mut text = printable(&last);
    for cause in causes(error) {
        let said = cause.to_string();
        if !last.contains(&said) {
            text.push_str("\n  cause: ");
            text.push_str(&printable(said.trim_end()));
            last = said;
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Layer {
        text: &'static str,
        source: Option<Box<Layer>>,
    }

    fn layers(texts: &[&'static str]) -> Option<Box<Layer>> {
        let (&text, under) = texts.split_first()?;
        Some(Box::new(Layer {
            text,
            source: layers(under),
        }))
    }

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

    #[test]
    fn hostile_text_is_shown_harmlessly() {
        assert_eq!(printable("vm\x1b[2J\nü"), "vm\\u{1b}[2J\\nü");
    }

    #[test]
    fn columns_line_up() {
        let rows = [["NAME", "KIND"], ["a", "native"], ["native", "x"]].map(|row| row.map(str::to_owned));
        assert_eq!(table(&rows), "NAME    KIND\na       native\nnative  x\n");
    }

    #[test]
    fn causes_are_told_once() {
        let error = layers(&["cannot open a: No such file", "No such file", "disk gone"]).unwrap();
        assert_eq!(
            describe(&*error),
            "cannot open a: No such file\n  cause: disk gone"
        );
    }

    #[test]
    fn no_error_and_no_record_says_more_than_its_lines() {
        let error = layers(&["a\nsealblk: done", "b\x1b[2J\u{202e}"]).unwrap();
        assert_eq!(
            describe(&*error),
            "a\\nsealblk: done\n  cause: b\\u{1b}[2J\\u{202e}"
        );
        let mut log = OneLine(Vec::new());
        log.write_all(b"a record of disk x\ny\n").unwrap();
        assert_eq!(log.0, b"a record of disk x\\ny\n");
    }
}
