//! The sandbox of a process that serves a disk. The process enters it before it reads a byte of a guest or a front-end, so that a guest
//! that takes the process over can do little with it.
//!
//! ```text
//! no_new_privileges   no program can raise its privileges (prctl(2), PR_SET_NO_NEW_PRIVS)
//! system_calls        a filter (seccomp(2)) for all threads, those that are there and those to come. These fail with EPERM:
//!                       a program or process that it would start
//!                       a socket that is not a Unix socket
//!                       looking into another process, or sending it a signal
//!                       memory that is executable
//!                       changes of name spaces, mounts, users, keys, modules and the like
//! ```
//!
//! The process needs none of these calls any more: the key helper runs, the names of users and groups are known, the sockets are bound.
//! No thread can remove a filter, and new threads inherit it.
//!
//! The filter lists what fails, and lets the rest through: files can be opened as before, and the kernel does not ask it about what an
//! io_uring does. It costs nothing on the path of a request: the kernel remembers the calls that pass whatever their arguments are.
//!
//! x86-64 kernels can have system calls twice: the numbers of the x32 ABI are refused as well.

mod system_calls;

use clap::ValueEnum;
use seccompiler::BackendError;
use serde::{Deserialize, Serialize};

/// A measure of the sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// It gets no new privileges.
    NoNewPrivileges,
    /// It makes no system calls but those that a disk needs.
    SystemCalls,
}

impl Measure {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoNewPrivileges => "no new privileges",
            Self::SystemCalls => "system calls",
        }
    }
}

/// Whether a process enters the sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Choice {
    /// It ends if this kernel has no sandbox.
    Require,
    /// It warns and continues if this kernel has none.
    Prefer,
    /// It does not.
    Off,
}

/// Why a process cannot enter the sandbox.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The rules cannot be compiled for this processor.
    #[error(
        "--sandbox: there is no filter of system calls for this processor; serve the disk with --sandbox=prefer"
    )]
    Rules(#[from] BackendError),
    /// The kernel has no filters.
    #[error(
        "--sandbox: the system calls of this process cannot be filtered; run it on a kernel with seccomp filters \
         (CONFIG_SECCOMP_FILTER), or serve the disk with --sandbox=prefer"
    )]
    Filter(#[from] seccompiler::Error),
}

impl Choice {
    /// Enters the sandbox, and returns the measures in force.
    ///
    /// # Errors
    /// [`SandboxError`], if it was required.
    pub fn enter(self) -> Result<Vec<Measure>, SandboxError> {
        match self {
            Self::Off => {
                tracing::warn!(
                    "--sandbox=off: a guest that takes this process over can do all that its user can do"
                );
                Ok(Vec::new())
            }
            Self::Require => enter(),
            Self::Prefer => enter().or_else(|error| {
                tracing::warn!(%error, "this process is not confined");
                Ok(Vec::new())
            }),
        }
    }
}

fn enter() -> Result<Vec<Measure>, SandboxError> {
    system_calls::filter()?;
    Ok(vec![Measure::NoNewPrivileges, Measure::SystemCalls])
}
