//! How this host is called in the headers of volumes that its processes have attached ([`Holder`](crate::luks2::Holder)).

use std::fs;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use uuid::{Builder, Uuid};

use crate::luks2::Host;

/// This host.
#[derive(Debug)]
pub struct ThisHost {
    /// How it is called.
    pub host: Host,
    /// Whether it is called so after its next boot.
    pub is_lasting: bool,
}

impl ThisHost {
    /// As its files say. Call it while the process is not confined.
    pub fn find() -> Self {
        let boot = uuid("/proc/sys/kernel/random/boot_id");
        let machine = uuid("/etc/machine-id");
        Self {
            is_lasting: machine.is_some(),
            host: Host {
                id: machine.or(boot).map(derived).unwrap_or_default(),
                name: text("/proc/sys/kernel/hostname").unwrap_or_default(),
                boot: boot.unwrap_or_default(),
            },
        }
    }
}

fn text(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

fn uuid(path: &str) -> Option<Uuid> {
    text(path)?.parse().ok().filter(|id: &Uuid| !id.is_nil())
}

/// machine-id(5) asks that the ID itself be kept from other hosts. This is what sd_id128_get_machine_app_specific(3) makes of it.
fn derived(machine: Uuid) -> Uuid {
    let mut mac = Hmac::<Sha256>::new_from_slice(machine.as_bytes()).expect("a key has any length");
    mac.update(APPLICATION.as_bytes());
    let [bytes @ .., _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _] =
        <[u8; 32]>::from(mac.finalize().into_bytes());
    Builder::from_random_bytes(bytes).into_uuid()
}

/// Names sealblk. It never changes: a host would take its own attachments for those of another.
const APPLICATION: Uuid = Uuid::from_u128(0x4b45_bb46_01dc_4665_bd2a_a6ce_15ab_f8f9);

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_host_is_called_as_systemd_derives_it() {
        let machine = "3d1219c7c4c5404aaa1f6d2a48adfda4".parse().unwrap();
        // `systemd-id128 machine-id --app-specific=4b45bb46-01dc-4665-bd2a-a6ce15abf8f9` on a host with this ID.
        assert_eq!(
            derived(machine).simple().to_string(),
            "e903a74e73c649ba9d40a2f22315a358"
        );
        let told = Command::new("systemd-id128")
            .args(["machine-id", "--app-specific", &APPLICATION.simple().to_string()])
            .output();
        let found = ThisHost::find();
        if let Some(told) = told.ok().filter(|told| told.status.success() && found.is_lasting) {
            let told = String::from_utf8(told.stdout).unwrap();
            assert_eq!(told.trim(), found.host.id.simple().to_string());
        }
    }
}
