//! `sealblk provider`: the key providers of this host.

use std::convert::Infallible;
use std::path::PathBuf;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use clap::{ArgGroup, Args, Subcommand};
use serde_json::json;

use super::failure::Failure;
use super::key::Insistence;
use super::secret::SecretSource;
use super::{Host, Keys, absolute, output, primary_key, stderr, text};
use crate::inventory::Removal;
use crate::kbs::ResourcePath;
use crate::keys::RequestPurpose;
use crate::keys::{KeyReason, Providers};
use crate::providers::trusted;
use crate::providers::{kmip, kmip::Wrap, kmip::WrappingKey};
use crate::providers::{registry::Backup, registry::Entry, registry::Registry, registry::Source};
use crate::providers::{transit, transit::Login};
use crate::tpm::{DEFAULT_DEVICE, Device};

const PROVIDER_HELP: &str = "\
First, on a new host:
  sealblk provider add native
  sealblk provider backup native --to native.backup --passphrase-file FILE

Kinds of providers:
  native   a primary key in the state directory, which gives each volume its key
  kmip     key servers that speak KMIP
  transit  an OpenBao or HashiCorp Vault server
  trusted  a broker, which releases a key after this host's TPM has proved what the
           host has booted";

const NATIVE_HELP: &str = "\
Examples:
  sealblk provider add native
  sealblk provider add native --name lab --default

A native provider is one primary key in a file of the state directory. It derives
the keys of all its volumes from the primary key. The file opens all these volumes;
without it, only recovery keys open them. The provider gives no keys to new volumes
until you take a backup (`sealblk provider backup`), unless you give --no-backup.";

const REMOVE_HELP: &str = "\
Examples:
  sealblk provider remove kms --dry-run
  sealblk provider remove native --new-default kms
  sealblk provider remove lab --force --confirm lab

sealblk does not remove a provider while a known disk is bound to it: rekey the
disks first. It does not remove a native provider without a backup of its primary
key (`sealblk provider backup`). sealblk does not know disks that this host has
never used; `sealblk key scan` adds them. Keys at servers stay as they are.";

const KMIP_HELP: &str = "\
Examples:
  sealblk provider add kmip --server kms1.example.com --server kms2.example.com \\
    --ca /etc/sealblk/kms-ca.pem --certificate /etc/sealblk/host.pem \\
    --key /etc/sealblk/host.key
  sealblk provider add kmip --name vault --wrap server --server [2001:db8::7]:5696 \\
    --ca ca.pem --certificate host.pem --key host.key

All servers must have the same keys; sealblk tries them in the given order. It
supports KMIP 1.1 to 1.4, 2.0 and 2.1 over TLS 1.2 or 1.3. The files are PEM, and
sealblk reads them at each connection. sealblk first makes a key called
sealblk-probe at the server, and wraps and unwraps under it. If that fails, it adds
nothing, and the exit code is not 0. docs/providers.md describes the setup.";
const TRANSIT_HELP: &str = "\
Examples:
  sealblk provider add transit --address https://bao1:8200 --address https://bao2:8200 \\
      --ca /etc/sealblk/bao-ca.pem --transit-key sealblk \\
      --role-id 3c2f1a5e-7a54-4e0c-9f5d-0f6f0f1f2a3b --secret-id-file /etc/sealblk/secret-id
  sealblk provider add transit --address https://bao1:8200 --ca /etc/sealblk/bao-ca.pem \\
      --transit-key sealblk --certificate /etc/sealblk/host.pem --key /etc/sealblk/host.key

The transit key stays on the server, and wraps the keys that volumes are bound to.
sealblk reads the files at each connection, so you can replace them at any time.
sealblk first wraps and unwraps a key. If that fails, it adds nothing, and the exit
code is not 0. docs/providers.md describes the setup.";

const TRUSTED_HELP: &str = "\
Examples:
  sealblk provider add trusted --address https://broker:8700 --ca /etc/sealblk/ca.pem \\
      --resource sealblk/kek/1
  sealblk provider enrol trusted --host node1 --token-file node1.token
  sealblk provider attestation-key trusted > node1.pub

The host's TPM makes an attestation key. Then make the broker know that key: with
`sealblk broker` by `sealblk provider enrol`; with Trustee, give it the output of
`sealblk provider attestation-key`. From then on the broker releases the resource
if the host has booted the expected software. The resource wraps the keys that
volumes are bound to.";

