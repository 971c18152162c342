//! Hostile guests and front-ends, as functions that take any bytes. They are the bodies of the fuzz targets in `fuzz/`, and of tests
//! that have them run for a few seconds. Nothing of this is in a build of the program.

mod messages;
mod queue;

pub use messages::messages;
pub use queue::queue;

/// Bytes that are taken from the front.
struct Bytes<'b>(&'b [u8]);

impl<'b> Bytes<'b> {
    fn take(&mut self, len: usize) -> Option<&'b [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    /// A number of two bytes.
    fn number(&mut self) -> Option<u16> {
        let bytes = self.take(2)?.try_into().ok()?;
        Some(u16::from_le_bytes(bytes))
    }

    /// As many bytes as the next one says, or what is left of them.
    fn some(&mut self) -> Option<&'b [u8]> {
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
