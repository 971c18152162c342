//! A real `sealblk broker` with its own state, a TPM, and a host that has both as its provider `trusted`.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Instant;

use base16ct::lower;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use sealblk::keys::{KeyProvider, Providers};
use sealblk::providers::trusted::Settings;
use sealblk::providers::{registry::Registry, registry::RegistryError, registry::Source};
use sealblk::tpm::{Device, Tpm};
use sealblk_secmem::arena::SecretBytes;
use serde_json::Value;
use tempfile::TempDir;

use crate::certificates;
use crate::ports::free_port;
use common::DEADLINE;
use common::process::Process;
use common::serve::sealblk_path;
use common::swtpm::Swtpm;

pub(crate) const RESOURCE: &str = "sealblk/kek/1";
/// The registers that count.
pub(crate) const PCRS: [u8; 3] = [0, 7, 11];

pub(crate) struct Broker {
    dir: TempDir,
    port: u16,
    process: Option<Process>,
}

impl Broker {
    /// One that believes the maker of `tpm`, and has a resource.
    pub(crate) fn start(tpm: &Swtpm) -> Self {
        Self::with(tpm, "server", 60)
    }

    pub(crate) fn with(tpm: &Swtpm, certificate: &str, session_lifetime: u16) -> Self {
        Self::listening("127.0.0.1", tpm, certificate, session_lifetime)
    }

    /// One that listens on another address than that of this machine alone.
    pub(crate) fn start_on(tpm: &Swtpm, address: &str) -> Self {
        Self::listening(address, tpm, "server", 60)
    }

    fn listening(address: &str, tpm: &Swtpm, certificate: &str, session_lifetime: u16) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let port = free_port("127.0.0.1");
        let pem = |extension| {
            certificates::directory()
                .join(certificate)
                .with_extension(extension)
        };
        let settings = format!(
            "listen = \"{address}:{port}\"\ncertificate = {:?}\nkey = {:?}\nstate-dir = {:?}\n\
             endorsement-authorities = {:?}\nsession-lifetime = {session_lifetime}\n",
            pem("pem"),
            pem("key"),
            dir.path().join("state"),
            tpm.maker()
        );
        fs::write(dir.path().join("broker.toml"), settings).unwrap();
        let mut broker = Self {
            dir,
            port,
            process: None,
        };
        broker.does(&["resource", "add", RESOURCE]);
        broker.expect_state_of(tpm);
        broker.run();
        broker
    }

    pub(crate) fn run(&mut self) {
        let mut command = self.verb(&["serve"]);
        let mut process = Process::spawn(&mut command);
        let started = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            assert!(process.is_running(), "{:?}", process.wait());
            assert!(started.elapsed() < DEADLINE, "the broker does not answer");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        self.process = Some(process);
    }

    pub(crate) fn stop(&mut self) {
        let mut process = self.process.take().unwrap();
        process.signal(rustix::process::Signal::TERM);
        assert!(process.wait().status.success());
    }

    pub(crate) fn address(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    pub(crate) fn socket(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.port).into()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn verb(&self, args: &[&str]) -> Command {
        let mut command = Command::new(sealblk_path());
        command
            .arg("--config")
            .arg(self.path("broker.toml"))
            .arg("broker")
            .args(args);
        command
    }

    pub(crate) fn does(&self, args: &[&str]) -> Output {
        common::volume::run(&mut self.verb(args))
    }

    /// The state that the TPM's host is in now is the one that it has to be in.
    pub(crate) fn expect_state_of(&self, tpm: &Swtpm) {
        let mut opened = Tpm::open(&Device::from(tpm.device())).unwrap();
        let values = opened.read_pcrs().unwrap();
        let pcrs = PCRS.map(|n| format!("{n}={}", lower::encode_string(&values[usize::from(n)])));
        let mut args = vec!["reference", "set", "node"];
        args.extend(pcrs.iter().flat_map(|pcr| ["--pcr", pcr]));
        self.does(&args);
    }

    /// A token for a host.
    pub(crate) fn token(&self, host: &str) -> SecretBytes {
        let file = self.path(&format!("{host}.token"));
        let _ = fs::remove_file(&file);
        let path = file.display().to_string();
        self.does(&[
            "host",
            "enrol",
            host,
            "--reference",
            "node",
            "--resource",
            RESOURCE,
            "--token-file",
            &path,
        ]);
        SecretBytes::take(&mut fs::read(&file).unwrap()).unwrap()
    }

    /// The records of the audit log, whose chain holds.
    pub(crate) fn audit(&self, event: &str) -> Vec<Value> {
        let path = self.path("state/audit.log");
        common::volume::run(Command::new(sealblk_path()).args(["audit", "verify"]).arg(&path));
        let log = fs::read_to_string(path).unwrap();
        log.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .filter(|record: &Value| record["event"] == event)
            .collect()
    }

    /// What it answers to a request of a host that is none of ours: status, cookie and body. `head` is method and path, and a
    /// header in a second line.
    pub(crate) fn request(&self, head: &str, body: &str) -> (u16, Option<String>, Value) {
        let mut roots = RootCertStore::empty();
        let ca = certificates::directory().join("ca.pem");
        roots.add(CertificateDer::from_pem_file(ca).unwrap()).unwrap();
        let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from("127.0.0.1").unwrap();
        let socket = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        let mut stream = StreamOwned::new(ClientConnection::new(Arc::new(config), name).unwrap(), socket);
        let len = body.len();
        let (line, more) = head.split_once('\n').unwrap_or((head, "X-Nothing: 0"));
        let request = format!("{line} HTTP/1.1\r\n{more}\r\nContent-Length: {len}\r\n\r\n{body}");
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let cookie = head.lines().find_map(|line| line.strip_prefix("Set-Cookie: "));
        let cookie = cookie.map(|cookie| cookie.split(';').next().unwrap().to_owned());
        (status, cookie, serde_json::from_str(body).unwrap_or(Value::Null))
    }
}

