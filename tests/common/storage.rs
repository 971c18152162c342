//! Places for a volume to lie other than a file of `/tmp`: loop devices and small file systems, where they can be had.

use super::volume::run;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A loop device over a file.
#[derive(Debug)]
pub struct LoopDevice(PathBuf);

impl LoopDevice {
    /// Nothing if this machine gives none.
    pub fn over(file: &Path, logical_block_size: u32) -> Option<Self> {
        LoopDevice::with(file, &["--sector-size", &logical_block_size.to_string()])
    }

    /// The same, with other arguments for losetup.
    pub fn with(file: &Path, args: &[&str]) -> Option<Self> {
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .args(args)
            .arg(file)
            .output()
            .ok()?;
        if !output.status.success() {
            eprintln!("no loop device: {}", String::from_utf8_lossy(&output.stderr));
            return None;
        }
        let name = String::from_utf8(output.stdout).unwrap();
        Some(LoopDevice(name.trim().into()))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Has the device refuse writes, or take them.
    pub fn set_read_only(&self, read_only: bool) {
        let option = if read_only { "--setro" } else { "--setrw" };
        run(Command::new("blockdev").arg(option).arg(&self.0));
    }

    /// Flushes completed (the kernel's `Documentation/block/stat.rst`).
    pub fn flushes(&self) -> u64 {
        let name = self.0.file_name().unwrap();
        let stat = fs::read_to_string(Path::new("/sys/block").join(name).join("stat")).unwrap();
        stat.split_whitespace().nth(15).unwrap().parse().unwrap()
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // That would outlast what it is detached from.
        let _ = Command::new("blockdev").arg("--setrw").arg(&self.0).status();
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

/// A mounted file system.
#[derive(Debug)]
pub struct Filesystem {
    pub path: PathBuf,
    _device: Option<LoopDevice>,
}

impl Filesystem {
    /// A tmpfs of some size; nothing if this process may not mount.
    pub fn tmpfs(at: PathBuf, size: u64) -> Option<Self> {
        let options = format!("size={size}");
        mount(&at, &["-t", "tmpfs", "-o", &options, "none"]).then_some(Filesystem {
            path: at,
            _device: None,
        })
    }

    /// A ramfs, which makes no holes in its files; nothing if this process may not mount.
    pub fn ramfs(at: PathBuf) -> Option<Self> {
        mount(&at, &["-t", "ramfs", "none"]).then_some(Filesystem {
            path: at,
            _device: None,
        })
    }

    /// An overlayfs of new directories in `dir`: what is written lies in `upper`, and is seen in `merged` too.
    pub fn overlay(dir: &Path) -> Option<Self> {
        let [lower, upper, work, merged] = ["lower", "upper", "work", "merged"].map(|name| dir.join(name));
        for directory in [&lower, &upper, &work] {
            fs::create_dir_all(directory).unwrap();
        }
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.display(),
            upper.display(),
            work.display()
        );
        mount(&merged, &["-t", "overlay", "-o", &options, "none"]).then_some(Filesystem {
            path: merged,
            _device: None,
        })
    }

    /// Mounts it anew, for reading only.
    pub fn set_read_only(&self) {
        run(Command::new("mount").args(["-o", "remount,ro"]).arg(&self.path));
    }

    /// An ext4 on a device; nothing if this process may not mount.
    pub fn ext4(at: PathBuf, device: LoopDevice) -> Option<Self> {
        run(Command::new("mkfs.ext4").arg("-q").arg(device.path()));
        let source = device.path().to_owned();
        mount(&at, &[source.to_str().unwrap()]).then_some(Filesystem {
            path: at,
            _device: Some(device),
        })
    }
}

/// A file system whose server is there and answers nothing, mounted over a directory until this is dropped: as NFS, when its
/// server is away.
#[derive(Debug)]
pub struct SilentFilesystem {
    path: PathBuf,
    _server: fs::File,
}

impl SilentFilesystem {
    /// Nothing if this process may not mount.
    pub fn over(path: PathBuf) -> Option<Self> {
        let server = fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .ok()?;
        let status = Command::new("mount")
            .args([
                "-i",
                "-t",
                "fuse",
                "-o",
                "fd=0,rootmode=40000,user_id=0,group_id=0",
                "silent",
            ])
            .arg(&path)
            .stdin(server.try_clone().unwrap())
            .status();
        status.is_ok_and(|status| status.success()).then_some(Self {
            path,
            _server: server,
        })
    }
}

impl Drop for SilentFilesystem {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.path).status();
    }
}

/// A file system on which nothing can be written until this is dropped: writes to it are held up.
#[derive(Debug)]
pub struct Frozen(PathBuf);

impl Filesystem {
    pub fn freeze(&self) -> Frozen {
        run(Command::new("fsfreeze").arg("--freeze").arg(&self.path));
        Frozen(self.path.clone())
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        run(Command::new("fsfreeze").arg("--unfreeze").arg(&self.0));
    }
}

fn mount(at: &Path, args: &[&str]) -> bool {
    fs::create_dir_all(at).unwrap();
    let output = Command::new("mount").args(args).arg(at).output();
    output.is_ok_and(|output| output.status.success())
}

impl Drop for Filesystem {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.path).status();
    }
}
