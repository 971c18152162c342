//! Which front-end may have the disk, where QEMUs of several guests run as one user: the one that a file names.
//!
//! What manages the guests writes the file (libvirt's hook) before the front-end connects. It is read at each connection, so that it can
//! name another one then; without it no front-end is accepted.

#![allow(unsafe_code)] // SO_PEERSEC has no wrapper.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use crate::control::peer::Peer;
use crate::parsing;

/// What the file says of the front-end, as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registered {
    /// Its user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<u32>,
    /// Its security label (SELinux, AppArmor), on a host that tells one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// What systemd and libvirt call its machine, without what follows the last hyphen: a part of its control group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
}

/// Where the front-end is registered.
#[derive(Debug)]
pub struct Peers(PathBuf);

/// The longest such file, and the longest list of control groups.
const LONGEST: usize = 64 << 10;

impl Peers {
    /// The front-end that `file` names at the time of its connection.
    pub fn in_file(file: PathBuf) -> Self {
        Self(file)
    }

    /// Why a front-end is turned away, if it is.
    pub(super) fn check(&self, stream: &UnixStream) -> Result<(), String> {
        let content = match read(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(format!("none is registered in {}", self.0.display()));
            }
            content => content.map_err(|error| format!("{}: {error}", self.0.display()))?,
        };
        let registered: Registered =
            parsing::json(&content).map_err(|error| format!("{}: {error}", self.0.display()))?;
        let peer = Peer::of(stream).map_err(|error| error.to_string())?;
        if let Some(user) = registered.user
            && user != peer.user
        {
            return Err(format!("it runs as user {}, and not {user}", peer.user));
        }
        if let (Some(expected), Some(label)) = (&registered.label, label(stream))
            && *expected != label
        {
            return Err(format!("its security label is {label:?}, and not {expected:?}"));
        }
        if let Some(machine) = &registered.machine {
            let groups = read(Path::new(&format!("/proc/{}/cgroup", peer.process))).map_err(|error| {
                format!(
                    "the control group of process {} is not known: {error}",
                    peer.process
                )
            })?;
            if !is_in(&String::from_utf8_lossy(&groups), machine) {
                return Err(format!(
                    "process {} is not in the control group of {machine:?}",
                    peer.process
                ));
            }
        }
        Ok(())
    }
}

/// Whether one of the control groups (cgroups(7), /proc/PID/cgroup) is that of a machine, in a hierarchy of systemd
/// (`machine-qemu\x2d1\x2dvm7.scope`) or of libvirt alone (`qemu-1-vm7.libvirt-qemu`).
fn is_in(groups: &str, machine: &str) -> bool {
    let mut parts = groups.lines().flat_map(|line| line.split('/'));
    parts.any(|part| {
        let part = part.replace("\\x2d", "-");
        let name = part.strip_prefix("machine-").unwrap_or(&part);
        name.strip_prefix(machine)
            .is_some_and(|rest| rest.starts_with('-'))
    })
}

/// A short file, by calls that a confined process has.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let file = rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK,
        Mode::empty(),
    )?;
    let mut content = vec![0; LONGEST];
    let mut len = 0;
    while len < LONGEST {
        match rustix::io::read(&file, &mut content[len..])? {
            0 => break,
            more => len += more,
        }
    }
    content.truncate(len);
    Ok(content)
}

/// The security label of the other end (SO_PEERSEC), if the kernel has one for it. AppArmor adds a mode in parentheses.
fn label(stream: &UnixStream) -> Option<String> {
    let mut label = vec![0_u8; 4096];
    let mut bytes = libc::socklen_t::try_from(label.len()).ok()?;
    // SAFETY: the kernel writes at most `bytes` bytes to the vector, which is as long, and the length to `bytes`.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERSEC,
            label.as_mut_ptr().cast(),
            &raw mut bytes,
        )
    };
    label.truncate(bytes as usize);
    let text = String::from_utf8_lossy(&label);
    let text = text.trim_end_matches('\0');
    let name = text.split(" (").next().unwrap_or_default();
    (result == 0 && !name.is_empty()).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_known_by_its_control_group() {
        let systemd = "0::/machine.slice/machine-qemu\\x2d1\\x2dvm7.scope/libvirt/emulator\n";
        let libvirt = "1:cpu:/machine/qemu-1-vm7.libvirt-qemu\n0::/user.slice\n";
        for groups in [systemd, libvirt] {
            assert!(is_in(groups, "qemu-1"));
            for other in ["qemu-11", "qemu-2", "qemu", "1"] {
                assert_eq!(is_in(groups, other), other == "qemu", "{other}");
            }
        }
        assert!(!is_in(
            "0::/machine.slice/machine-qemu\\x2d11\\x2dvm7.scope\n",
            "qemu-1"
        ));
    }

    #[test]
    fn a_front_end_that_is_not_the_registered_one_is_turned_away() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("peer");
        let peers = Peers::in_file(file.clone());
        let (stream, _other) = UnixStream::pair().unwrap();
        let own = rustix::process::geteuid().as_raw();
        let say = |registered: Option<Registered>| {
            match registered {
                Some(registered) => std::fs::write(&file, serde_json::to_vec(&registered).unwrap()).unwrap(),
                None => drop(std::fs::remove_file(&file)),
            }
            peers.check(&stream)
        };
        let anybody = Registered {
            user: None,
            label: None,
            machine: None,
        };
        assert!(say(None).unwrap_err().contains("none is registered"));
        say(Some(anybody.clone())).unwrap();
        say(Some(Registered {
            user: Some(own),
            ..anybody.clone()
        }))
        .unwrap();
        let other = say(Some(Registered {
            user: Some(own + 1),
            ..anybody.clone()
        }));
        assert!(other.unwrap_err().contains("runs as user"));
        let other = say(Some(Registered {
            machine: Some("qemu-77777".into()),
            ..anybody.clone()
        }));
        assert!(other.unwrap_err().contains("control group"));
        std::fs::write(&file, "{\"user\": 0, \"users\": 1}").unwrap();
        peers.check(&stream).unwrap_err();
    }
}
