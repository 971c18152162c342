//! The JSON area: keyslots, tokens, segments, digests and config (LUKS2 1.1, "LUKS2 JSON Metadata Format").
//!
//! Known content has types. Unknown content (other types of objects, further fields, requirements) is kept
//! and written back unchanged, because other programs may have put it there. [`Metadata::parse`] returns only
//! consistent metadata: areas are within the keyslots area and do not overlap, references lead to
//! existing objects, offsets are aligned. [`Refusal`](crate::Refusal) names what sealblk does not serve.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

use crate::binary;
use sealblk_base::parsing::{self, NotUnderstood, broken, rule};

/// The root object.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Metadata {
    pub keyslots: BTreeMap<Id, Keyslot>,
    pub tokens: BTreeMap<Id, Token>,
    pub segments: BTreeMap<Id, Segment>,
    pub digests: BTreeMap<Id, Digest>,
    pub config: Config,
    #[serde(flatten)]
    pub other: Other,
}

impl Metadata {
    /// Reads the JSON area of a header of `header_size` bytes.
    pub(crate) fn parse(area: &[u8], header_size: u64) -> Result<Self, MetadataError> {
        let end = area
            .iter()
            .position(|&byte| byte == 0)
            .ok_or(MetadataError::Unterminated)?;
        let (text, rest) = area.split_at(end);
        if rest.iter().any(|&byte| byte != 0) {
            return Err(MetadataError::Trailing);
        }
        let metadata: Self = parsing::json(text)?;
        metadata.validate(header_size)?;
        Ok(metadata)
    }

    /// Writes the JSON area, which must be zero.
    pub(crate) fn write(&self, area: &mut [u8]) -> Result<(), MetadataError> {
        let text = serde_json::to_vec(self).map_err(|_| MetadataError::Unwritable)?;
        // At least one NUL ends it.
        if text.len() >= area.len() {
            return Err(MetadataError::TooLong {
                len: text.len(),
                room: area.len(),
            });
        }
        area[..text.len()].copy_from_slice(&text);
        Ok(())
    }

    /// Checks that the numbers fit together, for what was read and for what is to be written.
    pub(crate) fn validate(&self, header_size: u64) -> Result<(), MetadataError> {
        self.validate_counts()?;
        self.validate_config(header_size)?;
        self.validate_keyslots(header_size)?;
        self.validate_references()?;
        self.validate_segments()
    }

