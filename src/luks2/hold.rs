//! Attaches a volume by its header, and detaches it ([`Holder`]).
//!
//! Headers have no atomic update that two hosts can use. Two that attach a volume at one moment may both find it free. So each waits a
//! while after its write and reads the header again; the one that does not find itself gives up. This is no proof: storage that delays a
//! write by more than that while deceives both.

use std::thread;
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::copies::Damage;
use crate::error::Reason;
use crate::holder::{Holder, Holding, Host, TYPE};
use crate::lock::LockMode;
use crate::locked::Locked;
use crate::update::Update;

/// How a process attaches a volume.
#[derive(Debug, Clone, Copy)]
pub struct Terms<'a> {
    /// The process' host.
    pub host: &'a Host,
    /// Tells the process from all others.
    pub process: Uuid,
    /// The sequence of an attachment of another host that is over.
    pub take_over: Option<u64>,
    /// The last of the process' attachments whose guest ran.
    pub ran: Option<u64>,
    /// Whether that guest is to go on now.
    pub goes_on: bool,
}

impl Holding {
    /// Whether a process can attach the volume.
    ///
    /// # Errors
    /// If another host has it attached, or the guest has run elsewhere since.
    pub fn check(&self, terms: &Terms<'_>) -> Result<(), Reason> {
        if let Some(holder) = &self.holder
            && !holder.is(terms.host)
            && terms.take_over != Some(self.sequence)
        {
            return Err(Reason::HeldElsewhere {
                sequence: self.sequence,
                holder: Box::new(holder.clone()),
            });
        }
        let now = self.last_run(terms);
        match terms.ran {
            Some(then) if terms.goes_on && then != now => Err(Reason::RanElsewhere { then, now }),
            _ => Ok(()),
        }
    }

    /// The last attachment whose guest has run, or may have.
    fn last_run(&self, terms: &Terms<'_>) -> u64 {
        match &self.holder {
            // The process could not remove it, or not enter it as a whole.
            Some(holder) if holder.process == Some(terms.process) && terms.ran != Some(self.sequence) => {
                self.ran
            }
            Some(_) => self.sequence,
            None => self.ran,
        }
    }

    /// Whether the attachment `sequence` of `host` is still there.
    fn has(&self, host: &Host, sequence: u64) -> Result<bool, Reason> {
        match &self.holder {
            Some(holder) if holder.is(host) => Ok(self.sequence == sequence),
            // It was removed before, or the header is an older one.
            None if self.sequence <= sequence => Ok(false),
            holder => Err(Reason::TakenOver {
                by: holder.as_ref().map(|holder| holder.name.clone()),
            }),
        }
    }
}

/// How long a process waits at least before it looks whether another host has attached the volume in the same moment.
const PAUSE: Duration = Duration::from_millis(if cfg!(test) { 20 } else { 100 });

impl Update<'_> {
    /// What the header says.
    fn holding(&self) -> Holding {
        Holding::of(self.metadata())
    }

    /// Has the header say this.
    fn set_holding(&mut self, holding: Holding) -> Result<(), Reason> {
        let tokens = self.metadata().tokens.iter();
        let ours: Vec<_> = tokens
            .filter(|(_, token)| token.kind == TYPE)
            .map(|(&id, _)| id)
            .collect();
        for &id in ours.iter().skip(1) {
            self.remove_token(id);
        }
        match ours.first() {
            Some(&id) => self.replace_token(id, holding.into_token()),
            None => drop(self.add_token(holding.into_token())?),
        }
        Ok(())
    }
}

