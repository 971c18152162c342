//! What a host logs in to a key server with is the agent's alone: no process of a disk has it, and nothing tells of it.

use std::fs::{self, File};
use std::process::{Child, Stdio};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use sealblk::providers::transit::Login;
use sealblk::providers::{registry::Registry, registry::Source};
use serde_json::json;

use crate::openbao;
use common::agent::Agent;
use common::secrets::{Core, Search, core, readable_memory, token};
use common::serve::Server;
use common::volume::run;

#[test]
fn credentials_and_keks_of_a_server_are_in_no_disks_process_log_or_event() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: it takes root to look");
        return;
    }
    let server = openbao::Server::start();
    let agent = Agent::new("");
    let mut watcher = Ended(
        agent
            .verb(&["events"])
            .stdout(File::create(agent.path("events")).unwrap())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let mut search = Search::default();
    let mut served = Vec::new();
    for (name, login) in [("token", server.token()), ("approle", server.approle(3600))] {
        let file = match &login {
            Login::Token { token_file } => token_file,
            Login::Approle { secret_id_file, .. } => secret_id_file,
            Login::Cert { .. } => unreachable!("it has no secret text"),
        };
        let secret = fs::read(file).unwrap();
        search = search.text(name, secret.trim_ascii());
        let settings = openbao::settings(&[server.address()], login);
        let mut registry = Registry::open(&agent.path("state")).unwrap();
        registry.add(name, Source::Transit(settings), false).unwrap();

        let volume = agent.volume_with(&["--provider", name]);
        let (disk, control) = (volume.path.clone(), agent.path(name));
        let disk_server = Server::of(volume, &["--control-socket", control.to_str().unwrap()]);
        // A KEK of each, before the rekey and after it.
        search = search.key(&format!("KEK by {name}"), &kek(&server, &disk));
        run(agent.verb(&["rekey", "--control-socket"]).arg(&control));
        search = search.key(&format!("new KEK by {name}"), &kek(&server, &disk));
        served.push(disk_server);
    }
    // It does not log in with the token of a file, and has another one from AppRole.
    run(&mut agent.verb(&["provider", "list"]));
    watcher.end();

    for server in &served {
        let pid = server.process.pid();
        let (memory, dump) = (readable_memory(pid), core(pid, Core::Everything));
        let known = Search::default().text("arguments", b"--control-socket");
        for (place, bytes) in [("memory", memory), ("a core dump", dump)] {
            assert!(!known.found(&bytes).is_empty(), "{place} has the arguments");
            search.assert_absent(&bytes, place);
        }
        search.assert_absent(server.process.stderr().as_bytes(), "the log of a disk");
    }
    for file in ["cmdline", "environ"] {
        let bytes = fs::read(format!("/proc/{}/{file}", agent.child.id())).unwrap();
        search.assert_absent(&bytes, file);
    }
    search.assert_absent(
        &core(agent.child.id(), Core::AsTheKernel),
        "a core dump of the agent",
    );
    // The log, the events and the audit log are among these, and tell of what was done.
    for (file, last) in [
        ("agent.log", "KeyBound"),
        ("events", "KeyBound"),
        ("state/audit.log", "KeyBound"),
    ] {
        let bytes = fs::read(agent.path(file)).unwrap();
        let told = String::from_utf8_lossy(&bytes);
        assert!(told.matches(last).count() >= 2, "{file}: {told}");
        assert_eq!(tokens(&bytes), 0, "{file} has a token");
    }
    search.assert_absent_under(&agent.path(""), &[]);
    assert_eq!(
        tokens(&fs::read(server.private("again", &token_of(&server))).unwrap()),
        1
    );
}

/// The KEK that a volume is bound to, as the server's operator can have it.
fn kek(server: &openbao::Server, disk: &std::path::Path) -> Vec<u8> {
    let key_id = token(disk)["key_id"].as_str().unwrap().to_owned();
    let (key, ciphertext) = key_id.split_once(':').unwrap();
    let answer = server.post(
        &format!("transit/decrypt/{key}"),
        json!({ "ciphertext": ciphertext }),
    );
    BASE64_STANDARD
        .decode(answer["data"]["plaintext"].as_str().unwrap())
        .unwrap()
}

fn token_of(server: &openbao::Server) -> String {
    match server.token() {
        Login::Token { token_file } => fs::read_to_string(token_file).unwrap(),
        _ => unreachable!("that is what was asked for"),
    }
}

/// How many texts there are that look like a token of the server's, whichever.
fn tokens(bytes: &[u8]) -> usize {
    let is_token = |text: &[u8]| {
        text.strip_prefix(b"s.")
            .is_some_and(|text| text.len() == 24 && text.iter().all(u8::is_ascii_alphanumeric))
    };
    bytes.windows(26).filter(|text| is_token(text)).count()
}

struct Ended(Child);

impl Ended {
    fn end(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        self.end();
    }
}
