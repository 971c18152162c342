//! Crypto-erase: destroys a volume's header and keyslots, and so every source of its volume key.
//!
//! ```text
//! mark       the header gets the requirement `sealblk-erase`: no program opens the volume any longer, and each says why
//! keyslots   the whole area is overwritten, and read back
//! header     both copies are overwritten, and read back
//! discard    the range is discarded on the device
//! ```
//!
//! After a crash the volume still opens, or it says that its erasure has begun (and can be erased again), or it is no
//! longer a volume. At no step does a header list a usable keyslot that is destroyed, and no volume counts as erased before
//! it is.
//!
//! Erasure does not reach copies and backups of the header, overwritten blocks that flash or a file system keeps,
//! and a key in the memory of a process that still has the volume open.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use base16ct::lower;
use sealblk_base::size::in_memory;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::copies::{self, Found, Header, HeaderError};
use crate::error::{Reason, VolumeError};
use crate::header_io::{BLOCK, HeaderIo};
use crate::lock::{LockMode, MetadataLock};
use crate::metadata::{Other, Requirements, Token};
use crate::refusal::MARK;

/// What was erased, and how it was seen to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Erased {
    /// Length of what was written over, from the start of the header.
    pub len: u64,
    /// SHA-256 of both copies of the header, as they were.
    pub header_sha256: String,
    /// SHA-256 of the keyslots area, as it was.
    pub keyslots_sha256: String,
    /// SHA-256 of what was written over it all, and read back.
    pub written_sha256: String,
    /// Whether it was written and read back without a cache of this host between.
    pub direct: bool,
    /// Whether the device or file system took the discard.
    pub discarded: bool,
}

/// Erases the volume whose header is in `io`, if its UUID is `expected`. Where the header has no room for the mark, tokens make room:
/// those that `keep` tells to keep go last.
///
/// # Errors
/// [`VolumeError`]. Once the header is marked the volume opens no more; then the erasure is to be begun anew.
pub fn erase(io: &dyn HeaderIo, expected: Uuid, keep: fn(&Token) -> bool) -> Result<Erased, VolumeError> {
    Erasure::begin(io, expected, keep)
        .and_then(Erasure::finish)
        .map_err(|reason| reason.at(io.path()))
}

/// A volume that is marked, and locked.
struct Erasure<'io> {
    surface: Surface<'io>,
    header: Range<u64>,
    keyslots: Range<u64>,
    header_sha256: String,
    keyslots_sha256: String,
    _lock: MetadataLock<'io>,
}

impl<'io> Erasure<'io> {
    fn begin(io: &'io dyn HeaderIo, expected: Uuid, keep: fn(&Token) -> bool) -> Result<Self, Reason> {
        if io.read_only() {
            return Err(Reason::ReadOnly);
        }
        let lock = io.lock(LockMode::Write).map_err(Reason::Lock)?;
        let found = copies::read(io)?;
        let uuid = found.header().binary.uuid;
        if uuid != expected {
            return Err(Reason::Replaced {
                expected,
                found: uuid,
            });
        }
        let (copies_end, end) = (2 * found.header().binary.header_size, found.header().end());
        let surface = Surface::new(io, end)?;
        let (header, keyslots) = (0..copies_end, copies_end..end);
        let (header_sha256, keyslots_sha256) = (surface.hash(&header)?, surface.hash(&keyslots)?);
        let mut marked = match found {
            Found::Sound(header) => header,
            Found::NeedsRecovery(recoverable) => recoverable.recover(io)?,
        };
        if !marked.metadata.config.mandatory().iter().any(|name| name == MARK) {
            mark(&mut marked, io, keep)?;
        }
        Ok(Self {
            surface,
            header,
            keyslots,
            header_sha256,
            keyslots_sha256,
            _lock: lock,
        })
    }

    fn finish(self) -> Result<Erased, Reason> {
        let mut written = Sha256::new();
        // The header goes last: as long as it is there, it says what is going on.
        for range in [&self.keyslots, &self.header] {
            self.surface.write_over(range, &mut written)?;
        }
        let io = self.surface.io;
        let end = self.keyslots.end;
        // What was read back is gone, whether storage wants the blocks or not: a full file system may not even take a hole.
        let discarded = io.discard(0..end).unwrap_or_else(|error| {
            tracing::warn!(%error, "{}: the erased range cannot be discarded", io.path().display());
            false
        });
        io.forget_cached(0..end).map_err(Reason::ForgetCached)?;
        match copies::read(io) {
            Err(HeaderError::NotLuks { .. }) => {}
            Err(error @ HeaderError::Read(_)) => return Err(error.into()),
            _ => return Err(Reason::NotErased),
        }
        Ok(Erased {
            len: end,
            header_sha256: self.header_sha256,
            keyslots_sha256: self.keyslots_sha256,
            written_sha256: lower::encode_string(&written.finalize()),
            direct: self.surface.direct.is_some(),
            discarded,
        })
    }
}

