//! A disk gets another size, at rest and under a guest that goes on reading and writing.

use std::fs::{self, OpenOptions};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use common::driver::{Data, Driver, S_IOERR, S_OK, SECTOR, Setup, T_IN, T_OUT};
use common::frontend::Channel;
use common::pattern;
use common::serve::{Server, sealblk_path, serve};
use common::storage::LoopDevice;
use common::volume::{MIB, Volume, run};
use serde_json::Value;

const OPERATOR: i32 = 2;
const IN_USE: i32 = 5;
const STORAGE: i32 = 6;
const REFUSED: i32 = 7;

/// Where the payload of a volume starts that sealblk made.
const HEADER: u64 = 16 * MIB;

fn resize(args: &[&str]) -> Output {
    Command::new(sealblk_path())
        .arg("resize")
        .args(args)
        .output()
        .unwrap()
}

fn resized(args: &[&str], says: &str) {
    let output = resize(args);
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{err}");
    assert!(out.contains(says), "{out}");
}

fn refused(args: &[&str], code: i32, says: &str) {
    let output = resize(args);
    let err = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{err}");
    assert!(err.contains(says), "{err}");
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The size in the header, as cryptsetup reads it.
fn segment_size(header: &Path) -> String {
    let mut dump = Command::new("cryptsetup");
    let dump = run(dump.args(["luksDump", "--dump-json-metadata"]).arg(header));
    let metadata: Value = serde_json::from_slice(&dump.stdout).unwrap();
    metadata["segments"]["0"]["size"].as_str().unwrap().to_owned()
}

fn set_len(path: &Path, len: u64) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(len).unwrap();
}

fn len(path: &Path) -> u64 {
    fs::metadata(path).unwrap().len()
}

/// A served disk with a control socket.
struct Served {
    server: Server,
    control: String,
}

impl Served {
    fn start(volume: &Volume, name: &str, args: &[&str]) -> Self {
        let control = volume.beside(&format!("{name}.control")).display().to_string();
        let socket = volume.beside(&format!("{name}.sock"));
        let args = [args, &["--control-socket", &control]].concat();
        let server = Server::at(&mut serve(volume, &socket, &args), socket);
        Served { server, control }
    }

    fn on_control(&self, verb: &str) {
        let mut command = Command::new(sealblk_path());
        run(command.args([verb, "--control-socket", &self.control]));
    }

    fn status(&self) -> Value {
        let mut status = Command::new(sealblk_path());
        let told = run(status.args(["status", "--json", "--control-socket", &self.control]));
        serde_json::from_slice(&told.stdout).unwrap()
    }

    fn resized(&self, args: &[&str], says: &str) {
        resized(&[&["--control-socket", &self.control], args].concat(), says);
    }

    fn refused(&self, args: &[&str], code: i32, says: &str) {
        refused(&[&["--control-socket", &self.control], args].concat(), code, says);
    }
}

/// A driver whose front-end hears the back-end, and has asked for the capacity.
fn listening(server: &Server, mib: u64) -> (Driver, Channel) {
    let driver = server.connect();
    assert_eq!(driver.capacity(), sectors(mib));
    let channel = driver.frontend.back_end_channel();
    (driver, channel)
}

fn sectors(mib: u64) -> u64 {
    mib * MIB / SECTOR as u64
}

/// The last sectors of a disk of `mib` MiB can be written and read, and none behind them.
fn ends_at(driver: &mut Driver, mib: u64) {
    assert_eq!(driver.capacity(), sectors(mib));
    let (last, bytes) = (sectors(mib) - 8, pattern(mib, 8 * SECTOR));
    driver.write(last, &bytes);
    assert!(driver.read(last, bytes.len()) == bytes);
    for kind in [Data::In(SECTOR), Data::Out(&bytes[..SECTOR])] {
        let request = if let Data::In(_) = kind { T_IN } else { T_OUT };
        assert_eq!(driver.run(request, sectors(mib), kind).status, S_IOERR);
    }
}

#[test]
fn a_disk_at_rest_grows_with_its_file_and_keeps_its_data() {
    for sector_size in [512, 4096] {
        let volume = Volume::created(8 * MIB, sector_size);
        let disk = volume.path.to_str().unwrap();
        let bytes = pattern(1, 64 << 10);
        let server = Server::start(&volume);
        server.connect().write(sectors(8) - 128, &bytes);
        server.stop();

        resized(&[disk, "--size", "20M"], "the disk has 20 MiB (before: 8 MiB)");
        assert_eq!(len(&volume.path), HEADER + 20 * MIB);
        assert_eq!(segment_size(&volume.path), (20 * MIB).to_string());
        // The file first, the disk then; whole sectors of it.
        set_len(&volume.path, HEADER + 24 * MIB + 511);
        resized(&[disk], "the disk has 24 MiB (before: 20 MiB)");
        resized(&[disk], "the disk has 24 MiB already");

        let server = Server::start(&volume);
        let mut driver = server.connect();
        assert!(driver.read(sectors(8) - 128, bytes.len()) == bytes);
        ends_at(&mut driver, 24);
    }
}

