//! TTLV, KMIP's encoding on the wire: KMIP 1.4, section 9.1; KMIP 2.1, section 10.
//!
//! ```text
//! offset  length
//!      0       3   tag
//!      3       1   type
//!      4       4   length of the value, without its padding
//!      8       n   value; zeros up to a multiple of 8
//! ```
//! A structure's value is a sequence of such items. The input of the decoder is untrusted: depth and number of items are
//! limited, and each length is checked against the bytes that are present. Decoding is strict, so that an item has one
//! encoding. Byte strings and texts of a decoded item stay in the receive buffer, and an encoded message is in the key
//! arena: both may hold a key.

use std::fmt;

use sealblk_secmem::{arena::ArenaError, arena::SecretBytes};

/// The length of what stands before every value.
pub const HEADER_LEN: usize = 8;
/// Structures within structures; messages of KMIP have less than ten.
const MAX_DEPTH: usize = 16;
/// Items in a message.
const MAX_ITEMS: usize = 1024;

/// The name of an item, 24 bits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Tag(pub u32);

/// A tag with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item<'a> {
    /// What it is.
    pub tag: Tag,
    /// Its value.
    pub value: Value<'a>,
}

/// A value of each type that the encoding has.
#[derive(Clone, PartialEq, Eq)]
#[allow(missing_docs)] // The names are the specification's.
pub enum Value<'a> {
    Structure(Vec<Item<'a>>),
    Integer(i32),
    LongInteger(i64),
    /// Two's complement, big-endian, a multiple of 8 bytes.
    BigInteger(&'a [u8]),
    Enumeration(u32),
    Boolean(bool),
    TextString(&'a str),
    ByteString(&'a [u8]),
    /// Seconds since 1970.
    DateTime(i64),
    /// Seconds.
    Interval(u32),
    /// Microseconds since 1970; from KMIP 2.0 on.
    DateTimeExtended(i64),
}

/// Why bytes are no TTLV.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // The texts say it.
pub enum Malformed {
    #[error("it ends within an item")]
    Truncated,
    #[error("{0} bytes follow its end")]
    Trailing(usize),
    #[error("it begins with the item {found} instead of {wanted}")]
    Begins { found: Tag, wanted: Tag },
    #[error("it is {length} bytes long; the limit is {limit}")]
    TooLong { length: usize, limit: usize },
    #[error("the item {tag} has a type that is unknown, {kind:#04x}")]
    Type { tag: Tag, kind: u8 },
    #[error("the item {tag} has {length} bytes, which its type does not allow")]
    Length { tag: Tag, length: usize },
    #[error("the item {0} has a value that its type does not allow")]
    Value(Tag),
    #[error("its structures are more than {MAX_DEPTH} deep")]
    Depth,
    #[error("it has more than {MAX_ITEMS} items")]
    Count,
}

mod kind {
    pub(super) const STRUCTURE: u8 = 0x01;
    pub(super) const INTEGER: u8 = 0x02;
    pub(super) const LONG_INTEGER: u8 = 0x03;
    pub(super) const BIG_INTEGER: u8 = 0x04;
    pub(super) const ENUMERATION: u8 = 0x05;
    pub(super) const BOOLEAN: u8 = 0x06;
    pub(super) const TEXT_STRING: u8 = 0x07;
    pub(super) const BYTE_STRING: u8 = 0x08;
    pub(super) const DATE_TIME: u8 = 0x09;
    pub(super) const INTERVAL: u8 = 0x0a;
    pub(super) const DATE_TIME_EXTENDED: u8 = 0x0b;
}

/// How many bytes follow the header of a message, which has to be a structure `tag` of up to `limit` bytes.
///
/// # Errors
/// [`Malformed`], if it is something else.
pub fn announced(header: &[u8; HEADER_LEN], tag: Tag, limit: usize) -> Result<usize, Malformed> {
    let (found, kind, length) = parse_header(header);
    match kind {
        _ if found != tag => Err(Malformed::Begins { found, wanted: tag }),
        kind::STRUCTURE if length % 8 != 0 => Err(Malformed::Length { tag, length }),
        kind::STRUCTURE if length > limit => Err(Malformed::TooLong { length, limit }),
        kind::STRUCTURE => Ok(length),
        kind => Err(Malformed::Type { tag, kind }),
    }
}

impl<'a> Item<'a> {
    /// A structure of these.
    pub fn structure(tag: Tag, items: impl Into<Vec<Item<'a>>>) -> Self {
        Self::new(tag, Value::Structure(items.into()))
    }

    /// An item with this value.
    pub fn new(tag: Tag, value: Value<'a>) -> Self {
        Self { tag, value }
    }

    /// Reads the one item that `bytes` are.
    ///
    /// # Errors
    /// [`Malformed`], if they are anything else.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut decoder = Decoder {
            rest: bytes,
            left: MAX_ITEMS,
        };
        let item = decoder.item(MAX_DEPTH)?;
        match decoder.rest.len() {
            0 => Ok(item),
            trailing => Err(Malformed::Trailing(trailing)),
        }
    }

    /// Its bytes, which may hold a key.
    ///
    /// # Errors
    /// [`ArenaError`], if there is no memory for them.
    pub fn encode(&self) -> Result<SecretBytes, ArenaError> {
        let mut bytes = SecretBytes::zeroed(self.encoded_len())?;
        let rest = self.write(&mut bytes);
        debug_assert!(rest.is_empty());
        Ok(bytes)
    }

    fn encoded_len(&self) -> usize {
        HEADER_LEN + self.value.len().next_multiple_of(8)
    }

    /// Writes it to the front of `out`, which is zero, and returns what is left of that.
    fn write<'o>(&self, out: &'o mut [u8]) -> &'o mut [u8] {
        let length = self.value.len();
        let (header, out) = out.split_at_mut(HEADER_LEN);
        header[..4].copy_from_slice(&(self.tag.0 << 8 | u32::from(self.value.kind())).to_be_bytes());
        let announced = u32::try_from(length).expect("secrets in the arena are shorter than 4 GiB");
        header[4..].copy_from_slice(&announced.to_be_bytes());
        let (out, rest) = out.split_at_mut(length.next_multiple_of(8));
        match &self.value {
            Value::Structure(items) => {
                items.iter().fold(out, |out, item| item.write(out));
            }
            Value::Integer(value) => out[..4].copy_from_slice(&value.to_be_bytes()),
            Value::Enumeration(value) | Value::Interval(value) => {
                out[..4].copy_from_slice(&value.to_be_bytes())
            }
            Value::LongInteger(value) | Value::DateTime(value) | Value::DateTimeExtended(value) => {
                out.copy_from_slice(&value.to_be_bytes());
            }
            Value::Boolean(value) => out[7] = u8::from(*value),
            Value::TextString(text) => out[..length].copy_from_slice(text.as_bytes()),
            Value::BigInteger(bytes) | Value::ByteString(bytes) => out[..length].copy_from_slice(bytes),
        }
        rest
    }
}

