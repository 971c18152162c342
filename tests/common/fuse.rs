//! A FUSE file system with one file, whose daemon leaves one process without an answer, as that of a hostile front-end would,
//! has writes land late, as slow storage does, or fails operations.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use tempfile::TempDir;

const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const FSYNC: u32 = 20;
const INIT: u32 = 26;
const FALLOCATE: u32 = 43;
const STATX: u32 = 52;

/// That more than one direct write of a caller can be under way (`FUSE_BIG_WRITES`, `FUSE_ASYNC_DIO`).
const FLAGS: u32 = 1 << 5 | 1 << 15;
/// So many of these can be at a time.
const MOST_UNDER_WAY: u32 = 64;
const MAX_WRITE: u32 = 1 << 16;

const ENOSYS: i32 = 38;

const ROOT: u64 = 1;

/// No process has this number.
const ALL: u32 = u32::MAX;

/// What the daemon can fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    Read,
    Write,
    Sync,
    Discard,
}

/// What becomes of an operation that the daemon fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It ends with this error, and changes nothing.
    Error(i32),
    /// Half of it is done, in whole sectors, and one at least.
    Short,
    /// It finds the end of the file.
    End,
}

#[derive(Debug)]
pub struct Fuse {
    dir: TempDir,
    device: Arc<File>,
    waiting: Arc<Waiting>,
    daemon: Option<JoinHandle<()>>,
}

/// Who waits for an answer, and what the file holds.
#[derive(Debug)]
struct Waiting {
    process: AtomicU32,
    requests: Mutex<Vec<u64>>,
    content: File,
    /// Whether writes that come from now on land only when they are let go.
    late: AtomicBool,
    writes: Mutex<Vec<LateWrite>>,
    /// Operations that fail from this offset on; how often they did.
    faults: Mutex<Vec<(Operation, Fault, u64)>>,
    failed: AtomicU32,
    /// Whether holes can be punched.
    discards: AtomicBool,
}

/// A write that has not landed.
#[derive(Debug)]
struct LateWrite {
    unique: u64,
    offset: u64,
    bytes: Vec<u8>,
}

impl Waiting {
    /// What becomes of an operation at `offset`.
    fn fault(&self, operation: Operation, offset: u64) -> Option<Fault> {
        let faults = self.faults.lock().unwrap();
        let mut faults = faults.iter();
        let fault = faults.find(|(fails, _, from)| {
            *fails == operation && (offset >= *from || operation == Operation::Sync)
        });
        let fault = fault.map(|(_, fault, _)| *fault)?;
        self.failed.fetch_add(1, Ordering::SeqCst);
        Some(fault)
    }

    /// Writes, and answers.
    fn land(&self, device: &File, write: &LateWrite) {
        self.content.write_all_at(&write.bytes, write.offset).unwrap();
        reply(
            device,
            write.unique,
            &u64::from(write.bytes.len() as u32).to_ne_bytes(),
        );
    }
}

impl Fuse {
    /// Mounts it, which takes root.
    pub fn mount() -> Option<Self> {
        let content = tempfile::tempfile().unwrap();
        content.set_len(64 << 20).unwrap();
        Self::over(content)
    }

    /// The same, of a file that holds what `content` holds.
    pub fn over(content: File) -> Option<Self> {
        let device = File::options().read(true).write(true).open("/dev/fuse").ok()?;
        let dir = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        mount
            .args(["-i", "-t", "fuse", "-o"])
            .arg("fd=0,rootmode=40000,user_id=0,group_id=0")
            .arg("sealblk-test")
            .arg(dir.path())
            .stdin(device.try_clone().unwrap())
            .stderr(Stdio::null());
        if !mount.status().unwrap().success() {
            return None;
        }
        let device = Arc::new(device);
        let waiting = Arc::new(Waiting {
            process: AtomicU32::new(0),
            requests: Mutex::default(),
            content,
            late: AtomicBool::new(false),
            writes: Mutex::default(),
            faults: Mutex::default(),
            failed: AtomicU32::new(0),
            discards: AtomicBool::new(false),
        });
        let (theirs, kept) = (Arc::clone(&device), Arc::clone(&waiting));
        let daemon = Some(std::thread::spawn(move || serve(&theirs, &kept)));
        Some(Fuse {
            dir,
            device,
            waiting,
            daemon,
        })
    }