    /// cryptsetup's limits. They keep what follows, which looks through lists within lists, from taking long.
    fn validate_counts(&self) -> Result<(), MetadataError> {
        let within = |what: &'static str, count: usize| match count <= MAX_OBJECTS as usize {
            true => Ok(()),
            false => Err(MetadataError::TooMany { what, count }),
        };
        within("keyslots", self.keyslots.len())?;
        within("tokens", self.tokens.len())?;
        within("segments", self.segments.len())?;
        within("digests", self.digests.len())?;
        for digest in self.digests.values() {
            within("keyslots of a digest", digest.keyslots().len())?;
            within("segments of a digest", digest.segments().len())?;
        }
        self.tokens
            .values()
            .try_for_each(|token| within("keyslots of a token", token.keyslots.len()))
    }

    fn validate_config(&self, header_size: u64) -> Result<(), MetadataError> {
        let json_size = self.config.json_size.0;
        if json_size.checked_add(binary::LEN as u64) != Some(header_size) {
            return Err(MetadataError::JsonSize {
                json_size,
                header_size,
            });
        }
        let keyslots_size = self.config.keyslots_size.0;
        if !keyslots_size.is_multiple_of(AREA_ALIGNMENT) || keyslots_size > MAX_KEYSLOTS_SIZE {
            return Err(MetadataError::KeyslotsSize { keyslots_size });
        }
        // Offset 0 says that the header is detached. Otherwise the payload starts behind the keyslots area.
        let payload = self.segments.values().filter_map(Segment::payload_offset).min();
        match payload {
            Some(offset) if offset != 0 && offset < 2 * header_size + keyslots_size => {
                Err(MetadataError::PayloadInHeader {
                    offset,
                    header_end: 2 * header_size + keyslots_size,
                })
            }
            _ => Ok(()),
        }
    }

    fn validate_keyslots(&self, header_size: u64) -> Result<(), MetadataError> {
        let within = 2 * header_size..2 * header_size + self.config.keyslots_size.0;
        let mut areas = Vec::with_capacity(self.keyslots.len());
        for (&keyslot, slot) in &self.keyslots {
            let (offset, size) = slot.area();
            let outside = MetadataError::AreaOutside {
                keyslot,
                offset,
                size,
            };
            let Some(end) = offset.checked_add(size) else {
                return Err(outside);
            };
            if size == 0 || offset < within.start || end > within.end {
                return Err(outside);
            }
            if let Keyslot::Luks2(slot) = slot {
                let needed = u64::from(slot.key_size) * u64::from(slot.af.stripes);
                if !offset.is_multiple_of(AREA_ALIGNMENT) || needed > size {
                    return Err(MetadataError::AreaUnfit {
                        keyslot,
                        offset,
                        size,
                        needed,
                    });
                }
            }
            areas.push((offset, end, keyslot));
        }
        areas.sort_unstable();
        for pair in areas.windows(2) {
            if pair[0].1 > pair[1].0 {
                return Err(MetadataError::AreasOverlap {
                    keyslot: pair[0].2,
                    other: pair[1].2,
                });
            }
        }
        Ok(())
    }

    fn validate_references(&self) -> Result<(), MetadataError> {
        let keyslots = |from: &'static str, id: Id, list: &[Id]| match list
            .iter()
            .find(|keyslot| !self.keyslots.contains_key(keyslot))
        {
            Some(&to) => Err(MetadataError::Dangling {
                from,
                id,
                what: "keyslot",
                to,
            }),
            None => Ok(()),
        };
        for (&id, token) in &self.tokens {
            keyslots("token", id, &token.keyslots)?;
        }
        for (&id, digest) in &self.digests {
            keyslots("digest", id, digest.keyslots())?;
            if let Some(&to) = digest
                .segments()
                .iter()
                .find(|segment| !self.segments.contains_key(segment))
            {
                return Err(MetadataError::Dangling {
                    from: "digest",
                    id,
                    what: "segment",
                    to,
                });
            }
        }
        Ok(())
    }

    fn validate_segments(&self) -> Result<(), MetadataError> {
        if self.segments.is_empty() {
            return Err(MetadataError::NoSegments);
        }
        let digested: BTreeSet<Id> = self
            .digests
            .values()
            .flat_map(|digest| digest.segments().iter().copied())
            .collect();
        for (&segment, description) in &self.segments {
            let Some(place) = description.place() else {
                continue;
            };
            let sector_size = match description {
                Segment::Crypt(crypt) => u64::from(crypt.sector_size),
                Segment::Linear(_) | Segment::Other(_) => SECTOR,
            };
            if sector_size == 0 || !sector_size.is_multiple_of(SECTOR) {
                return Err(MetadataError::SegmentSectorSize { segment, sector_size });
            }
            let offset = place.offset.0;
            let aligned = match place.size {
                SegmentSize::Dynamic => true,
                SegmentSize::Fixed(size) => size != 0 && size.is_multiple_of(sector_size),
            };
            if !offset.is_multiple_of(SECTOR) || !aligned {
                return Err(MetadataError::SegmentUnaligned {
                    segment,
                    offset,
                    size: place.size,
                    sector_size,
                });
            }
            if let SegmentSize::Fixed(size) = place.size
                && offset.checked_add(size).is_none()
            {
                return Err(MetadataError::SegmentUnaligned {
                    segment,
                    offset,
                    size: place.size,
                    sector_size,
                });
            }
            if matches!(description, Segment::Crypt(_)) && !digested.contains(&segment) {
                return Err(MetadataError::SegmentWithoutDigest { segment });
            }
        }
        Ok(())
    }

    /// The digest that verifies the key of `segment`.
    pub fn digest_of_segment(&self, segment: Id) -> Option<(Id, &Digest)> {
        let mut digests = self.digests.iter().map(|(&id, digest)| (id, digest));
        digests.find(|(_, digest)| digest.segments().contains(&segment))
    }
}

