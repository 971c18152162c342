//! What lies under an error.

use std::error::Error;

/// The cause of `error`, the cause of that, and so on.
pub(crate) fn causes<'e>(error: &'e (dyn Error + 'e)) -> impl Iterator<Item = &'e (dyn Error + 'static)> {
    std::iter::successors(error.source(), |error| (*error).source())
}
