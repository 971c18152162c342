//! Every kind of storage passes one suite of awkward requests: files and block devices, with direct I/O and without,
//! with the alignment of the guest's blocks and with a coarser one.

use common::driver::{Driver, F_DISCARD, S_OK, SECTOR, T_DISCARD, T_IN, T_OUT, T_WRITE_ZEROES, header};
use common::queue::{readable, writable};
use common::serve::Server;
use common::storage::{Filesystem, LoopDevice};
use common::volume::{MIB, Volume};
use common::{Random, pattern};
use std::fs::File;
use std::path::PathBuf;
use tempfile::TempDir;

/// The part of the disk that the suite works on, in bytes, at its start and again at its end.
const LEN: usize = 512 * 1024;

/// Requests at random places, of random lengths, in buffers cut anywhere, agree with a model; before and after the
/// server was started anew.
fn awkward_requests(volume: &Volume, args: &[&str], sector_size: usize) {
    let mut random = Random::new(1);
    let mut models = [vec![0; LEN], vec![0; LEN]];
    let server = Server::with(volume, args);
    let mut driver = server.connect();
    let starts = [0, driver.capacity() - (LEN / SECTOR) as u64];
    for start in starts {
        driver.write(start, &vec![0; LEN]);
    }
    for round in 0..150 {
        let which = random.below(2) as usize;
        let (model, start) = (&mut models[which], starts[which]);
        let unit = sector_size as u64;
        let units = LEN as u64 / unit;
        let first = random.below(units);
        let most = if random.below(4) == 0 { 64 } else { 8 };
        let count = 1 + random.below((units - first).min(most));
        let range = (first * unit) as usize..((first + count) * unit) as usize;
        let sector = start + first * unit / 512;
        match random.below(8) {
            0 => driver.flush(),
            1 => {
                let zone = (sector, (range.len() / SECTOR) as u32, random.below(2) as u32);
                assert_eq!(
                    driver.run_ranges(T_WRITE_ZEROES, &[zone]).status,
                    S_OK,
                    "round {round}"
                );
                model[range].fill(0);
            }
            2 if driver.features & F_DISCARD != 0 => {
                let zone = (sector, (range.len() / SECTOR) as u32, 0);
                assert_eq!(
                    driver.run_ranges(T_DISCARD, &[zone]).status,
                    S_OK,
                    "round {round}"
                );
                // What it holds now is the device's choice.
                let bytes = pattern(round, range.len());
                driver.write(sector, &bytes);
                model[range].copy_from_slice(&bytes);
            }
            3..=5 => {
                model[range.clone()].copy_from_slice(&pattern(round, range.len()));
                write_in_pieces(&mut driver, &mut random, sector, &model[range]);
            }
            _ => {
                let read = read_in_pieces(&mut driver, &mut random, sector, range.len());
                assert!(
                    read == model[range],
                    "round {round}: {count} units at {first} read back wrong"
                );
            }
        }
    }
    drop(driver);
    server.stop();

    let server = Server::with(volume, args);
    let mut driver = server.connect();
    for (start, model) in starts.iter().zip(&models) {
        assert!(
            driver.read(*start, LEN) == *model,
            "it is different after a restart"
        );
    }
    server.still_serves_both(driver);
}

fn write_in_pieces(driver: &mut Driver, random: &mut Random, sector: u64, bytes: &[u8]) {
    let mark = driver.memory.mark();
    let (head, data) = (
        driver.memory.filled(&header(T_OUT, sector)),
        driver.memory.filled(bytes),
    );
    let status = driver.memory.buffer(1);
    let mut chain = vec![readable(head, 16)];
    chain.extend(
        random
            .pieces(bytes.len())
            .into_iter()
            .map(|(at, len)| readable(data + at, len)),
    );
    chain.push(writable(status, 1));
    let head = driver.queue().indirect_chain(&chain);
    assert_eq!(driver.run_head(head).len, 1);
    assert_eq!(driver.memory.read(status, 1), [S_OK]);
    driver.memory.free_to(mark);
}

fn read_in_pieces(driver: &mut Driver, random: &mut Random, sector: u64, len: usize) -> Vec<u8> {
    let mark = driver.memory.mark();
    let (head, data) = (
        driver.memory.filled(&header(T_IN, sector)),
        driver.memory.buffer(len as u64),
    );
    let status = driver.memory.buffer(1);
    let mut chain = vec![readable(head, 16)];
    chain.extend(
        random
            .pieces(len)
            .into_iter()
            .map(|(at, len)| writable(data + at, len)),
    );
    chain.push(writable(status, 1));
    let head = driver.queue().indirect_chain(&chain);
    assert_eq!(driver.run_head(head).len, len as u32 + 1);
    assert_eq!(driver.memory.read(status, 1), [S_OK]);
    let bytes = driver.memory.read(data, len);
    driver.memory.free_to(mark);
    bytes
}

