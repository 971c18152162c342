//! The group and the mode of a socket that a verb listens on.

use std::path::Path;

use crate::control::socket::Permissions;
use crate::parsing::rule;

/// A group, by number or by name.
pub(super) fn parse_group(text: &str) -> Result<u32, String> {
    if let Ok(group) = text.parse() {
        return Ok(group);
    }
    let group =
        uzers::get_group_by_name(text).ok_or_else(|| format!("this host has no group called {text:?}"))?;
    Ok(group.gid())
}

/// A mode, in octal.
pub(super) fn parse_mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| mode & !0o777 == 0);
    mode.ok_or_else(|| rule::MODE.to_owned())
}

/// Whether two paths name the same socket. Both may be links, or lead through links.
pub(super) fn is_same_socket(front_ends: &Path, control: &Path) -> bool {
    // What does not exist is told when it is bound.
    let place = |path: &Path| {
        let directory = path.parent().filter(|parent| *parent != Path::new(""));
        let directory = directory.unwrap_or(Path::new(".")).canonicalize().ok()?;
        Some(directory.join(path.file_name()?))
    };
    place(front_ends).is_some_and(|at| Some(at) == place(control))
}

/// Warns if every user of the host can read and write the disk.
pub(super) fn warn_of_others(permissions: Permissions) {
    if permissions.mode & 0o002 != 0 {
        tracing::warn!("--socket-mode lets every user of this host read and write the disk");
    }
}
