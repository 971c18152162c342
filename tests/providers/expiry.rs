//! Certificates that are about to expire are told of before anything fails, and no more when they were renewed.

use std::fs;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::certificates;

#[test]
fn certificates_that_are_about_to_expire_are_told_of() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let sealblk = |args: &[&str]| {
        let mut command = Command::new(common::serve::sealblk_path());
        command.current_dir(dir.path()).args(args);
        command
    };
    let install = |ca: &str, client: &str| {
        for (from, to) in [
            (format!("{ca}.pem"), "ca.pem"),
            (format!("{client}.pem"), "host.pem"),
            (format!("{client}.key"), "host.key"),
        ] {
            fs::copy(certificates::directory().join(from), path(to)).unwrap();
        }
    };
    let own = ["--state-dir", "state"];
    install("ca", "client");
    // No server is there: what is told of certificates does not depend on one.
    let add = [
        "provider",
        "add",
        "kmip",
        "--server",
        "127.0.0.1:1",
        "--ca",
        "ca.pem",
    ];
    let files = ["--certificate", "host.pem", "--key", "host.key", "--no-check"];
    assert!(
        sealblk(&[&own[..], &add, &files].concat())
            .status()
            .unwrap()
            .success()
    );
    let told = |args: &[&str]| {
        let output = sealblk(args).output().unwrap();
        String::from_utf8(output.stderr).unwrap()
    };
    for verb in [&["provider", "list"][..], &["provider", "check", "kmip"]] {
        let stderr = told(&[&own[..], verb].concat());
        for part in [
            "this host's certificate \"CN=client\"",
            "the authority's certificate \"CN=ca\"",
        ] {
            assert!(stderr.contains(part), "{stderr}");
        }
        // In a day, or in a moment less than that.
        assert_eq!(stderr.matches("expires ").count(), 2, "{stderr}");
    }

    fs::write(
        path("config.toml"),
        format!("[agent]\nsocket = {:?}\n", path("agent.sock")),
    )
    .unwrap();
    let mut agent = sealblk(&[&own[..], &["--config", "config.toml", "agent"]].concat())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let began = Instant::now();
    let expiring = loop {
        let log = fs::read_to_string(path("state/audit.log")).unwrap_or_default();
        let records = log
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let expiring: Vec<_> = records
            .filter(|record| record["event"] == "CertificateExpiring")
            .collect();
        if expiring.len() == 2 && UnixStream::connect(path("agent.sock")).is_ok() {
            break expiring;
        }
        assert!(began.elapsed() < Duration::from_secs(30), "{expiring:?}");
        thread::sleep(Duration::from_millis(20));
    };
    for (record, whose) in expiring.iter().zip(["authority", "host"]) {
        assert_eq!(
            (&record["provider"], &record["whose"]),
            (&"kmip".into(), &whose.into())
        );
        assert!(record["days"].as_u64().unwrap() <= 1, "{record}");
    }
    assert!(told(&["--config", "config.toml", "provider", "list"]).contains("expires "));

    // Renewed, without a restart.
    install("lasting-ca", "lasting-client");
    for keys in [own, ["--config", "config.toml"]] {
        let stderr = told(&[&keys[..], &["provider", "list"]].concat());
        assert!(!stderr.contains("expire"), "{stderr}");
    }
    agent.kill().unwrap();
    agent.wait().unwrap();
}
