//! Which verb takes which privilege: every verb, run by real users who have one privilege each, or none.
//!
//! tests/agent.rs has the same for the calls under the verbs.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::DEADLINE;
use common::agent::Agent;
use common::serve::{Server, install, sealblk_path};
use common::volume::run;
use sealblk::keys::RequestPurpose;
use serde_json::Value;

/// Users whom no host has: one for each privilege, in this order, and one who has none.
const FIRST_USER: u32 = 4_200_000;
const PRIVILEGES: [&str; 8] = [
    "Access",
    "EncryptNew",
    "ManageKeyServers",
    "ManageKeys",
    "Migrate",
    "ReadKeyServersInfo",
    "Recrypt",
    "RegisterVM",
];

/// What a verb takes.
enum Takes {
    Nothing,
    /// One of these; who has none is told of the last.
    AnyOf(&'static [&'static str]),
    /// To write in the state directory, or to read there, which is the kernel's to say.
    StateDirectory,
    /// To be the user that the disk is served as, or root: there is no privilege for it.
    ServingUser,
}

use Takes::{AnyOf, Nothing, ServingUser, StateDirectory};

/// Keys of which there may be several kinds of use.
const SEES_KEYS: Takes = AnyOf(&["ManageKeys", "ReadKeyServersInfo"]);

impl Takes {
    fn allows(&self, granted: Option<&str>) -> bool {
        match self {
            Nothing => true,
            AnyOf(privileges) => granted.is_some_and(|granted| privileges.contains(&granted)),
            StateDirectory | ServingUser => false,
        }
    }
}

/// What is beside the configuration, and the units of systemd, are root's: the kernel and systemd refuse others.
const OF_DEFINITIONS: [&str; 5] = ["define", "undefine", "start", "stop", "libvirt"];

/// Verbs of another host, whose keys they are; whoever can write its state directory may all of it.
const OF_A_BROKER: &str = "broker";
/// What others call.
const SERVER: &str = "agent";

