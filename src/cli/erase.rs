//! `sealblk erase`: destroys a disk's header and keyslots, and writes a receipt. The receipt's form is documented in docs/erase.md.

use std::fs;
use std::io::{self, BufRead, IsTerminal, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use base16ct::lower;
use clap::Args;
use rustix::fs::{major, minor};
use serde::Serialize;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::failure::Failure;
use super::key::revoked_text;
use super::made::Made;
use super::size::Size;
use super::volume_args::{TakeOver, VolumeArgs};
use super::{Host, Keys, output, stderr, text};
use crate::agent::{Erasure, ErasureStep};
use crate::inventory::{GuardError, Removal};
use crate::keys::RequestPurpose;
use crate::keys::binding::{self, Bindings, BoundTo, Info, Proof};
use crate::keys::{KeyError, KeyId, KeyReason, Reach, Revocation};
use crate::luks2::{Erased, erase};
use crate::path_text;
use crate::storage::{Backing, Kind};
use crate::timestamp::Timestamp;
use sealblk_secmem::private_file;

const AFTER_HELP: &str = "\
Examples:
  sealblk erase vm7.luks
  sealblk erase /dev/vg0/vm8 --confirm 3b5b5f0e-2f5d-4c53-9d2a-5a3c1f0f7d11 --receipt vm8.receipt
  sealblk erase vm9.data --header vm9.luks --revoke-key

sealblk destroys both copies of the header and all keyslots, and nothing else. Then
no key opens this disk. Copies of the header still open (see Limits). sealblk overwrites the header
and the keyslots, reads them back from storage, and discards them if the device
supports that. The disk must not be in use.

The receipt is a JSON record of what was erased, when and by whom, and which keys
were revoked. It is not signed: `sealblk audit verify --receipt` checks it against
the audit log, so keep that log with it. The file or device stays, with the data
as they were, encrypted.

Limits:
  A copy or backup of the header still opens with the keys that were in it, and
  flash, file systems and snapshots may keep overwritten blocks: destroy the copies,
  or revoke the keys (--revoke-key, or later `sealblk key revoke` with the IDs in
  the receipt).
  A recovery key cannot be revoked: destroy it, or each copy of the header.
  A backup from before a rekey opens with the replaced key: `sealblk rekey` printed
  its ID, and the agent's audit log has it (event KeyBound). Revoke that key too.
  A process on another host that has the disk open keeps the volume key: end it.";

/// Destroy a disk for good, by destroying its header and keyslots
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Erase {
    #[command(flatten)]
    volume: VolumeArgs,
    /// The volume's UUID, as `sealblk info` shows it; without this option, sealblk asks for it on the terminal
    #[arg(long, value_name = "UUID")]
    confirm: Option<String>,
    /// Write the receipt (see below) to this new file instead of standard output
    #[arg(long, value_name = "FILE")]
    receipt: Option<PathBuf>,
    /// Also revoke the providers' keys that opened the disk. sealblk keeps a key that another volume of the volume list
    /// (`sealblk key where-used`) needs, and the receipt says so; if a provider cannot revoke a key now, sealblk erases nothing
    #[arg(long)]
    revoke_key: bool,
    #[command(flatten)]
    take_over: TakeOver,
}

/// What was done, by whom, and how it was seen to be done.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Receipt<'a> {
    receipt: &'static str,
    volume: Uuid,
    path: String,
    device: Device,
    started: Timestamp,
    finished: Timestamp,
    by: By,
    before: &'a Info,
    header_sha256: &'a str,
    keyslots_sha256: &'a str,
    erased: Done<'a>,
    keys: Vec<Revoked>,
    not_covered: [&'static str; 3],
}

/// Where it lay.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Device {
    kind: &'static str,
    /// Of a block device: its number; of a file: its file system's, and its inode.
    number: String,
    inode: Option<u64>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct By {
    user: u32,
    name: Option<String>,
    host: Option<String>,
    program: &'static str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Done<'a> {
    offset: u64,
    length: u64,
    written_sha256: &'a str,
    /// `direct`: from storage itself, past this host's cache; `cached`: after this host's cache was told to forget it.
    read_back: &'static str,
    discarded: bool,
}

/// What became of a key that opened it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Revoked {
    provider: String,
    key_id: KeyId,
    /// Null if it was left as it is.
    revoked: Option<Reach>,
    /// Then: why.
    why: Option<String>,
}

/// The form of the receipt.
const FORM: &str = "sealblk-erase-2";
const NOT_COVERED: [&str; 3] = [
    "copies and backups of the header: they open with the keys of their time, also with keys that a rekey has replaced",
    "overwritten blocks that flash, a file system or a snapshot keeps",
    "the volume key in the memory of a process on another host that has the disk open",
];

impl Erase {
    pub(super) fn run(self, host: &Host) -> Result<(), Failure> {
        let files = self.volume.open_to_change(&self.take_over)?;
        let (header, payload) = files.parts();
        let before = Info::read(header, payload)?;
        self.confirm(&before)?;
        // It is made first: nothing is erased for which there could be no receipt.
        let made = self.make_receipt()?;
        let path = std::path::absolute(header.path()).unwrap_or_else(|_| header.path().to_owned());
        let step = |step| Erasure {
            volume: before.uuid,
            path: path_text::to_text(&path),
            step,
        };
        // So is the record: each erasure, and its user, is in the log before it begins.
        let keys = host.keys(RequestPurpose::Access)?;
        let named = match self.revoke_key {
            true => self.keys_to_revoke(header, before.uuid, &keys)?,
            false => Vec::new(),
        };
        keys.report_erasure(&step(ErasureStep::Begun))?;
        let started = Timestamp::now();
        let erased = erase(header, before.uuid, binding::is_ours)?;
        made.keep();
        let finished = Timestamp::now();

        // The log has it before anything else can fail. There is a receipt whatever fails.
        let logged = keys.report_erasure(&step(ErasureStep::Erased {
            header_sha256: erased.header_sha256.clone(),
            written_sha256: erased.written_sha256.clone(),
        }));
        let (revoked, left) = match &logged {
            Ok(()) => revoke_keys(&keys, named),
            Err(_) => {
                named.iter().for_each(tell_left);
                (Vec::new(), None)
            }
        };
        let receipt = Receipt {
            receipt: FORM,
            volume: before.uuid,
            path: path_text::to_text(&path),
            device: Device::of(header),
            started,
            finished,
            by: By::this_process(),
            header_sha256: &erased.header_sha256,
            keyslots_sha256: &erased.keyslots_sha256,
            erased: Done::of(&erased),
            keys: revoked,
            not_covered: NOT_COVERED,
            before: &before,
        };
        let text = serde_json::to_string_pretty(&receipt).expect("numbers, texts and lists are JSON") + "\n";
        let logged = logged.and_then(|()| {
            keys.report_erasure(&step(ErasureStep::Receipted {
                receipt_sha256: sha256(text.as_bytes()),
            }))
        });
        self.hand_over(&text, before.uuid)?;
        for text in NOT_COVERED {
            stderr::note(&format!("not covered: {text}"));
        }
        logged?;
        left.map_or(Ok(()), Err)
    }

    /// The keys that opened the volume: those that its header names, and those that were replaced, as far as this host has noted
    /// that they opened it. What is known to be in the way of their revocation is told while nothing is erased.
    fn keys_to_revoke(&self, header: &Backing, volume: Uuid, keys: &Keys) -> Result<Vec<Opened>, Failure> {
        // First, since a proof also makes an entry, which may displace the entry of a replaced key.
        let noted = keys.opened(volume);
        let named = Bindings::prove(header, keys)?.into_iter();
        let mut opened: Vec<_> = named.map(Opened::from).collect();
        for Opened {
            provider,
            key_id,
            proved,
        } in &opened
        {
            let in_the_way = match proved {
                Err(error) => Some(error.clone()),
                Ok(()) => {
                    let removal = Removal {
                        dry_run: true,
                        ..Removal::default()
                    };
                    match keys.revoke(provider, key_id, Revocation::Deactivate, &removal) {
                        Err(Failure::Guard(GuardError::Key(error))) => Some(error),
                        // This disk is in the way itself.
                        _ => None,
                    }
                }
            };
            if let Some(source) = in_the_way.filter(|error| !is_final(error.reason)) {
                return Err(Failure::NotRevocable {
                    disk: self.volume.disk.clone(),
                    source: Box::new(source),
                });
            }
        }
        if !opened.is_empty() {
            for (provider, key_id) in noted? {
                if !opened
                    .iter()
                    .any(|key| key.provider == provider && key.key_id == key_id)
                {
                    opened.push(Opened {
                        provider,
                        key_id,
                        proved: Ok(()),
                    });
                }
            }
        }
        Ok(opened)
    }

    /// The receipt's file, empty.
    fn make_receipt(&self) -> Result<Made, Failure> {
        let mut made = Made::default();
        if let Some(path) = &self.receipt {
            // An earlier one that was interrupted has left it empty.
            let is_left = fs::symlink_metadata(path).is_ok_and(|file| file.is_file() && file.len() == 0);
            let make = if is_left {
                private_file::replace
            } else {
                private_file::create
            };
            make(path, &[]).map_err(|source| Failure::Make {
                path: path.clone(),
                source,
            })?;
            made.extend([path.clone()]);
        }
        Ok(made)
    }

    /// Puts the receipt where it is wanted.
    fn hand_over(&self, text: &str, volume: Uuid) -> Result<(), Failure> {
        match &self.receipt {
            Some(path) => {
                if let Err(source) = private_file::replace(path, text.as_bytes()) {
                    // There will be no other.
                    output::print::<Failure>(text)?;
                    return Err(Failure::Make {
                        path: path.clone(),
                        source,
                    });
                }
                output::print(&format!(
                    "{}: volume {} was erased; the receipt is in {}\n",
                    text::shown(&self.volume.disk),
                    volume,
                    text::shown(path)
                ))
            }
            None => output::print(text),
        }
    }

    /// Makes sure that this volume is meant.
    fn confirm(&self, before: &Info) -> Result<(), Failure> {
        let disk = || self.volume.disk.clone();
        let confirmed = match &self.confirm {
            Some(confirmed) => confirmed.clone(),
            None if io::stdin().is_terminal() => {
                let capacity = before
                    .capacity
                    .map_or("a disk".to_owned(), |bytes| Size(bytes).to_string());
                let _ = write!(
                    io::stderr(),
                    "This destroys {}: volume {}, {capacity}, for good. Type its UUID: ",
                    text::shown(&self.volume.disk),
                    before.uuid,
                );
                let mut line = String::new();
                let _ = io::stdin().lock().read_line(&mut line);
                line.trim().to_owned()
            }
            None => return Err(Failure::Unconfirmed { disk: disk() }),
        };
        match confirmed.parse() == Ok(before.uuid) {
            true => Ok(()),
            false => Err(Failure::ConfirmErasure {
                disk: disk(),
                volume: before.uuid,
                confirmed,
            }),
        }
    }
}

/// As receipts and the log have it.
pub(super) fn sha256(bytes: &[u8]) -> String {
    lower::encode_string(&Sha256::digest(bytes))
}

/// A key that opened the volume, or is said to have.
struct Opened {
    provider: String,
    key_id: KeyId,
    /// An attacker with write access to the header could have named another disk's key.
    proved: Result<(), KeyError>,
}

impl From<Proof> for Opened {
    fn from(Proof { to, proved }: Proof) -> Self {
        let BoundTo { provider, key_id, .. } = to;
        Self {
            provider,
            key_id,
            proved,
        }
    }
}

/// Whether nothing is left to be revoked, or nothing that is this volume's.
fn is_final(reason: KeyReason) -> bool {
    use KeyReason::{Missing, NotActive, Unauthentic, UnknownProvider};
    matches!(reason, Missing | NotActive | Unauthentic | UnknownProvider)
}

fn tell_left(Opened { provider, key_id, .. }: &Opened) {
    stderr::note(&format!(
        "key {key_id} of provider {provider:?} was not revoked: while it is active, it opens backups of the header"
    ));
}

/// Revokes the keys that opened only this volume; returns the first failure.
fn revoke_keys(keys: &Keys, named: Vec<Opened>) -> (Vec<Revoked>, Option<Failure>) {
    let mut left = None;
    let revoke = |key: Opened| {
        let Opened {
            provider,
            key_id,
            proved,
        } = &key;
        let revocation = Revocation::Deactivate;
        let result = proved
            .clone()
            .map_err(Failure::from)
            .and_then(|()| keys.revoke(provider, key_id, revocation, &Removal::default()));
        let (revoked, why) = match result {
            Ok(reach) => {
                let reach = reach.unwrap_or(Reach::Host);
                stderr::note(&format!(
                    "key {key_id} of provider {provider:?}: {}",
                    revoked_text(reach, revocation)
                ));
                (Some(reach), None)
            }
            Err(failure) => {
                output::complain_with(&failure, &failure.list());
                tell_left(&key);
                let mut why = vec![failure.to_string()];
                why.extend(failure.list());
                let is_meant = match &failure {
                    Failure::Guard(GuardError::InUse { .. }) => true,
                    Failure::Key(error) | Failure::Guard(GuardError::Key(error)) => is_final(error.reason),
                    _ => false,
                };
                if !is_meant && left.is_none() {
                    left = Some(Failure::NotRevoked {
                        provider: provider.clone(),
                        key_id: key_id.clone(),
                        why: Box::new(failure),
                    });
                }
                (None, Some(why.join("; ")))
            }
        };
        let Opened { provider, key_id, .. } = key;
        Revoked {
            provider,
            key_id,
            revoked,
            why,
        }
    };
    let revoked = named.into_iter().map(revoke).collect();
    (revoked, left)
}

impl Device {
    fn of(header: &Backing) -> Self {
        let metadata = header.file().metadata().ok();
        let number = |device| format!("{}:{}", major(device), minor(device));
        match header.kind() {
            Kind::BlockDevice => Self {
                kind: "block_device",
                number: metadata
                    .map(|metadata| number(metadata.rdev()))
                    .unwrap_or_default(),
                inode: None,
            },
            Kind::File => Self {
                kind: "file",
                number: metadata
                    .as_ref()
                    .map(|metadata| number(metadata.dev()))
                    .unwrap_or_default(),
                inode: metadata.map(|metadata| metadata.ino()),
            },
        }
    }
}

impl By {
    fn this_process() -> Self {
        let user = rustix::process::getuid().as_raw();
        let name = uzers::get_user_by_uid(user).map(|user| user.name().to_string_lossy().into_owned());
        let host = fs::read_to_string("/proc/sys/kernel/hostname").ok();
        Self {
            user,
            name,
            host: host.map(|host| host.trim().to_owned()),
            program: concat!("sealblk ", env!("CARGO_PKG_VERSION")),
        }
    }
}

impl<'a> Done<'a> {
    fn of(erased: &'a Erased) -> Self {
        Self {
            offset: 0,
            length: erased.len,
            written_sha256: &erased.written_sha256,
            read_back: match erased.direct {
                true => "direct",
                false => "cached",
            },
            discarded: erased.discarded,
        }
    }
}
