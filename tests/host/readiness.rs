//! Before a disk's key is asked for, all else that it takes to serve it is there; and a service says that it is ready when one
//! can connect, and not before.

use common::DEADLINE;
use common::agent::Agent;
use common::process::Process;
use common::secrets::without_call;
use common::serve::{sealblk_path, serve};
use common::volume::{MIB, Volume, run};
use rustix::process::Signal;
use std::fs;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

const HOST: i32 = 1;
const STORAGE: i32 = 6;
const USAGE: i32 = 2;

fn named(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// How often the agent was asked for a key to serve a disk.
fn asked(agent: &Agent) -> usize {
    let to_attach = |record: &&serde_json::Value| record["purpose"] == "attach";
    agent.audit().iter().filter(to_attach).count()
}

/// The key was released, "unlocked" and "serving" were said, and then the socket could not be bound or io_uring was forbidden.
#[test]
fn no_key_is_asked_for_if_the_disk_cannot_be_served() {
    let agent = Agent::new("");
    let volume = agent.volume();
    let socket = volume.beside("vhost");
    let refused = |mut command: Command, stdin: Stdio, code: i32, says: &[&str]| {
        let ended = Process::spawn_with_stdin(&mut command, stdin).wait();
        ended.assert_says(code, says);
        assert!(!ended.stderr.contains("serving"), "{}", ended.stderr);
        assert_eq!(asked(&agent), 0, "{}", ended.stderr);
        assert!(!socket.exists());
    };
    let served = |args: &[&str]| serve(&volume, &socket, args);

    let nowhere = serve(&volume, &volume.beside("no/such/directory"), &[]);
    refused(nowhere, Stdio::null(), STORAGE, &["no/such/directory"]);
    let file = volume.beside("file");
    fs::write(&file, "").unwrap();
    let occupied = served(&["--control-socket", named(&file)]);
    refused(occupied, Stdio::null(), USAGE, &[named(&file), "not a socket"]);

    // As in a container, by its default seccomp profile; and as on a kernel without io_uring.
    for (errno, says) in [
        (libc::EPERM, "--security-opt seccomp="),
        (libc::ENOSYS, "Linux 5.19"),
    ] {
        let mut command = served(&[]);
        without_call(&mut command, libc::SYS_io_uring_setup, errno);
        refused(command, Stdio::null(), HOST, &["io_uring cannot be set up", says]);
    }

    if rustix::process::geteuid().is_root() {
        let mut limited = Command::new("setpriv");
        limited.args(["--bounding-set", "-ipc_lock", "prlimit", "--memlock=65536"]);
        let command = served(&[]);
        limited.arg(command.get_program()).args(command.get_args());
        refused(limited, Stdio::null(), HOST, &["RLIMIT_MEMLOCK is 65536 bytes"]);

        // Enough for io_uring and not for keys: confined already, the process waited for a helper that it could not end.
        let mut limited = Command::new("setpriv");
        limited.args(["--bounding-set", "-ipc_lock", "prlimit", "--memlock=131072"]);
        let command = served(&["--pool-size", "1M"]);
        limited.arg(command.get_program()).args(command.get_args());
        refused(
            limited,
            Stdio::null(),
            HOST,
            &["bytes of memory for keys", "is 131072 bytes"],
        );
    }

    // A socket that nobody can come by: it was served, to nobody, and that was a success.
    let idle = rustix::net::socket(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::STREAM,
        None,
    );
    let command = served(&[]);
    let mut args: Vec<_> = command.get_args().collect();
    let at = args.iter().position(|arg| *arg == "--socket-path").unwrap();
    args.splice(at..at + 2, ["--fd".as_ref(), "9".as_ref()]);
    let mut with_fd = Command::new("sh");
    with_fd
        .args(["-c", r#"exec "$@" 9<&0 </dev/null"#, "sh", sealblk_path()])
        .args(args);
    refused(
        with_fd,
        idle.unwrap().into(),
        USAGE,
        &["file descriptor 9", "neither listens nor is connected"],
    );

    let mut process = Process::spawn(&mut served(&[]));
    process.wait_stderr("serving");
    assert!(asked(&agent) > 0);
    process.signal(Signal::TERM);
    assert!(process.wait().status.success());
}

/// What a service manager gets.
struct Manager(UnixDatagram);

impl Manager {
    fn of(command: &mut Command, at: &Path) -> Self {
        let socket = UnixDatagram::bind(at).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        command.env("NOTIFY_SOCKET", at);
        Self(socket)
    }

    fn hears(&self) -> String {
        let mut message = [0; 4096];
        let len = self.0.recv(&mut message).unwrap();
        String::from_utf8(message[..len].to_vec()).unwrap()
    }

    /// Waits for a message that has this line.
    fn waits_for(&self, line: &str) -> String {
        loop {
            let message = self.hears();
            if message.lines().any(|told| told.starts_with(line)) {
                return message;
            }
        }
    }
}

#[test]
fn the_service_manager_hears_of_a_disk_that_can_be_connected_to_and_of_its_locks() {
    let volume = Volume::created(4 * MIB, 512);
    let (socket, control) = (volume.beside("vhost"), volume.beside("control"));
    let mut command = serve(&volume, &socket, &["--control-socket", named(&control)]);
    let manager = Manager::of(&mut command, &volume.beside("notify"));
    let mut process = Process::spawn(&mut command);
    let ready = manager.waits_for("READY=1");
    assert!(ready.contains("STATUS=serving"), "{ready}");
    UnixStream::connect(&socket).unwrap();
    let verb = |verb: &str| {
        run(Command::new(sealblk_path())
            .args([verb, "--control-socket"])
            .arg(&control));
    };
    verb("lock");
    manager.waits_for("STATUS=locked by an operator");
    verb("unlock");
    manager.waits_for("STATUS=serving");
    process.signal(Signal::TERM);
    manager.waits_for("STOPPING=1");
    assert!(process.wait().status.success());

    // Without its key it is as ready, and says why it is locked.
    let primary = volume.beside("state/providers/native/primary.key");
    fs::rename(&primary, volume.beside("away")).unwrap();
    let mut command = serve(&volume, &socket, &[]);
    let manager = Manager::of(&mut command, &volume.beside("other"));
    let mut process = Process::spawn(&mut command);
    let ready = manager.waits_for("READY=1");
    assert!(
        ready.contains("STATUS=locked") && ready.contains("no such key"),
        "{ready}"
    );
    UnixStream::connect(&socket).unwrap();
    process.signal(Signal::TERM);
    assert!(process.wait().status.success());
}

#[test]
fn the_agent_is_ready_when_it_answers() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent.sock");
    let state = dir.path().join("state");
    fs::create_dir(&state).unwrap();
    let mut command = Command::new(sealblk_path());
    command.arg("--state-dir").arg(&state);
    command.args(["agent", "--socket-path"]).arg(&socket);
    let manager = Manager::of(&mut command, &dir.path().join("notify"));
    let mut process = Process::spawn(&mut command);
    manager.waits_for("READY=1");
    UnixStream::connect(&socket).unwrap();
    process.signal(Signal::TERM);
    manager.waits_for("STOPPING=1");
    assert!(process.wait().status.success());
    assert!(!socket.exists());
}

/// Until the first answer about its key nothing was bound, no signal was heard, and the service was not ready.
#[test]
fn a_key_server_that_does_not_answer_keeps_neither_the_start_nor_the_end_waiting() {
    let agent = Agent::new("");
    let mut volume = agent.volume();
    let silent = volume.beside("silent.sock");
    let _never_accepts = UnixListener::bind(&silent).unwrap();
    let config = volume.beside("config.toml");
    fs::write(&config, format!("[agent]\nsocket = {silent:?}\n")).unwrap();
    volume.open = vec!["--config".into(), named(&config).into()];
    let (socket, control) = (volume.beside("vhost"), volume.beside("control"));
    let args = ["--control-socket", named(&control)];

    let mut process = Process::spawn(&mut serve(
        &volume,
        &socket,
        &[&args[..], &["--no-wait"]].concat(),
    ));
    while !(socket.exists() && control.exists()) {
        assert!(process.is_running(), "{}", process.stderr());
        std::thread::sleep(Duration::from_millis(2));
    }
    process.signal(Signal::TERM);
    assert!(process.wait().status.success());
    assert!(!socket.exists() && !control.exists());

    let mut command = serve(&volume, &socket, &args);
    let manager = Manager::of(&mut command, &volume.beside("notify"));
    let mut process = Process::spawn(&mut command);
    let ready = manager.waits_for("READY=1");
    assert!(ready.contains("has not answered yet"), "{ready}");
    let status = run(Command::new(sealblk_path())
        .args(["status", "--control-socket"])
        .arg(&control));
    let status = String::from_utf8(status.stdout).unwrap();
    assert!(
        status.contains("locked") && status.contains("has not answered yet"),
        "{status}"
    );
    process.signal(Signal::TERM);
    assert!(process.wait().status.success());
}

/// A process that hangs would hold a guest up until somebody looks; its manager kills it if it does not hear this.
#[test]
fn the_service_manager_hears_that_a_disk_and_the_agent_work() {
    let volume = Volume::created(4 * MIB, 512);
    let state = volume.beside("agent-state");
    fs::create_dir(&state).unwrap();
    let mut agent = Command::new(sealblk_path());
    agent.arg("--state-dir").arg(&state);
    agent
        .args(["agent", "--socket-path"])
        .arg(volume.beside("agent.sock"));
    let disk = serve(&volume, &volume.beside("vhost"), &[]);
    for (mut command, name) in [(disk, "of-disk"), (agent, "of-agent")] {
        command.env("WATCHDOG_USEC", "100000");
        let manager = Manager::of(&mut command, &volume.beside(name));
        let mut process = Process::spawn(&mut command);
        manager.waits_for("READY=1");
        (0..3).for_each(|_| drop(manager.waits_for("WATCHDOG=1")));
        process.signal(Signal::TERM);
        manager.waits_for("STOPPING=1");
        assert!(process.wait().status.success());
    }
}

/// The first caller of a socket has its process started, by systemd's own program for this, and is answered.
#[test]
fn a_socket_that_the_service_manager_has_bound_is_served() {
    let agent = Agent::new("");
    let dir = tempfile::tempdir().unwrap();
    let activated = |socket: &Path, args: &[&str]| {
        let mut activate = Command::new("systemd-socket-activate");
        activate.arg(format!("--listen={}", socket.display()));
        activate.args(["--setenv=SEALBLK_LOG=info", sealblk_path()]);
        let process = Process::spawn(activate.args(args).env_remove("SEALBLK_LOG"));
        process.wait_stderr("Listening on");
        process
    };

    let socket = dir.path().join("agent.sock");
    let state = agent.path("state").display().to_string();
    fs::create_dir(dir.path().join("state")).unwrap();
    let own_state = dir.path().join("state").display().to_string();
    let config = dir.path().join("config.toml");
    fs::write(&config, format!("[agent]\nsocket = {socket:?}\n")).unwrap();
    let mut process = activated(
        &socket,
        &["--config", named(&config), "--state-dir", &own_state, "agent"],
    );
    let verb = |args: &[&str]| {
        let mut verb = Command::new(sealblk_path());
        verb.args(["--config", named(&config)])
            .args(args)
            .output()
            .unwrap()
    };
    // It has no providers, and says so.
    let listed = verb(&["provider", "list"]);
    assert!(listed.status.success(), "{listed:?}");
    process.signal(Signal::TERM);
    assert!(process.wait().status.success());
    // The socket is its manager's, for the next process.
    assert!(socket.exists());
    let said = process.stderr();
    assert!(!said.contains("name different sockets"), "{said}");

    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can serve a disk by its name");
        return;
    }
    let volume = agent.volume();
    let name = format!("test-activated-{}", std::process::id());
    // The group is a matter of the socket's unit.
    let mut define = agent.verb(&["define", &name, "--socket-group", "0", "--blk-file"]);
    run(define.arg(&volume.path));
    let sockets = sealblk::disks::Sockets::of(&name.parse().unwrap());
    let socket = dir.path().join("disk.sock");
    let config = agent.path("config.toml");
    let args = ["--config", named(&config), "start", "--foreground", &name];
    let mut process = activated(&socket, &args);
    let mut driver = common::driver::Driver::connect(&socket);
    let data = [0x5a; 4096];
    driver.write(0, &data);
    assert_eq!(driver.read(0, 4096), data);
    run(Command::new(sealblk_path()).args(["status", &name]));
    // Another process serves it, and the same socket.
    run(Command::new(sealblk_path()).args(["upgrade", &name]));
    assert_eq!(driver.read(0, 4096), data);
    // Both write to the same log, so that it does not end.
    while process.is_running() {
        std::thread::sleep(Duration::from_millis(10));
    }
    let status = run(Command::new(sealblk_path()).args(["status", "--json", &name])).stdout;
    let status: serde_json::Value = serde_json::from_slice(&status).unwrap();
    drop(driver);
    let mut driver = common::driver::Driver::connect(&socket);
    assert_eq!(driver.read(0, 4096), data);
    let served = i32::try_from(status["process"].as_i64().unwrap()).unwrap();
    rustix::process::kill_process(rustix::process::Pid::from_raw(served).unwrap(), Signal::TERM).unwrap();
    while UnixStream::connect(&sockets.control).is_ok() {
        std::thread::sleep(Duration::from_millis(10));
    }
    fs::remove_dir_all(&sockets.directory).unwrap();
    drop(state);
}
