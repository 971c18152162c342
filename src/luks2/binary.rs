//! The binary header: 4096 bytes that stand before each copy of the JSON area (LUKS2 1.1, "Binary Header").
//!
//! ```text
//! offset  width  field         (integers are big-endian, text ends at its first NUL)
//!      0      6  magic         "LUKS\xba\xbe" in the primary copy, "SKUL\xba\xbe" in the secondary
//!      6      2  version       2
//!      8      8  hdr_size      binary header and JSON area together: 16 KiB to 4 MiB, a power of two
//!     16      8  seqid         one more with every update: of two sound copies the greater is in force
//!     24     48  label
//!     72     32  csum_alg      name of the checksum's hash, "sha256"
//!    104     64  salt          random, different in each copy
//!    168     40  uuid
//!    208     48  subsystem
//!    256      8  hdr_offset    where this copy stands: 0, or hdr_size
//!    264    184  padding
//!    448     64  csum          hash over the whole copy (4096 bytes and JSON area) with these 64 bytes zero
//!    512   3584  padding
//! ```

use std::borrow::Cow;

use crate::hash::Hash;
use uuid::Uuid;

/// The fields of a binary header that both copies share, and the salt that is this copy's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BinaryHeader {
    pub(crate) header_size: u64,
    pub(crate) seqid: u64,
    pub(crate) label: Text<48>,
    pub(crate) checksum: Hash,
    pub(crate) salt: [u8; 64],
    pub(crate) uuid: Uuid,
    pub(crate) subsystem: Text<48>,
}

impl BinaryHeader {
    /// Reads the binary header of `copy` that was found at `offset`. The checksum is not looked at here, because it
    /// covers the JSON area too, whose length this tells: see [`verify_checksum`].
    pub(crate) fn decode(block: &[u8; LEN], copy: Copy, offset: u64) -> Result<Self, BinaryError> {
        if block[..6] != *copy.magic() {
            return Err(BinaryError::Magic);
        }
        let version = u16::from_be_bytes(field(block, 6));
        if version != VERSION {
            return Err(BinaryError::Version { version });
        }
        let said = u64::from_be_bytes(field(block, 256));
        if said != offset {
            return Err(BinaryError::Offset { said, offset });
        }
        let header_size = u64::from_be_bytes(field(block, 8));
        let misplaced = copy == Copy::Secondary && header_size != offset;
        if !HEADER_SIZES.contains(&header_size) || misplaced {
            return Err(BinaryError::Size { header_size });
        }
        let name = Text::<32>(field(block, 72));
        let Some(checksum) = Hash::by_name(&name.to_str()) else {
            return Err(BinaryError::ChecksumAlgorithm {
                name: name.to_str().into_owned(),
            });
        };
        let uuid = Text::<40>(field(block, 168));
        let Ok(uuid) = Uuid::try_parse(&uuid.to_str()) else {
            return Err(BinaryError::Uuid {
                text: uuid.to_str().into_owned(),
            });
        };
        Ok(Self {
            header_size,
            seqid: u64::from_be_bytes(field(block, 16)),
            label: Text(field(block, 24)),
            checksum,
            salt: field(block, 104),
            uuid,
            subsystem: Text(field(block, 208)),
        })
    }

    /// Writes the binary header of `copy` to the front of `whole`, which is the copy with its JSON area, and seals it
    /// with the checksum.
    pub(crate) fn encode(&self, copy: Copy, whole: &mut [u8]) {
        let block = &mut whole[..LEN];
        block.fill(0);
        block[..6].copy_from_slice(copy.magic());
        block[6..8].copy_from_slice(&VERSION.to_be_bytes());
        block[8..16].copy_from_slice(&self.header_size.to_be_bytes());
        block[16..24].copy_from_slice(&self.seqid.to_be_bytes());
        block[24..72].copy_from_slice(&self.label.0);
        put_text(&mut block[72..104], self.checksum.name());
        block[104..168].copy_from_slice(&self.salt);
        put_text(&mut block[168..208], &self.uuid.hyphenated().to_string());
        block[208..256].copy_from_slice(&self.subsystem.0);
        block[256..264].copy_from_slice(&copy.offset(self.header_size).to_be_bytes());
        let sum = self.checksum.digest(&[whole]);
        whole[CHECKSUM][..sum.len()].copy_from_slice(&sum);
    }
}

/// Whether `whole` (a copy with its JSON area) has the checksum that it carries.
pub(crate) fn checksum_holds(checksum: Hash, whole: &[u8]) -> bool {
    let zeros = [0; CHECKSUM.end - CHECKSUM.start];
    let sum = checksum.digest(&[&whole[..CHECKSUM.start], &zeros, &whole[CHECKSUM.end..]]);
    whole[CHECKSUM][..sum.len()] == *sum
}

/// Which of the two copies of the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Copy {
    Primary,
    Secondary,
}

impl Copy {
    pub(crate) fn magic(self) -> &'static [u8; 6] {
        match self {
            Copy::Primary => b"LUKS\xba\xbe",
            Copy::Secondary => b"SKUL\xba\xbe",
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Copy::Primary => "primary",
            Copy::Secondary => "secondary",
        }
    }

    /// Where this copy stands in a header of that size.
    pub(crate) fn offset(self, header_size: u64) -> u64 {
        match self {
            Copy::Primary => 0,
            Copy::Secondary => header_size,
        }
    }
}

