//! Notifications to the service manager: sd_notify(3), for units of `Type=notify`.
//!
//! A failure to notify it is not a failure of the service: the manager's own time limit reveals it.

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
        tracing::debug!(%error, "cannot notify the service manager");
    }
}
