//! What the service manager is told, if it asked for it: sd_notify(3), for units of `Type=notify`.
//!
//! A failure to tell it is no failure of the service: the manager's own time limit shows it.

use sd_notify::NotifyState;

use crate::keys::harmless;

/// The service can be used now; `status` is how it is.
pub fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(&line(status))]);
}

/// How the service is.
pub fn status(status: &str) {
    tell(&[NotifyState::Status(&line(status))]);
}

/// It finishes what it has begun, and ends.
pub fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// A line would be an assignment of its own, and some texts are others'.
fn line(status: &str) -> String {
    harmless(status, MAX_STATUS)
}

/// A status is for people.
const MAX_STATUS: usize = 1024;

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "the service manager cannot be told");
    }
}
