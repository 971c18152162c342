//! Disks by their names: defined, started, asked, changed while they are served and at rest, undefined.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use common::agent::Agent;
use common::process::Process;
use common::volume::{Volume, run};
use rustix::process::Signal;
use sealblk::disks::{DiskName, Sockets};
use serde_json::Value;

/// A host with an agent, and one disk with a name that no other disk of this machine has.
struct Host {
    agent: Agent,
    volume: Volume,
    name: String,
}

impl Host {
    fn new() -> Self {
        let agent = Agent::new("");
        let volume = agent.volume();
        let name = format!("test-{}", agent.child.id());
        Self { agent, volume, name }
    }

    fn define(&self, options: &[&str]) -> Command {
        let mut define = self.agent.verb(&["define", &self.name, "--blk-file"]);
        define.arg(&self.volume.path).args(options);
        define
    }

    fn verb(&self, args: &[&str]) -> Command {
        let args: Vec<_> = args.iter().map(|arg| arg.replace("NAME", &self.name)).collect();
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        self.agent.verb(&args)
    }

    fn says(&self, args: &[&str]) -> String {
        String::from_utf8(run(&mut self.verb(args)).stdout).unwrap()
    }

    fn fails(&self, args: &[&str]) -> (i32, String) {
        failed(&self.verb(args).output().unwrap())
    }

    fn start(&self) -> Process {
        let mut process = Process::spawn(&mut self.verb(&["start", "--foreground", "NAME"]));
        let name: DiskName = self.name.parse().unwrap();
        while !Sockets::of(&name).control.exists() {
            assert!(process.is_running(), "{}", process.wait().stderr);
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        process.wait_stderr("serving");
        process
    }

    /// The disk's entry in the list.
    fn listed(&self) -> Value {
        let list: Value = serde_json::from_str(&self.says(&["list", "--json"])).unwrap();
        let disks = list["disks"].as_array().unwrap();
        let own = disks.iter().find(|disk| disk["name"] == self.name.as_str());
        own.unwrap_or_else(|| panic!("{list}")).clone()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(Path::new(Sockets::DIRECTORY).join(&self.name));
    }
}

fn failed(output: &Output) -> (i32, String) {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code().unwrap(), said)
}

/// Who may make directories where sockets of a host's disks are.
fn may_serve_by_name() -> bool {
    let may = rustix::process::geteuid().is_root();
    if !may {
        eprintln!("skipped: only root can make {}", Sockets::DIRECTORY);
    }
    may
}

#[test]
fn a_disk_is_called_by_its_name_whether_it_is_served_or_not() {
    if !may_serve_by_name() {
        return;
    }
    let host = Host::new();
    let defined = String::from_utf8(run(&mut host.define(&["--num-queues=2"])).stdout).unwrap();
    let definition = host.agent.path(&format!("disks.d/{}.toml", host.name));
    assert!(
        defined.contains(definition.file_name().unwrap().to_str().unwrap()),
        "{defined}"
    );
    let (code, said) = failed(&host.define(&[]).output().unwrap());
    assert_eq!(code, 5, "{said}");
    let listed = host.listed();
    assert_eq!(listed["state"], "stopped", "{listed}");
    assert!(defined.contains(listed["volume"].as_str().unwrap()), "{defined}");
    assert!(listed["bound"].is_string(), "{listed}");

    let served = host.start();
    let status: Value = serde_json::from_str(&host.says(&["status", "NAME", "--json"])).unwrap();
    assert_eq!(status["volume"], listed["volume"]);
    assert_eq!(status["process"], served.pid());
    assert_eq!(host.listed()["state"], "open");
    host.says(&["lock", "NAME"]);
    assert_eq!(host.listed()["state"], "locked");
    let table = host.says(&["list"]);
    let row = table.lines().find(|row| row.starts_with(&host.name)).unwrap();
    assert!(row.contains("locked") && row.contains("0 d"), "{table}");
    host.says(&["unlock", "NAME"]);
    let rekeyed = host.says(&["rekey", "NAME"]);
    assert!(rekeyed.contains("rekeyed, in keyslot"), "{rekeyed}");
    let (code, said) = host.fails(&["resize", "NAME", "--size", "32M", "--shrink"]);
    assert!(
        code == 5 && said.contains("--shrink is for a disk at rest"),
        "{code}: {said}"
    );
    let (code, said) = host.fails(&["undefine", "NAME"]);
    assert!(code == 5 && said.contains("is being served"), "{code}: {said}");

    served.signal(Signal::TERM);
    let mut served = served;
    assert!(served.wait().status.success());
    let rekeyed = host.says(&["rekey", "NAME"]);
    assert!(rekeyed.contains("rekeyed, in keyslot"), "{rekeyed}");
    let resized = host.says(&["resize", "NAME", "--size", "32M", "--shrink"]);
    assert!(resized.contains("the disk has 32 MiB"), "{resized}");
    // A file of that name could be meant as well.
    fs::write(host.agent.path(&host.name), "").unwrap();
    let (code, said) = host.fails(&["rekey", "NAME"]);
    assert!(
        code == 2 && said.contains(&format!("./{}", host.name)),
        "{code}: {said}"
    );

    host.says(&["undefine", "NAME"]);
    assert!(!definition.exists());
    assert!(host.volume.path.exists());
    let (code, said) = host.fails(&["start", "--foreground", "NAME"]);
    assert!(code == 2 && said.contains("there is no disk"), "{code}: {said}");
}

