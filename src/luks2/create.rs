//! Making a volume.
//!
//! First come all steps that can fail without touching the disk: sizes, key derivation, and what the caller does with the volume's
//! UUID and key; then the locks and the growth of files. Only then [`NewVolume::write`] destroys the old content, writes the
//! keyslots, and writes the binary headers last. After a crash at any point the disk is either not a volume, or the complete
//! new volume.

use std::collections::BTreeMap;
use std::fmt;

use sealblk_base::sector::SectorSize;
use sealblk_base::size::in_memory;
use sealblk_secmem::arena::{ArenaError, SecretBytes};
use uuid::Uuid;

use crate::binary::{self, BinaryHeader, Text};
use crate::copies::{self, Header, HeaderError};
use crate::error::Reason;
use crate::hash::Hash;
use crate::header_io::HeaderIo;
use crate::keyslot::{self, ENCRYPTION, KEY_LEN, NewKeyslot};
use crate::lock::LockMode;
use crate::metadata::{
    AreaRange, Config, CryptSegment, Decimal, Id, MAX_OBJECTS, Metadata, Other, Segment, SegmentSize, Token,
};
use crate::update::{add_token, place, random_fill};

/// What a new volume shall be.
#[derive(Debug)]
pub struct Options<'a> {
    /// Length of the disk in bytes. None: as much as the file or device has room for.
    pub capacity: Option<u64>,
    /// The unit of encryption, and of the guest's I/O.
    pub sector_size: SectorSize,
    /// A name of up to 47 bytes, for people and for `/dev/disk/by-label`.
    pub label: &'a str,
    /// Whether a LUKS volume may be destroyed. Data of any other kind are destroyed in any case. Files are emptied
    /// then: nothing of what was there may shine through where the guest has not written yet.
    pub overwrite: bool,
}

/// A volume that has only to be written. It has a UUID and a key; it needs at least one keyslot.
pub struct NewVolume<'io> {
    io: &'io dyn HeaderIo,
    payload: Option<&'io dyn HeaderIo>,
    header: Header,
    key: SecretBytes,
    keyslots: Vec<(Id, NewKeyslot)>,
    /// Where the payload ends.
    end: u64,
    /// Whether a volume may be destroyed, and files are emptied first.
    overwrite: bool,
}

impl fmt::Debug for NewVolume<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewVolume")
            .field("header", &self.header)
            .finish_non_exhaustive()
    }
}

impl<'io> NewVolume<'io> {
    /// Plans a volume in what `header` holds, or with `payload`, in the two: then the header is detached, and the
    /// payload is the disk from its first byte. Nothing is changed yet.
    ///
    /// # Errors
    /// When the options are not possible, or there is a LUKS volume that may not be overwritten.
    pub fn plan(
        header: &'io dyn HeaderIo,
        payload: Option<&'io dyn HeaderIo>,
        options: &Options<'_>,
    ) -> Result<Self, Reason> {
        let io = header;
        if io.read_only() || payload.is_some_and(|payload| payload.read_only()) {
            return Err(Reason::ReadOnly);
        }
        let label = Text::new(options.label).ok_or_else(|| Reason::Label {
            label: options.label.to_owned(),
        })?;
        for file in [Some(io), payload].into_iter().flatten() {
            let _lock = file.lock(LockMode::Read).map_err(Reason::Lock)?;
            refuse_volume(file, options.overwrite)?;
        }

        let offset = if payload.is_some() { 0 } else { HEADER_LEN };
        let capacity = capacity(payload.unwrap_or(io), offset, options)?;
        let end = offset.checked_add(capacity).ok_or(Reason::Capacity {
            capacity,
            sector_size: options.sector_size.bytes(),
        })?;
        let key = volume_key()?;
        let header = Header::new(
            BinaryHeader {
                header_size: COPY_LEN,
                seqid: 0,
                label,
                checksum: Hash::Sha256,
                salt: [0; 64],
                uuid: random_uuid()?,
                subsystem: Text::EMPTY,
            },
            metadata(
                &key,
                offset,
                SegmentSize::Fixed(capacity),
                options.sector_size,
                HEADER_LEN - 2 * COPY_LEN,
            )?,
        )?;

        Ok(Self {
            io,
            payload,
            header,
            key,
            keyslots: Vec::new(),
            end,
            overwrite: options.overwrite,
        })
    }

    /// Its UUID.
    pub fn uuid(&self) -> Uuid {
        self.header.binary.uuid
    }

    /// Its volume key.
    pub fn key(&self) -> &SecretBytes {
        &self.key
    }

