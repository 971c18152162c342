//! The sandbox of a process that serves a disk. The process enters it before it reads a byte of a guest or a front-end, so that a guest
//! that takes the process over can do little with it.
//!
//! ```text
//! no_new_privileges   no program can raise its privileges (prctl(2), PR_SET_NO_NEW_PRIVS)
//! capabilities        no privileges of root (capabilities(7)) except those that the disk needs
//! abstract_sockets    no abstract Unix sockets of other processes (Landlock)
//! network             no TCP (Landlock)
//! files               no files except its own (Landlock); landlock_rules has these three
//! system_calls        only the system calls that a served disk makes (seccomp(2)): no programs, no processes, no memory that is
//!                     executable, no sockets except that of the protocol handler
//! ```
//!
//! The process does not need what it gives up: the key helper runs, the names of users and groups are known, the sockets are bound, and
//! the journal and the service manager are connected. No thread can leave the sandbox, and new threads inherit it. The measures
//! overlap on purpose: a kernel may lack one of them.
//!
//! The kernel does not ask the filter about the operations of an io_uring. So the process makes all its rings before, and each accepts only
//! the operations of a queue ([`crate::storage::RingPool`]).

mod capabilities;
mod landlock_rules;
mod system_calls;

use std::io;

use clap::ValueEnum;
use landlock::RulesetError;
use seccompiler::BackendError;
use serde::{Deserialize, Serialize};

pub use landlock_rules::Allowed;

/// Has a thread tell the log of system calls that the sandbox refuses.
///
/// # Errors
/// If the thread cannot be started.
pub fn tell_of_refusals() -> io::Result<()> {
    system_calls::tell()
}

/// A measure of the sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// It gets no new privileges.
    NoNewPrivileges,
    /// It has no privileges of root but those that it needs.
    Capabilities,
    /// It connects to no abstract Unix sockets of other processes.
    AbstractSockets,
    /// It uses no TCP.
    Network,
    /// It opens no files but its own.
    Files,
    /// It makes no system calls but those that a disk needs.
    SystemCalls,
}

impl Measure {
    /// In the order in which they are taken.
    const ALL: [Self; 6] = [
        Self::NoNewPrivileges,
        Self::Capabilities,
        Self::AbstractSockets,
        Self::Network,
        Self::Files,
        Self::SystemCalls,
    ];

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoNewPrivileges => "no new privileges",
            Self::Capabilities => "capabilities",
            Self::AbstractSockets => "abstract sockets",
            Self::Network => "network",
            Self::Files => "files",
            Self::SystemCalls => "system calls",
        }
    }

    /// What a kernel needs for it.
    fn needs(self) -> &'static str {
        match self {
            Self::NoNewPrivileges => "Linux 3.5",
            Self::Capabilities => "Linux 4.3",
            Self::AbstractSockets => {
                "Linux 6.12 with Landlock (CONFIG_SECURITY_LANDLOCK, and `landlock` in the parameter lsm=)"
            }
            Self::Network => {
                "Linux 6.7 with Landlock (CONFIG_SECURITY_LANDLOCK, and `landlock` in the parameter lsm=)"
            }
            Self::Files => {
                "Linux 5.13 with Landlock (CONFIG_SECURITY_LANDLOCK, and `landlock` in the parameter lsm=)"
            }
            Self::SystemCalls => "CONFIG_SECCOMP_FILTER, and x86-64 or aarch64",
        }
    }

    fn take(self, allowed: &Allowed) -> Result<(), NotTaken> {
        match self {
            Self::NoNewPrivileges => {
                rustix::thread::set_no_new_privs(true).map_err(|error| NotTaken::Kernel(error.into()))
            }
            Self::Capabilities => capabilities::drop_all(allowed),
            Self::AbstractSockets => landlock_rules::abstract_sockets(),
            Self::Network => landlock_rules::network(),
            Self::Files => landlock_rules::files(allowed),
            Self::SystemCalls => system_calls::filter(allowed.address_len),
        }
    }
}

/// Whether a process enters the sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Choice {
    /// It ends if this kernel does not have all measures.
    Require,
    /// It takes the measures that this kernel has, and warns of each that it does not have.
    Prefer,
    /// It takes none.
    Off,
}

/// The measures of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sandbox {
    /// Those in force.
    pub in_force: Vec<Measure>,
    /// The others.
    pub missing: Vec<Missing>,
}

/// A measure that is not in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// Which.
    pub measure: Measure,
    /// Why, for people.
    pub reason: String,
}

/// A process that has to be confined cannot be.
#[derive(Debug, thiserror::Error)]
#[error(
    "--sandbox=require: this kernel does not have the measure `{}`, which needs {}; serve the disk with --sandbox=prefer",
    measure.name(),
    measure.needs()
)]
pub struct SandboxError {
    measure: Measure,
    source: NotTaken,
}

/// Why a measure is not in force.
#[derive(Debug, thiserror::Error)]
enum NotTaken {
    /// The rules cannot be compiled for this processor.
    #[error(transparent)]
    Rules(#[from] BackendError),
    #[error(transparent)]
    Filter(#[from] seccompiler::Error),
    #[error(transparent)]
    Landlock(RulesetError),
    #[error("cannot count the threads")]
    Threads(#[source] io::Error),
    /// A defect of sealblk.
    #[error("the process has {0} threads already")]
    HasThreads(usize),
    #[error(transparent)]
    Kernel(io::Error),
}

impl Choice {
    /// Enters the sandbox, in which the process can open what is `allowed`. Call it while there is one thread.
    ///
    /// # Errors
    /// [`SandboxError`], if it was required.
    pub fn enter(self, allowed: &Allowed) -> Result<Sandbox, SandboxError> {
        let mut sandbox = Sandbox::default();
        for measure in Measure::ALL {
            let reason = match self {
                Self::Off => "--sandbox=off".to_owned(),
                Self::Require | Self::Prefer => match measure.take(allowed) {
                    Ok(()) => {
                        sandbox.in_force.push(measure);
                        continue;
                    }
                    Err(source) if self == Self::Require => return Err(SandboxError { measure, source }),
                    Err(error) => {
                        let reason = format!("it needs {} ({error})", measure.needs());
                        tracing::warn!(
                            measure = measure.name(),
                            reason,
                            "a measure of the sandbox is not in force"
                        );
                        reason
                    }
                },
            };
            sandbox.missing.push(Missing { measure, reason });
        }
        if self == Self::Off {
            tracing::warn!(
                "--sandbox=off: a guest that takes this process over can do all that its user can do"
            );
        }
        Ok(sandbox)
    }
}