/// A key that the agent keeps for a disk that was killed would open it still, on a host that has nothing to do with it any more.
#[test]
fn a_disk_that_is_undefined_leaves_no_key_in_the_agent() {
    if !may_serve_by_name() {
        return;
    }
    let host = Host::new();
    run(&mut host.define(&[]));
    let mut served = host.start();
    served.signal(Signal::KILL);
    served.wait();
    let kept = |event: &str| {
        let audit = host.agent.audit();
        audit.iter().filter(|record| record["event"] == event).count()
    };
    assert_eq!(kept("DiskUnregistered"), 0);
    host.says(&["undefine", "NAME"]);
    assert_eq!(kept("VolumeForgotten"), 1);
    let audit = host.agent.audit();
    let ended = audit.iter().find(|record| record["event"] == "DiskUnregistered");
    assert_eq!(ended.unwrap()["keyDropped"], true, "{audit:?}");

    // Another name for a volume that is being served.
    run(&mut host.define(&[]));
    let served = host.start();
    let other = format!("{}-b", host.name);
    let mut define = host.agent.verb(&["define", &other, "--blk-file"]);
    run(define.arg(&host.volume.path));
    let (code, said) = host.fails(&["undefine", "NAME-b"]);
    let process = format!("served by process {}", served.pid());
    assert!(code == 5 && said.contains(&process), "{code}: {said}");
    // An agent that is away cannot be asked.
    let mut host = host;
    host.agent.stop();
    let (code, said) = host.fails(&["undefine", "NAME-b"]);
    assert_eq!(code, 7, "{said}");
    host.says(&["undefine", "NAME-b", "--force"]);
}

/// Started once for a migration, a disk accepted others for ever, and ended where it could have waited for its key.
#[test]
fn a_disk_is_incoming_only_while_another_process_has_it() {
    if !may_serve_by_name() {
        return;
    }
    const WAITS: &str = "waiting for a guest that migrates here";
    let host = Host::new();
    run(&mut host.define(&[]));
    let sockets = Sockets::of(&host.name.parse().unwrap());
    fs::create_dir_all(&sockets.directory).unwrap();
    fs::write(sockets.incoming(), "").unwrap();
    let mut source = Process::spawn(&mut common::serve::serve(
        &host.volume,
        &host.volume.beside("vhost"),
        &[],
    ));
    source.wait_stderr("serving");
    let mut served = host.start();
    served.wait_stderr(WAITS);
    served.signal(Signal::TERM);
    assert!(served.wait().status.success());
    source.signal(Signal::TERM);
    assert!(source.wait().status.success());
    let mut served = host.start();
    assert!(!served.stderr().contains(WAITS), "{}", served.stderr());
    served.signal(Signal::TERM);
    assert!(served.wait().status.success());
}

