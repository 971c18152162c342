//! The trusted provider, with swtpm and our broker. The messages of a host that is none of ours are those of kbs-types.

use std::error::Error;
use std::fs;
use std::io::{Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use base16ct::lower;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use kbs_types::{
    Attestation, Challenge, CompositeEvidence, ErrorInformation, Response, RuntimeData, Tee, TeePubKey,
};
use sealblk::kbs::jwe::OneTimeKey;
use sealblk::kbs::{self, Evidence};
use sealblk::keys::{Binding, KeyError, KeyId, KeyProvider, KeyReason, KeyState};
use sealblk::providers::{registry::Registry, registry::RegistryError, registry::Source};
use sealblk::tpm::attest::{AttestationKey, Quote, RsaPublic};
use sealblk::tpm::pcr::Selection;
use sealblk::tpm::{Device, Tpm};
use sealblk_secmem::arena::SecretBytes;
use serde_json::{Value, json};
use sha2::{Digest, Sha256, Sha384};
use uuid::Uuid;

use crate::broker::{Broker, Host, RESOURCE, nobody};
use crate::mock::{Mock, Stream};
use crate::{certificates, conformance};
use common::agent::Agent;
use common::serve::{Server, sealblk_path};
use common::swtpm::Swtpm;
use common::volume::{Volume, run};

fn binding(key_id: &KeyId) -> Binding<'_> {
    Binding {
        volume: Uuid::from_u128(1),
        provider: "trusted",
        key_id,
        keyslot: 0,
    }
}

fn unwrap(provider: &dyn KeyProvider, key_id: &KeyId, wrapped: &[u8]) -> Result<(), KeyError> {
    provider.unwrap(&binding(key_id), wrapped).map(drop)
}

/// Why no key is to be had, with what lies under that.
#[track_caller]
fn refusal(host: &Host) -> (KeyReason, String) {
    told(host.provider().check().unwrap_err())
}

fn told(error: KeyError) -> (KeyReason, String) {
    let mut causes = String::new();
    let mut cause = error.source();
    while let Some(error) = cause {
        causes += &format!("{error}; ");
        cause = error.source();
    }
    (error.reason, causes)
}

#[track_caller]
fn assert_refused(host: &Host, reason: KeyReason, words: &str) {
    let (found, causes) = refusal(host);
    assert!(found == reason && causes.contains(words), "{found:?}: {causes}");
}

#[track_caller]
fn assert_not_enrolled(done: Result<(), RegistryError>, words: &str) {
    let Err(RegistryError::Key(error)) = done else {
        panic!("{done:?}");
    };
    let (reason, causes) = told(error);
    assert!(
        reason == KeyReason::Refused && causes.contains(words),
        "{reason:?}: {causes}"
    );
}

#[test]
fn conforms() {
    let tpm = Swtpm::new();
    let broker = Broker::start(&tpm);
    let host = Host::enrolled(&tpm, &broker);
    conformance::run(&*host.provider());
    assert_eq!(broker.audit("HostEnrolled").len(), 1);
}

#[test]
fn a_storm_makes_one_attestation_and_without_hold_each_use_is_one() {
    let tpm = Swtpm::new();
    let broker = Broker::start(&tpm);
    let host = Host::enrolled(&tpm, &broker);
    let secret = SecretBytes::random(32).unwrap();
    let fresh = host.other(|settings| settings.hold = 0).provider();
    let made: Vec<_> = (0..3).map(|_| fresh.create_kek().unwrap()).collect();
    assert_eq!(broker.audit("ResourceReleased").len(), 3);
    assert_eq!(broker.audit("ResourceReleased")[2]["resource"], RESOURCE);
    let wrapped = fresh.wrap(&binding(&made[0]), &secret).unwrap();
    assert_eq!(broker.audit("ResourceReleased").len(), 4);
    // What one made the other opens.
    let provider = host.provider();
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| unwrap(&*provider, &made[0], &wrapped).unwrap());
        }
    });
    assert_eq!(broker.audit("ResourceReleased").len(), 5);
}

// Each key of a list cost an attestation.
#[test]
fn a_list_of_keys_makes_one_attestation() {
    let tpm = Swtpm::new();
    let broker = Broker::start(&tpm);
    let host = Host::enrolled(&tpm, &broker);
    let agent = Agent::new("");
    let source = Source::Trusted(host.settings.clone());
    let mut registry = Registry::open(&agent.path("state")).unwrap();
    registry.add("trusted", source, true).unwrap();
    let key = "providers/trusted/attestation.key";
    fs::copy(host.state.path().join(key), agent.path("state").join(key)).unwrap();
    for disk in ["one", "two", "three"] {
        run(&mut agent.verb(&["create", disk, "--size", "1M"]));
    }
    let list = ["key", "list", "--json"];
    let mut own = std::process::Command::new(sealblk_path());
    own.arg("--state-dir").arg(agent.path("state")).args(list);
    for mut list in [agent.verb(&list), own] {
        let before = broker.audit("ResourceReleased").len();
        let rows: Vec<Value> = serde_json::from_slice(&run(&mut list).stdout).unwrap();
        assert!(
            rows.len() == 3 && rows.iter().all(|row| row["state"] == "active"),
            "{rows:?}"
        );
        let released = broker.audit("ResourceReleased").len() - before;
        assert!(released <= 1, "{released}");
    }
}

