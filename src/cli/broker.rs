//! `sealblk broker`: releases keys to hosts that prove, by their TPMs, what they have booted.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base16ct::lower;
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::failure::Failure;
use super::made::Made;
use super::{Host, output, text};
use crate::audit::AuditLog;
use crate::broker::state::{self, Kept, Reference, Token, check_name};
use crate::broker::{Broker as Server, Settings, State, StateError, audit_log};
use crate::control::events::Event;
use crate::control::manager;
use crate::kbs::ResourcePath;
use crate::tpm::pcr;
use sealblk_secmem::arena::SecretBytes;
use sealblk_secmem::private_file;

/// The default path of the broker's settings.
const DEFAULT_SETTINGS: &str = "/etc/sealblk/broker.toml";
/// How long a token for an enrolment can be used.
const TOKEN_LIFETIME: Duration = Duration::from_secs(24 * 3600);

const AFTER_HELP: &str = "\
Examples:
  sealblk --config broker.toml broker resource add sealblk/kek/1
  sealblk --config broker.toml broker reference set node --pcr 7=DIGITS --pcr 11=DIGITS
  sealblk --config broker.toml broker host enrol node1 --reference node \\
      --resource sealblk/kek/1 --token-file node1.token
  sealblk --config broker.toml broker serve

--config names the broker's settings [default: /etc/sealblk/broker.toml]:
  listen = \"[::]:8700\"
  certificate = \"/etc/sealblk/broker.pem\"
  key = \"/etc/sealblk/broker.key\"
  state-dir = \"/var/lib/sealblk-broker\"
  endorsement-authorities = \"/etc/sealblk/tpm-makers.pem\"

Changes take effect immediately, also in a running broker.";

/// Release keys to hosts that prove by their TPMs what they have booted
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Broker {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run the broker, until SIGTERM
    Serve,
    /// Manage resources: the keys that the broker releases
    #[command(subcommand)]
    Resource(Resource),
    /// Manage hosts
    #[command(subcommand)]
    Host(HostVerb),
    /// Manage reference values: the register values of hosts that booted the right software
    #[command(subcommand)]
    Reference(ReferenceVerb),
}

#[derive(Debug, Subcommand)]
enum Resource {
    /// Make a new key
    Add {
        /// Its path, REPOSITORY/TYPE/TAG
        path: ResourcePath,
    },
    /// List the paths of the keys
    List,
    /// Destroy a key; volumes that only this key opens are lost
    Remove {
        /// Its path
        path: ResourcePath,
        /// The same path again
        #[arg(long, value_name = "PATH")]
        confirm: String,
    },
}

#[derive(Debug, Subcommand)]
enum HostVerb {
    /// Allow a host to enrol its TPM, once; an enrolled host must enrol again
    Enrol(Enrol),
    /// List the hosts, and whether each is enrolled
    List,
    /// Remove a host: it gets no more keys
    Remove {
        /// Its name
        name: String,
    },
}

#[derive(Debug, Args)]
struct Enrol {
    /// The host's name at this broker
    name: String,
    /// The set of reference values that the host must have
    #[arg(long, value_name = "NAME")]
    reference: String,
    /// A resource for the host; repeat the option for more
    #[arg(long = "resource", value_name = "PATH", required = true)]
    resources: Vec<ResourcePath>,
    /// The file to write the token to; the host must enrol with it within a day
    #[arg(
        long,
        value_name = "FILE",
        required_unless_present = "endorsement_key",
        conflicts_with = "endorsement_key"
    )]
    token_file: Option<PathBuf>,
    /// The SHA-256 of the TPM's endorsement key; then the host needs no token, and its TPM needs no certificate
    #[arg(long, value_name = "DIGITS", value_parser = digest)]
    endorsement_key: Option<String>,
}