impl Value<'_> {
    fn kind(&self) -> u8 {
        match self {
            Value::Structure(_) => kind::STRUCTURE,
            Value::Integer(_) => kind::INTEGER,
            Value::LongInteger(_) => kind::LONG_INTEGER,
            Value::BigInteger(_) => kind::BIG_INTEGER,
            Value::Enumeration(_) => kind::ENUMERATION,
            Value::Boolean(_) => kind::BOOLEAN,
            Value::TextString(_) => kind::TEXT_STRING,
            Value::ByteString(_) => kind::BYTE_STRING,
            Value::DateTime(_) => kind::DATE_TIME,
            Value::Interval(_) => kind::INTERVAL,
            Value::DateTimeExtended(_) => kind::DATE_TIME_EXTENDED,
        }
    }

    /// Without the padding.
    fn len(&self) -> usize {
        match self {
            Value::Structure(items) => items.iter().map(Item::encoded_len).sum(),
            Value::Integer(_) | Value::Enumeration(_) | Value::Interval(_) => 4,
            Value::LongInteger(_) | Value::Boolean(_) | Value::DateTime(_) | Value::DateTimeExtended(_) => 8,
            Value::TextString(text) => text.len(),
            Value::BigInteger(bytes) | Value::ByteString(bytes) => bytes.len(),
        }
    }
}

struct Decoder<'a> {
    rest: &'a [u8],
    /// How many more items are read.
    left: usize,
}

