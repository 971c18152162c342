//! What an operator takes from the docs and scripts: units and domains fit together, and scripts say what they mean to.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::process::Process;
use common::serve::sealblk_path;
use common::volume::run;
use sealblk::disks::Sockets;

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// What a page of the docs shows in this language, block by block.
fn blocks(page: &str, language: &str) -> Vec<String> {
    let text = fs::read_to_string(repository(page)).unwrap();
    let fence = format!("```{language}\n");
    let blocks = text.split(&fence).skip(1);
    blocks
        .map(|block| block.split("```").next().unwrap().to_owned())
        .collect()
}

/// The units that are installed, and drop-ins of the docs, by their names.
fn unit_files() -> BTreeMap<String, String> {
    let drop_ins = ["docs/libvirt.md", "docs/agent.md"].map(|page| blocks(page, "ini"));
    let drop_ins = drop_ins.into_iter().flatten().map(|block| {
        let path = block.lines().next().unwrap();
        let name = path
            .strip_prefix("# /etc/systemd/system/")
            .expect("a drop-in's first line is its path");
        (name.to_owned(), block)
    });
    let units = fs::read_dir(repository("qemu/host/systemd")).unwrap();
    let units = units.map(|unit| unit.unwrap().path()).filter_map(|path| {
        let name = path.file_name()?.to_str()?.to_owned();
        let is_unit = [".service", ".socket", ".target"]
            .iter()
            .any(|kind| name.ends_with(kind));
        is_unit.then(|| (name, fs::read_to_string(&path).unwrap()))
    });
    drop_ins.chain(units).collect()
}

/// The units by their names, each with its settings; a line that ends in a backslash goes on.
fn units() -> BTreeMap<String, Vec<(String, String)>> {
    let settings = |text: String| {
        let text = text.replace("\\\n", " ");
        let settings = text.lines().filter_map(|line| line.split_once('='));
        let settings = settings.map(|(key, value)| (key.to_owned(), value.to_owned()));
        settings.collect()
    };
    let files = unit_files().into_iter();
    files.map(|(name, text)| (name, settings(text))).collect()
}

fn setting<'u>(unit: &'u [(String, String)], key: &str) -> Option<&'u str> {
    unit.iter()
        .find(|(name, _)| name == key)
        .map(|(_, value)| value.as_str())
}

/// An attribute of an element in a file of XML, as another parser reads it.
fn attribute(file: &Path, element: &str, attribute: &str) -> String {
    const READ: &str = "import sys, xml.etree.ElementTree as tree\n\
        file, element, attribute = sys.argv[1:]\n\
        print(tree.parse(file).find(element).attrib[attribute])";
    let mut python = Command::new("python3");
    python.args(["-c", READ]).arg(file);
    let output = python.args([element, attribute]).output().unwrap();
    assert!(
        output.status.success(),
        "{element}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
}

/// The same of the element of the disk vm7 in a domain.
fn of_disk(element: &str, name: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("disks.d")).unwrap();
    fs::write(
        dir.path().join("disks.d/vm7.toml"),
        "blk-file = '/srv/vms/vm7.luks'\n",
    )
    .unwrap();
    fs::write(dir.path().join("config.toml"), "").unwrap();
    let mut xml = Command::new(sealblk_path());
    xml.arg("--config").arg(dir.path().join("config.toml"));
    let xml = run(xml.args(["libvirt", "xml", "vm7", "--target", "vda"])).stdout;
    let file = dir.path().join("disk.xml");
    fs::write(&file, xml).unwrap();
    attribute(&file, element, name)
}

/// The agent's unit had the directory of the disks' sockets for its own, so that systemd removed them with each restart.
#[test]
fn no_units_end_takes_the_sockets_of_another() {
    let units = units();
    let agent = &units["sealblk-agent.service"];
    let disk = &units["sealblk@.service"];
    let mut owned = vec![("sealblk-agent.service", sealblk::agent::DEFAULT_SOCKET.to_owned())];
    for instance in ["vm7", "vm8"] {
        assert_eq!(
            setting(disk, "ExecStart"),
            Some("/usr/bin/sealblk start --foreground %i")
        );
        let of_disk = Sockets::of(&instance.parse().unwrap());
        for socket in [of_disk.front_end, of_disk.control] {
            owned.push((instance, socket.to_str().unwrap().to_owned()));
        }
    }
    let path = of_disk("source", "path");
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
    // systemd listens where QEMU, verbs and other disks look for them; and the disk has a directory to bind its own in.
    let listens = |unit: &str| setting(&units[unit], "ListenStream").map(str::to_owned);
    assert_eq!(
        listens("sealblk-agent.socket").as_deref(),
        Some(sealblk::agent::DEFAULT_SOCKET)
    );
    assert_eq!(listens("sealblk@.socket").unwrap().replace("%i", "vm7"), path);
    let directory = setting(disk, "RuntimeDirectory").unwrap().replace("%i", "vm7");
    let control = Sockets::of(&"vm7".parse().unwrap()).control;
    assert_eq!(control.parent().unwrap(), Path::new("/run").join(directory));
    for unit in [agent, disk] {
        assert_eq!(setting(unit, "Type"), Some("notify"));
    }
}

