//! What a file holds that cannot be understood is told nobody: it may be a secret, in the wrong place or in the wrong form.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use common::agent::Agent;
use common::process::Process;
use common::secrets::Search;
use common::serve::{Server, sealblk_path};
use common::volume::run;

use crate::certificates;

/// A private key that was copied without its line breaks, and how to look for it.
struct Key {
    pem: String,
    search: Search,
}

impl Key {
    fn new() -> Self {
        let pem = fs::read_to_string(certificates::directory().join("client.key")).unwrap();
        let pem: String = pem.lines().collect();
        let base64 = pem.split("-----").nth(2).unwrap();
        let der = BASE64_STANDARD.decode(base64).unwrap();
        let search = Search::default()
            .text("its text", base64.as_bytes())
            // Also as the numbers of its characters, as programs print bytes.
            .key("its text", base64.as_bytes())
            .key("the key", &der);
        Self { pem, search }
    }

    fn write(&self, path: &Path) {
        write_private(path, &self.pem);
    }
}

fn write_private(path: &Path, content: &str) {
    fs::write(path, content).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

fn said(output: &Output) -> String {
    [&output.stdout[..], &output.stderr]
        .map(String::from_utf8_lossy)
        .concat()
}

/// The library for PEM gives the line that it cannot understand in its error. Without line breaks that line is the key, and it
/// was printed as decimal numbers: at each retry into the log, to all users by `status`, and into the audit log.
#[test]
fn private_key_without_line_breaks_is_in_no_error_log_answer_or_audit_log() {
    let mut agent = Agent::new("");
    let volume = agent.volume();
    let key = Key::new();
    key.write(&agent.path("host.key"));
    let certificate = |name: &str| certificates::directory().join(name);
    let settings = format!(
        "default = \"native\"\n[provider.native]\nkind = \"kmip\"\nservers = [\"127.0.0.1:1\"]\nca = {:?}\n\
         certificate = {:?}\nkey = {:?}\n",
        certificate("ca.pem"),
        certificate("client.pem"),
        agent.path("host.key"),
    );
    fs::write(agent.path("state/providers.toml"), settings).unwrap();
    // It has forgotten the KEK.
    agent.restart();

    let told = "its line breaks were lost";
    let state = agent.path("state").display().to_string();
    let mut own = Command::new(sealblk_path());
    own.args(["--state-dir", &state, "provider", "check", "native"]);
    let control = agent.path("control.sock");
    let server = Server::of(volume, &["--control-socket", control.to_str().unwrap()]);
    server.process.wait_stderr(told);
    let socket = ["--control-socket", control.to_str().unwrap()];
    for mut verb in [
        own,
        agent.verb(&["provider", "check", "native"]),
        agent.verb(&["provider", "list"]),
        agent.verb(&["provider", "list", "--json"]),
        agent.verb(&[&["status"], &socket[..]].concat()),
        agent.verb(&[&["status", "--json"], &socket[..]].concat()),
        agent.verb(&[&["unlock"], &socket[..]].concat()),
    ] {
        let output = verb.output().unwrap();
        let text = said(&output);
        key.search.assert_absent(text.as_bytes(), &text);
        assert!(text.contains(told), "{verb:?}: {text}");
    }
    let log = server.process.stderr();
    key.search.assert_absent(log.as_bytes(), &log);
    for file in ["agent.log", "state/audit.log"] {
        let text = fs::read_to_string(agent.path(file)).unwrap();
        key.search.assert_absent(text.as_bytes(), &text);
    }
    key.search.assert_absent_under(&agent.path(""), &["host.key"]);

    let settings = format!(
        "listen = \"127.0.0.1:0\"\ncertificate = {:?}\nkey = {:?}\nstate-dir = {:?}\n",
        certificate("server.pem"),
        agent.path("host.key"),
        agent.path("broker"),
    );
    fs::write(agent.path("broker.toml"), settings).unwrap();
    let mut broker = Command::new(sealblk_path());
    broker
        .args(["broker", "serve", "--config"])
        .arg(agent.path("broker.toml"));
    let ended = Process::spawn(&mut broker).wait();
    key.search.assert_absent(ended.stderr.as_bytes(), &ended.stderr);
    assert!(
        ended.stderr.contains(told) && !ended.status.success(),
        "{}",
        ended.stderr
    );
}

/// The library for TOML prints the line that it does not understand, and that for JSON the value: of a private key that was
/// pasted into the settings in place of its file's name, or of a state file that was mixed up with one.
#[test]
fn what_is_in_a_file_of_settings_or_state_is_in_no_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::create_dir_all(path("state/providers/p")).unwrap();
    fs::create_dir_all(path("broker")).unwrap();
    for private in ["state/providers/p", "broker", "state"] {
        fs::set_permissions(path(private), fs::Permissions::from_mode(0o700)).unwrap();
    }
    let key = Key::new();
    let pem = &key.pem;
    let list = ["--state-dir", "state", "provider", "list"];
    let check = ["--state-dir", "state", "provider", "check", "p"];
    let config = ["--config", "config.toml", "provider", "list"];
    let broker = ["--config", "broker.toml", "broker", "serve"];
    let provider = |kind: &str, settings: &str| format!("[provider.p]\nkind = \"{kind}\"\n{settings}");
    let kmip = |settings: &str| {
        let files = "ca = \"/ca.pem\"\ncertificate = \"/host.pem\"\n";
        provider("kmip", &format!("{files}{settings}"))
    };
    let transit = |settings: &str, login: &str| {
        let files = "ca = \"/ca.pem\"\n";
        provider(
            "transit",
            &format!("{files}{settings}[provider.p.login]\n{login}"),
        )
    };
    let approle = |id: &str| format!("method = \"approle\"\nrole-id = {id:?}\nsecret-id-file = \"/s\"\n");
    let token = "method = \"token\"\ntoken-file = \"/t\"\n";
    let bao = "addresses = [\"https://h\"]\ntransit-key = \"k\"\n";
    let brokers = format!(
        "listen = \"127.0.0.1:0\"\ncertificate = \"/c\"\nkey = \"/k\"\nstate-dir = {:?}\n",
        path("broker")
    );
    let servers = "servers = [\"127.0.0.1:1\"]\n";
    // The file, what is in it, who reads it, and what they say of it.
    let cases: Vec<(&str, String, &[&str], &str)> = vec![
        (
            "config.toml",
            format!("{pem}\n"),
            &config,
            "line 1, column 12: this is not TOML",
        ),
        (
            "config.toml",
            format!("key = {pem}\n"),
            &config,
            "string values must be quoted",
        ),
        (
            "config.toml",
            format!("[agent]\n\n{pem:?} = 1\n"),
            &config,
            "line 3, column 1: unknown field, expected one of `socket`",
        ),
        (
            "config.toml",
            format!("[agent]\nkek-time-to-live = {pem:?}\n"),
            &config,
            "line 2, column 20: invalid type, expected u32",
        ),
        (
            "config.toml",
            format!("[agent.{pem:?}]\nx = 1\n"),
            &config,
            "unknown field, expected one of `socket`",
        ),
        (
            "config.toml",
            format!("[policy]\nmax-key-age = {pem:?}\n"),
            &config,
            "an age is a length of time",
        ),
        (
            "config.toml",
            format!("[agent.sealed-cache]\npcrs = {pem:?}\n"),
            &config,
            "registers are numbers from 0 to 23",
        ),
        (
            "config.toml",
            format!("[agent.sealed-cache]\ntpm = {pem:?}\n"),
            &config,
            "tpm under [agent.sealed-cache] must be an absolute path",
        ),
        (
            "config.toml",
            format!("[[grant]]\nuser = {pem:?}\nprivileges = []\n"),
            &config,
            "[[grant]] number 1 names a user that does not exist on this host",
        ),
        (
            "config.toml",
            format!("[[grant]]\nuser = 1\nprivileges = [{pem:?}]\n"),
            &config,
            "unknown variant, expected one of `",
        ),
        (
            "state/providers.toml",
            format!("default = {pem:?}\n"),
            &list,
            "`default` names a provider that does not exist",
        ),
        (
            "state/providers.toml",
            format!("removing = [{pem:?}]\n"),
            &list,
            "is not allowed",
        ),
        (
            "state/providers.toml",
            format!("[provider.{pem:?}]\nkind = \"native\"\n"),
            &list,
            "is not allowed",
        ),
        (
            "state/providers.toml",
            provider(pem, ""),
            &list,
            "unknown variant, expected one of `native`",
        ),
        (
            "state/providers.toml",
            kmip(&format!("{servers}key = {pem:?}\n")),
            &check,
            "key: write an absolute path",
        ),
        (
            "state/providers.toml",
            kmip(&format!("servers = [{pem:?}]\nkey = \"/k\"\n")),
            &check,
            "servers: number 1 is not the address of a server",
        ),
        (
            "state/providers.toml",
            kmip(&format!("servers = [{pem:?}]\nkey = \"/k\"\n")),
            &list,
            "servers: number 1 is not the address of a server",
        ),
        (
            "state/providers.toml",
            kmip(&format!(
                "{servers}key = \"/k\"\nwrapping-key = {{ id = {pem:?}, file = \"/w\" }}\n"
            )),
            &check,
            "wrapping-key.id: ",
        ),
        (
            "state/providers.toml",
            kmip(&format!(
                "{servers}key = \"/k\"\nwrapping-key = {{ id = \"1\", file = {pem:?} }}\n"
            )),
            &check,
            "wrapping-key.file: ",
        ),
        (
            "state/providers.toml",
            kmip(&format!("{servers}key = \"/k\"\n{pem:?} = 1\n")),
            &check,
            "unknown field, expected one of `servers`",
        ),
        (
            "state/providers.toml",
            transit(&format!("{bao}mount = {pem:?}\n"), token),
            &check,
            "mount: this is not a valid path",
        ),
        (
            "state/providers.toml",
            transit(bao, &approle(pem)),
            &check,
            "login.role-id: ",
        ),
        (
            "state/providers.toml",
            transit(bao, &format!("method = \"token\"\ntoken-file = {pem:?}\n")),
            &check,
            "login.token-file: ",
        ),
        (
            "state/providers.toml",
            transit(
                &format!("addresses = [\"https://u:{pem}@h\"]\ntransit-key = \"k\"\n"),
                token,
            ),
            &list,
            "address 1 is not valid",
        ),
        (
            "state/providers.toml",
            transit(
                &format!("addresses = [\"https://h\"]\ntransit-key = {pem:?}\n"),
                token,
            ),
            &check,
            "transit-key: ",
        ),
        (
            "broker.toml",
            format!("{brokers}session-lifetime = {pem:?}\n"),
            &broker,
            "invalid type, expected u16",
        ),
        (
            "broker.toml",
            format!("listen = {pem:?}\n{}", brokers.split_once('\n').unwrap().1),
            &broker,
            "line 1, column 10: ",
        ),
        (
            "broker.toml",
            brokers.replace("/k", pem),
            &broker,
            "must have absolute paths",
        ),
        (
            "broker/broker.json",
            format!("{{\"hosts\":{pem:?}}}"),
            &["--config", "good.toml", "broker", "host", "list"],
            "line 1, column ",
        ),
        (
            "broker/broker.json",
            format!("{{{pem:?}:1}}"),
            &["--config", "good.toml", "broker", "host", "list"],
            "line 1, column ",
        ),
        (
            "broker/broker.json",
            pem.clone(),
            &["--config", "good.toml", "broker", "host", "list"],
            "this is not JSON",
        ),
    ];
    write_private(&path("good.toml"), &brokers);
    // It has a master key from then on.
    let mut hosts = Command::new(sealblk_path());
    run(hosts
        .current_dir(&dir)
        .args(["--config", "good.toml", "broker", "host", "list"]));
    for (file, content, verb, told) in cases {
        write_private(&path(file), &content);
        let output = Command::new(sealblk_path())
            .current_dir(&dir)
            .args(verb)
            .output()
            .unwrap();
        let text = said(&output);
        key.search.assert_absent(text.as_bytes(), &text);
        assert!(text.contains(told), "{content}\n{verb:?} says:\n{text}");
        fs::remove_file(path(file)).unwrap();
    }
}

