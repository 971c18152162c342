//! `sealblk header-reader`, which a process with KEKs starts: it reads the headers of volumes for that process.

use clap::Args;

use super::failure::Failure;
use crate::inventory::reader;

/// Read the headers of volumes, for the process that has started this
#[derive(Debug, Args)]
#[command(hide = true)]
pub(super) struct HeaderReader {}

impl HeaderReader {
    pub(super) fn run(self) -> Result<(), Failure> {
        reader::run().map_err(Failure::Process)
    }
}
