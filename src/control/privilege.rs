//! Privileges, with the names of vSphere's (`Cryptographer.*`), granted to users and groups.
//!
//! Root, and the user that the process runs as, have all privileges, since they could get them anyway. Other users have only
//! granted privileges.
//!
//! A grant can be limited to some volumes, by UUID: a wrapped key is bound to its volume's UUID, so other volumes do not
//! open, for any header that a caller presents. Paths would enforce nothing: a user that serves a disk can write to it, and
//! so could copy another volume's header to the granted path.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::peer::Peer;

/// A privilege.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Privilege {
    /// Open a volume for another purpose than to serve it to a guest.
    Access,
    /// Bind a new volume to a KEK.
    EncryptNew,
    /// Remove key providers.
    ManageKeyServers,
    /// Ask for KEKs' states and for the volumes that they open, take them out of use, and push them to the agent.
    ManageKeys,
    /// Open a volume to serve it to a guest that migrates here.
    Migrate,
    /// See the key providers, whether they work, and which volumes they open; which volumes are served, and what happens to
    /// keys and disks.
    ReadKeyServersInfo,
    /// Give a volume another KEK.
    Recrypt,
    /// Open a volume to serve it to a guest.
    RegisterVM,
}

impl Privilege {
    /// Whether it is about volumes that are there, so that it can be granted for some of them.
    pub fn is_of_volumes(self) -> bool {
        matches!(
            self,
            Self::Access | Self::Migrate | Self::Recrypt | Self::RegisterVM
        )
    }
}

impl fmt::Display for Privilege {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Privileges for a user or a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// Who.
    pub to: Grantee,
    /// What.
    pub privileges: BTreeSet<Privilege>,
    /// For which volumes; none if for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volumes: Option<BTreeSet<Uuid>>,
}

impl Grant {
    /// What is about no volume takes the privilege alone.
    fn is_for(&self, volume: Option<Uuid>) -> bool {
        match (&self.volumes, volume) {
            (Some(volumes), Some(volume)) => volumes.contains(&volume),
            _ => true,
        }
    }
}

/// Who is granted something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Grantee {
    /// A user, by number.
    User(u32),
    /// All members of a group, by number.
    Group(u32),
}

impl Grantee {
    fn is(self, peer: &Peer) -> bool {
        match self {
            Self::User(user) => peer.user == user,
            Self::Group(group) => peer.groups.contains(&group),
        }
    }
}

/// All grants of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grants(Vec<Grant>);

impl Grants {
    /// These and no others.
    pub fn new(grants: Vec<Grant>) -> Self {
        Self(grants)
    }

    /// Those that are about `volume`, and say nothing of others.
    pub fn about(&self, volume: Uuid) -> Self {
        let about = |grant: &Grant| {
            grant.is_for(Some(volume)).then(|| Grant {
                volumes: grant.volumes.is_some().then(|| [volume].into()),
                ..grant.clone()
            })
        };
        Self(self.0.iter().filter_map(about).collect())
    }

    /// Whether anything was granted to `peer`.
    pub fn know(&self, peer: &Peer) -> bool {
        has_all(peer) || self.0.iter().any(|grant| grant.to.is(peer))
    }

    /// Whom a refusal is counted for: a user that something was granted to, or all others together.
    pub fn caller(&self, peer: &Peer) -> Option<u32> {
        self.know(peer).then_some(peer.user)
    }

    /// Whether `peer` may do what takes `privilege`, to `volume` if it is about one.
    pub fn allow(&self, peer: &Peer, privilege: Privilege, volume: Option<Uuid>) -> bool {
        let allows = |grant: &Grant| {
            grant.to.is(peer) && grant.privileges.contains(&privilege) && grant.is_for(volume)
        };
        has_all(peer) || self.0.iter().any(allows)
    }
}

/// Root, and the user that this process runs as.
pub fn has_all(peer: &Peer) -> bool {
    peer.user == 0 || peer.user == rustix::process::geteuid().as_raw()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(user: u32, groups: &[u32]) -> Peer {
        Peer {
            user,
            groups: groups.to_vec(),
            process: 1,
        }
    }

    #[test]
    fn privileges_are_those_of_the_user_and_of_its_groups_and_no_others() {
        let grants = Grants::new(vec![
            Grant {
                to: Grantee::User(4_000_001),
                privileges: [Privilege::Access].into(),
                volumes: None,
            },
            Grant {
                to: Grantee::Group(4_000_002),
                privileges: [Privilege::RegisterVM, Privilege::Recrypt].into(),
                volumes: None,
            },
        ]);
        let stranger = peer(4_000_003, &[4_000_001]);
        let user = peer(4_000_001, &[4_000_009]);
        let member = peer(4_000_004, &[1, 4_000_002]);
        let both = peer(4_000_001, &[4_000_002]);
        for (privilege, allowed) in [
            (Privilege::Access, [false, true, false, true]),
            (Privilege::RegisterVM, [false, false, true, true]),
            (Privilege::Recrypt, [false, false, true, true]),
            (Privilege::EncryptNew, [false; 4]),
            (Privilege::ManageKeys, [false; 4]),
        ] {
            let found = [&stranger, &user, &member, &both].map(|peer| grants.allow(peer, privilege, None));
            assert_eq!(found, allowed, "{privilege}");
            assert!(grants.allow(&peer(0, &[0]), privilege, None));
        }
    }

    #[test]
    fn a_grant_for_some_volumes_is_for_no_others() {
        let [own, shared, other] = [1, 2, 3].map(Uuid::from_u128);
        let grant = |to, privilege, volumes: &[Uuid]| Grant {
            to,
            privileges: [privilege].into(),
            volumes: Some(volumes.iter().copied().collect()),
        };
        let (user, group) = (Grantee::User(4_000_001), Grantee::Group(4_000_002));
        let grants = Grants::new(vec![
            grant(user, Privilege::RegisterVM, &[own]),
            grant(group, Privilege::RegisterVM, &[shared]),
            grant(user, Privilege::Recrypt, &[]),
        ]);
        let (single, member) = (peer(4_000_001, &[4_000_001]), peer(4_000_001, &[4_000_002]));
        let may = |peer, volume| grants.allow(peer, Privilege::RegisterVM, Some(volume));
        assert_eq!(
            [own, shared, other].map(|volume| may(&single, volume)),
            [true, false, false]
        );
        assert_eq!(
            [own, shared, other].map(|volume| may(&member, volume)),
            [true, true, false]
        );
        assert!(!grants.allow(&single, Privilege::Recrypt, Some(own)));
        assert!(grants.know(&single) && grants.allow(&single, Privilege::Recrypt, None));
    }
}
