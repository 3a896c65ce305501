//! What an operator asks for, and on what condition it is done.
//!
//! A command is looked at when no transition and no agreement is under way; until then it waits.

use super::boundary::{Action, Command, CommandId, PrimaryMode, Severity};
use super::link::{AfterLoss, Link, Mode};
use super::timer::Timer;
use super::transition::{AfterDemote, AfterShrink, Kind};
use super::{Node, Phase};
use crate::control::CommandOutcome;
use crate::error::{ErrorId, Refusal};
use crate::limits::CONNECT_BACKOFF_MIN;
use crate::types::{DiskState, Generation, Holders, MirrorId, Role};
use crate::wire::message::{Goodbye, Lineage};

/// Why a link stands alone or was given up when an operator wished it.
pub(super) const BY_OPERATOR: &str = "disconnected by an operator";

/// What came of looking at a command.
enum Looked {
    /// It was answered, or a transition was begun that will answer it.
    Taken,
    /// It must be looked at again later.
    Wait,
}

/// A command that was not answered yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waiting {
    command: CommandId,
    what: Command,
    /// It was given while the two were connected, or about to be.
    beside_peer: bool,
}

impl Node {
    /// An operator asks for something.
    pub(super) fn command_arrives(&mut self, command: CommandId, what: Command) {
        let beside_peer = self.link.session().is_some() || self.link.is_agreeing();
        self.commands.push_back(Waiting {
            command,
            what,
            beside_peer,
        });
    }

    /// Looks at the commands that wait, the oldest first. Returns whether one was taken.
    pub(super) fn pump_commands(&mut self) -> bool {
        if matches!(self.phase, Phase::New | Phase::Attaching | Phase::Settling) {
            return false;
        }
        let busy = self.phase == Phase::Running
            && (!self.transition.is_idle()
                || self.link.is_agreeing()
                || self.outdated_by.is_some()
                || self.awaits_settling()
                || self.invalidating.is_some());
        for at in 0..self.commands.len() {
            let waiting = self.commands[at];
            let what = waiting.what;
            if (at > 0 && !overtakes(what)) || (busy && !is_immediate(what)) {
                continue;
            }
            if let Looked::Taken = self.look_at(waiting) {
                self.commands.remove(at);
                if at == 0 {
                    self.timers.cancel(Timer::CommandPatience);
                }
                return true;
            }
        }
        false
    }

    fn look_at(&mut self, waiting: Waiting) -> Looked {
        let Waiting { command, what, .. } = waiting;
        let usable = !matches!(self.disk, DiskState::Diskless | DiskState::Failed);
        if matches!(self.phase, Phase::Closing | Phase::Closed) || !usable {
            if what == Command::Down {
                self.done(command, Vec::new());
                if self.phase == Phase::Running {
                    self.close();
                }
            } else {
                let text = match &self.refusal {
                    Some(refusal) => format!("no usable disk here: {refusal}"),
                    None => "the mirror is down; run `kagami up`".to_owned(),
                };
                self.refuse(command, ErrorId::NoUsableDisk, &text);
            }
            return Looked::Taken;
        }
        match what {
            // Without an arbiter only the operator's knowledge keeps both from serving, and he asked
            // for a change of roles of two. With one it costs him another try.
            Command::Primary(PrimaryMode::Ordinary)
                if waiting.beside_peer && self.would_need_lost_peer() =>
            {
                self.refuse(command, ErrorId::LostPeer, "the peer was lost; try again");
            }
            Command::Primary(mode) => return self.primary_command(command, mode),
            Command::Secondary if self.role == Role::Primary => {
                return self.demote_command(AfterDemote::Answer(command));
            }
            Command::Secondary => self.done(command, Vec::new()),
            Command::Down if self.role == Role::Primary => {
                return self.demote_command(AfterDemote::Leave(command));
            }
            Command::Down => self.leave(command),
            Command::Connect { discard_my_data } => {
                self.connect_if_alone(command, discard_my_data);
            }
            Command::Disconnect => self.disconnect_command(command),
            Command::Invalidate => self.invalidate_command(command),
            Command::CompareFirst => {
                self.by_checksum = true;
                self.done(command, Vec::new());
            }
            Command::Verify { repair, resume } => self.verify_command(command, repair, resume),
            Command::StopVerify => self.stop_verify_command(command),
            Command::PauseResync | Command::ResumeResync => {
                self.resync_paused = what == Command::PauseResync;
                self.done(command, Vec::new());
            }
        }
        Looked::Taken
    }

