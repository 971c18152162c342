//! The rings of a session: which are being served, and which should be.

use std::io;
use std::sync::Arc;

use vhost_user_backend::VringT;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend};

use super::call::Call;
use super::config::Agreed;
use super::dirty_log::DirtyLog;
use super::disk::{Disk, Grant};
use super::frontend_message::Scope;
use super::guest::SharedMemory;
use super::handover::NotHandedOver;
use super::inflight::{InflightMemory, MapError};
use super::left;
use super::sigbus;
use super::task::Piece;
use super::uring;
use super::vring::{Logging, StandsOn, StartError, Vring};
use super::worker_thread::WorkerThread;
use crate::storage::{Engine, RingPool};

/// A ring that is being served, and the generation of the table by which it is.
struct Served {
    worker: WorkerThread,
    generation: u64,
}

/// The rings of io_uring that queues work with, whichever session has them.
#[derive(Clone, Debug)]
pub(super) struct Urings {
    engines: RingPool,
    calls: RingPool,
}

impl Urings {
    /// Those of so many queues.
    ///
    /// # Errors
    /// Where the kernel has no io_uring or forbids it, or descriptors or memory are exhausted.
    pub(super) fn new(queues: u16) -> io::Result<Self> {
        Ok(Self {
            engines: Engine::<Piece>::rings(queues)?,
            calls: Call::rings(queues)?,
        })
    }
}

/// The vrings of a session, and the workers that serve them.
pub(super) struct Rings {
    disk: Arc<Disk>,
    urings: Urings,
    memory: SharedMemory,
    vrings: Vec<Vring>,
    inflight: InflightMemory,
    running: Vec<Option<Served>>,
    /// Engines of rings that are stopped, for the next start.
    engines: Vec<Engine<Piece>>,
    agreed: Agreed,
    /// The front-end's dirty log, also while it logs nothing.
    log: Option<Arc<DirtyLog>>,
    /// Where writes to each used ring are marked in it.
    used_logs: Vec<Option<u64>>,
    /// Whether none is served, whatever the front-end wants.
    is_held: bool,
}

impl Rings {
    /// Serves nothing yet.
    ///
    /// # Errors
    /// If memory is exhausted.
    pub(super) fn new(
        disk: Arc<Disk>,
        urings: Urings,
        memory: SharedMemory,
        vrings: Vec<Vring>,
    ) -> Result<Self, MapError> {
        sigbus::begin();
        disk.show(disk.sectors());
        let running = vrings.iter().map(|_| None).collect();
        let queues = u16::try_from(vrings.len()).unwrap_or(u16::MAX);
        let used_logs = vec![None; vrings.len()];
        Ok(Self {
            disk,
            urings,
            memory,
            inflight: InflightMemory::private(queues)?,
            vrings,
            running,
            engines: Vec::new(),
            agreed: Agreed::default(),
            log: None,
            used_logs,
            is_held: false,
        })
    }

    /// Stops all rings, and starts none until [`Rings::let_go`].
    pub(super) fn hold(&mut self) {
        self.is_held = true;
        self.stop();
    }

    /// Starts the rings that the front-end wants served by now.
    ///
    /// # Errors
    /// Those of [`Rings::start`].
    pub(super) fn let_go(&mut self) -> io::Result<()> {
        self.is_held = false;
        self.start()
    }

    /// Checks that another process finds all that is left in flight, in memory that the front-end keeps, and that nothing of it is under way.
    /// All are stopped.
    pub(super) fn check_finished(&self) -> Result<(), NotHandedOver> {
        let may_have_left = |index| {
            let part = self.inflight.of_queue(index);
            part.is_ok_and(|part| part.may_have_left())
        };
        let is_lost = self.inflight.is_private() && (0..self.count()).any(may_have_left);
        match is_lost {
            _ if self.disk.held.is_landing() => Err(NotHandedOver::InFlight),
            true => Err(NotHandedOver::NoRecord),
            false => Ok(()),
        }
    }

    /// How far each ring was served. All are stopped.
    pub(super) fn bases(&self) -> Vec<u16> {
        self.vrings.iter().map(VringT::queue_next_avail).collect()
    }

    /// Frees the memory of rings that are stopped, which counts against a limit of this user's.
    pub(super) fn drop_engines(&mut self) {
        self.engines.clear();
    }

    /// Makes what the rings need that the front-end wants served, so that nothing is left to fail when they start.
    ///
    /// # Errors
    /// If there are no descriptors or memory left.
    pub(super) fn prepare(&mut self) -> io::Result<()> {
        let wanted = self.vrings.iter().filter(|vring| vring.is_wanted()).count();
        while self.engines.len() < wanted {
            self.engines.push(engine(&self.disk, &self.urings)?);
        }
        Ok(())
    }

