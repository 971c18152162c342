//! The command `vhost-user-sealblk`, by either of its names: `sealblk serve` executes it with the arguments that it was given itself.

mod arguments;
mod failure;
mod serve;

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use sealblk_command::host_args::HostArgs;
use sealblk_command::{log, output, process, stderr, usage};
use sealblk_secmem::harden;

use crate::cipher;
pub use arguments::Serve;
use failure::Failure;
pub use serve::TAKEN_OVER;

/// The option by which `sealblk upgrade` has a process take a disk over, with the number of the attempt.
pub const UPGRADE: &str = serve::UPGRADE;

/// The executable's name, as QEMU's descriptors and packages name it.
pub const NAME: &str = "vhost-user-sealblk";
/// The command that users know.
const COMMAND: &str = "sealblk";
/// The verb of that command.
const VERB: &str = "serve";

#[derive(Debug, Parser)]
#[command(name = COMMAND, version, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    host: HostArgs,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Serve(Box<Serve>),
}

/// Runs the command named by the process' arguments.
pub fn main() -> ExitCode {
    let given: Vec<_> = std::env::args_os().collect();
    let mut command = Cli::command();
    if is_own_name(given.first()) {
        // The user did not type the verb.
        command = command.mut_subcommand(VERB, |serve| serve.override_usage(format!("{NAME} [OPTIONS]")));
    }
    let is_taking_over = given
        .iter()
        .any(|argument| argument.as_bytes().starts_with(serve::UPGRADE.as_bytes()));
    if is_taking_over {
        // `sealblk upgrade` adds to arguments that were given before.
        command = command.mut_subcommand(VERB, |serve| serve.args_override_self(true));
    }
    let given = arguments(given.into_iter());
    let parsed = command
        .try_get_matches_from_mut(&given)
        .and_then(|matches| Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut command)));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(refusal) => return ExitCode::from(usage::refuse(refusal, &command, given.into_iter())),
    };
    let code = match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output::complain(&failure);
            if is_taking_over {
                // To `sealblk upgrade`: standard error is the log of the disk.
                let _ = output::line::<Failure>(&output::told(&failure));
            }
            ExitCode::from(failure.blame().exit_code())
        }
    };
    stderr::flush();
    code
}

fn run(cli: Cli) -> Result<(), Failure> {
    process::prepare().map_err(Failure::Process)?;
    harden::process().map_err(Failure::Process)?;
    cipher::self_test()?;
    // It is confined before it has a second thread.
    stderr::hold();
    log::begin("info");
    let Verb::Serve(verb) = cli.verb;
    verb.run(&cli.host)
}

fn is_own_name(name: Option<&OsString>) -> bool {
    let file = name.and_then(|name| Path::new(name).file_name());
    file.is_some_and(|file| file == NAME)
}

/// The arguments as they are for `sealblk`, whichever name the process was started by.
fn arguments(mut given: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let name = given.next().unwrap_or_else(|| COMMAND.into());
    let verb = is_own_name(Some(&name)).then(|| VERB.into());
    [name].into_iter().chain(verb).chain(given).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn own_name_means_the_verb() {
        let seen = |given: &[&str]| arguments(given.iter().map(OsString::from));
        assert_eq!(
            seen(&["/usr/libexec/vhost-user-sealblk", "--fd", "3"]),
            ["/usr/libexec/vhost-user-sealblk", "serve", "--fd", "3"]
        );
        let other = ["sealblk", "--config", "a", "serve", "--fd", "3"];
        assert_eq!(seen(&other), other);
        assert_eq!(seen(&[]), ["sealblk"]);
    }
}
