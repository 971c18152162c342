//! A real `sealblk agent`, whose callers need neither its state directory nor a provider's credentials.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use sealblk::agent::Client;
use sealblk::keys::RequestPurpose;
use sealblk::keys::{KeyProvider, Providers};
use serde_json::Value;
use tempfile::TempDir;

use super::serve::sealblk_path;
use super::volume::{Volume, run};

/// An agent with a native provider, ended with this.
#[derive(Debug)]
pub struct Agent {
    dir: TempDir,
    pub child: Child,
}

impl Agent {
    pub fn new(grants: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let path = |name: &str| dir.path().join(name);
        let state = path("state").display().to_string();
        run(Command::new(sealblk_path()).args([
            "--state-dir",
            &state,
            "provider",
            "add",
            "native",
            "--no-backup",
        ]));
        let socket = path("agent.sock").display().to_string();
        fs::write(
            path("config.toml"),
            format!("[agent]\nsocket = {socket:?}\n{grants}"),
        )
        .unwrap();
        let child = start(&dir);
        Self { dir, child }
    }

    pub fn restart(&mut self) {
        self.stop();
        self.start();
    }

    pub fn start(&mut self) {
        self.child = start(&self.dir);
    }

    /// Starts another one, and gives back the one before, which may not have ended.
    pub fn replace(&mut self) -> Child {
        std::mem::replace(&mut self.child, start(&self.dir))
    }

    /// Has it end.
    pub fn terminate(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }

    pub fn stop(&mut self) {
        self.terminate();
        assert!(self.child.wait().unwrap().success());
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A verb that knows the agent, and has no state directory of its own.
    pub fn verb(&self, args: &[&str]) -> Command {
        let mut command = Command::new(sealblk_path());
        command.current_dir(self.dir.path());
        command.args(["--config", "config.toml"]).args(args);
        command
    }

    pub fn client(&self, purpose: RequestPurpose) -> Client {
        Client::new(&self.path("agent.sock"), purpose)
    }

    pub fn provider(&self, purpose: RequestPurpose) -> std::sync::Arc<dyn KeyProvider> {
        self.client(purpose).provider("native").unwrap()
    }

    /// The records of the audit log.
    pub fn audit(&self) -> Vec<Value> {
        let log = fs::read_to_string(self.path("state/audit.log")).unwrap();
        log.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// A new volume under the agent's provider, with what `serve` needs to open it.
    pub fn volume(&self) -> Volume {
        self.volume_with(&[])
    }

    /// The same, made with more arguments.
    pub fn volume_with(&self, args: &[&str]) -> Volume {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        run(self.verb(&["create", "--size", "64M"]).args(args).arg(&path));
        let config = self.path("config.toml").display().to_string();
        Volume {
            dir,
            path,
            open: vec!["--config".into(), config],
        }
    }

    pub fn memory_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

fn start(dir: &TempDir) -> Child {
    let mut log = OpenOptions::new();
    let log = log.append(true).create(true).open(dir.path().join("agent.log"));
    let log = log.unwrap();
    let child = Command::new(sealblk_path())
        .current_dir(dir.path())
        .args(["--state-dir", "state", "--config", "config.toml", "agent"])
        .env("SEALBLK_LOG", "trace")
        .stderr(log)
        .spawn()
        .unwrap();
    let started = Instant::now();
    while UnixStream::connect(dir.path().join("agent.sock")).is_err() {
        assert!(
            started.elapsed() < Duration::from_secs(30),
            "the agent does not answer"
        );
        thread::sleep(Duration::from_millis(10));
    }
    child
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
