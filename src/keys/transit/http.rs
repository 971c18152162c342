//! One server's HTTP API, for as long as an operation may take.
//!
//! No redirects are followed, and no proxy of the environment is used. Answers are read into the key arena, up to a limit, and
//! understood where they lie.

use std::io::Read;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use ureq::http::HeaderValue;
use ureq::unversioned::resolver::DefaultResolver;
use ureq::unversioned::transport::{Connector, TcpConnector};
use ureq::{Agent, RequestBuilder};

use super::connector::TlsConnector;
use super::failure::{Failure, Nonsense, Refusal};
use crate::keys::KeyReason;
use crate::keys::arena::SecretBytes;
use crate::keys::tls::TlsFiles;

/// The longest answer that is read: a key with a few thousand versions.
const ANSWER_LIMIT: usize = 64 << 10;
/// What most answers fit into.
const ANSWER_USUAL: usize = 4 << 10;
/// Two credentials in JSON, with every character of them escaped.
const REQUEST_LIMIT: usize = 20 << 10;

/// A server, until the deadline.
pub(super) struct Server<'a> {
    agent: Agent,
    address: &'a str,
    namespace: Option<&'a str>,
    deadline: Instant,
}

/// What a server has answered.
pub(super) struct Answer {
    status: u16,
    body: SecretBytes,
}

impl<'a> Server<'a> {
    /// The server at `address`. Connections of this value are made with the files as they are now.
    pub(super) fn new(
        address: &'a str,
        namespace: Option<&'a str>,
        files: &TlsFiles,
        deadline: Instant,
    ) -> Result<Self, Failure> {
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
            namespace,
            deadline,
        })
    }

    pub(super) fn get(&self, path: &str, token: &SecretBytes) -> Result<Answer, Failure> {
        let request = self.with_headers(self.agent.get(self.url(path)), Some(token))?;
        let request = request.config().timeout_global(Some(self.remaining())).build();
        Answer::read(request.call()?)
    }

    pub(super) fn post(
        &self,
        path: &str,
        token: Option<&SecretBytes>,
        body: &impl Serialize,
    ) -> Result<Answer, Failure> {
        let mut json = SecretBytes::zeroed(REQUEST_LIMIT)?;
        let mut rest = &mut json[..];
        serde_json::to_writer(&mut rest, body).expect("names and one-line secrets are shorter than this");
        let unused = rest.len();
        let request = self.with_headers(self.agent.post(self.url(path)), token)?;
        let request = request.config().timeout_global(Some(self.remaining())).build();
        Answer::read(request.send(&json[..REQUEST_LIMIT - unused])?)
    }

    /// Every part of `path` was checked when the settings or the key ID were.
    fn url(&self, path: &str) -> String {
        format!("{}/v1/{path}", self.address)
    }

    fn remaining(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    fn with_headers<B>(
        &self,
        mut request: RequestBuilder<B>,
        token: Option<&SecretBytes>,
    ) -> Result<RequestBuilder<B>, Failure> {
        request = request
            .header("X-Vault-Request", "true")
            .header("Content-Type", "application/json");
        if let Some(namespace) = self.namespace {
            request = request.header("X-Vault-Namespace", namespace);
        }
        if let Some(token) = token {
            let mut value =
                HeaderValue::from_bytes(token).map_err(|e| Failure::new(KeyReason::Invalid, e))?;
            value.set_sensitive(true);
            request = request.header("X-Vault-Token", value);
        }
        Ok(request)
    }
}

impl Answer {
    fn read(response: ureq::http::Response<ureq::Body>) -> Result<Self, Failure> {
        let status = response.status().as_u16();
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
        Ok(Self { status, body })
    }

    /// The body, if the request has succeeded.
    pub(super) fn body(self) -> Result<Body, Refusal> {
        match self.status {
            200..=299 => Ok(Body(self.body)),
            status => Err(Refusal::new(status, &self.body)),
        }
    }
}

/// JSON that may hold keys.
pub(super) struct Body(SecretBytes);

impl Body {
    /// What it says. Strings are borrowed from it, and stay in the arena so.
    pub(super) fn parse<'a, T: Deserialize<'a>>(&'a self) -> Result<T, Failure> {
        Ok(serde_json::from_slice(&self.0)?)
    }
}
