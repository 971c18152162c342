//! The mounts of this process' mount namespace: mountinfo (proc(5)).

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// A mount.
#[derive(Debug)]
pub struct Mount {
    /// The number that fdinfo names it by.
    id: String,
    /// Number of the file system: two mounts of it have the same.
    pub device: String,
    /// What of the file system is mounted.
    pub root: PathBuf,
    /// Where it is mounted.
    pub point: PathBuf,
    kind: String,
    /// The options of the file system, each as it stands there.
    options: Vec<Vec<u8>>,
}

impl Mount {
    /// All of them, the later over the earlier; none where there is no mountinfo.
    pub fn all() -> Vec<Self> {
        Self::parse_all(&fs::read("/proc/thread-self/mountinfo").unwrap_or_default())
    }

    /// Those of a text as mountinfo has it.
    pub fn parse_all(table: &[u8]) -> Vec<Self> {
        table
            .split(|byte| *byte == b'\n')
            .filter_map(Self::parse)
            .collect()
    }

    fn parse(line: &[u8]) -> Option<Self> {
        let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
        // Optional fields lie before the dash.
        let dash = 6 + fields.get(6..)?.iter().position(|field| *field == b"-")?;
        let text =
            |at: usize| String::from_utf8_lossy(fields.get(at).copied().unwrap_or_default()).into_owned();
        Some(Self {
            id: text(0),
            device: text(2),
            root: unescaped(fields.get(3)?).into(),
            point: unescaped(fields.get(4)?).into(),
            kind: text(dash + 1),
            options: fields
                .get(dash + 3)?
                .split(|byte| *byte == b',')
                .map(<[u8]>::to_vec)
                .collect(),
        })
    }

    /// The one through which `file` was opened.
    pub fn of(file: &File, mounts: &[Self]) -> Option<usize> {
        let info = fs::read_to_string(format!("/proc/thread-self/fdinfo/{}", file.as_raw_fd())).ok()?;
        let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim();
        mounts.iter().position(|mount| mount.id == id)
    }

    /// The one that `path` lies in, which is absolute and without links.
    pub fn holding<'a>(path: &Path, mounts: &'a [Self]) -> Option<&'a Self> {
        let holds = mounts.iter().filter(|mount| path.starts_with(&mount.point));
        holds.max_by_key(|mount| mount.point.components().count())
    }

    /// Whether its file system is of this type.
    pub fn is(&self, kind: &str) -> bool {
        self.kind == kind
    }

    /// Whether its file system has an option without a value.
    pub fn has_option(&self, name: &str) -> bool {
        self.options.iter().any(|option| option == name.as_bytes())
    }

    /// The value of an option of the file system.
    fn option(&self, name: &str) -> Option<OsString> {
        let value = |option: &Vec<u8>| {
            option
                .strip_prefix(name.as_bytes())?
                .strip_prefix(b"=")
                .map(unescaped)
        };
        self.options.iter().find_map(value)
    }
}

/// A path as mountinfo writes it: space, tab, newline and backslash are \ooo there.
fn unescaped(text: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        let escape = after
            .get(..3)
            .filter(|_| byte == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(escape.unwrap_or(byte));
        rest = if escape.is_some() { &after[3..] } else { after };
    }
    OsString::from_vec(bytes)
}

/// Where the file of an overlayfs lies once it was written to: the path in the mount stands for one in the upper directory.
pub fn overlay_upper(file: &File, mounts: &[Mount]) -> Option<PathBuf> {
    let mount = &mounts[Mount::of(file, mounts)?];
    if !mount.is("overlay") {
        return None;
    }
    let path = fs::read_link(format!("/proc/thread-self/fd/{}", file.as_raw_fd())).ok()?;
    let inside = path.strip_prefix(&mount.point).ok()?;
    let root = mount.root.strip_prefix(OsStr::from_bytes(b"/")).ok()?;
    let upper = PathBuf::from(mount.option("upperdir")?);
    // Where another one begins, only whoever mounted it knows.
    upper.is_absolute().then(|| upper.join(root).join(inside))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_mountinfo_are_read() {
        let line = br"36 35 98:0 /sub /srv/vm\040s rw,noatime shared:1 - overlay none rw,lowerdir=/a,upperdir=/b\134c\054";
        let mount = Mount::parse(line).unwrap();
        assert_eq!((&*mount.device, &*mount.kind), ("98:0", "overlay"));
        assert_eq!(
            (&*mount.root, &*mount.point),
            (Path::new("/sub"), Path::new("/srv/vm s"))
        );
        assert_eq!(mount.option("upperdir").unwrap(), r"/b\c,");
        assert!(mount.option("workdir").is_none());
        assert_eq!(unescaped(br"/a\9\04").as_bytes(), br"/a\9\04");
        assert!(Mount::parse(b"").is_none() && Mount::parse(b"36 35 98:0 / / rw").is_none());
    }

    #[test]
    fn a_place_is_in_the_mount_nearest_above_it() {
        let mounts = Mount::all();
        let root = Mount::holding(Path::new("/"), &mounts).unwrap();
        assert_eq!(root.point, Path::new("/"));
        let proc = Mount::holding(Path::new("/proc/self/mountinfo"), &mounts).unwrap();
        assert_eq!(proc.kind, "proc");
    }
}
