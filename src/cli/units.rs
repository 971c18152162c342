//! The units of disks: sealblk asks systemd to start and stop them, and why they do not run.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

use super::failure::Failure;
use super::stderr;
use crate::disks::DiskName;

/// The service that serves a disk.
fn service(name: &DiskName) -> String {
    format!("sealblk@{name}.service")
}

/// The socket that has systemd start the service.
fn socket(name: &DiskName) -> String {
    format!("sealblk@{name}.socket")
}

/// Has systemd start or stop a disk: its socket, too, since that starts the service when QEMU connects.
pub(super) fn order(verb: &'static str, name: &DiskName) -> Result<(), Failure> {
    run(verb, service(name), &[&socket(name)])
}

fn run(verb: &'static str, unit: String, others: &[&str]) -> Result<(), Failure> {
    match Command::new("systemctl")
        .arg(verb)
        .args(others)
        .arg(&unit)
        .status()
    {
        Ok(status) if status.success() => Ok(()),
        Ok(_) => Err(Failure::Unit { verb, unit }),
        Err(source) => Err(Failure::NoSystemd { source }),
    }
}

/// Whether systemd runs the service of a disk.
pub(super) fn is_active(name: &DiskName) -> bool {
    let mut is_active = Command::new("systemctl");
    is_active.args(["--quiet", "is-active", &service(name)]);
    is_active.status().is_ok_and(|status| status.success())
}

/// Has the service of a disk upgrade it (its ExecReload=).
pub(super) fn reload_service(name: &DiskName) -> Result<(), Failure> {
    run("reload", service(name), &[])
}

/// Why disks are not served, as far as systemd knows; nothing on a host without it.
pub(super) fn reasons(names: &[&DiskName]) -> BTreeMap<DiskName, String> {
    if names.is_empty() {
        return BTreeMap::new();
    }
    let mut show = Command::new("systemctl");
    show.args(["show", "--property=Id,ActiveState,ExecMainStatus,Result"]);
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
        let failed = match *unit.get("ExecMainStatus")? {
            "0" | "" => *unit.get("Result")?,
            code => &format!("exit code {code}"),
        };
        let told = match *unit.get("ActiveState")? {
            "activating" => "systemd starts it".to_owned(),
            "failed" => format!("its service has failed ({failed}): see `journalctl -u sealblk@{name}`"),
            _ => return None,
        };
        Some((name.parse().ok()?, told))
    };
    units.filter_map(reason).collect()
}

/// Has systemd look at the definitions again ([`generate`](super::generate)), where there is a systemd.
pub(super) fn reload() {
    if Path::new("/run/systemd/system").is_dir() {
        let status = Command::new("systemctl").arg("daemon-reload").status();
        if !status.is_ok_and(|status| status.success()) {
            stderr::note("`systemctl daemon-reload` failed: call it before you start the disk");
        }
    }
}

/// Has systemd start the disk no more after a boot. Where its unit was not enabled, or there is no systemd, nothing has to be done.
pub(super) fn disable(name: &DiskName) {
    let mut disable = Command::new("systemctl");
    disable.args(["--quiet", "disable", &service(name), &socket(name)]);
    let _ = disable
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
}
