//! The right to go on alone: what this node asks of the arbiter, and the leases that the pair give
//! each other meanwhile (R2, R4, R5).
//!
//! The arbiter keeps one [`Register`] per mirror and swaps it when the asker names its present
//! value. A consultation ends only when its outcome is certain:
//!
//! ```text
//!   read --> the value has our id ............... won; also when a reply was lost, or we crashed
//!        --> it does not name this replica ...... lost: no value recurs, so no swap of ours can land
//!        --> there is none ...................... never a grant
//!        --> else swap it for ours --> swapped .. won
//!                                  --> refused .. as if read
//!   no answer: read again. An old value proves nothing, because the swap may still land.
//! ```
//!
//! A swap noted by an earlier life of this daemon is settled before anything else is decided: won
//! if its id is read, else made impossible by one more swap, which changes nothing but the id.
//!
//! **Leases.** While both replicas hold, a read is answered only under a lease: the peer's word,
//! in the answer to a ping, that it asks for no right before the lease is over. The asker counts
//! it from the moment of the question, the giver from that of the answer, and a little longer.

use super::Node;
use super::boundary::{
    Action, ArbiterAnswer, ArbiterRequest, AskId, ConnectionId, GuestError, Severity,
};
use super::link::{AfterLoss, Link, Mode};
use super::timer::Timer;
use super::transition::{AfterShrink, Kind};
use crate::error::ErrorId;
use crate::limits::{ARBITER_COMMAND_PATIENCE, ARBITER_PATIENCE_MAX, ARBITER_PATIENCE_MIN};
use crate::meta::superblock::Proposal;
use crate::types::{ArbiterId, DiskState, Generation, Holders, Register, ReplicaId, Role, Time};
use crate::wire::message::Hello;
use crate::wire::{FLAG_LEASE, FrameType, Header};
use std::collections::VecDeque;
use std::time::Duration;

/// Pings whose answers still count.
const QUESTIONS: usize = 64;

/// On what ground the register is to be changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Ground {
    /// It has no value yet: this is the mirror's first generation.
    Create,
    /// This replica is named in it, and descends from its generation.
    Claim,
    /// An operator's force.
    Steal,
    /// To be told apart from what a swap of an earlier life may have made of it.
    Settle(Proposal),
}

/// Asking the arbiter until the outcome is certain.
#[derive(Debug)]
struct Consultation {
    ground: Ground,
    /// The value to be. Its id is the same in every attempt.
    wanted: Register,
    /// Answers to earlier questions belong to earlier consultations.
    first: AskId,
    since: Time,
    patience: Duration,
    /// A swap is on its way, or was: the register may change at any time.
    swap_sent: bool,
    /// The arbiter has said that it knows nothing of the mirror.
    absent: bool,
    /// The value that the present fence is to take the place of.
    fenced: Option<Register>,
}

/// How a swap noted in an earlier life ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Settled {
    /// It landed.
    Won,
    /// It never will.
    Void,
    /// The register does not name this replica any more.
    Lost(Option<Generation>),
}

/// What is under way with the arbiter, and the leases.
#[derive(Debug, Default)]
pub(super) struct Arbitration {
    consultation: Option<Consultation>,
    asks: u64,
    /// When this node was started.
    pub(super) started: Time,
    /// Until when this node has promised its peer not to ask for the right, by its own clock.
    promised: Time,
    /// Pings sent, and when.
    questions: VecDeque<(u64, Time)>,
    pings: u64,
    /// Until when the peer's lease holds.
    leased: Time,
    /// When the question was sent that the present lease answers, or when leases began to matter.
    lease_asked: Time,
    /// The connection to the peer for whose sake a claim was withdrawn.
    preferred: Option<ConnectionId>,
}

impl Node {
    /// Whom the mirror's record is kept with: before its first generation, whom it will be.
    pub(super) fn arbiter(&self) -> ArbiterId {
        if self.record.generation.is_unborn() {
            self.config.arbiter
        } else {
            self.record.arbiter
        }
    }

    pub(super) fn is_arbitrated(&self) -> bool {
        !self.arbiter().is_none()
    }

    /// Whether a swap of an earlier life may still land: nothing is decided before that is known.
    pub(super) fn awaits_settling(&self) -> bool {
        let born = !self.record.generation.is_unborn();
        let usable = !matches!(self.disk, DiskState::Failed | DiskState::Diskless);
        let noted = self.record.proposal.is_some();
        born && usable && self.is_arbitrated() && self.transition.is_idle() && noted
    }

