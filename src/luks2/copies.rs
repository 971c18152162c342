//! The two copies of the header, and updates that survive a crash at any byte.
//!
//! Each copy is the binary header and the JSON area in one piece, with one checksum over both. An update writes the
//! primary copy with the next `seqid` and syncs it, then the secondary. If a crash interrupts the first write,
//! the secondary still holds the complete old state; once the primary is durable, it holds the new one. A copy that
//! is damaged or has an older `seqid` is rewritten from the other before anything else is written. Otherwise the next
//! update would put the only good copy at risk.
//!
//! [`read`] returns a [`Header`] only after it has read both copies, and says in [`Found`] whether they agree.

use std::borrow::Cow;
use std::io;

use getrandom::fill;
use sealblk_base::size::in_memory;
use tracing::warn;
use uuid::Uuid;

use crate::binary::{self, BinaryError, BinaryHeader, Copy, HEADER_SIZES, checksum_holds};
use crate::foreign::{self, Format};
use crate::header_io::HeaderIo;
use crate::holder;
use crate::metadata::{Metadata, MetadataError};

/// A header that both copies hold, or that the sound one of them holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// As in the primary copy.
    pub(crate) binary: BinaryHeader,
    pub(crate) metadata: Metadata,
    secondary_salt: [u8; 64],
}

impl Header {
    /// A header that is on no medium yet.
    pub(crate) fn new(binary: BinaryHeader, metadata: Metadata) -> Result<Self, HeaderError> {
        Ok(Self {
            binary,
            metadata,
            secondary_salt: salt()?,
        })
    }

    /// The UUID in it.
    pub fn uuid(&self) -> Uuid {
        self.binary.uuid
    }

    /// The label in it, empty if it has none.
    pub fn label(&self) -> Cow<'_, str> {
        self.binary.label.to_str()
    }

    /// The subsystem in it, empty if it has none.
    pub fn subsystem(&self) -> Cow<'_, str> {
        self.binary.subsystem.to_str()
    }

    /// How many times it was written.
    pub fn sequence(&self) -> u64 {
        self.binary.seqid
    }

    /// What its JSON area says.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Where the keyslots area ends: as long as this a header must be.
    pub fn end(&self) -> u64 {
        2 * self.binary.header_size + self.metadata.config.keyslots_size.0
    }

    /// Whether it can be committed, if the storage does not fail. A caller asks before it destroys something that the header replaces.
    pub(crate) fn check(&self) -> Result<(), HeaderError> {
        self.metadata
            .validate(self.binary.header_size)
            .map_err(HeaderError::Unwritable)?;
        if self.binary.seqid == u64::MAX {
            return Err(HeaderError::SequenceEnds);
        }
        self.encode(Copy::Primary).map(drop)
    }

    /// Writes this header to both copies, as the next in sequence. The caller holds the write lock, and has read both
    /// copies to be sound under it.
    ///
    /// With the primary copy durable the header is in force, whatever becomes of the secondary: that is not an error,
    /// or the caller would take back what has happened.
    pub(crate) fn commit(&mut self, io: &dyn HeaderIo) -> Result<HeaderState, HeaderError> {
        self.check()?;
        self.binary.seqid += 1;
        self.write(Copy::Primary, io)?;
        match self.write(Copy::Secondary, io) {
            Ok(()) => Ok(HeaderState::Sound),
            Err(HeaderError::Write { copy, source }) => {
                let text = "the change took effect, but only one copy of the LUKS2 header has it: the other cannot \
                            be written; check the storage; sealblk repairs the copy when it next opens the volume";
                warn!(volume = %self.binary.uuid, "{}: {text}: {source}", io.path().display());
                Ok(HeaderState::NeedsRepair {
                    copy: copy.name(),
                    damage: format!("it cannot be written: {source}"),
                })
            }
            Err(error) => Err(error),
        }
    }

    /// Whether the primary copy on storage is this header, whatever the secondary is.
    pub(crate) fn is_primary(&self, io: &dyn HeaderIo) -> bool {
        let ours = One {
            binary: self.binary.clone(),
            metadata: self.metadata.clone(),
        };
        read_copy(io, Copy::Primary, 0)
            .is_ok_and(|found| found.binary.salt == ours.binary.salt && ours.agrees(&found))
    }

    fn write(&self, copy: Copy, io: &dyn HeaderIo) -> Result<(), HeaderError> {
        let bytes = self.encode(copy)?;
        let offset = copy.offset(self.binary.header_size);
        // The other copy may be written only after this one is durable.
        io.write_at(&bytes, offset)
            .and_then(|()| io.sync())
            .map_err(|source| HeaderError::Write { copy, source })
    }

    fn encode(&self, copy: Copy) -> Result<Vec<u8>, HeaderError> {
        let mut whole = vec![0; in_memory(self.binary.header_size)];
        self.metadata
            .write(&mut whole[binary::LEN..])
            .map_err(HeaderError::Unwritable)?;
        let mut binary = self.binary.clone();
        if copy == Copy::Secondary {
            binary.salt = self.secondary_salt;
        }
        binary.encode(copy, &mut whole);
        Ok(whole)
    }
}

