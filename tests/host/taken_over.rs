//! What a guest that takes a disk's process over reaches: nothing but the disk. The test makes the system calls in the real process.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use common::agent::Agent;
use common::inside::{Arg, Inside};
use common::secrets::{
    Search, binding, readable_memory, slot_secret, token, volume_key, without_secret_memory,
};
use common::serve::{Server, sealblk_path, serve};
use common::volume::{Volume, run};
use hkdf::Hkdf;
use sealblk::providers::registry::Registry;
use serde_json::json;
use sha2::Sha256;

/// An ordinary user, whom no host has.
const USER: u32 = 4_200_100;

/// In the state directory.
const PRIMARY_KEY: &str = "providers/native/primary.key";

/// A disk that is served, with what its process must not reach.
struct Host {
    server: Server,
    agent: Option<Agent>,
    volume: Volume,
    /// The directory that has the primary key.
    state: PathBuf,
    /// A disk of the same user, and of the same providers.
    other: PathBuf,
    /// The primary key, and keys of the other disk.
    secrets: Search,
    /// What the process has to have.
    own_key: Search,
    /// A process of the same user.
    bystander: Child,
}

impl Host {
    fn new(user: u32, with_agent: bool) -> Self {
        let agent = with_agent.then(|| {
            Agent::new(&format!(
                "[[grant]]\nuser = {user}\nprivileges = [\"RegisterVM\"]\n"
            ))
        });
        let volume = agent.as_ref().map_or_else(Volume::new, Agent::volume);
        let other = volume.beside("other");
        run(Command::new(sealblk_path())
            .args(&volume.open)
            .args(["create", "--size", "1M"])
            .arg(&other));
        let state = agent
            .as_ref()
            .map_or_else(|| volume.beside("state"), |agent| agent.path("state"));
        let primary = fs::read(state.join(PRIMARY_KEY)).unwrap()[16..48].to_vec();
        let key_id = token(&other)["key_id"].as_str().unwrap().to_owned();
        let mut kek = [0; 32];
        Hkdf::<Sha256>::new(None, &primary)
            .expand_multi_info(&[b"sealblk native KEK\0", key_id.as_bytes()], &mut kek)
            .unwrap();
        let slot_secret = slot_secret(&other, &Registry::open(&state).unwrap());
        let secrets = Search::default()
            .key("primary key", &primary)
            .key("another disk's KEK", &kek)
            .key("another disk's slot secret", &slot_secret);
        let own_key = Search::default().xts_key("own volume key", &volume_key(&volume));
        let top = volume.beside("");
        for path in all_below(&top) {
            chown(path, Some(user), Some(user)).unwrap();
        }
        let socket = volume.beside("sock");
        let mut command = serve(&volume, &socket, &["--sandbox=require"]);
        command.uid(user).gid(user);
        // Keys are where a search finds them.
        without_secret_memory(&mut command);
        let mut server = Server::at(&mut command, socket);
        server.process.is_taken_over = true;
        let mut bystander = Command::new("cat");
        let bystander = bystander
            .uid(user)
            .gid(user)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            server,
            agent,
            volume,
            state,
            other,
            secrets,
            own_key,
            bystander,
        }
    }

    fn helper(&self) -> u32 {
        let serving = self.server.process.pid();
        let children = fs::read_to_string(format!("/proc/{serving}/task/{serving}/children")).unwrap();
        children.trim().parse().unwrap()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // It has got no signal until now.
        let ended = self.bystander.try_wait();
        let _ = self.bystander.kill();
        let _ = self.bystander.wait();
        if !std::thread::panicking() {
            assert!(ended.unwrap().is_none());
        }
    }
}

fn all_below(top: &Path) -> Vec<PathBuf> {
    let mut found = vec![top.to_owned()];
    for entry in fs::read_dir(top).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() && !path.is_symlink() {
            true => found.extend(all_below(&path)),
            false => found.push(path),
        }
    }
    found
}

/// As the kernel takes it.
fn path(path: impl AsRef<Path>) -> Vec<u8> {
    [path.as_ref().as_os_str().as_bytes(), b"\0"].concat()
}

/// As root and as an ordinary user, with an agent and without.
#[test]
fn what_takes_a_served_disk_s_process_over_reaches_neither_files_nor_processes_nor_networks() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: it takes root to trace");
        return;
    }
    for user in [0, USER] {
        for with_agent in [false, true] {
            let host = Host::new(user, with_agent);
            let driver = host.server.connect();
            let inside = Inside::of(host.server.process.pid());
            files(&host, &inside);
            processes(&host, &inside);
            networks(&inside);
            unix_sockets(&host, &inside);
            keys(&host, &inside);
            other_calls(&inside);
            drop(inside);
            host.server
                .process
                .wait_stderr(&format!("system_call={}", libc::SYS_execve));
            host.server.still_serves_both(driver);
        }
    }
}

