//! The operator: makes the first Primary, gives commands at random, and in the end heals
//! everything. He is sane: without its peer he promotes a node only when it may go alone, and he
//! never promotes two.

use super::cluster::{Cluster, Event, Phase};
use super::host::{Fitness, NAMES};
use super::options::{Beginning, Scenario};
use super::split_brain::SplitBrain;
use super::stimulus::Stimulus;
use crate::control::CommandOutcome;
use crate::error::Refusal;
use crate::node::boundary::{Command, CommandId, Input, PrimaryMode};
use crate::types::{DiskState, Holders, LinkState, Role, Time};
use std::collections::BTreeMap;
use std::time::Duration;

/// How long healing may take, of virtual time.
pub(super) const HEAL_TIME: Duration = Duration::from_secs(240);

/// How long a fault may still show after it ended.
const CALM: Duration = Duration::from_secs(5);

/// How long two nodes may take to become holders both while nobody is Primary.
const PATIENCE: Duration = Duration::from_secs(120);

pub(super) const PRIMARY: Command = Command::Primary(PrimaryMode::Ordinary);

/// The operator's notes.
pub(super) struct Operator {
    waiting: BTreeMap<CommandId, (usize, Command)>,
    next_command: u64,
    /// Who is to be Primary next, after a demotion.
    pub heir: Option<usize>,
    storm_ends: Time,
    next_whim: Time,
    /// Until when nobody is promoted: two Secondaries must become holders both by themselves.
    patient_until: Option<Time>,
    /// Since when no fault can be the cause of a loss of the link.
    calm_from: Time,
    /// Both were seen to be holders since: they stay that.
    healed: bool,
    /// A command with force was given, so that rules may be overridden.
    pub forced: bool,
    pub split: SplitBrain,
    pub rng: fastrand::Rng,
}

impl Operator {
    pub fn new(rng: fastrand::Rng) -> Operator {
        Operator {
            waiting: BTreeMap::new(),
            next_command: 0,
            heir: None,
            storm_ends: Time(u64::MAX),
            next_whim: Time(0),
            patient_until: None,
            calm_from: Time(u64::MAX),
            healed: false,
            forced: false,
            split: SplitBrain::Not,
            rng,
        }
    }

    /// Whether a promotion is not answered yet.
    pub fn promoting(&self) -> bool {
        let mut commands = self.waiting.values();
        commands.any(|(_, command)| matches!(command, Command::Primary(_)))
    }

    pub fn busy(&self, h: usize) -> bool {
        self.waiting.values().any(|(host, _)| *host == h)
    }
}

impl Cluster {
    pub fn operator_step(&mut self) {
        match self.phase {
            Phase::Setup => self.set_up(),
            Phase::Storm if self.operator.split != SplitBrain::Not => self.split_brain_step(),
            // The list has the commands.
            Phase::Storm if !self.source.is_drawn() => return,
            Phase::Storm if self.now > self.operator.storm_ends => {
                return self.stimulate(Stimulus::Calm);
            }
            Phase::Storm => self.storm(),
            Phase::Heal { deadline } => self.heal(deadline),
            Phase::Verify { deadline } => {
                if self.now > deadline {
                    self.fail("the replicas cannot be read back in time".to_owned());
                }
            }
            Phase::Rot { serving, deadline } => self.watch_rot(serving, deadline),
            Phase::Over => return,
        }
        self.next_look();
    }

    fn next_look(&mut self) {
        let pause = self.operator.rng.u64(10_000_000..100_000_000);
        self.schedule(pause, Event::Operator);
    }

    /// Decides that a disk is to be replaced when its daemon is down.
    fn give_up_disk(&mut self, h: usize) {
        match self.phase {
            Phase::Storm => self.stimulate(Stimulus::GiveUpDisk { host: h }),
            _ => self.condemn(h),
        }
    }

    /// Gives a command of the storm through the recording, one of healing directly.
    pub fn order(&mut self, h: usize, what: Command) {
        match self.phase {
            Phase::Storm => self.stimulate(Stimulus::Command { host: h, what }),
            _ => self.command(h, what),
        }
    }

    /// Gives a command. A daemon that stands still takes none.
    pub fn command(&mut self, h: usize, what: Command) {
        if self.hosts[h].process.is_none() || self.is_paused(h) {
            return;
        }
        self.operator.next_command += 1;
        let command = CommandId(self.operator.next_command);
        self.operator.waiting.insert(command, (h, what));
        self.stats.commands += 1;
        let alone = !self.connected(h);
        self.stats.failovers += u64::from(alone && what == PRIMARY);
        if what == Command::Down
            && let Some(process) = &mut self.hosts[h].process
        {
            process.asked_down = true;
        }
        self.feed(h, Input::Command { command, what });
    }

