//! Shallow rekey as an operator does it: what changes, what opens afterwards, and what is left when it is killed.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Instant;

use common::serve::sealblk_path;
use common::volume::{Volume, run};
use sealblk::keys::binding::{self, BindingReason};
use sealblk::luks2::Locked;
use sealblk::providers::registry::Registry;
use sealblk::storage::{Access, Backing};
use serde_json::Value;

/// Where the payload of a volume starts that sealblk made.
const HEADER_LEN: usize = 16 << 20;

#[test]
fn rekey_changes_the_header_alone_and_the_old_key_opens_nothing() {
    let volume = Volume::new();
    add_recovery_key(&volume);
    let old = token(&volume);
    let before = volume.bytes();
    let told = String::from_utf8(run(&mut rekey(&volume, &[])).stdout).unwrap();
    let after = volume.bytes();

    assert_eq!(before.len(), after.len());
    assert!(
        before[HEADER_LEN..] == after[HEADER_LEN..],
        "a byte of the payload changed"
    );
    let new = token(&volume);
    assert_ne!(new["key_id"], old["key_id"]);
    assert_eq!(new["provider"], old["provider"]);
    assert_eq!(new.get("replaces"), None, "it is finished");
    for key_id in [&old["key_id"], &new["key_id"]] {
        assert!(told.contains(key_id.as_str().unwrap()), "{told}");
    }
    opens(&volume).unwrap();

    // Stock cryptsetup takes the header, and the recovery key opens as before.
    run(&mut cryptsetup(&["luksDump"], &volume));
    let recovery = volume.beside("recovery").display().to_string();
    let test = ["open", "--test-passphrase", "--key-file", &recovery];
    run(&mut cryptsetup(&test, &volume));

    // Who kept the old token has nothing that it opens: not in its keyslot, and not in the new one.
    for keyslot in [&old["keyslots"][0], &new["keyslots"][0]] {
        let mut kept = old.clone();
        kept["keyslots"][0] = keyslot.clone();
        let file = volume.beside("kept.json");
        fs::write(&file, kept.to_string()).unwrap();
        let forged = volume.beside("forged");
        fs::copy(&volume.path, &forged).unwrap();
        let imported = Command::new("cryptsetup")
            .args(["token", "import", "--token-id", "5", "--json-file"])
            .args([&file, &forged])
            .stderr(Stdio::null())
            .status()
            .unwrap();
        // cryptsetup itself refuses a token for a keyslot that is not there.
        assert_eq!(imported.success(), keyslot == &new["keyslots"][0]);
        if imported.success() {
            run(Command::new("cryptsetup")
                .args(["token", "remove", "--token-id"])
                .arg(id(&volume))
                .arg(&forged));
            let reason = reason_of(&volume, &forged);
            assert!(
                matches!(
                    reason,
                    BindingReason::ForeignToken { .. } | BindingReason::TokenOpensNothing { .. }
                ),
                "{reason}"
            );
        }
    }
}

#[test]
fn a_volume_moves_to_another_provider_and_back_from_its_recovery_key() {
    let volume = Volume::new();
    add_recovery_key(&volume);
    let state = volume.open[1].clone();
    run(&mut sealblk(
        &state,
        &["provider", "add", "native", "--no-backup", "--name", "second"],
    ));
    run(&mut rekey(&volume, &["--provider", "second"]));
    assert_eq!(token(&volume)["provider"], "second");
    opens(&volume).unwrap();

    // Another host, which has none of these keys.
    let elsewhere = volume.beside("elsewhere").display().to_string();
    run(&mut sealblk(
        &elsewhere,
        &["provider", "add", "native", "--no-backup", "--name", "third"],
    ));
    let mut command = sealblk(&elsewhere, &["rekey"]);
    command.arg(&volume.path);
    let refused = command.output().unwrap();
    assert_eq!(refused.status.code(), Some(4));
    run(command
        .args(["--provider", "third", "--unlock-key"])
        .arg(volume.beside("recovery")));
    assert_eq!(token(&volume)["provider"], "third");
    assert!(opens(&volume).is_err());
    let registry = Registry::open(elsewhere.as_ref()).unwrap();
    let disk = Backing::open(&volume.path, Access::Inspect).unwrap();
    binding::unlock(&Locked::open(&disk, None).unwrap(), &registry).unwrap();
}

