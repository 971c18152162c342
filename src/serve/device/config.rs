//! What the device offers: feature bits, and the configuration space (virtio 1.2 §5.2.3 and §5.2.4).

use std::mem::offset_of;

use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost::vhost_user::message::{VHOST_USER_CONFIG_SIZE, VhostUserVirtioFeatures};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES, virtio_blk_config,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::disk::Disk;
use super::limits::{MAX_DISCARD_SECTORS, MAX_SECTOR_RANGES, MAX_WRITE_ZEROES_SECTORS, SEG_MAX, SIZE_MAX};
use super::request::SECTOR;
use crate::cipher::Sector;
use crate::storage::PAGE;

/// VHOST_USER_F_PROTOCOL_FEATURES.
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// VHOST_F_LOG_ALL: no feature of the driver's, but the front-end's way to say that it logs what is written to guest memory.
const LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();

/// The bytes of the configuration space that have a meaning here: up to and with `write_zeroes_may_unmap`, padded.
const CONFIG_LEN: usize = offset_of!(virtio_blk_config, max_secure_erase_sectors);

/// What each release that has `sealblk upgrade` shows of it.
pub(super) const LEAST_LEN: usize = offset_of!(virtio_blk_config, max_secure_erase_sectors);

/// The feature bits of `disk`.
pub(super) fn features(disk: &Disk) -> u64 {
    let mut features = PROTOCOL_FEATURES | LOG_ALL;
    let mut offer = |bit: u32, offered: bool| features |= u64::from(offered) << bit;
    offer(VIRTIO_F_VERSION_1, true);
    offer(VIRTIO_RING_F_INDIRECT_DESC, true);
    offer(VIRTIO_RING_F_EVENT_IDX, true);
    offer(VIRTIO_BLK_F_SIZE_MAX, true);
    offer(VIRTIO_BLK_F_SEG_MAX, true);
    offer(VIRTIO_BLK_F_BLK_SIZE, true);
    offer(VIRTIO_BLK_F_TOPOLOGY, true);
    offer(VIRTIO_BLK_F_MQ, true);
    // A read-only disk takes flushes too: firmware sends one before it boots, and gives up if that is refused.
    offer(VIRTIO_BLK_F_FLUSH, true);
    offer(VIRTIO_BLK_F_RO, disk.read_only);
    offer(VIRTIO_BLK_F_WRITE_ZEROES, !disk.read_only);
    offer(VIRTIO_BLK_F_DISCARD, disk.discard && !disk.read_only);
    features
}

/// What front-end and driver have agreed on (SET_FEATURES), by which the session behaves. Before they have: nothing.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Agreed(u64);

/// A front-end asks for features that are not offered. A running guest keeps what it was offered when it started, and its
/// front-end repeats that at each reconnect, also if something else is offered by then.
#[derive(Debug, thiserror::Error)]
#[error(
    "the guest was offered features that this disk does not have: {}; serve the disk with the options that it was served \
     with when QEMU started, or stop QEMU and start it again",
    names(*missing)
)]
pub struct NotOffered {
    missing: u64,
}

impl Agreed {
    /// Takes `features` if `disk` offers them.
    ///
    /// CONFIG_WCE is not offered: the back-end must keep what a driver chooses by it, and front-ends do not repeat it
    /// to the next back-end. Earlier builds did offer it, and a guest that agreed on it then still comes with it.
    ///
    /// # Errors
    /// If they are not offered.
    pub(super) fn on(features: u64, disk: &Disk) -> Result<Self, NotOffered> {
        let offered_once = u64::from(!disk.read_only) << VIRTIO_BLK_F_CONFIG_WCE;
        match features & !self::features(disk) & !offered_once {
            0 => Ok(Self(features)),
            missing => Err(NotOffered { missing }),
        }
    }

    /// The features that are the protocol handler's: not those that are accepted and not offered, nor the log, which it would keep
    /// otherwise than the front-end has it.
    pub(super) fn of_handler(self) -> u64 {
        self.0 & !(1 << VIRTIO_BLK_F_CONFIG_WCE) & !LOG_ALL
    }

    /// All of them.
    pub(super) fn bits(self) -> u64 {
        self.0
    }

    /// Whether the front-end logs what is written to the driver's buffers.
    pub(super) fn log_all(self) -> bool {
        self.0 & LOG_ALL != 0
    }