/// A rekey takes the provider's word that it has the KEK, and removes the old way in: what was released before proves nothing.
#[test]
fn what_is_held_opens_volumes_and_proves_no_key() {
    let tpm = Swtpm::new();
    let broker = Broker::start(&tpm);
    let host = Host::enrolled(&tpm, &broker);
    let provider = host.provider();
    let key_id = provider.create_kek().unwrap();
    let secret = SecretBytes::random(32).unwrap();
    let wrapped = provider.wrap(&binding(&key_id), &secret).unwrap();
    assert_eq!(provider.state(&key_id).unwrap(), KeyState::Active);
    broker.does(&["resource", "remove", RESOURCE, "--confirm", RESOURCE]);
    unwrap(&*provider, &key_id, &wrapped).unwrap();
    assert_eq!(provider.state(&key_id).unwrap(), KeyState::Missing);
    assert_eq!(told(provider.create_kek().unwrap_err()).0, KeyReason::Missing);

    // Another one of the same name has not wrapped it.
    broker.does(&["resource", "add", RESOURCE]);
    assert_eq!(provider.state(&key_id).unwrap(), KeyState::Missing);
}

#[test]
fn a_register_that_differs_is_named_until_it_is_expected() {
    let tpm = Swtpm::new();
    let broker = Broker::start(&tpm);
    let host = Host::enrolled(&tpm, &broker);
    host.provider().check().unwrap();
    // One that does not count.
    tpm.extend(16);
    host.provider().check().unwrap();
    tpm.extend(7);
    assert_refused(&host, KeyReason::Attestation, "PCR 7 differs");
    let told = broker.audit("HostRefused");
    let message = told[0]["message"].as_str().unwrap();
    assert!(
        told[0]["host"] == "node1" && message.contains("PCR 7 differs"),
        "{told:?}"
    );
    broker.expect_state_of(&tpm);
    host.provider().check().unwrap();
}

#[test]
fn another_attestation_key_is_refused_also_one_of_the_same_tpm() {
    let tpm = Swtpm::new();
    let broker = Broker::start(&tpm);
    let host = Host::enrolled(&tpm, &broker);
    let stranger = Host::stranger(&tpm, &broker);
    assert_refused(
        &stranger,
        KeyReason::Refused,
        "no host is enrolled with this attestation key",
    );
    // The key of another TPM does not even load.
    let other = Swtpm::new();
    let moved = host.other(|settings| settings.tpm = Device::from(other.device()));
    let error = moved.provider().check().unwrap_err();
    assert_eq!(
        (error.reason, error.hop),
        (KeyReason::Attestation, other.device())
    );
    broker.does(&["host", "remove", "node1"]);
    assert_refused(
        &host,
        KeyReason::Refused,
        "no host is enrolled with this attestation key",
    );
}

#[test]
fn enrolment_takes_a_token_and_a_makers_tpm_or_a_named_one() {
    let tpm = Swtpm::new();
    let broker = Broker::start(&tpm);
    let host = Host::stranger(&tpm, &broker);
    let wrong = || SecretBytes::take(&mut [b'x'; 32]).unwrap();
    assert_not_enrolled(host.enrol(Some(&wrong())), "no host of this name");
    let token = broker.token("node1");
    assert_not_enrolled(host.enrol(None), "the token belongs to another host");
    assert_not_enrolled(host.enrol(Some(&wrong())), "the token belongs to another host");
    host.enrol(Some(&token)).unwrap();
    assert_not_enrolled(
        host.enrol(Some(&token)),
        "the token belongs to another host, was used",
    );
    host.provider().check().unwrap();

    // One of a maker that the broker does not know, until its endorsement key is named.
    let other = Swtpm::new();
    let foreign = Host::stranger(&other, &broker);
    let token = broker.token("node1");
    assert_not_enrolled(foreign.enrol(Some(&token)), "no trusted maker issued");
    let public = Tpm::open(&Device::from(other.device()))
        .unwrap()
        .endorsement_key()
        .unwrap()
        .public;
    let spki = RsaPublic::endorsement(&public).unwrap().spki();
    let digest = lower::encode_string(&Sha256::digest(&spki));
    broker.does(&[
        "host",
        "enrol",
        "node1",
        "--reference",
        "node",
        "--resource",
        RESOURCE,
        "--endorsement-key",
        &digest,
    ]);
    assert_not_enrolled(host.enrol(None), "differs from the one that the broker has");
    foreign.enrol(None).unwrap();
    foreign.provider().check().unwrap();
    assert_not_enrolled(foreign.enrol(None), "the token belongs to another host, was used");
}

/// A host by kbs-types.
struct Foreign<'a> {
    broker: &'a Broker,
    /// The attestation key's SubjectPublicKeyInfo.
    spki: Vec<u8>,
    quote: Quotes<'a>,
}