    /// Whether the arbiter is being asked.
    pub(super) fn is_asking(&self) -> bool {
        self.arbitration.consultation.is_some()
    }

    /// Whether the change under way needs no word of the arbiter: there is none, or this replica
    /// is the sole holder already and stays it.
    pub(super) fn needs_no_arbiter(&self) -> bool {
        let kind = self.transition.active.as_ref().map(|active| &active.kind);
        let stays_sole =
            matches!(kind, Some(Kind::PromoteAlone { .. })) && self.record.holders == Holders::Sole;
        !self.is_arbitrated() || stays_sole
    }

    /// Asks the arbiter for what the transition under way needs.
    pub(super) fn consult(&mut self) {
        if self.needs_no_arbiter() {
            return self.transition_step();
        }
        let Some(active) = &self.transition.active else {
            return;
        };
        let me = self.record.replica;
        let id = active.generation.id.0;
        let (ground, generation, other) = match &active.kind {
            Kind::PromoteAlone { mode, .. } if mode.is_initial() => {
                (Ground::Create, active.generation, ReplicaId::NONE)
            }
            Kind::PromoteAlone { mode, .. } if mode.is_forced() => {
                (Ground::Steal, active.generation, ReplicaId::NONE)
            }
            Kind::Shrink {
                after: AfterShrink::OfferSync { .. },
            } if self.agreeing_with().is_some_and(Hello::is_registered_sole) => {
                (Ground::Steal, active.generation, ReplicaId::NONE)
            }
            Kind::PromoteTogether { lineage, .. } => {
                let peer = self.link.session().map(|session| session.hello.replica);
                let peer = peer.unwrap_or(ReplicaId::NONE);
                (Ground::Create, lineage.generation, peer)
            }
            Kind::Widen => {
                let peer = self.record.peer_replica;
                (Ground::Claim, self.record.generation, peer)
            }
            _ => (Ground::Claim, active.generation, ReplicaId::NONE),
        };
        let wanted = Register {
            id,
            generation,
            holders: [me, other],
        };
        self.begin_consultation(ground, wanted);
    }

    /// Asks what became of a swap that an earlier life of this daemon noted.
    pub(super) fn settle_proposal(&mut self) {
        if !self.awaits_settling() || self.is_asking() {
            return;
        }
        let Some(proposal) = self.record.proposal else {
            return;
        };
        // What is wanted is known when the value to be fenced off is read.
        let nothing = Register {
            id: (self.id_source.0)(),
            generation: self.record.generation,
            holders: [self.record.replica, ReplicaId::NONE],
        };
        self.begin_consultation(Ground::Settle(proposal), nothing);
    }

    fn begin_consultation(&mut self, ground: Ground, wanted: Register) {
        self.arbitration.consultation = Some(Consultation {
            ground,
            wanted,
            first: AskId(self.arbitration.asks + 1),
            since: self.now,
            patience: ARBITER_PATIENCE_MIN,
            swap_sent: false,
            absent: false,
            fenced: None,
        });
        self.ask_arbiter(ArbiterRequest::Read);
    }

    fn ask_arbiter(&mut self, request: ArbiterRequest) {
        let Some(consultation) = &mut self.arbitration.consultation else {
            return;
        };
        if matches!(request, ArbiterRequest::Swap { .. }) {
            consultation.swap_sent = true;
        }
        let again = self.now.after(consultation.patience);
        self.timers.set(Timer::Arbiter, again);
        self.arbitration.asks += 1;
        let ask = AskId(self.arbitration.asks);
        self.out.push(Action::AskArbiter { ask, request });
    }

    /// The arbiter answers.
    pub(super) fn arbiter_answers(&mut self, ask: AskId, answer: ArbiterAnswer) {
        let Some(consultation) = &self.arbitration.consultation else {
            return;
        };
        if ask < consultation.first {
            return;
        }
        match answer {
            ArbiterAnswer::Swapped => {
                let wanted = consultation.wanted;
                self.register_is(Some(wanted));
            }
            ArbiterAnswer::Value(value) | ArbiterAnswer::Refused(value) => self.register_is(value),
        }
    }

