//! The disk that all workers of a served volume share.
//!
//! A disk has its key, or it is locked. While it is locked no ring is served, and the driver's requests wait in the rings.
//! The keys are in the segment table, and each worker shares the table for as long as it has a ring. So a lock is complete when
//! the last worker has given the table back; the disk then holds no part of a key.
//!
//! A disk becomes longer in the same way: rings by the table of the old length are stopped, and started by another one. The driver
//! sees the new length only then, so no ring refuses a request that fits it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{SendError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use super::claims::{ClaimPast, Claims, Due, Kept, LentClaim, NotClaimed, NotLent, Observer, Standing};
use super::held::{Held, HeldObserver, HeldTransfers};
use super::limits::{DEFAULT_POLL_MAX, DEFAULT_POOL_PAGES, DEFAULT_STOP_LIMIT};
use crate::cipher::SectorSize;
use crate::map::SegmentTable;
use crate::mutex::lock;
use crate::storage::{Attached, Claim, DataFile};
use crate::timestamp::Timestamp;

/// How often a lock looks whether the workers are done.
const LOCK_TICK: Duration = Duration::from_millis(1);
/// How often the end of the process looks whether the claim is given back.
const CLAIM_TICK: Duration = Duration::from_millis(10);

/// The segment table by which rings run: which range of sectors lies where, and under which key. Each unlock gives out
/// another one, of the next generation; a ring whose generation is not the current one is stopped before any is started.
#[derive(Clone, Debug)]
pub(super) struct Grant {
    generation: u64,
    table: Arc<SegmentTable>,
}

impl Grant {
    /// Tells it from those before and after it.
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// The table.
    pub(super) fn table(&self) -> Arc<SegmentTable> {
        Arc::clone(&self.table)
    }
}

#[derive(Debug)]
struct Tables {
    /// None while the disk is locked.
    current: Option<Grant>,
    /// How many there were.
    generation: u64,
    /// How many were withdrawn and are not back yet: rings may still run by them.
    withdrawn: u32,
    /// The capacity, which is known without a key.
    sectors: u64,
}

/// Storage has not answered a ring that is stopped. See [`Disk::landing`].
pub(super) struct Landing {
    disk: Arc<Disk>,
    queue: usize,
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.disk.held.end_landing(self.queue);
        if !self.disk.held.is_landing() {
            self.disk.release_due_claim();
        }
        self.disk.tell();
    }
}

impl Tables {
    /// Gives out another one.
    fn grant(&mut self, table: Arc<SegmentTable>) {
        self.generation += 1;
        self.current = Some(Grant {
            generation: self.generation,
            table,
        });
    }
}

/// A disk's table on its way back. See [`Disk::withdraw`].
#[derive(Debug)]
#[must_use = "the table counts as withdrawn until a caller has waited for it"]
pub struct Withdrawal<'disk> {
    disk: &'disk Disk,
    /// None if the disk had none, or another withdrawal has it; then that one is waited for.
    grant: Option<Grant>,
}

impl Withdrawal<'_> {
    /// Waits until no ring has the table any more, and nothing of a key is left with the disk.
    pub fn wait(self) {
        if let Some(Grant { mut table, .. }) = self.grant {
            // The session first reads the notification, and then each ring drains, which storage can delay without limit.
            while let Err(shared) = Arc::try_unwrap(table) {
                table = shared;
                thread::sleep(LOCK_TICK);
            }
            lock(&self.disk.tables).withdrawn -= 1;
            self.disk.returned.notify_all();
        }
        drop(self.disk.returned());
    }
}

/// The claim while another process has its locks as well. When this is dropped, this process goes on.
#[derive(Debug)]
#[must_use = "this process continues"]
pub struct Loan {
    pub claim: LentClaim,
    disk: Arc<Disk>,
}

impl Loan {
    /// Leaves the claim to the process that has borrowed it.
    pub fn leave(self) {
        self.disk.claims.leave();
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        self.disk.claims.lending_ends();
        // It may have become so meanwhile.
        self.disk.release_due_claim();
    }
}

