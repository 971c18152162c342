//! Looks at paths that may never answer: a file system whose server does not answer, a device that has lost its paths. Sometimes
//! the kernel cannot even end a process that waits for such a path.
//!
//! So a [`Looker`] does it, which can be abandoned. There are two:
//!
//! - A process reads the headers of volumes (`inventory::reader`), because other users name them and can write them.
//! - A [`Thread`] reads the files that settings name, because this process needs their content, such as keys, in its own memory.
//!
//! Each has its own [`Pool`] of at most [`MOST`] lookers: paths that callers name cannot use up the lookers for the files that
//! this host's settings name. One looker at a time looks at a path. While it waits, no other looker of the pool looks at the path,
//! nor at other paths of a file system that does not answer.

mod thread;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use crate::mutex::lock;
use sealblk_base::mounts::Mount;

pub(crate) use thread::Thread;

/// How long a path may take: longer than a disk that has to spin up, on most days.
pub(crate) const LIMIT: Duration = Duration::from_secs(5);
/// The most lookers of a pool, those included that wait for paths that do not answer.
const MOST: usize = 8;

/// Why nothing is known of a path.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Silence {
    #[error("it does not answer")]
    Path,
    #[error("{} does not answer", .0.display())]
    FileSystem(PathBuf),
    #[error("too many other paths do not answer")]
    Busy,
    #[error("the process or thread that reads it cannot be started: {0}")]
    NotStarted(io::Error),
    #[error("the process or thread that reads it has failed")]
    Failed,
}

/// Looks at one path after the other, and can be abandoned. When it is dropped, it ends as soon as it can.
pub(crate) trait Looker: Sized {
    /// Starts it. It keeps its seat until it has ended.
    fn start(seat: Seat) -> io::Result<Self>;

    /// Waits until a file system answers: [`wait_for`].
    fn wait_for(&mut self, mount: &Path) -> Result<(), Lost>;
}

/// A looker that gave no answer, and is asked no more.
#[derive(Debug)]
pub(crate) enum Lost {
    /// It had [`LIMIT`], and may still wait for the path.
    Waits,
    /// It has ended, or answered nonsense.
    Failed,
}

/// Looks at one path after the other.
#[derive(Debug)]
pub(crate) struct Probe<L> {
    pool: &'static Pool,
    /// With what lasts as long as its seat.
    looker: Option<(L, Weak<()>)>,
    /// Where something is mounted; read once.
    mounts: Option<Vec<PathBuf>>,
    /// Which of them answer.
    answers: HashMap<PathBuf, bool>,
    /// No seat was free: it does not wait for one again.
    busy: bool,
}

/// What the probes of one kind of looker share.
#[derive(Debug)]
pub(crate) struct Pool {
    shared: Mutex<Shared>,
    /// A looker has ended, or a path has its answer.
    freed: Condvar,
}

#[derive(Debug)]
struct Shared {
    lookers: usize,
    /// The paths that are being asked.
    asked: Vec<PathBuf>,
    /// The paths that did not answer, each with what lasts as long as its looker waits.
    silent: Vec<(PathBuf, Weak<()>)>,
}

impl<L: Looker> Probe<L> {
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

    /// What `look` gets to know of `path`.
    pub(crate) fn at<T>(
        &mut self,
        path: &Path,
        look: impl FnOnce(&mut L) -> Result<T, Lost>,
    ) -> Result<T, Silence> {
        if let Some(mount) = self.mount_of(path)
            && !self.answers(&mount)?
        {
            return Err(Silence::FileSystem(mount));
        }
        self.ask(path, look)
    }

    /// Has another looker look at the next path.
    pub(crate) fn renew(&mut self) {
        self.looker = None;
    }

