//! The volumes of this host that are being served, with their processes and KEKs.
//!
//! The release of a volume's key to a process registers the volume. The agent learns of the end of the process from the
//! kernel. A process that ends as it should detaches its volume before ([`Registered::detach`]), and when the last volume under a KEK
//! ends, the agent drops the KEK. A process that ends otherwise was killed: its volume stays registered, and its KEK with it,
//! for a grace time, in which the volume has to open again also while the key's server is away.
//!
//! Guests outlive the agent, so each registration is also a file, `served/UUID.PROCESS.json` in the state directory: after a
//! restart, the agent knows the volumes that are still served, and those that have ended. The start time distinguishes a
//! process from a later one with the same number.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::boot_time::BootTime;
use crate::control::peer::Peer;
use crate::control::privilege::has_all;
use crate::control::quota::is_fair;
use crate::keys::KeyId;
use crate::mutex::lock;
use crate::parsing;
use crate::timestamp::Timestamp;
use sealblk_secmem::private_file;

/// The most volumes that are watched: each takes a descriptor. The KEKs of others go when their time has come.
const MAX_VOLUMES: usize = 8192;
/// What a user gets of them at any rate, while there is room.
const SURE: usize = 64;

/// All of them.
#[derive(Debug)]
pub(super) struct Registered {
    dir: PathBuf,
    /// How long a volume stays registered whose process was killed.
    grace: Duration,
    all: Mutex<All>,
}

#[derive(Debug, Default)]
struct All {
    served: HashMap<ServedAs, Registration>,
    /// Those that ended while no agent was there to see it.
    ended: Vec<Registrant>,
}

/// A volume, and a process.
type ServedAs = (Uuid, i32);

#[derive(Debug)]
struct Registration {
    volume: Registrant,
    /// Readable when the process has ended.
    ending: OwnedFd,
    /// Whether it said so before.
    is_detached: bool,
    /// The process that was the last to get the volume's key since.
    followed_by: Option<i32>,
    /// Since when it is known that the process has ended.
    ended: Option<BootTime>,
}

impl Registration {
    fn new(volume: Registrant, ending: OwnedFd) -> Self {
        Self {
            volume,
            ending,
            is_detached: false,
            followed_by: None,
            ended: None,
        }
    }
}

/// A volume that is being served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Registrant {
    /// The UUID in its header.
    pub volume: Uuid,
    /// The provider that its key is under.
    pub provider: String,
    /// The KEK.
    pub key_id: KeyId,
    /// Who serves it.
    pub user: u32,
    /// See [`Registrant::user`].
    pub process: i32,
    /// Since when.
    pub since: Timestamp,
    /// Until when its KEK was good, if it came from what is kept for a reboot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grace: Option<Timestamp>,
}

/// What a registration's file holds.
#[derive(Serialize, Deserialize)]
struct Filed {
    #[serde(flatten)]
    volume: Registrant,
    identity: Identity,
}

/// Which of all processes that ever have a number.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    /// The kernel's `boot_id`.
    boot: Uuid,
    /// In clock ticks after the boot (proc_pid_stat(5), `starttime`).
    started: u64,
}

impl Identity {
    fn of(process: i32) -> io::Result<Self> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let boot = boot.trim().parse().map_err(io::Error::other)?;
        let started = stat_field(process, 22)?;
        Ok(Self { boot, started })
    }
}

/// A number that the kernel tells of a process: that of a field of its `stat` (proc_pid_stat(5)), the fourth or a later one.
fn stat_field<T: FromStr>(process: i32, field: usize) -> io::Result<T> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    // The name is in parentheses, and may hold some; the state, which is the third field, comes next.
    let fields = stat.rsplit_once(')').map(|(_, fields)| fields.split_whitespace());
    let number = fields.and_then(|mut fields| fields.nth(field.checked_sub(3)?)?.parse().ok());
    number.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The effective user of a process (proc_pid_status(5), `Uid`).
fn user_of(process: i32) -> io::Result<u32> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let users = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    let effective = users.and_then(|users| users.split_whitespace().nth(1)?.parse().ok());
    effective.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The process that serves the volume that `peer` asks for: `process`, if it is the peer's parent and has the same user, since the
