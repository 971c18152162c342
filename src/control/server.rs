//! A control socket being served: who calls gets a thread, within bounds that keep nobody out.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::{self, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::peer::Peer;
use super::socket::{self, BindError, Bound};
use super::varlink::{self, Interface};

/// The most callers at a time; others wait to be accepted.
const MAX_CALLERS: usize = 1024;
/// The most callers of one user at a time, so that none keeps out the others; what is more is turned away.
const MAX_CALLERS_OF_USER: usize = MAX_CALLERS / 2;
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
        if let Some((_, tick)) = tick {
            tick();
        }
        if !called {
            continue;
        }
        callers.wait_for_place();
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
    let Some(place) = Callers::place_for(callers, peer.user) else {
        tracing::debug!(user = peer.user, "a caller is turned away: its user has too many");
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

/// Those who are being answered: how many of each user.
#[derive(Debug, Default)]
struct Callers {
    of_users: Mutex<HashMap<u32, usize>>,
    left: Condvar,
}

/// A caller's place among them.
struct Place {
    callers: Arc<Callers>,
    user: u32,
}

impl Callers {
    /// Waits until there is a place for somebody.
    fn wait_for_place(&self) {
        let full = |of_users: &mut HashMap<u32, usize>| of_users.values().sum::<usize>() >= MAX_CALLERS;
        let waited = self.left.wait_while(self.lock(), full);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// A place for one more caller of `user`, if there is one.
    fn place_for(callers: &Arc<Self>, user: u32) -> Option<Place> {
        let mut of_users = callers.lock();
        let of_user = of_users.entry(user).or_default();
        if *of_user >= MAX_CALLERS_OF_USER {
            return None;
        }
        *of_user += 1;
        Some(Place {
            callers: Arc::clone(callers),
            user,
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u32, usize>> {
        self.of_users.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Entry::Occupied(mut of_user) = self.callers.lock().entry(self.user) {
            *of_user.get_mut() -= 1;
            if *of_user.get() == 0 {
                of_user.remove();
            }
        }
        self.callers.left.notify_one();
    }
}
