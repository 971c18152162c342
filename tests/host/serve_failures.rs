//! What keeps `sealblk serve` from serving, and what goes wrong under it: each failure says what, where and what to
//! do, has the exit code of its kind, and changes nothing.

use common::driver::{
    Data, Driver, F_FLUSH, S_IOERR, S_OK, SECTOR, Setup, T_FLUSH, T_IN, T_OUT, T_WRITE_ZEROES,
};
use common::frontend::Frontend;
use common::pattern;
use common::process::Process;
use common::serve::{Server, sealblk_path, serve, serve_fails};
use common::storage::{Filesystem, LoopDevice};
use common::volume::{MIB, Volume, run};
use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const HOST: i32 = 1;
const USAGE: i32 = 2;
const VOLUME: i32 = 3;
const KEY: i32 = 4;
const IN_USE: i32 = 5;
const STORAGE: i32 = 6;

fn small() -> Volume {
    Volume::created(4 * MIB, 512)
}

/// It ends with this exit code, says all of this, and leaves the volume's file as it was.
fn refused(volume: &Volume, args: &[&str], code: i32, says: &[&str]) -> String {
    let before = volume.path.is_file().then(|| volume.bytes());
    let ended = serve_fails(volume, args);
    ended.assert_says(code, says);
    assert!(
        volume.path.is_file().then(|| volume.bytes()) == before,
        "the file changed"
    );
    ended.stderr
}

fn named(path: &Path) -> &str {
    path.to_str().unwrap()
}

// ---- which volume

#[test]
fn another_volume_than_the_one_that_is_named_is_refused() {
    let (volume, other) = (small(), small());
    let uuid = |volume: &Volume| {
        let header = volume.stored(0xa8, 36);
        String::from_utf8(header).unwrap()
    };
    let (own, others) = (uuid(&volume), uuid(&other));
    refused(
        &volume,
        &["--volume", &others],
        VOLUME,
        &[named(&volume.path), &own, &others, "--volume"],
    );
    let server = Server::with(&volume, &["--volume", &own]);
    server.still_serves();
    server.stop();
}

// ---- keys

#[test]
fn wrong_passphrase_is_refused() {
    let mut volume = Volume::cryptsetup(4 * MIB, 512);
    let wrong = volume.beside("wrong");
    fs::write(&wrong, "wrong horse").unwrap();
    volume.open = vec!["--passphrase-file".into(), named(&wrong).into()];
    refused(
        &volume,
        &[],
        KEY,
        &[named(&volume.path), "no keyslot opens with this passphrase"],
    );
    volume.open[1] = named(&volume.beside("missing")).into();
    refused(&volume, &[], STORAGE, &[named(&volume.beside("missing"))]);
}

