//! The capabilities of the process (capabilities(7)): root's privileges, which it drops.
//!
//! Capabilities belong to threads. So the process drops them while it has one.

use std::io;

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities,
};

use super::NotTaken;
use super::landlock_rules::Allowed;

/// Drops all capabilities from all sets, but for those that serving this disk needs.
pub(super) fn drop_all(allowed: &Allowed) -> Result<(), NotTaken> {
    let held = capabilities(None).map_err(|error| NotTaken::Kernel(error.into()))?;
    match held == NOTHING {
        // A service manager has seen to it, and its filter of system calls may forbid to do it again.
        true => leave_bounds(NOTHING.effective).map_err(NotTaken::Kernel),
        false => needed(allowed).and_then(keep).map_err(NotTaken::Kernel),
    }
}

const NOTHING: CapabilitySets = CapabilitySets {
    effective: CapabilitySet::empty(),
    permitted: CapabilitySet::empty(),
    inheritable: CapabilitySet::empty(),
};

/// Those that the process needs later, of the ones that it has.
fn needed(allowed: &Allowed) -> io::Result<CapabilitySet> {
    let held = capabilities(None)?;
    let mut needed = CapabilitySet::empty();
    // Each queue pins memory. Without a limit that takes no capability.
    if held.effective.contains(CapabilitySet::IPC_LOCK) && lift_memory_limit().is_err() {
        needed |= CapabilitySet::IPC_LOCK;
        tracing::info!(
            "CAP_IPC_LOCK is kept, since the limit of locked memory cannot be lifted (RLIMIT_MEMLOCK)"
        );
    }
    // Whether the files can be opened without any.
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        ..held
    };
    set_capabilities(None, none)?;
    let is_open = allowed.is_open();
    set_capabilities(None, held)?;
    if held.effective.contains(CapabilitySet::DAC_OVERRIDE) && !is_open {
        needed |= CapabilitySet::DAC_OVERRIDE;
        tracing::info!(
            "CAP_DAC_OVERRIDE is kept, since the disk, or the directory of a socket, is another user's"
        );
    }
    Ok(needed)
}

fn lift_memory_limit() -> io::Result<()> {
    let unlimited = Rlimit {
        current: None,
        maximum: None,
    };
    if getrlimit(Resource::Memlock) != unlimited {
        setrlimit(Resource::Memlock, unlimited)?;
    }
    Ok(())
}

fn keep(needed: CapabilitySet) -> io::Result<()> {
    leave_bounds(needed)?;
    let sets = CapabilitySets {
        effective: needed,
        permitted: needed,
        inheritable: CapabilitySet::empty(),
    };
    Ok(set_capabilities(None, sets)?)
}

/// Leaves the sets that the execution of another program would look at.
fn leave_bounds(needed: CapabilitySet) -> io::Result<()> {
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if needed.contains(capability) {
            continue;
        }
        match remove_capability_from_bounding_set(capability) {
            // The kernel has no more.
            Err(Errno::INVAL) => break,
            // Without CAP_SETPCAP they stay in this set. It counts when a program is executed, and none is.
            Ok(()) | Err(Errno::PERM) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(clear_ambient_capability_set()?)
}
