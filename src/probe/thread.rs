//! A thread that looks at paths. It has none of the process' descriptors ([`crate::apart`]), so that a path that keeps the thread
//! keeps nothing else.

use std::io;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;

use tracing::subscriber::{NoSubscriber, with_default};

use super::{LIMIT, Looker, Lost, Seat, wait_for};
use crate::apart::let_go_of_descriptors;

type Job = Box<dyn FnOnce() + Send>;

/// A thread that works until this is dropped.
#[derive(Debug)]
pub(crate) struct Thread(Sender<Job>);

impl Looker for Thread {
    fn start(seat: Seat) -> io::Result<Self> {
        let (jobs, given) = mpsc::channel::<Job>();
        let work = move || {
            let _seat = seat;
            let_go_of_descriptors();
            // A log's descriptor is not here either.
            with_default(NoSubscriber::new(), || given.into_iter().for_each(|job| job()));
        };
        thread::Builder::new().name("look".to_owned()).spawn(work)?;
        Ok(Self(jobs))
    }

    fn wait_for(&mut self, mount: &Path) -> Result<(), Lost> {
        let mount = mount.to_owned();
        self.run(move || wait_for(&mount))
    }
}

impl Thread {
    /// What `work` brings.
    pub(crate) fn run<T: Send + 'static>(
        &mut self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Lost> {
        let (reply, answer) = mpsc::sync_channel(1);
        // It may have been abandoned meanwhile.
        let job = move || drop(reply.send(work()));
        self.0.send(Box::new(job)).map_err(|_| Lost::Failed)?;
        answer.recv_timeout(LIMIT).map_err(|error| match error {
            RecvTimeoutError::Timeout => Lost::Waits,
            RecvTimeoutError::Disconnected => Lost::Failed,
        })
    }
}
