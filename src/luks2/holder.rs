//! Which host has a volume attached, by a token in its header: for storage whose locks do not reach other hosts.
//!
//! ```json
//! {"type": "sealblk-host", "keyslots": [], "sequence": "7", "ran": "5", "host": "8d5e…", "name": "node-a", "boot": "e976…",
//!  "process": "c1f0…", "since": "2026-11-30T18:12:00Z"}
//! ```
//!
//! A process that attaches the volume adds 1 to `sequence` and enters its host. When it detaches, the host goes and the sequence stays:
//!
//! ```json
//! {"type": "sealblk-host", "keyslots": [], "sequence": "7", "ran": "7"}
//! ```
//!
//! So the host is there as long as a process has the volume attached, and after a crash. A process of another host refuses the volume then.
//! A process of the same host does not: locks reach it, so the one that has entered the host has ended. `boot` is the same for all
//! processes of one kernel, in whichever container they run.
//!
//! `sequence` never names two attachments, since an operator names one by it (`--take-over`). `ran` is the last attachment that has ended
//! and whose guest ran: it says whether a guest has run elsewhere since it ran here. An attachment that has not ended may have a guest,
//! unless it is one of this `process`, which knows.
//!
//! An earlier release writes neither `ran` nor `process`. It gives the number of an attachment without a guest back, so that `sequence` is
//! `ran` there.

use sealblk_base::harmless::harmless;
use sealblk_base::parsing;
use sealblk_base::timestamp::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use crate::metadata::{Decimal, Metadata, Other, Token};

/// The type of the token.
pub(crate) const TYPE: &str = "sealblk-host";

/// A host, as its processes enter it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// Tells it from all other hosts, also after a boot. Nil: nothing tells it from others.
    pub id: Uuid,
    /// For people.
    pub name: String,
    /// Its boot; nil if it is not known.
    pub boot: Uuid,
}

/// The host that has a volume attached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// [`Host::id`].
    pub host: Uuid,
    /// [`Host::name`].
    pub name: String,
    /// [`Host::boot`].
    pub boot: Uuid,
    /// [`Terms::process`](crate::Terms::process). An earlier release does not tell.
    #[serde(default)]
    pub process: Option<Uuid>,
    /// Since when, by its clock.
    pub since: Timestamp,
}

impl Holder {
    pub(crate) fn now(host: &Host, process: Uuid) -> Self {
        Self {
            host: host.id,
            name: harmless(&host.name, MOST_OF_NAME),
            boot: host.boot,
            process: Some(process),
            since: Timestamp::now(),
        }
    }

    /// Whether locks of `host` reach its processes.
    pub fn is(&self, host: &Host) -> bool {
        // Two hosts whose ID cannot be read are not the same one.
        let is_same = |ours: Uuid, theirs: Uuid| !ours.is_nil() && ours == theirs;
        is_same(self.host, host.id) || is_same(self.boot, host.boot)
    }
}

/// Who has a volume attached, as its header says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Holding {
    /// How many times the volume was attached, as far as that was entered.
    pub sequence: u64,
    /// The last attachment that has ended and whose guest ran.
    pub ran: u64,
    /// Who has it attached.
    pub holder: Option<Holder>,
}

impl Holding {
    /// What `metadata` say. A token that cannot be read says nothing: a header that was altered can say anything.
    pub fn of(metadata: &Metadata) -> Self {
        let tokens = metadata.tokens.values().filter(|token| token.kind == TYPE);
        let holdings = tokens.filter_map(|token| {
            let fields = Value::Object(token.other.clone());
            let Sequence { sequence, ran } = parsing::json_value(fields.clone()).ok()?;
            let holder = parsing::json_value(fields).ok();
            Some(Self {
                sequence: sequence.0,
                ran: ran.unwrap_or(sequence).0,
                holder,
            })
        });
        holdings
            .max_by_key(|holding| holding.sequence)
            .unwrap_or_default()
    }

    /// The token in the metadata.
    pub(crate) fn into_token(self) -> Token {
        let field = |text: String| Value::String(text);
        let mut other = Other::new();
        other.insert("sequence".to_owned(), field(self.sequence.to_string()));
        other.insert("ran".to_owned(), field(self.ran.to_string()));
        if let Some(holder) = self.holder {
            other.insert("host".to_owned(), field(holder.host.to_string()));
            other.insert("name".to_owned(), field(holder.name));
            other.insert("boot".to_owned(), field(holder.boot.to_string()));
            if let Some(process) = holder.process {
                other.insert("process".to_owned(), field(process.to_string()));
            }
            other.insert("since".to_owned(), field(holder.since.to_string()));
        }
        Token {
            kind: TYPE.to_owned(),
            keyslots: Vec::new(),
            other,
        }
    }
}

#[derive(Deserialize)]
struct Sequence {
    sequence: Decimal,
    #[serde(default)]
    ran: Option<Decimal>,
}

/// How much of a host's name is entered, in characters: as long as Linux lets it be.
const MOST_OF_NAME: usize = 64;
