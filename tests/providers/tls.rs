//! What is wrong with a certificate or a key is said in words, with what to do: real files, and real servers of OpenSSL's.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use common::process::Process;
use common::serve::sealblk_path;
use tempfile::TempDir;

use crate::certificates;

/// Files and servers by `tls_servers.py`.
struct Servers {
    child: Child,
    ports: Vec<(String, u16)>,
    dir: TempDir,
}

impl Servers {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for file in fs::read_dir(certificates::directory()).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), dir.path().join(file.file_name())).unwrap();
        }
        let mut child = Command::new("python3")
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/providers/tls_servers.py"))
            .arg(dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let lines = lines
            .map(|line| line.unwrap())
            .take_while(|line| !line.is_empty());
        let ports = lines.map(|line| {
            let (name, port) = line.split_once(' ').unwrap();
            (name.to_owned(), port.parse().unwrap())
        });
        let ports = ports.collect();
        Self { child, ports, dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn port(&self, name: &str) -> u16 {
        let found = self.ports.iter().find(|(known, _)| known == name);
        found.unwrap_or_else(|| panic!("no server is called {name}")).1
    }

    /// A file that its owner alone can read.
    fn write(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        path
    }

    /// What `provider check` says of a provider with these settings, and the exit code.
    fn check(&self, settings: &str) -> (String, Option<i32>) {
        let state = tempfile::tempdir().unwrap();
        let settings = format!("[provider.p]\n{settings}");
        fs::write(state.path().join("providers.toml"), settings).unwrap();
        let mut check = Command::new(sealblk_path());
        check
            .arg("--state-dir")
            .arg(state.path())
            .args(["provider", "check", "p"]);
        let output = check.output().unwrap();
        (String::from_utf8(output.stderr).unwrap(), output.status.code())
    }

    fn kmip(&self, address: &str, ca: &Path, certificate: &Path, key: &Path) -> (String, Option<i32>) {
        self.check(&format!(
            "kind = \"kmip\"\nservers = [{address:?}]\nca = {ca:?}\ncertificate = {certificate:?}\nkey = {key:?}\n"
        ))
    }

    fn transit(&self, address: &str, ca: &Path) -> (String, Option<i32>) {
        let token = self.write("token", b"s.token");
        self.check(&format!(
            "kind = \"transit\"\naddresses = [\"https://{address}\"]\nca = {ca:?}\ntransit-key = \"k\"\n\
             [provider.p.login]\nmethod = \"token\"\ntoken-file = {token:?}\n"
        ))
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// All of `parts` are said, and nothing that only programmers understand.
#[track_caller]
fn assert_says(case: &str, (text, code): &(String, Option<i32>), parts: &[&str]) {
    println!("--- {case} ({code:?})\n{text}");
    assert_eq!(*code, Some(4), "{case}: {text}");
    for part in parts {
        assert!(text.contains(part), "{case}: {part:?} is not said:\n{text}");
    }
    for debug in [
        "OtherError",
        "Other(",
        "AlertReceived",
        "InvalidCertificate",
        "Context",
        "peer ",
        "fatal alert",
    ] {
        assert!(!text.contains(debug), "{case}: {debug:?} is said:\n{text}");
    }
}

/// These were told as the library's debug texts, `Other(OtherError(CaUsedAsEndEntity))`, and P-521 as `HandshakeFailure`.
#[test]
fn what_is_wrong_with_a_servers_certificate_is_said_with_what_to_do() {
    let servers = Servers::start();
    let (client, key) = (servers.path("client.pem"), servers.path("client.key"));
    let make = "subjectAltName=IP:127.0.0.1";
    let new_key = "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256";
    // The server, the authorities that are believed, and what is said.
    let cases: &[(&str, &str, &[&str])] = &[
        (
            "self-signed-ca",
            "self-signed-ca",
            &[
                "\"CN=self-signed-ca\" is self-signed and belongs to an authority (CA:TRUE)",
                make,
            ],
        ),
        (
            "self-signed",
            "ca",
            &[
                "\"CN=self-signed\" is self-signed, and not in ",
                "ca.pem; put it there",
            ],
        ),
        (
            "version-1",
            "ca",
            &[
                "\"CN=version-1\" has X.509 version 1, but version 3 is required",
                make,
            ],
        ),
        (
            "no-name",
            "ca",
            &["\"CN=no-name\" has no subject alternative name", make],
        ),
        (
            "wrong-name",
            "ca",
            &[
                "is for kms.example.com, 192.0.2.1, but the settings name the server 127.0.0.1",
                make,
            ],
        ),
        (
            "critical",
            "ca",
            &["unknown critical extensions (1.3.6.1.4.1.99999.7)"],
        ),
        (
            "between-missing",
            "ca",
            &[
                "was issued by \"CN=between\", for which ",
                "configure the server to send its certificate too",
            ],
        ),
        (
            "same-name",
            "ca",
            &[
                "names the issuer \"CN=ca\", but the key",
                "put the authority's current certificate there",
            ],
        ),
        (
            "client-only",
            "ca",
            &["is not for servers: its extended key usage lacks serverAuth"],
        ),
        ("p521", "ca", &["no TLS parameters in common", "P-521", new_key]),
        ("ed448", "ca", &["no TLS parameters in common", new_key]),
        (
            "rsa-1024",
            "ca",
            &[
                "the key of the certificate \"CN=rsa-1024\" is RSA with 1024 bits",
                new_key,
            ],
        ),
        (
            "p521-authority",
            "curve-ca",
            &["\"CN=curve-ca\" is ECDSA with the curve P-521", new_key],
        ),
        (
            "expired",
            "ca",
            &[
                "\"CN=expired-server\" has expired, at 2",
                "this host's clock says 2",
                "renew it",
            ],
        ),
        (
            "future",
            "ca",
            &[
                "\"CN=future-server\" is not valid before 2",
                "this host's clock says 2",
            ],
        ),
        (
            "stranger",
            "ca",
            &[
                "was issued by \"CN=stranger\", for which ",
                "put the authority's certificate into ",
            ],
        ),
    ];
    for (server, ca, parts) in cases {
        let address = format!("127.0.0.1:{}", servers.port(server));
        let ca = servers.path(&format!("{ca}.pem"));
        assert_says(server, &servers.kmip(&address, &ca, &client, &key), parts);
        assert_says(server, &servers.transit(&address, &ca), parts);
    }
    // These are believed, and are no key servers.
    for server in ["good", "between-sent", "self-signed"] {
        let address = format!("127.0.0.1:{}", servers.port(server));
        let ca = if server == "self-signed" {
            "self-signed.pem"
        } else {
            "ca.pem"
        };
        let (text, _) = servers.kmip(&address, &servers.path(ca), &client, &key);
        assert!(
            !text.contains("trust each other") && text.contains("closed the connection"),
            "{server}: {text}"
        );
    }
    // A host by its name, in a certificate that has none.
    let address = format!("localhost:{}", servers.port("no-name"));
    let told = servers.kmip(&address, &servers.path("ca.pem"), &client, &key);
    assert_says("no-name by name", &told, &["subjectAltName=DNS:localhost"]);

    let address = format!("127.0.0.1:{}", servers.port("mutual"));
    let cases: &[(&str, &[&str])] = &[
        (
            "stranger-client",
            &[
                "\"CN=stranger-client\"",
                "the server does not know its issuer \"CN=stranger\"",
            ],
        ),
        (
            "expired-client",
            &["\"CN=expired-client\"", "it has expired, at 2", "renew it"],
        ),
        (
            "future-client",
            &["\"CN=future-client\"", "it is not valid before 2"],
        ),
    ];
    for (name, parts) in cases {
        let [certificate, key] = ["pem", "key"].map(|kind| servers.path(&format!("{name}.{kind}")));
        let told = servers.kmip(&address, &servers.path("ca.pem"), &certificate, &key);
        assert_says(name, &told, parts);
    }
    let told = servers.transit(&address, &servers.path("ca.pem"));
    assert_says(
        "no certificate",
        &told,
        &["the server requires a certificate of this host, but the settings name none"],
    );
}

/// "no items found" was all that was said of an encrypted key, or of one with a byte order mark.
#[test]
fn what_is_wrong_with_a_file_of_a_key_or_certificate_is_said_with_what_to_do() {
    let servers = Servers::start();
    let read = |name: &str| fs::read(servers.path(name)).unwrap();
    let text = |name: &str| fs::read_to_string(servers.path(name)).unwrap();
    let (key, certificate) = (text("client.key"), text("client.pem"));
    let lines = |separator: &str, text: &str| text.lines().collect::<Vec<_>>().join(separator);
    let half = |text: &str| text[..text.len() / 2].to_owned().into_bytes();
    let utf16: Vec<u8> = format!("\u{feff}{key}")
        .encode_utf16()
        .flat_map(u16::to_le_bytes)
        .collect();
    let keys: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("empty", b"\n".to_vec(), &["it is empty"]),
        (
            "encrypted",
            read("encrypted.key"),
            &[
                "the private key in it is encrypted",
                "openssl pkey -in FILE -out NEW",
            ],
        ),
        (
            "encrypted, of old",
            read("encrypted-old.key"),
            &[
                "the private key in it is encrypted",
                "openssl pkey -in FILE -out NEW",
            ],
        ),
        (
            "DER",
            read("der.key"),
            &["it is DER", "openssl pkey -inform DER -in FILE -out NEW"],
        ),
        (
            "PKCS#12",
            read("p12.key"),
            &[
                "it is PKCS#12",
                "openssl pkcs12 -in FILE -nocerts -nodes -out NEW",
            ],
        ),
        ("UTF-16", utf16, &["it is UTF-16", "iconv"]),
        (
            "no line breaks",
            lines("", &key).into_bytes(),
            &["its line breaks were lost", "sed"],
        ),
        (
            "escaped line breaks",
            lines("\\n", &key).into_bytes(),
            &["written as '\\n'", "sed"],
        ),
        (
            "indented",
            format!("    {}", lines("\n    ", &key)).into_bytes(),
            &["its lines begin with blanks"],
        ),
        (
            "several",
            [key.clone(), text("other.key")].concat().into_bytes(),
            &["it has several private keys"],
        ),
        (
            "a certificate",
            certificate.clone().into_bytes(),
            &["it has a certificate and no private key"],
        ),
        (
            "a public key",
            read("public.key"),
            &["it has a public key instead of"],
        ),
        (
            "a request",
            read("request.key"),
            &["it has a request for a certificate instead of"],
        ),
        (
            "OpenSSH's",
            read("openssh.key"),
            &["in OpenSSH's form", "ssh-keygen -p -m PKCS8"],
        ),
        ("cut off", half(&key), &["it ends in the middle"]),
        (
            "damaged",
            key.replacen("MI", "!!", 1).into_bytes(),
            &["is not base64", "damaged"],
        ),
        (
            "text",
            b"the key is in the safe\n".to_vec(),
            &["it is not a PEM file"],
        ),
        (
            "another's",
            read("other.key"),
            &[
                "it is not the key of the first certificate in ",
                "openssl x509 -in ",
            ],
        ),
        (
            "no key at all",
            b"-----BEGIN PRIVATE KEY-----\nMAAwAA==\n-----END PRIVATE KEY-----\n".to_vec(),
            &["the private key is damaged"],
        ),
    ];
    let (ca, host) = (servers.path("ca.pem"), servers.path("client.pem"));
    for (case, content, parts) in &keys {
        let path = servers.write("case.key", content);
        let told = servers.kmip("127.0.0.1:1", &ca, &host, &path);
        assert_says(
            case,
            &told,
            &[&[path.to_str().unwrap(), "cannot be used"], *parts].concat(),
        );
    }
    // In these forms it is read.
    for (case, content) in [
        ("a byte order mark", format!("\u{feff}{key}")),
        ("CR alone", lines("\r", &key)),
        ("CR and LF", lines("\r\n", &key)),
        ("of old", text("old.key")),
        ("with the certificate", format!("{certificate}{key}")),
    ] {
        let path = servers.write("case.key", content.as_bytes());
        assert_says(
            case,
            &servers.kmip("127.0.0.1:1", &ca, &host, &path),
            &["the connection failed"],
        );
    }

    let bundle = |second: String| format!("{certificate}{second}").into_bytes();
    let certificates: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("empty", Vec::new(), &["it is empty"]),
        (
            "DER",
            read("der.pem"),
            &["it is DER", "openssl x509 -inform DER -in FILE -out NEW"],
        ),
        (
            "a key",
            key.clone().into_bytes(),
            &["it has a private key and no certificate"],
        ),
        (
            "no line breaks",
            lines("", &certificate).into_bytes(),
            &["its line breaks were lost"],
        ),
        (
            "second without line breaks",
            bundle(lines("", &text("other.pem"))),
            &["its line breaks were lost"],
        ),
        (
            "second indented",
            bundle(format!(" {}", lines("\n ", &text("other.pem")))),
            &["its lines begin with blanks"],
        ),
        ("cut off", half(&certificate), &["it ends in the middle"]),
        (
            "damaged",
            certificate.replacen("MI", "!!", 1).into_bytes(),
            &["is not base64"],
        ),
        (
            "no certificate at all",
            b"-----BEGIN CERTIFICATE-----\nMAAwAA==\n-----END CERTIFICATE-----\n".to_vec(),
            &["not a readable X.509 certificate"],
        ),
    ];
    for (case, content, parts) in &certificates {
        let path = servers.write("case.pem", content);
        let named = [&[path.to_str().unwrap()], *parts].concat();
        assert_says(
            case,
            &servers.kmip("127.0.0.1:1", &path, &host, &servers.path("client.key")),
            &named,
        );
        assert_says(
            case,
            &servers.kmip("127.0.0.1:1", &ca, &path, &servers.path("client.key")),
            &named,
        );
    }
    let own: &[(&str, &[&str])] = &[
        (
            "own-version-1",
            &["this host's certificate \"CN=client\" has X.509 version 1"],
        ),
        (
            "own-p521",
            &["the key is ECDSA with the curve P-521", "openssl genpkey"],
        ),
        (
            "own-rsa-1024",
            &["the key is RSA with 1024 bits", "openssl genpkey"],
        ),
        ("own-dsa", &["the key is DSA", "openssl genpkey"]),
    ];
    for (name, parts) in own {
        let [certificate, key] = ["pem", "key"].map(|kind| servers.path(&format!("{name}.{kind}")));
        assert_says(name, &servers.kmip("127.0.0.1:1", &ca, &certificate, &key), parts);
        // A broker is told the same.
        let settings = format!(
            "listen = \"127.0.0.1:0\"\ncertificate = {certificate:?}\nkey = {key:?}\nstate-dir = {:?}\n",
            servers.path("broker")
        );
        fs::write(servers.path("broker.toml"), settings).unwrap();
        let mut serve = Command::new(sealblk_path());
        serve
            .args(["broker", "serve", "--config"])
            .arg(servers.path("broker.toml"));
        let ended = Process::spawn(&mut serve).wait();
        for part in *parts {
            assert!(ended.stderr.contains(part), "{name}: {}", ended.stderr);
        }
    }
}