/// What the two copies are found to be.
#[derive(Debug)]
pub enum Found {
    /// Both are sound and the same.
    Sound(Header),
    /// One is not, and the other is the header.
    NeedsRecovery(Recoverable),
}

/// What became of the two copies of the header when it was opened or written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeaderState {
    /// Both are sound and the same.
    Sound,
    /// One was damaged, and was rewritten from the other.
    Repaired {
        /// Which one.
        copy: &'static str,
        /// What was wrong with it.
        damage: String,
    },
    /// One is damaged, and the other is the header: the volume is read-only, or the copy could not be written.
    NeedsRepair {
        /// Which one.
        copy: &'static str,
        /// What is wrong with it.
        damage: String,
    },
}

/// A header of which one copy must be rewritten before the other may be touched.
#[derive(Debug)]
pub struct Recoverable {
    pub(crate) header: Header,
    pub(crate) bad: Copy,
    pub(crate) damage: Damage,
}

impl Recoverable {
    /// The damaged copy: "primary" or "secondary".
    pub fn copy(&self) -> &'static str {
        self.bad.name()
    }

    /// What is wrong with it.
    pub fn damage(&self) -> &Damage {
        &self.damage
    }

    /// Rewrites the bad copy. The caller holds the write lock, and read this under it.
    pub(crate) fn recover(mut self, io: &dyn HeaderIo) -> Result<Header, HeaderError> {
        match self.bad {
            Copy::Primary => self.header.binary.salt = salt()?,
            Copy::Secondary => self.header.secondary_salt = salt()?,
        }
        self.header.write(self.bad, io)?;
        Ok(self.header)
    }
}