/// peer is its key helper then; else the peer itself. The first process is the parent of any that has lost its own, and serves no disk.
pub(super) fn serving(peer: &Peer, process: Option<u32>) -> Peer {
    let named = process.and_then(|process| i32::try_from(process).ok());
    let is_parent = |named: &i32| {
        *named > 1
            && stat_field::<i32>(peer.process, 4).is_ok_and(|parent| parent == *named)
            && user_of(*named).is_ok_and(|user| user == peer.user)
    };
    Peer {
        process: named.filter(is_parent).unwrap_or(peer.process),
        ..peer.clone()
    }
}

impl Registrant {
    fn kek(&self) -> (&str, &KeyId) {
        (&self.provider, &self.key_id)
    }

    fn place(&self) -> ServedAs {
        (self.volume, self.process)
    }
}

impl All {
    /// Whether `peer` may have one more: half of what is left, so that the next user finds some.
    fn have_room_for(&self, peer: &Peer) -> bool {
        let left = MAX_VOLUMES.saturating_sub(self.served.len());
        let its = |registration: &&Registration| registration.volume.user == peer.user;
        let own = self.served.values().filter(its).count();
        left > 0 && has_all(peer) || is_fair(own, left, SURE)
    }

    fn any_under(&self, kek: (&str, &KeyId)) -> bool {
        self.served
            .values()
            .any(|registration| registration.volume.kek() == kek)
    }
}

impl Registered {
    /// What the state directory `state_dir` says is being served, of which all that has ended is told by
    /// [`Registered::ended`]. If it cannot be read, it is told in the log.
    pub(super) fn open(state_dir: &Path, grace: Duration) -> Self {
        let dir = state_dir.join("served");
        let mut all = All::default();
        let files = private_file::ensure_dir(&dir).and_then(|()| fs::read_dir(&dir));
        match files {
            Ok(files) => {
                for path in files.flatten().map(|file| file.path()) {
                    all.take_up(&path);
                }
            }
            Err(error) => {
                tracing::warn!(%error, "{}: after a restart, the agent will not know the volumes that are being served", dir.display());
            }
        }
        Self {
            dir,
            grace,
            all: Mutex::new(all),
        }
    }

    /// Takes note that `peer` serves `volume`, and gives back the KEK that no volume is served under any more, if it was
    /// served under another before. A process that has ended by now is none to wait for.
    pub(super) fn add(
        &self,
        peer: &Peer,
        volume: Uuid,
        (provider, key_id): (&str, &KeyId),
        grace: Option<Timestamp>,
    ) -> Option<Registrant> {
        // Should the number be another process' by now, the KEK is kept until its time has come.
        let ending = wait_for(peer.process)?;
        let volume = Registrant {
            volume,
            provider: provider.to_owned(),
            key_id: key_id.clone(),
            user: peer.user,
            process: peer.process,
            grace,
            since: Timestamp::now(),
        };
        let place = volume.place();
        let mut all = self.lock();
        if !all.served.contains_key(&place) && !all.have_room_for(peer) {
            return None;
        }
        if let Err(error) = self.file(&volume) {
            tracing::warn!(%error, "{}: after a restart, the agent will not know that this volume is served", volume.volume);
        }
        // Of the processes that serve a volume, the last one decides for how long its KEK is kept.
        let others = all
            .served
            .iter_mut()
            .filter(|(other, _)| other.0 == place.0 && **other != place);
        others.for_each(|(_, other)| other.followed_by = Some(peer.process));
        let before = all.served.insert(place, Registration::new(volume, ending))?;
        (!all.any_under(before.volume.kek())).then_some(before.volume)
    }

    /// Takes note that the process that `peer` is, or is the helper of, is about to end. If it has `served` the volume, those that have ended
    /// before it are not waited for either.
    pub(super) fn detach(&self, peer: &Peer, volume: Uuid, served: bool) {
        let mut all = self.lock();
        match all.served.get_mut(&(volume, peer.process)) {
            Some(registration) if registration.volume.user == peer.user => registration.is_detached = true,
            _ => return,
        }
        // One that lives is the source of a migration that came to nothing, or another reader.
        let ended = all.ended_places();
        for (place, registration) in &mut all.served {
            let is_before = place.0 == volume && registration.followed_by == Some(peer.process);
            registration.is_detached |= served && is_before && ended.contains(place);
        }
    }

