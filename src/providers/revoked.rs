//! KEKs that were revoked on this host: the host does not use them, even if their source would still give them out.
//!
//! ```text
//! revoked/HASH.json    in the state directory; the SHA-256 of provider and key ID
//! ```
//!
//! A native provider derives its KEKs, and a transit provider lets its server unwrap them: neither has a record of a single
//! KEK that could hold a state. So this directory holds the state, for all kinds of providers. The files stay when their
//! provider is removed, so that a provider that is restored from a backup does not restore revoked keys.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::file_name;
use crate::keys::KeyId;
use crate::parsing;
use crate::timestamp::Timestamp;
use sealblk_secmem::private_file;

/// The revoked KEKs of one provider.
#[derive(Debug)]
pub(super) struct Revoked {
    dir: PathBuf,
    provider: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Record {
    provider: String,
    key_id: KeyId,
    revoked: Timestamp,
}

/// A KEK that is not used any more.
#[derive(Debug, thiserror::Error)]
#[error("the key was revoked on this host{}", .0.map(|since| format!(" at {since}")).unwrap_or_default())]
pub(super) struct RevokedHere(Option<Timestamp>);

impl Revoked {
    /// Those of `provider`, in the state directory `state_dir`.
    pub(super) fn of(state_dir: &Path, provider: &str) -> Self {
        Self {
            dir: state_dir.join("revoked"),
            provider: provider.to_owned(),
        }
    }

    /// Where it is written down.
    pub(super) fn location(&self) -> &Path {
        &self.dir
    }

    /// Whether `key_id` is among them. A record that cannot be understood counts.
    ///
    /// # Errors
    /// If that cannot be told.
    pub(super) fn find(&self, key_id: &KeyId) -> io::Result<Option<RevokedHere>> {
        match fs::read(self.file(key_id)) {
            Ok(record) => {
                let record: Option<Record> = parsing::json(&record).ok();
                Ok(Some(RevokedHere(record.map(|record| record.revoked))))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Adds `key_id`. It is on stable storage when this returns.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) fn add(&self, key_id: &KeyId) -> io::Result<()> {
        private_file::ensure_dir_in_state(&self.dir)?;
        let record = Record {
            provider: self.provider.clone(),
            key_id: key_id.clone(),
            revoked: Timestamp::now(),
        };
        let text = serde_json::to_vec(&record).expect("texts are JSON");
        match private_file::create_in_state(&self.file(key_id), &text) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            result => result,
        }
    }

    fn file(&self, key_id: &KeyId) -> PathBuf {
        self.dir.join(file_name(&self.provider, key_id) + ".json")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_revoked_for_its_provider_alone_and_for_good() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (Revoked::of(dir.path(), "one"), Revoked::of(dir.path(), "two"));
        let (key, other) = (KeyId("k".into()), KeyId("../k".into()));
        assert!(one.find(&key).unwrap().is_none());
        one.add(&key).unwrap();
        let first = one.find(&key).unwrap().unwrap().to_string();
        one.add(&key).unwrap();
        assert_eq!(one.find(&key).unwrap().unwrap().to_string(), first);
        assert!(two.find(&key).unwrap().is_none() && one.find(&other).unwrap().is_none());
        fs::write(one.file(&key), "").unwrap();
        assert!(one.find(&key).unwrap().is_some(), "what is damaged counts");
    }
}
