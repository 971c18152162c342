//! What is said of key servers that are away, are others, refuse or lack the key: tests/mistakes/key-servers.txt.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use sealblk::providers::transit::Login;
use serde_json::json;

use crate::certificates;
use crate::openbao::Server;
use common::mistakes::Mistakes;

#[test]
fn mistakes_with_key_servers_are_told_word_for_word() {
    let mut m = Mistakes::of("key-servers");
    let certificates = certificates::directory();
    for name in [
        "ca.pem",
        "ca.key",
        "stranger.pem",
        "client.pem",
        "client.key",
        "other.key",
    ] {
        fs::copy(certificates.join(name), m.path(name)).unwrap();
    }
    m.write("token", "no-token-of-this-server");
    m.write("wrong-secret-id", "no-secret-id-of-this-server");
    for private in ["client.key", "token", "wrong-secret-id"] {
        fs::set_permissions(m.path(private), Permissions::from_mode(0o600)).unwrap();
    }
    m.write("open-token", "s.x");
    fs::set_permissions(m.path("open-token"), Permissions::from_mode(0o644)).unwrap();
    let add = |server: &str, key: &str, login: &str| {
        format!("sealblk provider add transit --address {server} --ca ca.pem --transit-key {key} {login}")
    };

    // Without a server.
    let nowhere = "https://127.0.0.1:1";
    m.mistake(&add("http://127.0.0.1:1", "sealblk", "--token-file token"));
    m.mistake(&add(nowhere, "sealblk", ""));
    m.mistake(&add(nowhere, "sealblk", "--token-file token"));
    m.mistake(&add(nowhere, "sealblk", "--token-file missing"));
    m.mistake(&add(nowhere, "sealblk", "--token-file open-token"));
    m.mistake(&add(nowhere, "sealblk", "--role-id node1"));
    m.mistake(&add(nowhere, "seal/blk", "--token-file token"));
    let kmip = "sealblk provider add kmip --certificate client.pem";
    m.mistake(&format!(
        "{kmip} --key client.key --ca ca.pem --server https://kms1"
    ));
    m.mistake(&format!(
        "{kmip} --key client.key --ca ca.pem --server 127.0.0.1:1"
    ));
    m.mistake(&format!(
        "{kmip} --key client.key --ca ca.pem --server kms.invalid"
    ));
    m.mistake(&format!(
        "{kmip} --key client.key --ca missing.pem --server 127.0.0.1:1"
    ));
    m.mistake(&format!(
        "{kmip} --key other.key --ca ca.pem --server 127.0.0.1:1"
    ));
    m.mistake(&format!(
        "{kmip} --key client.pem --ca ca.pem --server 127.0.0.1:1"
    ));
    m.mistake(&format!(
        "{kmip} --key client.key --ca client.key --server 127.0.0.1:1"
    ));

    let mut server = Server::start();
    let address = server.address();
    m.name(&address, "https://BAO");
    m.name(address.trim_start_matches("https://"), "BAO");
    let Login::Approle {
        role_id,
        secret_id_file,
        ..
    } = server.approle(3600)
    else {
        unreachable!()
    };
    m.name(&role_id, "ROLE-ID");
    fs::copy(secret_id_file, m.path("secret-id")).unwrap();
    let login = format!("--role-id {role_id} --secret-id-file secret-id");
    let strange = add(&address, "sealblk", &login).replace("--ca ca.pem", "--ca stranger.pem");
    m.mistake(&strange);
    m.mistake(&add(&address, "sealblk", "--token-file token"));
    m.mistake(&add(
        &address,
        "sealblk",
        "--role-id node1 --secret-id-file secret-id",
    ));
    m.mistake(&add(
        &address,
        "sealblk",
        &format!("--role-id {role_id} --secret-id-file wrong-secret-id"),
    ));
    m.mistake(&add(&address, "sealblk", &format!("{login} --mount elsewhere")));
    m.mistake(&add(&address, "nowhere", &login));
    server.set_policy("path \"transit/keys/sealblk\" { capabilities = [\"read\"] }");
    m.mistake(&add(&address, "sealblk", &format!("{login} --name other")));
    server.set_policy(crate::openbao::POLICY);
    m.does(&add(&address, "sealblk", &login));
    m.does("sealblk create vm.luks --size 1M");
    m.mistake("sealblk provider backup transit --to backup --passphrase-file token");

    let retire = |version: u32| {
        server.post("transit/keys/sealblk/rotate", json!({}));
        server.post(
            "transit/keys/sealblk/config",
            json!({ "min_decryption_version": version }),
        );
    };
    retire(2);
    m.mistake("sealblk rekey vm.luks");
    server.post("sys/seal", json!({}));
    m.mistake("sealblk serve --blk-file vm.luks --socket-path sock --no-wait");
    server.kill();
    m.mistake("sealblk provider list");
    m.mistake("sealblk create new.luks --size 1M");
    let expired = Server::start_with("expired-server");
    m.name(&expired.address(), "https://EXPIRED");
    m.name(expired.address().trim_start_matches("https://"), "EXPIRED");
    m.mistake(&add(
        &expired.address(),
        "sealblk",
        "--token-file token --name expired",
    ));
    m.check();
}
