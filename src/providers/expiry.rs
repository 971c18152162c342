//! Certificates that are about to expire: this host's own, and those of the authorities that it trusts.
//!
//! They are reported from 60 days before expiry on, with more weight from 30 and 7 days on, and after expiry. If a file has
//! several certificates of one subject, for instance while one is being replaced, the one that is valid longest counts.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use super::{tls::Certificate, tls::Identity, tls::TlsFiles, tls::certificates};
use crate::timestamp::Timestamp;

const DAY: u64 = 86_400;
/// The most that is told of a provider: a bundle of authorities may have many that are old.
const MOST: usize = 8;

/// A certificate that is to be renewed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Expiring {
    /// The file that it is in.
    pub path: String,
    /// Whom it is for.
    pub subject: String,
    /// What this host does with it.
    pub whose: Whose,
    /// Its last second.
    pub until: Timestamp,
}

/// What this host does with a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Whose {
    /// It shows it.
    Host,
    /// It believes those whom it has signed.
    Authority,
}

/// How much time is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Step {
    /// None.
    Expired,
    /// Less than 7 days.
    Week,
    /// Less than 30 days.
    Month,
    /// Less than 60 days.
    TwoMonths,
}

impl Expiring {
    /// How much time is left, if it is little.
    pub fn step(&self) -> Option<Step> {
        match self.until.ahead() {
            Duration::ZERO => Some(Step::Expired),
            left if left < days(7) => Some(Step::Week),
            left if left < days(30) => Some(Step::Month),
            left if left < days(60) => Some(Step::TwoMonths),
            _ => None,
        }
    }

    /// The whole days that are left.
    pub fn days(&self) -> u64 {
        self.until.ahead().as_secs() / DAY
    }
}

impl fmt::Display for Expiring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whose = match self.whose {
            Whose::Host => "this host's certificate",
            Whose::Authority => "the authority's certificate",
        };
        write!(f, "{whose} {:?} in {} ", self.subject, self.path)?;
        match (self.step(), self.days()) {
            (Some(Step::Expired), _) => write!(f, "has expired, at {}; renew it", self.until),
            (_, 0) => write!(f, "expires within a day, at {}; renew it", self.until),
            (_, 1) => write!(f, "expires in 1 day, at {}; renew it", self.until),
            (_, days) => write!(f, "expires in {days} days, at {}; renew it", self.until),
        }
    }
}

const fn days(days: u64) -> Duration {
    Duration::from_secs(days * DAY)
}

/// Those of `files` that are to be renewed, the most urgent first. Of files that cannot be read nothing is told: whoever
/// connects with them learns that.
pub(super) fn expiring(files: &TlsFiles) -> Vec<Expiring> {
    let own = files
        .identity
        .as_ref()
        .map(|Identity { certificate, .. }| certificate);
    let mut all: Vec<_> = in_file(&files.ca, Whose::Authority).collect();
    all.extend(own.into_iter().flat_map(|path| in_file(path, Whose::Host)));
    all.sort_by_key(|expiring| expiring.until);
    all.truncate(MOST);
    all
}

fn in_file(path: &Path, whose: Whose) -> impl Iterator<Item = Expiring> {
    let certificates = certificates(path).unwrap_or_default();
    let mut lasting: Vec<(String, Timestamp)> = Vec::new();
    for (subject, until) in certificates.iter().filter_map(validity) {
        match lasting.iter_mut().find(|(known, _)| *known == subject) {
            Some((_, known)) => *known = until.max(*known),
            None => lasting.push((subject, until)),
        }
    }
    let path = path.display().to_string();
    let told = lasting.into_iter().map(move |(subject, until)| Expiring {
        path: path.clone(),
        subject,
        whose,
        until,
    });
    told.filter(|expiring| expiring.step().is_some())
}

/// Whom a certificate is for, and until when.
fn validity(certificate: &CertificateDer<'_>) -> Option<(String, Timestamp)> {
    let certificate = Certificate::parse(certificate)?;
    let (_, until) = certificate.validity();
    Some((certificate.subject(), until))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// Two authorities of the name CN=old, until 2020 and 2021, and one CN=new, until 2999.
    const AUTHORITIES: &str = include_str!("testdata/authorities.pem");

    fn until(left: Duration) -> Expiring {
        Expiring {
            path: "/ca.pem".into(),
            subject: "CN=x".into(),
            whose: Whose::Host,
            until: Timestamp::of(std::time::SystemTime::now() + left),
        }
    }

    #[test]
    fn there_are_60_30_and_7_days() {
        let hour = Duration::from_secs(3600);
        for (left, step) in [
            (days(61), None),
            (days(60) + hour, None),
            (days(60) - hour, Some(Step::TwoMonths)),
            (days(30) + hour, Some(Step::TwoMonths)),
            (days(30) - hour, Some(Step::Month)),
            (days(7) + hour, Some(Step::Month)),
            (days(7) - hour, Some(Step::Week)),
            (hour, Some(Step::Week)),
            (Duration::ZERO, Some(Step::Expired)),
        ] {
            assert_eq!(until(left).step(), step, "{left:?}");
        }
        assert!(
            until(days(7) + hour)
                .to_string()
                .contains("expires in 7 days, at ")
        );
        assert!(until(hour).to_string().contains("expires within a day, at "));
    }

    #[test]
    fn of_one_subject_the_certificate_counts_that_lasts_longest() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), AUTHORITIES).unwrap();
        let files = TlsFiles {
            ca: file.path().to_owned(),
            identity: None,
        };
        let told = expiring(&files);
        let [old] = &told[..] else { panic!("{told:?}") };
        assert_eq!(
            (old.subject.as_str(), old.step()),
            ("CN=old", Some(Step::Expired))
        );
        assert_eq!(old.until.to_string(), "2021-01-01T00:00:00Z");
        fs::write(file.path(), "no certificate").unwrap();
        assert!(expiring(&files).is_empty());
    }
}