/// What is defined can be served without systemd and without an agent, and is listed then, too.
#[test]
fn a_host_without_an_agent_lists_its_disks() {
    let dir = tempfile::tempdir().unwrap();
    let volume = Volume::new();
    let sealblk = |args: &[&str]| {
        let mut command = Command::new(common::serve::sealblk_path());
        command
            .current_dir(dir.path())
            .args(["--config", "config.toml"])
            .args(args);
        command
    };
    fs::write(dir.path().join("config.toml"), "").unwrap();
    let mut define = sealblk(&["define", "a-disk-of-no-agent", "--blk-file"]);
    run(define.arg(&volume.path));
    fs::write(dir.path().join("disks.d/broken.toml"), "blk-file = 7").unwrap();
    let output = run(&mut sealblk(&["list"]));
    let table = String::from_utf8(output.stdout).unwrap();
    let row = |name: &str| table.lines().find(|row| row.starts_with(name)).unwrap();
    assert!(row("a-disk-of-no-agent").contains("stopped"), "{table}");
    assert!(
        row("broken").contains("blk-file must be set to an absolute path"),
        "{table}"
    );
}

/// QEMUs of several guests run as one user, and what a guest could do that has escaped into one of them: take the disk of another.
#[test]
fn a_disk_is_only_for_the_registered_front_end() {
    const ASK: &str = "import os, socket, sys\n\
        if sys.argv[2]: open(sys.argv[2], 'w').write(str(os.getpid()))\n\
        disk = socket.socket(socket.AF_UNIX)\n\
        disk.settimeout(60)\n\
        disk.connect(sys.argv[1])\n\
        try:\n\
        \x20disk.sendall(bytes([1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]))\n\
        \x20print(len(disk.recv(20)))\n\
        except ConnectionError: print(0)";
    let volume = Volume::new();
    let (socket, peer) = (volume.beside("vhost"), volume.beside("peers/peer"));
    fs::create_dir(peer.parent().unwrap()).unwrap();
    let args = ["--peer-file", peer.to_str().unwrap(), "--sandbox", "prefer"];
    let mut served = Process::spawn(&mut common::serve::serve(&volume, &socket, &args));
    served.wait_stderr("serving");
    let answered = |group: Option<&Path>| {
        let mut ask = Command::new("python3");
        ask.args(["-c", ASK]).arg(&socket);
        let asked = run(ask.arg(group.map_or(Path::new(""), Path::new)));
        String::from_utf8(asked.stdout).unwrap().trim() != "0"
    };
    assert!(!answered(None));
    served.wait_stderr("a front-end is turned away: none is registered");
    let user = rustix::process::geteuid().as_raw();
    fs::write(&peer, format!("{{\"user\":{user}}}")).unwrap();
    assert!(answered(None));
    fs::write(&peer, format!("{{\"user\":{}}}", user + 1)).unwrap();
    assert!(!answered(None));

    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let groups = mounts
        .lines()
        .find(|mount| mount.split(' ').nth(2) == Some("cgroup2"));
    let groups = groups.and_then(|mount| mount.split(' ').nth(1)).map(Path::new);
    fs::write(&peer, format!("{{\"user\":{user},\"machine\":\"qemu-7\"}}")).unwrap();
    assert!(!answered(None));
    served.wait_stderr("is not in the control group of \"qemu-7\"");
    let group =
        groups.map(|groups| groups.join(format!("machine-qemu\\x2d7\\x2dtest{}.scope", std::process::id())));
    match group.filter(|group| fs::create_dir(group).is_ok()) {
        Some(group) => {
            let asked = answered(Some(&group.join("cgroup.procs")));
            fs::remove_dir(&group).unwrap();
            assert!(asked, "{}", served.stderr());
        }
        None => eprintln!("skipped: this user can make no control group"),
    }
    served.signal(Signal::TERM);
    assert!(served.wait().status.success());
}
