//! A FUSE file system with one file, whose daemon leaves one process without an answer, as that of a hostile front-end would, or
//! has writes land late, as slow storage does.

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
}

/// A write that has not landed.
#[derive(Debug)]
struct LateWrite {
    unique: u64,
    offset: u64,
    bytes: Vec<u8>,
}

impl Waiting {
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
            GETATTR | SETATTR => [vec![0; 16], attributes(node, size)].concat(),
            OPEN => [1_u64, 0].map(u64::to_ne_bytes).concat(),
            // struct fuse_read_in and struct fuse_write_in: fh, offset, size; the bytes come after 40 of these.
            READ => {
                let mut bytes = vec![0; word(56) as usize];
                let len = waiting.content.read_at(&mut bytes, long(48)).unwrap();
                bytes.truncate(len);
                bytes
            }
            WRITE => {
                let bytes = buffer[80..80 + word(56) as usize].to_vec();
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
            FALLOCATE | STATX => {
                refuse(device, unique, ENOSYS);
                continue;
            }
            _ => Vec::new(),
        };
        reply(device, unique, &answer);
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
