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
        // In hexadecimal. What another process says can be short or empty.
        if common < 2 * config::LEAST_LEN || self.config.get(..common) != own.config.get(..common) {
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::claims::Claims;
    use super::*;
    use crate::cipher::SectorSize;
    use crate::storage::{Access, Backing, Others};

    /// An empty configuration was the beginning of any.
    #[test]
    fn a_disk_of_which_less_is_told_than_a_guest_can_see_is_another_one() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let backing = Backing::open(file.path(), Access::ReadWrite).unwrap();
        let attached = backing.attach(Others::Refused).unwrap();
        let data = Arc::new(backing.data_file(512, &attached.fence()).unwrap());
        let claims = Claims::now(attached).unwrap();
        let disk = Disk::new(2048, data, claims, SectorSize::B512, false, false, "serial").unwrap();
        let whole = Guise::of(&disk, 4);
        whole.check(&disk, 4).unwrap();
        for len in [0, 16, whole.config.len() - 1] {
            let config = whole.config[..len].to_owned();
            Guise {
                config,
                ..whole.clone()
            }
            .check(&disk, 4)
            .unwrap_err();
        }
        // A later release tells of more.
        let config = whole.config.clone() + "00";
        Guise { config, ..whole }.check(&disk, 4).unwrap();
    }
}
