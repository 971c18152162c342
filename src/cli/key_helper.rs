//! `sealblk key-helper`, which `sealblk serve` starts: the process that gets the keys of one disk. [`crate::key_helper`] tells what
//! the two are for each other; this is the helper's side.

use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use clap::Args;
use rustix::process::Signal;
use serde_json::json;
use uuid::Uuid;

use super::Host;
use super::failure::Failure;
use super::keys::Keys;
use super::secret::{SecretSource, duplicate};
use crate::agent::failure;
use crate::control::peer::Peer;
use crate::control::varlink::{self, Interface, MethodError, Reply, Request};
use crate::control::wire::{self, Connection};
use crate::error_chain::causes;
use crate::key_helper::{
    DESCRIPTION, Detached, Form, GivenGrants, GroupName, GroupNumber, INTERFACE, Open, Opened, Passphrase,
    WireFailure, give, path_of, reopened,
};
use crate::keys::RequestPurpose;
use crate::keys::binding::Bindings;
use crate::keys::protocol::{
    CreateKek, DefaultProvider, INTERFACE as AGENT, Kek, MAX_WRAPPED, SettleBinding, Unwrap, WireBinding,
    Wrap,
};
use crate::keys::{KeyError, KeyId, KeyReason, Providers};
use crate::luks2::Reason;
use crate::storage::{Access, Backing};
use sealblk_secmem::arena::SecretBytes;

/// How long a message may take that has begun.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Get the keys of one disk, for the `sealblk serve` that has started this
#[derive(Debug, Args)]
#[command(hide = true)]
pub(super) struct KeyHelper {
    /// The socket of the two, an inherited descriptor
    #[arg(long, value_name = "N")]
    fd: RawFd,
    /// As of `sealblk serve`
    #[arg(long, value_name = "FILE|-|fd:N|cred:NAME")]
    passphrase_file: Option<SecretSource>,
}

impl KeyHelper {
    pub(super) fn run(self, host: &Host) -> Result<(), Failure> {
        // In lists of processes it is told apart from commands of users. Without a name it works as well.
        let _ = rustix::thread::set_name(c"sealblk-keys");
        let stream = UnixStream::from(OwnedFd::from(duplicate(self.fd).map_err(Failure::Host)?));
        let peer = Peer::of(&stream).map_err(Failure::Host)?;
        // Again, for the kernel forgets it where the executable has capabilities of its own; the parent may have ended before.
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
            .map_err(|error| Failure::Host(error.into()))?;
        let parent = rustix::process::getppid().map(|parent| parent.as_raw_nonzero().get());
        if parent != Some(peer.process) {
            return Ok(());
        }
        let mut connection = Connection::new(stream, TIMEOUT);
        connection.wait_for_ever();
        let disk = Disk {
            host,
            passphrase: self.passphrase_file,
            serving: peer.process.unsigned_abs(),
            opened: OnceLock::new(),
        };
        let served = varlink::serve(&mut connection, &peer, &[&Own(&disk), &AsAgent(&disk)]);
        if let Err(error) = served {
            tracing::debug!(%error, "the connection to the serving process has ended");
        }
        Ok(())
    }
}

/// The disk whose keys this process gets.
struct Disk<'h> {
    host: &'h Host,
    passphrase: Option<SecretSource>,
    /// The process that serves it.
    serving: u32,
    /// Once its header was read.
    opened: OnceLock<Volume>,
}

/// What is known of its volume.
struct Volume {
    uuid: Uuid,
    /// Where keys come from, unless it is a passphrase.
    keys: Option<Ways>,
}

struct Ways {
    attach: Keys,
    migrate: Keys,
    recrypt: Keys,
}

/// Why the serving process opens its volume.
const SERVING: [RequestPurpose; 3] = [
    RequestPurpose::Attach,
    RequestPurpose::Migrate,
    RequestPurpose::Recrypt,
];

type Answered = Result<Reply, MethodError>;

