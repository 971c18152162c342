//! The end of a key's life: which disks a key opens, and what is not taken away while a disk needs it.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use common::process::children_of;
use common::secrets::as_user;
use common::serve::sealblk_path;
use common::storage::{LoopDevice, SilentFilesystem};
use common::volume::run;
use sealblk::agent::{Client, Erasure, ErasureStep};
use sealblk::keys::RequestPurpose;
use sealblk::keys::{Binding, KeyId, KeyReason, Providers};
use sealblk::storage::{Access, Backing};
use sealblk_secmem::arena::SecretBytes;
use serde_json::{Map, Value, json};
use tempfile::TempDir;
use uuid::Uuid;

const USAGE: i32 = 2;
const VOLUME: i32 = 3;
const KEY: i32 = 4;
const ASKED: i32 = 7;
const IN_USE: i32 = 5;
const STORAGE: i32 = 6;
/// A user whom no host has, and who is granted nothing unless a test does.
const SOMEBODY: u32 = 4_000_001;

/// A host with a native provider, in a directory of its own.
struct Host {
    dir: TempDir,
    /// What each verb is given: where keys come from.
    keys: Vec<String>,
    agent: Option<Child>,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let host = Host {
            dir,
            keys: vec!["--state-dir".into(), "state".into()],
            agent: None,
        };
        fs::write(host.path("pass"), "a passphrase of some length").unwrap();
        host.does(&["provider", "add", "native", "--no-backup"]);
        host
    }

    /// The same, with an agent in front of the state directory.
    fn with_agent(grants: &str) -> Self {
        let mut host = Host::new();
        let socket = host.path("agent.sock");
        fs::write(
            host.path("config.toml"),
            format!("[agent]\nsocket = {socket:?}\n{grants}"),
        )
        .unwrap();
        let agent = host
            .command(&["--config", "config.toml", "agent"])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        host.agent = Some(agent);
        let started = Instant::now();
        while UnixStream::connect(&socket).is_err() {
            assert!(started.elapsed() < common::DEADLINE, "the agent does not answer");
            thread::sleep(Duration::from_millis(10));
        }
        host.keys = vec!["--config".into(), "config.toml".into()];
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(sealblk_path());
        command.current_dir(self.dir.path()).args(&self.keys).args(args);
        command
    }

    fn backup(&self, name: &str) {
        let to = format!("{name}.backup");
        self.does(&[
            "provider",
            "backup",
            name,
            "--to",
            &to,
            "--passphrase-file",
            "pass",
        ]);
    }

    fn create(&self, disk: &str, more: &[&str]) {
        self.does(&[&["create", disk, "--size", "1M"], more].concat());
    }

    #[track_caller]
    fn does(&self, args: &[&str]) -> String {
        let output = self.command(args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", said(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    fn fails(&self, args: &[&str], code: i32) -> String {
        let output = self.command(args).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {}", said(&output));
        said(&output)
    }

    #[track_caller]
    fn json(&self, args: &[&str]) -> Vec<Value> {
        let answer: Value = serde_json::from_str(&self.does(args)).unwrap();
        answer.as_array().unwrap().clone()
    }

    /// The key that a disk is bound to, as its header tells.
    fn key_of(&self, disk: &str) -> String {
        let info: Value = serde_json::from_str(&self.does(&["info", "--json", disk])).unwrap();
        info["tokens"][0]["keyId"].as_str().unwrap().to_owned()
    }

    /// Whether this host opens a disk with its keys. To remove a keyslot that is not there, it has to be opened first.
    fn opens(&self, disk: &str) -> Result<(), String> {
        let args = ["recovery", "remove", disk, "--keyslot", "31"];
        let output = self.command(&args).output().unwrap();
        match output.status.code() {
            Some(USAGE) if said(&output).contains("keyslot 31 does not exist") => Ok(()),
            _ => Err(said(&output)),
        }
    }

    fn audit(&self, event: &str) -> Vec<Value> {
        let log = fs::read_to_string(self.path("state/audit.log")).unwrap();
        let records = log
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap());
        records.filter(|record| record["event"] == event).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(agent) = &mut self.agent {
            let _ = agent.kill();
            let _ = agent.wait();
        }
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn texts<'v>(rows: &'v [Value], field: &str) -> Vec<&'v str> {
    rows.iter().map(|row| row[field].as_str().unwrap()).collect()
}

/// What an index is for, the same with an agent and without.
fn keys_and_providers_in_use_are_kept(host: &Host) {
    for name in ["one", "two"] {
        host.create(name, &[]);
    }
    let key = host.key_of("one");
    let used = host.json(&["key", "where-used", &key, "--json"]);
    assert_eq!(texts(&used, "path"), [host.path("one").to_str().unwrap()]);
    assert_eq!(texts(&used, "standing"), ["bound"]);
    let listed = host.json(&["key", "list", "--json"]);
    assert_eq!(texts(&listed, "state"), ["active", "active"]);
    assert!(
        listed
            .iter()
            .all(|row| row["volumes"] == 1 && row["age"].as_u64().unwrap() < 3600)
    );
    assert_eq!(
        host.json(&["key", "list", "--provider", "other", "--json"]).len(),
        0
    );

    // The list of disks comes with each refusal.
    for dry_run in [&["--dry-run"][..], &[]] {
        let refused = host.fails(&[&["provider", "remove", "native"], dry_run].concat(), IN_USE);
        for name in ["one", "two"] {
            assert!(refused.contains(host.path(name).to_str().unwrap()), "{refused}");
        }
        let revoke = ["key", "revoke", &key, "--provider", "native"];
        let refused = host.fails(&[&revoke[..], dry_run].concat(), IN_USE);
        assert!(refused.contains(host.path("one").to_str().unwrap()), "{refused}");
        assert!(!refused.contains(host.path("two").to_str().unwrap()), "{refused}");
    }
    // With --force, a dry run said that no volume was known to need them.
    for (what, force) in [
        (
            "one",
            [
                "key",
                "revoke",
                &key,
                "--provider",
                "native",
                "--force",
                "--confirm",
                &key,
            ]
            .as_slice(),
        ),
        (
            "two",
            &["provider", "remove", "native", "--force", "--confirm", "native"],
        ),
    ] {
        let told = host.does(&[force, &["--dry-run"]].concat());
        assert!(told.contains("with --force:"), "{told}");
        assert!(told.contains(host.path("one").to_str().unwrap()), "{told}");
        assert_eq!(
            told.contains(host.path("two").to_str().unwrap()),
            what == "two",
            "{told}"
        );
        assert!(!told.contains("no volume is known"), "{told}");
    }
    host.opens("one").unwrap();

    // A disk that is not to be found is not known to be free.
    fs::rename(host.path("one"), host.path("moved")).unwrap();
    let refused = host.fails(&["key", "revoke", &key, "--provider", "native"], IN_USE);
    assert!(refused.contains("missing"), "{refused}");
    // What is at another place may be a copy, so its old one is given up when that is said.
    host.opens("moved").unwrap();
    let used = host.json(&["key", "where-used", &key, "--json"]);
    assert_eq!(texts(&used, "standing").len(), 2);
    host.does(&["key", "scan", "--forget-missing"]);
    let used = host.json(&["key", "where-used", &key, "--json"]);
    assert_eq!(texts(&used, "path"), [host.path("moved").to_str().unwrap()]);

    // A key that no disk needs any more can be taken out of use, and one that does can be by force alone.
    host.does(&["rekey", "moved"]);
    let used = host.json(&["key", "where-used", &key, "--json"]);
    assert_eq!(texts(&used, "standing"), ["not_bound"]);
    host.does(&["key", "revoke", &key, "--provider", "native", "--dry-run"]);
    host.does(&["key", "revoke", &key, "--provider", "native"]);
    host.opens("moved").unwrap();
    let needed = host.key_of("two");
    let revoke = [
        "key",
        "revoke",
        &needed,
        "--provider",
        "native",
        "--force",
        "--confirm",
    ];
    host.fails(&[&revoke[..], &["another"]].concat(), USAGE);
    host.opens("two").unwrap();
    host.does(&[&revoke[..], &[&needed]].concat());
    assert!(host.opens("two").unwrap_err().contains("not active"));
    let listed = host.json(&["key", "list", "--json"]);
    let states: Vec<_> = listed
        .iter()
        .map(|row| (row["keyId"] == *needed, &row["state"]))
        .collect();
    assert!(states.contains(&(true, &"revoked".into())), "{listed:?}");
    // It was said that the provider failed, and to see its log.
    let key = host.key_of("moved");
    let destroy = ["key", "revoke", &key, "--provider", "native", "--destroy"];
    for more in [&["--force", "--confirm", &key][..], &["--dry-run"]] {
        let why = host.fails(&[&destroy[..], more].concat(), USAGE);
        assert!(
            why.contains("cannot destroy a single key") && why.contains("leave out --destroy"),
            "{why}"
        );
    }
    host.opens("moved").unwrap();
}