    /// The number that the next keyslot will have.
    pub fn next_keyslot(&self) -> Id {
        // `write` refuses what no header has room for.
        Id(u32::try_from(self.keyslots.len()).unwrap_or(u32::MAX))
    }

    /// Adds a keyslot, which holds [`NewVolume::key`].
    pub fn add_keyslot(&mut self, new: NewKeyslot) -> Id {
        let id = self.next_keyslot();
        self.keyslots.push((id, new));
        id
    }

    /// Adds a token, and gives its number.
    ///
    /// # Errors
    /// If there are as many as there may be.
    pub fn add_token(&mut self, token: Token) -> Result<Id, Reason> {
        add_token(&mut self.header.metadata, token)
    }

    /// Destroys what is there, and makes the volume. Files grow as needed.
    ///
    /// # Errors
    /// Nothing is changed where the volume has no keyslot or one with another key, its tokens are not valid or too long, a lock cannot
    /// be had, or a file or device is too small or cannot grow. When writing fails, what is left is not a volume.
    pub fn write(mut self) -> Result<Uuid, Reason> {
        if self.keyslots.is_empty() {
            return Err(Reason::NoWayIn);
        }
        if self.keyslots.len() > MAX_OBJECTS as usize {
            let (what, limit) = ("keyslot", MAX_OBJECTS);
            return Err(Reason::NoneFree { what, limit });
        }
        let mut materials = Vec::with_capacity(self.keyslots.len());
        for (keyslot, new) in self.keyslots {
            materials.push(place(&mut self.header, keyslot, new, &[])?);
        }
        self.header.check()?;
        let (io, payload) = (self.io, self.payload);
        let files: Vec<(&dyn HeaderIo, u64)> = match payload {
            Some(payload) => vec![(io, HEADER_LEN), (payload, self.end)],
            None => vec![(io, self.end)],
        };
        // All that can refuse comes before anything is lost: the locks, another look under them, the room.
        let mut locks = Vec::new();
        for (file, _) in &files {
            locks.push(file.lock(LockMode::Write).map_err(Reason::Lock)?);
            refuse_volume(*file, self.overwrite)?;
        }
        grow(&files)?;
        for (file, len) in files.iter().filter(|(file, _)| self.overwrite && file.can_grow()) {
            file.set_size(0)
                .and_then(|()| file.set_size(*len))
                .map_err(|source| Reason::Grow { len: *len, source })?;
        }
        // Neither an old header nor a forgotten secondary copy may be taken for ours; and that the keyslots area is
        // random hides how many keyslots it has.
        io.write_at(&vec![0; in_memory(2 * COPY_LEN)], 0)
            .map_err(Reason::Prepare)?;
        random_fill(io, 2 * COPY_LEN..HEADER_LEN).map_err(Reason::Prepare)?;
        io.sync().map_err(Reason::Prepare)?;
        for material in materials {
            material.store(io)?;
        }
        if let Some(payload) = payload {
            if self.overwrite && !payload.can_grow() {
                // A header that was on the device itself would be taken for the payload's own.
                let len = self.end.min(HEADER_LEN) as usize;
                payload.write_at(&vec![0; len], 0).map_err(Reason::Prepare)?;
            }
            payload.sync().map_err(Reason::Prepare)?;
        }
        self.header.commit(io)?;
        Ok(self.header.binary.uuid)
    }
}

/// Refuses what is a LUKS volume, or was one before it was damaged.
fn refuse_volume(io: &dyn HeaderIo, overwrite: bool) -> Result<(), Reason> {
    if overwrite {
        return Ok(());
    }
    match copies::read(io) {
        Err(HeaderError::NotLuks { .. }) => Ok(()),
        Err(HeaderError::Length(source)) => Err(Reason::Length(source)),
        Err(error @ HeaderError::Read(_)) => Err(error.into()),
        _ => Err(Reason::AlreadyLuks),
    }
}

/// The length of the disk, and whether it can be had.
fn capacity(payload: &dyn HeaderIo, offset: u64, options: &Options<'_>) -> Result<u64, Reason> {
    let len = payload.size().map_err(Reason::Length)?;
    let sector_size = options.sector_size.bytes();
    let unit = sector_size as u64;
    let capacity = match options.capacity {
        Some(capacity) => capacity,
        None => len.saturating_sub(offset) / unit * unit,
    };
    if options.capacity.is_none() && capacity == 0 {
        return Err(Reason::TooSmall {
            len,
            needed: offset + unit,
        });
    }
    if capacity == 0 || !capacity.is_multiple_of(unit) {
        return Err(Reason::Capacity {
            capacity,
            sector_size,
        });
    }
    let needed = offset.saturating_add(capacity);
    if len < needed && !payload.can_grow() {
        return Err(Reason::TooSmall { len, needed });
    }
    Ok(capacity)
}

