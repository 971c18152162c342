//! The process that serves a disk, when another one is to serve it.

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use base16ct::lower;
use serde_json::json;

use super::{
    Begun, CONNECTION, CONTROL, END, ENVIRONMENT, GO, HandOver, INTERFACE, LIMIT, LISTENER, LOCKS, Locks,
    Names, Next, Prepare, Prepared, READY, STATE, STOP, State, VERSIONS, borrowed, content, say, send,
};
use crate::attachment::{Attachment, describe};
use crate::closer::ClosedElsewhere;
use crate::control::events::Event;
use crate::control::manager;
use crate::control::peer::Peer;
use crate::control::privilege::has_all;
use crate::control::server::Gate;
use crate::control::varlink::{self, MethodError, Reply, Request};
use crate::device::{Answer, Given, Guise, Handover, LentClaim, Message};
use crate::mutex::lock;

/// How a process was started.
#[derive(Debug)]
pub struct Origin {
    arguments: Vec<String>,
    directory: PathBuf,
    environment: Vec<String>,
}

impl Origin {
    /// Of this process, without the option `own` that `sealblk upgrade` has added. Call it while the process is where it was started.
    pub fn of_this(own: &str) -> Self {
        let is_own = |argument: &OsStr| argument.as_bytes().starts_with(own.as_bytes());
        let arguments = env::args_os().filter(|argument| !is_own(argument));
        let environment = ENVIRONMENT.iter().filter_map(|name| {
            let value = env::var_os(name)?;
            Some(hexadecimal(&[name.as_bytes(), b"=", value.as_bytes()].concat()))
        });
        Self {
            arguments: arguments
                .map(|argument| hexadecimal(argument.as_bytes()))
                .collect(),
            environment: environment.collect(),
            directory: env::current_dir().unwrap_or_default(),
        }
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    lower::encode_string(bytes)
}

/// See the module's header.
#[derive(Debug)]
pub struct Giver {
    pub served: Arc<Attachment>,
    pub handover: Handover,
    /// The number of queues that front-ends can have.
    pub queues: u16,
    /// The socket on which these methods are called.
    pub control: OwnedFd,
    /// Whether callers of that socket are taken.
    pub gate: Arc<Gate>,
    pub origin: Origin,
    /// The names of the listening sockets.
    pub front_ends_name: Option<(u64, u64)>,
    pub control_name: Option<(u64, u64)>,
    pub current: Mutex<Current>,
}

/// The upgrade that is under way.
#[derive(Debug, Default)]
pub struct Current {
    number: u64,
    /// How often the disk was changed before the new process could look at it; none before it has asked.
    changes: Option<u64>,
    /// Whether the disk is another process' by now.
    is_handed_over: bool,
}

type Answered = Result<Reply, MethodError>;

fn failed(message: &str) -> MethodError {
    MethodError::new(INTERFACE, "Failed", json!({ "message": message }))
}

fn out_of_date() -> MethodError {
    MethodError::new(INTERFACE, "OutOfDate", json!({}))
}

impl Giver {
    fn begin(&self) -> Answered {
        let stderr = io::stderr().as_fd().try_clone_to_owned();
        let stderr = stderr.map_err(|error| failed(&describe(&error)))?;
        let mut current = lock(&self.current);
        if current.is_handed_over {
            return Err(out_of_date());
        }
        current.number += 1;
        current.changes = None;
        let begun = Begun {
            upgrade: current.number,
            process: std::process::id(),
            user: rustix::process::geteuid().as_raw(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            arguments: self.origin.arguments.clone(),
            directory: hexadecimal(self.origin.directory.as_os_str().as_bytes()),
            environment: self.origin.environment.clone(),
            reads_once: self.served.reads_once(),
        };
        Ok(Reply::of(begun).with(stderr))
    }

    fn prepare(&self, mut request: Request<'_>) -> Answered {
        let Prepare { upgrade, versions } = request.parameters()?;
        let mut current = lock(&self.current);
        if current.is_handed_over || upgrade != current.number {
            return Err(out_of_date());
        }
        let version = VERSIONS.iter().filter(|version| versions.contains(version)).max();
        let version = *version
            .ok_or_else(|| MethodError::new(INTERFACE, "NoCommonVersion", json!({ "versions": VERSIONS })))?;
        let held = self.served.hold().ok_or_else(|| failed(CHANGING))?;
        current.changes = Some(self.served.changes());
        Ok(Reply::of(Prepared {
            version,
            process: std::process::id(),
            release: env!("CARGO_PKG_VERSION").to_owned(),
            guest: Guise::of(self.served.disk(), self.queues),
            key: held.state,
            sockets: Names {
                front_ends: self.front_ends_name,
                control: self.control_name,
            },
        }))
    }

    fn hand_over(&self, mut request: Request<'_>) -> Answered {
        let HandOver { upgrade, version } = request.parameters()?;
        // Meanwhile neither another upgrade begins, nor is this one cancelled.
        let mut current = lock(&self.current);
        if current.is_handed_over || upgrade != current.number {
            return Err(out_of_date());
        }
        let is_known = VERSIONS.contains(&version);
        let socket = request.descriptors.pop().filter(|_| is_known);
        let socket = socket.ok_or_else(|| MethodError::invalid_parameter("version"))?;
        let socket = ClosedElsewhere::from(UnixStream::from(socket));
        let changes = current.changes.ok_or_else(out_of_date)?;
        match self.give(&socket, changes) {
            Ok(next) => {
                current.is_handed_over = true;
                tracing::info!(process = next, "another process serves the disk from now on");
                Ok(Reply::default())
            }
            Err(error) => {
                let message = describe(&*error);
                tracing::warn!("the disk stays with this process: {message}");
                self.served
                    .tell(Event::UpgradeFailed, json!({ "message": message }));
                Err(failed(&message))
            }
        }
    }

    /// Gives all to the process behind `socket`, which serves the disk afterwards, and knows it as it was after so many `changes`.
    fn give(&self, socket: &UnixStream, changes: u64) -> Result<u32, Box<dyn std::error::Error>> {
        let served = &self.served;
        let disk = served.disk();
        let held = served.hold().ok_or(CHANGING)?;
        let answer = self.handover.ask(LIMIT)?;
        let loan = disk.lend_claim()?;
        // From here on neither a verb nor a claim changes the disk.
        if served.changes() != changes {
            return Err(CHANGED.into());
        }
        let past = loan.claim.past;
        let state = State {
            key: held.state,
            is_claimed: past.is_claimed,
            was_claimed: past.was_claimed,
            is_used: Some(past.is_used),
            guest_ran: Some(past.guest_ran),
            has_loss: disk.file.has_loss(),
            header_claims: Some(served.header_claim().past()),
            front_end: answer.given.served.as_ref().map(|served| served.since),
        };
        let next = match self.send(socket, &state, &loan.claim, &answer) {
            Ok(next) => next,
            Err(error) => {
                // Before a ring starts here. If it cannot be said, the other process has ended.
                let _ = say(socket, STOP);
                return Err(format!("the new process was not ready: {error}").into());
            }
        };
        // A caller that came to this process from now on would not get an answer.
        self.gate.set_closed(true);
        if let Err(error) = say(socket, GO) {
            self.gate.set_closed(false);
            return Err(format!("the new process has ended: {error}").into());
        }
        loan.leave();
        held.leave();
        // The manager may not read: no process waits for this one any more.
        manager::main_process(next);
        answer.leave();
        Ok(next)
    }

    /// Sends all, and waits until the other process is ready.
    fn send(
        &self,
        socket: &UnixStream,
        state: &State,
        claim: &LentClaim,
        answer: &Answer<Given>,
    ) -> io::Result<u32> {
        send(socket, STATE, state, &[])?;
        let (_, header) = self.served.backings();
        for part in &claim.parts {
            let locks = Locks {
                of_header: header.is_some_and(|header| header.path() == part.path),
                range: part.range.clone(),
                is_exclusive: part.is_exclusive,
            };
            send(socket, LOCKS, &locks, &borrowed(&part.descriptions))?;
        }
        if let Some(listener) = &answer.given.listener {
            send(socket, LISTENER, &json!({}), &[listener.as_fd()])?;
        }
        send(socket, CONTROL, &json!({}), &[self.control.as_fd()])?;
        if let Some(served) = &answer.given.served {
            send(socket, CONNECTION, &json!({}), &[served.connection.as_fd()])?;
            for message in &served.messages {
                message.try_clone()?.send(socket, LIMIT)?;
            }
        }
        say(socket, END)?;
        match Message::receive(socket, LIMIT).map_err(io::Error::other)? {
            Some(message) if message.number() == READY => content::<Next>(&message).map(|next| next.process),
            Some(_) => Err(io::ErrorKind::InvalidData.into()),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn end(&self, mut request: Request<'_>) -> Answered {
        let HandOver { upgrade, .. } = request.parameters()?;
        let mut current = lock(&self.current);
        if current.is_handed_over || upgrade != current.number {
            return Err(out_of_date());
        }
        current.number += 1;
        Ok(Reply::default())
    }
}

/// Why a disk cannot be handed over now.
const CHANGING: &str = "the disk's key is being fetched, wiped or changed: try again";
const CHANGED: &str = "the disk was resized or rekeyed while the new process started: try again";

impl varlink::Interface for Giver {
    fn name(&self) -> &'static str {
        INTERFACE
    }

    fn description(&self) -> &'static str {
        include_str!("org.sealblk.Upgrade.varlink")
    }

    fn knows(&self, peer: &Peer) -> bool {
        has_all(peer)
    }

    fn call(&self, method: &str, request: Request<'_>) -> Option<Answered> {
        let method: fn(&Self, Request<'_>) -> Answered = match method {
            "Begin" => |giver, _| giver.begin(),
            "Prepare" => Self::prepare,
            "HandOver" => Self::hand_over,
            "End" => Self::end,
            _ => return None,
        };
        if !has_all(request.peer) {
            let user = json!({ "user": request.peer.user });
            return Some(Err(MethodError::new(INTERFACE, "NotPermitted", user)));
        }
        Some(method(self, request))
    }
}