/// Has a TPM vouch for report data.
type Quotes<'a> = Box<dyn FnMut(&[u8]) -> Quote + 'a>;

impl<'a> Foreign<'a> {
    /// One with the attestation key of ours.
    fn new(broker: &'a Broker, tpm: &Swtpm, host: &Host) -> Self {
        let key = host.state.path().join("providers/trusted/attestation.key");
        let key: AttestationKey = serde_json::from_slice(&fs::read(key).unwrap()).unwrap();
        let mut tpm = Tpm::open(&Device::from(tpm.device())).unwrap();
        Self {
            broker,
            spki: RsaPublic::attestation(&key.public).unwrap().spki(),
            quote: Box::new(move |data| tpm.quote(&key, data, Selection::ALL).unwrap()),
        }
    }

    /// One that has nothing of ours: its keys, its certificate and its quotes are what tpm2-tools make of the TPM. It is
    /// enrolled as `node1`.
    fn by_tpm2_tools(broker: &'a Broker, tpm: &'a Swtpm) -> Self {
        let opened = Self::enrolling_by_tpm2_tools(broker, tpm);
        let file = |name: &str| fs::read(tpm.path(name)).unwrap();
        let (status, _, told) = broker.request("POST /sealblk/v0/activate", &opened.to_string());
        assert_eq!(status, 200, "{told}");
        let quote = move |data: &[u8]| {
            let all: Vec<_> = (0..24).map(|register: u8| register.to_string()).collect();
            let args = ["-c", "ak.ctx", "-g", "sha256", "-f", "plain", "-F", "values"];
            let wanted = [
                "-l",
                &format!("sha256:{}", all.join(",")),
                "-q",
                &lower::encode_string(data),
            ];
            let made = ["-m", "message", "-s", "signature", "-o", "registers"];
            tpm.tool("quote", &[&args[..], &wanted, &made].concat());
            let file = |name: &str| fs::read(tpm.path(name)).unwrap();
            let registers = file("registers");
            let (registers, rest) = registers.as_chunks();
            assert!(rest.is_empty());
            Quote {
                message: file("message"),
                signature: file("signature"),
                pcrs: registers.try_into().unwrap(),
            }
        };
        Self {
            broker,
            spki: file("ak.der"),
            quote: Box::new(quote),
        }
    }

    /// Begins to enrol as `node1`; what ends it is to be sent yet.
    fn enrolling_by_tpm2_tools(broker: &Broker, tpm: &Swtpm) -> Value {
        let mut enrol = Self::enrolment_by_tpm2_tools(tpm);
        let token = broker.token("node1");
        enrol["token"] = std::str::from_utf8(&token).unwrap().trim_end().into();
        Self::begun_by_tpm2_tools(broker, tpm, &enrol)
    }

    /// The request by which `node1` enrols, if its endorsement key was named.
    fn enrolment_by_tpm2_tools(tpm: &Swtpm) -> Value {
        let file = |name: &str| fs::read(tpm.path(name)).unwrap();
        let base64 = |bytes: &[u8]| BASE64_STANDARD.encode(bytes);
        tpm.tool("createek", &["-c", "ek.ctx", "-G", "rsa", "-u", "ek.pub"]);
        let ak = ["-C", "ek.ctx", "-c", "ak.ctx", "-u", "ak.pub"];
        tpm.tool(
            "createak",
            &[&ak[..], &["-G", "rsa", "-g", "sha256", "-s", "rsassa"]].concat(),
        );
        tpm.tool("readpublic", &["-c", "ak.ctx", "-f", "der", "-o", "ak.der"]);
        tpm.tool("nvread", &["0x1c00002", "-o", "ek.der"]);
        json!({
            "host": "node1",
            // They write TPM2B_PUBLIC.
            "endorsement-key": base64(&file("ek.pub")[2..]),
            "endorsement-certificate": base64(&file("ek.der")),
            "attestation-key": base64(&file("ak.pub")[2..]),
        })
    }

    /// Begins an enrolment, and opens its credential.
    fn begun_by_tpm2_tools(broker: &Broker, tpm: &Swtpm, enrol: &Value) -> Value {
        let (status, _, challenge) = broker.request("POST /sealblk/v0/enrol", &enrol.to_string());
        assert_eq!(status, 200, "{challenge}");
        let part = |name: &str| {
            let bytes = BASE64_STANDARD.decode(challenge[name].as_str().unwrap()).unwrap();
            [&(bytes.len() as u16).to_be_bytes()[..], &bytes].concat()
        };
        // Their magic number and version, then TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET.
        let credential = [
            &0xbadc_c0de_u32.to_be_bytes()[..],
            &1_u32.to_be_bytes(),
            &part("credential"),
            &part("secret"),
        ];
        fs::write(tpm.path("credential"), credential.concat()).unwrap();
        tpm.tool("startauthsession", &["--policy-session", "-S", "session"]);
        tpm.tool("policysecret", &["-S", "session", "-c", "e"]);
        let activate = ["-c", "ak.ctx", "-C", "ek.ctx", "-P", "session:session"];
        tpm.tool(
            "activatecredential",
            &[&activate[..], &["-i", "credential", "-o", "opened"]].concat(),
        );
        tpm.tool("flushcontext", &["session"]);
        let opened = fs::read(tpm.path("opened")).unwrap();
        json!({ "session": challenge["session"], "secret": BASE64_STANDARD.encode(opened) })
    }

