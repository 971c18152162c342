//! Log records in the journal's native protocol (<https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>): the message is the log line, and
//! the fields for searches are separate.

use std::error::Error;
use std::fmt::{self, Write as _};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use crate::stderr;
use crate::text::printable;
use sealblk_base::error_chain::causes;

/// The longest value. A datagram holds some of this length.
const MAX_VALUE: usize = 16 << 10;

/// The layer that makes the records.
#[derive(Debug)]
pub(crate) struct Journal;

impl<S: Subscriber> Layer<S> for Journal {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut record = Record::default();
        event.record(&mut record);
        let metadata = event.metadata();
        // The levels of syslog that have the same names.
        let priority = match *metadata.level() {
            Level::ERROR => "3",
            Level::WARN => "4",
            Level::INFO => "6",
            Level::DEBUG | Level::TRACE => "7",
        };
        let Record {
            message,
            line,
            mut bytes,
        } = record;
        put(&mut bytes, "MESSAGE", &printable(&(message + &line)));
        put(&mut bytes, "PRIORITY", priority);
        put(&mut bytes, "SYSLOG_IDENTIFIER", "sealblk");
        put(&mut bytes, "TARGET", metadata.target());
        if let (Some(file), Some(line)) = (metadata.file(), metadata.line()) {
            put(&mut bytes, "CODE_FILE", file);
            put(&mut bytes, "CODE_LINE", &line.to_string());
        }
        stderr::record(bytes);
    }
}

/// What a record says.
#[derive(Default)]
struct Record {
    message: String,
    /// Its fields as they stand behind the message.
    line: String,
    /// Its fields as the journal takes them.
    bytes: Vec<u8>,
}

impl Record {
    fn field(&mut self, field: &Field, value: &str, shown: fmt::Arguments<'_>) {
        if field.name() == "message" {
            value.clone_into(&mut self.message);
            return;
        }
        // A text takes whatever is written to it.
        let _ = write!(self.line, " {}={shown}", field.name());
        let allowed = |letter: char| match letter.to_ascii_uppercase() {
            letter @ ('A'..='Z' | '0'..='9') => letter,
            _ => '_',
        };
        let name: String = field.name().chars().map(allowed).collect();
        put(&mut self.bytes, &format!("SEALBLK_{name}"), value);
    }
}

impl Visit for Record {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.field(field, value, format_args!("{value:?}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let value = format!("{value:?}");
        self.field(field, &value, format_args!("{value}"));
    }

    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        let mut text = value.to_string();
        for cause in causes(value) {
            let _ = write!(text, ": {cause}");
        }
        self.field(field, &text, format_args!("{text}"));
    }
}

/// A field of any content: its name, the length of its value in eight bytes, and the value.
fn put(bytes: &mut Vec<u8>, name: &str, value: &str) {
    let value = &value[..value.floor_char_boundary(MAX_VALUE)];
    bytes.extend_from_slice(name.as_bytes());
    bytes.push(b'\n');
    bytes.extend_from_slice(&(value.len() as u64).to_le_bytes());
    bytes.extend_from_slice(value.as_bytes());
    bytes.push(b'\n');
}
