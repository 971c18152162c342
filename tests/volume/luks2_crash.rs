//! Metadata updates survive a crash at any byte.
//!
//! A medium stands in for the disk that keeps apart what was written and what was synced. An operation runs on it
//! once; then every state that a crash could have left is built and opened: at every stop point, with each of the
//! writes that were not synced yet durable or not, torn at every byte, and torn at sectors in any combination.
//! Whatever is found, the volume must be in the old state or in the new one, and every way in of that state must
//! open it. A sample of the states is shown to cryptsetup, which must find the same.
//!
//! The medium can also fail: at each lock, change of size, write and sync in turn. What the operation says then must be
//! true of what is found.

use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use sealblk::cipher::SectorSize;
use sealblk::keys::binding::{
    self, BindingError, BindingReason, CreateOptions, Info, Rekeyed, create, is_ours,
};
use sealblk::keys::{KeyProvider, Providers};
use sealblk::luks2::{
    Argon2Cost, Erased, HeaderError, HeaderIo, HeaderState, LockMode, Locked, MetadataLock, Reason, Refusal,
    Resize, Resized, VolumeError,
};
use sealblk::providers::{registry::Backup, registry::Registry, registry::Source};
use sealblk_secmem::arena::SecretBytes;
use uuid::Uuid;

const CHEAP: Argon2Cost = Argon2Cost {
    time: 1,
    memory_kib: 8,
    lanes: 1,
};
const OLD_KEY: &str = "the old recovery key";
const NEW_KEY: &str = "the new recovery key";
const MIB: usize = 1 << 20;

#[test]
fn adding_a_recovery_key() {
    let host = Host::new();
    let before = host.volume();
    let log = recorded(&before, |medium| host.add_new_key(medium).unwrap());
    host.replay(&before, &log, &ONE_KEY, &TWO_KEYS);
}

#[test]
fn removing_a_recovery_key() {
    let host = Host::new();
    let before = host.volume();
    let log = recorded(&before, |medium| host.remove_old_key(medium).unwrap());
    // The key may be gone before its keyslot is.
    host.replay(&before, &log, &NO_KEY, &NO_KEY);

    let after = medium_after(&before, &log).now();
    let gone = described(&after).unwrap();
    states(&before, &log, |image, at| {
        if described(image).unwrap() == gone {
            let material = MATERIAL_OF_OLD_KEY;
            assert_eq!(
                image[material.clone()],
                after[material],
                "{at}: removed, but not wiped"
            );
        }
    });
    assert!(!opens_with_the_header_of(&before, &after));
}

/// The header may have the old KEK, both, or the new one; whichever, the provider opens the volume, and the next rekey
/// ends with one.
#[test]
fn rekeying() {
    let host = Host::new();
    let before = host.volume();
    let log = recorded(&before, |medium| host.rekey(medium).map(drop).unwrap());
    let after = medium_after(&before, &log).now();
    assert!(!provider_opens_with_the_header_of(&host, &before, &after));

    let (old, new) = (described(&before).unwrap(), described(&after).unwrap());
    let mut found = BTreeMap::from([("old", 0), ("both", 0), ("new", 0)]);
    let mut count = 0;
    states(&before, &log, |image, at| {
        let info = described(image).unwrap_or_else(|error| panic!("{at}: {error}"));
        let tokens = info["tokens"].as_array().unwrap().len();
        let name = match tokens {
            1 if info == old => "old",
            1 if info == new => "new",
            2 => "both",
            _ => panic!("{at}: {info}"),
        };
        *found.get_mut(name).unwrap() += 1;
        if count % SAMPLE == 0 {
            let medium = Medium::new(image);
            host.opens(&medium, &ONE_KEY);
            if name == "both" {
                host.finish(&medium)
                    .unwrap_or_else(|| panic!("{at}: nothing to finish"));
            } else {
                assert_eq!(host.finish(&medium), None, "{at}");
                host.rekey(&medium).unwrap();
            }
            host.opens(&medium, &ONE_KEY);
            let now = medium.now();
            assert_eq!(
                described(&now).unwrap()["tokens"].as_array().unwrap().len(),
                1,
                "{at}"
            );
            assert!(
                !provider_opens_with_the_header_of(&host, image, &now) || name == "both",
                "{at}"
            );
            assert!(!provider_opens_with_the_header_of(&host, &before, &now), "{at}");
        }
        if count % (4 * SAMPLE) == 0 {
            host.cryptsetup_opens(image, &ONE_KEY, at);
        }
        count += 1;
    });
    assert!(
        found.values().all(|&count| count > 0),
        "not every state was seen: {found:?}"
    );
}