    /// What the register holds is known.
    fn register_is(&mut self, value: Option<Register>) {
        let Some(consultation) = &mut self.arbitration.consultation else {
            return;
        };
        consultation.absent = value.is_none();
        let (ground, wanted) = (consultation.ground, consultation.wanted);
        let me = self.record.replica;
        match (ground, value) {
            (Ground::Settle(noted), Some(value)) if value.id == noted.generation.id.0 => {
                self.settled(Settled::Won);
            }
            // Only the widening can have added the peer. That its id is another by now says that the
            // peer has put a fence on it.
            (Ground::Settle(noted), Some(value))
                if noted.holders == Holders::Both && value.names_both(me) =>
            {
                self.settled(Settled::Won);
            }
            (Ground::Settle(_), Some(value)) if value.id == wanted.id => {
                self.settled(Settled::Void);
            }
            (Ground::Settle(_), Some(value)) if value.names(me) => self.fence_off(value),
            (Ground::Settle(_), Some(value)) => {
                self.settled(Settled::Lost(Some(value.generation)));
            }
            (Ground::Claim, Some(value)) if self.widens() && value.names_both(me) => {
                self.right_won();
            }
            (Ground::Create, Some(value))
                if value.id == wanted.generation.id.0 && !value.covers(wanted) =>
            {
                self.create_anew(value);
            }
            (_, Some(value)) if value.id == wanted.id => self.right_won(),
            (Ground::Create, None) => self.swap(None, wanted),
            (Ground::Steal, Some(value)) => self.swap(Some(value), wanted),
            (Ground::Claim, Some(value)) if value.names(me) && self.descends(value.generation) => {
                self.swap(Some(value), wanted);
            }
            (_, Some(value)) => self.right_denied(Some(value)),
            (_, None) => self.register_is_absent(),
        }
    }

    /// Whether it is a widening that the arbiter is asked for.
    fn widens(&self) -> bool {
        let active = self.transition.active.as_ref();
        active.is_some_and(|active| active.kind == Kind::Widen)
    }

    /// Makes every swap impossible that expects `value`, and changes nothing else. Another value gets
    /// a fence with another id, so that no value of the register ever recurs.
    fn fence_off(&mut self, value: Register) {
        let fresh = (self.id_source.0)();
        let Some(consultation) = &mut self.arbitration.consultation else {
            return;
        };
        if consultation.fenced != Some(value) {
            consultation.fenced = Some(value);
            consultation.wanted = Register { id: fresh, ..value };
        }
        let fence = consultation.wanted;
        self.swap(Some(value), fence);
    }

    /// An earlier attempt at the first generation named a peer that is replaced since.
    fn create_anew(&mut self, value: Register) {
        let fresh = (self.id_source.0)();
        let Some(consultation) = &mut self.arbitration.consultation else {
            return;
        };
        if consultation.wanted.id == value.id {
            consultation.wanted.id = fresh;
        }
        let wanted = consultation.wanted;
        self.swap(Some(value), wanted);
    }

    fn descends(&self, from: Generation) -> bool {
        self.record.generation == from || self.record.ancestry.contains(&from)
    }

    fn swap(&mut self, expected: Option<Register>, new: Register) {
        self.ask_arbiter(ArbiterRequest::Swap { expected, new });
    }

    fn right_won(&mut self) {
        self.end_consultation();
        self.transition_step();
    }

    /// Nobody waits for an answer any more. Whether a swap that was sent lands is for who finds the
    /// proposal to settle.
    pub(super) fn end_consultation(&mut self) {
        self.arbitration.consultation = None;
        self.timers.cancel(Timer::Arbiter);
    }

    /// The arbiter knows nothing of the mirror, which is never a grant, nor proof that a swap on its
    /// way will not land: the register may come back. A command whose claim was never sent is told;
    /// everything else is asked for again.
    fn register_is_absent(&mut self) {
        let kind = self.transition.active.as_ref().map(|active| &active.kind);
        let sent = self.has_sent_swap();
        if matches!(kind, Some(Kind::PromoteAlone { .. })) && !sent {
            self.right_denied(None);
        }
    }

    /// Whether the register may change at any time by what this consultation sent.
    pub(super) fn has_sent_swap(&self) -> bool {
        let consultation = self.arbitration.consultation.as_ref();
        consultation.is_some_and(|consultation| consultation.swap_sent)
    }

