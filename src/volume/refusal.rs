//! What sealblk does not serve, and why: a volume whose header is sound, but which it would read wrongly, or which
//! somebody else is in the middle of changing.

use super::keyslot::{ENCRYPTION, KEY_LEN};
use super::metadata::{Digest, Id, Keyslot, Metadata, Segment};

/// Looks for anything in `metadata` that keeps sealblk from serving the volume.
pub(super) fn check(metadata: &Metadata) -> Result<(), Refusal> {
    if let Some(name) = metadata.config.mandatory().first() {
        // "offline-reencrypt", "online-reencrypt", "online-reencrypt-v2" …
        return Err(if name.contains("-reencrypt") {
            Refusal::MidReencryption
        } else {
            Refusal::Requirement { name: name.clone() }
        });
    }
    let reencrypts = |slot: &Keyslot| matches!(slot, Keyslot::Other(slot) if slot.kind == "reencrypt");
    if metadata.keyslots.values().any(reencrypts) {
        return Err(Refusal::MidReencryption);
    }
    metadata
        .segments
        .iter()
        .try_for_each(|(&id, segment)| check_segment(metadata, id, segment))?;
    if !metadata
        .segments
        .values()
        .any(|segment| matches!(segment, Segment::Crypt(_)))
    {
        return Err(Refusal::NotEncrypted);
    }
    Ok(())
}

fn check_segment(metadata: &Metadata, id: Id, segment: &Segment) -> Result<(), Refusal> {
    if let Some(flag) = segment.flags().first() {
        return Err(if flag.starts_with("backup-") || flag == "in-reencryption" {
            Refusal::MidReencryption
        } else {
            Refusal::SegmentFlag {
                segment: id,
                flag: flag.clone(),
            }
        });
    }
    let crypt = match segment {
        Segment::Crypt(crypt) => crypt,
        Segment::Linear(_) => return Ok(()),
        Segment::Other(other) => {
            return Err(Refusal::SegmentType {
                segment: id,
                kind: other.kind.clone(),
            });
        }
    };
    if crypt.integrity.is_some() {
        return Err(Refusal::Integrity { segment: id });
    }
    if crypt.encryption != ENCRYPTION {
        return Err(Refusal::Cipher {
            segment: id,
            encryption: crypt.encryption.clone(),
        });
    }
    let Some((_, digest)) = metadata.digest_of_segment(id) else {
        return Ok(()); // Metadata that were validated have one.
    };
    if let Digest::Other(digest) = digest {
        return Err(Refusal::DigestType {
            segment: id,
            kind: digest.kind.clone(),
        });
    }
    // The length of a segment's key stands nowhere but with the keyslots that hold it.
    let slots = digest
        .keyslots()
        .iter()
        .filter_map(|keyslot| metadata.keyslots.get(keyslot));
    for slot in slots {
        if let Keyslot::Luks2(slot) = slot
            && slot.key_size as usize != KEY_LEN
        {
            return Err(Refusal::KeySize {
                segment: id,
                bits: u64::from(slot.key_size) * 8,
            });
        }
    }
    Ok(())
}

/// Why a volume is not served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error(
        "it is in the middle of a reencryption; finish that with `cryptsetup repair` and \
         `cryptsetup reencrypt --resume-only`"
    )]
    MidReencryption,
    #[error("it requires {name:?} of whoever opens it, which this version of sealblk does not know")]
    Requirement { name: String },
    #[error("segment {segment} is encrypted with {encryption}; sealblk serves {ENCRYPTION} alone")]
    Cipher { segment: Id, encryption: String },
    #[error(
        "segment {segment} has a key of {bits} bits; sealblk serves {ENCRYPTION} with 512 bits (AES-256) alone"
    )]
    KeySize { segment: Id, bits: u64 },
    #[error("segment {segment} has sectors of {bytes} bytes; sealblk serves 512 and 4096")]
    SectorSize { segment: Id, bytes: u32 },
    #[error("segment {segment} has integrity protection (dm-integrity), which sealblk does not serve")]
    Integrity { segment: Id },
    #[error("segment {segment} is of type {kind:?}, which sealblk does not serve")]
    SegmentType { segment: Id, kind: String },
    #[error("segment {segment} has the flag {flag:?}, which this version of sealblk does not know")]
    SegmentFlag { segment: Id, flag: String },
    #[error(
        "the digest of segment {segment} is of type {kind:?}, which this version of sealblk does not know"
    )]
    DigestType { segment: Id, kind: String },
    #[error("segment {segment} has a dynamic size, and is not the last")]
    DynamicNotLast { segment: Id },
    #[error("two segments overlap at byte {offset} of the payload")]
    SegmentsOverlap { offset: u64 },
    #[error(
        "segment {segment} starts where the header is: the header is detached from its payload; name both"
    )]
    Detached { segment: Id },
    #[error("it has no encrypted segment")]
    NotEncrypted,
    #[error(
        "segment {segment} needs the payload to be {needed} bytes long, and it has {payload_len}; the file or device was \
         cut short"
    )]
    PayloadTruncated {
        segment: Id,
        needed: u64,
        payload_len: u64,
    },
    #[error("the payload's {payload_len} bytes do not make whole sectors of {sector_size} bytes")]
    PayloadUnaligned { payload_len: u64, sector_size: u64 },
}