    /// A command is answered.
    pub fn commanded(
        &mut self,
        h: usize,
        command: CommandId,
        result: Result<CommandOutcome, Refusal>,
    ) {
        let Some((host, what)) = self.operator.waiting.remove(&command) else {
            return self.fail(format!("{command:?} is answered, and nobody gave it"));
        };
        if host != h {
            return self.fail(format!("{command:?} is answered by the wrong node"));
        }
        match (what, result) {
            (Command::Primary(_), Ok(_)) => {
                self.stats.promotions += 1;
                if self.phase == Phase::Setup {
                    self.begin_storm();
                }
            }
            (Command::Down, Err(_)) => {
                if let Some(process) = &mut self.hosts[h].process {
                    process.asked_down = false;
                }
            }
            (_, Ok(_)) => {}
            (_, Err(_)) => self.stats.refusals += 1,
        }
    }

    /// The machine is down: its commands are never answered.
    pub fn operator_lost(&mut self, h: usize) {
        let promoted = self
            .operator
            .waiting
            .values()
            .any(|(host, what)| *host == h && matches!(what, Command::Primary(_)));
        if promoted {
            // Whether it took effect, he looks up before he promotes the other one.
            self.look_up_keeper(h);
        }
        self.operator.waiting.retain(|_, (host, _)| *host != h);
    }

    fn set_up(&mut self) {
        if self.now > Time(60_000_000_000) {
            return self.fail("the mirror cannot be initialised in time".to_owned());
        }
        let h = self.options.first_primary;
        let connected = self
            .standing(h)
            .is_some_and(|s| s.link == LinkState::Connected);
        if self.operator.busy(h) || !connected {
            return;
        }
        let mode = match self.options.beginning {
            Beginning::FullSync => PrimaryMode::Initial,
            Beginning::AssumeClean => PrimaryMode::InitialAssumeClean,
        };
        self.command(h, Command::Primary(mode));
    }

    fn begin_storm(&mut self) {
        self.phase = Phase::Storm;
        self.operator.storm_ends = self.now.after(self.options.storm);
        self.operator.next_whim = self.now.after(self.options.operator_gap);
        match self.source.is_drawn() {
            true => {
                self.next_fault();
                self.next_ambush();
                self.start_client();
            }
            false => self.listed_step(),
        }
    }

    /// The storm is over: what follows depends on nothing that was drawn in it.
    pub fn calm(&mut self) {
        self.operator.rng = self.options.rng();
        self.doubts.forget_storm(&self.options);
        self.operator.heir = None;
        if self.options.scenario == Scenario::InsaneOperator {
            self.operator.split = SplitBrain::Begin;
        } else {
            self.begin_healing();
        }
        self.next_look();
    }

    fn storm(&mut self) {
        self.care(50);
        self.doubt();
        if self.now < self.operator.next_whim {
            return;
        }
        let gap = self.options.operator_gap.as_nanos() as u64;
        self.operator.next_whim = Time(self.now.0 + self.operator.rng.u64(gap / 4..gap * 2));
        let h = self.operator.rng.usize(0..2);
        let serving = (0..2).find(|h| self.serving(*h));
        match (self.operator.rng.u8(0..15), serving) {
            (0..3, Some(s)) => {
                // A handover: the heir is promoted once nobody serves.
                self.operator.heir = Some(self.most_often(1 - s));
                self.order(s, Command::Secondary);
            }
            // The node must refuse: it knows that its peer is Primary.
            (3, Some(s)) if self.knows_primary(1 - s) => {
                self.order(1 - s, PRIMARY);
            }
            (4, _) => self.order(h, Command::Disconnect),
            (5, Some(s)) if self.options.store_size < 1 << 30 => {
                // At any time, and sometimes of the one copy that serves: the nodes must know.
                let which = self.most_often(1 - s);
                self.order(which, Command::Invalidate);
            }
            (6, _) => self.order(h, Command::PauseResync),
            (7, _) => self.order(h, Command::ResumeResync),
            (8, _) => self.order(h, Command::Down),
            (9, _) => {
                // There is nothing to discard where nothing diverged.
                let discard_my_data = self.operator.rng.bool();
                self.order(h, Command::Connect { discard_my_data });
            }
            (13, _) => self.command_both(h),
            // Its peer is down, and it cannot know what its operator does: that it has everything. With an
            // arbiter he would have to know as well that no claim of the peer is on its way there.
            (14, None) if self.hosts[1 - h].process.is_none() && !self.options.is_arbitrated() => {
                self.sample_custody();
                if self.custody.is_complete(h) && self.hosts[h].fitness == Fitness::Fit {
                    self.order(h, Command::Primary(PrimaryMode::Force));
                }
            }
            // Both are asked at once: at most one may win.
            (10, None) if self.both_connected() && !self.operator.promoting() => {
                self.order(h, PRIMARY);
                self.order(1 - h, PRIMARY);
            }
            // With an arbiter he need not think: the losing node must be refused.
            (11, _) if self.options.is_arbitrated() => {
                self.order(h, PRIMARY);
            }
            (11, None) if self.hosts[1 - h].process.is_none() => self.promote_fresh(h),
            (12, None) if !self.operator.promoting() => self.promote_half_copy(),
            _ => {}
        }
    }

