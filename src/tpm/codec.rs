//! Bytes as a TPM has them: integers big-endian, arrays after their length (TPM2B), and the structures of the TPM 2.0 Library,
//! part 2; and bytes as text.
//!
//! tpm2-protocol writes and reads the structures. Its buffers have a fixed size, are copied with their structures, and are never
//! wiped. So secrets do not go through them: they are slices, written and read in place.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use sha2::{Digest, Sha256};
use tpm2_protocol::{TpmMarshal, TpmSized, TpmUnmarshal, TpmWriter};

/// Writes bytes.
pub(super) trait Marshal {
    fn u16(&mut self, value: u16);
    fn u32(&mut self, value: u32);
    fn sized(&mut self, bytes: &[u8]);
    /// A structure that holds no secret: it is copied about on the stack.
    fn put(&mut self, structure: &(impl TpmMarshal + TpmSized));
}

impl Marshal for Vec<u8> {
    fn u16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_be_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_be_bytes());
    }

    fn sized(&mut self, bytes: &[u8]) {
        self.u16(u16::try_from(bytes.len()).expect("what we send is short"));
        self.extend_from_slice(bytes);
    }

    fn put(&mut self, structure: &(impl TpmMarshal + TpmSized)) {
        let at = self.len();
        self.resize(at + structure.len(), 0);
        let marshalled = structure.marshal(&mut TpmWriter::new(&mut self[at..]));
        marshalled.expect("its parts fit together, and it has room");
    }
}

/// The bytes of a structure that holds no secret.
pub(super) fn marshalled(structure: &(impl TpmMarshal + TpmSized)) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.put(structure);
    bytes
}

/// Reads bytes: those that are left.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.take(2)?.try_into().ok()?))
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.take(4)?.try_into().ok()?))
    }

    /// A structure that holds no secret: it is copied about on the stack.
    pub(super) fn get<T: TpmUnmarshal>(&mut self) -> Option<T> {
        let (structure, rest) = T::unmarshal(self.0).ok()?;
        self.0 = rest;
        Some(structure)
    }

    pub(super) fn sized(&mut self) -> Option<&'a [u8]> {
        let len = self.u16()?;
        self.take(len.into())
    }
}

/// The Name of an object (part 1, 16): the hash of its TPMT_PUBLIC.
pub fn object_name(public: &[u8]) -> [u8; 34] {
    let mut name = [0; 34];
    name[..2].copy_from_slice(&0x000b_u16.to_be_bytes());
    name[2..].copy_from_slice(&Sha256::digest(public));
    name
}

/// Bytes as base64.
pub(super) mod text {
    use super::{BASE64_STANDARD, Engine};
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::parsing::{broken, rule};

    pub(in crate::tpm) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64_STANDARD.encode(bytes))
    }

    pub(in crate::tpm) fn deserialize<'d, D: Deserializer<'d>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        BASE64_STANDARD.decode(text).map_err(|_| broken(rule::BASE64))
    }
}
