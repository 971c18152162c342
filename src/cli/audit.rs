//! `sealblk audit`: checks an audit log, and compares a receipt with it.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::{Map, Value};

use super::erase::sha256;
use super::failure::Failure;
use super::{Host, output, text};
use crate::agent;
use crate::control::events::Event;
use crate::parsing;

const AFTER_HELP: &str = "\
Examples:
  sealblk audit verify
  sealblk audit verify --head 5f0c...             # an earlier head, kept elsewhere
  sealblk audit verify --receipt vm7.receipt      # of `sealblk erase`

With --receipt, the log must contain the SHA-256 of the whole receipt, and an
erasure of the disk with the same checksums as in the receipt.";

/// Check an audit log: the key agent's, or a broker's
#[derive(Debug, Args)]
pub(super) struct Audit {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Check whether a line was changed, removed or inserted
    #[command(after_help = AFTER_HELP)]
    Verify(Verify),
}

#[derive(Debug, Args)]
struct Verify {
    /// The log, or a copy of it [default: the state directory's]
    file: Option<PathBuf>,
    /// A head that an earlier check printed; the log must still contain that line
    #[arg(long, value_name = "HASH")]
    head: Option<String>,
    /// A receipt of `sealblk erase`; the log must confirm it
    #[arg(long, value_name = "FILE")]
    receipt: Option<PathBuf>,
}

/// The longest receipt: a header holds no more than this.
const LONGEST_RECEIPT: u64 = 16 << 20;

/// A receipt, and the records that were found of it.
struct Receipt<'p> {
    path: &'p Path,
    sha256: String,
    /// What it says itself, by the names that the log has for it.
    says: [(&'static str, Value); 3],
    erased: Option<Map<String, Value>>,
    issued: Option<Map<String, Value>>,
}

impl Audit {
    pub(super) fn run(self, host: &Host) -> Result<(), Failure> {
        let Verb::Verify(Verify { file, head, receipt }) = self.verb;
        let path = match file {
            Some(path) => path,
            None => agent::audit_log(&host.state_dir()?),
        };
        let mut receipt = receipt.as_deref().map(Receipt::read).transpose()?;
        let verified = agent::verify_each(&path, head.as_deref(), |record| {
            if let Some(receipt) = &mut receipt {
                receipt.see(record);
            }
        })?;
        output::print::<Failure>(&format!(
            "{}: {} records, unchanged\n  head  {}\n",
            text::shown(&path),
            verified.records,
            verified.head
        ))?;
        receipt.map_or(Ok(()), |receipt| receipt.judge())
    }
}

/// A field, by the name that it has, or had in receipts of the form `sealblk-erase-1`.
fn either(of: &Value, name: &str, before: &str) -> Value {
    of.get(name)
        .or_else(|| of.get(before))
        .cloned()
        .unwrap_or_default()
}

impl<'p> Receipt<'p> {
    fn read(path: &'p Path) -> Result<Self, Failure> {
        let mut text = Vec::new();
        File::open(path)
            .and_then(|file| file.take(LONGEST_RECEIPT).read_to_end(&mut text))
            .map_err(|source| Failure::Look {
                path: path.to_owned(),
                source,
            })?;
        let value: Value = parsing::json(&text).unwrap_or_default();
        Ok(Self {
            path,
            sha256: sha256(&text),
            says: [
                ("volume", value["volume"].clone()),
                ("headerSha256", either(&value, "headerSha256", "header_sha256")),
                (
                    "writtenSha256",
                    either(&value["erased"], "writtenSha256", "written_sha256"),
                ),
            ],
            erased: None,
            issued: None,
        })
    }

    /// The record of the erasure comes first, and both are of one caller.
    fn see(&mut self, record: &Map<String, Value>) {
        let is = |event: Event| record.get("event") == Some(&event.to_string().into());
        let field = |name: &str| record.get(name).unwrap_or(&Value::Null);
        if is(Event::VolumeErased) && self.says.iter().all(|(name, said)| field(name) == said) {
            self.erased = Some(record.clone());
        }
        let same_caller = |erased: &Map<String, Value>| {
            ["volume", "user", "process"]
                .iter()
                .all(|name| erased.get(*name) == record.get(*name))
        };
        if is(Event::ReceiptIssued)
            && field("receiptSha256") == self.sha256.as_str()
            && self.erased.as_ref().is_some_and(same_caller)
        {
            self.issued = Some(record.clone());
        }
    }

    fn judge(self) -> Result<(), Failure> {
        let Some(issued) = self.issued else {
            return Err(Failure::NoReceipt {
                path: self.path.to_owned(),
                erased: self.erased.is_some(),
            });
        };
        let told = |name| issued.get(name).map(Value::to_string).unwrap_or_default();
        output::print(&format!(
            "{}: unchanged; issued by user {}, record {} of {}\n",
            text::shown(self.path),
            told("user"),
            told("seq"),
            told("time").trim_matches('"'),
        ))
    }
}
