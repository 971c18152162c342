//! What is asked of a KMIP server, and what it answers: KMIP 1.1 to 1.4, 2.0 and 2.1.
//!
//! Each message has one batch item. The versions differ in how attributes are written: up to 1.4 an attribute is a name in
//! text with a value (Template-Attribute), from 2.0 on it is an item of its own, and one that the specification does not
//! know belongs to a vendor.

use std::fmt;

use super::ttlv::{Item, Malformed, Tag, Value};
use crate::keys::KeyState;
use crate::keys::arena::{ArenaError, SecretBytes};

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
pub const PRODUCT: &str = env!("CARGO_PKG_NAME");

/// Whether a server may call a key so. The specification allows every text; those in the field are UUIDs and numbers, and
/// not every server survives what is no ASCII.
pub fn identifies(text: &str) -> bool {
    (1..=LONGEST_IDENTIFIER).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// How a key says whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// By attributes of our own, as vSphere has them: x-Vendor, x-Product, x-Product_Version.
    Vendor,
    /// By Application Specific Information.
    Application,
    /// By its Name alone.
    Name,
}

/// What a key is used for, as one attribute of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use<'a> {
    /// An attribute of our own, as vSphere has them: x-Component, x-Name, x-Identifier.
    Custom {
        /// Its name.
        name: &'a str,
        /// What it says.
        content: &'a str,
    },
    /// Application Specific Information.
    Application(&'a str),
}

