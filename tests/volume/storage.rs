//! What storage can do, and who else has it, is asked before a disk is served: devices that take no writes or no discards,
//! disks that are attached under another name, and block devices of ordinary users.

use common::driver::{Data, F_DISCARD, F_RO, S_OK, SECTOR, T_IN};
use common::pattern;
use common::process::Process;
use common::serve::{Server, sealblk_path, serve, serve_fails};
use common::storage::{Filesystem, LoopDevice};
use common::volume::{MIB, PASSPHRASE, Volume, run};
use rustix::fs::{FileType, Mode, mknodat};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use tempfile::TempDir;

const IN_USE: i32 = 5;
const STORAGE: i32 = 6;
/// An ordinary user.
const NOBODY: u32 = 65534;

/// A node where no udev makes it.
fn make_node(path: &Path, number: u64) {
    let mode = Mode::RUSR | Mode::WUSR;
    mknodat(rustix::fs::CWD, path, FileType::BlockDevice, mode, number).unwrap();
}

/// A loop device of 24 MiB, and the directory that its file lies in; nothing where there are none.
fn loop_device() -> Option<(TempDir, LoopDevice)> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("blocks");
    File::create(&file).unwrap().set_len(24 * MIB).unwrap();
    let device = LoopDevice::over(&file, 512);
    if device.is_none() {
        eprintln!("skipped: no loop device can be had here");
    }
    Some((dir, device?))
}

fn refused(volume: &Volume, args: &[&str], code: i32, says: &[&str]) {
    serve_fails(volume, args).assert_says(code, says);
}

/// The same volume, by another path.
fn refused_at(volume: &Volume, path: &Path, args: &[&str], code: i32, says: &[&str]) {
    let mut command = Command::new(sealblk_path());
    command
        .arg("serve")
        .args(&volume.open)
        .arg("--blk-file")
        .arg(path)
        .arg("--socket-path")
        .arg(volume.beside("second.sock"))
        .args(args);
    let ended = Process::spawn(&mut command).wait();
    assert!(!ended.status.success(), "it served: {}", ended.stderr);
    ended.assert_says(code, says);
}

/// A volume that is there, by another path.
fn named(mut volume: Volume, path: PathBuf) -> Volume {
    volume.path = path;
    volume
}

fn sealblk(volume: &Volume, verb: &[&str]) -> Output {
    Command::new(sealblk_path())
        .args(&volume.open)
        .args(verb)
        .output()
        .unwrap()
}

fn assert_not_changed_by_verbs(volume: &Volume, why: &str) {
    let disk = volume.path.to_str().unwrap();
    let key = volume.beside("recovery");
    let verbs: [&[&str]; 4] = [
        &["create", disk, "--force"],
        &["recovery", "add", disk, "--recovery-key", key.to_str().unwrap()],
        &["rekey", disk],
        &["erase", disk, "--confirm", "00000000-0000-0000-0000-000000000000"],
    ];
    for verb in verbs {
        let output = sealblk(volume, verb);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(STORAGE), "{verb:?}: {said}");
        assert!(said.contains(disk) && said.contains(why), "{verb:?}: {said}");
    }
    assert!(!key.exists());
}

// ---- what storage can do

/// Linux lets a read-only device be opened for writing. So it was served as a writable disk, of which each write failed.
#[test]
fn read_only_device_is_served_read_only_alone() {
    let Some((dir, device)) = loop_device() else {
        return;
    };
    let volume = Volume::created_at(dir, device.path().to_owned(), &[]);
    let blocks = volume.beside("blocks");
    let before = fs::read(&blocks).unwrap();

    device.set_read_only(true);
    refused(
        &volume,
        &[],
        STORAGE,
        &["the device is read-only", "blockdev --setrw", "--read-only"],
    );
    assert_not_changed_by_verbs(&volume, "the device is read-only");
    let server = Server::with(&volume, &["--read-only"]);
    let mut driver = server.connect();
    assert_ne!(driver.features & F_RO, 0);
    assert_eq!(driver.run(T_IN, 0, Data::In(SECTOR)).status, S_OK);
    drop(driver);
    server.stop();

    drop(device);
    let Some(device) = LoopDevice::with(&blocks, &["--read-only"]) else {
        return;
    };
    let volume = named(volume, device.path().to_owned());
    refused(&volume, &[], STORAGE, &["the device is read-only", "--read-only"]);
    assert!(fs::read(&blocks).unwrap() == before);
    device.set_read_only(false);
}

