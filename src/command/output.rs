//! Output to standard output and to standard error.
//!
//! Names, paths and the texts of servers are untrusted. Both outputs show them on one line, without control characters:
//! notes, [`complain`] and the log escape them, and callers of [`print`] escape parts of their results by
//! [`text`](crate::text)'s functions.

use std::error::Error;
use std::io::{self, Write};

use serde::Serialize;

use crate::stderr;
use crate::text::printable;
use sealblk_base::blame::Blame;
use sealblk_base::error_chain::causes;

/// What a verb prints did not go out.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the result to standard output; check that its destination has room")]
pub struct OutputError(#[source] io::Error);

impl OutputError {
    /// Where the cause lies.
    pub fn blame(&self) -> Blame {
        Blame::Storage
    }
}

/// Prints a verb's whole answer. A reader that closed the pipe has seen enough: that is no failure.
///
/// # Errors
/// [`OutputError`], for instance if the answer goes to a file on a full disk.
pub fn print<E: From<OutputError>>(text: &str) -> Result<(), E> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(OutputError(e).into()),
        _ => Ok(()),
    }
}

/// Prints one of several lines at once. Returns whether a reader is left.
///
/// # Errors
/// As for [`print`].
pub fn line<E: From<OutputError>>(text: &str) -> Result<bool, E> {
    let mut stdout = io::stdout().lock();
    match writeln!(stdout, "{text}").and_then(|()| stdout.flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(OutputError(e).into()),
        Ok(()) => Ok(true),
    }
}

/// Prints a verb's whole answer as JSON.
///
/// # Errors
/// As for [`print`].
pub fn print_json<E: From<OutputError>>(answer: &impl Serialize) -> Result<(), E> {
    let text = serde_json::to_string_pretty(answer).expect("numbers, texts and lists are JSON");
    print(&(text + "\n"))
}

/// Prints an error and its causes, each on a line.
pub fn complain(error: &dyn Error) {
    complain_with(error, &[]);
}

/// The same, with lines that go with it.
pub fn complain_with(error: &dyn Error, lines: &[String]) {
    let lines: String = lines
        .iter()
        .map(|line| format!("\n    {}", printable(line)))
        .collect();
    stderr::write(format!("sealblk: {}{lines}\n", describe(error)).as_bytes());
}

/// An error and its causes, as [`complain`] prints them.
pub fn told(error: &dyn Error) -> String {
    describe(error)
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
    fn causes_are_told_once() {
        let error = layers(&["cannot open a: No such file", "No such file", "disk gone"]).unwrap();
        assert_eq!(
            describe(&*error),
            "cannot open a: No such file\n  cause: disk gone"
        );
    }

    #[test]
    fn no_error_says_more_than_its_lines() {
        let error = layers(&["a\nsealblk: done", "b\x1b[2J\u{202e}"]).unwrap();
        assert_eq!(
            describe(&*error),
            "a\\nsealblk: done\n  cause: b\\u{1b}[2J\\u{202e}"
        );
    }
}
