//! The one way to a key: `sealblk serve` gets keys from a helper process, and from nothing else.
//!
//! ```text
//! sealblk serve                          its helper: sealblk key-helper
//! guest, front-end, control socket       configuration, state directory, providers, TLS, name service
//!   the volume key, expanded               no key, session or passphrase between requests
//!       |                                      |                    |                    |
//!       +--------- one socketpair -------------+              the agent's socket,  or providers of its own,
//!                                                                                   or the passphrase file
//! ```
//!
//! The process that a guest can attack holds no way to a key but this: it opens no provider, no credential and no passphrase file,
//! and connects to no agent. It starts the helper first, before it opens the disk, and cannot start another one later.
//!
//! **What is spoken.** Over the socketpair the serving process calls the methods of `org.sealblk.Agent`, in the same messages, by
//! the same code ([`Caller`]) as any client of the agent. More methods are in `org.sealblk.KeyHelper`: `Open` passes the
//! header's file, as a read-only description of its own that shares no lock with the claim; `ReadPassphrase` gives a passphrase. The helper
//! also tells what the serving process needs to know of the host: before `Open` the numbers of groups, after it the grants of the
//! configuration for this volume.
//!
//! **What the helper accepts.** It reads the header itself, once, and from then on answers for that volume's UUID only, for the
//! purposes attach and recrypt only. The path that the agent or the list of known
//! volumes gets to see is the helper's own. If the configuration has an agent, the helper forwards to it, by one connection for each
//! request, so that an agent that was restarted is found again. Otherwise it opens the provider in the state directory, for
//! this request. With `--passphrase-file` it reads that file at each request, and there are no providers.
//!
//! **What it keeps.** Between requests: the volume's UUID, the providers' settings (which hold paths and addresses), and the name of
//! the passphrase file. Slot secrets and passphrases pass through the key arena and leave by pipes.
//!
//! **Its life.** It inherits standard error, the socket, and a passphrase's descriptor if there is one, which the serving
//! process closes then; no other descriptor. It ignores the signals of a terminal and of a service manager that end the serving
//! process, and ends when the socket closes; the kernel kills it when the serving process has ended while a request is being
//! answered (PR_SET_PDEATHSIG). A thread of the serving process waits for it, tells the log when it ends too early, and leaves no
//! zombie. The disk is served on then, with the key that it has; what needs the helper says so ([`KeyReason::NoHelper`]), and
//! `lock` is refused, since nothing could unlock the disk again.
//!
//! The agent knows a caller by its user and groups, which both processes have in common. It lists the disk under the serving
//! process, which the helper names, and which the agent believes if it is the helper's parent.

mod process;

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use sealblk_base::blame::Blame;
use sealblk_command::secret::MAX_SECRET;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::control::privilege::Grants;
use crate::control::varlink::{CallError, call, object};
use crate::control::wire::Connection;
use crate::keys::RequestPurpose;
use crate::keys::remote::{Caller, Cause, Route, lacks_descriptors, unanswered};
use crate::keys::{KeyError, KeyReason, Providers};
use crate::mutex::lock;
use crate::parsing;
use crate::path_text;
use sealblk_secmem::arena::SecretBytes;

use process::Process;
pub use process::Settings;

/// The interface's name.
pub const INTERFACE: &str = "org.sealblk.KeyHelper";
/// It in varlink's interface definition language.
pub const DESCRIPTION: &str = include_str!("org.sealblk.KeyHelper.varlink");

/// `Open`, as the interface has it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Open {
    pub header: usize,
    pub path: String,
}

/// What it answers.
#[derive(Debug, Serialize, Deserialize)]
pub struct Opened {
    pub volume: Uuid,
}

/// What `GetGrants` answers.
#[derive(Debug, Serialize, Deserialize)]
pub struct GivenGrants {
    pub grants: Grants,
}

/// `GetGroup`, as the interface has it.
#[derive(Debug, Serialize, Deserialize)]
pub struct GroupName {
    pub name: String,
}

/// What it answers.
#[derive(Debug, Serialize, Deserialize)]
pub struct GroupNumber {
    pub number: u32,
}

/// `Detach`, as the interface has it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Detached {
    pub served: bool,
}

/// What `ReadPassphrase` answers.
#[derive(Debug, Serialize, Deserialize)]
pub struct Passphrase {
    pub forms: Vec<Form>,
}

/// A secret on its way.
#[derive(Debug, Serialize, Deserialize)]
pub struct Form {
    pub secret: usize,
    pub bytes: usize,
}

/// The error `Failed`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WireFailure {
    pub message: String,
    pub causes: Vec<String>,
    pub exit_code: u8,
}

