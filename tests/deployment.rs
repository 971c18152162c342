//! What an operator takes from the docs and scripts: units and domains fit together, and scripts say what they mean to.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The units of docs/agent.md by their names, each with its settings; a line that ends in a backslash goes on.
fn units() -> BTreeMap<String, Vec<(String, String)>> {
    let text = fs::read_to_string(repository("docs/agent.md")).unwrap();
    let mut units = BTreeMap::new();
    for block in text.split("```ini\n").skip(1) {
        let block = block.split("```").next().unwrap().replace("\\\n", " ");
        let name = block.lines().next().unwrap();
        let name = name
            .strip_prefix("# /etc/systemd/system/")
            .expect("a unit's first line is its path");
        let settings = block.lines().filter_map(|line| line.split_once('='));
        let settings = settings.map(|(key, value)| (key.to_owned(), value.to_owned()));
        units.insert(name.to_owned(), settings.collect());
    }
    units
}

fn setting<'u>(unit: &'u [(String, String)], key: &str) -> Option<&'u str> {
    unit.iter()
        .find(|(name, _)| name == key)
        .map(|(_, value)| value.as_str())
}

/// An attribute of an element of qemu/libvirt.xml, as a parser of XML reads it.
fn domain(element: &str, attribute: &str) -> String {
    const READ: &str = "import sys, xml.etree.ElementTree as tree\n\
        file, element, attribute = sys.argv[1:]\n\
        print(tree.parse(file).find(element).attrib[attribute])";
    let mut python = Command::new("python3");
    python.args(["-c", READ]).arg(repository("qemu/libvirt.xml"));
    let output = python.args([element, attribute]).output().unwrap();
    assert!(
        output.status.success(),
        "{element}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
}

/// The sockets that a command line or a domain names under /run.
fn sockets(text: &str) -> Vec<String> {
    let words = text.split(|c: char| c.is_whitespace() || "'\"".contains(c));
    words
        .filter(|word| word.starts_with("/run/"))
        .map(str::to_owned)
        .collect()
}

/// The agent's unit had the directory of the disks' sockets for its own, so that systemd removed them with each restart.
#[test]
fn no_units_end_takes_the_sockets_of_another() {
    let units = units();
    let agent = &units["sealblk-agent.service"];
    let disk = &units["sealblk@.service"];
    let mut owned = vec![("sealblk-agent.service", sealblk::agent::DEFAULT_SOCKET.to_owned())];
    for instance in ["vm7", "vm8"] {
        let command = setting(disk, "ExecStart").unwrap().replace("%i", instance);
        let of_disk = sockets(&command);
        assert_eq!(of_disk.len(), 2, "{command}");
        owned.extend(of_disk.into_iter().map(|socket| (instance, socket)));
    }
    let path = domain("devices/disk[@type='vhostuser']/source", "path");
    assert!(
        owned.contains(&("vm7", path.clone())),
        "{path}: no unit serves it: {owned:?}"
    );

    // What systemd removes when a unit ends: the innermost of each directory (systemd.exec(5)).
    let removed = |unit: &[(String, String)], instance: &str| -> Option<String> {
        let preserved = setting(unit, "RuntimeDirectoryPreserve") == Some("yes");
        let directory = setting(unit, "RuntimeDirectory").filter(|_| !preserved)?;
        Some(format!("/run/{}/", directory.replace("%i", instance)))
    };
    for (name, unit) in [("sealblk-agent.service", agent), ("vm7", disk), ("vm8", disk)] {
        let Some(directory) = removed(unit, name) else {
            continue;
        };
        for (owner, socket) in &owned {
            assert!(
                *owner == name || !socket.starts_with(&directory),
                "the end of {name} removes {socket} of {owner}"
            );
        }
    }
    // Each has a directory to bind its sockets in.
    for (name, unit) in [("sealblk-agent.service", agent), ("vm7", disk)] {
        let directory = format!(
            "/run/{}/",
            setting(unit, "RuntimeDirectory").unwrap().replace("%i", name)
        );
        let own = owned.iter().filter(|(owner, _)| *owner == name);
        assert!(own.clone().count() > 0 && own.clone().all(|(_, socket)| socket.starts_with(&directory)));
        assert_eq!(setting(unit, "Type"), Some("notify"), "{name}");
    }
}

/// A double hyphen in the domain's comment kept `virsh define` from reading it.
#[test]
fn domain_is_xml_and_shares_the_guests_memory() {
    assert_eq!(domain("memoryBacking/source", "type"), "memfd");
    assert_eq!(domain("memoryBacking/access", "mode"), "shared");
    assert_eq!(
        domain("devices/disk[@type='vhostuser']/source/reconnect", "enabled"),
        "yes"
    );
}

/// The shell told of the QEMU that had aborted on its own, in the middle of what the quick start prints.
#[test]
fn a_kvm_that_aborts_qemu_is_passed_over_in_silence() {
    let dir = tempfile::tempdir().unwrap();
    let build = dir.path().join("build");
    fs::create_dir_all(build.join("guest")).unwrap();
    let qemu = dir.path().join("qemu-system-x86_64");
    let ran = dir.path().join("ran");
    fs::write(&qemu, format!("#!/bin/sh\n: >{}\nkill -ABRT $$\n", ran.display())).unwrap();
    fs::set_permissions(&qemu, fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap());
    let mut accel = Command::new(repository("qemu/accel"));
    accel
        .env("PATH", path)
        .env("SEALBLK_BUILD", &build)
        .env_remove("SEALBLK_ACCEL");
    let output = accel.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    if !ran.exists() {
        eprintln!("skipped: this user has no /dev/kvm to try");
        return;
    }
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "tcg,thread=multi -cpu max\n"
    );
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}