/// A disk as the guest sees it, and the storage under it.
#[derive(Debug)]
pub struct Disk {
    tables: Mutex<Tables>,
    /// Signalled when a table that was withdrawn is back.
    returned: Condvar,
    /// Signalled when the disk was locked or unlocked, for the session to stop or start its rings.
    changed: OwnedFd,
    /// The capacity in sectors that the driver sees: that by which rings run.
    shown: AtomicU64,
    /// The payload's file.
    pub file: Arc<DataFile>,
    claims: Arc<Claims>,
    /// What waits for storage.
    pub(super) held: HeldTransfers,
    /// The unit of every transfer.
    pub sector_size: SectorSize,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether discards are offered: they show to a reader of the storage which sectors are in use.
    pub discard: bool,
    /// What GET_ID answers, padded with zeros.
    pub serial: [u8; 20],
    /// The longest that a worker looks for work itself before it sleeps.
    pub poll_max: Duration,
    /// The pages of each queue's pool.
    pub pool_pages: u32,
    /// How long a ring that is stopped waits for storage.
    pub stop_limit: Duration,
    /// Since when a front-end is connected.
    front_end: Mutex<Option<Timestamp>>,
    /// The features that it has agreed on: its own and the driver's, and those of the protocol.
    agreed: Mutex<(u64, u64)>,
    /// Whether the log says already that a driver takes this disk for another: a driver can cause that at any time.
    pub(super) mismatch_told: AtomicBool,
}

impl Disk {
    /// A locked disk.
    ///
    /// # Errors
    /// If descriptors are exhausted.
    pub fn new(
        sectors: u64,
        file: Arc<DataFile>,
        claims: Claims,
        sector_size: SectorSize,
        read_only: bool,
        discard: bool,
        serial: &str,
    ) -> io::Result<Self> {
        let mut padded = [0; 20];
        for (to, from) in padded.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        Ok(Self {
            tables: Mutex::new(Tables {
                current: None,
                generation: 0,
                withdrawn: 0,
                sectors,
            }),
            returned: Condvar::new(),
            changed: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            shown: AtomicU64::new(sectors),
            file,
            claims: Arc::new(claims),
            held: HeldTransfers::default(),
            sector_size,
            read_only,
            discard,
            serial: padded,
            poll_max: DEFAULT_POLL_MAX,
            pool_pages: DEFAULT_POOL_PAGES,
            stop_limit: DEFAULT_STOP_LIMIT,
            front_end: Mutex::default(),
            agreed: Mutex::default(),
            mismatch_told: AtomicBool::new(false),
        })
    }

    /// Has the disk served by `table`, for as many sectors as the disk has by now. Where one was withdrawn, this waits until no ring runs
    /// by that any more.
    pub fn unlock(&self, table: Arc<SegmentTable>) {
        let mut tables = self.returned();
        let table = match table.sectors() == tables.sectors {
            true => table,
            false => Arc::new(table.resized(tables.sectors)),
        };
        tables.grant(table);
        drop(tables);
        self.tell();
    }

