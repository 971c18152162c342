//! `sealblk list`: the volumes that are being served on this host.

use clap::Args;
use serde_json::json;

use super::failure::Failure;
use super::{Host, output, text};
use crate::agent::Client;
use crate::keys::RequestPurpose;

const AFTER_HELP: &str = "\
The agent lists the volumes whose keys it has given out. It does not list a disk
that waits for its key; `sealblk status --control-socket SOCK` shows such a disk.";

/// List the volumes that are being served on this host, according to its key agent
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct List {
    /// Print JSON, as in the interface org.sealblk.Agent
    #[arg(long)]
    json: bool,
}

impl List {
    pub(super) fn run(self, host: &Host) -> Result<(), Failure> {
        let disks = Client::new(&host.agent_socket()?, RequestPurpose::Check).disks()?;
        if self.json {
            return output::print_json(&json!({ "disks": disks }));
        }
        if disks.is_empty() {
            return output::print("no volume with a key from the agent is being served\n");
        }
        let head = [
            "VOLUME",
            "PROVIDER",
            "KEY",
            "USER",
            "PROCESS",
            "SINCE",
            "GRACE UNTIL",
        ]
        .map(str::to_owned);
        let rows = disks.into_iter().map(|disk| {
            [
                disk.volume.to_string(),
                disk.provider,
                disk.key_id.to_string(),
                disk.user.to_string(),
                disk.process.to_string(),
                disk.since.to_string(),
                disk.grace.map(|grace| grace.to_string()).unwrap_or_default(),
            ]
        });
        let rows: Vec<_> = [head].into_iter().chain(rows).collect();
        output::print(&text::table(&rows))
    }
}
