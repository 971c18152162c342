//! The API of OpenBao and Vault: the common part of all requests.

use std::time::Instant;

use serde::Serialize;
use ureq::http::HeaderValue;

use super::failure::Refusal;
use crate::keys::KeyReason;
use crate::providers::tls::TlsFiles;
use crate::providers::{https, https::Body, https::Failure, https::Header};
use sealblk_secmem::arena::SecretBytes;

/// A server, until the deadline.
pub(super) struct Server<'a> {
    server: https::Server<'a>,
    namespace: Option<&'a str>,
}

/// What a server has answered.
pub(super) struct Answer(https::Answer);

impl<'a> Server<'a> {
    /// The server at `address`. Connections of this value are made with the files as they are now.
    pub(super) fn new(
        address: &'a str,
        namespace: Option<&'a str>,
        files: &TlsFiles,
        deadline: Instant,
    ) -> Result<Self, Failure> {
        let server = https::Server::new(address, files, deadline)?;
        Ok(Self { server, namespace })
    }

    pub(super) fn get(&self, path: &str, token: &SecretBytes) -> Result<Answer, Failure> {
        let headers = self.headers(Some(token))?;
        self.server.get(&format!("v1/{path}"), &headers).map(Answer)
    }

    pub(super) fn post(
        &self,
        path: &str,
        token: Option<&SecretBytes>,
        body: &impl Serialize,
    ) -> Result<Answer, Failure> {
        let headers = self.headers(token)?;
        self.server
            .post(&format!("v1/{path}"), &headers, body)
            .map(Answer)
    }

    fn headers(&self, token: Option<&SecretBytes>) -> Result<Vec<Header>, Failure> {
        let value = |bytes| HeaderValue::from_bytes(bytes).map_err(|e| Failure::new(KeyReason::Invalid, e));
        let mut headers = vec![("X-Vault-Request", HeaderValue::from_static("true"))];
        if let Some(namespace) = self.namespace {
            headers.push(("X-Vault-Namespace", value(namespace.as_bytes())?));
        }
        if let Some(token) = token {
            let mut token = value(token)?;
            token.set_sensitive(true);
            headers.push(("X-Vault-Token", token));
        }
        Ok(headers)
    }
}

impl Answer {
    /// The body, if the request has succeeded.
    pub(super) fn body(self) -> Result<Body, Refusal> {
        self.0.success(Refusal::new)
    }
}
