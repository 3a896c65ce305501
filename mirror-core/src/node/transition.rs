//! Changes of role, generation and holders: at most one at a time, each a short list of stages.
//!
//! The list of a transition *is* its ordering rule: a stage begins only when the one before it is
//! durable or answered. Without an arbiter [`Stage::AwaitLease`] and [`Stage::Consult`] pass at
//! once.

use super::Node;
use super::arbitration::Settled;
use super::boundary::{Action, CommandId, PrimaryMode};
use super::link::{Mode, PeerTag};
use super::operation::Purpose;
use super::records::Then;
use super::timer::Timer;
use crate::error::ErrorId;
use crate::types::{DiskState, Generation, GenerationId, Holders, ReplicaId, Role, Time};
use crate::wire::message::{Lineage, text_bytes, text_from};
use crate::wire::{FrameType, Header};

/// What is being changed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// This UpToDate replica becomes the sole holder.
    Shrink { after: AfterShrink },
    /// This sole holder gets the peer as a resync target.
    OfferSync { whole: bool },
    /// Become Primary without the peer.
    PromoteAlone {
        command: CommandId,
        mode: PrimaryMode,
        /// Bytes of the mirrored device, if this is its first generation.
        size: u64,
    },
    /// Become Primary with the peer's record of it.
    PromoteTogether {
        command: CommandId,
        lineage: Lineage,
    },
    /// Record that the peer becomes Primary.
    Grant { lineage: Lineage },
    /// Give the role back. Guests have been drained.
    Demote { then: AfterDemote },
    /// Record that both replicas are equal.
    Agree,
    /// Become the target of a resync.
    BecomeTarget {
        lineage: Lineage,
        peer_replica: ReplicaId,
    },
    /// The resync of this target is complete.
    FinishTarget,
    /// The resync of the peer is complete: it becomes a holder again (R5).
    Widen,
    /// The peer went on alone, and said so.
    Outdate { generation: Generation },
    /// Drain and flush before the store is closed.
    Leave { command: CommandId },
    /// Record what became of a swap that an earlier life of the daemon had noted.
    Settle { outcome: Settled },
}

/// What a shrinking was for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum AfterShrink {
    /// The guest's requests go on.
    Resume,
    /// The peer becomes a target.
    OfferSync { whole: bool },
    /// The peer is left behind on an operator's word.
    Disconnect { command: CommandId },
    /// The peer's copy differs, as a verify has found; with `repair` it becomes a target at once.
    Verified { repair: bool },
}

/// What a demotion was for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum AfterDemote {
    /// The role itself.
    Answer(CommandId),
    /// Closing the store.
    Leave(CommandId),
}

/// One step of a transition.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stage {
    /// What was submitted to this disk for the peer or for guests completes.
    Drain,
    /// The leases end that this node gave, or may have given before it was restarted.
    AwaitLease,
    /// Everything that was submitted to this disk completes.
    Rest,
    /// What completed on this disk becomes durable.
    Flush,
    /// What completed on either disk becomes durable.
    FlushBoth,
    /// The intention becomes durable.
    Note,
    /// The intention becomes durable in both slots: it gives a right up.
    NoteTwice,
    /// The arbiter agrees: the register names the holders to be.
    Consult,
    /// The peer answers.
    Ask,
    /// The bitmap on disk becomes the one in memory, and the activity log empty.
    Save,
    /// The change becomes durable in one slot.
    Record,
    /// The change becomes durable in both slots: the loss of one must not bring back the trust or
    /// the record that it ends.
    RecordTwice,
}

impl Kind {
    fn stages(&self) -> &'static [Stage] {
        use Stage::*;
        match self {
            Kind::Shrink { .. } => &[AwaitLease, Flush, Note, Consult, RecordTwice],
            Kind::PromoteAlone { .. } => &[Drain, AwaitLease, Flush, Note, Consult, RecordTwice],
            Kind::OfferSync { .. } => &[Record],
            Kind::PromoteTogether { lineage, .. } if lineage.whole => {
                &[Flush, Note, Consult, Ask, Record]
            }
            Kind::PromoteTogether { .. } => &[Flush, Ask, Record],
            Kind::Grant { .. } | Kind::Agree | Kind::FinishTarget => &[Flush, Record],
            Kind::Demote { .. } => &[FlushBoth, Save, Record],
            Kind::BecomeTarget { .. } => &[Drain, RecordTwice],
            Kind::Widen => &[NoteTwice, Ask, Consult, Record],
            Kind::Outdate { .. } | Kind::Settle { .. } => &[RecordTwice],
            Kind::Leave { .. } => &[Drain, Flush, Rest],
        }
    }

    /// The command that waits for it, if any.
    pub(super) fn command(&self) -> Option<CommandId> {
        match self {
            Kind::PromoteAlone { command, .. }
            | Kind::PromoteTogether { command, .. }
            | Kind::Shrink {
                after: AfterShrink::Disconnect { command },
            }
            | Kind::Leave { command }
            | Kind::Demote {
                then: AfterDemote::Answer(command) | AfterDemote::Leave(command),
            } => Some(*command),
            _ => None,
        }
    }
}