    /// Whether the driver has CONFIG_WCE of an earlier version.
    pub(super) fn has_config_wce(self) -> bool {
        self.0 & (1 << VIRTIO_BLK_F_CONFIG_WCE) != 0
    }

    /// Whether a write must be on stable storage before it is answered (virtio 1.2 §5.2.6.2): for a driver that cannot
    /// flush, as firmware and boot loaders are, and for one with CONFIG_WCE, which may have chosen so and then sends no
    /// flushes.
    pub(super) fn write_through(self) -> bool {
        self.0 & (1 << VIRTIO_BLK_F_FLUSH) == 0 || self.has_config_wce()
    }
}

/// Feature bits in words, with the option that they depend on.
fn names(missing: u64) -> String {
    const OPTIONS: [(u32, &str); 4] = [
        (VIRTIO_BLK_F_RO, "read-only (--read-only)"),
        (VIRTIO_BLK_F_DISCARD, "discard (--discard)"),
        (VIRTIO_BLK_F_WRITE_ZEROES, "write zeroes (not with --read-only)"),
        (VIRTIO_BLK_F_CONFIG_WCE, "a write cache (not with --read-only)"),
    ];
    let name = |bit: u32| match OPTIONS.iter().find(|(option, _)| *option == bit) {
        Some((_, name)) => (*name).to_owned(),
        None => format!("bit {bit}"),
    };
    let bits = (0..u64::BITS).filter(|&bit| missing & (1 << bit) != 0);
    bits.map(name).collect::<Vec<_>>().join(", ")
}

/// The protocol features. By REPLY_ACK a front-end knows that the rings were drained for a message.
pub(super) fn protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
}

/// `size` bytes of the configuration space from `offset` on; past its end there are zeros, so that a front-end that
/// knows more fields than we do gets what it asked for. Nothing if that is past any configuration space.
pub(super) fn read(disk: &Disk, num_queues: u16, offset: u32, size: u32) -> Vec<u8> {
    let space = space(disk, num_queues);
    match offset.checked_add(size) {
        Some(end) if end <= VHOST_USER_CONFIG_SIZE => (offset as usize..end as usize)
            .map(|at| space.get(at).copied().unwrap_or(0))
            .collect(),
        _ => Vec::new(),
    }
}

/// A write to the configuration space is refused.
#[derive(Debug, thiserror::Error)]
#[error("{len} bytes at offset {offset} are not writable")]
pub(super) struct NotWritable {
    offset: u32,
    len: usize,
}

/// A write to the configuration space. All that a driver can write is `writeback`, if it has CONFIG_WCE; it makes no
/// difference, since each of its writes is put on stable storage anyway.
pub(super) fn write(agreed: Agreed, offset: u32, bytes: &[u8]) -> Result<(), NotWritable> {
    match bytes {
        [0 | 1] if offset as usize == offset_of!(virtio_blk_config, wce) && agreed.has_config_wce() => Ok(()),
        _ => Err(NotWritable {
            offset,
            len: bytes.len(),
        }),
    }
}

/// A page of storage in sectors.
const PAGE_SECTORS: u8 = 8;
const _: () = assert!(PAGE == PAGE_SECTORS as usize * 512);

