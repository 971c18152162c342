//! A native provider whose primary key is sealed to the host's TPM: its disks open on this host, booted as it was, alone.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output};

use common::secrets::finds;
use common::serve::{Server, sealblk_path};
use common::swtpm::Swtpm;
use common::volume::{Volume, run};
use tempfile::TempDir;

const USAGE: i32 = 2;
const KEY: i32 = 4;

/// A host with a TPM and a native provider that was backed up.
struct Host {
    dir: TempDir,
    tpm: Swtpm,
}

impl Host {
    fn new() -> Self {
        let host = Self {
            dir: tempfile::tempdir().unwrap(),
            tpm: Swtpm::new(),
        };
        fs::write(host.path("pass"), "a passphrase of some length").unwrap();
        host.does(&["provider", "add", "native"]);
        host.does(&[
            "provider",
            "backup",
            "native",
            "--to",
            "backup",
            "--passphrase-file",
            "pass",
        ]);
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn primary(&self) -> PathBuf {
        self.path("state/providers/native/primary.key")
    }

    fn on(&self, state: &str, args: &[&str]) -> Output {
        let mut command = Command::new(sealblk_path());
        command
            .current_dir(self.dir.path())
            .args(["--state-dir", state])
            .args(args);
        command.output().unwrap()
    }

    #[track_caller]
    fn does(&self, args: &[&str]) -> String {
        let output = self.on("state", args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {said}");
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    fn fails(&self, args: &[&str], code: i32, said: &str) {
        let output = self.on("state", args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        assert!(stderr.contains(said), "{args:?}: {stderr}");
    }

    fn seal(&self, more: &[&str]) -> String {
        let device = self.tpm.device();
        self.does(&[&["provider", "seal", "native", "--tpm", &device], more].concat())
    }

    fn reseal(&self) -> String {
        self.seal(&["--from", "backup", "--passphrase-file", "pass"])
    }
}

#[test]
fn a_sealed_key_opens_disks_until_the_host_boots_otherwise_and_is_sealed_anew_from_the_backup() {
    let host = Host::new();
    host.does(&["create", "before", "--size", "1M"]);
    let plain = fs::read(host.primary()).unwrap();
    // A power cut has left what was being written when the key was restored.
    let unfinished = host.primary().with_file_name("primary.key.0123456789abcdef.new");
    fs::write(&unfinished, &plain).unwrap();
    let said = host.seal(&["--tpm-pcrs", "4,7"]);
    assert!(said.contains("registers 4,7"), "{said}");
    // Nothing of the key is left in the file, which is the owner's own as before.
    let sealed = fs::read(host.primary()).unwrap();
    assert!(finds(&plain, &plain[16..48]) && !finds(&sealed, &plain[16..48]));
    assert!(!unfinished.exists());
    assert_eq!(
        fs::metadata(host.primary()).unwrap().permissions().mode() & 0o777,
        0o600
    );

    host.does(&["provider", "check", "native"]);
    host.does(&["rekey", "before"]);
    host.does(&["create", "after", "--size", "1M"]);
    host.tpm.extend(7);
    host.fails(&["rekey", "after"], KEY, "registers have changed");
    host.fails(&["provider", "check", "native"], KEY, "reference values");
    // Without the TPM's key there is nothing to seal but the backup's.
    let device = host.tpm.device();
    host.fails(
        &["provider", "seal", "native", "--tpm", &device],
        KEY,
        "registers",
    );
    host.reseal();
    host.does(&["rekey", "after"]);
    host.does(&["rekey", "before"]);
}

#[test]
fn a_sealed_key_is_of_no_use_with_another_tpm_or_none() {
    let mut host = Host::new();
    host.does(&["create", "disk", "--size", "1M"]);
    host.seal(&[]);
    host.tpm.stop();
    host.fails(&["rekey", "disk"], KEY, "swtpm:path=");
    host.tpm.start();
    host.does(&["rekey", "disk"]);

    // The file is taken to where another TPM answers at that place.
    let other = Swtpm::new();
    let text = fs::read_to_string(host.primary()).unwrap();
    let elsewhere = text.replace(&host.tpm.device(), &other.device());
    assert_ne!(elsewhere, text);
    fs::write(host.primary(), elsewhere).unwrap();
    host.fails(&["rekey", "disk"], KEY, "another TPM");
    fs::write(host.primary(), text).unwrap();
    host.does(&["rekey", "disk"]);
}

#[test]
fn a_key_without_a_backup_and_another_providers_backup_are_not_sealed() {
    let host = Host::new();
    let device = host.tpm.device();
    host.does(&["provider", "add", "native", "--name", "fresh"]);
    host.fails(
        &["provider", "seal", "fresh", "--tpm", &device],
        KEY,
        "has no backup",
    );
    // Somebody did without a backup, as `create --recovery-key` does on a new host: the TPM would hold the only copy.
    let before = fs::read(host.path("state/providers/fresh/primary.key")).unwrap();
    host.does(&["provider", "backup", "fresh", "--waive"]);
    host.fails(
        &["provider", "seal", "fresh", "--tpm", &device],
        KEY,
        "has no backup",
    );
    assert_eq!(
        fs::read(host.path("state/providers/fresh/primary.key")).unwrap(),
        before
    );
    host.does(&[
        "provider",
        "backup",
        "fresh",
        "--to",
        "other",
        "--passphrase-file",
        "pass",
    ]);
    let other = [
        "provider",
        "seal",
        "native",
        "--tpm",
        &device,
        "--from",
        "other",
        "--passphrase-file",
        "pass",
    ];
    let before = fs::read(host.primary()).unwrap();
    host.fails(&other, KEY, "the backup holds the primary key");
    assert_eq!(fs::read(host.primary()).unwrap(), before);
    host.fails(
        &["provider", "seal", "native", "--tpm", "/nowhere"],
        KEY,
        "/nowhere",
    );
    assert_eq!(fs::read(host.primary()).unwrap(), before);
    for pcrs in ["24", "", "seven"] {
        host.fails(
            &["provider", "seal", "native", "--tpm-pcrs", pcrs],
            USAGE,
            "registers",
        );
    }
}

#[test]
fn every_changed_byte_of_a_sealed_key_is_an_error() {
    let host = Host::new();
    host.seal(&[]);
    let sealed = fs::read(host.primary()).unwrap();
    // Each answer takes a TPM a while.
    for at in (0..sealed.len()).step_by(23) {
        let mut changed = sealed.clone();
        changed[at] ^= 1;
        fs::write(host.primary(), &changed).unwrap();
        let ended = host.on("state", &["provider", "check", "native"]);
        assert_eq!(ended.status.code(), Some(KEY), "byte {at}: {ended:?}");
    }
    for cut in [0, 1, 16, sealed.len() / 2, sealed.len() - 2] {
        fs::write(host.primary(), &sealed[..cut]).unwrap();
        host.fails(&["provider", "check", "native"], KEY, "primary key");
    }
    fs::write(host.primary(), &sealed).unwrap();
    host.does(&["provider", "check", "native"]);
}

/// As after an update of the firmware: the guest waits, and goes on when an operator has sealed the key anew.
#[test]
fn a_disk_is_locked_while_the_host_is_not_what_it_was() {
    let host = Host::new();
    let path = host.path("disk");
    host.does(&["create", "disk", "--size", "64M"]);
    host.seal(&[]);
    host.tpm.extend(7);
    let dir = tempfile::tempdir().unwrap();
    let control = dir.path().join("control");
    let volume = Volume::at(
        dir,
        path,
        vec!["--state-dir".into(), host.path("state").display().to_string()],
    );
    let server = Server::of(volume, &["--control-socket", control.to_str().unwrap()]);
    let mut status = Command::new(sealblk_path());
    status
        .args(["status", "--json", "--control-socket"])
        .arg(&control);
    let status: serde_json::Value = serde_json::from_slice(&run(&mut status).stdout).unwrap();
    assert_eq!(
        (
            &status["state"],
            &status["lock"]["reason"],
            &status["lock"]["hop"]
        ),
        (&"locked".into(), &"attestation".into(), &host.tpm.device().into())
    );
    host.reseal();
    server.still_serves();
}
