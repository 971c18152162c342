//! `sealblk list`: the volumes that are being served on this host.

use clap::Args;
use serde_json::json;

use super::failure::Failure;
use super::{Host, output};
use crate::agent::{Client, Purpose};

/// Show which volumes are being served on this host, as its key agent knows it
#[derive(Debug, Args)]
pub(super) struct List {
    /// Print JSON, as the interface org.sealblk.Agent has it
    #[arg(long)]
    json: bool,
}

impl List {
    pub(super) fn run(self, host: &Host) -> Result<(), Failure> {
        let socket = host.config()?.agent.unwrap_or_default().socket;
        let disks = Client::new(&socket, Purpose::Check).disks()?;
        if self.json {
            return output::print_json(&json!({ "disks": disks }));
        }
        let head = [
            "volume",
            "provider",
            "key",
            "user",
            "process",
            "since",
            "grace until",
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
        output::print(&output::table(&rows))
    }
}
