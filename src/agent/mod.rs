//! The host's key agent: the one process that talks to key providers and holds KEKs, for all `sealblk serve` of a host.
//!
//! ```text
//! service       the methods on its socket, the check of privileges, and the records in the audit log
//! manage        methods for the management of keys and providers
//! registered    the volumes that are being served, and their KEKs
//! certificates  reports of certificates that are about to expire
//! erasure       records of erasures in the audit log
//! client        the other side: calls to the agent's socket
//! hostile       callers that say anything, for tests and fuzz targets alone
//! messages      the messages between the two about management
//! ```
//!
//! A disk's process has neither a KEK nor a provider's credentials: it gets the slot secret of one keyslot, through a
//! pipe. The agent keeps KEKs for a limited time after their fetch, in memory only.

mod certificates;
mod client;
mod erasure;
#[cfg(any(test, fuzzing))]
pub mod hostile;
mod listing;
mod manage;
mod messages;
mod registered;
mod service;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use sealblk_base::blame::Blame;

use crate::closer::ClosedElsewhere;
use crate::control::events::Event;
use crate::control::privilege::Grants;
use crate::control::socket::{self, BindError, Bound, Permissions, termination};
use crate::control::varlink::Interface;
use crate::control::{manager, server};
use crate::providers::{SealedCache, SealedCacheSettings, SharedProviders};

use crate::audit::AuditLog;
pub use crate::audit::{AuditError, Verified, verify, verify_each};
pub use client::Client;
pub use erasure::{Erasure, ErasureStep, record_erasure};
pub use registered::Registrant;
use service::Service;
pub(crate) use service::failure;

/// Where its socket is, if nobody says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/sealblk/agent.sock";
/// How long a KEK is kept after it was fetched, if nobody says otherwise: a reboot's storm of attaches is over by then.
pub const DEFAULT_TIME_TO_LIVE: Duration = Duration::from_secs(600);

/// How long the KEK of a volume is kept whose process was killed, if nobody says otherwise: time for a service manager, or a person, to
/// start another one.
pub const DEFAULT_KEK_GRACE: Duration = Duration::from_secs(600);

/// How often KEKs are looked at for their time, and processes for their end.
const TICK: Duration = Duration::from_secs(1);

/// Its name, and what it is.
type Chore = (&'static str, fn(&Service));

/// What is done so often. Each may have to wait for storage: the audit log's, or that of a certificate.
const CHORES: [Chore; 3] = [
    ("keys", Service::drop_expired),
    ("ended", Service::tell_ended),
    ("certificates", Service::tell_expiring),
];

/// How an agent is set up.
#[derive(Debug)]
pub struct Settings {
    /// Where the providers are, and the audit log.
    pub state_dir: PathBuf,
    /// Where it listens.
    pub socket: PathBuf,
    /// Who may connect there.
    pub permissions: Permissions,
    /// How long a KEK is kept after it was fetched.
    pub time_to_live: Duration,
    /// How long the KEK of a volume is kept whose process was killed.
    pub kek_grace: Duration,
    /// What it keeps for a reboot while a provider's servers are away.
    pub sealed_cache: Option<SealedCacheSettings>,
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
    /// The directory that its socket is to be in.
    #[error(
        "cannot make {}, the directory of the agent's socket; make it with write access for this user, or name another socket \
         (--socket-path, or `socket` under [agent] in the configuration)",
        dir.display()
    )]
    Dir {
        /// The directory.
        dir: PathBuf,
        /// The answer.
        source: io::Error,
    },
    /// What the service manager has started it with.
    #[error(
        "the service manager has started the agent with something that is not a listening Unix socket; correct its socket unit"
    )]
    Activated(#[source] io::Error),
    /// The host is out of something.
    #[error(
        "the agent cannot accept callers: this host is out of descriptors or threads; raise LimitNOFILE or TasksMax"
    )]
    Setup(#[from] io::Error),
}

impl AgentError {
    /// Where the cause lies.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Socket(error) => error.blame(),
            Self::Audit(error) => error.blame(),
            Self::Dir { .. } => Blame::Storage,
            Self::Activated(_) => Blame::Operator,
            Self::Setup(_) => Blame::Host,
        }
    }
}

/// An agent whose socket answers from now on.
#[derive(Debug)]
pub struct Agent {
    listener: ClosedElsewhere<UnixListener>,
    ending: OwnedFd,
    service: Arc<Service>,
    /// None if the socket is the service manager's.
    _bound: Option<Bound>,
}

impl Agent {
    /// Sets the agent up; its socket is the last of it. From here on SIGINT and SIGTERM wait for [`Agent::run`].
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn new(settings: Settings) -> Result<Self, AgentError> {
        let audit = AuditLog::open(&audit_log(&settings.state_dir))?;
        let mut providers = SharedProviders::new(&settings.state_dir, settings.time_to_live);
        let sealed = settings.sealed_cache.as_ref();
        match sealed
            .map(|sealed| SealedCache::open(&settings.state_dir, sealed))
            .transpose()
        {
            Ok(Some(sealed)) => providers = providers.with_sealed_cache(sealed),
            Ok(None) => {}
            // Without it, disks open as long as their providers answer.
            Err(error) => tracing::error!("{error}"),
        }
        let ending = termination()?;
        let (listener, bound) = listen(&settings)?;
        audit.record(
            Event::AgentStarted,
            &serde_json::json!({ "process": std::process::id() }),
        )?;
        Ok(Self {
            listener: listener.into(),
            ending,
            service: Arc::new(Service::new(
                providers,
                settings.kek_grace,
                settings.grants,
                audit,
            )),
            _bound: bound,
        })
    }

    /// Answers until SIGINT or SIGTERM.
    ///
    /// # Errors
    /// If it cannot wait for callers.
    pub fn run(self) -> io::Result<()> {
        for (name, chore) in CHORES {
            let service = Arc::downgrade(&self.service);
            // Nobody waits for it: what holds it up holds up no other chore, no caller and not the end.
            thread::Builder::new().name(name.to_owned()).spawn(move || {
                loop {
                    thread::sleep(TICK);
                    let Some(service) = service.upgrade() else { return };
                    chore(&service);
                }
            })?;
        }
        let service: Arc<dyn Interface> = Arc::<Service>::clone(&self.service);
        server::run(
            &self.listener,
            &self.ending,
            &[service].into(),
            &server::Gate::default(),
            manager::watchdog(),
        )
    }
}

/// The socket that the service manager has for the agent, else one of its own.
fn listen(settings: &Settings) -> Result<(UnixListener, Option<Bound>), AgentError> {
    if let Some(listener) = socket::activated().map_err(AgentError::Activated)? {
        let address = listener.local_addr()?;
        let path = address.as_pathname().unwrap_or(Path::new(""));
        if path != settings.socket {
            tracing::warn!(
                listens = %path.display(),
                configured = %settings.socket.display(),
                "the unit sealblk-agent.socket and `socket` under [agent] name different sockets: verbs and disks do not find the agent"
            );
        }
        return Ok((listener, None));
    }
    if let Some(dir) = settings.socket.parent() {
        std::fs::create_dir_all(dir).map_err(|source| AgentError::Dir {
            dir: dir.to_owned(),
            source,
        })?;
    }
    let (listener, bound) = socket::bind(&settings.socket, settings.permissions)?;
    Ok((listener, Some(bound)))
}

/// Where the audit log of a state directory is.
pub fn audit_log(state_dir: &Path) -> PathBuf {
    state_dir.join("audit.log")
}
