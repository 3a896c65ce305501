//! What a node shows of itself.

use super::Node;
use super::link::Mode;
use super::request_table::Kind;
use super::resync::Progress;
use crate::control::{Arbitration, Counters, Direction, MirrorStatus, ResyncStatus};
use crate::types::{DiskState, Holders, LinkState, Role, Time};

/// Running totals of completed guest requests and resyncs.
#[derive(Debug, Default)]
pub(super) struct Totals {
    done: Counters,
    /// Resyncs completed.
    pub(super) resyncs: u64,
}

impl Totals {
    /// Counts a completed request of `bytes` bytes that took `took_ms` milliseconds.
    pub(super) fn count(&mut self, kind: Kind, bytes: u64, took_ms: u64) {
        match kind {
            Kind::Read => {
                self.done.reads += 1;
                self.done.read_bytes += bytes;
                return;
            }
            Kind::Write { .. } | Kind::Zero { .. } => {
                self.done.writes += 1;
                self.done.written_bytes += bytes;
            }
            Kind::Flush => self.done.flushes += 1,
        }
        self.done.max_stall_ms = self.done.max_stall_ms.max(took_ms);
    }
}

/// What a node says of itself and its peer, in the core's own terms: [`MirrorStatus`] without its texts
/// and figures.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Standing {
    /// Its role.
    pub role: Role,
    /// Its peer's, as it was last heard.
    pub peer_role: Role,
    /// Its replica.
    pub disk: DiskState,
    /// Its peer's replica, as it was last heard.
    pub peer_disk: DiskState,
    /// Its link.
    pub link: LinkState,
    /// Who holds everything that was acknowledged, by its record.
    pub holders: Holders,
    /// Whether an arbiter is asked.
    pub arbitration: Arbitration,
    /// Bytes of blocks that may differ.
    pub dirty_bytes: u64,
    /// Its side of a resync that is under way.
    pub resync: Option<Direction>,
    /// An operator, on this node or its peer, holds resyncs back.
    pub resync_is_held: bool,
}

impl Standing {
    /// Whether its record names the node itself as a holder.
    pub fn names_itself(&self) -> bool {
        self.holders == Holders::Both || self.names_itself_alone()
    }

    /// Whether its record names the node itself and nobody else. With a widening pending that decides
    /// nothing (R5).
    pub fn names_itself_alone(&self) -> bool {
        matches!(self.holders, Holders::Sole | Holders::Widening)
    }

    /// Whether it takes its replica and its peer's for equal.
    pub fn is_in_sync(&self) -> bool {
        self.link == LinkState::Connected
            && self.disk == DiskState::UpToDate
            && self.peer_disk == DiskState::UpToDate
            && self.dirty_bytes == 0
            && self.resync.is_none()
    }
}

impl Node {
    /// Where it stands now.
    pub fn standing(&self) -> Standing {
        let session = self.link.session();
        Standing {
            role: self.role,
            peer_role: session.map_or(Role::Unknown, |session| session.peer.role),
            disk: self.disk,
            peer_disk: session.map_or(DiskState::Unknown, |session| session.peer.disk),
            link: self.link.state(),
            holders: self.record.holders,
            arbitration: match (self.is_arbitrated(), self.is_asking()) {
                (false, _) => Arbitration::Unarbitrated,
                (true, false) => Arbitration::Arbitrated,
                (true, true) => Arbitration::Asking,
            },
            dirty_bytes: self.bitmap.dirty_bytes(),
            resync: self.copying().map(|(direction, _)| direction),
            resync_is_held: self.resync_is_held(),
        }
    }

    /// What `kagami status` shows of it, but for what only the driver counts.
    pub fn status(&self, now: Time) -> MirrorStatus {
        let standing = self.standing();
        let (me, peer) = (self.config.node.clone(), self.config.peer.clone());
        MirrorStatus {
            name: self.config.mirror.clone(),
            role: standing.role,
            peer_role: standing.peer_role,
            disk: standing.disk,
            peer_disk: standing.peer_disk,
            link: standing.link,
            generation: self.generation_in_words(),
            holders: match standing.holders {
                Holders::Nobody => Vec::new(),
                Holders::Both => {
                    let mut both = vec![me, peer];
                    both.sort();
                    both
                }
                // Until a widening takes effect the record names this replica alone.
                Holders::Sole | Holders::Widening => vec![me],
                Holders::Peer => vec![peer],
            },
            arbitration: standing.arbitration,
            size_bytes: self.record.mirror_size,
            dirty_bytes: standing.dirty_bytes,
            unsettled_bytes: self.log.unsettled_bytes(),
            resync: self.resync_status(now),
            verify: self.verify.as_ref().map(|verify| verify.status(now)),
            reasons: self.reasons(),
            counters: self.totals(),
        }
    }

    /// Running totals, and what is in flight.
    pub fn totals(&self) -> Counters {
        Counters {
            in_flight: self.requests.len() as u64,
            resyncs: self.counters.resyncs,
            ..self.counters.done
        }
    }

    /// This side of a resync that is under way.
    fn copying(&self) -> Option<(Direction, &Progress)> {
        match &self.link.session()?.mode {
            Mode::Source(resync) => Some((Direction::Source, &resync.progress)),
            Mode::Target(copying) => Some((Direction::Target, &copying.progress)),
            Mode::Idle(_) | Mode::InSync => None,
        }
    }

    fn resync_status(&self, now: Time) -> Option<ResyncStatus> {
        let (direction, progress) = self.copying()?;
        // Blocks may be copied again in a second walk.
        let total = progress.total.max(progress.done);
        let rate = progress.rate(now);
        Some(ResyncStatus {
            direction,
            done_bytes: progress.done,
            total_bytes: total,
            sent_bytes: progress.sent,
            rate_bytes_per_second: rate,
            eta_seconds: (total - progress.done).checked_div(rate),
            paused: self.resync_is_held(),
        })
    }

    fn reasons(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        self.link_reasons(&mut reasons);
        reasons.extend(self.arbitration_reason());
        if self.resync_is_held() {
            reasons.push("the resync is held; `kagami resync resume` lets it go on".to_owned());
        }
        if self.disk == DiskState::Outdated {
            reasons.push(format!(
                "{} went on alone in a later generation",
                self.config.peer
            ));
        }
        reasons
    }
}
