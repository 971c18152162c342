//! LUKS2 both ways, with stock cryptsetup as the judge: what sealblk writes it accepts, what it writes sealblk opens.

use std::fs::{self, File};
use std::io::Write;
use std::ops::Deref;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use sealblk::cipher::{KernelChoice, Reader, Sector, SectorSize, Workspace};
use sealblk::keys::binding::{self, BindingReason, CopiesInfo, CreateOptions, Info, create};
use sealblk::keys::{KeyProvider, Providers};
use sealblk::luks2::{
    Argon2Cost, FileLock, HeaderError, HeaderIo, HeaderState, LockMode, Locked, MetadataLock, Reason,
    Refusal, Volume,
};
use sealblk::map::{SegmentTable, Treatment};
use sealblk::providers::{registry::Backup, registry::Registry, registry::Source};
use sealblk::storage::{Access, Backing, Claim};
use sealblk_secmem::arena::SecretBytes;
use serde_json::Value;
use vm_memory::VolatileSlice;

fn as_io(payload: &Option<Opened>) -> Option<&dyn HeaderIo> {
    payload.as_ref().map(|opened| &opened.backing as &dyn HeaderIo)
}

/// Storage, and the claim on it.
struct Opened {
    backing: Backing,
    _claim: Option<Claim>,
}

impl Deref for Opened {
    type Target = Backing;

    fn deref(&self) -> &Backing {
        &self.backing
    }
}

const PASSPHRASE: &str = "correct horse battery staple";
const RECOVERY: &str = "rk-1234-5678";
const CHEAP: Argon2Cost = Argon2Cost {
    time: 4,
    memory_kib: 32,
    lanes: 1,
};
const MIB: u64 = 1 << 20;

// What we write, cryptsetup accepts.

#[test]
fn cryptsetup_dumps_and_opens_a_new_volume() {
    for sector_size in [SectorSize::B512, SectorSize::B4096] {
        let disk = Disk::created(sector_size);
        let dump = disk.cryptsetup(&["luksDump", DISK]);
        assert!(dump.contains(&disk.info().uuid.to_string()), "{dump}");
        assert!(dump.contains("Label:         \troot disk"), "{dump}");
        assert!(dump.contains("0: sealblk"), "{dump}");
        assert!(
            dump.contains(&format!("sector: {} [bytes]", sector_size.bytes())),
            "{dump}"
        );
        disk.cryptsetup_opens(RECOVERY);
    }
}

#[test]
fn a_new_volume_opens_by_its_provider_and_by_its_recovery_key() {
    let disk = Disk::created(SectorSize::B512);
    assert_eq!(disk.unlock_with_provider().unwrap().keyslot(), 0);
    let volume = disk.unlock(RECOVERY).unwrap();
    assert_eq!((volume.keyslot(), volume.layout().capacity), (1, 8 * MIB));
    assert!(matches!(
        disk.unlock("wrong"),
        Err(Reason::WrongPassphrase { .. })
    ));
}

#[test]
fn the_volume_key_that_cryptsetup_finds_encrypts_what_our_table_encrypts() {
    for sector_size in [SectorSize::B512, SectorSize::B4096] {
        let disk = Disk::created(sector_size);
        let key_file = disk.dir.path().join("key");
        let arguments = [
            "luksDump",
            "--dump-volume-key",
            "--volume-key-file",
            key_file.to_str().unwrap(),
            DISK,
        ];
        disk.cryptsetup_with(RECOVERY, &arguments);
        let key = fs::read(&key_file).unwrap();
        assert_eq!(
            encrypted(&disk.unlock(RECOVERY).unwrap()),
            expected(&key, sector_size, 16 * MIB)
        );
    }
}

#[test]
fn a_volume_survives_a_backup_and_a_restore_of_its_header() {
    let disk = Disk::created(SectorSize::B512);
    let backup = disk.dir.path().join("backup");
    let backup = backup.to_str().unwrap();
    disk.cryptsetup(&["luksHeaderBackup", "--header-backup-file", backup, DISK]);
    let mut file = File::options().write(true).open(&disk.path).unwrap();
    file.write_all(&vec![0; 16 * MIB as usize]).unwrap();
    disk.cryptsetup(&["luksHeaderRestore", "--header-backup-file", backup, DISK]);
    disk.unlock_with_provider().unwrap();
    disk.cryptsetup_opens(RECOVERY);
}