/// A volume opens, or says that its erasure was begun, or is none; and where it is none, its old header opens nothing.
#[test]
fn erasing() {
    let host = Host::new();
    let before = host.volume();
    let uuid = Locked::open(&Medium::new(&before), None).unwrap().uuid();
    let log = recorded(&before, |medium| drop(erase(medium, uuid).unwrap()));
    let after = medium_after(&before, &log).now();
    assert!(matches!(
        *erase(&Medium::new(&after), uuid).unwrap_err().reason,
        Reason::Header(HeaderError::NotLuks { .. })
    ));
    let old = described(&before).unwrap();
    let mut found = BTreeMap::from([("opens", 0), ("begun", 0), ("none", 0)]);
    let mut count = 0;
    states(&before, &log, |image, at| {
        let medium = Medium::new(image);
        let name = match Locked::open(&medium, None).map_err(|error| *error.reason) {
            Ok(_) => {
                // As long as nothing is told, nothing is destroyed.
                assert!(described(image).unwrap() == old, "{at}");
                assert!(image[MATERIAL] == before[MATERIAL], "{at}");
                "opens"
            }
            Err(Reason::Refused(Refusal::MidErasure)) => {
                if count % SAMPLE == 0 {
                    erase(&medium, uuid).unwrap_or_else(|error| panic!("{at}: {error}"));
                }
                "begun"
            }
            Err(Reason::Header(HeaderError::NotLuks { .. } | HeaderError::BothDamaged { .. })) => {
                // The keyslots went before the last of the header.
                assert!(image[MATERIAL] == after[MATERIAL], "{at}");
                "none"
            }
            Err(reason) => panic!("{at}: {reason}"),
        };
        *found.get_mut(name).unwrap() += 1;
        count += 1;
    });
    assert!(
        found.values().all(|&count| count > 0),
        "not every state was seen: {found:?}"
    );
    assert!(!provider_opens_with_the_header_of(&host, &before, &after));
    assert!(!opens_with_the_header_of(&before, &after));
}

/// Storage that keeps something else than what was written is found out.
#[test]
fn an_erasure_that_fails_is_told_and_can_be_gone_on_with() {
    let host = Host::new();
    let before = host.volume();
    let uuid = Locked::open(&Medium::new(&before), None).unwrap().uuid();
    faults(&before, |medium, at| {
        let result = erase(medium, uuid);
        let image = medium.now();
        let now = Medium::new(&image);
        match (result, Locked::open(&now, None)) {
            (Ok(_), Err(error)) => assert!(
                matches!(*error.reason, Reason::Header(HeaderError::NotLuks { .. })),
                "{at}: {error}"
            ),
            (Ok(_), Ok(_)) => panic!("{at}: it is said to be erased"),
            (Err(_), Ok(_)) => host.opens(&now, &ONE_KEY),
            (Err(_), Err(_)) => drop(erase(&now, uuid)),
        }
    });
}

#[test]
fn repairing_either_copy_and_then_adding_a_recovery_key() {
    let host = Host::new();
    for damaged in [100, COPY + 100] {
        let mut before = host.volume();
        before[damaged] ^= 0xff;
        let log = recorded(&before, |medium| {
            let mut locked = Locked::open(medium, None).unwrap();
            assert!(matches!(locked.header_state(), HeaderState::Repaired { .. }));
            let volume = locked.unlock_with_passphrase(&secret(OLD_KEY)).unwrap();
            locked.add_passphrase(&volume, &secret(NEW_KEY), CHEAP).unwrap();
        });
        host.replay(&before, &log, &ONE_KEY, &TWO_KEYS);
    }
}

#[test]
fn an_update_repairs_a_copy_that_was_damaged_after_it_was_opened() {
    let host = Host::new();
    let medium = Medium::new(host.volume());
    let mut locked = Locked::open(&medium, None).unwrap();
    let volume = locked.unlock_with_passphrase(&secret(OLD_KEY)).unwrap();
    let mut before = medium.now();
    before[COPY + 100] ^= 0xff;
    medium.reset(before.clone());
    locked.add_passphrase(&volume, &secret(NEW_KEY), CHEAP).unwrap();
    host.replay(&before, &medium.log(), &ONE_KEY, &TWO_KEYS);
}