/// Makes sure that each file or device is as long as it must be. Where one cannot be, all are as long as they were.
fn grow(files: &[(&dyn HeaderIo, u64)]) -> Result<(), Reason> {
    let mut grown: Vec<(&dyn HeaderIo, u64)> = Vec::new();
    for &(file, len) in files {
        let found = file.size().map_err(Reason::Length)?;
        if found >= len {
            continue;
        }
        let extended = if file.can_grow() {
            file.set_size(len).map_err(|source| Reason::Grow { len, source })
        } else {
            Err(Reason::TooSmall {
                len: found,
                needed: len,
            })
        };
        if let Err(reason) = extended {
            for (file, len) in grown {
                // A file that stays longer has lost nothing; the error to tell is the first one.
                let _ = file.set_size(len);
            }
            return Err(reason);
        }
        grown.push((file, found));
    }
    Ok(())
}

/// The metadata of a volume that has one segment and no keyslots yet.
///
/// A disk's segment says its length, where cryptsetup would write "dynamic": a payload that was cut short is then noticed,
/// and a file that grew shows the guest a larger disk only when somebody says so.
pub(crate) fn metadata(
    key: &SecretBytes,
    offset: u64,
    size: SegmentSize,
    sector_size: SectorSize,
    keyslots_size: u64,
) -> Result<Metadata, Reason> {
    let segment = Segment::Crypt(CryptSegment {
        place: AreaRange {
            offset: Decimal(offset),
            size,
            flags: None,
        },
        iv_tweak: Decimal(0),
        encryption: ENCRYPTION.to_owned(),
        sector_size: sector_size.bytes_u32(),
        integrity: None,
        other: Other::new(),
    });
    let digest = keyslot::digest_of(key, Vec::new(), vec![Id(0)]).map_err(Reason::NewKeyslot)?;
    Ok(Metadata {
        keyslots: BTreeMap::new(),
        tokens: BTreeMap::new(),
        segments: BTreeMap::from([(Id(0), segment)]),
        digests: BTreeMap::from([(Id(0), digest)]),
        config: Config {
            json_size: Decimal(COPY_LEN - binary::LEN as u64),
            keyslots_size: Decimal(keyslots_size),
            flags: None,
            requirements: None,
            other: Other::new(),
        },
        other: Other::new(),
    })
}

/// 64 random bytes, for which no cipher will find the halves equal.
fn volume_key() -> Result<SecretBytes, ArenaError> {
    loop {
        let key = SecretBytes::random(KEY_LEN)?;
        let (data, tweak) = key.split_at(KEY_LEN / 2);
        if data != tweak {
            return Ok(key);
        }
    }
}

pub(crate) fn random_uuid() -> Result<Uuid, Reason> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(Reason::Random)?;
    Ok(uuid::Builder::from_random_bytes(bytes).into_uuid())
}

/// cryptsetup's defaults: two copies of 16 KiB, and keyslots up to 16 MiB, where the payload starts.
pub(crate) const COPY_LEN: u64 = 16 << 10;
const HEADER_LEN: u64 = 16 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{CHEAP, Memory, of_a_missing_keyslot, sample, secret, too_long};

    /// The device was empty when the header turned out to be one that cannot be written.
    #[test]
    fn volume_that_cannot_be_valid_is_refused_before_the_device_is_changed() {
        let io = Memory::of(&sample());
        let before = io.front.borrow().clone();
        let planned = || {
            let options = Options {
                capacity: None,
                sector_size: SectorSize::B512,
                label: "",
                overwrite: true,
            };
            NewVolume::plan(&io, None, &options).unwrap()
        };
        let refused = |new: NewVolume<'_>| {
            let refused = new.write().unwrap_err();
            assert!(*io.front.borrow() == before, "{refused}");
            refused
        };
        let slot = |key: &SecretBytes| NewKeyslot::for_passphrase(key, &secret("new"), CHEAP).unwrap();
        for token in [of_a_missing_keyslot(), too_long()] {
            let mut new = planned();
            new.add_keyslot(slot(new.key()));
            new.add_token(token).unwrap();
            assert!(matches!(refused(new), Reason::Header(HeaderError::Unwritable(_))));
        }
        let mut new = planned();
        new.add_keyslot(slot(&SecretBytes::random(KEY_LEN).unwrap()));
        assert!(matches!(refused(new), Reason::NotItsKey));
    }
}
