//! `sealblk generate-units`: what the definitions of disks say to systemd, which calls this as a generator (systemd.generator(7)) at each boot
//! and each `systemctl daemon-reload`.
//!
//! A definition says where its disk is, so that the disk's unit waits for the file system or device, and which group and mode the
//! socket for QEMU has, which systemd binds.

use std::fmt::Write;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::Args;

use super::Host;
use super::failure::Failure;
use crate::disks::{Definition, DiskName};

/// Write drop-ins of the units of all disks; systemd calls it
#[derive(Debug, Args)]
pub(super) struct GenerateUnits {
    /// The directory for them; systemd names two more, for units of another priority
    #[arg(num_args = 1..=3)]
    directories: Vec<PathBuf>,
}

/// The name of each drop-in: what an administrator adds comes after it.
const DROP_IN: &str = "10-definition.conf";

impl GenerateUnits {
    pub(super) fn run(self, host: &Host) -> Result<(), Failure> {
        let directory = self.directories.first().cloned().unwrap_or_default();
        for name in host.disks().names()? {
            // One that is wrong keeps no other disk from being started, and `start` says what is wrong with it.
            let definition = match host.disks().definition(&name) {
                Ok(definition) => definition,
                Err(error) => {
                    tracing::warn!(disk = %name, "its units have no drop-ins: {error}");
                    continue;
                }
            };
            let path = host.disks().path(&name);
            for (unit, text) in [("service", service(&definition)), ("socket", socket(&definition))] {
                if !text.is_empty() {
                    let text = format!("# From {}\n{text}", path.display());
                    write(&directory, &name, unit, &text)?;
                }
            }
        }
        Ok(())
    }
}

fn write(directory: &Path, name: &DiskName, unit: &str, text: &str) -> Result<(), Failure> {
    let directory = directory.join(format!("sealblk@{name}.{unit}.d"));
    let path = directory.join(DROP_IN);
    let write = || -> io::Result<()> {
        fs::create_dir_all(&directory)?;
        fs::write(&path, text)
    };
    write().map_err(|source| Failure::Look {
        path: path.clone(),
        source,
    })
}

/// What the service waits for, and what it may open.
fn service(definition: &Definition) -> String {
    let (mut unit, mut service) = (String::new(), String::new());
    for path in [Some(definition.disk()), definition.header()]
        .into_iter()
        .flatten()
    {
        let Some(text) = path.to_str() else { continue };
        if path.starts_with("/dev") {
            // One that is there need not be waited for, also on a host whose devices systemd does not know.
            if !path.exists() {
                let device = device_unit(text);
                let _ = writeln!(unit, "Wants={device}\nAfter={device}");
            }
            // With the devices that it is a part of, or that are a part of it, which have locks as well.
            service.push_str("PrivateDevices=no\nDevicePolicy=closed\nDeviceAllow=block-* rw\n");
            continue;
        }
        let text = quoted(text);
        let _ = writeln!(unit, "RequiresMountsFor={text}");
        if ["/home", "/root", "/run/user"]
            .iter()
            .any(|home| path.starts_with(home))
        {
            service.push_str("ProtectHome=tmpfs\n");
            let _ = writeln!(service, "BindPaths=-{text}");
        }
        // If it is not there, `start` says so.
        let _ = writeln!(service, "ReadWritePaths=-{text}");
    }
    format!("[Unit]\n{unit}[Service]\n{service}")
}

fn socket(definition: &Definition) -> String {
    let [group, mode] = definition.socket();
    let mut unit = String::new();
    for (setting, value) in [("SocketGroup", group), ("SocketMode", mode)] {
        if let Some(value) = value {
            let _ = writeln!(unit, "{setting}={}", value.replace('%', "%%"));
        }
    }
    match unit.is_empty() {
        true => unit,
        false => format!("[Socket]\n{unit}"),
    }
}

/// A word of a unit file (systemd.syntax(7)).
fn quoted(text: &str) -> String {
    let text = text.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%");
    format!("\"{text}\"")
}

/// The unit of a device (systemd-escape --path).
fn device_unit(path: &str) -> String {
    let parts: Vec<_> = path.split('/').filter(|part| !part.is_empty()).collect();
    let mut name = String::new();
    for (at, byte) in parts.join("/").bytes().enumerate() {
        match byte {
            b'/' => name.push('-'),
            b'.' if at == 0 => name.push_str("\\x2e"),
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b':' | b'_' | b'.' => name.push(char::from(byte)),
            _ => {
                let _ = write!(name, "\\x{byte:02x}");
            }
        }
    }
    format!("{name}.device")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_device_has_the_unit_that_systemd_names() {
        for path in [
            "/dev/vg0/vm7",
            "/dev/mapper/vg0-a--b",
            "/dev/disk/by-id/a b:c.d",
            "/dev//ä",
        ] {
            let mut escape = Command::new("systemd-escape");
            let output = escape.args(["--path", "--suffix=device", path]).output().unwrap();
            let expected = String::from_utf8(output.stdout).unwrap();
            assert_eq!(device_unit(path), expected.trim_end(), "{path}");
        }
    }
}