#[test]
fn cryptsetup_adds_and_removes_keyslots_and_the_token_stays() {
    let disk = Disk::created(SectorSize::B512);
    let new_key = disk.dir.path().join("new");
    fs::write(&new_key, PASSPHRASE).unwrap();
    let mut arguments = vec!["luksAddKey"];
    arguments.extend(CHEAP_PBKDF);
    arguments.extend([DISK, new_key.to_str().unwrap()]);
    disk.cryptsetup_with(RECOVERY, &arguments);
    assert_eq!(disk.unlock(PASSPHRASE).unwrap().keyslot(), 2);
    disk.unlock_with_provider().unwrap();

    disk.cryptsetup_with(PASSPHRASE, &["luksKillSlot", DISK, "1"]);
    assert!(matches!(
        disk.unlock(RECOVERY),
        Err(Reason::WrongPassphrase { .. })
    ));
    disk.unlock(PASSPHRASE).unwrap();
    disk.unlock_with_provider().unwrap();
}

#[test]
fn cryptsetup_exports_our_token_and_leaves_it_whole_through_an_import_of_another() {
    let disk = Disk::created(SectorSize::B512);
    let exported: Value =
        serde_json::from_str(&disk.cryptsetup(&["token", "export", "--token-id", "0", DISK])).unwrap();
    assert_eq!(exported["type"], "sealblk");
    assert_eq!(exported["keyslots"], serde_json::json!(["0"]));
    assert_eq!(exported["provider"], "native");
    assert_eq!(exported["key_id"], disk.info().tokens[0].key_id.clone().unwrap());

    let foreign = disk.dir.path().join("foreign");
    fs::write(
        &foreign,
        r#"{"type":"someone-elses","keyslots":["1"],"blob":{"nested":[1,2,{"a":null}]}}"#,
    )
    .unwrap();
    disk.cryptsetup(&["token", "import", "--json-file", foreign.to_str().unwrap(), DISK]);
    disk.unlock_with_provider().unwrap();

    // And ours leaves the other one whole.
    let (header, _) = disk.backings(Access::ReadWrite);
    let mut locked = Locked::open(&*header, None).unwrap();
    let volume = binding::unlock(&locked, &disk.providers).unwrap();
    locked
        .add_passphrase(&volume, &secret(PASSPHRASE), CHEAP)
        .unwrap();
    let metadata = disk.metadata();
    assert_eq!(
        metadata["tokens"]["1"]["blob"],
        serde_json::json!({"nested": [1, 2, {"a": null}]})
    );
    disk.cryptsetup_opens(PASSPHRASE);
}

#[test]
fn cryptsetup_repairs_either_copy_and_so_do_we() {
    for damaged in [0, 16 << 10] {
        let disk = Disk::created(SectorSize::B512);
        disk.damage(damaged);
        assert!(matches!(disk.info().header, CopiesInfo::NeedsRepair { .. }));
        disk.cryptsetup(&["repair", DISK]);
        assert_eq!(disk.info().header, CopiesInfo::Sound);
        disk.unlock_with_provider().unwrap();

        disk.damage(damaged);
        let (header, _) = disk.backings(Access::ReadWrite);
        let locked = Locked::open(&*header, None).unwrap();
        assert!(matches!(locked.header_state(), HeaderState::Repaired { .. }));
        drop(header);
        assert_eq!(disk.info().header, CopiesInfo::Sound);
        let dump = disk.cryptsetup(&["luksDump", "--debug", DISK]);
        assert!(!dump.contains("requires recovery"), "{dump}");
    }
}