#[test]
fn keys_and_providers_that_disks_need_are_not_taken_away() {
    keys_and_providers_in_use_are_kept(&Host::new());
}

#[test]
fn the_agent_keeps_what_disks_need_and_tells_the_log() {
    let host = Host::with_agent("");
    keys_and_providers_in_use_are_kept(&host);
    let revoked = host.audit("KeyRevoked");
    // One that cannot be destroyed is refused before the log is told.
    assert_eq!(revoked.len(), 2);
    assert_eq!(revoked[1]["keyId"], host.key_of("two").as_str());
    assert_eq!(revoked[1]["force"], true);
    host.does(&["provider", "remove", "native", "--force", "--confirm", "native"]);
    assert_eq!(host.audit("ProviderRemoved")[0]["provider"], "native");
    assert!(host.opens("moved").unwrap_err().contains("no such key provider"));
}

/// What the header of a disk has for each keyslot: as whoever can read the file sees it.
fn wrapped_secret(host: &Host, disk: &str) -> Vec<u8> {
    let mut dump = Command::new("cryptsetup");
    let dump = run(dump
        .args(["luksDump", "--dump-json-metadata"])
        .arg(host.path(disk)));
    let metadata: Value = serde_json::from_slice(&dump.stdout).unwrap();
    let tokens = metadata["tokens"].as_object().unwrap();
    let wrapped = tokens.values().next().unwrap()["wrapped_slot_secret"]
        .as_str()
        .unwrap();
    BASE64_STANDARD.decode(wrapped).unwrap()
}

// A user with EncryptNew alone had the agent note eight places of another user's volume. They pushed its own note out, and were
// taken back. The key was revoked without --force then, and the disk opened no more.
#[test]
fn who_makes_disks_does_not_have_the_agent_forget_the_disks_of_others() {
    let host = Host::with_agent(&format!(
        "[[grant]]\nuser = {SOMEBODY}\nprivileges = [\"EncryptNew\", \"RegisterVM\"]\n"
    ));
    host.create("disk", &[]);
    let key_id = KeyId(host.key_of("disk"));
    let volume = uuid_of(&host, &["disk"]).parse().unwrap();
    let wrapped = wrapped_secret(&host, "disk");
    let socket = host.path("agent.sock");
    let at = |purpose, path: &Path| Client::new(&socket, purpose).at(path).provider("native").unwrap();
    let binding = |volume| Binding {
        volume,
        provider: "native",
        key_id: &key_id,
        keyslot: 0,
    };
    let secret = SecretBytes::random(32).unwrap();
    as_user(SOMEBODY, || {
        for number in 0..12 {
            let invented = PathBuf::from(format!("/nowhere/{number}"));
            for (volume, words) in [(volume, "another user"), (Uuid::new_v4(), "another volume,")] {
                let maker = at(RequestPurpose::Create, &invented);
                let error = maker.wrap(&binding(volume), &secret).unwrap_err();
                let cause = std::error::Error::source(&error).unwrap().to_string();
                assert!(
                    error.reason == KeyReason::Refused && cause.contains(words),
                    "{error}: {cause}"
                );
                maker.settle(&binding(volume), true).unwrap();
                maker.settle(&binding(volume), false).unwrap();
            }
            at(RequestPurpose::Attach, &invented)
                .unwrap(&binding(volume), &wrapped)
                .unwrap();
        }
    });
    // The places that were named count too, until somebody says that nothing is there.
    let revoke = ["key", "revoke", &key_id.0, "--provider", "native"];
    let listed = host.json(&["key", "where-used", &key_id.0, "--json"]);
    assert_eq!(listed.len(), 9, "{listed:?}");
    assert_eq!(listed.iter().filter(|row| row["user"] == SOMEBODY).count(), 8);
    let refused = host.fails(&revoke, IN_USE);
    assert!(refused.contains(host.path("disk").to_str().unwrap()), "{refused}");
    host.does(&["key", "scan", "--forget-missing"]);
    host.fails(&revoke, IN_USE);

    // Nor by saying that it was erased, while its disk is away and something else is in its place.
    fs::rename(host.path("disk"), host.path("away")).unwrap();
    fs::write(host.path("disk"), [0; 1 << 20]).unwrap();
    let erased = Erasure {
        volume,
        path: host.path("disk").display().to_string(),
        step: ErasureStep::Erased {
            header_sha256: "0".repeat(64),
            written_sha256: "0".repeat(64),
        },
    };
    as_user(SOMEBODY, || {
        Client::new(&socket, RequestPurpose::Create).report_erasure(&erased)
    })
    .unwrap();
    host.fails(&revoke, IN_USE);

    // What is being served is known without the list.
    let served = at(RequestPurpose::Attach, &host.path("away"));
    served.unwrap(&binding(volume), &wrapped).unwrap();
    fs::remove_dir_all(host.path("state/volumes")).unwrap();
    let refused = host.fails(&revoke, IN_USE);
    let process = format!("served: by process {} of user", std::process::id());
    assert!(refused.contains(&process), "{refused}");
    host.opens("away").unwrap();
}

