//! What operators and their programs hear of keys and disks: streams on the control sockets, and the journal.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use common::DEADLINE;
use common::agent::Agent;
use common::secrets::as_user;
use common::serve::{Server, sealblk_path};
use common::volume::{Volume, run};
use serde_json::Value;

/// `sealblk events`, ended with this.
struct Watcher {
    child: Child,
    events: Receiver<Value>,
}

impl Watcher {
    fn of(command: &mut Command) -> Self {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, events) = channel();
        let lines = BufReader::<ChildStdout>::new(child.stdout.take().unwrap()).lines();
        thread::spawn(move || {
            for line in lines {
                let _ = sender.send(serde_json::from_str(&line.unwrap()).unwrap());
            }
        });
        Self { child, events }
    }

    /// Waits for the event of this name; others may come before it.
    fn hears(&self, name: &str) -> Value {
        let mut before = Vec::new();
        loop {
            match self.events.recv_timeout(DEADLINE) {
                Ok(event) if event["event"] == name => return event,
                Ok(event) => before.push(event),
                Err(error) => panic!("no {name} ({error}), but {before:?}"),
            }
        }
    }

    /// How it ended by itself: its exit code, and what it complained of.
    fn ended(mut self) -> (Option<i32>, String) {
        let status = self.child.wait().unwrap();
        let complaint = std::io::read_to_string(self.child.stderr.take().unwrap()).unwrap();
        (status.code(), complaint)
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Until the watcher is there, nothing is told to it.
fn until(watcher: &Watcher, name: &str, cause: impl Fn()) {
    for _ in 0..100 {
        cause();
        if let Ok(event) = watcher.events.recv_timeout(DEADLINE / 100) {
            assert_eq!(event["event"], name);
            return;
        }
    }
    panic!("the watcher hears nothing");
}

#[test]
fn what_the_agent_does_is_told_to_who_watches() {
    let mut agent = Agent::new("");
    let watcher = Watcher::of(&mut agent.verb(&["events"]));
    until(&watcher, "ProviderChecked", || {
        run(&mut agent.verb(&["provider", "check", "native"]));
    });
    let volume = agent.volume();
    let bound = watcher.hears("KeyBound");
    assert_eq!(bound["purpose"], "create");
    assert!(bound["time"].as_str().unwrap().ends_with('Z'), "{bound}");
    let server = Server::of(volume, &[]);
    let released = watcher.hears("KeyReleased");
    assert_eq!(
        (&released["purpose"], &released["volume"]),
        (&"attach".into(), &bound["volume"])
    );
    server.stop();
    assert_eq!(watcher.hears("DiskUnregistered")["keyDropped"], true);

    // As the audit log has it, but for what chains it.
    let logged = agent
        .audit()
        .into_iter()
        .find(|record| record["event"] == "KeyBound")
        .unwrap();
    for field in ["volume", "provider", "keyId", "keyslot", "user", "process"] {
        assert_eq!(logged[field], bound[field], "{field}");
    }

    agent.stop();
    let (code, complaint) = watcher.ended();
    assert_eq!(code, Some(7), "{complaint}");
    assert!(complaint.contains("agent.sock"), "{complaint}");
}

// One user took all places of watchers, and root's alarm heard nothing any more. Who had left kept its place until something happened.
#[test]
fn who_watches_in_number_keeps_nobody_else_from_it() {
    let users = [4_000_001, 4_000_002];
    let grant = |user| format!("[[grant]]\nuser = {user}\nprivileges = [\"ReadKeyServersInfo\"]\n");
    let agent = Agent::new(&users.map(grant).concat());
    let watch = |user| {
        let mut stream = as_user(user, || UnixStream::connect(agent.path("agent.sock")).unwrap());
        stream
            .write_all(b"{\"method\":\"org.sealblk.Agent.Watch\",\"more\":true}\0")
            .unwrap();
        let mut reply = Vec::new();
        BufReader::new(&stream).read_until(0, &mut reply).unwrap();
        let reply = String::from_utf8(reply).unwrap();
        match reply.contains("TooManyWatchers") {
            true => None,
            false => Some((stream, reply)),
        }
    };
    let watches = users.map(|user| std::iter::from_fn(|| watch(user)).collect::<Vec<_>>());
    let counts = watches.each_ref().map(Vec::len);
    assert!(counts[0] > counts[1] && counts[1] > 0, "{counts:?}");
    let watcher = Watcher::of(&mut agent.verb(&["events"]));
    until(&watcher, "ProviderChecked", || {
        run(&mut agent.verb(&["provider", "check", "native"]));
    });
    drop(watcher);
    drop(watches);
    let left = Instant::now();
    while watch(users[0]).is_none() {
        assert!(left.elapsed() < DEADLINE, "who has left keeps its place");
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn what_happens_to_a_served_disk_is_told_to_who_watches_and_may() {
    let volume = Volume::new();
    let control = volume.beside("control");
    let server = Server::of(volume, &["--control-socket", control.to_str().unwrap()]);
    let verb = |verb: &str| {
        let mut command = Command::new(sealblk_path());
        command.args([verb, "--control-socket"]).arg(&control);
        command
    };
    let watcher = Watcher::of(&mut verb("events"));
    until(&watcher, "PrivilegeUsed", || {
        run(&mut verb("unlock"));
    });
    run(&mut verb("lock"));
    assert_eq!(watcher.hears("DiskLocked")["by"], "operator");
    run(&mut verb("unlock"));
    let unlocked = watcher.hears("DiskUnlocked");
    assert_eq!(unlocked["keyslot"], 0);
    run(&mut verb("rekey"));
    let rekeyed = watcher.hears("DiskRekeyed");
    assert_eq!(
        (&rekeyed["keyslot"], &rekeyed["volume"]),
        (&1.into(), &unlocked["volume"])
    );

    let away = server.volume().beside("away");
    let primary = server.volume().beside("state/providers/native/primary.key");
    fs::rename(&primary, &away).unwrap();
    assert!(!verb("rekey").output().unwrap().status.success());
    assert_eq!(watcher.hears("RekeyFailed")["reason"], "missing");
    fs::rename(&away, &primary).unwrap();
    server.still_serves();
}

/// A real journald, whose files and sockets are in a file system of its own.
#[test]
fn in_the_journal_events_keep_their_fields() {
    const SCRIPT: &str = r#"
        set -eu
        mount -t tmpfs none /run
        mkdir -p /run/systemd/journal /run/log/journal
        /lib/systemd/systemd-journald &
        journald=$!
        for _ in $(seq 100); do [ -S /run/systemd/journal/socket ] && break; sleep 0.1; done
        : >"$DIR/stderr"
        export JOURNAL_STREAM=$(stat -c %d:%i "$DIR/stderr")
        cd "$DIR"
        "$SEALBLK" --state-dir state provider add native --no-backup >&2
        "$SEALBLK" --state-dir state --config config.toml agent 2>>"$DIR/stderr" &
        agent=$!
        for _ in $(seq 100); do [ -S agent.sock ] && break; sleep 0.1; done
        "$SEALBLK" --config config.toml create disk --size 1M >&2
        kill $agent
        wait $agent
        sleep 1
        kill $journald
        wait $journald || true
        journalctl --directory /run/log/journal --output json SEALBLK_EVENT=KeyBound
    "#;
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can give journald a file system of its own");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::write(
        dir.path().join("config.toml"),
        "[agent]\nsocket = \"agent.sock\"\n",
    )
    .unwrap();
    let mut script = Command::new("unshare");
    script.args(["--mount", "bash", "-c", SCRIPT]);
    let journal = run(script
        .env("DIR", dir.path())
        .env("SEALBLK", Path::new(sealblk_path())))
    .stdout;
    let records: Vec<Value> = String::from_utf8(journal)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(records.len(), 1, "{records:?}");
    assert_eq!(
        (&records[0]["SEALBLK_PROVIDER"], &records[0]["SEALBLK_PURPOSE"]),
        (&"native".into(), &"create".into())
    );
    assert_eq!(records[0]["PRIORITY"], "6");
    assert_eq!(records[0]["SYSLOG_IDENTIFIER"], "sealblk");
    // Who reads the journal without looking for fields is told all the same.
    let message = records[0]["MESSAGE"].as_str().unwrap();
    assert!(
        message.contains("native") && message.contains("create"),
        "{message}"
    );
    assert_eq!(fs::read_to_string(dir.path().join("stderr")).unwrap(), "");
}

/// Runs a script that has its own `/run`, so that it can be the journal of the disk that it serves. It and all that it starts end
/// after `limit` seconds.
fn beside_a_journal(limit: &str, script: &str) {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can have a /run of its own");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut shell = Command::new("timeout");
    shell.args([
        "--kill-after=1",
        limit,
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
    ]);
    shell.args(["sh", "-c", script]);
    run(shell.env("DIR", dir.path()).env("SEALBLK", sealblk_path()));
}

/// Each record was sent by who had something to tell: a journal that hung kept an operator from `lock`, and the process from its end.
#[test]
fn a_journal_that_reads_nothing_holds_up_nobody() {
    const SCRIPT: &str = r#"
        set -eu
        mount -t tmpfs none /run
        mkdir -p /run/systemd/journal
        python3 -c '
import socket, time
journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
journal.bind("/run/systemd/journal/socket")
time.sleep(1000)' &
        journal=$!
        for _ in $(seq 100); do [ -S /run/systemd/journal/socket ] && break; sleep 0.1; done
        : >"$DIR/stderr"
        export JOURNAL_STREAM=$(stat -c %d:%i "$DIR/stderr")
        cd "$DIR"
        "$SEALBLK" --state-dir state provider add native --no-backup >&2
        "$SEALBLK" --state-dir state create disk --size 1M >&2
        "$SEALBLK" --state-dir state serve --blk-file disk --socket-path sock --control-socket control 2>>"$DIR/stderr" &
        serve=$!
        for _ in $(seq 100); do [ -S control ] && break; sleep 0.1; done
        # More records than a socket's queue takes.
        for _ in $(seq $(($(cat /proc/sys/net/unix/max_dgram_qlen) + 20))); do
            "$SEALBLK" lock --control-socket control
            "$SEALBLK" unlock --control-socket control
        done
        kill $serve
        wait $serve
        kill $journal
    "#;
    beside_a_journal("120", SCRIPT);
}

/// A confined process cannot connect to it again, and goes on all the same.
#[test]
fn a_journal_that_ends_does_not_end_a_served_disk() {
    const SCRIPT: &str = r#"
        set -eu
        mount -t tmpfs none /run
        mkdir -p /run/systemd/journal
        python3 -c '
import socket
journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
journal.bind("/run/systemd/journal/socket")
while True: journal.recv(1 << 20)' &
        journal=$!
        for _ in $(seq 100); do [ -S /run/systemd/journal/socket ] && break; sleep 0.1; done
        : >"$DIR/stderr"
        export JOURNAL_STREAM=$(stat -c %d:%i "$DIR/stderr")
        cd "$DIR"
        "$SEALBLK" --state-dir state provider add native --no-backup >&2
        "$SEALBLK" --state-dir state create disk --size 1M >&2
        "$SEALBLK" --state-dir state serve --blk-file disk --socket-path sock --control-socket control 2>>"$DIR/stderr" &
        serve=$!
        for _ in $(seq 100); do [ -S control ] && break; sleep 0.1; done
        "$SEALBLK" lock --control-socket control
        kill $journal
        wait $journal || true
        for _ in 1 2 3; do
            "$SEALBLK" unlock --control-socket control
            "$SEALBLK" lock --control-socket control
        done
        kill $serve
        wait $serve
        grep -q "log lines were lost" "$DIR/stderr"
        ! grep -q "refused a system call" "$DIR/stderr"
    "#;
    beside_a_journal("60", SCRIPT);
}
