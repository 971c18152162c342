//! The transit provider, with servers that no honest one would be.

use std::error::Error;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use sealblk::keys::{Binding, KeyError, KeyId, KeyProvider, KeyReason, Providers};
use sealblk::providers::{registry::Registry, registry::Source};
use sealblk::providers::{transit::Login, transit::Settings};
use sealblk_secmem::arena::SecretBytes;
use serde_json::json;
use uuid::Uuid;

use crate::mock::{Mock, Stream};
use crate::openbao::settings;

const KEY_ID: &str = "sealblk:vault:v1:AAAAAAAAAAAAAAAAAAAAAAAA";

/// A host with a token or a secret ID, and no server of its own.
struct Host(tempfile::TempDir);

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let credential = dir.path().join("credential");
        fs::write(&credential, "s.token").unwrap();
        fs::set_permissions(&credential, fs::Permissions::from_mode(0o600)).unwrap();
        Self(dir)
    }

    fn with_token(&self, addresses: &[String]) -> Settings {
        let token_file = self.0.path().join("credential");
        settings(addresses, Login::Token { token_file })
    }

    fn with_role(&self, addresses: &[String]) -> Settings {
        let login = Login::Approle {
            role_id: "role".into(),
            secret_id_file: self.0.path().join("credential"),
            mount: "approle".into(),
        };
        settings(addresses, login)
    }

    fn provider(&self, settings: Settings) -> Arc<dyn KeyProvider> {
        let dir = tempfile::tempdir_in(&self.0).unwrap();
        let mut registry = Registry::open(dir.path()).unwrap();
        registry.add("transit", Source::Transit(settings), true).unwrap();
        registry.provider("transit").unwrap()
    }
}

fn fetch(provider: &dyn KeyProvider) -> Result<(), KeyError> {
    let key_id = KeyId(KEY_ID.into());
    let binding = Binding {
        volume: Uuid::nil(),
        provider: "transit",
        key_id: &key_id,
        keyslot: 0,
    };
    provider
        .wrap(&binding, &SecretBytes::random(32).unwrap())
        .map(drop)
}

/// Reads a request with its body.
fn request(stream: &mut Stream) -> String {
    let mut text = String::new();
    let mut byte = [0];
    let read = |stream: &mut Stream, byte: &mut [u8; 1]| stream.read(byte).is_ok_and(|read| read == 1);
    while !text.ends_with("\r\n\r\n") && read(stream, &mut byte) {
        text.push(byte[0].into());
    }
    let length = |line: &str| line.to_lowercase().strip_prefix("content-length: ")?.parse().ok();
    for _ in 0..text.lines().find_map(length).unwrap_or(0) {
        if read(stream, &mut byte) {
            text.push(byte[0].into());
        }
    }
    text
}

fn reply(status: u16, headers: &str, body: &str) -> String {
    let len = body.len();
    format!("HTTP/1.1 {status} Whatever\r\nContent-Length: {len}\r\n{headers}Connection: close\r\n\r\n{body}")
}

/// A server that gives all of its clients this answer.
fn answering(answer: impl Into<Vec<u8>>) -> String {
    let answer = answer.into();
    let mock = Mock::start(move |stream| {
        request(stream);
        let _ = stream.write_all(&answer);
    });
    format!("https://{}", mock.address())
}

