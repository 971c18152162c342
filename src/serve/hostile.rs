//! Hostile callers of a served disk's control socket, a hostile key helper, and a hostile process in a handover: JSON messages, or
//! bytes that are none, with descriptors. It is the body of a fuzz target and of a test; nothing of it is in a build of the program.
//!
//! The disk is real, with its header in memory. All that both sides say is there before the first byte is read, and both end then. So
//! nothing waits, and each message is answered or refused.

use std::cell::RefCell;
use std::fs::File;
use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use sealblk_secmem::arena::SecretBytes;

use crate::attachment::{Attachment, By, Choice, HeaderClaim, Interface, Opener};
use crate::cipher::{KernelChoice, Sector, SectorSize};
use crate::control::peer::Peer;
use crate::control::privilege::Grants;
use crate::control::varlink;
use crate::control::wire::Connection;
use crate::device::hostile::{Bytes, handover_of_no_session};
use crate::device::{Claims, Disk, Handover};
use crate::key_helper::KeyHelper;
use crate::keys::binding::{self, CreateOptions};
use crate::keys::{
    Binding, KeyError, KeyId, KeyProvider, KeyState, Providers, Reach, RequestPurpose, Revocation,
};
use crate::sandbox::Sandbox;
use crate::storage::{Access, Backing, Others, ThisHost};
use crate::upgrade::{self, Giver, Origin};

/// Has callers, the helper and another process say what `input` holds.
///
/// # Panics
/// If this side does what it must not.
pub fn control(input: &[u8]) {
    HOST.with_borrow_mut(|host| host.get_or_insert_with(Host::new).play(&mut Bytes(input)));
}

thread_local! {
    static HOST: RefCell<Option<Host>> = const { RefCell::new(None) };
}

/// Of one input.
const MOST_MESSAGES: usize = 32;
const LIMIT: Duration = Duration::from_secs(5);
/// The front of the volume's file: the metadata, and the areas of its first keyslots.
const FRONT: usize = 1 << 20;
const CAPACITY: u64 = 64 << 10;

/// What all inputs have in common.
struct Host {
    front: Vec<u8>,
    len: u64,
    slot_secret: Vec<u8>,
    handover: Handover,
}

/// Keeps the slot secret of the one volume that is bound to it.
#[derive(Debug, Default)]
struct Known(Mutex<Vec<u8>>);

impl KeyProvider for Known {
    fn name(&self) -> &str {
        "known"
    }

    fn create_kek(&self) -> Result<KeyId, KeyError> {
        unreachable!("a volume is bound, and no more")
    }

    fn wrap(&self, _: &Binding<'_>, secret: &SecretBytes) -> Result<Vec<u8>, KeyError> {
        *self.0.lock().unwrap() = secret.to_vec();
        Ok(vec![7; 60])
    }

    fn unwrap(&self, _: &Binding<'_>, _: &[u8]) -> Result<SecretBytes, KeyError> {
        unreachable!("a volume is bound, and no more")
    }

    fn state(&self, _: &KeyId) -> Result<KeyState, KeyError> {
        Ok(KeyState::Active)
    }

    fn revoke(&self, _: &KeyId, _: Revocation) -> Result<Reach, KeyError> {
        unreachable!("a volume is bound, and no more")
    }

    fn check(&self) -> Result<(), KeyError> {
        Ok(())
    }
}

/// A file in memory, and a path that leads to it.
fn memory_file(len: u64) -> (File, PathBuf) {
    let file = File::from(memfd_create("volume", MemfdFlags::CLOEXEC).unwrap());
    ftruncate(&file, len).unwrap();
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    (file, path)
}

impl Host {
    fn new() -> Self {
        let known = Known::default();
        let (file, path) = memory_file(0);
        let (backing, _claim) = Backing::claimed(&path, Access::ReadWrite).unwrap();
        let options = CreateOptions {
            capacity: Some(CAPACITY),
            sector_size: SectorSize::B512,
            label: "",
            binding: Some((&known, &KeyId("key".to_owned()))),
            recovery_key: None,
            overwrite: false,
        };
        binding::create(&backing, None, &options).unwrap();
        let mut front = vec![0; FRONT];
        file.read_exact_at(&mut front, 0).unwrap();
        Self {
            front,
            len: file.metadata().unwrap().len(),
            slot_secret: known.0.into_inner().unwrap(),
            handover: handover_of_no_session(),
        }
    }

    fn play(&self, input: &mut Bytes<'_>) {
        let Some(setup) = input.byte() else { return };
        let (caller, callers_end) = UnixStream::pair().unwrap();
        let (helper, helpers_end) = UnixStream::pair().unwrap();
        let (other, others_end) = UnixStream::pair().unwrap();
        for _ in 0..MOST_MESSAGES {
            if self
                .say(input, [&callers_end, &helpers_end, &others_end])
                .is_none()
            {
                break;
            }
        }
        for end in [&callers_end, &helpers_end, &others_end] {
            end.shutdown(Shutdown::Write).unwrap();
        }
        upgrade::received(&other);
        let helper = KeyHelper::over(helper, LIMIT);
        match setup & 3 {
            0 => self.ask(&helper),
            1 => self.serve(caller, helper, By::Passphrase { once: false }),
            _ => self.serve(caller, helper, By::Providers),
        }
    }

