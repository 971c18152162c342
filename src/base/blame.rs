//! Who has to act when something fails: each package sorts its errors by it, and exit codes follow from it.

/// Where the cause of a failure lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// This host or sealblk itself: memory, the processor, the kernel, a defect.
    Host,
    /// The operator's arguments, configuration or other settings.
    Operator,
    /// What a disk, a backup, a receipt or a log holds.
    Content,
    /// The key: its provider does not give it, or a secret opens nothing.
    Key,
    /// Another use of the same disk, socket, key or provider, or something that would be lost.
    Use,
    /// Storage, or the files and devices of the host.
    Storage,
    /// Another process of sealblk, which does not answer or refuses.
    Process,
    /// A front-end, as QEMU: it breaks the protocol, or hangs. Ends its session, and no process.
    FrontEnd,
    /// A guest: its driver breaks the protocol. Ends a request or a queue, and no process.
    Guest,
}

impl Blame {
    /// All that a command fails for, in the order of their exit codes.
    const ALL: [Self; 7] = [
        Self::Host,
        Self::Operator,
        Self::Content,
        Self::Key,
        Self::Use,
        Self::Storage,
        Self::Process,
    ];

    /// The exit code, as `sealblk --help` documents it. That of [`Blame::Operator`] is what clap chooses too.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Host => 1,
            Self::Operator => 2,
            Self::Content => 3,
            Self::Key => 4,
            Self::Use => 5,
            Self::Storage => 6,
            // The last two end no process; if they did, it would be by another one.
            Self::Process | Self::FrontEnd | Self::Guest => 7,
        }
    }

    /// Of a process that ended with this exit code. One that is not documented is a defect.
    pub fn of_exit_code(code: u8) -> Self {
        let meant = |blame: &Self| blame.exit_code() == code;
        Self::ALL.into_iter().find(meant).unwrap_or(Self::Host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_lead_back_to_the_blame() {
        for blame in Blame::ALL {
            assert_eq!(Blame::of_exit_code(blame.exit_code()), blame);
        }
        assert_eq!(Blame::of_exit_code(101), Blame::Host);
    }
}