#[test]
fn answers_that_make_no_sense_are_garbled() {
    let host = Host::new();
    let nested = "[".repeat(10_000);
    let large = format!("{{\"data\":\"{}\"}}", "x".repeat(70_000));
    let chunk = format!("1000\r\n{}\r\n", "x".repeat(4096)).repeat(64);
    let answers = [
        reply(200, "", ""),
        reply(200, "", "null"),
        reply(200, "", "{}"),
        reply(200, "", r#"{"data":null}"#),
        reply(200, "", r#"{"data":{"ciphertext":5,"plaintext":5}}"#),
        reply(200, "", r#"{"data":{"ciphertext":"","plaintext":""}}"#),
        reply(
            200,
            "",
            r#"{"data":{"ciphertext":"vault:v1:../../x","plaintext":"not base64"}}"#,
        ),
        reply(
            200,
            "",
            r#"{"data":{"ciphertext":"vault:v0:AAAA","plaintext":"AAAA"}}"#,
        ),
        reply(200, "", "<html>log in first</html>"),
        reply(200, "", &nested),
        reply(200, "", &large),
        reply(204, "", ""),
        format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{chunk}"),
        "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{\"data\":".into(),
        format!("HTTP/1.1 200 OK\r\nX: {}\r\n\r\n", "x".repeat(1 << 20)),
        "HTTP/1.1 200".into(),
        // Closed: an answer that has nothing is cut off, too.
        String::new(),
        "220 mail.example.com ESMTP\r\n".into(),
        "\0\0\0\0".into(),
    ];
    for answer in answers {
        let provider = host.provider(host.with_token(&[answering(answer.as_str())]));
        let shown = answer.chars().take(120).collect::<String>();
        let error = provider.create_kek().unwrap_err();
        assert_eq!(error.reason, KeyReason::Garbled, "{shown:?}: {error:?}");
        let error = fetch(&*provider).unwrap_err();
        assert_eq!(error.reason, KeyReason::Garbled, "{shown:?}: {error:?}");
        assert_eq!(error.key_id, Some(KeyId(KEY_ID.into())));
    }
}

#[test]
fn keys_of_another_length_are_garbled_and_shown_nowhere() {
    let host = Host::new();
    for secret in ["QUJDREVGR0g=", "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVphYmNkZWZnaA=="] {
        let answer = json!({"data": {"plaintext": secret}}).to_string();
        // And where the answer breaks off amid the key.
        for answer in [
            answer.as_str(),
            &answer[..answer.len() - 3],
            &answer.replace("\"plaintext\":", ""),
        ] {
            let provider = host.provider(host.with_token(&[answering(reply(200, "", answer))]));
            let error = fetch(&*provider).unwrap_err();
            assert_eq!(error.reason, KeyReason::Garbled, "{error:?}");
            assert!(
                !format!("{error:?}{}", causes(&error)).contains(&secret[..8]),
                "{error:?}"
            );
        }
    }
}

fn causes(error: &KeyError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

#[test]
fn server_cannot_write_to_the_operators_terminal() {
    let host = Host::new();
    let body = json!({"errors": [format!("\x1b]0;owned\x07{}", "x".repeat(10_000)), "\r\nall is well"]});
    let address = answering(reply(400, "", &body.to_string()));
    let error = host
        .provider(host.with_token(&[address]))
        .create_kek()
        .unwrap_err();
    assert_eq!(error.reason, KeyReason::Failed);
    let text = causes(&error);
    assert!(text.contains("400: \\u{1b}]0;owned"), "{text}");
    assert!(
        !text.contains(char::is_control) && text.chars().count() < 700,
        "{text:?}"
    );
}

#[test]
fn redirect_is_not_followed() {
    let host = Host::new();
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let elsewhere = Mock::start(move |stream| {
        count.fetch_add(1, Ordering::Relaxed);
        request(stream);
        let body = json!({"data": {"ciphertext": "vault:v1:AAAA"}}).to_string();
        let _ = stream.write_all(reply(200, "", &body).as_bytes());
    });
    let address = format!("https://{}", elsewhere.address());
    host.provider(host.with_token(std::slice::from_ref(&address)))
        .create_kek()
        .unwrap();
    assert_eq!(asked.swap(0, Ordering::Relaxed), 1);
    for status in [301, 302, 303, 307, 308] {
        let redirect = answering(reply(status, &format!("Location: {address}/v1/x\r\n"), ""));
        let error = host
            .provider(host.with_token(&[redirect]))
            .create_kek()
            .unwrap_err();
        assert_eq!(error.reason, KeyReason::Failed, "{error:?}");
    }
    assert_eq!(asked.load(Ordering::Relaxed), 0);
}

#[test]
fn login_with_a_token_that_cannot_be_one_is_garbled() {
    let host = Host::new();
    for auth in [
        json!({"client_token": "", "lease_duration": 60}),
        json!({"client_token": "two words", "lease_duration": 60}),
        json!({"client_token": "s.x\r\nX-Header: y", "lease_duration": 60}),
        json!({"client_token": "t".repeat(5000), "lease_duration": 60}),
        json!({"client_token": "s.x", "lease_duration": -1}),
        json!({"client_token": "s.x"}),
        json!(null),
    ] {
        let address = answering(reply(200, "", &json!({"auth": auth}).to_string()));
        let error = host
            .provider(host.with_role(&[address]))
            .create_kek()
            .unwrap_err();
        assert_eq!(error.reason, KeyReason::Garbled, "{auth}: {error:?}");
    }
}

#[test]
fn slow_servers_cost_no_more_than_the_timeout() {
    let host = Host::new();
    // It takes connections, and says nothing, not even in TLS.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = format!("https://{}", listener.local_addr().unwrap());
    // It has its answer come byte by byte, each well in time.
    let dribbling = || {
        let mock = Mock::start(|stream| {
            request(stream);
            for byte in reply(200, "", &" ".repeat(1000)).bytes() {
                if stream.write_all(&[byte]).and_then(|()| stream.flush()).is_err() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        format!("https://{}", mock.address())
    };
    for addresses in [
        vec![silent.clone()],
        vec![dribbling()],
        vec![silent, dribbling()],
        vec![dribbling(), dribbling(), dribbling()],
    ] {
        let settings = Settings {
            timeout: 2,
            ..host.with_token(&addresses)
        };
        let provider = host.provider(settings);
        let started = Instant::now();
        let error = provider.create_kek().unwrap_err();
        let took = started.elapsed();
        assert_eq!(error.reason, KeyReason::Unreachable, "{error:?}");
        assert_eq!(&error.hop, addresses.last().unwrap());
        let expected = Duration::from_millis(1900)..Duration::from_millis(3500);
        assert!(expected.contains(&took), "{addresses:?}: {took:?}");
    }
}