/// Has the header say that the volume is being erased. What is in the header must not keep the volume from its erasure: tokens
/// make room, those to be kept last; and without room for the mark it is erased without.
fn mark(header: &mut Header, io: &dyn HeaderIo, keep: fn(&Token) -> bool) -> Result<(), Reason> {
    let requirements = header.metadata.config.requirements.get_or_insert(Requirements {
        mandatory: None,
        other: Other::new(),
    });
    requirements
        .mandatory
        .get_or_insert_default()
        .push(MARK.to_owned());
    let kept: [fn(&Token) -> bool; 3] = [|_| true, keep, |_| false];
    let mut committed = Ok(());
    for keeps in kept {
        header.metadata.tokens.retain(|_, token| keeps(token));
        committed = header.commit(io).map(drop);
        if !matches!(committed, Err(HeaderError::Unwritable(_))) {
            break;
        }
    }
    match committed {
        Err(error @ (HeaderError::Unwritable(_) | HeaderError::SequenceEnds)) => {
            tracing::warn!(%error, "{}: cannot mark the header before the erasure; erasing it nevertheless", io.path().display());
            Ok(())
        }
        committed => Ok(committed?),
    }
}

/// What lies under the header, as near to the medium as it can be had.
struct Surface<'io> {
    io: &'io dyn HeaderIo,
    direct: Option<File>,
}

impl<'io> Surface<'io> {
    fn new(io: &'io dyn HeaderIo, end: u64) -> Result<Self, Reason> {
        let direct = match end.is_multiple_of(BLOCK) {
            true => io.uncached().map_err(Reason::Erase)?,
            false => None,
        };
        Ok(Self { io, direct })
    }

    /// Writes noise over `range`, adds it to `written`, and reads it back.
    fn write_over(&self, range: &Range<u64>, written: &mut Sha256) -> Result<(), Reason> {
        let mut expected = Sha256::new();
        let mut piece = Piece::new();
        for part in parts(range) {
            let bytes = piece.of(&part);
            getrandom::fill(bytes).map_err(Reason::Random)?;
            match &self.direct {
                Some(file) => file.write_all_at(bytes, part.start),
                None => self.io.write_at(bytes, part.start),
            }
            .map_err(Reason::Erase)?;
            expected.update(&bytes);
            written.update(&bytes);
        }
        self.io.sync().map_err(Reason::Erase)?;
        match self.hash(range)? == lower::encode_string(&expected.finalize()) {
            true => Ok(()),
            false => Err(Reason::NotErased),
        }
    }

    /// The SHA-256 of a range, as it stands on storage.
    fn hash(&self, range: &Range<u64>) -> Result<String, Reason> {
        let mut hash = Sha256::new();
        let mut piece = Piece::new();
        self.io
            .forget_cached(range.clone())
            .map_err(Reason::ForgetCached)?;
        for part in parts(range) {
            let bytes = piece.of(&part);
            match &self.direct {
                Some(file) => file.read_exact_at(bytes, part.start),
                None => self.io.read_at(bytes, part.start),
            }
            .map_err(Reason::ReadArea)?;
            hash.update(&bytes);
        }
        Ok(lower::encode_string(&hash.finalize()))
    }
}

fn parts(range: &Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let end = range.end;
    range
        .clone()
        .step_by(in_memory(PIECE))
        .map(move |start| start..end.min(start + PIECE))
}

/// A buffer that begins where direct I/O wants it.
struct Piece {
    bytes: Vec<u8>,
    start: usize,
}

impl Piece {
    fn new() -> Self {
        let bytes = vec![0; in_memory(PIECE + BLOCK)];
        let start = bytes.as_ptr().align_offset(in_memory(BLOCK));
        Self { bytes, start }
    }

    /// As much of it as `part` takes.
    fn of(&mut self, part: &Range<u64>) -> &mut [u8] {
        &mut self.bytes[self.start..][..in_memory(part.end - part.start)]
    }
}

