//! `sealblk key`: lists keys and the volumes that they open, and revokes keys.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{ArgGroup, Args, Subcommand};
use serde::Serialize;
use uuid::Uuid;

use super::config::parse_age;
use super::failure::Failure;
use super::secret::SecretSource;
use super::{Host, Keys, absolute, output, stderr, text};
use crate::inventory;
use crate::inventory::{GuardError, Note, Removal};
use crate::keys::RequestPurpose;
use crate::keys::{KeyError, KeyId, KeyProvider, KeyReason, KeyState, Providers, Reach, Revocation};
use crate::timestamp::Timestamp;

const AFTER_HELP: &str = "\
Examples:
  sealblk key list
  sealblk key where-used --provider kms
  sealblk key scan /srv/vms /dev/vg0/vm9
  sealblk key revoke 9f3999d66378f496.4b5aea7b-9f6e-4a53-8d5b-3f0f5d2a3c11 --provider native --dry-run

This host keeps a list of the volumes that it binds to keys or opens, with their
paths. A volume opens without an entry: a volume from another host is added when it
is first used, or by `key scan`. sealblk compares each entry with the header of the
volume; if it cannot find the volume, the entry counts as a use of the key.";

const PUSH_HELP: &str = "\
Example:
  fetch-from-the-kms 4711 | sealblk key push 4711 --provider kms --key-file -

For a host that does not reach its key server: its management fetches the key and
pushes it. The agent keeps the key in memory, as long as a key that it fetched
itself. It opens volumes with the key, and binds no volume to it. A wrong key opens
nothing and does no harm. The caller needs the privilege ManageKeys.";

/// List keys and the disks that they open, and revoke keys
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Key {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// List the keys that known volumes are bound to, their states and ages
    List(List),
    /// List the volumes that a key or a provider opens
    WhereUsed(WhereUsed),
    /// List the volumes whose keys have reached their maximum age
    Due(Due),
    /// Add volumes to the list of known volumes; drop entries that no longer hold
    Scan(Scan),
    /// Revoke a key on this host, and at its server if the server supports it
    Revoke(Revoke),
    /// Give this host's agent a key that was fetched elsewhere, for a while
    #[command(after_help = PUSH_HELP)]
    Push(Push),
}

#[derive(Debug, Args)]
struct List {
    /// Only keys of this provider
    #[arg(long, value_name = "NAME")]
    provider: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("what").required(true).multiple(true).args(["key_id", "provider"]))]