/// The transition under way, if any.
#[derive(Debug, Default)]
pub(super) struct Transition {
    pub(super) active: Option<Active>,
    serial: u32,
}

#[derive(Debug)]
pub(super) struct Active {
    pub(super) kind: Kind,
    /// Index into [`Kind::stages`].
    at: usize,
    /// When the stage began.
    since: Time,
    /// Answers outstanding in [`Stage::FlushBoth`]: this disk's, the peer's.
    flushes: (bool, bool),
    /// The generation to be, of the kinds that begin one.
    pub(super) generation: Generation,
    /// Tells this transition's flushes from those of one that was given up.
    serial: u32,
}

impl Transition {
    pub(super) fn is_idle(&self) -> bool {
        self.active.is_none()
    }

    fn stage(&self) -> Option<Stage> {
        let active = self.active.as_ref()?;
        active.kind.stages().get(active.at).copied()
    }

    /// Since when a stage waits for the peer.
    pub(super) fn waits_for_peer_since(&self) -> Option<Time> {
        let active = self.active.as_ref()?;
        let waits = match self.stage()? {
            Stage::Ask => true,
            Stage::FlushBoth => active.flushes.1,
            _ => false,
        };
        waits.then_some(active.since)
    }

    /// Whether this node's record is about to change: no guest request is submitted, because what
    /// the node said of itself would not hold, and none is acknowledged, because the right to do so
    /// is being asked for.
    pub(super) fn changes_record(&self) -> bool {
        let kind = self.active.as_ref().map(|active| &active.kind);
        matches!(kind, Some(Kind::Shrink { .. } | Kind::OfferSync { .. }))
    }

    /// Whether what became of a swap is on its way to the disk.
    pub(super) fn is_settling(&self) -> bool {
        let kind = self.active.as_ref().map(|active| &active.kind);
        matches!(kind, Some(Kind::Settle { .. }))
    }
}

impl Node {
    /// Starts a transition. Only when none is under way.
    pub(super) fn begin_transition(&mut self, kind: Kind) {
        debug_assert!(
            self.transition.is_idle(),
            "{kind:?} during {:?}",
            self.transition
        );
        let generation = match &kind {
            Kind::PromoteTogether { lineage, .. } => lineage.generation,
            Kind::PromoteAlone { mode, .. } if mode.is_initial() => {
                self.first_generation(Holders::Sole)
            }
            _ => self.next_generation(),
        };
        self.transition.serial = self.transition.serial.wrapping_add(1);
        let serial = self.transition.serial;
        let flushes = (false, false);
        self.transition.active = Some(Active {
            kind,
            at: 0,
            since: self.now,
            flushes,
            generation,
            serial,
        });
        self.enter_stage();
    }

    /// A fresh generation after the present one.
    pub(super) fn next_generation(&mut self) -> Generation {
        Generation {
            counter: self.record.generation.counter + 1,
            id: GenerationId((self.id_source.0)()),
        }
    }

    /// The stage under way has ended well.
    pub(super) fn transition_step(&mut self) {
        if let Some(active) = &mut self.transition.active {
            active.at += 1;
            self.enter_stage();
        }
    }

    fn enter_stage(&mut self) {
        if let Some(active) = &mut self.transition.active {
            active.since = self.now;
        }
        match self.transition.stage() {
            None => self.complete_transition(),
            Some(Stage::Drain | Stage::Save | Stage::Rest) => self.poll_transition(),
            Some(Stage::AwaitLease) => self.await_leases(),
            Some(Stage::Consult) => self.consult(),
            Some(Stage::Flush) => self.flush_for_step(),
            Some(Stage::FlushBoth) => self.flush_both(),
            Some(Stage::Note) => {
                self.note();
                self.commit(Then::Step);
            }
            Some(Stage::NoteTwice) => {
                self.note();
                self.commit_both(Then::Step);
            }
            Some(Stage::Ask) => self.ask(),
            Some(Stage::Record) => {
                self.apply();
                self.commit(Then::Step);
            }
            Some(Stage::RecordTwice) => {
                self.apply();
                self.commit_both(Then::Step);
            }
        }
    }

    fn await_leases(&mut self) {
        if self.may_ask_now() {
            self.transition_step();
        } else {
            self.timers.set(Timer::Lease, self.may_ask_from());
        }
    }