// Whoever may make disks and see the list could learn what is in directories that are closed to it: the agent looked there, and told
// whether there was a file, a directory or nothing.
#[test]
fn what_is_at_places_is_told_to_who_manages_keys_alone() {
    let users = [SOMEBODY, SOMEBODY + 1, SOMEBODY + 2];
    let privileges = [
        "\"EncryptNew\", \"ReadKeyServersInfo\"",
        "\"ManageKeys\"",
        "\"ManageKeyServers\"",
    ];
    let grant = |(user, privileges)| format!("[[grant]]\nuser = {user}\nprivileges = [{privileges}]\n");
    let host = Host::with_agent(&users.into_iter().zip(privileges).map(grant).collect::<String>());
    fs::set_permissions(host.path("config.toml"), fs::Permissions::from_mode(0o644)).unwrap();
    let secret = host.path("secret");
    fs::create_dir(&secret).unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o700)).unwrap();
    let [file, dir, missing, device] = ["file", "dir", "missing", "device"].map(|name| secret.join(name));
    fs::write(&file, "text").unwrap();
    fs::create_dir(&dir).unwrap();
    let mut node = Command::new("mknod");
    // The first of nbd, which is not opened, be it there or not.
    let has_device = node
        .arg(&device)
        .args(["b", "43", "0"])
        .status()
        .unwrap()
        .success();
    let mut places = vec![
        (&file, "missing", "no LUKS2 volume is there"),
        (&dir, "unknown", "it is neither a regular file nor a block device"),
        (&missing, "missing", ""),
    ];
    if has_device {
        places.push((&device, "unknown", "it is a removable or network block device"));
    }
    as_user(SOMEBODY, || {
        for (place, ..) in &places {
            let maker = Client::new(&host.path("agent.sock"), RequestPurpose::Create).at(place);
            let provider = maker.provider("native").unwrap();
            let key_id = provider.create_kek().unwrap();
            let binding = Binding {
                volume: Uuid::new_v4(),
                provider: "native",
                key_id: &key_id,
                keyslot: 0,
            };
            provider
                .wrap(&binding, &SecretBytes::random(32).unwrap())
                .unwrap();
        }
    });
    let told_to = |user| {
        let list = ["key", "where-used", "--provider", "native", "--json"];
        let output = as_user(user, || host.command(&list).output().unwrap());
        assert!(output.status.success(), "{}", said(&output));
        let rows: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
        let told = |(place, ..): &(&PathBuf, &str, &str)| {
            let row = rows
                .iter()
                .find(|row| row["path"] == place.to_str().unwrap())
                .unwrap();
            let text = |name: &str| row[name].as_str().unwrap_or_default().to_owned();
            (text("standing"), text("why"))
        };
        places.iter().map(told).collect::<Vec<_>>()
    };
    assert_eq!(
        told_to(SOMEBODY),
        vec![("untold".into(), String::new()); places.len()]
    );
    for user in [0, SOMEBODY + 1] {
        for ((standing, why), (place, expected, reason)) in told_to(user).iter().zip(&places) {
            assert!(
                standing == expected && why.contains(reason),
                "{place:?}: {standing}, {why}"
            );
        }
    }
    let remove = ["provider", "remove", "native"];
    for (user, tells) in [(SOMEBODY + 2, false), (0, true)] {
        let refused = said(&as_user(user, || host.command(&remove).output().unwrap()));
        assert!(refused.contains(file.to_str().unwrap()), "{refused}");
        assert_eq!(refused.contains("no LUKS2 volume"), tells, "{refused}");
    }
}

#[test]
fn managing_takes_its_privileges() {
    let host = Host::with_agent(&format!(
        "[[grant]]\nuser = {SOMEBODY}\nprivileges = [\"ReadKeyServersInfo\"]\n[[grant]]\nuser = {}\nprivileges = \
         [\"ManageKeys\"]\n[[grant]]\nuser = {}\nprivileges = [\"ManageKeyServers\"]\n",
        SOMEBODY + 1,
        SOMEBODY + 2,
    ));
    fs::set_permissions(host.path("config.toml"), fs::Permissions::from_mode(0o644)).unwrap();
    host.create("disk", &[]);
    let key = host.key_of("disk");
    let verbs: [(&[&str], [bool; 3]); 4] = [
        (&["key", "where-used", &key], [true, true, false]),
        (&["key", "scan"], [false, true, false]),
        (
            &["key", "revoke", &key, "--provider", "native", "--dry-run"],
            [false, true, false],
        ),
        (
            &["provider", "remove", "native", "--dry-run"],
            [false, false, true],
        ),
    ];
    for (verb, allowed) in verbs {
        for (user, allowed) in (SOMEBODY..).zip(allowed) {
            let output = as_user(user, || host.command(verb).output().unwrap());
            let code = output.status.code().unwrap();
            let refused = said(&output).contains("lacks the privilege");
            // Who may do it is told that the disk is in the way.
            assert_eq!(!refused, allowed, "{verb:?} of {user}: {code}, {}", said(&output));
            assert_eq!(
                refused,
                code == ASKED,
                "{verb:?} of {user}: {code}, {}",
                said(&output)
            );
        }
    }
}

fn a_lost_list_comes_back(host: &Host) {
    for name in ["one", "two"] {
        host.create(name, &[]);
    }
    fs::remove_dir_all(host.path("state/volumes")).unwrap();
    // Nothing was lost but the hint.
    host.opens("one").unwrap();
    let known = |host: &Host| host.json(&["key", "where-used", "--provider", "native", "--json"]);
    assert_eq!(texts(&known(host), "path"), [host.path("one").to_str().unwrap()]);
    fs::create_dir(host.path("vms")).unwrap();
    fs::rename(host.path("two"), host.path("vms/two")).unwrap();
    fs::write(host.path("vms/notes.txt"), "no volume").unwrap();
    let told = host.does(&["key", "scan", "vms"]);
    assert!(told.starts_with("1 volumes found, 1 of them bound"), "{told}");
    let all = known(host);
    assert_eq!(all.len(), 2);
    let scanned = all
        .iter()
        .find(|row| row["path"] == host.path("vms/two").to_str().unwrap())
        .unwrap();
    assert!(
        scanned["bound"].is_string() && scanned["opened"].is_null(),
        "{scanned}"
    );
    // What is found not to be so is dropped, and what is not found only on demand.
    host.does(&["rekey", "one"]);
    fs::remove_file(host.path("vms/two")).unwrap();
    assert!(host.does(&["key", "scan"]).contains("1 entries dropped"));
    assert_eq!(known(host).len(), 2);
    assert!(
        host.does(&["key", "scan", "--forget-missing"])
            .contains("1 entries dropped")
    );
    assert_eq!(texts(&known(host), "path"), [host.path("one").to_str().unwrap()]);
}

#[test]
fn a_lost_list_comes_back_by_use_and_by_a_look() {
    a_lost_list_comes_back(&Host::new());
    a_lost_list_comes_back(&Host::with_agent(""));
}

#[test]
fn a_file_system_that_does_not_answer_keeps_its_disks_keys_and_nobody_waiting() {
    let host = Host::with_agent("");
    let agent = host.agent.as_ref().unwrap().id();
    fs::create_dir_all(host.path("far/away")).unwrap();
    for disk in ["far/one", "far/away/two", "near"] {
        host.create(disk, &[]);
    }
    let Some(silent) = SilentFilesystem::over(host.path("far")) else {
        eprintln!("skipped: only root can mount");
        return;
    };
    let known = || host.json(&["key", "where-used", "--provider", "native", "--json"]);
    let near = host.path("near");
    let check = |rows: &[Value], far: &str| {
        for row in rows {
            let is_near = row["path"] == near.to_str().unwrap();
            assert_eq!(row["standing"], if is_near { "bound" } else { far }, "{row}");
        }
        assert_eq!(rows.len(), 3);
    };
    let rows = known();
    check(&rows, "unknown");
    let why = rows.iter().find_map(|row| row["why"].as_str()).unwrap();
    assert_eq!(why, format!("{} does not answer", host.path("far").display()));

    // One process waits for all of them. Nobody else waits from now on.
    let asked = Instant::now();
    while children_of(agent).len() != 1 {
        assert!(asked.elapsed() < common::DEADLINE, "{:?}", children_of(agent));
        thread::sleep(Duration::from_millis(10));
    }
    let asked = Instant::now();
    check(&known(), "unknown");
    let refused = host.fails(&["provider", "remove", "native"], IN_USE);
    for disk in ["far/one", "far/away/two"] {
        assert!(refused.contains(host.path(disk).to_str().unwrap()), "{refused}");
    }
    assert!(refused.contains("does not answer"), "{refused}");
    host.does(&["key", "scan", "--forget-missing"]);
    host.does(&["rekey", "near"]);
    host.create("another", &[]);
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());

    drop(silent);
    host.does(&["erase", "another", "--confirm", &uuid_of(&host, &["another"])]);
    host.does(&["key", "scan"]);
    check(&known(), "bound");
}