#[test]
fn recovery_keys_come_and_go() {
    let disk = Disk::created(SectorSize::B512);
    let (header, _) = disk.backings(Access::ReadWrite);
    let mut locked = Locked::open(&*header, None).unwrap();
    let volume = binding::unlock(&locked, &disk.providers).unwrap();
    let keyslot = locked
        .add_passphrase(&volume, &secret(PASSPHRASE), CHEAP)
        .unwrap();
    assert_eq!(keyslot, 2);
    disk.cryptsetup_opens(PASSPHRASE);
    let area = area_of(&disk.metadata(), "1");
    let before = read_range(&disk.path, area);

    locked.remove_passphrase(1, &volume).unwrap();
    assert_ne!(
        read_range(&disk.path, area),
        before,
        "the material is still there"
    );
    assert!(
        !disk
            .try_cryptsetup(RECOVERY, &["open", "--test-passphrase", DISK])
            .status
            .success()
    );
    disk.cryptsetup_opens(PASSPHRASE);

    let other = locked.unlock_with_passphrase(&secret(PASSPHRASE)).unwrap();
    let error = locked.remove_passphrase(2, &other).unwrap_err();
    assert!(matches!(*error.reason, Reason::SameKey { keyslot: 2 }), "{error}");
    let error = locked.remove_passphrase(0, &other).unwrap_err();
    assert!(
        matches!(*error.reason, Reason::NoRecoveryKey { keyslot: 0 }),
        "{error}"
    );

    // cryptsetup puts another key where the one was that we have seen: that one nobody asked to remove.
    let new_key = disk.dir.path().join("new");
    fs::write(&new_key, "another").unwrap();
    let mut arguments = vec!["luksChangeKey", "--key-slot", "2"];
    arguments.extend(CHEAP_PBKDF);
    arguments.extend([DISK, new_key.to_str().unwrap()]);
    disk.cryptsetup_with(PASSPHRASE, &arguments);
    let error = locked.remove_passphrase(2, &volume).unwrap_err();
    assert!(matches!(*error.reason, Reason::ChangedMeanwhile), "{error}");
    disk.cryptsetup_opens("another");
}

// What cryptsetup writes, we open.

#[test]
fn volumes_of_cryptsetup_open_whatever_their_key_derivation_and_sizes() {
    for options in [
        &["--pbkdf", "argon2id"][..],
        &["--pbkdf", "argon2i"],
        &["--pbkdf", "argon2id", "--sector-size", "4096"],
        &[
            "--pbkdf",
            "argon2id",
            "--luks2-metadata-size",
            "32k",
            "--luks2-keyslots-size",
            "1M",
        ],
        &["--pbkdf", "argon2id", "--luks2-metadata-size", "4M"],
        &[
            "--pbkdf",
            "argon2id",
            "--luks2-keyslots-size",
            "2M",
            "--offset",
            "40960",
        ],
        &["--pbkdf", "argon2id", "--hash", "sha512", "--header"],
        &["--pbkdf", "argon2id", "--label", "other's", "--subsystem", "sub"],
    ] {
        let disk = Disk::formatted(options);
        let volume = disk
            .unlock(PASSPHRASE)
            .unwrap_or_else(|reason| panic!("{options:?}: {reason}"));
        let info = disk.info();
        let segment = &info.segments[0];
        assert_eq!(
            volume.layout().capacity,
            40 * MIB - segment.offset.unwrap(),
            "{options:?}"
        );
        assert!(matches!(
            disk.unlock("wrong"),
            Err(Reason::WrongPassphrase { .. })
        ));
    }
}

#[test]
fn pbkdf2_volumes_of_cryptsetup_open_under_every_hash() {
    for hash in ["sha1", "sha256", "sha512"] {
        let disk = Disk::formatted(&["--pbkdf", "pbkdf2", "--hash", hash]);
        disk.unlock(PASSPHRASE).unwrap();
    }
}

#[test]
fn a_volume_key_from_a_file_encrypts_what_our_table_encrypts() {
    let key: Vec<u8> = (0..64).map(|i| i * 3 + 1).collect();
    for (sector_size, text) in [(SectorSize::B512, "512"), (SectorSize::B4096, "4096")] {
        let disk = Disk::empty(40 * MIB);
        let key_file = disk.dir.path().join("key");
        fs::write(&key_file, &key).unwrap();
        let options = [
            "--pbkdf",
            "argon2id",
            "--sector-size",
            text,
            "--volume-key-file",
            key_file.to_str().unwrap(),
        ];
        disk.format(&options);
        assert_eq!(
            encrypted(&disk.unlock(PASSPHRASE).unwrap()),
            expected(&key, sector_size, 16 * MIB)
        );
    }
}