struct WhereUsed {
    /// The key, as `sealblk info` shows it
    key_id: Option<String>,
    /// The provider
    #[arg(long, value_name = "NAME")]
    provider: Option<String>,
    /// Print JSON, as in the interface org.sealblk.Agent
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct Due {
    /// The maximum age of a key, as in 90d [default: the configuration's max-key-age]
    #[arg(long, value_name = "AGE", value_parser = parse_age)]
    max_age: Option<Duration>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct Scan {
    /// Volumes, or directories with volumes; sealblk also checks all volumes on the list
    paths: Vec<PathBuf>,
    /// Also drop the entries of volumes that are not at their paths; first attach the disks that are only detached
    #[arg(long)]
    forget_missing: bool,
}

#[derive(Debug, Args)]
struct Revoke {
    /// The key, as `sealblk info` and `sealblk key list` show it
    key_id: String,
    /// Its provider
    #[arg(long, value_name = "NAME")]
    provider: String,
    /// Also destroy the key at the key server, for good
    #[arg(long)]
    destroy: bool,
    #[command(flatten)]
    insistence: Insistence,
}

#[derive(Debug, Args)]
struct Push {
    /// The key, as `sealblk info` and `sealblk key list` show it
    key_id: String,
    /// Its provider, by the agent's name for it
    #[arg(long, value_name = "NAME")]
    provider: String,
    /// The key itself: 32 bytes
    #[arg(long, value_name = "FILE|-|fd:N|cred:NAME")]
    key_file: SecretSource,
}

/// What goes with the taking away of something that may be needed.
#[derive(Clone, Debug, Args)]
pub(super) struct Insistence {
    /// Show whether the command would be refused, and change nothing
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Do it even if volumes are lost; needs --confirm
    #[arg(long, requires = "confirm")]
    pub(super) force: bool,
    /// The name of the provider, or the ID of the key, again
    #[arg(long, value_name = "NAME", requires = "force")]
    pub(super) confirm: Option<String>,
}

impl Insistence {
    /// Whether --force is given, and confirmed, for `subject`.
    ///
    /// # Errors
    /// [`Failure::Confirm`], if something else was confirmed.
    pub(super) fn insists(&self, subject: &str) -> Result<bool, Failure> {
        match &self.confirm {
            Some(confirmed) if confirmed != subject => Err(Failure::Confirm {
                what: format!("{subject:?}"),
                confirmed: confirmed.clone(),
            }),
            _ => Ok(self.force),
        }
    }

    /// What a dry run finds: `subject` can be taken away, or --force would go past what stands in the way. `ask` is told whether
    /// to go past it, and does nothing.
    ///
    /// # Errors
    /// The obstacle, unless --force is given; with --force, an obstacle that it does not override.
    pub(super) fn foresee(
        &self,
        subject: &str,
        done: &str,
        mut ask: impl FnMut(bool) -> Result<(), Failure>,
    ) -> Result<String, Failure> {
        let in_the_way = match ask(false) {
            Ok(()) => {
                return Ok(format!(
                    "{subject}: no volume is known to need it; it can be {done}\n"
                ));
            }
            Err(Failure::Guard(error)) if self.force => error,
            Err(failure) => return Err(failure),
        };
        ask(true)?;
        Ok(match in_the_way {
            GuardError::InUse { uses, .. } => {
                let lacks = match uses.full {
                    true => "the list of volumes is incomplete, and volumes that it lacks may need it; ",
                    false => "",
                };
                let disks = uses
                    .lines()
                    .into_iter()
                    .map(|disk| format!("  {}\n", text::printable(&disk)));
                let needed = match uses.count {
                    0 => format!("{subject}: {lacks}it can only be {done} with --force\n"),
                    _ => format!(
                        "{subject}: {lacks}these disks need it; it can only be {done} with --force:\n"
                    ),
                };
                disks.fold(needed, |told, disk| told + &disk)
            }
            GuardError::NotBackedUp(_) => {
                format!("{subject}: its primary key has no backup; it can only be {done} with --force\n")
            }
            _ => format!("{subject}: it can be {done} with --force\n"),
        })
    }
}

impl Key {
    pub(super) fn run(self, host: &Host) -> Result<(), Failure> {
        match self.verb {
            Verb::List(list) => list.run(host),
            Verb::WhereUsed(where_used) => where_used.run(host),
            Verb::Due(due) => due.run(host),
            Verb::Scan(scan) => scan.run(host),
            Verb::Revoke(revoke) => revoke.run(host),
            Verb::Push(push) => push.run(host),
        }
    }
}

/// A key, and the volumes that need it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    provider: String,
    key_id: KeyId,
    /// Null if the provider cannot tell.
    state: Option<KeyState>,
    /// Then: why.
    unknown: Option<KeyReason>,
    /// How many volumes it opens, as far as is known.
    volumes: usize,
    /// When the first of them was bound to it, if that is known.
    bound: Option<Timestamp>,
    /// How long ago that was, in seconds.
    age: Option<u64>,
}

impl List {
    fn run(self, host: &Host) -> Result<(), Failure> {
        let keys = host.keys(RequestPurpose::Check)?;
        let mut states = States::new();
        let mut by_key: BTreeMap<(String, String), Vec<inventory::Entry>> = BTreeMap::new();
        for entry in keys.volumes(self.provider.as_deref(), None)? {
            let Note { provider, key_id, .. } = &entry.note;
            let key = (provider.clone(), key_id.0.clone());
            by_key.entry(key).or_default().push(entry);
        }
        let rows = by_key.into_iter().map(|((provider, key_id), entries)| {
            let key_id = KeyId(key_id);
            let used: Vec<_> = entries.iter().filter(|entry| entry.in_use()).collect();
            let bound = used.iter().filter_map(|entry| entry.note.bound).min();
            let state = states.ask(&keys, &provider, &key_id);
            Row {
                unknown: state.as_ref().err().map(|error| error.reason),
                state: state.ok(),
                volumes: used.len(),
                bound,
                age: bound.map(|bound| bound.age().as_secs()),
                provider,
                key_id,
            }
        });
        let rows: Vec<_> = rows.collect();
        if self.json {
            return output::print_json(&rows);
        }
        if rows.is_empty() {
            return output::print("no volume is known; `sealblk key scan` adds volumes\n");
        }
        let mut table = vec![["PROVIDER", "KEY", "STATE", "VOLUMES", "AGE"].map(str::to_owned)];
        for row in rows {
            let state = match (row.state, row.unknown) {
                (Some(state), _) => state_text(state).to_owned(),
                (None, Some(reason)) => format!("unknown: {}", reason.what()),
                (None, None) => "unknown".to_owned(),
            };
            let (key, volumes) = (row.key_id.to_string(), row.volumes.to_string());
            let age = match row.volumes {
                0 => "-".to_owned(),
                _ => age_text(row.bound),
            };
            table.push([text::printable(&row.provider), key, state, volumes, age]);
        }
        output::print(&text::table(&table))
    }
}

/// What providers say of keys from some point in time on.
struct States {
    began: Instant,
    /// By name. One that cannot be asked is not asked for each of its keys.
    providers: HashMap<String, Result<Arc<dyn KeyProvider>, KeyError>>,
}

impl States {
    fn new() -> Self {
        Self {
            began: Instant::now(),
            providers: HashMap::new(),
        }
    }

