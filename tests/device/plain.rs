//! Disks that are no volume, served as they are by `--allow-unencrypted`; and that no volume is ever taken for one.

use base16ct::lower;
use common::driver::{Data, S_OK, T_GET_ID};
use common::pattern;
use common::serve::{Server, sealblk_path, serve_fails};
use common::volume::{MIB, Volume, run};
use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Command;

const USAGE: i32 = 2;
const VOLUME: i32 = 3;
const STORAGE: i32 = 6;

/// It ends with this exit code, says all of this, and leaves the file as it was.
fn refused(volume: &Volume, args: &[&str], code: i32, says: &[&str]) {
    let before = volume.bytes();
    let ended = serve_fails(volume, args);
    ended.assert_says(code, says);
    assert!(volume.bytes() == before, "the file changed");
}

#[test]
fn plain_disk_lies_on_storage_as_the_guest_wrote_it() {
    for sector_size in ["512", "4096"] {
        let volume = Volume::plain(8 * MIB);
        let found = pattern(1, 2 * MIB as usize);
        volume.file().write_all_at(&found, 5 * MIB).unwrap();

        let server = Server::with(&volume, &["--sector-size", sector_size]);
        let mut driver = server.connect();
        assert_eq!(driver.capacity(), 8 * 2048);
        assert_eq!(
            driver.frontend.config(20, 4).unwrap(),
            sector_size.parse::<u32>().unwrap().to_le_bytes()
        );
        assert!(driver.read(5 * 2048, found.len()) == found);
        let written = pattern(2, MIB as usize + 4096);
        for sector in [0, 3 * 2048, 8 * 2048 - 2056] {
            driver.write(sector, &written);
            driver.flush();
            assert!(volume.stored(sector * 512, written.len()) == written);
        }
        drop(driver);
        let ended = server.stop();
        assert!(
            ended.stderr.contains("serving it as an unencrypted disk"),
            "{}",
            ended.stderr
        );
        assert_eq!(volume.bytes().len() as u64, 8 * MIB);
    }
}

#[test]
fn serial_of_a_plain_disk_is_that_of_its_path() {
    let volume = Volume::plain(MIB);
    let sum = run(Command::new("sh")
        .args(["-c", "printf %s \"$0\" | sha256sum"])
        .arg(&volume.path))
    .stdout;
    let id = Server::with(&volume, &[])
        .connect()
        .run(T_GET_ID, 0, Data::In(20));
    assert_eq!((id.status, &id.data[..]), (S_OK, &sum[..20]));
}

#[test]
fn volume_is_served_decrypted_with_the_option_too() {
    let mut volume = Volume::new();
    volume.open.push("--allow-unencrypted".into());
    let bytes = pattern(3, 65_536);
    let server = Server::with(&volume, &[]);
    let mut driver = server.connect();
    assert_eq!(driver.capacity(), 64 * 2048);
    driver.write(64, &bytes);
    driver.flush();
    drop(driver);
    server.stop();
    assert!(volume.stored(volume.payload_offset() + 64 * 512, bytes.len()) != bytes);
    volume.open.pop();
    assert!(Server::with(&volume, &[]).connect().read(64, bytes.len()) == bytes);
}

/// A guest that got its ciphertext would take the disk for an empty one, and write over it.
#[test]
fn damaged_volume_is_no_plain_disk() {
    // What of a copy is overwritten: a letter of its magic, its version, its binary header, its JSON metadata and the
    // letters of its magic (which leaves nothing that is known), something in the middle.
    let damages: [&[(u64, usize)]; 5] = [
        &[(5, 1)],
        &[(6, 2)],
        &[(0, 4096)],
        &[(0, 4), (4096, 12288)],
        &[(0xa8, 8)],
    ];
    let mut volume = Volume::created(MIB, 512);
    volume.open.push("--allow-unencrypted".into());
    let sound = volume.bytes();
    for (number, primary) in damages.into_iter().enumerate() {
        // Where nothing is left of either, nothing tells the volume from noise: what the operator says holds.
        let others = damages.into_iter().enumerate();
        for (_, secondary) in others.filter(|&(other, _)| (number, other) != (3, 3)) {
            fs::write(&volume.path, &sound).unwrap();
            for (at, damage) in [(0, primary), (0x4000, secondary)] {
                for &(offset, len) in damage {
                    volume.file().write_all_at(&vec![0; len], at + offset).unwrap();
                }
            }
            refused(&volume, &[], VOLUME, &["LUKS2", "backup"]);
        }
    }
}

