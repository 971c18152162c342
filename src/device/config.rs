//! What the device offers: feature bits, and the configuration space (virtio 1.2 §5.2.3 and §5.2.4).

use std::mem::offset_of;

use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost::vhost_user::message::VHOST_USER_CONFIG_SIZE;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES, virtio_blk_config,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::disk::Disk;
use super::request::{MAX_DISCARD_SECTORS, MAX_WRITE_ZEROES_SECTORS, MAX_ZONES};
use crate::cipher::SectorSize;
use crate::storage::PAGE;

/// The largest queue that a driver may set up.
pub(super) const MAX_QUEUE_SIZE: u16 = 1024;

/// The longest data of a request, in bytes: what `size_max` and `seg_max` come to.
pub(super) const MAX_REQUEST: u32 = SIZE_MAX * SEG_MAX;

/// The most buffers of a request: what fits QEMU's default queue of 128 beside header and status.
const SEG_MAX: u32 = 126;

/// The longest buffer of a request, in bytes.
const SIZE_MAX: u32 = 1 << 20;

/// VHOST_USER_F_PROTOCOL_FEATURES.
const PROTOCOL_FEATURES: u64 = 1 << 30;

/// The bytes of the configuration space that have a meaning here: up to and with `write_zeroes_may_unmap`, padded.
const CONFIG_LEN: usize = offset_of!(virtio_blk_config, max_secure_erase_sectors);

/// The feature bits of `disk`.
pub(super) fn features(disk: &Disk) -> u64 {
    let mut features = PROTOCOL_FEATURES;
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
    offer(VIRTIO_BLK_F_CONFIG_WCE, !disk.read_only);
    offer(VIRTIO_BLK_F_RO, disk.read_only);
    offer(VIRTIO_BLK_F_WRITE_ZEROES, !disk.read_only);
    offer(VIRTIO_BLK_F_DISCARD, disk.discard && !disk.read_only);
    features
}

/// The protocol features. REPLY_ACK is what lets a front-end know that an edge has been drained.
pub(super) fn protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::BACKEND_REQ
}

/// `size` bytes of the configuration space from `offset` on; past its end there are zeros, so that a front-end that
/// knows more fields than we do gets what it asked for. Nothing if that is past any configuration space.
pub(super) fn read(disk: &Disk, num_queues: u16, offset: u32, size: u32) -> Vec<u8> {
    let space = space(disk, num_queues);
    match (offset as usize).checked_add(size as usize) {
        Some(end) if end <= VHOST_USER_CONFIG_SIZE as usize => (offset as usize..end)
            .map(|at| space.get(at).copied().unwrap_or(0))
            .collect(),
        _ => Vec::new(),
    }
}

/// Why a write to the configuration space is refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConfigError {
    #[error(
        "{len} bytes at offset {offset} are not writable; only `writeback`, the byte at 32, takes 0 or 1"
    )]
    NotWritable { offset: u32, len: usize },
    #[error("a message of {len} bytes does not hold what it says")]
    Malformed { len: usize },
    #[error("the write cache cannot be switched off: what it holds cannot be put on stable storage")]
    Sync(#[source] std::io::Error),
}

/// A write to the configuration space: the write cache is all that a driver can change. No ring may run meanwhile.
pub(super) fn write(disk: &Disk, offset: u32, bytes: &[u8]) -> Result<(), ConfigError> {
    match bytes {
        [writeback @ (0 | 1)] if offset as usize == offset_of!(virtio_blk_config, wce) && !disk.read_only => {
            disk.choose_write_cache(*writeback == 1)
                .map_err(ConfigError::Sync)
        }
        _ => Err(ConfigError::NotWritable {
            offset,
            len: bytes.len(),
        }),
    }
}

fn space(disk: &Disk, num_queues: u16) -> [u8; CONFIG_LEN] {
    let mut space = [0; CONFIG_LEN];
    let mut put = |at: usize, field: &[u8]| space[at..at + field.len()].copy_from_slice(field);
    let sector_size = disk.sector_size.bytes();
    let granule = (sector_size / SectorSize::B512.bytes()) as u32;

    put(
        offset_of!(virtio_blk_config, capacity),
        &disk.sectors().to_le_bytes(),
    );
    put(offset_of!(virtio_blk_config, size_max), &SIZE_MAX.to_le_bytes());
    put(offset_of!(virtio_blk_config, seg_max), &SEG_MAX.to_le_bytes());
    put(
        offset_of!(virtio_blk_config, blk_size),
        &(sector_size as u32).to_le_bytes(),
    );
    // Topology: a page of storage is the physical block, whatever the logical one; no preference beyond it.
    let physical_block_exp = (PAGE / sector_size).ilog2() as u8;
    put(
        offset_of!(virtio_blk_config, physical_block_exp),
        &[physical_block_exp],
    );
    put(
        offset_of!(virtio_blk_config, min_io_size),
        &((PAGE / sector_size) as u16).to_le_bytes(),
    );
    put(
        offset_of!(virtio_blk_config, wce),
        &[u8::from(disk.writeback_field())],
    );
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
        &(MAX_ZONES as u32).to_le_bytes(),
    );
    let discard_alignment = granule.max((PAGE / SectorSize::B512.bytes()) as u32);
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
        &(MAX_ZONES as u32).to_le_bytes(),
    );
    space
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::storage::{Access, Backing};

    fn disk(read_only: bool, discard: bool) -> Disk {
        let file = tempfile::NamedTempFile::new().unwrap();
        let backing = Backing::open(file.path(), Access::ReadWrite).unwrap();
        let file = Arc::new(backing.data_file(512).unwrap());
        Disk::new(2048, file, SectorSize::B512, read_only, discard, "serial").unwrap()
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
    fn only_writeback_can_be_written() {
        let disk = disk(false, false);
        write(&disk, 32, &[0]).unwrap();
        assert!(!disk.write_cache());
        assert_eq!(read(&disk, 1, 32, 1), [0]);
        write(&disk, 32, &[1]).unwrap();
        assert!(disk.write_cache());
        for (offset, bytes) in [
            (0, &[0_u8; 8][..]),
            (32, &[2]),
            (32, &[]),
            (32, &[0, 0]),
            (u32::MAX, &[0]),
        ] {
            assert!(write(&disk, offset, bytes).is_err(), "{offset} {bytes:?}");
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
