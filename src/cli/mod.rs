//! The command line: a file for each verb.
//!
//! A verb is a struct of arguments with `run(self, &Host) -> Result<(), Failure>`. It prints through [`output`], and reads
//! secrets through [`secret`]. This module prints failures, once, with their causes, and turns them into the exit code that
//! `sealblk --help` documents.

mod agent;
mod audit;
mod broker;
mod config;
mod create;
mod define;
mod erase;
mod events;
pub mod failure;
mod generate;
mod header_reader;
mod info;
mod key;
mod key_helper;
mod keys;
mod libvirt;
mod list;
mod made;
mod primary_key;
mod provider;
mod recovery;
mod recovery_key;
mod rekey;
mod resize;
mod serve;
mod served;
mod start;
mod strength;
mod target;
mod units;
mod upgrade;
mod volume_args;

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use sealblk_command::host_args::HostArgs;
use sealblk_command::{executable, log, output, process, secret, size, stderr, text, usage};
use sealblk_serve::command::{NAME, Serve};

use crate::agent::Client;
use crate::cipher;
use crate::disks::Disks;
use crate::keys::RequestPurpose;
use crate::providers::{registry, registry::Registry, registry::RegistryError};
use config::{Config, ConfigError};
use failure::Failure;
use keys::Keys;
use sealblk_secmem::harden;

const AFTER_HELP: &str = "\
Examples:
  sealblk create vm7.luks --size 20G --recovery-key ~/vm7.key
  sealblk serve --blk-file vm7.luks --volume UUID --socket-path /run/vm7.sock
  sealblk info vm7.luks
`create` prints the UUID.

Options name the source of a secret, never the secret itself: --recovery-key
and similar options take a file, '-' for standard input, 'fd:N' for an open
descriptor, or 'cred:NAME' for a file in $CREDENTIALS_DIRECTORY. One line of UTF-8
text is a passphrase: sealblk removes the newline at its end. Any other content, up
to 8 MiB, is a key: sealblk uses every byte of it, as `cryptsetup --key-file` does.
If the secret opens nothing, sealblk tries once more: it then keeps the newline of
a passphrase, or removes a newline at the end of a key.

sealblk gives points to a secret that you choose (a recovery key, a backup's
passphrase): 1 for a character, but 0.5 for a digit; 2 for a byte that is not text;
0 for repetitions and runs such as 'abc'. Below 12 points it refuses the secret,
unless you give --weak; below 20 it warns. It does not know words or names, so a
secret without a warning can still be easy to guess: let sealblk make the key.

Terms:
  disk          what the guest sees; DISK is the file or device that stores it
  volume        a disk as LUKS2 stores it: a header with keyslots, and the data,
                encrypted under the volume key
  key           opens a keyslot, which holds the volume key; each volume has its own,
                and a copy of a volume has the same
  key provider  makes and keeps keys: a native provider derives them from one
                primary key in the state directory, the others ask a server
  key agent     a process that asks the providers for all disks of a host; without
                it, each command asks them itself
  volume list   the volumes that this host has bound to a key or opened (`sealblk key
                where-used`); volumes that only other hosts know are not in it

Exit codes:
  0  done
  1  this host cannot do it: memory, processor, kernel, or a defect of sealblk
  2  the arguments, the configuration or other settings are wrong
  3  the content of the disk, backup, receipt or log is wrong: not a volume,
     damaged, not supported, changed
  4  the key is not available: the provider does not give it or cannot be used, or
     the passphrase or recovery key opens nothing
  5  the disk, socket, key or provider is in use, or data would be lost
  6  a file, device or socket cannot be made, opened, read or written, or is full
  7  the agent or `sealblk serve` does not answer, or refuses

Environment:
  SEALBLK_STATE_DIR  as --state-dir
  SEALBLK_CONFIG     as --config
  SEALBLK_LOG        log level on standard error: 'info', 'debug' ...";