const PIECE: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::binary;
    use crate::metadata::Id;
    use crate::testing::{COPY, HEADER, Memory, sample, sample_with};
    use serde_json::{Value, json};
    use std::io;
    use std::path::Path;

    /// A medium with a mind of its own.
    #[derive(Debug)]
    struct Stubborn {
        memory: Memory,
        /// Where it takes writes and keeps what was there.
        keeps: Range<u64>,
        /// What it says of a discard.
        discard: fn() -> io::Result<bool>,
    }

    impl Stubborn {
        fn new(keeps: Range<u64>) -> Self {
            Self::over(Memory::of(&sample()), keeps)
        }

        fn over(memory: Memory, keeps: Range<u64>) -> Self {
            // Something to be erased, in all of the keyslots area.
            memory
                .write_at(&[0x5a; (HEADER - 2 * COPY) as usize], 2 * COPY)
                .unwrap();
            Self {
                memory,
                keeps,
                discard: || Ok(false),
            }
        }

        fn erase(&self) -> Result<Erased, VolumeError> {
            erase(self, Uuid::from_u128(7), |token| token.kind == "sealblk")
        }

        fn header(&self) -> Result<Header, HeaderError> {
            copies::read(self).map(|found| match found {
                Found::Sound(header) => header,
                Found::NeedsRecovery(_) => panic!("a copy is damaged"),
            })
        }

        /// How much of the keyslots area is as it was.
        fn kept(&self) -> usize {
            let front = self.memory.front.borrow();
            let keyslots = &front[2 * COPY as usize..HEADER as usize];
            keyslots.chunks(16).filter(|chunk| **chunk == [0x5a; 16]).count()
        }
    }

    impl HeaderIo for Stubborn {
        fn path(&self) -> &Path {
            self.memory.path()
        }
        fn size(&self) -> io::Result<u64> {
            self.memory.size()
        }
        fn can_grow(&self) -> bool {
            false
        }
        fn set_size(&self, size: u64) -> io::Result<()> {
            self.memory.set_size(size)
        }
        fn read_only(&self) -> bool {
            false
        }
        fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
            self.memory.read_at(buffer, offset)
        }
        fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
            match self.keeps.contains(&offset) {
                true => Ok(()),
                false => self.memory.write_at(bytes, offset),
            }
        }
        fn sync(&self) -> io::Result<()> {
            Ok(())
        }
        fn forget_cached(&self, _: Range<u64>) -> io::Result<()> {
            Ok(())
        }
        fn discard(&self, _: Range<u64>) -> io::Result<bool> {
            (self.discard)()
        }
        fn lock(&self, mode: LockMode) -> io::Result<MetadataLock<'_>> {
            self.memory.lock(mode)
        }
    }

    #[test]
    fn storage_that_takes_no_discard_holds_no_volume_all_the_same() {
        let mut medium = Stubborn::new(0..0);
        medium.discard = || Err(io::Error::from_raw_os_error(libc::ENOSPC));
        let erased = medium.erase().unwrap();
        assert_eq!((erased.len, erased.discarded), (HEADER, false));
        assert_eq!(medium.kept(), 0);
        assert!(matches!(medium.header(), Err(HeaderError::NotLuks { .. })));
    }

    #[test]
    fn what_storage_keeps_is_not_taken_for_erased_and_the_header_says_that_it_was_begun() {
        // A megabyte in the middle of the keyslots area.
        let part = 2 * COPY + (3 << 20);
        let medium = Stubborn::new(part..part + 1);
        assert!(matches!(*medium.erase().unwrap_err().reason, Reason::NotErased));
        assert_eq!(medium.kept(), (1 << 20) / 16);
        let marked = medium.header().unwrap();
        assert!(marked.metadata.config.mandatory().iter().any(|name| name == MARK));

        // Once storage writes what it is given, the erasure is begun anew.
        let medium = Stubborn {
            keeps: 0..0,
            ..medium
        };
        medium.erase().unwrap();
        assert_eq!(medium.kept(), 0);
        let begun_anew = medium.erase().unwrap_err().reason;
        assert!(matches!(*begun_anew, Reason::Header(HeaderError::NotLuks { .. })));
    }

    /// Metadata with a token of others that leaves no room for the mark.
    fn full() -> Value {
        let with = |len| {
            sample_with(
                "/tokens/1",
                json!({ "type": "clevis", "keyslots": [], "jwe": "x".repeat(len) }),
            )
        };
        let room = (COPY as usize - binary::LEN) - with(0).to_string().len();
        with(room - 8)
    }

    /// Who can write a header could keep a disk from the erasure at the end of its life.
    #[test]
    fn what_fills_a_header_does_not_keep_it_from_being_erased() {
        let (full, sample) = (full().to_string(), sample().to_string());
        for (seqid, json) in [(3, &full), (u64::MAX, &sample)] {
            let copy = (seqid, json.as_bytes());
            let medium = Stubborn::over(Memory::holding(copy, copy), 0..0);
            medium.erase().unwrap();
            assert_eq!(medium.kept(), 0);
            assert!(matches!(medium.header(), Err(HeaderError::NotLuks { .. })));
        }
    }

    #[test]
    fn a_full_header_says_all_the_same_that_its_erasure_was_begun() {
        let part = 2 * COPY + (3 << 20);
        let medium = Stubborn::over(Memory::of(&full()), part..part + 1);
        assert!(matches!(*medium.erase().unwrap_err().reason, Reason::NotErased));
        let marked = medium.header().unwrap().metadata;
        assert!(marked.config.mandatory().iter().any(|name| name == MARK));
        // Which key is to be revoked is still known.
        assert!(marked.tokens.contains_key(&Id(0)) && marked.tokens.len() == 1);
    }
}