impl Disk<'_> {
    fn open(&self, mut request: Request<'_>) -> Answered {
        // It serves one volume for life, and looks at no other file.
        if let Some(volume) = self.opened.get() {
            return Err(not_this_volume(volume.uuid));
        }
        let open: Open = request.parameters()?;
        let header = request.descriptors.get(open.header);
        let header = header.ok_or_else(|| MethodError::invalid_parameter("header"))?;
        let volume = self
            .look(header, &path_of(&open))
            .map_err(|error| failed(&error))?;
        let uuid = volume.uuid;
        self.opened
            .set(volume)
            .map_err(|other| not_this_volume(other.uuid))?;
        Ok(Reply::of(Opened { volume: uuid }))
    }

    fn look(&self, header: &OwnedFd, path: &Path) -> Result<Volume, Failure> {
        let backing = Backing::open(&reopened(header), Access::Inspect)?;
        let bindings = Bindings::read(&backing).map_err(|error| Reason::Header(error).at(path))?;
        let to_serve = |purpose| match self.host.keys_of(path, purpose)? {
            Keys::Agent(client) => Ok::<_, Failure>(Keys::Agent(client.on_behalf_of(self.serving))),
            own @ Keys::Own(..) => Ok(own),
        };
        let keys = match self.passphrase {
            Some(_) => None,
            None => Some(Ways {
                attach: to_serve(RequestPurpose::Attach)?,
                migrate: to_serve(RequestPurpose::Migrate)?,
                recrypt: self.host.keys_of(path, RequestPurpose::Recrypt)?,
            }),
        };
        Ok(Volume {
            uuid: bindings.uuid,
            keys,
        })
    }

    fn grants(&self) -> Answered {
        let volume = self.opened.get().ok_or_else(not_opened)?.uuid;
        let config = self.host.config().map_err(|error| failed(&error.into()))?;
        Ok(Reply::of(GivenGrants {
            grants: config.grants.about(volume),
        }))
    }

    fn group(&self, mut request: Request<'_>) -> Answered {
        // Later the serving process may be in a guest's hands.
        if self.opened.get().is_some() {
            return Err(MethodError::new(INTERFACE, "AlreadyOpened", json!({})));
        }
        let GroupName { name } = request.parameters()?;
        match uzers::get_group_by_name(&name) {
            Some(group) => Ok(Reply::of(GroupNumber { number: group.gid() })),
            None => Err(failed(&Failure::NoGroup { name })),
        }
    }

    fn read_passphrase(&self) -> Answered {
        let source = match (&self.passphrase, self.opened.get()) {
            (Some(source), Some(_)) => source,
            _ => return Err(not_opened()),
        };
        let key = source.read_key().map_err(|error| failed(&error.into()))?;
        let (mut forms, mut descriptors) = (Vec::new(), Vec::new());
        for secret in key.into_forms() {
            forms.push(Form {
                secret: descriptors.len(),
                bytes: secret.len(),
            });
            descriptors.push(give(secret).map_err(|error| failed(&Failure::Host(error)))?);
        }
        let answer = Reply::of(Passphrase { forms });
        Ok(descriptors.into_iter().fold(answer, Reply::with))
    }

    /// The serving process is about to end. Without an agent that keeps KEKs there is nothing to tell.
    fn detach(&self, mut request: Request<'_>) -> Answered {
        let Detached { served } = request.parameters()?;
        if let Some(Volume {
            uuid,
            keys: Some(Ways {
                attach: Keys::Agent(client),
                ..
            }),
        }) = self.opened.get()
        {
            client.detach(*uuid, served).map_err(|error| failure(&error))?;
        }
        Ok(Reply::default())
    }

    /// Where keys for `purpose` come from.
    fn keys(&self, purpose: RequestPurpose, purposes: &[RequestPurpose]) -> Result<&Keys, MethodError> {
        let ways = self.opened.get().and_then(|volume| volume.keys.as_ref());
        let ways = ways.ok_or_else(not_opened)?;
        match purpose {
            RequestPurpose::Attach if purposes.contains(&purpose) => Ok(&ways.attach),
            RequestPurpose::Migrate if purposes.contains(&purpose) => Ok(&ways.migrate),
            RequestPurpose::Recrypt if purposes.contains(&purpose) => Ok(&ways.recrypt),
            _ => Err(MethodError::new(
                AGENT,
                "WrongPurpose",
                json!({ "purpose": purpose }),
            )),
        }
    }

    /// Lets through what is for this volume.
    fn check(&self, binding: &WireBinding) -> Result<(), MethodError> {
        match self.opened.get() {
            Some(volume) if volume.uuid == binding.volume => Ok(()),
            _ => Err(not_this_volume(binding.volume)),
        }
    }

    fn default_provider(&self, mut request: Request<'_>) -> Answered {
        let DefaultProvider { purpose } = request.parameters()?;
        let keys = self.keys(purpose, &[RequestPurpose::Recrypt])?;
        let name = keys.default_name().map_err(|error| failure(&error))?;
        Ok(Reply::of(json!({ "name": name })))
    }

    fn create_kek(&self, mut request: Request<'_>) -> Answered {
        let CreateKek { provider, purpose } = request.parameters()?;
        let keys = self.keys(purpose, &[RequestPurpose::Recrypt])?;
        let made = keys
            .provider(&provider)
            .and_then(|provider| provider.create_kek());
        let key_id: KeyId = made.map_err(|error| failure(&error))?;
        Ok(Reply::of(json!({ "keyId": key_id })))
    }

    fn wrap(&self, mut request: Request<'_>) -> Answered {
        let Wrap {
            binding,
            purpose,
            secret,
            ..
        } = request.parameters()?;
        self.check(&binding)?;
        let keys = self.keys(purpose, &[RequestPurpose::Recrypt])?;
        let secret = request
            .descriptors
            .get(secret)
            .and_then(|pipe| wire::take(pipe).ok());
        let secret = secret.ok_or_else(|| MethodError::invalid_parameter("secret"))?;
        let wrapped = keys
            .provider(&binding.provider)
            .and_then(|provider| provider.wrap(&binding.binding(), &secret))
            .map_err(|error| failure(&error))?;
        Ok(Reply::of(json!({ "wrapped": BASE64_STANDARD.encode(wrapped) })))
    }

    fn settle_binding(&self, mut request: Request<'_>) -> Answered {
        let SettleBinding {
            binding,
            purpose,
            stored,
            ..
        } = request.parameters()?;
        self.check(&binding)?;
        let keys = self.keys(purpose, &[RequestPurpose::Recrypt])?;
        keys.provider(&binding.provider)
            .and_then(|provider| provider.settle(&binding.binding(), stored))
            .map_err(|error| failure(&error))?;
        Ok(Reply::default())
    }

    fn unwrap(&self, mut request: Request<'_>) -> Answered {
        let Unwrap {
            binding,
            purpose,
            wrapped,
            ..
        } = request.parameters()?;
        self.check(&binding)?;
        let keys = self.keys(purpose, &SERVING)?;
        let wrapped = BASE64_STANDARD
            .decode(&wrapped)
            .ok()
            .filter(|wrapped| wrapped.len() <= MAX_WRAPPED)
            .ok_or_else(|| MethodError::invalid_parameter("wrapped"))?;
        let secret: SecretBytes = keys
            .provider(&binding.provider)
            .and_then(|provider| provider.unwrap(&binding.binding(), &wrapped))
            .map_err(|error| failure(&error))?;
        let pipe = wire::pass(&secret).map_err(|error| {
            let error = KeyError::new(&binding.provider, "the key helper", KeyReason::Host).because(error);
            failure(&error)
        })?;
        Ok(Reply::of(json!({ "secret": 0 })).with(pipe))
    }

    /// Tells the state of a key: a rekey asks for that of the key that it has made.
    fn kek_state(&self, mut request: Request<'_>) -> Answered {
        let Kek { provider, key_id, .. } = request.parameters()?;
        let keys = self.keys(RequestPurpose::Recrypt, &[RequestPurpose::Recrypt])?;
        let state = keys
            .provider(&provider)
            .and_then(|provider| provider.state(&key_id))
            .map_err(|error| failure(&error))?;
        Ok(Reply::of(json!({ "state": state })))
    }
}

