//! The group and the mode of a socket that a command listens on.

use std::convert::Infallible;
use std::path::Path;
use std::str::FromStr;

use sealblk_base::parsing::rule;
use sealblk_control::socket::Permissions;

/// A group, as it is given. Only a process that may load the host's name service can look up a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Group {
    /// By number.
    Number(u32),
    /// By name.
    Name(String),
}

impl FromStr for Group {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(text
            .parse()
            .map_or_else(|_| Self::Name(text.to_owned()), Self::Number))
    }
}

/// A mode, in octal.
pub fn parse_mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| mode & !0o777 == 0);
    mode.ok_or_else(|| rule::MODE.to_owned())
}

/// Whether two paths name the same socket. Both may be links, or lead through links.
pub fn is_same_socket(front_ends: &Path, control: &Path) -> bool {
    // What does not exist is told when it is bound.
    let place = |path: &Path| {
        let directory = path.parent().filter(|parent| *parent != Path::new(""));
        let directory = directory.unwrap_or(Path::new(".")).canonicalize().ok()?;
        Some(directory.join(path.file_name()?))
    };
    place(front_ends).is_some_and(|at| Some(at) == place(control))
}

/// Warns if every user of the host can read and write the disk.
pub fn warn_of_others(permissions: Permissions) {
    if permissions.mode & 0o002 != 0 {
        tracing::warn!("--socket-mode lets every user of this host read and write the disk");
    }
}
