//! Metadata updates survive a crash at any byte.
//!
//! A medium stands in for the disk that keeps apart what was written and what was synced. An operation runs on it
//! once; then every state that a crash could have left is built and opened: at every stop point, with each of the
//! writes that were not synced yet durable or not, torn at every byte, and torn at sectors in any combination.
//! Whatever is found, the volume must be in the old state or in the new one, and every way in of that state must
//! open it. A sample of the states is shown to cryptsetup, which must find the same.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::process::{Command, Stdio};

use sealblk::cipher::SectorSize;
use sealblk::keys::arena::SecretBytes;
use sealblk::keys::registry::Registry;
use sealblk::keys::{KeyProvider, Providers};
use sealblk::volume::{
    Argon2Cost, CreateOptions, HeaderError, HeaderIo, HeaderState, Info, LockMode, Locked, MetadataLock,
    Reason, create,
};

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
    let log = recorded(&before, |medium| {
        let mut locked = Locked::open(medium, None).unwrap();
        let volume = locked.unlock_with_provider(&host.providers).unwrap();
        locked.add_recovery_key(&volume, &secret(NEW_KEY), CHEAP).unwrap();
    });
    let old = State {
        passphrases: &[OLD_KEY],
        bound: true,
    };
    let new = State {
        passphrases: &[OLD_KEY, NEW_KEY],
        bound: true,
    };
    host.replay(&before, &log, &old, &new);
}

#[test]
fn removing_a_recovery_key() {
    let host = Host::new();
    let before = host.volume();
    let log = recorded(&before, |medium| {
        Locked::open(medium, None)
            .unwrap()
            .remove_keyslot(1, false)
            .unwrap();
    });
    let old = State {
        passphrases: &[OLD_KEY],
        bound: true,
    };
    let new = State {
        passphrases: &[],
        bound: true,
    };
    host.replay(&before, &log, &old, &new);
}

#[test]
fn binding_to_a_provider_anew() {
    let host = Host::new();
    let before = host.volume();
    let log = recorded(&before, |medium| {
        let mut locked = Locked::open(medium, None).unwrap();
        let volume = locked.unlock_with_passphrase(&secret(OLD_KEY)).unwrap();
        let provider = host.provider();
        locked
            .bind(&volume, &*provider, &provider.create_kek().unwrap())
            .unwrap();
    });
    let state = State {
        passphrases: &[OLD_KEY],
        bound: true,
    };
    host.replay(&before, &log, &state, &state);
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
            locked.add_recovery_key(&volume, &secret(NEW_KEY), CHEAP).unwrap();
        });
        let old = State {
            passphrases: &[OLD_KEY],
            bound: true,
        };
        let new = State {
            passphrases: &[OLD_KEY, NEW_KEY],
            bound: true,
        };
        host.replay(&before, &log, &old, &new);
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
    locked.add_recovery_key(&volume, &secret(NEW_KEY), CHEAP).unwrap();
    let old = State {
        passphrases: &[OLD_KEY],
        bound: true,
    };
    let new = State {
        passphrases: &[OLD_KEY, NEW_KEY],
        bound: true,
    };
    host.replay(&before, &medium.log(), &old, &new);
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
                    host.opens(
                        &Medium::new(image),
                        &State {
                            passphrases: &[OLD_KEY],
                            bound: true,
                        },
                    );
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
    let log = recorded(&before, |medium| {
        Locked::open(medium, None)
            .unwrap()
            .remove_keyslot(1, false)
            .unwrap();
    });
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

/// What must be found: which passphrases open the volume, and whether the provider does.
struct State {
    passphrases: &'static [&'static str],
    bound: bool,
}

/// A host with a native provider, and volumes that are bound to it.
struct Host {
    dir: tempfile::TempDir,
    providers: Registry,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut providers = Registry::open(&dir.path().join("state")).unwrap();
        providers.add_native("native", true).unwrap();
        Self { dir, providers }
    }

    fn provider(&self) -> Box<dyn KeyProvider> {
        self.providers.provider("native").unwrap()
    }

    /// The image of a volume with 4 MiB of payload: keyslot 0 for the provider, keyslot 1 for [`OLD_KEY`].
    fn volume(&self) -> Vec<u8> {
        let medium = Medium::new(vec![0; 20 * MIB]);
        self.create_on(&medium);
        medium.now()
    }

    fn create_on(&self, medium: &Medium<'_>) {
        let provider = self.provider();
        let options = CreateOptions {
            capacity: None,
            sector_size: SectorSize::B512,
            label: "crash",
            binding: Some((&*provider, &provider.create_kek().unwrap())),
            recovery_key: Some((&secret(OLD_KEY), CHEAP)),
            overwrite: false,
        };
        create(medium, None, &options).unwrap();
    }

    /// Opens every state that a crash could have left of `log`.
    fn replay(&self, before: &[u8], log: &[Op], old: &State, new: &State) {
        let mut after = before.to_vec();
        log.iter().for_each(|op| op.apply(&mut after));
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
        assert_eq!(locked.unlock_with_provider(&self.providers).is_ok(), state.bound);
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
    for &i in &changed {
        image[range.start + i] = bytes[i];
        found(image, &format!("torn after byte {i}"));
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

/// A disk in memory that keeps a log.
#[derive(Debug)]
struct Medium<'a> {
    bytes: RefCell<Cow<'a, [u8]>>,
    log: RefCell<Vec<Op>>,
}

#[derive(Debug, Clone)]
enum Op {
    Write { offset: usize, bytes: Vec<u8> },
    Sync,
}

impl Op {
    fn first_sector(&self) -> Op {
        match self {
            Op::Write { offset, bytes } => Op::Write {
                offset: *offset,
                bytes: bytes[..512.min(bytes.len())].to_vec(),
            },
            Op::Sync => Op::Sync,
        }
    }

    fn apply(&self, image: &mut [u8]) {
        if let Op::Write { offset, bytes } = self {
            image[*offset..offset + bytes.len()].copy_from_slice(bytes);
        }
    }
}

impl<'a> Medium<'a> {
    fn new(bytes: impl Into<Cow<'a, [u8]>>) -> Self {
        let bytes = bytes.into();
        Self {
            bytes: RefCell::new(bytes),
            log: RefCell::default(),
        }
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
        false
    }

    fn set_size(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
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
        self.bytes.borrow_mut().to_mut()[range.clone()].copy_from_slice(bytes);
        self.log.borrow_mut().push(Op::Write {
            offset: range.start,
            bytes: bytes.to_vec(),
        });
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.log.borrow_mut().push(Op::Sync);
        Ok(())
    }

    fn lock(&self, _: LockMode) -> io::Result<MetadataLock<'_>> {
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
