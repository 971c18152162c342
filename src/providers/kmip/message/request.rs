//! Requests to a KMIP server.

use super::{ANSWER_LIMIT, PRODUCT, TAG_LEN, VERSIONS, Version, tag, value};
use crate::providers::{kmip::ttlv::Item, kmip::ttlv::Tag, kmip::ttlv::Value};
use sealblk_secmem::{arena::ArenaError, arena::SecretBytes};

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
    /// The Unique Identifier among them, which tells how the server itself spells it.
    GetIdentifier(&'a str),
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

impl Request<'_> {
    /// The number of the operation.
    pub fn operation(&self) -> u32 {
        self.number_and_name().0
    }

    /// Its name, for people.
    pub fn name(&self) -> &'static str {
        self.number_and_name().1
    }

    fn number_and_name(&self) -> (u32, &'static str) {
        match self {
            Request::Create { .. } => (0x01, "Create"),
            Request::Locate { .. } => (0x08, "Locate"),
            Request::Get { .. } => (0x0a, "Get"),
            Request::GetState(_) | Request::GetIdentifier(_) => (0x0b, "Get Attributes"),
            Request::AddAttribute { .. } => (0x0d, "Add Attribute"),
            Request::Activate(_) => (0x12, "Activate"),
            Request::Revoke(_) => (0x13, "Revoke"),
            Request::Destroy(_) => (0x14, "Destroy"),
            Request::DiscoverVersions => (0x1e, "Discover Versions"),
            Request::Encrypt { .. } => (0x1f, "Encrypt"),
            Request::Decrypt { .. } => (0x20, "Decrypt"),
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
                integer(tag::MAXIMUM_RESPONSE_SIZE, ANSWER_LIMIT as i32),
                integer(tag::BATCH_COUNT, 1),
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
            } => create(version, name, mark, sensitive),
            Request::Locate { name } => locate(version, name),
            Request::Get { key, wrapped_by } => {
                let format = enumeration(tag::KEY_FORMAT_TYPE, value::KEY_FORMAT_RAW);
                let mut payload = vec![unique_identifier(key), format];
                payload.extend(wrapped_by.map(key_wrap));
                payload
            }
            Request::GetState(key) => get_attribute(version, key, "State", tag::STATE),
            Request::GetIdentifier(key) => {
                get_attribute(version, key, "Unique Identifier", tag::UNIQUE_IDENTIFIER)
            }
            Request::AddAttribute { key, attribute } => add_attribute(version, key, attribute),
            Request::Activate(key) | Request::Destroy(key) => vec![unique_identifier(key)],
            Request::Revoke(key) => {
                let reason = enumeration(tag::REVOCATION_REASON_CODE, value::CESSATION_OF_OPERATION);
                let reason = Item::structure(tag::REVOCATION_REASON, [reason]);
                vec![unique_identifier(key), reason]
            }
            Request::Encrypt {
                key,
                nonce,
                additional,
                data,
            } => with_gcm(key, nonce, additional, data).into(),
            Request::Decrypt {
                key,
                nonce,
                additional,
                data,
                tag,
            } => {
                let mut payload = Vec::from(with_gcm(key, nonce, additional, data));
                payload.push(bytes(tag::AUTHENTICATED_ENCRYPTION_TAG, tag));
                payload
            }
        }
    }
}

fn get_attribute<'a>(version: Version, key: &'a str, name: &'a str, tag: Tag) -> Vec<Item<'a>> {
    let wanted = match version.has_attribute_items() {
        true => enumeration(tag::ATTRIBUTE_REFERENCE, tag.0),
        false => text(tag::ATTRIBUTE_NAME, name),
    };
    vec![unique_identifier(key), wanted]
}

fn create(version: Version, name: &str, mark: Mark, sensitive: bool) -> Vec<Item<'_>> {
    let mut attributes = Attributes::of(version);
    attributes.add(
        "Cryptographic Algorithm",
        enumeration(tag::CRYPTOGRAPHIC_ALGORITHM, value::ALGORITHM_AES),
    );
    attributes.add("Cryptographic Length", integer(tag::CRYPTOGRAPHIC_LENGTH, 256));
    attributes.add(
        "Cryptographic Usage Mask",
        integer(tag::CRYPTOGRAPHIC_USAGE_MASK, value::ENCRYPT_DECRYPT),
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

fn locate(version: Version, name: &str) -> Vec<Item<'_>> {
    let mut attributes = Attributes::of(version);
    attributes.add("Name", name_item(name));
    attributes.add("State", enumeration(tag::STATE, value::STATE_ACTIVE));
    let mut payload = vec![integer(tag::MAXIMUM_ITEMS, 1)];
    payload.extend(attributes.within(tag::ATTRIBUTES));
    payload
}

fn add_attribute<'a>(version: Version, key: &'a str, attribute: Use<'a>) -> Vec<Item<'a>> {
    let mut attributes = Attributes::of(version);
    match attribute {
        Use::Custom { name, content } => attributes.add_custom(name, content),
        Use::Application(data) => attributes.add_application(data),
    }
    let mut payload = vec![unique_identifier(key)];
    payload.extend(attributes.within(tag::NEW_ATTRIBUTE));
    payload
}

/// What Encrypt and Decrypt have in common.
fn with_gcm<'a>(key: &'a str, nonce: &'a [u8], additional: &'a [u8], data: &'a [u8]) -> [Item<'a>; 5] {
    [
        unique_identifier(key),
        gcm(),
        bytes(tag::DATA, data),
        bytes(tag::IV_COUNTER_NONCE, nonce),
        bytes(tag::AUTHENTICATED_ENCRYPTION_ADDITIONAL_DATA, additional),
    ]
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

    /// As they stand in a payload: from 2.0 on in a structure.
    fn within(self, structure: Tag) -> Vec<Item<'a>> {
        match self.version.has_attribute_items() {
            true => vec![Item::structure(structure, self.items)],
            false => self.items,
        }
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

fn integer(tag: Tag, value: i32) -> Item<'static> {
    Item::new(tag, Value::Integer(value))
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
            integer(tag::TAG_LENGTH, TAG_LEN as i32),
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