/// Add, list, check, back up and remove key providers
#[derive(Debug, Args)]
#[command(after_help = PROVIDER_HELP)]
pub(super) struct Provider {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Add a key provider to this host
    #[command(subcommand)]
    Add(Box<Add>),
    /// Write a native provider's primary key to a file under a passphrase, and check the file
    Backup(primary_key::Backup),
    /// Add a native provider with the primary key of a backup
    Restore(primary_key::Restore),
    /// Encrypt a native provider's primary key with this host's TPM, and remove the plain key; needs a backup
    Seal(primary_key::Seal),
    /// Test one provider: let it wrap and unwrap a test secret
    Check(Check),
    /// Enrol this host's TPM at the broker of a trusted provider
    Enrol(Enrol),
    /// Print the attestation key of a trusted provider, to configure a broker such as Trustee
    AttestationKey(Check),
    /// Remove a key provider from this host, with a native provider's primary key, unless a volume of the volume list needs it
    Remove(Remove),
    /// List and test the key providers of this host; the exit code is 4 if one does not work
    List(List),
}

#[derive(Debug, Subcommand)]
enum Add {
    /// A primary key in the state directory; needs no server
    #[command(after_help = NATIVE_HELP)]
    Native(NativeArgs),
    /// Key servers that speak KMIP
    #[command(after_help = KMIP_HELP)]
    Kmip(KmipArgs),
    /// The Transit secrets engine of OpenBao or HashiCorp Vault
    #[command(after_help = TRANSIT_HELP)]
    Transit(TransitArgs),
    /// A broker that releases a key to this host after its TPM has proved what it has booted
    #[command(after_help = TRUSTED_HELP)]
    Trusted(TrustedArgs),
}

