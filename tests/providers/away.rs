//! While a key server is away: KEKs that the agent keeps for a reboot, and KEKs that are pushed to it. With OpenBao, a way to it
//! that is cut, and a TPM.

use std::fs;
use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use sealblk::keys::RequestPurpose;
use sealblk::keys::{Binding, KeyError, KeyId, KeyProvider, KeyReason, Providers};
use sealblk::providers::{registry::Registry, registry::Source};
use sealblk_secmem::arena::SecretBytes;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::openbao::{Server, settings};
use crate::ports::free_port;
use common::agent::Agent;
use common::serve::{Server as DiskServer, serve_fails};
use common::swtpm::Swtpm;

/// The way to a server, which can be cut.
struct Way {
    port: u16,
    cut: Arc<AtomicBool>,
}

impl Way {
    fn to(server: u16) -> Self {
        let port = free_port("127.0.0.1");
        let cut = Arc::new(AtomicBool::new(false));
        let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
        let is_cut = Arc::clone(&cut);
        thread::spawn(move || {
            for caller in listener.incoming().flatten() {
                if is_cut.load(Ordering::Relaxed) {
                    continue;
                }
                let Ok(server) = TcpStream::connect(("127.0.0.1", server)) else {
                    continue;
                };
                let pass = |mut from: TcpStream, mut to: TcpStream| {
                    thread::spawn(move || {
                        let _ = io::copy(&mut from, &mut to);
                        let _ = to.shutdown(Shutdown::Both);
                    })
                };
                pass(caller.try_clone().unwrap(), server.try_clone().unwrap());
                pass(server, caller);
            }
        });
        Self { port, cut }
    }

    fn cut(&self, cut: bool) {
        self.cut.store(cut, Ordering::Relaxed);
    }
}

/// A host whose agent keeps KEKs for a reboot.
struct Host {
    server: Server,
    way: Way,
    agent: Agent,
    tpm: Swtpm,
    key_id: KeyId,
    wrapped: Vec<u8>,
    secret: SecretBytes,
}

impl Host {
    fn new(grace: &str) -> Self {
        let tpm = Swtpm::new();
        let cache = format!(
            "[agent.sealed-cache]\ngrace = {grace:?}\ntpm = {:?}\n",
            tpm.device()
        );
        Self::with(&cache, tpm)
    }

    fn with(config: &str, tpm: Swtpm) -> Self {
        let server = Server::start();
        let mut agent = Agent::new(config);
        let port = server.address().rsplit(':').next().unwrap().parse().unwrap();
        let way = Way::to(port);
        let address = format!("https://127.0.0.1:{}", way.port);
        let settings = settings(&[address], server.token());
        let mut registry = Registry::open(&agent.path("state")).unwrap();
        registry.add("bao", Source::Transit(settings), false).unwrap();
        agent.restart();
        let provider = agent.client(RequestPurpose::Create).provider("bao").unwrap();
        let key_id = provider.create_kek().unwrap();
        let secret = SecretBytes::random(32).unwrap();
        let wrapped = provider.wrap(&binding(&key_id), &secret).unwrap();
        Self {
            server,
            way,
            agent,
            tpm,
            key_id,
            wrapped,
            secret,
        }
    }

    /// As after a reboot: nothing is in the agent's memory.
    fn reboots(&mut self) {
        self.agent.restart();
    }

    fn provider(&self, purpose: RequestPurpose) -> Arc<dyn KeyProvider> {
        self.agent.client(purpose).provider("bao").unwrap()
    }

    /// Attaches, and gives the audit log's record of it.
    fn attaches(&self) -> Result<Value, KeyError> {
        let unwrapped = self
            .provider(RequestPurpose::Attach)
            .unwrap(&binding(&self.key_id), &self.wrapped)?;
        assert!(unwrapped.ct_eq(&self.secret));
        Ok(self.agent.audit().pop().unwrap())
    }

