//! Process-wide protection of keys: no core dump, no debugger, no reading of `/proc/PID/mem` by the same user.
//!
//! This module uses only calls that need no privilege; root on a running host is outside the threat model.

use std::io;

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

/// Forbids core dumps and attaching to this process. To be called before the first key exists.
///
/// `PR_SET_DUMPABLE` also covers dumps that are piped to a handler, which ignore `RLIMIT_CORE`; the limit is set as
/// well because `execve` resets the former.
///
/// # Errors
/// What the kernel answered. Neither call fails on a kernel that sealblk supports, unless a sandbox forbids it.
pub fn process() -> io::Result<()> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    setrlimit(
        Resource::Core,
        Rlimit {
            current: Some(0),
            maximum: Some(0),
        },
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{dumpable_behavior, getrlimit};

    #[test]
    fn hardened_process_is_not_dumpable() {
        process().unwrap();
        assert_eq!(dumpable_behavior().unwrap(), DumpableBehavior::NotDumpable);
        assert_eq!(getrlimit(Resource::Core).maximum, Some(0));
    }
}