/// What a helper cannot do, with what lies under it.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct HelperFailure {
    message: String,
    /// Where the cause lies.
    pub blame: Blame,
    source: Option<Box<Cause>>,
}

impl HelperFailure {
    /// It answers, and gives no passphrase.
    pub fn no_passphrase() -> Self {
        Self::of("the key helper returned none", Blame::Host)
    }

    fn of(message: &str, blame: Blame) -> Self {
        Self {
            message: message.to_owned(),
            blame,
            source: None,
        }
    }
}

/// Why a helper gives no answer that helps.
#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    /// It cannot do it.
    #[error(transparent)]
    Failed(#[from] HelperFailure),
    /// It has ended.
    #[error(transparent)]
    Ended(#[from] KeyError),
}

/// The helper of this process.
#[derive(Debug)]
pub struct KeyHelper(Arc<Line>);

/// The way to the helper.
struct Line {
    // First, so that the helper is dismissed before the connection ends.
    process: Process,
    connection: Mutex<Connection>,
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Line")
            .field("process", &self.process)
            .finish_non_exhaustive()
    }
}

impl KeyHelper {
    /// Starts the helper. It waits for [`KeyHelper::open`].
    ///
    /// # Errors
    /// If there can be no other process, or descriptors are exhausted.
    pub fn start(settings: Settings) -> std::io::Result<Self> {
        let (process, connection) = Process::start(settings)?;
        Ok(Self(Arc::new(Line {
            process,
            connection: Mutex::new(connection),
        })))
    }