    /// Stops the rings of `scope`, and gives the guard by which what they stand on can be changed.
    pub(super) fn pause(&mut self, scope: Scope) -> Paused<'_> {
        self.stop_those(|index, _| scope.contains(index));
        if self.disk.held.is_landing() {
            // What is about to be answered with an error lands later: until then, no other queue may take the driver's next try.
            self.stop();
        }
        Paused { rings: self, scope }
    }

    /// Stops all rings.
    pub(super) fn stop(&mut self) {
        self.stop_those(|_, _| true);
    }

    /// Stops rings: when it returns, no I/O of theirs is under way, and the vrings know how far they were served. Requests that wait for
    /// storage are left in flight.
    fn stop_those(&mut self, chosen: impl Fn(usize, &Served) -> bool) {
        // All are asked to stop before the first is waited for, so that they drain together.
        for (index, running) in self.running.iter().enumerate() {
            if let Some(running) = running.as_ref().filter(|running| chosen(index, running)) {
                running.worker.tell_to_stop();
            }
        }
        for (index, running) in self.running.iter_mut().enumerate() {
            if let Some(running) = running.take_if(|running| chosen(index, running)) {
                let (ring, engine) = running.worker.stop();
                self.vrings[index].stopped(&ring);
                self.engines.extend(engine);
                self.disk.held.forget(index);
            }
        }
    }

    /// Whether any of them is served.
    pub(super) fn any_is_served(&self) -> bool {
        self.running.iter().any(Option::is_some)
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.vrings.len()
    }

    /// What the front-end has agreed on.
    pub(super) fn agreed(&self) -> Agreed {
        self.agreed
    }

    /// The number of memory regions that are mapped.
    pub(super) fn memory_regions(&self) -> usize {
        self.memory.memory().num_regions()
    }

    /// What the ring `index` stands on.
    fn stands_on(&self, index: usize) -> StandsOn<'_> {
        StandsOn {
            memory: &self.memory,
            logging: Logging {
                log: self.log.as_ref(),
                all: self.agreed.log_all(),
                used: self.used_logs[index],
            },
            inflight: &self.inflight,
            calls: &self.urings.calls,
        }
    }

    /// Answers with an error what is left in flight of the rings of `scope`, which are stopped.
    fn answer_left(&mut self, scope: Scope) {
        for (index, vring) in self.vrings.iter().enumerate() {
            if !scope.contains(index) || self.running[index].is_some() {
                continue;
            }
            match vring.with_left(index, &self.stands_on(index)) {
                Ok(Some(mut ring)) => {
                    let requests = left::answer(&mut ring, &self.disk);
                    vring.stopped(&ring);
                    if requests > 0 {
                        tracing::warn!(
                            queue = index,
                            requests,
                            "requests that wait are answered with an error, since the guest stops, migrates or is reset"
                        );
                    }
                }
                Ok(None) => {}
                Err(error) => tracing::warn!(queue = index, %error, "requests that wait cannot be answered"),
            }
        }
    }

    /// Stops all rings for good: the front-end leaves. What waits is left to the next server if the front-end keeps the record of it.
    pub(super) fn leave(&mut self) {
        self.stop();
        if self.inflight.is_private() && !sigbus::is_lost() {
            self.answer_left(Scope::All);
        }
    }

    /// Has every ring that the front-end wants served run by the disk's current table, and none by an earlier one; none at
    /// all while the disk is locked, or not claimed.
    ///
    /// # Errors
    /// If there are no descriptors, threads or memory left to serve one. A ring that the driver set up wrongly is no
    /// error of the session: it rests.
    pub(super) fn start(&mut self) -> io::Result<()> {
        if self.is_held {
            return Ok(());
        }
        let (granted, sectors) = self.disk.granted();
        let current = granted.as_ref().map(Grant::generation);
        self.stop_those(|_, running| Some(running.generation) != current);
        self.disk.show(sectors);
        if self.vrings.iter().any(Vring::is_started) {
            // The guest runs here, or will when the disk is unlocked.
            self.disk.set_claim_needed();
        }
        if self.disk.held.is_landing() {
            // What has not landed could overwrite what a ring writes that is still served.
            self.stop();
            return Ok(());
        }
        let Some(grant) = granted else {
            return Ok(());
        };
        if !self.vrings.iter().any(Vring::is_wanted) {
            return Ok(());
        }
        let Some(claim) = self.disk.claim() else {
            return self.disk.ask_for_claim();
        };
        for (index, vring) in self.vrings.iter().enumerate() {
            if self.running[index].is_some() {
                continue;
            }
            let ring = match vring.start(index, &self.stands_on(index)) {
                Ok(Some(ring)) => ring,
                Ok(None) => continue,
                Err(StartError::Io(error)) => return Err(error),
                Err(error) => {
                    tracing::warn!(queue = index, %error, "the queue is not served");
                    continue;
                }
            };
            let engine = match self.engines.pop() {
                Some(engine) => engine,
                None => engine(&self.disk, &self.urings)?,
            };
            self.disk.set_claim_used();
            let worker = WorkerThread::start(
                ring,
                Arc::clone(&self.disk),
                Arc::clone(&claim),
                grant.table(),
                engine,
                self.agreed.write_through(),
            )?;
            self.running[index] = Some(Served {
                worker,
                generation: grant.generation(),
            });
        }
        Ok(())
    }
}

