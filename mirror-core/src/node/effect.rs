//! What transitions change: in the superblock, for the stage that makes it durable, and in the
//! node, once everything the transition is about is durable.

use super::Node;
use super::boundary::{Action, CommandId, PrimaryMode, Severity};
use super::commands::BY_OPERATOR;
use super::link::{AfterLoss, Mode};
use super::timer::Timer;
use super::transition::{AfterDemote, AfterShrink, Kind};
use crate::meta::superblock::Trust;
use crate::types::{DiskState, Generation, Holders, MirrorId, ReplicaId, Role};
use crate::wire::message::{Goodbye, Lineage};
use crate::wire::{FrameType, Header};

impl Node {
    /// Changes the superblock in memory, for the stage that then makes it durable.
    pub(super) fn apply(&mut self) {
        let Some(active) = &self.transition.active else {
            return;
        };
        let (kind, generation) = (active.kind.clone(), active.generation);
        match kind {
            Kind::Shrink { .. } => {
                self.record.begin_generation(generation);
                self.record.registered = generation;
                // A Primary shrinks because writes wait to be acknowledged in the new generation.
                self.record.used = self.role == Role::Primary;
                self.record.holders = Holders::Sole;
                self.record.proposal = None;
            }
            Kind::OfferSync { whole } => self.apply_offer(whole),
            Kind::PromoteAlone { mode, size, .. } => {
                self.apply_promotion_alone(mode, size, generation);
            }
            Kind::PromoteTogether { lineage, .. } => {
                self.apply_promotion_together(&lineage);
                self.record.primary = true;
                // The peer has recorded it.
                self.record.last_common = lineage.generation;
            }
            Kind::Grant { lineage } => {
                // Whether the peer will record the next one as well, its first write says.
                let shared = self.record.generation;
                self.apply_promotion_together(&lineage);
                if !lineage.whole {
                    self.record.last_common = shared;
                }
            }
            Kind::Demote { .. } => self.record.primary = false,
            Kind::Agree => self.apply_in_sync(),
            Kind::Widen => {
                self.record.registered = self.record.generation;
                self.apply_in_sync();
            }
            Kind::FinishTarget => {
                self.bitmap.clear_all();
                // If it does not come to that, this replica is no holder, and asks for nothing.
                self.record.registered = self.record.generation;
                self.apply_in_sync();
            }
            Kind::BecomeTarget {
                lineage,
                peer_replica,
            } => {
                self.apply_becoming_target(&lineage, peer_replica);
            }
            Kind::Outdate { .. } => {
                self.record.trust = Trust::Outdated;
                if self.is_arbitrated() {
                    // Also a sole holder is none any more once the right was taken from it.
                    self.record.holders = Holders::Peer;
                }
            }
            Kind::Settle { outcome } => self.apply_settled(outcome),
            Kind::Leave { .. } => {}
        }
    }

    fn apply_offer(&mut self, whole: bool) {
        if let Some(theirs) = self.agreeing_with() {
            self.record.peer_replica = theirs.replica;
        }
        if whole {
            self.bitmap.mark_all();
            self.record.all_dirty = true;
        }
    }

    fn apply_in_sync(&mut self) {
        if let Some(theirs) = self.agreeing_with() {
            self.record.peer_replica = theirs.replica;
        }
        self.record.trust = Trust::UpToDate;
        self.record.holders = Holders::Both;
        self.record.proposal = None;
        self.record.in_sync_boot = self.boot;
        self.record.last_common = self.record.generation;
        self.record.all_dirty = false;
        self.record.primary = self.role == Role::Primary;
    }

    fn apply_becoming_target(&mut self, lineage: &Lineage, peer_replica: ReplicaId) {
        let arbiter = self.arbiter();
        let record = &mut self.record;
        record.arbiter = arbiter;
        record.proposal = None;
        record.adopt_history(
            lineage.generation,
            &lineage.ancestry,
            lineage.unused_ancestors,
        );
        record.mirror = lineage.mirror;
        record.mirror_size = lineage.mirror_size;
        record.peer_replica = peer_replica;
        record.trust = Trust::Inconsistent;
        record.holders = Holders::Peer;
        record.primary = false;
        // Its data will be what was written in that generation.
        record.used = true;
        self.bitmap.limit(lineage.mirror_size);
        if lineage.whole {
            // The source has marked every block; marks of an older life here mean nothing.
            self.bitmap.clear_all();
            self.record.all_dirty = false;
        } else if self.invalidating.is_some() {
            self.bitmap.mark_all();
            self.record.all_dirty = true;
        }
    }