    /// The file.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("file")
    }

    /// The same, opened.
    pub fn open(&self) -> OwnedFd {
        let path = self.path();
        File::options().read(true).write(true).open(path).unwrap().into()
    }

    /// Gives nobody an answer any more.
    pub fn ignore_all(&self) {
        self.ignore(ALL);
    }

    /// Whether somebody waits for an answer.
    pub fn is_asked(&self) -> bool {
        !self.waiting.requests.lock().unwrap().is_empty()
    }

    /// Gives that process no answer any more.
    pub fn ignore(&self, process: u32) {
        self.waiting.process.store(process, Ordering::SeqCst);
    }

    /// Fails operations that begin at `from` or behind it, and all syncs if that is what fails.
    pub fn fail(&self, operation: Operation, fault: Fault, from: u64) {
        self.waiting.faults.lock().unwrap().push((operation, fault, from));
    }

    /// Fails nothing any more. Gives how many operations it has failed.
    pub fn heal(&self) -> u32 {
        self.waiting.faults.lock().unwrap().clear();
        self.waiting.failed.swap(0, Ordering::SeqCst)
    }

    /// How many operations it has failed.
    pub fn failed(&self) -> u32 {
        self.waiting.failed.load(Ordering::SeqCst)
    }

    /// Lets holes be punched.
    pub fn take_discards(&self) {
        self.waiting.discards.store(true, Ordering::SeqCst);
    }

    /// Has writes that come from now on land when they are let go, or at once.
    pub fn set_late(&self, late: bool) {
        self.waiting.late.store(late, Ordering::SeqCst);
    }

    /// How many writes have not landed.
    pub fn writes_under_way(&self) -> usize {
        self.waiting.writes.lock().unwrap().len()
    }

    /// Has the writes land that have not.
    pub fn let_writes_land(&self) {
        for write in self.waiting.writes.lock().unwrap().drain(..) {
            self.waiting.land(&self.device, &write);
        }
    }

    /// Answers all from now on.
    pub fn answer(&self) {
        self.ignore(0);
        for unique in self.waiting.requests.lock().unwrap().drain(..) {
            reply(&self.device, unique, &[]);
        }
    }

    /// Answers all from now on, and with an error what has waited.
    pub fn answer_by(&self, error: i32) {
        self.ignore(0);
        for unique in self.waiting.requests.lock().unwrap().drain(..) {
            refuse(&self.device, unique, error);
        }
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        self.answer();
        self.set_late(false);
        self.let_writes_land();
        let _ = Command::new("umount")
            .args([OsStr::new("-l"), self.dir.path().as_os_str()])
            .status();
        if let Some(daemon) = self.daemon.take()
            && !std::thread::panicking()
        {
            daemon.join().unwrap();
        }
    }
}

