//! Hostile guests and front-ends, as functions that take any bytes. They are the bodies of the fuzz targets in `fuzz/`, and of tests
//! that have them run for a few seconds. Nothing of this is in a build of the program.

mod messages;
mod queue;

use std::thread;

use rustix::event::{PollFd, PollFlags, poll};

use super::handover::{Given, Handover};

pub use messages::messages;
pub use queue::queue;

/// The way to a thread that serves no front-end, and hands over that.
pub(crate) fn handover_of_no_session() -> Handover {
    let handover = Handover::new().unwrap();
    let asked = handover.clone();
    thread::spawn(move || {
        loop {
            poll(&mut [PollFd::new(asked.asked(), PollFlags::IN)], None).unwrap();
            if let Some(asked) = asked.take() {
                asked.answer(Ok(Given {
                    listener: None,
                    served: None,
                }));
            }
        }
    });
    handover
}

/// Bytes that are taken from the front.
pub(crate) struct Bytes<'b>(pub(crate) &'b [u8]);

impl<'b> Bytes<'b> {
    pub(crate) fn take(&mut self, len: usize) -> Option<&'b [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    pub(crate) fn byte(&mut self) -> Option<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    /// A number of two bytes.
    pub(crate) fn number(&mut self) -> Option<u16> {
        let bytes = self.take(2)?.try_into().ok()?;
        Some(u16::from_le_bytes(bytes))
    }

    /// As many bytes as the next one says, or what is left of them.
    pub(super) fn some(&mut self) -> Option<&'b [u8]> {
        let len = self.byte()?;
        self.take(self.0.len().min(len.into()))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    #[test]
    fn no_driver_breaks_the_device_or_gets_at_memory_that_it_did_not_offer() {
        inputs::run("queue", Duration::from_secs(8), super::queue);
    }

    #[test]
    fn no_front_end_breaks_a_session_or_leaves_anything_behind() {
        inputs::run("messages", Duration::from_secs(8), super::messages);
    }
}