    /// Whether a promotion would have to make do without a peer that may hold as much as this node.
    fn would_need_lost_peer(&self) -> bool {
        self.role != Role::Primary
            && self.record.holders != Holders::Sole
            && self.link.session().is_none()
    }

    fn primary_command(&mut self, command: CommandId, mode: PrimaryMode) -> Looked {
        let initial = mode.is_initial();
        if self.role == Role::Primary && !self.serving {
            return Looked::Wait;
        }
        if self.role == Role::Primary && !initial {
            self.done(command, Vec::new());
            return Looked::Taken;
        }
        match self.plan_promotion(command, mode) {
            Ok(Some(kind)) => {
                if matches!(kind, Kind::PromoteAlone { .. }) {
                    // The peer, if it is there at all, will learn of the new generation when it
                    // is met again.
                    if self.link.connection().is_some() {
                        self.lose_link("this node becomes Primary alone", AfterLoss::Search);
                    }
                }
                self.begin_transition(kind);
                Looked::Taken
            }
            Ok(None) => {
                let at = self
                    .search_patience()
                    .max(self.now.after(CONNECT_BACKOFF_MIN));
                self.timers.set_if_idle(Timer::CommandPatience, at);
                Looked::Wait
            }
            Err(refusal) => {
                self.refuse(command, refusal.id, &refusal.message);
                Looked::Taken
            }
        }
    }

    /// How this node may become Primary now; `None` while the peer may still turn up.
    fn plan_promotion(
        &mut self,
        command: CommandId,
        mode: PrimaryMode,
    ) -> Result<Option<Kind>, Refusal> {
        let initial = mode.is_initial();
        let unborn = self.record.generation.is_unborn();
        let (peer, mirror) = (self.config.peer.clone(), self.config.mirror.clone());
        if initial && !unborn {
            return Err(Refusal::new(
                ErrorId::NotInitial,
                format!("{mirror} was initialised before; leave `--initial` away"),
            ));
        }
        if let Some(form) = self.other_first_form(mode) {
            return Err(Refusal::new(
                ErrorId::RightDenied,
                format!(
                    "an earlier `kagami primary {mirror} {form}` may have reached the arbiter; \
                     run that again"
                ),
            ));
        }
        if unborn && !initial {
            return Err(Refusal::new(
                ErrorId::NeverInitialised,
                format!(
                    "{mirror} was never initialised; if this node has the data to begin with, \
                     run `kagami primary {mirror} --initial`"
                ),
            ));
        }
        if let Some(session) = self.link.session() {
            if session.peer.role == Role::Primary {
                return Err(Refusal::new(
                    ErrorId::PeerIsPrimary,
                    format!("{peer} is Primary; run `kagami secondary {mirror}` there first"),
                ));
            }
            return self.plan_with_peer(command, mode).map(Some);
        }
        // A peer that was just heard will say in a moment what it is.
        let greeting = matches!(self.link, Link::Arrived { heard: true, .. });
        let meeting = matches!(self.link, Link::Searching | Link::Arrived { .. })
            && !self.met_peer
            && self.now < self.search_patience();
        let size = self.initial_size();
        let alone = Kind::PromoteAlone {
            command,
            mode,
            size,
        };
        match (mode, self.disk) {
            (PrimaryMode::Initial, _) => Ok(Some(alone)),
            (PrimaryMode::InitialAssumeClean, _) if meeting => Ok(None),
            (PrimaryMode::InitialAssumeClean, _) => Err(Refusal::new(
                ErrorId::NotConnected,
                format!(
                    "{peer} is not connected, and must record that both disks are equal; start \
                         its daemon and try again"
                ),
            )),
            (PrimaryMode::Ordinary, _) if greeting => Ok(None),
            (PrimaryMode::Ordinary, DiskState::UpToDate) => Ok(Some(alone)),
            (PrimaryMode::Ordinary, _) if meeting => Ok(None),
            (PrimaryMode::Ordinary, disk) => Err(self.not_up_to_date(disk)),
            (PrimaryMode::Force, _) => Ok(Some(alone)),
        }
    }

