//! Requests to a KMIP server, and its answers: KMIP 1.1 to 1.4, 2.0 and 2.1.
//!
//! Each message has one batch item. The versions differ in how attributes are written: up to 1.4 an attribute is a name in
//! text with a value (Template-Attribute), from 2.0 on it is an item of its own, and an attribute that is not in the
//! specification belongs to a vendor.

mod answer;
mod request;

use std::fmt;

use super::{ttlv::Item, ttlv::Tag, ttlv::Value};

pub use answer::{Answer, AnswerError, Encrypted, Refusal};
pub use request::{Mark, Request, Use};

/// The longest answer that is read, without its header, in bytes. Those that are asked for have a few hundred.
pub const ANSWER_LIMIT: usize = 16 << 10;
/// The length of the nonce of AES-GCM, in bytes.
pub const NONCE_LEN: usize = 12;
/// The length of the tag of AES-GCM, in bytes.
pub const TAG_LEN: usize = 16;

/// Tags, by their names in the specification.
#[allow(missing_docs)]
pub mod tag {
    use super::Tag;

    pub const APPLICATION_DATA: Tag = Tag(0x42_0002);
    pub const APPLICATION_NAMESPACE: Tag = Tag(0x42_0003);
    pub const APPLICATION_SPECIFIC_INFORMATION: Tag = Tag(0x42_0004);
    pub const ATTRIBUTE: Tag = Tag(0x42_0008);
    pub const ATTRIBUTE_NAME: Tag = Tag(0x42_000a);
    pub const ATTRIBUTE_VALUE: Tag = Tag(0x42_000b);
    pub const BATCH_COUNT: Tag = Tag(0x42_000d);
    pub const BATCH_ITEM: Tag = Tag(0x42_000f);
    pub const BLOCK_CIPHER_MODE: Tag = Tag(0x42_0011);
    pub const CRYPTOGRAPHIC_ALGORITHM: Tag = Tag(0x42_0028);
    pub const CRYPTOGRAPHIC_LENGTH: Tag = Tag(0x42_002a);
    pub const CRYPTOGRAPHIC_PARAMETERS: Tag = Tag(0x42_002b);
    pub const CRYPTOGRAPHIC_USAGE_MASK: Tag = Tag(0x42_002c);
    pub const ENCRYPTION_KEY_INFORMATION: Tag = Tag(0x42_0036);
    pub const IV_COUNTER_NONCE: Tag = Tag(0x42_003d);
    pub const KEY_BLOCK: Tag = Tag(0x42_0040);
    pub const KEY_FORMAT_TYPE: Tag = Tag(0x42_0042);
    pub const KEY_MATERIAL: Tag = Tag(0x42_0043);
    pub const KEY_VALUE: Tag = Tag(0x42_0045);
    pub const KEY_WRAPPING_DATA: Tag = Tag(0x42_0046);
    pub const KEY_WRAPPING_SPECIFICATION: Tag = Tag(0x42_0047);
    pub const MAXIMUM_ITEMS: Tag = Tag(0x42_004f);
    pub const MAXIMUM_RESPONSE_SIZE: Tag = Tag(0x42_0050);
    pub const NAME: Tag = Tag(0x42_0053);
    pub const NAME_TYPE: Tag = Tag(0x42_0054);
    pub const NAME_VALUE: Tag = Tag(0x42_0055);
    pub const OBJECT_TYPE: Tag = Tag(0x42_0057);
    pub const OPERATION: Tag = Tag(0x42_005c);
    pub const PROTOCOL_VERSION: Tag = Tag(0x42_0069);
    pub const PROTOCOL_VERSION_MAJOR: Tag = Tag(0x42_006a);
    pub const PROTOCOL_VERSION_MINOR: Tag = Tag(0x42_006b);
    pub const REQUEST_HEADER: Tag = Tag(0x42_0077);
    pub const REQUEST_MESSAGE: Tag = Tag(0x42_0078);
    pub const REQUEST_PAYLOAD: Tag = Tag(0x42_0079);
    pub const RESPONSE_MESSAGE: Tag = Tag(0x42_007b);
    pub const RESPONSE_PAYLOAD: Tag = Tag(0x42_007c);
    pub const RESULT_MESSAGE: Tag = Tag(0x42_007d);
    pub const RESULT_REASON: Tag = Tag(0x42_007e);
    pub const RESULT_STATUS: Tag = Tag(0x42_007f);
    pub const REVOCATION_REASON: Tag = Tag(0x42_0081);
    pub const REVOCATION_REASON_CODE: Tag = Tag(0x42_0082);
    pub const STATE: Tag = Tag(0x42_008d);
    pub const SYMMETRIC_KEY: Tag = Tag(0x42_008f);
    pub const TEMPLATE_ATTRIBUTE: Tag = Tag(0x42_0091);
    pub const UNIQUE_IDENTIFIER: Tag = Tag(0x42_0094);
    pub const VENDOR_IDENTIFICATION: Tag = Tag(0x42_009d);
    pub const WRAPPING_METHOD: Tag = Tag(0x42_009e);
    pub const ENCODING_OPTION: Tag = Tag(0x42_00a3);
    pub const DATA: Tag = Tag(0x42_00c2);
    pub const TAG_LENGTH: Tag = Tag(0x42_00ce);
    pub const AUTHENTICATED_ENCRYPTION_ADDITIONAL_DATA: Tag = Tag(0x42_00fe);
    pub const AUTHENTICATED_ENCRYPTION_TAG: Tag = Tag(0x42_00ff);
    pub const SENSITIVE: Tag = Tag(0x42_0120);
    pub const ATTRIBUTES: Tag = Tag(0x42_0125);
    pub const ATTRIBUTE_REFERENCE: Tag = Tag(0x42_013b);
    pub const NEW_ATTRIBUTE: Tag = Tag(0x42_013d);
}