#[test]
fn making_a_disk_longer() {
    let host = Host::new();
    let before = host.volume();
    let log = recorded(&before, |medium| {
        resize(medium, 8, false).unwrap();
    });
    host.replay(&before, &log, &ONE_KEY, &ONE_KEY);
    assert_eq!(medium_after(&before, &log).now().len(), 24 * MIB);
}

/// The file is longer already.
#[test]
fn making_a_disk_as_long_as_its_file() {
    let host = Host::new();
    let before = host.volume();
    let log = recorded(&before, |medium| {
        medium.set_size(24 * MIB as u64).unwrap();
        let mut locked = Locked::open(medium, None).unwrap();
        let (capacity, shrink) = (None, false);
        locked.resize(None, Resize { capacity, shrink }).unwrap();
    });
    host.replay(&before, &log, &ONE_KEY, &ONE_KEY);
    assert_eq!(medium_after(&before, &log).now().len(), 24 * MIB);
}

#[test]
fn making_a_disk_shorter() {
    let host = Host::new();
    let before = host.volume();
    let log = recorded(&before, |medium| {
        resize(medium, 2, true).unwrap();
    });
    host.replay(&before, &log, &ONE_KEY, &ONE_KEY);
    assert_eq!(medium_after(&before, &log).now().len(), 18 * MIB);
}

#[test]
fn a_disk_has_one_of_the_two_lengths_whatever_fails() {
    let host = Host::new();
    let before = host.volume();
    for (mib, expected) in [(8, 6), (2, 8)] {
        let mut resized = 0;
        faults(&before, |medium, at| {
            let result = resize(medium, mib, true);
            medium.heal();
            let capacity = Locked::open(medium, None).unwrap().capacity();
            let (old, new) = (4 * MIB as u64, (mib * MIB) as u64);
            match result {
                Ok(found) => {
                    assert_eq!((found.from, found.to, capacity), (old, new, new), "{at}");
                    resized += 1;
                }
                // Storage that says it failed may have done it.
                Err(Reason::Header(HeaderError::Write { copy: _, source: _ })) => {
                    assert!([old, new].contains(&capacity), "{at}");
                }
                Err(Reason::Grow { .. } | Reason::Lock(_)) => assert_eq!(capacity, old, "{at}"),
                Err(reason) => panic!("{at}: {reason}"),
            }
            host.opens(medium, &ONE_KEY);
        });
        // Where nothing failed, or only what comes after the primary copy, once or for good.
        assert_eq!(resized, expected, "{mib} MiB");
    }
}

#[test]
fn creating_a_volume_leaves_none_or_all_of_it() {
    let host = Host::new();
    let before = vec![0x5a; 20 * MIB];
    let log = recorded(&before, |medium| host.create_on(medium));
    let (mut nothing, mut whole) = (0, 0);
    states(&before, &log, |image, at| {
        match Info::read(&Medium::new(image), None).map_err(|error| *error.reason) {
            Ok(_) => {
                if whole % SAMPLE == 0 {
                    host.opens(&Medium::new(image), &ONE_KEY);
                }
                whole += 1;
            }
            Err(Reason::Header(HeaderError::NotLuks { .. } | HeaderError::BothDamaged { .. })) => {
                nothing += 1
            }
            Err(reason) => panic!("{at}: {reason}"),
        }
    });
    assert!(nothing > 0 && whole > 0);
}

/// A test of the test: with nothing ever synced in between, some of the states are of no volume at all.
#[test]
fn without_syncs_the_replay_finds_a_lost_volume() {
    let host = Host::new();
    let before = host.volume();
    let log = recorded(&before, |medium| host.remove_old_key(medium).unwrap());
    let unsynced: Vec<Op> = log
        .into_iter()
        .filter(|op| matches!(op, Op::Write { .. }))
        .collect();
    let mut lost = 0;
    states(&before, &unsynced, |image, _| {
        lost += u32::from(Info::read(&Medium::new(image), None).is_err());
    });
    assert!(lost > 0);
}

// Storage that fails.

