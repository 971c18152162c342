//! The transit provider, with OpenBao.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use sealblk::keys::{Binding, KeyError, KeyId, KeyProvider, KeyReason, KeyState, Providers};
use sealblk::providers::{registry::Registry, registry::Source};
use sealblk::providers::{transit::Login, transit::Settings};
use sealblk_secmem::arena::SecretBytes;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::openbao::{POLICY, Server, settings};
use crate::ports::free_port;
use crate::{certificates, conformance};

/// The provider with these settings, as a registry opens it.
fn provider(settings: &Settings) -> Arc<dyn KeyProvider> {
    let dir = tempfile::tempdir().unwrap();
    let mut registry = Registry::open(dir.path()).unwrap();
    registry
        .add("transit", Source::Transit(settings.clone()), true)
        .unwrap();
    Registry::open(dir.path()).unwrap().provider("transit").unwrap()
}

fn provider_of(server: &Server, login: Login) -> Arc<dyn KeyProvider> {
    provider(&settings(&[server.address()], login))
}

/// A KEK with something wrapped under it, which has to unwrap later.
struct Wrapped {
    key_id: KeyId,
    secret: SecretBytes,
    wrapped: Vec<u8>,
}

impl Wrapped {
    fn new(provider: &dyn KeyProvider) -> Self {
        let key_id = provider.create_kek().unwrap();
        let secret = SecretBytes::random(32).unwrap();
        let wrapped = provider.wrap(&binding(&key_id), &secret).unwrap();
        Self {
            key_id,
            secret,
            wrapped,
        }
    }

    fn unwrap(&self, provider: &dyn KeyProvider) -> Result<(), KeyError> {
        let secret = provider.unwrap(&binding(&self.key_id), &self.wrapped)?;
        assert!(secret.ct_eq(&self.secret));
        Ok(())
    }

    /// Why it does not unwrap.
    #[track_caller]
    fn refusal(&self, provider: &dyn KeyProvider) -> KeyReason {
        let error = self.unwrap(provider).unwrap_err();
        assert_eq!(error.key_id.as_ref(), Some(&self.key_id));
        error.reason
    }
}

fn binding(key_id: &KeyId) -> Binding<'_> {
    Binding {
        volume: Uuid::from_u128(1),
        provider: "transit",
        key_id,
        keyslot: 0,
    }
}

#[test]
fn conforms_by_approle() {
    let server = Server::start();
    conformance::run(&*provider_of(&server, server.approle(3600)));
}

#[test]
fn conforms_by_certificate() {
    let server = Server::start();
    conformance::run(&*provider_of(&server, server.certificate()));
}

#[test]
fn conforms_by_token() {
    let server = Server::start();
    conformance::run(&*provider_of(&server, server.token()));
}

#[test]
fn rotated_key_wraps_new_keks_and_unwraps_old_ones() {
    let server = Server::start();
    let provider = provider_of(&server, server.token());
    let old = Wrapped::new(&*provider);
    server.post("transit/keys/sealblk/rotate", json!({}));
    let new = Wrapped::new(&*provider);
    assert!(old.key_id.0.starts_with("sealblk:vault:v1:"), "{}", old.key_id);
    assert!(new.key_id.0.starts_with("sealblk:vault:v2:"), "{}", new.key_id);
    old.unwrap(&*provider).unwrap();
    new.unwrap(&*provider).unwrap();
}

#[test]
fn version_that_is_too_old_is_not_active() {
    let server = Server::start();
    let provider = provider_of(&server, server.token());
    let old = Wrapped::new(&*provider);
    server.post("transit/keys/sealblk/rotate", json!({}));
    let new = Wrapped::new(&*provider);
    server.post(
        "transit/keys/sealblk/config",
        json!({"min_decryption_version": 2}),
    );
    let deactivated = || {
        assert_eq!(old.refusal(&*provider), KeyReason::NotActive);
        assert_eq!(provider.state(&old.key_id).unwrap(), KeyState::Deactivated);
        new.unwrap(&*provider).unwrap();
        assert_eq!(provider.state(&new.key_id).unwrap(), KeyState::Active);
    };
    deactivated();
    // The same to a host that may not look at the key.
    server.set_policy(&POLICY.replace("\"read\"", "\"deny\""));
    deactivated();
    server.post(
        "transit/keys/sealblk/config",
        json!({"min_encryption_version": 2}),
    );
    server.post("transit/keys/sealblk/trim", json!({"min_available_version": 2}));
    server.set_policy(POLICY);
    assert_eq!(old.refusal(&*provider), KeyReason::NotActive);
    assert_eq!(provider.state(&old.key_id).unwrap(), KeyState::Destroyed);
}

