//! How long a worker looks for something to do itself, before it sleeps until it is woken.
//!
//! A wake-up takes several microseconds, and tens of them if the processor sleeps too; a look takes processor time. So a worker
//! looks only while an event is likely to come soon: when the last events came soon, and never for longer than a bound. KVM
//! polls for a halted guest's interrupts by the same rule, and QEMU's I/O threads for requests. A worker that waits for rare
//! events stops looking after a few of them. A worker that has enough in flight never looks, since the gain would be small.

use std::time::{Duration, Instant};

/// Where a window starts to grow, and below which it closes.
const LEAST: Duration = Duration::from_micros(4);

/// The time to look for one kind of event. It adapts to how soon such events come.
#[derive(Debug)]
pub(super) struct Polling {
    window: Duration,
    max: Duration,
}

impl Polling {
    /// A window that opens up to `max`; with zero, it never does.
    pub(super) fn new(max: Duration) -> Self {
        Self { window: max, max }
    }

    /// Looks until `found` or the window is over; tells which.
    pub(super) fn look(&self, mut found: impl FnMut() -> bool) -> bool {
        if self.window.is_zero() {
            return false;
        }
        let start = Instant::now();
        while start.elapsed() < self.window {
            if found() {
                return true;
            }
            std::hint::spin_loop();
        }
        false
    }

    /// Takes into account that the worker found nothing, and then slept for `time`.
    pub(super) fn slept(&mut self, time: Duration) {
        self.window = if time < self.max {
            (self.window * 2).clamp(LEAST.min(self.max), self.max)
        } else {
            let halved = self.window / 2;
            if halved < LEAST { Duration::ZERO } else { halved }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_micros(10);
    const MAX: Duration = Duration::from_micros(32);
    const LATE: Duration = Duration::from_millis(10);

    #[test]
    fn the_window_closes_when_events_are_rare_and_opens_when_they_are_not() {
        let mut polling = Polling::new(MAX);
        for _ in 0..5 {
            polling.slept(LATE);
        }
        assert_eq!(polling.window, Duration::ZERO);
        assert!(!polling.look(|| panic!("nothing is looked for")));
        polling.slept(SOON);
        assert_eq!(polling.window, LEAST);
        for _ in 0..5 {
            polling.slept(SOON);
        }
        assert_eq!(polling.window, MAX);
    }

    #[test]
    fn polling_can_be_turned_off() {
        let mut polling = Polling::new(Duration::ZERO);
        polling.slept(Duration::ZERO);
        assert!(!polling.look(|| panic!("nothing is looked for")));
    }

    #[test]
    fn looking_ends_with_what_it_finds() {
        let mut looks = 0;
        let found = Polling::new(Duration::from_secs(60)).look(|| {
            looks += 1;
            looks == 3
        });
        assert!(found);
    }
}
