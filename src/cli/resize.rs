//! `sealblk resize`: gives a disk another size, at rest or while it is served.

use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args};
use serde::Deserialize;
use serde_json::json;

use super::failure::Failure;
use super::size::Size;
use super::target::Target;
use super::volume_args::{TakeOver, VolumeArgs};
use super::{Host, output, served, text};
use crate::luks2::{Resize as Wanted, Resized};
use crate::storage::StorageError;

const AFTER_HELP: &str = "\
Examples:
  sealblk resize vm7 --size 40G                                 # a file, by the disk's name
  sealblk resize --control-socket /run/vm7.control --size 40G   # a file, while its guest runs
  sealblk resize vm7.luks --size 40G                            # a file at rest
  lvextend -L 50G vg0/vm8
  sealblk resize --control-socket /run/vm8.control              # all of its device

Without --size the disk gets all the room of its file or device, in whole sectors.
With --size, a file grows as needed: it is 16M longer than the disk, unless the
header is detached. A device must be large enough already.

The guest sees the new size at once: no reset and no restart is needed. Then enlarge
the partition and the file system in the guest. The new space reads as noise until
the guest writes to it.

If sealblk is interrupted, the disk has the old size or the new one, and all its
data; repeat the command. No key is needed.

A disk becomes smaller only with --shrink, and never while it is served. The data
behind its new end are lost, and a file is cut there. First make the partitions
and file systems smaller in the guest. Make a device smaller only afterwards.

`sealblk resize DISK` refuses a disk that is being served (exit code 5): give its
name or its control socket instead. That needs the privilege RegisterVM.";

/// Change the size of a disk; the guest of a served disk sees the new size at once
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
#[command(group = ArgGroup::new("target").required(true).args(["disk", "control_socket"]))]
pub(super) struct Resize {
    /// The disk's file or device, or its name on this host (`sealblk define`)
    #[arg(value_name = "DISK|NAME")]
    disk: Option<PathBuf>,
    /// The file that holds the header, if it is detached
    #[arg(long, value_name = "FILE", requires = "disk")]
    header: Option<PathBuf>,
    /// The control socket of `sealblk serve`, to resize a disk that is being served
    #[arg(long, value_name = "SOCK", conflicts_with_all = ["header", "shrink", "take_over"])]
    control_socket: Option<PathBuf>,
    /// The new size of the disk, as in 40G [default: all the room of its file or device]
    #[arg(long)]
    size: Option<Size>,
    /// Also make the disk smaller. You lose the data behind its new end
    #[arg(long, requires = "size")]
    shrink: bool,
    #[command(flatten)]
    take_over: TakeOver,
}

impl Resize {
    pub(super) fn run(self, host: &Host) -> Result<(), Failure> {
        let capacity = self.size.map(|Size(bytes)| bytes);
        let target = match (self.disk, self.control_socket) {
            (Some(disk), _) => host.target(&disk, self.header.as_deref())?,
            (None, socket) => Target::Served(socket.unwrap_or_default()),
        };
        match target {
            Target::AtRest(volume) => at_rest(&volume, capacity, self.shrink, &self.take_over),
            Target::Served(_) if self.shrink => Err(Failure::NotWhileServed { option: "--shrink" }),
            Target::Served(_) if self.take_over.is_given() => Err(Failure::NotWhileServed {
                option: "--take-over",
            }),
            Target::Served(socket) => while_served(&socket, capacity),
        }
    }
}

fn at_rest(
    volume: &VolumeArgs,
    capacity: Option<u64>,
    shrink: bool,
    take_over: &TakeOver,
) -> Result<(), Failure> {
    let files = volume
        .open_to_resize(take_over)
        .map_err(|failure| match failure {
            Failure::Storage(StorageError::InUse { path }) => Failure::MayBeServed { path },
            other => other,
        })?;
    let (_, payload) = files.parts();
    let mut locked = files.locked()?;
    let resized = locked.resize(payload, Wanted { capacity, shrink });
    tell(
        &volume.disk,
        resized.map_err(|reason| reason.at(volume.header_path()))?,
    )
}

/// Asks the process that serves the disk.
fn while_served(socket: &Path, capacity: Option<u64>) -> Result<(), Failure> {
    #[derive(Deserialize)]
    struct Reply {
        before: u64,
        capacity: u64,
    }
    let answer: Reply = served::ask(socket, "Resize", json!({ "capacity": capacity }))?;
    let (from, to) = (answer.before, answer.capacity);
    tell(socket, Resized { from, to })
}

fn tell(disk: &Path, Resized { from, to }: Resized) -> Result<(), Failure> {
    let (disk, from, to) = (text::shown(disk), Size(from), Size(to));
    output::print(&match from == to {
        true => format!("{disk}: the disk has {to} already\n"),
        false => format!("{disk}: the disk has {to} (before: {from})\n"),
    })
}
