//! Events of keys and disks: each goes at once to the log (the journal for a service), and to the watchers of a control
//! socket.
//!
//! An event is a JSON object: its `time` (RFC 3339), its name as `event`, and further fields. Its name and fields have the
//! same meaning in the audit log, in the log and in the stream.

use std::fmt;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{Duration, SystemTime};

use serde_json::{Map, Value};

use super::peer::Peer;
use super::quota::{Limits, Quota, Standing, UserQuota, UserShare};
use sealblk_base::mutex::lock;

/// Everything that is told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The agent began to answer.
    AgentStarted,
    /// A provider made a KEK.
    KeyCreated,
    /// A slot secret was wrapped under a KEK.
    KeyBound,
    /// A slot secret was unwrapped and given out.
    KeyReleased,
    /// The agent was given a KEK that it had not fetched.
    KeyPushed,
    /// Somebody asked for a KEK's state.
    KeyLookedUp,
    /// A provider was proved to work.
    ProviderChecked,
    /// A KEK is about to be taken out of use.
    KeyRevoked,
    /// A provider is about to be removed.
    ProviderRemoved,
    /// Somebody is about to erase a volume.
    ErasureBegun,
    /// Somebody has erased a volume.
    VolumeErased,
    /// Somebody has the receipt of that.
    ReceiptIssued,
    /// A certificate with which this host and a provider's servers know each other is to be renewed.
    CertificateExpiring,
    /// A volume is none of this host's guests any more.
    VolumeForgotten,
    /// A caller of the agent lacks the privilege.
    KeyRefused,
    /// The provider has no such KEK.
    KeyMissing,
    /// The provider does not answer.
    KeyServerUnreachable,
    /// This host cannot hold the key.
    KeyRefusedByHost,
    /// The provider cannot do it for another reason.
    KeyFailed,
    /// The process that served a volume has ended.
    DiskUnregistered,
    /// A served disk's key was taken away, or is not to be had.
    DiskLocked,
    /// A served disk has its key.
    DiskUnlocked,
    /// A process has taken a disk over from another one, which served it before.
    DiskTakenOver,
    /// It has not.
    UpgradeFailed,
    /// A served disk's volume was bound to another KEK.
    DiskRekeyed,
    /// It was not.
    RekeyFailed,
    /// A served disk has another size.
    DiskResized,
    /// Requests of a guest wait, since storage has failed them.
    RequestsHeld,
    /// None waits any more.
    RequestsResumed,
    /// A caller of a served disk has used its privilege.
    PrivilegeUsed,
    /// A caller of a served disk lacks the privilege.
    PrivilegeRefused,
    /// A broker began to answer.
    BrokerStarted,
    /// A broker knows a host by its TPM.
    HostEnrolled,
    /// A broker does not believe a host, or does not know it.
    HostRefused,
    /// A broker has given a key to a host.
    ResourceReleased,
    /// A broker's operator makes a key.
    ResourceAdded,
    /// A broker's operator destroys a key.
    ResourceRemoved,
    /// A broker's operator lets a host enrol.
    HostAdmitted,
    /// A broker's operator has it forget a host.
    HostRemoved,
    /// A broker's operator says what hosts have to have booted.
    ReferenceSet,
}

impl Event {
    /// All of them.
    #[cfg(test)]
    pub const ALL: [Self; 40] = [
        Self::AgentStarted,
        Self::KeyCreated,
        Self::KeyBound,
        Self::KeyReleased,
        Self::KeyPushed,
        Self::KeyLookedUp,
        Self::ProviderChecked,
        Self::KeyRevoked,
        Self::ProviderRemoved,
        Self::ErasureBegun,
        Self::VolumeErased,
        Self::ReceiptIssued,
        Self::CertificateExpiring,
        Self::VolumeForgotten,
        Self::KeyRefused,
        Self::KeyMissing,
        Self::KeyServerUnreachable,
        Self::KeyRefusedByHost,
        Self::KeyFailed,
        Self::DiskUnregistered,
        Self::DiskLocked,
        Self::DiskUnlocked,
        Self::DiskTakenOver,
        Self::UpgradeFailed,
        Self::DiskRekeyed,
        Self::RekeyFailed,
        Self::DiskResized,
        Self::RequestsHeld,
        Self::RequestsResumed,
        Self::PrivilegeUsed,
        Self::PrivilegeRefused,
        Self::BrokerStarted,
        Self::HostEnrolled,
        Self::HostRefused,
        Self::ResourceReleased,
        Self::ResourceAdded,
        Self::ResourceRemoved,
        Self::HostAdmitted,
        Self::HostRemoved,
        Self::ReferenceSet,
    ];

