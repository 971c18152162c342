//! What can be read of a process that serves a disk: no key.
//!
//! The judge is the kernel: all that `/proc/PID/mem` gives of the process, which is also what a core dump or a debugger
//! would get, is searched for the keys, after the data path has used them. It takes root to look.

mod common;

use std::fs;
use std::process::Command;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use common::driver::{Data, Driver, T_IN, T_OUT};
use common::secrets::{finds, readable_memory};
use common::serve::Server;
use common::volume::{MIB, PASSPHRASE, Volume, run};
use sealblk::keys::registry::Registry;
use sealblk::keys::{Binding, KeyId, Providers};
use serde_json::Value;

#[test]
fn volume_key_and_passphrase_are_nowhere_in_readable_memory() {
    let volume = Volume::cryptsetup(4 * MIB, 512);
    let key = volume_key(&volume);
    let Some(memory) = memory_after_use(&volume) else {
        return;
    };
    // The first round keys of AES-256 are the key itself, so this finds expanded keys as well.
    assert_absent(&memory, &key, "volume key");
    assert_absent(&memory, PASSPHRASE.as_bytes(), "passphrase");
}

/// A page of guest memory that is missing interrupts a kernel, and the signal puts its registers on the stack.
#[test]
fn volume_key_is_nowhere_in_readable_memory_after_guest_memory_was_taken_away() {
    let volume = Volume::cryptsetup(4 * MIB, 512);
    let key = volume_key(&volume);
    for write in [false, true] {
        let memory = memory_after(&volume, |driver| {
            let bytes = [7; 64 * 1024];
            let (kind, data) = match write {
                true => (T_OUT, Data::Out(&bytes)),
                false => (T_IN, Data::In(bytes.len())),
            };
            let (_, buffers) = driver.build(kind, 0, data);
            let head = driver.queue().chain(&buffers);
            // The region with the buffers, from their middle on.
            let file = &driver.memory.regions()[2].file;
            rustix::fs::ftruncate(file, 32 * 1024).unwrap();
            driver.queue().offer(&[head]);
            driver.queue().kick();
            driver.queue().watch_used();
        });
        let Some(memory) = memory else { return };
        assert_absent(&memory, &key, "volume key");
    }
}

#[test]
fn primary_key_and_slot_secret_are_nowhere_in_readable_memory() {
    let volume = Volume::new();
    let primary = fs::read(volume.beside("state/providers/native/primary.key")).unwrap();
    let slot_secret = slot_secret(&volume);
    let Some(memory) = memory_after_use(&volume) else {
        return;
    };
    assert_absent(&memory, &primary[16..48], "primary key");
    assert_absent(&memory, &slot_secret, "slot secret");
    assert_absent(
        &memory,
        BASE64_STANDARD.encode(&slot_secret).as_bytes(),
        "slot secret as a passphrase",
    );
}

/// By the one who made it.
fn volume_key(volume: &Volume) -> Vec<u8> {
    let key_file = volume.beside("volume.key");
    run(Command::new("cryptsetup")
        .args([
            "luksDump",
            "--batch-mode",
            "--dump-volume-key",
            "--volume-key-file",
        ])
        .arg(&key_file)
        .arg("--key-file")
        .arg(volume.beside("passphrase"))
        .arg(&volume.path));
    let key = fs::read(&key_file).unwrap();
    assert_eq!(key.len(), 64);
    key
}

/// The memory of a server that has read and written, if it can be had.
fn memory_after_use(volume: &Volume) -> Option<Vec<u8>> {
    memory_after(volume, |driver| {
        driver.write(0, &common::pattern(7, 4096));
        assert_eq!(driver.read(0, 4096), common::pattern(7, 4096));
    })
}

/// The memory of a server that `work` was done with, if it can be had. Nothing is done with the driver's after that.
fn memory_after(volume: &Volume, work: impl FnOnce(&mut Driver)) -> Option<Vec<u8>> {
    let server = Server::start(volume);
    let mut driver = server.connect();
    work(&mut driver);
    let hidden = fs::read_to_string(format!("/proc/{}/maps", server.process.pid()))
        .is_ok_and(|maps| maps.contains("/secretmem"));
    if !hidden || !rustix::process::geteuid().is_root() {
        eprintln!("skipped: it takes root to look, and a kernel with memfd_secret(2) to hide from root");
        return None;
    }
    let memory = readable_memory(server.process.pid());
    let path = volume.path.to_str().unwrap().as_bytes();
    assert!(finds(&memory, path), "what is there is found");
    std::mem::forget(driver);
    server.stop();
    Some(memory)
}

/// What the volume's token wraps.
fn slot_secret(volume: &Volume) -> Vec<u8> {
    let cryptsetup = |args: &[&str]| run(Command::new("cryptsetup").args(args).arg(&volume.path)).stdout;
    let token: Value = serde_json::from_slice(&cryptsetup(&["token", "export", "--token-id", "0"])).unwrap();
    let field = |name: &str| token[name].as_str().unwrap().to_owned();
    let key_id = KeyId(field("key_id"));
    let provider = field("provider");
    let uuid = String::from_utf8(cryptsetup(&["luksUUID"])).unwrap();
    let binding = Binding {
        volume: uuid.trim().parse().unwrap(),
        provider: &provider,
        key_id: &key_id,
        keyslot: 0,
    };
    let wrapped = BASE64_STANDARD.decode(field("wrapped_slot_secret")).unwrap();
    let registry = Registry::open(&volume.beside("state")).unwrap();
    registry
        .provider(&provider)
        .unwrap()
        .unwrap(&binding, &wrapped)
        .unwrap()
        .to_vec()
}

/// No 16 bytes of the secret in a row.
#[track_caller]
fn assert_absent(memory: &[u8], secret: &[u8], what: &str) {
    for (i, part) in secret.chunks_exact(16).enumerate() {
        assert!(
            !finds(memory, part),
            "bytes {} to {} of the {what}",
            16 * i,
            16 * i + 16
        );
    }
}