// The notes of disks that were deleted filled the list: no disk could be made and no key be changed, the error blamed the
// provider's files, and what it named did not help. What would have helped took longer than a client of the agent waits.
#[test]
fn a_list_without_room_keeps_no_key_from_being_changed_and_says_what_helps() {
    const MOST: usize = 16384;
    let host = Host::with_agent("");
    host.create("vm.luks", &[]);
    let old = host.key_of("vm.luks");
    for number in 1..MOST {
        let volume = Uuid::from_u128(number as u128);
        let note = json!({
            "volume": volume, "path": format!("/nowhere/{number}"), "provider": "native", "keyId": format!("k{number}"), "keyslot": 0,
        });
        fs::write(
            host.path(&format!("state/volumes/{volume}.0.json")),
            note.to_string(),
        )
        .unwrap();
    }
    let refused = host.fails(&["create", "more.luks", "--size", "1M"], KEY);
    for (text, told) in [
        ("`sealblk key scan --forget-missing`", true),
        ("attach disks that are only detached", true),
        ("restore", false),
        ("own state", false),
    ] {
        assert_eq!(refused.contains(text), told, "{refused}");
    }
    host.does(&["rekey", "vm.luks"]);
    let new = host.key_of("vm.luks");
    assert_ne!(new, old);
    let used = host.json(&["key", "where-used", &old, "--json"]);
    assert_eq!(texts(&used, "standing"), ["not_bound"]);
    // The next one drops that note, which the header contradicts, so that it needs no more room either.
    host.does(&["rekey", "vm.luks"]);
    assert!(host.json(&["key", "where-used", &old, "--json"]).is_empty());
    let (old, new) = (new, host.key_of("vm.luks"));
    let used = host.json(&["key", "where-used", &new, "--json"]);
    assert_eq!(texts(&used, "standing"), ["bound"]);
    let listed = host.command(&["key", "where-used", &new]).output().unwrap();
    assert!(
        said(&listed).contains("room for 16384 volumes, and holds 16384"),
        "{}",
        said(&listed)
    );
    host.fails(&["key", "revoke", &new, "--provider", "native"], IN_USE);

    let told = host.does(&["key", "scan", "--forget-missing"]);
    assert!(told.contains("16384 entries dropped"), "{told}");
    host.create("more.luks", &[]);
    host.fails(&["key", "revoke", &new, "--provider", "native"], IN_USE);
    host.does(&["key", "revoke", &old, "--provider", "native"]);
}

#[test]
fn a_disk_that_could_not_be_made_is_on_no_list() {
    for host in [Host::new(), Host::with_agent("")] {
        host.create("made", &[]);
        let known = || host.json(&["key", "where-used", "--provider", "native", "--json"]);
        let only_made = || assert_eq!(texts(&known(), "path"), [host.path("made").to_str().unwrap()]);
        // Where there is no room, and where somebody else's disk is.
        host.fails(&["create", "vm", "--size", "16777215T"], STORAGE);
        only_made();
        host.fails(&["create", "made", "--size", "1M"], IN_USE);
        only_made();
        assert_eq!(known()[0].get("unsettled"), None);
        host.opens("made").unwrap();
    }
}

#[test]
fn a_key_that_a_disk_is_about_to_get_is_kept() {
    let host = Host::new();
    host.create("disk", &[]);
    let key = host.key_of("disk");
    host.does(&["rekey", "disk"]);
    let notes = fs::read_dir(host.path("state/volumes")).unwrap();
    let read = |path: &PathBuf| serde_json::from_slice::<Value>(&fs::read(path).unwrap()).unwrap();
    let note = notes
        .map(|note| note.unwrap().path())
        .find(|note| read(note)["keyId"] == key.as_str())
        .unwrap();
    let mut known = read(&note);
    let standing = || host.json(&["key", "where-used", &key, "--json"])[0]["standing"].clone();
    let revoke = ["key", "revoke", &key, "--provider", "native", "--dry-run"];
    assert_eq!(standing(), "not_bound");
    host.does(&revoke);
    // As a rekey leaves it between its note and its writing of the header.
    known["unsettled"] = true.into();
    fs::write(&note, known.to_string()).unwrap();
    assert_eq!(standing(), "unknown");
    assert!(host.fails(&revoke, IN_USE).contains("about to be bound"));
    assert!(host.does(&["key", "scan"]).contains("0 entries dropped"));
    known["bound"] = "2020-02-29T12:00:00Z".into();
    fs::write(&note, known.to_string()).unwrap();
    assert_eq!(standing(), "not_bound");
    host.does(&revoke);
}

#[test]
fn a_disk_whose_making_was_killed_is_on_the_list_for_an_hour() {
    for host in [Host::new(), Host::with_agent("")] {
        host.create("made", &[]);
        let notes = || {
            let entries = fs::read_dir(host.path("state/volumes")).unwrap();
            let paths = entries.map(|entry| entry.unwrap().path());
            let notes = paths.filter(|path| path.extension().is_some_and(|extension| extension == "json"));
            notes.collect::<Vec<_>>()
        };
        let age = |note: &PathBuf, unsettled: bool| {
            let mut known: Value = serde_json::from_slice(&fs::read(note).unwrap()).unwrap();
            known["bound"] = "2020-02-29T12:00:00Z".into();
            known["unsettled"] = unsettled.into();
            fs::write(note, known.to_string()).unwrap();
        };
        let whole = notes().pop().unwrap();
        // Between the noting and the writing a recovery key takes its second.
        let mut making = host
            .command(&["create", "vm", "--size", "1M", "--recovery-key", "recovery"])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let started = Instant::now();
        while notes().len() == 1 {
            assert!(started.elapsed() < common::DEADLINE, "nothing is noted");
            thread::sleep(Duration::from_millis(1));
        }
        making.kill().unwrap();
        making.wait().unwrap();

        let known = || host.json(&["key", "where-used", "--provider", "native", "--json"]);
        let killed = |rows: &[Value]| {
            let row = rows
                .iter()
                .find(|row| row["path"] == host.path("vm").to_str().unwrap());
            row.unwrap().clone()
        };
        let row = killed(&known());
        assert_eq!(
            (&row["unsettled"], &row["standing"]),
            (&true.into(), &"missing".into())
        );
        let key = row["keyId"].as_str().unwrap().to_owned();
        let revoke = ["key", "revoke", &key, "--provider", "native", "--dry-run"];
        host.fails(&revoke, IN_USE);

        // An hour later. A volume that says so itself stays, whatever the note says.
        let killed_note = notes().into_iter().find(|note| *note != whole).unwrap();
        age(&killed_note, true);
        age(&whole, true);
        assert_eq!(killed(&known())["standing"], "not_bound");
        host.does(&revoke);
        assert!(host.does(&["key", "scan"]).contains("1 entries dropped"));
        assert_eq!(texts(&known(), "standing"), ["bound"]);
        // So does one that is known to have come about, wherever it may be now.
        age(&whole, false);
        fs::rename(host.path("made"), host.path("elsewhere")).unwrap();
        assert!(host.does(&["key", "scan"]).contains("0 entries dropped"));
        assert_eq!(texts(&known(), "standing"), ["missing"]);
    }
}

