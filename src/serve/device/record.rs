//! What a front-end has said, as far as it holds: with it another process continues the session.
//!
//! Of each kind of message that sets something, and of each ring, the last one is kept with its descriptors. What takes something back
//! removes it.

use std::collections::BTreeMap;
use std::io;

use vhost::vhost_user::message::{
    FrontendReq, MAX_ATTACHED_FD_ENTRIES, VhostUserMemory, VhostUserMemoryRegion,
    VhostUserSingleMemoryRegion, VhostUserVringState,
};
use vm_memory::ByteValued;

use super::foreign::Foreign;
use super::frontend_message::{FrontendMessage, structure};
use super::message::Message;

/// See the module's header.
#[derive(Default)]
pub(super) struct Record {
    messages: BTreeMap<Place, Message>,
    /// The memory table.
    memory: Vec<(VhostUserMemoryRegion, Foreign)>,
}

/// What a message sets, in the order in which messages are repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Owner,
    ProtocolFeatures,
    Features,
    BackendReqFd,
    // The memory table comes here.
    LogBase,
    InflightFd,
    VringNum(u32),
    VringBase(u32),
    VringAddr(u32),
    VringCall(u32),
    VringErr(u32),
    VringKick(u32),
    VringEnable(u32),
}

impl Place {
    fn of(content: &FrontendMessage) -> Option<Self> {
        use FrontendMessage as M;
        Some(match content {
            M::SetOwner => Self::Owner,
            M::SetProtocolFeatures(_) => Self::ProtocolFeatures,
            M::SetFeatures(_) => Self::Features,
            M::SetBackendReqFd => Self::BackendReqFd,
            M::SetLogBase(_) => Self::LogBase,
            M::SetInflightFd(_) => Self::InflightFd,
            M::SetVringNum(ring) => Self::VringNum(ring.index),
            M::SetVringAddr(ring) => Self::VringAddr(ring.index),
            M::SetVringCall(ring) => Self::VringCall(ring.index.into()),
            M::SetVringErr(ring) => Self::VringErr(ring.index.into()),
            M::SetVringKick(ring) => Self::VringKick(ring.index.into()),
            M::SetVringEnable(ring) => Self::VringEnable(ring.index),
            _ => return None,
        })
    }

    /// Whether it is before the memory table.
    fn is_before_memory(self) -> bool {
        self < Self::LogBase
    }
}

impl Record {
    /// A copy of `message` for [`Record::keep`]; none of one that leaves nothing to keep.
    ///
    /// # Errors
    /// If descriptors are exhausted.
    pub(super) fn copy(message: &Message, content: &FrontendMessage) -> io::Result<Option<Message>> {
        use FrontendMessage as M;
        let is_kept = Place::of(content).is_some() || matches!(content, M::SetMemTable(_) | M::AddMemReg(_));
        is_kept.then(|| message.try_clone()).transpose()
    }

    /// Takes note of a message that was applied, of which `copy` was made before.
    pub(super) fn keep(&mut self, content: &FrontendMessage, copy: Option<Message>, body: &[u8]) {
        use FrontendMessage as M;
        let mut fds = Vec::new();
        if let Some(mut copy) = copy {
            match Place::of(content) {
                Some(place) => drop(self.messages.insert(place, copy)),
                None => fds = copy.take_fds(),
            }
        }
        match content {
            M::SetMemTable(regions) => self.memory = regions.iter().copied().zip(fds).collect(),
            M::AddMemReg(region) => self.memory.extend(fds.into_iter().map(|fd| (**region, fd))),
            M::RemMemReg => {
                if let Some(removed) = structure::<VhostUserSingleMemoryRegion>(body) {
                    let at = removed.guest_phys_addr;
                    self.memory.retain(|(region, _)| { region.guest_phys_addr } != at);
                }
            }
            M::GetVringBase(ring) => {
                self.messages.remove(&Place::VringKick(ring.index));
                self.messages.remove(&Place::VringCall(ring.index));
            }
            M::ResetOwner => drop(self.messages.remove(&Place::Owner)),
            M::ResetDevice => self
                .messages
                .retain(|place, _| !matches!(place, Place::VringEnable(_))),
            _ => {}
        }
    }

    /// The messages that set all that is set, in an order that any process accepts. `bases` are how far each of the rings was served.
    ///
    /// # Errors
    /// If descriptors are exhausted.
    pub(super) fn repeated(&self, bases: &[u16]) -> io::Result<Vec<Message>> {
        let mut bases: BTreeMap<_, _> = (0..)
            .zip(bases)
            .map(|(index, base)| {
                let state = VhostUserVringState::new(index, u32::from(*base));
                let message = Message::request(FrontendReq::SET_VRING_BASE, state.as_slice());
                (Place::VringBase(index), message)
            })
            .collect();
        // A ring that was never set up has none.
        bases.retain(|place, _| match place {
            Place::VringBase(index) => self.messages.contains_key(&Place::VringAddr(*index)),
            _ => false,
        });
        let mut before = Vec::new();
        for (place, message) in &self.messages {
            match place.is_before_memory() {
                true => before.push(message.try_clone()?),
                false => drop(bases.insert(*place, message.try_clone()?)),
            }
        }
        before.extend(self.memory_table()?);
        before.extend(bases.into_values());
        Ok(before)
    }

    fn memory_table(&self) -> io::Result<Vec<Message>> {
        let (table, others) = self
            .memory
            .split_at(self.memory.len().min(MAX_ATTACHED_FD_ENTRIES));
        let Ok(count @ 1..) = u32::try_from(table.len()) else {
            return Ok(Vec::new());
        };
        let mut body = VhostUserMemory::new(count).as_slice().to_vec();
        table
            .iter()
            .for_each(|(region, _)| body.extend_from_slice(region.as_slice()));
        let mut message = Message::request(FrontendReq::SET_MEM_TABLE, &body);
        for (_, file) in table {
            message = message.with(file.try_clone()?);
        }
        let mut messages = vec![message];
        for (region, file) in others {
            let region = VhostUserSingleMemoryRegion::new(
                region.guest_phys_addr,
                region.memory_size,
                region.user_addr,
                region.mmap_offset,
            );
            let message = Message::request(FrontendReq::ADD_MEM_REG, region.as_slice());
            messages.push(message.with(file.try_clone()?));
        }
        Ok(messages)
    }
}