    /// A way that is cut: who listens there hangs up.
    #[track_caller]
    fn is_cut_off(&self) {
        assert_cut(&self.attaches().unwrap_err());
    }

    #[track_caller]
    fn cannot_attach(&self, reason: KeyReason) {
        assert_eq!(self.attaches().unwrap_err().reason, reason);
    }
}

#[track_caller]
fn assert_cut(error: &KeyError) {
    let away = matches!(error.reason, KeyReason::Unreachable | KeyReason::Garbled);
    assert!(away, "{error:?}");
}

fn binding(key_id: &KeyId) -> Binding<'_> {
    Binding {
        volume: Uuid::from_u128(7),
        provider: "bao",
        key_id,
        keyslot: 0,
    }
}

#[test]
fn after_a_reboot_without_the_server_disks_open_on_this_host_alone() {
    let mut host = Host::new("1h");
    assert_eq!(host.attaches().unwrap().get("grace"), None);
    host.way.cut(true);
    host.reboots();
    let record = host.attaches().unwrap();
    assert_eq!(record["event"], "KeyReleased");
    assert!(record["grace"].as_str().unwrap().ends_with('Z'), "{record}");
    let listed = common::volume::run(&mut host.agent.verb(&["list", "--keys", "--json"])).stdout;
    let listed: Value = serde_json::from_slice(&listed).unwrap();
    assert_eq!(listed["disks"][0]["grace"], record["grace"]);
    // Nothing new is bound to what only this host knows to be good.
    let create = host.provider(RequestPurpose::Create);
    let refused = create.wrap(&binding(&host.key_id), &host.secret).unwrap_err();
    assert_cut(&refused);
    assert_cut(&create.create_kek().unwrap_err());

    // The state directory on a host that has booted something else.
    host.tpm.extend(7);
    host.reboots();
    host.is_cut_off();
    // What was there is gone; the server is back, and what it gives is kept again.
    host.way.cut(false);
    assert_eq!(host.attaches().unwrap().get("grace"), None);
    host.way.cut(true);
    host.reboots();
    host.attaches().unwrap();

    // Without its TPM the agent goes on, and asks servers alone.
    host.tpm.stop();
    host.reboots();
    host.is_cut_off();
    host.way.cut(false);
    host.attaches().unwrap();
}

#[test]
fn a_key_that_its_server_has_taken_out_of_use_is_not_kept() {
    let mut host = Host::new("1h");
    host.attaches().unwrap();
    host.server.post("transit/keys/sealblk/rotate", json!({}));
    let config = "transit/keys/sealblk/config";
    host.server.post(config, json!({ "min_decryption_version": 2 }));
    host.reboots();
    host.cannot_attach(KeyReason::NotActive);
    host.server.post(config, json!({ "min_decryption_version": 1 }));
    host.way.cut(true);
    host.reboots();
    host.is_cut_off();

    // And one that was revoked on this host.
    host.way.cut(false);
    host.reboots();
    host.attaches().unwrap();
    let revoke = [
        "key",
        "revoke",
        &host.key_id.0,
        "--provider",
        "bao",
        "--force",
        "--confirm",
    ];
    common::volume::run(host.agent.verb(&revoke).arg(&host.key_id.0));
    host.way.cut(true);
    host.reboots();
    host.cannot_attach(KeyReason::NotActive);
    let kept = fs::read_dir(host.agent.path("state/sealed-keks")).unwrap();
    assert_eq!(kept.count(), 1, "the cache's own key");
}