    /// The other form of a first promotion, if the register may hold its value: a claim in this form
    /// would be denied, and the one that has won forgotten.
    fn other_first_form(&self, mode: PrimaryMode) -> Option<&'static str> {
        let noted = self
            .record
            .proposal
            .filter(|_| self.record.generation.is_unborn())?;
        match (mode, noted.holders) {
            (PrimaryMode::Initial, Holders::Both) => Some("--initial --assume-clean"),
            (PrimaryMode::InitialAssumeClean, Holders::Sole) => Some("--initial"),
            _ => None,
        }
    }

    fn not_up_to_date(&self, disk: DiskState) -> Refusal {
        let (peer, mirror) = (&self.config.peer, &self.config.mirror);
        if disk == DiskState::Inconsistent {
            return Refusal::new(
                ErrorId::Inconsistent,
                format!(
                    "this copy of {mirror} is Inconsistent: a resync from {peer} is not complete. \
                     Bring {peer} back; `--force` would serve a mix of old and new blocks"
                ),
            );
        }
        Refusal::new(
            ErrorId::NotUpToDate,
            format!(
                "this copy of {mirror} is {disk}: {peer} may have acknowledged writes that are \
                 not here. Bring {peer} back, or use `--force` and lose those writes"
            ),
        )
    }

    fn plan_with_peer(&mut self, command: CommandId, mode: PrimaryMode) -> Result<Kind, Refusal> {
        let mirror = self.config.mirror.clone();
        let alone = Kind::PromoteAlone {
            command,
            mode,
            size: self.initial_size(),
        };
        let Some(session) = self.link.session() else {
            return Ok(alone);
        };
        match (&session.mode, mode) {
            (Mode::Idle(_), PrimaryMode::InitialAssumeClean) => {
                if !session.hello.generation.is_unborn() {
                    return Err(Refusal::new(
                        ErrorId::NotInitial,
                        format!("{}'s disk was initialised before", self.config.peer),
                    ));
                }
                let mirror_size = self.initial_size();
                let lineage = Lineage {
                    mirror: MirrorId((self.id_source.0)()),
                    mirror_size,
                    generation: self.first_generation(Holders::Both),
                    ancestry: Vec::new(),
                    unused_ancestors: 0,
                    whole: true,
                };
                Ok(Kind::PromoteTogether { command, lineage })
            }
            (Mode::Idle(_), PrimaryMode::Initial | PrimaryMode::Force) => Ok(alone),
            (Mode::Idle(_), PrimaryMode::Ordinary) => Err(self.not_up_to_date(self.disk)),
            (Mode::Target(_), _) => Err(Refusal::new(
                ErrorId::Inconsistent,
                format!(
                    "this copy of {mirror} is being resynced from {}; wait for the resync, or \
                     make that node Primary",
                    self.config.peer
                ),
            )),
            (Mode::Source(_), _) => Ok(alone),
            (Mode::InSync, _) => {
                let generation = self.next_generation();
                let mut ancestry = self.record.ancestry.clone();
                ancestry.insert(0, self.record.generation);
                let lineage = Lineage {
                    generation,
                    ancestry,
                    // Whoever records it knows of its own whether the one before was used.
                    unused_ancestors: 0,
                    ..self.lineage(false)
                };
                Ok(Kind::PromoteTogether { command, lineage })
            }
        }
    }

    /// What the operator should know of a promotion without the peer.
    pub(super) fn warnings_of_promotion(&self, mode: PrimaryMode) -> Vec<String> {
        let peer = &self.config.peer;
        let unarbitrated = format!(
            "unarbitrated: nothing proves that {peer} is down; if it is Primary too, the two \
             copies diverge"
        );
        match mode {
            PrimaryMode::Initial | PrimaryMode::InitialAssumeClean => Vec::new(),
            PrimaryMode::Ordinary if self.was_sole || self.is_arbitrated() => Vec::new(),
            PrimaryMode::Ordinary => vec![unarbitrated],
            PrimaryMode::Force => {
                let lost =
                    format!("forced: writes that only {peer} acknowledged are not in this copy");
                let risk = if self.is_arbitrated() {
                    format!("the right was taken from {peer}: it must be down")
                } else {
                    unarbitrated
                };
                vec![lost, risk]
            }
        }
    }

    fn demote_command(&mut self, then: AfterDemote) -> Looked {
        if self.serving {
            self.serving = false;
            self.out.push(Action::Serve(false));
        }
        if self.requests.len() > 0 {
            return Looked::Wait;
        }
        self.begin_transition(Kind::Demote { then });
        Looked::Taken
    }

    fn connect_if_alone(&mut self, command: CommandId, discard: bool) {
        if discard && self.role == Role::Primary {
            let text = format!(
                "a Primary's data cannot be discarded; run `kagami secondary {}` first",
                self.config.mirror
            );
            return self.refuse(command, ErrorId::NotAsPrimary, &text);
        }
        let trying = matches!(
            self.link,
            Link::Searching | Link::Arrived { .. } | Link::Connected(_)
        );
        if discard || !trying {
            if matches!(self.link, Link::Connected(_)) {
                // Agreed already: there is nothing to discard.
                return self.done(command, Vec::new());
            }
            if self.link.connection().is_some() {
                self.lose_link("connecting anew", AfterLoss::Search);
            }
            self.discard = discard;
            self.search_anew();
        }
        self.done(command, Vec::new());
    }

    fn disconnect_command(&mut self, command: CommandId) {
        let in_sync = matches!(self.link.session().map(|s| &s.mode), Some(Mode::InSync));
        if in_sync && self.role == Role::Primary {
            // The peer is left behind in good order: first the right to go on alone, then it is
            // told, so that it will not be promoted by mistake.
            let after = AfterShrink::Disconnect { command };
            return self.begin_transition(Kind::Shrink { after });
        }
        if in_sync
            && self
                .link
                .session()
                .is_some_and(|s| s.peer.role == Role::Primary)
        {
            self.disk = DiskState::Consistent;
        }
        let outdated_by = (self.role == Role::Primary && self.record.holders == Holders::Sole)
            .then_some(self.record.generation);
        let reason = BY_OPERATOR.to_owned();
        let goodbye = Goodbye {
            outdated_by,
            reason,
        };
        self.part(BY_OPERATOR, goodbye, AfterLoss::StandAlone);
        self.refusal = None;
        self.parted = Some(BY_OPERATOR.to_owned());
        self.done(command, Vec::new());
    }

    fn invalidate_command(&mut self, command: CommandId) {
        let mirror = &self.config.mirror;
        if self.role == Role::Primary {
            let text = format!(
                "a Primary's copy cannot be invalidated; run `kagami secondary {mirror}` first, or \
                 invalidate the other node's copy there"
            );
            return self.refuse(command, ErrorId::NotAsPrimary, &text);
        }
        let mode = self.link.session().map(|session| &session.mode);
        if !matches!(mode, Some(Mode::InSync)) {
            let text = format!(
                "invalidating needs a connected peer whose copy is UpToDate; see `kagami status \
                 {mirror}`"
            );
            return self.refuse(command, ErrorId::NotConnected, &text);
        }
        // The handshake does the rest: an Inconsistent side becomes target, after the other has
        // shrunk the holders.
        self.lose_link("this copy is invalidated", AfterLoss::Search);
        self.invalidating = Some(command);
        self.search_since = self.now;
        self.timers.set(Timer::Invalidation, self.search_patience());
        self.event(
            Severity::Warning,
            "the local copy is invalidated".to_owned(),
        );
    }

    /// Nothing is thrown away yet, and this copy may be the last: other commands must not wait for
    /// a peer that is gone. A handshake under way has its own end.
    pub(super) fn invalidation_timed_out(&mut self) {
        if self.link.connection().is_none() {
            self.give_up_invalidation();
        }
    }

    /// Refuses an invalidation, unless it is being recorded: then it takes effect.
    pub(super) fn give_up_invalidation(&mut self) {
        let active = self.transition.active.as_ref();
        if active.is_some_and(|active| matches!(active.kind, Kind::BecomeTarget { .. })) {
            return;
        }
        if let Some(command) = self.invalidating.take() {
            self.refuse(command, ErrorId::LostPeer, "the peer was lost; try again");
        }
    }

    /// Answers an operator with success.
    pub(super) fn done(&mut self, command: CommandId, warnings: Vec<String>) {
        let result = Ok(CommandOutcome { warnings });
        self.out.push(Action::CommandDone { command, result });
    }

    /// Answers an operator with a refusal.
    pub(super) fn refuse(&mut self, command: CommandId, id: ErrorId, text: &str) {
        let result = Err(Refusal::new(id, text));
        self.out.push(Action::CommandDone { command, result });
    }

    /// The generation as operators see it.
    pub(super) fn generation_in_words(&self) -> String {
        match self.record.generation {
            Generation::UNBORN => String::new(),
            generation => generation.to_string(),
        }
    }
}

/// Commands that need not wait for the ones before them: one of them may be what those wait for.
fn overtakes(what: Command) -> bool {
    is_immediate(what) || what == Command::Disconnect
}

/// Commands that need no rest.
fn is_immediate(what: Command) -> bool {
    matches!(
        what,
        Command::PauseResync | Command::ResumeResync | Command::StopVerify | Command::CompareFirst
    )
}