    fn apply_promotion_alone(&mut self, mode: PrimaryMode, size: u64, generation: Generation) {
        let first = mode.is_initial();
        self.record.arbiter = self.arbiter();
        if first {
            self.record.mirror = MirrorId((self.id_source.0)());
            self.record.mirror_size = size;
            self.bitmap.limit(self.record.mirror_size);
            self.bitmap.mark_all();
            self.record.all_dirty = true;
        }
        self.was_sole = self.record.holders == Holders::Sole;
        let was_incomplete = self.record.trust == Trust::Inconsistent && !first;
        let unused_at_source = usize::from(self.record.unused_ancestors);
        self.record.begin_generation(generation);
        if !self.was_sole {
            self.record.registered = generation;
        }
        if was_incomplete {
            // What is promoted here is not the generation it was a copy in the making of, nor any
            // before it: the two must look diverged, so that an operator decides between them.
            // Nothing may be withdrawn to hide that: neither this claim, nor on the other side the
            // generation that was copied with the unused ones before it, which would leave their
            // parent.
            let ancestry = &mut self.record.ancestry;
            ancestry.drain(..ancestry.len().min(2 + unused_at_source));
            self.record.unused_ancestors = 0;
            self.record.used = true;
            self.bitmap.mark_all();
            self.record.all_dirty = true;
        }
        self.record.trust = Trust::UpToDate;
        self.record.holders = Holders::Sole;
        self.record.proposal = None;
        self.record.primary = true;
    }

    fn apply_promotion_together(&mut self, lineage: &Lineage) {
        self.record.arbiter = self.arbiter();
        self.record.begin_generation(lineage.generation);
        if !lineage.whole {
            return;
        }
        self.record.mirror = lineage.mirror;
        self.record.mirror_size = lineage.mirror_size;
        if let Some(session) = self.link.session() {
            self.record.peer_replica = session.hello.replica;
        }
        self.bitmap.limit(lineage.mirror_size);
        self.bitmap.clear_all();
        self.record.registered = lineage.generation;
        self.apply_in_sync();
    }

    /// The mirrored size of a first generation: what fits both, as far as the peer is known.
    pub(super) fn initial_size(&self) -> u64 {
        let peer = self
            .link
            .session()
            .map_or(u64::MAX, |session| session.hello.data_size);
        self.record.data_size.min(peer)
    }

    /// Everything the transition is about is durable: it takes effect.
    pub(super) fn complete_transition(&mut self) {
        let Some(active) = self.transition.active.take() else {
            return;
        };
        self.use_is_durable = self.record.used && !self.records.awaits_use();
        match active.kind {
            Kind::Shrink { after } => self.shrunk(after),
            Kind::OfferSync { whole } => self.offer_sync(whole),
            Kind::PromoteAlone { command, mode, .. } => {
                self.became_primary();
                let warnings = self.warnings_of_promotion(mode);
                self.done(command, warnings);
            }
            Kind::PromoteTogether { command, lineage } => {
                if lineage.whole {
                    self.began_clean();
                }
                self.became_primary();
                self.done(command, Vec::new());
            }
            Kind::Grant { lineage } => {
                if lineage.whole {
                    self.began_clean();
                }
                if self.link.session().is_some() {
                    let generation = self.record.generation.tag();
                    self.send(Header::bare(FrameType::Promoted, generation, 0));
                }
            }
            Kind::Demote { then } => self.demoted(then),
            Kind::Agree => self.agreed_in_sync(),
            Kind::BecomeTarget { lineage, .. } => {
                self.disk = DiskState::Inconsistent;
                self.announce_target(lineage.whole);
                if let Some(command) = self.invalidating.take() {
                    self.done(command, Vec::new());
                }
            }
            Kind::FinishTarget => self.target_finished(),
            Kind::Widen => self.widened(),
            Kind::Outdate { .. } => self.disk = DiskState::Outdated,
            Kind::Settle { outcome } => self.proposal_settled(outcome),
            Kind::Leave { command } => {
                self.done(command, Vec::new());
                self.close();
            }
        }
        self.acknowledgements_due = true;
    }