#[test]
fn a_recovery_key_is_added_or_not_whatever_fails() {
    let host = Host::new();
    let before = host.volume();
    let old = described(&before).unwrap();
    let mut added = 0;
    faults(&before, |medium, at| {
        let result = host.add_new_key(medium);
        medium.heal();
        let now = described(&medium.now()).unwrap();
        match result.map_err(of_volume) {
            Ok(()) => {
                host.opens(medium, &TWO_KEYS);
                added += 1;
            }
            // Storage that says it failed may have done it.
            Err(Reason::Header(HeaderError::Write { copy: _, source: _ })) => host.opens(medium, &ONE_KEY),
            Err(Reason::WriteKeyslot { .. } | Reason::Lock(_) | Reason::Keyslot { .. }) => {
                assert_eq!(now, old, "{at}");
                host.opens(medium, &ONE_KEY);
            }
            Err(reason) => panic!("{at}: {reason}"),
        }
    });
    // Where nothing failed, or only the secondary copy's write or sync, once or for good: the keyslot is in force.
    assert_eq!(added, 6);
}

#[test]
fn a_recovery_key_that_was_removed_opens_nothing_whatever_fails() {
    let host = Host::new();
    let before = host.volume();
    let old = described(&before).unwrap();
    let mut removed = 0;
    faults(&before, |medium, at| {
        let result = host.remove_old_key(medium);
        medium.heal();
        let now = described(&medium.now()).unwrap();
        match result.map_err(of_volume) {
            Ok(()) => {
                assert_ne!(now, old, "{at}");
                assert!(!opens_with_the_header_of(&before, &medium.now()), "{at}");
                removed += 1;
                return;
            }
            Err(Reason::Entry { .. }) => assert!(!opens_with_the_header_of(&before, &medium.now()), "{at}"),
            Err(Reason::Wipe { .. } | Reason::Lock(_) | Reason::Keyslot { .. }) => {
                assert_eq!(now, old, "{at}")
            }
            Err(reason) => panic!("{at}: {reason}"),
        }
        // Tried again on sound storage, it goes.
        match host.remove_old_key(medium).map_err(of_volume) {
            Ok(()) | Err(Reason::NoSuchKeyslot { keyslot: 1 }) => {}
            Err(reason) => panic!("{at}, again: {reason}"),
        }
        assert!(!opens_with_the_header_of(&before, &medium.now()), "{at}");
        host.opens(medium, &NO_KEY);
    });
    assert_eq!(removed, 6);
}

#[test]
fn a_rekey_loses_no_way_in_whatever_fails() {
    let host = Host::new();
    let before = host.volume();
    let old = described(&before).unwrap();
    let (mut done, mut untouched, mut unfinished) = (0, 0, 0);
    faults(&before, |medium, at| {
        let result = host.rekey(medium);
        medium.heal();
        host.opens(medium, &ONE_KEY);
        match result.map_err(|error| *error.reason) {
            Ok(_) => done += 1,
            Err(BindingReason::RekeyUnfinished(reason)) => {
                // An operator who is told to remove the old keyslot would not finish the rekey.
                assert!(!reason.to_string().contains("remove"), "{at}: {reason}");
                unfinished += 1;
            }
            Err(BindingReason::Volume(
                Reason::WriteKeyslot { .. } | Reason::Lock(_) | Reason::Keyslot { .. },
            )) => {
                assert_eq!(described(&medium.now()).unwrap(), old, "{at}");
                untouched += 1;
            }
            // Storage that says it failed may have done it.
            Err(BindingReason::Volume(Reason::Header(HeaderError::Write { copy: _, source: _ }))) => {
                untouched += 1
            }
            Err(reason) => panic!("{at}: {reason}"),
        }
        // Tried again on sound storage, one key is left, and it is not the old one.
        if host.finish(medium).is_none() {
            host.rekey(medium).unwrap();
        }
        host.opens(medium, &ONE_KEY);
        assert!(
            !provider_opens_with_the_header_of(&host, &before, &medium.now()),
            "{at}"
        );
    });
    assert!(
        done > 0 && untouched > 0 && unfinished > 0,
        "{done}, {untouched}, {unfinished}"
    );
}

#[test]
fn a_volume_that_is_overwritten_stays_until_nothing_but_writing_can_fail() {
    let host = Host::new();
    let before = host.volume();
    let mut created = 0;
    faults(&before, |medium, at| {
        let result = host.overwrite(medium, 64 * MIB as u64);
        medium.heal();
        match result.map_err(of_volume) {
            Ok(_) => {
                host.opens(medium, &ONE_KEY);
                created += 1;
            }
            Err(Reason::Lock(_)) => assert!(medium.now() == before, "{at}: the old volume is gone"),
            Err(Reason::Grow { .. }) => {
                let now = medium.now();
                assert!(now.is_empty() || now.starts_with(&before), "{at}");
            }
            Err(
                Reason::Prepare(_) | Reason::WriteKeyslot { .. } | Reason::Header(HeaderError::Write { .. }),
            ) => {}
            Err(reason) => panic!("{at}: {reason}"),
        }
    });
    assert_eq!(created, 6);
}

