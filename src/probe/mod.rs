//! Reads of paths that may never answer: a file system whose server does not answer, a device that has lost its paths. Sometimes
//! even a kill does not end such a read, so each read has a thread that can be abandoned.
//!
//! Each [`Pool`] has at most [`MOST`] such threads: paths that callers name cannot use up the threads for the files that this
//! host's settings name. One thread at a time reads a path. While that thread waits, no other thread reads the path, nor
//! other paths of a file system that does not answer.
//!
//! Such a thread has none of the process' descriptors ([`crate::apart`]).

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use tracing::subscriber::{NoSubscriber, with_default};

use crate::apart::let_go_of_descriptors;
use crate::mutex::lock;
use sealblk_base::mounts::Mount;

/// How long a place may take: longer than a disk that has to spin up, on most days.
const LIMIT: Duration = Duration::from_secs(5);
/// The most threads of a pool that look, or wait in vain.
const MOST: usize = 8;

/// Places that callers of this process name.
pub(crate) static OF_CALLERS: Pool = Pool::new();
/// Files that the settings of this host name.
pub(crate) static OF_SETTINGS: Pool = Pool::new();

/// Why nothing is known of a place.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Silence {
    #[error("it does not answer")]
    Path,
    #[error("{} does not answer", .0.display())]
    FileSystem(PathBuf),
    #[error("too many other paths do not answer")]
    Busy,
}

/// Somebody who looks at one place after the other.
#[derive(Debug)]
pub(crate) struct Probe {
    pool: &'static Pool,
    looker: Option<Looker>,
    /// Where something is mounted; read once.
    mounts: Option<Vec<PathBuf>>,
    /// Which of them answer.
    answers: HashMap<PathBuf, bool>,
    /// There was no thread to be had: it is not waited for again.
    busy: bool,
}

type Job = Box<dyn FnOnce() + Send>;

/// A thread that looks until this is dropped.
#[derive(Debug)]
struct Looker(Sender<Job>);

/// What lookouts share.
#[derive(Debug)]
pub(crate) struct Pool {
    shared: Mutex<Shared>,
    /// A looker has ended, or a place was asked.
    freed: Condvar,
}

#[derive(Debug)]
struct Shared {
    lookers: usize,
    /// What is being asked just now.
    asked: Vec<PathBuf>,
    /// What did not answer, each with what its thread lets go of when it comes back.
    silent: Vec<(PathBuf, Weak<()>)>,
}

impl Probe {
    /// One that shares with the others of `pool`.
    pub(crate) fn of(pool: &'static Pool) -> Self {
        Self {
            pool,
            looker: None,
            mounts: None,
            answers: HashMap::new(),
            busy: false,
        }
    }