/// What is asked of a server. Keys are AES-256.
#[derive(Debug)]
#[allow(missing_docs)] // The names are the specification's.
pub enum Request<'a> {
    DiscoverVersions,
    /// A key that encrypts and decrypts; with `sensitive`, one that the server gives to nobody (from KMIP 1.4 on).
    Create {
        name: &'a str,
        mark: Mark,
        sensitive: bool,
    },
    Activate(&'a str),
    /// The State among a key's attributes.
    GetState(&'a str),
    /// A key in format Raw; by NISTKeyWrap, if it is to be wrapped.
    Get {
        key: &'a str,
        wrapped_by: Option<&'a str>,
    },
    /// One active key of this Name.
    Locate {
        name: &'a str,
    },
    /// By AES-GCM, which KMIP has from 1.4 on.
    Encrypt {
        key: &'a str,
        nonce: &'a [u8],
        additional: &'a [u8],
        data: &'a [u8],
    },
    Decrypt {
        key: &'a str,
        nonce: &'a [u8],
        additional: &'a [u8],
        data: &'a [u8],
        tag: &'a [u8],
    },
    /// For a key that something was bound to.
    AddAttribute {
        key: &'a str,
        attribute: Use<'a>,
    },
    /// For a key that was made and is not going to be used.
    Revoke(&'a str),
    Destroy(&'a str),
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

impl Request<'_> {
    /// The number of the operation.
    pub fn operation(&self) -> u32 {
        match self {
            Request::Create { .. } => 0x01,
            Request::Locate { .. } => 0x08,
            Request::Get { .. } => 0x0a,
            Request::GetState(_) => 0x0b,
            Request::AddAttribute { .. } => 0x0d,
            Request::Activate(_) => 0x12,
            Request::Revoke(_) => 0x13,
            Request::Destroy(_) => 0x14,
            Request::DiscoverVersions => 0x1e,
            Request::Encrypt { .. } => 0x1f,
            Request::Decrypt { .. } => 0x20,
        }
    }

    /// Its name, for people.
    pub fn name(&self) -> &'static str {
        match self {
            Request::Create { .. } => "Create",
            Request::Locate { .. } => "Locate",
            Request::Get { .. } => "Get",
            Request::GetState(_) => "Get Attributes",
            Request::AddAttribute { .. } => "Add Attribute",
            Request::Activate(_) => "Activate",
            Request::Revoke(_) => "Revoke",
            Request::Destroy(_) => "Destroy",
            Request::DiscoverVersions => "Discover Versions",
            Request::Encrypt { .. } => "Encrypt",
            Request::Decrypt { .. } => "Decrypt",
        }
    }

    /// The message that asks for it.
    ///
    /// # Errors
    /// [`ArenaError`], if there is no memory for it.
    pub fn encode(&self, version: Version) -> Result<SecretBytes, ArenaError> {
        let header = Item::structure(
            tag::REQUEST_HEADER,
            [
                version.item(),
                Item::new(tag::MAXIMUM_RESPONSE_SIZE, Value::Integer(ANSWER_LIMIT as i32)),
                Item::new(tag::BATCH_COUNT, Value::Integer(1)),
            ],
        );
        let batch_item = Item::structure(
            tag::BATCH_ITEM,
            [
                enumeration(tag::OPERATION, self.operation()),
                Item::structure(tag::REQUEST_PAYLOAD, self.payload(version)),
            ],
        );
        Item::structure(tag::REQUEST_MESSAGE, [header, batch_item]).encode()
    }

    fn payload(&self, version: Version) -> Vec<Item<'_>> {
        match *self {
            Request::DiscoverVersions => VERSIONS.map(Version::item).into(),
            Request::Create {
                name,
                mark,
                sensitive,
            } => {
                let mut attributes = Attributes::of(version);
                attributes.add(
                    "Cryptographic Algorithm",
                    enumeration(tag::CRYPTOGRAPHIC_ALGORITHM, value::ALGORITHM_AES),
                );
                attributes.add(
                    "Cryptographic Length",
                    Item::new(tag::CRYPTOGRAPHIC_LENGTH, Value::Integer(256)),
                );
                attributes.add(
                    "Cryptographic Usage Mask",
                    Item::new(
                        tag::CRYPTOGRAPHIC_USAGE_MASK,
                        Value::Integer(value::ENCRYPT_DECRYPT),
                    ),
                );
                attributes.add("Name", name_item(name));
                if sensitive {
                    attributes.add("Sensitive", Item::new(tag::SENSITIVE, Value::Boolean(true)));
                }
                attributes.mark(mark);
                let template = match version.has_attribute_items() {
                    true => tag::ATTRIBUTES,
                    false => tag::TEMPLATE_ATTRIBUTE,
                };
                vec![
                    enumeration(tag::OBJECT_TYPE, value::SYMMETRIC_KEY),
                    Item::structure(template, attributes.items),
                ]
            }
            Request::Locate { name } => {
                let mut attributes = Attributes::of(version);
                attributes.add("Name", name_item(name));
                attributes.add("State", enumeration(tag::STATE, value::STATE_ACTIVE));
                let mut payload = vec![Item::new(tag::MAXIMUM_ITEMS, Value::Integer(1))];
                match version.has_attribute_items() {
                    true => payload.push(Item::structure(tag::ATTRIBUTES, attributes.items)),
                    false => payload.extend(attributes.items),
                }
                payload
            }
            Request::Get { key, wrapped_by } => {
                let format = enumeration(tag::KEY_FORMAT_TYPE, value::KEY_FORMAT_RAW);
                let mut payload = vec![unique_identifier(key), format];
                payload.extend(wrapped_by.map(key_wrap));
                payload
            }
            Request::GetState(key) => {
                let wanted = match version.has_attribute_items() {
                    true => enumeration(tag::ATTRIBUTE_REFERENCE, tag::STATE.0),
                    false => text(tag::ATTRIBUTE_NAME, "State"),
                };
                vec![unique_identifier(key), wanted]
            }
            Request::AddAttribute { key, attribute } => {
                let mut attributes = Attributes::of(version);
                match attribute {
                    Use::Custom { name, content } => attributes.add_custom(name, content),
                    Use::Application(data) => attributes.add_application(data),
                }
                let mut payload = vec![unique_identifier(key)];
                match version.has_attribute_items() {
                    true => payload.push(Item::structure(tag::NEW_ATTRIBUTE, attributes.items)),
                    false => payload.extend(attributes.items),
                }
                payload
            }
            Request::Activate(key) | Request::Destroy(key) => vec![unique_identifier(key)],
            Request::Revoke(key) => vec![
                unique_identifier(key),
                Item::structure(
                    tag::REVOCATION_REASON,
                    [enumeration(
                        tag::REVOCATION_REASON_CODE,
                        value::CESSATION_OF_OPERATION,
                    )],
                ),
            ],
            Request::Encrypt {
                key,
                nonce,
                additional,
                data,
            } => vec![
                unique_identifier(key),
                gcm(),
                bytes(tag::DATA, data),
                bytes(tag::IV_COUNTER_NONCE, nonce),
                bytes(tag::AUTHENTICATED_ENCRYPTION_ADDITIONAL_DATA, additional),
            ],
            Request::Decrypt {
                key,
                nonce,
                additional,
                data,
                tag,
            } => vec![
                unique_identifier(key),
                gcm(),
                bytes(tag::DATA, data),
                bytes(tag::IV_COUNTER_NONCE, nonce),
                bytes(tag::AUTHENTICATED_ENCRYPTION_ADDITIONAL_DATA, additional),
                bytes(tag::AUTHENTICATED_ENCRYPTION_TAG, tag),
            ],
        }
    }
}

/// Attributes as a version writes them.
struct Attributes<'a> {
    version: Version,
    items: Vec<Item<'a>>,
}

