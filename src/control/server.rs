//! A control socket being served: who calls gets a thread, within bounds that keep nobody out.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::{self, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::peer::Peer;
use super::socket::{self, BindError, Bound};
use super::varlink::{self, Interface};

/// The most callers at a time of one user to whom something was granted, and of all of them; what is more is turned away.
const MAX_CALLERS_OF_USER: usize = 512;
const MAX_CALLERS: usize = 2 * MAX_CALLERS_OF_USER;
/// The most callers at a time of one user to whom nothing was, and of all of them: they have nothing to wait for.
const MAX_STRANGERS_OF_USER: usize = 16;
const MAX_STRANGERS: usize = 64;
/// How long a caller may be silent, or leave an answer unread.
const CALLER_TIMEOUT: Duration = Duration::from_secs(30);
/// A caller's thread calls into a provider's client, and into little else.
const STACK: usize = 1 << 20;
/// Binds a control socket. Anybody may ask there; who may have what is decided by who it is.
///
/// # Errors
/// [`BindError`].
pub fn bind(path: &Path) -> Result<(UnixListener, Bound), BindError> {
    let (listener, bound) = socket::bind(path)?;
    let opened = fs::set_permissions(path, Permissions::from_mode(0o666));
    opened
        .and_then(|()| listener.set_nonblocking(true))
        .map_err(|source| BindError::Bind {
            path: path.to_owned(),
            source,
        })?;
    Ok((listener, bound))
}

/// Answers callers until `ending` is readable. Meanwhile `tick` is called about as often as it says.
///
/// # Errors
/// If it cannot wait for callers.
pub fn run(
    listener: &UnixListener,
    ending: &OwnedFd,
    service: &Arc<dyn Interface>,
    tick: Option<(Duration, &dyn Fn())>,
) -> io::Result<()> {
    let callers = Arc::new(Callers::default());
    let mut ticked = Instant::now();
    let timeout = tick.map(|(interval, _)| Timespec {
        tv_sec: interval.as_secs() as i64,
        tv_nsec: interval.subsec_nanos().into(),
    });
    loop {
        let mut fds = [
            PollFd::new(ending, PollFlags::IN),
            PollFd::new(listener, PollFlags::IN),
        ];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let [ended, called] = fds.map(|fd| !fd.revents().is_empty());
        if ended {
            return Ok(());
        }
        if let Some((interval, tick)) = tick
            && ticked.elapsed() >= interval
        {
            tick();
            ticked = Instant::now();
        }
        if !called {
            continue;
        }
        match listener.accept() {
            Ok((stream, _)) => answer(stream, service, &callers),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                tracing::warn!(%error, "a caller cannot be accepted");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

fn answer(stream: UnixStream, service: &Arc<dyn Interface>, callers: &Arc<Callers>) {
    let Ok(peer) = Peer::of(&stream) else { return };
    let Some(place) = Callers::place_for(callers, peer.user, service.knows(&peer)) else {
        tracing::debug!(user = peer.user, "a caller is turned away: there are too many");
        return;
    };
    let service = Arc::clone(service);
    let thread = std::thread::Builder::new()
        .name("caller".into())
        .stack_size(STACK);
    let spawned = thread.spawn(move || {
        if let Err(error) = varlink::serve(stream, &peer, &*service, CALLER_TIMEOUT) {
            tracing::debug!(%error, user = peer.user, "a caller was left");
        }
        drop(place);
    });
    if let Err(error) = spawned {
        tracing::warn!(%error, "a caller cannot be answered");
    }
}

/// Those who are being answered: how many of each user, and whether anything was granted to it.
#[derive(Debug, Default)]
struct Callers(Mutex<HashMap<(u32, bool), usize>>);

/// A caller's place among them.
struct Place {
    callers: Arc<Callers>,
    kind: (u32, bool),
}

impl Callers {
    /// A place for one more caller of `user`, if there is one.
    fn place_for(callers: &Arc<Self>, user: u32, known: bool) -> Option<Place> {
        let (of_user, of_all) = match known {
            true => (MAX_CALLERS_OF_USER, MAX_CALLERS),
            false => (MAX_STRANGERS_OF_USER, MAX_STRANGERS),
        };
        let mut counts = callers.lock();
        let alike = counts.iter().filter(|((_, other), _)| *other == known);
        let all: usize = alike.map(|(_, count)| count).sum();
        let count = counts.entry((user, known)).or_default();
        if *count >= of_user || all >= of_all {
            return None;
        }
        *count += 1;
        Some(Place {
            callers: Arc::clone(callers),
            kind: (user, known),
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(u32, bool), usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Entry::Occupied(mut count) = self.callers.lock().entry(self.kind) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}
