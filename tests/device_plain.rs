//! Disks that are no volume, served as they are by `--allow-unencrypted`; and that no volume is ever taken for one.

mod common;

use common::driver::{Data, S_OK, T_GET_ID};
use common::pattern;
use common::serve::{Server, serve_fails};
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
    assert_eq!(ended.status.code(), Some(code), "{}", ended.stderr);
    for text in says {
        assert!(
            ended.stderr.contains(text),
            "nothing of {text:?} in: {}",
            ended.stderr
        );
    }
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
            ended.stderr.contains("nothing of it is encrypted"),
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
    refused(&volume, &[], VOLUME, &["LUKS2", "not served as a plain disk"]);
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
            &["--passphrase-file", "plain disk"],
        );
    }
    refused(&volume, &["--header", key], USAGE, &["--header"]);
}

#[test]
fn sector_size_is_for_plain_disks_alone() {
    let mut volume = Volume::created(MIB, 512);
    refused(&volume, &["--sector-size", "512"], USAGE, &["its sector size"]);
    volume.open.push("--allow-unencrypted".into());
    refused(&volume, &["--sector-size", "512"], USAGE, &["its sector size"]);
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
