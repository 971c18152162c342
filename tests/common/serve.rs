//! A back-end in its own process: the real `sealblk serve`, or QEMU's storage daemon as one to judge the driver by.

use super::DEADLINE;
use super::driver::{Driver, Setup};
use super::process::{Ended, Facts, Process};
use super::volume::Volume;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The `sealblk` that Cargo has built for the test program, beside the `vhost-user-sealblk` of the same sources, which it executes.
pub fn sealblk_path() -> &'static str {
    static BINARY: LazyLock<String> = LazyLock::new(|| {
        let path = std::env::var("CARGO_BIN_EXE_sealblk")
            .expect("run the test program by Cargo, or set CARGO_BIN_EXE_sealblk to the path of sealblk");
        build_server(Path::new(&path));
        path
    });
    &BINARY
}

/// Cargo builds a test program the executables of its own package alone.
fn build_server(sealblk: &Path) {
    // Whoever runs the test program by hand has built both.
    let Some(cargo) = std::env::var_os("CARGO") else {
        return;
    };
    let profile = sealblk.parent().expect("a directory of the profile");
    let mut build = Command::new(cargo);
    build.args([
        "build",
        "--quiet",
        "--locked",
        "--package",
        "sealblk-serve",
        "--bins",
    ]);
    build
        .arg("--target-dir")
        .arg(profile.parent().expect("a target directory"));
    if profile.ends_with("release") {
        build.arg("--release");
    }
    // Cargo has set what is about this test program.
    let status = build.current_dir(env!("CARGO_MANIFEST_DIR")).status().unwrap();
    assert!(status.success(), "{build:?}: {status}");
}

/// Puts both executables in `directory`, where other users may execute them; that of `sealblk`.
pub fn install(directory: &Path) -> PathBuf {
    let sealblk = Path::new(sealblk_path());
    // By another process: while this one writes a file, one that it starts meanwhile keeps the file from being executed.
    let mut copy = Command::new("cp");
    copy.args([sealblk, &sealblk.with_file_name("vhost-user-sealblk")])
        .arg(directory);
    super::volume::run(&mut copy);
    directory.join("sealblk")
}

#[derive(Debug)]
pub struct Server {
    pub process: Process,
    socket: PathBuf,
    _socket_dir: TempDir,
    /// What it was before the first front-end.
    fresh: Facts,
    /// The volume, if nobody else keeps it.
    volume: Option<Volume>,
}

impl Server {
    /// Serves a new volume of 64 MiB and 512-byte sectors.
    pub fn new() -> Self {
        Server::of(Volume::new(), &[])
    }

    /// Serves a volume and keeps it.
    pub fn of(volume: Volume, args: &[&str]) -> Self {
        let mut server = Server::with(&volume, args);
        server.volume = Some(volume);
        server
    }

    pub fn volume(&self) -> &Volume {
        self.volume
            .as_ref()
            .expect("the server of a volume that it keeps")
    }

    /// Serves a volume, with four queues.
    pub fn start(volume: &Volume) -> Self {
        Server::with(volume, &[])
    }

    /// Serves a volume, with more arguments.
    pub fn with(volume: &Volume, args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("vhost.sock");
        let mut command = serve(volume, &socket, args);
        Server::spawn(&mut command, socket, dir)
    }

    /// Serves null storage.
    pub fn null(size: &str, args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("vhost.sock");
        let mut command = Command::new(sealblk_path());
        command
            .args(["serve", "--null-storage", size, "--socket-path"])
            .arg(&socket)
            .args(args);
        Server::spawn(&mut command, socket, dir)
    }

    /// QEMU's vhost-user-blk back-end over a plain file.
    pub fn reference(size: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (socket, disk) = (dir.path().join("vhost.sock"), dir.path().join("disk"));
        std::fs::File::create(&disk).unwrap().set_len(size).unwrap();
        let blockdev = format!(
            "driver=file,node-name=f,filename={},discard=unmap",
            disk.display()
        );
        let export = format!(
            "type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={},writable=on,num-queues=4",
            socket.display()
        );
        let mut command = Command::new("qemu-storage-daemon");
        command.args(["--blockdev", &blockdev, "--export", &export]);
        Server::spawn(&mut command, socket, dir)
    }