/// VM encryption for QEMU/KVM: serves LUKS2 volumes to guests as virtio disks
#[derive(Debug, Parser)]
#[command(name = "sealblk", version, after_help = AFTER_HELP, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    host: HostArgs,

    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Create(create::Create),
    Info(info::Info),
    Recovery(recovery::Recovery),
    Rekey(rekey::Rekey),
    Resize(resize::Resize),
    Provider(provider::Provider),
    Key(key::Key),
    Erase(erase::Erase),
    Define(define::Define),
    Undefine(define::Undefine),
    Start(start::Start),
    Stop(start::Stop),
    Serve(Box<Serve>),
    Status(served::Status),
    Events(events::Events),
    List(list::List),
    Libvirt(libvirt::Libvirt),
    Lock(served::Lock),
    Unlock(served::Unlock),
    Resume(served::Resume),
    Upgrade(upgrade::Upgrade),
    Agent(agent::Agent),
    Audit(audit::Audit),
    Broker(broker::Broker),
    KeyHelper(key_helper::KeyHelper),
    HeaderReader(header_reader::HeaderReader),
    #[command(hide = true)]
    GenerateUnits(generate::GenerateUnits),
}

/// What verbs know of the host that they run on. Nothing is read before a verb asks.
#[derive(Debug)]
pub struct Host(HostArgs);

impl Host {
    /// The configuration.
    fn config(&self) -> Result<Config, ConfigError> {
        Config::read(self.0.config.as_deref())
    }

    /// Where the configuration is, or would be.
    fn config_path(&self) -> PathBuf {
        self.0
            .config
            .clone()
            .unwrap_or_else(|| config::DEFAULT_PATH.into())
    }

    /// The disks that it has defined.
    fn disks(&self) -> Disks {
        Disks::beside(&self.config_path())
    }

    /// The options of the host, as they were given.
    fn arguments(&self) -> Vec<OsString> {
        let options = [("--config=", &self.0.config), ("--state-dir=", &self.0.state_dir)];
        let given = options.into_iter().filter_map(|(option, path)| {
            let mut option = OsString::from(option);
            option.push(path.as_ref()?);
            Some(option)
        });
        given.collect()
    }

    /// The socket of the host's agent, for verbs that ask only the agent.
    ///
    /// # Errors
    /// [`Failure::NoAgent`], if the configuration has none, and none listens at the usual place.
    fn agent_socket(&self) -> Result<PathBuf, Failure> {
        let configured = self.config()?.agent;
        let is_configured = configured.is_some();
        let socket = configured.unwrap_or_default().socket;
        if is_configured || socket.exists() {
            return Ok(socket);
        }
        Err(Failure::NoAgent {
            config: self.config_path(),
        })
    }

    /// The state directory.
    ///
    /// # Errors
    /// [`RegistryError::NoStateDir`], if neither an option nor the environment tells it.
    pub fn state_dir(&self) -> Result<PathBuf, RegistryError> {
        match &self.0.state_dir {
            Some(dir) => Ok(dir.clone()),
            None => registry::default_dir(),
        }
    }

    /// The key providers of the state directory.
    ///
    /// # Errors
    /// [`RegistryError`], if there is no state directory to look in, or its settings cannot be used.
    pub fn registry(&self) -> Result<Registry, RegistryError> {
        Registry::open(&self.state_dir()?)
    }

    /// The key providers: those of the state directory that was named, else of the host's agent, if the configuration has
    /// one, else of the usual state directory.
    fn keys(&self, purpose: RequestPurpose) -> Result<Keys, Failure> {
        Ok(match (&self.0.state_dir, self.config()?.agent) {
            (None, Some(agent)) => Keys::Agent(Client::new(&agent.socket, purpose)),
            _ => Keys::Own(self.registry()?, None),
        })
    }

    /// The same, for the volume whose header is in `path`: the list of volumes gets an entry for it.
    fn keys_of(&self, path: &Path, purpose: RequestPurpose) -> Result<Keys, Failure> {
        Ok(match self.keys(purpose)? {
            Keys::Own(registry, _) => Keys::Own(registry, Some(path.to_owned())),
            Keys::Agent(client) => Keys::Agent(client.at(path)),
        })
    }
}

/// A path as it is stored or sent: it holds wherever sealblk is started.
fn absolute(path: PathBuf) -> Result<PathBuf, Failure> {
    std::path::absolute(&path).map_err(|source| Failure::Look { path, source })
}