#[test]
fn a_verb_takes_its_privilege_and_no_other_will_do() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can be other users");
        return;
    }
    let grants: String = (PRIVILEGES.iter().zip(FIRST_USER..))
        .map(|(privilege, user)| format!("[[grant]]\nuser = {user}\nprivileges = [{privilege:?}]\n"))
        .collect();
    let host = Host::new(&grants);
    let served = host.serve();
    let control = served.control.to_str().unwrap();
    let state = &host.agent.path("state").display().to_string();

    let key_id = &host
        .agent
        .provider(RequestPurpose::Create)
        .create_kek()
        .unwrap()
        .0;

    // With the file of the user's own volume for DISK.
    let verbs: [(&[&str], Takes); 37] = [
        (&["create", "--size", "1M", "new"], AnyOf(&["EncryptNew"])),
        (
            &[
                "serve",
                "--no-wait",
                "--socket-path",
                "vhost.sock",
                "--blk-file",
                "DISK",
            ],
            AnyOf(&["RegisterVM"]),
        ),
        (
            &[
                "serve",
                "--incoming",
                "--socket-path",
                "vhost.sock",
                "--blk-file",
                "DISK",
            ],
            AnyOf(&["Migrate"]),
        ),
        (&["rekey", "DISK"], AnyOf(&["Recrypt"])),
        (
            &["recovery", "add", "DISK", "--recovery-key", "recovery"],
            AnyOf(&["Access"]),
        ),
        (
            &["recovery", "remove", "DISK", "--keyslot", "1"],
            AnyOf(&["Access"]),
        ),
        (
            &["recovery", "test", "DISK", "--recovery-key", "recovery-key"],
            Nothing,
        ),
        // The disk is its owner's to destroy; what it takes is to have the log tell of it.
        (
            &["erase", "DISK", "--confirm", "UUID"],
            AnyOf(&["Access", "ManageKeys", "EncryptNew"]),
        ),
        (&["info", "DISK"], Nothing),
        (&["provider", "list"], AnyOf(&["ReadKeyServersInfo"])),
        (&["provider", "check", "native"], AnyOf(&["ReadKeyServersInfo"])),
        (&["key", "list"], SEES_KEYS),
        (&["key", "where-used", "--provider", "native"], SEES_KEYS),
        (&["key", "due", "--max-age", "90d"], SEES_KEYS),
        (&["key", "scan", "DISK"], AnyOf(&["ManageKeys"])),
        (
            &["key", "revoke", key_id, "--provider", "native", "--dry-run"],
            AnyOf(&["ManageKeys"]),
        ),
        (
            &["key", "push", key_id, "--provider", "native", "--key-file", "kek"],
            AnyOf(&["ManageKeys"]),
        ),
        (
            &[
                "provider",
                "remove",
                "spare",
                "--dry-run",
                "--force",
                "--confirm",
                "spare",
            ],
            AnyOf(&["ManageKeyServers"]),
        ),
        (&["list", "--keys"], AnyOf(&["ReadKeyServersInfo"])),
        (&["events"], AnyOf(&["ReadKeyServersInfo"])),
        (&["status", "--control-socket", control], Nothing),
        (&["lock", "--control-socket", control], AnyOf(&["RegisterVM"])),
        (&["unlock", "--control-socket", control], AnyOf(&["RegisterVM"])),
        (&["rekey", "--control-socket", control], AnyOf(&["Recrypt"])),
        (&["resize", "--control-socket", control], AnyOf(&["RegisterVM"])),
        (&["resume", "--control-socket", control], AnyOf(&["RegisterVM"])),
        (&["upgrade", "--control-socket", control], ServingUser),
        (
            &["events", "--control-socket", control],
            AnyOf(&["ReadKeyServersInfo"]),
        ),
        (&["provider", "add", "native", "--name", "own"], StateDirectory),
        (&["provider", "backup", "native", "--waive"], StateDirectory),
        (
            &["provider", "restore", "backup", "--passphrase-file", "kek"],
            StateDirectory,
        ),
        (&["provider", "seal", "native"], StateDirectory),
        (&["provider", "enrol", "native", "--host", "here"], StateDirectory),
        (&["provider", "attestation-key", "native"], StateDirectory),
        (&["audit", "verify"], StateDirectory),
        // With the state directory named, nobody is asked.
        (&["key", "list", "--state-dir", "STATE"], StateDirectory),
        (&["rekey", "DISK", "--state-dir", "STATE"], StateDirectory),
    ];
    let run: Vec<&[&str]> = verbs.iter().map(|(args, _)| *args).collect();
    let missing: Vec<_> = all_verbs()
        .into_iter()
        .filter(|verb| {
            !run.iter()
                .any(|args| args.iter().zip(verb.iter()).all(|(arg, name)| arg == name))
        })
        .filter(|verb| ![OF_A_BROKER, SERVER].contains(&&*verb[0]) && !OF_DEFINITIONS.contains(&&*verb[0]))
        .collect();
    assert!(missing.is_empty(), "no word on who may {missing:?}");
    for (args, takes) in &verbs {
        let users = (FIRST_USER..).zip(PRIVILEGES.map(Some).into_iter().chain([None]));
        // What takes nothing is for who has nothing to try: a privilege more does not take any away.
        for (user, granted) in users.filter(|(_, granted)| granted.is_none() || !matches!(takes, Nothing)) {
            let ran = host.run(user, args);
            let said = String::from_utf8_lossy(&ran.stderr).into_owned();
            let what = format!("{args:?} by who has {granted:?}: {}: {said}", ran.status);
            if takes.allows(granted) {
                assert!(ran.status.success(), "{what}");
                continue;
            }
            let (code, words) = match takes {
                AnyOf(privileges) => (Some(7), ["lack", privileges.last().unwrap()]),
                ServingUser => (
                    Some(7),
                    [
                        "the disk is served as user 0",
                        "run `sealblk upgrade` as that user",
                    ],
                ),
                StateDirectory => (ran.status.code(), ["ermission denied", state]),
                Nothing => unreachable!("nothing is refused to nobody"),
            };
            assert!(!ran.status.success() && ran.status.code() == code, "{what}");
            assert!(words.iter().all(|word| said.contains(word)), "{what}");
        }
        // Whatever it was, it did not hurt.
        host.root(&["unlock", "--control-socket", control]);
    }
    served.server.still_serves();
}

/// Whether a verb asks no agent, even where there is one.
fn of_the_state_directory(args: &[&str]) -> bool {
    match args[0] {
        "audit" => true,
        "provider" => !["list", "check", "remove"].contains(&args[1]),
        _ => false,
    }
}

/// All verbs that the command line has, by its own account.
fn all_verbs() -> Vec<Vec<String>> {
    let mut all = Vec::new();
    let mut left = vec![Vec::new()];
    while let Some(verb) = left.pop() {
        let help = run(Command::new(sealblk_path()).args(&verb).arg("--help")).stdout;
        let help = String::from_utf8(help).unwrap();
        let listed = help.split_once("\nCommands:\n").map(|(_, rest)| rest);
        let Some(listed) = listed.filter(|_| verb.len() < 2) else {
            all.push(verb);
            continue;
        };
        for line in listed.lines().take_while(|line| line.starts_with("  ")) {
            // Lines that go on are set further in.
            if let Some(name) = line[2..].split(' ').next().filter(|name| !name.is_empty())
                && name != "help"
            {
                left.push([&verb[..], &[name.to_owned()]].concat());
            }
        }
    }
    assert!(all.len() > 30, "{all:?}");
    all
}