/// cryptsetup's volumes reach to the end of their file or device, and go on doing so.
#[test]
fn a_disk_of_cryptsetup_follows_its_device() {
    let volume = Volume::cryptsetup(8 * MIB, 512);
    let disk = volume.path.to_str().unwrap();
    resized(&[disk, "--size", "12M"], "the disk has 12 MiB (before: 8 MiB)");
    assert_eq!(segment_size(&volume.path), "dynamic");
    assert_eq!(len(&volume.path), HEADER + 12 * MIB);

    let Some(device) = LoopDevice::over(&volume.path, 512) else {
        return;
    };
    let on_device = Volume::at(
        tempfile::tempdir().unwrap(),
        device.path().to_owned(),
        volume.open.clone(),
    );
    let served = Served::start(&on_device, "served", &[]);
    let (mut driver, channel) = listening(&served.server, 12);
    set_len(&volume.path, HEADER + 16 * MIB);
    run(Command::new("losetup").arg("--set-capacity").arg(device.path()));
    // The guest knows the size that it was told, until somebody says otherwise.
    ends_at(&mut driver, 12);
    served.on_control("lock");
    served.on_control("unlock");
    ends_at(&mut driver, 12);
    assert!(channel.is_silent());

    served.resized(&[], "the disk has 16 MiB (before: 12 MiB)");
    channel.config_changed();
    ends_at(&mut driver, 16);
    assert_eq!(segment_size(&volume.path), "dynamic");
    served.refused(
        &["--size", "17M"],
        REFUSED,
        "make it larger, or choose a smaller disk",
    );
    ends_at(&mut driver, 16);
}

#[test]
fn a_disk_becomes_smaller_only_at_rest_and_with_shrink() {
    let volume = Volume::created(8 * MIB, 512);
    let disk = volume.path.to_str().unwrap();
    let before = volume.bytes();
    refused(&[disk, "--size", "4M"], IN_USE, "add --shrink");
    refused(&[disk, "--shrink"], OPERATOR, "--size");
    refused(
        &[disk, "--size", "8388609"],
        OPERATOR,
        "multiple of the sector size",
    );
    refused(&[disk, "--size", "0"], OPERATOR, "multiple of the sector size");
    assert!(volume.bytes() == before);
    let served = Served::start(&volume, "served", &[]);
    served.refused(&["--size", "4M"], REFUSED, "would be lost");
    served.refused(&["--size", "4M", "--shrink"], OPERATOR, "--shrink");
    served.refused(&["--size", "8388609"], REFUSED, "multiple of the sector size");
    refused(&[disk, "--size", "9M"], IN_USE, "--control-socket");
    assert_eq!(served.status()["capacity"], 8 * MIB);
    served.server.stop();
    assert!(volume.bytes() == before);

    resized(
        &[disk, "--size", "4M", "--shrink"],
        "the disk has 4 MiB (before: 8 MiB)",
    );
    assert_eq!(segment_size(&volume.path), (4 * MIB).to_string());
    assert_eq!(len(&volume.path), HEADER + 4 * MIB);
    ends_at(&mut Server::start(&volume).connect(), 4);
}

#[test]
fn a_file_that_cannot_grow_leaves_the_disk_as_it_was() {
    let Some(device) = LoopDevice::over(&Volume::plain(40 * MIB).path, 512) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let volume = Volume::created_at(dir, device.path().to_owned(), &["--size", "8M", "--force"]);
    let disk = volume.path.to_str().unwrap();
    let before = volume.stored(0, 32 << 10);
    refused(
        &[disk, "--size", "1T"],
        STORAGE,
        "make it larger, or choose a smaller disk",
    );
    assert!(volume.stored(0, 32 << 10) == before);
    resized(&[disk, "--size", "10M"], "the disk has 10 MiB");
    resized(&[disk], "the disk has 24 MiB");
}

