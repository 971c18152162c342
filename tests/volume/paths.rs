//! Paths that are not UTF-8: every verb takes them, and what is told of them in JSON leads back to them.

use common::agent::Agent;
use common::process::Process;
use common::serve::sealblk_path;
use common::volume::run;
use rustix::process::Signal;
use serde_json::Value;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A name with a byte that is in no UTF-8.
fn odd(dir: &Path, name: &[u8]) -> PathBuf {
    dir.join(OsStr::from_bytes(&[name, b"\xff"].concat()))
}

/// What JSON tells of the path.
fn told(path: &Path) -> String {
    let text = path.to_string_lossy();
    format!("file://{}", text.replace('\u{fffd}', "%FF"))
}

/// How the host's keys are reached.
type Verb<'a> = &'a dyn Fn(&[&str]) -> Command;

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Every verb that names a file, over the life of a disk.
fn a_disk_lives(verb: Verb<'_>, dir: &Path, log: &Path) {
    let disk = odd(dir, b"disk");
    let of = |args: &[&str], paths: &[&Path]| {
        let mut command = verb(args);
        for path in paths {
            command.arg(path);
        }
        command
    };
    run(&mut of(&["create", "--size", "4M"], &[&disk]));
    run(&mut of(&["info"], &[&disk]));
    let info = json(&run(&mut of(&["info", "--json"], &[&disk])));
    let uuid = info["uuid"].as_str().unwrap().to_owned();
    run(&mut of(&["rekey"], &[&disk]));

    // It ended the process at the first question.
    let (socket, control) = (odd(dir, b"vhost"), odd(dir, b"control"));
    let mut serve = of(&["serve", "--blk-file"], &[&disk]);
    serve.arg("--socket-path").arg(&socket);
    serve.arg("--control-socket").arg(&control);
    let mut process = Process::spawn(&mut serve);
    process.wait_stderr("serving");
    run(&mut of(&["status", "--control-socket"], &[&control]));
    let status = json(&run(&mut of(
        &["status", "--json", "--control-socket"],
        &[&control],
    )));
    assert_eq!(status["disk"], told(&disk));
    for asked in ["lock", "unlock", "rekey"] {
        run(&mut of(&[asked, "--control-socket"], &[&control]));
    }
    assert!(process.is_running(), "{}", process.stderr());
    process.signal(Signal::TERM);
    assert!(process.wait().status.success());
    assert!(!socket.exists() && !control.exists());

    // The note of such a disk led nowhere, so that a look dropped it, and then its key could be revoked.
    run(&mut verb(&["key", "scan", "--forget-missing"]));
    let used = json(&run(&mut verb(&[
        "key",
        "where-used",
        "--provider",
        "native",
        "--json",
    ])));
    let volume = &used[0];
    assert_eq!(
        (&volume["path"], &volume["standing"]),
        (&told(&disk).into(), &"bound".into())
    );
    let key_id = volume["keyId"].as_str().unwrap();
    let revoked = verb(&["key", "revoke", key_id, "--provider", "native"])
        .output()
        .unwrap();
    assert_eq!(revoked.status.code(), Some(5), "{revoked:?}");
    let seen = run(&mut of(&["key", "scan"], &[dir]));
    assert!(seen.stdout.starts_with(b"1 volumes found, 1 of them"), "{seen:?}");
    run(&mut verb(&["key", "list"]));

    let receipt = odd(dir, b"receipt");
    run(of(&["erase", "--confirm", &uuid], &[&disk])
        .arg("--receipt")
        .arg(&receipt));
    let confirmed: Value = serde_json::from_slice(&std::fs::read(&receipt).unwrap()).unwrap();
    assert_eq!(confirmed["path"], told(&disk));
    run(Command::new(sealblk_path())
        .args(["audit", "verify"])
        .arg(log)
        .arg("--receipt")
        .arg(&receipt));
    let used = json(&run(&mut verb(&[
        "key",
        "where-used",
        "--provider",
        "native",
        "--json",
    ])));
    assert_eq!(used.as_array().unwrap().len(), 0, "{used}");
}

/// `status`, which any user may ask for, ended `serve` by an `unreachable!` behind the reply.
#[test]
fn a_disk_whose_path_is_not_utf8_is_made_served_rekeyed_found_and_erased() {
    let dir = tempfile::tempdir().unwrap();
    let state = odd(dir.path(), b"state");
    let verb = |args: &[&str]| {
        let mut command = Command::new(sealblk_path());
        command.arg("--state-dir").arg(&state).args(args);
        command
    };
    run(&mut verb(&["provider", "add", "native", "--no-backup"]));
    let disks = odd(dir.path(), b"disks");
    std::fs::create_dir(&disks).unwrap();
    a_disk_lives(&verb, &disks, &state.join("audit.log"));

    let (disk, key) = (odd(&disks, b"other"), odd(&disks, b"key"));
    run(verb(&["create", "--size", "4M"])
        .arg(&disk)
        .arg("--recovery-key")
        .arg(&key));
    run(verb(&["recovery", "test"])
        .arg(&disk)
        .arg("--recovery-key")
        .arg(&key));
}

#[test]
fn the_agent_hears_of_paths_that_are_not_utf8() {
    let agent = Agent::new("");
    let disks = odd(&agent.path(""), b"disks");
    std::fs::create_dir(&disks).unwrap();
    a_disk_lives(&|args| agent.verb(args), &disks, &agent.path("state/audit.log"));
}

/// It ended by an `expect` that settings are TOML.
#[test]
fn a_provider_whose_files_cannot_be_named_in_its_settings_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let made = odd(dir.path(), b"file");
    std::fs::write(&made, "").unwrap();
    let mut add = Command::new(sealblk_path());
    add.arg("--state-dir").arg(dir.path().join("state"));
    add.args(["provider", "add", "kmip", "--server", "kms.example:5696", "--ca"]);
    add.arg(&made)
        .arg("--certificate")
        .arg(&made)
        .arg("--key")
        .arg(&made);
    let output = add.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.code().is_some_and(|code| code != 0 && code != 101),
        "{output:?}"
    );
    assert!(!said.contains("panicked"), "{said}");
}
