//! What a process that serves a disk cannot do any more.

#![allow(unsafe_code)] // System calls that no library makes.

mod common;

use std::fs;
use std::io;
use std::process::{Command, Stdio};

use common::serve::{SEALBLK, Server};
use common::volume::{Volume, run};
use sealblk::sandbox::Choice;
use serde_json::{Value, json};

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
        let verb = |name: &str| run(Command::new(SEALBLK).args([name, "--control-socket", &control]));
        verb("lock");
        verb("unlock");
        driver.still_serves();
        let tasks = fs::read_dir(format!("/proc/{}/task", server.process.pid())).unwrap();
        for task in tasks {
            let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            let has = |line: &str| status.lines().any(|has| has == line);
            let name = status.lines().next().unwrap();
            assert_eq!(has("NoNewPrivs:\t1"), confined, "{choice}: {name}");
            assert_eq!(has("Seccomp:\t2"), confined, "{choice}: {name}");
        }
        let status =
            run(Command::new(SEALBLK).args(["status", "--json", "--control-socket", &control])).stdout;
        let status: Value = serde_json::from_slice(&status).unwrap();
        let measures = match confined {
            true => json!(["no_new_privileges", "system_calls"]),
            false => json!([]),
        };
        assert_eq!(status["sandbox"], measures);
        let text = String::from_utf8(verb("status").stdout).unwrap();
        let line = if confined {
            "no new privileges, system calls"
        } else {
            "none"
        };
        assert!(text.contains(line), "{text}");
        server.still_serves_both(driver);
    }
}

/// The test runs itself in a process of its own, since a filter is for good.
#[test]
fn what_a_confined_process_must_not_do_fails() {
    const INSIDE: &str = "SEALBLK_TEST_INSIDE";
    if std::env::var_os(INSIDE).is_none() {
        let mut inside = Command::new(std::env::current_exe().unwrap());
        run(inside
            .args(["--exact", "what_a_confined_process_must_not_do_fails"])
            .env(INSIDE, "1"));
        return;
    }
    // It ends with this process.
    let mut other = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
    let other_id = other.id() as libc::c_long;
    // There before the filter, and asked after it.
    let (ask, asked) = std::sync::mpsc::channel::<()>();
    let before = std::thread::spawn(move || {
        asked.recv().unwrap();
        refused(&[
            libc::SYS_socket,
            libc::AF_INET.into(),
            libc::SOCK_STREAM.into(),
            0,
        ])
    });
    let works = call(&[
        libc::SYS_socket,
        libc::AF_INET.into(),
        libc::SOCK_STREAM.into(),
        0,
    ]);
    assert!(works.is_ok(), "the method of this test finds what works");

    Choice::Require.enter().unwrap();
    ask.send(()).unwrap();
    before.join().unwrap();
    let error = Command::new("/bin/true").status().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EPERM), "a program was started");
    for domain in [
        libc::AF_INET,
        libc::AF_INET6,
        libc::AF_NETLINK,
        libc::AF_PACKET,
        libc::AF_VSOCK,
    ] {
        refused(&[libc::SYS_socket, domain.into(), libc::SOCK_DGRAM.into(), 0]);
    }
    refused(&[libc::SYS_ptrace, libc::PTRACE_ATTACH.into(), other_id, 0, 0]);
    for signal in [0, libc::SIGKILL] {
        refused(&[libc::SYS_kill, other_id, signal.into()]);
        refused(&[libc::SYS_tkill, other_id, signal.into()]);
        refused(&[libc::SYS_tgkill, other_id, other_id, signal.into()]);
    }
    // Signals that the kernel sends when something happens to a descriptor, and limits that end a process.
    for command in [libc::F_SETOWN, F_SETSIG, F_SETOWN_EX] {
        refused(&[libc::SYS_fcntl, 0, command.into(), other_id]);
    }
    refused(&[libc::SYS_prlimit64, other_id, 0, 0, 0]);
    refused(&[libc::SYS_ioctl, 0, TIOCSTI, 0]);
    refused(&[libc::SYS_prctl, libc::PR_SET_DUMPABLE.into(), 1]);
    refused(&[libc::SYS_shmat, 0, 0, 0]);
    refused(&[libc::SYS_process_vm_readv, other_id, 0, 0, 0, 0, 0]);
    refused(&[libc::SYS_clone, libc::SIGCHLD.into(), 0, 0, 0, 0]);
    refused(&[libc::SYS_unshare, libc::CLONE_NEWUSER.into()]);
    refused(&[libc::SYS_bpf, 0, 0, 0]);
    let executable = libc::c_long::from(libc::PROT_READ | libc::PROT_EXEC);
    let anonymous = libc::c_long::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    refused(&[libc::SYS_mmap, 0, 4096, executable, anonymous, -1, 0]);
    let clone3 = call(&[libc::SYS_clone3, 0, 0]).unwrap_err();
    assert_eq!(clone3.raw_os_error(), Some(libc::ENOSYS));
    #[cfg(target_arch = "x86_64")]
    {
        refused(&[libc::SYS_fork]);
        // execve and ptrace of the x32 ABI.
        refused(&[0x4000_0000 | 520, 0, 0, 0]);
        refused(&[0x4000_0000 | 521, 0, 0, 0, 0]);
        refused(&[0x4000_0000 | libc::SYS_clone3, 0, 0]);
    }

    // What a disk needs goes on.
    let pair = std::os::unix::net::UnixStream::pair();
    assert!(pair.is_ok() && std::thread::spawn(|| 7).join().unwrap() == 7);
    assert!(fs::read("/dev/null").is_ok());
    assert!(call(&[libc::SYS_prlimit64, 0, libc::RLIMIT_NOFILE as libc::c_long, 0, 0]).is_ok());
    assert!(call(&[libc::SYS_fcntl, 0, libc::F_GETFD.into()]).is_ok());
    // No signal has reached it.
    assert!(other.try_wait().unwrap().is_none());
}

/// As in the kernel's headers; libc does not have all of them for every target.
const F_SETSIG: libc::c_int = 10;
const F_SETOWN_EX: libc::c_int = 15;
const TIOCSTI: libc::c_long = 0x5412;

fn refused(arguments: &[libc::c_long]) {
    let error = call(arguments).expect_err("it works");
    assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{arguments:?}");
}

fn call(arguments: &[libc::c_long]) -> io::Result<libc::c_long> {
    let argument = |n: usize| arguments.get(n).copied().unwrap_or(0);
    // SAFETY: the calls here take numbers, or null for what they would write to; none of them changes this process' memory.
    let result = unsafe {
        libc::syscall(
            argument(0),
            argument(1),
            argument(2),
            argument(3),
            argument(4),
            argument(5),
            argument(6),
        )
    };
    match result {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}
