//! A control socket being served: who calls gets a thread, within bounds that keep nobody out.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use super::peer::Peer;
use super::places::{Place, Places};
use super::privilege::has_all;
use super::socket;
use super::varlink::{self, Interface};
use crate::closer::ClosedElsewhere;

/// The most callers at a time of those who stand so; what is more is turned away. Each kind has places of its own.
const fn places(standing: Standing) -> usize {
    match standing {
        Standing::Own => 512,
        Standing::Granted => 1024,
        // They have nothing to wait for.
        Standing::Stranger => 64,
    }
}

/// What a user gets at any rate, while there is a place.
const SURE: usize = 16;
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
    let callers = Arc::new(Callers::default());
    socket::listen(listener, ending, || {
        let stream = socket::accept(listener)?;
        answer(stream.into(), service, &callers);
        Ok(())
    })
}

fn answer(stream: ClosedElsewhere<UnixStream>, service: &Arc<dyn Interface>, callers: &Arc<Callers>) {
    let Ok(peer) = Peer::of(&stream) else { return };
    let standing = match () {
        () if has_all(&peer) => Standing::Own,
        () if service.knows(&peer) => Standing::Granted,
        () => Standing::Stranger,
    };
    let Some(place) = place_for(callers, peer.user, standing) else {
        tracing::debug!(user = peer.user, "a caller is turned away: there are too many");
        return;
    };
    let service = Arc::clone(service);
    let thread = std::thread::Builder::new()
        .name("caller".into())
        .stack_size(STACK);
    let spawned = thread.spawn(move || {
        if let Err(error) = varlink::serve(stream.into_inner(), &peer, &*service, CALLER_TIMEOUT) {
            tracing::debug!(%error, user = peer.user, "a caller was left");
        }
        drop(place);
    });
    if let Err(error) = spawned {
        tracing::warn!(%error, "a caller cannot be answered");
    }
}

/// How a caller stands to the process that it asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Standing {
    /// Root, or the user that the process runs as.
    Own,
    /// Something was granted to it.
    Granted,
    /// Nothing was.
    Stranger,
}

/// The places of those who are being answered: how many each user has.
type Callers = Places<(u32, Standing)>;

/// A place for one more caller of `user`, if there is one: half of the places that are left, so that the next user finds some.
fn place_for(callers: &Arc<Callers>, user: u32, standing: Standing) -> Option<Place<(u32, Standing)>> {
    Places::take(callers, (user, standing), |taken| {
        let alike = taken.iter().filter(|((_, other), _)| *other == standing);
        let all: usize = alike.map(|(_, count)| count).sum();
        let left = places(standing).saturating_sub(all);
        let count = taken.get(&(user, standing)).copied().unwrap_or(0);
        let share = match standing {
            Standing::Own => places(standing),
            Standing::Granted | Standing::Stranger => left / 2,
        };
        left > 0 && count < SURE.max(share)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_users_take_all_places_and_none_of_them_the_owners() {
        let callers = Arc::new(Callers::default());
        let mut held = Vec::new();
        let mut take_all = |user, standing| {
            let before = held.len();
            while let Some(place) = place_for(&callers, user, standing) {
                held.push(place);
            }
            held.len() - before
        };
        let granted: Vec<_> = (1..=10).map(|user| take_all(user, Standing::Granted)).collect();
        assert!(
            granted[0] < 400 && granted.iter().all(|got| *got >= SURE),
            "{granted:?}"
        );
        assert!(take_all(11, Standing::Stranger) < 64 && take_all(12, Standing::Stranger) > 0);
        assert_eq!(take_all(0, Standing::Own), 512);
    }
}