/// Runs `operation` on media that hold `before`, each of which fails at another step; once, and from then on.
fn faults(before: &[u8], mut operation: impl FnMut(&Medium<'_>, &str)) {
    for lasting in [false, true] {
        for step in 0.. {
            let medium = Medium::new(before);
            medium.fault.set(Some(Fault { step, lasting }));
            operation(&medium, &format!("step {step} failed, lasting: {lasting}"));
            if !medium.failed.get() {
                break; // It has no such step.
            }
        }
    }
}

/// Why an operation failed, which asked no provider for anything that it did not give.
fn of_volume(error: BindingError) -> Reason {
    match *error.reason {
        BindingReason::Volume(reason) => reason,
        other => panic!("{other}"),
    }
}

fn resize(medium: &Medium<'_>, mib: usize, shrink: bool) -> Result<Resized, Reason> {
    let mut locked = Locked::open(medium, None).map_err(|error| *error.reason)?;
    let capacity = Some((mib * MIB) as u64);
    locked.resize(None, Resize { capacity, shrink })
}

fn erase(medium: &Medium<'_>, uuid: Uuid) -> Result<Erased, VolumeError> {
    sealblk::luks2::erase(medium, uuid, is_ours)
}

/// Whether the provider opens `now` with the header that the volume had before.
fn provider_opens_with_the_header_of(host: &Host, before: &[u8], now: &[u8]) -> bool {
    let mut image = now.to_vec();
    image[..2 * COPY].copy_from_slice(&before[..2 * COPY]);
    let medium = Medium::new(image);
    let locked = Locked::open(&medium, None).unwrap();
    binding::unlock(&locked, &host.providers).is_ok()
}

/// Whether the old recovery key opens `now` with the header that the volume had before, of which there is a backup.
fn opens_with_the_header_of(before: &[u8], now: &[u8]) -> bool {
    let mut image = now.to_vec();
    image[..2 * COPY].copy_from_slice(&before[..2 * COPY]);
    let medium = Medium::new(image);
    let locked = Locked::open(&medium, None).unwrap();
    locked.unlock_with_passphrase(&secret(OLD_KEY)).is_ok()
}

/// What must be found: which passphrases open the volume, and whether the provider does.
struct State {
    passphrases: &'static [&'static str],
    bound: bool,
}

const NO_KEY: State = State {
    passphrases: &[],
    bound: true,
};
const ONE_KEY: State = State {
    passphrases: &[OLD_KEY],
    bound: true,
};
const TWO_KEYS: State = State {
    passphrases: &[OLD_KEY, NEW_KEY],
    bound: true,
};

