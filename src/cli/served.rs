//! `sealblk status`, `lock`, `unlock` and `resume`: calls to the control socket of a disk that is being served.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::failure::Failure;
use super::size::Size;
use super::{output, text};
use crate::attachment::{self, ClaimState, FrontEnd, HeldBy, LockedBy, State};
use crate::control::varlink::{CallError, MethodError, call};
use crate::control::wire::Connection;
use crate::disks::{DiskName, Sockets};
use crate::parsing;

/// How long an answer may take: a lock waits for storage, a rekey for key servers.
pub(super) const TIMEOUT: Duration = Duration::from_secs(300);

/// Show the state of a served disk: whether it has its key, and the reason if it has not
#[derive(Debug, Args)]
pub(super) struct Status {
    #[command(flatten)]
    disk: ServedDisk,
    /// Print JSON, as in the interface org.sealblk.Disk
    #[arg(long)]
    json: bool,
}

/// Remove the key of a served disk from memory; the guest's requests wait until `unlock`
#[derive(Debug, Args)]
pub(super) struct Lock {
    #[command(flatten)]
    disk: ServedDisk,
}

/// Fetch the key of a locked disk; the guest's requests continue
#[derive(Debug, Args)]
pub(super) struct Unlock {
    #[command(flatten)]
    disk: ServedDisk,
}

/// Try the requests of a guest again that wait because the storage has failed them
#[derive(Debug, Args)]
pub(super) struct Resume {
    #[command(flatten)]
    disk: ServedDisk,
}

/// The disk that a verb asks.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(super) struct ServedDisk {
    /// The disk's name on this host (`sealblk define`)
    #[arg(value_name = "NAME")]
    name: Option<DiskName>,
    /// The control socket of `sealblk serve`, for a disk without a name
    #[arg(long, value_name = "SOCK")]
    control_socket: Option<PathBuf>,
}

impl ServedDisk {
    /// Its control socket.
    pub(super) fn socket(self) -> PathBuf {
        let of_name = self.name.map(|name| Sockets::of(&name).control);
        self.control_socket.or(of_name).unwrap_or_default()
    }
}

impl Status {
    pub(super) fn run(self) -> Result<(), Failure> {
        let socket = &self.disk.socket();
        if self.json {
            return output::print_json(&ask::<Value>(socket, "GetStatus", json!({}))?);
        }
        output::print(&text(&ask(socket, "GetStatus", json!({}))?))
    }
}

impl Lock {
    pub(super) fn run(self) -> Result<(), Failure> {
        ask::<Nothing>(&self.disk.socket(), "Lock", json!({})).map(drop)
    }
}

impl Unlock {
    pub(super) fn run(self) -> Result<(), Failure> {
        ask::<Nothing>(&self.disk.socket(), "Unlock", json!({})).map(drop)
    }
}

impl Resume {
    pub(super) fn run(self) -> Result<(), Failure> {
        let Resumed { transfers } = ask(&self.disk.socket(), "Resume", json!({}))?;
        output::print(&match transfers {
            0 => "no request waited for the storage\n".to_owned(),
            _ => format!(
                "transfers that are tried again: {transfers} (`sealblk status` shows those that fail again)\n"
            ),
        })
    }
}

#[derive(Deserialize)]
struct Resumed {
    transfers: u64,
}

#[derive(Deserialize)]
struct Nothing {}

