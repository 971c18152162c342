//! LUKS2 headers of every kind: `ci/campaign fuzz`.
//!
//! The first byte of the input says what the rest is: the front of a volume as it lies on storage, or the JSON text
//! of a header whose both copies are sound otherwise. Without the second kind everything would end at the checksum.

#![no_main]

use std::io;
use std::ops::Range;
use std::path::Path;

use libfuzzer_sys::fuzz_target;
use sealblk::keys::binding::Info;
use sealblk::luks2::{HeaderIo, LockMode, Locked, MetadataLock};
use sha2::{Digest, Sha256};

fuzz_target!(|input: &[u8]| {
    let Some((kind, rest)) = input.split_first() else {
        return;
    };
    let medium = match kind % 2 {
        0 => Medium(rest.to_vec()),
        _ => Medium(sealed(rest)),
    };
    if let Ok(info) = Info::read(&medium, None) {
        assert_eq!(Locked::open(&medium, None).is_ok(), info.servable);
    }
});

/// Both copies of a header around `json`, each with a checksum that holds.
fn sealed(json: &[u8]) -> Vec<u8> {
    let copy = |magic: &[u8; 6], offset: u64| {
        let mut copy = vec![0; COPY];
        copy[..6].copy_from_slice(magic);
        copy[6..8].copy_from_slice(&2_u16.to_be_bytes());
        copy[8..16].copy_from_slice(&(COPY as u64).to_be_bytes());
        copy[72..78].copy_from_slice(b"sha256");
        copy[168..204].copy_from_slice(b"6f2d5a2e-8b0e-4a43-9c39-0f4a63c0a001");
        copy[256..264].copy_from_slice(&offset.to_be_bytes());
        let len = json.len().min(COPY - 4096);
        copy[4096..4096 + len].copy_from_slice(&json[..len]);
        let sum = Sha256::digest(&copy);
        copy[448..480].copy_from_slice(&sum);
        copy
    };
    [copy(b"LUKS\xba\xbe", 0), copy(b"SKUL\xba\xbe", COPY as u64)].concat()
}

/// A read-only file of [`SIZE`] bytes, of which only the front is not zero.
#[derive(Debug)]
struct Medium(Vec<u8>);

impl HeaderIo for Medium {
    fn path(&self) -> &Path {
        Path::new("input")
    }

    fn size(&self) -> io::Result<u64> {
        Ok(SIZE)
    }

    fn can_grow(&self) -> bool {
        false
    }

    fn set_size(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if offset
            .checked_add(buffer.len() as u64)
            .is_none_or(|end| end > SIZE)
        {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buffer.fill(0);
        if let Some(there) = self.0.get(offset as usize..) {
            let len = there.len().min(buffer.len());
            buffer[..len].copy_from_slice(&there[..len]);
        }
        Ok(())
    }

    fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
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

const COPY: usize = 16 << 10;
const SIZE: u64 = 40 << 20;
