//! The claim on a served disk's storage, which a ring needs to start.
//!
//! A process that was killed can have writes in flight that have not landed. The disk is served after them: it is attached and
//! can be connected to at once, and its rings start when it is claimed.

use std::sync::{Arc, Mutex};

use crate::error_chain::causes;
use crate::mutex::lock;
use crate::storage::{Attached, Claim, StorageError, Unclaimed};

/// See the module's header.
#[derive(Debug)]
pub struct Claims(Mutex<State>);

#[derive(Debug)]
enum State {
    Claimed(Arc<Claim>),
    /// Writes of a process that was killed have not landed.
    Landing(Attached),
    /// A thread waits for them.
    Waiting,
    /// It cannot be claimed any more; the text says why.
    Failed(String),
}

/// How a disk's claim is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Its rings can be served.
    Held,
    /// Writes of a process that was killed have not landed: its rings wait.
    Waiting,
    /// It cannot be claimed, for this reason: its rings wait until the process is started again.
    Failed(String),
}

impl Claims {
    /// Claims what is attached, now or, if writes of a process that was killed have not landed, later.
    ///
    /// # Errors
    /// Where another process has it in use, or it cannot be locked.
    pub fn take(attached: Attached) -> Result<Self, StorageError> {
        let state = match attached.claim() {
            Ok(claim) => State::Claimed(Arc::new(claim)),
            Err(Unclaimed {
                attached,
                error: StorageError::Landing { .. },
            }) => State::Landing(attached),
            Err(Unclaimed { error, .. }) => return Err(error),
        };
        Ok(Self(Mutex::new(state)))
    }

    /// The claim; none while writes of another process have not landed.
    pub(super) fn current(&self) -> Option<Arc<Claim>> {
        match &*lock(&self.0) {
            State::Claimed(claim) => Some(Arc::clone(claim)),
            _ => None,
        }
    }

    /// How it is.
    pub(super) fn standing(&self) -> Standing {
        match &*lock(&self.0) {
            State::Claimed(_) => Standing::Held,
            State::Landing(_) | State::Waiting => Standing::Waiting,
            State::Failed(reason) => Standing::Failed(reason.clone()),
        }
    }

    /// Waits until writes of a process that was killed have landed, and claims the disk then. Nothing ends this but that.
    pub(super) fn wait(&self) {
        let attached = {
            let mut state = lock(&self.0);
            match std::mem::replace(&mut *state, State::Waiting) {
                State::Landing(attached) => attached,
                other => {
                    *state = other;
                    return;
                }
            }
        };
        let claimed = attached.claim_in_turn();
        *lock(&self.0) = match claimed {
            Ok(claim) => State::Claimed(Arc::new(claim)),
            Err(Unclaimed { error, .. }) => {
                let reason = causes(&error).fold(error.to_string(), |text, cause| format!("{text}: {cause}"));
                tracing::error!("the disk is not served: {reason}; then restart `sealblk serve`");
                State::Failed(reason)
            }
        };
    }
}
