//! KEKs that the agent keeps for a reboot: with OpenBao, a way to it that is cut, and a TPM.

use std::fs;
use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use sealblk::agent::Purpose;
use sealblk::keys::arena::SecretBytes;
use sealblk::keys::registry::{Registry, Source};
use sealblk::keys::{Binding, KeyError, KeyId, KeyProvider, KeyReason, Providers};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::common::agent::Agent;
use crate::common::swtpm::Swtpm;
use crate::openbao::{Server, settings};
use crate::ports::free_port;

/// What a way that is cut looks like: who listens there hangs up.
const CUT: KeyReason = KeyReason::Garbled;

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
        let (server, tpm) = (Server::start(), Swtpm::new());
        let cache = format!(
            "[agent.sealed-cache]\ngrace = {grace:?}\ntpm = {:?}\n",
            tpm.device()
        );
        let mut agent = Agent::new(&cache);
        let port = server.address().rsplit(':').next().unwrap().parse().unwrap();
        let way = Way::to(port);
        let address = format!("https://127.0.0.1:{}", way.port);
        let settings = settings(&[address], server.token());
        let mut registry = Registry::open(&agent.path("state")).unwrap();
        registry.add("bao", Source::Transit(settings), false).unwrap();
        agent.restart();
        let provider = agent.client(Purpose::Create).provider("bao").unwrap();
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

    fn provider(&self, purpose: Purpose) -> Arc<dyn KeyProvider> {
        self.agent.client(purpose).provider("bao").unwrap()
    }

    /// Attaches, and gives the audit log's record of it.
    fn attaches(&self) -> Result<Value, KeyError> {
        let unwrapped = self
            .provider(Purpose::Attach)
            .unwrap(&binding(&self.key_id), &self.wrapped)?;
        assert!(unwrapped.ct_eq(&self.secret));
        Ok(self.agent.audit().pop().unwrap())
    }

    #[track_caller]
    fn cannot_attach(&self, reason: KeyReason) {
        assert_eq!(self.attaches().unwrap_err().reason, reason);
    }
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
    let listed = crate::common::volume::run(&mut host.agent.verb(&["list", "--json"])).stdout;
    let listed: Value = serde_json::from_slice(&listed).unwrap();
    assert_eq!(listed["disks"][0]["grace"], record["grace"]);
    // Nothing new is bound to what only this host knows to be good.
    let create = host.provider(Purpose::Create);
    let refused = create.wrap(&binding(&host.key_id), &host.secret).unwrap_err();
    assert_eq!(refused.reason, CUT);
    assert_eq!(create.create_kek().unwrap_err().reason, CUT);

    // The state directory on a host that has booted something else.
    host.tpm.extend(7);
    host.reboots();
    host.cannot_attach(CUT);
    // What was there is gone; the server is back, and what it gives is kept again.
    host.way.cut(false);
    assert_eq!(host.attaches().unwrap().get("grace"), None);
    host.way.cut(true);
    host.reboots();
    host.attaches().unwrap();

    // Without its TPM the agent goes on, and asks servers alone.
    host.tpm.stop();
    host.reboots();
    host.cannot_attach(CUT);
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
    host.cannot_attach(CUT);

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
    crate::common::volume::run(host.agent.verb(&revoke).arg(&host.key_id.0));
    host.way.cut(true);
    host.reboots();
    host.cannot_attach(KeyReason::NotActive);
    let kept = fs::read_dir(host.agent.path("state/sealed-keks")).unwrap();
    assert_eq!(kept.count(), 1, "the cache's own key");
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
    host.cannot_attach(CUT);
}