    /// One that is behind `stream`.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn over(stream: std::os::unix::net::UnixStream, timeout: Duration) -> Self {
        Self(Arc::new(Line {
            process: Process::none(),
            connection: Mutex::new(Connection::new(stream, timeout)),
        }))
    }

    /// What the configuration grants to users and groups, of the volume that the helper serves.
    ///
    /// # Errors
    /// If the configuration cannot be used.
    pub fn grants(&self) -> Result<Grants, HelperError> {
        let answer = self.ask_first::<GivenGrants>("GetGrants", Map::new(), &[])?;
        Ok(answer.grants)
    }

    /// The number of the group `name`.
    ///
    /// # Errors
    /// If this host has no such group.
    pub fn group(&self, name: &str) -> Result<u32, HelperError> {
        let name = name.to_owned();
        let answer = self.ask_first::<GroupNumber>("GetGroup", GroupName { name }, &[])?;
        Ok(answer.number)
    }

    /// Has the helper read `header`, which `path` names, of the volume that it serves from then on: its UUID.
    ///
    /// # Errors
    /// Where there is no such volume for it, or no way to its keys.
    pub fn open(&self, header: &File, path: &Path) -> Result<Uuid, HelperError> {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let open = Open {
            header: 0,
            path: path_text::to_text(&path),
        };
        let answer = self.ask_first::<Opened>("Open", open, &[header.as_fd()])?;
        Ok(answer.volume)
    }

    /// Has a thread wait for the helper's end, which is told to the log.
    ///
    /// # Errors
    /// If threads are exhausted.
    pub fn watch(&self) -> std::io::Result<()> {
        self.0.process.watch()
    }

    /// Why it can do nothing any more, if that is so.
    pub fn ended(&self) -> Option<KeyError> {
        self.0.process.has_ended().then(|| self.0.fail())
    }

    /// Its providers, asked for `purpose`.
    pub fn providers(&self, purpose: RequestPurpose) -> impl Providers {
        let route: Arc<dyn Route> = Arc::<Line>::clone(&self.0);
        Caller::new(route, purpose)
    }

    /// The passphrase of the volume: the forms in which it may be meant.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn passphrase(&self) -> Result<Vec<SecretBytes>, HelperError> {
        let (Passphrase { forms }, descriptors) = self.ask("ReadPassphrase", Map::new(), &[])?;
        let take = |form: &Form| {
            let descriptor = descriptors
                .get(form.secret)
                .ok_or(std::io::ErrorKind::UnexpectedEof)?;
            receive(descriptor, form.bytes)
        };
        let secrets: std::io::Result<Vec<_>> = forms.iter().map(take).collect();
        Ok(secrets.map_err(|error| self.0.fail().because(error))?)
    }

    /// Reports that this process is about to end, and whether it has `served` the volume. Waits for the answer no longer than `limit`: the
    /// agent may not answer.
    pub fn detach(&self, served: bool, limit: Duration) {
        let (done, wait) = sync_channel(1);
        let line = Arc::clone(&self.0);
        let spawned = thread::Builder::new().name("detach".into()).spawn(move || {
            let parameters = Map::from_iter([("served".to_owned(), Value::Bool(served))]);
            let told = line.call(&format!("{INTERFACE}.Detach"), &parameters, &[]);
            let _ = done.send(told.map(drop));
        });
        if spawned.is_err() {
            return;
        }
        match wait.recv_timeout(limit) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "the agent is not told that the disk is detached"),
            Err(error) => tracing::debug!(%error, "the agent does not answer that the disk is detached"),
        }
    }

    /// Asks before the helper is watched: one that has ended has said why.
    fn ask_first<T: serde::de::DeserializeOwned>(
        &self,
        method: &str,
        parameters: impl Serialize,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<T, HelperError> {
        match self.ask(method, parameters, descriptors) {
            Ok((answer, _)) => Ok(answer),
            Err(HelperError::Ended(error)) => {
                // If it has not ended, for instance since it is of another version, it ends with its connection.
                lock(&self.0.connection).shut_down();
                Err(self.0.process.failure().map_or(error.into(), HelperError::Failed))
            }
            Err(failed @ HelperError::Failed(_)) => Err(failed),
        }
    }

    fn ask<T: serde::de::DeserializeOwned>(
        &self,
        method: &str,
        parameters: impl Serialize,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(T, Vec<OwnedFd>), HelperError> {
        let method = format!("{INTERFACE}.{method}");
        let called = self.0.call(&method, &object(parameters), descriptors);
        let (answer, descriptors) = called.map_err(|error| self.failure(error))?;
        let answer = parsing::json_value(Value::Object(answer));
        Ok((answer.map_err(|error| self.0.fail().because(error))?, descriptors))
    }

    fn failure(&self, error: CallError) -> HelperError {
        let told = match error {
            CallError::Method(told) => told,
            error => {
                let reason = unanswered(&*self.0, &error);
                return KeyError::new("", self.0.hop(), reason).because(error).into();
            }
        };
        let parameters = Value::Object(told.parameters.clone());
        match parsing::json_value::<WireFailure>(parameters) {
            Ok(failure) => HelperFailure {
                message: failure.message,
                blame: Blame::of_exit_code(failure.exit_code),
                source: Cause::of(failure.causes),
            }
            .into(),
            Err(_) => self.0.fail().because(CallError::Method(told)).into(),
        }
    }
}

impl Line {
    fn fail(&self) -> KeyError {
        KeyError::new("", self.hop(), self.no_answer())
    }
}

impl Route for Line {
    fn call(
        &self,
        method: &str,
        parameters: &Map<String, Value>,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(Map<String, Value>, Vec<OwnedFd>), CallError> {
        let mut connection = lock(&self.connection);
        let called = call(&mut connection, method, parameters, descriptors);
        match &called {
            Ok(_) | Err(CallError::Method(_)) => {}
            Err(error) if lacks_descriptors(error) => {}
            // What comes next could be the rest of this answer. The helper ends with its socket.
            Err(_) => {
                connection.shut_down();
                self.process.give_up();
            }
        }
        called
    }

    fn hop(&self) -> String {
        format!("the key helper, process {}", self.process.id())
    }

    fn no_answer(&self) -> KeyReason {
        KeyReason::NoHelper
    }
}

/// Takes a secret of so many bytes, which the helper writes meanwhile.
fn receive(descriptor: &OwnedFd, bytes: usize) -> std::io::Result<SecretBytes> {
    if bytes > MAX_SECRET {
        return Err(std::io::ErrorKind::FileTooLarge.into());
    }
    let mut secret = SecretBytes::zeroed(bytes).map_err(std::io::Error::other)?;
    std::fs::File::from(descriptor.try_clone()?).read_exact(&mut secret)?;
    Ok(secret)
}

/// A secret of any length on its way: the end of a pipe, to which a thread writes it.
///
/// # Errors
/// If descriptors or threads are exhausted.
pub fn give(secret: SecretBytes) -> std::io::Result<OwnedFd> {
    let (take, mut give) = std::io::pipe()?;
    std::thread::Builder::new()
        .name("passphrase".into())
        // Who does not take it has ended.
        .spawn(move || drop(std::io::Write::write_all(&mut give, &secret)))?;
    Ok(take.into())
}

/// `path`, as [`Open`] tells it.
pub fn path_of(open: &Open) -> std::path::PathBuf {
    path_text::from_text(&open.path)
}

/// A descriptor as a path by which it can be opened again.
pub fn reopened(descriptor: &OwnedFd) -> std::path::PathBuf {
    use std::os::fd::AsRawFd;
    Path::new("/proc/self/fd").join(descriptor.as_raw_fd().to_string())
}
