//! The native provider: a file, and no server.

use sealblk::keys::{KeyReason, Providers};
use sealblk::providers::{registry::Backup, registry::Registry, registry::Source};
use sealblk::tpm::Device;
use tempfile::TempDir;

use crate::conformance;
use common::swtpm::Swtpm;

fn host() -> (TempDir, Registry) {
    let dir = tempfile::tempdir().unwrap();
    let mut registry = Registry::open(dir.path()).unwrap();
    registry
        .add(
            "native",
            Source::Native {
                backup: Backup::Waived,
            },
            true,
        )
        .unwrap();
    (dir, registry)
}

#[test]
fn conforms() {
    let (_dir, registry) = host();
    conformance::run(&*registry.provider("native").unwrap());
}

#[test]
fn conforms_with_its_primary_key_sealed_to_a_tpm() {
    let (_dir, mut registry) = host();
    registry.set_backup("native", Backup::Taken).unwrap();
    let tpm = Swtpm::new();
    let device = Device::from(tpm.device());
    registry
        .seal("native", None, &device, "7".parse().unwrap())
        .unwrap();
    conformance::run(&*registry.provider("native").unwrap());
    tpm.extend(7);
    let refused = registry.provider("native").unwrap_err();
    assert_eq!(
        (refused.reason, refused.hop),
        (KeyReason::Attestation, tpm.device())
    );
}
