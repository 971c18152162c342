//! Which verb takes which privilege: every verb, run by real users who have one privilege each, or none.
//!
//! tests/agent.rs has the same for the calls under the verbs.

mod common;

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::DEADLINE;
use common::agent::Agent;
use common::serve::{SEALBLK, Server};
use common::volume::run;
use sealblk::agent::Purpose;

/// Users whom no host has: one for each privilege, in this order, and one who has none.
const FIRST_USER: u32 = 4_200_000;
const PRIVILEGES: [&str; 7] = [
    "Access",
    "EncryptNew",
    "ManageKeyServers",
    "ManageKeys",
    "ReadKeyServersInfo",
    "Recrypt",
    "RegisterVM",
];

/// What a verb takes.
enum Takes {
    Nothing,
    Privilege(&'static str),
    Either(&'static str, &'static str),
}

use Takes::{Either, Nothing, Privilege};

impl Takes {
    fn allows(&self, granted: Option<&str>) -> bool {
        match self {
            Nothing => true,
            Privilege(privilege) => granted == Some(privilege),
            Either(one, other) => granted == Some(one) || granted == Some(other),
        }
    }
}

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

    let key_id = &host.agent.provider(Purpose::Create).create_kek().unwrap().0;

    // With the file of the user's own volume for DISK.
    let verbs: [(&[&str], Takes); 21] = [
        (&["create", "--size", "1M", "new"], Privilege("EncryptNew")),
        (
            &[
                "serve",
                "--no-wait",
                "--socket-path",
                "vhost.sock",
                "--blk-file",
                "DISK",
            ],
            Privilege("RegisterVM"),
        ),
        (&["rekey", "DISK"], Privilege("Recrypt")),
        (
            &["recovery", "add", "DISK", "--recovery-key", "recovery"],
            Privilege("Access"),
        ),
        (&["info", "DISK"], Nothing),
        (&["provider", "list"], Privilege("ReadKeyServersInfo")),
        (&["provider", "check", "native"], Privilege("ReadKeyServersInfo")),
        (&["key", "list"], Either("ManageKeys", "ReadKeyServersInfo")),
        (
            &["key", "where-used", "--provider", "native"],
            Either("ManageKeys", "ReadKeyServersInfo"),
        ),
        (
            &["key", "due", "--max-age", "90d"],
            Either("ManageKeys", "ReadKeyServersInfo"),
        ),
        (&["key", "scan", "DISK"], Privilege("ManageKeys")),
        (
            &["key", "revoke", key_id, "--provider", "native", "--dry-run"],
            Privilege("ManageKeys"),
        ),
        (
            &["key", "push", key_id, "--provider", "native", "--key-file", "kek"],
            Privilege("ManageKeys"),
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
            Privilege("ManageKeyServers"),
        ),
        (&["list"], Privilege("ReadKeyServersInfo")),
        (&["events"], Privilege("ReadKeyServersInfo")),
        (&["status", "--control-socket", control], Nothing),
        (&["lock", "--control-socket", control], Privilege("RegisterVM")),
        (&["unlock", "--control-socket", control], Privilege("RegisterVM")),
        (&["rekey", "--control-socket", control], Privilege("Recrypt")),
        (
            &["events", "--control-socket", control],
            Privilege("ReadKeyServersInfo"),
        ),
    ];
    for (args, takes) in &verbs {
        for (user, granted) in (FIRST_USER..).zip(PRIVILEGES.map(Some).into_iter().chain([None])) {
            let ran = host.run(user, args);
            let said = String::from_utf8_lossy(&ran.stderr).into_owned();
            let what = format!("{args:?} by who has {granted:?}: {}: {said}", ran.status);
            if takes.allows(granted) {
                assert!(ran.status.success(), "{what}");
            } else {
                let (Privilege(wanted) | Either(_, wanted)) = takes else {
                    unreachable!("nothing is refused to nobody")
                };
                assert_eq!(ran.status.code(), Some(4), "{what}");
                assert!(said.contains("lack") && said.contains(wanted), "{what}");
            }
        }
        // Whatever it was, it did not hurt.
        host.root(&["unlock", "--control-socket", control]);
    }
    served.server.still_serves();
}

/// A host with an agent and a binary that all users can run.
struct Host {
    agent: Agent,
    binary: PathBuf,
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
        let mut add = Command::new(SEALBLK);
        run(add.arg("--state-dir").arg(state).args([
            "provider",
            "add",
            "native",
            "--name",
            "spare",
            "--no-backup",
        ]));
        let binary = agent.path("sealblk");
        fs::copy(SEALBLK, &binary).unwrap();
        Self { agent, binary }
    }

    fn serve(&self) -> Served {
        let volume = self.agent.volume();
        fs::set_permissions(volume.beside(""), fs::Permissions::from_mode(0o755)).unwrap();
        let control = volume.beside("control");
        let server = Server::of(volume, &["--control-socket", control.to_str().unwrap()]);
        Served { server, control }
    }

    fn root(&self, args: &[&str]) {
        run(&mut self.agent.verb(args));
    }

    /// Runs a verb as `user`, in a directory of the user's own. What would go on for ever is ended, as by an operator, when it
    /// has begun.
    fn run(&self, user: u32, args: &[&str]) -> Output {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        chown(dir.path(), Some(user), Some(user)).unwrap();
        if args.contains(&"DISK") {
            self.root(&["create", "--size", "1M", disk.to_str().unwrap()]);
            chown(&disk, Some(user), Some(user)).unwrap();
        }
        fs::write(dir.path().join("kek"), [7; 32]).unwrap();
        let config = self.agent.path("config.toml");
        let mut command = Command::new(&self.binary);
        command.current_dir(dir.path()).arg("--config").arg(config);
        command.args(args.iter().map(|arg| match *arg {
            "DISK" => "disk",
            arg => arg,
        }));
        command
            .uid(user)
            .gid(user)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let begun = Instant::now();
        while child.try_wait().unwrap().is_none() {
            assert!(begun.elapsed() < DEADLINE, "{args:?} does not end");
            let serves = dir.path().join("vhost.sock").exists();
            let watches = args[0] == "events" && begun.elapsed() > Duration::from_secs(2);
            if serves || watches {
                let pid = rustix::process::Pid::from_child(&child);
                rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
                let mut ended = child.wait_with_output().unwrap();
                if watches {
                    // A signal is how it is to end.
                    ended.status = std::os::unix::process::ExitStatusExt::from_raw(0);
                }
                return ended;
            }
            thread::sleep(Duration::from_millis(5));
        }
        child.wait_with_output().unwrap()
    }
}