    fn challenge(&self) -> (String, Challenge) {
        let request = kbs_types::Request {
            version: "0.4.0".to_owned(),
            tee: Tee::Tpm,
            extra_params: json!(""),
        };
        let body = serde_json::to_string(&request).unwrap();
        let (status, cookie, body) = self.broker.request("POST /kbs/v0/auth", &body);
        assert_eq!(status, 200);
        (cookie.unwrap(), serde_json::from_value(body).unwrap())
    }

    fn attestation(&mut self, nonce: &str, key: &OneTimeKey) -> Attestation {
        let tee_pubkey: TeePubKey =
            serde_json::from_value(serde_json::to_value(key.public()).unwrap()).unwrap();
        let runtime_data = RuntimeData {
            nonce: nonce.to_owned(),
            tee_pubkey,
        };
        // As Trustee canonicalises it: names in their order.
        let value: Value = serde_json::to_value(&runtime_data).unwrap();
        let of = |name: &str| value["tee-pubkey"][name].clone();
        let ordered = json!({
            "nonce": nonce,
            "tee-pubkey": { "alg": of("alg"), "crv": of("crv"), "kty": of("kty"), "x": of("x"), "y": of("y") },
        });
        let hash = Sha384::digest(ordered.to_string());
        let report_data = *hash.first_chunk::<32>().unwrap();
        let quote = (self.quote)(&report_data);
        let evidence = Evidence::new(&quote, &report_data, &self.spki);
        Attestation {
            init_data: None,
            runtime_data,
            tee_evidence: CompositeEvidence {
                primary_evidence: serde_json::to_value(evidence).unwrap(),
                additional_evidence: String::new(),
            },
        }
    }

    fn attest(&self, cookie: &str, attestation: &Attestation) -> Result<(), String> {
        let body = serde_json::to_string(attestation).unwrap();
        let head = format!("POST /kbs/v0/attest\nCookie: {cookie}");
        let (status, _, body) = self.broker.request(&head, &body);
        match status {
            200 => Ok(()),
            401 => Err(serde_json::from_value::<ErrorInformation>(body).unwrap().detail),
            status => panic!("{status}: {body}"),
        }
    }
}

#[test]
fn hosts_by_kbs_types_are_served_and_replays_are_refused() {
    let tpm = Swtpm::new();
    let broker = Broker::start(&tpm);
    let host = Host::enrolled(&tpm, &broker);
    let mut foreign = Foreign::new(&broker, &tpm, &host);

    let (cookie, challenge) = foreign.challenge();
    let key = OneTimeKey::new().unwrap();
    let attestation = foreign.attestation(&challenge.nonce, &key);
    foreign.attest(&cookie, &attestation).unwrap();
    let get = format!("GET /kbs/v0/resource/{RESOURCE}");
    let (status, _, body) = broker.request(&format!("{get}\nCookie: {cookie}"), "");
    assert_eq!(status, 200, "{body}");
    let response: Response = serde_json::from_value(body.clone()).unwrap();
    assert_eq!(
        (response.protected.alg.as_str(), response.protected.enc.as_str()),
        ("ECDH-ES+A256KW", "A256GCM")
    );
    let resource = key.open(&serde_json::from_value(body).unwrap()).unwrap();
    assert_eq!(resource.len(), 32);
    // One attestation is for one release.
    assert_eq!(broker.request(&format!("{get}\nCookie: {cookie}"), "").0, 401);

    // The same once more, in the same session and in a new one.
    let again = foreign.attest(&cookie, &attestation).unwrap_err();
    assert!(again.contains("the session is unknown, was used"), "{again}");
    let (cookie, _) = foreign.challenge();
    let again = foreign.attest(&cookie, &attestation).unwrap_err();
    assert!(again.contains("another session's nonce"), "{again}");
    // In a session that was never given out.
    let (made_up, challenge) = foreign.challenge();
    let made_up = made_up.replace("id=", "id=A");
    let attestation_of_none = foreign.attestation(&challenge.nonce, &OneTimeKey::new().unwrap());
    let told = foreign.attest(&made_up, &attestation_of_none).unwrap_err();
    assert!(told.contains("the session is unknown"), "{told}");
    // And the old quote under another one.
    let (cookie, challenge) = foreign.challenge();
    let mut replayed = attestation.clone();
    replayed.runtime_data.nonce = challenge.nonce;
    let again = foreign.attest(&cookie, &replayed).unwrap_err();
    assert!(again.contains("it is replayed"), "{again}");

    // Altered in each part that counts.
    let mut altered = |alter: &dyn Fn(&mut Value)| {
        let (cookie, challenge) = foreign.challenge();
        let mut attestation = foreign.attestation(&challenge.nonce, &OneTimeKey::new().unwrap());
        alter(&mut attestation.tee_evidence.primary_evidence);
        foreign.attest(&cookie, &attestation).unwrap_err()
    };
    let flip = |value: &mut Value| {
        let text = value.as_str().unwrap();
        let at = text.len() / 2;
        let other = if &text[at..=at] == "A" { "B" } else { "A" };
        *value = format!("{}{other}{}", &text[..at], &text[at + 1..]).into();
    };
    let told = altered(&|evidence| flip(&mut evidence["tpm_quote"]["message"]));
    assert!(
        told.contains("not signed by this host's attestation key"),
        "{told}"
    );
    let told = altered(&|evidence| flip(&mut evidence["tpm_quote"]["signature"]));
    assert!(
        told.contains("not signed by this host's attestation key"),
        "{told}"
    );
    let told = altered(&|evidence| evidence["tpm_quote"]["pcrs"][7] = "ab".repeat(32).into());
    assert!(
        told.contains("differ from those that the TPM has signed"),
        "{told}"
    );
    let told = altered(&|evidence| drop(evidence["tpm_quote"]["pcrs"].as_array_mut().unwrap().pop()));
    assert!(told.contains("24 registers"), "{told}");
}