#[test]
fn rekey_is_refused_without_a_change_where_there_is_no_such_provider_or_the_disk_is_in_use() {
    let volume = Volume::new();
    let before = volume.bytes();
    let refused = rekey(&volume, &["--provider", "nobody"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(4));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(
        said.contains("nobody") && said.contains("provider list"),
        "{said}"
    );

    let claim = Backing::claimed(&volume.path, Access::ReadWrite).unwrap();
    assert_eq!(rekey(&volume, &[]).output().unwrap().status.code(), Some(5));
    drop(claim);
    assert!(volume.bytes() == before);
}

/// `REKEY_KILLS` asks for more than the few that there is time for.
#[test]
fn killed_at_any_moment_the_volume_opens_and_the_next_rekey_ends_with_one_key() {
    let kills: u32 = env::var("REKEY_KILLS").map_or(12, |kills| kills.parse().unwrap());
    let volume = Volume::new();
    let start = Instant::now();
    run(&mut rekey(&volume, &[]));
    let whole = start.elapsed();
    let mut found = BTreeSet::new();
    for kill in 0..kills {
        let mut child: Child = rekey(&volume, &[]).stdout(Stdio::null()).spawn().unwrap();
        // From the first moment to the last, in an order that neighbouring kills do not share.
        let at = whole.mul_f64(f64::from(kill * 7 % kills) / f64::from(kills));
        thread::sleep(at);
        child.kill().unwrap();
        child.wait().unwrap();
        opens(&volume).unwrap_or_else(|error| panic!("killed after {at:?}: {error}"));
        run(cryptsetup(&["luksDump"], &volume).stdout(Stdio::null()));
        found.insert(tokens(&volume).len());
    }
    assert!(found.is_subset(&BTreeSet::from([1, 2])), "{found:?}");
    run(&mut rekey(&volume, &[]));
    assert_eq!(tokens(&volume).len(), 1);
    opens(&volume).unwrap();
}

fn sealblk(state: &str, args: &[&str]) -> Command {
    let mut command = Command::new(sealblk_path());
    command.args(["--state-dir", state]).args(args);
    command
}

fn rekey(volume: &Volume, args: &[&str]) -> Command {
    let mut command = sealblk(&volume.open[1], &["rekey"]);
    command.arg(&volume.path).args(args);
    command
}

fn add_recovery_key(volume: &Volume) {
    let mut command = sealblk(&volume.open[1], &["recovery", "add"]);
    run(command
        .arg(&volume.path)
        .arg("--recovery-key")
        .arg(volume.beside("recovery")));
}

fn cryptsetup(args: &[&str], volume: &Volume) -> Command {
    let mut command = Command::new("cryptsetup");
    command.args(args).arg(&volume.path);
    command
}

/// Whether the volume's provider opens it.
fn opens(volume: &Volume) -> Result<(), BindingReason> {
    unlock(volume, &volume.path)
}

fn reason_of(volume: &Volume, path: &std::path::Path) -> BindingReason {
    unlock(volume, path).unwrap_err()
}

fn unlock(volume: &Volume, path: &std::path::Path) -> Result<(), BindingReason> {
    let registry = Registry::open(volume.open[1].as_ref()).unwrap();
    let disk = Backing::open(path, Access::Inspect).unwrap();
    let locked = Locked::open(&disk, None).unwrap();
    binding::unlock(&locked, &registry)
        .map(drop)
        .map_err(|error| *error.reason)
}

/// The tokens of the header, as cryptsetup shows it.
fn tokens(volume: &Volume) -> serde_json::Map<String, Value> {
    let dump = run(&mut cryptsetup(&["luksDump", "--dump-json-metadata"], volume)).stdout;
    let metadata: Value = serde_json::from_slice(&dump).unwrap();
    metadata["tokens"].as_object().unwrap().clone()
}

/// The only token, and its number.
fn token(volume: &Volume) -> Value {
    let tokens = tokens(volume);
    assert_eq!(tokens.len(), 1);
    tokens.into_iter().next().unwrap().1
}

fn id(volume: &Volume) -> String {
    tokens(volume).into_iter().next().unwrap().0
}
