//! The agent's methods for the management of keys and providers: list the volumes of a key, revoke keys, remove providers.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::erasure::{Erasure, ErasureStep};
use super::listing::page;
use super::messages::{ForgetVolume, InUse, ListVolumes, NotBackedUp, RemoveProvider, ScanVolumes, Volumes};
use super::service::{Answered, Service, by, check_names, failure, with};
use crate::control::events::Event;
use crate::control::peer::Peer;
use crate::control::privilege::Privilege;
use crate::control::varlink::{MethodError, Reply, Request};
use crate::inventory;
use crate::inventory::verify::{Scanned, verify};
use crate::inventory::{By, Disk, GuardError, Note, Removal, SERVED, Uses, remove_provider, revoke};
use crate::keys::protocol::{INTERFACE, RevokeKek};
use crate::keys::{KeyError, KeyId, KeyReason, Providers};
use crate::path_text::from_text;
use crate::providers::{registry::Registry, registry::RegistryError};

impl Service {
    pub(super) fn list_volumes(&self, mut request: Request<'_>) -> Answered {
        let ListVolumes {
            volume,
            provider,
            key_id,
            from,
        } = request.parameters()?;
        let either = [Privilege::ManageKeys, Privilege::ReadKeyServersInfo];
        self.permit_any(request.peer, &either, None, json!({}))?;
        let listing = self.listing.from(from, || self.index.list());
        let listing = listing.map_err(|error| unreadable(&error))?;
        let matches = |note: &&Note| {
            volume.is_none_or(|volume| note.volume == volume)
                && note.is_under(provider.as_deref(), key_id.as_ref())
        };
        let (notes, next) = page(listing.notes.iter().filter(matches), from);
        let notes = notes.into_iter().cloned();
        let volumes = match self.may_know_places(request.peer) {
            true => verify(notes),
            false => notes.map(inventory::Entry::untold).collect(),
        };
        Ok(Reply::of(Volumes {
            volumes,
            next,
            full: listing.full,
            crowded: listing.crowded.clone(),
        }))
    }

    /// Whether somebody is told what is at the places of notes. Others have named them, and the agent may look where they may not.
    fn may_know_places(&self, peer: &Peer) -> bool {
        self.grants.allow(peer, Privilege::ManageKeys, None)
    }

    pub(super) fn scan_volumes(&self, mut request: Request<'_>) -> Answered {
        let ScanVolumes { paths, missing } = request.parameters()?;
        self.permit(request.peer, Privilege::ManageKeys, None, json!({}))?;
        if paths.is_empty() {
            let dropped = self.index.sweep(missing).map_err(|error| unreadable(&error))?;
            return Ok(Reply::of(Scanned {
                dropped,
                ..Scanned::default()
            }));
        }
        let paths: Vec<_> = paths.iter().map(|path| from_text(path)).collect();
        let absolute = paths
            .iter()
            .map(PathBuf::as_path)
            .filter(|path| path.is_absolute());
        Ok(Reply::of(self.index.scan(absolute, by(request.peer))))
    }

    pub(super) fn revoke_kek(&self, mut request: Request<'_>) -> Answered {
        let RevokeKek {
            provider,
            key_id,
            revocation,
            force,
            dry_run,
        } = request.parameters()?;
        check_names(&provider, Some(&key_id))?;
        let subject = json!({
            "provider": provider, "keyId": key_id, "revocation": revocation, "force": force,
        });
        self.permit(request.peer, Privilege::ManageKeys, None, subject.clone())?;
        let provider = self
            .providers
            .provider(&provider)
            .map_err(|error| failure(&error))?;
        let take_away = |removal| revoke(&*provider, &self.index, &key_id, revocation, &removal);
        let served = self.served(|under| under == (provider.name(), &key_id));
        let guarded = Removal {
            force,
            dry_run: true,
            served: &served,
            ..Removal::default()
        };
        take_away(guarded).map_err(|error| self.guarded(request.peer, error))?;
        if dry_run {
            return Ok(Reply::of(json!({})));
        }
        self.audited(Event::KeyRevoked, request.peer, subject.clone())?;
        // What was seen just now need not be seen again.
        let reach = match take_away(Removal {
            force: true,
            ..Removal::default()
        }) {
            Err(GuardError::Key(error)) => self.judged(request.peer, &subject, Err(error))?,
            result => result.map_err(|error| self.guarded(request.peer, error))?,
        };
        Ok(Reply::of(json!({ "reach": reach })))
    }

