//! `sealblk provider`: the key providers of this host.

use clap::{Args, Subcommand};

use super::failure::Failure;
use super::{Host, Keys, output};
use crate::agent::Purpose;
use crate::keys::Providers;
use crate::keys::registry::{Registry, Source};

const NATIVE_HELP: &str = "\
Examples:
  sealblk provider add native
  sealblk provider add native --name lab --default

A native provider is one primary key in a file of the state directory. All keys
that it gives to volumes are derived from it: whoever has the file can open the
volumes, and without it they open with a recovery key alone. Back it up.";

/// Add and list sources of keys
#[derive(Debug, Args)]
pub(super) struct Provider {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Add a key provider to this host
    #[command(subcommand)]
    Add(Add),
    /// List the key providers of this host, and whether each one's keys can be used
    List,
}

#[derive(Debug, Subcommand)]
enum Add {
    /// A primary key in the state directory; needs no server
    #[command(after_help = NATIVE_HELP)]
    Native(Common),
}

/// What every kind is asked.
#[derive(Debug, Args)]
struct Common {
    /// What to call it [default: its kind]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Let new volumes take it when none is named; the first provider is the default anyway
    #[arg(long)]
    default: bool,
}

impl Provider {
    pub(super) fn run(self, host: &Host) -> Result<(), Failure> {
        match self.verb {
            Verb::Add(add) => add.run(host),
            Verb::List => output::print(&list(&host.keys(Purpose::Check)?)?),
        }
    }
}

impl Add {
    fn run(self, host: &Host) -> Result<(), Failure> {
        let mut registry = host.registry()?;
        match self {
            Add::Native(common) => add_native(&mut registry, common.named("native"), common.default),
        }
    }
}

impl Common {
    fn named(&self, kind: &'static str) -> &str {
        self.name.as_deref().unwrap_or(kind)
    }
}

/// Adds a native provider, and says where its key is.
pub(super) fn add_native(registry: &mut Registry, name: &str, default: bool) -> Result<(), Failure> {
    registry.add(name, Source::Native {}, default)?;
    let dir = registry.dir().display();
    output::note(&format!(
        "added key provider {name:?}; its primary key is in {dir}: back that directory up, since volumes bound to \
         this provider open with it or with their recovery key, and with nothing else"
    ));
    Ok(())
}

fn list(keys: &Keys) -> Result<String, Failure> {
    let entries = keys.list()?;
    if entries.is_empty() {
        return Ok("this host has no key providers; `sealblk provider add native` adds one\n".to_owned());
    }
    let mut rows = vec![[
        "NAME".to_owned(),
        "KIND".into(),
        "DEFAULT".into(),
        "KEYS".into(),
        "LOCATION".into(),
    ]];
    for entry in entries {
        let usable = match keys.provider(&entry.name).and_then(|provider| provider.check()) {
            Ok(()) => "usable".to_owned(),
            Err(e) => e.reason.what().to_owned(),
        };
        let default = if entry.default { "yes" } else { "no" };
        rows.push([entry.name, entry.kind, default.to_owned(), usable, entry.location]);
    }
    Ok(output::table(&rows))
}