    /// Whether a file system answers at all. Where links lead from a path to another file system, that one is not asked,
    /// and the path is silent for itself.
    fn answers(&mut self, mount: &Path) -> Result<bool, Silence> {
        if let Some(answers) = self.answers.get(mount) {
            return Ok(*answers);
        }
        let answers = match self.ask(mount, |looker| looker.wait_for(mount)) {
            Ok(()) => true,
            Err(Silence::Path) => false,
            Err(other) => return Err(other),
        };
        self.answers.insert(mount.to_owned(), answers);
        Ok(answers)
    }

    fn ask<T>(&mut self, path: &Path, look: impl FnOnce(&mut L) -> Result<T, Lost>) -> Result<T, Silence> {
        let _turn = self.pool.turn(path)?;
        let (mut looker, seated) = match self.looker.take() {
            Some(looker) => looker,
            None => self.start()?,
        };
        match look(&mut looker) {
            Ok(seen) => {
                self.looker = Some((looker, seated));
                Ok(seen)
            }
            Err(Lost::Waits) => {
                lock(&self.pool.shared).silent.push((path.to_owned(), seated));
                Err(Silence::Path)
            }
            Err(Lost::Failed) => Err(Silence::Failed),
        }
    }

    fn start(&mut self) -> Result<(L, Weak<()>), Silence> {
        let seat = match self.busy {
            true => None,
            false => self.pool.seat(),
        };
        self.busy = seat.is_none();
        let seat = seat.ok_or(Silence::Busy)?;
        let seated = Arc::downgrade(&seat.taken);
        Ok((L::start(seat).map_err(Silence::NotStarted)?, seated))
    }

    /// What is mounted where `path` lies, by its name: nothing is looked up for that.
    fn mount_of(&mut self, path: &Path) -> Option<PathBuf> {
        let mounts = self
            .mounts
            .get_or_insert_with(|| Mount::all().into_iter().map(|mount| mount.point).collect());
        let above = mounts.iter().filter(|mount| path.starts_with(mount));
        above.max_by_key(|mount| mount.as_os_str().len()).cloned()
    }
}

/// Waits until a file system answers. What a cache of this host knows is no answer; an error is one.
pub(crate) fn wait_for(mount: &Path) {
    let _ = statx(CWD, mount, AtFlags::STATX_FORCE_SYNC, StatxFlags::TYPE);
}

impl Pool {
    pub(crate) const fn new() -> Self {
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
        free.then(|| Seat {
            pool: self,
            taken: Arc::new(()),
        })
    }

    /// The turn to ask `path`, unless it is silent.
    fn turn(&self, path: &Path) -> Result<Turn<'_>, Silence> {
        let mut shared = self.wait_while(|shared| shared.asked.iter().any(|asked| asked == path));
        let is_asked = shared.asked.iter().any(|asked| asked == path);
        if is_asked || shared.is_silent(path) {
            return Err(Silence::Path);
        }
        shared.asked.push(path.to_owned());
        Ok(Turn {
            pool: self,
            path: path.to_owned(),
        })
    }

    /// What all share, when that is over, or after the time that a path may take.
    fn wait_while(&self, waits: impl FnMut(&mut Shared) -> bool) -> MutexGuard<'_, Shared> {
        let waited = self.freed.wait_timeout_while(lock(&self.shared), LIMIT, waits);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Shared {
    /// Whether a looker still waits for this path.
    fn is_silent(&mut self, path: &Path) -> bool {
        self.silent.retain(|(_, waits)| waits.strong_count() > 0);
        self.silent.iter().any(|(silent, _)| silent == path)
    }
}

/// One of [`MOST`].
#[derive(Debug)]
pub(crate) struct Seat {
    pool: &'static Pool,
    taken: Arc<()>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        lock(&self.pool.shared).lookers -= 1;
        self.pool.freed.notify_all();
    }
}

