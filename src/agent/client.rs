//! The client of the agent: the agent's providers, and its other methods.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::erasure::Erasure;
use super::messages::{
    Disks, ForgetVolume, InUse, ListDisks, ListVolumes, NotBackedUp, PushKek, RemoveProvider, ScanVolumes,
    Volumes,
};
use super::registered::Registrant;
use crate::control::varlink::{CallError, call};
use crate::control::wire::{self, Connection, WireError};
use crate::inventory;
use crate::inventory::verify::Scanned;
use crate::inventory::{GuardError, Removal, Share, Uses};
use crate::keys::RequestPurpose;
use crate::keys::protocol::{Detach, INTERFACE, RevokeKek, may_be};
use crate::keys::remote::{Caller, Failed, Nothing, Route};
use crate::keys::{KeyError, KeyId, KeyProvider, KeyReason, Providers, Reach, Revocation};
use crate::parsing;
use crate::path_text;
use crate::providers::registry::Entry;
use sealblk_secmem::arena::SecretBytes;

/// How long the agent may take: it may have to wait for several servers, one after the other.
const TIMEOUT: Duration = Duration::from_secs(120);

/// How long, and how often, a busy agent is asked again.
const TURNED_AWAY: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_millis(50);

/// The agent at a socket. Each call is a connection of its own.
#[derive(Clone, Debug)]
pub struct Client(Caller);

/// The socket of an agent.
#[derive(Debug)]
struct Socket(PathBuf);

impl Route for Socket {
    fn call(
        &self,
        method: &str,
        parameters: &Map<String, Value>,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(Map<String, Value>, Vec<OwnedFd>), CallError> {
        let ask = || {
            let mut connection = Connection::to(&self.0, TIMEOUT)?;
            call(&mut connection, method, parameters, descriptors)
        };
        let mut patience = TURNED_AWAY;
        loop {
            match ask() {
                // An agent that has too many callers of this user hangs up.
                Err(error) if has_hung_up(&error) && !patience.is_zero() => {
                    std::thread::sleep(RETRY);
                    patience = patience.saturating_sub(RETRY);
                }
                result => return result,
            }
        }
    }

    fn hop(&self) -> String {
        self.0.display().to_string()
    }

    fn no_answer(&self) -> KeyReason {
        KeyReason::NoAgent
    }
}

impl Client {
    /// The agent that listens at `socket`, asked for keys for `purpose`.
    pub fn new(socket: &Path, purpose: RequestPurpose) -> Self {
        Self(Caller::new(Arc::new(Socket(socket.to_owned())), purpose))
    }

    /// The same, for the volume whose header is in `path`.
    pub fn at(self, path: &Path) -> Self {
        Self(self.0.at(path))
    }

    /// The same, for a volume that `process` serves, whose child this process is.
    pub fn on_behalf_of(self, process: u32) -> Self {
        Self(self.0.on_behalf_of(process))
    }

    /// All providers, by name.
    ///
    /// # Errors
    /// [`KeyError`], above all [`KeyReason::NoAgent`] and [`KeyReason::NotPermitted`].
    pub fn list(&self) -> Result<Vec<Entry>, KeyError> {
        #[derive(Deserialize)]
        struct Listed {
            providers: Vec<Entry>,
        }
        let (listed, _) = self.0.ask::<Listed>("", "ListProviders", json!({}), &[])?;
        Ok(listed.providers)
    }

    /// The volumes that are being served on this host, by the time since when they are.
    ///
    /// # Errors
    /// As for [`Client::list`].
    pub fn disks(&self) -> Result<Vec<Registrant>, KeyError> {
        all_pages(|from| {
            let (page, _) = self.0.ask::<Disks>("", "ListDisks", ListDisks { from }, &[])?;
            Ok((page.disks, page.next))
        })
    }

    /// Tells the agent that the process that serves `volume`, or has `served` it, is about to end.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn detach(&self, volume: Uuid, served: bool) -> Result<(), KeyError> {
        let detach = Detach {
            volume,
            process: self.0.process(),
            served: Some(served),
        };
        self.0.ask::<Nothing>("", "Detach", detach, &[]).map(drop)
    }

    /// Gives the agent a KEK, which somebody has fetched for this host.
    ///
    /// # Errors
    /// As for [`Client::list`], and if it is no KEK of a provider there.
    pub fn push(&self, provider: &str, key_id: &KeyId, kek: &SecretBytes) -> Result<(), KeyError> {
        if !may_be(key_id) {
            return Err(self.0.fail(provider, KeyReason::Missing).of(key_id));
        }
        let pipe = wire::pass(kek)
            .map_err(|error| self.0.fail(provider, KeyReason::Host).of(key_id).because(error))?;
        let parameters = PushKek {
            provider: provider.to_owned(),
            key_id: key_id.clone(),
            kek: 0,
        };
        self.0
            .ask::<Nothing>(provider, "PushKek", parameters, &[pipe.as_fd()])?;
        Ok(())
    }

