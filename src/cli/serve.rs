//! `sealblk serve`: another executable serves the disk, one that holds no code for key servers, settings or users.

use std::os::unix::process::CommandExt;
use std::process::Command;

use sealblk_command::executable;
use sealblk_serve::command::NAME;

use super::failure::Failure;

/// Becomes `vhost-user-sealblk`, with the arguments and the name that this process was started with. Returns if that fails.
pub(super) fn execute() -> Failure {
    let path = match executable::find(NAME) {
        Ok(path) => path,
        Err(error) => return error.into(),
    };
    let mut given = std::env::args_os();
    let mut command = Command::new(&path);
    // Its own name would stand for the verb.
    let source = command
        .arg0(given.next().unwrap_or_else(|| "sealblk".into()))
        .args(given)
        .exec();
    Failure::Execute { path, source }
}
