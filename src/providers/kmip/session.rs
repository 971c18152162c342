//! A connection to one KMIP server: mutual TLS, a version of the protocol that both sides speak, requests one by one.
//!
//! A session lasts for one operation of the provider and has one deadline, which holds for everything that a server does or
//! does not do. The session reads answers into the key arena, up to a limit.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use rustls::{ClientConnection, StreamOwned};

use super::address::Address;
use super::message::{ANSWER_LIMIT, Answer, AnswerError, Refusal, Request, VERSIONS, Version, tag};
use super::ttlv::{self, Malformed};
use crate::deadline::{Deadline, Timed};
use crate::keys::{KeyReason, KeyState};
use crate::providers::{tls::Client, tls::TlsFailure};
use sealblk_secmem::{arena::ArenaError, arena::SecretBytes};

/// A connection on which requests are answered.
pub(super) struct Session {
    stream: StreamOwned<ClientConnection, Timed<TcpStream>>,
    version: Version,
    tls: Client,
}

/// Why a server did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub(super) enum Trouble {
    #[error("its name is unknown")]
    Resolve(#[source] io::Error),
    #[error("the connection failed")]
    Connect(#[source] io::Error),
    #[error("there was no answer in time")]
    Timeout,
    #[error("the connection broke")]
    Broken(#[source] io::Error),
    #[error("it closed the connection without an answer")]
    Closed,
    #[error("TLS failed")]
    Tls(#[source] TlsFailure),
    #[error("the answer to {0} ends too early")]
    Truncated(&'static str),
    #[error("the answer to {request} is not a KMIP message")]
    Malformed {
        request: &'static str,
        source: Malformed,
    },
    #[error("the answer to {request} makes no sense")]
    Answer {
        request: &'static str,
        source: AnswerError,
    },
    #[error("the server refuses {request}")]
    Refused { request: &'static str, source: Refusal },
    #[error("it supports none of the KMIP versions 1.1 to 1.4, 2.0 and 2.1")]
    NoCommonVersion,
    #[error("it supports KMIP {0}, but wrap = \"server\" needs KMIP {v1_4} or later; wrap = \"client\" also works with older versions", v1_4 = Version::V1_4)]
    NoWrapping(Version),
    #[error("its state is {0:?}")]
    State(KeyState),
    #[error("the server calls this key {0:?}: use this name")]
    Spelled(String),
    #[error(
        "the key cannot be unwrapped: {} and the server's key {id:?} differ, or the answer was altered",
        file.display()
    )]
    NotUnwrapped { id: String, file: PathBuf },
    #[error("the key is not an AES-256 key")]
    NoKek(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error(transparent)]
    Arena(#[from] ArenaError),
}

impl Trouble {
    /// What an operator would act on.
    pub(super) fn reason(&self) -> KeyReason {
        match self {
            Self::Resolve(_) | Self::Connect(_) | Self::Timeout | Self::Broken(_) | Self::Closed => {
                KeyReason::Unreachable
            }
            Self::Tls(failure) => failure.reason,
            Self::Truncated(_) | Self::Malformed { .. } | Self::Answer { .. } | Self::NoKek(_) => {
                KeyReason::Garbled
            }
            Self::Refused { source, .. } => refusal_reason(source),
            Self::NotUnwrapped { .. } => KeyReason::Invalid,
            Self::NoCommonVersion | Self::NoWrapping(_) => KeyReason::Failed,
            Self::State(KeyState::Missing | KeyState::Destroyed) => KeyReason::Missing,
            Self::Spelled(_) => KeyReason::Missing,
            Self::State(_) => KeyReason::NotActive,
            Self::Arena(_) => KeyReason::Host,
        }
    }

    /// Whether this is the server's word on the key: no other server of the same keys is asked then.
    pub(super) fn is_verdict(&self) -> bool {
        match self.reason() {
            KeyReason::Missing | KeyReason::NotActive | KeyReason::Refused => true,
            // Not a server's.
            KeyReason::Host => true,
            _ => false,
        }
    }
}

/// By Result Reason: KMIP 2.1, section 11.48.
fn refusal_reason(refusal: &Refusal) -> KeyReason {
    match refusal.reason {
        // Item Not Found, Object Destroyed, Object Not Found.
        Some(0x01 | 0x36 | 0x37) => KeyReason::Missing,
        // Object Archived, Wrong Key Lifecycle State.
        Some(0x0d | 0x43) => KeyReason::NotActive,
        // Authentication Not Successful, Permission Denied, Sensitive, Not Extractable, Not Authorised.
        Some(0x03 | 0x0c | 0x16 | 0x17 | 0x39) => KeyReason::Refused,
        _ => KeyReason::Failed,
    }
}

impl Session {
    /// Connects to a server and agrees with it on a version.
    pub(super) fn open(address: &Address, tls: &Client, deadline: Instant) -> Result<Self, Trouble> {
        let name = ServerName::try_from(address.host().to_owned())
            .map_err(|e| Trouble::Resolve(io::Error::new(io::ErrorKind::InvalidInput, e)))?;
        let socket = Timed::new(connect(address, deadline)?, Deadline::at(deadline));
        let connection = tls.connect(name).map_err(Trouble::Tls)?;
        let mut stream = StreamOwned::new(connection, socket);
        while stream.conn.is_handshaking() {
            if let Err(e) = stream.conn.complete_io(&mut stream.sock) {
                return Err(broken_by(tls, &mut stream, e));
            }
        }
        let mut session = Self {
            stream,
            version: VERSIONS[0],
            tls: tls.clone(),
        };
        session.version = session.negotiate()?;
        Ok(session)
    }

    /// The version that both sides speak.
    pub(super) fn version(&self) -> Version {
        self.version
    }

    /// Asks for something, and reads the answer.
    pub(super) fn ask<T>(
        &mut self,
        request: &Request<'_>,
        read: impl FnOnce(Answer<'_>) -> Result<T, AnswerError>,
    ) -> Result<T, Trouble> {
        let name = request.name();
        let message = self.exchange(request)?;
        Answer::parse(&message, request.operation())
            .and_then(read)
            .map_err(|e| match e {
                AnswerError::Refused(source) => Trouble::Refused {
                    request: name,
                    source,
                },
                AnswerError::Arena(e) => Trouble::Arena(e),
                source => Trouble::Answer {
                    request: name,
                    source,
                },
            })
    }

    /// Asks for what has no other answer than that it is done.
    pub(super) fn order(&mut self, request: &Request<'_>) -> Result<(), Trouble> {
        self.ask(request, |_| Ok(()))
    }

    /// The best version of ours that the server has too. The question has to be put in a version too: in the oldest one,
    /// which most servers have, and to those that have not in the next.
    fn negotiate(&mut self) -> Result<Version, Trouble> {
        let mut told = Err(Trouble::NoCommonVersion);
        for version in VERSIONS.into_iter().rev() {
            self.version = version;
            told = self.ask(&Request::DiscoverVersions, |answer| Ok(answer.versions()));
            if !matches!(told, Err(Trouble::Refused { .. })) {
                break;
            }
        }
        let theirs = told?;
        let common = VERSIONS.into_iter().find(|version| theirs.contains(version));
        common.ok_or(Trouble::NoCommonVersion)
    }

    /// Sends a request, and receives a message.
    fn exchange(&mut self, request: &Request<'_>) -> Result<SecretBytes, Trouble> {
        let asked = request.encode(self.version)?;
        if let Err(e) = self.stream.write_all(&asked).and_then(|()| self.stream.flush()) {
            return Err(broken_by(&self.tls, &mut self.stream, e));
        }
        let truncated = |e: io::Error| match e.kind() {
            io::ErrorKind::UnexpectedEof => Trouble::Truncated(request.name()),
            _ => trouble(&self.tls, e),
        };
        let mut header = [0; ttlv::HEADER_LEN];
        self.stream
            .read_exact(&mut header[..1])
            .map_err(|e| trouble(&self.tls, e))?;
        self.stream.read_exact(&mut header[1..]).map_err(truncated)?;
        let len = ttlv::announced(&header, tag::RESPONSE_MESSAGE, ANSWER_LIMIT).map_err(|source| {
            let request = request.name();
            Trouble::Malformed { request, source }
        })?;
        let mut message = SecretBytes::zeroed(header.len() + len)?;
        message[..header.len()].copy_from_slice(&header);
        self.stream
            .read_exact(&mut message[header.len()..])
            .map_err(truncated)?;
        Ok(message)
    }
}

impl Drop for Session {
    /// Says good-bye, so that the server's log has no complaint; it does not matter whether that arrives.
    fn drop(&mut self) {
        self.stream.conn.send_close_notify();
        let _ = self.stream.conn.complete_io(&mut self.stream.sock);
    }
}

/// What is left until the deadline, which is not zero.
fn left(deadline: Instant) -> io::Result<Duration> {
    match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
        left => Ok(left),
    }
}

/// The deadline of the first of `count` attempts that have `deadline` together.
pub(super) fn share(deadline: Instant, count: usize) -> Instant {
    let now = Instant::now();
    let count = u32::try_from(count).unwrap_or(u32::MAX).max(1);
    now + deadline.saturating_duration_since(now) / count
}

/// Connects to the first address of the host that answers.
fn connect(address: &Address, deadline: Instant) -> Result<TcpStream, Trouble> {
    let addresses = resolve(address, deadline)?;
    let mut first = None;
    for (tried, socket_address) in addresses.iter().enumerate() {
        let connected = left(share(deadline, addresses.len() - tried))
            .and_then(|left| TcpStream::connect_timeout(socket_address, left))
            // Requests are small, and each waits for its answer.
            .and_then(|socket| socket.set_nodelay(true).map(|()| socket));
        match connected {
            Ok(socket) => return Ok(socket),
            Err(e) => {
                first.get_or_insert(e);
            }
        }
    }
    let none = || io::Error::new(io::ErrorKind::NotFound, "it has no address");
    Err(Trouble::Connect(first.unwrap_or_else(none)))
}

/// The host's addresses. The resolver has no deadline of its own: a thread waits for it, and may be left behind.
fn resolve(address: &Address, deadline: Instant) -> Result<Vec<SocketAddr>, Trouble> {
    if let Ok(ip) = address.host().parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(ip, address.port())]);
    }
    let (sender, receiver) = mpsc::channel();
    let asked = (address.host().to_owned(), address.port());
    thread::Builder::new()
        .name("resolver".into())
        .spawn(move || sender.send(asked.to_socket_addrs().map(Iterator::collect)))
        .map_err(Trouble::Resolve)?;
    let wait = left(deadline).map_err(Trouble::Resolve)?;
    let resolved = receiver.recv_timeout(wait).map_err(|_| Trouble::Timeout)?;
    resolved.map_err(Trouble::Resolve)
}

/// Why sending failed.
fn broken_by(
    tls: &Client,
    stream: &mut StreamOwned<ClientConnection, Timed<TcpStream>>,
    error: io::Error,
) -> Trouble {
    match trouble(tls, error) {
        broken @ Trouble::Broken(_) => tls
            .last_words(&mut stream.conn, &mut stream.sock)
            .map_or(broken, Trouble::Tls),
        trouble => trouble,
    }
}

/// What an error of the connection is.
fn trouble(tls: &Client, error: io::Error) -> Trouble {
    match error.kind() {
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Trouble::Timeout,
        io::ErrorKind::UnexpectedEof => Trouble::Closed,
        _ => match tls.explain_io(&error) {
            Some(failure) => Trouble::Tls(failure),
            None => Trouble::Broken(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_share_what_time_is_left() {
        let deadline = Instant::now() + Duration::from_secs(9);
        let third = share(deadline, 3).saturating_duration_since(Instant::now());
        assert!(
            third <= Duration::from_secs(3) && third > Duration::from_secs(2),
            "{third:?}"
        );
        assert_eq!(
            share(Instant::now(), 3).saturating_duration_since(Instant::now()),
            Duration::ZERO
        );
    }
}
