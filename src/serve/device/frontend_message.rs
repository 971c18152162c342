//! The messages of a front-end, decoded once (vhost-user specification, "Front-end message types").
//!
//! [`FrontendMessage::rule`] is the table of what each message pauses, and how it is answered. A message that no feature of
//! ours leads to is not decoded, and ends the session: the protocol handler would end it as well.

use vhost::vhost_user::message::{
    FrontendReq, VhostUserConfig, VhostUserInflight, VhostUserLog, VhostUserMemory, VhostUserMemoryRegion,
    VhostUserSingleMemoryRegion, VhostUserU64, VhostUserVringAddr, VhostUserVringState,
};
use vm_memory::ByteValued;

use super::message::Message;

/// A message of the front-end, with the protocol crate's structures. Descriptors stay with the [`Message`].
pub(super) enum FrontendMessage {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    ResetDevice,
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    GetMaxMemSlots,
    SetMemTable(Vec<VhostUserMemoryRegion>),
    AddMemReg(VhostUserSingleMemoryRegion),
    RemMemReg,
    SetLogBase(VhostUserLog),
    SetVringNum(VhostUserVringState),
    SetVringAddr(VhostUserVringAddr),
    SetVringBase(VhostUserVringState),
    GetVringBase(VhostUserVringState),
    SetVringEnable(VhostUserVringState),
    SetVringKick(VringDescriptor),
    SetVringCall(VringDescriptor),
    SetVringErr(VringDescriptor),
    GetConfig,
    SetConfig { offset: u32, bytes: Vec<u8> },
    SetBackendReqFd,
    GetInflightFd(VhostUserInflight),
    SetInflightFd(VhostUserInflight),
}

/// What a message says of a ring's kick, call or error descriptor.
#[derive(Clone, Copy, Debug)]
pub(super) struct VringDescriptor {
    /// The ring.
    pub index: u8,
    /// Whether there is a descriptor; if not, the ring must be polled.
    pub is_there: bool,
}

impl From<VhostUserU64> for VringDescriptor {
    fn from(message: VhostUserU64) -> Self {
        // Bits 0 to 7 are the index, bit 8 says that there is no descriptor. The others are reserved.
        let [index, flags, ..] = message.value.to_le_bytes();
        Self {
            index,
            is_there: flags & 1 == 0,
        }
    }
}

/// Which rings a message concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    All,
    One(usize),
}

impl Scope {
    /// Whether it concerns the ring `index`.
    pub(super) fn contains(self, index: usize) -> bool {
        self == Scope::All || self == Scope::One(index)
    }

    /// The ring that a message names. No vector is so long that the conversion would matter.
    fn one(index: u32) -> Self {
        Scope::One(usize::try_from(index).unwrap_or(usize::MAX))
    }
}

/// What a message is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// Data, always.
    Data,
    /// Whether it succeeded, if its sender has asked to know (REPLY_ACK).
    Acknowledgement,
}

/// A line of the table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rule {
    /// The rings that are stopped while the message is applied; none if no I/O stands on what it changes.
    pub pauses: Option<Scope>,
    pub reply: Reply,
}

/// A message is malformed, or belongs to a feature that is not offered.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("{} is not valid, or asks for what was not offered; the front-end must be a vhost-user-blk device, as of QEMU 7.2", named(*.0))]
pub(super) struct Refused(pub u32);

/// A message as the specification names it.
pub(super) fn named(message: u32) -> String {
    FrontendReq::try_from(message).map_or_else(
        |_| format!("message {message} of the front-end"),
        |known| format!("message {known:?} of the front-end"),
    )
}