/// Declares an object whose `type` decides its fields: an enum with a variant for each type that is known here, and
/// `Other` for all that are not, which are kept as they were found. A known type with wrong fields is an error.
macro_rules! by_type {
    ($(#[$meta:meta])* $name:ident { $($text:literal => $variant:ident($fields:ty),)* _ => Other($other:ty) }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Serialize)]
        #[serde(tag = "type")]
        pub enum $name {
            $(#[serde(rename = $text)] $variant($fields),)*
            #[serde(untagged)]
            Other($other),
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let mut object = Map::<String, Value>::deserialize(deserializer)?;
                match object.get("type").and_then(Value::as_str) {
                    $(Some($text) => {
                        object.remove("type");
                        typed(object).map(Self::$variant)
                    })*
                    Some(_) => typed(object).map(Self::Other),
                    None => Err(broken(rule::NO_TYPE)),
                }
            }
        }
    };
}

fn typed<T: DeserializeOwned, E: serde::de::Error>(object: Map<String, Value>) -> Result<T, E> {
    parsing::json_value(Value::Object(object)).map_err(NotUnderstood::within)
}

by_type! {
    /// A way in: an area with a key in it, and how a passphrase opens that.
    Keyslot {
        "luks2" => Luks2(Box<Luks2Keyslot>),
        _ => Other(OtherKeyslot)
    }
}

impl Keyslot {
    /// Offset and size of its area in bytes.
    pub fn area(&self) -> (u64, u64) {
        match self {
            Keyslot::Luks2(slot) => (slot.area.offset.0, slot.area.size.0),
            Keyslot::Other(slot) => (slot.area.offset.0, slot.area.size.0),
        }
    }
}

/// A keyslot of type `luks2`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Luks2Keyslot {
    /// Length in bytes of the key that it holds.
    pub key_size: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<u32>,
    pub af: Af,
    pub area: Area,
    pub kdf: Kdf,
    #[serde(flatten)]
    pub other: Other,
}

/// A keyslot of another type (`reencrypt`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OtherKeyslot {
    #[serde(rename = "type")]
    pub kind: String,
    pub area: OtherArea,
    #[serde(flatten)]
    pub other: Other,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OtherArea {
    pub offset: Decimal,
    pub size: Decimal,
    #[serde(flatten)]
    pub other: Other,
}

/// The anti-forensic splitter of a keyslot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Af {
    #[serde(rename = "type")]
    pub kind: String,
    pub stripes: u32,
    pub hash: String,
    #[serde(flatten)]
    pub other: Other,
}

/// Where a keyslot's material is stored, and under which cipher.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Area {
    #[serde(rename = "type")]
    pub kind: String,
    pub offset: Decimal,
    pub size: Decimal,
    pub encryption: String,
    /// Length in bytes of the key that encrypts the area.
    pub key_size: u32,
    #[serde(flatten)]
    pub other: Other,
}

by_type! {
    /// How a passphrase becomes the key of a keyslot's area.
    Kdf {
        "pbkdf2" => Pbkdf2(Pbkdf2),
        "argon2i" => Argon2i(Argon2),
        "argon2id" => Argon2id(Argon2),
        _ => Other(OtherObject)
    }
}

