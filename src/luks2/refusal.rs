//! Volumes that sealblk refuses to serve, and the reasons: the header is valid, but sealblk would read the volume
//! wrongly, or another program has not finished a change of it.
//!
//! Nothing authenticates a header: its checksum needs no key. So sealblk serves only a single encrypted segment. An attacker
//! with write access to the storage could add a `linear` segment, which would store in clear what the guest takes for
//! encrypted.

use crate::keyslot::{ENCRYPTION, KEY_LEN};
use crate::metadata::{CryptSegment, Digest, Id, Keyslot, Metadata, Pbkdf2Digest, Segment};

/// The requirement that erasure puts into a header first: a volume with it opens no more.
pub(crate) const MARK: &str = "sealblk-erase";

/// The one segment that there is to serve, and the digest that tells its key.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Served<'m> {
    pub(crate) id: Id,
    pub(crate) segment: &'m CryptSegment,
    pub(crate) digest_id: Id,
    pub(crate) digest: &'m Pbkdf2Digest,
}

/// Looks for anything in `metadata` that keeps sealblk from serving the volume.
pub(crate) fn check(metadata: &Metadata) -> Result<Served<'_>, Refusal> {
    if let Some(name) = metadata.config.mandatory().first() {
        // "offline-reencrypt", "online-reencrypt", "online-reencrypt-v2" …
        return Err(if name.contains("-reencrypt") {
            Refusal::MidReencryption
        } else if name == MARK {
            Refusal::MidErasure
        } else {
            Refusal::Requirement { name: name.clone() }
        });
    }
    let reencrypts = |slot: &Keyslot| matches!(slot, Keyslot::Other(slot) if slot.kind == "reencrypt");
    if metadata.keyslots.values().any(reencrypts) {
        return Err(Refusal::MidReencryption);
    }
    let mut served = None;
    for (&id, segment) in &metadata.segments {
        served = Some(check_segment(metadata, id, segment)?);
    }
    match (served, metadata.segments.len()) {
        (Some(served), 1) => Ok(served),
        (_, count) => Err(Refusal::Segments { count }),
    }
}

fn check_segment<'m>(metadata: &'m Metadata, id: Id, segment: &'m Segment) -> Result<Served<'m>, Refusal> {
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
        Segment::Linear(_) => return Err(Refusal::NotEncrypted { segment: id }),
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
    let (digest_id, digest) = match metadata.digest_of_segment(id) {
        Some((digest_id, Digest::Pbkdf2(digest))) => (digest_id, digest),
        Some((_, Digest::Other(digest))) => {
            return Err(Refusal::DigestType {
                segment: id,
                kind: digest.kind.clone(),
            });
        }
        // Metadata that were validated have one.
        None => return Err(Refusal::NoDigest { segment: id }),
    };
    // The length of a segment's key stands nowhere but with the keyslots that hold it.
    let slots = digest
        .keyslots
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
    Ok(Served {
        id,
        segment: crypt,
        digest_id,
        digest,
    })
}