/// Values of enumerations.
mod value {
    pub(super) const ALGORITHM_AES: u32 = 3;
    pub(super) const CESSATION_OF_OPERATION: u32 = 6;
    pub(super) const GCM: u32 = 9;
    /// Wrapping Method.
    pub(super) const ENCRYPT: u32 = 1;
    pub(super) const KEY_FORMAT_RAW: u32 = 1;
    pub(super) const NIST_KEY_WRAP: u32 = 0x0d;
    pub(super) const NO_ENCODING: u32 = 1;
    pub(super) const SUCCESS: u32 = 0;
    pub(super) const SYMMETRIC_KEY: u32 = 2;
    pub(super) const STATE_ACTIVE: u32 = 2;
    pub(super) const UNINTERPRETED_TEXT_STRING: u32 = 1;
    /// Cryptographic Usage Mask: Encrypt and Decrypt.
    pub(super) const ENCRYPT_DECRYPT: i32 = 0x4 | 0x8;
}

/// A version of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    major: i32,
    minor: i32,
}

/// The versions that this side speaks, the best one first.
pub const VERSIONS: [Version; 6] = [
    Version::new(2, 1),
    Version::new(2, 0),
    Version::V1_4,
    Version::new(1, 3),
    Version::new(1, 2),
    // The first one with Discover Versions.
    Version::new(1, 1),
];

const LONGEST_IDENTIFIER: usize = 1024;
/// What keys' attributes call this side.
pub(super) const PRODUCT: &str = env!("CARGO_PKG_NAME");

/// Whether a server may call a key so. The specification allows every text; those in the field are UUIDs and numbers, and
/// not every server survives what is no ASCII.
pub fn identifies(text: &str) -> bool {
    (1..=LONGEST_IDENTIFIER).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

impl Version {
    /// The first one with AES-GCM.
    pub const V1_4: Self = Self::new(1, 4);

    const fn new(major: i32, minor: i32) -> Self {
        Self { major, minor }
    }

    fn item(self) -> Item<'static> {
        Item::structure(
            tag::PROTOCOL_VERSION,
            [
                Item::new(tag::PROTOCOL_VERSION_MAJOR, Value::Integer(self.major)),
                Item::new(tag::PROTOCOL_VERSION_MINOR, Value::Integer(self.minor)),
            ],
        )
    }

    /// Attributes are items of their own.
    fn has_attribute_items(self) -> bool {
        self.major >= 2
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}
