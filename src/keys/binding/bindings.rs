//! The bindings of a volume, for the list of volumes: read without a key.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::token::sealblk_tokens;
use crate::{Binding, KeyError, KeyId, Providers};
use sealblk_base::timestamp::Timestamp;
use sealblk_luks2::metadata::Base64;
use sealblk_luks2::{Header, HeaderError, HeaderIo, Reason, VolumeError, read_unlocked};

/// A volume and the KEKs that open it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bindings {
    /// UUID in the header.
    pub uuid: Uuid,
    /// One for each sealblk token that can be read.
    pub to: Vec<BoundTo>,
}

/// A KEK that opens a keyslot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BoundTo {
    /// Its provider's name.
    pub provider: String,
    /// The KEK.
    pub key_id: KeyId,
    /// The keyslot.
    pub keyslot: u32,
    /// When the keyslot was bound to it, if the token tells.
    pub since: Option<Timestamp>,
}

/// A KEK that a header names, and whether it opens the keyslot indeed.
#[derive(Debug)]
pub struct Proof {
    /// The KEK.
    pub to: BoundTo,
    /// If not: why its provider does not confirm it.
    pub proved: Result<(), KeyError>,
}

impl Bindings {
    /// Whether it is bound to a key for longer than `age`. One of which nobody knows since when counts: it cannot be shown to be
    /// younger. So does a rekey that was interrupted.
    pub fn are_older_than(&self, age: Duration) -> bool {
        self.to.len() > 1
            || self
                .to
                .iter()
                .any(|to| to.since.is_none_or(|since| since.may_be_older_than(age)))
    }

    /// Reads the header, whoever has it open. No lock is waited for: while one copy is written, the other is whole, and
    /// whoever looks at many volumes must not hang on one whose lock somebody keeps.
    ///
    /// # Errors
    /// Where there is no LUKS2 header, or both its copies are damaged.
    pub fn read(io: &dyn HeaderIo) -> Result<Self, HeaderError> {
        Ok(Self::of(read_unlocked(io)?.header()))
    }

    /// What of it the providers confirm, in the order of `to`: a header can name any key, and only the one that has wrapped a
    /// secret for this volume unwraps it.
    ///
    /// # Errors
    /// [`VolumeError`], as for [`Bindings::read`].
    pub fn prove(io: &dyn HeaderIo, providers: &dyn Providers) -> Result<Vec<Proof>, VolumeError> {
        let found = read_unlocked(io).map_err(|error| Reason::from(error).at(io.path()))?;
        let header = found.header();
        let tokens = sealblk_tokens(header.metadata()).into_iter();
        let wrapped = tokens.map(|(.., token)| token.wrapped_slot_secret);
        let unwrap = |(to, wrapped): (BoundTo, Base64)| {
            let binding = Binding {
                volume: header.uuid(),
                provider: &to.provider,
                key_id: &to.key_id,
                keyslot: to.keyslot,
            };
            let unwrapped = providers
                .provider(&to.provider)
                .and_then(|provider| provider.unwrap(&binding, &wrapped.0));
            let proved = unwrapped.map(drop);
            Proof { to, proved }
        };
        Ok(Self::of(header).to.into_iter().zip(wrapped).map(unwrap).collect())
    }

    /// Those in `header`.
    pub fn of(header: &Header) -> Self {
        let to = sealblk_tokens(header.metadata()).into_iter();
        Self {
            uuid: header.uuid(),
            to: to
                .map(|(_, keyslot, token)| BoundTo {
                    provider: token.provider,
                    key_id: token.key_id,
                    keyslot: keyslot.0,
                    since: token.bound,
                })
                .collect(),
        }
    }
}