impl<'a> Decoder<'a> {
    fn item(&mut self, depth: usize) -> Result<Item<'a>, Malformed> {
        self.left = self.left.checked_sub(1).ok_or(Malformed::Count)?;
        let (header, rest) = self.rest.split_first_chunk().ok_or(Malformed::Truncated)?;
        let (tag, kind, length) = parse_header(header);
        let padded = length.checked_next_multiple_of(8).ok_or(Malformed::Truncated)?;
        let (value, rest) = rest.split_at_checked(padded).ok_or(Malformed::Truncated)?;
        let (value, padding) = value.split_at(length);
        if padding.iter().any(|byte| *byte != 0) {
            return Err(Malformed::Value(tag));
        }
        self.rest = rest;
        let bad_length = || Malformed::Length { tag, length };
        let four = || <[u8; 4]>::try_from(value).map_err(|_| bad_length());
        let eight = || <[u8; 8]>::try_from(value).map_err(|_| bad_length());
        let value = match kind {
            kind::STRUCTURE => Value::Structure(self.items(value, depth)?),
            kind::INTEGER => Value::Integer(i32::from_be_bytes(four()?)),
            kind::LONG_INTEGER => Value::LongInteger(i64::from_be_bytes(eight()?)),
            kind::BIG_INTEGER if length == 0 || length % 8 != 0 => return Err(bad_length()),
            kind::BIG_INTEGER => Value::BigInteger(value),
            kind::ENUMERATION => Value::Enumeration(u32::from_be_bytes(four()?)),
            kind::BOOLEAN => match u64::from_be_bytes(eight()?) {
                0 => Value::Boolean(false),
                1 => Value::Boolean(true),
                _ => return Err(Malformed::Value(tag)),
            },
            kind::TEXT_STRING => Value::TextString(str::from_utf8(value).map_err(|_| Malformed::Value(tag))?),
            kind::BYTE_STRING => Value::ByteString(value),
            kind::DATE_TIME => Value::DateTime(i64::from_be_bytes(eight()?)),
            kind::INTERVAL => Value::Interval(u32::from_be_bytes(four()?)),
            kind::DATE_TIME_EXTENDED => Value::DateTimeExtended(i64::from_be_bytes(eight()?)),
            kind => return Err(Malformed::Type { tag, kind }),
        };
        Ok(Item { tag, value })
    }

    /// The items of a structure whose value `bytes` are.
    fn items(&mut self, bytes: &'a [u8], depth: usize) -> Result<Vec<Item<'a>>, Malformed> {
        let depth = depth.checked_sub(1).ok_or(Malformed::Depth)?;
        let mut inner = Decoder {
            rest: bytes,
            left: self.left,
        };
        let mut items = Vec::new();
        while !inner.rest.is_empty() {
            items.push(inner.item(depth)?);
        }
        self.left = inner.left;
        Ok(items)
    }
}

fn parse_header(header: &[u8; HEADER_LEN]) -> (Tag, u8, usize) {
    let [t0, t1, t2, kind, l0, l1, l2, l3] = *header;
    let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
    (Tag(u32::from_be_bytes([0, t0, t1, t2])), kind, length)
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:06x}", self.0)
    }
}

