//! PyKMIP's server, each test with its own: certificates, database and port, in a directory that goes with it.

use std::fs::{self, File};
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use sealblk::providers::{kmip::Settings, kmip::Wrap};

use crate::certificates;
use crate::ports::free_port;

/// How long a server may take to start. Long, since it is only reached on a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// Settings for these servers, as the host "client".
pub(crate) fn settings(servers: &[String]) -> Settings {
    Settings {
        servers: servers.to_vec(),
        ca: certificates::directory().join("ca.pem"),
        certificate: certificates::directory().join("client.pem"),
        key: certificates::directory().join("client.key"),
        wrap: Wrap::Client,
        wrapping_key: None,
        timeout: 30,
    }
}

/// A running server.
pub(crate) struct Server {
    child: Child,
    dir: tempfile::TempDir,
    host: &'static str,
    port: u16,
}

impl Server {
    /// A server on 127.0.0.1 that speaks all versions that PyKMIP has.
    pub(crate) fn start() -> Self {
        Self::start_with("127.0.0.1", "server", &[])
    }

    /// A server on `host`, with this certificate, that speaks `versions` alone.
    pub(crate) fn start_with(host: &'static str, certificate: &str, versions: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let port = free_port(host);
        let child = Command::new(python())
            .arg(script("kmip_server.py"))
            .args([dir.path(), &dir.path().join("database")])
            .arg(certificates::directory().join(certificate))
            .args([host, &port.to_string()])
            .args(versions)
            .env("TMPDIR", dir.path())
            // It has processes of its own, which end with it.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(dir.path().join("stderr")).unwrap())
            .spawn()
            .unwrap();
        let mut server = Self {
            child,
            dir,
            host,
            port,
        };
        server.wait_until_it_listens();
        server
    }

    fn wait_until_it_listens(&mut self) {
        let started = Instant::now();
        while TcpStream::connect((self.host, self.port)).is_err() {
            let ended = self.child.try_wait().unwrap();
            assert!(
                ended.is_none() && started.elapsed() < DEADLINE,
                "PyKMIP does not start: {}",
                fs::read_to_string(self.dir.path().join("stderr")).unwrap()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// As the settings name it.
    pub(crate) fn address(&self) -> String {
        match self.host.contains(':') {
            true => format!("[{}]:{}", self.host, self.port),
            false => format!("{}:{}", self.host, self.port),
        }
    }

    /// How often the server has logged something. Of a full log it makes "log.1", and so on until five.
    pub(crate) fn logged(&self, text: &str) -> usize {
        let old = (1..=5).map(|n| format!("log.{n}"));
        old.chain(["log".into()])
            .filter_map(|name| fs::read_to_string(self.dir.path().join(name)).ok())
            .map(|log| log.matches(text).count())
            .sum()
    }

    /// Lets the server's operator do something, by PyKMIP's own client: see `kmip_operator.py`.
    pub(crate) fn operator(&self, verb: &[&str]) -> String {
        let mut command = Command::new(python());
        command
            .arg(script("kmip_operator.py"))
            .args([self.host, &self.port.to_string()])
            .arg(certificates::directory())
            .args(verb);
        run(&mut command).trim().to_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            let lines: Vec<_> = log
                .lines()
                .rev()
                .filter(|line| !line.contains("DEBUG"))
                .take(20)
                .collect();
            eprintln!(
                "---- the last that {} logged, newest first:\n{}",
                self.address(),
                lines.join("\n")
            );
        }
    }
}

/// What PyKMIP's encoder makes of it, in hexadecimal.
pub(crate) fn encoded(version: &str, key: &str, content: &str) -> String {
    let mut command = Command::new(python());
    command
        .arg(script("kmip_encoder.py"))
        .args([version, key, content]);
    run(&mut command).trim().to_owned()
}

fn run(command: &mut Command) -> String {
    let done = command.output().unwrap();
    assert!(
        done.status.success(),
        "{command:?}:\n{}",
        String::from_utf8_lossy(&done.stderr)
    );
    String::from_utf8(done.stdout).unwrap()
}

/// The interpreter that `ci/servers` has installed PyKMIP for.
fn python() -> PathBuf {
    let build = std::env::var_os("SEALBLK_BUILD").map_or_else(|| repository().join("build"), PathBuf::from);
    let python = build.join("servers/bin/python");
    assert!(python.exists(), "{} is not there: run ci/setup", python.display());
    python
}

fn script(name: &str) -> PathBuf {
    repository().join("tests/providers").join(name)
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
