//! A TPM: swtpm with a state of its own, which tpm2-tools can ask as well.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::DEADLINE;
use super::volume::run;

/// A running TPM, ended with this.
#[derive(Debug)]
pub struct Swtpm {
    dir: TempDir,
    child: Option<Child>,
}

impl Swtpm {
    /// A new TPM, with an endorsement key's certificate of a maker of its own.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        fs::create_dir_all(path("state")).unwrap();
        fs::create_dir_all(path("ca")).unwrap();
        // The maker's keys stay in the directory as well.
        fs::write(
            path("ca.conf"),
            format!(
                "statedir = {0}\nsigningkey = {0}/key.pem\nissuercert = {0}/cert.pem\ncertserial = {0}/serial\n",
                path("ca")
            ),
        )
        .unwrap();
        fs::write(path("ca.options"), "--platform-manufacturer test\n").unwrap();
        fs::write(
            path("setup.conf"),
            format!(
                "create_certs_tool = swtpm_localca\ncreate_certs_tool_config = {}\ncreate_certs_tool_options = {}\n\
                 active_pcr_banks = sha256\n",
                path("ca.conf"),
                path("ca.options")
            ),
        )
        .unwrap();
        let mut setup = Command::new("swtpm_setup");
        run(setup
            .args(["--tpm2", "--create-ek-cert", "--lock-nvram", "--overwrite"])
            .args(["--config", &path("setup.conf")])
            .args(["--tpmstate", &path("state")]));
        let mut tpm = Self { dir, child: None };
        tpm.start();
        tpm
    }

    /// As when its host is switched on: registers are as they are then.
    pub fn start(&mut self) {
        let path = |name: &str| self.dir.path().join(name).display().to_string();
        let child = Command::new("swtpm")
            .args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear"])
            .args(["--tpmstate", &format!("dir={}", path("state"))])
            .args(["--server", &format!("type=unixio,path={}", path("tpm.sock"))])
            .args(["--ctrl", &format!("type=unixio,path={}", path("tpm.sock.ctrl"))])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        self.child = Some(child);
        let started = Instant::now();
        while !listens(&path("tpm.sock")) {
            assert!(started.elapsed() < DEADLINE, "swtpm does not answer");
            thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        for name in ["tpm.sock", "tpm.sock.ctrl"] {
            let _ = fs::remove_file(self.dir.path().join(name));
        }
    }

    /// What sealblk and tpm2-tools call it.
    pub fn device(&self) -> String {
        format!("swtpm:path={}", self.path("tpm.sock").display())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The certificate of who has certified its endorsement key, in PEM.
    pub fn maker(&self) -> PathBuf {
        self.path("ca/cert.pem")
    }

    /// One of tpm2-tools, as in `quote`.
    pub fn tool(&self, name: &str, args: &[&str]) {
        self.output(name, args);
    }

    /// The same, and what it prints.
    pub fn output(&self, name: &str, args: &[&str]) -> String {
        let mut tool = Command::new(format!("tpm2_{name}"));
        let output = run(tool
            .current_dir(self.dir.path())
            .env("TPM2TOOLS_TCTI", self.device())
            .args(args));
        // There is no resource manager that would clear up behind it.
        if !matches!(name, "flushcontext") {
            self.tool("flushcontext", &["--transient-object"]);
        }
        String::from_utf8(output.stdout).unwrap()
    }

    /// Something else is booted.
    pub fn extend(&self, register: u8) {
        self.tool("pcrextend", &[&format!("{register}:sha256={}", "5a".repeat(32))]);
    }
}

/// Whether a process listens at a socket. The socket's file is there before that, and a connection is refused then.
fn listens(socket: &str) -> bool {
    const LISTENS: &str = "00010000";
    let sockets = fs::read_to_string("/proc/net/unix").unwrap();
    let mut lines = sockets.lines();
    lines.any(|line| line.ends_with(socket) && line.split(' ').nth(3) == Some(LISTENS))
}

impl Drop for Swtpm {
    fn drop(&mut self) {
        self.stop();
    }
}
