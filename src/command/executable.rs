//! The executables of sealblk find each other: `sealblk` starts `vhost-user-sealblk`, which starts `sealblk` as its key helper.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Where the one is, seen from the directory of the other: beside it, or as packages place them, in `bin` and `libexec`. Seen from
/// another directory, those may be anyone's.
fn places(directory: &Path) -> &'static [&'static str] {
    match directory.file_name().and_then(|name| name.to_str()) {
        Some("bin" | "sbin") => &["", "../libexec"],
        Some("libexec") => &["", "../bin"],
        _ => &[""],
    }
}

/// Another executable of sealblk is not there.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot find the executable {name}, which belongs to sealblk: install it in {}, or as packages do, in `libexec` or `bin` beside \
     that directory",
    directory.display()
)]
pub struct NoExecutable {
    name: &'static str,
    /// That of this process' executable.
    directory: PathBuf,
}

/// Where the executable `name` is.
///
/// # Errors
/// [`NoExecutable`], if it is at none of the known places.
pub fn find(name: &'static str) -> Result<PathBuf, NoExecutable> {
    // The path of a file that was replaced meanwhile ends with " (deleted)"; its directory stays.
    let own = std::env::current_exe().unwrap_or_default();
    let directory = own.parent().unwrap_or(Path::new("/")).to_owned();
    let found = places(&directory)
        .iter()
        .map(|place| directory.join(place).join(name));
    let other = found.into_iter().find(|path| is_another(path).unwrap_or(false));
    other.ok_or(NoExecutable { name, directory })
}

/// Whether this process' own executable has the file name `name`.
pub fn is_own_name(name: &str) -> bool {
    std::env::current_exe().is_ok_and(|own| own.file_name().is_some_and(|file| file == name))
}

/// Whether there is a file that is not this process' own executable: a link to that would start itself without end.
fn is_another(path: &Path) -> io::Result<bool> {
    let (found, own) = (fs::metadata(path)?, fs::metadata("/proc/self/exe")?);
    Ok(found.is_file() && (found.dev(), found.ino()) != (own.dev(), own.ino()))
}
