//! The end of requests that nothing would answer any more: they are left in flight, and the driver of their queue stops, migrates or is
//! reset. They are answered with an error.

use super::disk::Disk;
use super::request::{Request, Status, Target};
use super::ring::Ring;

/// Answers what is left in flight of `ring`, and gives the number of requests.
pub(super) fn answer(ring: &mut Ring, disk: &Disk) -> usize {
    let (mut request, mut answered) = (Request::new(), 0);
    while ring.is_resuming() {
        let chain = match ring.take() {
            Ok(Some(chain)) => chain,
            Ok(None) => continue,
            Err(error) => {
                tracing::warn!(queue = ring.index, %error, "requests in flight cannot be answered");
                break;
            }
        };
        let gathered = request.gather(chain);
        let sectors = disk.shown();
        let parsed = request.parse(gathered, &ring.memory, Target { disk, sectors });
        // One without a place for its status goes back as it is.
        let has_status = parsed.map_or_else(|why| why.status().is_some(), |()| true);
        let is_written = has_status && request.write_status(&ring.memory, Status::IoError).is_ok();
        let used_len = u32::from(is_written && request.writable_len == 0);
        if let Err(error) = ring.give_back(request.head, used_len) {
            tracing::warn!(queue = ring.index, %error, "requests in flight cannot be answered");
            break;
        }
        answered += 1;
    }
    if answered > 0
        && let Some(call) = &mut ring.call
        && let Err(error) = call.signal()
    {
        tracing::warn!(queue = ring.index, %error, "the driver cannot be notified");
    }
    answered
}