#[derive(Debug, Subcommand)]
enum ReferenceVerb {
    /// Set the reference values of registers
    Set {
        /// The name of the set
        name: String,
        /// A register of the SHA-256 bank, and an allowed value; repeat the option for more registers or values
        #[arg(long = "pcr", value_name = "REGISTER=DIGITS", required = true)]
        pcrs: Vec<String>,
    },
    /// Show the reference values of registers
    Show,
}

fn digest(text: &str) -> Result<String, String> {
    match pcr::parse_value(text) {
        Some(bytes) => Ok(lower::encode_string(&bytes)),
        None => Err("expected 64 hexadecimal digits".to_owned()),
    }
}

impl Broker {
    pub(super) fn run(self, host: &Host) -> Result<(), Failure> {
        let path = host.0.config.clone().unwrap_or_else(|| DEFAULT_SETTINGS.into());
        let settings = Settings::read(&path).map_err(crate::broker::BrokerError::from)?;
        if let Verb::Serve = self.verb {
            let server = Server::new(settings)?;
            manager::ready("answering");
            let result = server.run();
            manager::stopping();
            return result.map_err(Failure::Host);
        }
        let desk = Desk {
            state: State::open(&settings.state_dir)?,
            state_dir: settings.state_dir,
        };
        match self.verb {
            Verb::Serve => unreachable!("it was taken out above"),
            Verb::Resource(verb) => verb.run(&desk),
            Verb::Host(HostVerb::Enrol(enrol)) => enrol.run(&desk),
            Verb::Host(HostVerb::List) => output::print(&hosts(&desk.state.read()?)),
            Verb::Host(HostVerb::Remove { name }) => {
                desk.change(Event::HostRemoved, json!({ "host": name }), |kept| {
                    match kept.hosts.remove(&name) {
                        Some(_) => Ok(()),
                        None => Err(unknown("host", &name)),
                    }
                })
            }
            Verb::Reference(verb) => verb.run(&desk),
        }
    }
}

/// Where an operator of a broker changes what it knows.
struct Desk {
    state: State,
    state_dir: PathBuf,
}

impl Desk {
    /// Makes a change after it is recorded in the audit log.
    fn change(
        &self,
        event: Event,
        mut about: Value,
        change: impl FnOnce(&mut Kept) -> Result<(), StateError>,
    ) -> Result<(), Failure> {
        about["user"] = rustix::process::geteuid().as_raw().into();
        about["process"] = std::process::id().into();
        self.state.change(|kept| {
            change(kept)?;
            AuditLog::open(&audit_log(&self.state_dir))?.record(event, &about)?;
            Ok(())
        })
    }
}

fn unknown(what: &'static str, name: &str) -> StateError {
    let name = name.to_owned();
    StateError::Unknown { what, name }
}

impl Resource {
    fn run(self, desk: &Desk) -> Result<(), Failure> {
        match self {
            Self::Add { path } => {
                let about = json!({ "resource": path });
                desk.change(Event::ResourceAdded, about, |kept| {
                    if kept.resources.contains_key(&path) {
                        let name = path.to_string();
                        return Err(StateError::Exists {
                            what: "resource",
                            name,
                        });
                    }
                    let sealed = desk.state.wrap_new(&path)?;
                    kept.resources.insert(path, sealed);
                    Ok(())
                })
            }
            Self::List => {
                let kept = desk.state.read()?;
                output::print(
                    &kept
                        .resources
                        .keys()
                        .map(|path| format!("{path}\n"))
                        .collect::<String>(),
                )
            }
            Self::Remove { path, confirm } if confirm != path.as_ref() => {
                let what = format!("{:?}", path.as_ref());
                Err(Failure::Confirm {
                    what,
                    confirmed: confirm,
                })
            }
            Self::Remove { path, .. } => desk.change(
                Event::ResourceRemoved,
                json!({ "resource": path }),
                |kept| match kept.resources.remove(&path) {
                    Some(_) => Ok(()),
                    None => Err(unknown("resource", path.as_ref())),
                },
            ),
        }
    }
}