    fn flush_for_step(&mut self) {
        let op = self.ops.start(Purpose::Step(self.transition.serial));
        self.out.push(Action::Flush { op });
    }

    fn flush_both(&mut self) {
        let replicating = self.replicating();
        if let Some(active) = &mut self.transition.active {
            active.flushes = (true, replicating);
        }
        self.flush_for_step();
        if replicating {
            let generation = self.record.generation.tag();
            self.send(Header::bare(
                FrameType::Flush,
                generation,
                PeerTag::Step.encode(),
            ));
        }
    }

    /// This disk's flush for the stage under way succeeded.
    pub(super) fn step_flushed_here(&mut self, serial: u32) {
        if self
            .transition
            .active
            .as_ref()
            .is_none_or(|active| active.serial != serial)
        {
            return;
        }
        match (self.transition.stage(), &mut self.transition.active) {
            (Some(Stage::Flush), _) => self.transition_step(),
            (Some(Stage::FlushBoth), Some(active)) => {
                active.flushes.0 = false;
                self.step_if_both_flushed();
            }
            _ => {}
        }
    }

    /// The peer's flush for the stage under way succeeded.
    pub(super) fn step_flushed_there(&mut self) {
        if let (Some(Stage::FlushBoth), Some(active)) =
            (self.transition.stage(), &mut self.transition.active)
        {
            active.flushes.1 = false;
            self.step_if_both_flushed();
        }
    }

    fn step_if_both_flushed(&mut self) {
        let flushes = self.transition.active.as_ref().map(|active| active.flushes);
        if flushes == Some((false, false)) {
            self.transition_step();
        }
    }

    /// Moves the stages on that wait for something other than an answer.
    pub(super) fn poll_transition(&mut self) {
        match self.transition.stage() {
            Some(Stage::Drain) if self.ops.is_drained() => self.transition_step(),
            Some(Stage::AwaitLease) if self.may_ask_now() => self.transition_step(),
            Some(Stage::Rest) if self.ops.len() == 0 => self.transition_step(),
            Some(Stage::Save) => {
                // Everything is durable on both, or marked in the bitmap.
                if !self.bitmap_is_saved() {
                    self.save_bitmap();
                } else if !self.log.is_empty() && !self.log.is_writing() {
                    self.log.evict_all();
                    self.write_log();
                } else if !self.log.is_saved() {
                    self.write_log();
                } else {
                    self.transition_step();
                }
            }
            _ => {}
        }
    }

    fn note(&mut self) {
        let Some(active) = &self.transition.active else {
            return;
        };
        if active.kind == Kind::Widen {
            self.record.holders = Holders::Widening;
        }
        self.record.proposal = self.proposal_of(&active.kind, active.generation);
        self.begin_leasing();
    }

    fn ask(&mut self) {
        // No new session can stand while a transition is under way, so if there is one it is the
        // one this question belongs to.
        if self.link.session().is_none() {
            return self.transition_lost_link();
        }
        let Some(active) = &self.transition.active else {
            return;
        };
        let generation = self.record.generation.tag();
        match &active.kind {
            Kind::PromoteTogether { lineage, .. } => {
                let bytes = lineage.encode();
                self.send_control(Header::bare(FrameType::Promote, generation, 0), bytes);
            }
            Kind::Widen => self.send(Header::bare(FrameType::SyncFinish, generation, 0)),
            _ => {}
        }
    }

    /// The peer answered the question of the stage under way.
    pub(super) fn peer_answered(&mut self, header: Header) {
        let kind = self.transition.active.as_ref().map(|active| &active.kind);
        // Who grants a generation speaks in it.
        let answered = match (header.kind, kind) {
            (FrameType::Promoted, Some(Kind::PromoteTogether { lineage, .. })) => {
                Some(lineage.generation)
            }
            (FrameType::SyncFinished, Some(Kind::Widen)) => Some(self.record.generation),
            _ => None,
        };
        let expected = answered.map(Generation::tag) == Some(header.generation);
        if expected && self.transition.stage() == Some(Stage::Ask) {
            self.transition_step();
        } else {
            self.protocol_error("an answer to no question");
        }
    }

    /// The peer does not grant the promotion to the generation with the tag `asked`.
    pub(super) fn promotion_refused(&mut self, asked: u64, bytes: &[u8]) {
        let kind = self.transition.active.as_ref().map(|active| &active.kind);
        match (kind, self.transition.stage()) {
            (Some(Kind::PromoteTogether { command, lineage }), Some(Stage::Ask))
                if lineage.generation.tag() == asked =>
            {
                let command = *command;
                self.transition.active = None;
                let text = format!("{} refused: {}", self.config.peer, text_from(bytes));
                self.refuse(command, ErrorId::PeerRefused, &text);
            }
            _ => self.protocol_error("an answer to no question"),
        }
    }