    /// This node, or one time in four the other.
    fn most_often(&mut self, h: usize) -> usize {
        match self.operator.rng.u8(0..4) {
            0 => 1 - h,
            _ => h,
        }
    }

    /// Freshly started and alone: the node itself must know whether it may. One that was chosen as
    /// source and then left alone believes so; only he knows what was done on the other side since.
    fn promote_fresh(&mut self, h: usize) {
        let process = self.hosts[h].process.as_ref();
        let fresh = process.is_some_and(|process| process.fresh);
        let believes = self
            .standing(h)
            .is_some_and(|standing| standing.names_itself_alone());
        let knows = !believes || self.custody.may_go_alone(h);
        if fresh && knows && self.hosts[h].fitness == Fitness::Fit {
            self.order(h, PRIMARY);
        }
    }

    /// A copy in the making: only the node itself can know that it must refuse.
    fn promote_half_copy(&mut self) {
        let half = |h: &usize| {
            self.standing(*h)
                .is_some_and(|s| s.disk == DiskState::Inconsistent)
        };
        if let Some(h) = (0..2).find(half) {
            self.order(h, PRIMARY);
        }
    }

    /// The same thing is asked of both at once.
    fn command_both(&mut self, first: usize) {
        let small = self.options.store_size < 1 << 30;
        let what = match self.operator.rng.u8(0..5) {
            0 => Command::Disconnect,
            1 => Command::Down,
            2 => Command::Secondary,
            3 if small => Command::Invalidate,
            _ => Command::Connect {
                discard_my_data: true,
            },
        };
        self.order(first, what);
        self.order(1 - first, what);
    }

    pub fn connected(&self, h: usize) -> bool {
        self.standing(h)
            .is_some_and(|s| s.link == LinkState::Connected)
    }

    fn both_connected(&self) -> bool {
        self.connected(0) && self.connected(1) && self.network.sound()
    }

    fn knows_primary(&self, h: usize) -> bool {
        self.standing(h)
            .is_some_and(|s| s.link == LinkState::Connected && s.peer_role == Role::Primary)
    }

    /// What a caring operator does now and then: connect what stands alone, promote somebody.
    fn care(&mut self, percent: u32) {
        for h in 0..2 {
            self.care_for_disk(h, percent);
            let alone = self
                .standing(h)
                .is_some_and(|s| s.link == LinkState::StandAlone);
            if alone && !self.operator.busy(h) && self.operator.rng.u32(0..400) < percent {
                self.order(
                    h,
                    Command::Connect {
                        discard_my_data: false,
                    },
                );
            }
        }
        let nobody = (0..2).all(|h| !self.serving(h));
        if nobody
            && self.operator.patient_until.is_none()
            && !self.operator.promoting()
            && self.operator.rng.u32(0..100) < percent
        {
            self.promote_somebody();
        }
    }

    /// Takes a disk down that failed, is another's or is given up, to replace it or to try it again.
    fn care_for_disk(&mut self, h: usize, percent: u32) {
        let Some(standing) = self.standing(h) else {
            return;
        };
        let failed = standing.disk == DiskState::Failed;
        let cloned = self.hosts[h].fitness == Fitness::Clone;
        // The daemon stood still when it was told to go down.
        let given_up = self.hosts[h].fitness == Fitness::Condemned;
        let acts = self.operator.rng.u32(0..400) < percent;
        if (failed || cloned || given_up) && acts && !self.operator.busy(h) {
            let replaces = cloned || (self.operator.rng.bool() && self.may_be_replaced(h));
            if replaces && !given_up {
                self.give_up_disk(h);
            }
            self.order(h, Command::Down);
        }
    }

    /// Promotes a node that may be, if there is one.
    pub fn promote_somebody(&mut self) {
        self.sample_custody();
        let first = match self.operator.heir.take() {
            Some(heir) => heir,
            None => self.operator.rng.usize(0..2),
        };
        for h in [first, 1 - first] {
            let Some(standing) = self.standing(h) else {
                continue;
            };
            if self.is_paused(h) {
                continue;
            }
            let peer_is_primary = self
                .standing(1 - h)
                .is_some_and(|s| s.role == Role::Primary);
            let with_peer = standing.link == LinkState::Connected;
            let alone = self.options.is_arbitrated() || self.custody.may_go_alone(h);
            if standing.disk == DiskState::UpToDate && !peer_is_primary && (with_peer || alone) {
                self.tell(h, "is chosen to be Primary");
                return self.order(h, PRIMARY);
            }
        }
    }