#[test]
fn a_header_of_another_host_is_no_note_of_this_one_but_its_place_is_not_forgotten() {
    let host = Host::new();
    host.create("disk", &[]);
    let key = host.key_of("disk");
    // Another volume takes the place of the one that was noted.
    host.create("other", &[]);
    fs::rename(host.path("other"), host.path("disk")).unwrap();
    let used = host.json(&["key", "where-used", &key, "--json"]);
    assert_eq!(texts(&used, "standing"), ["missing"]);
    assert!(used[0]["why"].as_str().unwrap().contains("another volume"));
    let revoke = ["key", "revoke", &key, "--provider", "native"];
    host.does(&["key", "scan"]);
    assert!(host.fails(&revoke, IN_USE).contains("another volume is there"));
    // Somebody has to say that it is gone for good.
    host.does(&["key", "scan", "--forget-missing"]);
    host.does(&revoke);
    host.opens("disk").unwrap();
}

#[test]
fn a_provider_goes_with_its_files_and_comes_back_from_its_backup() {
    let host = Host::new();
    host.backup("native");
    host.does(&["provider", "add", "native", "--name", "second", "--no-backup"]);
    // Not without a backup, not without a successor.
    let refused = host.fails(&["provider", "remove", "second"], IN_USE);
    assert!(refused.contains("provider backup"), "{refused}");
    host.fails(&["provider", "remove", "second", "--force"], USAGE);
    host.fails(
        &["provider", "remove", "second", "--force", "--confirm", "native"],
        USAGE,
    );
    let refused = host.fails(&["provider", "remove", "native"], USAGE);
    assert!(
        refused.contains("--new-default") && refused.contains("second"),
        "{refused}"
    );
    host.fails(&["provider", "remove", "third"], KEY);

    host.create("disk", &[]);
    let key = fs::read(host.path("state/providers/native/primary.key")).unwrap();
    host.does(&["rekey", "disk", "--provider", "second"]);
    host.does(&[
        "provider",
        "remove",
        "native",
        "--new-default",
        "second",
        "--dry-run",
    ]);
    assert_eq!(
        fs::read(host.path("state/providers/native/primary.key")).unwrap(),
        key
    );
    host.does(&["provider", "remove", "native", "--new-default", "second"]);
    assert!(!host.path("state/providers/native").exists());
    // The list complained of its keys until the next scan.
    let listed = host.json(&["key", "list", "--json"]);
    assert_eq!(texts(&listed, "provider"), ["second"]);
    assert!(!host.does(&["provider", "list"]).contains("native.backup"));
    host.create("new", &[]);
    host.does(&[
        "provider",
        "restore",
        "native.backup",
        "--passphrase-file",
        "pass",
    ]);
    assert_eq!(
        fs::read(host.path("state/providers/native/primary.key")).unwrap(),
        key
    );
    host.does(&[
        "provider",
        "remove",
        "second",
        "--new-default",
        "native",
        "--force",
        "--confirm",
        "second",
    ]);
    assert!(host.opens("disk").unwrap_err().contains("no such key provider"));
    // What a disk needs stays on the list.
    let listed = host.json(&["key", "where-used", "--provider", "second", "--json"]);
    assert_eq!(texts(&listed, "standing"), ["bound", "bound"]);
}

/// The SHA-256 of bytes, by another program.
fn sha256(bytes: &[u8]) -> String {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    let sum = run(Command::new("sha256sum").arg(file.path())).stdout;
    String::from_utf8(sum).unwrap()[..64].to_owned()
}

fn uuid_of(host: &Host, args: &[&str]) -> String {
    let info: Value = serde_json::from_str(&host.does(&[&["info", "--json"], args].concat())).unwrap();
    info["uuid"].as_str().unwrap().to_owned()
}

/// Where the header ends of a volume that sealblk made, and where its copies end.
const HEADER: usize = 16 << 20;
const COPIES: usize = 32 << 10;

#[test]
fn an_erased_disk_opens_with_nothing_and_the_receipt_says_what_it_was() {
    let host = Host::new();
    host.create("disk", &["--recovery-key", "key"]);
    let key = host.key_of("disk");
    let uuid = uuid_of(&host, &["disk"]);
    let before = fs::read(host.path("disk")).unwrap();

    // Not by accident, and not while it is in use.
    assert!(host.fails(&["erase", "disk"], USAGE).contains("--confirm UUID"));
    assert!(
        host.fails(&["erase", "disk", "--confirm", &key], USAGE)
            .contains(&uuid)
    );
    let claim = Backing::claimed(&host.path("disk"), Access::ReadOnly).unwrap();
    host.fails(&["erase", "disk", "--confirm", &uuid], IN_USE);
    drop(claim);
    fs::write(host.path("taken"), "a receipt").unwrap();
    host.fails(
        &["erase", "disk", "--confirm", &uuid, "--receipt", "taken"],
        STORAGE,
    );
    assert!(fs::read(host.path("disk")).unwrap() == before, "it was touched");

    // As an erase that was interrupted leaves it.
    fs::write(host.path("receipt"), "").unwrap();
    host.does(&["erase", "disk", "--confirm", &uuid, "--receipt", "receipt"]);
    let receipt: Value = serde_json::from_slice(&fs::read(host.path("receipt")).unwrap()).unwrap();
    assert_eq!(receipt["receipt"], "sealblk-erase-2");
    assert_eq!(receipt["volume"], uuid.as_str());
    assert_eq!(receipt["path"], host.path("disk").to_str().unwrap());
    assert_eq!(
        receipt["device"]["inode"],
        fs::metadata(host.path("disk")).unwrap().ino()
    );
    assert_eq!(receipt["headerSha256"], sha256(&before[..COPIES]).as_str());
    assert_eq!(
        receipt["keyslotsSha256"],
        sha256(&before[COPIES..HEADER]).as_str()
    );
    assert_eq!(receipt["before"]["keyslots"].as_array().unwrap().len(), 2);
    assert_eq!(receipt["before"]["tokens"][0]["keyId"], key.as_str());
    assert_eq!(receipt["erased"]["length"], HEADER);
    assert_eq!(receipt["keys"], json!([]), "the key was left alone");

    // Nothing of it is left, not even for who has an old copy of the header; the data are as they were.
    let after = fs::read(host.path("disk")).unwrap();
    assert_eq!(after.len(), before.len());
    assert!(after[HEADER..] == before[HEADER..]);
    let mut sectors = (0..HEADER).step_by(512).map(|at| at..at + 512);
    // The header's copies are padded with zeros, and so is what was discarded.
    let left = sectors.find(|at| after[at.clone()] == before[at.clone()] && before[at.clone()] != [0; 512]);
    assert_eq!(left, None, "this is there still");
    host.fails(&["info", "disk"], VOLUME);
    host.fails(&["erase", "disk", "--confirm", &uuid], VOLUME);
    fs::write(
        host.path("forged"),
        [&before[..COPIES], &after[COPIES..]].concat(),
    )
    .unwrap();
    assert!(host.opens("forged").is_err());
    let opened = Command::new("cryptsetup")
        .args(["open", "--test-passphrase", "--key-file"])
        .args([host.path("key"), host.path("forged")])
        .output()
        .unwrap();
    assert_eq!(
        opened.status.code(),
        Some(2),
        "no key available: {}",
        said(&opened)
    );
    fs::remove_file(host.path("forged")).unwrap();

    // It is on no list any more, and in the log.
    host.does(&["key", "scan", "--forget-missing"]);
    assert!(host.json(&["key", "where-used", &key, "--json"]).is_empty());
    let logged = host.audit("VolumeErased");
    assert_eq!(logged.len(), 1);
    assert_eq!(logged[0]["volume"], uuid.as_str());
    assert_eq!(logged[0]["headerSha256"], receipt["headerSha256"]);
    host.does(&["audit", "verify"]);
}