#[test]
fn deleted_key_is_missing() {
    let server = Server::start();
    let provider = provider_of(&server, server.token());
    let wrapped = Wrapped::new(&*provider);
    let delete = || {
        server.post("transit/keys/sealblk/config", json!({"deletion_allowed": true}));
        server.request("DELETE", "transit/keys/sealblk", Value::Null);
    };
    delete();
    assert_eq!(wrapped.refusal(&*provider), KeyReason::Missing);
    assert_eq!(provider.state(&wrapped.key_id).unwrap(), KeyState::Missing);
    assert_eq!(provider.create_kek().unwrap_err().reason, KeyReason::Missing);
    // One of the same name is another key.
    server.post("transit/keys/sealblk", json!({}));
    assert_eq!(wrapped.refusal(&*provider), KeyReason::Unauthentic);
}

#[test]
fn soft_deleted_key_is_not_active() {
    let server = Server::start();
    let provider = provider_of(&server, server.token());
    let wrapped = Wrapped::new(&*provider);
    server.request("DELETE", "transit/keys/sealblk/soft-delete", Value::Null);
    assert_eq!(wrapped.refusal(&*provider), KeyReason::NotActive);
    assert_eq!(provider.state(&wrapped.key_id).unwrap(), KeyState::Deactivated);
    server.post("transit/keys/sealblk/soft-delete-restore", json!({}));
    wrapped.unwrap(&*provider).unwrap();
}

#[test]
fn altered_or_foreign_key_ids_open_nothing() {
    let server = Server::start();
    server.post("transit/keys/other", json!({}));
    server.set_policy(&POLICY.replace("sealblk", "+"));
    let provider = provider_of(&server, server.token());
    let wrapped = Wrapped::new(&*provider);
    let refusal = |key_id: String| {
        let key_id = KeyId(key_id);
        let secret = SecretBytes::random(32).unwrap();
        provider.wrap(&binding(&key_id), &secret).unwrap_err().reason
    };
    let key_id = &wrapped.key_id.0;
    assert_eq!(refusal(key_id.replace(":v1:", ":v7:")), KeyReason::Missing);
    assert_eq!(refusal(key_id.replace("sealblk", "other")), KeyReason::Missing);
    assert_eq!(refusal("sealblk:vault:v1:AAAA".into()), KeyReason::Unauthentic);
    let (head, base64) = key_id.rsplit_once(':').unwrap();
    let flipped = match base64.as_bytes()[0] {
        b'A' => "B",
        _ => "A",
    };
    assert_eq!(
        refusal(format!("{head}:{flipped}{}", &base64[1..])),
        KeyReason::Unauthentic
    );
}

#[test]
fn policy_decides() {
    let server = Server::start();
    let provider = provider_of(&server, server.approle(3600));
    let wrapped = Wrapped::new(&*provider);
    server.set_policy(&POLICY.replace("transit/decrypt", "transit/encrypt"));
    assert_eq!(wrapped.refusal(&*provider), KeyReason::Refused);
    provider.create_kek().unwrap();
    server.set_policy(POLICY);
    wrapped.unwrap(&*provider).unwrap();
}

#[test]
fn login_that_fails_is_refused() {
    let server = Server::start();
    let refusal = |login| provider_of(&server, login).create_kek().unwrap_err().reason;
    let Login::Approle {
        role_id,
        secret_id_file,
        mount,
    } = server.approle(3600)
    else {
        unreachable!()
    };
    let with = |role_id: &str, file: &str, mount: &str| Login::Approle {
        role_id: role_id.into(),
        secret_id_file: server.private("changed-secret-id", file),
        mount: mount.into(),
    };
    let secret_id = fs::read_to_string(&secret_id_file).unwrap();
    let secret_id = secret_id.trim();
    provider_of(&server, with(&role_id, secret_id, &mount))
        .create_kek()
        .unwrap();
    assert_eq!(refusal(with("nobody", secret_id, &mount)), KeyReason::Refused);
    assert_eq!(refusal(with(&role_id, "nothing", &mount)), KeyReason::Refused);
    assert_eq!(
        refusal(with(&role_id, secret_id, "elsewhere")),
        KeyReason::Refused
    );

    let Login::Cert { mount, .. } = server.certificate() else {
        unreachable!()
    };
    for (name, reason) in [
        ("other", KeyReason::Refused),
        ("stranger-client", KeyReason::Refused),
        ("expired-client", KeyReason::Untrusted),
        ("future-client", KeyReason::Untrusted),
    ] {
        let dir = certificates::directory();
        let login = Login::Cert {
            certificate: dir.join(format!("{name}.pem")),
            key: dir.join(format!("{name}.key")),
            mount: mount.clone(),
        };
        assert_eq!(refusal(login), reason, "{name}");
    }

    let token_file = server.private("token", "s.nobodys");
    assert_eq!(refusal(Login::Token { token_file }), KeyReason::Refused);
}

