//! The claim on a volume in its header ([`Locked::hold`]), by which a process keeps those of other hosts out where locks do not reach them.
//!
//! It comes and goes with the claim on the storage ([`Claims`](crate::device::Claims)): it is entered after that was taken, and
//! removed before that is given back. After a crash it stays, and the next process of this host replaces it.

use std::sync::Mutex;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::OpenError;
use crate::keys::binding::BindingReason;
use crate::luks2::{Host, Locked, Reason, Terms, VolumeError};
use crate::mutex::lock;
use crate::storage::{Backing, Kind, ThisHost};

/// When a claim is entered in the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Choice {
    /// On a block device, if the header can be changed
    Auto,
    /// Always
    On,
    /// Never
    Off,
}

/// See the module's header.
#[derive(Debug)]
pub struct HeaderClaim {
    host: Host,
    choice: Choice,
    /// Whether there is one.
    is_wanted: bool,
    take_over: Option<u64>,
    /// Not locked while the storage is waited for.
    past: Mutex<HeaderClaimPast>,
}

/// The claims so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeaderClaimPast {
    /// See [`Terms::process`]. The process that takes over a disk goes by that of the one before.
    process: Uuid,
    /// The sequence of the claim, while it is held.
    held: Option<u64>,
    /// That of the last one by which a guest ran, and which is held no more.
    ran: Option<u64>,
}

impl HeaderClaim {
    /// On the volume with its header in `header`; that of another host with the sequence `take_over` is over.
    pub fn new(header: &Backing, choice: Choice, take_over: Option<u64>) -> Self {
        let is_wanted = match choice {
            Choice::Auto => header.kind() == Kind::BlockDevice,
            Choice::On => true,
            Choice::Off => false,
        };
        let is_wanted = is_wanted && !header.read_only();
        let ThisHost { host, is_lasting } = ThisHost::find();
        if is_wanted && !is_lasting {
            tracing::warn!(
                "this host has no machine ID (/etc/machine-id): if it crashes, it needs --take-over to attach the disk again after its boot"
            );
        }
        if is_wanted && host.boot.is_nil() {
            tracing::warn!(
                "the boot ID (/proc/sys/kernel/random/boot_id) of this host cannot be read: containers with another machine ID (/etc/machine-id) \
                 count as other hosts"
            );
        }
        Self {
            host,
            choice,
            is_wanted,
            take_over,
            past: Mutex::new(HeaderClaimPast {
                process: Uuid::new_v4(),
                held: None,
                ran: None,
            }),
        }
    }

    /// Enters it, for the guest that ran here last if that `goes_on`.
    ///
    /// # Errors
    /// Those of [`Locked::hold`].
    pub fn take(&self, locked: &mut Locked<'_>, goes_on: bool) -> Result<(), Reason> {
        let terms = self.terms(goes_on && self.is_wanted);
        let found = locked.holding();
        found.check(&terms)?;
        match found.holder.filter(|holder| !holder.is(&self.host)) {
            Some(holder) => tracing::warn!(
                host = holder.name,
                since = %holder.since,
                attachment = found.sequence,
                "the volume is taken over from another host, which must not write to it any more"
            ),
            None if self.take_over == Some(found.sequence) => {
                tracing::warn!(
                    "--take-over was not needed, since no other host has the volume attached: leave it out"
                );
            }
            None => {}
        }
        if locked.is_read_only() {
            return Ok(());
        }
        let held = match self.is_wanted {
            true => locked.hold(&terms).map(Some),
            false => locked.forget_holder(&terms).map(|()| None),
        };
        match held {
            Ok(sequence) => {
                lock(&self.past).held = sequence;
                Ok(())
            }
            Err(error) if self.choice != Choice::On && (error.is_not_permitted() || error.has_no_room()) => {
                tracing::warn!(
                    "the header cannot say that this host has the disk attached, so no other host is kept from it: {error}"
                );
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Whether another host has it.
    ///
    /// # Errors
    /// Those of [`Holding::check`](crate::luks2::Holding::check).
    pub fn check(&self, locked: &Locked<'_>) -> Result<(), Reason> {
        locked.holding().check(&self.terms(false))
    }

    /// Checks, before the header is changed, that it still names this attachment, if there is one: no lock keeps another host from taking
    /// it over.
    ///
    /// # Errors
    /// [`Reason::TakenOver`].
    pub fn check_held(&self, locked: &Locked<'_>) -> Result<(), Reason> {
        let held = lock(&self.past).held;
        held.map_or(Ok(()), |sequence| locked.check_held(&self.host, sequence))
    }

    fn terms(&self, goes_on: bool) -> Terms<'_> {
        let HeaderClaimPast { process, ran, .. } = self.past();
        Terms {
            host: &self.host,
            process,
            take_over: self.take_over,
            ran,
            goes_on,
        }
    }

    /// Whether the disk is not to be served because of `error`.
    pub fn has_refused(&self, error: &OpenError) -> bool {
        let is_refusal = |reason: &BindingReason| {
            matches!(
                reason,
                BindingReason::Volume(
                    Reason::HeldElsewhere { .. } | Reason::RanElsewhere { .. } | Reason::AttachedTwice { .. }
                )
            )
        };
        self.is_wanted || matches!(error, OpenError::Volume(error) if is_refusal(&error.reason))
    }

    /// Whether there is one while the disk is claimed.
    pub fn is_wanted(&self) -> bool {
        self.is_wanted
    }

    /// Whether there is one now.
    pub fn is_held(&self) -> bool {
        lock(&self.past).held.is_some()
    }

    /// Removes it from the header that `open` gives; and whether a guest `ran` by it.
    ///
    /// # Errors
    /// Those of `open` and of [`Locked::let_go`].
    pub fn let_go<'header>(
        &self,
        open: impl FnOnce() -> Result<Locked<'header>, VolumeError>,
        ran: bool,
    ) -> Result<(), VolumeError> {
        let sequence = {
            let mut past = lock(&self.past);
            // Also if the header cannot be opened or written: the next claim replaces what is left there.
            let Some(held) = past.held.take() else {
                return Ok(());
            };
            if ran {
                past.ran = Some(held);
            }
            held
        };
        let mut locked = open()?;
        let let_go = locked.let_go(&self.host, sequence, ran);
        let_go.map_err(|reason| reason.at(locked.path()))
    }

    /// The claims so far, for another process of this host that takes the disk over.
    pub fn past(&self) -> HeaderClaimPast {
        *lock(&self.past)
    }

    /// Continues with those of another process.
    pub fn take_over(&self, past: HeaderClaimPast) {
        *lock(&self.past) = past;
    }
}
