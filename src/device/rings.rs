//! The rings of a session: which are being served, and which should be.

use std::io;
use std::sync::Arc;

use vm_memory::{GuestAddressSpace, GuestMemoryBackend};

use super::config::Agreed;
use super::disk::{Disk, Grant};
use super::guest::SharedMemory;
use super::sigbus;
use super::uring;
use super::vring::{StartError, Vring};
use super::worker::{self, Piece};
use crate::storage::Engine;

/// Which rings a change concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    All,
    One(usize),
}

impl Scope {
    fn contains(self, index: usize) -> bool {
        self == Scope::All || self == Scope::One(index)
    }
}

/// A ring that is being served, and the generation of the table by which it is.
struct Running {
    worker: worker::Running,
    generation: u64,
}

/// The vrings of a session, and the workers that serve them.
pub(super) struct Rings {
    disk: Arc<Disk>,
    memory: SharedMemory,
    vrings: Vec<Vring>,
    running: Vec<Option<Running>>,
    /// Engines of rings that are stopped, for the next start.
    engines: Vec<Engine<Piece>>,
    agreed: Agreed,
}

impl Rings {
    pub(super) fn new(disk: Arc<Disk>, memory: SharedMemory, vrings: Vec<Vring>) -> Self {
        sigbus::begin();
        let running = vrings.iter().map(|_| None).collect();
        Self {
            disk,
            memory,
            vrings,
            running,
            engines: Vec::new(),
            agreed: Agreed::default(),
        }
    }

    /// Stops the rings of `scope`: when it returns, nothing of theirs is in flight, and the vrings know how far they
    /// were served.
    pub(super) fn stop(&mut self, scope: Scope) {
        self.stop_those(|index, _| scope.contains(index));
    }

    fn stop_those(&mut self, chosen: impl Fn(usize, &Running) -> bool) {
        // All are told before one is waited for, so that they drain together.
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
            }
        }
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.vrings.len()
    }

    /// What the front-end has agreed on.
    pub(super) fn agreed(&self) -> Agreed {
        self.agreed
    }

    /// Takes into account what the front-end has agreed on. Call it while all rings are stopped.
    pub(super) fn agree(&mut self, agreed: Agreed) {
        if agreed.has_config_wce() && !self.agreed.has_config_wce() {
            tracing::info!(
                "the guest agreed with an earlier build that it may switch the write cache off: each of its writes is on \
                 stable storage before it is answered, until QEMU is started anew"
            );
        }
        self.agreed = agreed;
        if agreed.write_through() && !self.disk.read_only {
            // What others wrote before this driver, it takes to be on stable storage as well.
            if let Err(error) = self.disk.file.sync() {
                tracing::error!(%error, "what was written before cannot be put on stable storage; the next flush will fail");
            }
        }
    }

    /// Takes into account that the handler has mapped other memory. Call it while all rings are stopped.
    pub(super) fn memory_changed(&self) {
        sigbus::protect(&self.memory.memory());
    }

    /// The number of memory regions that are mapped.
    pub(super) fn memory_regions(&self) -> usize {
        self.memory.memory().num_regions()
    }

    /// Has every ring that the front-end wants served run by the disk's current table, and none by an earlier one; none at
    /// all while the disk is locked.
    ///
    /// # Errors
    /// If there are no descriptors, threads or memory left to serve one. A ring that the driver set up wrongly is no
    /// error of the session: it rests.
    pub(super) fn start(&mut self) -> io::Result<()> {
        let granted = self.disk.granted();
        let current = granted.as_ref().map(Grant::generation);
        self.stop_those(|_, running| Some(running.generation) != current);
        let Some(grant) = granted else {
            return Ok(());
        };
        for (index, vring) in self.vrings.iter().enumerate() {
            if self.running[index].is_some() {
                continue;
            }
            let ring = match vring.start(index, &self.memory) {
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
                None => engine(&self.disk)?,
            };
            let worker = worker::Running::start(
                ring,
                Arc::clone(&self.disk),
                grant.table(),
                engine,
                self.agreed.write_through(),
            )?;
            self.running[index] = Some(Running {
                worker,
                generation: grant.generation(),
            });
        }
        Ok(())
    }
}

impl Drop for Rings {
    fn drop(&mut self) {
        self.stop(Scope::All);
    }
}

/// An engine as each queue gets one.
pub(super) fn engine(disk: &Disk) -> io::Result<Engine<Piece>> {
    uring::patiently(|| Engine::new(Arc::clone(&disk.file), disk.pool_pages))
}