impl Enrol {
    fn run(self, desk: &Desk) -> Result<(), Failure> {
        check_name(&self.name)?;
        // Removes a token that enrols no host.
        let mut made = Made::default();
        let token = match &self.token_file {
            Some(path) => {
                let token = new_token(path)?;
                made.extend([path.clone()]);
                Some(token)
            }
            None => None,
        };
        let about = json!({ "host": self.name, "reference": self.reference, "resources": self.resources });
        desk.change(Event::HostAdmitted, about, |kept| {
            if !kept.references.contains_key(&self.reference) {
                return Err(unknown("set of reference values", &self.reference));
            }
            if let Some(path) = self
                .resources
                .iter()
                .find(|path| !kept.resources.contains_key(path))
            {
                return Err(unknown("resource", path.as_ref()));
            }
            let host = state::Host {
                reference: self.reference,
                resources: self.resources,
                endorsement: self.endorsement_key,
                attestation: None,
                token,
            };
            kept.hosts.insert(self.name, host);
            Ok(())
        })?;
        made.keep();
        Ok(())
    }
}

/// Writes a new token to a file, and gives what is kept of it.
fn new_token(path: &std::path::Path) -> Result<Token, Failure> {
    let random = SecretBytes::random(24).map_err(StateError::from)?;
    let mut text = SecretBytes::zeroed(32).map_err(StateError::from)?;
    BASE64_URL_SAFE_NO_PAD
        .encode_slice(&*random, &mut text)
        .expect("24 bytes are 32 characters");
    private_file::create(path, &text).map_err(|source| Failure::Make {
        path: path.to_owned(),
        source,
    })?;
    let until = SystemTime::now() + TOKEN_LIFETIME;
    Ok(Token {
        sha256: lower::encode_string(&Sha256::digest(&*text)),
        until: until.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
    })
}

fn hosts(kept: &Kept) -> String {
    let mut rows = vec![["NAME", "ENROLLED", "REFERENCE", "RESOURCES", "ENDORSEMENT KEY"].map(str::to_owned)];
    for (name, host) in &kept.hosts {
        let enrolled = if host.attestation.is_some() { "yes" } else { "no" };
        let resources: Vec<_> = host.resources.iter().map(AsRef::as_ref).collect();
        rows.push([
            name.clone(),
            enrolled.to_owned(),
            host.reference.clone(),
            resources.join(", "),
            host.endorsement.clone().unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    text::table(&rows)
}

impl ReferenceVerb {
    fn run(self, desk: &Desk) -> Result<(), Failure> {
        match self {
            Self::Set { name, pcrs } => {
                check_name(&name)?;
                let reference = reference(&pcrs)?;
                let about = json!({ "reference": name, "registers": reference });
                desk.change(Event::ReferenceSet, about, |kept| {
                    kept.references.insert(name, reference);
                    Ok(())
                })
            }
            Self::Show => {
                let kept = desk.state.read()?;
                let mut text = String::new();
                for (name, reference) in &kept.references {
                    text += &format!("{name}\n");
                    for (register, values) in &reference.0 {
                        for value in values {
                            text += &format!("  {register}={value}\n");
                        }
                    }
                }
                output::print(&text)
            }
        }
    }
}

fn reference(pcrs: &[String]) -> Result<Reference, StateError> {
    let mut registers = BTreeMap::<u8, Vec<String>>::new();
    for text in pcrs {
        let parsed = text.split_once('=').and_then(|(register, value)| {
            let register = register
                .parse()
                .ok()
                .filter(|register| *register < crate::tpm::pcr::COUNT)?;
            Some((register, lower::encode_string(&pcr::parse_value(value)?)))
        });
        let (register, value) = parsed.ok_or_else(|| StateError::Register(text.clone()))?;
        registers.entry(register).or_default().push(value);
    }
    Ok(Reference(registers))
}