#[test]
fn a_receipt_is_confirmed_by_the_log_and_a_forged_one_is_not() {
    for host in [Host::new(), Host::with_agent("")] {
        let log = host.path("state/audit.log");
        let verify = |receipt: &str| {
            let args = ["audit", "verify", log.to_str().unwrap(), "--receipt", receipt];
            host.command(&args).output().unwrap()
        };
        for disk in ["disk", "other"] {
            host.create(disk, &[]);
            let uuid = uuid_of(&host, &[disk]);
            let receipt = format!("{disk}.receipt");
            host.does(&["erase", disk, "--confirm", &uuid, "--receipt", &receipt]);
            let confirmed = verify(&receipt);
            assert!(confirmed.status.success(), "{}", said(&confirmed));
            let told = String::from_utf8(confirmed.stdout).unwrap();
            assert!(
                told.contains(&format!("{receipt}: unchanged; issued by user 0")),
                "{told}"
            );
        }
        for event in ["ErasureBegun", "VolumeErased", "ReceiptIssued"] {
            assert_eq!(host.audit(event).len(), 2, "{event}");
        }
        let receipt = fs::read(host.path("disk.receipt")).unwrap();
        let forge = |bytes: &[u8]| {
            fs::write(host.path("forged"), bytes).unwrap();
            let refused = verify("forged");
            assert_eq!(refused.status.code(), Some(VOLUME), "{}", said(&refused));
            said(&refused)
        };
        // What the log does not repeat cannot be changed either.
        let text = String::from_utf8(receipt.clone()).unwrap();
        let by = format!("\"program\": \"sealblk {}\"", env!("CARGO_PKG_VERSION"));
        assert!(text.contains(&by));
        let told = forge(text.replace(&by, "\"program\": \"sealblk 9\"").as_bytes());
        assert!(
            told.contains("the receipt was changed after it was issued"),
            "{told}"
        );
        let told = forge(
            text.replace(text.split('"').nth(7).unwrap(), "another")
                .as_bytes(),
        );
        assert!(told.contains("it has no erasure of this volume"), "{told}");
        assert!(forge(b"no receipt").contains("it has no erasure of this volume"));
        let mut flipped = receipt;
        for at in [0, flipped.len() / 2, flipped.len() - 1] {
            flipped[at] ^= 1;
            forge(&flipped);
            flipped[at] ^= 1;
        }
    }
}

/// Changed or destroyed in a copy of the header, what opens a disk still opens it.
#[test]
fn a_copy_of_the_header_is_not_taken_for_the_header() {
    let host = Host::new();
    host.create("disk", &["--recovery-key", "key"]);
    let uuid = uuid_of(&host, &["disk"]);
    let mut backup = Command::new("cryptsetup");
    backup.arg("luksHeaderBackup").arg(host.path("disk"));
    run(backup.arg("--header-backup-file").arg(host.path("copy")));
    let before = fs::read(host.path("copy")).unwrap();
    for args in [
        &["erase", "disk", "--header", "copy", "--confirm", &uuid][..],
        &["rekey", "disk", "--header", "copy"],
        &[
            "recovery",
            "add",
            "disk",
            "--header",
            "copy",
            "--recovery-key",
            "other",
        ],
    ] {
        let refused = host.fails(args, USAGE);
        assert!(refused.contains("has its header on the disk"), "{refused}");
    }
    assert!(fs::read(host.path("copy")).unwrap() == before, "it was touched");
    host.does(&[
        "recovery",
        "test",
        "disk",
        "--header",
        "copy",
        "--recovery-key",
        "key",
    ]);
}

/// A rekey that was killed once its token was in, to a provider that is then gone.
#[test]
fn a_rekey_goes_on_past_one_whose_provider_is_gone() {
    let host = Host::new();
    host.does(&["provider", "add", "native", "--name", "two", "--no-backup"]);
    host.create("disk", &["--recovery-key", "key"]);
    host.does(&["rekey", "disk", "--provider", "two"]);
    let cryptsetup = |args: &[&str]| {
        let mut command = Command::new("cryptsetup");
        run(command.current_dir(host.path("")).args(["token"]).args(args)).stdout
    };
    let info: Value = serde_json::from_str(&host.does(&["info", "--json", "disk"])).unwrap();
    let id = info["tokens"][0]["token"].to_string();
    let token = cryptsetup(&["export", "--token-id", &id, "disk"]);
    let mut token: Value = serde_json::from_slice(&token).unwrap();
    token["replaces"] = json!(["9"]);
    fs::write(host.path("token"), token.to_string()).unwrap();
    let import = [
        "import",
        "--token-replace",
        "--token-id",
        &id,
        "--json-file",
        "token",
        "disk",
    ];
    cryptsetup(&import);
    host.does(&["provider", "remove", "two", "--force", "--confirm", "two"]);
    host.fails(&["rekey", "disk", "--unlock-key", "key"], KEY);
    host.does(&["rekey", "disk", "--unlock-key", "key", "--provider", "native"]);
    host.opens("disk").unwrap();
}

#[test]
fn nothing_is_erased_that_no_log_tells_of() {
    let mut host = Host::with_agent("");
    fs::set_permissions(host.path("config.toml"), fs::Permissions::from_mode(0o644)).unwrap();
    host.create("disk", &[]);
    let uuid = uuid_of(&host, &["disk"]);
    fs::set_permissions(host.path("disk"), fs::Permissions::from_mode(0o666)).unwrap();
    let erase = ["erase", "disk", "--confirm", &uuid, "--receipt", "receipt"];
    let refused = as_user(SOMEBODY, || host.command(&erase[..4]).output().unwrap());
    assert_eq!(refused.status.code(), Some(ASKED), "{}", said(&refused));
    assert!(
        said(&refused).contains("lacks the privilege"),
        "{}",
        said(&refused)
    );
    host.opens("disk").unwrap();
    let mut agent = host.agent.take().unwrap();
    agent.kill().unwrap();
    agent.wait().unwrap();
    host.fails(&erase, ASKED);
    assert!(!host.path("receipt").exists());
    // Who insists names the state directory, and its log tells of it.
    host.keys = vec!["--state-dir".into(), "state".into()];
    host.opens("disk").unwrap();
    host.does(&erase);
    assert_eq!(host.audit("ReceiptIssued").len(), 1);
}

#[test]
fn an_erasure_that_is_killed_leaves_no_doubt() {
    let host = Host::new();
    let mut random = common::Random::new(7);
    let (mut killed, mut begun) = (0, 0);
    // How long it takes here when nobody interferes.
    host.create("whole", &[]);
    let uuid = uuid_of(&host, &["whole"]);
    let whole = Instant::now();
    host.does(&["erase", "whole", "--confirm", &uuid]);
    let whole = whole.elapsed().as_micros() as u64;
    for round in 0..12 {
        let disk = format!("disk{round}");
        host.create(&disk, &[]);
        let uuid = uuid_of(&host, &[&disk]);
        let erase = ["erase", &disk, "--confirm", &uuid];
        let mut child = host
            .command(&erase)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        thread::sleep(Duration::from_micros(random.below(whole)));
        child.kill().unwrap();
        killed += u32::from(!child.wait().unwrap().success());
        let info = host.command(&["info", "--json", &disk]).output().unwrap();
        match info.status.code() {
            // The header is gone, and the keyslots went before it.
            Some(VOLUME) => {}
            Some(0) => {
                let info: Value = serde_json::from_slice(&info.stdout).unwrap();
                match info["servable"].as_bool().unwrap() {
                    true => host.opens(&disk).unwrap(),
                    false => {
                        begun += 1;
                        let why = info["refusal"].as_str().unwrap();
                        assert!(why.contains("erasure has begun"), "{why}");
                        let why = host.opens(&disk).unwrap_err();
                        assert!(why.contains("finish the erasure"), "{why}");
                    }
                }
                host.does(&erase);
                host.fails(&["info", &disk], VOLUME);
            }
            code => panic!("{code:?}: {}", said(&info)),
        }
    }
    eprintln!("{killed} of 12 were killed, {begun} of them once it was marked");
    assert!(killed > 0);
}

