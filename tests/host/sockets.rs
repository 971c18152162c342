//! The sockets that sealblk binds: who can connect to them, from the first moment on; what their directory's other users can do
//! to them; and that none stays behind.

use common::DEADLINE;
use common::process::{Ended, Process};
use common::serve::{install, sealblk_path, serve};
use common::volume::{MIB, Volume};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::process::Signal;
use sealblk::control::socket::{BindError, Permissions, accept, bind};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const USAGE: i32 = 2;
const KEY: i32 = 4;

/// A group that no host has.
const GROUP: u32 = 4_300_000;

fn small() -> Volume {
    Volume::created(4 * MIB, 512)
}

fn mode_and_group(path: &Path) -> (u32, u32) {
    let metadata = fs::symlink_metadata(path).unwrap();
    (metadata.mode() & 0o7777, metadata.gid())
}

/// Serves at `socket` until it says that it serves.
fn serving(volume: &Volume, socket: &Path, args: &[&str]) -> Process {
    let process = Process::spawn(&mut serve(volume, socket, args));
    process.wait_stderr("serving");
    process
}

fn refused(volume: &Volume, socket: &Path, args: &[&str], code: i32, says: &[&str]) -> Ended {
    let ended = Process::spawn(&mut serve(volume, socket, args)).wait();
    ended.assert_says(code, says);
    ended
}

/// The mode was set by the socket's path after it was bound. Who could write to the directory put a link there in between, and
/// root opened what it led to, as /etc/shadow, to everybody.
#[test]
fn a_file_that_is_put_in_a_sockets_place_keeps_its_mode_and_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (socket, link, victim) = (path("socket"), path("link"), path("victim"));
    fs::write(&victim, "precious").unwrap();
    fs::set_permissions(&victim, fs::Permissions::from_mode(0o600)).unwrap();
    let done = AtomicBool::new(false);
    let mut replaced = 0;
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                // As soon as the socket is there, it and the link change places.
                let _ = renameat_with(CWD, &link, CWD, &socket, RenameFlags::EXCHANGE);
            }
        });
        let start = Instant::now();
        while replaced < 10 && start.elapsed() < DEADLINE {
            let _ = fs::remove_file(&link);
            let _ = fs::remove_file(&socket);
            symlink(&victim, &link).unwrap();
            let permissions = Permissions::new(Some(0o666), Some(GROUP));
            match bind(&socket, permissions) {
                Ok(bound) => drop(bound),
                Err(BindError::Replaced { .. }) => replaced += 1,
                // The link was there first.
                Err(BindError::NotASocket { .. } | BindError::Bind { .. }) => {}
                Err(error) => panic!("{error}"),
            }
            assert_eq!(
                mode_and_group(&victim),
                (0o600, fs::metadata(dir.path()).unwrap().gid())
            );
            assert_eq!(fs::read(&victim).unwrap(), b"precious");
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(replaced > 0, "nobody came between");
}

/// The vhost-user socket had the mode that the umask left of 777: QEMU, which runs as another user, could not connect, or
/// everybody could.
#[test]
fn sockets_have_the_mode_and_group_that_were_asked_for_whatever_the_umask_is() {
    let own = rustix::process::getegid().as_raw();
    for umask in ["000", "022", "077"] {
        let volume = small();
        let (socket, control) = (volume.beside("vhost"), volume.beside("control"));
        let control_args = ["--control-socket", control.to_str().unwrap()];
        let group = GROUP.to_string();
        let with_groups = [
            &control_args[..],
            &[
                "--socket-group",
                &group,
                "--control-socket-group",
                &group,
                "--control-socket-mode",
                "620",
            ],
        ]
        .concat();
        for (args, of_vhost, of_control) in [
            (&control_args[..], (0o600, own), (0o660, own)),
            (&with_groups[..], (0o660, GROUP), (0o620, GROUP)),
        ] {
            let command = serve(&volume, &socket, args);
            let mut shell = Command::new("sh");
            shell
                .args(["-c", &format!("umask {umask}; exec \"$@\""), "sh"])
                .arg(command.get_program())
                .args(command.get_args());
            let mut process = Process::spawn(&mut shell);
            process.wait_stderr("serving");
            assert_eq!(mode_and_group(&socket), of_vhost, "umask {umask}");
            assert_eq!(mode_and_group(&control), of_control, "umask {umask}");
            process.signal(Signal::TERM);
            assert!(process.wait().status.success());
        }
    }
}

