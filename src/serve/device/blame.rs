//! How loud the log is about what a guest or a front-end brings about: it follows from where the cause lies.

use sealblk_base::blame::Blame;
use tracing::Level;

/// The level of a log line about a failure. The host's and the storage's failures need an operator; a front-end's end with its session;
/// a guest's are its own concern.
pub(super) fn level(blame: Blame) -> Level {
    match blame {
        Blame::Host | Blame::Storage | Blame::Content => Level::ERROR,
        Blame::Operator | Blame::Key | Blame::Use | Blame::Process | Blame::FrontEnd => Level::WARN,
        Blame::Guest => Level::DEBUG,
    }
}

/// A log line whose level follows from `$blame`: `tracing` wants a constant.
macro_rules! log_by_blame {
    ($blame:expr, $($line:tt)+) => {
        match $crate::device::blame::level($blame) {
            tracing::Level::ERROR => tracing::error!($($line)+),
            tracing::Level::WARN => tracing::warn!($($line)+),
            _ => tracing::debug!($($line)+),
        }
    };
}
pub(super) use log_by_blame;
