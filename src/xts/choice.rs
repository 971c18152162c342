//! The kernels of this architecture, and the choice among them at run time.

use std::fmt;
use std::str::FromStr;

use super::kernel::Kernel;
#[cfg(target_arch = "x86_64")]
use super::x86;
use super::{CipherError, portable};
use sealblk_secmem::arena::{ArenaError, SecretBytes};

/// A row of the table.
pub(super) struct Candidate {
    pub(super) name: &'static str,
    pub(super) choice: KernelChoice,
    /// Whether this machine's processor has the instructions.
    pub(super) runs_here: fn() -> bool,
    /// Expands a key of [`super::KEY_LEN`] bytes; round keys go to the key arena. Only where it runs.
    pub(super) expand: fn(&SecretBytes) -> Result<Box<dyn Kernel>, ArenaError>,
}

/// All kernels of this architecture, the fastest first.
pub(super) const KERNELS: &[Candidate] = &[
    #[cfg(target_arch = "x86_64")]
    Candidate {
        name: "avx512",
        choice: KernelChoice::Avx512,
        runs_here: x86::has_avx512,
        expand: x86::expand_avx512,
    },
    #[cfg(target_arch = "x86_64")]
    Candidate {
        name: "avx2",
        choice: KernelChoice::Avx2,
        runs_here: x86::has_avx2,
        expand: x86::expand_avx2,
    },
    #[cfg(target_arch = "x86_64")]
    Candidate {
        name: "aes-ni",
        choice: KernelChoice::AesNi,
        runs_here: x86::has_aes_ni,
        expand: x86::expand_aes_ni,
    },
    Candidate {
        name: "portable",
        choice: KernelChoice::Portable,
        runs_here: || true,
        expand: portable::expand,
    },
];

/// The kernels that this machine can run, the fastest first.
pub(super) fn running_here() -> impl Iterator<Item = &'static Candidate> {
    KERNELS.iter().filter(|kernel| (kernel.runs_here)())
}

/// Which kernel to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KernelChoice {
    /// The fastest that the machine can run.
    #[default]
    Fastest,
    /// x86-64: AVX-512 and VAES, four blocks in a vector.
    Avx512,
    /// x86-64: AVX2 and VAES, two blocks in a vector.
    Avx2,
    /// x86-64: AES-NI and AVX, one block in a vector.
    AesNi,
    /// The one that runs everywhere, and that others are compared with.
    Portable,
}

impl KernelChoice {
    /// Every choice.
    pub const ALL: [Self; 5] = [
        Self::Fastest,
        Self::Avx512,
        Self::Avx2,
        Self::AesNi,
        Self::Portable,
    ];
}

pub(super) fn choose(choice: KernelChoice) -> Result<&'static Candidate, CipherError> {
    running_here()
        .find(|kernel| choice == KernelChoice::Fastest || kernel.choice == choice)
        .ok_or_else(|| CipherError::Kernel {
            kernel: choice,
            runs_here: names(running_here().map(|kernel| kernel.choice)),
        })
}

fn names(choices: impl Iterator<Item = KernelChoice>) -> String {
    let names: Vec<_> = choices.map(|choice| choice.to_string()).collect();
    names.join(", ")
}

impl fmt::Display for KernelChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fastest => "fastest",
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::AesNi => "aes-ni",
            Self::Portable => "portable",
        })
    }
}

impl FromStr for KernelChoice {
    type Err = UnknownKernel;

    fn from_str(name: &str) -> Result<Self, UnknownKernel> {
        Self::ALL
            .into_iter()
            .find(|choice| choice.to_string() == name)
            .ok_or_else(|| UnknownKernel(name.to_owned()))
    }
}

/// No kernel has this name.
#[derive(Debug, thiserror::Error)]
#[error("no cipher kernel is called {0:?}; known: {known}", known = names(KernelChoice::ALL.into_iter()))]
pub struct UnknownKernel(String);
