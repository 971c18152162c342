//! `sealblk agent`: the host's key agent, until SIGTERM.

use std::path::PathBuf;

use clap::Args;

use super::failure::Failure;
use super::{Host, process};
use crate::agent;
use crate::closer;
use crate::control::manager;

const AFTER_HELP: &str = "\
Example, in the configuration (/etc/sealblk/config.toml, or --config):
  [agent]
  socket = \"/run/sealblk/agent.sock\"

  [[grant]]
  user = \"sealblk-vm7\"
  privileges = [\"RegisterVM\"]
  volumes = [\"e2a81bd8-66d8-4f4d-9c2c-f6d4b3e9a001\"]

If the configuration has [agent], all verbs that use keys ask the agent, and need
neither the state directory nor a provider's credentials. The agent identifies its
callers by their user and groups, and checks their privileges:

  RegisterVM          serve a disk
  Migrate             serve a disk to a guest that migrates here (serve --incoming)
  Access              open a volume for another purpose: `recovery`
  EncryptNew          make a disk, or erase one
  Recrypt             give a volume another key: `rekey`
  ReadKeyServersInfo  see providers, what they open, served volumes and events:
                      `provider list`, `check`, `key where-used`, `due`, `list`,
                      `events`
  ManageKeys          see, push and revoke keys: `key list`, `scan`, `push`, `revoke`
  ManageKeyServers    remove a provider: `provider remove`

Root, and the user that the agent runs as, have all privileges. Other users have
only those that are granted. RegisterVM, Migrate, Access and Recrypt can be limited to some
volumes, by UUID. Grant nothing to QEMU's own user or group. The agent records
requests, refusals and released keys in audit.log in the state directory; `sealblk
audit verify` checks that the log is unchanged.";

/// Run the key agent: it holds this host's keys for all disks that are served here
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Agent {
    /// The socket to listen on; socket-group and socket-mode in the configuration set its permissions
    /// [default: the configuration's, else /run/sealblk/agent.sock]
    #[arg(long, value_name = "SOCK")]
    socket_path: Option<PathBuf>,
}

impl Agent {
    pub(super) fn run(self, host: &Host) -> Result<(), Failure> {
        process::raise_descriptor_limit();
        closer::prepare();
        let config = host.config()?;
        let is_asked = config.agent.is_some();
        let settings = config.agent.unwrap_or_default();
        let agent = agent::Agent::new(agent::Settings {
            state_dir: host.state_dir()?,
            socket: self.socket_path.unwrap_or(settings.socket),
            permissions: settings.permissions,
            time_to_live: settings.time_to_live,
            kek_grace: settings.kek_grace,
            sealed_cache: settings.sealed_cache,
            grants: config.grants,
        })?;
        tracing::info!("the agent answers");
        if !is_asked {
            tracing::warn!(
                config = %host.config_path().display(),
                "no process asks this agent: add [agent] to the configuration, which `serve` and the other verbs also read"
            );
        }
        manager::ready("answering");
        let result = agent.run();
        manager::stopping();
        result.map_err(|error| Failure::Agent(error.into()))
    }
}
