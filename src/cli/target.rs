//! The disk that a verb changes: named by its path, or by its name on this host, and then served or at rest.

use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use super::Host;
use super::failure::Failure;
use super::volume_args::VolumeArgs;
use crate::disks::{DiskName, Sockets};

/// Where a disk is changed.
#[derive(Debug)]
pub(super) enum Target {
    /// By the process that serves it, which has this control socket.
    Served(PathBuf),
    /// By the verb itself.
    AtRest(VolumeArgs),
}

impl Host {
    /// The disk that an operator means by `disk`. What has a slash is a path.
    ///
    /// # Errors
    /// [`Failure`], if it can be both a name and a path, or its definition cannot be used.
    pub(super) fn target(&self, disk: &Path, header: Option<&Path>) -> Result<Target, Failure> {
        let disks = self.disks();
        let name: Option<DiskName> = disk.to_str().and_then(|name| name.parse().ok());
        let Some(name) = name.filter(|name| disks.has(name)) else {
            let volume = VolumeArgs::new(disk.to_owned(), header.map(Path::to_owned));
            return Ok(Target::AtRest(volume));
        };
        if disk.symlink_metadata().is_ok() {
            return Err(Failure::NameOrPath { name });
        }
        if header.is_some() {
            return Err(Failure::HeaderOfName { name });
        }
        let definition = disks.definition(&name)?;
        let control = Sockets::of(&name).control;
        Ok(match is_served(&control) {
            true => Target::Served(control),
            false => Target::AtRest(VolumeArgs::new(definition.disk(), definition.header())),
        })
    }
}

/// The names of all disks that are being served, also of those that are not defined any more.
pub(super) fn served_names() -> Vec<DiskName> {
    let directories = fs::read_dir(Sockets::DIRECTORY).into_iter().flatten().flatten();
    let names = directories.filter_map(|entry| entry.file_name().to_str()?.parse::<DiskName>().ok());
    let mut names: Vec<_> = names
        .filter(|name| is_served(&Sockets::of(name).control))
        .collect();
    names.sort();
    names
}

/// Whether a process answers on a control socket, or this user cannot find out. A killed process has left one that refuses connections.
pub(super) fn is_served(control: &Path) -> bool {
    match UnixStream::connect(control) {
        Ok(_) => true,
        Err(error) => !matches!(
            error.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::ConnectionRefused
        ),
    }
}