    /// Takes note that `volume` is none of this host's guests any more: those of its processes that were killed are not waited for. The
    /// processes that serve it, if any does; then nothing changes.
    pub(super) fn release(&self, volume: Uuid) -> Result<(), Vec<i32>> {
        let mut all = self.lock();
        let ended = all.ended_places();
        let of_volume = |place: &&ServedAs| place.0 == volume;
        let alive = all
            .served
            .keys()
            .filter(of_volume)
            .filter(|place| !ended.contains(place));
        let alive: Vec<_> = alive.map(|(_, process)| *process).collect();
        if !alive.is_empty() {
            return Err(alive);
        }
        let of_volume = all.served.iter_mut().filter(|(place, _)| place.0 == volume);
        of_volume.for_each(|(_, registration)| registration.is_detached = true);
        Ok(())
    }

    /// Whether any volume is registered under this KEK.
    pub(super) fn has_any_under(&self, kek: (&str, &KeyId)) -> bool {
        self.lock().any_under(kek)
    }

    /// Whether `user` serves `volume` under this KEK, or has served it until a process was killed, less than the grace time ago.
    pub(super) fn serves(&self, user: u32, volume: Uuid, kek: (&str, &KeyId)) -> bool {
        let all = self.lock();
        let mut served = all.served.values().map(|registration| &registration.volume);
        served.any(|served| served.user == user && served.volume == volume && served.kek() == kek)
    }

    /// Those that are served no more, each with whether it was the last one under its KEK: the process has ended, and if it was killed, the
    /// grace time is over, or another process has served the volume since. They stay until [`Registered::forget`].
    pub(super) fn ended(&self) -> Vec<(Registrant, bool)> {
        let mut all = self.lock();
        let ended = all.due_places(self.grace);
        let (gone, alive): (Vec<_>, Vec<_>) = all.served.iter().partition(|(place, _)| ended.contains(place));
        let under: HashSet<_> = alive
            .iter()
            .map(|(_, registration)| registration.volume.kek())
            .collect();
        let gone = gone.into_iter().map(|(_, registration)| &registration.volume);
        let told = |volume: &Registrant| (volume.clone(), !under.contains(&volume.kek()));
        all.ended.iter().chain(gone).map(told).collect()
    }

    /// Lets go of one whose process has ended.
    pub(super) fn forget(&self, volume: &Registrant) {
        let mut all = self.lock();
        all.ended.retain(|ended| ended != volume);
        let place = volume.place();
        match all.served.get(&place) {
            // A later process of the same number serves the same volume.
            Some(registration) if registration.volume != *volume => return,
            _ => drop(all.served.remove(&place)),
        }
        // One that stays is taken up by the next agent, and found to have ended.
        let _ = fs::remove_file(self.path(place));
    }

    /// All of them, by the time since when they are served, without those that were killed.
    pub(super) fn list(&self) -> Vec<Registrant> {
        let mut all = self.lock();
        let due = all.due_places(self.grace);
        let is_listed = |(place, registration): &(&ServedAs, &Registration)| {
            registration.ended.is_none() || due.contains(place)
        };
        let served = all
            .served
            .iter()
            .filter(is_listed)
            .map(|(_, registration)| registration);
        let mut list: Vec<_> = served.map(|registration| registration.volume.clone()).collect();
        list.sort_by_key(|volume| (volume.since, volume.volume));
        list
    }

    /// Those whose process has not ended, whether or not that was told of.
    pub(super) fn alive(&self) -> Vec<Registrant> {
        let all = self.lock();
        let ended = all.ended_places();
        let served = all.served.iter().filter(|(place, _)| !ended.contains(place));
        served
            .map(|(_, registration)| registration.volume.clone())
            .collect()
    }