    /// The peer wants to become Primary.
    pub(super) fn peer_wants_promotion(&mut self, bytes: &[u8]) {
        let lineage = match Lineage::decode(FrameType::Promote, bytes) {
            Ok(lineage) => lineage,
            Err(error) => return self.protocol_error(&error.to_string()),
        };
        match self.objection_to_promotion(&lineage) {
            None => {
                // What it writes from then on takes no range here.
                let cause = format!("{} becomes Primary", self.config.peer);
                self.stop_verify(&cause);
                self.begin_transition(Kind::Grant { lineage });
            }
            Some(objection) => {
                let generation = self.record.generation.tag();
                let asked = lineage.generation.tag();
                let header = Header::bare(FrameType::PromoteRefused, generation, asked);
                self.send_control(header, text_bytes(objection).to_vec());
            }
        }
    }

    fn objection_to_promotion(&self, lineage: &Lineage) -> Option<&'static str> {
        let Some(session) = self.link.session() else {
            return Some("not connected");
        };
        let current = self.record.generation;
        if self.role == Role::Primary {
            Some("it is Primary itself; run `kagami secondary` there first")
        } else if !self.transition.is_idle() || !self.records.is_settled() {
            Some("it is changing its own state; try again")
        } else if self.has_found_differences() {
            Some("a verify there has found that the copies differ; see `kagami status` there")
        } else if lineage.whole {
            let fits = lineage.mirror_size > 0 && lineage.mirror_size <= self.record.data_size;
            (!current.is_unborn() || !fits || lineage.mirror.is_none())
                .then_some("its disk was initialised before")
        } else if !matches!(session.mode, Mode::InSync) {
            Some("the replicas are not in sync")
        } else if lineage.ancestry.first() != Some(&current) {
            Some("it knows another generation")
        } else {
            None
        }
    }

    /// The source says that everything is there.
    pub(super) fn source_finished(&mut self, header: Header) {
        let is_target = self
            .link
            .session()
            .is_some_and(|session| matches!(session.mode, Mode::Target(_)));
        let current = header.generation == self.record.generation.tag();
        if is_target && current && self.transition.is_idle() {
            self.begin_transition(Kind::FinishTarget);
        } else {
            self.protocol_error("the end of a resync that this replica has no part in");
        }
    }

    /// The connection is gone: transitions that need its answer end; those that only make a
    /// state durable that both sides agreed upon run to their end.
    pub(super) fn transition_lost_link(&mut self) {
        let sent = self.has_sent_swap();
        let Some(active) = &mut self.transition.active else {
            return;
        };
        let stage = active.kind.stages().get(active.at).copied();
        match (&active.kind, stage) {
            (Kind::PromoteTogether { command, .. }, Some(Stage::Flush | Stage::Ask)) => {
                let command = *command;
                self.transition.active = None;
                self.refuse(command, ErrorId::LostPeer, "the peer was lost; try again");
            }
            (Kind::Widen, Some(Stage::Ask | Stage::Consult)) if !sent => {
                self.transition.active = None;
                if self.is_arbitrated() {
                    // No swap was sent, so none will land.
                    self.end_consultation();
                    let outcome = Settled::Void;
                    self.begin_transition(Kind::Settle { outcome });
                }
            }
            (Kind::BecomeTarget { .. }, Some(Stage::Drain)) => self.transition.active = None,
            (Kind::Demote { .. }, Some(Stage::FlushBoth)) => {
                active.flushes.1 = false;
                self.step_if_both_flushed();
            }
            _ => {}
        }
    }

    /// The disk is gone: whatever was under way has failed.
    pub(super) fn abort_transition(&mut self) {
        self.end_consultation();
        let Some(active) = self.transition.active.take() else {
            return;
        };
        let text = "the local disk reported an error";
        self.refuse_kind(active.kind, ErrorId::DiskFailed, text);
    }

    /// Starts the transition that circumstances ask for, if none is under way.
    pub(super) fn start_waiting_transition(&mut self) {
        if !self.transition.is_idle() {
            return;
        }
        if let Some(generation) = self.outdated_by.take() {
            let ours = self.record.generation;
            if self.disk != DiskState::Inconsistent && generation.counter > ours.counter {
                self.begin_transition(Kind::Outdate { generation });
            }
        } else if self.needs_shrinking() && self.disk == DiskState::UpToDate {
            self.begin_transition(Kind::Shrink {
                after: AfterShrink::Resume,
            });
        }
    }
}