#[test]
fn luks1_volume_and_cut_off_header_are_no_plain_disks() {
    let volume = Volume::plain(8 * MIB);
    let pass = volume.beside("pass");
    fs::write(&pass, "x").unwrap();
    run(Command::new("cryptsetup")
        .args(["luksFormat", "--batch-mode", "--type", "luks1"])
        .args(["--pbkdf-force-iterations", "1000"])
        .args([&volume.path, &pass]));
    refused(&volume, &[], VOLUME, &["LUKS1"]);
    fs::write(&volume.path, b"LUKS\xba\xbe\0\x02").unwrap();
    refused(
        &volume,
        &[],
        VOLUME,
        &["LUKS2", "not served as an unencrypted disk"],
    );
}

/// The text for a qcow2 file recommended --allow-unencrypted, which then served the container, raw and writable.
#[test]
fn image_in_which_a_disk_is_packed_is_no_plain_disk() {
    let images: [(&str, &str, &str); 9] = [
        ("qcow2", "", "a qcow2 image"),
        ("qed", "", "a QED image"),
        ("vmdk", "", "a VMDK image"),
        ("vmdk", "subformat=monolithicFlat", "a VMDK image"),
        ("vhdx", "", "a VHDX image"),
        ("vpc", "", "a VHD image"),
        ("vpc", "subformat=fixed", "a VHD image"),
        ("vdi", "", "a VDI image"),
        ("parallels", "", "a Parallels image"),
    ];
    let mut volume = Volume::plain(MIB);
    for (format, options, name) in images {
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", format]);
        if !options.is_empty() {
            create.args(["-o", options]);
        }
        run(create.arg(&volume.path).arg("4M"));
        let unpack = format!(
            "qemu-img convert -f {format} -O raw {} NEWFILE",
            volume.path.display()
        );
        volume.open = vec!["--allow-unencrypted".into()];
        refused(&volume, &[], VOLUME, &[name, &unpack, "--format raw"]);
        volume.open = Vec::new();
        refused(&volume, &[], VOLUME, &["not a LUKS2 volume", name, &unpack]);
        let said = serve_fails(&volume, &[]).stderr;
        assert!(!said.contains("--allow-unencrypted"), "{said}");
        assert_create_names(&volume, name);
    }
    // The advice is good.
    run(Command::new("qemu-img")
        .args(["convert", "-f", "parallels", "-O", "raw"])
        .args([&volume.path, &volume.beside("NEWFILE")]));
    volume.path = volume.beside("NEWFILE");
    volume.open = vec!["--allow-unencrypted".into()];
    assert_eq!(Server::with(&volume, &[]).connect().capacity(), 4 * 2048);

    for (command, file) in [
        ("gzip", "NEWFILE.gz"),
        ("xz", "NEWFILE.xz"),
        ("bzip2", "NEWFILE.bz2"),
    ] {
        run(Command::new(command).arg("--keep").arg(volume.beside("NEWFILE")));
        volume.path = volume.beside(file);
        refused(&volume, &[], VOLUME, &["a compressed file", "decompress it"]);
    }
}

fn assert_create_names(volume: &Volume, name: &str) {
    let before = volume.bytes();
    let mut create = Command::new(sealblk_path());
    let state = volume.beside("state");
    create
        .arg("--state-dir")
        .arg(&state)
        .arg("create")
        .arg(&volume.path);
    let output = create.args(["--size", "1M"]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains(&format!("holds {name}")), "{said}");
    assert!(volume.bytes() == before, "the file changed");
}

