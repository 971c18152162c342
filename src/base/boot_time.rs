//! Time since the boot of the host, including the time of suspension. It limits the life of secrets. For waits, which do not
//! count the time of suspension, use [`std::time::Instant`].

use std::ops::Add;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// A point in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BootTime(Duration);

impl BootTime {
    /// The present.
    pub fn now() -> Self {
        let now = clock_gettime(ClockId::Boottime);
        // It counts from 0.
        let part = |number: i64| u64::try_from(number).unwrap_or(0);
        Self(Duration::from_secs(part(now.tv_sec)) + Duration::from_nanos(part(now.tv_nsec)))
    }

    /// How long ago it was; no time at all, if it is yet to come.
    pub fn elapsed(self) -> Duration {
        Self::now().0.saturating_sub(self.0)
    }
}

/// What is too long to be counted never comes.
impl Add<Duration> for BootTime {
    type Output = Self;

    fn add(self, time: Duration) -> Self {
        Self(self.0.saturating_add(time))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn it_is_the_time_since_the_boot_and_goes_on() {
        // The first number, in seconds, is CLOCK_BOOTTIME (proc_uptime(5)).
        let uptime = || -> f64 {
            let text = fs::read_to_string("/proc/uptime").unwrap();
            text.split_whitespace().next().unwrap().parse().unwrap()
        };
        let (before, now, after) = (uptime(), BootTime::now(), uptime());
        let seconds = now.0.as_secs_f64();
        assert!(before <= seconds + 0.01 && seconds <= after + 0.01, "{now:?}");
        assert!(now <= BootTime::now());
    }

    #[test]
    fn time_that_is_added_ends_nowhere() {
        let now = BootTime::now();
        let later = now + Duration::from_secs(3600);
        assert!(later > now && later.elapsed().is_zero());
        assert_eq!(later.0 - now.0, Duration::from_secs(3600));
        assert!(now + Duration::MAX > later);
        assert!(BootTime(Duration::ZERO).elapsed() >= now.0);
    }
}