impl Locked<'_> {
    /// What the header says, as of when it was read or written last.
    pub fn holding(&self) -> Holding {
        Holding::of(self.header().metadata())
    }

    /// Enters the host as the one that has the volume attached, and gives the sequence of that. It takes a tenth of a second, to be sure
    /// that no other host does the same at this moment.
    ///
    /// # Errors
    /// If another host has it attached or was quicker, the guest has run elsewhere, the host has no ID, or the header cannot be written.
    /// Then the host is not entered, unless the storage fails.
    pub fn hold(&mut self, terms: &Terms<'_>) -> Result<u64, Reason> {
        // Also where the header cannot be locked to be changed.
        self.holding().check(terms)?;
        if terms.host.id.is_nil() {
            return Err(Reason::UnknownHost);
        }
        let start = Instant::now();
        let mut update = self.update_if(|metadata| Holding::of(metadata).check(terms))?;
        let found = update.holding();
        let ours = Holding {
            sequence: found.sequence.wrapping_add(1),
            ran: found.last_run(terms),
            holder: Some(Holder::now(terms.host, terms.process)),
        };
        update.set_holding(ours.clone())?;
        let entered = update.commit(self).and_then(|()| {
            // Storage that is slow for this host is so for others. Both sides wait: the write of one may come after all of the other's.
            thread::sleep(PAUSE.max(2 * start.elapsed()));
            self.is_held_as(&ours)
        });
        match entered {
            Ok(()) => Ok(ours.sequence),
            Err(error) => {
                // A write that failed may have come through nevertheless, and others may have read the number.
                let nobody = Holding {
                    holder: None,
                    ..ours.clone()
                };
                let _ = self.set_holding(&ours, nobody);
                Err(error)
            }
        }
    }

    /// Reads the header again, to see whether it is as this process has written it.
    fn is_held_as(&mut self, ours: &Holding) -> Result<(), Reason> {
        match self.read_back() {
            Ok(()) => {}
            // The writes of two hosts have crossed, each to both copies. The primary is in force, so both hosts agree whose it is.
            Err(Reason::DamagedCopy {
                damage: Damage::OtherHost,
                ..
            }) => {
                let lock = self.io.lock(LockMode::Write).map_err(Reason::Lock)?;
                if !self.header.is_primary(self.io) {
                    return Err(Reason::AttachedTwice { by: String::new() });
                }
                self.state = self.header.commit(self.io)?;
                drop(lock);
                thread::sleep(PAUSE);
                self.read_back()?;
            }
            Err(error) => return Err(error),
        }
        let found = self.holding();
        match found == *ours {
            true => Ok(()),
            false => Err(Reason::AttachedTwice {
                by: found.holder.map(|holder| holder.name).unwrap_or_default(),
            }),
        }
    }

    /// Checks that the header, as of when it was read or written last, names the attachment `sequence` of `host`.
    ///
    /// # Errors
    /// [`Reason::TakenOver`].
    pub fn check_held(&self, host: &Host, sequence: u64) -> Result<(), Reason> {
        match self.holding().has(host, sequence)? {
            true => Ok(()),
            false => Err(Reason::TakenOver { by: None }),
        }
    }

    /// Has the header say that no host has the volume attached, if it says `sequence` and this host; and whether its guest `ran`.
    ///
    /// # Errors
    /// If another host has attached it since, or the header cannot be written.
    pub fn let_go(&mut self, host: &Host, sequence: u64, ran: bool) -> Result<(), Reason> {
        let mut update = self.update_if(|metadata| Holding::of(metadata).has(host, sequence).map(drop))?;
        let found = update.holding();
        if !found.has(host, sequence)? {
            return Ok(());
        }
        update.set_holding(Holding {
            sequence,
            ran: if ran { sequence } else { found.ran },
            holder: None,
        })?;
        update.commit(self)
    }

    /// Has the header say that no host has the volume attached, if it names one that [`Holding::check`] accepts.
    ///
    /// # Errors
    /// As for [`Locked::hold`].
    pub fn forget_holder(&mut self, terms: &Terms<'_>) -> Result<(), Reason> {
        let found = self.holding();
        found.check(terms)?;
        match found.holder {
            Some(_) => self.set_holding(
                &found.clone(),
                Holding {
                    sequence: found.sequence,
                    ran: found.last_run(terms),
                    holder: None,
                },
            ),
            None => Ok(()),
        }
    }

    /// Has the header say `next` if it says `expected`.
    fn set_holding(&mut self, expected: &Holding, next: Holding) -> Result<(), Reason> {
        let mut update = self.update_if(|metadata| match Holding::of(metadata) == *expected {
            true => Ok(()),
            false => Err(Reason::ChangedMeanwhile),
        })?;
        update.set_holding(next)?;
        update.commit(self)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::ops::Range;
    use std::path::Path;
    use std::{fmt, io};

    use serde_json::json;

    use super::*;
    use crate::copies::HeaderState;
    use crate::header_io::HeaderIo;
    use crate::lock::MetadataLock;
    use crate::metadata::Id;
    use crate::testing::{Memory, sample, sample_with};

    fn host(number: u128) -> Host {
        Host {
            id: Uuid::from_u128(number),
            name: format!("node-{number}"),
            boot: Uuid::from_u128(100 + number),
        }
    }

    fn terms(host: &Host) -> Terms<'_> {
        Terms {
            host,
            process: Uuid::new_v4(),
            take_over: None,
            ran: None,
            goes_on: false,
        }
    }

    fn nobody(sequence: u64, ran: u64) -> Holding {
        Holding {
            sequence,
            ran,
            holder: None,
        }
    }

    fn held(io: &Memory) -> Holding {
        Locked::open(io, None).unwrap().holding()
    }

    /// A medium on which something happens when it is synced, or read back.
    struct Medium<'a> {
        io: &'a Memory,
        /// What is read until the first write.
        seen: RefCell<Option<Vec<u8>>>,
        on_sync: Box<dyn Fn() -> io::Result<()> + 'a>,
        on_look: Box<dyn Fn() + 'a>,
    }

    impl fmt::Debug for Medium<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            self.io.fmt(f)
        }
    }

    impl HeaderIo for Medium<'_> {
        fn path(&self) -> &Path {
            self.io.path()
        }

        fn size(&self) -> io::Result<u64> {
            self.io.size()
        }

        fn can_grow(&self) -> bool {
            self.io.can_grow()
        }

        fn set_size(&self, size: u64) -> io::Result<()> {
            self.io.set_size(size)
        }

        fn read_only(&self) -> bool {
            self.io.read_only()
        }

        fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
            self.io.read_at(buffer, offset)?;
            if let Some(there) = self
                .seen
                .borrow()
                .as_ref()
                .and_then(|seen| seen.get(offset as usize..))
            {
                let len = there.len().min(buffer.len());
                buffer[..len].copy_from_slice(&there[..len]);
            }
            Ok(())
        }

        fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
            *self.seen.borrow_mut() = None;
            self.io.write_at(bytes, offset)
        }

        fn sync(&self) -> io::Result<()> {
            (self.on_sync)()
        }

        fn forget_cached(&self, _: Range<u64>) -> io::Result<()> {
            (self.on_look)();
            Ok(())
        }

        fn lock(&self, mode: LockMode) -> io::Result<MetadataLock<'_>> {
            self.io.lock(mode)
        }
    }

    #[test]
    fn another_host_is_refused_until_the_first_lets_go_and_its_own_processes_are_not() {
        let io = Memory::of(&sample());
        let [a, b] = [1, 2].map(host);
        let mut locked = Locked::open(&io, None).unwrap();
        assert_eq!(locked.hold(&terms(&a)).unwrap(), 1);
        let mut other = Locked::open(&io, None).unwrap();
        let refused = other.hold(&terms(&b)).unwrap_err();
        assert!(refused.to_string().contains("\"node-1\""), "{refused}");
        assert!(refused.to_string().contains("--take-over 1"), "{refused}");
        assert_eq!(held(&io).holder.unwrap().host, a.id);

        // After a crash, after a boot, and in another container.
        let booted = Host {
            boot: Uuid::from_u128(200),
            ..a.clone()
        };
        assert_eq!(other.hold(&terms(&booted)).unwrap(), 2);
        let container = Host {
            id: Uuid::max(),
            ..booted.clone()
        };
        assert_eq!(other.hold(&terms(&container)).unwrap(), 3);

        // A process that was succeeded takes nothing away.
        locked.let_go(&booted, 2, true).unwrap();
        assert!(held(&io).holder.is_some());
        other.let_go(&container, 3, true).unwrap();
        assert_eq!(held(&io), nobody(3, 3));
        assert_eq!(other.hold(&terms(&b)).unwrap(), 4);
    }

    #[test]
    fn a_take_over_is_of_one_attachment() {
        let io = Memory::of(&sample());
        let [a, b, c] = [1, 2, 3].map(host);
        let mut locked = Locked::open(&io, None).unwrap();
        locked.hold(&terms(&a)).unwrap();
        let take_over = |host, number| Terms {
            take_over: Some(number),
            ..terms(host)
        };
        locked.hold(&take_over(&b, 2)).unwrap_err();
        assert_eq!(locked.hold(&take_over(&b, 1)).unwrap(), 2);
        locked.hold(&take_over(&c, 1)).unwrap_err();
        locked.forget_holder(&take_over(&a, 1)).unwrap_err();
        locked.forget_holder(&take_over(&a, 2)).unwrap();
        assert_eq!(held(&io), nobody(2, 2));
    }

    /// The number of an attachment without a guest was given out again, so that it could be taken over by what was said of the first.
    #[test]
    fn a_number_is_given_out_once() {
        let io = Memory::of(&sample());
        let [a, b] = [1, 2].map(host);
        let mut locked = Locked::open(&io, None).unwrap();
        assert_eq!(locked.hold(&terms(&a)).unwrap(), 1);
        locked.let_go(&a, 1, false).unwrap();
        assert_eq!(held(&io), nobody(1, 0));
        assert_eq!(locked.hold(&terms(&a)).unwrap(), 2);
        let left_in_a_unit = Terms {
            take_over: Some(1),
            ..terms(&b)
        };
        let refused = locked.hold(&left_in_a_unit).unwrap_err();
        assert!(refused.to_string().contains("--take-over 2"), "{refused}");
        // Also if the claim fails.
        locked.let_go(&a, 2, true).unwrap();
        let fails = Cell::new(true);
        let medium = Medium {
            io: &io,
            seen: RefCell::default(),
            on_sync: Box::new(|| match fails.take() {
                true => Err(io::ErrorKind::Other.into()),
                false => Ok(()),
            }),
            on_look: Box::new(|| {}),
        };
        let mut locked = Locked::open(&medium, None).unwrap();
        locked.hold(&terms(&a)).unwrap_err();
        assert_eq!(held(&io), nobody(3, 2));
    }

    /// It heard nothing of it, or that the other host had to be taken over.
    #[test]
    fn a_host_that_was_taken_over_hears_of_that_at_its_end() {
        let io = Memory::of(&sample());
        let [a, b] = [1, 2].map(host);
        let mut locked = Locked::open(&io, None).unwrap();
        locked.hold(&terms(&a)).unwrap();
        let take_over = Terms {
            take_over: Some(1),
            ..terms(&b)
        };
        locked.hold(&take_over).unwrap();
        let refused = locked.let_go(&a, 1, true).unwrap_err();
        assert!(
            matches!(&refused, Reason::TakenOver { by: Some(by) } if by == "node-2"),
            "{refused}"
        );
        assert!(!refused.to_string().contains("--take-over"), "{refused}");
        locked.let_go(&b, 2, true).unwrap();
        let refused = locked.let_go(&a, 1, true).unwrap_err();
        assert!(matches!(refused, Reason::TakenOver { by: None }), "{refused}");
        assert_eq!(held(&io), nobody(2, 2));
        // Its own removal had come through; an older header was restored.
        locked.let_go(&b, 2, true).unwrap();
        locked.let_go(&b, 3, true).unwrap();
    }

    #[test]
    fn a_host_without_an_id_is_no_other_host() {
        let io = Memory::of(&sample());
        let [mut a, mut b] = [1, 2].map(host);
        (a.boot, b.boot) = (Uuid::nil(), Uuid::nil());
        let mut locked = Locked::open(&io, None).unwrap();
        locked.hold(&terms(&a)).unwrap();
        let refused = locked.hold(&terms(&b)).unwrap_err();
        assert!(matches!(refused, Reason::HeldElsewhere { .. }), "{refused}");
        // What an earlier release has entered of a host without any.
        b.id = Uuid::nil();
        let theirs = json!({
            "type": TYPE, "keyslots": [], "sequence": "1", "host": b.id.to_string(), "name": "", "boot": b.boot.to_string(),
            "since": "2026-11-30T18:12:00Z",
        });
        let io = Memory::of(&sample_with("/tokens/1", theirs));
        let mut locked = Locked::open(&io, None).unwrap();
        let refused = locked.hold(&terms(&b)).unwrap_err();
        assert!(matches!(refused, Reason::HeldElsewhere { .. }), "{refused}");
        let io = Memory::of(&sample());
        let mut locked = Locked::open(&io, None).unwrap();
        let refused = locked.hold(&terms(&b)).unwrap_err();
        assert!(matches!(refused, Reason::UnknownHost), "{refused}");
        assert_eq!(held(&io), Holding::default());
    }

    #[test]
    fn a_guest_does_not_go_on_where_it_ran_before_it_ran_elsewhere() {
        let io = Memory::of(&sample());
        let [a, b] = [1, 2].map(host);
        let mut locked = Locked::open(&io, None).unwrap();
        let sequence = locked.hold(&terms(&a)).unwrap();
        locked.let_go(&a, sequence, true).unwrap();
        let goes_on = Terms {
            ran: Some(sequence),
            goes_on: true,
            ..terms(&a)
        };
        // It never ran there.
        let elsewhere = locked.hold(&terms(&b)).unwrap();
        locked.let_go(&b, elsewhere, false).unwrap();
        assert_eq!(held(&io), nobody(2, 1));
        let sequence = locked.hold(&goes_on).unwrap();
        locked.let_go(&a, sequence, true).unwrap();
        let elsewhere = locked.hold(&terms(&b)).unwrap();
        locked.let_go(&b, elsewhere, true).unwrap();
        let goes_on = Terms {
            ran: Some(sequence),
            ..goes_on
        };
        let refused = locked.hold(&goes_on).unwrap_err();
        assert!(
            matches!(refused, Reason::RanElsewhere { then: 3, now: 4 }),
            "{refused}"
        );
        // Another guest begins with what is there.
        locked.hold(&terms(&a)).unwrap();
    }

    /// What had come through of a claim that failed was taken for a guest that has run elsewhere.
    #[test]
    fn a_process_knows_that_no_guest_ran_by_a_claim_that_it_could_not_remove() {
        let io = Memory::of(&sample());
        let [a, b] = [1, 2].map(host);
        let mut locked = Locked::open(&io, None).unwrap();
        let first = locked.hold(&terms(&a)).unwrap();
        locked.let_go(&a, first, true).unwrap();
        let goes_on = Terms {
            ran: Some(first),
            goes_on: true,
            ..terms(&a)
        };
        for left in 2..4 {
            assert_eq!(locked.hold(&goes_on).unwrap(), left);
        }
        assert_eq!((held(&io).sequence, held(&io).ran), (3, 1));
        // A guest ran by it, and it could not be removed.
        let ran = Terms {
            ran: Some(3),
            ..goes_on
        };
        locked.hold(&ran).unwrap();
        assert_eq!((held(&io).sequence, held(&io).ran), (4, 3));
        // Another process does not know, of this host or another.
        let other = Terms {
            process: Uuid::new_v4(),
            ..ran
        };
        let refused = locked.hold(&other).unwrap_err();
        assert!(
            matches!(refused, Reason::RanElsewhere { then: 3, now: 4 }),
            "{refused}"
        );
        let take_over = Terms {
            take_over: Some(4),
            ..terms(&b)
        };
        locked.hold(&take_over).unwrap();
        assert_eq!((held(&io).sequence, held(&io).ran), (5, 4));
    }

    #[test]
    fn an_earlier_release_has_given_back_the_number_of_an_attachment_without_a_guest() {
        let a = host(1);
        let theirs = json!({ "type": TYPE, "keyslots": [], "sequence": "7" });
        let io = Memory::of(&sample_with("/tokens/1", theirs));
        assert_eq!(held(&io), nobody(7, 7));
        let goes_on = |ran| Terms {
            ran: Some(ran),
            goes_on: true,
            ..terms(&a)
        };
        let mut locked = Locked::open(&io, None).unwrap();
        locked.hold(&goes_on(6)).unwrap_err();
        locked.hold(&goes_on(7)).unwrap();
        let holder = json!({
            "type": TYPE, "keyslots": [], "sequence": "8", "host": a.id.to_string(), "name": "node-1", "boot": a.boot.to_string(),
            "since": "2026-11-30T18:12:00Z",
        });
        let io = Memory::of(&sample_with("/tokens/1", holder));
        let mut locked = Locked::open(&io, None).unwrap();
        locked.hold(&goes_on(7)).unwrap_err();
        locked.let_go(&a, 8, true).unwrap();
        assert_eq!(held(&io), nobody(8, 8));
    }

    /// The other host may be in the middle of a write, and no lock tells.
    #[test]
    fn nothing_is_repaired_while_another_host_has_the_volume() {
        let io = Memory::of(&sample());
        let [a, b] = [1, 2].map(host);
        Locked::open(&io, None).unwrap().hold(&terms(&a)).unwrap();
        io.spoil(crate::testing::COPY + 5000);
        let before = io.front.borrow().clone();
        let mut there = Locked::open_on(&b, &io, None).unwrap();
        assert!(matches!(there.header_state(), HeaderState::NeedsRepair { .. }));
        there.hold(&terms(&b)).unwrap_err();
        there.let_go(&b, 1, true).unwrap_err();
        assert!(*io.front.borrow() == before);
        let take_over = Terms {
            take_over: Some(1),
            ..terms(&b)
        };
        there.hold(&take_over).unwrap();
        assert_eq!(
            *Locked::open_on(&a, &io, None).unwrap().header_state(),
            HeaderState::Sound
        );

        io.spoil(crate::testing::COPY + 5000);
        let locked = Locked::open_on(&b, &io, None).unwrap();
        assert!(matches!(locked.header_state(), HeaderState::Repaired { .. }));
    }

    /// Each host finds the volume free, and the writes of the second land a while after those of the first.
    #[test]
    fn of_two_hosts_that_start_at_one_moment_never_two_attach() {
        let io = Memory::of(&sample());
        let [a, b] = [1, 2].map(host);
        let (theirs, landed) = (RefCell::new(None), Cell::new(None));
        let second = Medium {
            io: &io,
            seen: RefCell::new(Some(io.front.borrow().clone())),
            on_sync: Box::new(|| Ok(())),
            on_look: Box::new(|| {}),
        };
        let attach_second = || {
            if theirs.borrow().is_none() {
                let mut locked = Locked::open(&second, None).unwrap();
                let held = locked.hold(&terms(&b));
                *theirs.borrow_mut() = Some(held);
            }
        };
        let first = Medium {
            io: &io,
            seen: RefCell::default(),
            on_sync: Box::new(|| {
                landed.set(Some(Instant::now()));
                Ok(())
            }),
            on_look: Box::new(|| {
                let waited = landed.get().map(|landed: Instant| landed.elapsed());
                if waited.is_some_and(|waited| waited >= PAUSE / 2) {
                    attach_second();
                }
            }),
        };
        let ours = Locked::open(&first, None).unwrap().hold(&terms(&a));
        attach_second();
        let theirs = theirs.take().unwrap();
        assert!(ours.is_err() || theirs.is_err(), "both have it");
        let refused = ours.unwrap_err();
        assert!(
            matches!(&refused, Reason::AttachedTwice { by } if by == "node-2"),
            "{refused}"
        );
        assert_eq!(held(&io).holder.unwrap().host, b.id);
    }

    /// Both had found it free, and the second write was the last.
    #[test]
    fn of_two_hosts_that_attach_at_one_moment_one_gives_up() {
        let io = Memory::of(&sample());
        let [a, b] = [1, 2].map(host);
        let mut first = Locked::open(&io, None).unwrap();
        let mut second = Locked::open(&io, None).unwrap();
        let enter = |locked: &mut Locked<'_>, update: Update<'_>, host: &Host| {
            let mut update = update;
            let ours = Holding {
                sequence: 1,
                ran: 0,
                holder: Some(Holder::now(host, Uuid::new_v4())),
            };
            update.set_holding(ours.clone()).unwrap();
            update.commit(locked).unwrap();
            ours
        };
        let (one, two) = (first.update().unwrap(), second.update().unwrap());
        let ours = enter(&mut first, one, &a);
        let theirs = enter(&mut second, two, &b);
        let refused = first.is_held_as(&ours).unwrap_err();
        assert!(
            matches!(&refused, Reason::AttachedTwice { by } if by == "node-2"),
            "{refused}"
        );
        second.is_held_as(&theirs).unwrap();

        // The writes crossed: the secondary is that of the first.
        let (whole, half) = (io.front.borrow().clone(), crate::testing::COPY as usize);
        let io = Memory::of(&sample());
        let mut first = Locked::open(&io, None).unwrap();
        let one = first.update().unwrap();
        let ours = enter(&mut first, one, &a);
        io.front.borrow_mut()[..half].copy_from_slice(&whole[..half]);
        let refused = first.is_held_as(&ours).unwrap_err();
        assert!(matches!(refused, Reason::AttachedTwice { .. }), "{refused}");
        let mut second = Locked { io: &io, ..second };
        second.is_held_as(&theirs).unwrap();
        assert_eq!(held(&io), theirs);
    }

    /// The copies differed for ever then, and no tool of ours opened the volume any more.
    #[test]
    fn of_two_hosts_that_attach_at_one_moment_the_quicker_may_die() {
        let io = Memory::of(&sample());
        let [a, b] = [1, 2].map(host);
        let quicker = RefCell::new(Locked::open(&io, None).unwrap());
        let update = RefCell::new(Some(quicker.borrow().update().unwrap()));
        let medium = Medium {
            io: &io,
            seen: RefCell::default(),
            // After the write of the first copy.
            on_sync: Box::new(|| {
                if let Some(mut update) = update.borrow_mut().take() {
                    let theirs = Holding {
                        sequence: 1,
                        ran: 0,
                        holder: Some(Holder::now(&b, Uuid::new_v4())),
                    };
                    update.set_holding(theirs).unwrap();
                    update.commit(&mut quicker.borrow_mut()).unwrap();
                }
                Ok(())
            }),
            on_look: Box::new(|| {}),
        };
        let refused = Locked::open(&medium, None).unwrap().hold(&terms(&a)).unwrap_err();
        assert!(matches!(refused, Reason::AttachedTwice { .. }), "{refused}");

        let refused = Locked::open_on(&a, &io, None)
            .unwrap()
            .hold(&terms(&a))
            .unwrap_err();
        assert!(refused.to_string().contains("--take-over 1"), "{refused}");
        let mut locked = Locked::open_on(&b, &io, None).unwrap();
        assert_eq!(locked.hold(&terms(&b)).unwrap(), 2);
        assert_eq!(
            *Locked::open_on(&a, &io, None).unwrap().header_state(),
            HeaderState::Sound
        );
    }

    /// It took itself for another host.
    #[test]
    fn a_host_with_a_strange_name_knows_itself() {
        let io = Memory::of(&sample());
        let mut named = host(1);
        named.name = "node\u{7f}1".repeat(40);
        let mut locked = Locked::open(&io, None).unwrap();
        assert_eq!(locked.hold(&terms(&named)).unwrap(), 1);
        locked.let_go(&named, 1, true).unwrap();
        assert_eq!(held(&io), nobody(1, 1));
    }

    #[test]
    fn a_header_without_room_says_so_and_stays_as_it_is() {
        let mut json = sample();
        let filler = "x".repeat(12288 - json.to_string().len() - 100);
        json["tokens"]["1"] = json!({ "type": "filler", "keyslots": [], "text": filler });
        let io = Memory::of(&json);
        let before = io.front.borrow().clone();
        let mut locked = Locked::open(&io, None).unwrap();
        let refused = locked.hold(&terms(&host(1))).unwrap_err();
        assert!(refused.has_no_room(), "{refused}");
        assert!(*io.front.borrow() == before);

        let mut json = sample();
        for id in 1..32 {
            json["tokens"][id.to_string()] = json!({ "type": "filler", "keyslots": [] });
        }
        let io = Memory::of(&json);
        let mut locked = Locked::open(&io, None).unwrap();
        let refused = locked.hold(&terms(&host(1))).unwrap_err();
        assert!(refused.has_no_room(), "{refused}");
    }

    /// A header comes from storage, and says what its last writer wanted.
    #[test]
    fn a_token_that_cannot_be_read_says_nothing_and_is_replaced() {
        for token in [
            json!({ "type": TYPE, "keyslots": [] }),
            json!({ "type": TYPE, "keyslots": [], "sequence": 7, "host": "x" }),
            json!({ "type": TYPE, "keyslots": ["0"], "sequence": "-1" }),
            json!({ "type": TYPE, "keyslots": [], "sequence": "7", "ran": 7 }),
        ] {
            let io = Memory::of(&sample_with("/tokens/1", token));
            assert_eq!(held(&io), Holding::default());
            let mut locked = Locked::open(&io, None).unwrap();
            assert_eq!(locked.hold(&terms(&host(1))).unwrap(), 1);
            assert_eq!(locked.header().metadata().tokens[&Id(1)].keyslots, []);
        }
        let last = json!({ "type": TYPE, "keyslots": [], "sequence": u64::MAX.to_string() });
        let io = Memory::of(&sample_with("/tokens/1", last));
        let mut locked = Locked::open(&io, None).unwrap();
        assert_eq!(locked.hold(&terms(&host(1))).unwrap(), 0);
    }

    #[test]
    fn a_name_cannot_steer_a_terminal() {
        let mut named = host(1);
        named.name = "\u{1b}[2J".repeat(40);
        let token = Holding {
            sequence: 1,
            ran: 0,
            holder: Some(Holder::now(&named, Uuid::new_v4())),
        }
        .into_token();
        let name = token.other["name"].as_str().unwrap();
        assert!(!name.contains('\u{1b}') && name.len() < 700, "{name}");
    }
}