    /// Has the disk grow to this length, and notifies the session: requests in flight are finished, and all others are carried out by
    /// another table. [`Withdrawal::wait`] waits until no ring runs by the one before. The guest knows a disk that is longer already.
    pub fn grow(&self, sectors: u64) -> Withdrawal<'_> {
        let mut tables = lock(&self.tables);
        let sectors = sectors.max(tables.sectors);
        tables.sectors = sectors;
        let grant = tables.current.take();
        if let Some(Grant { table, .. }) = &grant {
            tables.grant(Arc::new(table.resized(sectors)));
            tables.withdrawn += 1;
        }
        drop(tables);
        self.tell();
        Withdrawal { disk: self, grant }
    }

    /// Gives a disk without a table the size that it had: for the next input.
    #[cfg(any(test, fuzzing))]
    pub(super) fn shrink_for_next_input(&self, sectors: u64) {
        lock(&self.tables).sectors = sectors;
        self.show(sectors);
    }

    /// Has all that waits for storage tried again: the rings are stopped, and take it from their records when they start.
    /// [`Withdrawal::wait`] waits until they have stopped.
    pub fn resume(&self) -> Withdrawal<'_> {
        self.grow(0)
    }

    /// What waits for storage.
    pub fn held(&self) -> Option<Held> {
        self.held.now()
    }

    /// Takes note that storage has not answered so many transfers of a ring that is stopped, until this is dropped.
    pub(super) fn landing(self: &Arc<Self>, queue: usize, transfers: usize) -> Landing {
        self.held.begin_landing(queue, transfers);
        let disk = Arc::clone(self);
        Landing { disk, queue }
    }

    /// Has `observer` told when transfers begin to wait for storage, and when none waits any more.
    pub fn observe_held(&self, observer: impl Fn(Option<&Held>) + Send + Sync + 'static) {
        let observer: HeldObserver = Box::new(observer);
        self.held.observe(observer);
    }

    /// Removes the table, with the keys in it, and notifies the session: requests in flight are finished, all others wait in
    /// the rings. [`Withdrawal::wait`] waits for the end.
    pub fn withdraw(&self) -> Withdrawal<'_> {
        let mut tables = lock(&self.tables);
        let grant = tables.current.take();
        tables.withdrawn += u32::from(grant.is_some());
        drop(tables);
        self.tell();
        Withdrawal { disk: self, grant }
    }

    /// Whether it is locked.
    pub fn is_locked(&self) -> bool {
        lock(&self.tables).current.is_none()
    }

    /// What rings run by, none while the disk is locked; and the capacity in sectors.
    pub(super) fn granted(&self) -> (Option<Grant>, u64) {
        let tables = lock(&self.tables);
        (tables.current.clone(), tables.sectors)
    }

    /// Shows the driver this capacity from now on. No ring runs by a table of another one.
    pub(super) fn show(&self, sectors: u64) {
        self.shown.store(sectors, Ordering::Relaxed);
    }

    /// The capacity in sectors that the driver sees.
    pub(super) fn shown(&self) -> u64 {
        self.shown.load(Ordering::Relaxed)
    }

    /// The claim on its storage, without which no ring is served.
    pub(super) fn claim(&self) -> Option<Arc<Claim>> {
        self.claims.current()
    }

    /// How the claim is.
    pub fn claimed(&self) -> Standing {
        self.claims.standing()
    }

    /// Whether this process has, or had, the claim on its storage.
    pub fn was_claimed(&self) -> bool {
        self.claims.was_held()
    }

    /// Has a thread claim the storage, and the rings start then.
    ///
    /// # Errors
    /// If threads are exhausted.
    pub fn ask_for_claim(self: &Arc<Self>) -> io::Result<()> {
        let disk = Arc::clone(self);
        self.claims.ask(&self.file, move || disk.tell())
    }

    /// Keeps the claim on the storage for a change of the volume's header.
    ///
    /// # Errors
    /// Why it is not this process's to change now.
    pub fn keep_claim(&self) -> Result<Kept, NotClaimed> {
        let kept = self.claims.keep(&self.file);
        // Rings may have been looking for the claim meanwhile.
        self.tell();
        kept
    }

    /// Gives the claim back, once what was written is on stable storage. No ring is served. A reader keeps its claim: it is all that keeps
    /// writers out, and no other reader needs it.
    pub(super) fn release_claim(self: &Arc<Self>) {
        // Before this looks whether storage has answered: what ends to land then looks whether the claim is due.
        self.claims.stopped();
        self.release_due_claim();
    }

    /// Gives the claim back if that is due, and storage answers. If it answers later, the claim is given back then.
    pub(super) fn release_due_claim(self: &Arc<Self>) {
        let Some(due) = self.claims.due() else {
            return;
        };
        if self.held.is_landing() {
            // What would be written by then could overwrite what another process has written.
            tracing::error!(
                "the storage does not answer, so the disk stays claimed, and no other process can take it over until the storage answers"
            );
            return;
        }
        if !self.claims.begin_sync(due) {
            return;
        }
        if !self.claims.is_held() {
            self.claims.release(due, self.stop_limit);
        } else if self.read_only {
            self.claims.retain(due);
        } else {
            let disk = Arc::clone(self);
            let late = move |result| {
                disk.synced(due, result);
                // A ring may have asked for the claim meanwhile.
                disk.tell();
            };
            match self.sync_in_time(late) {
                Some(result) => self.synced(due, result),
                None => tell_not_synced(&not_answered()),
            }
        }
    }

    /// Gives back the claim that is `due` if what was written is on stable storage.
    fn synced(&self, due: Due, result: io::Result<()>) {
        // The kernel tells of a failure once, and the sync after that succeeds.
        let result = result.and_then(|()| match self.file.has_unknown_loss() {
            true => Err(io::Error::other(
                "the storage has lost data, and the guest does not know of that yet: continue it, so that it flushes",
            )),
            false => Ok(()),
        });
        match result {
            Ok(()) => self.claims.release(due, self.stop_limit),
            Err(error) => {
                if self.claims.retain(due) {
                    tell_not_synced(&error);
                }
            }
        }
    }

    /// Gives the claim back at the end of the process, if other hosts have to be told. No ring is served.
    pub fn detach(self: &Arc<Self>) {
        if !self.claims.tells_other_hosts() {
            return;
        }
        let start = Instant::now();
        loop {
            if self.claims.has_to_release() {
                self.release_claim();
            }
            // Another thread may have begun to write the header.
            if !self.claims.is_leaving() || start.elapsed() >= self.stop_limit {
                break;
            }
            thread::sleep(CLAIM_TICK);
        }
        if self.claims.has_to_release() || self.claims.is_leaving() {
            tracing::error!(
                "this process ends without having given the disk back, since the storage does not answer or fails: the header may still say that this host has the disk attached, so that \
                 another host needs --take-over to attach it"
            );
        }
    }

    /// Takes note that a ring is served by the claim.
    pub(super) fn set_claim_used(&self) {
        self.claims.set_used();
    }

    /// Takes note that the guest runs: the claim is not to be given back.
    pub(super) fn set_claim_needed(&self) {
        self.claims.runs();
    }

    /// Puts on stable storage what was written, unless storage does not answer: the front-end waits.
    ///
    /// # Errors
    /// Those of storage; or it does not answer.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.sync_in_time(|_| ()).unwrap_or_else(|| Err(not_answered()))
    }

    /// Puts on stable storage what was written, and gives the result. None if storage does not answer in time; then `late` gets it from
    /// another thread.
    fn sync_in_time(&self, late: impl FnOnce(io::Result<()>) + Send + 'static) -> Option<io::Result<()>> {
        let (tell, result) = sync_channel(0);
        let file = Arc::clone(&self.file);
        let thread = thread::Builder::new().name("sync".into());
        let sync = move || {
            if let Err(SendError(result)) = tell.send(file.sync()) {
                late(result);
            }
        };
        match thread.spawn(sync) {
            Ok(_) => result.recv_timeout(self.stop_limit).ok(),
            Err(_) => Some(self.file.sync()),
        }
    }

    /// Gives the claim back if the other side of a migration may need it: the front-end has left without stopping its rings.
    pub(super) fn front_end_left(self: &Arc<Self>) {
        if self
            .claims
            .current()
            .is_none_or(|claim| claim.is_attached_by_others())
        {
            self.release_claim();
        } else {
            self.release_due_claim();
        }
    }

    /// The features that the front-end has agreed on: its own and the driver's, and those of the protocol.
    pub(super) fn agreed(&self) -> (u64, u64) {
        *lock(&self.agreed)
    }

    /// Takes note of the features that a front-end has agreed on: its own and the driver's, and those of the protocol.
    pub(super) fn set_agreed(&self, features: u64, protocol_features: u64) {
        *lock(&self.agreed) = (features, protocol_features);
    }

    /// The claim, for another process that takes the disk over. No ring is served.
    ///
    /// # Errors
    /// If it is just coming or to be given back, was refused, what a guest has written can still land, or descriptors are exhausted.
    pub fn lend_claim(self: &Arc<Self>) -> Result<Loan, NotLent> {
        // The locks are the other process' own, and would not keep it waiting.
        if self.held.is_landing() {
            return Err(NotLent::InFlight);
        }
        let claim = self.claims.lend()?;
        let disk = Arc::clone(self);
        Ok(Loan { claim, disk })
    }

    /// Takes over a claim that another process has left.
    pub fn take_claim(&self, attached: Attached, past: ClaimPast) {
        self.claims.take_over(attached, past);
    }

    /// Has `observer` asked and told when the claim comes or goes.
    pub fn observe_claim(&self, observer: Box<dyn Observer>) {
        self.claims.observe(observer);
    }

    /// The tables, once what was withdrawn is back.
    fn returned(&self) -> MutexGuard<'_, Tables> {
        let tables = lock(&self.tables);
        let tables = self.returned.wait_while(tables, |tables| tables.withdrawn > 0);
        tables.unwrap_or_else(PoisonError::into_inner)
    }

    /// Is readable when the disk was locked or unlocked, or a worker has notified the session, since [`Disk::take_change`].
    pub(super) fn changed(&self) -> &OwnedFd {
        &self.changed
    }

    /// Resets the notification; [`Disk::granted`] says what has changed.
    pub(super) fn take_change(&self) {
        let _ = rustix::io::read(&self.changed, &mut [0; 8]);
    }

    /// Wakes the session, to start the rings that can be served by now.
    pub fn tell(&self) {
        // A counter that is full is readable already.
        let _ = rustix::io::write(&self.changed, &1_u64.to_ne_bytes());
    }

    /// Since when a front-end is connected; none while none is.
    pub fn front_end(&self) -> Option<Timestamp> {
        *lock(&self.front_end)
    }

    /// Records that a front-end has come or left.
    pub(super) fn set_front_end(&self, since: Option<Timestamp>) {
        self.set_agreed(0, 0);
        if since.is_some() {
            self.claims.front_end_came();
        }
        *lock(&self.front_end) = since;
    }

    /// The same disk, whose workers look for work for so long at most before they sleep; zero has them sleep at once.
    pub fn with_poll_max(mut self, poll_max: Duration) -> Self {
        self.poll_max = poll_max;
        self
    }

    /// The same disk, whose rings wait so long at most for storage when they are stopped.
    pub fn with_stop_limit(mut self, stop_limit: Duration) -> Self {
        self.stop_limit = stop_limit;
        self
    }

    /// The same disk, each of whose queues has a pool of so many pages for data on the way between driver and storage.
    pub fn with_pool_pages(mut self, pool_pages: u32) -> Self {
        self.pool_pages = pool_pages;
        self
    }

    /// The capacity in sectors.
    pub fn sectors(&self) -> u64 {
        lock(&self.tables).sectors
    }
}