/// Rings that are stopped, and stay so until [`Paused::resume`]. What their I/O stands on is changed while this is there, and
/// at no other time.
#[must_use = "the rings stay stopped"]
pub(super) struct Paused<'r> {
    rings: &'r mut Rings,
    scope: Scope,
}

impl Paused<'_> {
    /// The disk that the rings serve.
    pub(super) fn disk(&self) -> &Arc<Disk> {
        &self.rings.disk
    }

    /// Takes into account what front-end and driver have agreed on. All rings are paused.
    pub(super) fn agree(&mut self, agreed: Agreed) {
        debug_assert_eq!(self.scope, Scope::All);
        if agreed.has_config_wce() && !self.rings.agreed.has_config_wce() {
            tracing::info!(
                "the guest agreed with an earlier build that it may switch the write cache off: each of its writes is on \
                 stable storage before it is answered, until QEMU is restarted"
            );
        }
        self.rings.agreed = agreed;
        if agreed.write_through() && !self.disk().read_only {
            // This driver assumes that everything written before it is on stable storage as well.
            if let Err(error) = self.disk().sync() {
                tracing::error!(%error, "earlier writes are not on stable storage");
            }
        }
    }

    /// Tracks requests in flight in other memory. All rings are paused.
    pub(super) fn track_in(&mut self, memory: InflightMemory) {
        debug_assert_eq!(self.scope, Scope::All);
        self.rings.inflight = memory;
    }

    /// Answers with an error what waits of the rings that are paused: nothing would answer it after what comes now. The front-end has the
    /// driver stop, and may have it go on elsewhere, or resets it.
    pub(super) fn answer_left(&mut self) {
        self.rings.answer_left(self.scope);
    }

    /// Takes into account that the handler has stopped a vring. With the last of them the guest has stopped, and may go on elsewhere.
    pub(super) fn vring_stopped(&mut self) {
        if !self.rings.vrings.iter().any(Vring::is_started) {
            self.disk().release_claim();
        }
    }

    /// Takes into account that the handler has mapped other memory. All rings are paused.
    pub(super) fn memory_changed(&mut self) {
        debug_assert_eq!(self.scope, Scope::All);
        sigbus::protect(&self.rings.memory.memory());
    }

    /// Takes the front-end's dirty log, in place of an earlier one. All rings are paused.
    pub(super) fn log_to(&mut self, log: DirtyLog) {
        debug_assert_eq!(self.scope, Scope::All);
        sigbus::protect_log(Some(&log));
        self.rings.log = Some(Arc::new(log));
    }

    /// Takes into account where writes to the used ring of the ring `index` are logged, if they are. It is paused.
    pub(super) fn log_used(&mut self, index: u32, at: Option<u64>) {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        debug_assert!(self.scope.contains(index));
        if let Some(used_log) = self.rings.used_logs.get_mut(index) {
            *used_log = at;
        }
    }

    /// Starts the rings that the front-end wants served by now.
    ///
    /// # Errors
    /// Those of [`Rings::start`].
    pub(super) fn resume(self) -> io::Result<()> {
        self.rings.start()
    }
}

impl Drop for Rings {
    fn drop(&mut self) {
        self.stop();
        sigbus::protect_log(None);
    }
}

/// An engine as each queue gets one.
pub(super) fn engine(disk: &Disk, urings: &Urings) -> io::Result<Engine<Piece>> {
    uring::patiently(|| Engine::new(Arc::clone(&disk.file), disk.pool_pages, &urings.engines))
}