/// A host with a native provider, and volumes that are bound to it.
struct Host {
    dir: tempfile::TempDir,
    providers: Registry,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut providers = Registry::open(&dir.path().join("state")).unwrap();
        providers
            .add(
                "native",
                Source::Native {
                    backup: Backup::Waived,
                },
                true,
            )
            .unwrap();
        Self { dir, providers }
    }

    fn provider(&self) -> Arc<dyn KeyProvider> {
        self.providers.provider("native").unwrap()
    }

    /// The image of a volume with 4 MiB of payload: keyslot 0 for the provider, keyslot 1 for [`OLD_KEY`].
    fn volume(&self) -> Vec<u8> {
        let medium = Medium::new(vec![0; 20 * MIB]);
        self.create_on(&medium);
        medium.now()
    }

    fn create_on(&self, medium: &Medium<'_>) {
        self.create(medium, None, false).unwrap();
    }

    fn overwrite(&self, medium: &Medium<'_>, capacity: u64) -> Result<(), BindingError> {
        self.create(medium, Some(capacity), true)
    }

    fn create(
        &self,
        medium: &Medium<'_>,
        capacity: Option<u64>,
        overwrite: bool,
    ) -> Result<(), BindingError> {
        let provider = self.provider();
        let options = CreateOptions {
            capacity,
            sector_size: SectorSize::B512,
            label: "crash",
            binding: Some((&*provider, &provider.create_kek().unwrap())),
            recovery_key: Some((&secret(OLD_KEY), CHEAP)),
            overwrite,
        };
        create(medium, None, &options).map(drop)
    }

    fn add_new_key(&self, medium: &Medium<'_>) -> Result<(), BindingError> {
        let mut locked = Locked::open(medium, None)?;
        let volume = binding::unlock(&locked, &self.providers)?;
        locked
            .add_passphrase(&volume, &secret(NEW_KEY), CHEAP)
            .map(drop)
            .map_err(BindingError::from)
    }

    fn remove_old_key(&self, medium: &Medium<'_>) -> Result<(), BindingError> {
        let mut locked = Locked::open(medium, None)?;
        let volume = binding::unlock(&locked, &self.providers)?;
        Ok(locked.remove_passphrase(1, &volume)?)
    }

    fn rekey(&self, medium: &Medium<'_>) -> Result<Rekeyed, BindingError> {
        let mut locked = Locked::open(medium, None)?;
        let volume = binding::unlock(&locked, &self.providers)?;
        binding::rekey(
            &mut locked,
            &volume,
            &self.providers,
            &self.providers,
            Some("native"),
        )
    }

    /// Finishes a rekey that was interrupted, if there is one.
    fn finish(&self, medium: &Medium<'_>) -> Option<Rekeyed> {
        let tokens = Info::read(medium, None).unwrap().tokens;
        tokens.iter().find(|token| !token.replaces.is_empty())?;
        let mut locked = Locked::open(medium, None).unwrap();
        let volume = binding::unlock(&locked, &self.providers).unwrap();
        Some(binding::rekey(&mut locked, &volume, &self.providers, &self.providers, None).unwrap())
    }

    /// Opens every state that a crash could have left of `log`.
    fn replay(&self, before: &[u8], log: &[Op], old: &State, new: &State) {
        let after = medium_after(before, log).now();
        let (old_info, new_info) = (described(before).unwrap(), described(&after).unwrap());
        assert_ne!(old_info, new_info);

        let mut found = BTreeMap::from([("old", 0), ("new", 0)]);
        let mut count = 0;
        states(before, log, |image, at| {
            let info = described(image).unwrap_or_else(|error| panic!("{at}: {error}"));
            let (name, state) = if info == new_info {
                ("new", new)
            } else {
                assert_eq!(info, old_info, "{at}: neither the old nor the new state");
                ("old", old)
            };
            *found.entry(name).or_insert(0) += 1;
            // Opening for writing repairs, and must lose nothing; this takes longer, as key derivation does.
            if count % SAMPLE == 0 {
                let medium = Medium::new(image);
                self.opens(&medium, state);
                assert_eq!(
                    described(&medium.now()).unwrap(),
                    info,
                    "{at}: the repair changed the volume"
                );
            }
            if count % (4 * SAMPLE) == 0 {
                self.cryptsetup_opens(image, state, at);
            }
            count += 1;
        });
        assert!(
            found.values().all(|&count| count > 0),
            "not every state was seen: {found:?}"
        );
    }

    fn opens(&self, medium: &Medium<'_>, state: &State) {
        let locked = Locked::open(medium, None).unwrap();
        for passphrase in state.passphrases {
            locked.unlock_with_passphrase(&secret(passphrase)).unwrap();
        }
        assert_eq!(binding::unlock(&locked, &self.providers).is_ok(), state.bound);
    }

    fn cryptsetup_opens(&self, image: &[u8], state: &State, at: &str) {
        let path = self.dir.path().join("image");
        fs::write(&path, image).unwrap();
        let run = |arguments: &[&str], input: &str| {
            let mut command = Command::new("cryptsetup");
            let command = command
                .args(arguments)
                .arg(&path)
                .stdin(Stdio::piped())
                .stdout(Stdio::null());
            let mut child = command.spawn().unwrap();
            io::Write::write_all(&mut child.stdin.take().unwrap(), input.as_bytes()).unwrap();
            assert!(child.wait().unwrap().success(), "{at}: cryptsetup {arguments:?}");
        };
        run(&["luksDump"], "");
        for passphrase in state.passphrases {
            run(&["open", "--test-passphrase", "--key-file", "-"], passphrase);
        }
    }
}

