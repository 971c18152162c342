//! The backup of a native provider's primary key: restored elsewhere it opens the disks, and nothing else does.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use common::serve::sealblk_path;
use common::volume::run;
use tempfile::TempDir;

const PASSPHRASE: &str = "a passphrase of some length";
const USAGE: i32 = 2;
const VOLUME: i32 = 3;
const KEY: i32 = 4;

/// A host with the native provider of the test's own, which was not backed up.
struct Host(TempDir);

impl Host {
    fn new() -> Self {
        let host = Host(tempfile::tempdir().unwrap());
        fs::write(host.path("pass"), PASSPHRASE).unwrap();
        fs::write(host.path("wrong"), "another passphrase").unwrap();
        host.does(&["provider", "add", "native"]);
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn on(&self, state: &str, args: &[&str]) -> Output {
        let mut command = Command::new(sealblk_path());
        command
            .current_dir(self.0.path())
            .args(["--state-dir", state])
            .args(args);
        command.output().unwrap()
    }

    #[track_caller]
    fn does(&self, args: &[&str]) -> String {
        self.does_on("state", args)
    }

    #[track_caller]
    fn does_on(&self, state: &str, args: &[&str]) -> String {
        let output = self.on(state, args);
        assert!(
            output.status.success(),
            "{args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    fn fails_on(&self, state: &str, args: &[&str], code: i32, said: &str) {
        let output = self.on(state, args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        assert!(stderr.contains(said), "{args:?}: {stderr}");
    }

    fn backup(&self) {
        self.does(&BACKUP);
    }
}

const BACKUP: [&str; 7] = [
    "provider",
    "backup",
    "native",
    "--to",
    "backup",
    "--passphrase-file",
    "pass",
];
const RESTORE: [&str; 5] = ["provider", "restore", "backup", "--passphrase-file", "pass"];

#[test]
fn no_new_volume_relies_on_a_provider_that_was_not_backed_up() {
    let host = Host::new();
    let create = ["create", "vm.luks", "--size", "1M"];
    host.fails_on("state", &create, KEY, "provider backup");
    assert!(!host.path("vm.luks").exists());
    let list = host.on("state", &["provider", "list"]);
    assert_eq!(list.status.code(), Some(KEY));
    assert!(String::from_utf8(list.stdout).unwrap().contains("not backed up"));
    let listed = || {
        let output = host.on("state", &["provider", "list", "--json"]);
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    let before = &listed()[0];
    assert_eq!(
        (&before["name"], &before["usable"]),
        (&"native".into(), &false.into())
    );
    assert_eq!(before["reason"], "not_backed_up");
    host.fails_on(
        "state",
        &["provider", "check", "native"],
        KEY,
        "has no backup yet",
    );
    host.backup();
    host.does(&["provider", "check", "native"]);
    let after = &listed()[0];
    assert_eq!(
        (&after["usable"], &after["reason"]),
        (&true.into(), &serde_json::Value::Null)
    );
    host.does(&create);

    // Where somebody does without, too; and where the volume has another way in, on a host that has no provider at all.
    host.does_on("other", &["provider", "add", "native"]);
    host.does_on("other", &["provider", "backup", "native", "--waive"]);
    host.does_on("other", &["create", "other.luks", "--size", "1M"]);
    host.fails_on(
        "third",
        &["create", "third.luks", "--size", "1M"],
        KEY,
        "--recovery-key",
    );
    host.does_on(
        "third",
        &[
            "create",
            "third.luks",
            "--size",
            "1M",
            "--recovery-key",
            "third.key",
        ],
    );
}

#[test]
fn a_restored_backup_opens_the_disks_and_cryptsetup_finds_the_key_in_it() {
    let host = Host::new();
    host.backup();
    host.does(&["create", "vm.luks", "--size", "1M"]);
    assert_eq!(
        host.does_on("second", &RESTORE),
        "key provider \"native\" was restored\n"
    );
    host.does_on(
        "second",
        &["recovery", "add", "vm.luks", "--recovery-key", "vm.key"],
    );
    host.does_on("second", &["create", "second.luks", "--size", "1M"]);
    host.does(&["rekey", "second.luks"]);
    let file = "providers/native/primary.key";
    let primary = fs::read(host.path("state").join(file)).unwrap();
    assert_eq!(primary, fs::read(host.path("second").join(file)).unwrap());

    let cryptsetup = |args: &[&str]| {
        let mut command = Command::new("cryptsetup");
        command.current_dir(host.0.path()).args(args);
        run(&mut command)
    };
    cryptsetup(&["luksDump", "backup"]);
    cryptsetup(&["open", "--test-passphrase", "--key-file", "pass", "backup"]);
    let dump = [
        "luksDump",
        "--batch-mode",
        "--dump-volume-key",
        "--key-file",
        "pass",
        "--volume-key-file",
        "out",
    ];
    cryptsetup(&[&dump[..], &["backup"]].concat());
    let key = fs::read(host.path("out")).unwrap();
    assert_eq!(key.len(), 64);
    assert!(key[..32] == primary[16..48]);

    // Nothing that exists is replaced.
    host.fails_on("second", &RESTORE, USAGE, "already");
    host.fails_on("state", &BACKUP, 6, "backup");
    host.does_on("second", &[&RESTORE[..], &["--name", "again"]].concat());
}

#[test]
fn a_backup_with_one_flipped_bit_or_another_passphrase_is_refused() {
    let host = Host::new();
    host.backup();
    let whole = fs::read(host.path("backup")).unwrap();
    // Some of every part, its ends among them.
    let parts = [
        0..64,
        64..512,
        4096..4200,
        8192..8200,
        16384..16448,
        20480..20500,
        32760..32776,
    ];
    let area = (32768..whole.len()).step_by(9973);
    let ends = [whole.len() - 2048, whole.len() - 1];
    for (n, at) in parts
        .into_iter()
        .flatten()
        .step_by(7)
        .chain(area)
        .chain(ends)
        .enumerate()
    {
        let mut damaged = whole.clone();
        damaged[at] ^= 1 << (n % 8);
        fs::write(host.path("backup"), &damaged).unwrap();
        let refused = host.on("second", &RESTORE);
        assert!(!refused.status.success(), "byte {at}");
        assert!(!host.path("second/providers.toml").exists(), "byte {at}");
    }
    for damaged in [&whole[..whole.len() - 1], &[&whole[..], &[0]].concat()] {
        fs::write(host.path("backup"), damaged).unwrap();
        host.fails_on("second", &RESTORE, VOLUME, "not a usable backup");
    }
    fs::write(host.path("backup"), &whole).unwrap();
    let wrong = ["provider", "restore", "backup", "--passphrase-file", "wrong"];
    let said = "backup: this passphrase does not open it; try another one";
    host.fails_on("second", &wrong, KEY, said);

    // The name was taken without a word, and disks that look for the one that they know stayed locked.
    let restored = host.on("second", &[&RESTORE[..], &["--name", "other"]].concat());
    let said = String::from_utf8(restored.stderr).unwrap();
    assert!(restored.status.success(), "{said}");
    assert!(
        said.contains("bound to provider \"native\" do not find it under the name \"other\""),
        "{said}"
    );
}

#[test]
fn what_is_no_backup_and_what_cannot_be_backed_up_is_told() {
    let host = Host::new();
    fs::write(host.path("short"), "12345678901").unwrap();
    let to = ["--to", "backup", "--passphrase-file"];
    let backup =
        |name: &'static str, pass: &'static str| [&["provider", "backup", name][..], &to, &[pass]].concat();
    host.fails_on("state", &backup("native", "short"), USAGE, "too weak");
    host.fails_on("state", &backup("nobody", "pass"), KEY, "nobody");
    assert!(!host.path("backup").exists());
    host.fails_on("state", &["provider", "backup", "native"], USAGE, "--to");

    fs::write(host.path("backup"), vec![7; 290_816]).unwrap();
    host.fails_on("second", &RESTORE, VOLUME, "LUKS");
    host.does(&["provider", "backup", "native", "--waive"]);
    host.does(&["create", "disk", "--size", "1M", "--recovery-key", "key"]);
    fs::rename(host.path("disk"), host.path("backup")).unwrap();
    host.fails_on("second", &RESTORE, VOLUME, "not a usable backup");
}

/// The passphrase is waited for, and argon2id takes its time: meanwhile the provider is replaced by another one.
#[test]
fn a_backup_of_one_primary_key_is_none_of_another() {
    let host = Host::new();
    let fifo = host.path("fifo");
    run(Command::new("mkfifo").arg(&fifo));
    let mut command = Command::new(sealblk_path());
    command.current_dir(host.0.path()).args(["--state-dir", "state"]);
    command.args([
        "provider",
        "backup",
        "native",
        "--to",
        "backup",
        "--passphrase-file",
        "fifo",
    ]);
    let backup = command.stderr(Stdio::piped()).spawn().unwrap();
    // Opening it to write waits for the reader, who has the primary key by then.
    let mut passphrase = OpenOptions::new().write(true).open(&fifo).unwrap();
    host.does(&["provider", "remove", "native", "--force", "--confirm", "native"]);
    host.does(&["provider", "add", "native"]);
    passphrase.write_all(PASSPHRASE.as_bytes()).unwrap();
    drop(passphrase);
    let output = backup.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && stderr.contains("was replaced"),
        "{stderr}"
    );
    host.fails_on(
        "state",
        &["create", "vm.luks", "--size", "1M"],
        KEY,
        "provider backup",
    );
}