/// What the broker asks of a TPM, and what it believes, are the standard's, and not only our own TPM commands'.
#[test]
fn a_host_with_keys_and_quotes_of_tpm2_tools_is_enrolled_and_served() {
    let tpm = Swtpm::new();
    let broker = Broker::start(&tpm);
    let mut foreign = Foreign::by_tpm2_tools(&broker, &tpm);
    let (cookie, challenge) = foreign.challenge();
    let key = OneTimeKey::new().unwrap();
    let attestation = foreign.attestation(&challenge.nonce, &key);
    foreign.attest(&cookie, &attestation).unwrap();
    let get = format!("GET /kbs/v0/resource/{RESOURCE}\nCookie: {cookie}");
    let (status, _, body) = broker.request(&get, "");
    assert_eq!(status, 200, "{body}");
    let resource = key.open(&serde_json::from_value(body).unwrap()).unwrap();
    assert_eq!(resource.len(), 32);

    tpm.extend(11);
    let (cookie, challenge) = foreign.challenge();
    let attestation = foreign.attestation(&challenge.nonce, &OneTimeKey::new().unwrap());
    let told = foreign.attest(&cookie, &attestation).unwrap_err();
    assert!(told.contains("PCR 11 differs"), "{told}");
}

/// One address gets no more connections than leave room for others.
#[test]
fn a_stranger_who_keeps_connections_open_keeps_no_other_address_out() {
    let tpm = Swtpm::new();
    let broker = Broker::start_on(&tpm, "0.0.0.0");
    let host = Host::enrolled(&tpm, &broker);
    let stranger = || {
        let connect = rustix::net::socket(
            rustix::net::AddressFamily::INET,
            rustix::net::SocketType::STREAM,
            None,
        )
        .unwrap();
        let from: std::net::SocketAddr = "127.0.0.2:0".parse().unwrap();
        rustix::net::bind(&connect, &from).unwrap();
        rustix::net::connect(&connect, &broker.socket()).unwrap();
        std::net::TcpStream::from(connect)
    };
    let silent: Vec<_> = (0..200).map(|_| stranger()).collect();
    let mut turned_away = 0;
    for mut stream in silent.iter() {
        stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        // Those that are answered wait for a greeting.
        turned_away += usize::from(matches!(stream.read(&mut [0]), Ok(0)));
    }
    assert!(turned_away >= 100, "{turned_away} of 200 are turned away");
    host.provider().check().unwrap();
}

#[test]
fn what_an_operator_changes_stands_in_the_log_of_a_broker_that_serves() {
    let tpm = Swtpm::new();
    let broker = Broker::start(&tpm);
    let host = Host::enrolled(&tpm, &broker);
    broker.does(&["resource", "add", "sealblk/kek/2"]);
    host.provider().check().unwrap();
    broker.does(&[
        "resource",
        "remove",
        "sealblk/kek/2",
        "--confirm",
        "sealblk/kek/2",
    ]);
    broker.does(&["host", "remove", "node1"]);
    assert_eq!(refusal(&host).0, KeyReason::Refused);
    // What was not done is not told of.
    let nobody = broker.verb(&["host", "remove", "node1"]).output().unwrap();
    assert!(!nobody.status.success());
    for (event, times) in [
        ("BrokerStarted", 1),
        ("ReferenceSet", 1),
        ("HostAdmitted", 1),
        ("HostEnrolled", 1),
        ("ResourceAdded", 2),
        ("ResourceRemoved", 1),
        ("HostRemoved", 1),
    ] {
        assert_eq!(broker.audit(event).len(), times, "{event}");
    }
    let [admitted] = &broker.audit("HostAdmitted")[..] else {
        unreachable!()
    };
    assert_eq!(
        (&admitted["host"], &admitted["reference"]),
        (&json!("node1"), &json!("node"))
    );
    assert_eq!(admitted["user"], json!(rustix::process::geteuid().as_raw()));
}

