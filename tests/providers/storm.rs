//! Many disks attached at once, as after a reboot of their host: what that costs the key server and the agent.
//!
//! `ATTACHES` asks for more than the few that there is time for; the figures are printed.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use sealblk::keys::RequestPurpose;
use sealblk::keys::{Binding, KeyId, KeyProvider, Providers};
use sealblk::providers::{registry::Registry, registry::Source};
use sealblk_secmem::arena::SecretBytes;
use uuid::Uuid;

use crate::{openbao, pykmip};
use common::agent::Agent;

#[test]
fn openbao_is_asked_once_for_each_kek() {
    let server = openbao::Server::start();
    let settings = openbao::settings(&[server.address()], server.approle(3600));
    // The login is another request.
    let requests = || server.logged("request_path=/v1/transit/decrypt/sealblk");
    storms("OpenBao", Source::Transit(settings), requests);
}

#[test]
fn pykmip_is_asked_once_for_each_kek() {
    let server = pykmip::Server::start();
    let settings = pykmip::settings(&[server.address()]);
    let requests = || server.logged("Processing operation: Get\n");
    storms("PyKMIP", Source::Kmip(settings), requests);
}

/// All disks under one KEK, then each under one of its own. `requests` counts those that have fetched a KEK so far.
fn storms(server: &str, source: Source, requests: impl Fn() -> usize) {
    let attaches = std::env::var("ATTACHES").map_or(40, |attaches| attaches.parse().unwrap());
    let mut agent = Agent::new("");
    let mut registry = Registry::open(&agent.path("state")).unwrap();
    registry.add("kms", source, false).unwrap();
    for keks in [1, attaches] {
        agent.restart();
        let provider = agent.client(RequestPurpose::Create).provider("kms").unwrap();
        let disks: Vec<_> = (0..keks).map(|n| Disk::new(n, &*provider)).collect();
        // Nothing is in the agent's memory.
        agent.restart();
        let (memory, made, started) = (agent.memory_kib(), requests(), Instant::now());
        thread::scope(|scope| {
            for n in 0..attaches {
                let (agent, disk) = (&agent, &disks[n % keks]);
                scope.spawn(move || {
                    disk.attach(&agent.client(RequestPurpose::Attach).provider("kms").unwrap())
                });
            }
        });
        let (took, after) = (started.elapsed(), agent.memory_kib());
        // A server may log a request after it has answered it.
        thread::sleep(Duration::from_millis(500));
        let made = requests() - made;
        println!(
            "{server}: {attaches} attaches under {keks} KEKs: {made} requests, {:.1} s to the last, agent {memory} KiB before, \
             {after} KiB after",
            took.as_secs_f64()
        );
        assert_eq!(made, keks);
        assert!(
            after < memory + 64 * 1024,
            "{memory} KiB before, {after} KiB after"
        );
    }
}

/// What of a disk the agent knows.
struct Disk {
    volume: Uuid,
    key_id: KeyId,
    secret: SecretBytes,
    wrapped: Vec<u8>,
}

impl Disk {
    fn new(n: usize, provider: &dyn KeyProvider) -> Self {
        let (volume, key_id) = (Uuid::from_u128(n as u128), provider.create_kek().unwrap());
        let secret = SecretBytes::random(32).unwrap();
        let wrapped = provider.wrap(&binding(volume, &key_id), &secret).unwrap();
        Self {
            volume,
            key_id,
            secret,
            wrapped,
        }
    }

    fn attach(&self, provider: &Arc<dyn KeyProvider>) {
        let unwrapped = provider.unwrap(&binding(self.volume, &self.key_id), &self.wrapped);
        assert!(unwrapped.unwrap().ct_eq(&self.secret));
    }
}

fn binding(volume: Uuid, key_id: &KeyId) -> Binding<'_> {
    Binding {
        volume,
        provider: "kms",
        key_id,
        keyslot: 0,
    }
}