    /// What `look` sees at `place`.
    pub(crate) fn at<T: Send + 'static>(
        &mut self,
        place: &Path,
        look: impl FnOnce(&Path) -> T + Send + 'static,
    ) -> Result<T, Silence> {
        if let Some(mount) = self.mount_of(place)
            && !self.answers(&mount)?
        {
            return Err(Silence::FileSystem(mount));
        }
        self.ask(place, look)
    }

    /// Whether a file system answers at all. Where the path of a place leads over links to another one, that one is not asked,
    /// and the place keeps silent for itself.
    fn answers(&mut self, mount: &Path) -> Result<bool, Silence> {
        if let Some(answers) = self.answers.get(mount) {
            return Ok(*answers);
        }
        // What a cache of this host knows is no answer.
        let ask = |mount: &Path| statx(CWD, mount, AtFlags::STATX_FORCE_SYNC, StatxFlags::TYPE).is_ok();
        let answers = match self.ask(mount, ask) {
            Ok(_) => true,
            Err(Silence::Busy) => return Err(Silence::Busy),
            Err(_) => false,
        };
        self.answers.insert(mount.to_owned(), answers);
        Ok(answers)
    }

    fn ask<T: Send + 'static>(
        &mut self,
        place: &Path,
        look: impl FnOnce(&Path) -> T + Send + 'static,
    ) -> Result<T, Silence> {
        let _turn = self.pool.turn(place)?;
        let waits = Arc::new(());
        let still_waits = Arc::downgrade(&waits);
        let (reply, answer) = mpsc::sync_channel(1);
        let looked_at = place.to_owned();
        let job = move || {
            let _waits = waits;
            // Nobody may care any more.
            let _ = reply.send(look(&looked_at));
        };
        if !self.looker()?.give(Box::new(job)) {
            return Err(Silence::Busy);
        }
        answer.recv_timeout(LIMIT).map_err(|_| {
            self.looker = None;
            lock(&self.pool.shared)
                .silent
                .push((place.to_owned(), still_waits));
            Silence::Path
        })
    }

    fn looker(&mut self) -> Result<&Looker, Silence> {
        if self.looker.is_none() && !self.busy {
            self.looker = Looker::new(self.pool);
            self.busy = self.looker.is_none();
        }
        self.looker.as_ref().ok_or(Silence::Busy)
    }

    /// What is mounted where `place` lies, by its name: nothing is looked up for that.
    fn mount_of(&mut self, place: &Path) -> Option<PathBuf> {
        let mounts = self
            .mounts
            .get_or_insert_with(|| Mount::all().into_iter().map(|mount| mount.point).collect());
        let above = mounts.iter().filter(|mount| place.starts_with(mount));
        above.max_by_key(|mount| mount.as_os_str().len()).cloned()
    }
}

impl Looker {
    /// Nothing, if there are as many as there may be, and stay so.
    fn new(pool: &'static Pool) -> Option<Self> {
        let seat = pool.seat()?;
        let (jobs, given) = mpsc::channel::<Job>();
        let work = move || {
            let _seat = seat;
            let_go_of_descriptors();
            // A log's descriptor is not here either.
            with_default(NoSubscriber::new(), || given.into_iter().for_each(|job| job()));
        };
        let spawned = thread::Builder::new().name("look".to_owned()).spawn(work);
        spawned.ok().map(|_| Self(jobs))
    }

    fn give(&self, job: Job) -> bool {
        self.0.send(job).is_ok()
    }
}

impl Pool {
    const fn new() -> Self {
        Self {
            shared: Mutex::new(Shared {
                lookers: 0,
                asked: Vec::new(),
                silent: Vec::new(),
            }),
            freed: Condvar::new(),
        }
    }

    fn seat(&'static self) -> Option<Seat> {
        let mut shared = self.wait_while(|shared| shared.lookers >= MOST);
        let free = shared.lookers < MOST;
        shared.lookers += usize::from(free);
        // None is made only to be dropped, which would lock what is locked here.
        free.then(|| Seat(self))
    }

    /// The turn to ask `place`, unless it is silent.
    fn turn(&self, place: &Path) -> Result<Turn<'_>, Silence> {
        let mut shared = self.wait_while(|shared| shared.asked.iter().any(|asked| asked == place));
        let is_asked = shared.asked.iter().any(|asked| asked == place);
        if is_asked || shared.is_silent(place) {
            return Err(Silence::Path);
        }
        shared.asked.push(place.to_owned());
        Ok(Turn {
            pool: self,
            place: place.to_owned(),
        })
    }

    /// What all share, when that is over, or after the time that a place may take.
    fn wait_while(&self, waits: impl FnMut(&mut Shared) -> bool) -> MutexGuard<'_, Shared> {
        let waited = self.freed.wait_timeout_while(lock(&self.shared), LIMIT, waits);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Shared {
    /// Whether a thread still waits for this place.
    fn is_silent(&mut self, place: &Path) -> bool {
        self.silent.retain(|(_, waits)| waits.strong_count() > 0);
        self.silent.iter().any(|(silent, _)| silent == place)
    }
}