#[test]
fn expired_token_is_replaced_by_a_new_login() {
    let server = Server::start();
    let provider = provider_of(&server, server.approle(2));
    let wrapped = Wrapped::new(&*provider);
    std::thread::sleep(Duration::from_secs(3));
    wrapped.unwrap(&*provider).unwrap();
}

#[test]
fn revoked_token_is_replaced_by_a_new_login() {
    let server = Server::start();
    let provider = provider_of(&server, server.approle(3600));
    let wrapped = Wrapped::new(&*provider);
    server.post("sys/leases/revoke-prefix/auth/approle/login", json!({}));
    wrapped.unwrap(&*provider).unwrap();
}

#[test]
fn token_file_is_read_again_when_the_token_is_refused() {
    let server = Server::start();
    let provider = provider_of(&server, server.token());
    let wrapped = Wrapped::new(&*provider);
    server.post("auth/token/revoke", json!({"token": token_in(&server.token())}));
    wrapped.unwrap(&*provider).unwrap();
    let login = server.token();
    wrapped.unwrap(&*provider).unwrap();
    server.post("auth/token/revoke", json!({"token": token_in(&login)}));
    // The first provider still has the token of its own login; a new one reads the revoked one.
    assert_eq!(wrapped.refusal(&*provider_of(&server, login)), KeyReason::Refused);
}

fn token_in(login: &Login) -> String {
    let Login::Token { token_file } = login else {
        unreachable!()
    };
    fs::read_to_string(token_file).unwrap().trim().to_owned()
}

#[test]
fn sealed_server_fails_until_it_is_unsealed() {
    let server = Server::start();
    let provider = provider_of(&server, server.approle(3600));
    let wrapped = Wrapped::new(&*provider);
    server.request("PUT", "sys/seal", Value::Null);
    assert_eq!(wrapped.refusal(&*provider), KeyReason::Failed);
    assert_eq!(
        provider.state(&wrapped.key_id).unwrap_err().reason,
        KeyReason::Failed
    );
    server.unseal();
    wrapped.unwrap(&*provider).unwrap();
}

#[test]
fn server_that_is_down_is_passed_over() {
    let mut server = Server::start();
    let nobody = format!("https://127.0.0.1:{}", free_port("127.0.0.1"));
    let login = server.token();
    let several = provider(&settings(&[nobody, server.address()], login.clone()));
    let wrapped = Wrapped::new(&*several);
    server.kill();
    assert_eq!(wrapped.refusal(&*several), KeyReason::Unreachable);
    let error = wrapped.unwrap(&*several).unwrap_err();
    assert_eq!(error.hop, server.address());
    let unknown = provider(&settings(&["https://nowhere.invalid:8200".into()], login));
    assert_eq!(unknown.create_kek().unwrap_err().reason, KeyReason::Unreachable);
}

#[test]
fn sealed_server_is_passed_over_and_a_refusal_is_not() {
    let (one, two) = (Server::start(), Server::start());
    let login = two.token();
    let both = provider(&settings(&[one.address(), two.address()], login));
    // The token is the second one's: the first one knows the host and refuses.
    let error = both.create_kek().unwrap_err();
    assert_eq!((error.reason, error.hop), (KeyReason::Refused, one.address()));
    one.request("PUT", "sys/seal", Value::Null);
    both.check().unwrap();
}

#[test]
fn certificates_that_cannot_be_trusted_are_not() {
    let reason = |certificate, ca: &str| {
        let server = Server::start_with(certificate);
        let settings = Settings {
            ca: certificates::directory().join(ca),
            ..settings(&[server.address()], server.token())
        };
        provider(&settings).create_kek().map_err(|e| e.reason)
    };
    reason("server", "ca.pem").unwrap();
    assert_eq!(reason("server", "stranger.pem"), Err(KeyReason::Untrusted));
    assert_eq!(reason("stranger-server", "ca.pem"), Err(KeyReason::Untrusted));
    assert_eq!(reason("expired-server", "ca.pem"), Err(KeyReason::Untrusted));
    assert_eq!(reason("future-server", "ca.pem"), Err(KeyReason::Untrusted));
    // A host's certificate is for nobody's server.
    assert_eq!(reason("client", "ca.pem"), Err(KeyReason::Untrusted));
}