impl FrontendMessage {
    /// Decodes `message`. Its values are not checked.
    pub(super) fn decode(message: &Message) -> Result<Self, Refused> {
        let body = message.body.as_slice();
        let state = || structure::<VhostUserVringState>(body);
        let number = || structure::<VhostUserU64>(body);
        let descriptor = || number().map(VringDescriptor::from);
        let code = FrontendReq::try_from(message.number()).map_err(|_| Refused(message.number()))?;
        let decoded = match code {
            FrontendReq::GET_FEATURES => Some(Self::GetFeatures),
            FrontendReq::SET_FEATURES => number().map(|features| Self::SetFeatures(features.value)),
            FrontendReq::SET_OWNER => Some(Self::SetOwner),
            FrontendReq::RESET_OWNER => Some(Self::ResetOwner),
            FrontendReq::RESET_DEVICE => Some(Self::ResetDevice),
            FrontendReq::GET_PROTOCOL_FEATURES => Some(Self::GetProtocolFeatures),
            FrontendReq::SET_PROTOCOL_FEATURES => {
                number().map(|features| Self::SetProtocolFeatures(features.value))
            }
            FrontendReq::GET_QUEUE_NUM => Some(Self::GetQueueNum),
            FrontendReq::GET_MAX_MEM_SLOTS => Some(Self::GetMaxMemSlots),
            FrontendReq::SET_MEM_TABLE => memory_table(body).map(Self::SetMemTable),
            FrontendReq::ADD_MEM_REG => structure(body).map(Self::AddMemReg),
            FrontendReq::REM_MEM_REG => Some(Self::RemMemReg),
            FrontendReq::SET_LOG_BASE => structure(body).map(Self::SetLogBase),
            FrontendReq::SET_VRING_NUM => state().map(Self::SetVringNum),
            FrontendReq::SET_VRING_ADDR => structure(body).map(Self::SetVringAddr),
            FrontendReq::SET_VRING_BASE => state().map(Self::SetVringBase),
            FrontendReq::GET_VRING_BASE => state().map(Self::GetVringBase),
            FrontendReq::SET_VRING_ENABLE => state().map(Self::SetVringEnable),
            FrontendReq::SET_VRING_KICK => descriptor().map(Self::SetVringKick),
            FrontendReq::SET_VRING_CALL => descriptor().map(Self::SetVringCall),
            FrontendReq::SET_VRING_ERR => descriptor().map(Self::SetVringErr),
            FrontendReq::GET_CONFIG => Some(Self::GetConfig),
            FrontendReq::SET_CONFIG => config(body),
            FrontendReq::SET_BACKEND_REQ_FD => Some(Self::SetBackendReqFd),
            FrontendReq::GET_INFLIGHT_FD => inflight(body).map(Self::GetInflightFd),
            FrontendReq::SET_INFLIGHT_FD => inflight(body).map(Self::SetInflightFd),
            _ => None,
        };
        decoded.ok_or(Refused(message.number()))
    }

    /// The table: what is paused while the message is applied, and how it is answered.
    pub(super) fn rule(&self) -> Rule {
        use Reply::{Acknowledgement, Data};
        let (pauses, reply) = match self {
            Self::GetFeatures | Self::GetProtocolFeatures | Self::GetQueueNum => (None, Data),
            Self::GetMaxMemSlots | Self::GetConfig | Self::GetInflightFd(_) => (None, Data),
            Self::SetOwner | Self::SetProtocolFeatures(_) => (None, Acknowledgement),
            Self::SetConfig { .. } | Self::SetBackendReqFd => (None, Acknowledgement),
            // The front-end waits for the answer in any case: after it nothing is marked in an earlier log.
            Self::SetLogBase(_) => (Some(Scope::All), Data),
            // An answer with the base says that nothing is in flight.
            Self::GetVringBase(ring) => (Some(Scope::one(ring.index)), Data),
            Self::SetVringNum(ring) | Self::SetVringBase(ring) | Self::SetVringEnable(ring) => {
                (Some(Scope::one(ring.index)), Acknowledgement)
            }
            Self::SetVringAddr(ring) => (Some(Scope::one(ring.index)), Acknowledgement),
            Self::SetVringKick(ring) | Self::SetVringCall(ring) | Self::SetVringErr(ring) => {
                (Some(Scope::one(ring.index.into())), Acknowledgement)
            }
            Self::SetMemTable(_) | Self::AddMemReg(_) | Self::RemMemReg => {
                (Some(Scope::All), Acknowledgement)
            }
            Self::SetFeatures(_) | Self::ResetOwner | Self::ResetDevice | Self::SetInflightFd(_) => {
                (Some(Scope::All), Acknowledgement)
            }
        };
        Rule { pauses, reply }
    }
}

/// The structure that `bytes` are, if they are as many as it has.
pub(super) fn structure<T: ByteValued + Default>(bytes: &[u8]) -> Option<T> {
    let mut structure = T::default();
    let target = structure.as_mut_slice();
    if target.len() != bytes.len() {
        return None;
    }
    target.copy_from_slice(bytes);
    Some(structure)
}