/// Root's sockets were open to its own group, or to all, until their mode was set.
#[test]
fn nobody_else_can_connect_before_a_socket_has_its_group() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let done = AtomicBool::new(false);
    let seen = thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut seen = Vec::new();
            while !done.load(Ordering::Relaxed) {
                if let Ok(metadata) = fs::symlink_metadata(&socket) {
                    let now = (metadata.mode() & 0o777, metadata.gid());
                    if !seen.contains(&now) {
                        seen.push(now);
                    }
                }
            }
            seen
        });
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(500) {
            drop(bind(&socket, Permissions::new(None, Some(GROUP))).unwrap());
        }
        done.store(true, Ordering::Relaxed);
        watcher.join().unwrap()
    });
    assert!(seen.contains(&(0o660, GROUP)), "{seen:?}");
    let own = fs::metadata(dir.path()).unwrap().gid();
    for now in seen {
        assert!(
            [(0o600, own), (0o600, GROUP), (0o660, GROUP)].contains(&now),
            "{now:?}"
        );
    }
}

#[test]
fn a_member_of_the_sockets_group_connects_and_another_user_does_not() {
    let volume = small();
    fs::set_permissions(volume.beside(""), fs::Permissions::from_mode(0o755)).unwrap();
    let (socket, control) = (volume.beside("vhost"), volume.beside("control"));
    let group = GROUP.to_string();
    let args = [
        "--control-socket",
        control.to_str().unwrap(),
        "--control-socket-group",
        &group,
    ];
    let process = serving(&volume, &socket, &args);
    let binary = install(&volume.beside(""));
    for (group, connects) in [(GROUP, true), (GROUP + 1, false)] {
        let mut status = Command::new(&binary);
        status.args(["status", "--control-socket"]).arg(&control);
        let output = status.uid(GROUP).gid(group).output().unwrap();
        assert_eq!(output.status.success(), connects, "{output:?}");
    }
    end(process, Signal::TERM);
}

fn end(mut process: Process, signal: Signal) {
    process.signal(signal);
    let ended = process.wait();
    assert!(ended.status.success(), "{ended:?}");
}

#[test]
fn sockets_go_with_their_process_and_stale_ones_are_replaced() {
    let volume = small();
    let (socket, control) = (volume.beside("vhost"), volume.beside("control"));
    let args = ["--control-socket", control.to_str().unwrap()];
    for signal in [Signal::TERM, Signal::INT] {
        for stale in [&socket, &control] {
            drop(UnixListener::bind(stale).unwrap());
        }
        let process = serving(&volume, &socket, &args);
        assert!(socket.exists() && control.exists());
        end(process, signal);
        assert!(!socket.exists() && !control.exists());
    }
    // Nor do they stay if the process fails after it has bound them.
    let primary = volume.beside("state/providers/native/primary.key");
    fs::rename(&primary, volume.beside("away")).unwrap();
    refused(
        &volume,
        &socket,
        &[&args[..], &["--no-wait"]].concat(),
        KEY,
        &["native"],
    );
    assert!(!socket.exists() && !control.exists());
    let occupied = volume.beside("occupied");
    fs::write(&occupied, "").unwrap();
    let args = ["--control-socket", occupied.to_str().unwrap()];
    refused(&volume, &socket, &args, USAGE, &["not a socket"]);
    assert!(!socket.exists() && occupied.exists());
}