impl<'a> Attributes<'a> {
    fn of(version: Version) -> Self {
        Self {
            version,
            items: Vec::new(),
        }
    }

    /// An attribute of the specification: its name up to 1.4, and the item that it is from 2.0 on.
    fn add(&mut self, name: &'a str, mut item: Item<'a>) {
        if !self.version.has_attribute_items() {
            item.tag = tag::ATTRIBUTE_VALUE;
            item = Item::structure(tag::ATTRIBUTE, [text(tag::ATTRIBUTE_NAME, name), item]);
        }
        self.items.push(item);
    }

    /// An attribute of our own. Up to 1.4, "x-" before the name says that a client made it; from 2.0 on, "x" is the vendor.
    fn add_custom(&mut self, name: &'a str, content: &'a str) {
        let mut items = vec![
            text(tag::ATTRIBUTE_NAME, name),
            text(tag::ATTRIBUTE_VALUE, content),
        ];
        if self.version.has_attribute_items() {
            items[0] = text(tag::ATTRIBUTE_NAME, name.trim_start_matches("x-"));
            items.insert(0, text(tag::VENDOR_IDENTIFICATION, "x"));
        }
        self.items.push(Item::structure(tag::ATTRIBUTE, items));
    }

    fn add_application(&mut self, data: &'a str) {
        self.add(
            "Application Specific Information",
            Item::structure(
                tag::APPLICATION_SPECIFIC_INFORMATION,
                [
                    text(tag::APPLICATION_NAMESPACE, PRODUCT),
                    text(tag::APPLICATION_DATA, data),
                ],
            ),
        );
    }

    fn mark(&mut self, mark: Mark) {
        const VERSION: &str = env!("CARGO_PKG_VERSION");
        match mark {
            Mark::Vendor => {
                self.add_custom("x-Vendor", PRODUCT);
                self.add_custom("x-Product", PRODUCT);
                self.add_custom("x-Product_Version", VERSION);
            }
            Mark::Application => self.add_application(VERSION),
            Mark::Name => (),
        }
    }
}

fn enumeration(tag: Tag, value: u32) -> Item<'static> {
    Item::new(tag, Value::Enumeration(value))
}

fn text(tag: Tag, text: &str) -> Item<'_> {
    Item::new(tag, Value::TextString(text))
}

fn bytes(tag: Tag, bytes: &[u8]) -> Item<'_> {
    Item::new(tag, Value::ByteString(bytes))
}

fn unique_identifier(key: &str) -> Item<'_> {
    text(tag::UNIQUE_IDENTIFIER, key)
}

fn name_item(name: &str) -> Item<'_> {
    Item::structure(
        tag::NAME,
        [
            text(tag::NAME_VALUE, name),
            enumeration(tag::NAME_TYPE, value::UNINTERPRETED_TEXT_STRING),
        ],
    )
}

fn gcm() -> Item<'static> {
    Item::structure(
        tag::CRYPTOGRAPHIC_PARAMETERS,
        [
            enumeration(tag::BLOCK_CIPHER_MODE, value::GCM),
            enumeration(tag::CRYPTOGRAPHIC_ALGORITHM, value::ALGORITHM_AES),
            Item::new(tag::TAG_LENGTH, Value::Integer(TAG_LEN as i32)),
        ],
    )
}