fn text(status: &attachment::Status) -> String {
    let mut rows: Vec<[String; 2]> = Vec::new();
    let mut row = |what: &str, value: String| rows.push([what.to_owned(), value]);
    row("disk", text::printable(&status.disk));
    row("volume", format!("LUKS2 {}", status.volume));
    row("capacity", Size(status.capacity).to_string());
    row(
        "access",
        if status.read_only {
            "read-only"
        } else {
            "read and write"
        }
        .to_owned(),
    );
    if let Some(FrontEnd { connected, since }) = status.front_end {
        let since = since.map_or(String::new(), |since| format!(" since {since}"));
        let told = if connected {
            format!("connected{since}")
        } else {
            "not connected".to_owned()
        };
        row("front-end", told);
    }
    if let (Some(version), Some(process)) = (&status.version, status.process) {
        row(
            "served by",
            format!("process {process}, release {}", text::printable(version)),
        );
    }
    if let Some(before) = &status.before {
        let told = format!(
            "before by process {}, release {}, until {}",
            before.process,
            text::printable(&before.version),
            before.until
        );
        row("", told);
    }
    if let Some(sandbox) = &status.sandbox {
        let names: Vec<_> = sandbox.iter().map(|measure| measure.name()).collect();
        let none = "none".to_owned();
        row("sandbox", if names.is_empty() { none } else { names.join(", ") });
    }
    for missing in status.sandbox_missing.iter().flatten() {
        let reason = text::printable(&missing.reason);
        row("", format!("without {}: {reason}", missing.measure.name()));
    }
    match status.state {
        State::Open => row("state", "open".to_owned()),
        State::Locking => row("state", "locking: finishing the requests in flight".to_owned()),
        State::Locked => row("state", "locked: the guest's requests wait".to_owned()),
    }
    if let Some(held) = &status.held {
        let until = match held.by {
            HeldBy::Full => "the storage is full: requests wait until it has space",
            HeldBy::Hung => "the storage does not answer: the disk is not served until it does",
            HeldBy::Error => "the storage fails: requests wait until `sealblk resume`",
        };
        row("", format!("{until} ({} transfers)", held.transfers));
        row("", text::printable(&held.message));
    }
    if let Some(claim) = &status.claim {
        let told = match claim.state {
            ClaimState::Held => "held: no other process can attach the disk",
            ClaimState::Released => "released: no guest runs with the disk here",
            ClaimState::Waiting => {
                "waiting: another process has the disk, or its last writes have not landed; the guest's requests wait"
            }
            ClaimState::Refused => "refused: stop and continue the guest to try again; the reason:",
        };
        row("claim", told.to_owned());
        if let Some(message) = &claim.message {
            row("", text::printable(message));
        }
    }
    if let Some(lock) = &status.lock {
        match lock.by {
            LockedBy::Operator => row("", "until `sealblk unlock`".to_owned()),
            LockedBy::NoKey => row(
                "",
                "until its key is available; sealblk tries again regularly".to_owned(),
            ),
        }
        if let Some(message) = &lock.message {
            row("", message.clone());
        }
    }
    text::table(&rows)
}

/// Asks the disk that is served with this control socket.
pub(super) fn ask<T: DeserializeOwned>(
    socket: &Path,
    method: &str,
    parameters: impl Serialize,
) -> Result<T, Failure> {
    ask_within(socket, method, parameters, TIMEOUT)
}

/// The same, for an answer that must not take long.
pub(super) fn ask_within<T: DeserializeOwned>(
    socket: &Path,
    method: &str,
    parameters: impl Serialize,
    patience: Duration,
) -> Result<T, Failure> {
    let answer = || {
        let mut connection = Connection::to(socket, patience)?;
        let method = format!("{}.{method}", attachment::INTERFACE);
        call(&mut connection, &method, parameters, &[])
    };
    match answer() {
        Ok((answer, _)) => Ok(answer),
        Err(error) => Err(failure(socket, error)),
    }
}

/// Why a call on a control socket failed.
pub(super) fn failure(socket: &Path, error: CallError) -> Failure {
    match error {
        CallError::Method(error) => refused(socket, &error),
        source => Failure::Control {
            socket: socket.to_owned(),
            source,
        },
    }
}

fn refused(socket: &Path, error: &MethodError) -> Failure {
    if error.name.strip_prefix(attachment::INTERFACE) == Some(".NotDue") {
        return Failure::NotDue;
    }
    let field = |name: &str| error.parameters.get(name).and_then(Value::as_str);
    let message = match error.name.rsplit('.').next() {
        Some("Failed") => field("message").map(str::to_owned),
        Some("NotPermitted") => field("privilege").map(|privilege| {
            format!("this user lacks the privilege {privilege}; grant it in the configuration of the process that owns this socket")
        }),
        Some("TooManyWatchers") => Some("too many watchers; stop one of them".to_owned()),
        Some("EventsLost") => {
            Some("events were lost, because they came faster than this program read them; call again".to_owned())
        }
        _ => None,
    };
    Failure::Refused {
        socket: socket.to_owned(),
        message: message.unwrap_or_else(|| error.to_string()),
        reason: error
            .parameters
            .get("reason")
            .and_then(|reason| parsing::json_value(reason.clone()).ok()),
    }
}