/// What the header says, apart from the state of its two copies.
fn described(image: &[u8]) -> Result<serde_json::Value, String> {
    let medium = Medium::new(image);
    let info = Info::read(&medium, None).map_err(|error| error.to_string())?;
    let mut info = serde_json::to_value(info).unwrap();
    for field in ["header", "sequence"] {
        info.as_object_mut().unwrap().remove(field);
    }
    for token in info["tokens"].as_array_mut().unwrap() {
        // It grows while the test runs.
        token.as_object_mut().unwrap().remove("age");
    }
    Ok(info)
}

/// Builds every state that a crash could have left, and hands it on with a name for it.
fn states(before: &[u8], log: &[Op], mut found: impl FnMut(&[u8], &str)) {
    let mut durable = before.to_vec();
    let mut pending: Vec<&Op> = Vec::new();
    found(&durable, "before");
    for (number, op) in log.iter().enumerate() {
        if let Op::Sync = op {
            pending.drain(..).for_each(|op| op.apply(&mut durable));
            found(&durable, &format!("after op {number}"));
            continue;
        }
        // Of what was not synced before it, each write may have come through, or not, or its first sector alone.
        let uncertain = pending.len().saturating_sub(2);
        for chosen in 0..3_usize.pow((pending.len() - uncertain) as u32) {
            let mut image = durable.clone();
            pending[..uncertain].iter().for_each(|op| op.apply(&mut image));
            for (i, op) in pending[uncertain..].iter().enumerate() {
                match chosen / 3_usize.pow(i as u32) % 3 {
                    0 => {}
                    1 => op.first_sector().apply(&mut image),
                    _ => op.apply(&mut image),
                }
            }
            torn(&mut image, op, &mut |image, at| {
                found(image, &format!("op {number}, earlier writes {chosen}, {at}"))
            });
        }
        pending.push(op);
    }
}

/// Tears one write: at every byte of a header that it changes, and at its sectors in any combination. Material of
/// keyslots, which nothing refers to until it is whole, is torn here and there.
fn torn(image: &mut [u8], op: &Op, found: &mut impl FnMut(&[u8], &str)) {
    let Op::Write { offset, bytes } = op else { return };
    let range = *offset..offset + bytes.len();
    let original = image[range.clone()].to_vec();
    if range.start >= 2 * COPY {
        for end in (1..8).map(|eighths| bytes.len() * eighths / 8) {
            image[range.start..range.start + end].copy_from_slice(&bytes[..end]);
            found(image, &format!("torn after byte {end}"));
        }
        image[range].copy_from_slice(&original);
        return;
    }
    let changed: Vec<usize> = (0..bytes.len()).filter(|&i| original[i] != bytes[i]).collect();
    // Noise over both copies is not an update that might be taken for whole: there every sixteenth byte will do.
    let step = if changed.len() > COPY { 16 } else { 1 };
    for some in changed.chunks(step) {
        for &i in some {
            image[range.start + i] = bytes[i];
        }
        found(image, &format!("torn after byte {}", some[some.len() - 1]));
    }
    let mut sectors: Vec<usize> = changed.iter().map(|i| i / 512).collect();
    sectors.dedup();
    // More than these only the erasure of what was there before a volume was made writes.
    sectors.truncate(8);
    for chosen in 0..1_u32 << sectors.len() {
        image[range.clone()].copy_from_slice(&original);
        for (_, sector) in sectors.iter().enumerate().filter(|(i, _)| chosen & 1 << i != 0) {
            let piece = sector * 512..(sector + 1) * 512;
            image[range.clone()][piece.clone()].copy_from_slice(&bytes[piece]);
        }
        found(image, &format!("sectors {sectors:?} torn, {chosen:b} written"));
    }
    image[range].copy_from_slice(&original);
}

/// Runs `operation` on a medium that holds `before`, and gives what it did.
fn recorded(before: &[u8], operation: impl FnOnce(&Medium<'_>)) -> Vec<Op> {
    let medium = Medium::new(before);
    operation(&medium);
    medium.log()
}

/// What `log` makes of `before`.
fn medium_after(before: &[u8], log: &[Op]) -> Medium<'static> {
    let mut after = before.to_vec();
    log.iter().for_each(|op| op.apply(&mut after));
    Medium::new(after)
}