    /// The event in words.
    fn what(self) -> &'static str {
        match self {
            Self::AgentStarted => "the agent answers",
            Self::KeyCreated => "a key was made",
            Self::KeyBound => "a volume was bound to a key",
            Self::KeyReleased => "a volume's key was released",
            Self::KeyPushed => "a key was pushed",
            Self::KeyLookedUp => "a key was looked up",
            Self::ProviderChecked => "a provider works",
            Self::KeyRevoked => "a key is about to be revoked",
            Self::ProviderRemoved => "a provider is about to be removed",
            Self::ErasureBegun => "a volume is about to be erased",
            Self::VolumeErased => "a volume was erased",
            Self::ReceiptIssued => "the receipt of an erasure was issued",
            Self::CertificateExpiring => "a certificate is about to expire",
            Self::VolumeForgotten => "a volume's keys were dropped",
            Self::KeyRefused => "a caller was refused a key",
            Self::KeyMissing => "a provider has no such key",
            Self::KeyServerUnreachable => "a provider does not answer",
            Self::KeyRefusedByHost => "this host cannot hold a key",
            Self::KeyFailed => "a key is not available",
            Self::DiskUnregistered => "a volume is no longer served",
            Self::DiskLocked => "the disk is locked, and the guest's requests wait",
            Self::DiskUnlocked => "the disk is unlocked",
            Self::DiskTakenOver => "a process has taken the disk over",
            Self::UpgradeFailed => "the disk stays with its process, and was not taken over",
            Self::DiskRekeyed => "the volume is bound to another key",
            Self::RekeyFailed => "the rekey failed: the volume keeps its key",
            Self::DiskResized => "the disk has another size",
            Self::RequestsHeld => "the storage fails, and the guest's requests wait",
            Self::RequestsResumed => "the guest's requests no longer wait for the storage",
            Self::PrivilegeUsed => "a caller was permitted",
            Self::PrivilegeRefused => "a caller was refused",
            Self::BrokerStarted => "the broker answers",
            Self::HostEnrolled => "a host is enrolled by its TPM",
            Self::HostRefused => "a host was refused",
            Self::ResourceReleased => "a key was released to a host",
            Self::ResourceAdded => "a key is made",
            Self::ResourceRemoved => "a key is destroyed",
            Self::HostAdmitted => "a host is allowed to enrol",
            Self::HostRemoved => "a host is removed",
            Self::ReferenceSet => "reference values are set",
        }
    }

    /// Whether somebody may have to do something about it.
    fn is_warning(self, fields: &Value) -> bool {
        match self {
            Self::CertificateExpiring
            | Self::KeyRefused
            | Self::KeyMissing
            | Self::KeyServerUnreachable
            | Self::KeyRefusedByHost
            | Self::KeyFailed
            | Self::RekeyFailed
            | Self::UpgradeFailed
            | Self::PrivilegeRefused
            | Self::HostRefused => true,
            Self::DiskLocked => fields["by"] == "no_key",
            _ => false,
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// The most that watch at a time.
const ROOMS: Limits = Limits {
    own: 64,
    granted: 64,
    stranger: 0,
    sure: 4,
};
/// The most events that one may be behind.
const MAX_BEHIND: usize = 1024;

/// Where a process tells its events.
#[derive(Debug, Default)]
pub struct Events {
    watchers: Mutex<Vec<Watcher>>,
    places: Arc<UserQuota>,
}

#[derive(Debug)]
struct Watcher {
    sender: SyncSender<Arc<Value>>,
    /// Gone with its [`Watch`].
    place: Weak<UserShare>,
}

/// The events from now on.
#[derive(Debug)]
pub struct Watch {
    events: Receiver<Arc<Value>>,
    _place: Arc<UserShare>,
}

/// What a watcher gets next.
#[derive(Debug)]
pub enum Next {
    /// This has happened.
    Event(Arc<Value>),
    /// Nothing has, for as long as was waited.
    Quiet,
    /// The watcher was too slow, and misses what happens now.
    Behind,
}

impl Events {
    /// Tells of an event, with its `fields`, which are a JSON object.
    pub fn tell(&self, event: Event, fields: &Value) {
        log(event, fields);
        let mut watchers = self.lock();
        if watchers.is_empty() {
            return;
        }
        let mut told = Map::new();
        let time = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
        told.insert("time".into(), time.into());
        told.insert("event".into(), event.to_string().into());
        if let Value::Object(fields) = fields {
            told.extend(fields.clone());
        }
        let told = Arc::new(Value::Object(told));
        watchers.retain(|watcher| match watcher.sender.try_send(Arc::clone(&told)) {
            Ok(()) => true,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => false,
        });
    }

    /// Hears all events from now on for `peer`, who may, unless too many do.
    pub fn watch(&self, peer: &Peer) -> Option<Watch> {
        let standing = Standing::of(peer, |_| true);
        let place = Arc::new(Quota::take_of(&self.places, ROOMS, peer.user, standing)?);
        let (sender, events) = sync_channel(MAX_BEHIND);
        let mut watchers = self.lock();
        watchers.retain(|watcher| watcher.place.strong_count() > 0);
        watchers.push(Watcher {
            sender,
            place: Arc::downgrade(&place),
        });
        Some(Watch {
            events,
            _place: place,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Watcher>> {
        lock(&self.watchers)
    }
}

impl Watch {
    /// Waits for the next event.
    pub fn next(&self, timeout: Duration) -> Next {
        match self.events.recv_timeout(timeout) {
            Ok(event) => Next::Event(event),
            Err(RecvTimeoutError::Timeout) => Next::Quiet,
            Err(RecvTimeoutError::Disconnected) => Next::Behind,
        }
    }
}

/// The target of these records.
pub const TARGET: &str = module_path!();

/// A record of the log has its fields apart, so that the journal can be searched by them.
fn log(event: Event, fields: &Value) {
    let text = |name: &str| fields.get(name).and_then(Value::as_str);
    let number = |name: &str| fields.get(name).and_then(Value::as_u64);
    macro_rules! log {
        ($level:expr) => {
            tracing::event!(
                $level,
                event = %event,
                volume = text("volume"),
                host = text("host"),
                peer = text("peer"),
                provider = text("provider"),
                key_id = text("keyId"),
                purpose = text("purpose"),
                privilege = text("privilege"),
                by = text("by"),
                reason = text("reason"),
                hop = text("hop"),
                user = number("user"),
                process = number("process"),
                "{}{}",
                event.what(),
                text("message").map(|more| format!(": {more}")).unwrap_or_default()
            )
        };
    }
    match event.is_warning(fields) {
        true => log!(tracing::Level::WARN),
        false => log!(tracing::Level::INFO),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn peer(user: u32) -> Peer {
        Peer {
            user,
            groups: Vec::new(),
            process: 1,
        }
    }

    #[test]
    fn who_watches_hears_everything_and_who_does_not_listen_is_let_go() {
        let events = Events::default();
        events.tell(Event::KeyCreated, &json!({}));
        let [quick, slow] = [1, 2].map(|user| events.watch(&peer(user)).unwrap());
        for n in 0..=MAX_BEHIND {
            events.tell(Event::KeyReleased, &json!({ "n": n }));
            let Next::Event(told) = quick.next(Duration::ZERO) else {
                panic!("{n}");
            };
            assert_eq!((&told["event"], &told["n"]), (&json!("KeyReleased"), &json!(n)));
        }
        assert!(matches!(quick.next(Duration::ZERO), Next::Quiet));
        for n in 0..MAX_BEHIND {
            assert!(matches!(slow.next(Duration::ZERO), Next::Event(told) if told["n"] == n));
        }
        assert!(matches!(slow.next(Duration::ZERO), Next::Behind));
        assert_eq!(events.lock().len(), 1);
        drop(quick);
        events.tell(Event::KeyCreated, &json!({}));
        assert!(events.lock().is_empty());
    }

    #[test]
    fn no_more_watch_than_may_and_who_leaves_makes_room() {
        let events = Events::default();
        let all = |user| std::iter::from_fn(|| events.watch(&peer(user))).collect::<Vec<_>>();
        let [one, other, root] = [4_000_001, 4_000_002, 0].map(all);
        assert!(one.len() > other.len() && !other.is_empty());
        assert_eq!(root.len(), ROOMS.own);
        drop((one, other, root));
        let watches = all(0);
        assert_eq!((watches.len(), events.lock().len()), (ROOMS.own, ROOMS.own));
    }

    #[test]
    fn every_event_stands_in_the_documentation() {
        let page = include_str!("../../docs/events.md");
        for event in Event::ALL {
            assert!(page.contains(&format!("| `{event}` |")), "{event}");
        }
    }
}
