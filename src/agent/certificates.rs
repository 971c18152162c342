//! Reports certificates that are about to expire: once a day, and when the remaining time passes a step (30, 7 days).

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::mutex::lock;
use crate::providers::registry::Entry;
use crate::providers::{Expiring, Step};

/// How often the files are read.
const LOOK: Duration = Duration::from_secs(3600);
/// How often the same is told again.
const AGAIN: Duration = Duration::from_secs(24 * 3600);

/// What was told.
#[derive(Debug, Default)]
pub(super) struct Certificates(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    looked: Option<Instant>,
    told: HashMap<(String, Expiring), (Step, Instant)>,
}

impl Certificates {
    /// What is to be told now, each with its provider. `list` is asked once in a while.
    pub(super) fn due(&self, list: impl FnOnce() -> Vec<Entry>) -> Vec<(String, Expiring)> {
        let mut state = lock(&self.0);
        if state.looked.is_some_and(|looked| looked.elapsed() < LOOK) {
            return Vec::new();
        }
        state.looked = Some(Instant::now());
        state.sift(list(), Instant::now())
    }
}

impl State {
    fn sift(&mut self, providers: Vec<Entry>, now: Instant) -> Vec<(String, Expiring)> {
        let before = std::mem::take(&mut self.told);
        let mut due = Vec::new();
        for provider in providers {
            for expiring in provider.expiring {
                let Some(step) = expiring.step() else { continue };
                let certificate = (provider.name.clone(), expiring);
                let told = match before.get(&certificate) {
                    Some(&(same, then)) if same == step && now.duration_since(then) < AGAIN => then,
                    _ => {
                        due.push(certificate.clone());
                        now
                    }
                };
                self.told.insert(certificate, (step, told));
            }
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::providers::Whose;
    use crate::timestamp::Timestamp;

    fn provider(until: u64) -> Vec<Entry> {
        vec![Entry {
            name: "kms".into(),
            kind: "kmip".into(),
            default: true,
            location: "kms1:5696".into(),
            expiring: vec![Expiring {
                path: "/host.pem".into(),
                subject: "CN=host".into(),
                whose: Whose::Host,
                until: Timestamp::from_unix(until),
            }],
        }]
    }

    #[test]
    fn a_certificate_is_told_of_once_a_day_until_it_is_renewed() {
        let mut state = State::default();
        let start = Instant::now();
        let mut told_at = |hours: u64, until| {
            let now = start + Duration::from_secs(3600 * hours);
            state.sift(provider(until), now).len()
        };
        assert_eq!(
            [0, 1, 23, 24, 25, 48].map(|hours| told_at(hours, 1)),
            [1, 0, 0, 1, 0, 1]
        );
        // Another one in its place is another matter.
        assert_eq!(told_at(49, u64::MAX), 0);
        assert_eq!(told_at(50, 2), 1);
    }
}
