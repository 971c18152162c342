//! The KMIP provider with PyKMIP.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use sealblk::keys::{Binding, KeyError, KeyId, KeyProvider, KeyReason, KeyState, Providers};
use sealblk::providers::{kmip::Settings, kmip::Wrap, kmip::WrappingKey};
use sealblk::providers::{registry::Registry, registry::RegistryError, registry::Source};
use sealblk_secmem::arena::SecretBytes;
use uuid::Uuid;

use crate::certificates;
use crate::conformance;
use crate::ports::free_port;
use crate::pykmip::{Server, settings};

/// The provider with these settings, as a registry opens it.
pub(crate) fn open(settings: &Settings) -> Arc<dyn KeyProvider> {
    let dir = tempfile::tempdir().unwrap();
    let mut registry = Registry::open(dir.path()).unwrap();
    registry.add("kms", Source::Kmip(settings.clone()), true).unwrap();
    // What was written is what is read.
    Registry::open(dir.path()).unwrap().provider("kms").unwrap()
}

fn provider(server: &Server) -> Arc<dyn KeyProvider> {
    open(&settings(&[server.address()]))
}

fn binding(key_id: &KeyId) -> Binding<'_> {
    Binding {
        volume: Uuid::from_u128(7),
        provider: "kms",
        key_id,
        keyslot: 0,
    }
}

pub(crate) fn wrap(provider: &dyn KeyProvider, key_id: &KeyId) -> Result<Vec<u8>, KeyError> {
    provider.wrap(&binding(key_id), &SecretBytes::random(32).unwrap())
}

/// The text of an error with those under it.
pub(crate) fn causes(error: &KeyError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

#[track_caller]
pub(crate) fn assert_fails<T: std::fmt::Debug>(result: Result<T, KeyError>, reason: KeyReason, cause: &str) {
    let error = result.unwrap_err();
    let causes = causes(&error);
    assert_eq!(error.reason, reason, "{causes}");
    assert!(causes.contains(cause), "{causes}");
}

#[test]
fn conforms() {
    let server = Server::start();
    conformance::run(&*provider(&server));
}

#[test]
fn conforms_where_the_server_wraps() {
    let server = Server::start();
    let settings = Settings {
        wrap: Wrap::Server,
        ..settings(&[server.address()])
    };
    conformance::run(&*open(&settings));
}

/// A wrapping key in a file, which the server has as well.
struct Wrapping {
    _dir: tempfile::TempDir,
    key: WrappingKey,
}

impl Wrapping {
    fn new(server: &Server) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("wrapping.key");
        write_key(&file, &SecretBytes::random(32).unwrap());
        let id = server.operator(&["register-wrapping", file.to_str().unwrap()]);
        let key = WrappingKey { id, file };
        Self { _dir: dir, key }
    }

    fn settings(&self, server: &Server) -> Settings {
        Settings {
            wrapping_key: Some(self.key.clone()),
            ..settings(&[server.address()])
        }
    }
}

fn write_key(file: &Path, key: &[u8]) {
    std::fs::write(file, key).unwrap();
    std::fs::set_permissions(file, PermissionsExt::from_mode(0o600)).unwrap();
}

#[test]
fn conforms_where_keys_come_wrapped() {
    let server = Server::start();
    let wrapping = Wrapping::new(&server);
    let provider = open(&wrapping.settings(&server));
    conformance::run(&*provider);
    // Nobody is to have it in clear.
    let key_id = provider.create_kek().unwrap();
    assert!(
        server
            .operator(&["attributes", &key_id.0])
            .contains("Sensitive=True")
    );
    // The keys are no others than those that come in clear, where a server gives them.
    let in_clear = open(&settings(&[server.address()]));
    let binding = binding(&key_id);
    let secret = SecretBytes::random(32).unwrap();
    let wrapped = in_clear.wrap(&binding, &secret).unwrap();
    assert!(provider.unwrap(&binding, &wrapped).unwrap().ct_eq(&secret));
}

