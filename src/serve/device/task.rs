//! Requests in hand, and how far each has come.
//!
//! A request is carried out in pieces. What of it was issued, what is in flight and what it is answered with is a [`Task`];
//! a [`Piece`] is what an operation of the storage engine carries, and gives back when it ends.

use std::ops::{Index, IndexMut};

use super::guest::Position;
use super::limits::MAX_REQUESTS;
use super::request::{Kind, Request, Status};
use crate::cipher::Sector;
use crate::map::Extent;

/// A part of a request that is in flight.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub task: TaskIndex,
    /// Where its data lies in the request's buffers.
    pub position: Position,
    /// Where it lies on storage and what is done to it; empty for a flush.
    pub extent: Extent,
}

/// A request in hand, and how far it has come.
#[derive(Debug)]
pub(super) struct Task {
    pub request: Request,
    /// The range to be issued next, and how many of its sectors have been.
    range: usize,
    sectors_issued: u64,
    /// Where the data of the next piece lies.
    position: Position,
    pub all_issued: bool,
    pub in_flight: u32,
    pub status: Status,
    /// The bytes from the start of the device-writable part that were written.
    pub written: u32,
}

impl Task {
    fn new() -> Self {
        Self {
            request: Request::new(),
            range: 0,
            sectors_issued: 0,
            position: Position::default(),
            all_issued: false,
            in_flight: 0,
            status: Status::Ok,
            written: 0,
        }
    }

    /// Sets out to carry out the request that was parsed.
    pub(super) fn begin(&mut self) {
        self.range = 0;
        self.sectors_issued = 0;
        self.position = self.request.data_start();
        self.all_issued = false;
        self.status = Status::Ok;
        self.written = match self.request.kind {
            Kind::Read => self.request.writable_len,
            _ => 0,
        };
    }

    /// The sectors that are to be issued next.
    pub(super) fn next_sectors(&mut self) -> Option<(Sector, u64)> {
        while let Some(range) = self.request.ranges.get(self.range) {
            if self.sectors_issued < range.sectors {
                return Some((
                    Sector(range.sector + self.sectors_issued),
                    range.sectors - self.sectors_issued,
                ));
            }
            self.range += 1;
            self.sectors_issued = 0;
        }
        None
    }

    /// Gives the piece of this task, which is number `task`, that lies in `extent`, and takes into account that it is issued.
    #[inline]
    pub(super) fn next_piece(&mut self, task: TaskIndex, extent: Extent) -> Piece {
        let position = self.position;
        self.sectors_issued += extent.sectors;
        if let Kind::Read | Kind::Write = self.request.kind {
            self.position = position.advanced(self.request.data(), data_len(&extent));
        }
        self.in_flight += 1;
        Piece {
            task,
            position,
            extent,
        }
    }

    /// Issues nothing more of it.
    pub(super) fn fail(&mut self, status: Status) {
        self.range = self.request.ranges.len();
        self.status = status;
        self.written = 0;
    }

    /// What the used ring says was written (virtio 1.2 §2.7.8.2): never more than really was, from the start of the
    /// device-writable part on. The status byte is the last of that part.
    pub(super) fn used_len(&self) -> u32 {
        self.written + u32::from(self.written == self.request.writable_len)
    }
}

/// The length in bytes of an extent with data, which [`super::limits::MAX_PIECE_SECTORS`] keeps far below the bound of the type.
pub(super) fn data_len(extent: &Extent) -> u32 {
    u32::try_from(extent.bytes()).unwrap_or(u32::MAX)
}

/// The number of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TaskIndex(u16);

/// The tasks of a queue: those in hand, and vacant ones, whose lists keep their memory.
#[derive(Debug, Default)]
pub(super) struct Tasks {
    tasks: Vec<Task>,
    vacant: Vec<TaskIndex>,
}

impl Tasks {
    /// Whether there is a vacant one.
    pub(super) fn has_vacant(&self) -> bool {
        !self.vacant.is_empty() || self.tasks.len() < usize::from(MAX_REQUESTS)
    }

    /// Takes a vacant one, if there is any.
    pub(super) fn take(&mut self) -> Option<TaskIndex> {
        if let Some(task) = self.vacant.pop() {
            return Some(task);
        }
        let next = u16::try_from(self.tasks.len())
            .ok()
            .filter(|next| *next < MAX_REQUESTS)?;
        self.tasks.push(Task::new());
        Some(TaskIndex(next))
    }

    /// Gives one back, which is vacant from then on.
    pub(super) fn give_back(&mut self, task: TaskIndex) {
        self.vacant.push(task);
    }
}

impl Index<TaskIndex> for Tasks {
    type Output = Task;

    fn index(&self, task: TaskIndex) -> &Task {
        &self.tasks[usize::from(task.0)]
    }
}

impl IndexMut<TaskIndex> for Tasks {
    fn index_mut(&mut self, task: TaskIndex) -> &mut Task {
        &mut self.tasks[usize::from(task.0)]
    }
}
