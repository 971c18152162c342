//! A back-end in its own process: the real `sealblk serve`, or QEMU's storage daemon as one to judge the driver by.

use super::DEADLINE;
use super::driver::{Driver, Setup};
use super::process::{Ended, Facts, Process};
use super::volume::Volume;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tempfile::TempDir;

pub const SEALBLK: &str = env!("CARGO_BIN_EXE_sealblk");

#[derive(Debug)]
pub struct Server {
    pub process: Process,
    socket: PathBuf,
    _socket_dir: TempDir,
}

impl Server {
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
        Server {
            process,
            socket,
            _socket_dir: dir,
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

    /// The server's state once it has let go of every front-end.
    pub fn idle_facts(&self) -> Facts {
        let start = Instant::now();
        loop {
            let facts = self.facts();
            if facts.guest_mappings == 0 {
                return facts;
            }
            assert!(
                start.elapsed() < DEADLINE,
                "guest memory is still mapped: {facts:?}"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
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

/// The command line that serves a volume.
pub fn serve(volume: &Volume, socket: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(SEALBLK);
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
