//! `sealblk serve`: another executable serves the disk, one that holds no code for key servers, settings or users.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use sealblk_command::executable;
use sealblk_serve::command::NAME;

use super::failure::Failure;

/// Becomes `vhost-user-sealblk`, with the arguments of this process. Returns if that fails.
pub(super) fn execute() -> Failure {
    execute_with(std::env::args_os().skip(1))
}

/// The same with other arguments.
pub(super) fn execute_with(arguments: impl IntoIterator<Item = OsString>) -> Failure {
    let path = match executable::find(NAME) {
        Ok(path) => path,
        Err(error) => return error.into(),
    };
    // Its own name would stand for the verb, which is among the arguments.
    let mut command = Command::new(&path);
    command.arg0("sealblk").args(arguments);
    let source = command.exec();
    Failure::Execute { path, source }
}
