//! Sessions: what a broker has asked a host, until that answers or is too late. Each is one attestation, or one enrolment.
//!
//! A stranger may ask for challenges without end, so the broker keeps none of them: a session's name carries its time and a
//! tag, and its nonce is computed from it. What is kept begins with evidence that was believed, or with an enrolment that was
//! granted. That an attested session stays known until its challenge has expired makes its nonce good for one attestation.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use ring::hmac;
use zeroize::Zeroizing;

use super::state::{Host, Reference};
use crate::mutex::lock;
use crate::rcar::jwe::PublicKey;

/// The most that are kept at a time.
const MAX_SESSIONS: usize = 4096;
/// What tells one challenge from all others, and when it is too old: in milliseconds after the broker's start, big-endian.
const RANDOM_LEN: usize = 16;
const ISSUED_LEN: usize = RANDOM_LEN + 8;
const TAG_LEN: usize = 32;
/// What the key computes.
const NAME: &[u8] = b"session\0";
const NONCE: &[u8] = b"nonce\0";

/// The sessions of a broker.
#[derive(Debug)]
pub(super) struct Sessions {
    lifetime: Duration,
    started: Instant,
    /// Of this process alone.
    key: hmac::Key,
    /// By name, with the time when they go. One that was taken leaves nothing but its name.
    sessions: Mutex<HashMap<String, (Instant, Option<Session>)>>,
}

/// A nonce that nobody had before, and the session that it is for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Issued {
    pub(super) session: String,
    pub(super) nonce: String,
}

/// What a host has reached.
#[derive(Debug)]
pub(super) enum Session {
    /// It is what it has to be, and gets one resource, encrypted to this key.
    Attested {
        host: String,
        /// What was known of it, and what was expected: of another one nothing was proved.
        as_known: Host,
        reference: Reference,
        key: PublicKey,
    },
    /// It has a credential to open.
    Enrolling {
        host: String,
        /// What the operator had said of it.
        as_known: Host,
        /// The SHA-256 of its endorsement key.
        endorsement: String,
        /// TPMT_PUBLIC, in base64.
        attestation: String,
        /// What is in the credential.
        secret: Zeroizing<[u8; 32]>,
    },
}

/// Why there is no session.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NoSession {
    /// There is no room for another.
    Full,
    /// There was one of this name.
    Used,
}

impl Sessions {
    /// # Errors
    /// If the host has no random numbers.
    pub(super) fn new(lifetime: Duration) -> Result<Self, getrandom::Error> {
        let mut key = Zeroizing::new([0; 32]);
        getrandom::fill(&mut key[..])?;
        Ok(Self {
            lifetime,
            started: Instant::now(),
            key: hmac::Key::new(hmac::HMAC_SHA256, &key[..]),
            sessions: Mutex::default(),
        })
    }

    /// A new challenge, of which nothing is kept.
    pub(super) fn challenge(&self) -> Result<Issued, getrandom::Error> {
        let mut issued = [0; ISSUED_LEN];
        let (random, expires) = issued.split_at_mut(RANDOM_LEN);
        getrandom::fill(random)?;
        let until = self.started.elapsed() + self.lifetime;
        expires.copy_from_slice(&(until.as_millis() as u64).to_be_bytes());
        let tag = self.tag(NAME, &issued);
        Ok(Issued {
            session: BASE64_URL_SAFE_NO_PAD.encode([&issued[..], tag.as_ref()].concat()),
            nonce: self.nonce(&issued),
        })
    }

    /// The nonce of a session that this broker has challenged a host in, unless it was attested or is too old.
    pub(super) fn challenged(&self, session: &str) -> Option<String> {
        let name = BASE64_URL_SAFE_NO_PAD.decode(session).ok()?;
        let name: [u8; ISSUED_LEN + TAG_LEN] = name.try_into().ok()?;
        let (issued, tag) = name.split_at(ISSUED_LEN);
        hmac::verify(&self.key, &[NAME, issued].concat(), tag).ok()?;
        let expires = issued[RANDOM_LEN..].try_into().expect("it is as long");
        let is_fresh = self.started.elapsed() < Duration::from_millis(u64::from_be_bytes(expires));
        let is_unused = !self.lock().contains_key(session);
        (is_fresh && is_unused).then(|| self.nonce(issued))
    }

    /// Begins an enrolment under a new name. A host has one at a time, so that these take no more room than there are hosts.
    pub(super) fn begin(&self, session: Session) -> Result<Result<String, NoSession>, getrandom::Error> {
        let mut name = [0; 32];
        getrandom::fill(&mut name)?;
        let name = BASE64_URL_SAFE_NO_PAD.encode(name);
        if let Session::Enrolling { host, .. } = &session {
            let is_its = |kept: &Option<Session>| matches!(kept, Some(Session::Enrolling { host: other, .. }) if other == host);
            self.lock().retain(|_, (_, kept)| !is_its(kept));
        }
        Ok(self.put(&name, session).map(|()| name))
    }