impl Kdf {
    /// Its name as in the metadata.
    pub fn name(&self) -> &str {
        match self {
            Kdf::Pbkdf2(_) => "pbkdf2",
            Kdf::Argon2i(_) => "argon2i",
            Kdf::Argon2id(_) => "argon2id",
            Kdf::Other(other) => &other.kind,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pbkdf2 {
    pub hash: String,
    pub iterations: u32,
    pub salt: Base64,
    #[serde(flatten)]
    pub other: Other,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Argon2 {
    /// Passes over the memory.
    pub time: u32,
    /// KiB.
    pub memory: u32,
    /// Lanes.
    pub cpus: u32,
    pub salt: Base64,
    #[serde(flatten)]
    pub other: Other,
}

/// What opens keyslots without a passphrase from a person. Tokens of every type have these two fields; the
/// rest belongs to the type.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Token {
    #[serde(rename = "type")]
    pub kind: String,
    pub keyslots: Vec<Id>,
    #[serde(flatten)]
    pub other: Other,
}

by_type! {
    /// A range of the payload with one treatment.
    Segment {
        "crypt" => Crypt(CryptSegment),
        "linear" => Linear(LinearSegment),
        _ => Other(OtherObject)
    }
}

impl Segment {
    pub fn kind(&self) -> &str {
        match self {
            Segment::Crypt(_) => "crypt",
            Segment::Linear(_) => "linear",
            Segment::Other(other) => &other.kind,
        }
    }

    pub fn place(&self) -> Option<&AreaRange> {
        match self {
            Segment::Crypt(crypt) => Some(&crypt.place),
            Segment::Linear(linear) => Some(&linear.place),
            Segment::Other(_) => None,
        }
    }

    pub fn flags(&self) -> &[String] {
        self.place()
            .and_then(|place| place.flags.as_deref())
            .unwrap_or_default()
    }

    fn payload_offset(&self) -> Option<u64> {
        match self {
            Segment::Crypt(crypt) => Some(crypt.place.offset.0),
            // A linear segment may stand anywhere: in the middle of a decryption its data lies where the header will.
            Segment::Linear(_) | Segment::Other(_) => None,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CryptSegment {
    #[serde(flatten)]
    pub place: AreaRange,
    /// Added to the number of a sector in the segment to give its tweak, in units of 512 bytes.
    pub iv_tweak: Decimal,
    pub encryption: String,
    /// Bytes under one tweak.
    pub sector_size: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub integrity: Option<Value>,
    #[serde(flatten)]
    pub other: Other,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LinearSegment {
    #[serde(flatten)]
    pub place: AreaRange,
    #[serde(flatten)]
    pub other: Other,
}

/// Where a segment lies on its device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AreaRange {
    pub offset: Decimal,
    pub size: SegmentSize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flags: Option<Vec<String>>,
}

by_type! {
    /// What tells a right volume key from a wrong one.
    Digest {
        "pbkdf2" => Pbkdf2(Pbkdf2Digest),
        _ => Other(OtherDigest)
    }
}

impl Digest {
    pub fn keyslots(&self) -> &[Id] {
        match self {
            Digest::Pbkdf2(digest) => &digest.keyslots,
            Digest::Other(digest) => &digest.keyslots,
        }
    }

    pub fn keyslots_mut(&mut self) -> &mut Vec<Id> {
        match self {
            Digest::Pbkdf2(digest) => &mut digest.keyslots,
            Digest::Other(digest) => &mut digest.keyslots,
        }
    }

    pub fn segments(&self) -> &[Id] {
        match self {
            Digest::Pbkdf2(digest) => &digest.segments,
            Digest::Other(digest) => &digest.segments,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pbkdf2Digest {
    pub keyslots: Vec<Id>,
    pub segments: Vec<Id>,
    pub hash: String,
    pub iterations: u32,
    pub salt: Base64,
    pub digest: Base64,
    #[serde(flatten)]
    pub other: Other,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OtherDigest {
    #[serde(rename = "type")]
    pub kind: String,
    pub keyslots: Vec<Id>,
    pub segments: Vec<Id>,
    #[serde(flatten)]
    pub other: Other,
}

/// What holds for the whole header.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Config {
    pub json_size: Decimal,
    pub keyslots_size: Decimal,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flags: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requirements: Option<Requirements>,
    #[serde(flatten)]
    pub other: Other,
}

impl Config {
    /// What a program must know of to touch this volume.
    pub fn mandatory(&self) -> &[String] {
        let mandatory = self
            .requirements
            .as_ref()
            .and_then(|requirements| requirements.mandatory.as_deref());
        mandatory.unwrap_or_default()
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Requirements {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mandatory: Option<Vec<String>>,
    #[serde(flatten)]
    pub other: Other,
}

/// An object of which nothing is known but its type.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OtherObject {
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(flatten)]
    pub other: Other,
}

/// Fields that are not known here, kept as they were found.
pub type Other = Map<String, Value>;

/// The name of a keyslot, token, segment or digest: a number, in JSON a string of decimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(pub u32);

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for Id {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        // "00" and "0" would be two names for others, and one here.
        let canonical = text == "0" || !text.starts_with('0');
        match decimal(&text).and_then(|number| u32::try_from(number).ok()) {
            Some(number) if canonical => Ok(Self(number)),
            _ => Err(broken(rule::NUMBER)),
        }
    }
}

/// An offset or size in bytes, or a sector number: 64 bits, in JSON a string of decimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decimal(pub u64);

impl Serialize for Decimal {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Decimal {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let number = decimal(&text);
        number.map(Self).ok_or_else(|| broken(rule::NUMBER))
    }
}

/// Length of a segment in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SegmentSize {
    /// To the end of the device, however long that is.
    Dynamic,
    Fixed(u64),
}

impl fmt::Display for SegmentSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SegmentSize::Dynamic => f.write_str("dynamic"),
            SegmentSize::Fixed(size) => size.fmt(f),
        }
    }
}

impl Serialize for SegmentSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SegmentSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match text.as_str() {
            "dynamic" => Ok(Self::Dynamic),
            text => {
                let size = decimal(text).map(Self::Fixed);
                size.ok_or_else(|| broken(rule::SEGMENT_SIZE))
            }
        }
    }
}

/// Bytes, in JSON a base64 string.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base64(pub Vec<u8>);

impl Serialize for Base64 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64_STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Base64 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        BASE64_STANDARD
            .decode(String::deserialize(deserializer)?)
            .map(Self)
            .map_err(|_| broken(rule::BASE64))
    }
}

