//! The server of a control socket: each caller gets a thread, within limits that leave room for every user.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use super::peer::Peer;
use super::quota::{Limits, Quota, Standing, UserQuota};
use super::socket;
use super::varlink::{self, Interface};
use super::wire::Connection;
use sealblk_base::closer::ClosedElsewhere;
use sealblk_base::mutex::lock;

/// The most callers at a time; what is more is turned away. Strangers have nothing to wait for.
const ROOMS: Limits = Limits {
    own: 512,
    granted: 1024,
    stranger: 64,
    sure: 16,
};
/// How long a caller may be silent, or leave an answer unread.
const CALLER_TIMEOUT: Duration = Duration::from_secs(30);
/// A caller's thread calls into a provider's client, and into little else.
const STACK: usize = 1 << 20;

/// Answers callers of `listener`, which does not block, until `ending` is readable. Whoever can connect may ask; what a caller
/// may have is decided by who it is. `alive` is as in [`socket::listen`].
///
/// # Errors
/// If it cannot wait for callers.
pub fn run(
    listener: &UnixListener,
    ending: &OwnedFd,
    services: &Arc<[Arc<dyn Interface>]>,
    gate: &Gate,
    alive: Option<Duration>,
) -> io::Result<()> {
    let callers = Arc::default();
    socket::listen(listener, ending, alive, || {
        let is_closed = lock(&gate.0);
        if *is_closed {
            drop(is_closed);
            thread::sleep(CLOSED_TICK);
            return Ok(());
        }
        let stream = socket::accept(listener)?;
        answer(stream.into(), services, &callers);
        Ok(())
    })
}

/// Whether callers are taken. While it is closed, they wait, perhaps for another process that has the same socket.
#[derive(Debug, Default)]
pub struct Gate(Mutex<bool>);

impl Gate {
    /// Closes or opens it.
    pub fn set_closed(&self, is_closed: bool) {
        *lock(&self.0) = is_closed;
    }
}

/// How often a closed gate is looked at.
const CLOSED_TICK: Duration = Duration::from_millis(10);

fn answer(
    stream: ClosedElsewhere<UnixStream>,
    services: &Arc<[Arc<dyn Interface>]>,
    callers: &Arc<UserQuota>,
) {
    let Ok(peer) = Peer::of(&stream) else { return };
    let standing = Standing::of(&peer, |peer| services.iter().any(|service| service.knows(peer)));
    let Some(place) = Quota::take_of(callers, ROOMS, peer.user, standing) else {
        tracing::debug!(
            user = peer.user,
            "a caller is refused: there are too many callers"
        );
        return;
    };
    let services = Arc::clone(services);
    let thread = std::thread::Builder::new()
        .name("caller".into())
        .stack_size(STACK);
    let spawned = thread.spawn(move || {
        let mut connection = Connection::new(stream.into_inner(), CALLER_TIMEOUT);
        let interfaces: Vec<&dyn Interface> = services.iter().map(|service| &**service).collect();
        if let Err(error) = varlink::serve(&mut connection, &peer, &interfaces) {
            tracing::debug!(%error, user = peer.user, "the connection of a caller ended with an error");
        }
        drop(connection);
        drop(place);
    });
    if let Err(error) = spawned {
        tracing::warn!(%error, "a caller cannot be answered");
    }
}
