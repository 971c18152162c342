//! The OpenBao server, each test with its own: TLS for hosts on one port, and its operator's own on another.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sealblk::providers::{
    transit::Login, transit::MOUNT, transit::Settings, transit::approle, transit::cert,
};
use serde_json::{Value, json};

use crate::certificates;
use crate::ports::free_port;

/// How long a server may take to start. Long, since it is only reached on a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// What the documentation tells an operator to grant.
pub(crate) const POLICY: &str = r#"
path "transit/datakey/wrapped/sealblk" { capabilities = ["update"] }
path "transit/decrypt/sealblk" { capabilities = ["update"] }
path "transit/keys/sealblk" { capabilities = ["read"] }
"#;

/// A running, unsealed server with a transit key "sealblk" and a policy "sealblk".
pub(crate) struct Server {
    child: Child,
    dir: tempfile::TempDir,
    port: u16,
    operator_port: u16,
    unseal_key: String,
    root_token: String,
}

impl Server {
    pub(crate) fn start() -> Self {
        Self::start_with("server")
    }

    /// A server that shows this certificate.
    pub(crate) fn start_with(certificate: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (port, operator_port) = (free_port("127.0.0.1"), free_port("127.0.0.1"));
        let certificates = certificates::directory().display();
        let configuration = format!(
            r#"storage "inmem" {{}}
listener "tcp" {{
  address = "127.0.0.1:{port}"
  tls_cert_file = "{certificates}/{certificate}.pem"
  tls_key_file = "{certificates}/{certificate}.key"
}}
listener "tcp" {{
  address = "127.0.0.1:{operator_port}"
  tls_disable = true
}}
api_addr = "https://127.0.0.1:{port}"
# Else it takes the port after each of these, too.
disable_clustering = true
log_requests_level = "info"
"#
        );
        fs::write(dir.path().join("server.hcl"), configuration).unwrap();
        let log = File::create(dir.path().join("log")).unwrap();
        let child = Command::new(bao())
            .arg("server")
            .arg(format!("-config={}", dir.path().join("server.hcl").display()))
            .env("HOME", dir.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut server = Self {
            child,
            dir,
            port,
            operator_port,
            unseal_key: String::new(),
            root_token: String::new(),
        };
        server.initialise();
        server.post("sys/mounts/transit", json!({"type": "transit"}));
        server.post("transit/keys/sealblk", json!({}));
        server.set_policy(POLICY);
        server
    }

    fn initialise(&mut self) {
        let started = Instant::now();
        let shares = json!({"secret_shares": 1, "secret_threshold": 1});
        let answer = loop {
            match self.try_request("PUT", "sys/init", &shares) {
                Ok(answer) => break answer,
                Err(e) => {
                    let ended = self.child.try_wait().unwrap();
                    assert!(
                        ended.is_none() && started.elapsed() < DEADLINE,
                        "OpenBao does not start: {e}"
                    );
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        };
        self.unseal_key = answer["keys"][0].as_str().unwrap().to_owned();
        self.root_token = answer["root_token"].as_str().unwrap().to_owned();
        self.unseal();
    }

    pub(crate) fn unseal(&self) {
        self.request("PUT", "sys/unseal", json!({"key": self.unseal_key}));
        let started = Instant::now();
        // The root token is good once what is behind the seal has been started.
        while self
            .try_request("GET", "auth/token/lookup-self", &Value::Null)
            .is_err()
        {
            assert!(started.elapsed() < DEADLINE, "OpenBao does not unseal");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// As the settings name it.
    pub(crate) fn address(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    /// Ends it, as a crash would.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// How often the server has logged something.
    pub(crate) fn logged(&self, text: &str) -> usize {
        let log = fs::read_to_string(self.dir.path().join("log")).unwrap();
        log.matches(text).count()
    }

    /// Lets the server's operator do something.
    pub(crate) fn post(&self, path: &str, body: Value) -> Value {
        self.request("POST", path, body)
    }

    pub(crate) fn request(&self, method: &str, path: &str, body: Value) -> Value {
        self.try_request(method, path, &body)
            .unwrap_or_else(|e| panic!("{method} {path}: {e}"))
    }

    fn try_request(&self, method: &str, path: &str, body: &Value) -> Result<Value, ureq::Error> {
        let (namespace, path) = path.split_once("//").unwrap_or(("", path));
        let request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("http://127.0.0.1:{}/v1/{path}", self.operator_port))
            .header("X-Vault-Token", &self.root_token)
            .header("X-Vault-Namespace", namespace)
            .body(body.to_string())?;
        let config = ureq::Agent::config_builder()
            .proxy(None)
            .allow_non_standard_methods(true);
        let text = config
            .build()
            .new_agent()
            .run(request)?
            .into_body()
            .read_to_string()?;
        Ok(serde_json::from_str(&text).unwrap_or(Value::Null))
    }

    pub(crate) fn set_policy(&self, policy: &str) {
        self.post("sys/policies/acl/sealblk", json!({"policy": policy}));
    }

    /// Lets the host log in by AppRole, for tokens that are good for so many seconds.
    pub(crate) fn approle(&self, lease: u32) -> Login {
        self.post("sys/auth/approle", json!({"type": "approle"}));
        self.post(
            "auth/approle/role/host",
            json!({"token_policies": "sealblk", "token_ttl": lease, "token_max_ttl": lease}),
        );
        let role = self.request("GET", "auth/approle/role/host/role-id", Value::Null);
        let secret = self.post("auth/approle/role/host/secret-id", json!({}));
        let text = |answer: &Value, field: &str| answer["data"][field].as_str().unwrap().to_owned();
        Login::Approle {
            role_id: text(&role, "role_id"),
            secret_id_file: self.private("secret-id", &text(&secret, "secret_id")),
            mount: approle(),
        }
    }

    /// Lets the host "client" log in by its certificate.
    pub(crate) fn certificate(&self) -> Login {
        let dir = certificates::directory();
        let ca = fs::read_to_string(dir.join("ca.pem")).unwrap();
        self.post("sys/auth/cert", json!({"type": "cert"}));
        let role = json!({"certificate": ca, "allowed_common_names": "client", "token_policies": "sealblk"});
        self.post("auth/cert/certs/host", role);
        Login::Cert {
            certificate: dir.join("client.pem"),
            key: dir.join("client.key"),
            mount: cert(),
        }
    }

    /// Gives the host a token, in a file.
    pub(crate) fn token(&self) -> Login {
        let answer = self.post("auth/token/create", json!({"policies": ["sealblk"]}));
        Login::Token {
            token_file: self.private("token", answer["auth"]["client_token"].as_str().unwrap()),
        }
    }

    /// A file that its owner alone can read, with a line of text.
    pub(crate) fn private(&self, name: &str, line: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, format!("{line}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        path
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            let lines: Vec<_> = log.lines().rev().take(20).collect();
            eprintln!(
                "---- the last that OpenBao logged, newest first:\n{}",
                lines.join("\n")
            );
        }
    }
}

/// Settings for these servers.
pub(crate) fn settings(addresses: &[String], login: Login) -> Settings {
    Settings {
        addresses: addresses.to_vec(),
        ca: certificates::directory().join("ca.pem"),
        transit_key: "sealblk".into(),
        mount: MOUNT.into(),
        namespace: None,
        timeout: 30,
        login,
    }
}

/// What `ci/servers` has installed.
fn bao() -> PathBuf {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
    let build = std::env::var_os("SEALBLK_BUILD").map_or_else(|| repository.join("build"), PathBuf::from);
    let bao = build.join("servers/bin/bao");
    assert!(bao.exists(), "{} is not there: run ci/setup", bao.display());
    bao
}
