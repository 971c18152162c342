//! Paths as text: in JSON, in files, and in messages between processes.
//!
//! A path is bytes, which JSON cannot hold. A path in UTF-8 is written unchanged. Any other path is made absolute and written as
//! a `file` URI (RFC 8089), `file:///srv/vm%FF.luks`: the URI keeps every byte, and no absolute path begins like a URI.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, percent_encode};

const SCHEME: &str = "file://";

/// What RFC 3986 does not have in a path; bytes beyond ASCII are encoded anyway.
const ENCODED: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'%')
    .add(b'<')
    .add(b'>')
    .add(b'?')
    .add(b'[')
    .add(b'\\')
    .add(b']')
    .add(b'^')
    .add(b'`')
    .add(b'{')
    .add(b'|')
    .add(b'}');

/// The path as text.
pub fn to_text(path: &Path) -> String {
    if let Some(text) = path.to_str() {
        return text.to_owned();
    }
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    format!("{SCHEME}{}", percent_encode(path.as_os_str().as_bytes(), ENCODED))
}

/// The path that is written so.
pub fn from_text(text: &str) -> PathBuf {
    match text.strip_prefix(SCHEME) {
        Some(encoded) => OsString::from_vec(percent_decode_str(encoded).collect()).into(),
        None => text.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;

    #[test]
    fn every_path_comes_back_and_those_of_utf8_look_as_they_are() {
        for (bytes, text) in [
            (&b"/srv/vm7.luks"[..], "/srv/vm7.luks"),
            (b"/srv/a%FF b\n", "/srv/a%FF b\n"),
            ("/srv/über".as_bytes(), "/srv/über"),
            (b"vm7.luks", "vm7.luks"),
            (b"/srv/vm\xff.luks", "file:///srv/vm%FF.luks"),
            (b"/srv/%41\xff \n", "file:///srv/%2541%FF%20%0A"),
        ] {
            let path = Path::new(OsStr::from_bytes(bytes));
            assert_eq!(to_text(path), text);
            assert_eq!(from_text(text), path);
        }
        let relative = Path::new(OsStr::from_bytes(b"vm\xff"));
        assert_eq!(
            from_text(&to_text(relative)),
            std::path::absolute(relative).unwrap()
        );
    }
}