    fn ask(&mut self, keys: &Keys, provider: &str, key_id: &KeyId) -> Result<KeyState, KeyError> {
        // A reply for one key is also used for the next one. The call takes time, too.
        let age = self.began.elapsed() + Duration::from_secs(1);
        let asked = match self.providers.get(provider) {
            Some(Err(error)) => {
                // A key that this host has revoked is revoked for every provider.
                let note = keys
                    .provider(provider)
                    .and_then(|opened| opened.state_here(key_id));
                return note.ok().flatten().ok_or_else(|| error.clone());
            }
            Some(Ok(note)) => note.state_within(key_id, age),
            None => keys.provider(provider).and_then(|opened| {
                let state = opened.state_within(key_id, age);
                self.providers.insert(provider.to_owned(), Ok(opened));
                state
            }),
        };
        asked.inspect_err(|error| {
            output::complain(error);
            self.providers.insert(provider.to_owned(), Err(error.clone()));
        })
    }
}

fn state_text(state: KeyState) -> &'static str {
    match state {
        KeyState::PreActive => "pre-active",
        KeyState::Active => "active",
        KeyState::Deactivated => "deactivated",
        KeyState::Revoked => "revoked",
        KeyState::Compromised => "compromised",
        KeyState::Destroyed => "destroyed",
        KeyState::Missing => "missing",
    }
}

/// The age of what was bound then, for people.
pub(super) fn age_text(bound: Option<Timestamp>) -> String {
    const DAY: u64 = 86_400;
    match bound.map(|bound| bound.age().as_secs()) {
        None => "unknown".to_owned(),
        Some(age) if age < DAY => "less than a day".to_owned(),
        Some(age) if age < 2 * DAY => "1 day".to_owned(),
        Some(age) => format!("{} days", age / DAY),
    }
}

impl WhereUsed {
    fn run(self, host: &Host) -> Result<(), Failure> {
        let key_id = self.key_id.map(KeyId);
        let keys = host.keys(RequestPurpose::Check)?;
        let entries = keys.volumes(self.provider.as_deref(), key_id.as_ref())?;
        if self.json {
            return output::print_json(&entries);
        }
        if entries.is_empty() {
            if let Some(provider) = &self.provider
                && let Err(error) = keys.provider(provider).and_then(|provider| provider.check())
                && error.reason == KeyReason::UnknownProvider
            {
                stderr::note(&format!("this host has no key provider {provider:?}"));
            }
            return output::print("no volume is known to be bound to it\n");
        }
        let mut table = vec![["DISK", "VOLUME", "STATE", "LAST OPENED", "KEY"].map(str::to_owned)];
        for entry in entries {
            let verdict = match &entry.why {
                Some(why) => format!("{}: {}", entry.verdict, text::printable(why)),
                None => entry.verdict.replace('_', " "),
            };
            let note = entry.note;
            let opened = note
                .opened
                .map_or("never".to_owned(), |opened| opened.to_string());
            table.push([
                text::printable(&note.path),
                note.volume.to_string(),
                verdict,
                opened,
                format!("{} of {}", note.key_id, text::printable(&note.provider)),
            ]);
        }
        output::print(&text::table(&table))
    }
}

/// A volume whose key is to be changed.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct DueVolume {
    volume: Uuid,
    path: String,
    provider: String,
    key_id: KeyId,
    #[serde(rename = "standing")]
    verdict: String,
    /// Null if it is unknown.
    bound: Option<Timestamp>,
    age: Option<u64>,
}

