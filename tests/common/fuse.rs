//! A FUSE file system with one file, whose daemon leaves one process without an answer, as that of a hostile front-end would.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use tempfile::TempDir;

const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const INIT: u32 = 26;

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

/// Who waits for an answer.
#[derive(Debug, Default)]
struct Waiting {
    process: AtomicU32,
    requests: Mutex<Vec<u64>>,
}

impl Fuse {
    /// Mounts it, which takes root.
    pub fn mount() -> Option<Self> {
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
        let waiting = Arc::new(Waiting::default());
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
        let answer = match opcode {
            // struct fuse_init_out: major, minor, and 56 bytes of which zeros do but for max_write.
            INIT => [7, 31, 0, 0, 0, 1 << 16]
                .map(u32::to_ne_bytes)
                .concat()
                .into_iter()
                .chain([0; 40])
                .collect(),
            LOOKUP => {
                let node = ROOT + 1;
                [
                    [node, 0, 0, 0, 0].map(u64::to_ne_bytes).concat(),
                    attributes(node),
                ]
                .concat()
            }
            GETATTR => [vec![0; 16], attributes(node)].concat(),
            OPEN => [1_u64, 0].map(u64::to_ne_bytes).concat(),
            _ => Vec::new(),
        };
        reply(device, unique, &answer);
    }
}

/// struct fuse_attr.
fn attributes(node: u64) -> Vec<u8> {
    let longs = [node, 64 << 20, 0, 0, 0, 0].map(u64::to_ne_bytes).concat();
    let mode = if node == ROOT { 0o040_755 } else { 0o100_666 };
    let words = [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0]
        .map(u32::to_ne_bytes)
        .concat();
    [longs, words].concat()
}

fn reply(mut device: &File, unique: u64, answer: &[u8]) {
    let (len, error) = (16 + answer.len() as u32, 0_i32);
    let header = [
        &len.to_ne_bytes()[..],
        &error.to_ne_bytes(),
        &unique.to_ne_bytes(),
    ]
    .concat();
    // One that was given up meanwhile needs no answer.
    let _ = device.write_all(&[&header, answer].concat());
}
