//! `sealblk audit`: the agent's log of what keys were asked for, by whom.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::failure::Failure;
use super::{Host, output};
use crate::agent;

/// Check the key agent's audit log
#[derive(Debug, Args)]
pub(super) struct Audit {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// See whether any line was changed, removed or added since the agent wrote it
    Verify(Verify),
}

#[derive(Debug, Args)]
struct Verify {
    /// The log, or a copy of it [default: the state directory's]
    file: Option<PathBuf>,
    /// A head that an earlier check has printed: that line has to be there still
    #[arg(long, value_name = "HASH")]
    head: Option<String>,
}

impl Audit {
    pub(super) fn run(self, host: &Host) -> Result<(), Failure> {
        let Verb::Verify(Verify { file, head }) = self.verb;
        let path = match file {
            Some(path) => path,
            None => agent::audit_log(&host.state_dir()?),
        };
        let verified = agent::verify(&path, head.as_deref())?;
        output::print(&format!(
            "{}: {} records, each as it was written\n  head  {}\n",
            path.display(),
            verified.records,
            verified.head
        ))
    }
}
