//! The native provider: a file, and no server.

use sealblk::keys::Providers;
use sealblk::keys::registry::{Backup, Registry, Source};

use crate::conformance;

#[test]
fn conforms() {
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
    conformance::run(&*registry.provider("native").unwrap());
}