#[test]
fn the_key_goes_with_its_last_disk() {
    let host = Host::with_agent("");
    // Two disks of one key, as a copy of a disk is.
    host.create("disk", &[]);
    let key = host.key_of("disk");
    fs::copy(host.path("disk"), host.path("copy")).unwrap();
    host.opens("copy").unwrap();
    let uuid = uuid_of(&host, &["disk"]);
    let erase = |disk: &str| -> Value {
        let told = host.does(&["erase", disk, "--confirm", &uuid, "--revoke-key"]);
        serde_json::from_str(&told).unwrap()
    };
    let receipt = erase("disk");
    assert_eq!(receipt["keys"][0]["revoked"], Value::Null);
    let why = receipt["keys"][0]["why"].as_str().unwrap();
    assert!(why.contains(host.path("copy").to_str().unwrap()), "{why}");
    host.opens("copy").unwrap();
    // A disk by another name is no other disk.
    std::os::unix::fs::symlink("copy", host.path("link")).unwrap();
    host.opens("link").unwrap();
    assert_eq!(host.json(&["key", "where-used", &key, "--json"]).len(), 2);
    let receipt = erase("copy");
    assert_eq!(receipt["keys"][0]["keyId"], key.as_str());
    assert_eq!(receipt["keys"][0]["revoked"], "host");
    assert_eq!(host.audit("VolumeErased").len(), 2);
    assert_eq!(host.audit("KeyRevoked").len(), 1);
}

/// The disk was erased, its key was not revoked, and the exit code was 0.
#[test]
fn a_disk_stays_whose_key_cannot_go_with_it() {
    let host = Host::with_agent(&format!(
        "[[grant]]\nuser = {SOMEBODY}\nprivileges = [\"EncryptNew\"]\n[[grant]]\nuser = {}\nprivileges = [\"EncryptNew\", \
         \"Access\"]\n",
        SOMEBODY + 1,
    ));
    fs::set_permissions(host.path("config.toml"), fs::Permissions::from_mode(0o644)).unwrap();
    host.create("disk", &[]);
    fs::set_permissions(host.path("disk"), fs::Permissions::from_mode(0o666)).unwrap();
    let uuid = uuid_of(&host, &["disk"]);
    let erase = ["erase", "disk", "--confirm", &uuid, "--revoke-key"];
    for user in [SOMEBODY, SOMEBODY + 1] {
        let refused = as_user(user, || host.command(&erase).output().unwrap());
        let said = said(&refused);
        assert_eq!(refused.status.code(), Some(ASKED), "{said}");
        assert!(
            said.contains("nothing was erased") && said.contains("lacks the privilege"),
            "{said}"
        );
        host.opens("disk").unwrap();
    }

    // What shows only when the disk is gone is told, too.
    std::os::unix::fs::symlink("nowhere/at/all", host.path("state/revoked")).unwrap();
    let output = host.command(&erase).output().unwrap();
    let said = said(&output);
    assert_eq!(output.status.code(), Some(KEY), "{said}");
    assert!(
        said.contains("was not revoked: while it is active") && said.contains("was not revoked"),
        "{said}"
    );
    let receipt: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(receipt["keys"][0]["revoked"], Value::Null);
    host.fails(&["info", "disk"], VOLUME);
}

/// A backup of the header from before a rekey opened the erased disk.
#[test]
fn the_key_that_a_rekey_replaced_goes_with_its_disk() {
    for host in [Host::new(), Host::with_agent("")] {
        host.create("disk", &[]);
        let old = host.key_of("disk");
        fs::copy(host.path("disk"), host.path("backup")).unwrap();
        host.does(&["rekey", "disk"]);
        let new = host.key_of("disk");
        let uuid = uuid_of(&host, &["disk"]);
        let told = host.does(&["erase", "disk", "--confirm", &uuid, "--revoke-key"]);
        let receipt: Value = serde_json::from_str(&told).unwrap();
        let keys = receipt["keys"].as_array().unwrap();
        assert_eq!(texts(keys, "keyId"), [new, old]);
        assert_eq!(texts(keys, "revoked"), ["host", "host"]);
        assert!(host.opens("backup").unwrap_err().contains("not active"));
    }
}

/// The first key that a sealed server told nothing of was taken to tell of all of them.
#[test]
fn a_revoked_key_is_told_whether_its_provider_answers_or_not() {
    for host in [Host::new(), Host::with_agent("")] {
        fs::write(host.path("ca.pem"), "").unwrap();
        fs::write(host.path("token"), "token").unwrap();
        fs::set_permissions(host.path("token"), fs::Permissions::from_mode(0o600)).unwrap();
        let add = Command::new(sealblk_path())
            .current_dir(host.dir.path())
            .args(["--state-dir", "state", "provider", "add", "transit", "--no-check"])
            .args(["--address", "https://127.0.0.1:1", "--ca", "ca.pem"])
            .args(["--transit-key", "sealblk", "--token-file", "token"])
            .output()
            .unwrap();
        assert!(add.status.success(), "{}", said(&add));
        let keys = ["sealblk:vault:v1:AAAA", "sealblk:vault:v1:BBBB"];
        fs::create_dir_all(host.path("state/volumes")).unwrap();
        fs::create_dir_all(host.path("state/revoked")).unwrap();
        for (number, key) in keys.into_iter().enumerate() {
            let volume = Uuid::from_u128(number as u128);
            let note = json!({
                "volume": volume, "path": "/nowhere", "provider": "transit", "keyId": key, "keyslot": 0,
            });
            fs::write(
                host.path(&format!("state/volumes/{volume}.0000000000000000.json")),
                note.to_string(),
            )
            .unwrap();
        }
        // As `key revoke` leaves it: the SHA-256 of provider and key ID.
        let mut named = 7_u64.to_be_bytes().to_vec();
        named.extend(b"transit");
        named.extend(keys[1].as_bytes());
        fs::write(host.path(&format!("state/revoked/{}.json", sha256(&named))), "").unwrap();

        let listed = host.json(&["key", "list", "--json"]);
        let states: Vec<_> = listed.iter().map(|row| (&row["keyId"], &row["state"])).collect();
        assert_eq!(
            states,
            [
                (&json!(keys[0]), &Value::Null),
                (&json!(keys[1]), &json!("revoked")),
            ]
        );
    }
}

