//! Requests to the JSON API of an HTTPS server, within the time limit of an operation, and the choice among several servers.
//!
//! The client follows no redirects, and uses no proxy of the environment. It reads answers into the key arena, up to a
//! limit, and parses them there.

mod connector;
mod failure;

use std::io::Read;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use ureq::Agent;
use ureq::http::header::SET_COOKIE;
use ureq::http::{HeaderMap, HeaderValue};
use ureq::unversioned::resolver::DefaultResolver;
use ureq::unversioned::transport::{Connector, TcpConnector};

use self::connector::TlsConnector;
pub(super) use self::failure::{Failure, Nonsense};
use super::source::LONGEST_TIMEOUT;
use super::tls::TlsFiles;
use crate::keys::KeyError;
use crate::parsing;
use sealblk_secmem::arena::SecretBytes;

/// The longest answer that is read: a key with a few thousand versions.
const ANSWER_LIMIT: usize = 64 << 10;
/// What most answers fit into.
const ANSWER_USUAL: usize = 4 << 10;
/// Two credentials in JSON, with every character of them escaped.
const REQUEST_LIMIT: usize = 20 << 10;

/// A setting by which no server can be asked. What stands there instead is not shown: it may be a secret in the wrong place.
#[derive(Debug, thiserror::Error)]
pub(super) enum Setting {
    #[error("address {0} is not valid: write https://HOST:PORT, with nothing before HOST or after PORT")]
    Address(usize),
    #[error("the address of a server is missing")]
    NoAddress,
    #[error("{0}: write an absolute path")]
    Relative(&'static str),
    #[error("timeout = {0}: must be 1 to {LONGEST_TIMEOUT} seconds")]
    Timeout(u16),
}

/// What is sent beside the usual.
pub(super) type Header = (&'static str, HeaderValue);

/// A server, until the deadline.
pub(super) struct Server<'a> {
    agent: Agent,
    address: &'a str,
    deadline: Instant,
}

/// What a server has answered.
pub(super) struct Answer {
    pub(super) status: u16,
    /// A cookie that is to be sent back, as in `name=value`.
    pub(super) cookie: Option<HeaderValue>,
    pub(super) body: Body,
}

impl<'a> Server<'a> {
    /// The server at `address`. Connections of this value are made with the files as they are now.
    pub(super) fn new(address: &'a str, files: &TlsFiles, deadline: Instant) -> Result<Self, Failure> {
        let connector = TcpConnector::default().chain(TlsConnector(files.load()?));
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .https_only(true)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(None)
            .user_agent(concat!("sealblk/", env!("CARGO_PKG_VERSION")))
            .build();
        Ok(Self {
            agent: Agent::with_parts(config, connector, DefaultResolver::default()),
            address,
            deadline,
        })
    }

    /// Every part of `path` was checked when the settings or the key ID were.
    pub(super) fn get(&self, path: &str, headers: &[Header]) -> Result<Answer, Failure> {
        let mut request = self.agent.get(self.url(path));
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        let request = request.config().timeout_global(Some(self.remaining())).build();
        Answer::read(request.call()?)
    }

    /// The same, with a body.
    pub(super) fn post(
        &self,
        path: &str,
        headers: &[Header],
        body: &impl Serialize,
    ) -> Result<Answer, Failure> {
        let mut json = SecretBytes::zeroed(REQUEST_LIMIT)?;
        let mut rest = &mut json[..];
        // Ours is shorter; what a server has given to be sent back may be longer.
        serde_json::to_writer(&mut rest, body).map_err(|_| Nonsense::TooMuch(REQUEST_LIMIT))?;
        let unused = rest.len();
        let mut request = self
            .agent
            .post(self.url(path))
            .header("Content-Type", "application/json");
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        let request = request.config().timeout_global(Some(self.remaining())).build();
        Answer::read(request.send(&json[..REQUEST_LIMIT - unused])?)
    }

    fn url(&self, path: &str) -> String {
        format!("{}/{path}", self.address)
    }

