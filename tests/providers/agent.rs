//! The agent's providers: what volumes see of them is what they see of any.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sealblk::agent::{Client, Purpose};
use sealblk::keys::Providers;
use sealblk::keys::registry::{Backup, Registry, Source};

use crate::conformance;

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn native_by_the_agent_conforms() {
    let dir = tempfile::tempdir().unwrap();
    let mut registry = Registry::open(dir.path()).unwrap();
    registry
        .add(
            "native",
            Source::Native {
                backup: Backup::Waived,
            },
            true,
        )
        .unwrap();
    let socket = dir.path().join("agent.sock");
    let agent = Command::new(env!("CARGO_BIN_EXE_sealblk"))
        .arg("--state-dir")
        .arg(dir.path())
        .args(["agent", "--socket-path"])
        .arg(&socket)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let _agent = Ended(agent);
    let client = Client::new(&socket, Purpose::Recrypt);
    let started = Instant::now();
    while client.default_name().is_err() {
        assert!(
            started.elapsed() < Duration::from_secs(30),
            "the agent does not answer"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(client.default_name().unwrap().as_deref(), Some("native"));
    conformance::run(&*client.provider("native").unwrap());
}