/// Another volume than the disk's is asked for.
fn not_this_volume(volume: Uuid) -> MethodError {
    MethodError::new(INTERFACE, "NotThisVolume", json!({ "volume": volume }))
}

/// There is no volume yet, or the method is none for it.
fn not_opened() -> MethodError {
    MethodError::new(INTERFACE, "NotOpened", json!({}))
}

/// The error of `org.sealblk.KeyHelper`, for what would have ended `sealblk serve`.
fn failed(error: &Failure) -> MethodError {
    let failure = WireFailure {
        message: error.to_string(),
        causes: causes(error).map(ToString::to_string).collect(),
        exit_code: error.blame().exit_code(),
    };
    MethodError::new(INTERFACE, "Failed", failure)
}

/// The helper's own interface.
struct Own<'d>(&'d Disk<'d>);

impl Interface for Own<'_> {
    fn name(&self) -> &'static str {
        INTERFACE
    }

    fn description(&self) -> &'static str {
        DESCRIPTION
    }

    fn knows(&self, _: &Peer) -> bool {
        true
    }

    fn call(&self, method: &str, request: Request<'_>) -> Option<Answered> {
        Some(match method {
            "Detach" => self.0.detach(request),
            "GetGrants" => self.0.grants(),
            "GetGroup" => self.0.group(request),
            "Open" => self.0.open(request),
            "ReadPassphrase" => self.0.read_passphrase(),
            _ => return None,
        })
    }
}

/// The agent's, as far as a served disk needs it.
struct AsAgent<'d>(&'d Disk<'d>);

impl Interface for AsAgent<'_> {
    fn name(&self) -> &'static str {
        AGENT
    }

    fn description(&self) -> &'static str {
        include_str!("../agent/org.sealblk.Agent.varlink")
    }

    fn knows(&self, _: &Peer) -> bool {
        true
    }

    fn call(&self, method: &str, request: Request<'_>) -> Option<Answered> {
        let disk = self.0;
        Some(match method {
            "GetDefaultProvider" => disk.default_provider(request),
            "CreateKek" => disk.create_kek(request),
            "Wrap" => disk.wrap(request),
            "SettleBinding" => disk.settle_binding(request),
            "Unwrap" => disk.unwrap(request),
            "GetKekState" => disk.kek_state(request),
            _ => return None,
        })
    }
}
