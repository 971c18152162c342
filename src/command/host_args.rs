//! Where a command finds the settings of its host.

use std::path::PathBuf;

use clap::Args;

/// The options that all verbs have.
#[derive(Clone, Debug, Args)]
pub struct HostArgs {
    /// The directory of the key providers. If you give it, or set SEALBLK_STATE_DIR, sealblk reads the providers there, and does
    /// not ask the key agent, even if the configuration names one [default: /var/lib/sealblk for root, else $XDG_STATE_HOME/sealblk]
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "SEALBLK_STATE_DIR",
        hide_env = true
    )]
    pub state_dir: Option<PathBuf>,

    /// The configuration file [default: /etc/sealblk/config.toml, if it exists; for `broker`: /etc/sealblk/broker.toml]
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "SEALBLK_CONFIG",
        hide_env = true
    )]
    pub config: Option<PathBuf>,
}