/// Why a JSON area is not LUKS2 metadata.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MetadataError {
    #[error("the JSON text is not ended by a NUL")]
    Unterminated,
    #[error("bytes follow the NUL that ends the JSON text")]
    Trailing,
    #[error("the JSON text cannot be parsed: {0}")]
    Json(#[from] NotUnderstood),
    #[error("the metadata cannot be written as JSON")]
    Unwritable,
    #[error("{len} bytes of JSON do not fit into the JSON area of {room} bytes; remove a keyslot or a token")]
    TooLong { len: usize, room: usize },
    #[error("there are {count} {what}, but the limit is {MAX_OBJECTS}")]
    TooMany { what: &'static str, count: usize },
    #[error("config: json_size {json_size} does not fit the header's size {header_size}")]
    JsonSize { json_size: u64, header_size: u64 },
    #[error("config: keyslots_size {keyslots_size} is not a multiple of 4096 up to 128 MiB")]
    KeyslotsSize { keyslots_size: u64 },
    #[error("the payload starts at byte {offset}, within the header, which ends at {header_end}")]
    PayloadInHeader { offset: u64, header_end: u64 },
    #[error("keyslot {keyslot}: its area ({size} bytes at {offset}) is not within the keyslots area")]
    AreaOutside { keyslot: Id, offset: u64, size: u64 },
    #[error(
        "keyslot {keyslot}: its area ({size} bytes at {offset}) is not aligned to 4096, or shorter than the \
         {needed} bytes of its material"
    )]
    AreaUnfit {
        keyslot: Id,
        offset: u64,
        size: u64,
        needed: u64,
    },
    #[error("the areas of keyslots {keyslot} and {other} overlap")]
    AreasOverlap { keyslot: Id, other: Id },
    #[error("{from} {id} refers to {what} {to}, which does not exist")]
    Dangling {
        from: &'static str,
        id: Id,
        what: &'static str,
        to: Id,
    },
    #[error("there are no segments")]
    NoSegments,
    #[error("segment {segment}: sector size {sector_size} is not a multiple of 512")]
    SegmentSectorSize { segment: Id, sector_size: u64 },
    #[error(
        "segment {segment}: offset {offset} and size {size} do not make whole sectors of {sector_size} bytes"
    )]
    SegmentUnaligned {
        segment: Id,
        offset: u64,
        size: SegmentSize,
        sector_size: u64,
    },
    #[error("segment {segment}: it has no digest for its key")]
    SegmentWithoutDigest { segment: Id },
}

