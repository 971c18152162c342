//! The host's key agent: the one process that talks to key providers and holds KEKs, for all `sealblk serve` of a host.
//!
//! ```text
//! service   what it answers on its socket, to whom, and what of it stands in the audit log
//! audit     that log: a chain that shows tampering
//! client    the other side: the agent's providers, as a volume sees providers
//! ```
//!
//! A disk's process has neither a KEK nor a provider's credentials: it gets the slot secret of one keyslot, through a
//! pipe. KEKs are kept for a while after their last fetch, in memory only.

mod audit;
mod client;
mod service;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

use crate::control::peer::Peer;
use crate::control::privilege::{Grants, Privilege};
use crate::control::socket::{BindError, Bound, bind, termination};
use crate::control::varlink;
use crate::keys::SharedProviders;

use audit::AuditLog;
pub use audit::{AuditError, Verified, verify};
pub use client::Client;
use service::Service;

/// Where its socket is, if nobody says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/sealblk/agent.sock";
/// How long a KEK is kept after it was fetched, if nobody says otherwise: a reboot's storm of attaches is over by then.
pub const DEFAULT_TIME_TO_LIVE: Duration = Duration::from_secs(600);

/// The most callers at a time; others wait to be accepted.
const MAX_CALLERS: usize = 1024;
/// The most callers of one user at a time, so that none keeps out the others; what is more is turned away.
const MAX_CALLERS_OF_USER: usize = MAX_CALLERS / 2;
/// How long a caller may be silent, or leave an answer unread.
const CALLER_TIMEOUT: Duration = Duration::from_secs(30);
/// A caller's thread calls into a provider's client, and into little else.
const STACK: usize = 1 << 20;
/// How often KEKs are looked at for their time.
const TICK: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// What a key is asked for. The interface describes which calls and privileges go with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Purpose {
    /// To serve a volume to a guest.
    Attach,
    /// To open a volume for something else.
    Access,
    /// To make a volume.
    Create,
    /// To give a volume another KEK.
    Recrypt,
    /// To prove that a provider works.
    Check,
}

impl Purpose {
    fn privilege(self) -> Privilege {
        match self {
            Self::Attach => Privilege::RegisterVM,
            Self::Access => Privilege::Access,
            Self::Create => Privilege::EncryptNew,
            Self::Recrypt => Privilege::Recrypt,
            Self::Check => Privilege::ReadKeyServersInfo,
        }
    }
}

/// How an agent is set up.
#[derive(Debug)]
pub struct Settings {
    /// Where the providers are, and the audit log.
    pub state_dir: PathBuf,
    /// Where it listens.
    pub socket: PathBuf,
    /// How long a KEK is kept after it was fetched.
    pub time_to_live: Duration,
    /// Who may do what.
    pub grants: Grants,
}

/// Why there is no agent.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Its socket.
    #[error(transparent)]
    Socket(#[from] BindError),
    /// Its audit log.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The host is out of something.
    #[error("the agent cannot be set up")]
    Setup(#[from] io::Error),
}

/// An agent whose socket answers from now on.
#[derive(Debug)]
pub struct Agent {
    listener: UnixListener,
    ending: OwnedFd,
    service: Arc<Service>,
    _bound: Bound,
}

impl Agent {
    /// Sets the agent up; its socket is the last of it. From here on SIGINT and SIGTERM wait for [`Agent::run`].
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn new(settings: Settings) -> Result<Self, AgentError> {
        let audit = AuditLog::open(&audit_log(&settings.state_dir))?;
        let providers = SharedProviders::new(&settings.state_dir, settings.time_to_live);
        let ending = termination()?;
        if let Some(dir) = settings.socket.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let (listener, bound) = bind(&settings.socket)?;
        // Anybody may ask; who may have what is decided by who it is.
        std::fs::set_permissions(&settings.socket, std::fs::Permissions::from_mode(0o666))?;
        listener.set_nonblocking(true)?;
        audit.record(
            "AgentStarted",
            serde_json::json!({ "process": std::process::id() }),
        )?;
        Ok(Self {
            listener,
            ending,
            service: Arc::new(Service::new(providers, settings.grants, audit)),
            _bound: bound,
        })
    }

    /// Answers until SIGINT or SIGTERM.
    ///
    /// # Errors
    /// If it cannot wait for callers.
    pub fn run(self) -> io::Result<()> {
        let callers = Arc::new(Callers::default());
        loop {
            let mut fds = [
                PollFd::new(&self.ending, PollFlags::IN),
                PollFd::from_borrowed_fd(self.listener.as_fd(), PollFlags::IN),
            ];
            match poll(&mut fds, Some(&TICK)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if !fds[0].revents().is_empty() {
                return Ok(());
            }
            let called = !fds[1].revents().is_empty();
            self.service.providers().drop_expired();
            if !called {
                continue;
            }
            callers.wait_for_place();
            match self.listener.accept() {
                Ok((stream, _)) => self.answer(stream, &callers),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    tracing::warn!(%error, "a caller cannot be accepted");
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn answer(&self, stream: UnixStream, callers: &Arc<Callers>) {
        let Ok(peer) = Peer::of(&stream) else { return };
        let Some(place) = Callers::place_for(callers, peer.user) else {
            tracing::debug!(user = peer.user, "a caller is turned away: its user has too many");
            return;
        };
        let service = Arc::clone(&self.service);
        let thread = std::thread::Builder::new()
            .name("caller".into())
            .stack_size(STACK);
        let spawned = thread.spawn(move || {
            if let Err(error) = varlink::serve(stream, &peer, &*service, CALLER_TIMEOUT) {
                tracing::debug!(%error, user = peer.user, "a caller was left");
            }
            drop(place);
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "a caller cannot be answered");
        }
    }
}

/// Those who are being answered: how many of each user.
#[derive(Debug, Default)]
struct Callers {
    of_users: Mutex<HashMap<u32, usize>>,
    left: Condvar,
}

/// A caller's place among them.
struct Place {
    callers: Arc<Callers>,
    user: u32,
}

impl Callers {
    /// Waits until there is a place for somebody.
    fn wait_for_place(&self) {
        let full = |of_users: &mut HashMap<u32, usize>| of_users.values().sum::<usize>() >= MAX_CALLERS;
        let waited = self.left.wait_while(self.lock(), full);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// A place for one more caller of `user`, if there is one.
    fn place_for(callers: &Arc<Self>, user: u32) -> Option<Place> {
        let mut of_users = callers.lock();
        let of_user = of_users.entry(user).or_default();
        if *of_user >= MAX_CALLERS_OF_USER {
            return None;
        }
        *of_user += 1;
        Some(Place {
            callers: Arc::clone(callers),
            user,
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u32, usize>> {
        self.of_users.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Entry::Occupied(mut of_user) = self.callers.lock().entry(self.user) {
            *of_user.get_mut() -= 1;
            if *of_user.get() == 0 {
                of_user.remove();
            }
        }
        self.callers.left.notify_one();
    }
}

/// Where the audit log of a state directory is.
pub fn audit_log(state_dir: &Path) -> PathBuf {
    state_dir.join("audit.log")
}