/// AES Key Wrap of the bare key material by a key of the server's.
fn key_wrap(by: &str) -> Item<'_> {
    let parameters = enumeration(tag::BLOCK_CIPHER_MODE, value::NIST_KEY_WRAP);
    Item::structure(
        tag::KEY_WRAPPING_SPECIFICATION,
        [
            enumeration(tag::WRAPPING_METHOD, value::ENCRYPT),
            Item::structure(
                tag::ENCRYPTION_KEY_INFORMATION,
                [
                    unique_identifier(by),
                    Item::structure(tag::CRYPTOGRAPHIC_PARAMETERS, [parameters]),
                ],
            ),
            enumeration(tag::ENCODING_OPTION, value::NO_ENCODING),
        ],
    )
}

/// Why an answer is none, or brings nothing.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // The texts say it.
pub enum AnswerError {
    #[error("it is no TTLV")]
    Malformed(#[from] Malformed),
    #[error("it lacks the item {0}, or has one of another type")]
    Lacks(Tag),
    #[error("it answers {answered:#x}, and the operation asked for is {asked:#x}")]
    OtherOperation { answered: u32, asked: u32 },
    #[error("the key has the state {0:#x}, which is unknown")]
    State(u32),
    #[error("it has {found} bytes where {wanted} belong")]
    Length { found: usize, wanted: usize },
    #[error(
        "its Unique Identifier is empty, longer than {LONGEST_IDENTIFIER} bytes, or more than visible ASCII"
    )]
    Identifier,
    #[error("it has the key in clear, which was to come wrapped")]
    InClear,
    #[error("it has a wrapped key, which was to come in clear")]
    Wrapped,
    /// The server says no.
    #[error(transparent)]
    Refused(Refusal),
    #[error(transparent)]
    Arena(#[from] ArenaError),
}

/// What a server says when it does not do what it was asked for.
#[derive(Debug)]
pub struct Refusal {
    /// Result Status, which is not success.
    pub status: u32,
    /// Result Reason.
    pub reason: Option<u32>,
    /// Result Message, fit to be shown.
    pub message: String,
}

/// What a server answers if it did what it was asked for.
#[derive(Debug)]
pub struct Answer<'a>(Vec<Item<'a>>);

/// What a server encrypted by AES-GCM.
#[derive(Debug)]
pub struct Encrypted<'a> {
    /// The nonce, if the server has chosen another one than it was given.
    pub nonce: Option<&'a [u8]>,
    /// The ciphertext.
    pub data: &'a [u8],
    /// The tag.
    pub tag: &'a [u8],
}

impl<'a> Answer<'a> {
    /// Reads the answer to a request for `operation`.
    ///
    /// # Errors
    /// [`AnswerError`], if it is none, or a refusal.
    pub fn parse(message: &'a [u8], operation: u32) -> Result<Self, AnswerError> {
        let Item { tag, value } = Item::decode(message)?;
        let (tag::RESPONSE_MESSAGE, Value::Structure(items)) = (tag, value) else {
            return Err(AnswerError::Lacks(tag::RESPONSE_MESSAGE));
        };
        let batch_item = take(items, tag::BATCH_ITEM)?;
        match find(&batch_item, tag::OPERATION) {
            Some(Value::Enumeration(answered)) if *answered != operation => {
                return Err(AnswerError::OtherOperation {
                    answered: *answered,
                    asked: operation,
                });
            }
            // A refusal of the whole message names none.
            _ => (),
        }
        match find(&batch_item, tag::RESULT_STATUS) {
            Some(Value::Enumeration(value::SUCCESS)) => match find(&batch_item, tag::RESPONSE_PAYLOAD) {
                Some(_) => Ok(Self(take(batch_item, tag::RESPONSE_PAYLOAD)?)),
                None => Ok(Self(Vec::new())),
            },
            Some(Value::Enumeration(status)) => Err(AnswerError::Refused(Refusal {
                status: *status,
                reason: match find(&batch_item, tag::RESULT_REASON) {
                    Some(Value::Enumeration(reason)) => Some(*reason),
                    _ => None,
                },
                message: match find(&batch_item, tag::RESULT_MESSAGE) {
                    Some(Value::TextString(message)) => showable(message),
                    _ => String::new(),
                },
            })),
            _ => Err(AnswerError::Lacks(tag::RESULT_STATUS)),
        }
    }