#[test]
fn namespace_and_mounts_are_where_the_settings_say() {
    let server = Server::start();
    server.post("sys/namespaces/team", json!({}));
    server.post("team//sys/mounts/keys/disks", json!({"type": "transit"}));
    server.post("team//keys/disks/keys/sealblk", json!({}));
    server.post(
        "team//sys/policies/acl/sealblk",
        json!({"policy": POLICY.replace("transit/", "keys/disks/")}),
    );
    server.post("team//sys/auth/hosts", json!({"type": "approle"}));
    server.post("team//auth/hosts/role/host", json!({"token_policies": "sealblk"}));
    let role = server.request("GET", "team//auth/hosts/role/host/role-id", Value::Null);
    let secret = server.post("team//auth/hosts/role/host/secret-id", json!({}));
    let login = Login::Approle {
        role_id: role["data"]["role_id"].as_str().unwrap().into(),
        secret_id_file: server.private("secret-id", secret["data"]["secret_id"].as_str().unwrap()),
        mount: "hosts".into(),
    };
    let inside = Settings {
        namespace: Some("team".into()),
        mount: "keys/disks".into(),
        ..settings(&[server.address()], login)
    };
    provider(&inside).check().unwrap();
    let outside = Settings {
        namespace: None,
        ..inside
    };
    assert_eq!(provider(&outside).check().unwrap_err().reason, KeyReason::Refused);
}

#[test]
fn settings_that_cannot_be_are_refused_before_a_server_is_asked() {
    let token_file = PathBuf::from("/nowhere/token");
    let good = settings(&["https://[::1]:8200".into()], Login::Token { token_file });
    let add = |settings: Settings| {
        let dir = tempfile::tempdir().unwrap();
        let mut registry = Registry::open(dir.path()).unwrap();
        registry.add("transit", Source::Transit(settings), true)
    };
    add(good.clone()).unwrap();
    let mut bad = Vec::new();
    for address in [
        "http://bao1:8200",
        "bao1:8200",
        "https://",
        "https://bao1:8200/",
        "https://bao1:8200/v1",
        "https://bao1:8200?a",
        "https://bao1:8200#a",
        "https://user@bao1:8200",
        "https://bao1:99999",
        "https://bao1:",
        "https://bao 1:8200",
        "https://bao1\r\nx:8200",
    ] {
        let addresses = vec![address.into()];
        bad.push((
            address,
            Settings {
                addresses,
                ..good.clone()
            },
        ));
    }
    for path in [
        "", "/", "a/", "/a", "a//b", "..", "a/../b", "a b", "a?b", "a%2fb", "ä", "a\r\nb",
    ] {
        bad.push((
            path,
            Settings {
                mount: path.into(),
                ..good.clone()
            },
        ));
        bad.push((
            path,
            Settings {
                namespace: Some(path.into()),
                ..good.clone()
            },
        ));
        bad.push((
            path,
            Settings {
                transit_key: path.into(),
                ..good.clone()
            },
        ));
    }
    bad.push((
        "no address",
        Settings {
            addresses: vec![],
            ..good.clone()
        },
    ));
    bad.push((
        "relative CA",
        Settings {
            ca: "ca.pem".into(),
            ..good.clone()
        },
    ));
    let token_file = "token".into();
    bad.push((
        "relative token",
        Settings {
            login: Login::Token { token_file },
            ..good.clone()
        },
    ));
    for timeout in [0, 101] {
        bad.push((
            "no time, or more than a client waits",
            Settings {
                timeout,
                ..good.clone()
            },
        ));
    }
    for (what, settings) in bad {
        assert!(add(settings).is_err(), "{what:?}");
    }
}

