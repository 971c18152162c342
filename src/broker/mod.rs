//! The broker, for sites without a Key Broker Service. It identifies hosts by their TPMs, and releases a key to a host
//! that proves for each release that it has booted the expected software.
//!
//! ```text
//! settings   the settings file
//! state      the stored state: sealed resources, hosts, reference values
//! http       one request of a connection, limited in time and size
//! session    nonces: single-use and short-lived; nothing is stored before their answer
//! service    the answers to requests (crate::kbs has the messages)
//! evidence   the check of a quote
//! enrolment  the check that a TPM is genuine, and to which host it belongs
//! ```
//!
//! A connection has a thread and serves one request, so no data of a host outlive the connection, and the limit on threads
//! limits everything. The broker is blocking like the rest of sealblk: an executor would be its largest part.

mod enrolment;
pub mod evidence;
mod http;
mod service;
mod session;
mod settings;
pub mod state;

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::{ServerConnection, StreamOwned};
use sealblk_base::blame::Blame;
use serde_json::json;

use crate::audit::{AuditError, AuditLog};
use crate::control::events::Event;
use crate::control::manager;
use crate::control::quota::{Quota, Share};
use crate::control::socket::{listen, termination};
use crate::deadline::{Deadline, Timed};
use crate::providers::tls::TlsFileError;

use service::Service;
pub use settings::{Settings, SettingsError};
pub use state::{State, StateError};

/// The most connections at a time, and the most of one address, or of one network of IPv6 (/64), which is what one machine
/// can have: it does not keep the others out. What is more is closed at once.
const MAX_CONNECTIONS: usize = 128;
const MAX_OF_ADDRESS: usize = 32;
/// How long a connection may take, all in all.
const DEADLINE: Duration = Duration::from_secs(10);

/// A broker that listens.
#[derive(Debug)]
pub struct Broker {
    listener: TcpListener,
    ending: OwnedFd,
    settings: Arc<Settings>,
    service: Arc<Service>,
    connections: Arc<Quota<u64>>,
}

/// Why there is no broker.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// Its settings.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// What it keeps.
    #[error(transparent)]
    State(#[from] StateError),
    /// Its certificate, its key, or the certificates of TPMs' makers.
    #[error("cannot set up the broker")]
    Tls(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Its audit log.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The host has no random numbers.
    #[error("cannot set up the broker")]
    Random(#[source] getrandom::Error),
    /// Its address.
    #[error(
        "the broker cannot listen on {address}; use an address of this host that no other process listens on"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The answer.
        source: io::Error,
    },
}

impl BrokerError {
    /// Where the cause lies.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Settings(error) => error.blame(),
            Self::State(error) => error.blame(),
            Self::Audit(error) => error.blame(),
            Self::Tls(_) => Blame::Operator,
            Self::Listen { source, .. } => match source.kind() {
                io::ErrorKind::AddrInUse => Blame::Use,
                _ => Blame::Host,
            },
            Self::Random(_) => Blame::Host,
        }
    }
}

impl From<TlsFileError> for BrokerError {
    fn from(error: TlsFileError) -> Self {
        Self::Tls(Box::new(error))
    }
}

impl Broker {
    /// Sets it up. From here on SIGINT and SIGTERM wait for [`Broker::run`].
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn new(settings: Settings) -> Result<Self, BrokerError> {
        let failed = |source| BrokerError::Listen {
            address: settings.listen,
            source,
        };
        // They are read for each connection; wrong ones show here.
        settings.identity().load()?;
        let state = State::open(&settings.state_dir)?;
        let audit = AuditLog::open(&audit_log(&settings.state_dir))?;
        let ending = termination().map_err(failed)?;
        let listener = TcpListener::bind(settings.listen).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        audit.record(
            Event::BrokerStarted,
            &json!({ "address": address.to_string(), "process": std::process::id() }),
        )?;
        let service = Service::new(&settings, state, audit)?;
        Ok(Self {
            listener,
            ending,
            settings: Arc::new(settings),
            service: Arc::new(service),
            connections: Arc::default(),
        })
    }

    /// Answers until SIGINT or SIGTERM.
    ///
    /// # Errors
    /// If it cannot wait for hosts.
    pub fn run(self) -> io::Result<()> {
        listen(&self.listener, &self.ending, manager::watchdog(), || {
            let (socket, peer) = self.listener.accept()?;
            self.answer(socket, peer);
            Ok(())
        })
    }

    fn answer(&self, socket: TcpStream, peer: SocketAddr) {
        let Some(place) = place_for(&self.connections, peer.ip()) else {
            return;
        };
        let (settings, service) = (Arc::clone(&self.settings), Arc::clone(&self.service));
        let work = move || {
            let _place = place;
            if let Err(error) = serve(socket, peer, &settings, &service) {
                tracing::debug!(%peer, %error, "a connection has ended early");
            }
        };
        let started = std::thread::Builder::new()
            .name("connection".to_owned())
            .spawn(work);
        if let Err(error) = started {
            tracing::warn!(%error, "a host cannot be answered");
        }
    }
}

/// A place for one more connection of `address`, if there is one.
fn place_for(connections: &Arc<Quota<u64>>, address: IpAddr) -> Option<Share<u64>> {
    let owner = match address.to_canonical() {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => (address.to_bits() >> 64) as u64,
    };
    Quota::take(connections, owner, |taken| {
        let all: usize = taken.values().sum();
        all < MAX_CONNECTIONS && taken.get(&owner).is_none_or(|own| *own < MAX_OF_ADDRESS)
    })
}

fn serve(socket: TcpStream, peer: SocketAddr, settings: &Settings, service: &Service) -> io::Result<()> {
    let config = settings.identity().load().map_err(|error| {
        tracing::error!(path = %error.path.display(), "the broker's certificate or key can no longer be used");
        io::Error::other(error)
    })?;
    let connection = ServerConnection::new(config).map_err(io::Error::other)?;
    let socket = Timed::new(socket, Deadline::after(DEADLINE));
    let mut stream = StreamOwned::new(connection, socket);
    let answer = match http::read(&mut stream) {
        Ok(request) => service.answer(peer, &request),
        Err(http::ReadError::Io(error)) => return Err(error),
        Err(http::ReadError::Status(status)) => http::Response::empty(status),
    };
    answer.write(&mut stream)?;
    stream.conn.send_close_notify();
    while stream.conn.wants_write() {
        stream.conn.write_tls(&mut stream.sock)?;
    }
    Ok(())
}

/// Where the audit log of a state directory is.
pub fn audit_log(state_dir: &Path) -> std::path::PathBuf {
    state_dir.join("audit.log")
}