/// What calls a parser whose errors quote, or names such an error, and where that is allowed.
const QUOTING: [(&str, &[&str]); 15] = [
    ("serde_json::from_", &["base/parsing.rs", "luks2/testing.rs"]),
    ("serde_json::Error", &["base/parsing.rs"]),
    ("serde_json::error", &["base/parsing.rs"]),
    ("toml::from_", &["toml_file.rs"]),
    ("toml::de::", &["toml_file.rs"]),
    ("parse::<toml", &["toml_file.rs"]),
    ("Error::custom", &[]),
    ("E::custom", &["base/parsing.rs"]),
    ("from_pem_", &[]),
    ("pem_slice_iter", &["providers/tls/pem.rs"]),
    ("pem::Error", &[]),
    ("rustls::Error", &[]),
    ("FromUtf8Error", &[]),
    ("DecodeError", &[]),
    (
        "ureq::Error",
        &["providers/https/failure.rs", "providers/https/connector.rs"],
    ),
];

#[test]
fn nothing_else_calls_a_parser_whose_errors_quote() {
    fn look(dir: &Path, root: &Path, found: &mut Vec<String>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                look(&path, root, found);
                continue;
            }
            if path.extension().is_none_or(|extension| extension != "rs") {
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            let program = text.split("#[cfg(test)]\nmod tests").next().unwrap();
            for (line, number) in program.lines().zip(1..) {
                let code = line.split("//").next().unwrap();
                for (what, allowed) in QUOTING {
                    if code.contains(what) && !allowed.contains(&name.as_str()) {
                        found.push(format!("{name}:{number}: {what}"));
                    }
                }
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    look(&root, &root, &mut found);
    assert!(found.is_empty(), "{found:#?}");
}
