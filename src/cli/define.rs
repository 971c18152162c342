//! `sealblk define` and `undefine`: a disk's name on this host, and how it is served.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;

use super::failure::Failure;
use super::target::is_served;
use super::volume_args::VolumeArgs;
use super::{Host, output, text, units};
use crate::agent::Client;
use crate::disks::{Definition, DiskName, Sockets};
use crate::keys::RequestPurpose;

const AFTER_HELP: &str = "\
Examples:
  sealblk define vm7 --blk-file /srv/vms/vm7.luks --socket-group libvirt-qemu
  systemctl enable --now sealblk@vm7.socket

The definition is the file disks.d/NAME.toml beside the configuration: usually
/etc/sealblk/disks.d/NAME.toml. To change it, edit it: it has a line for each option
of `sealblk serve`, such as `num-queues = 4`. Then run `systemctl daemon-reload`, and
start the disk again.

QEMU finds the disk at /run/sealblk/NAME/disk.sock. Verbs for a served disk take NAME
in place of --control-socket.

If you do not give --volume, sealblk reads the UUID from the disk's header, and the disk
is served only while it holds that volume. An attacker with write access to the storage
may have replaced the header already: compare the UUID with what `sealblk create`
printed.";

const UNDEFINE_HELP: &str = "\
The disk's file, its data and its keys at the provider stay: `sealblk define` brings the
disk back. `sealblk erase` destroys a disk.

The agent drops the keys that it has in memory and in its sealed cache, unless another
disk needs them. The unit sealblk@NAME is disabled. A disk that is being served is
refused (exit code 5): stop it first.";

/// Define a disk of this host, so that units and verbs know it by its name
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Define {
    /// The disk's name, which is new on this host
    name: DiskName,
    /// Options of `sealblk serve`, among them --blk-file
    #[arg(
        value_name = "OPTIONS",
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    options: Vec<OsString>,
}

/// Remove a disk's definition from this host, and its keys from the memory of the key agent; the disk stays as it is
#[derive(Debug, Args)]
#[command(after_help = UNDEFINE_HELP)]
pub(super) struct Undefine {
    /// The disk's name
    name: DiskName,
    /// Also if the key agent cannot be asked
    #[arg(long)]
    force: bool,
}

impl Undefine {
    pub(super) fn run(self, host: &Host) -> Result<(), Failure> {
        undefine(host, &self.name, self.force)
    }
}

/// Removes the definition of a disk, and its keys from the agent; with `force` also if that cannot be asked.
pub(super) fn undefine(host: &Host, name: &DiskName, force: bool) -> Result<(), Failure> {
    let definition = host.disks().definition(name)?;
    if is_served(&Sockets::of(name).control) {
        return Err(Failure::Served { name: name.clone() });
    }
    match forget(host, &definition) {
        Err(failure) if !force => return Err(failure),
        Err(failure) => tracing::warn!("the key agent may keep keys of this disk: {failure}"),
        Ok(Err(processes)) => {
            let name = name.clone();
            return Err(Failure::ServedBy { name, processes });
        }
        Ok(Ok(())) => {}
    }
    units::disable(name);
    host.disks().undefine(name)?;
    units::reload();
    Ok(())
}

/// Has the agent forget the disk's keys, or tells of the processes that serve it. Without an agent, no key is kept.
fn forget(host: &Host, definition: &Definition) -> Result<Result<(), Vec<i32>>, Failure> {
    let socket = match host.agent_socket() {
        Ok(socket) => socket,
        Err(Failure::NoAgent { .. }) => return Ok(Ok(())),
        Err(failure) => return Err(failure),
    };
    let Some(volume) = definition.volume() else {
        return Ok(Ok(()));
    };
    Ok(Client::new(&socket, RequestPurpose::Attach).forget_volume(volume)?)
}

impl Define {
    pub(super) fn run(self, host: &Host) -> Result<(), Failure> {
        let mut definition = Definition::of_options(&self.options)
            .map_err(Failure::Options)?
            .map_err(Failure::Definition)?;
        let mut volume = None;
        if definition.lacks_volume() {
            let volume_args = VolumeArgs::new(definition.disk(), definition.header());
            let uuid = volume_args.inspect()?.locked()?.header().uuid();
            definition.set_volume(uuid);
            volume = Some(uuid);
        }
        let path: PathBuf = host.disks().define(&self.name, &definition)?;
        units::reload();
        let volume = volume.map_or(String::new(), |uuid| format!(" (volume {uuid})"));
        output::print(&format!("{}: {}{volume}\n", self.name, text::shown(&path)))
    }
}