    /// The register stands against this node's claim, or there is none. In either case no swap of
    /// this node can land any more.
    fn right_denied(&mut self, value: Option<Register>) {
        self.end_consultation();
        let Some(active) = self.transition.active.take() else {
            return;
        };
        let widened = active.kind == Kind::Widen;
        if widened && value.is_some() {
            // Taken away by force.
            self.record.holders = Holders::Peer;
        }
        self.drop_proposal();
        let mirror = &self.config.mirror;
        let first = self.record.generation.is_unborn();
        let text = match value {
            Some(_) if first => {
                format!("the arbiter has a record of {mirror}: it was initialised before")
            }
            Some(_) => format!(
                "the arbiter does not let this node go on alone with {mirror}: {} has the right; \
                 bring it back, or use it",
                self.config.peer
            ),
            None => format!(
                "the arbiter has no record of {mirror}, which is never a right to go on alone; \
                 bring {} back",
                self.config.peer
            ),
        };
        self.verify_ended();
        self.refuse_kind(active.kind, ErrorId::RightDenied, &text);
        let Some(value) = value else { return };
        if !first {
            self.lost_right(value.generation);
        }
        if self.link.is_agreeing() || widened {
            self.lose_link("the arbiter names another holder", AfterLoss::BackOff);
        }
    }

    /// Answers the command that a transition was begun for, if there is one.
    pub(super) fn refuse_kind(&mut self, kind: Kind, id: ErrorId, text: &str) {
        if let Some(command) = kind.command() {
            self.refuse(command, id, text);
        }
    }

    /// Forgets a proposal of which it is certain that it never takes effect.
    fn drop_proposal(&mut self) {
        if self.record.proposal.take().is_some() {
            self.commit(super::records::Then::Nothing);
        }
    }

    /// The peer went on without this replica: guests' held requests end with errors and are never
    /// replayed (R4).
    pub(super) fn lost_right(&mut self, to: Generation) {
        if self.role == Role::Primary {
            self.event(
                Severity::Error,
                format!(
                    "lost the right to serve: {} went on alone",
                    self.config.peer
                ),
            );
            self.role = Role::Secondary;
            if self.serving {
                self.serving = false;
                self.out.push(Action::Serve(false));
            }
            self.abort_requests(GuestError::NotPrimary);
        }
        if to.counter > self.record.generation.counter {
            self.outdated_by = Some(to);
        } else if self.disk == DiskState::UpToDate {
            self.disk = DiskState::Consistent;
        }
    }

    /// Whether the peer's facts prove that it went on alone, by right, from where this node is.
    pub(super) fn lost_right_to(&self, theirs: &Hello) -> bool {
        self.role == Role::Primary
            && self.is_arbitrated()
            && self.record.holders != Holders::Sole
            && theirs.is_registered_sole()
            && theirs.ancestry.contains(&self.record.generation)
    }

    /// The arbiter has not answered in time: the register is read again. A claim that never left
    /// this node ends where somebody waits for an answer.
    pub(super) fn arbiter_is_late(&mut self) {
        let Some(consultation) = &mut self.arbitration.consultation else {
            return;
        };
        consultation.patience = (consultation.patience * 2).min(ARBITER_PATIENCE_MAX);
        let waited = self.now.since(consultation.since);
        let kind = self.transition.active.as_ref().map(|active| &active.kind);
        let allowed = match kind {
            Some(Kind::PromoteAlone { .. }) => ARBITER_COMMAND_PATIENCE,
            // Guests wait for as long.
            Some(Kind::Shrink {
                after: AfterShrink::Disconnect { .. } | AfterShrink::Verified { .. },
            }) => self.config.stall_timeout,
            _ => Duration::MAX,
        };
        if waited >= allowed && !consultation.swap_sent {
            self.withdraw_claim_to_right();
        } else {
            self.ask_arbiter(ArbiterRequest::Read);
        }
    }

    /// The peer is back before a swap was sent: the two agree instead.
    pub(super) fn prefer_peer_to_arbiter(&mut self) {
        let Some(consultation) = &self.arbitration.consultation else {
            return;
        };
        let back = matches!(self.link, Link::Arrived { heard: true, .. });
        let ends = self.transition.active.as_ref().is_some_and(|active| {
            let resumes = Kind::Shrink {
                after: AfterShrink::Resume,
            };
            active.kind == resumes || matches!(active.kind, Kind::PromoteAlone { .. })
        });
        // An answer may be on its way, and is worth waiting for a moment.
        let asked = self.now.since(consultation.since) >= ARBITER_PATIENCE_MIN;
        if back && ends && asked && !consultation.swap_sent {
            // Until this connection ends, the peer's word is awaited, and not the arbiter's.
            self.arbitration.preferred = self.link.connection();
            self.withdraw_claim_to_right();
        }
    }

