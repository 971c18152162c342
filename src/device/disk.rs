//! The disk that all workers of a served volume share.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::{polling, worker};
use crate::cipher::SectorSize;
use crate::storage::DataFile;
use crate::volume::segment::SegmentTable;

/// A disk as the guest sees it, and what lies under it.
#[derive(Debug)]
pub struct Disk {
    /// Which range of sectors lies where, and under which key.
    pub table: Arc<SegmentTable>,
    /// The payload's file.
    pub file: Arc<DataFile>,
    /// The unit of every transfer.
    pub sector_size: SectorSize,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether discards are offered: they tell who sees the storage which sectors are in use.
    pub discard: bool,
    /// What GET_ID answers, padded with zeros.
    pub serial: [u8; 20],
    /// The longest that a worker looks for work itself before it sleeps.
    pub poll_max: Duration,
    /// The pages of each queue's pool.
    pub pool_pages: u32,
    write_cache: AtomicBool,
    /// What the last driver that could choose has chosen.
    chosen: AtomicBool,
}

impl Disk {
    /// A disk whose write cache is on, as the driver of a disk with a flush command expects at first.
    pub fn new(
        table: Arc<SegmentTable>,
        file: Arc<DataFile>,
        sector_size: SectorSize,
        read_only: bool,
        discard: bool,
        serial: &str,
    ) -> Self {
        let mut padded = [0; 20];
        for (to, from) in padded.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        Self {
            table,
            file,
            sector_size,
            read_only,
            discard,
            serial: padded,
            poll_max: polling::DEFAULT_MAX,
            pool_pages: worker::DEFAULT_POOL_PAGES,
            write_cache: AtomicBool::new(true),
            chosen: AtomicBool::new(true),
        }
    }

    /// The same disk, whose workers look for work for so long at most before they sleep; zero has them sleep at once.
    pub fn with_poll_max(mut self, poll_max: Duration) -> Self {
        self.poll_max = poll_max;
        self
    }

    /// The same disk, each of whose queues has a pool of so many pages for data on the way between driver and storage.
    pub fn with_pool_pages(mut self, pool_pages: u32) -> Self {
        self.pool_pages = pool_pages;
        self
    }

    /// The capacity in sectors.
    pub fn sectors(&self) -> u64 {
        self.table.sectors()
    }

    /// Whether a write may be answered before it is on stable storage (virtio 1.2 §5.2.6.2, `writeback`).
    pub fn write_cache(&self) -> bool {
        self.write_cache.load(Ordering::Acquire)
    }

    /// What `writeback` reads as. A front-end may ask before there is a driver, and keep the answer for the one to come:
    /// so it tells of that driver's choice alone, and not of a mode that firmware happens to need.
    pub fn writeback_field(&self) -> bool {
        self.chosen.load(Ordering::Acquire)
    }

    /// Takes into account which driver is at work: one that can choose the mode, one that can only flush, or, as
    /// firmware and boot loaders are, one that can do neither and must find after a crash what it wrote.
    ///
    /// A choice of writethrough stands until it is taken back, whatever driver comes: QEMU keeps the field's value over
    /// reconnects and resets of the guest, does not repeat it to us, and a driver that reads 0 sends no flushes.
    /// It does not outlive this process: after a restart, writeback it is, and a guest that chose otherwise has to again.
    ///
    /// # Errors
    /// As for [`Disk::choose_write_cache`].
    pub fn driver_is(&self, can_choose: bool, can_flush: bool) -> io::Result<()> {
        self.set_write_cache(self.chosen.load(Ordering::Acquire) && (can_choose || can_flush))
    }

    /// Takes the driver's choice between writeback and writethrough. No write may be in flight.
    ///
    /// # Errors
    /// If what was written in writeback mode cannot be put on stable storage: the driver will not flush it any more.
    pub fn choose_write_cache(&self, on: bool) -> io::Result<()> {
        self.chosen.store(on, Ordering::Release);
        self.set_write_cache(on)
    }

    fn set_write_cache(&self, on: bool) -> io::Result<()> {
        let was_on = self.write_cache.swap(on, Ordering::AcqRel);
        if was_on && !on && !self.read_only {
            self.file.sync()?;
        }
        Ok(())
    }
}