/// Reads both copies and compares them. A caller who does not hold the lock, for reading at least, may see another program's update
/// on its way; while one copy is written, the other is whole.
///
/// # Errors
/// Where there is no LUKS2 header, or both its copies are damaged.
pub fn read(io: &dyn HeaderIo) -> Result<Found, HeaderError> {
    let primary = read_copy(io, Copy::Primary, 0);
    let secondary = match &primary {
        Ok(primary) => read_copy(io, Copy::Secondary, primary.binary.header_size),
        Err(_) => find_secondary(io),
    };
    let header = |good: One, other_salt| Header {
        binary: good.binary,
        metadata: good.metadata,
        secondary_salt: other_salt,
    };
    let from_secondary = |mut good: One| {
        let secondary_salt = std::mem::replace(&mut good.binary.salt, [0; 64]);
        header(good, secondary_salt)
    };
    let found = match (primary, secondary) {
        (Ok(primary), Ok(secondary)) => {
            let (ours, theirs) = (primary.binary.seqid, secondary.binary.seqid);
            let salt = secondary.binary.salt;
            let older = Damage::Older {
                seqid: ours.min(theirs),
                newer: ours.max(theirs),
            };
            match ours.cmp(&theirs) {
                std::cmp::Ordering::Equal if !primary.agrees(&secondary) => {
                    match primary.without_host().agrees(&secondary.without_host()) {
                        // Which the primary names is what both hosts go by.
                        true => Recoverable::found(header(primary, salt), Copy::Secondary, Damage::OtherHost),
                        false => return Err(HeaderError::CopiesDisagree { seqid: ours }),
                    }
                }
                std::cmp::Ordering::Equal => Found::Sound(header(primary, salt)),
                std::cmp::Ordering::Greater => {
                    Recoverable::found(header(primary, salt), Copy::Secondary, older)
                }
                std::cmp::Ordering::Less => {
                    Recoverable::found(from_secondary(secondary), Copy::Primary, older)
                }
            }
        }
        (Ok(primary), Err(damage)) => {
            damage.refuse_later_than(&primary, Copy::Secondary)?;
            Recoverable::found(header(primary, [0; 64]), Copy::Secondary, damage)
        }
        (Err(damage), Ok(secondary)) => {
            damage.refuse_later_than(&secondary, Copy::Primary)?;
            refuse_foreign(io)?;
            Recoverable::found(from_secondary(secondary), Copy::Primary, damage)
        }
        (Err(Damage::Io(source)), Err(_)) | (Err(_), Err(Damage::Io(source)))
            if source.kind() != io::ErrorKind::UnexpectedEof =>
        {
            return Err(HeaderError::Read(source));
        }
        (Err(primary), Err(secondary)) => return Err(no_header(io, primary, secondary)),
    };
    let end = found.header().end();
    let len = io.size().map_err(HeaderError::Length)?;
    if len < end {
        return Err(HeaderError::Truncated { len, end });
    }
    Ok(found)
}

impl Found {
    /// The header.
    pub fn header(&self) -> &Header {
        match self {
            Found::Sound(header) | Found::NeedsRecovery(Recoverable { header, .. }) => header,
        }
    }
}

impl Recoverable {
    fn found(header: Header, bad: Copy, damage: Damage) -> Found {
        Found::NeedsRecovery(Self { header, bad, damage })
    }
}

/// One copy that is sound in itself.
struct One {
    binary: BinaryHeader,
    metadata: Metadata,
}

impl One {
    /// Whether another copy of the same `seqid` says the same.
    fn agrees(&self, other: &Self) -> bool {
        let binary = BinaryHeader {
            salt: other.binary.salt,
            ..self.binary.clone()
        };
        binary == other.binary && self.metadata == other.metadata
    }

    /// What it says beside which host has the volume attached.
    fn without_host(&self) -> Self {
        let mut metadata = self.metadata.clone();
        metadata.tokens.retain(|_, token| token.kind != holder::TYPE);
        Self {
            binary: self.binary.clone(),
            metadata,
        }
    }
}

fn read_copy(io: &dyn HeaderIo, copy: Copy, offset: u64) -> Result<One, Damage> {
    let mut block = [0; binary::LEN];
    io.read_at(&mut block, offset)?;
    let binary = BinaryHeader::decode(&block, copy, offset)?;
    let mut whole = vec![0; in_memory(binary.header_size)];
    io.read_at(&mut whole, offset)
        .map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => Damage::CutShort {
                // That of both copies.
                end: 2 * binary.header_size,
            },
            _ => error.into(),
        })?;
    // What was decoded first must be what the checksum covers.
    if whole[..binary::LEN] != block || !checksum_holds(binary.checksum, &whole) {
        return Err(Damage::Checksum);
    }
    match Metadata::parse(&whole[binary::LEN..], binary.header_size) {
        Ok(metadata) => Ok(One { binary, metadata }),
        Err(source) => Err(Damage::Metadata {
            seqid: binary.seqid,
            source,
        }),
    }
}