impl fmt::Debug for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Debug for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Structure(items) => f.debug_list().entries(items).finish(),
            Value::Integer(value) => write!(f, "{value}"),
            Value::LongInteger(value) | Value::DateTime(value) | Value::DateTimeExtended(value) => {
                write!(f, "{value}")
            }
            Value::Enumeration(value) | Value::Interval(value) => write!(f, "{value:#x}"),
            Value::Boolean(value) => write!(f, "{value}"),
            Value::TextString(text) => write!(f, "{text:?}"),
            // It may be a key.
            Value::BigInteger(bytes) | Value::ByteString(bytes) => write!(f, "{} bytes", bytes.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TAG: Tag = Tag(0x42_0020);

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> = hex.bytes().filter(|byte| *byte != b' ').collect();
        let byte = |pair: &[u8]| u8::from_str_radix(str::from_utf8(pair).unwrap(), 16).unwrap();
        digits.chunks(2).map(byte).collect()
    }

    /// KMIP 1.4, section 9.1.2, "Examples".
    #[test]
    fn examples_of_the_specification() {
        let big = bytes("0000000003fd35eb 6bc2df4618080000");
        let inner = |value| Item::new(Tag(0x42_0004), value);
        let examples = [
            (
                "42 00 20 02 00 00 00 04 00 00 00 08 00 00 00 00",
                Value::Integer(8),
            ),
            (
                "42 00 20 03 00 00 00 08 01 B6 9B 4B A5 74 92 00",
                Value::LongInteger(123_456_789_000_000_000),
            ),
            (
                "42 00 20 04 00 00 00 10 00 00 00 00 03 FD 35 EB 6B C2 DF 46 18 08 00 00",
                Value::BigInteger(&big),
            ),
            (
                "42 00 20 05 00 00 00 04 00 00 00 FF 00 00 00 00",
                Value::Enumeration(255),
            ),
            (
                "42 00 20 06 00 00 00 08 00 00 00 00 00 00 00 01",
                Value::Boolean(true),
            ),
            (
                "42 00 20 07 00 00 00 0B 48 65 6C 6C 6F 20 57 6F 72 6C 64 00 00 00 00 00",
                Value::TextString("Hello World"),
            ),
            (
                "42 00 20 08 00 00 00 03 01 02 03 00 00 00 00 00",
                Value::ByteString(&[1, 2, 3]),
            ),
            (
                "42 00 20 09 00 00 00 08 00 00 00 00 47 DA 67 F8",
                Value::DateTime(1_205_495_800),
            ),
            (
                "42 00 20 0A 00 00 00 04 00 0D 2F 00 00 00 00 00",
                Value::Interval(864_000),
            ),
            (
                "42 00 20 01 00 00 00 20 42 00 04 05 00 00 00 04 00 00 00 FE 00 00 00 00 \
                 42 00 05 02 00 00 00 04 00 00 00 FF 00 00 00 00",
                Value::Structure(vec![
                    inner(Value::Enumeration(254)),
                    Item::new(Tag(0x42_0005), Value::Integer(255)),
                ]),
            ),
        ];
        for (hex, value) in examples {
            let (item, bytes) = (Item::new(TAG, value), bytes(hex));
            assert_eq!(Item::decode(&bytes).unwrap(), item);
            assert_eq!(*item.encode().unwrap(), bytes);
        }
    }

    #[test]
    fn malformed_items_are_told() {
        let length = |length| Malformed::Length { tag: TAG, length };
        for (hex, error) in [
            ("", Malformed::Truncated),
            ("42002002 000000", Malformed::Truncated),
            ("42002002 00000004 00000008", Malformed::Truncated),
            ("42002008 ffffffff 0000000000000000", Malformed::Truncated),
            ("42002002 00000008 0000000000000008", length(8)),
            ("42002002 00000000", length(0)),
            ("42002003 00000004 0000000800000000", length(4)),
            ("42002004 00000000", length(0)),
            ("42002004 00000004 0000000800000000", length(4)),
            ("42002002 00000004 0000000800000001", Malformed::Value(TAG)),
            ("42002006 00000008 0000000000000002", Malformed::Value(TAG)),
            ("42002007 00000002 c328000000000000", Malformed::Value(TAG)),
            ("42002008 00000003 0102030000000001", Malformed::Value(TAG)),
            ("4200200c 00000000", Malformed::Type { tag: TAG, kind: 12 }),
            ("42002000 00000000", Malformed::Type { tag: TAG, kind: 0 }),
            ("42002008 00000000 00", Malformed::Trailing(1)),
            // The inner item is longer than the structure around it.
            (
                "42002001 00000010 42002008 00000010 0000000000000000 0000000000000000",
                Malformed::Truncated,
            ),
            ("42002001 00000004 42002008 00000000", Malformed::Truncated),
        ] {
            assert_eq!(Item::decode(&bytes(hex)).unwrap_err(), error, "{hex}");
        }
    }

    #[test]
    fn depth_and_number_of_items_are_bounded() {
        let nested =
            |depth| (1..depth).fold(Item::structure(TAG, []), |inner, _| Item::structure(TAG, [inner]));
        let wide = |count| Item::structure(TAG, vec![Item::new(TAG, Value::ByteString(&[])); count - 1]);
        let decode = |item: Item<'_>| Item::decode(&item.encode().unwrap()).map(drop);
        assert_eq!(decode(nested(MAX_DEPTH)), Ok(()));
        assert_eq!(decode(nested(MAX_DEPTH + 1)), Err(Malformed::Depth));
        assert_eq!(decode(wide(MAX_ITEMS)), Ok(()));
        assert_eq!(decode(wide(MAX_ITEMS + 1)), Err(Malformed::Count));
    }

    #[test]
    fn announced_length_is_believed_of_the_right_message_alone() {
        let header = |hex| <[u8; 8]>::try_from(bytes(hex)).unwrap();
        let announced = |hex| announced(&header(hex), TAG, 64);
        assert_eq!(announced("42002001 00000040"), Ok(64));
        assert_eq!(
            announced("42002001 00000048"),
            Err(Malformed::TooLong {
                length: 72,
                limit: 64
            })
        );
        assert_eq!(
            announced("42002001 00000041"),
            Err(Malformed::Length { tag: TAG, length: 65 })
        );
        assert_eq!(
            announced("42002008 00000040"),
            Err(Malformed::Type { tag: TAG, kind: 8 })
        );
        assert_eq!(
            announced("48545450 2f312e31"),
            Err(Malformed::Begins {
                found: Tag(0x48_5454),
                wanted: TAG
            })
        );
    }

    #[test]
    fn keys_are_not_printed() {
        let item = Item::new(TAG, Value::ByteString(b"0123456789abcdef"));
        assert_eq!(format!("{item:?}"), "Item { tag: 420020, value: 16 bytes }");
    }

    /// An item that owns what [`Item`] borrows.
    #[derive(Clone, Debug)]
    enum Owned {
        Leaf(u32, u8, Vec<u8>),
        Structure(u32, Vec<Owned>),
    }

    impl Owned {
        fn item(&self) -> Item<'_> {
            match self {
                Owned::Structure(tag, items) => {
                    let items: Vec<_> = items.iter().map(Owned::item).collect();
                    Item::structure(Tag(*tag), items)
                }
                Owned::Leaf(tag, kind, bytes) => {
                    let mut number = [0; 8];
                    number.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
                    let (long, short) = (
                        i64::from_be_bytes(number),
                        u32::from_be_bytes([number[0], number[1], number[2], number[3]]),
                    );
                    Item::new(
                        Tag(*tag),
                        match kind % 10 {
                            0 => Value::Integer(short as i32),
                            1 => Value::LongInteger(long),
                            2 => Value::BigInteger(&[0x5a; 64][..8 * (1 + bytes.len() % 8)]),
                            3 => Value::Enumeration(short),
                            4 => Value::Boolean(short % 2 == 1),
                            5 => Value::TextString(str::from_utf8(bytes).unwrap_or("ключ")),
                            6 => Value::ByteString(bytes),
                            7 => Value::DateTime(long),
                            8 => Value::Interval(short),
                            _ => Value::DateTimeExtended(long),
                        },
                    )
                }
            }
        }
    }

    fn any_item() -> impl Strategy<Value = Owned> {
        let tag = 0_u32..1 << 24;
        let leaf = (
            tag.clone(),
            any::<u8>(),
            proptest::collection::vec(any::<u8>(), 0..40),
        )
            .prop_map(|(tag, kind, bytes)| Owned::Leaf(tag, kind, bytes));
        leaf.prop_recursive(8, 64, 8, move |inner| {
            (tag.clone(), proptest::collection::vec(inner, 0..8))
                .prop_map(|(tag, items)| Owned::Structure(tag, items))
        })
    }

    proptest! {
        #[test]
        fn what_is_encoded_decodes_to_the_same(owned in any_item()) {
            let item = owned.item();
            let bytes = item.encode().unwrap();
            prop_assert_eq!(Item::decode(&bytes).unwrap(), item);
        }

        #[test]
        fn what_decodes_has_one_encoding(owned in any_item(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let mut bytes = owned.item().encode().unwrap().to_vec();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if let Ok(item) = Item::decode(&bytes) {
                prop_assert_eq!(&*item.encode().unwrap(), &bytes[..]);
            }
        }

        #[test]
        fn every_cut_is_noticed(owned in any_item(), at in any::<prop::sample::Index>()) {
            let bytes = owned.item().encode().unwrap();
            prop_assert!(Item::decode(&bytes[..at.index(bytes.len())]).is_err());
        }
    }
}
