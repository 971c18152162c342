//! `sealblk list`: the disks of this host, and the volumes whose keys its agent has given out.

use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use serde_json::json;
use uuid::Uuid;

use super::failure::Failure;
use super::target::{is_served, served_names};
use super::volume_args::VolumeArgs;
use super::{Host, output, served, stderr, text, units};
use crate::agent::{Client, Registrant};
use crate::attachment::{ClaimState, FrontEnd, State, Status};
use crate::disks::{DiskName, Sockets};
use crate::keys::RequestPurpose;
use crate::keys::binding::Bindings;
use crate::timestamp::Timestamp;

const AFTER_HELP: &str = "\
The list has the disks that are defined (`sealblk define`), and others that are being
served: those with a directory in /run/sealblk, and those whose keys the agent has given
out. `sealblk status NAME` shows all of one disk.

STATE is
  open         the guest reads and writes
  locked       the disk has no key; the guest's requests wait
  locking      it is about to be locked
  held         the storage fails; the guest's requests wait
  waiting      another process still has the disk; the guest's requests wait
  refused      this process may not use the storage; the guest's requests wait
  stopped      no process serves it
  unknown      the process that serves it does not answer, or not to this user
KEY AGE is the time since the volume was bound to its key; it is empty if this user
cannot read the header.";

/// List the disks of this host and how they are
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct List {
    /// List the volumes whose keys the agent has given out, with the keys and processes
    #[arg(long)]
    keys: bool,
    /// Print JSON; with --keys, as in the interface org.sealblk.Agent
    #[arg(long)]
    json: bool,
}

/// How long a disk may take to tell its state, and how many are asked at a time.
const PATIENCE: Duration = Duration::from_secs(5);
const AT_A_TIME: usize = 32;

/// A disk of this host.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Listed {
    /// None, if only the agent knows of it.
    name: Option<DiskName>,
    /// Its file or device.
    disk: Option<String>,
    volume: Option<Uuid>,
    state: &'static str,
    reason: Option<String>,
    front_end: Option<FrontEnd>,
    /// Since when the volume is bound to its key.
    bound: Option<Timestamp>,
    process: Option<u32>,
}

impl List {
    pub(super) fn run(self, host: &Host) -> Result<(), Failure> {
        if self.keys {
            return self.keys(host);
        }
        let disks = disks(host)?;
        if self.json {
            return output::print_json(&json!({ "disks": disks }));
        }
        if disks.is_empty() {
            return output::print("this host has no disks: define one with `sealblk define`\n");
        }
        let head = ["NAME", "STATE", "GUEST", "KEY AGE", "DISK", "REASON"].map(str::to_owned);
        let rows: Vec<_> = [head].into_iter().chain(disks.iter().map(Listed::row)).collect();
        output::print(&text::table(&rows))
    }

    fn keys(&self, host: &Host) -> Result<(), Failure> {
        let disks = Client::new(&host.agent_socket()?, RequestPurpose::Check).disks()?;
        if self.json {
            return output::print_json(&json!({ "disks": disks }));
        }
        if disks.is_empty() {
            return output::print("no volume with a key from the agent is being served\n");
        }
        let head = [
            "VOLUME",
            "PROVIDER",
            "KEY",
            "USER",
            "PROCESS",
            "SINCE",
            "GRACE UNTIL",
        ]
        .map(str::to_owned);
        let rows = disks.into_iter().map(|disk| {
            [
                disk.volume.to_string(),
                disk.provider,
                disk.key_id.to_string(),
                disk.user.to_string(),
                disk.process.to_string(),
                disk.since.to_string(),
                disk.grace.map(|grace| grace.to_string()).unwrap_or_default(),
            ]
        });
        let rows: Vec<_> = [head].into_iter().chain(rows).collect();
        output::print(&text::table(&rows))
    }
}

impl Listed {
    fn row(&self) -> [String; 6] {
        let guest = match &self.front_end {
            Some(FrontEnd {
                connected: true,
                since,
            }) => since.map_or("connected".to_owned(), |since| format!("since {since}")),
            Some(_) => "none".to_owned(),
            None => String::new(),
        };
        let days = |bound: Timestamp| format!("{} d", bound.age().as_secs() / 86_400);
        [
            self.name.as_ref().map_or("-".to_owned(), ToString::to_string),
            self.state.to_owned(),
            guest,
            self.bound.map(days).unwrap_or_default(),
            self.disk.clone().unwrap_or_default(),
            self.reason.clone().unwrap_or_default(),
        ]
    }

