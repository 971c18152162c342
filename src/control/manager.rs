//! Notifications to the service manager: sd_notify(3), for units of `Type=notify`.
//!
//! A failure to notify it is not a failure of the service: the manager's own time limit reveals it.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::SocketAddr;
use std::sync::LazyLock;
use std::time::Duration;

use super::datagram::Service;
use sealblk_base::harmless::harmless;

/// The manager of this service, if it has one.
static MANAGER: LazyLock<Option<Service>> = LazyLock::new(|| {
    let address = address(&std::env::var_os("NOTIFY_SOCKET")?);
    let complain = |error: &io::Error| tracing::debug!(%error, "cannot notify the service manager");
    address.inspect_err(complain).ok().map(Service::at)
});

/// Connects to the service manager, which a confined process cannot do.
pub fn connect() {
    LazyLock::force(&MANAGER);
}

/// The service can be used now; `status` is how it is.
pub fn ready(status: &str) {
    tell(&format!("READY=1\nSTATUS={}\n", line(status)));
}

/// Another process is the main one of the service from now on.
pub fn main_process(process: u32) {
    tell(&format!("MAINPID={process}\n"));
}

/// How the service is.
pub fn status(status: &str) {
    tell(&format!("STATUS={}\n", line(status)));
}

/// It finishes what it has begun, and ends.
pub fn stopping() {
    tell("STOPPING=1\n");
}

/// How often the manager wants to hear of this process at least (sd_watchdog_enabled(3)); with half of that nothing is late.
pub fn watchdog() -> Option<Duration> {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    // The process of an upgrade takes the place of the one that was meant.
    let is_meant = number("WATCHDOG_PID").is_none_or(|process| process == u64::from(std::process::id()));
    let within = number("WATCHDOG_USEC").filter(|within| *within > 1)?;
    is_meant.then(|| Duration::from_micros(within / 2))
}

/// The process works: a manager that does not hear this in time kills it.
pub fn alive() {
    tell("WATCHDOG=1\n");
}

/// A path, or behind an '@' an abstract name (sd_notify(3)).
fn address(socket: &OsStr) -> io::Result<SocketAddr> {
    match socket.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(socket),
    }
}

/// A line would be an assignment of its own, and some texts are others'.
fn line(status: &str) -> String {
    harmless(status, MAX_STATUS)
}

/// A status is for people.
const MAX_STATUS: usize = 1024;

fn tell(state: &str) {
    let Some(manager) = &*MANAGER else { return };
    if let Err(error) = manager.send(state.as_bytes()) {
        tracing::debug!(%error, "cannot notify the service manager");
    }
}
