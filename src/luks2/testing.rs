//! Headers to test with: one as cryptsetup 2.6 writes it, and a medium in memory that holds it.

use std::cell::{Cell, RefCell};
use std::io;
use std::ops::Range;
use std::path::Path;

use sealblk_secmem::arena::SecretBytes;
use serde_json::Value;
use uuid::Uuid;

use crate::binary::{self, BinaryHeader, Copy, Text};
use crate::hash::Hash;
use crate::header_io::HeaderIo;
use crate::kdf::Argon2Cost;
use crate::lock::{LockMode, MetadataLock};
use crate::metadata::{Id, Metadata, MetadataError, Other, Token};

/// The length of one copy of the sample's header, of the whole, and of the file that it describes.
pub(crate) const COPY: u64 = 16 << 10;
pub(crate) const HEADER: u64 = 16 << 20;
pub(crate) const FILE: u64 = 40 << 20;

/// What `cryptsetup luksFormat --key-size 512` wrote, with a token and a priority added.
pub(crate) fn sample() -> Value {
    serde_json::from_str(
        r#"{
        "keyslots": {"0": {
            "type": "luks2", "key_size": 64, "priority": 2,
            "af": {"type": "luks1", "stripes": 4000, "hash": "sha256"},
            "area": {
                "type": "raw", "offset": "32768", "size": "258048", "encryption": "aes-xts-plain64", "key_size": 64
            },
            "kdf": {
                "type": "argon2id", "time": 4, "memory": 32, "cpus": 1,
                "salt": "fD32LxBoZEAYOqGbywaIaa0/hnAV7OeSg8h8akVSklY="
            }
        }},
        "tokens": {"0": {
            "type": "sealblk", "keyslots": ["0"], "provider": "native", "key_id": "k1", "wrapped_slot_secret": "AQID"
        }},
        "segments": {"0": {
            "type": "crypt", "offset": "16777216", "size": "dynamic", "iv_tweak": "0",
            "encryption": "aes-xts-plain64", "sector_size": 4096
        }},
        "digests": {"0": {
            "type": "pbkdf2", "keyslots": ["0"], "segments": ["0"], "hash": "sha256", "iterations": 1000,
            "salt": "nL68BvPVINpZ5EYHtXTETd80c1CqDs2y67iHW4KSdZ0=",
            "digest": "LQjFcVtVqho4BrMLfY5lVhn1a5GpJ79m2t2/84Wn9uk="
        }},
        "config": {"json_size": "12288", "keyslots_size": "16744448"}
    }"#,
    )
    .unwrap()
}

/// The sample with the value at `pointer` (RFC 6901) replaced, or added to its object.
pub(crate) fn sample_with(pointer: &str, value: impl Into<Value>) -> Value {
    let mut json = sample();
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    json.pointer_mut(parent)
        .unwrap()
        .as_object_mut()
        .unwrap()
        .insert(key.to_owned(), value.into());
    json
}

/// The metadata that `json` is, as they stand in a header of [`COPY`] bytes.
pub(crate) fn parsed(json: &Value) -> Result<Metadata, MetadataError> {
    Metadata::parse(&area(json.to_string().as_bytes()), COPY)
}

/// A derivation that takes no time.
pub(crate) const CHEAP: Argon2Cost = Argon2Cost {
    time: 1,
    memory_kib: 8,
    lanes: 1,
};

pub(crate) fn secret(text: &str) -> SecretBytes {
    SecretBytes::copy_of(text.as_bytes()).unwrap()
}

/// A token that makes metadata invalid.
pub(crate) fn of_a_missing_keyslot() -> Token {
    Token {
        kind: "stray".to_owned(),
        keyslots: vec![Id(31)],
        other: Other::new(),
    }
}

/// A token that no header of [`COPY`] bytes has room for.
pub(crate) fn too_long() -> Token {
    Token {
        kind: "x".repeat(COPY as usize),
        keyslots: Vec::new(),
        other: Other::new(),
    }
}

/// A sealed copy of the header around any JSON text.
pub(crate) fn copy_of(copy: Copy, seqid: u64, json: &[u8]) -> Vec<u8> {
    let mut whole = vec![0; binary::LEN];
    whole.extend(area(json));
    let binary = BinaryHeader {
        header_size: COPY,
        seqid,
        label: Text::EMPTY,
        checksum: Hash::Sha256,
        salt: [copy as u8; 64],
        uuid: Uuid::from_u128(7),
        subsystem: Text::EMPTY,
    };
    binary.encode(copy, &mut whole);
    whole
}

fn area(json: &[u8]) -> Vec<u8> {
    let mut area = vec![0; COPY as usize - binary::LEN];
    let len = json.len().min(area.len());
    area[..len].copy_from_slice(&json[..len]);
    area
}

/// A file in memory, of which only the front is there; the rest is zeros that nobody writes.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) front: RefCell<Vec<u8>>,
    pub(crate) size: Cell<u64>,
    /// Whether it can become longer or shorter.
    pub(crate) grows: bool,
    pub(crate) read_only: bool,
    /// Whether every read ends in EIO.
    pub(crate) fails: bool,
}

impl Memory {
    /// Both copies, with their sequence numbers and JSON texts.
    pub(crate) fn holding(primary: (u64, &[u8]), secondary: (u64, &[u8])) -> Self {
        let mut front = copy_of(Copy::Primary, primary.0, primary.1);
        front.extend(copy_of(Copy::Secondary, secondary.0, secondary.1));
        Self {
            front: RefCell::new(front),
            size: Cell::new(FILE),
            grows: false,
            read_only: false,
            fails: false,
        }
    }

    /// Both copies the same.
    pub(crate) fn of(json: &Value) -> Self {
        let json = json.to_string();
        Self::holding((3, json.as_bytes()), (3, json.as_bytes()))
    }

    pub(crate) fn spoil(&self, at: u64) {
        self.front.borrow_mut()[at as usize] ^= 0xff;
    }

    fn range(&self, offset: u64, len: usize) -> io::Result<Range<usize>> {
        let end = offset
            .checked_add(len as u64)
            .filter(|&end| end <= self.size.get());
        end.map(|end| offset as usize..end as usize)
            .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

impl HeaderIo for Memory {
    fn path(&self) -> &Path {
        Path::new("memory")
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.size.get())
    }

    fn can_grow(&self) -> bool {
        self.grows
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        self.size.set(size);
        Ok(())
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if self.fails {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let range = self.range(offset, buffer.len())?;
        buffer.fill(0);
        if let Some(there) = self.front.borrow().get(range.start..) {
            let len = there.len().min(buffer.len());
            buffer[..len].copy_from_slice(&there[..len]);
        }
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let range = self.range(offset, bytes.len())?;
        let mut front = self.front.borrow_mut();
        if front.len() < range.end {
            front.resize(range.end, 0);
        }
        front[range].copy_from_slice(bytes);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn forget_cached(&self, _: Range<u64>) -> io::Result<()> {
        Ok(())
    }

    fn lock(&self, _: LockMode) -> io::Result<MetadataLock<'_>> {
        Ok(MetadataLock::unshared())
    }
}
