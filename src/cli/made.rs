//! The files that a verb has made, which go again if it fails.

use std::fs;
use std::path::PathBuf;

use super::output;

/// Removes the files it holds when it is dropped, unless they are kept.
#[derive(Debug, Default)]
pub(super) struct Made(Vec<PathBuf>);

impl Made {
    pub(super) fn extend(&mut self, paths: impl IntoIterator<Item = PathBuf>) {
        self.0.extend(paths);
    }

    pub(super) fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for path in &self.0 {
            if let Err(e) = fs::remove_file(path) {
                output::note(&format!("{} was made and cannot be removed: {e}", path.display()));
            }
        }
    }
}