    /// The volumes that are known, or one of them, of one provider or one KEK, whether there may be others, and whose room runs out.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn volumes(
        &self,
        volume: Option<Uuid>,
        provider: Option<&str>,
        key_id: Option<&KeyId>,
    ) -> Result<(Vec<inventory::Entry>, bool, Vec<Share>), KeyError> {
        let (mut full, mut crowded) = (false, Vec::new());
        let all = all_pages(|from| {
            let parameters = ListVolumes {
                volume,
                provider: provider.map(str::to_owned),
                key_id: key_id.cloned(),
                from,
            };
            let (page, _) = self.0.ask::<Volumes>("", "ListVolumes", parameters, &[])?;
            (full, crowded) = (page.full, page.crowded);
            Ok((page.volumes, page.next))
        })?;
        Ok((all, full, crowded))
    }

    /// Has the agent look at the volumes in `paths`, which are absolute, and at all that it knows.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn scan(&self, paths: &[PathBuf], missing: bool) -> Result<Scanned, KeyError> {
        let mut all = Scanned::default();
        let texts: Vec<String> = paths.iter().map(|path| path_text::to_text(path)).collect();
        // Paths and what is told of them have to go into one message.
        let mut pieces: Vec<&[String]> = texts.chunks(8).collect();
        // What is known is looked at once, after the last.
        pieces.push(&[]);
        for piece in pieces {
            let parameters = ScanVolumes {
                paths: piece.to_vec(),
                missing,
            };
            let (scanned, _) = self.0.ask::<Scanned>("", "ScanVolumes", parameters, &[])?;
            all.found.extend(scanned.found);
            all.passed_over.extend(scanned.passed_over);
            all.dropped += scanned.dropped;
        }
        Ok(all)
    }

    /// Takes a KEK out of use.
    ///
    /// # Errors
    /// [`GuardError`]; the KEK can be used as before then.
    pub fn revoke(
        &self,
        provider: &str,
        key_id: &KeyId,
        revocation: Revocation,
        removal: &Removal<'_>,
    ) -> Result<Option<Reach>, GuardError> {
        #[derive(Deserialize)]
        struct Revoked {
            #[serde(default)]
            reach: Option<Reach>,
        }
        // Nobody has such a key, and the agent hears of none.
        if !may_be(key_id) {
            return Err(self.0.fail(provider, KeyReason::Missing).of(key_id).into());
        }
        let parameters = RevokeKek {
            provider: provider.to_owned(),
            key_id: key_id.clone(),
            revocation,
            force: removal.force,
            dry_run: removal.dry_run,
        };
        Ok(self.manage::<Revoked>(provider, "RevokeKek", parameters)?.reach)
    }

    /// Removes a provider.
    ///
    /// # Errors
    /// [`GuardError`].
    pub fn remove_provider(&self, name: &str, removal: &Removal<'_>) -> Result<(), GuardError> {
        let parameters = RemoveProvider {
            provider: name.to_owned(),
            new_default: removal.new_default.map(str::to_owned),
            force: removal.force,
            dry_run: removal.dry_run,
        };
        self.manage::<Nothing>(name, "RemoveProvider", parameters)
            .map(drop)
    }

    /// Has the agent drop the keys of a volume that this host no longer serves.
    ///
    /// # Errors
    /// [`KeyError`]. Within that: the processes that serve the volume.
    pub fn forget_volume(&self, volume: Uuid) -> Result<Result<(), Vec<i32>>, KeyError> {
        #[derive(Deserialize)]
        struct Served {
            processes: Vec<i32>,
        }
        let error = match self.0.call("", "ForgetVolume", ForgetVolume { volume }, &[]) {
            Ok((Nothing {}, _)) => return Ok(Ok(())),
            Err(Failed::Method(error)) => error,
            Err(Failed::Key(error)) => return Err(error),
        };
        if error.name.strip_prefix(INTERFACE) == Some(".Served")
            && let Ok(Served { processes }) = parsing::json_value(Value::Object(error.parameters.clone()))
        {
            return Ok(Err(processes));
        }
        Err(self.0.refused("", error))
    }

    /// Has the agent write down how far the erasure of a volume has come.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn report_erasure(&self, erasure: &Erasure) -> Result<(), KeyError> {
        self.0.ask::<Nothing>("", "ReportErasure", erasure, &[]).map(drop)
    }

    /// Asks for what the agent may refuse for the sake of volumes.
    fn manage<T: DeserializeOwned>(
        &self,
        provider: &str,
        method: &str,
        parameters: impl Serialize,
    ) -> Result<T, GuardError> {
        let error = match self.0.call(provider, method, parameters, &[]) {
            Ok((answer, _)) => return Ok(answer),
            Err(Failed::Method(error)) => error,
            Err(Failed::Key(error)) => return Err(error.into()),
        };
        let told = Value::Object(error.parameters.clone());
        match error.name.strip_prefix(INTERFACE) {
            Some(".InUse") => {
                if let Ok(InUse {
                    what,
                    volumes,
                    count,
                    full,
                }) = parsing::json_value(told)
                {
                    let uses = Uses { volumes, count, full };
                    return Err(GuardError::InUse { what, uses });
                }
            }
            Some(".NotBackedUp") => {
                if let Ok(NotBackedUp { provider }) = parsing::json_value(told) {
                    return Err(GuardError::NotBackedUp(provider));
                }
            }
            _ => {}
        }
        Err(self.0.refused(provider, error).into())
    }
}

impl Providers for Client {
    fn provider(&self, name: &str) -> Result<Arc<dyn KeyProvider>, KeyError> {
        self.0.provider(name)
    }

    fn default_name(&self) -> Result<Option<String>, KeyError> {
        self.0.default_name()
    }
}

/// All of a list, of which `page` tells what begins at an entry, and where to go on.
fn all_pages<T>(
    mut page: impl FnMut(usize) -> Result<(Vec<T>, Option<usize>), KeyError>,
) -> Result<Vec<T>, KeyError> {
    let (mut all, mut from) = (Vec::new(), 0);
    loop {
        let (entries, next) = page(from)?;
        all.extend(entries);
        match next {
            Some(next) if next > from => from = next,
            _ => return Ok(all),
        }
    }
}

/// Whether the connection ended before an answer. A call that was heard nevertheless may be made again: a KEK too many, or
/// a secret once more.
fn has_hung_up(error: &CallError) -> bool {
    match error {
        CallError::NoAnswer => true,
        CallError::Wire(WireError::Io(error)) => {
            matches!(
                error.kind(),
                io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
            )
        }
        _ => false,
    }
}
