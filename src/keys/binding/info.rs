//! The properties of a volume that can be read without a key.

use serde::Serialize;
use uuid::Uuid;

use super::token::{SealblkToken, is_ours};
use sealblk_base::timestamp::Timestamp;
use sealblk_luks2::metadata::{Id, Kdf, Keyslot, Metadata, Segment, SegmentSize, Token};
use sealblk_luks2::{Found, HeaderIo, Holding, Reason, VolumeError, keyslots_of_segments, layout};

/// What an operator asks of a volume. Its JSON form is stable: fields are added, and none is renamed or removed.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Info {
    /// UUID in the header.
    pub uuid: Uuid,
    /// Label in the header, empty if it has none.
    pub label: String,
    /// Subsystem in the header, empty if it has none.
    pub subsystem: String,
    /// Whether the header was read from another file than the payload's.
    pub detached_header: bool,
    /// How many times the header was written.
    pub sequence: u64,
    /// Length of the header with its keyslots, in bytes.
    pub header_size: u64,
    /// Whether both copies of the header are sound.
    pub header: CopiesInfo,
    /// Whether sealblk can serve it.
    pub servable: bool,
    /// If not: why.
    pub refusal: Option<String>,
    /// Length of the disk in bytes, if sealblk can serve it.
    pub capacity: Option<u64>,
    /// The parts of the payload.
    pub segments: Vec<SegmentInfo>,
    /// The ways in.
    pub keyslots: Vec<KeyslotInfo>,
    /// What opens keyslots without a person.
    pub tokens: Vec<TokenInfo>,
    /// Which host has it attached, if the header tells.
    pub attached: Option<AttachedInfo>,
    /// Flags of the header: what the volume permits whoever activates it ("allow-discards" …).
    pub flags: Vec<String>,
    /// What a program must know of to touch the volume.
    pub requirements: Vec<String>,
}

/// The host that has a volume attached, or had it when it crashed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AttachedInfo {
    /// The number of the attachment, for `--take-over`.
    pub attachment: u64,
    /// The host, derived from its machine ID.
    pub host: Uuid,
    /// Its name.
    pub name: String,
    /// Its boot.
    pub boot: Uuid,
    /// Since when, by its clock.
    pub since: Timestamp,
}

/// The two copies of the header.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum CopiesInfo {
    /// Both are sound and the same.
    Sound,
    /// One is not, and is repaired when the volume is opened for writing.
    NeedsRepair {
        /// "primary" or "secondary".
        copy: &'static str,
        /// What is wrong with it.
        damage: String,
    },
}

/// One segment.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SegmentInfo {
    /// Its number.
    pub segment: u32,
    /// "crypt", "linear", or what else there may be.
    pub kind: String,
    /// Where it starts in the payload's file or device, in bytes.
    pub offset: Option<u64>,
    /// Length in bytes; none if it reaches to the end of the file or device.
    pub size: Option<u64>,
    /// Its cipher.
    pub encryption: Option<String>,
    /// Length of its key in bits, if a keyslot tells it.
    pub key_bits: Option<u64>,
    /// Bytes under one tweak.
    pub sector_size: Option<u32>,
}

/// One keyslot.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct KeyslotInfo {
    /// Its number.
    pub keyslot: u32,
    /// Its type.
    pub kind: String,
    /// What it is for.
    pub purpose: Purpose,
    /// "normal", "prefer", "ignore".
    pub priority: &'static str,
    /// How its passphrase becomes a key.
    pub kdf: Option<KdfInfo>,
}

/// What a keyslot is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Purpose {
    /// A key provider opens it, through a sealblk token.
    Provider,
    /// A token of another program opens it.
    ForeignToken,
    /// A person opens it: a recovery key or passphrase.
    Passphrase,
    /// It opens no segment.
    Unbound,
}