/// A loop device of 96 MiB, and the directory that it lies in.
fn loop_device(logical_block_size: u32) -> Option<(TempDir, LoopDevice)> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("blocks");
    File::create(&file).unwrap().set_len(96 * MIB).unwrap();
    let device = LoopDevice::over(&file, logical_block_size)?;
    Some((dir, device))
}

fn device_path(device: &LoopDevice) -> PathBuf {
    device.path().to_owned()
}

#[test]
fn file() {
    awkward_requests(&Volume::new(), &[], 512);
    awkward_requests(&Volume::new(), &["--discard"], 512);
    awkward_requests(&Volume::created(64 * MIB, 4096), &[], 4096);
}

#[test]
fn file_with_a_detached_header() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, header) = (dir.path().join("disk"), dir.path().join("header"));
    let header = header.to_str().unwrap().to_owned();
    let volume = Volume::created_at(dir, disk, &["--size", "8M", "--header", &header]);
    awkward_requests(&volume, &["--header", &header], 512);
    // Nothing but ciphertext: no header at the start, nothing before the first sector.
    assert_ne!(volume.stored(0, 6), b"LUKS\xba\xbe");
}

#[test]
fn file_without_direct_io() {
    let dir = tempfile::tempdir().unwrap();
    let Some(tmpfs) = Filesystem::tmpfs(dir.path().join("mounted"), 128 * MIB) else {
        eprintln!("skipped: nothing can be mounted here");
        return;
    };
    let volume = Volume::created_at(dir, tmpfs.path.join("disk"), &["--size", "64M"]);
    awkward_requests(&volume, &["--discard"], 512);
}

#[test]
fn file_whose_direct_io_is_coarser_than_the_guests_blocks() {
    let Some((dir, device)) = loop_device(4096) else {
        eprintln!("skipped: no loop device can be had here");
        return;
    };
    let Some(ext4) = Filesystem::ext4(dir.path().join("mounted"), device) else {
        eprintln!("skipped: nothing can be mounted here");
        return;
    };
    let volume = Volume::created_at(
        dir,
        ext4.path.join("disk"),
        &["--size", "32M", "--sector-size", "512"],
    );
    awkward_requests(&volume, &["--discard"], 512);
}

#[test]
fn block_device() {
    let Some((dir, device)) = loop_device(512) else {
        eprintln!("skipped: no loop device can be had here");
        return;
    };
    let volume = Volume::created_at(dir, device_path(&device), &[]);
    awkward_requests(&volume, &["--discard"], 512);
    discard_reaches_storage(&volume);
}

#[test]
fn block_device_of_4096_byte_blocks() {
    for sector_size in [512, 4096] {
        let Some((dir, device)) = loop_device(4096) else {
            eprintln!("skipped: no loop device can be had here");
            return;
        };
        let args = ["--sector-size", &sector_size.to_string()];
        let volume = Volume::created_at(dir, device_path(&device), &args);
        awkward_requests(&volume, &["--discard"], sector_size);
        discard_reaches_storage(&volume);
    }
}

/// A discard of blocks of a loop device makes a hole in the file under it.
fn discard_reaches_storage(volume: &Volume) {
    let server = Server::with(volume, &["--discard"]);
    let mut driver = server.connect();
    // Not flushed: without direct I/O it is in the page cache when the discard comes.
    driver.write(16_384, &pattern(2, 4 * MIB as usize));
    assert_eq!(
        driver.run_ranges(T_DISCARD, &[(16_384 + 2048, 4096, 0)]).status,
        S_OK
    );
    driver.flush();
    let blocks = File::open(volume.beside("blocks")).unwrap();
    let hole = rustix::fs::seek(
        &blocks,
        rustix::fs::SeekFrom::Hole(volume.payload_offset() + 8 * MIB),
    )
    .unwrap();
    assert_eq!(hole, volume.payload_offset() + 9 * MIB);
    assert!(driver.read(16_384, MIB as usize) == pattern(2, 4 * MIB as usize)[..MIB as usize]);
    drop(driver);
    server.stop();
}
