//! A disk as the guest sees it. A process that continues to serve a disk must have the same.

use base16ct::lower;
use serde::{Deserialize, Serialize};

use super::config::{self, Agreed, NotOffered};
use super::disk::Disk;

/// See the module's header.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Guise {
    /// The configuration space, in hexadecimal.
    pub config: String,
    /// What GET_ID answers, in hexadecimal.
    pub serial: String,
    /// The features that the driver and the front-end have agreed on.
    pub features: u64,
    /// The protocol features that the front-end has agreed on.
    pub protocol_features: u64,
}

/// The guest would see another disk.
#[derive(Debug, thiserror::Error)]
pub enum NotTheSame {
    #[error("{0} would change under the guest: if the disk has grown, run `sealblk resize` first")]
    Other(&'static str),
    #[error(transparent)]
    Features(#[from] NotOffered),
    #[error(
        "this release does not have the vhost-user protocol features {0:#x}, which the front-end has accepted"
    )]
    Protocol(u64),
}

impl Guise {
    /// Of `disk`, with so many queues.
    pub fn of(disk: &Disk, num_queues: u16) -> Self {
        let (features, protocol_features) = disk.agreed();
        Self {
            config: lower::encode_string(&config::space(disk, num_queues)),
            serial: lower::encode_string(&disk.serial),
            features,
            protocol_features,
        }
    }

    /// Checks that `disk` is the same. A release may know more fields of the configuration space, which the guest has not asked for.
    ///
    /// # Errors
    /// What is different.
    pub fn check(&self, disk: &Disk, num_queues: u16) -> Result<(), NotTheSame> {
        let own = Self::of(disk, num_queues);
        let common = self.config.len().min(own.config.len());
        if self.config.get(..common) != own.config.get(..common) {
            return Err(NotTheSame::Other(
                "the capacity, or another field of the device's configuration,",
            ));
        }
        if self.serial != own.serial {
            return Err(NotTheSame::Other("the serial"));
        }
        Agreed::on(self.features, disk)?;
        match self.protocol_features & !config::protocol_features().bits() {
            0 => Ok(()),
            missing => Err(NotTheSame::Protocol(missing)),
        }
    }
}
