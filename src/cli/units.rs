//! The units of disks: sealblk asks systemd to start and stop them, and why they do not run.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

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

/// Starts disks for a domain, and says why one does not start. One that takes longer is served when it is ready: its socket is there, and QEMU
/// waits.
pub(super) fn start_within(names: &[&DiskName], patience: Duration) -> Result<(), Failure> {
    let mut start = Command::new("systemctl");
    start.arg("start");
    start.args(names.iter().flat_map(|name| [socket(name), service(name)]));
    start
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = start.spawn().map_err(|source| Failure::NoSystemd { source })?;
    let began = Instant::now();
    while began.elapsed() < patience {
        match child.try_wait() {
            Ok(None) => thread::sleep(Duration::from_millis(10)),
            Ok(Some(status)) if status.success() => return Ok(()),
            _ => {
                let failed = names.iter().find(|name| !is_active(name));
                return Err(Failure::NotStarted {
                    name: failed
                        .or(names.first())
                        .map_or(String::new(), ToString::to_string),
                    said: failed.map(|name| last_words(name)).unwrap_or_default(),
                });
            }
        }
    }
    // systemd continues with what it was asked for.
    let _ = child.kill();
    let _ = child.wait();
    Ok(())
}

/// What the service of a disk has said at its end.
fn last_words(name: &DiskName) -> String {
    let mut journal = Command::new("journalctl");
    journal.args(["--quiet", "--lines=20", "--output=cat", "--unit", &service(name)]);
    let output = journal.stdin(Stdio::null()).stderr(Stdio::null()).output();
    let text = output
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    let begin = lines.iter().rposition(|line| line.starts_with("sealblk: "));
    let said = lines.into_iter().skip(begin.unwrap_or(usize::MAX));
    let said = said.take_while(|line| line.starts_with("sealblk: ") || line.starts_with("  cause: "));
    said.map(str::trim).collect::<Vec<_>>().join("; ")
}

/// Has systemd stop the services of disks, whose sockets stay, and does not wait for that: storage may not answer.
pub(super) fn stop_services(names: &[&DiskName]) {
    let mut stop = Command::new("systemctl");
    stop.args(["stop", "--no-block"])
        .args(names.iter().map(|name| service(name)));
    let _ = stop
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
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
