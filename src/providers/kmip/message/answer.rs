//! The answers of a KMIP server.

use std::fmt;

use super::{LONGEST_IDENTIFIER, NONCE_LEN, TAG_LEN, Version, identifies, tag, value};
use crate::keys::KeyState;
use crate::providers::{kmip::ttlv::Item, kmip::ttlv::Malformed, kmip::ttlv::Tag, kmip::ttlv::Value};
use sealblk_secmem::{arena::ArenaError, arena::SecretBytes};

/// Why an answer is none, or brings nothing.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // The texts say it.
pub enum AnswerError {
    #[error("it is not TTLV")]
    Malformed(#[from] Malformed),
    #[error("it lacks the item {0}, or has one of another type")]
    Lacks(Tag),
    #[error("it answers operation {answered:#x}, but the request was for {asked:#x}")]
    OtherOperation { answered: u32, asked: u32 },
    #[error("the key has the state {0:#x}, which is unknown")]
    State(u32),
    #[error("it has {found} bytes instead of {wanted}")]
    Length { found: usize, wanted: usize },
    #[error("its Unique Identifier is empty, longer than {LONGEST_IDENTIFIER} bytes, or not visible ASCII")]
    Identifier,
    #[error("it has the key in clear, but a wrapped key was requested")]
    InClear,
    #[error("it has a wrapped key, but a key in clear was requested")]
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
        let Some(Value::Enumeration(state)) = self.attribute("State", tag::STATE) else {
            return Err(AnswerError::Lacks(tag::STATE));
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

    /// A key's Unique Identifier as its server spells it: the attribute, or else what the answer is about.
    ///
    /// # Errors
    /// [`AnswerError`], if the answer has neither, or a text that [`identifies`] does not let through.
    pub fn identifier(&self) -> Result<&'a str, AnswerError> {
        match self.attribute("Unique Identifier", tag::UNIQUE_IDENTIFIER) {
            Some(Value::TextString(text)) if identifies(text) => Ok(text),
            Some(_) => Err(AnswerError::Identifier),
            None => self.unique_identifier(),
        }
    }

    /// An attribute among those that were asked for: by its name up to KMIP 1.4, by its tag from 2.0 on.
    fn attribute(&self, name: &str, tag: Tag) -> Option<Value<'a>> {
        self.0.iter().find_map(|item| match item {
            Item {
                tag: tag::ATTRIBUTE,
                value: Value::Structure(items),
            } if find(items, tag::ATTRIBUTE_NAME) == Some(&Value::TextString(name)) => {
                find(items, tag::ATTRIBUTE_VALUE).cloned()
            }
            Item {
                tag: tag::ATTRIBUTES,
                value: Value::Structure(items),
            } => find(items, tag).cloned(),
            _ => None,
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
    Ok(SecretBytes::copy_of(byte_string(items, tag)?)?)
}

/// The front of a server's text, without what a terminal would act on.
fn showable(text: &str) -> String {
    const SHOWN: usize = 200;
    text.chars().take(SHOWN).filter(|c| !c.is_control()).collect()
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