fn files(host: &Host, inside: &Inside) {
    let here: Arg<'_> = libc::AT_FDCWD.into();
    let open = |path: &[u8], flags: i32| {
        inside.call(libc::SYS_openat, &[here, path.into(), flags.into(), 0o600.into()])
    };
    let refused = |what: &Path, flags: i32| {
        let error = open(&path(what), flags).expect_err("it opens");
        assert_eq!(error.raw_os_error(), Some(libc::EACCES), "{what:?}");
    };
    let beside = |name: &str| host.volume.beside(name);
    // It may open its own disk, as any queue does.
    assert!(open(&path(&host.volume.path), libc::O_RDWR).is_ok());
    for file in [
        host.state.join(PRIMARY_KEY),
        host.other.clone(),
        "/etc/passwd".into(),
        "/etc/sealblk/config.toml".into(),
        format!("/proc/{}/mem", host.helper()).into(),
        format!("/proc/{}/environ", host.helper()).into(),
        format!("/proc/{}/mem", host.bystander.id()).into(),
    ] {
        if file.exists() {
            refused(&file, libc::O_RDONLY);
        }
    }
    refused(&host.other, libc::O_RDWR);
    refused(&beside(""), libc::O_RDONLY | libc::O_DIRECTORY);
    refused(&beside("new"), libc::O_RDWR | libc::O_CREAT);
    for name in ["/proc", "/dev", "/tmp"] {
        refused(name.as_ref(), libc::O_RDONLY | libc::O_DIRECTORY);
    }
    assert!(!beside("new").exists());
}

