//! The units of disks: sealblk asks systemd to start and stop them, and why they do not run.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};

use super::failure::Failure;
use crate::disks::DiskName;

/// The service that serves a disk.
fn service(name: &DiskName) -> String {
    format!("sealblk@{name}.service")
}

/// Has systemd start or stop the service of a disk.
pub(super) fn order(verb: &'static str, name: &DiskName) -> Result<(), Failure> {
    let unit = service(name);
    match Command::new("systemctl").args([verb, &unit]).status() {
        Ok(status) if status.success() => Ok(()),
        Ok(_) => Err(Failure::Unit { verb, unit }),
        Err(source) => Err(Failure::NoSystemd { source }),
    }
}

/// Why disks are not served, as far as systemd knows; nothing on a host without it.
pub(super) fn reasons(names: &[&DiskName]) -> BTreeMap<DiskName, String> {
    if names.is_empty() {
        return BTreeMap::new();
    }
    let mut show = Command::new("systemctl");
    show.args(["show", "--property=Id,ActiveState,ExecMainStatus,StatusText"]);
    show.args(names.iter().map(|name| service(name)));
    let output = show.stdin(Stdio::null()).stderr(Stdio::null()).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let text = text.unwrap_or_default();
    let units = text.split("\n\n").map(|unit| {
        let lines = unit.lines().filter_map(|line| line.split_once('='));
        lines.collect::<BTreeMap<_, _>>()
    });
    let reason = |unit: BTreeMap<&str, &str>| {
        let name = unit
            .get("Id")?
            .strip_prefix("sealblk@")?
            .strip_suffix(".service")?;
        let told = match (*unit.get("ActiveState")?, *unit.get("ExecMainStatus")?) {
            ("inactive", "0") => return None,
            ("activating", "0") => "systemd starts it".to_owned(),
            (_, "0") => return None,
            ("activating", code) => {
                format!(
                    "it ended with exit code {code}, and systemd starts it again: `journalctl -u sealblk@{name}`"
                )
            }
            (_, code) => format!("it ended with exit code {code}: `journalctl -u sealblk@{name}`"),
        };
        Some((name.parse().ok()?, told))
    };
    units.filter_map(reason).collect()
}

/// Has systemd start the disk no more after a boot. Where its unit was not enabled, or there is no systemd, nothing has to be done.
pub(super) fn disable(name: &DiskName) {
    let mut disable = Command::new("systemctl");
    disable.args(["--quiet", "disable", &service(name)]);
    let _ = disable
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
}
