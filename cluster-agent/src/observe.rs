//! From one look at the daemon to the next: what changed, in words. Pure.

use anyhow::Result;
use log::Level;
use mirror_core::control::MirrorStatus;
use mirror_core::types::{DiskState, LinkState};

/// The last look.
#[derive(Debug, Default)]
pub struct View {
    /// `None` before the first look, and while the daemon does not answer.
    mirrors: Option<Vec<MirrorStatus>>,
    /// Whether its absence was said.
    absence_told: bool,
}

/// A line for the log.
#[derive(Debug, PartialEq, Eq)]
pub struct Change {
    /// How much it matters.
    pub level: Level,
    /// What changed.
    pub text: String,
}

impl View {
    /// Takes a new look and says what changed since the one before.
    pub fn update(&mut self, seen: Result<Vec<MirrorStatus>>) -> Vec<Change> {
        let mirrors = match seen {
            Ok(mirrors) => mirrors,
            Err(error) => return self.lost(&error),
        };
        self.absence_told = false;
        let before = self.mirrors.replace(mirrors.clone()).unwrap_or_default();
        mirrors
            .iter()
            .filter_map(|now| change(&before, now))
            .collect()
    }

    fn lost(&mut self, error: &anyhow::Error) -> Vec<Change> {
        self.mirrors = None;
        if std::mem::replace(&mut self.absence_told, true) {
            return Vec::new();
        }
        let text = format!("the daemon does not answer: {error:#}");
        vec![Change {
            level: Level::Error,
            text,
        }]
    }
}

fn change(before: &[MirrorStatus], now: &MirrorStatus) -> Option<Change> {
    let key = |status: &MirrorStatus| {
        (
            status.role,
            status.peer_role,
            status.disk,
            status.peer_disk,
            status.link,
            status.holders.clone(),
        )
    };
    let old = before.iter().find(|old| old.name == now.name);
    if old.is_some_and(|old| key(old) == key(now)) {
        return None;
    }
    let well = now.link == LinkState::Connected && now.disk == DiskState::UpToDate;
    let reasons = if now.reasons.is_empty() {
        String::new()
    } else {
        format!(" ({})", now.reasons.join("; "))
    };
    Some(Change {
        level: if well { Level::Info } else { Level::Warn },
        text: format!(
            "{}: {}/{} {}/{} {} holders {}{reasons}",
            now.name,
            now.role,
            now.peer_role,
            now.disk,
            now.peer_disk,
            now.link,
            now.holders.join(",")
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;

    fn mirror(disk: DiskState, link: LinkState) -> MirrorStatus {
        MirrorStatus {
            name: "r0".into(),
            disk,
            link,
            ..MirrorStatus::default()
        }
    }

    #[test]
    fn only_changes_are_told() {
        let mut view = View::default();
        let well = || mirror(DiskState::UpToDate, LinkState::Connected);
        assert_eq!(view.update(Ok(vec![well()])).len(), 1);
        assert_eq!(view.update(Ok(vec![well()])), []);
        let busy = MirrorStatus {
            dirty_bytes: 4096,
            ..well()
        };
        assert_eq!(view.update(Ok(vec![busy])), []);
        let alone = view.update(Ok(vec![mirror(DiskState::UpToDate, LinkState::Connecting)]));
        assert_eq!(alone[0].level, Level::Warn);
        assert!(
            alone[0]
                .text
                .starts_with("r0: Secondary/Unknown UpToDate/Unknown Connecting")
        );
    }

    #[test]
    fn an_absent_daemon_is_told_once() {
        let mut view = View::default();
        assert_eq!(view.update(Err(anyhow!("gone")))[0].level, Level::Error);
        assert_eq!(view.update(Err(anyhow!("gone"))), []);
        assert_eq!(
            view.update(Ok(vec![mirror(DiskState::UpToDate, LinkState::Connected)]))
                .len(),
            1
        );
        assert_eq!(view.update(Err(anyhow!("gone"))).len(), 1);
    }
}