/// Those of Trustee's `kbs/docs/kbs_attestation_protocol.md`, with TEE and algorithms as ours are. What kbs-types has of them is read
/// by that as well.
#[test]
fn examples_of_the_protocols_document_are_read_and_written_again() {
    fn again<T: serde::Serialize + serde::de::DeserializeOwned>(example: &Value) -> Value {
        let read: T = serde_json::from_value(example.clone()).unwrap();
        serde_json::to_value(read).unwrap()
    }
    let request = json!({
        "version": "0.1.1",
        "tee": "tpm",
        "extra-params": {
            "tee-metadata": {
                "primary_tee": { "tee": "tpm", "metadata": {} },
                "additional_tees": [{ "tee": "$additional_tee", "metadata": {} }]
            }
        }
    });
    assert_eq!(again::<kbs::Request>(&request), request);
    assert_eq!(again::<kbs_types::Request>(&request), request);
    let challenge = json!({ "nonce": "$nonce", "extra-params": {} });
    assert_eq!(again::<kbs::Challenge>(&challenge), challenge);
    assert_eq!(again::<Challenge>(&challenge), challenge);
    let runtime_data = json!({
        "nonce": "$nonce",
        "tee-pubkey": {
            "kty": "EC",
            "crv": "$curve_name",
            "alg": "$key_algorithm",
            "x": "$x_coordinate",
            "y": "$y_coordinate"
        }
    });
    assert_eq!(again::<kbs::RuntimeData>(&runtime_data), runtime_data);
    assert_eq!(again::<RuntimeData>(&runtime_data), runtime_data);
    let token = json!({ "token": "<JWT_token_string>" });
    assert_eq!(again::<kbs::Token>(&token), token);
    let mut response = json!({
        "protected": "$jose_header",
        "encrypted_key": "$encrypted_key",
        "aad": "$aad",
        "iv": "$iv",
        "ciphertext": "$ciphertext",
        "tag": "$tag"
    });
    // What is authenticated beside the header is optional (RFC 7516, 7.2.2), and never ours.
    let ours = again::<kbs::jwe::Response>(&response);
    response.as_object_mut().unwrap().remove("aad");
    assert_eq!(ours, response);
    // The form of the evidence is each TEE's own.
    let attestation = json!({
        "init-data": { "format": "json", "body": "..." },
        "runtime-data": runtime_data,
        "tee-evidence": { "primary_evidence": {}, "additional_evidence": "{}" }
    });
    assert_eq!(again::<Attestation>(&attestation), attestation);
    assert!(serde_json::from_value::<kbs::Attestation>(attestation.clone()).is_err());
    let mut with_quote = attestation;
    with_quote["tee-evidence"]["primary_evidence"] = json!({
        "svn": "1",
        "report_data": "",
        "tpm_quote": { "signature": "", "message": "", "pcrs": [] },
        "ak_public": ""
    });
    assert_eq!(again::<kbs::Attestation>(&with_quote), with_quote);
}

#[test]
fn a_nonce_expires() {
    let tpm = Swtpm::new();
    let broker = Broker::with(&tpm, "server", 1);
    let host = Host::enrolled(&tpm, &broker);
    let mut foreign = Foreign::new(&broker, &tpm, &host);
    let (cookie, challenge) = foreign.challenge();
    let attestation = foreign.attestation(&challenge.nonce, &OneTimeKey::new().unwrap());
    thread::sleep(Duration::from_millis(1100));
    let late = foreign.attest(&cookie, &attestation).unwrap_err();
    assert!(late.contains("has expired"), "{late}");
}

#[test]
fn what_is_not_there_or_not_permitted_is_told_apart() {
    let tpm = Swtpm::new();
    let broker = Broker::start(&tpm);
    let host = Host::enrolled(&tpm, &broker);
    broker.does(&["resource", "add", "sealblk/kek/2"]);
    let other = host.other(|settings| settings.resource = "sealblk/kek/2".parse().unwrap());
    assert_refused(&other, KeyReason::Refused, "not allowed to have this resource");
    let key_id = host.provider().create_kek().unwrap();
    broker.does(&["resource", "remove", RESOURCE, "--confirm", RESOURCE]);
    assert_refused(&host, KeyReason::Missing, "resource does not exist");
    // One of the same path is another key.
    broker.does(&["resource", "add", RESOURCE]);
    let wrapped = vec![1; 64];
    let error = unwrap(&*host.provider(), &key_id, &wrapped).unwrap_err();
    assert_eq!(error.reason, KeyReason::Unauthentic);
}

#[test]
fn brokers_that_are_away_or_not_trusted() {
    let tpm = Swtpm::new();
    let mut broker = Broker::start(&tpm);
    let host = Host::enrolled(&tpm, &broker);
    let failover = host.other(|settings| settings.addresses.insert(0, nobody()));
    failover.provider().check().unwrap();
    let distrust = host.other(|settings| settings.ca = certificates::directory().join("stranger.pem"));
    assert_eq!(refusal(&distrust).0, KeyReason::Untrusted);
    let expired = Broker::with(&tpm, "expired-server", 60);
    let old = host.other(|settings| settings.addresses = vec![expired.address()]);
    assert_eq!(refusal(&old).0, KeyReason::Untrusted);
    broker.stop();
    assert_eq!(refusal(&host).0, KeyReason::Unreachable);
    broker.run();
    host.provider().check().unwrap();
}