/// One of [`MOST`].
struct Seat(&'static Pool);

impl Drop for Seat {
    fn drop(&mut self) {
        lock(&self.0.shared).lookers -= 1;
        self.0.freed.notify_all();
    }
}

/// The asking of a place.
struct Turn<'p> {
    pool: &'p Pool,
    place: PathBuf,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        lock(&self.pool.shared).asked.retain(|asked| *asked != self.place);
        self.pool.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{FileType, Mode, mknodat};
    use std::fs::{self, File, OpenOptions};
    use std::time::Instant;

    #[test]
    fn a_silent_place_is_asked_once_and_keeps_no_other_from_its_turn() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        // To open a pipe that nobody writes to takes for ever.
        mknodat(CWD, &pipe, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let open = |path: &Path| File::open(path).is_ok();
        let mut probe = Probe::of(&OF_CALLERS);
        assert!(matches!(probe.at(&pipe, open), Err(Silence::Path)));
        let asked = Instant::now();
        assert!(matches!(probe.at(&pipe, open), Err(Silence::Path)));
        assert!(matches!(
            Probe::of(&OF_CALLERS).at(&pipe, open),
            Err(Silence::Path)
        ));
        assert!(probe.at(dir.path(), open).unwrap());
        assert!(asked.elapsed() < LIMIT);

        // Now it answers, and so does a second one, once the thread that had waited for the first is told.
        let _both = OpenOptions::new().read(true).write(true).open(&pipe).unwrap();
        while lock(&OF_CALLERS.shared).is_silent(&pipe) {
            assert!(asked.elapsed() < 4 * LIMIT);
            thread::sleep(Duration::from_millis(5));
        }
        assert!(probe.at(&pipe, open).unwrap());
    }

    // Each of those who asked one silent place at a time took a thread, and nothing else was looked at any more.
    #[test]
    fn any_number_who_ask_a_silent_place_take_one_thread() {
        static POOL: Pool = Pool::new();
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        mknodat(CWD, &pipe, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let open = |path: &Path| File::open(path).is_ok();
        thread::scope(|scope| {
            for _ in 0..MOST {
                scope.spawn(|| {
                    let asked = Probe::of(&POOL).at(&pipe, open);
                    assert!(matches!(asked, Err(Silence::Path)), "{asked:?}");
                });
            }
        });
        assert!(Probe::of(&POOL).at(dir.path(), open).unwrap());
        assert_eq!(lock(&POOL.shared).silent.len(), 1);
    }

    /// Whoever found no seat hung, and all others with him.
    #[test]
    fn who_finds_no_seat_is_told_and_leaves_the_others_as_they_are() {
        static POOL: Pool = Pool::new();
        let mut seats: Vec<_> = (0..MOST).map(|_| POOL.seat().unwrap()).collect();
        assert!(POOL.seat().is_none());
        assert!(matches!(
            Probe::of(&POOL).at(Path::new("/"), |_| ()),
            Err(Silence::Busy)
        ));
        seats.pop();
        Probe::of(&POOL).at(Path::new("/"), |_| ()).unwrap();
    }

    #[test]
    fn who_looks_holds_nothing_of_the_process() {
        let _held = File::open("/proc/self/status").unwrap();
        let held = |_: &Path| {
            let entries = fs::read_dir("/proc/thread-self/fd").unwrap();
            let numbers = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            numbers.filter_map(|number| number.parse::<u32>().ok()).max()
        };
        // That of the directory is the first after the standard ones.
        let most = Probe::of(&OF_CALLERS).at(Path::new("/"), held).unwrap();
        assert!(most <= Some(3), "{most:?}");
    }

    #[test]
    fn mounts_are_found_by_name() {
        assert_eq!(
            Probe::of(&OF_CALLERS).mount_of(Path::new("/proc/self/mountinfo")),
            Some("/proc".into())
        );
        let mut probe = Probe {
            mounts: Some(["/", "/srv", "/srv/vms"].map(PathBuf::from).to_vec()),
            ..Probe::of(&OF_CALLERS)
        };
        for (place, mount) in [("/srv/vms/a", "/srv/vms"), ("/srv/vmsa", "/srv"), ("/a", "/")] {
            assert_eq!(probe.mount_of(Path::new(place)), Some(mount.into()), "{place}");
        }
    }
}