#[test]
fn a_key_that_was_fetched_elsewhere_and_pushed_opens_volumes_and_binds_none() {
    let mut host = Host::new("1h");
    let ciphertext = host.key_id.0.strip_prefix("sealblk:").unwrap();
    let decrypted = host
        .server
        .post("transit/decrypt/sealblk", json!({ "ciphertext": ciphertext }));
    let kek = BASE64_STANDARD
        .decode(decrypted["data"]["plaintext"].as_str().unwrap())
        .unwrap();
    fs::remove_dir_all(host.agent.path("state/sealed-keks")).unwrap();
    host.way.cut(true);
    host.reboots();
    host.is_cut_off();
    let push = |file: &str| {
        let push = [
            "key",
            "push",
            &host.key_id.0,
            "--provider",
            "bao",
            "--key-file",
            file,
        ];
        host.agent.verb(&push).output().unwrap()
    };
    // A wrong key does no harm, and one that is none is refused.
    fs::write(host.agent.path("wrong"), [7; 32]).unwrap();
    assert!(push("wrong").status.success());
    host.is_cut_off();
    fs::write(host.agent.path("short"), [7; 31]).unwrap();
    assert_eq!(push("short").status.code(), Some(4));
    fs::write(host.agent.path("kek"), kek).unwrap();
    assert!(push("kek").status.success());
    assert_eq!(host.agent.audit().pop().unwrap()["event"], "KeyPushed");
    host.attaches().unwrap();
    let create = host.provider(RequestPurpose::Create);
    let refused = create.wrap(&binding(&host.key_id), &host.secret).unwrap_err();
    assert_cut(&refused);
    host.attaches().unwrap();
    host.reboots();
    host.is_cut_off();
}

/// A kill while the key server was away locked the disk: the agent dropped its KEK at once.
#[test]
fn a_disk_whose_server_was_killed_opens_again_without_its_key_server_and_no_other_disk_does() {
    // The KEK's own time is over long before the kill.
    let host = Host::with("kek-time-to-live = 1\nkek-grace = 600\n", Swtpm::new());
    let volume = || host.agent.volume_with(&["--provider", "bao"]);
    let [killed, detached] = [volume(), volume()];
    let serve = |volume| DiskServer::with(volume, &["--no-wait"]);
    let cannot_serve = |volume| {
        let ended = serve_fails(volume, &["--no-wait"]);
        assert!(ended.stderr.contains("bao"), "{}", ended.stderr);
    };
    let [mut first, second] = [&killed, &detached].map(serve);
    first.connect().still_serves();
    second.stop();
    thread::sleep(Duration::from_secs(3));
    host.way.cut(true);
    cannot_serve(&detached);
    for _ in 0..2 {
        first.process.signal(rustix::process::Signal::KILL);
        first.process.wait();
        // The agent sees the end within a second.
        thread::sleep(Duration::from_secs(2));
        let listed = common::volume::run(&mut host.agent.verb(&["list", "--keys", "--json"])).stdout;
        assert_eq!(
            serde_json::from_slice::<Value>(&listed).unwrap(),
            json!({ "disks": [] })
        );
        cannot_serve(&detached);
        first = serve(&killed);
        first.connect().still_serves();
        // The end of the killed one may be told of since.
        let mut audit = host.agent.audit();
        audit.retain(|record| record["event"] == "KeyReleased");
        assert_eq!(audit.pop().unwrap()["held"], true);
    }
    // Detached in order, it is as any other.
    first.stop();
    thread::sleep(Duration::from_secs(2));
    cannot_serve(&killed);

    // What the server says counts, once it answers.
    host.way.cut(false);
    let mut first = serve(&killed);
    thread::sleep(Duration::from_secs(3));
    host.server.post("transit/keys/sealblk/rotate", json!({}));
    let config = "transit/keys/sealblk/config";
    host.server.post(config, json!({ "min_decryption_version": 2 }));
    first.process.signal(rustix::process::Signal::KILL);
    first.process.wait();
    cannot_serve(&killed);
}

#[test]
fn grace_comes_to_an_end() {
    let mut host = Host::new("3s");
    host.attaches().unwrap();
    host.way.cut(true);
    host.reboots();
    host.attaches().unwrap();
    thread::sleep(Duration::from_secs(3));
    host.reboots();
    host.is_cut_off();
}
