//! The end of a key's life at its server: kept while a disk needs it, and out of use for every host after.

use std::path::Path;
use std::process::{Command, Output};

use sealblk::keys::{KeyId, KeyState};
use serde_json::Value;

use crate::kmip::open;
use crate::pykmip::{Server, settings};
use common::agent::Agent;
use sealblk::providers::kmip::Settings;

const KEY: i32 = 4;
const IN_USE: i32 = 5;

fn sealblk(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(common::serve::sealblk_path());
    command.current_dir(dir).args(["--state-dir", "state"]).args(args);
    command.output().unwrap()
}

#[track_caller]
fn does(dir: &Path, args: &[&str]) -> String {
    let output = sealblk(dir, args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn is_refused_for(disk: &str, dir: &Path, args: &[&str]) {
    let output = sealblk(dir, args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(IN_USE), "{args:?}: {stderr}");
    assert!(
        stderr.contains(dir.join(disk).to_str().unwrap()),
        "{args:?}: {stderr}"
    );
}

fn add_kmip(dir: &Path, settings: &Settings, name: &str, more: &[&str]) {
    let file = |path: &Path| path.to_str().unwrap().to_owned();
    let (ca, certificate, key) = (
        file(&settings.ca),
        file(&settings.certificate),
        file(&settings.key),
    );
    let add = [
        "provider",
        "add",
        "kmip",
        "--name",
        name,
        "--server",
        &settings.servers[0],
    ];
    let files = ["--ca", &ca, "--certificate", &certificate, "--key", &key];
    does(dir, &[&add[..], &files, more].concat());
}

fn key_of(dir: &Path, disk: &str) -> String {
    let info: Value = serde_json::from_str(&does(dir, &["info", "--json", disk])).unwrap();
    info["tokens"][0]["keyId"].as_str().unwrap().to_owned()
}

fn state_of(dir: &Path, key: &str) -> String {
    let rows: Value = serde_json::from_str(&does(dir, &["key", "list", "--json"])).unwrap();
    let row = rows
        .as_array()
        .unwrap()
        .iter()
        .find(|row| row["keyId"] == key)
        .unwrap();
    row["state"].as_str().unwrap().to_owned()
}

#[test]
fn a_key_of_a_kmip_server_ends_there_when_no_disk_needs_it() {
    let server = Server::start();
    let settings = settings(&[server.address()]);
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    does(dir, &["provider", "add", "native", "--no-backup"]);
    add_kmip(dir, &settings, "kms", &["--default"]);
    does(dir, &["create", "vm", "--size", "1M"]);
    let key = key_of(dir, "vm");
    assert_eq!(state_of(dir, &key), "active");

    let revoke = ["key", "revoke", &key, "--provider", "kms"];
    is_refused_for("vm", dir, &revoke);
    is_refused_for("vm", dir, &[&revoke[..], &["--destroy"]].concat());
    is_refused_for(
        "vm",
        dir,
        &["provider", "remove", "kms", "--new-default", "native"],
    );
    assert!(
        server
            .operator(&["attributes", &key])
            .contains("State=State.ACTIVE")
    );

    does(dir, &["rekey", "vm", "--provider", "native"]);
    does(dir, &[&revoke[..], &["--dry-run"]].concat());
    assert!(
        server
            .operator(&["attributes", &key])
            .contains("State=State.ACTIVE")
    );
    assert!(does(dir, &revoke).contains("revoked on this host and at its server"));
    assert!(
        server
            .operator(&["attributes", &key])
            .contains("State=State.DEACTIVATED")
    );
    // Once more is no error, and another host, which was told nothing, does not use it either.
    does(dir, &revoke);
    let elsewhere = open(&settings);
    assert_eq!(
        elsewhere.state(&KeyId(key.clone())).unwrap(),
        KeyState::Deactivated
    );
    assert!(does(dir, &[&revoke[..], &["--destroy"]].concat()).contains("destroyed at its server"));
    let state = elsewhere.state(&KeyId(key.clone())).unwrap();
    assert!(
        matches!(state, KeyState::Destroyed | KeyState::Missing),
        "{state:?}"
    );
    assert_ne!(state_of(dir, &key), "active");

    does(dir, &["provider", "remove", "kms", "--new-default", "native"]);
    assert!(!dir.join("state/providers/kms").exists());
    does(dir, &["create", "new", "--size", "1M"]);
    assert_ne!(key_of(dir, "new"), key);
}

/// What a revocation destroys is the server's key, whatever it is called here: by another provider of the same server, with
/// another ciphertext behind it, or by another spelling that the server takes for the same.
#[test]
fn a_key_that_a_disk_needs_is_not_revoked_by_another_name() {
    let server = Server::start();
    let settings = settings(&[server.address()]);
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    add_kmip(dir, &settings, "kms", &["--default"]);
    add_kmip(dir, &settings, "kms-old", &[]);
    add_kmip(dir, &settings, "wrapped", &["--wrap", "server"]);
    does(dir, &["create", "vm", "--size", "1M"]);
    does(
        dir,
        &["create", "sensitive", "--size", "1M", "--provider", "wrapped"],
    );
    let (key, wrapped) = (key_of(dir, "vm"), key_of(dir, "sensitive"));
    let (by, kek) = wrapped.rsplit_once('.').unwrap();
    let first = if kek.starts_with('A') { 'B' } else { 'A' };
    let other = format!("{by}.{first}{}", &kek[1..]);

    let revoke = |key: &str, provider: &str| {
        ["key", "revoke", key, "--provider", provider, "--destroy"].map(str::to_owned)
    };
    for (disk, key, provider) in [
        ("vm", key.as_str(), "kms-old"),
        ("sensitive", by, "kms"),
        ("sensitive", &other, "wrapped"),
    ] {
        let revoke = revoke(key, provider);
        is_refused_for(disk, dir, &revoke.each_ref().map(String::as_str));
    }
    let output = sealblk(
        dir,
        &revoke(&format!("0{key}"), "kms").each_ref().map(String::as_str),
    );
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && stderr.contains(&format!("the server calls this key {key:?}")),
        "{stderr}"
    );
    for key in [key.as_str(), by] {
        assert!(
            server
                .operator(&["attributes", key])
                .contains("State=State.ACTIVE")
        );
    }
    does(dir, &["rekey", "vm"]);
    does(dir, &["rekey", "sensitive"]);
}

/// The agent has the key in memory for a while, and opens the disk with it; that proves no way in.
#[test]
fn a_recovery_key_is_not_removed_while_only_a_memory_opens_the_disk() {
    let server = Server::start();
    let mut agent = Agent::new("");
    let dir = agent.path("");
    agent.stop();
    add_kmip(&dir, &settings(&[server.address()]), "kms", &["--default"]);
    agent.start();
    let verb = |args: &[&str]| agent.verb(args).output().unwrap();
    let succeeds = |args: &[&str]| {
        let output = verb(args);
        assert!(
            output.status.success(),
            "{args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    };
    succeeds(&["create", "vm", "--size", "1M", "--recovery-key", "vm.key"]);
    let key = key_of(&dir, "vm");
    let remove = ["recovery", "remove", "vm", "--recovery-key", "vm.key"];
    server.operator(&["destroy", &key]);
    let output = verb(&remove);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(KEY), "{stderr}");
    assert!(
        stderr.contains("in the state Missing at the provider, not Active"),
        "{stderr}"
    );
    succeeds(&["recovery", "test", "vm", "--recovery-key", "vm.key"]);

    // Another key opens it, which its server has: the recovery key may go.
    succeeds(&["rekey", "vm", "--unlock-key", "vm.key"]);
    succeeds(&remove);
}