#[test]
fn a_keyslot_to_be_ignored_is_not_tried() {
    let disk = Disk::formatted(&["--pbkdf", "argon2id"]);
    disk.cryptsetup(&["config", "--priority", "ignore", "--key-slot", "0", DISK]);
    assert!(matches!(disk.unlock(PASSPHRASE), Err(Reason::NoKeyslots)));
    disk.cryptsetup(&["config", "--priority", "normal", "--key-slot", "0", DISK]);
    disk.unlock(PASSPHRASE).unwrap();
    disk.cryptsetup(&["config", "--priority", "prefer", "--key-slot", "0", DISK]);
    disk.unlock(PASSPHRASE).unwrap();
}

// Both at a time.

#[test]
fn cryptsetup_waits_for_our_lock_and_we_wait_for_theirs() {
    let disk = Disk::created(SectorSize::B512);
    let file = File::options().read(true).write(true).open(&disk.path).unwrap();
    let lock = MetadataLock::acquire(&file, LockMode::Write, FileLock::Flock).unwrap();
    let mut child = Command::new("cryptsetup")
        .args(["luksDump", disk.path.to_str().unwrap()])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let ours = thread::scope(|scope| {
        let ours = scope.spawn(|| disk.info());
        thread::sleep(Duration::from_millis(300));
        assert!(child.try_wait().unwrap().is_none(), "cryptsetup did not wait");
        assert!(!ours.is_finished(), "we did not wait");
        drop(lock);
        ours.join().unwrap()
    });
    assert!(ours.servable);
    assert!(child.wait().unwrap().success());
}

#[test]
fn keyslots_that_both_add_at_a_time_are_all_there() {
    let disk = Disk::created(SectorSize::B512);
    let (header, _) = disk.backings(Access::ReadWrite);
    thread::scope(|scope| {
        scope.spawn(|| {
            for i in 0..4 {
                let new_key = disk.dir.path().join(format!("new {i}"));
                fs::write(&new_key, format!("theirs {i}")).unwrap();
                let mut arguments = vec!["luksAddKey"];
                arguments.extend(CHEAP_PBKDF);
                arguments.extend([DISK, new_key.to_str().unwrap()]);
                // It gives up when it finds that somebody was faster.
                while !disk.try_cryptsetup(RECOVERY, &arguments).status.success() {}
            }
        });
        let mut locked = Locked::open(&*header, None).unwrap();
        let volume = binding::unlock(&locked, &disk.providers).unwrap();
        for i in 0..4 {
            locked
                .add_passphrase(&volume, &secret(&format!("ours {i}")), CHEAP)
                .unwrap();
            thread::sleep(Duration::from_millis(100));
        }
    });
    drop(header);
    for i in 0..4 {
        disk.cryptsetup_opens(&format!("ours {i}"));
        disk.unlock(&format!("theirs {i}")).unwrap();
    }
    assert_eq!(disk.info().keyslots.len(), 10);
}

// What is refused, and why.

#[test]
fn other_ciphers_and_key_lengths_are_refused() {
    let disk = Disk::formatted(&["--pbkdf", "argon2id", "--key-size", "256"]);
    assert!(matches!(
        disk.unlock(PASSPHRASE),
        Err(Reason::Refused(Refusal::KeySize { bits: 256, .. }))
    ));
    let disk = Disk::formatted(&[
        "--pbkdf",
        "argon2id",
        "--cipher",
        "aes-cbc-essiv:sha256",
        "--key-size",
        "256",
    ]);
    assert!(matches!(
        disk.unlock(PASSPHRASE),
        Err(Reason::Refused(Refusal::Cipher { .. }))
    ));
    let info = disk.info();
    assert!(!info.servable);
    assert!(info.refusal.unwrap().contains("aes-cbc-essiv:sha256"));
}

#[test]
fn sector_sizes_other_than_512_and_4096_are_refused() {
    let disk = Disk::formatted(&["--pbkdf", "argon2id", "--sector-size", "2048"]);
    assert!(matches!(
        disk.unlock(PASSPHRASE),
        Err(Reason::Refused(Refusal::SectorSize { bytes: 2048, .. }))
    ));
}