    /// Runs `command`, which serves at `socket`.
    pub fn at(command: &mut Command, socket: PathBuf) -> Self {
        Server::spawn(command, socket, tempfile::tempdir().unwrap())
    }

    fn spawn(command: &mut Command, socket: PathBuf, dir: TempDir) -> Self {
        let mut process = Process::spawn(command);
        let start = Instant::now();
        while !socket.exists() {
            assert!(process.is_running(), "{command:?} ended: {:?}", process.wait());
            assert!(
                start.elapsed() < DEADLINE,
                "{command:?}: no socket; it said:\n{}",
                process.stderr()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        if command.get_program() == sealblk_path() {
            // Who connects before that waits; but not all of its threads are there.
            process.wait_stderr("serving");
        }
        while command.get_args().any(|arg| arg == "--control-socket")
            && !process.threads().iter().any(|thread| thread.name == "control")
        {
            assert!(start.elapsed() < DEADLINE, "nobody answers on the control socket");
            std::thread::sleep(Duration::from_millis(1));
        }
        // The socket is there, and now it also waits for front-ends.
        let fresh = process.settled_facts();
        Server {
            process,
            fresh,
            socket,
            _socket_dir: dir,
            volume: None,
        }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    pub fn connect(&self) -> Driver {
        Driver::connect(&self.socket)
    }

    pub fn connect_with(&self, setup: Setup) -> Driver {
        Driver::with(&self.socket, setup)
    }

    /// A front-end that comes new is served.
    pub fn still_serves(&self) {
        self.connect().still_serves();
    }

    pub fn facts(&self) -> Facts {
        self.process.facts()
    }

    /// Waits until the server has let go of every front-end and of all that came with it.
    pub fn wait_idle(&self) {
        let start = Instant::now();
        loop {
            let facts = self.facts();
            // At first the thread that got the key may not have ended yet.
            if facts.descriptors <= self.fresh.descriptors
                && facts.threads <= self.fresh.threads
                && facts.guest_mappings <= self.fresh.guest_mappings
            {
                return;
            }
            assert!(
                start.elapsed() < DEADLINE,
                "left behind: {facts:?}, at first it was {:?}; {:?}",
                self.fresh,
                self.process.threads()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// After whatever was done to it: the same front-end is served, and so is a new one.
    pub fn still_serves_both(&self, mut driver: Driver) {
        driver.still_serves();
        drop(driver);
        self.still_serves();
    }

    pub fn terminate(mut self) -> Ended {
        self.process.signal(rustix::process::Signal::TERM);
        self.process.wait()
    }

    /// Ends it as an operator does, and expects that it ends well.
    pub fn stop(self) -> Ended {
        let ended = self.terminate();
        assert!(ended.status.success(), "{:?}", ended);
        ended
    }
}

/// The command line that serves a volume. SEALBLK_TEST_KERNEL=NAME has all volumes encrypted by that kernel.
pub fn serve(volume: &Volume, socket: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(sealblk_path());
    command
        .arg("serve")
        .args(&volume.open)
        .arg("--blk-file")
        .arg(&volume.path)
        .arg("--socket-path")
        .arg(socket);
    if !args.contains(&"--num-queues") {
        command.args(["--num-queues", "4"]);
    }
    if !args.contains(&"--cipher-kernel")
        && let Ok(kernel) = std::env::var("SEALBLK_TEST_KERNEL")
    {
        command.args(["--cipher-kernel", &kernel]);
    }
    command.args(args);
    command
}

/// Serves a volume when that must fail.
pub fn serve_fails(volume: &Volume, args: &[&str]) -> Ended {
    let socket = volume.beside("refused.sock");
    let ended = Process::spawn(&mut serve(volume, &socket, args)).wait();
    assert!(!ended.status.success(), "it served: {}", ended.stderr);
    ended
}