    pub fn begin_healing(&mut self) {
        self.tell(0, "and b: faults are over");
        self.phase = Phase::Heal {
            deadline: self.now.after(HEAL_TIME),
        };
        self.heal_faults();
        if self.options.patience_suffices() {
            self.operator.calm_from = self.now.after(CALM);
        }
        let patience = self.options.heals_without_primary.then_some(PATIENCE);
        self.operator.patient_until = patience.map(|patience| self.now.after(patience));
    }

    /// Leaves the two to themselves, without a Primary. They must not need it for long.
    fn wait_without_primary(&mut self) {
        let Some(until) = self.operator.patient_until else {
            return;
        };
        if let Some(h) = (0..2).find(|h| self.serving(*h) && !self.operator.busy(*h)) {
            self.command(h, Command::Secondary);
        } else if self.both_hold() && self.both_connected() {
            self.operator.patient_until = None;
        } else if self.now > until {
            self.fail("without a Primary the two do not become holders both".to_owned());
        }
    }

    /// What the operator does at the end, again and again until the two are in sync.
    pub fn heal(&mut self, deadline: Time) {
        if self.arbiter.is_wiped() {
            // Only an operator's re-arming would bring the mirror back; what it must not do
            // meanwhile was watched for long enough.
            if Time(self.now.0 + HEAL_TIME.as_nanos() as u64 * 9 / 10) > deadline {
                self.check_complete();
                self.phase = Phase::Over;
            }
            return self.care(100);
        }
        if self.now > deadline {
            let states = [0, 1].map(|h| format!("{}: {:?}", NAMES[h], self.status(h)));
            let under_way = format!(
                "{} of {} requests asked, {} unanswered, {} disk operations and {} frames under way",
                self.client.asked(),
                self.options.requests,
                self.client.pending_at(0) + self.client.pending_at(1),
                self.hosts[0].disk.in_flight() + self.hosts[1].disk.in_flight(),
                self.network.under_way()
            );
            return self.fail(format!(
                "not healed in time; {under_way}; {}",
                states.join("; ")
            ));
        }
        self.resume_resyncs();
        self.wait_without_primary();
        self.care(100);
        let both_hold = self.both_hold();
        if self.operator.healed && !both_hold {
            return self.fail("one is no holder any more, and no fault is left".to_owned());
        }
        let calm = self.now >= self.operator.calm_from;
        self.operator.healed |= calm && both_hold && self.in_sync();
        let serving = (0..2).find(|h| self.serving(*h));
        let asked_all = match self.source.is_drawn() {
            true => self.client.asked() >= self.options.requests,
            false => self.source.next_at().is_none(),
        };
        // A guest that could ask little because nobody served asks no more.
        let done = asked_all || self.now.after(HEAL_TIME / 2) > deadline;
        self.client.held |= done;
        if serving.is_some() && done && self.quiet() && self.in_sync() && both_hold {
            self.converged();
        }
    }

    /// Nothing is held any more.
    pub fn resume_resyncs(&mut self) {
        for h in 0..2 {
            let paused = self
                .standing(h)
                .is_some_and(|s| s.resync.is_some() && s.resync_is_held);
            if paused && !self.operator.busy(h) {
                self.command(h, Command::ResumeResync);
            }
        }
    }

    /// Both nodes name both as holders, and so does the arbiter.
    fn both_hold(&self) -> bool {
        let both = (0..2).all(|h| {
            self.standing(h)
                .is_some_and(|standing| standing.holders == Holders::Both)
        });
        both && (!self.options.is_arbitrated() || self.registered() == [true; 2])
    }

    fn converged(&mut self) {
        self.tell(0, "and b: in sync again");
        self.check_covered();
        for h in [0, 1] {
            let held = self.hosts[h]
                .process
                .as_ref()
                .map_or(0, |p| p.buffers.held());
            if held > 0 {
                self.fail(format!("{}: {held} buffers leaked", NAMES[h]));
            }
        }
        self.stats.resyncs += (0..2)
            .filter_map(|h| self.hosts[h].process.as_ref())
            .map(|process| process.node.totals().resyncs)
            .sum::<u64>();
        let differing = self.differing_blocks();
        if !differing.is_empty() {
            self.fail(format!(
                "{} blocks differ after everything was healed",
                differing.len()
            ));
        }
        self.phase = Phase::Verify {
            deadline: self.now.after(HEAL_TIME),
        };
        self.begin_verification();
    }

    /// Everything was read back.
    pub fn verified(&mut self) {
        match self.options.verifies {
            true => self.begin_rot(),
            false => self.phase = Phase::Over,
        }
    }
}