fn decimal(text: &str) -> Option<u64> {
    // `parse` would take a sign.
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

/// The unit of every sector number and segment.
const SECTOR: u64 = 512;
pub(crate) const AREA_ALIGNMENT: u64 = 4096;
pub(crate) const MAX_OBJECTS: u32 = 32;
const MAX_KEYSLOTS_SIZE: u64 = 128 << 20;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::{COPY, parsed, sample, sample_with};

    /// Two areas, each a keyslot's own, of the sample with a second keyslot.
    fn with_keyslot_at(offset: &str, size: &str) -> Value {
        let mut slot = sample()["keyslots"]["0"].clone();
        slot["area"]["offset"] = offset.into();
        slot["area"]["size"] = size.into();
        sample_with("/keyslots/1", slot)
    }

    #[test]
    fn what_cryptsetup_wrote_is_written_back_the_same() {
        assert_eq!(
            serde_json::to_value(parsed(&sample()).unwrap()).unwrap(),
            sample()
        );
    }

    #[test]
    fn what_is_not_known_is_written_back_as_it_was() {
        let mut json = sample();
        let odd = json!({"nested": [1, -2, 3.5, null, true, {"": "\u{1f512}"}]});
        for object in [
            "",
            "/keyslots/0",
            "/keyslots/0/af",
            "/keyslots/0/area",
            "/keyslots/0/kdf",
            "/tokens/0",
            "/segments/0",
            "/digests/0",
            "/config",
        ] {
            json.pointer_mut(object).unwrap()["later"] = odd.clone();
        }
        json["keyslots"]["7"] = json!({
            "type": "reencrypt", "mode": "reencrypt", "direction": "forward", "key_size": 1,
            "area": {"type": "checksum", "offset": "290816", "size": "4096", "hash": "sha256", "sector_size": 512}
        });
        json["keyslots"]["8"] = json!({"type": "luks9", "area": {"offset": "294912", "size": "1"}, "x": odd});
        json["tokens"]["3"] = json!({"type": "systemd-tpm2", "keyslots": [], "tpm2-blob": "AAAA"});
        json["segments"]["1"] =
            json!({"type": "linear", "offset": "0", "size": "512", "flags": ["backup-final"]});
        json["segments"]["2"] =
            json!({"type": "hw-opal", "offset": "0", "size": "512", "opal_segment_number": 1});
        json["digests"]["4"] = json!({"type": "blake9", "keyslots": ["7"], "segments": [], "d": odd});
        json["config"]["flags"] = json!(["allow-discards"]);
        json["config"]["requirements"] = json!({"mandatory": ["something-new"], "optional": odd});
        assert_eq!(serde_json::to_value(parsed(&json).unwrap()).unwrap(), json);
    }

    #[test]
    fn a_keyslots_area_lies_within_the_keyslots_area_and_clear_of_others() {
        parsed(&with_keyslot_at("290816", "258048")).unwrap();
        parsed(&with_keyslot_at("16519168", "258048")).unwrap();
        for (offset, size) in [
            ("0", "258048"),
            ("28672", "258048"),
            ("16523264", "258048"),
            ("18446744073709547520", "258048"),
            ("290816", "18446744073709551615"),
            ("290816", "0"),
        ] {
            let error = parsed(&with_keyslot_at(offset, size)).unwrap_err();
            assert!(
                matches!(error, MetadataError::AreaOutside { keyslot: Id(1), .. }),
                "{offset}: {error}"
            );
        }
        for offset in ["32768", "286720"] {
            let error = parsed(&with_keyslot_at(offset, "258048")).unwrap_err();
            assert!(
                matches!(error, MetadataError::AreasOverlap { .. }),
                "{offset}: {error}"
            );
        }
        for (offset, size) in [("290816", "253952"), ("290817", "258048")] {
            let error = parsed(&with_keyslot_at(offset, size)).unwrap_err();
            assert!(
                matches!(error, MetadataError::AreaUnfit { .. }),
                "{offset} {size}: {error}"
            );
        }
    }

    #[test]
    fn no_list_is_longer_than_cryptsetups() {
        for pointer in ["/tokens/0/keyslots", "/digests/0/keyslots", "/digests/0/segments"] {
            parsed(&sample_with(pointer, vec!["0"; 32])).unwrap();
            let error = parsed(&sample_with(pointer, vec!["0"; 33])).unwrap_err();
            assert!(
                matches!(error, MetadataError::TooMany { count: 33, .. }),
                "{pointer}: {error}"
            );
        }
        let tokens = (0..33).map(|id| (id.to_string(), json!({"type": "t", "keyslots": []})));
        let error = parsed(&sample_with("/tokens", tokens.collect::<Map<_, _>>())).unwrap_err();
        assert_eq!(
            error,
            MetadataError::TooMany {
                what: "tokens",
                count: 33
            }
        );
    }

    #[test]
    fn references_lead_somewhere() {
        for pointer in ["/tokens/0/keyslots", "/digests/0/keyslots", "/digests/0/segments"] {
            let error = parsed(&sample_with(pointer, json!(["0", "9"]))).unwrap_err();
            assert!(
                matches!(error, MetadataError::Dangling { to: Id(9), .. }),
                "{pointer}: {error}"
            );
        }
        let error = parsed(&sample_with("/digests/0/segments", json!([]))).unwrap_err();
        assert_eq!(error, MetadataError::SegmentWithoutDigest { segment: Id(0) });
        let error = parsed(&sample_with("/segments", json!({}))).unwrap_err();
        assert!(matches!(error, MetadataError::Dangling { .. }), "{error}");
    }

    #[test]
    fn sizes_fit_the_header() {
        let json_size = |text: &str| parsed(&sample_with("/config/json_size", text)).unwrap_err();
        for text in ["0", "12287", "16384", "18446744073709551615"] {
            assert!(
                matches!(json_size(text), MetadataError::JsonSize { .. }),
                "{text}"
            );
        }
        let keyslots_size = |text: &str| parsed(&sample_with("/config/keyslots_size", text)).unwrap_err();
        for text in ["4095", "134221824", "18446744073709551615"] {
            assert!(
                matches!(keyslots_size(text), MetadataError::KeyslotsSize { .. }),
                "{text}"
            );
        }
        // 16 MiB + 4 KiB less two copies would reach into the payload.
        assert!(matches!(
            keyslots_size("16748544"),
            MetadataError::PayloadInHeader { .. }
        ));
    }

    #[test]
    fn segments_are_whole_sectors() {
        for (field, value) in [
            ("offset", json!("16777217")),
            ("size", json!("0")),
            ("size", json!("4608")),
            ("size", json!("18446744073709547520")),
        ] {
            let error = parsed(&sample_with(&format!("/segments/0/{field}"), value)).unwrap_err();
            assert!(
                matches!(error, MetadataError::SegmentUnaligned { .. }),
                "{field}: {error}"
            );
        }
        for size in [0, 1, 513] {
            let error = parsed(&sample_with("/segments/0/sector_size", size)).unwrap_err();
            assert!(
                matches!(error, MetadataError::SegmentSectorSize { .. }),
                "{size}: {error}"
            );
        }
    }

    #[test]
    fn numbers_are_decimal_digits_alone() {
        for text in [
            "",
            "+1",
            "-1",
            " 1",
            "1 ",
            "0x10",
            "1e3",
            "1.0",
            "18446744073709551616",
            "٣",
        ] {
            assert!(
                parsed(&sample_with("/segments/0/iv_tweak", text)).is_err(),
                "{text:?}"
            );
        }
        for name in ["", "00", "01", "+1", "-1", "4294967296", "one"] {
            let token = json!({"type": "t", "keyslots": []});
            assert!(
                parsed(&sample_with(&format!("/tokens/{name}"), token)).is_err(),
                "{name:?}"
            );
        }
    }

    #[test]
    fn the_json_area_is_one_text_and_zeros() {
        let mut area = vec![0; COPY as usize - binary::LEN];
        let text = sample().to_string();
        area[..text.len()].copy_from_slice(text.as_bytes());
        Metadata::parse(&area, COPY).unwrap();
        area[text.len() + 9] = b'x';
        assert_eq!(Metadata::parse(&area, COPY), Err(MetadataError::Trailing));
        area.fill(b' ');
        assert_eq!(Metadata::parse(&area, COPY), Err(MetadataError::Unterminated));
    }

    #[test]
    fn metadata_that_do_not_fit_are_not_written() {
        let metadata = parsed(&sample()).unwrap();
        let len = serde_json::to_vec(&metadata).unwrap().len();
        assert!(matches!(
            metadata.write(&mut vec![0; len]),
            Err(MetadataError::TooLong { .. })
        ));
        metadata.write(&mut vec![0; len + 1]).unwrap();
    }

    #[test]
    fn deep_nesting_is_an_error_and_not_a_stack_overflow() {
        let mut area = vec![0; COPY as usize - binary::LEN];
        area[..12000].fill(b'[');
        assert!(matches!(
            Metadata::parse(&area, COPY),
            Err(MetadataError::Json { .. })
        ));
    }
}
