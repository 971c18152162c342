//! Volumes to serve, made by the real tools: `sealblk create` with a native provider in a state directory of its own,
//! or stock cryptsetup with a passphrase.

use super::serve::sealblk_path;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

pub const MIB: u64 = 1 << 20;
pub const PASSPHRASE: &str = "correct horse battery staple";

/// A volume in a directory of its own, which goes when this does.
#[derive(Debug)]
pub struct Volume {
    pub(super) dir: TempDir,
    pub path: PathBuf,
    /// What `sealblk serve` needs to open it.
    pub open: Vec<String>,
}

impl Volume {
    /// A volume of `sealblk create`: 64 MiB for the guest, 512-byte sectors.
    pub fn new() -> Self {
        Volume::created(64 * MIB, 512)
    }

    pub fn created(size: u64, sector_size: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let (size, sector_size) = (size.to_string(), sector_size.to_string());
        Volume::created_at(dir, path, &["--size", &size, "--sector-size", &sector_size])
    }

    /// A volume of `sealblk create` anywhere, with its state directory in `dir`.
    pub fn created_at(dir: TempDir, path: PathBuf, args: &[&str]) -> Self {
        let state = dir.path().join("state").display().to_string();
        let mut add = Command::new(sealblk_path());
        run(add.args(["--state-dir", &state, "provider", "add", "native", "--no-backup"]));
        let mut create = Command::new(sealblk_path());
        run(create
            .args(["--state-dir", &state, "create"])
            .arg(&path)
            .args(args));
        let open = vec!["--state-dir".into(), state];
        Volume { dir, path, open }
    }

    /// A volume that is there, with what `sealblk serve` needs to open it; `dir` goes when this does.
    pub fn at(dir: TempDir, path: PathBuf, open: Vec<String>) -> Self {
        Volume { dir, path, open }
    }

    /// A volume of `cryptsetup luksFormat`, opened by a passphrase.
    pub fn cryptsetup(size: u64, sector_size: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let passphrase = passphrase_file(dir.path());
        File::create(&path).unwrap().set_len(16 * MIB + size).unwrap();
        run(Command::new("cryptsetup")
            .args([
                "luksFormat",
                "--batch-mode",
                "--type",
                "luks2",
                "--cipher",
                "aes-xts-plain64",
            ])
            .args([
                "--key-size",
                "512",
                "--pbkdf",
                "pbkdf2",
                "--pbkdf-force-iterations",
                "1000",
            ])
            .args(["--sector-size", &sector_size.to_string(), "--key-file"])
            .args([&passphrase, &path]));
        Volume {
            dir,
            path,
            open: vec!["--passphrase-file".into(), passphrase.display().to_string()],
        }
    }

    /// No volume: a file of zeros that is served as it is.
    pub fn plain(size: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        File::create(&path).unwrap().set_len(size).unwrap();
        let open = vec!["--allow-unencrypted".into()];
        Volume { dir, path, open }
    }

    /// A place beside the volume.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn file(&self) -> File {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(&self.path)
            .unwrap()
    }

    pub fn bytes(&self) -> Vec<u8> {
        fs::read(&self.path).unwrap()
    }

    /// `len` bytes of the file.
    pub fn stored(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file().read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }

    /// Where the payload starts in the file, as cryptsetup reads the header.
    pub fn payload_offset(&self) -> u64 {
        let dump = run(Command::new("cryptsetup")
            .args(["luksDump", "--dump-json-metadata"])
            .arg(&self.path));
        let metadata: serde_json::Value = serde_json::from_slice(&dump.stdout).unwrap();
        metadata["segments"]["0"]["offset"]
            .as_str()
            .unwrap()
            .parse()
            .unwrap()
    }
}

/// Writes the passphrase, without a newline, and gives the file's path.
pub fn passphrase_file(dir: &Path) -> PathBuf {
    let path = dir.join("passphrase");
    fs::write(&path, PASSPHRASE).unwrap();
    path
}

/// Runs a command that must succeed.
pub fn run(command: &mut Command) -> Output {
    let output = command
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(
        output.status.success(),
        "{command:?}: {}\n{out}{err}",
        output.status
    );
    output
}