/// Four queues write and verify all the time, while the disk grows again and again.
#[test]
fn a_guest_that_writes_sees_each_new_size_and_loses_nothing() {
    const QUEUES: u32 = 4;
    let volume = Volume::created(8 * MIB, 512);
    let served = Served::start(&volume, "served", &[]);
    let mut driver = served.server.connect_with(Setup {
        queues: QUEUES,
        ..Setup::default()
    });
    assert_eq!(driver.capacity(), sectors(8));
    let channel = driver.frontend.back_end_channel();

    let (control, ended) = (served.control.clone(), AtomicBool::new(false));
    thread::scope(|scope| {
        let grow = scope.spawn(|| {
            for mib in 9..=24 {
                let size = format!("{mib}M");
                resized(
                    &["--control-socket", &control, "--size", &size],
                    &format!("{mib} MiB"),
                );
            }
            ended.store(true, Ordering::SeqCst);
        });
        let (mut round, mut told) = (0, 8);
        while !ended.load(Ordering::SeqCst) {
            round += 1;
            let mark = driver.memory.mark();
            let pending: Vec<_> = (0..QUEUES)
                .map(|queue| {
                    let bytes = pattern(round, 4096);
                    driver.submit(queue as usize, T_OUT, u64::from(queue) * 8, Data::Out(&bytes))
                })
                .collect();
            for (queue, pending) in pending.into_iter().enumerate() {
                let used = driver.queues[queue].wait_used();
                assert_eq!(driver.outcome(&pending, used).status, S_OK);
            }
            driver.memory.free_to(mark);
            if !channel.is_silent() {
                channel.config_changed();
                let now = driver.capacity() / sectors(1);
                assert!(now >= told, "{now} after {told}");
                // What it was told is valid at once, on each queue.
                for queue in 0..QUEUES as usize {
                    let last = driver.run_on(queue, T_IN, sectors(now) - 8, Data::In(4096));
                    assert_eq!(last.status, S_OK, "queue {queue}, {now} MiB");
                }
                told = now;
            }
        }
        grow.join().unwrap();
        for queue in 0..u64::from(QUEUES) {
            assert!(driver.read(queue * 8, 4096) == pattern(round, 4096));
        }
    });
    ends_at(&mut driver, 24);
    assert_eq!(served.status()["capacity"], 24 * MIB);
    served.server.stop();
    assert_eq!(segment_size(&volume.path), (24 * MIB).to_string());
}

/// A front-end that connects again does not ask for the configuration.
#[test]
fn a_guest_hears_of_a_disk_that_grew_while_it_was_not_served() {
    let volume = Volume::created(8 * MIB, 512);
    let socket = volume.beside("served.sock");
    let first = Served::start(&volume, "served", &[]);
    let (mut driver, _channel) = listening(&first.server, 8);
    first.server.stop();
    resized(&[volume.path.to_str().unwrap(), "--size", "12M"], "12 MiB");

    let served = Served::start(&volume, "served", &[]);
    driver.reconnect(&socket);
    let channel = driver.frontend.back_end_channel();
    channel.config_changed();
    ends_at(&mut driver, 12);
    // It knows; a guest that stops and continues hears nothing new.
    driver.frontend.enable(0, false);
    let base = driver.frontend.stop_vring(0);
    served.refused(&["--size", "16M"], REFUSED, "continue the guest");
    driver.restart(0, base);
    driver.still_serves();
    assert!(channel.is_silent());
}

#[test]
fn a_locked_disk_is_resized_and_opens_with_the_new_size() {
    let volume = Volume::created(8 * MIB, 512);
    let served = Served::start(&volume, "served", &[]);
    let (mut driver, channel) = listening(&served.server, 8);
    served.on_control("lock");
    served.resized(&["--size", "12M"], "the disk has 12 MiB (before: 8 MiB)");
    assert_eq!(served.status()["state"], "locked");
    assert_eq!(served.status()["capacity"], 12 * MIB);
    served.on_control("unlock");
    channel.config_changed();
    ends_at(&mut driver, 12);
    let log = served.server.process.stderr();
    assert!(log.contains("event=DiskResized"), "{log}");
}

#[test]
fn a_disk_with_a_detached_header_is_resized_at_rest_and_while_served() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, header) = (dir.path().join("disk"), dir.path().join("header"));
    let header_path = header.to_str().unwrap().to_owned();
    let mut volume = Volume::created_at(dir, disk, &["--size", "8M", "--header", &header_path]);
    volume.open.extend(["--header".to_owned(), header_path.clone()]);
    let disk = volume.path.to_str().unwrap();
    resized(&[disk, "--header", &header_path, "--size", "10M"], "10 MiB");
    assert_eq!(len(&volume.path), 10 * MIB);
    let served = Served::start(&volume, "served", &[]);
    let (mut driver, channel) = listening(&served.server, 10);
    served.resized(&["--size", "12M"], "the disk has 12 MiB (before: 10 MiB)");
    channel.config_changed();
    ends_at(&mut driver, 12);
    assert_eq!((len(&volume.path), len(&header)), (12 * MIB, HEADER));
    assert_eq!(segment_size(&header), (12 * MIB).to_string());
}

/// The destination of a migration has read the header before the source's disk grew.
#[test]
fn a_disk_that_grew_at_the_source_is_as_long_at_the_destination() {
    let volume = Volume::created(8 * MIB, 512);
    let source = Served::start(&volume, "source", &[]);
    let (mut there, channel) = listening(&source.server, 8);
    let destination = Served::start(&volume, "destination", &["--incoming"]);
    let (mut here, here_channel) = listening(&destination.server, 8);
    let write = here.submit(0, T_OUT, sectors(12) - 8, Data::Out(&pattern(2, 4096)));
    destination.refused(&["--size", "16M"], REFUSED, "where it runs");
    source.resized(&["--size", "12M"], "12 MiB");
    channel.config_changed();
    ends_at(&mut there, 12);
    there.frontend.enable(0, false);
    there.frontend.stop_vring(0);

    let used = here.queue().wait_used();
    assert_eq!(here.outcome(&write, used).status, S_OK);
    here_channel.config_changed();
    ends_at(&mut here, 12);
}