#[derive(Debug, Args)]
struct TrustedArgs {
    /// A broker; repeat the option for further brokers, which are tried in this order
    #[arg(long, value_name = "https://HOST:PORT", required = true, value_parser = parse_address)]
    address: Vec<String>,
    /// PEM file with the certificate of the authority that signs the brokers' certificates
    #[arg(long, value_name = "FILE")]
    ca: PathBuf,
    /// The broker's key
    #[arg(long, value_name = "REPOSITORY/TYPE/TAG")]
    resource: ResourcePath,
    /// The host's TPM
    #[arg(long, value_name = "DEVICE", default_value = DEFAULT_DEVICE)]
    tpm: String,
    /// How long this host keeps the broker's key for other disks; with 0 it asks the broker at each use
    #[arg(long, value_name = "SECONDS", default_value_t = trusted::HOLD)]
    hold: u16,
    /// The time limit of a release
    #[arg(long, value_name = "SECONDS", default_value_t = trusted::TIMEOUT)]
    timeout: u16,
    /// Add it without a test
    #[arg(long)]
    no_check: bool,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
struct Enrol {
    /// The provider
    name: String,
    /// The name that the broker's operator has given this host
    #[arg(long, value_name = "NAME")]
    host: String,
    /// The token of `sealblk broker host enrol`; not needed if the broker was given the TPM's endorsement key
    #[arg(long, value_name = "SECRET")]
    token_file: Option<SecretSource>,
}

#[derive(Debug, Args)]
struct NativeArgs {
    /// Let new volumes use its keys without a backup
    #[arg(long)]
    no_backup: bool,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
#[command(after_help = REMOVE_HELP)]
struct Remove {
    /// The provider
    name: String,
    /// The new default provider, if this one is the default
    #[arg(long, value_name = "NAME")]
    new_default: Option<String>,
    #[command(flatten)]
    insistence: Insistence,
}

#[derive(Debug, Args)]
struct Check {
    /// The provider
    name: String,
}

#[derive(Debug, Args)]
struct KmipArgs {
    /// A server; write an IPv6 address with a port in brackets; repeat the option for further servers with the same keys
    /// [default port: 5696]
    #[arg(long = "server", value_name = "HOST[:PORT]", required = true)]
    servers: Vec<String>,
    /// PEM file with the certificates of the authorities that sign the servers' certificates
    #[arg(long, value_name = "FILE")]
    ca: PathBuf,
    /// This host's certificate
    #[arg(long, value_name = "FILE")]
    certificate: PathBuf,
    /// The certificate's private key, readable only by its owner
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// Where keys are used. client: this host fetches them. server: the server decrypts for this host (from KMIP 1.4 on)
    #[arg(long, value_name = "WHO", default_value = "client", value_parser = ["client", "server"])]
    wrap: String,
    /// The Unique Identifier of the key under which the server wraps keys for this host
    #[arg(long, value_name = "ID", requires = "wrapping_key_file")]
    wrapping_key: Option<String>,
    /// The file with the 32 bytes of that key, readable only by its owner
    #[arg(long, value_name = "FILE", requires = "wrapping_key")]
    wrapping_key_file: Option<PathBuf>,
    /// The time limit of an operation, for all servers together
    #[arg(long, value_name = "SECONDS", default_value_t = kmip::DEFAULT_TIMEOUT)]
    timeout: u64,
    /// Add it without a test
    #[arg(long)]
    no_check: bool,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("login").required(true).args(["role_id", "certificate", "token_file"]))]
struct TransitArgs {
    /// A server; repeat the option for further servers, which are tried in this order
    #[arg(long, value_name = "https://HOST:PORT", required = true, value_parser = parse_address)]
    address: Vec<String>,
    /// PEM file with the certificate of the authority that signs the servers' certificates
    #[arg(long, value_name = "FILE")]
    ca: PathBuf,
    /// The server's key
    #[arg(long, value_name = "NAME")]
    transit_key: String,
    /// The mount path of the secrets engine
    #[arg(long, value_name = "PATH", default_value = transit::MOUNT)]
    mount: String,
    /// The namespace of the secrets engine
    #[arg(long, value_name = "PATH")]
    namespace: Option<String>,
    /// Log in by AppRole, with this role
    #[arg(long, value_name = "ID", requires = "secret_id_file")]
    role_id: Option<String>,
    /// The file of the role's secret ID, readable only by its owner
    #[arg(long, value_name = "FILE", requires = "role_id", conflicts_with_all = ["certificate", "token_file"])]
    secret_id_file: Option<PathBuf>,
    /// Log in by the TLS certificate in this PEM file
    #[arg(long, value_name = "FILE", requires = "key")]
    certificate: Option<PathBuf>,
    /// The file of the certificate's private key, readable only by its owner
    #[arg(long, value_name = "FILE", requires = "certificate", conflicts_with_all = ["role_id", "token_file"])]
    key: Option<PathBuf>,
    /// Log in by the token in this file, readable only by its owner; another program must keep the token valid
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// The mount path of the login method, under auth/ [default: approle, or cert]
    #[arg(long, value_name = "PATH", conflicts_with = "token_file")]
    login_mount: Option<String>,
    /// The time limit of an operation
    #[arg(long, value_name = "SECONDS", default_value_t = transit::TIMEOUT)]
    timeout: u16,
    /// Add it without a test
    #[arg(long)]
    no_check: bool,
    #[command(flatten)]
    common: Common,
}

/// What every kind is asked.
#[derive(Clone, Debug, Args)]
struct Common {
    /// The name of the provider [default: its kind]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Make it the default provider of new volumes; the first provider is always the default
    #[arg(long)]
    default: bool,
}

impl Provider {
    pub(super) fn run(self, host: &Host) -> Result<(), Failure> {
        match self.verb {
            Verb::Add(add) => add.run(host),
            Verb::Backup(backup) => backup.run(host),
            Verb::Restore(restore) => restore.run(host),
            Verb::Seal(seal) => seal.run(host),
            Verb::Enrol(enrol) => enrol.run(host),
            Verb::AttestationKey(of) => {
                let key = BASE64_STANDARD.encode(host.registry()?.attestation_key(&of.name)?);
                let lines: Vec<_> = key.as_bytes().chunks(64).map(String::from_utf8_lossy).collect();
                output::print(&format!(
                    "-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n",
                    lines.join("\n")
                ))
            }
            Verb::Remove(remove) => remove.run(host),
            Verb::Check(check) => {
                let keys = host.keys(RequestPurpose::Check)?;
                for entry in keys.list()?.iter().filter(|entry| entry.name == check.name) {
                    tell_expiring(entry);
                }
                Ok(keys.provider(&check.name)?.check()?)
            }
            Verb::List(list) => list.run(&host.keys(RequestPurpose::Check)?),
        }
    }
}

impl Add {
    fn run(self, host: &Host) -> Result<(), Failure> {
        let mut registry = host.registry()?;
        match self {
            Add::Native(NativeArgs { no_backup, common }) => {
                let backup = if no_backup { Backup::Waived } else { Backup::None };
                add_native(
                    host,
                    &mut registry,
                    common.named("native"),
                    common.default,
                    backup,
                )
            }
            Add::Kmip(args) => {
                let (common, no_check) = (args.common.clone(), args.no_check);
                let source = Source::Kmip(args.settings()?);
                add_servers(&mut registry, &common, no_check, "kmip", source)
            }
            Add::Transit(args) => {
                let (common, no_check) = (args.common.clone(), args.no_check);
                let source = Source::Transit(args.settings()?);
                add_servers(&mut registry, &common, no_check, "transit", source)
            }
            Add::Trusted(args) => {
                let settings = trusted::Settings {
                    addresses: args.address,
                    ca: absolute(args.ca)?,
                    resource: args.resource,
                    tpm: Device::from(args.tpm),
                    hold: args.hold,
                    timeout: args.timeout,
                };
                let source = Source::Trusted(settings);
                add_servers(&mut registry, &args.common, args.no_check, "trusted", source)
            }
        }
    }
}

impl Enrol {
    fn run(self, host: &Host) -> Result<(), Failure> {
        let token = self.token_file.as_ref().map(SecretSource::read).transpose()?;
        host.registry()?.enrol(&self.name, &self.host, token.as_ref())?;
        output::print(&format!("the broker knows this host as {:?}\n", self.host))
    }
}

impl KmipArgs {
    fn settings(self) -> Result<kmip::Settings, Failure> {
        Ok(kmip::Settings {
            servers: self.servers,
            ca: absolute(self.ca)?,
            certificate: absolute(self.certificate)?,
            key: absolute(self.key)?,
            wrap: match self.wrap.as_str() {
                "server" => Wrap::Server,
                _ => Wrap::Client,
            },
            wrapping_key: match self.wrapping_key.zip(self.wrapping_key_file) {
                Some((id, file)) => Some(WrappingKey {
                    id,
                    file: absolute(file)?,
                }),
                None => None,
            },
            timeout: self.timeout,
        })
    }
}

impl TransitArgs {
    fn settings(self) -> Result<transit::Settings, Failure> {
        let (role_id, certificate) = (
            self.role_id.zip(self.secret_id_file),
            self.certificate.zip(self.key),
        );
        let login = match (role_id, certificate, self.token_file) {
            (Some((role_id, secret_id_file)), ..) => Login::Approle {
                role_id,
                secret_id_file: absolute(secret_id_file)?,
                mount: self.login_mount.unwrap_or_else(transit::approle),
            },
            (_, Some((certificate, key)), _) => Login::Cert {
                certificate: absolute(certificate)?,
                key: absolute(key)?,
                mount: self.login_mount.unwrap_or_else(transit::cert),
            },
            (.., Some(token_file)) => Login::Token {
                token_file: absolute(token_file)?,
            },
            _ => unreachable!("one of them is required"),
        };
        Ok(transit::Settings {
            addresses: self.address,
            ca: absolute(self.ca)?,
            transit_key: self.transit_key,
            mount: self.mount,
            namespace: self.namespace,
            timeout: self.timeout,
            login,
        })
    }
}

/// Adds a provider whose keys are had of servers, once they are seen to be.
fn add_servers(
    registry: &mut Registry,
    common: &Common,
    no_check: bool,
    kind: &'static str,
    source: Source,
) -> Result<(), Failure> {
    let name = common.named(kind);
    let mut next = "its keys can be used".to_owned();
    if no_check {
        registry.add(name, source, common.default)?;
        next = format!("`sealblk provider check {name}` tests whether its keys can be used");
    } else {
        // A broker identifies this host by a key that is made here.
        let is_trusted = matches!(source, Source::Trusted(_));
        registry.add_working(name, source, common.default, |error| match error.reason {
            KeyReason::Refused | KeyReason::Attestation if is_trusted => {
                next = format!(
                    "its broker answers, but does not know this host yet: run `sealblk provider enrol {name}`, or give the broker the \
                     output of `sealblk provider attestation-key {name}`"
                );
                Ok(())
            }
            _ => Err(error),
        })?;
    }
    stderr::note(&format!("added key provider {name:?}; {next}"));
    Ok(())
}

impl Common {
    fn named(&self, kind: &'static str) -> &str {
        self.name.as_deref().unwrap_or(kind)
    }
}

/// Adds a native provider, and says what is to be done with it.
pub(super) fn add_native(
    host: &Host,
    registry: &mut Registry,
    name: &str,
    default: bool,
    backup: Backup,
) -> Result<(), Failure> {
    registry.add(name, Source::Native { backup }, default)?;
    let dir = text::shown(registry.dir());
    stderr::note(&format!(
        "added key provider {name:?}; its primary key is in {dir}: back it up with {}; only the primary key and their \
         recovery keys open the volumes of this provider",
        backup_command(host, name)
    ));
    Ok(())
}

/// The command that backs up a native provider.
pub(super) fn backup_command(host: &Host, name: &str) -> String {
    let state_dir = host.0.state_dir.as_deref().map(text::shown);
    let option = state_dir.map_or(String::new(), |dir| format!(" --state-dir {dir}"));
    format!("`sealblk{option} provider backup {name} --to FILE --passphrase-file FILE`")
}

/// An address as `BAO_ADDR` and its like have it, too: a slash at its end says nothing.
fn parse_address(text: &str) -> Result<String, Infallible> {
    Ok(text.strip_suffix('/').unwrap_or(text).to_owned())
}

impl Remove {
    fn run(self, host: &Host) -> Result<(), Failure> {
        let name = &self.name;
        let force = self.insistence.insists(name)?;
        let mut keys = host.keys(RequestPurpose::Check)?;
        let mut remove = |force, dry_run| {
            let removal = Removal {
                new_default: self.new_default.as_deref(),
                force,
                dry_run,
                ..Removal::default()
            };
            keys.remove_provider(name, &removal)
        };
        let provider = format!("key provider {name:?}");
        if self.insistence.dry_run {
            let ask = |force| remove(force, true);
            return output::print(&self.insistence.foresee(&provider, "removed", ask)?);
        }
        remove(force, false)?;
        output::print(&format!("{provider} was removed\n"))
    }
}

fn tell_expiring(entry: &Entry) {
    for expiring in &entry.expiring {
        stderr::note(&format!("key provider {:?}: {expiring}", entry.name));
    }
}

#[derive(Debug, Args)]
struct List {
    /// Print JSON: `reason`, as in the audit log, says why a provider's keys cannot be used
    #[arg(long)]
    json: bool,
}

impl List {
    fn run(self, keys: &Keys) -> Result<(), Failure> {
        let listed: Vec<_> = keys
            .list()?
            .into_iter()
            .map(|entry| {
                let checked = keys.provider(&entry.name).and_then(|provider| provider.check());
                let reason = checked.err().map(|e| {
                    output::complain(&e);
                    e.reason
                });
                (entry, reason)
            })
            .collect();
        let unusable: Vec<_> = listed
            .iter()
            .filter(|(_, reason)| reason.is_some())
            .map(|(entry, _)| format!("{:?}", entry.name))
            .collect();
        Self::print(self.json, listed)?;
        match unusable.is_empty() {
            true => Ok(()),
            false => Err(Failure::Unusable {
                names: unusable.join(", "),
            }),
        }
    }