#[test]
fn wrapping_key_that_is_none_or_another_is_the_hosts_own_fault() {
    let server = Server::start();
    let wrapping = Wrapping::new(&server);
    let provider = open(&wrapping.settings(&server));
    let key_id = provider.create_kek().unwrap();
    let file = &wrapping.key.file;
    let key = std::fs::read(file).unwrap();
    let refused = |reason, cause| assert_fails(wrap(&*provider, &key_id), reason, cause);
    write_key(file, &[7; 32]);
    refused(KeyReason::Invalid, "the key cannot be unwrapped");
    write_key(file, &key[..31]);
    refused(KeyReason::Invalid, "32 bytes");
    write_key(file, &[&key[..], b"\n"].concat());
    refused(KeyReason::Invalid, "32 bytes");
    std::fs::remove_file(file).unwrap();
    refused(KeyReason::Invalid, "cannot be read");
    write_key(file, &key);
    std::fs::set_permissions(file, PermissionsExt::from_mode(0o640)).unwrap();
    refused(KeyReason::Invalid, "chmod go-rwx");
    write_key(file, &key);
    wrap(&*provider, &key_id).unwrap();

    server.operator(&["destroy", &wrapping.key.id]);
    refused(KeyReason::Missing, "Wrapping key does not exist");
}

#[test]
fn conforms_over_ipv6() {
    let server = Server::start_with("::1", "server", &[]);
    conformance::run(&*provider(&server));
}

#[test]
fn every_version_is_spoken() {
    for version in ["1.1", "1.2", "1.3", "1.4", "2.0"] {
        let server = Server::start_with("127.0.0.1", "server", &[version]);
        let provider = provider(&server);
        provider.check().unwrap();
        let key_id = provider.create_kek().unwrap();
        assert_eq!(provider.state(&key_id).unwrap(), KeyState::Active);
        wrap(&*provider, &key_id).unwrap();

        let wrapping = open(&Settings {
            wrap: Wrap::Server,
            ..settings(&[server.address()])
        });
        match version {
            "1.4" | "2.0" => wrapping.check().unwrap(),
            _ => assert_fails(
                wrapping.create_kek(),
                KeyReason::Failed,
                "needs KMIP 1.4 or later",
            ),
        }
    }
    let server = Server::start_with("127.0.0.1", "server", &["1.0"]);
    assert_fails(
        provider(&server).create_kek(),
        KeyReason::Failed,
        "the server refuses Discover Versions",
    );
}

/// PyKMIP refuses attributes of clients' own.
#[test]
fn key_tells_whose_it_is_where_own_attributes_are_refused() {
    for version in ["1.4", "2.0"] {
        let server = Server::start_with("127.0.0.1", "server", &["1.4", version]);
        let key_id = provider(&server).create_kek().unwrap();
        let attributes = server.operator(&["attributes", &key_id.0]);
        assert!(attributes.contains("Name=sealblk-"), "{attributes}");
        assert!(
            attributes.contains("Application Specific Information="),
            "{attributes}"
        );
        assert!(attributes.contains("State=State.ACTIVE"), "{attributes}");
        assert!(attributes.contains("Sensitive=False"), "{attributes}");
    }
}

#[test]
fn key_that_wraps_on_the_server_is_sensitive_and_the_kek_is_not_there() {
    let server = Server::start();
    let provider = open(&Settings {
        wrap: Wrap::Server,
        ..settings(&[server.address()])
    });
    let key_id = provider.create_kek().unwrap();
    let (uid, _) = key_id.0.rsplit_once('.').unwrap();
    assert!(server.operator(&["attributes", uid]).contains("Sensitive=True"));
    assert_eq!(server.operator(&["locate"]), uid);
}

#[test]
fn checks_leave_one_key_on_the_server() {
    let server = Server::start();
    let provider = provider(&server);
    provider.check().unwrap();
    provider.check().unwrap();
    let keys = server.operator(&["locate"]);
    assert_eq!(keys.lines().count(), 1, "{keys}");
    // One that was put out of use is replaced.
    server.operator(&["deactivate", &keys]);
    provider.check().unwrap();
    assert_eq!(server.operator(&["locate"]).lines().count(), 2);
}

#[test]
fn key_that_is_not_active_is_told_with_its_state() {
    let server = Server::start();
    let provider = provider(&server);
    let deactivated = provider.create_kek().unwrap();
    let compromised = provider.create_kek().unwrap();
    server.operator(&["deactivate", &deactivated.0]);
    server.operator(&["compromise", &compromised.0]);
    let pre_active = KeyId(server.operator(&["create"]));
    for (key_id, state) in [
        (deactivated, KeyState::Deactivated),
        (compromised, KeyState::Compromised),
        (pre_active, KeyState::PreActive),
    ] {
        assert_eq!(provider.state(&key_id).unwrap(), state);
        assert_fails(
            wrap(&*provider, &key_id),
            KeyReason::NotActive,
            &format!("{state:?}"),
        );
    }
}