fn processes(host: &Host, inside: &Inside) {
    let refused = |what, number, arguments: &[Arg<'_>]| inside.refused(what, libc::EPERM, number, arguments);
    for other in [host.helper(), host.bystander.id()] {
        let other: Arg<'_> = i64::from(other).into();
        refused(
            "trace",
            libc::SYS_ptrace,
            &[i64::from(libc::PTRACE_ATTACH).into(), other],
        );
        for signal in [0, libc::SIGKILL] {
            refused("kill", libc::SYS_kill, &[other, signal.into()]);
            refused("tkill", libc::SYS_tkill, &[other, signal.into()]);
            refused("tgkill", libc::SYS_tgkill, &[other, other, signal.into()]);
        }
        // Signals that the kernel sends when something happens to a descriptor, and limits that end a process.
        for command in [libc::F_SETOWN, F_SETSIG, F_SETOWN_EX] {
            refused("own", libc::SYS_fcntl, &[0.into(), command.into(), other]);
        }
        refused(
            "limit",
            libc::SYS_prlimit64,
            &[other, 0.into(), 0.into(), 0.into()],
        );
        refused("read memory", libc::SYS_process_vm_readv, &[other]);
        refused("write memory", libc::SYS_process_vm_writev, &[other]);
    }
    let program = path("/bin/true");
    let program: Arg<'_> = program.as_slice().into();
    refused("exec", libc::SYS_execve, &[program]);
    refused("exec", libc::SYS_execveat, &[libc::AT_FDCWD.into(), program]);
    refused("fork", libc::SYS_fork, &[]);
    refused("fork", libc::SYS_vfork, &[]);
    refused("clone", libc::SYS_clone, &[libc::SIGCHLD.into()]);
    inside.refused("clone", libc::ENOSYS, libc::SYS_clone3, &[]);
}

fn networks(inside: &Inside) {
    for domain in [
        libc::AF_INET,
        libc::AF_INET6,
        libc::AF_NETLINK,
        libc::AF_PACKET,
        libc::AF_VSOCK,
    ] {
        let arguments = [domain.into(), libc::SOCK_DGRAM.into(), 0.into()];
        inside.refused("socket", libc::EPERM, libc::SYS_socket, &arguments);
    }
}

/// Keys of other disks: not from the helper, and neither in memory nor in any file that the process has or can open.
fn keys(host: &Host, inside: &Inside) {
    let (binding, wrapped) = binding(&host.other);
    let parameters = json!({ "binding": binding, "purpose": "attach", "wrapped": wrapped });
    let unwrap = json!({ "method": "org.sealblk.Agent.Unwrap", "parameters": parameters });
    // The socket's ends are the first descriptors, and the helper's has the higher number.
    let arguments = fs::read_to_string(format!("/proc/{}/cmdline", host.helper())).unwrap();
    let theirs = arguments
        .split('\0')
        .find_map(|argument| argument.strip_prefix("--fd="))
        .unwrap();
    let ours = theirs.parse::<i32>().unwrap() - 1;
    let answer = inside.exchange(ours, format!("{unwrap}\0").as_bytes());
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.contains("NotThisVolume"), "{answer}");

    let serving = host.server.process.pid();
    let memory = readable_memory(serving);
    // A key that is there is found.
    assert!(!host.own_key.found(&memory).is_empty());
    host.secrets.assert_absent(&memory, "memory");

    let mut reachable: Vec<PathBuf> = fs::read_dir(format!("/proc/{serving}/fd"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| fs::metadata(path).is_ok_and(|file| file.is_file()))
        .collect();
    assert!(!reachable.is_empty());
    let others = [host.volume.beside(""), host.state.clone(), "/etc".into()];
    let here: Arg<'_> = libc::AT_FDCWD.into();
    for file in others.iter().flat_map(|top| all_below(top)) {
        let name = path(&file);
        let open = [here, name.as_slice().into(), libc::O_NONBLOCK.into()];
        if let Ok(opened) = inside.call(libc::SYS_openat, &open) {
            inside.call(libc::SYS_close, &[opened.into()]).unwrap();
            reachable.push(file);
        }
    }
    assert!(reachable.contains(&host.volume.path));
    for file in reachable {
        host.secrets
            .assert_absent(&fs::read(&file).unwrap(), &file.display().to_string());
    }
}

/// The agent's socket, and the control socket of another disk.
fn unix_sockets(host: &Host, inside: &Inside) {
    let call = |number, arguments: &[Arg<'_>]| inside.call(number, arguments);
    let refused = |what, number, arguments: &[Arg<'_>]| inside.refused(what, libc::EPERM, number, arguments);
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
    let socket = call(libc::SYS_socket, &[libc::AF_UNIX.into(), kind.into(), 0.into()]).unwrap();
    let at = host.agent.as_ref().map_or_else(
        || host.server.socket().to_owned(),
        |agent| agent.path("agent.sock"),
    );
    let address = [&libc::AF_UNIX.to_ne_bytes()[..2], &path(&at)].concat();
    let len = address.len() as i64;
    let address: Arg<'_> = address.as_slice().into();
    refused(
        "connect",
        libc::SYS_connect,
        &[socket.into(), address, len.into()],
    );
    refused("bind", libc::SYS_bind, &[socket.into(), address, len.into()]);
    let datagram = [b"x".into(), 1.into(), 0.into(), address, len.into()];
    refused(
        "send",
        libc::SYS_sendto,
        &[&[socket.into()], &datagram[..]].concat(),
    );
    // A descriptor of the socket's file would give it a short name.
    let file = path(&at);
    let name = [libc::AT_FDCWD.into(), file.as_slice().into(), libc::O_PATH.into()];
    refused("name", libc::SYS_openat, &name);
    refused("name", libc::SYS_openat2, &name);
    refused("name", libc::SYS_open_tree, &name);
    refused(
        "directory",
        libc::SYS_chdir,
        &[path(at.parent().unwrap()).as_slice().into()],
    );
    for kind in [libc::SOCK_DGRAM, libc::SOCK_SEQPACKET] {
        refused(
            "socket",
            libc::SYS_socket,
            &[libc::AF_UNIX.into(), kind.into(), 0.into()],
        );
    }
    call(libc::SYS_close, &[socket.into()]).unwrap();
}

fn other_calls(inside: &Inside) {
    let refused = |what, number, arguments: &[Arg<'_>]| inside.refused(what, libc::EPERM, number, arguments);
    refused(
        "input of a terminal",
        libc::SYS_ioctl,
        &[0.into(), TIOCSTI.into()],
    );
    refused(
        "dumpable",
        libc::SYS_prctl,
        &[libc::PR_SET_DUMPABLE.into(), 1.into()],
    );
    refused("shared memory", libc::SYS_shmat, &[]);
    refused("name space", libc::SYS_unshare, &[libc::CLONE_NEWUSER.into()]);
    refused("bpf", libc::SYS_bpf, &[]);
    // One of its own would do what the filter refuses.
    refused(
        "ring",
        libc::SYS_io_uring_setup,
        &[8.into(), [0; 120].as_slice().into()],
    );
    refused("another root", libc::SYS_chroot, &[]);
    refused("timer", libc::SYS_timer_create, &[]);
    refused("no call", 1000, &[]);
    let executable = libc::PROT_READ | libc::PROT_EXEC;
    let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let map = [
        0.into(),
        4096.into(),
        executable.into(),
        anonymous.into(),
        (-1).into(),
        0.into(),
    ];
    refused("executable memory", libc::SYS_mmap, &map);
    // execve, ptrace and clone3 of the x32 ABI.
    for number in [520, 521, libc::SYS_clone3] {
        refused("x32", 0x4000_0000 | number, &[]);
    }
}

/// As in the kernel's headers; libc does not have all of them for every target.
const F_SETSIG: libc::c_int = 10;
const F_SETOWN_EX: libc::c_int = 15;
const TIOCSTI: libc::c_int = 0x5412;
