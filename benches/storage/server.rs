//! The servers that are measured: sealblk, and QEMU's storage daemon, over disks that hold the same or over nothing.

use crate::logging;
use common::serve::sealblk_path;
use rustix::fs::{CWD, FallocateFlags, RenameFlags, fallocate, renameat_with};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle};
use tempfile::TempDir;

const QEMU: &str = "qemu-storage-daemon";
/// QEMU's ways to do I/O.
pub(crate) const AIO: [&str; 2] = ["io_uring", "native"];
/// Where the payload of cryptsetup's LUKS1 volumes of such keys starts.
const LUKS1_HEADER: u64 = 2 << 20;
/// What null storage claims to hold: 64 GiB. QEMU wants a number without a letter.
const NULL_SIZE: &str = "68719476736";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Sealblk,
    /// The same by another build.
    OtherBuild,
    /// The same while a front-end logs what is written to the driver's memory.
    Logged,
    /// sealblk over a disk that is not encrypted.
    Plain,
    Qemu,
    QemuLuks,
}

/// The disks of one run, which go when this does. The plain one serves all that do not encrypt.
#[derive(Debug)]
pub(crate) struct Disks {
    dir: TempDir,
    null: bool,
    /// What stands before the payload of sealblk's volume.
    header_len: usize,
}

/// What may differ between two measurements of one server.
#[derive(Debug)]
pub(crate) struct Tuning<'a> {
    /// The cores it may use, as taskset has them.
    pub(crate) cores: &'a str,
    pub(crate) queues: u16,
    pub(crate) aio: &'a str,
    pub(crate) sector_size: u32,
    pub(crate) serve_arguments: &'a [String],
    pub(crate) other_build: Option<&'a Path>,
}

