//! Which measures a process that serves a disk takes, and what it tells of them.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::process::Command;

use common::process::Process;
use common::secrets::without_call;
use common::serve::{Server, sealblk_path, serve};
use common::volume::{Volume, run};
use serde_json::{Value, json};

/// On a kernel that has them all.
const MEASURES: [&str; 6] = [
    "no_new_privileges",
    "capabilities",
    "abstract_sockets",
    "network",
    "files",
    "system_calls",
];

/// Every thread of a served disk is confined, and the disk works as before; its helper is not confined by it.
#[test]
fn all_threads_of_a_served_disk_are_confined_and_status_says_so() {
    for (choice, confined) in [("require", true), ("prefer", true), ("off", false)] {
        let volume = Volume::new();
        let control = volume.beside("control").display().to_string();
        let sandbox = format!("--sandbox={choice}");
        let server = Server::of(volume, &["--control-socket", &control, &sandbox]);
        let mut driver = server.connect();
        driver.still_serves();
        let verb = |name: &str| run(Command::new(sealblk_path()).args([name, "--control-socket", &control]));
        verb("lock");
        verb("unlock");
        driver.still_serves();
        let tasks = fs::read_dir(format!("/proc/{}/task", server.process.pid())).unwrap();
        for task in tasks {
            // A thread may have ended meanwhile.
            let Ok(status) = fs::read_to_string(task.unwrap().path().join("status")) else {
                continue;
            };
            let has = |line: &str| status.lines().any(|has| has == line);
            let name = status.lines().next().unwrap();
            assert_eq!(has("NoNewPrivs:\t1"), confined, "{choice}: {name}");
            assert_eq!(has("Seccomp:\t2"), confined, "{choice}: {name}");
            if confined {
                assert_eq!(capabilities(&status), kept(0), "{choice}: {name}");
            }
        }
        let status =
            run(Command::new(sealblk_path()).args(["status", "--json", "--control-socket", &control])).stdout;
        let status: Value = serde_json::from_slice(&status).unwrap();
        let measures = match confined {
            true => json!(MEASURES),
            false => json!([]),
        };
        assert_eq!(status["sandbox"], measures);
        let missing: Vec<_> = status["sandboxMissing"].as_array().unwrap().iter().collect();
        assert_eq!(missing.len(), if confined { 0 } else { MEASURES.len() });
        let text = String::from_utf8(verb("status").stdout).unwrap();
        let line = if confined {
            "no new privileges, capabilities, abstract sockets, network, files, system calls"
        } else {
            "none"
        };
        assert!(text.contains(line), "{text}");
        server.still_serves_both(driver);
    }
}

/// Inheritable, permitted, effective, bounding and ambient.
fn capabilities(status: &str) -> [u64; 5] {
    ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"].map(|set| {
        let line = status.lines().find_map(|line| line.strip_prefix(set)).unwrap();
        u64::from_str_radix(line.trim_start_matches(':').trim(), 16).unwrap()
    })
}

/// What a served disk of root has of these if it needs `capabilities`. Where root cannot lift the limit of locked memory, as in a
/// container, it also needs the capability to lock more.
fn kept(mut capabilities: u64) -> [u64; 5] {
    const IPC_LOCK: u64 = 1 << 14;
    const SYS_RESOURCE: u64 = 1 << 24;
    let own = self::capabilities(&fs::read_to_string("/proc/self/status").unwrap())[2];
    if own & SYS_RESOURCE == 0 {
        capabilities |= own & IPC_LOCK;
    }
    [0, capabilities, capabilities, capabilities, 0]
}

/// Root serves the disk of a user, as libvirt has it, and each queue opens it.
#[test]
fn root_keeps_the_capability_to_open_another_user_s_disk_and_no_other() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: it takes root");
        return;
    }
    // Whom no host has.
    const USER: u32 = 4_200_100;
    let volume = Volume::new();
    chown(&volume.path, Some(USER), Some(USER)).unwrap();
    fs::set_permissions(&volume.path, fs::Permissions::from_mode(0o600)).unwrap();
    let server = Server::of(volume, &["--sandbox=require"]);
    server.connect().still_serves();
    let status = fs::read_to_string(format!("/proc/{}/status", server.process.pid())).unwrap();
    const DAC_OVERRIDE: u64 = 1 << 1;
    assert_eq!(capabilities(&status), kept(DAC_OVERRIDE));
    server.stop();
}

/// A kernel without Landlock.
#[test]
fn a_measure_that_the_kernel_does_not_have_is_told_and_ends_a_process_that_requires_it() {
    let volume = Volume::new();
    let (control, socket) = (volume.beside("control"), volume.beside("sock"));
    let start = |sandbox: &str| {
        let control = control.display().to_string();
        let mut command = serve(&volume, &socket, &["--control-socket", &control, sandbox]);
        without_call(&mut command, libc::SYS_landlock_create_ruleset, libc::ENOSYS);
        command
    };
    let ended = Process::spawn(&mut start("--sandbox=require")).wait();
    ended.assert_says(1, &["abstract sockets", "needs Linux 6.12", "--sandbox=prefer"]);
    assert!(!socket.exists() && !control.exists());

    let server = Server::at(&mut start("--sandbox=prefer"), socket.clone());
    server
        .process
        .wait_stderr("a measure of the sandbox is not in force");
    server.still_serves();
    let status = |args: &[&str]| {
        let mut command = Command::new(sealblk_path());
        run(command
            .arg("status")
            .args(args)
            .arg("--control-socket")
            .arg(&control))
        .stdout
    };
    let told: Value = serde_json::from_slice(&status(&["--json"])).unwrap();
    assert_eq!(
        told["sandbox"],
        json!(["no_new_privileges", "capabilities", "system_calls"])
    );
    let missing = told["sandboxMissing"].as_array().unwrap().iter();
    let names: Vec<_> = missing
        .map(|missing| missing["measure"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["abstract_sockets", "network", "files"]);
    let text = String::from_utf8(status(&[])).unwrap();
    assert!(
        text.contains("without files: it needs Linux 5.13 with Landlock"),
        "{text}"
    );
    server.stop();
}
