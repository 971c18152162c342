//! The files that a verb has made, and removes again if it fails.

use std::fs;
use std::path::PathBuf;

use super::stderr;
use sealblk_secmem::private_file;

/// Removes the files it holds when it is dropped, unless they are kept.
#[derive(Debug, Default)]
pub(super) struct Made(Vec<PathBuf>);

impl Made {
    pub(super) fn extend(&mut self, paths: impl IntoIterator<Item = PathBuf>) {
        self.0.extend(paths);
    }

    /// Leaves them where they are, by names that a crash of the host does not take back.
    pub(super) fn keep(mut self) {
        for path in self.0.drain(..) {
            if let Err(e) = private_file::sync_dir_of(&path) {
                stderr::note(&format!(
                    "{} was made, but a crash now may lose it: {e}",
                    path.display()
                ));
            }
        }
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for path in &self.0 {
            if let Err(e) = fs::remove_file(path) {
                stderr::note(&format!("{} was made and cannot be removed: {e}", path.display()));
            }
        }
    }
}
