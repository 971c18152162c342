//! Sessions: a challenge of the broker to a host, until the host answers or the time is over. Each session is one attestation,
//! or one enrolment.
//!
//! A stranger can ask for any number of challenges, so the broker stores none of them: a session's name contains its time and
//! a tag, and its nonce is computed from the name. The broker stores a session only after it has accepted evidence. It keeps
//! the attested session until the challenge has expired, so a nonce is valid for one attestation. A host has a share of the
//! room for sessions.
//!
//! The broker also stores nothing for an enrolment in progress, since anyone with a host's name and public endorsement key
//! can begin one: the session's name contains all of it, and the secret in the credential is computed from the name. So any
//! number of enrolments can be in progress, and each can be completed; the first completed one changes the host's settings,
//! and so invalidates the others.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use ring::hmac;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::state::{Host, Reference};
use crate::boot_time::BootTime;
use crate::kbs::jwe::PublicKey;
use crate::mutex::lock;
use crate::parsing;

/// The most that are kept at a time, and how many of them a host gets at any rate, while there is room.
const MAX_SESSIONS: usize = 4096;
const SURE: usize = 64;
/// What tells one challenge from all others, and when it is too old: in milliseconds after the broker's start, big-endian.
const RANDOM_LEN: usize = 16;
const ISSUED_LEN: usize = RANDOM_LEN + 8;
const TAG_LEN: usize = 32;
/// What the key computes.
const NAME: &[u8] = b"session\0";
const NONCE: &[u8] = b"nonce\0";
const ENROLMENT: &[u8] = b"enrolment\0";
const CREDENTIAL: &[u8] = b"credential\0";
const HOST: &[u8] = b"host\0";

/// The sessions of a broker.
#[derive(Debug)]
pub(super) struct Sessions {
    lifetime: Duration,
    started: BootTime,
    /// Of this process alone.
    key: hmac::Key,
    /// By name.
    sessions: Mutex<HashMap<String, Kept>>,
}

#[derive(Debug)]
struct Kept {
    until: BootTime,
    host: String,
    /// One that was taken leaves nothing but its name.
    session: Option<Attested>,
}

/// A nonce that nobody had before, and the session that it is for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Issued {
    pub(super) session: String,
    pub(super) nonce: String,
}

/// A host that is what it has to be, and gets one resource, encrypted to this key.
#[derive(Debug)]
pub(super) struct Attested {
    pub(super) host: String,
    /// What was known of it, and what was expected: of another one nothing was proved.
    pub(super) as_known: Host,
    pub(super) reference: Reference,
    pub(super) key: PublicKey,
}

/// A host that has a credential to open.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Enrolling {
    pub(super) host: String,
    /// The SHA-256 of its endorsement key.
    pub(super) endorsement: String,
    /// TPMT_PUBLIC, in base64.
    pub(super) attestation: String,
    /// Stands for what the operator had said of it: [`Sessions::mark`].
    pub(super) as_known: String,
}