#[test]
fn file_that_takes_no_writes_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let Some(tmpfs) = Filesystem::tmpfs(dir.path().join("mounted"), 64 * MIB) else {
        eprintln!("skipped: nothing can be mounted here");
        return;
    };
    let mut volume = Volume::created_at(dir, tmpfs.path.join("disk"), &["--size", "1M"]);
    tmpfs.set_read_only();
    refused(
        &volume,
        &[],
        STORAGE,
        &["mounted read-only", "remount", "--read-only"],
    );
    assert_not_changed_by_verbs(&volume, "mounted read-only");
    Server::with(&volume, &["--read-only"]).stop();

    let immutable = volume.beside("immutable");
    fs::copy(&volume.path, &immutable).unwrap();
    volume.path = immutable;
    let set = |attribute: &str| {
        let output = Command::new("chattr").arg(attribute).arg(&volume.path).output();
        output.is_ok_and(|output| output.status.success())
    };
    if !set("+i") {
        eprintln!("skipped: no file can be made immutable here");
        return;
    }
    let ended = serve_fails(&volume, &[]);
    assert!(set("-i"));
    ended.assert_says(STORAGE, &["immutable", "chattr -i", "--read-only"]);
}

/// `--discard` was offered to the guest whatever lay under the disk.
#[test]
fn discards_are_not_offered_where_storage_takes_none() {
    let dir = tempfile::tempdir().unwrap();
    let Some(ramfs) = Filesystem::ramfs(dir.path().join("mounted")) else {
        eprintln!("skipped: nothing can be mounted here");
        return;
    };
    let offered = |volume: &Volume| {
        let server = Server::with(volume, &["--discard"]);
        let mut driver = server.connect();
        driver.still_serves();
        let offered = driver.frontend.features() & F_DISCARD != 0;
        drop(driver);
        (
            offered,
            server.stop().stderr.contains("does not support discards"),
        )
    };
    let volume = Volume::created_at(dir, ramfs.path.join("disk"), &["--size", "1M"]);
    assert_eq!(offered(&volume), (false, true));
    // A loop device passes them on to the file under it.
    let Some(device) = LoopDevice::over(&volume.path, 512) else {
        return;
    };
    let volume = named(volume, device.path().to_owned());
    assert_eq!(offered(&volume), (false, true));
    assert_eq!(offered(&Volume::created(MIB, 512)), (true, false));
    let Some((dir, device)) = loop_device() else {
        return;
    };
    let volume = Volume::created_at(dir, device.path().to_owned(), &[]);
    assert_eq!(offered(&volume), (true, false));
}

// ---- who else has it

/// The lock was on what was named alone, and a file and the loop device over it are two inodes.
#[test]
fn file_and_loop_device_over_it_exclude_each_other() {
    let Some((dir, device)) = loop_device() else {
        return;
    };
    let volume = Volume::created_at(dir, device.path().to_owned(), &[]);
    let blocks = volume.beside("blocks");
    let loop_over = ["loop device", device.path().to_str().unwrap(), "losetup --detach"];

    // The device is there before the file is named, whether it is served or not.
    let server = Server::with(&volume, &[]);
    for args in [&[][..], &["--read-only"]] {
        refused_at(&volume, &blocks, args, IN_USE, &["in use"]);
    }
    server.still_serves();
    server.stop();
    for args in [&[][..], &["--read-only"]] {
        refused_at(&volume, &blocks, args, IN_USE, &loop_over);
    }
    drop(device);

    // The file is served before the device is there.
    let file = named(volume, blocks.clone());
    let server = Server::with(&file, &[]);
    let device = LoopDevice::over(&blocks, 512).unwrap();
    for args in [&[][..], &["--read-only"]] {
        refused_at(&file, device.path(), args, IN_USE, &["in use"]);
    }
    server.stop();
    drop(device);

    // Where nobody writes, all may read.
    let device = LoopDevice::with(&blocks, &["--read-only"]).unwrap();
    let first = Server::with(&file, &["--read-only"]);
    let by_device = named(file, device.path().to_owned());
    let second = Server::with(&by_device, &["--read-only"]);
    for server in [first, second] {
        assert_eq!(server.connect().run(T_IN, 0, Data::In(SECTOR)).status, S_OK);
        server.stop();
    }
}