    pub(super) fn remove_provider(&self, mut request: Request<'_>) -> Answered {
        let RemoveProvider {
            provider,
            new_default,
            force,
            dry_run,
        } = request.parameters()?;
        check_names(&provider, None)?;
        let subject = json!({ "provider": provider, "force": force });
        self.permit(request.peer, Privilege::ManageKeyServers, None, subject.clone())?;
        let mut registry =
            Registry::open(self.providers.dir()).map_err(|error| self.guarded(request.peer, error.into()))?;
        let mut take_away = |removal| remove_provider(&mut registry, &provider, &removal);
        let served = self.served(|(under, _)| under == provider);
        let removal = Removal {
            new_default: new_default.as_deref(),
            force,
            dry_run: true,
            served: &served,
        };
        take_away(removal).map_err(|error| self.guarded(request.peer, error))?;
        if !dry_run {
            self.audited(Event::ProviderRemoved, request.peer, subject)?;
            take_away(Removal {
                dry_run: false,
                ..removal
            })
            .map_err(|error| self.guarded(request.peer, error))?;
            self.providers.refresh();
        }
        Ok(Reply::of(json!({})))
    }

    /// Takes the caller's word for it: that somebody says so, stands in the log with who it was.
    /// Drops the KEKs of a volume that is unregistered from this host, as vSphere does with a machine's.
    pub(super) fn forget_volume(&self, mut request: Request<'_>) -> Answered {
        let ForgetVolume { volume } = request.parameters()?;
        let subject = json!({ "volume": volume });
        self.permit(request.peer, Privilege::RegisterVM, Some(volume), subject.clone())?;
        self.registered
            .release(volume)
            .map_err(|processes| MethodError::new(INTERFACE, "Served", json!({ "processes": processes })))?;
        // Those under which it was served go here.
        self.tell_ended();
        let listing = self.index.list().map_err(|error| unreadable(&error))?;
        let notes = listing.notes.iter().filter(|note| note.volume == volume);
        let keks: BTreeSet<_> = notes.map(|note| (&note.provider, &note.key_id.0)).collect();
        for (provider, key_id) in keks {
            let key_id = KeyId(key_id.clone());
            if !self.registered.has_any_under((provider, &key_id)) {
                self.providers.forget_for_good(provider, &key_id);
            }
        }
        self.audited(Event::VolumeForgotten, request.peer, subject)?;
        Ok(Reply::default())
    }

    pub(super) fn report_erasure(&self, mut request: Request<'_>) -> Answered {
        let erasure: Erasure = request.parameters()?;
        if erasure.is_too_long() {
            return Err(MethodError::invalid_parameter("path"));
        }
        let any = [Privilege::Access, Privilege::ManageKeys, Privilege::EncryptNew];
        self.permit_any(request.peer, &any, Some(erasure.volume), json!({}))?;
        let (event, fields) = erasure.told();
        self.audited(event, request.peer, fields)?;
        if let ErasureStep::Erased { .. } = erasure.step {
            // Who manages keys could drop any note.
            let by = match self.may_know_places(request.peer) {
                true => By::Owner,
                false => by(request.peer),
            };
            self.index.erased(erasure.volume, &from_text(&erasure.path), by);
        }
        Ok(Reply::of(json!({})))
    }

    /// The volumes that are being served under such keys.
    fn served(&self, matches: impl Fn((&str, &KeyId)) -> bool) -> Vec<Disk> {
        let served = self.registered.alive().into_iter();
        let under = served.filter(|volume| matches((&volume.provider, &volume.key_id)));
        under
            .map(|volume| Disk {
                volume: volume.volume,
                path: "(served)".to_owned(),
                verdict: SERVED.to_owned(),
                why: Some(format!("by process {} of user {}", volume.process, volume.user)),
            })
            .collect()
    }

    /// A refusal on the wire.
    fn guarded(&self, peer: &Peer, error: GuardError) -> MethodError {
        match error {
            GuardError::InUse { what, uses } => {
                let Uses { volumes, count, full } = match self.may_know_places(peer) {
                    true => uses,
                    false => uses.untold(),
                };
                let told = InUse {
                    what,
                    volumes,
                    count,
                    full,
                };
                MethodError::new(INTERFACE, "InUse", told)
            }
            GuardError::NotBackedUp(provider) => {
                MethodError::new(INTERFACE, "NotBackedUp", NotBackedUp { provider })
            }
            GuardError::Key(error) | GuardError::Registry(RegistryError::Key(error)) => failure(&error),
            GuardError::Registry(error) => {
                let location = self.providers.dir().display();
                failure(&KeyError::new("", location, KeyReason::Invalid).because(error))
            }
            GuardError::Index { source, .. } => unreadable(&source),
        }
    }
}

fn unreadable(error: &io::Error) -> MethodError {
    let why: Value = with(json!({}), "reason", error.to_string());
    MethodError::new(INTERFACE, "NoVolumes", why)
}