    fn print(json: bool, listed: Vec<(Entry, Option<KeyReason>)>) -> Result<(), Failure> {
        if json {
            let providers = listed.iter().map(|(entry, reason)| {
                json!({
                    "name": entry.name,
                    "kind": entry.kind,
                    "default": entry.default,
                    "location": entry.location,
                    "usable": reason.is_none(),
                    "reason": reason,
                    "expiring": entry.expiring,
                })
            });
            return output::print_json(&providers.collect::<Vec<_>>());
        }
        if listed.is_empty() {
            return output::print("this host has no key providers; `sealblk provider add native` adds one\n");
        }
        let mut rows = vec![["NAME", "KIND", "DEFAULT", "KEYS", "LOCATION"].map(str::to_owned)];
        for (entry, reason) in listed {
            tell_expiring(&entry);
            // By its name alone: it was told in full above.
            let usable = match json!(reason).as_str() {
                Some(reason) => reason.replace('_', " "),
                None => "usable".to_owned(),
            };
            let default = if entry.default { "yes" } else { "no" };
            rows.push([entry.name, entry.kind, default.to_owned(), usable, entry.location]);
        }
        output::print(&text::table(&rows))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slash_at_the_end_of_an_address_is_no_part_of_it() {
        for text in ["https://bao1:8200", "https://bao1:8200/"] {
            assert_eq!(parse_address(text).unwrap(), "https://bao1:8200");
        }
    }
}