impl Due {
    fn run(self, host: &Host) -> Result<(), Failure> {
        let max_age = max_key_age(host, self.max_age)?;
        let volumes = host.keys(RequestPurpose::Check)?.volumes(None, None)?.into_iter();
        let is_due = |entry: &inventory::Entry| {
            entry.in_use()
                && entry
                    .note
                    .bound
                    .is_none_or(|bound| bound.may_be_older_than(max_age))
        };
        let due: Vec<_> = volumes
            .filter(is_due)
            .map(|inventory::Entry { note, verdict, .. }| DueVolume {
                volume: note.volume,
                path: note.path,
                provider: note.provider,
                key_id: note.key_id,
                verdict,
                bound: note.bound,
                age: note.bound.map(|bound| bound.age().as_secs()),
            })
            .collect();
        if self.json {
            return output::print_json(&due);
        }
        if due.is_empty() {
            return output::print("no key of a known volume has reached its maximum age\n");
        }
        let mut table = vec![["DISK", "VOLUME", "AGE", "KEY"].map(str::to_owned)];
        for volume in due {
            table.push([
                text::printable(&volume.path),
                volume.volume.to_string(),
                age_text(volume.bound),
                format!("{} of {}", volume.key_id, text::printable(&volume.provider)),
            ]);
        }
        output::print(&text::table(&table))
    }
}

/// How old a key may get: as it is given, else as the configuration has it.
pub(super) fn max_key_age(host: &Host, given: Option<Duration>) -> Result<Duration, Failure> {
    match given {
        Some(age) => Ok(age),
        None => host.config()?.max_key_age.ok_or(Failure::NoPolicy),
    }
}

impl Scan {
    fn run(self, host: &Host) -> Result<(), Failure> {
        let mut paths = Vec::new();
        for path in &self.paths {
            let absolute = absolute(path.clone())?;
            match fs::metadata(&absolute).is_ok_and(|metadata| metadata.is_dir()) {
                true => {
                    let entries = fs::read_dir(&absolute).and_then(Iterator::collect::<Result<Vec<_>, _>>);
                    let entries = entries.map_err(|source| Failure::Look {
                        path: path.clone(),
                        source,
                    })?;
                    let files = entries
                        .iter()
                        .map(fs::DirEntry::path)
                        .filter(|path| !path.is_dir());
                    paths.extend(files);
                }
                false => paths.push(absolute),
            }
        }
        let scanned = host
            .keys(RequestPurpose::Check)?
            .scan(&paths, self.forget_missing)?;
        for passed in &scanned.passed_over {
            let (path, why) = (text::printable(&passed.path), text::printable(&passed.why));
            stderr::note(&format!("{path}: skipped: {why}"));
        }
        let bound = scanned.found.iter().filter(|seen| seen.keys > 0).count();
        output::print(&format!(
            "{} volumes found, {bound} of them bound to a key; {} entries dropped\n",
            scanned.found.len(),
            scanned.dropped
        ))
    }
}

impl Push {
    fn run(self, host: &Host) -> Result<(), Failure> {
        let key_id = KeyId(self.key_id);
        let Keys::Agent(client) = host.keys(RequestPurpose::Check)? else {
            let error = KeyError::new(&self.provider, "the configuration", KeyReason::NoAgent);
            return Err(error.of(&key_id).into());
        };
        client.push(&self.provider, &key_id, &self.key_file.read()?)?;
        output::print(&format!(
            "key {key_id} of provider {:?} was pushed\n",
            self.provider
        ))
    }
}

impl Revoke {
    fn run(self, host: &Host) -> Result<(), Failure> {
        let force = self.insistence.insists(&self.key_id)?;
        let revocation = match self.destroy {
            true => Revocation::Destroy,
            false => Revocation::Deactivate,
        };
        let key_id = KeyId(self.key_id);
        let keys = host.keys(RequestPurpose::Check)?;
        let revoke = |force, dry_run| {
            let removal = Removal {
                force,
                dry_run,
                ..Removal::default()
            };
            keys.revoke(&self.provider, &key_id, revocation, &removal)
        };
        let key = format!("key {key_id} of provider {:?}", self.provider);
        if self.insistence.dry_run {
            let ask = |force| revoke(force, true).map(drop);
            return output::print(&self.insistence.foresee(&key, "revoked", ask)?);
        }
        let reach = revoke(force, false)?.unwrap_or(Reach::Host);
        output::print(&format!("{key}: {}\n", revoked_text(reach, revocation)))
    }
}

/// What has become of a key.
pub(super) fn revoked_text(reach: Reach, revocation: Revocation) -> &'static str {
    match (reach, revocation) {
        (Reach::Host, _) => "revoked on this host; other hosts with this provider can still use it",
        (Reach::Server, Revocation::Deactivate) => "revoked on this host and at its server",
        (Reach::Server, Revocation::Destroy) => "destroyed at its server, and revoked on this host",
    }
}
