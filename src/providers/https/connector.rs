//! TLS for the HTTP client, with this host's own settings: the client's own TLS would end the process if a certificate and
//! its key do not belong together.

use std::fmt;
use std::io::{self, Read, Write};
use std::sync::Arc;

use rustls::pki_types::ServerName;
use rustls::{ClientConnection, StreamOwned};
use ureq::Error;
use ureq::unversioned::transport::time::{Duration, Instant};
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, LazyBuffers, NextTimeout, Transport, TransportAdapter,
};

use crate::providers::tls::Client;

/// Puts TLS on a connection that is there.
pub(super) struct TlsConnector(pub(super) Client);

impl<In: Transport> Connector<In> for TlsConnector {
    type Out = TlsTransport<In>;

    fn connect(
        &self,
        details: &ConnectionDetails<'_>,
        chained: Option<In>,
    ) -> Result<Option<Self::Out>, Error> {
        let Some(transport) = chained else {
            return Ok(None);
        };
        let host = details.uri.host().unwrap_or_default();
        let bare = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(host);
        let name = ServerName::try_from(bare.to_owned()).map_err(|e| Error::Other(e.into()))?;
        let mut connection = self.0.connect(name).map_err(|e| Error::Other(e.into()))?;
        let mut socket = TransportAdapter::new(transport, Arc::clone(&details.current_time));
        socket.set_timeout(left(details));
        if let Err(error) = connection.complete_io(&mut socket) {
            return Err(broken_by(&self.0, &mut connection, &mut socket, error));
        }
        let (input, output) = (
            details.config.input_buffer_size(),
            details.config.output_buffer_size(),
        );
        Ok(Some(TlsTransport {
            buffers: LazyBuffers::new(input, output),
            stream: StreamOwned::new(connection, socket),
            client: self.0.clone(),
        }))
    }
}

/// What an error of the connection means. Reading sends as well what is still to be sent, and so can fail by that.
fn broken_by(
    client: &Client,
    connection: &mut ClientConnection,
    socket: &mut impl Read,
    error: io::Error,
) -> Error {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
    let left = matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset);
    let last_words = || left.then(|| client.last_words(connection, socket)).flatten();
    match client.explain_io(&error).or_else(last_words) {
        Some(failure) => Error::Other(failure.into()),
        None => error.into(),
    }
}

/// What connecting has left of the time to connect.
fn left(details: &ConnectionDetails<'_>) -> NextTimeout {
    let mut timeout = details.timeout;
    if let (Duration::Exact(limit), Instant::Exact(began), Instant::Exact(now)) =
        (timeout.after, details.now, (details.current_time)())
    {
        timeout.after = Duration::Exact(limit.saturating_sub(now.saturating_duration_since(began)));
    }
    timeout
}

impl fmt::Debug for TlsConnector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsConnector")
    }
}

/// A connection with TLS.
pub(super) struct TlsTransport<In: Transport> {
    buffers: LazyBuffers,
    stream: StreamOwned<ClientConnection, TransportAdapter<In>>,
    client: Client,
}

impl<In: Transport> Transport for TlsTransport<In> {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        self.stream.get_mut().set_timeout(timeout);
        let written = self.stream.write_all(&self.buffers.output()[..amount]);
        let StreamOwned { conn, sock } = &mut self.stream;
        written.map_err(|e| broken_by(&self.client, conn, sock, e))
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        self.stream.get_mut().set_timeout(timeout);
        let read = self.stream.read(self.buffers.input_append_buf());
        let StreamOwned { conn, sock } = &mut self.stream;
        let read = read.map_err(|e| broken_by(&self.client, conn, sock, e))?;
        self.buffers.input_appended(read);
        Ok(read > 0)
    }

    fn is_open(&mut self) -> bool {
        self.stream.get_mut().get_mut().is_open()
    }

    fn is_tls(&self) -> bool {
        true
    }
}

impl<In: Transport> fmt::Debug for TlsTransport<In> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsTransport")
    }
}