/// The time limit has passed.
fn not_answered() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "it does not answer")
}

fn tell_not_synced(error: &io::Error) {
    tracing::error!(
        %error,
        "what was written cannot be put on stable storage: the disk stays claimed, so that no other process takes it over without these data"
    );
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc::SyncSender;

    use tracing::span::{Attributes, Id, Record};
    use tracing::{Event, Metadata, Subscriber, subscriber};

    use super::*;
    use crate::storage::{Access, Backing, Others};

    /// Has storage answer as soon as the log says that it does not.
    struct Answer(Mutex<Option<Landing>>);

    impl Subscriber for Answer {
        fn enabled(&self, _: &Metadata<'_>) -> bool {
            true
        }

        fn new_span(&self, _: &Attributes<'_>) -> Id {
            Id::from_u64(1)
        }

        fn record(&self, _: &Id, _: &Record<'_>) {}

        fn record_follows_from(&self, _: &Id, _: &Id) {}

        fn event(&self, _: &Event<'_>) {
            let landing = lock(&self.0).take();
            thread::scope(|scope| drop(scope.spawn(|| drop(landing))));
        }

        fn enter(&self, _: &Id) {}

        fn exit(&self, _: &Id) {}
    }

    fn served(file: &tempfile::NamedTempFile) -> (Backing, Arc<Disk>) {
        let backing = Backing::open(file.path(), Access::ReadWrite).unwrap();
        let attached = backing.attach(Others::Refused).unwrap();
        let data = Arc::new(backing.data_file(512, &attached.fence()).unwrap());
        let claims = Claims::now(attached).unwrap();
        let disk = Disk::new(2048, data, claims, SectorSize::B512, false, false, "serial").unwrap();
        (backing, Arc::new(disk))
    }

    /// The next process had the locks for its own, and did not wait: the write could land over those of its guest.
    #[test]
    fn a_disk_is_not_handed_over_while_a_write_of_a_guest_that_has_left_can_land() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (_backing, disk) = served(&file);
        let landing = disk.landing(0, 1);
        disk.front_end_left();
        assert!(matches!(disk.lend_claim(), Err(NotLent::InFlight)));
        drop(landing);
        drop(disk.lend_claim().unwrap());
    }

    /// The process ended in the middle of the write, and without a word.
    #[test]
    fn the_end_of_the_process_waits_for_a_header_that_is_just_written() {
        struct Slow {
            is_held: AtomicBool,
            begun: Mutex<Option<SyncSender<()>>>,
        }
        impl Observer for Slow {
            fn check(&self, _: bool, _: bool) -> Result<(), String> {
                Ok(())
            }
            fn has_to_release(&self) -> bool {
                self.is_held.load(Ordering::Relaxed)
            }
            fn tells_other_hosts(&self) -> bool {
                true
            }
            fn release(&self, _: bool) {
                self.is_held.store(false, Ordering::Relaxed);
                drop(lock(&self.begun).take());
                thread::sleep(Duration::from_millis(100));
            }
            fn changed(&self) {}
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        let (backing, disk) = served(&file);
        let (begun, begins) = sync_channel(0);
        disk.observe_claim(Box::new(Slow {
            is_held: true.into(),
            begun: Mutex::new(Some(begun)),
        }));
        thread::scope(|scope| {
            scope.spawn(|| disk.release_claim());
            begins.recv().unwrap_err();
            disk.detach();
            assert!(!backing.is_claimed());
        });
    }

    /// The last request landed after it had been looked for, and before it was noted that the claim is to be given back: nothing looked
    /// again, and the destination of a migration was refused.
    #[test]
    fn a_claim_is_given_back_if_storage_answers_while_the_guest_stops() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (backing, disk) = served(&file);
        let answer = Answer(Mutex::new(Some(disk.landing(0, 1))));
        subscriber::with_default(answer, || disk.release_claim());
        assert_eq!(disk.claimed(), Standing::Released);
        assert!(!backing.is_claimed());
    }
}