/// What took the place of our socket, or was put there for it, is not ours to remove.
#[test]
fn a_socket_that_others_have_replaced_stays() {
    let volume = small();
    let socket = volume.beside("vhost");
    let process = serving(&volume, &socket, &[]);
    fs::remove_file(&socket).unwrap();
    let _others = UnixListener::bind(&socket).unwrap();
    end(process, Signal::TERM);
    assert!(socket.exists());
}

/// A path of more than 107 bytes was "must be shorter than SUN_LEN".
#[test]
fn a_path_that_is_too_long_for_a_socket_is_told_with_its_length() {
    let volume = small();
    let long = |len: usize| {
        let dir = volume.beside("").display().to_string().len();
        volume.beside(&"x".repeat(len - dir))
    };
    let longest = long(107);
    end(serving(&volume, &longest, &[]), Signal::TERM);
    let says = ["the path has 108 bytes", "only 107", "shorter"];
    refused(&volume, &long(108), &[], USAGE, &says);
    let too_long = long(108);
    let args = ["--control-socket", too_long.to_str().unwrap()];
    refused(&volume, &volume.beside("vhost"), &args, USAGE, &says);
    assert!(!volume.beside("vhost").exists());
    let mut status = Command::new(sealblk_path());
    let asked = status
        .args(["status", "--control-socket"])
        .arg(&too_long)
        .output();
    let said = String::from_utf8(asked.unwrap().stderr).unwrap();
    assert!(said.contains(says[0]) && said.contains(says[1]), "{said}");
}

/// The second of two equal paths was refused as another server's.
#[test]
fn one_path_for_both_sockets_is_refused() {
    let volume = small();
    let link = volume.beside("link");
    symlink(volume.beside(""), &link).unwrap();
    let paths: [PathBuf; 2] = [volume.beside("one"), link.join("one")];
    for control in &paths {
        let args = ["--control-socket", control.to_str().unwrap()];
        refused(
            &volume,
            &paths[0],
            &args,
            USAGE,
            &["--socket-path", "--control-socket"],
        );
        assert!(!paths[0].exists());
    }
}

#[test]
fn a_group_that_one_does_not_belong_to_or_nobody_knows_is_told() {
    let volume = small();
    let socket = volume.beside("vhost");
    for (option, value, says) in [
        ("--socket-group", "no-such-group", "no group called"),
        ("--socket-mode", "rw", "octal"),
        ("--socket-mode", "1777", "octal"),
    ] {
        refused(&volume, &socket, &[option, value], USAGE, &[option, says]);
    }
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let socket = dir.path().join("socket");
    let error = common::secrets::as_user(GROUP, || bind(&socket, Permissions::new(None, Some(GROUP + 1))));
    let error = error.unwrap_err();
    assert!(matches!(error, BindError::Group { .. }), "{error}");
    assert!(error.to_string().contains("member of that group"), "{error}");
    assert!(!socket.exists());
}

/// Whoever connected before the socket was found to be ours was taken for somebody who had replaced it.
#[test]
fn callers_may_come_as_soon_as_the_socket_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            // By another process, as a front-end is one.
            let script = r#"
import socket, sys
while True:
    s = socket.socket(socket.AF_UNIX)
    try:
        s.connect(sys.argv[1])
    except OSError:
        pass
"#;
            let mut caller = Command::new("python3")
                .args(["-c", script])
                .arg(&socket)
                .spawn()
                .unwrap();
            while !done.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(5));
            }
            caller.kill().unwrap();
            caller.wait().unwrap();
        });
        let (start, mut came, mut failure) = (Instant::now(), 0, None);
        while came < 20 && failure.is_none() && start.elapsed() < DEADLINE {
            match bind(&socket, Permissions::new(None, None)) {
                Ok((listener, _bound)) => came += u32::from(accept(&listener).is_ok()),
                Err(error) => failure = Some(error),
            }
        }
        done.store(true, Ordering::Relaxed);
        assert!(failure.is_none(), "{failure:?}");
        assert!(came > 0, "nobody came");
    });
}