#[test]
fn key_put_out_of_use_on_the_server_unwraps_nothing_more() {
    let server = Server::start();
    let provider = open(&Settings {
        wrap: Wrap::Server,
        ..settings(&[server.address()])
    });
    let (deactivated, destroyed) = (provider.create_kek().unwrap(), provider.create_kek().unwrap());
    let by = |key_id: &KeyId| key_id.0.rsplit_once('.').unwrap().0.to_owned();
    server.operator(&["deactivate", &by(&deactivated)]);
    server.operator(&["destroy", &by(&destroyed)]);
    assert_fails(
        wrap(&*provider, &deactivated),
        KeyReason::NotActive,
        "Deactivated",
    );
    assert_fails(wrap(&*provider, &destroyed), KeyReason::Missing, "");
}

#[test]
fn destroyed_key_is_missing() {
    let server = Server::start();
    let provider = provider(&server);
    let key_id = provider.create_kek().unwrap();
    server.operator(&["destroy", &key_id.0]);
    assert_eq!(provider.state(&key_id).unwrap(), KeyState::Missing);
    assert_fails(
        wrap(&*provider, &key_id),
        KeyReason::Missing,
        "restore the key at the provider",
    );
}

#[test]
fn key_of_another_host_is_refused() {
    let server = Server::start();
    let key_id = provider(&server).create_kek().unwrap();
    let other = open(&Settings {
        certificate: certificates::directory().join("other.pem"),
        key: certificates::directory().join("other.key"),
        ..settings(&[server.address()])
    });
    assert_fails(wrap(&*other, &key_id), KeyReason::Refused, "Permission Denied");
}

#[test]
fn key_of_another_length_is_no_kek() {
    let server = Server::start();
    let key_id = KeyId(server.operator(&["register"]));
    assert_fails(
        wrap(&*provider(&server), &key_id),
        KeyReason::Garbled,
        "it has 128 bits",
    );
}

#[test]
fn certificates_that_are_wrong_are_not_trusted() {
    let server = Server::start();
    let stranger = Server::start_with("127.0.0.1", "stranger-server", &[]);
    let expired = Server::start_with("127.0.0.1", "expired-server", &[]);
    let future = Server::start_with("127.0.0.1", "future-server", &[]);
    let as_client = |name: &str| Settings {
        certificate: certificates::directory().join(format!("{name}.pem")),
        key: certificates::directory().join(format!("{name}.key")),
        ..settings(&[server.address()])
    };
    for (settings, cause) in [
        (settings(&[stranger.address()]), "was issued by \"CN=stranger\""),
        (settings(&[expired.address()]), "expired"),
        (settings(&[future.address()]), "is not valid before"),
        (as_client("stranger-client"), "does not know its issuer"),
        (as_client("expired-client"), "it has expired"),
        (as_client("future-client"), "it is not valid before"),
    ] {
        assert_fails(open(&settings).create_kek(), KeyReason::Untrusted, cause);
    }
    open(&as_client("client")).create_kek().unwrap();
}

