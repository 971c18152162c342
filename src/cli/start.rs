//! `sealblk start` and `stop`: a disk of this host, by its name. systemd starts and ends the process that serves it.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use clap::Args;
use rustix::fs::{Gid, Uid};
use sealblk_control::socket::{ACTIVATED, is_activated};

use super::failure::Failure;
use super::volume_args::{TakeOver, VolumeArgs};
use super::{Host, serve, units};
use crate::disks::{Definition, DiskName, Sockets};

const AFTER_HELP: &str = "\
systemd serves the disk, by the units sealblk@NAME.socket and sealblk@NAME.service.
`systemctl enable sealblk@NAME.socket` also has it do so after each boot.

With --foreground, sealblk serves the disk itself, as `sealblk serve` does with the
options of the disk's definition: that is what the unit calls. If a service manager has
started it with a socket, it serves that one. OPTIONS are further options of `sealblk
serve`, for this start: --incoming, --take-over N or --no-wait.

With --prepare, which the unit calls as root, sealblk gives the disk's file or device to
the user that owns /run/sealblk/NAME/control: the unit's. It does that only if the disk is the
volume of the definition.";

/// Serve a disk that this host has defined
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Start {
    /// The disk's name (`sealblk define`)
    name: DiskName,
    /// Serve it in this process
    #[arg(long)]
    foreground: bool,
    /// Accept another `sealblk serve` that has the disk: a guest migrates here. This holds for each start while the other one has the disk,
    /// until `sealblk stop`, or `sealblk start` without it
    #[arg(long, conflicts_with_all = ["foreground", "prepare"])]
    incoming: bool,
    /// Give the disk's file or device to the user that is to serve it
    #[arg(long, conflicts_with = "foreground")]
    prepare: bool,
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
        match (self.foreground, self.prepare) {
            (true, _) => Err(self.in_foreground(host, &definition)?),
            (_, true) => prepare(&definition, &Sockets::of(&self.name)),
            _ => {
                note_incoming(&self.name, self.incoming)?;
                units::order("start", &self.name)
            }
        }
    }

    /// Becomes the process that serves the disk. Returns if that fails.
    fn in_foreground(self, host: &Host, definition: &Definition) -> Result<Failure, Failure> {
        let sockets = Sockets::of(&self.name);
        // When the other side has gone, a start is like any other: it can wait for its key, and keeps others out.
        let volume = VolumeArgs::new(definition.disk(), definition.header());
        let is_incoming = sockets.incoming().exists() && volume.open_to_change(&TakeOver::default()).is_err();
        let directory = of_control(&sockets);
        make(directory).map_err(|source| Failure::Make {
            path: directory.to_owned(),
            source,
        })?;
        let option = |name: &str, path: PathBuf| {
            let mut option = OsString::from(name);
            option.push(path);
            option
        };
        let mut arguments = host.arguments();
        arguments.push("serve".into());
        if is_activated() {
            arguments.extend(definition.arguments_without_socket());
            arguments.push(format!("--fd={ACTIVATED}").into());
        } else {
            arguments.extend(definition.arguments());
            arguments.push(option("--socket-path=", sockets.front_end));
        }
        if !definition.may_be_unencrypted() {
            arguments.push(option("--control-socket=", sockets.control));
        }
        if is_incoming {
            arguments.push("--incoming".into());
        }
        arguments.extend(self.options);
        Ok(serve::execute_with(arguments))
    }
}

impl Stop {
    pub(super) fn run(self) -> Result<(), Failure> {
        units::order("stop", &self.name)?;
        let _ = fs::remove_file(Sockets::of(&self.name).incoming());
        Ok(())
    }
}

/// Leaves word to each process of a disk's unit whether it is to accept the other side of a migration.
pub(super) fn note_incoming(name: &DiskName, incoming: bool) -> Result<(), Failure> {
    let sockets = Sockets::of(name);
    let path = sockets.incoming();
    let noted = match incoming {
        true => make(&sockets.directory).and_then(|()| File::create_new(&path).map(drop)),
        false => fs::remove_file(&path),
    };
    let noted = match noted {
        Err(error) if [io::ErrorKind::NotFound, io::ErrorKind::AlreadyExists].contains(&error.kind()) => {
            Ok(())
        }
        noted => noted,
    };
    noted.map_err(|source| Failure::Make { path, source })
}

/// The directory of the control socket: the user's who serves the disk.
fn of_control(sockets: &Sockets) -> &Path {
    sockets.control.parent().unwrap_or(&sockets.directory)
}

/// Makes a directory of a disk.
pub(super) fn make(directory: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o755).create(directory)
}

/// Gives a disk, and its header if that is detached, to the user who is to serve it.
fn prepare(definition: &Definition, sockets: &Sockets) -> Result<(), Failure> {
    let directory = of_control(sockets);
    let directory = fs::metadata(directory).map_err(|source| Failure::Look {
        path: directory.to_owned(),
        source,
    })?;
    let (user, group) = (directory.uid(), directory.gid());
    let volume = VolumeArgs::new(definition.disk(), definition.header());
    let files = volume.inspect()?;
    if let Some(expected) = definition.volume() {
        let found = files.locked()?.uuid();
        if found != expected {
            return Err(Failure::NotItsVolume {
                disk: volume.header_path().to_owned(),
                expected,
                found,
            });
        }
    }
    for file in files.all() {
        let metadata = file.metadata().map_err(Failure::Host)?;
        if (metadata.uid(), metadata.gid()) == (user, group) {
            continue;
        }
        // By a second name it could be a file that is no disk.
        if metadata.is_file() && metadata.nlink() != 1 {
            tracing::warn!("the disk stays its owner's: its file has several names");
            continue;
        }
        // On a file system where root may not, the user may have access nevertheless, and `serve` says if it has not.
        if let Err(error) = rustix::fs::fchown(file, Some(Uid::from_raw(user)), Some(Gid::from_raw(group))) {
            tracing::warn!(%error, "the disk stays its owner's: it cannot be given to user {user}");
        }
    }
    Ok(())
}