/// MemAvailable is the host's, and of that a control group may have little: the kernel ended the process then, or had it
/// stand still.
#[test]
fn keyslot_that_takes_more_memory_than_the_control_group_has_is_not_tried() {
    let Some(group) = MemoryGroup::new(48 * MIB) else {
        eprintln!("skipped: no control group with a memory limit can be had here");
        return;
    };
    let volume = Volume::cryptsetup(4 * MIB, 512);
    // It takes less itself where less of the host's memory is free.
    run(Command::new("cryptsetup")
        .args(["luksConvertKey", "--batch-mode", "--pbkdf", "argon2id"])
        .args(["--pbkdf-memory", "262144", "--pbkdf-parallel", "1"])
        .args(["--pbkdf-force-iterations", "4", "--key-file"])
        .args([&volume.beside("passphrase"), &volume.path]));
    let mut test = Command::new("sh");
    test.args(["-c", r#"echo $$ > "$0/cgroup.procs" && exec "$@""#])
        .arg(&group.0)
        .args([sealblk_path(), "recovery", "test"])
        .arg(&volume.path)
        .arg("--recovery-key")
        .arg(volume.beside("passphrase"));
    let ended = Process::spawn(&mut test).wait();
    ended.assert_says(HOST, &["KiB of memory", "control group"]);
}

/// A control group of its own, until it is dropped.
struct MemoryGroup(PathBuf);

impl MemoryGroup {
    fn new(limit: u64) -> Option<Self> {
        let name = format!("sealblk-test-{}", std::process::id());
        let places = [
            ("/sys/fs/cgroup", "memory.max"),
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        ];
        places.iter().find_map(|(tree, file)| {
            let dir = Path::new(tree).join(&name);
            fs::create_dir(&dir).ok()?;
            let group = Self(dir);
            let limited = fs::OpenOptions::new().write(true).open(group.0.join(file));
            limited.ok()?.write_all(limit.to_string().as_bytes()).ok()?;
            Some(group)
        })
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn host_without_the_provider_is_refused() {
    let mut volume = small();
    let empty = volume.beside("empty");
    fs::create_dir(&empty).unwrap();
    volume.open = vec!["--state-dir".into(), named(&empty).into()];
    refused(&volume, &[], KEY, &[named(&volume.path), "native"]);
}

#[test]
fn provider_of_the_same_name_with_another_key_is_refused() {
    let (mut volume, other) = (small(), small());
    volume.open.clone_from(&other.open);
    refused(&volume, &["--no-wait"], KEY, &[named(&volume.path), "native"]);
}

#[test]
fn volume_of_cryptsetup_without_a_passphrase_is_refused() {
    let mut volume = Volume::cryptsetup(4 * MIB, 512);
    volume.open = small().open;
    refused(&volume, &[], KEY, &[named(&volume.path), "token", "passphrase"]);
}

#[test]
fn token_of_another_volume_is_refused() {
    let (volume, other) = (small(), small());
    let token = volume.beside("token");
    run(Command::new("cryptsetup")
        .args(["token", "export", "--token-id", "0", "--json-file"])
        .arg(&token)
        .arg(&other.path));
    run(Command::new("cryptsetup")
        .args(["token", "remove", "--token-id", "0"])
        .arg(&volume.path));
    run(Command::new("cryptsetup")
        .args(["token", "import", "--token-id", "0", "--json-file"])
        .arg(&token)
        .arg(&volume.path));
    let mut volume = volume;
    // With the state directory whose key wrapped the token.
    volume.open.clone_from(&other.open);
    refused(
        &volume,
        &[],
        KEY,
        &[named(&volume.path), "does not belong to volume"],
    );
}

// ---- headers and payloads

#[test]
fn damaged_copy_of_the_header_is_repaired_from_the_other() {
    // The first byte of the UUID in the first binary header, then in the second one.
    for at in [0xa8, 0x4000 + 0xa8] {
        let volume = small();
        let sound = volume.bytes();
        let byte = volume.stored(at, 1)[0];
        volume.file().write_all_at(&[byte ^ 1], at).unwrap();
        let damaged = volume.bytes();

        // Read-only, it is served and stays as it is.
        let server = Server::with(&volume, &["--read-only"]);
        assert_eq!(server.connect().run(T_IN, 0, Data::In(SECTOR)).status, S_OK);
        server.stop();
        assert!(
            volume.bytes() == damaged,
            "a volume that is open read-only was written to"
        );

        let server = Server::with(&volume, &[]);
        server.connect().still_serves();
        server.stop();
        assert!(volume.bytes()[..0x8000] != damaged[..0x8000], "not repaired");
        run(Command::new("cryptsetup")
            .arg("isLuks")
            .args(["--type", "luks2"])
            .arg(&volume.path));
        // Both copies hold what the sound one held; only the sequence number may have moved on.
        let repaired = volume.bytes();
        assert_eq!(repaired[0xa8..0xd0], sound[0xa8..0xd0]);
        assert_eq!(repaired[0x40a8..0x40d0], sound[0x40a8..0x40d0]);
    }
}

#[test]
fn two_damaged_copies_of_the_header_are_refused() {
    let volume = small();
    for at in [0xa8, 0x4000 + 0xa8] {
        let byte = volume.stored(at, 1)[0];
        volume.file().write_all_at(&[byte ^ 1], at).unwrap();
    }
    refused(&volume, &[], VOLUME, &[named(&volume.path), "backup"]);
}

#[test]
fn file_that_holds_no_luks2_volume_is_refused() {
    let volume = small();
    // Empty, cut off after the magic, zeros, noise.
    let plain = [
        vec![],
        b"LUKS\xba\xbe\0\x02".to_vec(),
        vec![0; 4 << 20],
        pattern(1, 4 << 20),
    ];
    for bytes in plain {
        fs::write(&volume.path, bytes).unwrap();
        refused(
            &volume,
            &[],
            VOLUME,
            &[named(&volume.path), "LUKS2", "--allow-unencrypted"],
        );
    }
    let pass = volume.beside("pass");
    fs::write(&pass, "x").unwrap();
    fs::write(&volume.path, vec![0; 8 << 20]).unwrap();
    run(Command::new("cryptsetup")
        .args([
            "luksFormat",
            "--batch-mode",
            "--type",
            "luks1",
            "--pbkdf-force-iterations",
            "1000",
        ])
        .args([&volume.path, &pass]));
    refused(&volume, &[], VOLUME, &[named(&volume.path), "LUKS1"]);
}

#[test]
fn file_that_cannot_be_opened_is_refused() {
    let mut volume = small();
    volume.path = volume.beside("missing");
    refused(&volume, &[], STORAGE, &[named(&volume.path), "No such file"]);
    volume.path = volume.beside("directory");
    fs::create_dir(&volume.path).unwrap();
    refused(&volume, &[], STORAGE, &[named(&volume.path)]);
    volume.path = PathBuf::from("/dev/null");
    refused(&volume, &[], STORAGE, &["/dev/null"]);
}

#[test]
fn truncated_payload_is_refused() {
    let volume = small();
    volume.file().set_len(16 * MIB + 2 * MIB).unwrap();
    refused(&volume, &[], VOLUME, &[named(&volume.path), "truncated"]);
}

#[test]
fn what_sealblk_does_not_serve_is_refused_with_the_reason() {
    let format = |args: &[&str]| {
        let volume = Volume::cryptsetup(4 * MIB, 512);
        run(Command::new("cryptsetup")
            .args([
                "luksFormat",
                "--batch-mode",
                "--type",
                "luks2",
                "--pbkdf",
                "pbkdf2",
            ])
            .args(["--pbkdf-force-iterations", "1000"])
            .args(args)
            .args([&volume.path, &volume.beside("passphrase")]));
        volume
    };
    let cbc = format(&["--cipher", "aes-cbc-essiv:sha256", "--key-size", "256"]);
    refused(
        &cbc,
        &[],
        VOLUME,
        &[named(&cbc.path), "aes-cbc-essiv:sha256", "aes-xts-plain64"],
    );
    let short = format(&["--cipher", "aes-xts-plain64", "--key-size", "256"]);
    refused(&short, &[], VOLUME, &[named(&short.path), "256 bits", "512 bits"]);
    let sectors = format(&[
        "--cipher",
        "aes-xts-plain64",
        "--key-size",
        "512",
        "--sector-size",
        "2048",
    ]);
    refused(&sectors, &[], VOLUME, &[named(&sectors.path), "2048"]);

    let volume = Volume::cryptsetup(4 * MIB, 512);
    run(Command::new("cryptsetup")
        .args([
            "reencrypt",
            "--batch-mode",
            "--init-only",
            "--force-offline-reencrypt",
            "--pbkdf",
            "pbkdf2",
        ])
        .args(["--pbkdf-force-iterations", "1000", "--key-file"])
        .args([&volume.beside("passphrase"), &volume.path]));
    refused(
        &volume,
        &[],
        VOLUME,
        &[named(&volume.path), "reencryption", "cryptsetup repair"],
    );
}

// ---- in use

#[test]
fn volume_that_is_attached_already_is_refused() {
    let volume = small();
    let (soft, hard) = (volume.beside("soft"), volume.beside("hard"));
    symlink(&volume.path, &soft).unwrap();
    fs::hard_link(&volume.path, &hard).unwrap();
    let server = Server::with(&volume, &[]);
    let second = |path: &Path, args: &[&str]| {
        let mut command = serve(&volume, &volume.beside("second.sock"), args);
        let args: Vec<_> = command
            .get_args()
            .map(|arg| {
                if arg == volume.path {
                    path.into()
                } else {
                    arg.to_owned()
                }
            })
            .collect();
        command = Command::new(command.get_program());
        let ended = Process::spawn(command.args(args)).wait();
        ended.assert_says(IN_USE, &[named(path), "in use"]);
    };
    for path in [&volume.path, &soft, &hard] {
        second(path, &[]);
        second(path, &["--read-only"]);
    }
    server.still_serves();
    server.stop();

    // Readers do not disturb each other, but a writer does.
    let reader = Server::with(&volume, &["--read-only"]);
    let other = Server::with(&volume, &["--read-only"]);
    second(&volume.path, &[]);
    drop(other);
    reader.stop();
    Server::with(&volume, &[]).stop();
}

#[test]
fn socket_of_a_living_server_is_refused() {
    let (first, second) = (small(), small());
    let server = Server::with(&first, &[]);
    let ended = Process::spawn(&mut serve(&second, server.socket(), &[])).wait();
    ended.assert_says(IN_USE, &[named(server.socket())]);
    server.still_serves();
    server.stop();
}

#[test]
fn socket_that_nobody_listens_on_is_replaced() {
    let volume = small();
    let server = Server::with(&volume, &[]);
    let socket = volume.beside("stale.sock");
    // Left behind by a server that was killed.
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    server.stop();
    let mut process = Process::spawn(&mut serve(&volume, &socket, &[]));
    Driver::connect(&socket).still_serves();
    process.signal(rustix::process::Signal::TERM);
    assert!(process.wait().status.success());
    assert!(!socket.exists());
}

#[test]
fn path_of_something_else_than_a_socket_is_refused() {
    let volume = small();
    let file = volume.beside("file");
    fs::write(&file, "precious").unwrap();
    let ended = Process::spawn(&mut serve(&volume, &file, &[])).wait();
    assert!(
        !ended.status.success() && ended.stderr.contains("not a socket"),
        "{ended:?}"
    );
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    let ended = Process::spawn(&mut serve(&volume, &volume.beside("no/such/directory"), &[])).wait();
    assert!(
        !ended.status.success() && ended.stderr.contains("no/such/directory"),
        "{ended:?}"
    );
}

// ---- arguments and limits

#[test]
fn arguments_that_make_no_sense_are_refused() {
    let volume = small();
    for args in [
        &["--num-queues", "0"][..],
        &["--num-queues", "65"],
        &["--num-queues", "x"],
        &["--pool-size", "1048575"],
        &["--pool-size", "1M1"],
        &["--pool-size", "65M"],
        &["--poll-max", "1001"],
        &["--fd", "9"],
        &["--bogus"],
    ] {
        refused(&volume, args, USAGE, &["--"]);
    }
}

#[test]
fn too_few_descriptors_are_said_or_suffice() {
    let volume = small();
    let mut outcomes = Vec::new();
    for limit in 4..60 {
        let socket = volume.beside("limited.sock");
        let command = serve(&volume, &socket, &[]);
        let mut limited = Command::new("sh");
        limited.args(["-c", &format!("ulimit -n {limit} && exec \"$@\""), "sh"]);
        limited.arg(command.get_program()).args(command.get_args());
        let mut process = Process::spawn(&mut limited);
        let stream = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break Some(stream),
                Err(_) if process.is_running() => std::thread::sleep(Duration::from_millis(1)),
                Err(_) => break None,
            }
        };
        let front_end = std::thread::spawn(move || {
            let frontend = Frontend::over(stream.expect("a connection"));
            let mut driver = Driver::unstarted(frontend, Setup::default());
            driver.restart(0, 0);
            driver.still_serves();
        });
        // A server that has started says what becomes of the front-end, and lives. One that has not says why, and ends.
        let started = loop {
            if process.stderr().contains("a front-end") {
                break true;
            }
            if !process.is_running() {
                break false;
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        while started && !front_end.is_finished() && !process.stderr().contains("cannot be accepted") {
            std::thread::sleep(Duration::from_millis(1));
        }
        if started {
            process.signal(rustix::process::Signal::TERM);
        }
        let served = front_end.join().is_ok();
        let ended = process.wait();
        if started {
            assert!(ended.status.success(), "{limit}: {ended:?}");
        } else {
            let code = ended.status.code();
            assert!(
                code.is_some_and(|code| (1..=6).contains(&code)),
                "{limit}: {ended:?}"
            );
        }
        assert!(
            served || ended.stderr.contains("open files") || started,
            "{limit}: {ended:?}"
        );
        outcomes.push((limit, started, served));
    }
    assert_eq!(outcomes.first(), Some(&(4, false, false)));
    assert_eq!(outcomes.last(), Some(&(59, true, true)));
}

// ---- errors under the guest

/// Reads and writes still work where there is no error, and the server can be stopped.
fn lives_on(server: Server, mut driver: Driver) {
    driver.still_serves();
    assert_eq!(driver.run(T_FLUSH, 0, Data::None).status, S_OK);
    drop(driver);
    server.still_serves();
    server.stop();
}

#[test]
fn file_that_was_cut_short_gives_io_errors_beyond_its_end() {
    let volume = Volume::new();
    let server = Server::with(&volume, &[]);
    let mut driver = server.connect();
    let bytes = pattern(2, 64 * 1024);
    let capacity = driver.capacity();
    driver.write(0, &bytes);
    driver.write(capacity - 128, &bytes);
    // The cut is in the middle of a sector, in the middle of a request.
    let len = volume.payload_offset() + 32 * MIB + 16 * 512 + 100;
    volume.file().set_len(len).unwrap();
    let cut = 32 * 2048 + 16;
    for (sector, len) in [
        (cut, 512),
        (cut - 8, 8192),
        (cut + 1000, 4096),
        (capacity - 128, 65_536),
    ] {
        let read = driver.run(T_IN, sector, Data::In(len));
        assert_eq!((read.status, read.used_len), (S_IOERR, 0), "{len} at {sector}");
    }
    assert_eq!(driver.run(T_IN, cut - 8, Data::In(4096)).status, S_OK);
    assert!(driver.read(0, bytes.len()) == bytes);
    lives_on(server, driver);
}

#[test]
fn full_file_system_gives_io_errors_until_there_is_room_if_they_are_to_be_reported() {
    let mut volume = Volume::new();
    let Some(small) = Filesystem::tmpfs(volume.beside("small"), 24 * MIB) else {
        eprintln!("skipped: nothing can be mounted here");
        return;
    };
    let disk = small.path.join("disk");
    run(Command::new("cp")
        .arg("--sparse=always")
        .args([&volume.path, &disk]));
    volume.path = disk;
    let ballast = small.path.join("ballast");
    fs::write(&ballast, vec![1; 4 << 20]).unwrap();

    let server = Server::with(&volume, &["--on-full", "report"]);
    let mut driver = server.connect();
    let bytes = pattern(3, MIB as usize);
    driver.still_serves();
    let statuses: Vec<u8> = (1..32)
        .map(|mib| driver.run(T_OUT, mib * 2048, Data::Out(&bytes)).status)
        .collect();
    assert_eq!((statuses[0], statuses[30]), (S_OK, S_IOERR), "{statuses:?}");
    assert!(
        statuses.iter().all(|&status| status == S_OK || status == S_IOERR),
        "{statuses:?}"
    );
    assert_eq!(
        driver.run_ranges(T_WRITE_ZEROES, &[(2048 * 50, 8192, 0)]).status,
        S_IOERR
    );
    assert!(driver.read(2048, bytes.len()) == bytes);
    driver.still_serves();

    fs::remove_file(&ballast).unwrap();
    driver.write(2048 * 40, &bytes);
    assert!(driver.read(2048 * 40, bytes.len()) == bytes);
    lives_on(server, driver);
}

/// A flush answered that all was on stable storage, though it was lost: the failure was told to whoever synced first, here a
/// rekey and another program, and was then over for Linux.
#[test]
fn flushes_fail_after_data_were_lost_whoever_was_told_first() {
    for consumer in ["rekey", "another program"] {
        let dir = tempfile::tempdir().unwrap();
        let Some(small) = Filesystem::tmpfs(dir.path().join("small"), 64 * MIB) else {
            eprintln!("skipped: nothing can be mounted here");
            return;
        };
        // Without direct I/O, since the device's blocks are larger than the guest's.
        let blocks = small.path.join("blocks");
        fs::File::create(&blocks).unwrap().set_len(96 * MIB).unwrap();
        let Some(device) = LoopDevice::over(&blocks, 4096) else {
            eprintln!("skipped: no loop device can be had here");
            return;
        };
        let volume = Volume::created_at(dir, device.path().to_owned(), &["--sector-size", "512"]);
        let control = named(&volume.beside("control")).to_owned();
        let args = ["--control-socket", &control];
        let server = Server::with(&volume, &args);
        let two = Setup {
            queues: 2,
            ..Setup::default()
        };
        let flushes =
            |driver: &mut Driver| [0, 1].map(|queue| driver.run_on(queue, T_FLUSH, 0, Data::None).status);
        let mut driver = server.connect_with(two);
        assert_eq!(flushes(&mut driver), [S_OK; 2]);

        // The device takes nothing new any more.
        let ballast = small.path.join("ballast");
        let mut filler = fs::File::create(&ballast).unwrap();
        while filler.write_all(&[1; 4096]).is_ok() {}
        driver.write(2048, &pattern(1, MIB as usize));
        drop(driver);
        server.wait_idle();
        match consumer {
            "rekey" => {
                let mut rekey = Command::new(sealblk_path());
                let output = rekey
                    .args(["rekey", "--control-socket", &control])
                    .output()
                    .unwrap();
                assert!(!output.status.success(), "{output:?}");
            }
            _ => {
                let other = fs::File::open(&volume.path).unwrap();
                let _ = rustix::fs::fdatasync(&other);
            }
        }
        drop(filler);
        fs::remove_file(&ballast).unwrap();

        // On every queue, and as long as the disk is attached: the cache still gives what storage does not have.
        for _ in 0..2 {
            let mut driver = server.connect_with(two);
            assert_eq!(flushes(&mut driver), [S_IOERR; 2], "after {consumer}");
            assert_eq!(flushes(&mut driver), [S_IOERR; 2], "after {consumer}");
            driver.write(0, &[1; 512]);
            drop(driver);
            server.wait_idle();
        }
        let mut durable = server.connect_with(Setup {
            features: !F_FLUSH,
            ..two
        });
        assert_eq!(durable.run(T_OUT, 0, Data::Out(&[1; 512])).status, S_IOERR);
        drop(durable);
        let told = server.stop().stderr;
        assert!(told.contains("restart `sealblk serve` and the guest"), "{told}");

        // From then on what is read is what storage has.
        let server = Server::with(&volume, &args);
        let mut driver = server.connect_with(two);
        assert_eq!(flushes(&mut driver), [S_OK; 2]);
        assert!(
            driver.read(2048, MIB as usize) != pattern(1, MIB as usize),
            "the cache was kept"
        );
        lives_on(server, driver);
    }
}

#[test]
fn limit_on_the_size_of_files_gives_io_errors_and_kills_nobody() {
    let volume = small();
    let socket = volume.beside("limited.sock");
    let command = serve(&volume, &socket, &[]);
    let mut limited = Command::new("sh");
    // In blocks of 512 bytes: 2 MiB of payload can be written to.
    limited.args(["-c", "ulimit -f 36864 && exec \"$@\"", "sh"]);
    limited.arg(command.get_program()).args(command.get_args());
    let mut process = Process::spawn(&mut limited);
    let mut driver = Driver::connect(&socket);
    driver.write(0, &[1; 4096]);
    assert_eq!(driver.run(T_OUT, 3 * 2048, Data::Out(&[1; 4096])).status, S_IOERR);
    driver.still_serves();
    drop(driver);
    process.signal(rustix::process::Signal::TERM);
    assert!(process.wait().status.success());
}
