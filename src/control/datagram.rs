//! Datagrams to a service of this host: the journal, and the service manager.
//!
//! The socket is connected once and kept, since a confined process can connect none. If the service has bound a new
//! socket since, a process that may connect connects to that.

use std::io;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sealblk_base::mutex::lock;

/// Whether this process may connect no more.
static CONFINED: AtomicBool = AtomicBool::new(false);

/// Has no service of this process connect again.
pub fn keep_connections() {
    CONFINED.store(true, Ordering::Relaxed);
}

/// How long a service may not read.
const PATIENCE: Duration = Duration::from_millis(500);

/// See the module's header.
#[derive(Debug)]
pub struct Service {
    address: SocketAddr,
    socket: Mutex<Option<UnixDatagram>>,
}

impl Service {
    /// The one at this address, connected if it is there.
    pub fn at(address: SocketAddr) -> Self {
        let socket = Mutex::new(connected(&address).ok());
        Self { address, socket }
    }

    /// Sends a datagram; waits for a moment if the service does not read.
    ///
    /// # Errors
    /// If nothing is at the address, the service does not read, or the datagram is too long.
    pub fn send(&self, datagram: &[u8]) -> io::Result<()> {
        let mut socket = lock(&self.socket);
        let sent = socket.as_ref().map(|socket| socket.send(datagram));
        match sent {
            Some(Ok(_)) => return Ok(()),
            Some(Err(error))
                if error.kind() == io::ErrorKind::WouldBlock || CONFINED.load(Ordering::Relaxed) =>
            {
                return Err(error);
            }
            None if CONFINED.load(Ordering::Relaxed) => return Err(io::ErrorKind::NotConnected.into()),
            Some(Err(_)) | None => {}
        }
        socket.insert(connected(&self.address)?).send(datagram)?;
        Ok(())
    }
}

fn connected(address: &SocketAddr) -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(address)?;
    socket.set_write_timeout(Some(PATIENCE))?;
    Ok(socket)
}