    /// A disk of which its definition tells.
    fn defined(host: &Host, name: DiskName) -> Self {
        let mut listed = Self {
            state: "stopped",
            disk: None,
            volume: None,
            reason: None,
            front_end: None,
            bound: None,
            process: None,
            name: None,
        };
        match host.disks().definition(&name) {
            Ok(definition) => {
                listed.disk = Some(definition.disk().to_string_lossy().into_owned());
                listed.volume = definition.volume();
                let volume = VolumeArgs::new(definition.disk(), definition.header());
                listed.bound = bound(&volume);
            }
            Err(error) => listed.reason = Some(told(&error)),
        }
        listed.name = Some(name);
        listed
    }

    /// What the process that serves it tells.
    fn ask(&mut self) {
        let Some(name) = &self.name else { return };
        let control = Sockets::of(name).control;
        if !is_served(&control) {
            return;
        }
        match served::ask_within::<Status>(&control, "GetStatus", json!({}), PATIENCE) {
            Ok(status) => self.learn(status),
            Err(failure) => {
                self.state = "unknown";
                self.reason = Some(told(&failure));
            }
        }
    }

    fn learn(&mut self, status: Status) {
        let claim = status.claim.as_ref().map(|claim| claim.state);
        (self.state, self.reason) = match (status.state, &status.held, claim) {
            (State::Locked, ..) => ("locked", status.lock.and_then(|lock| lock.message)),
            (State::Locking, ..) => ("locking", None),
            (_, Some(held), _) => ("held", Some(held.message.clone())),
            (_, _, Some(ClaimState::Waiting)) => ("waiting", None),
            (_, _, Some(ClaimState::Refused)) => ("refused", status.claim.and_then(|claim| claim.message)),
            (State::Open, ..) => ("open", None),
        };
        self.disk = Some(status.disk);
        self.volume = Some(status.volume);
        self.front_end = status.front_end;
        self.process = status.process;
    }
}

/// An error with its causes, on one line.
fn told(error: &(dyn std::error::Error + 'static)) -> String {
    output::told(error).trim_end().replace('\n', "; ")
}

/// Since when a volume is bound to a key, if its header can be read and tells.
fn bound(volume: &VolumeArgs) -> Option<Timestamp> {
    let files = volume.inspect().ok()?;
    let locked = files.locked().ok()?;
    let bindings = Bindings::of(locked.header()).to;
    bindings.into_iter().filter_map(|to| to.since).min()
}

/// All disks: first those with a name, in order.
fn disks(host: &Host) -> Result<Vec<Listed>, Failure> {
    let mut names = host.disks().names()?;
    // Those that are served, and not defined any more.
    names.extend(served_names());
    names.sort();
    names.dedup();
    let mut disks: Vec<_> = names
        .into_iter()
        .map(|name| Listed::defined(host, name))
        .collect();
    for some in disks.chunks_mut(AT_A_TIME) {
        thread::scope(|scope| some.iter_mut().for_each(|disk| drop(scope.spawn(|| disk.ask()))));
    }
    let stopped = disks.iter().filter(|disk| disk.state == "stopped");
    let names: Vec<_> = stopped.filter_map(|disk| disk.name.as_ref()).collect();
    let mut reasons: BTreeMap<DiskName, String> = units::reasons(&names);
    for disk in &mut disks {
        let reason = disk.name.as_ref().and_then(|name| reasons.remove(name));
        disk.reason = disk.reason.take().or(reason);
    }
    let known: Vec<_> = disks.iter().filter(|disk| disk.process.is_some()).collect();
    let others = of_the_agent(host).into_iter().filter(|one| {
        !known
            .iter()
            .any(|disk| disk.process == u32::try_from(one.process).ok())
    });
    let others: Vec<_> = others
        .map(|one| Listed {
            name: None,
            disk: None,
            volume: Some(one.volume),
            state: "open",
            reason: Some(format!("volume {}, process {}", one.volume, one.process)),
            front_end: None,
            bound: None,
            process: u32::try_from(one.process).ok(),
        })
        .collect();
    disks.extend(others);
    Ok(disks)
}

/// What the agent tells, if there is one.
fn of_the_agent(host: &Host) -> Vec<Registrant> {
    let socket = match host.agent_socket() {
        Ok(socket) => socket,
        Err(_) => return Vec::new(),
    };
    match Client::new(&socket, RequestPurpose::Check).disks() {
        Ok(disks) => disks,
        Err(error) => {
            stderr::note(&format!("the list has no disks without a name: {error}"));
            Vec::new()
        }
    }
}