/// Looks at every place where a secondary copy can stand, when the primary does not tell.
fn find_secondary(io: &dyn HeaderIo) -> Result<One, Damage> {
    let mut damage = Damage::NotFound;
    for offset in HEADER_SIZES {
        match read_copy(io, Copy::Secondary, offset) {
            Ok(found) => return Ok(found),
            Err(Damage::Binary(BinaryError::Magic)) => {}
            Err(Damage::Io(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(found) => damage = found,
        }
    }
    Err(damage)
}

/// Tells apart what is no LUKS2 volume from one that is lost.
fn no_header(io: &dyn HeaderIo, primary: Damage, secondary: Damage) -> HeaderError {
    let not_luks = || HeaderError::NotLuks {
        looks_like: foreign::find(io),
    };
    match (&primary, &secondary) {
        (Damage::Binary(BinaryError::Version { version: 1 }), _) => HeaderError::Luks1,
        (Damage::Io(error), Damage::NotFound) if error.kind() == io::ErrorKind::UnexpectedEof => not_luks(),
        (Damage::Binary(BinaryError::Magic), Damage::NotFound) => not_luks(),
        (&Damage::CutShort { end }, _) => match io.size() {
            Ok(len) => HeaderError::Truncated { len, end },
            Err(error) => HeaderError::Length(error),
        },
        // Two sound copies that say what we do not know are somebody's good header, which no older backup should replace.
        (Damage::Metadata { source, .. }, Damage::Metadata { .. }) => HeaderError::NotUnderstood {
            copy: Copy::Primary,
            source: source.clone(),
        },
        _ => HeaderError::BothDamaged {
            primary: Box::new(primary),
            secondary: Box::new(secondary),
        },
    }
}

/// A secondary copy survives a disk's being made into something else. To serve it would be wrong, and to write the
/// primary back would destroy what it is now. So, as cryptsetup does, a signature of another format where the primary
/// was is left for a person to judge.
fn refuse_foreign(io: &dyn HeaderIo) -> Result<(), HeaderError> {
    match foreign::find(io) {
        Some(format) => Err(HeaderError::ForeignSignature { format }),
        None => Ok(()),
    }
}

fn salt() -> Result<[u8; 64], HeaderError> {
    let mut salt = [0; 64];
    fill(&mut salt).map_err(HeaderError::Random)?;
    Ok(salt)
}

/// What is wrong with one copy.
#[derive(Debug, thiserror::Error)]
pub enum Damage {
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Binary(#[from] BinaryError),
    #[error("it extends beyond the end")]
    CutShort { end: u64 },
    #[error("its checksum is wrong")]
    Checksum,
    #[error("its metadata cannot be parsed: {source}")]
    Metadata { seqid: u64, source: MetadataError },
    #[error("its sequence number is {seqid}, but {newer} in the other copy")]
    Older { seqid: u64, newer: u64 },
    #[error(
        "it names another host than the primary copy: two hosts have attached the volume in the same moment"
    )]
    OtherHost,
    #[error("it is at none of the possible offsets")]
    NotFound,
}

impl Damage {
    /// A checksum that holds says that somebody meant what he wrote. If it is later than the copy that is understood
    /// here, that one is no remedy for it.
    fn refuse_later_than(&self, good: &One, bad: Copy) -> Result<(), HeaderError> {
        match self {
            Damage::Metadata { seqid, source } if *seqid >= good.binary.seqid => {
                Err(HeaderError::NotUnderstood {
                    copy: bad,
                    source: source.clone(),
                })
            }
            _ => Ok(()),
        }
    }
}

/// Why a header cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    #[error("not a LUKS2 volume{}", looks_like.map(|format| format!(", but {format}")).unwrap_or_default())]
    NotLuks { looks_like: Option<Format> },
    #[error("a LUKS1 volume; convert it with `cryptsetup convert --type luks2`")]
    Luks1,
    #[error(
        "both copies of the LUKS2 header are damaged (primary: {primary}; secondary: {secondary}); restore a backup \
         of the header with `cryptsetup luksHeaderRestore`"
    )]
    BothDamaged {
        primary: Box<Damage>,
        secondary: Box<Damage>,
    },
    #[error(
        "both copies of the LUKS2 header have sequence number {seqid} and valid checksums, but differ; only one \
         of them was written: restore a backup of the header with `cryptsetup luksHeaderRestore`"
    )]
    CopiesDisagree { seqid: u64 },
    #[error(
        "the {copy} copy of the LUKS2 header is complete and valid, but its metadata cannot be parsed: {source}; \
         perhaps a later version of cryptsetup wrote it"
    )]
    NotUnderstood { copy: Copy, source: MetadataError },
    #[error(
        "the LUKS2 header takes {end} bytes, but the file or device has only {len}: it was truncated; restore it from a backup, or \
         restore the size of the device"
    )]
    Truncated { len: u64, end: u64 },
    #[error(
        "the primary copy of the LUKS2 header is damaged, and a signature of {format} is in its place; if \
         this is a LUKS2 volume, run `cryptsetup repair`"
    )]
    ForeignSignature { format: Format },
    #[error(
        "the LUKS2 header cannot be read: the storage fails, and neither copy is valid; check the storage, and try again"
    )]
    Read(#[source] io::Error),
    #[error("its length cannot be read")]
    Length(#[source] io::Error),
    #[error("the {copy} copy of the LUKS2 header cannot be written; check the storage, and try again")]
    Write { copy: Copy, source: io::Error },
    #[error("the metadata cannot be written")]
    Unwritable(#[source] MetadataError),
    #[error("the header's sequence number has reached its maximum")]
    SequenceEnds,
    #[error("the kernel's random source failed")]
    Random(#[source] getrandom::Error),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{COPY, Memory, sample, sample_with};

    fn bad(found: Found) -> (Copy, Damage) {
        match found {
            Found::Sound(_) => panic!("both copies are sound"),
            Found::NeedsRecovery(recoverable) => (recoverable.bad, recoverable.damage),
        }
    }

    /// It was told to be damage, and that a backup should be restored over what was perhaps whole.
    #[test]
    fn storage_that_fails_is_not_a_damaged_header() {
        let mut io = Memory::of(&sample());
        io.fails = true;
        assert!(matches!(read(&io), Err(HeaderError::Read(_))));
    }

    #[test]
    fn one_damaged_copy_is_recovered_from_the_other() {
        for (at, copy) in [
            (COPY - 1, Copy::Primary),
            (0, Copy::Primary),
            (COPY, Copy::Secondary),
        ] {
            let io = Memory::of(&sample());
            let Found::Sound(before) = read(&io).unwrap() else {
                panic!("not sound")
            };
            io.spoil(at);
            let Found::NeedsRecovery(recoverable) = read(&io).unwrap() else {
                panic!("{at}: sound")
            };
            assert_eq!(recoverable.bad, copy);
            let recovered = recoverable.recover(&io).unwrap();
            assert_eq!(recovered.metadata, before.metadata);
            assert!(matches!(read(&io).unwrap(), Found::Sound(found) if found == recovered));
            assert_ne!(
                (recovered.binary.salt, recovered.secondary_salt),
                (before.binary.salt, before.secondary_salt)
            );
        }
    }

    #[test]
    fn a_secondary_copy_is_found_wherever_it_can_be() {
        for size in HEADER_SIZES {
            let mut json = sample_with("/config/json_size", (size - 4096).to_string());
            json["config"]["keyslots_size"] = "258048".into();
            json["keyslots"]["0"]["area"]["offset"] = (2 * size).to_string().into();
            let metadata: Metadata = serde_json::from_value(json).unwrap();
            let Found::Sound(mut header) = read(&Memory::of(&sample())).unwrap() else {
                panic!("not sound")
            };
            header.binary.header_size = size;
            header.metadata = metadata;
            let io = Memory::of(&sample());
            *io.front.borrow_mut() = Vec::new();
            header.write(Copy::Secondary, &io).unwrap();
            let (copy, _) = bad(read(&io).unwrap());
            assert_eq!(copy, Copy::Primary, "{size}");
        }
    }

    #[test]
    fn of_two_sound_copies_the_later_is_in_force() {
        let (old, new) = (
            sample().to_string(),
            sample_with("/tokens", serde_json::json!({})).to_string(),
        );
        for (primary, secondary, older) in [
            ((4, new.as_bytes()), (3, old.as_bytes()), Copy::Secondary),
            ((3, old.as_bytes()), (4, new.as_bytes()), Copy::Primary),
        ] {
            let io = Memory::holding(primary, secondary);
            let found = read(&io).unwrap();
            assert!(found.header().metadata.tokens.is_empty());
            let (copy, damage) = bad(found);
            assert_eq!(copy, older);
            assert!(matches!(damage, Damage::Older { seqid: 3, newer: 4 }));
        }
    }

    #[test]
    fn copies_of_one_sequence_number_that_differ_are_nobodys_header() {
        let other = sample_with("/tokens", serde_json::json!({})).to_string();
        let io = Memory::holding((3, sample().to_string().as_bytes()), (3, other.as_bytes()));
        assert!(matches!(read(&io), Err(HeaderError::CopiesDisagree { seqid: 3 })));
    }

    #[test]
    fn metadata_that_are_later_and_not_understood_are_not_replaced_by_older_ones() {
        let (known, unknown) = (
            sample().to_string(),
            sample_with("/keyslots/0/af", "new").to_string(),
        );
        for (seqid, older) in [(4, false), (3, false), (2, true)] {
            for (primary, secondary) in [
                (unknown.as_bytes(), known.as_bytes()),
                (known.as_bytes(), unknown.as_bytes()),
            ] {
                let seqid_of = |json: &[u8]| if json == known.as_bytes() { 3 } else { seqid };
                let io = Memory::holding((seqid_of(primary), primary), (seqid_of(secondary), secondary));
                match read(&io) {
                    Ok(found) => assert!(older && matches!(bad(found).1, Damage::Metadata { seqid: 2, .. })),
                    Err(error) => assert!(
                        !older && matches!(error, HeaderError::NotUnderstood { .. }),
                        "{error}"
                    ),
                }
            }
        }
    }

    #[test]
    fn two_copies_that_nobody_here_understands_are_not_called_damaged() {
        let unknown = sample_with("/keyslots/0/af", "new").to_string();
        let io = Memory::holding((3, unknown.as_bytes()), (3, unknown.as_bytes()));
        assert!(matches!(
            read(&io),
            Err(HeaderError::NotUnderstood {
                copy: Copy::Primary,
                ..
            })
        ));
    }

    #[test]
    fn two_damaged_copies_are_told_from_no_volume() {
        let io = Memory::of(&sample());
        io.spoil(100);
        io.spoil(COPY + 100);
        let error = read(&io).unwrap_err();
        let HeaderError::BothDamaged { primary, secondary } = error else {
            panic!("{error}");
        };
        assert!(matches!(
            (*primary, *secondary),
            (Damage::Checksum, Damage::Checksum)
        ));
        io.front.borrow_mut().fill(0);
        assert!(matches!(
            read(&io),
            Err(HeaderError::NotLuks { looks_like: None })
        ));
        io.front.borrow_mut()[..4].copy_from_slice(b"QFI\xfb");
        assert!(matches!(
            read(&io),
            Err(HeaderError::NotLuks {
                looks_like: Some(Format::Qcow2)
            })
        ));
        io.front.borrow_mut()[..8].copy_from_slice(b"LUKS\xba\xbe\x00\x01");
        assert!(matches!(read(&io), Err(HeaderError::Luks1)));
    }

    #[test]
    fn a_header_longer_than_its_device_is_refused() {
        let io = Memory::of(&sample());
        io.size.set(crate::testing::HEADER - 1);
        assert!(matches!(read(&io), Err(HeaderError::Truncated { .. })));
        for size in [0, 1, 4095] {
            io.size.set(size);
            assert!(
                matches!(read(&io), Err(HeaderError::NotLuks { looks_like: None })),
                "{size}"
            );
        }
    }

    #[test]
    fn what_was_made_of_the_disk_since_is_no_volume_to_repair() {
        let io = Memory::of(&sample());
        io.front.borrow_mut()[..2048].fill(0);
        io.front.borrow_mut()[1080..1082].copy_from_slice(b"\x53\xef");
        let error = read(&io).unwrap_err();
        assert!(matches!(
            error,
            HeaderError::ForeignSignature { format: Format::Ext }
        ));
    }
}