    /// Has one of them say the next thing.
    fn say(&self, input: &mut Bytes<'_>, [caller, helper, other]: [&UnixStream; 3]) -> Option<()> {
        let who = input.byte()?;
        let kinds = match input.byte()? % 6 {
            5 => &[],
            count => input.take(count.into())?,
        };
        // What nobody writes to any more, so that whoever reads it waits for nothing.
        let things: Vec<_> = kinds.iter().map(|kind| self.thing(*kind)).collect();
        let fds: Vec<_> = things.iter().map(|(thing, _)| thing.as_fd()).collect();
        let len = input.number()?;
        let text = input.take(input.0.len().min(len.into()))?;
        match who % 5 {
            0 => send(caller, &[text, &[0]].concat(), &fds),
            1 => send(helper, &[text, &[0]].concat(), &fds),
            2 => send(caller, text, &fds),
            3 => send(helper, text, &fds),
            _ => {
                let (number, body) = text.split_at_checked(4)?;
                let len = u32::try_from(body.len()).unwrap().to_ne_bytes();
                send(other, &[number, &1_u32.to_ne_bytes(), &len, body].concat(), &fds);
            }
        }
        // The other ends of sockets have to stay until all is done, or there is nobody to hand over to.
        KEPT.with_borrow_mut(|kept| kept.extend(things.into_iter().filter_map(|(_, end)| end)));
        Some(())
    }

    /// What is behind a descriptor, and its other end.
    fn thing(&self, kind: u8) -> (OwnedFd, Option<UnixStream>) {
        let pipe = |content: &[u8]| {
            let (take, give) = std::io::pipe().unwrap();
            (&give).write_all(content).unwrap();
            OwnedFd::from(take)
        };
        match kind % 6 {
            0 => (pipe(&self.slot_secret), None),
            1 => (pipe(&[7; 32]), None),
            2 => (pipe(&[]), None),
            3 => (File::open("/dev/null").unwrap().into(), None),
            // A process that is ready, and one that is not.
            4 => {
                let (ours, theirs) = UnixStream::pair().unwrap();
                let next = br#"{"process":1}"#;
                let ready = [0x5ea1_0007, 1, 13].map(u32::to_ne_bytes);
                send(&theirs, &[ready.as_flattened(), next].concat(), &[]);
                theirs.shutdown(Shutdown::Write).unwrap();
                (ours.into(), Some(theirs))
            }
            _ => (UnixStream::pair().unwrap().0.into(), None),
        }
    }

    /// Asks the helper for all that it can be asked for.
    fn ask(&self, helper: &KeyHelper) {
        let (file, path) = memory_file(0);
        let _ = helper.grants();
        let _ = helper.group("kvm");
        let _ = helper.open(&file, &path);
        let _ = helper.passphrase();
        let providers = helper.providers(RequestPurpose::Attach);
        let _ = providers.default_name();
        let provider = providers.provider("known").unwrap();
        let key_id = KeyId("key".to_owned());
        let bound = Binding {
            volume: uuid::Uuid::nil(),
            provider: "known",
            key_id: &key_id,
            keyslot: 0,
        };
        let _ = provider.create_kek();
        let _ = provider.unwrap(&bound, &[7; 60]);
        let _ = provider.wrap(&bound, &SecretBytes::zeroed(32).unwrap());
        let _ = provider.state(&key_id);
        let _ = provider.revoke(&key_id, Revocation::Deactivate);
        let _ = provider.check();
        helper.detach(true, LIMIT);
    }

    /// Answers the caller.
    fn serve(&self, caller: UnixStream, helper: KeyHelper, by: By) {
        let (file, path) = memory_file(self.len);
        file.write_all_at(&self.front, 0).unwrap();
        let backing = Backing::open(&path, Access::ReadWrite).unwrap();
        let attached = backing.attach(Others::Refused).unwrap();
        let data = backing.data_file(512, &attached.fence()).unwrap();
        let disk = Disk::new(
            CAPACITY / Sector::LEN,
            Arc::new(data),
            Claims::now(attached).unwrap(),
            SectorSize::B512,
            false,
            true,
            "serial",
        );
        let opener = Opener {
            disk: backing,
            header: None,
            host: ThisHost::find().host,
            by,
            purpose: RequestPurpose::Attach,
            helper,
            kernel: KernelChoice::Fastest,
        };
        let identity = opener.locked().unwrap().identity().unwrap();
        let claim = HeaderClaim::new(&opener.disk, Choice::Off, None);
        let served = Attachment::new(opener, Arc::new(disk.unwrap()), identity, claim);
        let interface = Interface::new(Arc::clone(&served), Grants::default(), Sandbox::default(), None);
        let giver = Giver {
            served,
            handover: self.handover.clone(),
            queues: 1,
            control: File::open("/dev/null").unwrap().into(),
            gate: Arc::default(),
            origin: Origin::of_this("--none"),
            front_ends_name: None,
            control_name: None,
            current: Mutex::default(),
        };
        let peer = Peer::of(&caller).unwrap();
        let mut connection = Connection::new(caller, LIMIT);
        let _ = varlink::serve(&mut connection, &peer, &[&interface, &giver]);
        KEPT.take();
    }
}

thread_local! {
    static KEPT: RefCell<Vec<UnixStream>> = const { RefCell::new(Vec::new()) };
}

/// What does not fit into the socket is lost.
fn send(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(5))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let _ = rustix::net::sendmsg(stream, &[IoSlice::new(bytes)], &mut control, flags);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    #[test]
    fn no_caller_no_helper_and_no_other_process_breaks_a_served_disk() {
        inputs::run("control", Duration::from_secs(6), super::control);
    }
}