impl Purpose {
    fn of(metadata: &Metadata, keyslot: Id) -> Self {
        if !keyslots_of_segments(metadata).any(|(bound, _)| bound == keyslot) {
            return Self::Unbound;
        }
        let mut tokens = metadata.tokens.values();
        match tokens.find(|token| token.keyslots.contains(&keyslot)) {
            Some(token) if is_ours(token) => Self::Provider,
            Some(_) => Self::ForeignToken,
            None => Self::Passphrase,
        }
    }
}

/// A key derivation and its cost.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct KdfInfo {
    /// "pbkdf2", "argon2id" …
    pub kind: String,
    /// PBKDF2: its hash.
    pub hash: Option<String>,
    /// PBKDF2: iterations.
    pub iterations: Option<u32>,
    /// Argon2: passes.
    pub time: Option<u32>,
    /// Argon2: memory in KiB.
    pub memory_kib: Option<u32>,
    /// Argon2: lanes.
    pub lanes: Option<u32>,
}

/// One token.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TokenInfo {
    /// Its number.
    pub token: u32,
    /// Its type.
    pub kind: String,
    /// What it opens.
    pub keyslots: Vec<u32>,
    /// Of a sealblk token: the provider's name.
    pub provider: Option<String>,
    /// Of a sealblk token: the KEK.
    pub key_id: Option<String>,
    /// Of a sealblk token: when the keyslot was bound to the KEK, if that is known.
    pub bound: Option<Timestamp>,
    /// How long ago that was, in seconds.
    pub age: Option<u64>,
    /// Of a sealblk token that a rekey under way has added: the tokens that it replaces.
    pub replaces: Vec<u32>,
    /// Of a sealblk token that cannot be read: why.
    pub broken: Option<String>,
}

impl Info {
    /// Reads the header, repairs nothing, and looks whether sealblk would serve the volume. `payload` is given when
    /// the header is detached.
    ///
    /// # Errors
    /// Where there is no LUKS2 header.
    pub fn read(io: &dyn HeaderIo, payload: Option<&dyn HeaderIo>) -> Result<Self, VolumeError> {
        let read = || {
            let found = sealblk_luks2::read(io)?;
            Ok(Self::of(&found, io, payload))
        };
        read().map_err(|reason: Reason| reason.at(io.path()))
    }

    fn of(found: &Found, io: &dyn HeaderIo, payload: Option<&dyn HeaderIo>) -> Self {
        let header = found.header();
        let metadata = header.metadata();
        let served = layout(header, io, payload);
        Self {
            uuid: header.uuid(),
            label: header.label().into_owned(),
            subsystem: header.subsystem().into_owned(),
            detached_header: payload.is_some(),
            sequence: header.sequence(),
            header_size: header.end(),
            header: CopiesInfo::of(found),
            servable: served.is_ok(),
            capacity: served.as_ref().ok().map(|layout| layout.capacity),
            refusal: served.err().map(|reason| reason.to_string()),
            segments: metadata
                .segments
                .iter()
                .map(|(&id, segment)| SegmentInfo::of(metadata, id, segment))
                .collect(),
            keyslots: metadata
                .keyslots
                .iter()
                .map(|(&id, slot)| KeyslotInfo::of(metadata, id, slot))
                .collect(),
            tokens: metadata
                .tokens
                .iter()
                .map(|(&id, token)| TokenInfo::of(id, token))
                .collect(),
            attached: AttachedInfo::of(metadata),
            flags: metadata.config.flags.clone().unwrap_or_default(),
            requirements: metadata.config.mandatory().to_vec(),
        }
    }
}

impl AttachedInfo {
    fn of(metadata: &Metadata) -> Option<Self> {
        let Holding { sequence, holder, .. } = Holding::of(metadata);
        holder.map(|holder| Self {
            attachment: sequence,
            host: holder.host,
            name: holder.name,
            boot: holder.boot,
            since: holder.since,
        })
    }
}