/// A host with a TPM.
pub(crate) struct Host {
    pub(crate) state: TempDir,
    pub(crate) settings: Settings,
}

impl Host {
    /// One that the broker does not know yet.
    pub(crate) fn stranger(tpm: &Swtpm, broker: &Broker) -> Self {
        Self::with(Settings {
            addresses: vec![broker.address()],
            ca: certificates::directory().join("ca.pem"),
            resource: RESOURCE.parse().unwrap(),
            tpm: Device::from(tpm.device()),
            hold: 60,
            timeout: 20,
        })
    }

    pub(crate) fn with(settings: Settings) -> Self {
        let state = tempfile::tempdir().unwrap();
        let mut registry = Registry::open(state.path()).unwrap();
        registry
            .add("trusted", Source::Trusted(settings.clone()), true)
            .unwrap();
        Self { state, settings }
    }

    /// One that it knows.
    pub(crate) fn enrolled(tpm: &Swtpm, broker: &Broker) -> Self {
        let host = Self::stranger(tpm, broker);
        host.enrol(Some(&broker.token("node1"))).unwrap();
        host
    }

    pub(crate) fn enrol(&self, token: Option<&SecretBytes>) -> Result<(), RegistryError> {
        self.registry().enrol("trusted", "node1", token)
    }

    pub(crate) fn registry(&self) -> Registry {
        Registry::open(self.state.path()).unwrap()
    }

    /// The provider as a new process has it, with nothing held.
    pub(crate) fn provider(&self) -> Arc<dyn KeyProvider> {
        self.registry().provider("trusted").unwrap()
    }

    /// The provider with other settings.
    pub(crate) fn other(&self, change: impl FnOnce(&mut Settings)) -> Self {
        let mut settings = self.settings.clone();
        change(&mut settings);
        let other = Self::with(settings);
        let key = "providers/trusted/attestation.key";
        fs::copy(self.state.path().join(key), other.state.path().join(key)).unwrap();
        other
    }
}

/// An address at which nobody is.
pub(crate) fn nobody() -> String {
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    format!("https://127.0.0.1:{port}")
}