#[test]
fn luks1_and_what_is_no_volume_are_told_apart() {
    let disk = Disk::empty(8 * MIB);
    let unlocked = disk.unlock(PASSPHRASE);
    assert!(matches!(
        unlocked,
        Err(Reason::Header(HeaderError::NotLuks { looks_like: None }))
    ));
    let arguments = [
        "luksFormat",
        "--type",
        "luks1",
        "--pbkdf-force-iterations",
        "1000",
        DISK,
    ];
    disk.cryptsetup_with(PASSPHRASE, &arguments);
    assert!(matches!(
        disk.unlock(PASSPHRASE),
        Err(Reason::Header(HeaderError::Luks1))
    ));
}

#[test]
fn a_reencryption_that_has_begun_is_refused_and_served_again_when_it_is_done() {
    let disk = Disk::formatted(&["--pbkdf", "argon2id"]);
    let mut begin = vec!["reencrypt", "--init-only", "--force-offline-reencrypt"];
    begin.extend(CHEAP_PBKDF);
    begin.push(DISK);
    disk.cryptsetup_with(PASSPHRASE, &begin);
    assert!(matches!(
        disk.unlock(PASSPHRASE),
        Err(Reason::Refused(Refusal::MidReencryption))
    ));
    disk.cryptsetup_with(
        PASSPHRASE,
        &["reencrypt", "--resume-only", "--force-offline-reencrypt", DISK],
    );
    disk.unlock(PASSPHRASE).unwrap();
}

#[test]
fn a_payload_that_was_cut_short_is_refused() {
    let disk = Disk::created(SectorSize::B512);
    File::options()
        .write(true)
        .open(&disk.path)
        .unwrap()
        .set_len(23 * MIB)
        .unwrap();
    let unlocked = disk.unlock(RECOVERY);
    assert!(matches!(
        unlocked,
        Err(Reason::Refused(Refusal::PayloadTruncated { .. }))
    ));
    File::options()
        .write(true)
        .open(&disk.path)
        .unwrap()
        .set_len(MIB)
        .unwrap();
    assert!(matches!(
        disk.unlock(RECOVERY),
        Err(Reason::Header(HeaderError::Truncated { .. }))
    ));
}

#[test]
fn a_detached_header_without_its_payload_is_refused() {
    let disk = Disk::formatted(&["--pbkdf", "argon2id", "--header"]);
    let header = Backing::open(disk.header.as_ref().unwrap(), Access::ReadOnly).unwrap();
    let error = Locked::open(&header, None).unwrap_err();
    assert!(
        matches!(*error.reason, Reason::Refused(Refusal::Detached { .. })),
        "{error}"
    );
}

#[test]
fn a_token_of_another_volume_says_so() {
    let disk = Disk::created(SectorSize::B512);
    disk.cryptsetup(&["luksUUID", "--uuid", "6f2d5a2e-8b0e-4a43-9c39-0f4a63c0a001", DISK]);
    assert!(matches!(
        disk.unlock_with_provider(),
        Err(BindingReason::ForeignToken { token: 0, .. })
    ));
    disk.unlock(RECOVERY).unwrap();
}

#[test]
fn a_volume_is_not_made_over_another_unless_told() {
    let disk = Disk::formatted(&["--pbkdf", "argon2id"]);
    let (header, _) = disk.backings(Access::ReadWrite);
    let mut options = CreateOptions {
        capacity: None,
        sector_size: SectorSize::B512,
        label: "",
        binding: None,
        recovery_key: Some((&secret(RECOVERY), CHEAP)),
        overwrite: false,
    };
    let error = create(&*header, None, &options).unwrap_err();
    assert!(
        matches!(*error.reason, BindingReason::Volume(Reason::AlreadyLuks)),
        "{error}"
    );
    drop(header);
    disk.unlock(PASSPHRASE).unwrap();
    let (header, _) = disk.backings(Access::ReadWrite);
    options.overwrite = true;
    create(&*header, None, &options).unwrap();
    drop(header);
    assert_eq!(disk.unlock(RECOVERY).unwrap().layout().capacity, 24 * MIB);
    disk.cryptsetup_opens(RECOVERY);
}