/// The regions of a memory table ("Memory regions description").
fn memory_table(body: &[u8]) -> Option<Vec<VhostUserMemoryRegion>> {
    let (head, regions) = body.split_at_checked(size_of::<VhostUserMemory>())?;
    let head: VhostUserMemory = structure(head)?;
    let regions = regions.chunks(size_of::<VhostUserMemoryRegion>());
    let regions: Vec<_> = regions.map(structure).collect::<Option<_>>()?;
    (regions.len() == usize::try_from(head.num_regions).ok()?).then_some(regions)
}

/// Memory that tracks requests in flight ("Inflight description"). The fields are 20 bytes; QEMU and others send a structure of C, which
/// has 4 more.
fn inflight(body: &[u8]) -> Option<VhostUserInflight> {
    let mut padded = [0; size_of::<VhostUserInflight>()];
    match body.len() {
        20 | 24 => padded[..body.len()].copy_from_slice(body),
        _ => return None,
    }
    structure(&padded)
}

/// A write to the configuration space ("Virtio device config space"). Its flags name the cause, which makes no difference.
fn config(body: &[u8]) -> Option<FrontendMessage> {
    let (head, bytes) = body.split_at_checked(size_of::<VhostUserConfig>())?;
    let head: VhostUserConfig = structure(head)?;
    (bytes.len() == usize::try_from(head.size).ok()?).then(|| FrontendMessage::SetConfig {
        offset: head.offset,
        bytes: bytes.to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(code: FrontendReq, body: &[u8]) -> Result<FrontendMessage, Refused> {
        FrontendMessage::decode(&Message::request(code, body))
    }

    #[test]
    fn a_body_of_another_length_than_its_structure_is_refused() {
        for (code, len) in [
            (FrontendReq::SET_FEATURES, 8),
            (FrontendReq::SET_PROTOCOL_FEATURES, 8),
            (FrontendReq::SET_VRING_NUM, 8),
            (FrontendReq::SET_VRING_BASE, 8),
            (FrontendReq::GET_VRING_BASE, 8),
            (FrontendReq::SET_VRING_ENABLE, 8),
            (FrontendReq::SET_VRING_KICK, 8),
            (FrontendReq::SET_VRING_ADDR, 40),
            (FrontendReq::ADD_MEM_REG, 40),
            (FrontendReq::SET_LOG_BASE, 16),
        ] {
            for wrong in (0..64).filter(|wrong| *wrong != len) {
                assert!(
                    decode(code, &vec![0; wrong]).is_err(),
                    "{code:?} of {wrong} bytes"
                );
            }
            assert!(decode(code, &vec![0; len]).is_ok(), "{code:?}");
        }
    }

    #[test]
    fn a_memory_table_has_as_many_regions_as_it_says() {
        let table = |says: u32, has: usize| {
            let head = u64::from(says).to_ne_bytes();
            decode(
                FrontendReq::SET_MEM_TABLE,
                &[&head[..], &vec![1; 32 * has]].concat(),
            )
        };
        let Ok(FrontendMessage::SetMemTable(regions)) = table(2, 2) else {
            panic!("two regions are refused");
        };
        assert_eq!(regions.len(), 2);
        assert_eq!({ regions[1].mmap_offset }, u64::from_ne_bytes([1; 8]));
        assert!(table(1, 2).is_err() && table(3, 2).is_err() && table(u32::MAX, 0).is_err());
    }

    #[test]
    fn a_write_to_the_configuration_is_as_long_as_it_says() {
        let write = |says: u32, has: usize| {
            let head: Vec<_> = [32, says, 0].into_iter().flat_map(u32::to_ne_bytes).collect();
            decode(FrontendReq::SET_CONFIG, &[head, vec![7; has]].concat())
        };
        let Ok(FrontendMessage::SetConfig { offset: 32, bytes }) = write(3, 3) else {
            panic!("three bytes are refused");
        };
        assert_eq!(bytes, [7; 3]);
        assert!(write(2, 3).is_err() && write(4, 3).is_err() && write(u32::MAX, 0).is_err());
    }

    #[test]
    fn a_ring_without_a_descriptor_is_known_by_bit_8() {
        for (value, index, is_there) in [(0_u64, 0, true), (0x105, 5, false), (0xff, 255, true)] {
            let Ok(FrontendMessage::SetVringCall(ring)) =
                decode(FrontendReq::SET_VRING_CALL, &value.to_ne_bytes())
            else {
                panic!("{value:#x} is refused");
            };
            assert_eq!((ring.index, ring.is_there), (index, is_there), "{value:#x}");
        }
    }
}