#[test]
fn parts_of_one_file_are_served_side_by_side_and_not_with_the_whole() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("blocks");
    File::create(&file).unwrap().set_len(48 * MIB).unwrap();
    let part = |offset: &str| LoopDevice::with(&file, &["--offset", offset, "--sizelimit", "24M"]);
    let (Some(first), Some(second)) = (part("0"), part("24M")) else {
        eprintln!("skipped: no loop device can be had here");
        return;
    };
    let first_volume = Volume::created_at(dir, first.path().to_owned(), &[]);
    let second_volume = Volume::created_at(tempfile::tempdir().unwrap(), second.path().to_owned(), &[]);
    let (one, other) = (
        Server::with(&first_volume, &[]),
        Server::with(&second_volume, &[]),
    );
    one.still_serves();
    other.still_serves();
    // Over the end of the one and the start of the other, and over both.
    for args in [&["--offset", "20M", "--sizelimit", "8M"][..], &[]] {
        let across = LoopDevice::with(&file, args).unwrap();
        refused_at(
            &first_volume,
            across.path(),
            &["--read-only"],
            IN_USE,
            &["in use"],
        );
    }
    one.stop();
    other.stop();
}

#[test]
fn partition_and_its_disk_exclude_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("blocks");
    let disk = File::create(&file).unwrap();
    disk.set_len(48 * MIB).unwrap();
    // One partition of Linux, from the first MiB on.
    let mut entry = [0; 16];
    entry[4] = 0x83;
    entry[8..12].copy_from_slice(&2048_u32.to_le_bytes());
    entry[12..16].copy_from_slice(&(40 * 2048_u32).to_le_bytes());
    disk.write_all_at(&entry, 446).unwrap();
    disk.write_all_at(&[0x55, 0xaa], 510).unwrap();
    let Some(device) = LoopDevice::with(&file, &["--partscan"]) else {
        eprintln!("skipped: no loop device can be had here");
        return;
    };
    let name = device.path().file_name().unwrap().to_str().unwrap();
    let Ok(number) = fs::read_to_string(format!("/sys/block/{name}/{name}p1/dev")) else {
        eprintln!("skipped: this kernel has no partitions here");
        return;
    };
    let (major, minor) = number.trim().split_once(':').unwrap();
    let number = rustix::fs::makedev(major.parse().unwrap(), minor.parse().unwrap());
    let node = dir.path().join("partition");
    make_node(&node, number);

    let volume = Volume::created_at(dir, node, &[]);
    let server = Server::with(&volume, &[]);
    refused_at(&volume, device.path(), &["--read-only"], IN_USE, &["in use"]);
    server.still_serves();
    server.stop();
    let reader = Server::with(&volume, &["--read-only"]);
    refused_at(&volume, device.path(), &[], IN_USE, &["in use"]);
    reader.stop();
}

/// O_EXCL keeps a second writer from a device. But one reads, and the other's lock is on another node's inode.
#[test]
fn second_node_of_a_device_is_the_same_device() {
    let Some((dir, device)) = loop_device() else {
        return;
    };
    let number = fs::metadata(device.path()).unwrap().rdev();
    let volume = Volume::created_at(dir, device.path().to_owned(), &[]);
    let node = volume.beside("node");
    make_node(&node, number);

    let server = Server::with(&volume, &[]);
    refused_at(&volume, &node, &["--read-only"], IN_USE, &["in use"]);
    server.stop();
    let reader = Server::with(&volume, &["--read-only"]);
    refused_at(&volume, &node, &[], IN_USE, &["in use"]);
    reader.stop();
    let by_node = named(volume, node);
    let server = Server::with(&by_node, &[]);
    refused_at(&by_node, device.path(), &["--read-only"], IN_USE, &["in use"]);
    server.stop();
}

#[test]
fn file_of_an_overlay_and_that_in_its_upper_directory_exclude_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let Some(overlay) = Filesystem::overlay(dir.path()) else {
        eprintln!("skipped: nothing can be mounted here");
        return;
    };
    fs::create_dir(overlay.path.join("vms")).unwrap();
    let volume = Volume::created_at(dir, overlay.path.join("vms/disk"), &["--size", "1M"]);
    let upper = volume.beside("upper/vms/disk");
    let server = Server::with(&volume, &[]);
    for args in [&[][..], &["--read-only"]] {
        refused_at(&volume, &upper, args, IN_USE, &["in use"]);
    }
    server.still_serves();
    server.stop();
    let merged = volume.path.clone();
    let by_upper = named(volume, upper);
    let server = Server::with(&by_upper, &[]);
    refused_at(&by_upper, &merged, &["--read-only"], IN_USE, &["in use"]);
    server.stop();
}

/// A process that has a disk in use until its input ends.
struct User(Child);

