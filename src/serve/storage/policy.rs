//! What becomes of a read or write that storage fails: the guest gets the error, or the request waits until storage works again.
//!
//! A flush that fails is never repeated. Storage reports a loss once, and would answer the second flush with success although
//! the data are lost ([`super::loss`]). A write keeps its data until it ends, so it can be repeated.

use std::io;

/// What becomes of a request that storage fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Answer {
    /// The guest gets an error.
    #[default]
    Report,
    /// The request waits.
    Stop,
}

/// What becomes of a read or write, by the error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Where storage has no space.
    pub full: Answer,
    /// For all other errors.
    pub error: Answer,
}

impl Policy {
    /// Whether a request waits that `error` has ended.
    pub(super) fn holds(self, error: &io::Error) -> bool {
        let answer = if is_full(error) { self.full } else { self.error };
        answer == Answer::Stop
    }
}

/// Whether storage, or the user's share of it, has no space.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}