    /// The versions that a server speaks, of those that it was asked about.
    pub fn versions(&self) -> Vec<Version> {
        let number = |items: &[Item<'_>], tag| match find(items, tag) {
            Some(Value::Integer(number)) => Some(*number),
            _ => None,
        };
        let version = |item: &Item<'_>| match item {
            Item {
                tag: tag::PROTOCOL_VERSION,
                value: Value::Structure(items),
            } => Some(Version::new(
                number(items, tag::PROTOCOL_VERSION_MAJOR)?,
                number(items, tag::PROTOCOL_VERSION_MINOR)?,
            )),
            _ => None,
        };
        self.0.iter().filter_map(version).collect()
    }

    /// The key that was made.
    ///
    /// # Errors
    /// [`AnswerError`], if the answer names none, or by a text that [`identifies`] does not let through.
    pub fn unique_identifier(&self) -> Result<&'a str, AnswerError> {
        self.located()?.ok_or(AnswerError::Lacks(tag::UNIQUE_IDENTIFIER))
    }

    /// The first key that was found, if there is one.
    ///
    /// # Errors
    /// [`AnswerError`], if it is named by a text that [`identifies`] does not let through.
    pub fn located(&self) -> Result<Option<&'a str>, AnswerError> {
        match find(&self.0, tag::UNIQUE_IDENTIFIER) {
            Some(Value::TextString(text)) if identifies(text) => Ok(Some(text)),
            Some(_) => Err(AnswerError::Identifier),
            None => Ok(None),
        }
    }

    /// A key's state.
    ///
    /// # Errors
    /// [`AnswerError`], if the answer has no state, or one that is unknown.
    pub fn state(&self) -> Result<KeyState, AnswerError> {
        let lacks = AnswerError::Lacks(tag::STATE);
        let from_attribute = |item: &Item<'a>| match item {
            Item {
                tag: tag::ATTRIBUTE,
                value: Value::Structure(items),
            } if find(items, tag::ATTRIBUTE_NAME) == Some(&Value::TextString("State")) => {
                find(items, tag::ATTRIBUTE_VALUE).cloned()
            }
            Item {
                tag: tag::ATTRIBUTES,
                value: Value::Structure(items),
            } => find(items, tag::STATE).cloned(),
            _ => None,
        };
        let Some(Value::Enumeration(state)) = self.0.iter().find_map(from_attribute) else {
            return Err(lacks);
        };
        Ok(match state {
            1 => KeyState::PreActive,
            2 => KeyState::Active,
            3 => KeyState::Deactivated,
            4 => KeyState::Compromised,
            5 | 6 => KeyState::Destroyed,
            state => return Err(AnswerError::State(state)),
        })
    }

    /// The key that was fetched.
    ///
    /// # Errors
    /// [`AnswerError`], if it is not there in clear as a symmetric key in format Raw, or there is no memory for it.
    pub fn key(self) -> Result<SecretBytes, AnswerError> {
        let block = self.key_block()?;
        match find(&block, tag::KEY_WRAPPING_DATA) {
            None => secret(&take(block, tag::KEY_VALUE)?, tag::KEY_MATERIAL),
            Some(_) => Err(AnswerError::Wrapped),
        }
    }

    /// The key that was fetched, as it was wrapped.
    ///
    /// # Errors
    /// [`AnswerError`], if it is not there, or in clear.
    pub fn wrapped_key(self) -> Result<Vec<u8>, AnswerError> {
        let block = self.key_block()?;
        match find(&block, tag::KEY_WRAPPING_DATA) {
            Some(_) => Ok(byte_string(&take(block, tag::KEY_VALUE)?, tag::KEY_MATERIAL)?.to_vec()),
            None => Err(AnswerError::InClear),
        }
    }

    fn key_block(self) -> Result<Vec<Item<'a>>, AnswerError> {
        let block = take(take(self.0, tag::SYMMETRIC_KEY)?, tag::KEY_BLOCK)?;
        match find(&block, tag::KEY_FORMAT_TYPE) {
            Some(&Value::Enumeration(value::KEY_FORMAT_RAW)) => Ok(block),
            _ => Err(AnswerError::Lacks(tag::KEY_FORMAT_TYPE)),
        }
    }

    /// What was encrypted, of which `len` bytes are expected.
    ///
    /// # Errors
    /// [`AnswerError`], if it is not there, or a part of it has another length.
    pub fn encrypted(&self, len: usize) -> Result<Encrypted<'a>, AnswerError> {
        let sized = |tag, wanted| match byte_string(&self.0, tag)? {
            bytes if bytes.len() == wanted => Ok(bytes),
            bytes => Err(AnswerError::Length {
                found: bytes.len(),
                wanted,
            }),
        };
        Ok(Encrypted {
            nonce: match find(&self.0, tag::IV_COUNTER_NONCE) {
                Some(_) => Some(sized(tag::IV_COUNTER_NONCE, NONCE_LEN)?),
                None => None,
            },
            data: sized(tag::DATA, len)?,
            tag: sized(tag::AUTHENTICATED_ENCRYPTION_TAG, TAG_LEN)?,
        })
    }

    /// What was decrypted.
    ///
    /// # Errors
    /// [`AnswerError`], if it is not there, or there is no memory for it.
    pub fn decrypted(&self) -> Result<SecretBytes, AnswerError> {
        secret(&self.0, tag::DATA)
    }
}