    /// Writes a registration down. The host's crash ends the process as well, so nothing has to be on the storage.
    fn file(&self, volume: &Registrant) -> io::Result<()> {
        let identity = Identity::of(volume.process)?;
        let path = self.path(volume.place());
        let new = path.with_extension("new");
        let filed = Filed {
            volume: volume.clone(),
            identity,
        };
        fs::write(&new, serde_json::to_vec(&filed)?)?;
        fs::rename(&new, &path)
    }

    fn path(&self, (volume, process): ServedAs) -> PathBuf {
        self.dir.join(format!("{volume}.{process}.json"))
    }

    fn lock(&self) -> MutexGuard<'_, All> {
        lock(&self.all)
    }
}

impl All {
    /// Takes up what an earlier agent has left in the file `path`.
    fn take_up(&mut self, path: &Path) {
        let filed = fs::read(path)
            .ok()
            .and_then(|content| parsing::json::<Filed>(&content).ok());
        let Some(Filed { volume, identity }) = filed else {
            // An agent was killed while it wrote this.
            let _ = fs::remove_file(path);
            return;
        };
        // Looked at while it can be waited for: its number is no other process' meanwhile.
        let ending = wait_for(volume.process);
        match ending.filter(|_| Identity::of(volume.process).is_ok_and(|now| now == identity)) {
            Some(ending) => drop(
                self.served
                    .insert(volume.place(), Registration::new(volume, ending)),
            ),
            None => self.ended.push(volume),
        }
    }

    /// Those whose process has ended, and that need not stay for the grace time.
    fn due_places(&mut self, grace: Duration) -> HashSet<ServedAs> {
        let now = BootTime::now();
        let mut ended = self.ended_places();
        // One that has left, as the new process of an upgrade that failed, follows none.
        let serving: HashSet<_> = self
            .served
            .iter()
            .filter(|(place, registration)| !registration.is_detached && !ended.contains(place))
            .map(|(place, _)| *place)
            .collect();
        ended.retain(|place| {
            self.served.get_mut(place).is_some_and(|registration| {
                let since = *registration.ended.get_or_insert(now);
                let follower = registration.followed_by.map(|process| (place.0, process));
                let is_followed = follower.is_some_and(|follower| serving.contains(&follower));
                registration.is_detached || is_followed || since + grace <= now
            })
        });
        ended
    }

    fn ended_places(&self) -> HashSet<ServedAs> {
        let (mut fds, mut places) = (Vec::new(), Vec::new());
        for (place, registration) in &self.served {
            places.push(*place);
            fds.push(PollFd::new(&registration.ending, PollFlags::IN));
        }
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        if !matches!(poll(&mut fds, Some(&at_once)), Ok(ended) if ended > 0) {
            return HashSet::new();
        }
        let ended = fds.iter().map(|fd| !fd.revents().is_empty());
        let places = places.into_iter().zip(ended).filter(|(_, ended)| *ended);
        places.map(|(place, _)| place).collect()
    }
}