impl Disks {
    pub(crate) fn new(directory: &Path, mebibytes: u64, sector_size: u32) -> Self {
        fs::create_dir_all(directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
        let dir = TempDir::with_prefix_in("storage-", directory).expect("a directory for the disks");
        let mut disks = Disks {
            dir,
            null: false,
            header_len: 0,
        };
        let size = mebibytes << 20;
        let sealblk = || {
            let mut command = Command::new(sealblk_path());
            command.arg("--state-dir").arg(disks.path("state"));
            command
        };
        succeed(sealblk().args(["provider", "add", "native", "--no-backup"]));
        succeed(sealblk().arg("create").arg(disks.path("volume")).args([
            "--size",
            &size.to_string(),
            "--sector-size",
            &sector_size.to_string(),
        ]));
        let volume_len = fs::metadata(disks.path("volume")).expect("the volume").len();
        disks.header_len = (volume_len - size) as usize;
        fs::File::create(disks.raw())
            .and_then(|raw| raw.set_len(volume_len))
            .expect("the plain disk");
        fs::File::create(disks.path("luks"))
            .and_then(|file| file.set_len(size + LUKS1_HEADER))
            .expect("QEMU's disk");
        disks.format_luks1(&["luks"]);
        for name in ["raw", "volume", "luks"] {
            let file = OpenOptions::new().write(true).open(disks.path(name)).expect(name);
            let len = file.metadata().expect(name).len();
            fallocate(&file, FallocateFlags::KEEP_SIZE, 0, len).expect("space for the disks");
        }
        disks
    }

    pub(crate) fn null() -> Self {
        let dir = TempDir::with_prefix("null-storage-").expect("a directory for sockets");
        let disks = Disks {
            dir,
            null: true,
            header_len: 0,
        };
        fs::File::create(disks.path("payload"))
            .and_then(|file| file.set_len(LUKS1_HEADER))
            .expect("a payload to format");
        disks.format_luks1(&["payload", "--header", "header"]);
        disks
    }

    /// Has the volume and the plain disk change places on storage: of two files with the same content, one is up to a
    /// tenth slower than the other for good, which is neither's merit.
    pub(crate) fn exchange(&self) {
        let open = |path: PathBuf| {
            let file = OpenOptions::new().read(true).write(true).open(&path);
            file.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        };
        let (volume, raw) = (open(self.path("volume")), open(self.raw()));
        let mut header = vec![0; self.header_len];
        volume.read_exact_at(&mut header, 0).expect("the volume's header");
        raw.write_all_at(&header, 0).expect("the header in its new place");
        volume
            .write_all_at(&vec![0; self.header_len], 0)
            .expect("no header in its old place");
        for file in [&volume, &raw] {
            file.sync_all().expect("the header on storage");
        }
        renameat_with(CWD, self.path("volume"), CWD, self.raw(), RenameFlags::EXCHANGE)
            .expect("new names for the disks");
    }

    /// QEMU knows LUKS1 alone. Not made by qemu-img, which on a fast machine fails to time its key derivation.
    fn format_luks1(&self, arguments: &[&str]) {
        fs::write(self.passphrase(), "the disk of a benchmark keeps no secret").expect("a passphrase file");
        let mut format = Command::new("cryptsetup");
        format.args([
            "luksFormat",
            "--batch-mode",
            "--type=luks1",
            "--cipher=aes-xts-plain64",
        ]);
        format.args([
            "--key-size=512",
            "--hash=sha256",
            "--pbkdf-force-iterations=1000",
            "--key-file",
        ]);
        succeed(
            format
                .arg(self.passphrase())
                .args(arguments)
                .current_dir(self.dir.path()),
        );
    }

    pub(crate) fn raw(&self) -> PathBuf {
        self.path("raw")
    }

    fn passphrase(&self) -> PathBuf {
        self.path("passphrase")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// QEMU's object that knows the passphrase.
    fn secret(&self) -> String {
        format!("secret,id=secret,file={}", self.passphrase().display())
    }

    fn serve(&self, kind: Kind, socket: &Path, tuning: &Tuning<'_>) -> Command {
        match kind {
            Kind::Sealblk | Kind::OtherBuild | Kind::Logged | Kind::Plain => {
                self.sealblk(kind, socket, tuning)
            }
            Kind::Qemu | Kind::QemuLuks => self.qemu(kind, socket, tuning),
        }
    }

    fn sealblk(&self, kind: Kind, socket: &Path, tuning: &Tuning<'_>) -> Command {
        let executable = match (kind, tuning.other_build) {
            (Kind::OtherBuild, Some(other)) => other.display().to_string(),
            _ => sealblk_path().to_owned(),
        };
        let mut serve = on_cores(tuning.cores, &[executable]);
        serve
            .arg("--state-dir")
            .arg(self.path("state"))
            .arg("serve")
            .arg("--socket-path")
            .arg(socket);
        serve
            .args(["--num-queues", &tuning.queues.to_string()])
            .args(tuning.serve_arguments);
        let sector_size = tuning.sector_size.to_string();
        match (self.null, kind) {
            (true, _) => serve.args(["--null-storage", NULL_SIZE, "--sector-size", &sector_size]),
            (false, Kind::Sealblk | Kind::OtherBuild | Kind::Logged) => {
                serve.arg("--blk-file").arg(self.path("volume"))
            }
            (false, _) => serve
                .arg("--blk-file")
                .arg(self.raw())
                .args(["--sector-size", &sector_size]),
        };
        if kind == Kind::Plain {
            serve.arg("--allow-unencrypted");
        }
        serve
    }

    fn qemu(&self, kind: Kind, socket: &Path, tuning: &Tuning<'_>) -> Command {
        let file = |name: &str, node: &str| {
            format!(
                "driver=file,node-name={node},filename={},cache.direct=on,aio={}",
                self.path(name).display(),
                tuning.aio
            )
        };
        let nothing = |node: &str| format!("driver=null-co,node-name={node},size={NULL_SIZE},read-zeroes=on");
        let mut daemon = on_cores(tuning.cores, &daemon(self.null));
        if kind == Kind::Qemu {
            let disk = if self.null {
                nothing("disk")
            } else {
                file("raw", "disk")
            };
            daemon.args(["--blockdev", &disk]);
        } else {
            let payload = if self.null {
                nothing("payload")
            } else {
                file("luks", "payload")
            };
            daemon.args(["--object", &self.secret(), "--blockdev", &payload]);
            let mut luks = "driver=luks,node-name=disk,file=payload,key-secret=secret".to_owned();
            if self.null {
                daemon.args(["--blockdev", &file("header", "header")]);
                luks += ",header=header";
            }
            daemon.args(["--blockdev", &luks]);
        }
        daemon.args(["--object", "iothread,id=thread", "--export"]).arg(format!(
            "type=vhost-user-blk,id=export,node-name=disk,iothread=thread,writable=on,num-queues={},addr.type=unix,addr.path={}",
            tuning.queues,
            socket.display()
        ));
        daemon
    }
}

/// QEMU's storage daemon. Over null storage it is QEMU 10's, if qemu/build-qemu10 has fetched it.
pub(crate) fn daemon(null: bool) -> Vec<String> {
    let qemu10 = in_repository("qemu/qemu10").display().to_string();
    let mut command = vec![QEMU.to_owned()];
    if null && has_qemu10() {
        command.insert(0, qemu10);
    }
    command
}

/// Only since version 9 can QEMU have the header of a LUKS volume apart from its payload, which null storage is.
pub(crate) fn has_qemu10() -> bool {
    in_repository("build/qemu10").exists()
}

fn in_repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A server in its own process, which ends when this goes.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
    end: Signal,
    socket: PathBuf,
    /// What stands before it.
    logging: Option<JoinHandle<()>>,
}

impl Server {
    pub(crate) fn start(disks: &Disks, kind: Kind, tuning: &Tuning<'_>) -> Self {
        let socket = disks.path("vhost.sock");
        let _ = fs::remove_file(&socket);
        let mut command = disks.serve(kind, &socket, tuning);
        let log = fs::File::create(disks.path("log")).expect("a file for what the server says");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = command
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let end = match kind {
            // QEMU 7.2, whose front-end has just left, can wait for itself for ever. All was measured already.
            Kind::Qemu | Kind::QemuLuks => Signal::KILL,
            // The kernel keeps the locks of a killed server until it has taken apart its rings, and the next one has the same file.
            Kind::Sealblk | Kind::OtherBuild | Kind::Logged | Kind::Plain => Signal::TERM,
        };
        let (socket, logging) = match kind {
            Kind::Logged => {
                let (socket, logging) = logging::before(&socket);
                (socket, Some(logging))
            }
            _ => (socket, None),
        };
        Server {
            child,
            end,
            socket,
            logging,
        }
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It does not matter if it has ended by itself.
        let _ = kill_process(self.pid(), self.end);
        let _ = self.child.wait();
        // After another failure there may never have been a driver.
        if let Some(logging) = self.logging.take().filter(|_| !thread::panicking()) {
            logging.join().expect("the front-end that logs");
        }
    }
}

/// The program on some cores; taskset becomes it, so the process is the same.
fn on_cores(cores: &str, program: &[String]) -> Command {
    let mut command = Command::new("taskset");
    command.args(["--cpu-list", cores]).args(program);
    command
}

fn succeed(command: &mut Command) {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
}
