//! A key backup: a key in a LUKS2 header without a disk. cryptsetup can open it like any other header.
//!
//! ```text
//! 0                16 KiB            32 KiB                            284 KiB
//! +----------------+-----------------+---------------------------------+
//! | binary header  | binary header   | keyslot 0: the key, split and   |  a payload of no bytes
//! | JSON area      | JSON area       | encrypted under argon2id        |
//! +----------------+-----------------+---------------------------------+
//! ```
//!
//! The backed up key is stored as LUKS2's volume key. The token has the purpose of the key, and the SHA-256 of the keyslots
//! area, which LUKS2's own checksums do not cover. So every bit of the file is checked, and a damaged backup is detected
//! before an operator relies on it. A user with write access to the file can of course replace it by another backup.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use sealblk_base::size::in_memory;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::binary::{BinaryHeader, Text};
use crate::copies::{self, Found, Header};
use crate::create::{COPY_LEN, metadata, random_uuid};
use crate::error::{Reason, VolumeError};
use crate::hash::Hash;
use crate::header_io::HeaderIo;
use crate::kdf::{Argon2Cost, Budget};
use crate::keyslot::{self, AREA_LEN, NewKeyslot};
use crate::lock::LockMode;
use crate::metadata::{Id, Keyslot, Other, SegmentSize, Token};
use crate::refusal;
use crate::update::{add_token, place, random_fill};
use sealblk_base::sector::SectorSize;
use sealblk_secmem::arena::SecretBytes;

/// Where the keyslots area ends, and the file.
const END: u64 = 2 * COPY_LEN + AREA_LEN;
/// Where the unused half of the checksum is in the binary header (LUKS2 1.1, "Binary Header", `csum`).
const UNUSED: u64 = 448 + 32;
/// What the token calls the hash of the keyslots area.
const AREA_HASH: &str = "keyslots_area_sha256";

/// A key out of a backup, and what it is for.
#[derive(Debug)]
pub struct Contents {
    /// The key.
    pub key: SecretBytes,
    /// What was written beside it, by name.
    pub about: Vec<(String, String)>,
}

/// Puts `key`, of 64 bytes, under `passphrase` in a header that is made in `io`, an empty file. The token gets the type
/// `kind`, and `about` as its fields.
///
/// # Errors
/// Where the file cannot be written.
pub fn write(
    io: &dyn HeaderIo,
    key: &SecretBytes,
    passphrase: &SecretBytes,
    cost: Argon2Cost,
    kind: &str,
    about: &[(&str, &str)],
) -> Result<(), VolumeError> {
    let write = || {
        let _lock = io.lock(LockMode::Write).map_err(Reason::Lock)?;
        io.set_size(END)
            .map_err(|source| Reason::Grow { len: END, source })?;
        let size = SegmentSize::Dynamic;
        let mut header = Header::new(
            BinaryHeader {
                header_size: COPY_LEN,
                seqid: 0,
                label: Text::EMPTY,
                checksum: Hash::Sha256,
                salt: [0; 64],
                uuid: random_uuid()?,
                subsystem: Text::EMPTY,
            },
            metadata(key, END, size, SectorSize::B512, AREA_LEN)?,
        )?;
        random_fill(io, 2 * COPY_LEN..END).map_err(Reason::Prepare)?;
        let encrypted = NewKeyslot::for_passphrase(key, passphrase, cost).map_err(Reason::NewKeyslot)?;
        place(&mut header, Id(0), encrypted, &[])?.store(io)?;
        let mut fields = Other::new();
        for (name, value) in about {
            fields.insert((*name).to_owned(), Value::String((*value).to_owned()));
        }
        fields.insert(AREA_HASH.to_owned(), area_hash(io)?.into());
        let token = Token {
            kind: kind.to_owned(),
            keyslots: vec![Id(0)],
            other: fields,
        };
        add_token(&mut header.metadata, token)?;
        header.commit(io)?;
        Ok(())
    };
    write().map_err(|reason: Reason| reason.at(io.path()))
}

/// Takes the key out of what [`write`] has made with the same `kind`, read anew from storage.
///
/// # Errors
/// [`Reason::NoVault`] if it is none, or was damaged; [`Reason::WrongBackupPassphrase`].
pub fn read(io: &dyn HeaderIo, passphrase: &SecretBytes, kind: &str) -> Result<Contents, VolumeError> {
    let read = || {
        let no_vault = |what| Reason::NoVault { what };
        let _lock = io.lock(LockMode::Read).map_err(Reason::Lock)?;
        if io.size().map_err(Reason::Length)? != END {
            return Err(no_vault("it does not have the length of a backup"));
        }
        io.forget_cached(0..END).map_err(Reason::ForgetCached)?;
        let header = match copies::read(io)? {
            Found::Sound(header) => header,
            Found::NeedsRecovery(_) => return Err(no_vault("one copy of its header is damaged")),
        };
        if (0..2).any(|copy| !unused_is_zero(io, copy * COPY_LEN).unwrap_or(false)) {
            return Err(no_vault("a checksum in its header is damaged"));
        }
        let metadata = &header.metadata;
        let token = metadata.tokens.values().find(|token| token.kind == kind);
        let fields = &token.ok_or(no_vault("it holds another key"))?.other;
        if fields.get(AREA_HASH) != Some(&area_hash(io)?.into()) {
            return Err(no_vault("its keyslot is damaged"));
        }
        let served = refusal::check(metadata)?;
        let Some(Keyslot::Luks2(slot)) = metadata.keyslots.get(&Id(0)) else {
            return Err(no_vault("it has no keyslot"));
        };
        let failed = |source| Reason::Keyslot { keyslot: 0, source };
        let mut budget = Budget::default();
        budget
            .spend(&slot.kdf, served.digest.iterations)
            .map_err(|source| failed(source.into()))?;
        let key = keyslot::open(io, slot, passphrase).map_err(failed)?;
        if !keyslot::verify(served.digest, &key).map_err(failed)? {
            return Err(Reason::WrongBackupPassphrase);
        }
        let texts = fields
            .iter()
            .filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned())));
        Ok(Contents {
            key,
            about: texts.filter(|(name, _)| name != AREA_HASH).collect(),
        })
    };
    read().map_err(|reason| reason.at(io.path()))
}

/// Whether the bytes are zero that SHA-256 leaves of a copy's checksum, which nothing else covers.
fn unused_is_zero(io: &dyn HeaderIo, copy: u64) -> std::io::Result<bool> {
    let mut unused = [0; 32];
    io.read_at(&mut unused, copy + UNUSED)?;
    Ok(unused == [0; 32])
}

fn area_hash(io: &dyn HeaderIo) -> Result<String, Reason> {
    let mut area = vec![0; in_memory(AREA_LEN)];
    io.read_at(&mut area, 2 * COPY_LEN).map_err(Reason::ReadArea)?;
    Ok(BASE64_STANDARD.encode(Sha256::digest(&area)))
}