    fn remaining(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }
}

impl Answer {
    fn read(response: ureq::http::Response<ureq::Body>) -> Result<Self, Failure> {
        let status = response.status().as_u16();
        let cookie = cookie(response.headers());
        let mut reader = response.into_body().into_reader();
        let mut body = SecretBytes::zeroed(ANSWER_USUAL)?;
        let mut len = 0;
        loop {
            if len == body.len() {
                if len >= ANSWER_LIMIT {
                    return Err(Nonsense::TooLong(ANSWER_LIMIT).into());
                }
                let mut longer = SecretBytes::zeroed(2 * len)?;
                longer[..len].copy_from_slice(&body);
                body = longer;
            }
            match reader.read(&mut body[len..])? {
                0 => break,
                read => len += read,
            }
        }
        body.truncate(len);
        Ok(Self {
            status,
            cookie,
            body: Body(body),
        })
    }

    /// The body, if the request has succeeded; else what `refused` makes of the status and the body.
    pub(super) fn success<E>(self, refused: impl FnOnce(u16, &[u8]) -> E) -> Result<Body, E> {
        match self.status {
            200..=299 => Ok(self.body),
            status => Err(refused(status, &self.body.0)),
        }
    }
}

/// The first cookie, without what a browser would be told of it.
fn cookie(headers: &HeaderMap) -> Option<HeaderValue> {
    let set = headers.get(SET_COOKIE)?.as_bytes();
    let pair = set.split(|byte| *byte == b';').next()?;
    HeaderValue::from_bytes(pair).ok()
}

/// JSON that may hold keys.
pub(super) struct Body(SecretBytes);

impl Body {
    /// What it says. Strings are borrowed from it, and stay in the arena so.
    pub(super) fn parse<'a, T: Deserialize<'a>>(&'a self) -> Result<T, Failure> {
        Ok(parsing::json(&self.0)?)
    }
}

/// Has `request` answered by the first of `addresses` that can, within `timeout` for all of them.
pub(super) fn ask<T>(
    provider: &str,
    addresses: &[String],
    timeout: Duration,
    request: impl Fn(&str, Instant) -> Result<T, Failure>,
) -> Result<T, KeyError> {
    let ends = Instant::now() + timeout;
    let mut left = addresses.len() as u32;
    for address in addresses {
        let now = Instant::now();
        let deadline = now + ends.saturating_duration_since(now) / left;
        left -= 1;
        match request(address, deadline) {
            Ok(answer) => return Ok(answer),
            Err(failure) if failure.is_of_this_server() && left > 0 => {
                tracing::warn!(
                    provider,
                    server = address,
                    reason = failure.reason.what(),
                    cause = %failure.cause,
                    "asking the next key server"
                );
            }
            Err(failure) => {
                let hop = failure.hop.as_ref().unwrap_or(address);
                return Err(KeyError::new(provider, hop, failure.reason).because(failure.cause));
            }
        }
    }
    unreachable!("the settings have an address, and the last one's failure is returned")
}

/// Checks what every provider has in its settings that asks such servers.
pub(super) fn check<'a>(
    addresses: &[String],
    files: impl IntoIterator<Item = (&'static str, &'a PathBuf)>,
    timeout: u16,
) -> Result<(), Setting> {
    if addresses.is_empty() {
        return Err(Setting::NoAddress);
    }
    if let Some(at) = addresses.iter().position(|address| !is_address(address)) {
        return Err(Setting::Address(at + 1));
    }
    if let Some((field, _)) = files.into_iter().find(|(_, path)| !path.is_absolute()) {
        return Err(Setting::Relative(field));
    }
    match timeout {
        1..=LONGEST_TIMEOUT => Ok(()),
        timeout => Err(Setting::Timeout(timeout)),
    }
}

/// The addresses as they are shown: what is none may hold a password.
pub(super) fn location(addresses: &[String]) -> String {
    let shown = addresses.iter().map(|address| match is_address(address) {
        true => address.as_str(),
        false => "(no address)",
    });
    shown.collect::<Vec<_>>().join(", ")
}

/// `https://HOST` or `https://HOST:PORT`.
fn is_address(text: &str) -> bool {
    let Some(authority) = text.strip_prefix("https://") else {
        return false;
    };
    let Ok(parsed) = authority.parse::<ureq::http::uri::Authority>() else {
        return false;
    };
    let has_port = authority.len() > parsed.host().len();
    !parsed.host().is_empty() && !authority.contains('@') && (!has_port || parsed.port_u16().is_some())
}
