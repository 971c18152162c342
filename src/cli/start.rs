//! `sealblk start` and `stop`: a disk of this host, by its name. systemd starts and ends the process that serves it.

use std::ffi::OsString;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;

use clap::Args;

use super::failure::Failure;
use super::{Host, serve, units};
use crate::disks::{DiskName, Sockets};

const AFTER_HELP: &str = "\
systemd serves the disk, by the unit sealblk@NAME. `systemctl enable sealblk@NAME` also
has it do so after each boot.

With --foreground, sealblk serves the disk itself, as `sealblk serve` does with the
options of the disk's definition: that is what the unit calls. OPTIONS are further
options of `sealblk serve`, for this start: --incoming, --take-over N or --no-wait.";

/// Serve a disk that this host has defined
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Start {
    /// The disk's name (`sealblk define`)
    name: DiskName,
    /// Serve it in this process
    #[arg(long)]
    foreground: bool,
    /// Options of `sealblk serve` for this start
    #[arg(value_name = "OPTIONS", last = true, requires = "foreground")]
    options: Vec<OsString>,
}

/// End serving a disk that this host has defined; a guest that uses it waits
#[derive(Debug, Args)]
pub(super) struct Stop {
    /// The disk's name
    name: DiskName,
}

impl Start {
    pub(super) fn run(self, host: &Host) -> Result<(), Failure> {
        let definition = host.disks().definition(&self.name)?;
        if !self.foreground {
            return units::order("start", &self.name);
        }
        let sockets = Sockets::of(&self.name);
        let made = DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&sockets.directory);
        made.map_err(|source| Failure::Make {
            path: sockets.directory.clone(),
            source,
        })?;
        let option = |name: &str, path: std::path::PathBuf| {
            let mut option = OsString::from(name);
            option.push(path);
            option
        };
        let mut arguments = definition.arguments();
        arguments.push(option("--socket-path=", sockets.front_end));
        if !definition.may_be_unencrypted() {
            arguments.push(option("--control-socket=", sockets.control));
        }
        arguments.extend(self.options);
        Err(serve::execute_with(
            host.arguments()
                .into_iter()
                .chain(["serve".into()])
                .chain(arguments),
        ))
    }
}

impl Stop {
    pub(super) fn run(self) -> Result<(), Failure> {
        units::order("stop", &self.name)
    }
}