/// The asking of a path.
struct Turn<'p> {
    pool: &'p Pool,
    path: PathBuf,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        lock(&self.pool.shared).asked.retain(|asked| *asked != self.path);
        self.pool.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{FileType, Mode, mknodat};
    use std::fs::{self, File, OpenOptions};
    use std::thread;
    use std::time::Instant;

    static POOL: Pool = Pool::new();

    fn probe(pool: &'static Pool) -> Probe<Thread> {
        Probe::of(pool)
    }

    /// Opens `path` in a thread of the probe.
    fn open(probe: &mut Probe<Thread>, path: &Path) -> Result<bool, Silence> {
        let opened = path.to_owned();
        probe.at(path, |thread| thread.run(move || File::open(opened).is_ok()))
    }

    #[test]
    fn a_silent_place_is_asked_once_and_keeps_no_other_from_its_turn() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        // To open a pipe that nobody writes to takes for ever.
        mknodat(CWD, &pipe, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let mut probe = probe(&POOL);
        assert!(matches!(open(&mut probe, &pipe), Err(Silence::Path)));
        let asked = Instant::now();
        assert!(matches!(open(&mut probe, &pipe), Err(Silence::Path)));
        assert!(matches!(open(&mut self::probe(&POOL), &pipe), Err(Silence::Path)));
        assert!(open(&mut probe, dir.path()).unwrap());
        assert!(asked.elapsed() < LIMIT);

        // Now it answers, and so does a second one, once the thread that had waited for the first is told.
        let _both = OpenOptions::new().read(true).write(true).open(&pipe).unwrap();
        while lock(&POOL.shared).is_silent(&pipe) {
            assert!(asked.elapsed() < 4 * LIMIT);
            thread::sleep(Duration::from_millis(5));
        }
        assert!(open(&mut probe, &pipe).unwrap());
    }

    // Each of those who asked one silent place at a time took a thread, and nothing else was looked at any more.
    #[test]
    fn any_number_who_ask_a_silent_place_take_one_thread() {
        static POOL: Pool = Pool::new();
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        mknodat(CWD, &pipe, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        thread::scope(|scope| {
            for _ in 0..MOST {
                scope.spawn(|| {
                    let asked = open(&mut probe(&POOL), &pipe);
                    assert!(matches!(asked, Err(Silence::Path)), "{asked:?}");
                });
            }
        });
        assert!(open(&mut probe(&POOL), dir.path()).unwrap());
        assert_eq!(lock(&POOL.shared).silent.len(), 1);
    }

    /// Whoever found no seat hung, and all others with him.
    #[test]
    fn who_finds_no_seat_is_told_and_leaves_the_others_as_they_are() {
        static POOL: Pool = Pool::new();
        let mut seats: Vec<_> = (0..MOST).map(|_| POOL.seat().unwrap()).collect();
        assert!(POOL.seat().is_none());
        assert!(matches!(
            open(&mut probe(&POOL), Path::new("/")),
            Err(Silence::Busy)
        ));
        seats.pop();
        open(&mut probe(&POOL), Path::new("/")).unwrap();
    }

    #[test]
    fn who_looks_holds_nothing_of_the_process() {
        let _held = File::open("/proc/self/status").unwrap();
        let held = || {
            let entries = fs::read_dir("/proc/thread-self/fd").unwrap();
            let numbers = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            numbers.filter_map(|number| number.parse::<u32>().ok()).max()
        };
        // That of the directory is the first after the standard ones.
        let most = probe(&POOL)
            .at(Path::new("/"), |thread| thread.run(held))
            .unwrap();
        assert!(most <= Some(3), "{most:?}");
    }

    #[test]
    fn mounts_are_found_by_name() {
        assert_eq!(
            probe(&POOL).mount_of(Path::new("/proc/self/mountinfo")),
            Some("/proc".into())
        );
        let mut probe = Probe {
            mounts: Some(["/", "/srv", "/srv/vms"].map(PathBuf::from).to_vec()),
            ..probe(&POOL)
        };
        for (place, mount) in [("/srv/vms/a", "/srv/vms"), ("/srv/vmsa", "/srv"), ("/a", "/")] {
            assert_eq!(probe.mount_of(Path::new(place)), Some(mount.into()), "{place}");
        }
    }
}
