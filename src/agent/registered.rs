//! The volumes of this host that are being served: by which process, under which KEK.
//!
//! A process registers a volume by having its key released to serve it, and nothing has to be told when it ends: the kernel
//! knows. With the last volume under a KEK, the KEK goes.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::control::peer::Peer;
use crate::keys::KeyId;
use crate::moment::Moment;

/// The most volumes that are watched: each takes a descriptor. The KEKs of others go when their time has come.
const MAX_VOLUMES: usize = 8192;

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Registered(Mutex<HashMap<(Uuid, i32), Registration>>);

#[derive(Debug)]
struct Registration {
    volume: Registrant,
    /// Readable when the process has ended.
    ending: OwnedFd,
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
    /// Since when, as RFC 3339 has it.
    pub since: String,
    /// Until when its KEK was good, if it came from what is kept for a reboot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grace: Option<Moment>,
}

impl Registrant {
    fn kek(&self) -> (&str, &KeyId) {
        (&self.provider, &self.key_id)
    }
}

impl Registered {
    /// Takes note that `peer` serves `volume`. A process that has ended by now is none to wait for.
    pub(super) fn add(
        &self,
        peer: &Peer,
        volume: Uuid,
        (provider, key_id): (&str, &KeyId),
        grace: Option<Moment>,
    ) {
        // Should the number be another process' by now, the KEK is kept until its time has come.
        let Some(ending) =
            Pid::from_raw(peer.process).and_then(|process| pidfd_open(process, PidfdFlags::empty()).ok())
        else {
            return;
        };
        let mut registered = self.lock();
        let place = (volume, peer.process);
        if registered.len() >= MAX_VOLUMES && !registered.contains_key(&place) {
            return;
        }
        let volume = Registrant {
            volume,
            provider: provider.to_owned(),
            key_id: key_id.clone(),
            user: peer.user,
            process: peer.process,
            grace,
            since: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        };
        registered.insert(place, Registration { volume, ending });
    }

    /// Those whose process has ended since the last call, each with whether it was the last one under its KEK.
    pub(super) fn take_ended(&self) -> Vec<(Registrant, bool)> {
        let mut registered = self.lock();
        let mut fds: Vec<PollFd<'_>> = Vec::with_capacity(registered.len());
        let mut places = Vec::with_capacity(registered.len());
        for (place, registration) in registered.iter() {
            places.push(*place);
            fds.push(PollFd::new(&registration.ending, PollFlags::IN));
        }
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        if !matches!(poll(&mut fds, Some(&at_once)), Ok(ended) if ended > 0) {
            return Vec::new();
        }
        let ended = fds.iter().map(|fd| !fd.revents().is_empty());
        let ended: Vec<_> = places.iter().zip(ended).filter(|(_, ended)| *ended).collect();
        let ended: Vec<_> = ended.into_iter().map(|(place, _)| *place).collect();
        let gone: Vec<Registrant> = ended
            .iter()
            .filter_map(|place| registered.remove(place))
            .map(|registration| registration.volume)
            .collect();
        let left = |of: &Registrant| registered.values().any(|other| other.volume.kek() == of.kek());
        gone.iter()
            .map(|volume| (volume.clone(), !left(volume)))
            .collect()
    }

    /// All of them, by the time since when they are served.
    pub(super) fn list(&self) -> Vec<Registrant> {
        let mut list: Vec<_> = self
            .lock()
            .values()
            .map(|registration| registration.volume.clone())
            .collect();
        list.sort_by(|one, two| (&one.since, one.volume).cmp(&(&two.since, two.volume)));
        list
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(Uuid, i32), Registration>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
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

    #[test]
    fn a_kek_is_let_go_with_the_last_process_that_serves_a_volume_under_it() {
        let registered = Registered::default();
        let [(first, one), (second, two)] = [process(), process()];
        let [shared, own] = ["shared", "own"].map(|id| KeyId(id.into()));
        let volumes = [(); 3].map(|()| Uuid::new_v4());
        registered.add(&one, volumes[0], ("kms", &shared), None);
        registered.add(&two, volumes[1], ("kms", &shared), None);
        registered.add(&two, volumes[2], ("kms", &own), None);
        registered.add(&two, volumes[2], ("kms", &own), None);
        assert_eq!(registered.list().len(), 3);
        assert_eq!(registered.take_ended(), []);
        end(first);
        let ended = registered.take_ended();
        assert_eq!(
            (ended[0].0.volume, ended[0].1, ended.len()),
            (volumes[0], false, 1)
        );
        end(second);
        let ended = registered.take_ended();
        assert!(
            ended.len() == 2 && ended.iter().all(|(_, last)| *last),
            "{ended:?}"
        );
        assert_eq!(registered.list(), []);

        // A process that has ended already cannot be waited for.
        registered.add(&one, volumes[0], ("kms", &shared), None);
        assert_eq!(registered.list(), []);
    }
}
