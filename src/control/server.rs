//! The server of a control socket: each caller gets a thread, within limits that leave room for every user.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use super::peer::Peer;
use super::quota::{Limits, Quota, Standing, UserQuota};
use super::socket;
use super::varlink::{self, Interface};
use super::wire::Connection;
use sealblk_base::closer::ClosedElsewhere;

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
/// may have is decided by who it is.
///
/// # Errors
/// If it cannot wait for callers.
pub fn run(listener: &UnixListener, ending: &OwnedFd, service: &Arc<dyn Interface>) -> io::Result<()> {
    let callers = Arc::default();
    socket::listen(listener, ending, || {
        let stream = socket::accept(listener)?;
        answer(stream.into(), service, &callers);
        Ok(())
    })
}

fn answer(stream: ClosedElsewhere<UnixStream>, service: &Arc<dyn Interface>, callers: &Arc<UserQuota>) {
    let Ok(peer) = Peer::of(&stream) else { return };
    let standing = Standing::of(&peer, |peer| service.knows(peer));
    let Some(place) = Quota::take_of(callers, ROOMS, peer.user, standing) else {
        tracing::debug!(
            user = peer.user,
            "a caller is refused: there are too many callers"
        );
        return;
    };
    let service = Arc::clone(service);
    let thread = std::thread::Builder::new()
        .name("caller".into())
        .stack_size(STACK);
    let spawned = thread.spawn(move || {
        let mut connection = Connection::new(stream.into_inner(), CALLER_TIMEOUT);
        if let Err(error) = varlink::serve(&mut connection, &peer, &[&*service]) {
            tracing::debug!(%error, user = peer.user, "the connection of a caller ended with an error");
        }
        drop(connection);
        drop(place);
    });
    if let Err(error) = spawned {
        tracing::warn!(%error, "a caller cannot be answered");
    }
}