#[test]
fn a_detached_header_of_ours_opens_with_cryptsetup() {
    let mut disk = Disk::empty(0);
    let header = disk.dir.path().join("header");
    File::create(&header).unwrap();
    disk.header = Some(header);
    let (header, payload) = disk.backings(Access::ReadWrite);
    let recovery = secret(RECOVERY);
    let options = CreateOptions {
        capacity: Some(8 * MIB),
        sector_size: SectorSize::B512,
        label: "",
        binding: None,
        recovery_key: Some((&recovery, CHEAP)),
        overwrite: false,
    };
    create(&*header, as_io(&payload), &options).unwrap();
    drop((header, payload));
    assert_eq!(fs::metadata(&disk.path).unwrap().len(), 8 * MIB);
    disk.cryptsetup_opens(RECOVERY);
    assert_eq!(disk.unlock(RECOVERY).unwrap().layout().capacity, 8 * MIB);
}

/// 8 KiB of zeros from sector 8 on, as they lie on storage, and where.
fn encrypted(volume: &Volume) -> (u64, Vec<u8>) {
    let table = SegmentTable::of(volume, KernelChoice::default()).unwrap();
    let extent = table.extent(Sector(8), 16);
    assert_eq!(extent.sectors, 16);
    let treatment = table.treatment(extent.treatment);
    assert!(matches!(treatment, Treatment::Crypt(_)));
    let mut plain = vec![0; 8192];
    let mut stored = vec![0; 8192];
    treatment.encrypt(
        extent.iv,
        &[VolatileSlice::from(&mut plain[..])],
        &mut stored,
        Reader::Processor,
        &mut Workspace::new().unwrap(),
    );
    (extent.offset, stored)
}

/// The same by an implementation that knows nothing of ours.
fn expected(key: &[u8], sector_size: SectorSize, payload: u64) -> (u64, Vec<u8>) {
    use aes::cipher::KeyInit;
    let half = |half: &[u8]| aes::Aes256::new_from_slice(half).unwrap();
    let xts = xts_mode::Xts128::new(half(&key[..32]), half(&key[32..]));
    let mut bytes = vec![0; 8192];
    for (i, unit) in bytes.chunks_mut(sector_size.bytes()).enumerate() {
        let sector = 8 + (i * sector_size.bytes() / 512) as u128;
        xts.encrypt_sector(unit, xts_mode::get_tweak_default(sector));
    }
    (payload + 8 * 512, bytes)
}

fn area_of(metadata: &Value, keyslot: &str) -> (u64, usize) {
    let area = &metadata["keyslots"][keyslot]["area"];
    let number = |name: &str| area[name].as_str().unwrap().parse::<u64>().unwrap();
    (number("offset"), number("size") as usize)
}

fn read_range(path: &Path, (offset, len): (u64, usize)) -> Vec<u8> {
    let mut bytes = vec![0; len];
    File::open(path)
        .unwrap()
        .read_exact_at(&mut bytes, offset)
        .unwrap();
    bytes
}

/// A disk in a directory of its own.
struct Disk {
    dir: tempfile::TempDir,
    path: PathBuf,
    header: Option<PathBuf>,
    providers: Registry,
}

impl Disk {
    fn empty(size: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        File::create(&path).unwrap().set_len(size).unwrap();
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
        Self {
            dir,
            path,
            header: None,
            providers,
        }
    }

    /// A volume of ours: 8 MiB, keyslot 0 for the provider, keyslot 1 for the recovery key.
    fn created(sector_size: SectorSize) -> Self {
        let disk = Self::empty(0);
        let (header, payload) = disk.backings(Access::ReadWrite);
        let provider = disk.provider();
        let key_id = provider.create_kek().unwrap();
        let options = CreateOptions {
            capacity: Some(8 * MIB),
            sector_size,
            label: "root disk",
            binding: Some((&*provider, &key_id)),
            recovery_key: Some((&secret(RECOVERY), CHEAP)),
            overwrite: false,
        };
        create(&*header, as_io(&payload), &options).unwrap();
        disk
    }

    /// A volume of cryptsetup's, 8 MiB, with these options.
    fn formatted(options: &[&str]) -> Self {
        let mut disk = Self::empty(40 * MIB);
        if options.contains(&"--header") {
            disk.header = Some(disk.dir.path().join("header"));
            File::create(disk.dir.path().join("header"))
                .unwrap()
                .set_len(16 * MIB)
                .unwrap();
        }
        disk.format(options);
        disk
    }