impl std::fmt::Display for Copy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Text in a field of fixed width, up to its first NUL. The bytes are kept as they were found.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Text<const N: usize>(pub(crate) [u8; N]);

impl<const N: usize> Text<N> {
    pub(crate) const EMPTY: Self = Self([0; N]);

    /// `None` when the text, with the NUL that ends it, does not fit, or holds a NUL itself.
    pub(crate) fn new(text: &str) -> Option<Self> {
        if text.len() >= N || text.contains('\0') {
            return None;
        }
        let mut bytes = [0; N];
        bytes[..text.len()].copy_from_slice(text.as_bytes());
        Some(Self(bytes))
    }

    pub(crate) fn to_str(&self) -> Cow<'_, str> {
        let end = self.0.iter().position(|&byte| byte == 0).unwrap_or(N);
        String::from_utf8_lossy(&self.0[..end])
    }
}

impl<const N: usize> std::fmt::Debug for Text<N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.to_str())
    }
}

/// Why 4096 bytes are not a binary header.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BinaryError {
    #[error("no LUKS2 magic")]
    Magic,
    #[error("header version {version}, not {VERSION}")]
    Version { version: u16 },
    #[error("it is for byte offset {said}, but is at {offset}")]
    Offset { said: u64, offset: u64 },
    #[error("LUKS2 does not permit the header size {header_size}")]
    Size { header_size: u64 },
    #[error("unknown checksum algorithm {name:?}")]
    ChecksumAlgorithm { name: String },
    #[error("{text:?} is not a UUID")]
    Uuid { text: String },
}

fn field<const N: usize>(block: &[u8; LEN], offset: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&block[offset..offset + N]);
    bytes
}

fn put_text(field: &mut [u8], text: &str) {
    field[..text.len()].copy_from_slice(text.as_bytes());
}

pub(crate) const LEN: usize = 4096;
pub(crate) const VERSION: u16 = 2;

/// The sizes that a header can have, and so the offsets at which a secondary copy can stand.
pub(crate) const HEADER_SIZES: [u64; 9] = [
    0x4000, 0x8000, 0x1_0000, 0x2_0000, 0x4_0000, 0x8_0000, 0x10_0000, 0x20_0000, 0x40_0000,
];

const CHECKSUM: std::ops::Range<usize> = 448..512;

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> BinaryHeader {
        BinaryHeader {
            header_size: 0x4000,
            seqid: 7,
            label: Text::new("root disk").unwrap(),
            checksum: Hash::Sha256,
            salt: [9; 64],
            uuid: Uuid::from_u128(0x0123_4567_89ab_cdef),
            subsystem: Text::new("").unwrap(),
        }
    }

    fn encoded(copy: Copy) -> Vec<u8> {
        let mut whole = vec![0; 0x4000];
        whole[LEN..LEN + 2].copy_from_slice(b"{}");
        header().encode(copy, &mut whole);
        whole
    }

    #[test]
    fn what_was_encoded_is_decoded_and_its_checksum_holds() {
        for (copy, offset) in [(Copy::Primary, 0), (Copy::Secondary, 0x4000)] {
            let whole = encoded(copy);
            let decoded = BinaryHeader::decode(whole.first_chunk().unwrap(), copy, offset).unwrap();
            assert_eq!(decoded, header());
            assert!(checksum_holds(Hash::Sha256, &whole));
        }
    }

    #[test]
    fn every_changed_byte_breaks_the_checksum_or_the_header() {
        let whole = encoded(Copy::Primary);
        for at in (0..512).chain([4095, 4096, 0x3fff]) {
            let mut changed = whole.clone();
            changed[at] ^= 1;
            // Beyond the 32 bytes of a SHA-256 the checksum field is not used.
            let unused = (480..512).contains(&at);
            let decodes = BinaryHeader::decode(changed.first_chunk().unwrap(), Copy::Primary, 0).is_ok();
            assert_eq!(
                decodes && checksum_holds(Hash::Sha256, &changed),
                unused,
                "byte {at}"
            );
        }
    }

    #[test]
    fn a_copy_that_stands_elsewhere_than_it_says_is_refused() {
        let whole = encoded(Copy::Secondary);
        let error = BinaryHeader::decode(whole.first_chunk().unwrap(), Copy::Secondary, 0x8000).unwrap_err();
        assert_eq!(
            error,
            BinaryError::Offset {
                said: 0x4000,
                offset: 0x8000
            }
        );
    }

    #[test]
    fn a_size_that_luks2_does_not_permit_is_refused() {
        for header_size in [0, 4096, 0x4001, 0x6000, 0x80_0000, u64::MAX] {
            let mut whole = encoded(Copy::Primary);
            whole[8..16].copy_from_slice(&header_size.to_be_bytes());
            let error = BinaryHeader::decode(whole.first_chunk().unwrap(), Copy::Primary, 0).unwrap_err();
            assert_eq!(error, BinaryError::Size { header_size });
        }
    }

    #[test]
    fn a_label_must_fit_with_its_nul() {
        assert!(Text::<48>::new(&"x".repeat(47)).is_some());
        assert!(Text::<48>::new(&"x".repeat(48)).is_none());
    }
}
