//! A point in time, to the second, in the form of RFC 3339 in UTC, for headers, lists and receipts.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::parsing::{broken, rule};

/// A second, from 1970 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(u64);

/// The last second that RFC 3339 can write.
const LAST: u64 = 253_402_300_799;

/// A text that is no point in time.
#[derive(Debug, thiserror::Error)]
#[error("a point in time looks like 2026-11-23T10:44:14Z")]
pub struct NotATimestamp;

impl Timestamp {
    /// The present, as this host's clock has it.
    pub fn now() -> Self {
        Self::of(SystemTime::now())
    }

    /// The second that `time` is in; times that RFC 3339 cannot write become the nearest that it can.
    pub fn of(time: SystemTime) -> Self {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(since.as_secs().min(LAST))
    }

    /// The second with this number, counted from 1970.
    pub fn from_unix(seconds: u64) -> Self {
        Self(seconds.min(LAST))
    }

    /// How long ago it was; no time at all, if it is yet to come.
    pub fn age(self) -> Duration {
        Duration::from_secs(Self::now().0.saturating_sub(self.0))
    }

    /// Whether it cannot be shown to be within the last `age`. One that is yet to come was written by a clock that was wrong, and
    /// tells nothing; a day is for clocks that differ.
    pub fn may_be_older_than(self, age: Duration) -> bool {
        const DAY: Duration = Duration::from_secs(24 * 3600);
        self.age() > age || self.ahead() > DAY
    }

    /// How long it is until then; no time at all, if it has passed.
    pub fn ahead(self) -> Duration {
        Duration::from_secs(self.0.saturating_sub(Self::now().0))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(self.0)).fmt(f)
    }
}

impl FromStr for Timestamp {
    type Err = NotATimestamp;

    fn from_str(text: &str) -> Result<Self, NotATimestamp> {
        humantime::parse_rfc3339(text)
            .map(Self::of)
            .map_err(|_| NotATimestamp)
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(|NotATimestamp| broken(rule::TIMESTAMP))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_what_it_was_written_as() {
        for text in [
            "1970-01-01T00:00:00Z",
            "2026-11-23T10:44:14Z",
            "9999-12-31T23:59:59Z",
        ] {
            assert_eq!(text.parse::<Timestamp>().unwrap().to_string(), text);
        }
        assert_eq!(Timestamp::from_unix(u64::MAX).to_string(), "9999-12-31T23:59:59Z");
        for text in ["", "yesterday", "2026-11-23", "2026-13-01T00:00:00Z"] {
            assert!(text.parse::<Timestamp>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_moment_that_is_far_ahead_is_of_no_known_age() {
        let year = Duration::from_secs(365 * 24 * 3600);
        let at = |seconds: i64| Timestamp(Timestamp::now().0.saturating_add_signed(seconds));
        for (seconds, older) in [
            (-60, false),
            (3600, false),
            (-400 * 86400, true),
            (2 * 86400, true),
        ] {
            assert_eq!(at(seconds).may_be_older_than(year), older, "{seconds}");
        }
    }

    #[test]
    fn what_is_yet_to_come_has_no_age_and_what_has_passed_is_not_ahead() {
        let (past, future) = (Timestamp::from_unix(0), Timestamp::from_unix(u64::MAX));
        assert!(past.age() > Duration::from_secs(1 << 30) && past.ahead().is_zero());
        assert!(future.ahead() > Duration::from_secs(1 << 30) && future.age().is_zero());
    }
}