    fn format(&self, options: &[&str]) {
        let options = options.iter().filter(|&&option| option != "--header");
        let mut arguments = vec!["luksFormat", "--type", "luks2", "--cipher", "aes-xts-plain64"];
        if !options.clone().any(|option| *option == "--key-size") {
            arguments.extend(["--key-size", "512"]);
        }
        match options.clone().any(|option| *option == "pbkdf2") {
            true => arguments.extend(["--pbkdf-force-iterations", "1000"]),
            false => arguments.extend(CHEAP_PBKDF),
        }
        arguments.extend(options);
        arguments.push(DISK);
        self.cryptsetup_with(PASSPHRASE, &arguments);
    }

    fn provider(&self) -> Arc<dyn KeyProvider> {
        self.providers.provider("native").unwrap()
    }

    /// The header and the payload, if that is apart. What can be written is claimed: nothing else of a header is changed.
    fn backings(&self, access: Access) -> (Opened, Option<Opened>) {
        let open = |path: &Path| {
            let backing = Backing::open(path, access).unwrap();
            let claim = (access == Access::ReadWrite).then(|| backing.claim().unwrap());
            Opened {
                backing,
                _claim: claim,
            }
        };
        match &self.header {
            Some(header) => (open(header), Some(open(&self.path))),
            None => (open(&self.path), None),
        }
    }

    /// Spoils a byte of the copy of the header that starts at `offset`.
    fn damage(&self, offset: u64) {
        let (at, header) = (
            offset + 100,
            File::options().read(true).write(true).open(&self.path).unwrap(),
        );
        let mut byte = [0];
        header.read_exact_at(&mut byte, at).unwrap();
        header.write_all_at(&[byte[0] ^ 0xff], at).unwrap();
    }

    fn info(&self) -> Info {
        let (header, payload) = self.backings(Access::Inspect);
        Info::read(&*header, as_io(&payload)).unwrap()
    }

    fn unlock(&self, passphrase: &str) -> Result<Volume, Reason> {
        let (header, payload) = self.backings(Access::ReadWrite);
        let locked = Locked::open(&*header, as_io(&payload)).map_err(|error| *error.reason)?;
        locked
            .unlock_with_passphrase(&secret(passphrase))
            .map_err(|error| *error.reason)
    }

    fn unlock_with_provider(&self) -> Result<Volume, BindingReason> {
        let (header, payload) = self.backings(Access::ReadWrite);
        let locked = Locked::open(&*header, as_io(&payload)).unwrap();
        binding::unlock(&locked, &self.providers).map_err(|error| *error.reason)
    }

    /// Runs cryptsetup on this disk: its command and options, for which it succeeds.
    fn cryptsetup(&self, arguments: &[&str]) -> String {
        self.cryptsetup_with("", arguments)
    }

    fn cryptsetup_with(&self, input: &str, arguments: &[&str]) -> String {
        let output = self.try_cryptsetup(input, arguments);
        let text = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(output.status.success(), "cryptsetup {arguments:?}: {text}");
        text
    }

    fn try_cryptsetup(&self, input: &str, arguments: &[&str]) -> Output {
        let mut command = Command::new("cryptsetup");
        command.arg("--batch-mode");
        if let Some(header) = &self.header {
            command.arg("--header").arg(header);
        }
        if !input.is_empty() {
            command.args(["--key-file", "-"]);
        }
        for argument in arguments {
            match *argument {
                DISK => command.arg(&self.path),
                argument => command.arg(argument),
            };
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    }

    fn cryptsetup_opens(&self, passphrase: &str) {
        self.cryptsetup_with(passphrase, &["open", "--test-passphrase", DISK]);
    }

    fn metadata(&self) -> Value {
        serde_json::from_str(&self.cryptsetup(&["luksDump", "--dump-json-metadata", DISK])).unwrap()
    }
}

/// Stands for the disk's path in cryptsetup's arguments.
const DISK: &str = "DISK";

const CHEAP_PBKDF: [&str; 6] = [
    "--pbkdf-force-iterations",
    "4",
    "--pbkdf-memory",
    "32",
    "--pbkdf-parallel",
    "1",
];

fn secret(text: &str) -> SecretBytes {
    SecretBytes::take(&mut text.as_bytes().to_vec()).unwrap()
}