    /// Whether the peer is about to say what a claim would have to be made for.
    pub(super) fn prefers_peer(&self) -> bool {
        let connection = self.link.connection();
        connection.is_some() && connection == self.arbitration.preferred
    }

    fn withdraw_claim_to_right(&mut self) {
        self.end_consultation();
        let Some(active) = self.transition.active.take() else {
            return;
        };
        self.drop_proposal();
        let text = "the arbiter does not answer; see `kagami status`, and try again";
        if let Kind::Shrink {
            after: AfterShrink::Verified { .. },
        } = active.kind
        {
            self.verify_without_right(text);
        }
        self.refuse_kind(active.kind, ErrorId::ArbiterUnreachable, text);
    }

    /// What became of an earlier life's swap is certain: it is recorded.
    fn settled(&mut self, outcome: Settled) {
        self.end_consultation();
        self.begin_transition(Kind::Settle { outcome });
    }

    /// Changes the superblock to what an earlier life's swap came to.
    pub(super) fn apply_settled(&mut self, outcome: Settled) {
        let Some(proposal) = self.record.proposal.take() else {
            return;
        };
        match (outcome, proposal.holders) {
            (Settled::Won, Holders::Both) => {
                self.record.registered = self.record.generation;
                self.record.holders = Holders::Both;
            }
            (Settled::Won, _) => {
                self.record.begin_generation(proposal.generation);
                self.record.registered = proposal.generation;
                self.record.holders = Holders::Sole;
            }
            (Settled::Void, Holders::Both) => self.record.holders = Holders::Sole,
            (Settled::Void, _) => {}
            (Settled::Lost(_), _) if self.record.holders == Holders::Widening => {
                self.record.holders = Holders::Peer;
            }
            (Settled::Lost(_), _) => {}
        }
    }

    /// The outcome is recorded.
    pub(super) fn proposal_settled(&mut self, outcome: Settled) {
        self.acknowledgements_due = true;
        let whole = !matches!(self.disk, DiskState::Inconsistent | DiskState::Outdated);
        if self.record.holders == Holders::Sole && whole {
            self.disk = DiskState::UpToDate;
        }
        if let Settled::Lost(Some(generation)) = outcome {
            self.lost_right(generation);
        }
    }

    /// The proposal that a transition notes durably before it asks.
    pub(super) fn proposal_of(&self, kind: &Kind, fresh: Generation) -> Option<Proposal> {
        let proposal = |generation, holders| Proposal {
            generation,
            holders,
        };
        match kind {
            Kind::Widen if !self.is_arbitrated() => None,
            // Of a widening only the id is new.
            Kind::Widen => Some(proposal(
                Generation {
                    counter: self.record.generation.counter,
                    id: fresh.id,
                },
                Holders::Both,
            )),
            Kind::PromoteTogether { lineage, .. } => {
                Some(proposal(lineage.generation, Holders::Both))
            }
            _ if self.is_arbitrated() && self.needs_no_arbiter() => None,
            _ => Some(proposal(fresh, Holders::Sole)),
        }
    }

    /// A fresh generation; for the first one of a mirror, the one that an earlier attempt may have
    /// written to the arbiter already.
    pub(super) fn first_generation(&mut self, holders: Holders) -> Generation {
        match self.record.proposal {
            Some(noted) if self.record.generation.is_unborn() && noted.holders == holders => {
                noted.generation
            }
            _ => self.next_generation(),
        }
    }

    /// What is awaited of the arbiter, as `status` shows it.
    pub(super) fn arbitration_reason(&self) -> Option<String> {
        let consultation = self.arbitration.consultation.as_ref()?;
        let what = match consultation.ground {
            Ground::Settle(_) => "what became of a question asked before the restart",
            _ => "the right to change who holds every acknowledged write",
        };
        Some(if consultation.absent {
            "the arbiter has no record of this mirror, which is never a right".to_owned()
        } else {
            format!("awaiting the arbiter: {what}")
        })
    }