/// What is in a credential.
pub(super) type Secret = Zeroizing<[u8; 32]>;

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
            started: BootTime::now(),
            key: hmac::Key::new(hmac::HMAC_SHA256, &key[..]),
            sessions: Mutex::default(),
        })
    }

    /// A new challenge, of which nothing is kept.
    pub(super) fn challenge(&self) -> Result<Issued, getrandom::Error> {
        let issued = self.issue()?;
        let tag = self.tag(NAME, &issued);
        Ok(Issued {
            session: BASE64_URL_SAFE_NO_PAD.encode([&issued[..], tag.as_ref()].concat()),
            nonce: self.nonce(&issued),
        })
    }

    fn issue(&self) -> Result<[u8; ISSUED_LEN], getrandom::Error> {
        let mut issued = [0; ISSUED_LEN];
        let (random, expires) = issued.split_at_mut(RANDOM_LEN);
        getrandom::fill(random)?;
        let until = self.started.elapsed() + self.lifetime;
        expires.copy_from_slice(&(until.as_millis() as u64).to_be_bytes());
        Ok(issued)
    }

    fn is_fresh(&self, issued: &[u8]) -> bool {
        let expires = issued
            .get(RANDOM_LEN..ISSUED_LEN)
            .and_then(|bytes| bytes.try_into().ok());
        expires.is_some_and(|expires| {
            self.started.elapsed() < Duration::from_millis(u64::from_be_bytes(expires))
        })
    }

    /// The nonce of a session that this broker has challenged a host in, unless it was attested or is too old.
    pub(super) fn challenged(&self, session: &str) -> Option<String> {
        let name = BASE64_URL_SAFE_NO_PAD.decode(session).ok()?;
        let name: [u8; ISSUED_LEN + TAG_LEN] = name.try_into().ok()?;
        let (issued, tag) = name.split_at(ISSUED_LEN);
        hmac::verify(&self.key, &[NAME, issued].concat(), tag).ok()?;
        let is_fresh = self.is_fresh(issued);
        let is_unused = !self.lock().contains_key(session);
        (is_fresh && is_unused).then(|| self.nonce(issued))
    }

    /// Begins an enrolment, of which nothing is kept: its name, and what its credential is to hold.
    pub(super) fn enrol(&self, enrolling: &Enrolling) -> Result<(String, Secret), getrandom::Error> {
        let told = serde_json::to_vec(enrolling).expect("texts are JSON");
        let content = [&self.issue()?[..], &told].concat();
        let tag = self.tag(ENROLMENT, &content);
        let name = BASE64_URL_SAFE_NO_PAD.encode([tag.as_ref(), &content].concat());
        Ok((name, self.secret(&content)))
    }

    /// The enrolment that this broker has begun under this name, unless it is too old, and what its credential holds.
    pub(super) fn enrolling(&self, name: &str) -> Option<(Enrolling, Secret)> {
        let name = BASE64_URL_SAFE_NO_PAD.decode(name).ok()?;
        let (tag, content) = name.split_at_checked(TAG_LEN)?;
        hmac::verify(&self.key, &[ENROLMENT, content].concat(), tag).ok()?;
        let enrolling = parsing::json(content.get(ISSUED_LEN..)?).ok()?;
        self.is_fresh(content).then(|| (enrolling, self.secret(content)))
    }

    /// What stands for all that is known of a host, and tells nothing of it.
    pub(super) fn mark(&self, host: &Host) -> String {
        let known = serde_json::to_vec(host).expect("texts are JSON");
        BASE64_URL_SAFE_NO_PAD.encode(self.tag(HOST, &known))
    }

    fn secret(&self, content: &[u8]) -> Secret {
        let mut secret = Zeroizing::new([0; 32]);
        secret.copy_from_slice(self.tag(CREDENTIAL, content).as_ref());
        secret
    }

    /// Keeps what a host has reached in a session, once.
    pub(super) fn put(&self, name: &str, session: Attested) -> Result<(), NoSession> {
        let now = BootTime::now();
        let mut sessions = self.lock();
        if sessions.contains_key(name) {
            return Err(NoSession::Used);
        }
        // Half of what is left, so that the next host finds some.
        let has_room = |sessions: &HashMap<String, Kept>| {
            let left = MAX_SESSIONS.saturating_sub(sessions.len());
            let its = sessions.values().filter(|kept| kept.host == session.host);
            left > 0 && its.count() < SURE.max(left / 2)
        };
        if !has_room(&sessions) {
            sessions.retain(|_, kept| kept.until > now);
            if !has_room(&sessions) {
                return Err(NoSession::Full);
            }
        }
        let kept = Kept {
            // The challenge of this name has expired by then.
            until: now + self.lifetime,
            host: session.host.clone(),
            session: Some(session),
        };
        sessions.insert(name.to_owned(), kept);
        Ok(())
    }

    /// Takes a session out: nobody else has it after this.
    pub(super) fn take(&self, name: &str) -> Option<Attested> {
        let mut sessions = self.lock();
        let kept = sessions.get_mut(name)?;
        let session = kept.session.take()?;
        (kept.until > BootTime::now()).then_some(session)
    }

    fn nonce(&self, issued: &[u8]) -> String {
        BASE64_URL_SAFE_NO_PAD.encode(self.tag(NONCE, issued))
    }

    fn tag(&self, of: &[u8], issued: &[u8]) -> hmac::Tag {
        hmac::sign(&self.key, &[of, issued].concat())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Kept>> {
        lock(&self.sessions)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn attested() -> Attested {
        attested_of("host")
    }

    fn attested_of(host: &str) -> Attested {
        Attested {
            host: host.to_owned(),
            as_known: Host::default(),
            reference: Reference::default(),
            key: serde_json::from_value(serde_json::json!({ "crv": "", "kty": "", "x": "", "y": "" }))
                .unwrap(),
        }
    }

    #[test]
    fn sessions_are_had_once_and_not_for_long() {
        let sessions = Sessions::new(LONG).unwrap();
        sessions.put("name", attested()).unwrap();
        assert!(sessions.take("name").is_some());
        assert!(sessions.take("name").is_none());
        assert_eq!(sessions.put("name", attested()), Err(NoSession::Used));
        let sessions = Sessions::new(Duration::ZERO).unwrap();
        sessions.put("name", attested()).unwrap();
        assert!(sessions.take("name").is_none());
    }

    #[test]
    fn no_host_takes_the_room_of_others_and_old_sessions_make_room() {
        let sessions = Sessions::new(LONG).unwrap();
        let fill = |host: &str| {
            let put = |n: &usize| sessions.put(&format!("{host}.{n}"), attested_of(host)).is_ok();
            (0..=MAX_SESSIONS).take_while(put).count()
        };
        assert!(fill("a") < MAX_SESSIONS / 2);
        assert!(fill("b") >= SURE && fill("c") >= SURE);
        let sessions = Sessions::new(Duration::ZERO).unwrap();
        for n in 0..=MAX_SESSIONS {
            sessions.put(&n.to_string(), attested()).unwrap();
        }
    }

    // A host had one enrolment at a time: whoever began another one, which takes no more than its public endorsement key,
    // cancelled it.
    #[test]
    fn enrolments_are_known_by_their_names_however_many_are_begun() {
        let sessions = Sessions::new(LONG).unwrap();
        let enrolling = Enrolling {
            host: "host".to_owned(),
            endorsement: "ek".to_owned(),
            attestation: "ak".to_owned(),
            as_known: sessions.mark(&Host::default()),
        };
        let [(first, secret), (second, other)] = [(); 2].map(|()| sessions.enrol(&enrolling).unwrap());
        assert!(first != second && secret != other);
        for (name, secret) in [(&first, &secret), (&second, &other), (&first, &secret)] {
            let (known, holds) = sessions.enrolling(name).unwrap();
            assert_eq!((known.host.as_str(), &holds), ("host", secret));
        }
        assert!(sessions.lock().is_empty(), "a stranger costs nothing");
        let name = BASE64_URL_SAFE_NO_PAD.decode(&first).unwrap();
        for at in 0..name.len() {
            let mut altered = name.clone();
            altered[at] ^= 1;
            let altered = BASE64_URL_SAFE_NO_PAD.encode(altered);
            assert!(sessions.enrolling(&altered).is_none(), "byte {at}");
        }
        let challenge = sessions.challenge().unwrap().session;
        for other in ["", "AAAA", &first[1..], &challenge] {
            assert!(sessions.enrolling(other).is_none());
        }
        assert!(sessions.challenged(&first).is_none());
        assert!(Sessions::new(LONG).unwrap().enrolling(&first).is_none());
        let sessions = Sessions::new(Duration::ZERO).unwrap();
        let (late, _) = sessions.enrol(&enrolling).unwrap();
        assert!(sessions.enrolling(&late).is_none());
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
        sessions.put(&one.session, attested()).unwrap();
        assert_eq!(sessions.challenged(&one.session), None);
        sessions.take(&one.session).unwrap();
        assert_eq!(sessions.challenged(&one.session), None);
        assert_eq!(sessions.put(&one.session, attested()), Err(NoSession::Used));
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