/// A disk in memory that keeps a log, and fails when it is told to.
#[derive(Debug)]
struct Medium<'a> {
    bytes: RefCell<Cow<'a, [u8]>>,
    log: RefCell<Vec<Op>>,
    /// How many locks, changes of size, writes and syncs were asked for.
    steps: Cell<usize>,
    fault: Cell<Option<Fault>>,
    failed: Cell<bool>,
}

#[derive(Debug, Clone, Copy)]
struct Fault {
    step: usize,
    lasting: bool,
}

#[derive(Debug, Clone)]
enum Op {
    Write { offset: usize, bytes: Vec<u8> },
    SetSize(usize),
    Sync,
}

impl Op {
    fn first_sector(&self) -> Op {
        match self {
            Op::Write { offset, bytes } => Op::Write {
                offset: *offset,
                bytes: bytes[..512.min(bytes.len())].to_vec(),
            },
            op => op.clone(),
        }
    }

    fn apply(&self, image: &mut Vec<u8>) {
        match self {
            Op::Write { offset, bytes } => image[*offset..offset + bytes.len()].copy_from_slice(bytes),
            Op::SetSize(size) => image.resize(*size, 0),
            Op::Sync => {}
        }
    }
}

impl<'a> Medium<'a> {
    fn new(bytes: impl Into<Cow<'a, [u8]>>) -> Self {
        let bytes = bytes.into();
        Self {
            bytes: RefCell::new(bytes),
            log: RefCell::default(),
            steps: Cell::new(0),
            fault: Cell::new(None),
            failed: Cell::new(false),
        }
    }

    fn step(&self) -> io::Result<()> {
        let step = self.steps.replace(self.steps.get() + 1);
        match self.fault.get() {
            Some(fault) if step == fault.step || fault.lasting && step > fault.step => {
                self.failed.set(true);
                Err(io::Error::from_raw_os_error(5)) // EIO
            }
            _ => Ok(()),
        }
    }

    fn heal(&self) {
        self.fault.set(None);
    }

    fn now(&self) -> Vec<u8> {
        self.bytes.borrow().to_vec()
    }

    fn log(&self) -> Vec<Op> {
        self.log.borrow().clone()
    }

    fn reset(&self, bytes: Vec<u8>) {
        *self.bytes.borrow_mut() = bytes.into();
        self.log.borrow_mut().clear();
    }

    fn range(&self, offset: u64, len: usize) -> io::Result<Range<usize>> {
        let range = offset as usize..offset as usize + len;
        let within = range.end <= self.bytes.borrow().len();
        within
            .then_some(range)
            .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

impl HeaderIo for Medium<'_> {
    fn path(&self) -> &Path {
        Path::new("medium")
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.bytes.borrow().len() as u64)
    }

    fn can_grow(&self) -> bool {
        true
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        self.step()?;
        self.bytes.borrow_mut().to_mut().resize(size as usize, 0);
        self.log.borrow_mut().push(Op::SetSize(size as usize));
        Ok(())
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let range = self.range(offset, buffer.len())?;
        buffer.copy_from_slice(&self.bytes.borrow()[range]);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let range = self.range(offset, bytes.len())?;
        // Of a write that fails, the beginning is written.
        let failed = self.step();
        let written = if failed.is_ok() {
            bytes.len()
        } else {
            bytes.len() / 2
        };
        self.bytes.borrow_mut().to_mut()[range.start..range.start + written]
            .copy_from_slice(&bytes[..written]);
        failed?;
        self.log.borrow_mut().push(Op::Write {
            offset: range.start,
            bytes: bytes.to_vec(),
        });
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.step()?;
        self.log.borrow_mut().push(Op::Sync);
        Ok(())
    }

    fn forget_cached(&self, _: Range<u64>) -> io::Result<()> {
        Ok(())
    }

    fn lock(&self, _: LockMode) -> io::Result<MetadataLock<'_>> {
        self.step()?;
        Ok(MetadataLock::unshared())
    }
}

fn secret(text: &str) -> SecretBytes {
    SecretBytes::take(&mut text.as_bytes().to_vec()).unwrap()
}

/// Of so many states one is opened with its keys, which takes long.
const SAMPLE: u32 = 151;

/// Length of one copy of the header.
const COPY: usize = 16 << 10;

/// Where cryptsetup and we put the second keyslot's material.
const MATERIAL: Range<usize> = 2 * COPY..2 * COPY + 2 * 258048;
const MATERIAL_OF_OLD_KEY: Range<usize> = 2 * COPY + 258048..2 * COPY + 2 * 258048;
