//! What a node shows of itself.

use super::Node;
use super::link::Mode;
use super::request_table::Kind;
use crate::control::{Arbitration, Counters, Direction, MirrorStatus, ResyncStatus};
use crate::types::{DiskState, Holders, Role, Time};

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

impl Node {
    /// What `kagami status` shows of it, but for what only the driver counts.
    pub fn status(&self, now: Time) -> MirrorStatus {
        let session = self.link.session();
        let (me, peer) = (self.config.node.clone(), self.config.peer.clone());
        MirrorStatus {
            name: self.config.mirror.clone(),
            role: self.role,
            peer_role: session.map_or(Role::Unknown, |session| session.peer.role),
            disk: self.disk,
            peer_disk: session.map_or(DiskState::Unknown, |session| session.peer.disk),
            link: self.link.state(),
            generation: self.generation_in_words(),
            holders: match self.record.holders {
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
            arbitration: match (self.is_arbitrated(), self.is_asking()) {
                (false, _) => Arbitration::Unarbitrated,
                (true, false) => Arbitration::Arbitrated,
                (true, true) => Arbitration::Asking,
            },
            size_bytes: self.record.mirror_size,
            dirty_bytes: self.bitmap.dirty_bytes(),
            unsettled_bytes: self.log.unsettled_bytes(),
            resync: self.resync_status(now),
            verify: self.verify.as_ref().map(|verify| verify.status(now)),
            reasons: self.reasons(),
            counters: Counters {
                in_flight: self.requests.len() as u64,
                resyncs: self.counters.resyncs,
                ..self.counters.done
            },
        }
    }

    fn resync_status(&self, now: Time) -> Option<ResyncStatus> {
        let (direction, progress) = match &self.link.session()?.mode {
            Mode::Source(resync) => (Direction::Source, &resync.progress),
            Mode::Target(copying) => (Direction::Target, &copying.progress),
            Mode::Idle(_) | Mode::InSync => return None,
        };
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
