//! What a forced command would lose, in words, from what is known before it is given.
//!
//! `None` means that nothing is lost that the same command without force would keep.

use crate::human;
use mirror_core::control::{Arbitration, MirrorStatus};
use mirror_core::meta::superblock::{Superblock, Trust};
use mirror_core::types::{DiskState, Holders, LinkState, Role};

/// Of `kagami primary --force`.
pub fn of_force(status: &MirrorStatus) -> Option<String> {
    let arbitrated = status.arbitration != Arbitration::Unarbitrated;
    let lost = match status.disk {
        _ if status.role == Role::Primary => return None,
        DiskState::UpToDate if arbitrated => {
            "the right to serve is taken from the peer; if it runs, what it still acknowledges is \
             lost"
        }
        // The last three have nothing to serve, by force neither.
        DiskState::UpToDate | DiskState::Diskless | DiskState::Failed | DiskState::Unknown => {
            return None;
        }
        DiskState::Inconsistent => {
            "it would serve a mix of old and new blocks, and what only the peer has is lost"
        }
        DiskState::Outdated => {
            "the peer went on without it, and every write that only the peer has is lost"
        }
        DiskState::Consistent => {
            "the peer may have acknowledged writes that are not in it, and these are lost"
        }
    };
    Some(format!(
        "{}: this copy is {}, {}; {}: {lost}",
        status.name,
        status.disk,
        difference(status),
        peer(status)
    ))
}

/// Of `kagami connect --discard-my-data`.
pub fn of_discarding(status: &MirrorStatus) -> Option<String> {
    // Who has agreed with the peer, or never had anything, has nothing to discard.
    if status.link == LinkState::Connected || status.generation.is_empty() {
        return None;
    }
    Some(format!(
        "{}: this copy is {}, {}; {}: where they diverged, what was written only here, at most \
         {}, is lost",
        status.name,
        status.disk,
        difference(status),
        peer(status),
        human::size(status.dirty_bytes),
    ))
}

/// Of `kagami invalidate`: always a whole copy.
pub fn of_invalidating(status: &MirrorStatus) -> String {
    format!(
        "{}: this copy ({}, {}) is thrown away and copied anew; {}, and until that is done it has \
         the only good copy, if it has one",
        status.name,
        human::size(status.size_bytes),
        status.disk,
        peer(status),
    )
}

/// Of replacing this replica's metadata: its history. A replica that never served has none.
pub fn of_recreating(old: &Superblock) -> Option<String> {
    if old.generation.is_unborn() {
        return None;
    }
    let trust = match old.trust {
        Trust::Inconsistent => DiskState::Inconsistent,
        Trust::Outdated => DiskState::Outdated,
        Trust::UpToDate => DiskState::UpToDate,
    };
    let last = match old.holders {
        Holders::Sole | Holders::Widening => {
            ", and it may be the only one with the last acknowledged writes"
        }
        Holders::Nobody | Holders::Both | Holders::Peer => "",
    };
    Some(format!(
        "{}: the history of this copy is forgotten (generation {}, recorded as {trust}{last}): it \
         counts as unknown, and the first sync from the peer overwrites all of it",
        old.mirror_name,
        human::generation(&old.generation.to_string()),
    ))
}

fn difference(status: &MirrorStatus) -> String {
    format!(
        "generation {}, {} out of sync",
        human::generation(&status.generation),
        human::size(status.dirty_bytes)
    )
}

fn peer(status: &MirrorStatus) -> String {
    match status.link {
        LinkState::Connected => {
            format!("the peer is {}, {}", status.peer_role, status.peer_disk)
        }
        LinkState::Connecting | LinkState::StandAlone => {
            format!("the peer is not connected ({})", status.link)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mirror_core::types::{Generation, GenerationId, ReplicaId};

    fn status(role: Role, disk: DiskState, link: LinkState) -> MirrorStatus {
        MirrorStatus {
            name: "r0".to_owned(),
            role,
            disk,
            link,
            peer_role: Role::Secondary,
            peer_disk: DiskState::UpToDate,
            generation: "3:0123456789abcdef".to_owned(),
            dirty_bytes: 8192,
            size_bytes: 1 << 30,
            ..MirrorStatus::default()
        }
    }

    /// Rows: role, disk, link, and what `primary --force` would lose.
    #[test]
    fn force_loses_what_the_plain_command_would_keep() {
        use DiskState::{Consistent, Diskless, Inconsistent, Outdated, UpToDate};
        use LinkState::{Connected, Connecting, StandAlone};
        let rows = [
            (Role::Primary, UpToDate, Connected, None),
            (Role::Primary, Inconsistent, Connecting, None),
            (Role::Secondary, UpToDate, Connected, None),
            (Role::Secondary, UpToDate, StandAlone, None),
            (Role::Secondary, Diskless, Connecting, None),
            (
                Role::Secondary,
                Consistent,
                Connecting,
                Some("not connected (Connecting)"),
            ),
            (
                Role::Secondary,
                Outdated,
                StandAlone,
                Some("the peer went on without it"),
            ),
            (
                Role::Secondary,
                Inconsistent,
                Connected,
                Some("the peer is Secondary, UpToDate: it would serve a mix"),
            ),
        ];
        for (role, disk, link, part) in rows {
            let loss = of_force(&status(role, disk, link));
            assert_eq!(loss.is_some(), part.is_some(), "{role} {disk} {link}");
            if let (Some(loss), Some(part)) = (loss, part) {
                assert!(loss.contains(part), "{loss}");
                assert!(
                    loss.starts_with(&format!(
                        "r0: this copy is {disk}, generation 3:01234567, 8 KiB out of sync"
                    )),
                    "{loss}"
                );
            }
        }
        let arbitrated = MirrorStatus {
            arbitration: Arbitration::Arbitrated,
            ..status(Role::Secondary, UpToDate, StandAlone)
        };
        assert!(of_force(&arbitrated).is_some_and(|loss| loss.contains("taken from the peer")));
    }

    #[test]
    fn what_was_agreed_is_not_discarded() {
        let apart = status(Role::Secondary, DiskState::UpToDate, LinkState::StandAlone);
        let loss = of_discarding(&apart).unwrap();
        assert!(loss.ends_with("at most 8 KiB, is lost"), "{loss}");
        let agreed = MirrorStatus {
            link: LinkState::Connected,
            ..apart.clone()
        };
        assert_eq!(of_discarding(&agreed), None);
        let unborn = MirrorStatus {
            generation: String::new(),
            ..apart
        };
        assert_eq!(of_discarding(&unborn), None);
    }

    #[test]
    fn a_replica_that_never_served_has_no_history() {
        let mut old = Superblock::unborn(ReplicaId(1), 1 << 20);
        old.mirror_name = "r0".to_owned();
        assert_eq!(of_recreating(&old), None);
        old.generation = Generation {
            counter: 3,
            id: GenerationId(5 << 96),
        };
        old.trust = Trust::UpToDate;
        old.holders = Holders::Both;
        let loss = of_recreating(&old).unwrap();
        assert!(
            loss.contains("(generation 3:00000005, recorded as UpToDate): it"),
            "{loss}"
        );
        old.holders = Holders::Sole;
        let loss = of_recreating(&old).unwrap();
        assert!(
            loss.contains("the only one with the last acknowledged writes"),
            "{loss}"
        );
    }
}