/// The bytes of the configuration space that have a meaning.
pub(super) fn space(disk: &Disk, num_queues: u16) -> [u8; CONFIG_LEN] {
    let mut space = [0; CONFIG_LEN];
    let mut put = |at: usize, field: &[u8]| space[at..at + field.len()].copy_from_slice(field);
    let granule = disk.sector_size.sectors();

    put(
        offset_of!(virtio_blk_config, capacity),
        &disk.shown().to_le_bytes(),
    );
    put(offset_of!(virtio_blk_config, size_max), &SIZE_MAX.to_le_bytes());
    put(offset_of!(virtio_blk_config, seg_max), &SEG_MAX.to_le_bytes());
    put(
        offset_of!(virtio_blk_config, blk_size),
        &(u32::from(granule) * SECTOR).to_le_bytes(),
    );
    // Topology: the physical block is a page of storage, for each logical block size; no preference beyond it.
    let blocks_a_page = PAGE_SECTORS / granule;
    let [physical_block_exp, ..] = blocks_a_page.ilog2().to_le_bytes();
    put(
        offset_of!(virtio_blk_config, physical_block_exp),
        &[physical_block_exp],
    );
    put(
        offset_of!(virtio_blk_config, min_io_size),
        &u16::from(blocks_a_page).to_le_bytes(),
    );
    // A driver with FLUSH is served in writeback mode. One that looks without it flushes for nothing, at worst.
    put(offset_of!(virtio_blk_config, wce), &[1]);
    put(
        offset_of!(virtio_blk_config, num_queues),
        &num_queues.to_le_bytes(),
    );
    // Limits stand also where the feature is not offered: a driver that looks at them anyway must not see zeros.
    put(
        offset_of!(virtio_blk_config, max_discard_sectors),
        &MAX_DISCARD_SECTORS.to_le_bytes(),
    );
    put(
        offset_of!(virtio_blk_config, max_discard_seg),
        &u32::from(MAX_SECTOR_RANGES).to_le_bytes(),
    );
    // A discard that is smaller than storage can give back only costs time.
    let of_storage = disk.file.discard_alignment() / Sector::LEN;
    let discard_alignment = u32::try_from(of_storage)
        .unwrap_or(MAX_DISCARD_SECTORS)
        .clamp(PAGE_SECTORS.into(), MAX_DISCARD_SECTORS);
    put(
        offset_of!(virtio_blk_config, discard_sector_alignment),
        &discard_alignment.to_le_bytes(),
    );
    put(
        offset_of!(virtio_blk_config, max_write_zeroes_sectors),
        &MAX_WRITE_ZEROES_SECTORS.to_le_bytes(),
    );
    put(
        offset_of!(virtio_blk_config, max_write_zeroes_seg),
        &u32::from(MAX_SECTOR_RANGES).to_le_bytes(),
    );
    space
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::claims::Claims;
    use super::*;
    use crate::cipher::SectorSize;
    use crate::storage::{Access, Backing, Others};

    fn disk(read_only: bool, discard: bool) -> Disk {
        let file = tempfile::NamedTempFile::new().unwrap();
        let backing = Backing::open(file.path(), Access::ReadWrite).unwrap();
        let attached = backing.attach(Others::Refused).unwrap();
        let file = Arc::new(backing.data_file(512, &attached.fence()).unwrap());
        let claims = Claims::now(attached).unwrap();
        Disk::new(2048, file, claims, SectorSize::B512, read_only, discard, "serial").unwrap()
    }

    #[test]
    fn a_prefix_of_any_length_is_answered_with_that_length() {
        let disk = disk(false, false);
        for size in [0, 1, 8, 60, 72, 96, 256] {
            assert_eq!(read(&disk, 4, 0, size).len(), size as usize);
        }
        assert_eq!(read(&disk, 4, 0, 8), 2048_u64.to_le_bytes());
        assert_eq!(read(&disk, 4, 34, 2), 4_u16.to_le_bytes());
        assert!(read(&disk, 4, 0, VHOST_USER_CONFIG_SIZE + 1).is_empty());
        assert!(read(&disk, 4, u32::MAX, u32::MAX).is_empty());
    }

    #[test]
    fn only_writeback_can_be_written_and_only_with_config_wce() {
        let disk = disk(false, false);
        let agreed = |features| Agreed::on(features, &disk).unwrap();
        let old = agreed(1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_CONFIG_WCE);
        write(old, 32, &[0]).unwrap();
        write(old, 32, &[1]).unwrap();
        write(agreed(1 << VIRTIO_BLK_F_FLUSH), 32, &[0]).unwrap_err();
        for (offset, bytes) in [
            (0, &[0_u8; 8][..]),
            (32, &[2]),
            (32, &[]),
            (32, &[0, 0]),
            (u32::MAX, &[0]),
        ] {
            assert!(write(old, offset, bytes).is_err(), "{offset} {bytes:?}");
        }
    }

    #[test]
    fn a_read_only_disk_offers_flushes_but_nothing_that_changes_it() {
        let has = |features: u64, bit: u32| features & (1 << bit) != 0;
        let features = features(&disk(true, true));
        assert!(has(features, VIRTIO_BLK_F_RO) && has(features, VIRTIO_BLK_F_FLUSH));
        assert!(!has(features, VIRTIO_BLK_F_DISCARD) && !has(features, VIRTIO_BLK_F_WRITE_ZEROES));
    }
}