fn find<'i, 'a>(items: &'i [Item<'a>], tag: Tag) -> Option<&'i Value<'a>> {
    items.iter().find(|item| item.tag == tag).map(|item| &item.value)
}

/// The items of the structure `tag` among these.
fn take<'a>(items: Vec<Item<'a>>, tag: Tag) -> Result<Vec<Item<'a>>, AnswerError> {
    match items.into_iter().find(|item| item.tag == tag) {
        Some(Item {
            value: Value::Structure(items),
            ..
        }) => Ok(items),
        _ => Err(AnswerError::Lacks(tag)),
    }
}

fn byte_string<'a>(items: &[Item<'a>], tag: Tag) -> Result<&'a [u8], AnswerError> {
    match find(items, tag) {
        Some(Value::ByteString(bytes)) => Ok(bytes),
        _ => Err(AnswerError::Lacks(tag)),
    }
}

fn secret(items: &[Item<'_>], tag: Tag) -> Result<SecretBytes, AnswerError> {
    let bytes = byte_string(items, tag)?;
    let mut secret = SecretBytes::zeroed(bytes.len())?;
    secret.copy_from_slice(bytes);
    Ok(secret)
}

/// The front of a server's text, without what a terminal would act on.
fn showable(text: &str) -> String {
    const SHOWN: usize = 200;
    text.chars().take(SHOWN).filter(|c| !c.is_control()).collect()
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.reason, reason_name(self.reason)) {
            (_, Some(name)) => f.write_str(name)?,
            (Some(reason), None) => write!(f, "Result Reason {reason:#x}")?,
            (None, None) => write!(f, "Result Status {:#x}", self.status)?,
        }
        match self.message.as_str() {
            "" => Ok(()),
            message => write!(f, ": {message:?}"),
        }
    }
}

impl std::error::Error for Refusal {}

/// The specification's name of a Result Reason.
fn reason_name(reason: Option<u32>) -> Option<&'static str> {
    Some(match reason? {
        0x01 => "Item Not Found",
        0x02 => "Response Too Large",
        0x03 => "Authentication Not Successful",
        0x04 => "Invalid Message",
        0x05 => "Operation Not Supported",
        0x06 => "Missing Data",
        0x07 => "Invalid Field",
        0x08 => "Feature Not Supported",
        0x0a => "Cryptographic Failure",
        0x0b => "Illegal Operation",
        0x0c => "Permission Denied",
        0x0d => "Object Archived",
        0x10 => "Key Format Type Not Supported",
        0x16 => "Sensitive",
        0x17 => "Not Extractable",
        0x36 => "Object Destroyed",
        0x37 => "Object Not Found",
        0x39 => "Not Authorised",
        0x43 => "Wrong Key Lifecycle State",
        0x100 => "General Failure",
        _ => return None,
    })
}