#[test]
fn a_key_that_a_header_only_claims_to_need_does_not_go_with_it() {
    for host in [Host::new(), Host::with_agent("")] {
        host.create("theirs", &[]);
        host.create("forged", &[]);
        let key = host.key_of("theirs");
        forge_token(&host, "forged", |token| {
            token.insert("key_id".to_owned(), key.as_str().into());
        });
        // A disk of another host, of which this one knows nothing.
        fs::remove_dir_all(host.path("state/volumes")).unwrap();
        let uuid = uuid_of(&host, &["forged"]);
        let told = host.does(&["erase", "forged", "--confirm", &uuid, "--revoke-key"]);
        let receipt: Value = serde_json::from_str(&told).unwrap();
        assert_eq!(receipt["keys"][0]["keyId"], key.as_str());
        assert_eq!(receipt["keys"][0]["revoked"], Value::Null);
        assert!(receipt["keys"][0]["why"].is_string(), "{receipt}");
        host.opens("theirs").unwrap();
    }
}

#[test]
fn a_detached_header_and_a_device_are_erased() {
    let host = Host::new();
    host.create("data", &["--header", "header"]);
    let payload = fs::read(host.path("data")).unwrap();
    let uuid = uuid_of(&host, &["data", "--header", "header"]);
    host.does(&["erase", "data", "--header", "header", "--confirm", &uuid]);
    assert!(fs::read(host.path("data")).unwrap() == payload);
    host.fails(&["info", "header"], VOLUME);

    let file = host.path("backing");
    fs::File::create(&file).unwrap().set_len(64 << 20).unwrap();
    let Some(device) = LoopDevice::over(&file, 512) else {
        return;
    };
    let disk = device.path().to_str().unwrap();
    host.does(&["create", disk]);
    let used = host.json(&["key", "where-used", &host.key_of(disk), "--json"]);
    assert_eq!(texts(&used, "standing"), ["bound"], "{used:?}");
    let uuid = uuid_of(&host, &[disk]);
    let receipt: Value = serde_json::from_str(&host.does(&["erase", disk, "--confirm", &uuid])).unwrap();
    assert_eq!(receipt["device"]["kind"], "block_device");
    assert_eq!(receipt["erased"]["readBack"], "direct");
    // Loop devices pass discards on to their files, which read as zeros then.
    assert_eq!(receipt["erased"]["discarded"], true);
    host.fails(&["info", disk], VOLUME);
    host.does(&["create", disk]);
}

/// Has the header of a disk tell another date at which it was bound, or none.
fn bound_at(host: &Host, disk: &str, date: Option<&str>) {
    forge_token(host, disk, |fields| {
        match date {
            Some(date) => fields.insert("bound".to_owned(), date.into()),
            None => fields.remove("bound"),
        };
    });
}

/// Has the token of a disk say something else.
fn forge_token(host: &Host, disk: &str, forge: impl FnOnce(&mut Map<String, Value>)) {
    let cryptsetup = |args: &[&str]| {
        let mut command = Command::new("cryptsetup");
        run(command
            .current_dir(host.dir.path())
            .arg("token")
            .args(args)
            .arg(disk))
        .stdout
    };
    let exported = cryptsetup(&["export", "--token-id", "0"]);
    let mut token: Value = serde_json::from_slice(&exported).unwrap();
    forge(token.as_object_mut().unwrap());
    fs::write(host.path("token.json"), token.to_string()).unwrap();
    cryptsetup(&["remove", "--token-id", "0"]);
    cryptsetup(&["import", "--token-id", "0", "--json-file", "token.json"]);
}

#[test]
fn keys_that_are_too_old_are_told_and_changed_by_policy() {
    let mut host = Host::new();
    for args in [&["key", "due"][..], &["rekey", "--if-due", "young"]] {
        assert!(host.fails(args, USAGE).contains("max-key-age"));
    }
    fs::write(host.path("config.toml"), "[policy]\nmax-key-age = \"90d\"\n").unwrap();
    host.keys.extend(["--config", "config.toml"].map(str::to_owned));
    for name in ["young", "old", "dateless"] {
        host.create(name, &[]);
    }
    bound_at(&host, "old", Some("2020-02-29T12:00:00Z"));
    bound_at(&host, "dateless", None);
    let info: Value = serde_json::from_str(&host.does(&["info", "--json", "old"])).unwrap();
    assert_eq!(info["tokens"][0]["bound"], "2020-02-29T12:00:00Z");
    assert!(info["tokens"][0]["age"].as_u64().unwrap() > 5 * 365 * 86_400);
    assert!(host.does(&["info", "young"]).contains("age less than a day"));
    assert!(host.does(&["info", "dateless"]).contains("age unknown"));

    let due = host.json(&["key", "due", "--json"]);
    let mut paths = texts(&due, "path");
    paths.sort_unstable();
    assert_eq!(
        paths,
        [
            host.path("dateless").to_str().unwrap(),
            host.path("old").to_str().unwrap()
        ]
    );
    let ages: Vec<_> = due
        .iter()
        .map(|row| (row["path"].as_str().unwrap(), row["age"].is_u64()))
        .collect();
    assert!(
        ages.iter().all(|(path, known)| *known == path.ends_with("old")),
        "{ages:?}"
    );
    assert_eq!(
        host.json(&["key", "due", "--max-age", "20000d", "--json"]).len(),
        1
    );

    // As a timer does it: those that are due, and no others; one that is in use keeps no other from its turn.
    let keys = |host: &Host| ["young", "old", "dateless"].map(|disk| host.key_of(disk));
    let before = keys(&host);
    let claim = Backing::claimed(&host.path("old"), Access::ReadOnly).unwrap();
    let told = host.fails(&["rekey", "--if-due", "old", "young", "dateless"], IN_USE);
    assert!(
        told.contains("old") && told.contains("--control-socket"),
        "{told}"
    );
    drop(claim);
    host.does(&["rekey", "--if-due", "old", "young", "dateless"]);
    let after = keys(&host);
    let changed = [0, 1, 2].map(|at| before[at] != after[at]);
    assert_eq!(changed, [false, true, true]);
    let told = host.does(&["rekey", "--if-due", "old", "young", "dateless"]);
    assert_eq!(told.matches("not reached its maximum age").count(), 3, "{told}");
    assert_eq!(keys(&host), after);
    assert!(host.json(&["key", "due", "--json"]).is_empty());
    host.fails(&["rekey", "old", "young"], USAGE);
    for disk in ["old", "dateless"] {
        host.opens(disk).unwrap();
    }
}

#[test]
fn a_disk_that_is_served_is_rekeyed_when_it_is_due() {
    let host = Host::new();
    host.create("disk", &[]);
    bound_at(&host, "disk", Some("2020-02-29T12:00:00Z"));
    let mut served = host
        .command(&[
            "serve",
            "--blk-file",
            "disk",
            "--socket-path",
            "sock",
            "--control-socket",
            "control",
        ])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let started = Instant::now();
    while UnixStream::connect(host.path("control")).is_err() {
        assert!(started.elapsed() < common::DEADLINE, "the disk does not answer");
        thread::sleep(Duration::from_millis(10));
    }
    let before = host.key_of("disk");
    let rekey = |age| {
        host.does(&[
            "rekey",
            "--control-socket",
            "control",
            "--if-due",
            "--max-age",
            age,
        ])
    };
    assert!(rekey("20000d").contains("not reached its maximum age"));
    assert_eq!(host.key_of("disk"), before);
    assert!(rekey("90d").contains("rekeyed"));
    let after = host.key_of("disk");
    assert_ne!(after, before);
    assert!(rekey("90d").contains("not reached its maximum age"));
    assert_eq!(host.key_of("disk"), after);
    let _ = served.kill();
    let _ = served.wait();
    let used = host.json(&["key", "where-used", &after, "--json"]);
    assert_eq!(texts(&used, "standing"), ["bound"]);
}
