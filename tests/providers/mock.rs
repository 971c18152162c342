//! A server that acts as a test says: as no honest one would, or as the real ones of the other tests never do.

use std::io;
use std::net::{Shutdown, TcpListener};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use crate::certificates;

/// What a client's connection is to the server.
pub(crate) type Stream = StreamOwned<ServerConnection, std::net::TcpStream>;

/// A server with the right certificate, which acts towards one client after the other.
pub(crate) struct Mock {
    address: String,
    _thread: JoinHandle<()>,
}

impl Mock {
    pub(crate) fn start(act: impl Fn(&mut Stream) + Send + 'static) -> Self {
        let chain =
            vec![CertificateDer::from_pem_file(certificates::directory().join("server.pem")).unwrap()];
        let key = PrivateKeyDer::from_pem_file(certificates::directory().join("server.key")).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        let config = Arc::new(config);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        // It ends with the test's process.
        let thread = thread::spawn(move || {
            for socket in listener.incoming() {
                let connection = ServerConnection::new(config.clone()).unwrap();
                let mut stream = StreamOwned::new(connection, socket.unwrap());
                act(&mut stream);
                stream.conn.send_close_notify();
                let _ = stream.conn.complete_io(&mut stream.sock);
                // A socket that is closed before all was read resets the connection, and takes what was sent with it.
                let _ = stream.sock.shutdown(Shutdown::Write);
                let _ = stream.sock.set_read_timeout(Some(Duration::from_secs(10)));
                let _ = io::copy(&mut stream.sock, &mut io::sink());
            }
        });
        Self {
            address,
            _thread: thread,
        }
    }

    /// As the settings name it.
    pub(crate) fn address(&self) -> String {
        self.address.clone()
    }
}