    // ---- leases ----

    /// A ping to the peer, which asks for a lease.
    pub(super) fn ping(&mut self) {
        self.arbitration.pings += 1;
        let number = self.arbitration.pings;
        self.arbitration.questions.push_back((number, self.now));
        if self.arbitration.questions.len() > QUESTIONS {
            self.arbitration.questions.pop_front();
        }
        self.send(Header::bare(FrameType::Ping, 0, number));
    }

    /// Answers a ping, with a lease if one can be given.
    pub(super) fn answer_ping(&mut self, id: u64) {
        let mut answer = Header::bare(FrameType::Pong, self.record.generation.tag(), id);
        if self.may_give_lease() {
            let lease = self.config.lease;
            self.arbitration.promised = self.now.after(lease + drift(lease));
            answer.flags = FLAG_LEASE;
            answer.length = u32::try_from(lease.as_millis()).unwrap_or(u32::MAX);
        }
        self.send(answer);
    }

    /// Who asks for the right himself, or may have, gives no lease.
    fn may_give_lease(&self) -> bool {
        let mode = self.link.session().map(|session| &session.mode);
        let copies = matches!(mode, Some(Mode::InSync | Mode::Target(_)));
        let kind = self.transition.active.as_ref().map(|active| &active.kind);
        let asks = matches!(kind, Some(Kind::Shrink { .. } | Kind::PromoteAlone { .. }));
        let settled = self.record.proposal.is_none();
        self.is_arbitrated() && copies && self.role == Role::Secondary && !asks && settled
    }

    /// The peer answered a ping.
    pub(super) fn ping_answered(&mut self, header: Header) {
        let questions = &mut self.arbitration.questions;
        let Some(at) = questions
            .iter()
            .position(|(number, _)| *number == header.id)
        else {
            return;
        };
        let asked = questions[at].1;
        questions.drain(..=at);
        let current = header.generation == self.record.generation.tag();
        if header.flags & FLAG_LEASE != 0 && current && self.link.session().is_some() {
            let lease = Duration::from_millis(header.length.into()).min(self.config.lease);
            self.arbitration.lease_asked = self.arbitration.lease_asked.max(asked);
            self.arbitration.leased = self.arbitration.leased.max(asked.after(lease));
            self.acknowledgements_due = true;
        }
    }

    /// Whether a read must not be answered without a lease.
    pub(super) fn needs_lease(&self) -> bool {
        let shared = matches!(self.record.holders, Holders::Both | Holders::Widening);
        self.is_arbitrated() && shared
    }

    /// Whether what this disk holds is the present, as far as a read may say so.
    pub(super) fn may_answer_reads(&self) -> bool {
        !self.needs_lease() || self.now < self.arbitration.leased
    }

    /// Leases matter from now on: the peer gets its time to give one.
    pub(super) fn begin_leasing(&mut self) {
        if self.needs_lease() {
            self.arbitration.lease_asked = self.now;
            self.ping();
        }
    }

    /// Whether half of the lease has passed without a new one.
    pub(super) fn lease_runs_out(&self) -> bool {
        self.needs_lease() && self.now >= self.half_lease()
    }

    fn half_lease(&self) -> Time {
        self.arbitration.lease_asked.after(self.config.lease / 2)
    }

    /// Wakes the node when it has to ask the arbiter for what the peer does not answer.
    pub(super) fn watch_lease(&mut self) {
        let waits = self.needs_lease() && self.role == Role::Primary && self.requests.len() > 0;
        if waits && !self.replicating() && !self.lease_runs_out() {
            self.timers.set_if_idle(Timer::Lease, self.half_lease());
        }
    }

    /// When this node may ask for the right: not before the leases are over that it gave, nor
    /// those that an earlier life of it may have given.
    pub(super) fn may_ask_from(&self) -> Time {
        let lease = self.config.lease;
        let earlier_life = self.arbitration.started.after(lease + drift(lease));
        self.arbitration.promised.max(earlier_life)
    }

    /// Whether the transition under way need not wait for leases.
    pub(super) fn may_ask_now(&self) -> bool {
        let first = self.record.generation.is_unborn();
        first || self.needs_no_arbiter() || self.now >= self.may_ask_from()
    }
}

/// What two clocks may differ by over such a span.
fn drift(span: Duration) -> Duration {
    span / 8
}