/// Why a volume is not served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error(
        "its reencryption is not finished; finish it with `cryptsetup repair` and \
         `cryptsetup reencrypt --resume-only`"
    )]
    MidReencryption,
    #[error("its erasure has begun, so it can no longer be opened; finish the erasure")]
    MidErasure,
    #[error("it has the requirement {name:?}, which this version of sealblk does not know")]
    Requirement { name: String },
    #[error("segment {segment} is encrypted with {encryption}; sealblk serves only {ENCRYPTION}")]
    Cipher { segment: Id, encryption: String },
    #[error(
        "segment {segment} has a key of {bits} bits; sealblk serves {ENCRYPTION} only with 512 bits (AES-256)"
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
    #[error("segment {segment} has no digest for its key")]
    NoDigest { segment: Id },
    #[error(
        "it has {count} segments, but sealblk serves only one; if this is not intended, the header was altered: restore a \
         backup of it with `cryptsetup luksHeaderRestore`"
    )]
    Segments { count: usize },
    #[error(
        "the data of segment {segment} are not encrypted (its type is \"linear\"); if this is not intended, the header was \
         altered: restore a backup of it with `cryptsetup luksHeaderRestore`"
    )]
    NotEncrypted { segment: Id },
    #[error(
        "segment {segment} overlaps the header, so the header is detached from its payload; name both files"
    )]
    Detached { segment: Id },
    #[error(
        "segment {segment} needs a payload of {needed} bytes, but it has {payload_len}: the file or \
         device was truncated; restore it from a backup, or restore the size of the device"
    )]
    PayloadTruncated {
        segment: Id,
        needed: u64,
        payload_len: u64,
    },
    #[error("the payload's {payload_len} bytes do not make whole sectors of {sector_size} bytes")]
    PayloadUnaligned { payload_len: u64, sector_size: u64 },
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::testing::{parsed, sample, sample_with};

    fn refused(json: &Value) -> Refusal {
        check(&parsed(json).unwrap()).unwrap_err()
    }

    #[test]
    fn a_plain_volume_is_served() {
        assert_eq!(check(&parsed(&sample()).unwrap()).unwrap().id, Id(0));
    }

    #[test]
    fn a_requirement_is_refused_by_name() {
        for name in [
            "online-reencrypt",
            "online-reencrypt-v2",
            "online-reencrypt-v9",
            "offline-reencrypt",
        ] {
            let json = sample_with("/config/requirements", json!({"mandatory": [name]}));
            assert_eq!(refused(&json), Refusal::MidReencryption);
        }
        for name in ["opal", "sealblk-later", ""] {
            let json = sample_with("/config/requirements", json!({"mandatory": [name]}));
            assert_eq!(
                refused(&json),
                Refusal::Requirement {
                    name: name.to_owned()
                }
            );
        }
        // What is not mandatory is none of our business.
        let json = sample_with(
            "/config/requirements",
            json!({"mandatory": [], "optional": ["x"]}),
        );
        check(&parsed(&json).unwrap()).unwrap();
    }

    #[test]
    fn traces_of_a_reencryption_are_refused_without_its_requirement() {
        let slot = json!({"type": "reencrypt", "key_size": 1, "area": {"offset": "290816", "size": "4096"}});
        assert_eq!(
            refused(&sample_with("/keyslots/1", slot)),
            Refusal::MidReencryption
        );
        for flag in [
            "backup-previous",
            "backup-final",
            "backup-moved-segment",
            "in-reencryption",
        ] {
            assert_eq!(
                refused(&sample_with("/segments/0/flags", json!([flag]))),
                Refusal::MidReencryption
            );
        }
    }

    #[test]
    fn what_would_be_read_wrongly_is_refused() {
        let encryption = "aes-xts-plain64be".to_owned();
        assert_eq!(
            refused(&sample_with("/segments/0/encryption", encryption.clone())),
            Refusal::Cipher {
                segment: Id(0),
                encryption
            }
        );
        let integrity =
            json!({"type": "hmac(sha256)", "journal_encryption": "none", "journal_integrity": "none"});
        assert_eq!(
            refused(&sample_with("/segments/0/integrity", integrity)),
            Refusal::Integrity { segment: Id(0) }
        );
        assert_eq!(
            refused(&sample_with("/segments/0/flags", json!(["new-flag"]))),
            Refusal::SegmentFlag {
                segment: Id(0),
                flag: "new-flag".to_owned()
            }
        );
        for kind in ["hw-opal", "hw-opal-crypt", "zoned"] {
            let kind = kind.to_owned();
            assert_eq!(
                refused(&sample_with("/segments/0/type", kind.clone())),
                Refusal::SegmentType { segment: Id(0), kind }
            );
        }
        assert_eq!(
            refused(&sample_with("/keyslots/0/key_size", 32)),
            Refusal::KeySize {
                segment: Id(0),
                bits: 256
            }
        );
        assert_eq!(
            refused(&sample_with("/digests/0/type", "other")),
            Refusal::DigestType {
                segment: Id(0),
                kind: "other".to_owned()
            }
        );
    }

    /// Whoever has the storage can write a header; a checksum is no signature. What the guest writes must not reach
    /// storage unencrypted, whatever segments he enters.
    #[test]
    fn no_header_makes_a_disk_of_plaintext() {
        let mut cut = sample();
        cut["segments"]["0"]["size"] = "4096".into();
        cut["segments"]["1"] = json!({"type": "linear", "offset": "16781312", "size": "dynamic"});
        assert_eq!(refused(&cut), Refusal::NotEncrypted { segment: Id(1) });
        cut["segments"]["1"] = cut["segments"]["0"].clone();
        cut["segments"]["1"]["offset"] = "16781312".into();
        cut["digests"]["0"]["segments"] = json!(["0", "1"]);
        assert_eq!(refused(&cut), Refusal::Segments { count: 2 });
        let linear = json!({"0": {"type": "linear", "offset": "16777216", "size": "dynamic"}});
        assert_eq!(
            refused(&sample_with("/segments", linear)),
            Refusal::NotEncrypted { segment: Id(0) }
        );
    }
}