impl CopiesInfo {
    fn of(found: &Found) -> Self {
        match found {
            Found::Sound(_) => Self::Sound,
            Found::NeedsRecovery(recoverable) => Self::NeedsRepair {
                copy: recoverable.copy(),
                damage: recoverable.damage().to_string(),
            },
        }
    }
}

impl SegmentInfo {
    fn of(metadata: &Metadata, id: Id, segment: &Segment) -> Self {
        let place = segment.place();
        let crypt = match segment {
            Segment::Crypt(crypt) => Some(crypt),
            Segment::Linear(_) | Segment::Other(_) => None,
        };
        Self {
            segment: id.0,
            kind: segment.kind().to_owned(),
            offset: place.map(|place| place.offset.0),
            size: place.and_then(|place| match place.size {
                SegmentSize::Fixed(size) => Some(size),
                SegmentSize::Dynamic => None,
            }),
            encryption: crypt.map(|crypt| crypt.encryption.clone()),
            key_bits: key_bits(metadata, id),
            sector_size: crypt.map(|crypt| crypt.sector_size),
        }
    }
}

/// The length of a segment's key stands nowhere but with the keyslots that hold it.
fn key_bits(metadata: &Metadata, segment: Id) -> Option<u64> {
    let (_, digest) = metadata.digest_of_segment(segment)?;
    let mut slots = digest
        .keyslots()
        .iter()
        .filter_map(|keyslot| metadata.keyslots.get(keyslot));
    slots.find_map(|slot| match slot {
        Keyslot::Luks2(slot) => Some(u64::from(slot.key_size) * 8),
        Keyslot::Other(_) => None,
    })
}

impl KeyslotInfo {
    fn of(metadata: &Metadata, id: Id, slot: &Keyslot) -> Self {
        let (kind, priority, kdf) = match slot {
            Keyslot::Luks2(slot) => ("luks2", slot.priority, Some(KdfInfo::of(&slot.kdf))),
            Keyslot::Other(slot) => (slot.kind.as_str(), None, None),
        };
        Self {
            keyslot: id.0,
            kind: kind.to_owned(),
            purpose: Purpose::of(metadata, id),
            priority: match priority {
                Some(0) => "ignore",
                Some(2) => "prefer",
                _ => "normal",
            },
            kdf,
        }
    }
}

impl KdfInfo {
    fn of(kdf: &Kdf) -> Self {
        let mut info = Self {
            kind: kdf.name().to_owned(),
            hash: None,
            iterations: None,
            time: None,
            memory_kib: None,
            lanes: None,
        };
        match kdf {
            Kdf::Pbkdf2(kdf) => {
                info.hash = Some(kdf.hash.clone());
                info.iterations = Some(kdf.iterations);
            }
            Kdf::Argon2i(kdf) | Kdf::Argon2id(kdf) => {
                info.time = Some(kdf.time);
                info.memory_kib = Some(kdf.memory);
                info.lanes = Some(kdf.cpus);
            }
            Kdf::Other(_) => {}
        }
        info
    }
}

impl TokenInfo {
    fn of(id: Id, token: &Token) -> Self {
        let (sealblk, broken) = match SealblkToken::of(token) {
            Some(Ok(sealblk)) => (Some(sealblk), None),
            Some(Err(text)) => (None, Some(text)),
            None => (None, None),
        };
        let replaces = sealblk.as_ref().map_or(&[][..], |sealblk| &sealblk.replaces);
        let replaces = replaces.iter().map(|token| token.0).collect();
        let bound = sealblk.as_ref().and_then(|sealblk| sealblk.bound);
        let age = bound.map(|bound| bound.age().as_secs());
        let (provider, key_id) = sealblk
            .map(|sealblk| (sealblk.provider, sealblk.key_id.0))
            .unzip();
        Self {
            token: id.0,
            kind: token.kind.clone(),
            keyslots: token.keyslots.iter().map(|keyslot| keyslot.0).collect(),
            provider,
            key_id,
            bound,
            age,
            replaces,
            broken,
        }
    }
}