/// An operator who reads the broker's name would look at the wrong machine.
#[test]
fn a_tpm_that_does_not_answer_is_where_it_fails() {
    let mut tpm = Swtpm::new();
    let broker = Broker::start(&tpm);
    let host = Host::enrolled(&tpm, &broker);
    tpm.stop();
    let error = host.provider().check().unwrap_err();
    assert_eq!((error.reason, error.hop), (KeyReason::Host, tpm.device()));
    tpm.start();
    host.provider().check().unwrap();
}

/// A host of a broker that is none of ours.
fn host_of(broker: &Mock, tpm: &Swtpm) -> Host {
    Host::with(sealblk::providers::trusted::Settings {
        addresses: vec![format!("https://{}", broker.address())],
        ca: certificates::directory().join("ca.pem"),
        resource: RESOURCE.parse().unwrap(),
        tpm: Device::from(tpm.device()),
        hold: 0,
        timeout: 20,
    })
}

/// What comes as a nonce goes back in the evidence.
#[test]
fn a_nonce_that_is_too_long_is_garbled() {
    let tpm = Swtpm::new();
    let broker = Mock::start(|stream: &mut Stream| {
        let _ = stream.read(&mut [0; 4096]);
        let body = format!("{{\"nonce\":\"{}\",\"extra-params\":\"\"}}", "n".repeat(30000));
        let head = "HTTP/1.1 200 OK\r\nSet-Cookie: kbs-session-id=a\r\nConnection: close";
        let _ = write!(stream, "{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    });
    let host = host_of(&broker, &tpm);
    let (reason, told) = refusal(&host);
    assert_eq!(reason, KeyReason::Garbled, "{told}");
}

/// Operators change their minds while hosts are on their way.
#[test]
fn what_was_begun_before_an_operator_changed_something_comes_to_nothing() {
    let tpm = Swtpm::new();
    let broker = Broker::start(&tpm);
    let host = Host::enrolled(&tpm, &broker);
    let mut foreign = Foreign::new(&broker, &tpm, &host);
    let get = format!("GET /kbs/v0/resource/{RESOURCE}");
    let mut attested = || {
        let (cookie, challenge) = foreign.challenge();
        let attestation = foreign.attestation(&challenge.nonce, &OneTimeKey::new().unwrap());
        foreign.attest(&cookie, &attestation).unwrap();
        cookie
    };
    let [expected, admitted] = [(); 2].map(|()| attested());
    let ask = |cookie: &str| broker.request(&format!("{get}\nCookie: {cookie}"), "");
    // Other registers are expected, since it was attested.
    let other = format!("7={}", "ab".repeat(32));
    broker.does(&["reference", "set", "node", "--pcr", &other]);
    let (status, _, told) = ask(&expected);
    assert!(
        status == 401 && told["detail"].as_str().unwrap().contains("changed"),
        "{told}"
    );
    // It has the TPM to itself.
    drop(foreign);
    broker.expect_state_of(&tpm);
    // It is to be another TPM, since it was attested, and since it began to enrol.
    let enrolling = Foreign::enrolling_by_tpm2_tools(&broker, &tpm);
    let key = "ab".repeat(32);
    let admit = [
        "host",
        "enrol",
        "node1",
        "--reference",
        "node",
        "--resource",
        RESOURCE,
    ];
    broker.does(&[&admit[..], &["--endorsement-key", &key]].concat());
    assert_eq!(ask(&admitted).0, 401);
    let (status, _, told) = broker.request("POST /sealblk/v0/activate", &enrolling.to_string());
    assert!(
        status == 403
            && told["detail"]
                .as_str()
                .unwrap()
                .contains("changed in the meantime"),
        "{told}"
    );
    let hosts = String::from_utf8(broker.does(&["host", "list"]).stdout).unwrap();
    assert!(hosts.contains(&key) && hosts.contains("no "), "{hosts}");
}

// A host had one enrolment at a time. A public endorsement key is no secret: whoever sent it under the host's name, before the
// host could answer, cancelled the host's own enrolment, as often as it was tried.
#[test]
fn who_has_a_hosts_public_endorsement_key_does_not_keep_it_from_enrolling() {
    let tpm = Swtpm::new();
    let broker = Broker::start(&tpm);
    let enrol = Foreign::enrolment_by_tpm2_tools(&tpm);
    let public = BASE64_STANDARD.decode(enrol["endorsement-key"].as_str().unwrap());
    let spki = RsaPublic::endorsement(&public.unwrap()).unwrap().spki();
    let named = ["--endorsement-key", &lower::encode_string(&Sha256::digest(&spki))];
    let admit = [
        "host",
        "enrol",
        "node1",
        "--reference",
        "node",
        "--resource",
        RESOURCE,
    ];
    broker.does(&[&admit[..], &named].concat());
    let opened = Foreign::begun_by_tpm2_tools(&broker, &tpm, &enrol);
    let strangers: Vec<_> = (0..3)
        .map(|_| broker.request("POST /sealblk/v0/enrol", &enrol.to_string()))
        .collect();
    let activate = |opened: &Value| broker.request("POST /sealblk/v0/activate", &opened.to_string());
    let (status, _, told) = activate(&opened);
    assert_eq!(status, 200, "{told}");
    // What was begun meanwhile comes to nothing, with the right secret or without.
    for (status, _, challenge) in strangers {
        assert_eq!(status, 200, "{challenge}");
        let guessed = json!({ "session": challenge["session"], "secret": opened["secret"] });
        assert_eq!(activate(&guessed).0, 403);
    }
    let (status, _, told) = activate(&opened);
    assert_eq!(status, 403, "{told}");
    assert_eq!(broker.audit("HostEnrolled").len(), 1);
}

/// The same command, put right, would find the file in its way.
#[test]
fn a_token_of_an_enrolment_that_is_refused_is_not_left_behind() {
    let tpm = Swtpm::new();
    let broker = Broker::start(&tpm);
    let token = broker.path("node2.token");
    for (reference, resource) in [("nobody", RESOURCE), ("node", "sealblk/kek/none")] {
        let file = token.display().to_string();
        let of = [
            "--reference",
            reference,
            "--resource",
            resource,
            "--token-file",
            &file,
        ];
        let refused = broker
            .verb(&[&["host", "enrol", "node2"], &of[..]].concat())
            .output()
            .unwrap();
        assert!(!refused.status.success());
        assert!(!token.exists());
    }
    broker.token("node2");
    assert!(token.exists());
}

/// Else it would count as the first, whatever is expected of the second.
#[test]
fn a_tpm_is_one_host() {
    let tpm = Swtpm::new();
    let broker = Broker::start(&tpm);
    let host = Host::enrolled(&tpm, &broker);
    let token = broker.token("node2");
    let enrol = || host.registry().enrol("trusted", "node2", Some(&token));
    assert_not_enrolled(enrol(), "is enrolled as another host");
    broker.does(&["host", "remove", "node1"]);
    enrol().unwrap();
    host.provider().check().unwrap();
}

#[test]
fn hostile_answers_are_garbled() {
    let tpm = Swtpm::new();
    let cases: [(&'static str, KeyReason); 8] = [
        ("", KeyReason::Garbled),
        ("SSH-2.0-OpenSSH_9.2\r\n", KeyReason::Garbled),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{\"nonce\"",
            KeyReason::Garbled,
        ),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
            KeyReason::Garbled,
        ),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n{\"nonce\":\"n\"}",
            KeyReason::Garbled,
        ),
        (
            "HTTP/1.1 200 OK\r\nSet-Cookie: a=b\r\nContent-Length: 62\r\n\r\n\
             {\"nonce\":\"n\",\"extra-params\":{\"selected-hash-algorithm\":\"md5\"}}",
            KeyReason::Garbled,
        ),
        (
            "HTTP/1.1 200 OK\r\nSet-Cookie: a=b\r\nContent-Length: 13\r\n\r\n{\"nonce\":\"n\"}",
            KeyReason::Garbled,
        ),
        (
            "HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n",
            KeyReason::Failed,
        ),
    ];
    for (answer, reason) in cases {
        let mock = Mock::start(move |stream: &mut Stream| {
            let _ = stream.read(&mut [0; 16 << 10]);
            let _ = stream.write_all(answer.as_bytes());
        });
        let host = host_of(&mock, &tpm);
        let (found, causes) = refusal(&host);
        assert_eq!(found, reason, "{answer:?}: {causes}");
    }
}

#[test]
fn a_disk_of_a_host_that_has_booted_something_else_is_locked_until_that_is_expected() {
    let tpm = Swtpm::new();
    let broker = Broker::start(&tpm);
    let host = Host::enrolled(&tpm, &broker);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let state = host.state.path().display().to_string();
    run(std::process::Command::new(sealblk_path())
        .args(["--state-dir", &state, "create", "--size", "64M"])
        .arg(&path));
    tpm.extend(11);
    let volume = Volume::at(dir, path, vec!["--state-dir".into(), state]);
    let control = volume.beside("control");
    let server = Server::of(volume, &["--control-socket", control.to_str().unwrap()]);
    let status = || -> Value {
        let mut command = std::process::Command::new(sealblk_path());
        let output = run(command
            .args(["status", "--json", "--control-socket"])
            .arg(&control));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let locked = status();
    assert_eq!(locked["state"], "locked");
    assert_eq!(locked["lock"]["reason"], "attestation");
    assert_eq!(locked["lock"]["hop"], broker.address());
    assert!(locked["lock"].to_string().contains("PCR 11 differs"), "{locked}");
    broker.expect_state_of(&tpm);
    let started = Instant::now();
    while status()["state"] != "open" {
        assert!(started.elapsed() < Duration::from_secs(60), "{}", status());
        thread::sleep(Duration::from_millis(50));
    }
    drop(server);
}