/// blkid is the judge of what is made here, each by the description of its format.
#[test]
fn what_belongs_to_a_pool_is_served_only_if_it_is_said_to_be_raw() {
    // libblkid looks for ZFS on nothing smaller.
    const LEN: u64 = 64 * MIB;
    let md = |magic: [u8; 4], major: u32, sector: u64| {
        let mut superblock = vec![0; 4096];
        superblock[..4].copy_from_slice(&magic);
        superblock[4..8].copy_from_slice(&major.to_le_bytes());
        superblock[16] = 1;
        superblock[144..152].copy_from_slice(&sector.to_le_bytes());
        superblock
    };
    let little = [0xfc, 0x4e, 0x2b, 0xa9];
    let last = LEN / 512 - 16;
    let mut uberblocks = vec![0; 4096];
    for uberblock in uberblocks.chunks_exact_mut(1024) {
        for (at, field) in (0..).step_by(8).zip([0x00ba_b10c_u64, 5000, 10, 11]) {
            uberblock[at..at + 8].copy_from_slice(&field.to_le_bytes());
        }
    }
    let labels = [0, 256 << 10, LEN - (512 << 10), LEN - (256 << 10)]
        .map(|label| (label + (128 << 10), uberblocks.clone()));
    let mut bcache = [8_u64.to_le_bytes(); 3].concat();
    bcache[..8].fill(0);
    bcache[16..24].fill(0);
    bcache.extend(lower::decode_vec("c68573f64e1a45ca8265f57f48ba6d81").unwrap());
    let mut bitlocker = b"\xeb\x58\x90-FVE-FS-".to_vec();
    bitlocker.resize(160, 0);
    bitlocker.extend(lower::decode_vec("3bd66749292ed84a8399f6a339e3d001").unwrap());
    bitlocker.extend(65536_u64.to_le_bytes());
    let bitlocker_metadata = b"-FVE-FS-\x40\0\x02\0".to_vec();
    let of_md = "a member of a Linux RAID (md)";
    type Pieces = Vec<(u64, Vec<u8>)>;
    let members: [(Pieces, &str, &str); 10] = [
        (
            vec![(512, lvm_label())],
            "LVM2_member",
            "a physical volume of LVM",
        ),
        (vec![(LEN - 65536, md(little, 0, 0))], "linux_raid_member", of_md),
        (
            vec![(last * 512, md(little, 1, last))],
            "linux_raid_member",
            of_md,
        ),
        (vec![(0, md(little, 1, 0))], "linux_raid_member", of_md),
        (vec![(4096, md(little, 1, 8))], "linux_raid_member", of_md),
        (labels.to_vec(), "zfs_member", "a member of a ZFS pool"),
        (vec![(4096, bcache)], "bcache", "a device of bcache"),
        (
            vec![(0, b"integrt\0\x01".to_vec())],
            "DM_integrity",
            "a device of dm-integrity",
        ),
        (
            vec![(0, b"bluestore block device\n".to_vec())],
            "ceph_bluestore",
            "a device of Ceph (BlueStore)",
        ),
        (
            vec![(0, bitlocker), (65536, bitlocker_metadata)],
            "BitLocker",
            "a BitLocker volume",
        ),
    ];
    let mut volume = Volume::plain(LEN);
    for (pieces, kind, name) in members {
        volume.file().set_len(0).unwrap();
        volume.file().set_len(LEN).unwrap();
        for (at, bytes) in &pieces {
            volume.file().write_all_at(bytes, *at).unwrap();
        }
        let blkid = run(Command::new("blkid")
            .args(["-p", "-o", "value", "-s", "TYPE"])
            .arg(&volume.path));
        assert_eq!(String::from_utf8(blkid.stdout).unwrap().trim(), kind);
        for (open, says) in [
            (vec!["--allow-unencrypted".into()], "--format raw"),
            (Vec::new(), "--allow-unencrypted --format raw"),
        ] {
            volume.open = open;
            let ended = serve_fails(&volume, &[]);
            assert_eq!(ended.status.code(), Some(VOLUME), "{}", ended.stderr);
            assert!(
                ended.stderr.contains(name) && ended.stderr.contains(says),
                "{}",
                ended.stderr
            );
        }
    }
    volume.open = vec!["--allow-unencrypted".into()];
    let server = Server::with(&volume, &["--format", "raw"]);
    assert_eq!(server.connect().read(0, 512)[3..11], *b"-FVE-FS-");
}

/// A label of LVM2 in sector 1: its number, a checksum over all that follows that, where its data begin, and its type.
fn lvm_label() -> Vec<u8> {
    let mut sector = vec![0; 512];
    sector[..8].copy_from_slice(b"LABELONE");
    sector[8] = 1;
    sector[20] = 32;
    sector[24..32].copy_from_slice(b"LVM2 001");
    sector[32..64].fill(b'a');
    let checksum = sector[20..].iter().fold(0xf597_a6cf_u32, |mut sum, byte| {
        sum ^= u32::from(*byte);
        for _ in 0..8 {
            sum = sum >> 1 ^ if sum & 1 == 1 { 0xedb8_8320 } else { 0 };
        }
        sum
    });
    sector[16..20].copy_from_slice(&checksum.to_le_bytes());
    sector
}