/// Runs the command named by the process' arguments.
pub fn main() -> ExitCode {
    // Once a link by that name was how sealblk was installed for QEMU. Two copies would execute each other without end.
    if is_server_name(std::env::args_os().next().as_deref()) || executable::is_own_name(NAME) {
        output::complain(&Failure::NotTheServer);
        return ExitCode::from(Failure::NotTheServer.blame().exit_code());
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(refusal) => {
            let code = usage::refuse(refusal, &Cli::command(), std::env::args_os());
            return ExitCode::from(code);
        }
    };
    let code = match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output::complain_with(&failure, &failure.list());
            ExitCode::from(failure.blame().exit_code())
        }
    };
    stderr::flush();
    code
}

fn is_server_name(name: Option<&OsStr>) -> bool {
    let file = name.and_then(|name| Path::new(name).file_name());
    file.is_some_and(|file| file == NAME)
}

/// Prepares this process for what `verb` does.
fn prepare(verb: &Verb) -> Result<(), Failure> {
    process::prepare().map_err(Failure::Process)?;
    harden::process().map_err(Failure::Process)?;
    // These encrypt no sector, and other processes wait for them.
    if !matches!(verb, Verb::KeyHelper(_) | Verb::HeaderReader(_)) {
        cipher::self_test()?;
    }
    match verb {
        Verb::Agent(_) | Verb::Broker(_) | Verb::KeyHelper(_) => {
            stderr::begin();
            log::begin("info");
        }
        _ => log::begin("warn"),
    }
    Ok(())
}

fn run(cli: Cli) -> Result<(), Failure> {
    // Another executable serves the disk, and prepares itself.
    if !matches!(cli.verb, Verb::Serve(_)) {
        prepare(&cli.verb)?;
    }
    let host = Host(cli.host);
    match cli.verb {
        Verb::Create(verb) => verb.run(&host),
        Verb::Info(verb) => verb.run(),
        Verb::Recovery(verb) => verb.run(&host),
        Verb::Rekey(verb) => verb.run(&host),
        Verb::Resize(verb) => verb.run(&host),
        Verb::Provider(verb) => verb.run(&host),
        Verb::Key(verb) => verb.run(&host),
        Verb::Erase(verb) => verb.run(&host),
        Verb::Define(verb) => verb.run(&host),
        Verb::Undefine(verb) => verb.run(&host),
        Verb::Start(verb) => verb.run(&host),
        Verb::Stop(verb) => verb.run(),
        Verb::Serve(_) => Err(serve::execute()),
        Verb::Status(verb) => verb.run(),
        Verb::Events(verb) => verb.run(&host),
        Verb::List(verb) => verb.run(&host),
        Verb::Libvirt(verb) => verb.run(&host),
        Verb::Lock(verb) => verb.run(),
        Verb::Unlock(verb) => verb.run(),
        Verb::Resume(verb) => verb.run(),
        Verb::Upgrade(verb) => verb.run(),
        Verb::Agent(verb) => verb.run(&host),
        Verb::Audit(verb) => verb.run(&host),
        Verb::Broker(verb) => verb.run(&host),
        Verb::KeyHelper(verb) => verb.run(&host),
        Verb::HeaderReader(verb) => verb.run(),
        Verb::GenerateUnits(verb) => verb.run(&host),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    /// A wrong verb was answered with "a similar subcommand exists: 'erase'".
    #[test]
    fn wrong_verb_is_answered_with_those_that_there_are() {
        let said = |wrong: &str, given: &[&str]| {
            usage::no_such_verb(wrong, &Cli::command(), given.iter().map(OsString::from))
        };
        let top = said("phrase", &["sealblk", "--state-dir", "x", "phrase", "erase"]);
        assert!(
            top.starts_with("`sealblk` has no verb \"phrase\"; it has:\n  create "),
            "{top}"
        );
        // The list of the verbs was empty.
        let none = said("serve", &["sealblk", "help", "create", "serve"]);
        let expected =
            "`sealblk create` has no verbs, so \"serve\" is not valid; see `sealblk create --help`\n";
        assert_eq!(none, expected);
        let kinds = said("vault", &["sealblk", "provider", "add", "vault"]);
        assert!(
            kinds.starts_with("`sealblk provider add` has no verb \"vault\""),
            "{kinds}"
        );
        assert!(
            kinds.contains("  transit  The Transit secrets engine of OpenBao or HashiCorp Vault"),
            "{kinds}"
        );
    }
}