/// Five failures within half a second used up all starts that systemd allows, and a disk stayed down after its cause was mended.
#[test]
fn units_are_ones_that_systemd_knows_and_starts_again() {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in unit_files() {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text.replace("/usr/bin/sealblk", sealblk_path())).unwrap();
    }
    let mut verify = Command::new("systemd-analyze");
    verify.env("SYSTEMD_UNIT_PATH", format!("{}:", dir.path().display()));
    verify.args(["verify", "--man=no"]);
    for kind in ["service", "socket"] {
        let unit = |instance| dir.path().join(format!("sealblk@{instance}.{kind}"));
        fs::copy(unit(""), unit("vm7")).unwrap();
    }
    let services = ["sealblk-agent.service", "sealblk@vm7.service", "sealblk.target"];
    let output = verify
        .args(services.map(|service| dir.path().join(service)))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !said.contains("sealblk"), "{output:?}");

    let units = units();
    for (name, unit) in units.iter().filter(|(name, _)| name.ends_with(".service")) {
        assert_eq!(setting(unit, "StartLimitIntervalSec"), Some("0"), "{name}");
    }
    let agent = &units["sealblk-agent.service"];
    assert_eq!(setting(agent, "Restart"), Some("on-failure"));
    let pause: u32 = setting(agent, "RestartSec").unwrap().parse().unwrap();
    assert!(pause > 0);
    // Wrong settings and a damaged log: the two of docs/cli.md that no time mends.
    assert_eq!(setting(agent, "RestartPreventExitStatus"), Some("2 3"));
    // QEMU connects again, and the socket starts the disk's service, however often.
    assert_eq!(setting(&units["sealblk@.service"], "Restart"), Some("no"));
    assert_eq!(
        setting(&units["sealblk@.socket"], "TriggerLimitIntervalSec"),
        Some("0")
    );
}

/// The process that serves a disk sees as little of its host as systemd can arrange for one that has to know who its callers are.
#[test]
fn a_disks_unit_is_confined() {
    let mut security = Command::new("systemd-analyze");
    security.args(["security", "--offline=true", "--threshold=5"]);
    let unit = security.arg(repository("qemu/host/systemd/sealblk@.service"));
    let output = unit.output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
}

/// The configuration that the docs began with named a user that no host has, so that the agent did not start.
#[test]
fn commands_for_a_libvirt_host_work_in_their_order() {
    let host = tempfile::tempdir().unwrap();
    let path = |name: &str| host.path().join(name);
    let config = fs::read_to_string(repository("qemu/host/config.toml")).unwrap();
    // The usual socket, and the user, are an installed host's.
    let config = config.replace(
        "\n[agent]\n",
        &format!("\n[agent]\nsocket = {:?}\n", path("agent.sock")),
    );
    let config = config.replace("user = \"sealblk\"", "user = 0");
    fs::write(path("config.toml"), config).unwrap();
    // systemd makes it, by StateDirectory.
    fs::create_dir(host.path().join("state")).unwrap();
    let mut agent = Command::new(sealblk_path());
    agent.args(["--config", "config.toml", "--state-dir", "state", "agent"]);
    let agent = Process::spawn(agent.current_dir(&host).env_remove("SEALBLK_LOG"));
    agent.wait_stderr("the agent answers");

    let dir = Path::new(sealblk_path()).parent().unwrap().display();
    let search = format!("{dir}:{}", std::env::var("PATH").unwrap());
    let mut ran = Vec::new();
    for line in blocks("docs/libvirt.md", "sh").remove(1).lines() {
        let line = line.split("  #").next().unwrap().replace("/srv/", "srv/");
        let Some(word) = line.split_whitespace().next() else {
            continue;
        };
        if ["systemctl", "virsh"].contains(&word) || line.starts_with("sealblk libvirt") {
            continue;
        }
        let mut shell = Command::new("sh");
        shell.args(["-c", &line]).current_dir(&host);
        shell.env("PATH", &search).env("SEALBLK_CONFIG", "config.toml");
        if line.starts_with("sealblk provider") {
            // The usual one is the host's own; other verbs would pass the agent by if it were named to them.
            shell.env("SEALBLK_STATE_DIR", "state");
        }
        run(&mut shell);
        ran.push(line);
    }
    assert!(
        ran.iter().any(|line| line.starts_with("sealblk create")),
        "{ran:?}"
    );
    let audit = fs::read_to_string(path("state/audit.log")).unwrap();
    assert!(audit.contains("KeyBound"), "{audit}");
    assert!(
        !agent.stderr().contains("no process asks this agent"),
        "{}",
        agent.stderr()
    );
}

/// An agent that no configuration names answered, and nobody asked it; nothing told of that.
#[test]
fn agent_that_nobody_asks_says_so() {
    let host = tempfile::tempdir().unwrap();
    fs::write(
        host.path().join("config.toml"),
        "[policy]\nmax-key-age = \"90d\"\n",
    )
    .unwrap();
    // systemd makes it, by StateDirectory.
    fs::create_dir(host.path().join("state")).unwrap();
    let mut agent = Command::new(sealblk_path());
    agent.args(["--config", "config.toml", "--state-dir", "state"]);
    agent.args(["agent", "--socket-path", "agent.sock"]);
    let agent = Process::spawn(agent.current_dir(&host).env_remove("SEALBLK_LOG"));
    agent.wait_stderr("no process asks this agent: add [agent] to the configuration");
}

/// A double hyphen in the domain's comment kept `virsh define` from reading it.
#[test]
fn domain_is_xml_and_shares_the_guests_memory() {
    let domain = repository("qemu/libvirt.xml");
    assert_eq!(attribute(&domain, "memoryBacking/source", "type"), "memfd");
    assert_eq!(attribute(&domain, "memoryBacking/access", "mode"), "shared");
    assert_eq!(of_disk("source/reconnect", "enabled"), "yes");
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