/// A host with an agent and a binary that all users can run.
struct Host {
    agent: Agent,
    binary: PathBuf,
    disk: PathBuf,
    recovery_key: PathBuf,
}

/// A disk that root serves.
struct Served {
    server: Server,
    control: PathBuf,
}

impl Host {
    fn new(grants: &str) -> Self {
        let agent = Agent::new(grants);
        let state = agent.path("state");
        let mut add = Command::new(sealblk_path());
        run(add.arg("--state-dir").arg(state).args([
            "provider",
            "add",
            "native",
            "--name",
            "spare",
            "--no-backup",
        ]));
        let binary = install(&agent.path(""));
        let [disk, recovery_key] = ["disk", "recovery-key"].map(|name| agent.path(name));
        let mut create = agent.verb(&["create", "--size", "1M"]);
        run(create.arg(&disk).arg("--recovery-key").arg(&recovery_key));
        Self {
            agent,
            binary,
            disk,
            recovery_key,
        }
    }

    fn serve(&self) -> Served {
        let volume = self.agent.volume();
        fs::set_permissions(volume.beside(""), fs::Permissions::from_mode(0o755)).unwrap();
        let control = volume.beside("control");
        let server = Server::of(
            volume,
            &[
                "--control-socket",
                control.to_str().unwrap(),
                "--control-socket-mode",
                "666",
            ],
        );
        Served { server, control }
    }

    fn root(&self, args: &[&str]) {
        run(&mut self.agent.verb(args));
    }

    /// Runs a verb as `user`, in a directory of the user's own. What would go on for ever is ended, as by an operator, when it
    /// has begun.
    fn run(&self, user: u32, args: &[&str]) -> Output {
        let dir = tempfile::tempdir().unwrap();
        chown(dir.path(), Some(user), Some(user)).unwrap();
        let mut uuid = String::new();
        if args.contains(&"DISK") {
            // Each of these is its user's own; that they have a UUID in common shows to nobody.
            for (file, copy) in [(&self.disk, "disk"), (&self.recovery_key, "recovery-key")] {
                let copy = dir.path().join(copy);
                fs::copy(file, &copy).unwrap();
                chown(&copy, Some(user), Some(user)).unwrap();
            }
            let info = run(&mut self.agent.verb(&["info", "--json", self.disk.to_str().unwrap()]));
            let info: Value = serde_json::from_slice(&info.stdout).unwrap();
            uuid = info["uuid"].as_str().unwrap().to_owned();
        }
        fs::write(dir.path().join("kek"), [7; 32]).unwrap();
        let config = self.agent.path("config.toml");
        let mut command = Command::new(&self.binary);
        command.current_dir(dir.path()).arg("--config").arg(config);
        let state = self.agent.path("state").display().to_string();
        command.args(args.iter().map(|arg| match *arg {
            "DISK" => "disk",
            "UUID" => &uuid,
            "STATE" => &state,
            arg => arg,
        }));
        if of_the_state_directory(args) {
            command.env("SEALBLK_STATE_DIR", &state);
        }
        command
            .uid(user)
            .gid(user)
            .stdout(Stdio::piped())
            .stderr(fs::File::create(dir.path().join("said")).unwrap());
        let said = || fs::read(dir.path().join("said")).unwrap();
        let mut child = command.spawn().unwrap();
        let begun = Instant::now();
        let mut told = false;
        while child.try_wait().unwrap().is_none() {
            assert!(begun.elapsed() < DEADLINE * 4, "{args:?} does not end");
            let serves = args[0] == "serve" && String::from_utf8_lossy(&said()).contains("INFO serving");
            let watches = args[0] == "events" && begun.elapsed() > Duration::from_secs(2);
            if !told && (serves || watches) {
                let pid = rustix::process::Pid::from_child(&child);
                rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
                told = true;
            }
            thread::sleep(Duration::from_millis(5));
        }
        let mut ended = child.wait_with_output().unwrap();
        ended.stderr = said();
        if told && args[0] == "events" {
            // A signal is how it is to end.
            ended.status = std::os::unix::process::ExitStatusExt::from_raw(0);
        }
        ended
    }
}