    fn shrunk(&mut self, after: AfterShrink) {
        let generation = self.record.generation;
        self.disk = DiskState::UpToDate;
        self.event(
            Severity::Warning,
            format!("sole holder from generation {generation} on"),
        );
        match after {
            AfterShrink::Resume => {}
            AfterShrink::OfferSync { whole } => {
                if self.agreeing_with().is_some() {
                    self.begin_transition(Kind::OfferSync { whole });
                }
            }
            AfterShrink::Disconnect { command } => {
                let goodbye = Goodbye {
                    outdated_by: Some(generation),
                    reason: BY_OPERATOR.into(),
                };
                self.part(BY_OPERATOR, goodbye, AfterLoss::StandAlone);
                self.parted = Some(BY_OPERATOR.to_owned());
                self.done(command, Vec::new());
            }
            AfterShrink::Verified { repair } => {
                self.verify_ended();
                let goodbye = Goodbye {
                    outdated_by: Some(generation),
                    reason: "a verify found that the copies differ".into(),
                };
                if repair {
                    self.part("its copy differs", goodbye, AfterLoss::Search);
                } else {
                    let verdict = self.verdict_of_verify();
                    self.part(&verdict, goodbye, AfterLoss::StandAlone);
                    self.parted = Some(verdict);
                }
            }
        }
    }

    fn became_primary(&mut self) {
        self.role = Role::Primary;
        // What is written from here on must not be discarded on an old word.
        self.discard = false;
        // Nor does it bow to who went on alone and said so meanwhile: the two have diverged.
        self.outdated_by = None;
        self.disk = DiskState::UpToDate;
        self.serving = true;
        self.out.push(Action::Serve(true));
        let generation = self.record.generation;
        self.event(
            Severity::Info,
            format!("Primary in generation {generation}"),
        );
        // As Secondary it asked for leases in vain.
        self.begin_leasing();
    }

    /// First generation, and the operator said that both replicas are equal.
    fn began_clean(&mut self) {
        self.disk = DiskState::UpToDate;
        self.save_bitmap();
        if let Some(session) = self.link.session_mut() {
            session.mode = Mode::InSync;
            session.peer.disk = DiskState::UpToDate;
        }
    }

    fn demoted(&mut self, then: AfterDemote) {
        self.role = Role::Secondary;
        self.event(Severity::Info, "Secondary".into());
        match then {
            AfterDemote::Answer(command) => self.done(command, Vec::new()),
            AfterDemote::Leave(command) => self.leave(command),
        }
    }

    /// Parts from the peer and closes the store, as a Secondary.
    pub(super) fn leave(&mut self, command: CommandId) {
        let goodbye = Goodbye {
            outdated_by: None,
            reason: "the mirror goes down".into(),
        };
        self.part("going down", goodbye, AfterLoss::StandAlone);
        self.begin_transition(Kind::Leave { command });
    }

    fn target_finished(&mut self) {
        self.disk = DiskState::UpToDate;
        self.by_checksum = false;
        self.counters.resyncs += 1;
        self.save_bitmap();
        if let Some(session) = self.link.session_mut()
            && matches!(session.mode, Mode::Target(_))
        {
            session.mode = Mode::InSync;
            self.send(Header::bare(
                FrameType::SyncFinished,
                self.record.generation.tag(),
                0,
            ));
            self.event(Severity::Info, "resync complete: UpToDate".into());
        }
    }

    fn widened(&mut self) {
        self.timers.cancel(Timer::Checkpoint);
        self.by_checksum = false;
        self.save_bitmap();
        self.counters.resyncs += 1;
        if let Some(session) = self.link.session_mut()
            && matches!(session.mode, Mode::Source(_))
        {
            session.mode = Mode::InSync;
            session.peer.disk = DiskState::UpToDate;
            self.event(Severity::Info, "resync complete: both are UpToDate".into());
        }
    }
}