#[test]
fn files_that_cannot_be_used_are_the_hosts_own_fault() {
    let server = Server::start();
    let reason = |settings: Settings| provider(&settings).create_kek().unwrap_err().reason;
    let token = |line: &str| Login::Token {
        token_file: server.private("token", line),
    };
    let good = settings(&[server.address()], server.token());
    let exposed = server.private("exposed", "s.token");
    fs::set_permissions(&exposed, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let missing = PathBuf::from("/nowhere/token");
    for login in [
        Login::Token { token_file: exposed },
        Login::Token {
            token_file: missing.clone(),
        },
        token(""),
        token("two\nlines"),
        token("two words"),
        token(&"t".repeat(5000)),
    ] {
        assert_eq!(
            reason(Settings {
                login,
                ..good.clone()
            }),
            KeyReason::Invalid
        );
    }
    assert_eq!(
        reason(Settings {
            ca: missing,
            ..good.clone()
        }),
        KeyReason::Invalid
    );
    // A certificate, and the key of another one.
    let dir = certificates::directory();
    let login = Login::Cert {
        certificate: dir.join("client.pem"),
        key: dir.join("other.key"),
        mount: "cert".into(),
    };
    assert_eq!(reason(Settings { login, ..good }), KeyReason::Invalid);
}

#[test]
fn volume_moves_to_the_new_version_of_a_rotated_key() {
    let server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    let (disk, left_out) = (dir.path().join("vm.luks"), dir.path().join("left-out.luks"));
    let run = |verb: &[&str], operands: &[&str]| {
        Command::new(common::serve::sealblk_path())
            .args(verb)
            .arg("--state-dir")
            .arg(dir.path().join("state"))
            .env("SEALBLK_CONFIG", server.private("config.toml", ""))
            .args(operands)
            .output()
            .unwrap()
    };
    let sealblk = |verb: &[&str], operands: &[&str]| {
        let done = run(verb, operands);
        let stderr = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{verb:?}: {stderr}");
        String::from_utf8(done.stdout).unwrap()
    };
    let Login::Approle {
        role_id,
        secret_id_file,
        ..
    } = server.approle(3600)
    else {
        unreachable!()
    };
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let ca = text(&certificates::directory().join("ca.pem"));
    let address = server.address();
    let (secret_id_file, disk, left_out) = (text(&secret_id_file), text(&disk), text(&left_out));
    let mut options = vec!["--address", &address, "--ca", &ca, "--transit-key", "sealblk"];
    options.extend(["--role-id", &role_id, "--secret-id-file", &secret_id_file]);
    sealblk(&["provider", "add", "transit"], &options);
    let list = sealblk(&["provider", "list"], &[]);
    assert!(list.contains("usable") && list.contains(&address), "{list}");

    // What does not work is not added.
    let mut wrong = options.clone();
    wrong[5] = "nowhere";
    wrong.extend(["--name", "wrong"]);
    let refused = run(&["provider", "add", "transit"], &wrong);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(4), "{said}");
    assert!(
        said.contains("was not added") && said.contains("--no-check"),
        "{said}"
    );
    assert_eq!(sealblk(&["provider", "list"], &[]), list);

    for disk in [&disk, &left_out] {
        sealblk(&["create"], &["--size=32M", disk]);
    }
    let info = || sealblk(&["info"], &[&disk]);
    assert!(info().contains("sealblk:vault:v1:"), "{}", info());
    server.post("transit/keys/sealblk/rotate", json!({}));
    sealblk(&["rekey"], &[&disk]);
    assert!(info().contains("sealblk:vault:v2:"), "{}", info());
    server.post(
        "transit/keys/sealblk/config",
        json!({"min_decryption_version": 2}),
    );
    // It has to open for that.
    sealblk(&["rekey"], &[&disk]);
    let refused = run(&["rekey"], &[&left_out]);
    let stderr = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success(), "{stderr}");
    assert!(
        stderr.contains("the key is not active") && stderr.contains("too old"),
        "{stderr}"
    );
    // Until the version may be used again.
    server.post(
        "transit/keys/sealblk/config",
        json!({"min_decryption_version": 1}),
    );
    sealblk(&["rekey"], &[&left_out]);
    assert!(sealblk(&["info"], &[&left_out]).contains("sealblk:vault:v2:"));
}

#[test]
fn ways_to_log_in_exclude_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let add = |login: &[&str]| {
        Command::new(common::serve::sealblk_path())
            .args(["provider", "add", "transit", "--state-dir"])
            .arg(dir.path().join("state"))
            .args(["--address=https://bao1", "--ca=ca.pem", "--transit-key=sealblk"])
            .args(login)
            .output()
            .unwrap()
            .status
            .code()
    };
    for login in [
        &[][..],
        &["--role-id=a"],
        &["--secret-id-file=a"],
        &["--certificate=a"],
        &["--key=a"],
        &["--token-file=a", "--role-id=a", "--secret-id-file=a"],
        &["--token-file=a", "--certificate=a", "--key=a"],
        &["--token-file=a", "--secret-id-file=a"],
        &["--token-file=a", "--login-mount=a"],
    ] {
        assert_eq!(add(login), Some(2), "{login:?}");
    }
    assert_eq!(add(&["--token-file=a", "--no-check"]), Some(0));
}