impl User {
    /// A qemu-io that has opened `disk`, or why it has not.
    fn qemu_io(disk: &Path, args: &[&str]) -> Result<Self, String> {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw"]).args(args).arg(disk);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.as_mut().unwrap().write_all(b"read 0 512\n").unwrap();
        let mut said = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while said.read_line(&mut line).unwrap() > 0 {
            if line.contains("512/512 bytes") {
                return Ok(Self(child));
            }
        }
        let ended = child.wait_with_output().unwrap();
        Err(String::from_utf8(ended.stderr).unwrap())
    }
}

impl Drop for User {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

/// A reader was let in beside a QEMU that writes.
#[test]
fn qemu_and_sealblk_exclude_each_other_whichever_comes_first() {
    let volume = Volume::created(MIB, 512);
    let file = volume.path.clone();
    let disk = &file;
    let in_use = |args: &[&str]| refused(&volume, args, IN_USE, &["in use"]);
    {
        let _writer = User::qemu_io(disk, &[]).unwrap();
        in_use(&[]);
        in_use(&["--read-only"]);
    }
    {
        let _reader = User::qemu_io(disk, &["-r"]).unwrap();
        in_use(&[]);
        let reads = Server::with(&volume, &["--read-only"]);
        assert_eq!(reads.connect().run(T_IN, 0, Data::In(SECTOR)).status, S_OK);
        reads.stop();
    }
    let writes = Server::with(&volume, &[]);
    for args in [&[][..], &["-r"]] {
        let said = User::qemu_io(disk, args).map(drop).unwrap_err();
        assert!(said.contains("Failed to get \"consistent read\" lock"), "{said}");
    }
    writes.still_serves();
    writes.stop();
    let reads = Server::with(&volume, &["--read-only"]);
    let said = User::qemu_io(disk, &[]).map(drop).unwrap_err();
    assert!(said.contains("Failed to get \"write\" lock"), "{said}");
    drop(User::qemu_io(disk, &["-r"]).unwrap());
    reads.stop();
    drop(User::qemu_io(disk, &[]).unwrap());
    // A loop device has its own file to itself.
    let Some(device) = LoopDevice::over(disk, 512) else {
        return;
    };
    let by_device = named(volume, device.path().to_owned());
    let server = Server::with(&by_device, &[]);
    User::qemu_io(disk, &[]).map(drop).unwrap_err();
    server.stop();
    let _writer = User::qemu_io(disk, &[]).unwrap();
    refused(&by_device, &[], IN_USE, &["in use"]);
}

/// Earlier builds lock the whole file: exclusively to write, shared to read.
#[test]
fn an_earlier_build_and_this_one_exclude_each_other() {
    let volume = Volume::created(MIB, 512);
    let earlier = |write: bool| {
        let script = "import fcntl, os, struct, sys
file = os.open(sys.argv[1], os.O_RDWR)
kind = fcntl.F_WRLCK if sys.argv[2] == 'w' else fcntl.F_RDLCK
try: fcntl.fcntl(file, 37, struct.pack('hhqqi4x', kind, 0, 0, 0, 0))
except BlockingIOError: sys.exit(1)
print(flush=True)
sys.stdin.read()";
        let mut command = Command::new("python3");
        command
            .args(["-c", script])
            .arg(&volume.path)
            .arg(if write { "w" } else { "r" });
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let locked = child.stdout.as_mut().unwrap().read_exact(&mut [0]).is_ok();
        let holds = User(child);
        locked.then_some(holds)
    };
    let writer = earlier(true).unwrap();
    for args in [&[][..], &["--read-only"]] {
        refused(&volume, args, IN_USE, &["in use"]);
    }
    drop(writer);
    let reader = earlier(false).unwrap();
    refused(&volume, &[], IN_USE, &["in use"]);
    Server::with(&volume, &["--read-only"]).stop();
    drop(reader);
    let server = Server::with(&volume, &[]);
    assert!(earlier(true).is_none() && earlier(false).is_none());
    server.stop();
    let server = Server::with(&volume, &["--read-only"]);
    assert!(earlier(true).is_none() && earlier(false).is_some());
    server.stop();
}

/// They have the same key: whoever sees both storages sees where they differ.
#[test]
fn copy_that_is_served_beside_the_original_is_told_of() {
    let volume = Volume::created(MIB, 512);
    let original = volume.path.clone();
    let told = "a copy of this volume";
    let server = Server::with(&volume, &["--read-only"]);
    // The same file is no copy.
    let ended = Server::with(&volume, &["--read-only"]).stop();
    assert!(!ended.stderr.contains(told), "{}", ended.stderr);
    let copy = volume.beside("copy");
    fs::copy(&original, &copy).unwrap();
    let volume = named(volume, copy);
    let ended = Server::with(&volume, &[]).stop();
    assert!(ended.stderr.contains(told), "{}", ended.stderr);
    // In a container whose processes have numbers of their own: that of the original's is 0 there.
    if rustix::process::geteuid().is_root() {
        let direct = serve(&volume, &volume.beside("sock"), &[]);
        let mut contained = Command::new("unshare");
        contained.args(["--pid", "--fork", "--kill-child"]);
        contained.arg(direct.get_program()).args(direct.get_args());
        let mut contained = Process::spawn(&mut contained);
        contained.wait_stderr(told);
        contained.signal(rustix::process::Signal::KILL);
        contained.wait();
    }
    server.stop();

    // What an ordinary user says nobody has to believe.
    let uuid = run(Command::new("cryptsetup").arg("luksUUID").arg(&original)).stdout;
    let name = format!("sealblk/{}/file-1-2/0", String::from_utf8(uuid).unwrap().trim());
    for (user, believed) in [(0, true), (NOBODY, false)] {
        if user != 0 && !rustix::process::geteuid().is_root() {
            continue;
        }
        let listener = "import socket, sys
s = socket.socket(socket.AF_UNIX)
s.bind('\\0' + sys.argv[1])
s.listen()
print(flush=True)
sys.stdin.read()";
        let mut command = Command::new("python3");
        command.args(["-c", listener, &name]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        if user != 0 {
            command.uid(user).gid(user);
        }
        let mut other = command.spawn().unwrap();
        other.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let ended = Server::with(&volume, &[]).stop();
        assert_eq!(ended.stderr.contains(told), believed, "{}", ended.stderr);
        drop(other.stdin.take());
        other.wait().unwrap();
    }
}

// ---- ordinary users

/// The lock on the metadata of a block device is a file in /run/cryptsetup, which belongs to root: nobody else could serve a
/// device, though he might read and write it.
#[test]
fn ordinary_user_serves_a_device_and_may_not_change_its_metadata() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: it takes root to become somebody else");
        return;
    }
    let Some((dir, device)) = loop_device() else {
        return;
    };
    let made = Volume::cryptsetup(4 * MIB, 512);
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let blocks = File::options().write(true).open(device.path()).unwrap();
    blocks.write_all_at(&made.bytes(), 0).unwrap();
    blocks.sync_all().unwrap();
    let (key, own) = (dir.path().join("key"), dir.path().join("own"));
    fs::write(&key, PASSPHRASE).unwrap();
    fs::create_dir(&own).unwrap();
    let before = fs::metadata(device.path()).unwrap();
    for path in [&key, &own, device.path()] {
        chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    // There is a directory, and it lets no others in.
    let _ = fs::DirBuilder::new().create("/run/cryptsetup");
    let key = key.to_str().unwrap().to_owned();
    let volume = Volume::at(
        dir,
        device.path().to_owned(),
        vec!["--passphrase-file".into(), key.clone()],
    );
    let as_nobody = |command: &mut Command| {
        command.uid(NOBODY).gid(NOBODY);
    };

    let socket = own.join("vhost.sock");
    let mut command = serve(&volume, &socket, &[]);
    as_nobody(&mut command);
    let server = Server::at(&mut command, socket);
    let mut driver = server.connect();
    let bytes = pattern(1, MIB as usize);
    driver.write(64, &bytes);
    driver.flush();
    assert!(driver.read(64, bytes.len()) == bytes);
    drop(driver);
    server.stop();

    let mut add = Command::new(sealblk_path());
    let recovery = own.join("recovery");
    add.args(["recovery", "add"])
        .arg(device.path())
        .args(["--unlock-key", &key, "--recovery-key"])
        .arg(&recovery);
    as_nobody(&mut add);
    let output = add.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(STORAGE), "{said}");
    assert!(
        said.contains("/run/cryptsetup") && said.contains("as root"),
        "{said}"
    );
    assert!(!recovery.exists());

    // A damaged copy is not repaired, and does not keep the disk from being served.
    blocks.write_all_at(&[0], 0xa8).unwrap();
    let mut command = serve(&volume, &own.join("again.sock"), &[]);
    as_nobody(&mut command);
    let server = Server::at(&mut command, own.join("again.sock"));
    server.still_serves();
    assert!(server.stop().stderr.contains("needs repair"));
    chown(device.path(), Some(before.uid()), Some(before.gid())).unwrap();
    run(Command::new(sealblk_path()).arg("info").arg(device.path()));
}