/// A descriptor that is readable when `process` has ended.
fn wait_for(process: i32) -> Option<OwnedFd> {
    pidfd_open(Pid::from_raw(process)?, PidfdFlags::empty()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command, Stdio};

    fn process() -> (Child, Peer) {
        let child = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let peer = Peer {
            user: 1000,
            groups: vec![1000],
            process: child.id() as i32,
        };
        (child, peer)
    }

    fn end(mut child: Child) {
        drop(child.stdin.take());
        child.wait().unwrap();
    }

    fn take_ended(registered: &Registered) -> Vec<(Registrant, bool)> {
        let ended = registered.ended();
        assert_eq!(registered.ended().len(), ended.len());
        ended.iter().for_each(|(volume, _)| registered.forget(volume));
        ended
    }

    /// Any process could be named, and was in the audit log as the one that got the key.
    #[test]
    fn a_disk_is_served_by_the_callers_parent_of_the_same_user_or_by_the_caller() {
        let own = i32::try_from(std::process::id()).unwrap();
        let peer = |user| Peer {
            user,
            groups: Vec::new(),
            process: own,
        };
        let user = rustix::process::geteuid().as_raw();
        let parent = std::os::unix::process::parent_id();
        let told = |user, process| serving(&peer(user), process).process;
        assert_eq!(told(user, Some(parent)), i32::try_from(parent).unwrap());
        assert_eq!(told(user + 1, Some(parent)), own);
        for other in [None, Some(1), Some(u32::MAX), Some(std::process::id())] {
            assert_eq!(told(user, other), own, "{other:?}");
        }
    }

    #[test]
    fn a_kek_is_let_go_with_the_last_process_that_serves_a_volume_under_it() {
        let dir = tempfile::tempdir().unwrap();
        let registered = Registered::open(dir.path(), Duration::ZERO);
        let [(first, one), (second, two)] = [process(), process()];
        let [shared, own] = ["shared", "own"].map(|id| KeyId(id.into()));
        let volumes = [(); 3].map(|()| Uuid::new_v4());
        registered.add(&one, volumes[0], ("kms", &shared), None);
        registered.add(&two, volumes[1], ("kms", &shared), None);
        registered.add(&two, volumes[2], ("kms", &own), None);
        registered.add(&two, volumes[2], ("kms", &own), None);
        assert_eq!(registered.list().len(), 3);
        assert_eq!(take_ended(&registered), []);
        end(first);
        assert_eq!((registered.alive().len(), registered.list().len()), (2, 3));
        let ended = take_ended(&registered);
        assert_eq!(
            (ended[0].0.volume, ended[0].1, ended.len()),
            (volumes[0], false, 1)
        );
        end(second);
        let ended = take_ended(&registered);
        assert!(
            ended.len() == 2 && ended.iter().all(|(_, last)| *last),
            "{ended:?}"
        );
        assert_eq!(registered.list(), []);

        // A process that has ended already cannot be waited for.
        registered.add(&one, volumes[0], ("kms", &shared), None);
        assert_eq!(registered.list(), []);
    }

    #[test]
    fn the_next_agent_knows_what_is_served_and_what_has_ended() {
        let dir = tempfile::tempdir().unwrap();
        let key = KeyId("key".into());
        let [(lives, one), (ends, two), (other, three)] = [process(), process(), process()];
        let volumes = [(); 3].map(|()| Uuid::new_v4());
        let list = {
            let registered = Registered::open(dir.path(), Duration::ZERO);
            for (volume, peer) in volumes.iter().zip([&one, &two, &three]) {
                registered.add(peer, *volume, ("kms", &key), Some(Timestamp::from_unix(7)));
            }
            registered.list()
        };
        end(ends);
        // A later process has the third one's number.
        let path = dir
            .path()
            .join(format!("served/{}.{}.json", volumes[2], three.process));
        let mut filed: Filed = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        filed.identity.started -= 1;
        fs::write(&path, serde_json::to_vec(&filed).unwrap()).unwrap();
        fs::write(dir.path().join("served/torn.new"), "{").unwrap();

        let registered = Registered::open(dir.path(), Duration::ZERO);
        assert_eq!(registered.list().len(), 1);
        assert!(list.contains(&registered.list()[0]) && registered.list()[0].volume == volumes[0]);
        let mut ended = take_ended(&registered);
        ended.sort_by_key(|(volume, _)| volume.volume != volumes[1]);
        let ended: Vec<_> = ended
            .into_iter()
            .map(|(volume, last)| (volume.volume, last))
            .collect();
        assert_eq!(ended, [(volumes[1], false), (volumes[2], false)]);
        end(other);
        end(lives);
        assert!(matches!(&*take_ended(&registered), [(_, true)]));
        assert_eq!(fs::read_dir(dir.path().join("served")).unwrap().count(), 0);
        assert!(take_ended(&Registered::open(dir.path(), Duration::ZERO)).is_empty());
    }

    #[test]
    fn a_kek_that_no_volume_is_served_under_any_more_is_told_of() {
        let dir = tempfile::tempdir().unwrap();
        let registered = Registered::open(dir.path(), Duration::ZERO);
        let (child, peer) = process();
        let [first, second] = [(); 2].map(|()| Uuid::new_v4());
        let [old, new] = ["old", "new"].map(|id| KeyId(id.into()));
        let add = |volume, key| {
            let before = registered.add(&peer, volume, ("kms", key), None);
            before.map(|before| before.key_id)
        };
        assert_eq!((add(first, &old), add(second, &old)), (None, None));
        assert_eq!((add(first, &new), add(first, &new)), (None, None));
        assert_eq!(add(second, &new), Some(old.clone()));
        assert_eq!(registered.list().len(), 2);
        end(child);
    }

    #[test]
    fn a_volume_whose_process_was_killed_keeps_its_kek_for_the_grace_time() {
        let dir = tempfile::tempdir().unwrap();
        let registered = Registered::open(dir.path(), Duration::from_secs(600));
        let key = KeyId("key".into());
        let volumes = [(); 2].map(|()| Uuid::new_v4());
        let [(killed, one), (detached, two), (again, three)] = [process(), process(), process()];
        registered.add(&one, volumes[0], ("kms", &key), None);
        registered.add(&two, volumes[1], ("kms", &key), None);
        let serves = |user, volume| registered.serves(user, volume, ("kms", &key));
        // Of another user, and of another volume, it means nothing.
        let other = Peer {
            user: 7,
            ..one.clone()
        };
        registered.detach(&other, volumes[0], true);
        registered.detach(&one, volumes[1], true);
        registered.detach(&two, volumes[1], true);
        end(killed);
        end(detached);
        let ended = take_ended(&registered);
        assert_eq!(
            (ended.len(), ended[0].0.volume, ended[0].1),
            // The other one's process was killed, and its KEK is kept.
            (1, volumes[1], false)
        );
        assert_eq!((registered.list(), registered.alive()), (Vec::new(), Vec::new()));
        assert!(serves(1000, volumes[0]) && !serves(7, volumes[0]) && !serves(1000, volumes[1]));
        assert!(!registered.serves(1000, volumes[0], ("kms", &KeyId("other".into()))));
        // The volume is served again: the killed process is told of, and its KEK is in use.
        registered.add(&three, volumes[0], ("kms", &key), None);
        let ended = take_ended(&registered);
        assert_eq!(
            (ended.len(), ended[0].0.process, ended[0].1),
            (1, one.process, false)
        );
        assert_eq!(registered.list().len(), 1);
        end(again);
        assert!(take_ended(&registered).is_empty());
        // It was killed as well, and the next one detaches before the agent has looked.
        let (last, four) = process();
        registered.add(&four, volumes[0], ("kms", &key), None);
        registered.detach(&four, volumes[0], true);
        end(last);
        let ended = take_ended(&registered);
        assert!(
            ended.len() == 2 && ended.iter().all(|(_, last)| *last),
            "{ended:?}"
        );

        // The destination of a migration that came to nothing takes nothing from the source, which lives.
        let [(source, five), (destination, six)] = [process(), process()];
        registered.add(&five, volumes[1], ("kms", &key), None);
        registered.add(&six, volumes[1], ("kms", &key), None);
        registered.detach(&six, volumes[1], true);
        end(destination);
        assert_eq!(take_ended(&registered).len(), 1);
        end(source);
        assert!(take_ended(&registered).is_empty());
        assert!(registered.serves(1000, volumes[1], ("kms", &key)));
    }

    /// The new process of an upgrade that failed has ended: the old one was kept no grace time when it was killed then.
    #[test]
    fn a_process_whose_successor_has_left_keeps_its_grace_time() {
        let dir = tempfile::tempdir().unwrap();
        let registered = Registered::open(dir.path(), Duration::from_secs(600));
        let key = KeyId("key".into());
        let volume = Uuid::new_v4();
        let forget = |peer: &Peer| {
            let registrant = registered.lock().served[&(volume, peer.process)].volume.clone();
            registered.forget(&registrant);
        };
        for is_detached in [true, false] {
            let [(old, one), (new, two)] = [process(), process()];
            registered.add(&one, volume, ("kms", &key), None);
            registered.add(&two, volume, ("kms", &key), None);
            if is_detached {
                registered.detach(&two, volume, false);
            }
            end(new);
            let ended = take_ended(&registered);
            assert_eq!(ended.len(), usize::from(is_detached));
            end(old);
            assert_eq!(take_ended(&registered), Vec::new());
            assert!(registered.serves(1000, volume, ("kms", &key)));
            forget(&one);
            if !is_detached {
                forget(&two);
            }
        }
    }
}