/// What a guest writes onto its plain disk is its own: it is never looked into, and can deny the disk to nobody if the operator
/// has said what the disk is.
#[test]
fn guest_that_writes_an_images_signature_is_served_what_it_wrote() {
    let volume = Volume::plain(MIB);
    let image = volume.beside("image");
    run(Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .args(["-o", "backing_file=/etc/hostname,backing_fmt=raw"])
        .arg(&image)
        .arg("4M"));
    let mut written = fs::read(&image).unwrap();
    written.truncate(MIB as usize);
    written.resize(written.len().next_multiple_of(512), 0);
    for args in [&[][..], &["--format", "raw"]] {
        let server = Server::with(&volume, args);
        let mut driver = server.connect();
        driver.write(0, &written);
        driver.flush();
        drop(driver);
        server.stop();
        refused(&volume, &[], VOLUME, &["a qcow2 image", "--format raw"]);
        let server = Server::with(&volume, &["--format", "raw"]);
        let mut driver = server.connect();
        assert_eq!(driver.capacity(), 2048);
        assert!(driver.read(0, written.len()) == written);
        drop(driver);
        server.stop();
        volume.file().write_all_at(&[0; 512], 0).unwrap();
    }
}

#[test]
fn format_is_named_for_plain_disks_alone() {
    let mut volume = Volume::created(MIB, 512);
    refused(&volume, &["--format", "raw"], USAGE, &["--allow-unencrypted"]);
    volume.open.push("--allow-unencrypted".into());
    refused(
        &volume,
        &["--format", "raw"],
        USAGE,
        &["LUKS2 volume", "leave out --format"],
    );
    refused(&volume, &["--format", "qcow2"], USAGE, &["raw"]);
    // Damaged it is no plain disk either, whatever it is said to be.
    volume.file().write_all_at(&[0; 4096], 0).unwrap();
    volume.file().write_all_at(&[0; 8], 0x40a8).unwrap();
    refused(&volume, &["--format", "raw"], VOLUME, &["LUKS2", "backup"]);
    // A guest may have a LUKS1 volume on its plain disk.
    let plain = Volume::plain(8 * MIB);
    let pass = plain.beside("pass");
    fs::write(&pass, "x").unwrap();
    run(Command::new("cryptsetup")
        .args(["luksFormat", "--batch-mode", "--type", "luks1"])
        .args(["--pbkdf-force-iterations", "1000"])
        .args([&plain.path, &pass]));
    refused(&plain, &[], VOLUME, &["LUKS1"]);
    let server = Server::with(&plain, &["--format", "raw"]);
    assert_eq!(server.connect().read(0, 512)[..6], *b"LUKS\xba\xbe");
}

#[test]
fn options_that_belong_to_volumes_are_refused_for_a_plain_disk() {
    let volume = Volume::plain(MIB);
    let key = volume.beside("key");
    fs::write(&key, "x").unwrap();
    let key = key.to_str().unwrap();
    for option in ["--passphrase-file", "--key-file"] {
        refused(
            &volume,
            &[option, key],
            USAGE,
            &["--passphrase-file", "unencrypted disk"],
        );
    }
    refused(&volume, &["--header", key], USAGE, &["--header"]);
}

#[test]
fn sector_size_is_for_plain_disks_alone() {
    let mut volume = Volume::created(MIB, 512);
    refused(&volume, &["--sector-size", "512"], USAGE, &["the sector size"]);
    volume.open.push("--allow-unencrypted".into());
    refused(&volume, &["--sector-size", "512"], USAGE, &["the sector size"]);
    let plain = Volume::plain(MIB);
    refused(&plain, &["--sector-size", "1024"], USAGE, &["512 or 4096"]);
}

#[test]
fn plain_disk_ends_with_its_last_whole_sector() {
    let volume = Volume::plain(MIB + 512 + 100);
    let server = Server::with(&volume, &[]);
    assert_eq!(server.connect().capacity(), 2049);
    server.stop();
    refused(
        &volume,
        &["--sector-size", "4096"],
        USAGE,
        &["multiple of the sector size, 4096"],
    );
    volume.file().set_len(511).unwrap();
    refused(&volume, &[], STORAGE, &["too few"]);
    volume.file().set_len(0).unwrap();
    refused(&volume, &[], STORAGE, &["too few"]);
}
