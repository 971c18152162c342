//! Certificates of a test authority, made anew by `certificates.py` for each run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

/// The directory of what `certificates.py` tells of.
pub(crate) fn directory() -> &'static Path {
    static DIR: LazyLock<PathBuf> = LazyLock::new(|| {
        // Under target/, for no test of this process knows that it is the last one.
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("certificates");
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/providers/certificates.py");
        let done = Command::new("python3").arg(script).arg(&dir).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        dir
    });
    &DIR
}
