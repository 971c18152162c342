//! Sessions: what a broker has asked a host, until that answers or is too late. Each is one attestation, or one enrolment, and
//! its nonce is used once whatever comes of it.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use zeroize::Zeroizing;

use crate::rcar::jwe::PublicKey;

/// The most at a time.
const MAX_SESSIONS: usize = 4096;

/// The sessions of a broker.
#[derive(Debug)]
pub(super) struct Sessions {
    lifetime: Duration,
    sessions: Mutex<HashMap<String, (Instant, Session)>>,
}

/// What a host has reached.
#[derive(Debug)]
pub(super) enum Session {
    /// It has a nonce.
    Challenged { nonce: String },
    /// It is what it has to be, and gets one resource, encrypted to this key.
    Attested { host: String, key: PublicKey },
    /// It has a credential to open.
    Enrolling {
        host: String,
        /// The SHA-256 of its endorsement key.
        endorsement: String,
        /// TPMT_PUBLIC, in base64.
        attestation: String,
        /// What is in the credential.
        secret: Zeroizing<[u8; 32]>,
    },
}

/// There is no room for another.
#[derive(Debug)]
pub(super) struct Full;

impl Sessions {
    pub(super) fn new(lifetime: Duration) -> Self {
        Self {
            lifetime,
            sessions: Mutex::default(),
        }
    }

    /// Begins a session, or goes on with one under a new name.
    pub(super) fn begin(&self, session: Session) -> Result<String, Full> {
        let id = random().map_err(|_| Full)?;
        self.put(id.clone(), session)?;
        Ok(id)
    }

    /// Goes on with a session that was taken out.
    pub(super) fn put(&self, id: String, session: Session) -> Result<(), Full> {
        let now = Instant::now();
        let mut sessions = self.lock();
        if sessions.len() >= MAX_SESSIONS {
            sessions.retain(|_, (until, _)| *until > now);
        }
        if sessions.len() >= MAX_SESSIONS {
            return Err(Full);
        }
        sessions.insert(id, (now + self.lifetime, session));
        Ok(())
    }

    /// Takes a session out: nobody else has it after this.
    pub(super) fn take(&self, id: &str) -> Option<Session> {
        let (until, session) = self.lock().remove(id)?;
        (until > Instant::now()).then_some(session)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, (Instant, Session)>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// 256 random bits as text.
pub(super) fn random() -> Result<String, getrandom::Error> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes)?;
    Ok(BASE64_URL_SAFE_NO_PAD.encode(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn challenged() -> Session {
        Session::Challenged {
            nonce: "n".to_owned(),
        }
    }

    #[test]
    fn sessions_are_had_once_and_not_for_long() {
        let sessions = Sessions::new(Duration::from_secs(60));
        let id = sessions.begin(challenged()).unwrap();
        assert!(sessions.take(&id).is_some());
        assert!(sessions.take(&id).is_none());
        let sessions = Sessions::new(Duration::ZERO);
        let id = sessions.begin(challenged()).unwrap();
        assert!(sessions.take(&id).is_none());
    }

    #[test]
    fn there_are_not_too_many_and_old_ones_make_room() {
        let sessions = Sessions::new(Duration::from_secs(60));
        for _ in 0..MAX_SESSIONS {
            sessions.begin(challenged()).unwrap();
        }
        assert!(sessions.begin(challenged()).is_err());
        let sessions = Sessions::new(Duration::ZERO);
        for _ in 0..=MAX_SESSIONS {
            sessions.begin(challenged()).unwrap();
        }
    }
}
