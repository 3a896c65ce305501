//! `--wait-for STATE`: the states one can wait for, and the waiting.

use crate::human;
use mirror_core::control::MirrorStatus;
use mirror_core::error::{ErrorId, Refusal};
use mirror_core::types::{DiskState, LinkState, Role};
use std::time::{Duration, Instant};

/// The pause between two looks.
pub const POLL: Duration = Duration::from_millis(100);

/// A state to wait for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Goal {
    /// This node's role.
    Role(Role),
    /// This node's replica.
    Disk(DiskState),
    /// The link.
    Link(LinkState),
    /// Connected, both replicas UpToDate, no resync.
    Synced,
    /// A resync is under way.
    Resync,
}

const GOALS: [(&str, Goal); 13] = [
    ("Primary", Goal::Role(Role::Primary)),
    ("Secondary", Goal::Role(Role::Secondary)),
    ("UpToDate", Goal::Disk(DiskState::UpToDate)),
    ("Consistent", Goal::Disk(DiskState::Consistent)),
    ("Outdated", Goal::Disk(DiskState::Outdated)),
    ("Inconsistent", Goal::Disk(DiskState::Inconsistent)),
    ("Failed", Goal::Disk(DiskState::Failed)),
    ("Diskless", Goal::Disk(DiskState::Diskless)),
    ("Connected", Goal::Link(LinkState::Connected)),
    ("Connecting", Goal::Link(LinkState::Connecting)),
    ("StandAlone", Goal::Link(LinkState::StandAlone)),
    ("synced", Goal::Synced),
    ("resync", Goal::Resync),
];

impl Goal {
    /// The goal of this name, in any case.
    pub fn parse(text: &str) -> Result<Goal, String> {
        GOALS
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(text))
            .map(|(_, goal)| *goal)
            .ok_or_else(|| {
                let names: Vec<&str> = GOALS.iter().map(|(name, _)| *name).collect();
                format!("no such state; one of {}", names.join(", "))
            })
    }

    /// Whether a mirror is in this state.
    pub fn is_reached(self, status: &MirrorStatus) -> bool {
        match self {
            Goal::Role(role) => status.role == role,
            Goal::Disk(disk) => status.disk == disk,
            Goal::Link(link) => status.link == link,
            Goal::Synced => {
                status.link == LinkState::Connected
                    && status.disk == DiskState::UpToDate
                    && status.peer_disk == DiskState::UpToDate
                    && status.resync.is_none()
            }
            Goal::Resync => status.resync.is_some(),
        }
    }
}

/// Looks again and again until every mirror that `look` shows is in the state, and returns what
/// it saw then. A daemon that cannot be reached, or does not run the mirror, is a state of its
/// own: not yet.
pub fn until(
    goal: Goal,
    timeout: Option<Duration>,
    mut look: impl FnMut() -> Result<Vec<MirrorStatus>, Refusal>,
) -> Result<Vec<MirrorStatus>, Refusal> {
    let start = Instant::now();
    loop {
        let seen = match look() {
            Ok(mirrors) => {
                if !mirrors.is_empty() && mirrors.iter().all(|it| goal.is_reached(it)) {
                    return Ok(mirrors);
                }
                let headlines: Vec<String> = mirrors.iter().map(human::headline).collect();
                headlines.join("; ")
            }
            Err(refusal) if is_not_yet(refusal.id) => refusal.to_string(),
            Err(refusal) => return Err(refusal),
        };
        if timeout.is_some_and(|timeout| start.elapsed() >= timeout) {
            let waited = human::span(start.elapsed().as_secs());
            let message = format!("after {waited} still {seen}; wait longer or look why");
            return Err(Refusal::new(ErrorId::TimedOut, message));
        }
        std::thread::sleep(POLL);
    }
}

fn is_not_yet(id: ErrorId) -> bool {
    matches!(id, ErrorId::DaemonUnreachable | ErrorId::NotRunning)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn synced() -> MirrorStatus {
        MirrorStatus {
            name: "r0".to_owned(),
            role: Role::Primary,
            disk: DiskState::UpToDate,
            peer_disk: DiskState::UpToDate,
            link: LinkState::Connected,
            ..MirrorStatus::default()
        }
    }

    #[test]
    fn every_name_in_any_case() {
        for (name, goal) in GOALS {
            assert_eq!(Goal::parse(name), Ok(goal));
            assert_eq!(Goal::parse(&name.to_uppercase()), Ok(goal));
            assert_eq!(Goal::parse(&name.to_lowercase()), Ok(goal));
        }
        assert!(Goal::parse("Unknown").unwrap_err().contains("synced"));
    }

    #[test]
    fn names_are_those_of_the_states() {
        for (name, goal) in GOALS {
            let spelled = match goal {
                Goal::Role(role) => role.to_string(),
                Goal::Disk(disk) => disk.to_string(),
                Goal::Link(link) => link.to_string(),
                Goal::Synced | Goal::Resync => continue,
            };
            assert_eq!(name, spelled);
        }
    }

    #[test]
    fn synced_means_all_of_it() {
        assert!(Goal::Synced.is_reached(&synced()));
        let cases = [
            MirrorStatus {
                link: LinkState::Connecting,
                ..synced()
            },
            MirrorStatus {
                disk: DiskState::Consistent,
                ..synced()
            },
            MirrorStatus {
                peer_disk: DiskState::Inconsistent,
                ..synced()
            },
        ];
        for status in cases {
            assert!(!Goal::Synced.is_reached(&status));
        }
    }

    #[test]
    fn waits_through_a_daemon_that_is_not_there_yet() {
        let mut looks = 0;
        let seen = until(Goal::Synced, Some(Duration::from_secs(10)), || {
            looks += 1;
            match looks {
                1 => Err(Refusal::new(ErrorId::DaemonUnreachable, "not there")),
                2 => Ok(vec![MirrorStatus::default()]),
                _ => Ok(vec![synced()]),
            }
        });
        assert_eq!(seen.unwrap(), vec![synced()]);
        assert_eq!(looks, 3);
    }

    #[test]
    fn gives_up_in_time_and_says_what_it_saw() {
        let refusal = until(Goal::Resync, Some(Duration::ZERO), || Ok(vec![synced()])).unwrap_err();
        assert_eq!(refusal.id, ErrorId::TimedOut);
        assert!(
            refusal
                .message
                .contains("Primary/Unknown  UpToDate/UpToDate"),
            "{refusal}"
        );
    }

    #[test]
    fn a_real_refusal_ends_the_waiting() {
        let denied = Refusal::new(ErrorId::DaemonDenied, "no");
        assert_eq!(
            until(Goal::Synced, None, || Err(denied.clone())),
            Err(denied)
        );
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".*") {
            let _ = Goal::parse(&text);
        }
    }
}
