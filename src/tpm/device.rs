//! The device of a TPM, and the transport of bytes to and from it.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::deadline::{Deadline, Timed};

/// The kernel's resource manager, which keeps users of the TPM apart.
pub const DEFAULT_DEVICE: &str = "/dev/tpmrm0";

/// What names swtpm's socket, as tpm2-tools do it.
const SWTPM: &str = "swtpm:path=";
/// The longest command and answer: no TPM has longer ones.
pub(super) const MAX_MESSAGE: usize = 4096;
/// The header of an answer: tag, length, response code.
pub(super) const HEADER: usize = 10;
/// How long a command and its answer may take: some TPMs make an RSA key in half a minute.
const TIMEOUT: Duration = Duration::from_secs(90);

/// Where a TPM is: `/dev/tpmrm0`, or `swtpm:path=SOCKET`, the data socket of swtpm.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub struct Device(Transport);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Transport {
    File(PathBuf),
    Socket(PathBuf),
}

impl From<String> for Device {
    fn from(text: String) -> Self {
        Self(match text.strip_prefix(SWTPM) {
            Some(socket) => Transport::Socket(socket.into()),
            None => Transport::File(text.into()),
        })
    }
}

impl Device {
    /// Whether it is named by its whole path, as settings have to: what else stands there may be a secret in the wrong place.
    pub(crate) fn is_absolute(&self) -> bool {
        let (Transport::File(path) | Transport::Socket(path)) = &self.0;
        path.is_absolute()
    }
}

impl From<&str> for Device {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

impl From<Device> for String {
    fn from(device: Device) -> Self {
        device.to_string()
    }
}

impl Default for Device {
    fn default() -> Self {
        DEFAULT_DEVICE.into()
    }
}

impl Device {
    /// The file or socket.
    pub fn path(&self) -> &Path {
        match &self.0 {
            Transport::File(path) | Transport::Socket(path) => path,
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Transport::File(path) => write!(f, "{}", path.display()),
            Transport::Socket(path) => write!(f, "{SWTPM}{}", path.display()),
        }
    }
}

/// A TPM's end of a conversation, in which the sides take turns.
#[derive(Debug)]
pub(super) enum Stream {
    /// Gives a whole answer to one read, and takes a whole command in one write.
    File(File),
    Socket(UnixStream),
}

impl Stream {
    pub(super) fn open(device: &Device) -> io::Result<Self> {
        Ok(match &device.0 {
            Transport::File(path) => Self::File(OpenOptions::new().read(true).write(true).open(path)?),
            Transport::Socket(path) => Self::Socket(UnixStream::connect(path)?),
        })
    }

    /// Sends a command, and takes its answer: as long as its header says, and no longer than any is.
    pub(super) fn transmit(&mut self, command: &[u8]) -> io::Result<Vec<u8>> {
        let invalid = || {
            io::Error::new(
                io::ErrorKind::InvalidData,
                "the length of its answer is not valid",
            )
        };
        let mut answer = vec![0; MAX_MESSAGE];
        let read = match self {
            Self::File(file) => {
                file.write_all(command)?;
                file.read(&mut answer)?
            }
            Self::Socket(stream) => {
                let mut stream = Timed::new(stream, Deadline::after(TIMEOUT));
                stream.write_all(command)?;
                stream.read_exact(&mut answer[..HEADER])?;
                let len = length(&answer).filter(|len| (HEADER..=MAX_MESSAGE).contains(len));
                let len = len.ok_or_else(invalid)?;
                stream.read_exact(&mut answer[HEADER..len])?;
                len
            }
        };
        if read < HEADER || length(&answer) != Some(read) {
            return Err(invalid());
        }
        answer.truncate(read);
        Ok(answer)
    }
}

fn length(answer: &[u8]) -> Option<usize> {
    let bytes = answer.get(2..6)?.try_into().ok()?;
    usize::try_from(u32::from_be_bytes(bytes)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_operators_know_them() {
        for text in ["/dev/tpmrm0", "swtpm:path=/run/tpm.sock"] {
            assert_eq!(Device::from(text).to_string(), text);
        }
        assert_eq!(Device::from("swtpm:path=/a").path(), Path::new("/a"));
    }

    /// Who answers is a file or a program that is no TPM.
    #[test]
    fn answers_that_are_none_are_errors() {
        let answered = |bytes: &[u8]| {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(bytes).unwrap();
            theirs.shutdown(std::net::Shutdown::Write).unwrap();
            Stream::Socket(ours).transmit(b"command")
        };
        let long = [&[0x80, 1, 0, 0, 0x10, 1, 0, 0, 0, 0][..], &[0; 5000]].concat();
        for bytes in [
            &b""[..],
            b"\x80\x01",
            b"\x80\x01\0\0\0\x09\0\0\0\0",
            b"\x80\x01\0\0\0\x0c\0\0\0\0\0",
            &long,
        ] {
            answered(bytes).unwrap_err();
        }
        let short = b"\x80\x01\0\0\0\x0a\0\0\x01\x01";
        assert_eq!(answered(short).unwrap(), short);
    }
}
