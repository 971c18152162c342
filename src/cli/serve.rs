//! `sealblk serve`: another executable serves the disk, one that holds no code for key servers, settings or users.

use std::os::unix::process::CommandExt;
use std::process::Command;

use sealblk_command::executable;
use sealblk_serve::command::NAME;

use super::failure::Failure;

/// Becomes `vhost-user-sealblk`, with the arguments of this process. Returns if that fails.
pub(super) fn execute() -> Failure {
    let path = match executable::find(NAME) {
        Ok(path) => path,
        Err(error) => return error.into(),
    };
    // Its own name would stand for the verb, which is among the arguments.
    let mut command = Command::new(&path);
    command.arg0("sealblk").args(std::env::args_os().skip(1));
    let source = command.exec();
    Failure::Execute { path, source }
}