    /// Keeps what a host has reached in a session, once.
    pub(super) fn put(&self, name: &str, session: Session) -> Result<(), NoSession> {
        let now = Instant::now();
        let mut sessions = self.lock();
        if sessions.contains_key(name) {
            return Err(NoSession::Used);
        }
        if sessions.len() >= MAX_SESSIONS {
            sessions.retain(|_, (until, _)| *until > now);
        }
        if sessions.len() >= MAX_SESSIONS {
            return Err(NoSession::Full);
        }
        // The challenge of this name has expired by then.
        sessions.insert(name.to_owned(), (now + self.lifetime, Some(session)));
        Ok(())
    }

    /// Takes a session out: nobody else has it after this.
    pub(super) fn take(&self, name: &str) -> Option<Session> {
        let mut sessions = self.lock();
        let (until, session) = sessions.get_mut(name)?;
        let session = session.take()?;
        (*until > Instant::now()).then_some(session)
    }

    fn nonce(&self, issued: &[u8]) -> String {
        BASE64_URL_SAFE_NO_PAD.encode(self.tag(NONCE, issued))
    }

    fn tag(&self, of: &[u8], issued: &[u8]) -> hmac::Tag {
        hmac::sign(&self.key, &[of, issued].concat())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, (Instant, Option<Session>)>> {
        lock(&self.sessions)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn enrolling() -> Session {
        enrolling_of("host")
    }

    fn enrolling_of(host: &str) -> Session {
        Session::Enrolling {
            host: host.to_owned(),
            as_known: Host::default(),
            endorsement: String::new(),
            attestation: String::new(),
            secret: Zeroizing::new([7; 32]),
        }
    }

    #[test]
    fn sessions_are_had_once_and_not_for_long() {
        let sessions = Sessions::new(LONG).unwrap();
        let name = sessions.begin(enrolling()).unwrap().unwrap();
        assert!(sessions.take(&name).is_some());
        assert!(sessions.take(&name).is_none());
        assert_eq!(sessions.put(&name, enrolling()), Err(NoSession::Used));
        let sessions = Sessions::new(Duration::ZERO).unwrap();
        let name = sessions.begin(enrolling()).unwrap().unwrap();
        assert!(sessions.take(&name).is_none());
    }

    #[test]
    fn there_are_not_too_many_and_old_ones_make_room() {
        let sessions = Sessions::new(LONG).unwrap();
        let begin = |sessions: &Sessions, n: usize| sessions.put(&n.to_string(), enrolling());
        (0..MAX_SESSIONS).for_each(|n| begin(&sessions, n).unwrap());
        assert_eq!(begin(&sessions, MAX_SESSIONS), Err(NoSession::Full));
        let sessions = Sessions::new(Duration::ZERO).unwrap();
        (0..=MAX_SESSIONS).for_each(|n| begin(&sessions, n).unwrap());
    }

    #[test]
    fn a_host_has_one_enrolment_at_a_time() {
        let sessions = Sessions::new(LONG).unwrap();
        let [first, other, second] =
            ["a", "b", "a"].map(|host| sessions.begin(enrolling_of(host)).unwrap().unwrap());
        assert!(sessions.take(&first).is_none());
        assert!(sessions.take(&other).is_some() && sessions.take(&second).is_some());
    }

    #[test]
    fn challenges_are_known_by_their_names_until_they_are_answered_or_too_old() {
        let sessions = Sessions::new(LONG).unwrap();
        let [one, two] = [(); 2].map(|()| sessions.challenge().unwrap());
        assert_ne!(one, two);
        for issued in [&one, &two, &one] {
            assert_eq!(sessions.challenged(&issued.session).as_ref(), Some(&issued.nonce));
        }
        assert!(sessions.lock().is_empty(), "a stranger costs nothing");
        sessions.put(&one.session, enrolling()).unwrap();
        assert_eq!(sessions.challenged(&one.session), None);
        sessions.take(&one.session).unwrap();
        assert_eq!(sessions.challenged(&one.session), None);
        assert_eq!(sessions.put(&one.session, enrolling()), Err(NoSession::Used));
        assert!(sessions.challenged(&two.session).is_some());

        // Each byte of the name counts, and each broker has a key of its own.
        let name = BASE64_URL_SAFE_NO_PAD.decode(&two.session).unwrap();
        for at in 0..name.len() {
            let mut altered = name.clone();
            altered[at] ^= 1;
            let altered = BASE64_URL_SAFE_NO_PAD.encode(altered);
            assert_eq!(sessions.challenged(&altered), None, "byte {at}");
        }
        for other in ["", "AAAA", &two.session[1..], &two.nonce] {
            assert_eq!(sessions.challenged(other), None);
        }
        assert_eq!(Sessions::new(LONG).unwrap().challenged(&two.session), None);
        let sessions = Sessions::new(Duration::ZERO).unwrap();
        let late = sessions.challenge().unwrap();
        assert_eq!(sessions.challenged(&late.session), None);
    }
}