fn serve(device: &File, waiting: &Waiting) {
    let mut buffer = vec![0; 1 << 20];
    // Until it is unmounted.
    while let Ok(len) = (&*device).read(&mut buffer) {
        let word = |at: usize| u32::from_ne_bytes(buffer[at..at + 4].try_into().unwrap());
        let long = |at: usize| u64::from_ne_bytes(buffer[at..at + 8].try_into().unwrap());
        assert!(len >= 40);
        // struct fuse_in_header: len, opcode, unique, nodeid, uid, gid, pid, which is the thread.
        let (opcode, unique, node, thread) = (word(4), long(8), long(16), word(32));
        let process = waiting.process.load(Ordering::SeqCst);
        let is_theirs = || Path::new(&format!("/proc/{process}/task/{thread}")).exists();
        if process == ALL && opcode != INIT || is_theirs() {
            waiting.requests.lock().unwrap().push(unique);
            continue;
        }
        let size = waiting.content.metadata().unwrap().len();
        let operation = match opcode {
            READ => Some(Operation::Read),
            WRITE => Some(Operation::Write),
            FSYNC => Some(Operation::Sync),
            FALLOCATE => Some(Operation::Discard),
            _ => None,
        };
        let fault = operation.and_then(|operation| waiting.fault(operation, long(48)));
        if let Some(Fault::Error(error)) = fault {
            refuse(device, unique, error);
            continue;
        }
        let answer = match opcode {
            // struct fuse_init_out: major, minor, max_readahead, flags, two halves of which the lower is max_background, max_write,
            // and 40 bytes of which zeros do.
            INIT => [7, 31, 0, FLAGS, MOST_UNDER_WAY, MAX_WRITE]
                .map(u32::to_ne_bytes)
                .concat()
                .into_iter()
                .chain([0; 40])
                .collect(),
            LOOKUP => {
                let node = ROOT + 1;
                [
                    [node, 0, 0, 0, 0].map(u64::to_ne_bytes).concat(),
                    attributes(node, size),
                ]
                .concat()
            }
            GETATTR => [vec![0; 16], attributes(node, size)].concat(),
            // struct fuse_setattr_in: what is valid, fh, size.
            SETATTR => {
                let is_size = word(40) & 1 << 3 != 0;
                let size = if is_size { long(56) } else { size };
                waiting.content.set_len(size).unwrap();
                [vec![0; 16], attributes(node, size)].concat()
            }
            OPEN => [1_u64, 0].map(u64::to_ne_bytes).concat(),
            // struct fuse_read_in and struct fuse_write_in: fh, offset, size; the bytes come after 40 of these.
            READ => {
                let mut bytes = vec![0; part(word(56), fault) as usize];
                let len = waiting.content.read_at(&mut bytes, long(48)).unwrap();
                bytes.truncate(len);
                bytes
            }
            WRITE => {
                let bytes = buffer[80..80 + part(word(56), fault) as usize].to_vec();
                let offset = long(48);
                let write = LateWrite {
                    unique,
                    offset,
                    bytes,
                };
                match waiting.late.load(Ordering::SeqCst) {
                    true => waiting.writes.lock().unwrap().push(write),
                    false => waiting.land(device, &write),
                }
                continue;
            }
            // struct fuse_fallocate_in: fh, offset, length, mode.
            FALLOCATE if waiting.discards.load(Ordering::SeqCst) => {
                let end = long(48).saturating_add(long(56)).min(size);
                let zeros = vec![0; end.saturating_sub(long(48)) as usize];
                waiting.content.write_all_at(&zeros, long(48)).unwrap();
                Vec::new()
            }
            FALLOCATE | STATX => {
                refuse(device, unique, ENOSYS);
                continue;
            }
            _ => Vec::new(),
        };
        reply(device, unique, &answer);
    }
}

/// How much of `len` bytes is done.
fn part(len: u32, fault: Option<Fault>) -> u32 {
    match fault {
        Some(Fault::Short) => (len / 2 / 512 * 512).max(len.min(512)),
        Some(Fault::End) => 0,
        _ => len,
    }
}

/// struct fuse_attr.
fn attributes(node: u64, size: u64) -> Vec<u8> {
    let longs = [node, size, 0, 0, 0, 0].map(u64::to_ne_bytes).concat();
    let mode = if node == ROOT { 0o040_755 } else { 0o100_666 };
    let words = [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0]
        .map(u32::to_ne_bytes)
        .concat();
    [longs, words].concat()
}

fn reply(device: &File, unique: u64, answer: &[u8]) {
    send(device, unique, 0, answer);
}

fn refuse(device: &File, unique: u64, error: i32) {
    send(device, unique, -error, &[]);
}

fn send(mut device: &File, unique: u64, error: i32, answer: &[u8]) {
    let len = 16 + answer.len() as u32;
    let header = [
        &len.to_ne_bytes()[..],
        &error.to_ne_bytes(),
        &unique.to_ne_bytes(),
    ]
    .concat();
    // One that was given up meanwhile needs no answer.
    let _ = device.write_all(&[&header, answer].concat());
}