#[test]
fn server_under_another_name_is_not_trusted() {
    let server = Server::start();
    let (_, port) = server
        .address()
        .rsplit_once(':')
        .map(|(host, port)| (host.to_owned(), port.to_owned()))
        .unwrap();
    open(&settings(&[format!("localhost:{port}")]))
        .create_kek()
        .unwrap();
    let renamed = settings(&[format!("127.0.0.2:{port}")]);
    // PyKMIP listens on 127.0.0.1 alone.
    let relay = TcpListener::bind(("127.0.0.2", port.parse().unwrap())).unwrap();
    let target = server.address();
    thread::spawn(move || {
        let (mut client, _) = relay.accept().unwrap();
        let mut server = TcpStream::connect(target).unwrap();
        let (mut from, mut to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
        thread::spawn(move || io::copy(&mut from, &mut to));
        let _ = io::copy(&mut server, &mut client);
    });
    assert_fails(
        open(&renamed).create_kek(),
        KeyReason::Untrusted,
        "but the settings name the server 127.0.0.2",
    );
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let server = Server::start();
    let good = settings(&[server.address()]);
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing");
    let other_key = certificates::directory().join("other.key");
    let open_key = dir.path().join("open.key");
    std::fs::copy(&good.key, &open_key).unwrap();
    std::fs::set_permissions(&open_key, PermissionsExt::from_mode(0o644)).unwrap();
    for (settings, file, cause) in [
        (
            Settings {
                ca: missing.clone(),
                ..good.clone()
            },
            &missing,
            "cannot be read",
        ),
        (
            Settings {
                certificate: good.key.clone(),
                ..good.clone()
            },
            &good.key,
            "no certificate",
        ),
        (
            Settings {
                key: other_key.clone(),
                ..good.clone()
            },
            &other_key,
            "it is not the key of the first certificate in ",
        ),
        (
            Settings {
                key: open_key.clone(),
                ..good.clone()
            },
            &open_key,
            "chmod go-rwx",
        ),
    ] {
        let error = open(&settings).create_kek().unwrap_err();
        assert_eq!(error.hop, file.display().to_string());
        assert_fails(Err::<(), _>(error), KeyReason::Invalid, cause);
    }
}

#[test]
fn renewed_certificate_needs_no_restart() {
    let server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    let install = |name: &str| {
        for end in ["pem", "key"] {
            std::fs::copy(
                certificates::directory().join(format!("{name}.{end}")),
                dir.path().join(end),
            )
            .unwrap();
        }
    };
    install("expired-client");
    let provider = open(&Settings {
        certificate: dir.path().join("pem"),
        key: dir.path().join("key"),
        ..settings(&[server.address()])
    });
    assert_fails(provider.create_kek(), KeyReason::Untrusted, "it has expired");
    install("client");
    provider.create_kek().unwrap();
}

#[test]
fn settings_of_the_wrong_form_are_refused_when_they_are_made() {
    let good = settings(&["kms1".into()]);
    let wrapping = |id: &str, file: &str| Settings {
        wrapping_key: Some(WrappingKey {
            id: id.into(),
            file: file.into(),
        }),
        ..good.clone()
    };
    for (settings, cause) in [
        (
            Settings {
                servers: vec![],
                ..good.clone()
            },
            "at least one",
        ),
        (
            Settings {
                servers: vec!["https://kms1".into()],
                ..good.clone()
            },
            "is not the address of a server",
        ),
        (
            Settings {
                ca: "ca.pem".into(),
                ..good.clone()
            },
            "absolute path",
        ),
        (
            Settings {
                timeout: 0,
                ..good.clone()
            },
            "timeout = 0",
        ),
        (
            Settings {
                timeout: 101,
                ..good.clone()
            },
            "timeout = 101",
        ),
        (wrapping("key 1", "/wrapping.key"), "is not a Unique Identifier"),
        (wrapping("1", "wrapping.key"), "absolute path"),
        (
            Settings {
                wrap: Wrap::Server,
                ..wrapping("1", "/wrapping.key")
            },
            "no key leaves the server",
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut registry = Registry::open(dir.path()).unwrap();
        match registry.add("kms", Source::Kmip(settings), true) {
            Err(RegistryError::Settings(error)) => {
                assert_fails(Err::<(), _>(error), KeyReason::Invalid, cause)
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(registry.list(), []);
    }
}

#[test]
fn second_server_answers_when_the_first_is_away() {
    let second = Server::start();
    let away = format!("127.0.0.1:{}", free_port("127.0.0.1"));
    let provider = open(&settings(&[away, second.address()]));
    let key_id = provider.create_kek().unwrap();
    wrap(&*provider, &key_id).unwrap();
}

#[test]
fn no_server_answers() {
    let away = || format!("127.0.0.1:{}", free_port("127.0.0.1"));
    let one = open(&settings(&[away()]));
    assert_fails(one.create_kek(), KeyReason::Unreachable, "Connection refused");
    let servers = [away(), away()];
    let error = open(&settings(&servers)).create_kek().unwrap_err();
    assert_eq!(error.hop, servers.join(", "));
    assert_fails(
        Err::<(), _>(error),
        KeyReason::Unreachable,
        &format!("; {}: ", servers[1]),
    );
    let nameless = open(&settings(&["kms.invalid".into()]));
    assert_fails(
        nameless.create_kek(),
        KeyReason::Unreachable,
        "its name is unknown",
    );
}

#[test]
fn what_another_server_says_tells_more_than_that_one_is_away() {
    let away = format!("127.0.0.1:{}", free_port("127.0.0.1"));
    let expired = Server::start_with("127.0.0.1", "expired-server", &[]);
    let provider = open(&settings(&[away, expired.address()]));
    assert_fails(provider.create_kek(), KeyReason::Untrusted, "expired");
}
