//! A machine: its disk, its clock, and the daemon's process with the node.

use super::buffers::{Buffers, Checksum};
use super::clock::Clock;
use super::cluster::{Cluster, Event};
use super::disk::{Blank, Disk};
use super::disk_faults::Trouble;
use super::driver::Purpose;
use super::faults::{Crash, draw_down};
use super::options::{Chance, Options};
use crate::limits::SECTOR;
use crate::meta;
use crate::node::boundary::{Input, OpId, Payload};
use crate::node::{Node, NodeConfig};
use crate::types::{BootId, ReplicaId, Time};
use std::collections::{HashMap, VecDeque};

/// The names of the two nodes.
pub(super) const NAMES: [&str; 2] = ["a", "b"];

/// A running daemon with one mirror.
pub(super) struct Process {
    pub node: Node,
    pub life: u32,
    pub buffers: Buffers,
    pub serving: bool,
    /// Started, and not heard of its peer since.
    pub fresh: bool,
    pub asked_down: bool,
    pub detached: bool,
    /// Its disk reported an error.
    pub erred: bool,
    /// A superblock is on its way to the disk since custody was looked at.
    pub record_changes: bool,
    /// When the first chunk of a resync was read, and how many bytes since.
    pub copied: Option<(Time, u64)>,
    pub tick_at: Option<Time>,
    pub operations: HashMap<OpId, Purpose>,
}

/// What may become of a machine's disk when the daemon starts next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fitness {
    /// It is the replica it was.
    Fit,
    /// The operator replaces it by an empty one.
    Condemned,
    /// No slot can be trusted: the node must refuse it, and make no superblock.
    Unreadable,
    /// It is an image of the peer's: the nodes must refuse each other.
    Clone,
}

/// What a daemon that stood still meets first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Wake {
    TimersFirst,
    InputsFirst,
}

/// A machine of the cluster.
pub(super) struct Host {
    pub process: Option<Process>,
    pub disk: Disk,
    pub fitness: Fitness,
    pub trouble: Option<Trouble>,
    /// Where metadata blocks landed on this disk that belonged elsewhere.
    pub astray: Vec<u64>,
    pub clock: Clock,
    /// The daemon stands still, and misses these.
    pub paused: Option<Wake>,
    pub missed: VecDeque<Input>,
    /// Actions until the daemon crashes.
    pub crash_in: Option<(u32, Crash)>,
    /// A pause or a stopped clock lasts until then: waiting is no wonder.
    pub excused_until: Time,
    pub boot: BootId,
    /// When it lost power last.
    pub powerless_at: Time,
    pub lives: u32,
    pub slow_until: Time,
    pub slowness: u32,
    /// Writes submitted before then do not end before then.
    pub stuck_until: Time,
    /// When the last of its exceptionally slow disk operations will have ended.
    pub held_until: Time,
    pub starting: bool,
    pub rng: fastrand::Rng,
}

impl Host {
    /// A machine whose disk went through `kagami create`.
    pub fn new(options: &Options, index: usize, mut rng: fastrand::Rng) -> Host {
        Host {
            process: None,
            disk: new_disk(options, index, options.blank(index), &mut rng),
            fitness: Fitness::Fit,
            trouble: None,
            astray: Vec::new(),
            clock: Clock::new(Time(0), options.drift[index]),
            paused: None,
            missed: VecDeque::new(),
            crash_in: None,
            excused_until: Time(0),
            powerless_at: Time(0),
            boot: BootId(rng.u128(1..)),
            lives: 0,
            slow_until: Time(0),
            slowness: 1,
            stuck_until: Time(0),
            held_until: Time(0),
            starting: false,
            rng,
        }
    }

    /// What the machine's clock shows.
    pub fn now(&self, world: Time) -> Time {
        self.clock.at(world)
    }

    /// The process and what only it knows is gone.
    pub fn end_process(&mut self) {
        self.process = None;
        self.paused = None;
        self.missed.clear();
        self.crash_in = None;
    }

    /// The machine gets another disk.
    pub fn install(&mut self, mut disk: Disk) {
        disk.succeed(&self.disk);
        self.disk = disk;
        self.astray.clear();
    }

    /// Nobody wonders about what waits until then.
    pub fn excuse(&mut self, until: Time) {
        self.excused_until = self.excused_until.max(until);
    }
}

/// A disk that went through `kagami create`.
fn new_disk(options: &Options, index: usize, blank: Blank, rng: &mut fastrand::Rng) -> Disk {
    let layout = options.layout();
    let mut disk = Disk::new(layout.data_size / SECTOR, blank, rng.fork());
    let new = meta::NewReplica {
        replica: ReplicaId(rng.u128(1..)),
        cluster: "sim".to_owned(),
        mirror: "r0".to_owned(),
        node: NAMES[index].to_owned(),
    };
    for (offset, bytes) in meta::create(&layout, &new) {
        disk.write_metadata(offset, &bytes);
    }
    disk
}

impl Cluster {
    /// Starts the daemon on a machine.
    pub fn start(&mut self, h: usize) {
        let host = &mut self.hosts[h];
        host.starting = false;
        if host.process.is_some() {
            return;
        }
        host.lives += 1;
        if host.fitness == Fitness::Condemned {
            // Whatever the machine held before the mirror's life, it is told from the other.
            let blank = Blank::Garbage(2 + (host.lives % 12) as u8);
            let disk = new_disk(&self.options, h, blank, &mut host.rng);
            host.install(disk);
            host.fitness = Fitness::Fit;
            host.trouble = None;
        }
        let config = NodeConfig {
            cluster: "sim".to_owned(),
            mirror: "r0".to_owned(),
            node: NAMES[h].to_owned(),
            peer: NAMES[1 - h].to_owned(),
            metadata: self.options.metadata,
            stall_timeout: self.options.stall_timeout,
            copy_rates: self.options.copy_rates(),
            arbiter: self.options.arbiter(),
            lease: self.options.lease,
            log_extents: self.options.log_extents,
        };
        let mut ids = host.rng.fork();
        host.process = Some(Process {
            node: Node::new(config, Box::new(move || ids.u128(1..))),
            life: host.lives,
            buffers: Buffers::default(),
            serving: false,
            fresh: true,
            asked_down: false,
            detached: false,
            erred: false,
            record_changes: false,
            copied: None,
            tick_at: None,
            operations: HashMap::new(),
        });
        let boot = host.boot;
        self.read_slots(h);
        let store_size = self.options.store_size;
        self.feed(h, Input::Attach { store_size, boot });
    }

    /// Gives the node of a machine an input and carries out what it asks for.
    pub fn feed(&mut self, h: usize, input: Input) {
        if self.trace.wants_lines() {
            let name = NAMES[h];
            self.trace
                .line(self.now, format_args!("{name} <- {}", brief(&input)));
        }
        let now = self.now;
        let host = &mut self.hosts[h];
        let Some(process) = &mut host.process else {
            return;
        };
        if host.paused.is_some() {
            host.missed.push_back(input);
            return;
        }
        let mut actions = std::mem::take(&mut self.actions);
        process.node.handle(host.clock.at(now), input, &mut actions);
        let mut crash = None;
        for action in actions.drain(..) {
            // A machine that crashed amid these actions carries out no more of them.
            let crashed = crash.is_some() || self.hosts[h].process.is_none();
            if self.violation.is_some() || crashed {
                continue;
            }
            if self.trace.wants_lines() {
                let name = NAMES[h];
                self.trace
                    .line(now, format_args!("{name} ->   {}", brief(&action)));
            }
            if let Err(problem) = self.perform(h, action) {
                self.fail(format!("{}: {problem}", NAMES[h]));
            }
            self.action_carried_out(h);
            crash = self.crash_is_due(h);
        }
        self.actions = actions;
        self.flush_network();
        if let Some(kind) = crash {
            return self.crash_for_a_while(h, kind);
        }
        if let Some(process) = &mut self.hosts[h].process
            && std::mem::take(&mut process.record_changes)
        {
            self.sample_custody();
        }
        if self.hosts[h].process.as_ref().is_some_and(|p| p.detached) {
            self.detach(h);
        } else {
            self.plan_tick(h);
        }
    }

    fn plan_tick(&mut self, h: usize) {
        let now = self.now;
        let host = &mut self.hosts[h];
        let Some(process) = &mut host.process else {
            return;
        };
        let Some(deadline) = process.node.next_deadline() else {
            return;
        };
        let late = match self.options.chance {
            Chance::Drawn => host.rng.u64(0..100_000),
            Chance::Fixed => 0,
        };
        let Some(due) = host.clock.when(deadline) else {
            return;
        };
        let at = Time(due.max(now).0 + late);
        if process.tick_at.is_none_or(|planned| at < planned) {
            process.tick_at = Some(at);
            let life = process.life;
            self.schedule(at.0 - now.0, Event::Tick { host: h, life, at });
        }
    }

    pub fn tick(&mut self, h: usize, life: u32, at: Time) {
        let Some(process) = &mut self.hosts[h].process else {
            return;
        };
        if process.life != life || process.tick_at != Some(at) {
            return;
        }
        process.tick_at = None;
        self.tick_if_due(h);
    }

    /// Lets the node's timers fire, or plans when they will.
    pub fn tick_if_due(&mut self, h: usize) {
        let now = self.hosts[h].now(self.now);
        let Some(process) = &self.hosts[h].process else {
            return;
        };
        if self.hosts[h].paused.is_some() {
            return;
        }
        match process.node.next_deadline() {
            Some(deadline) if deadline <= now => self.feed(h, Input::Tick),
            _ => self.plan_tick(h),
        }
    }

    /// The clock changed its course: the timers are planned anew.
    pub fn replan_tick(&mut self, h: usize) {
        if let Some(process) = &mut self.hosts[h].process {
            process.tick_at = None;
        }
        self.tick_if_due(h);
    }

    /// The node is at rest and asked for its store to be closed.
    fn detach(&mut self, h: usize) {
        self.sample_custody();
        let Some(process) = self.hosts[h].process.take() else {
            return;
        };
        self.hosts[h].end_process();
        let busy = self.hosts[h].disk.in_flight();
        if self.hosts[h].fitness == Fitness::Unreadable {
            if self.replica_on(h).is_some() {
                self.fail(format!("{}: a lost superblock was made anew", NAMES[h]));
            }
            self.hosts[h].fitness = Fitness::Condemned;
        } else if !process.asked_down && !process.erred {
            self.fail(format!("{}: detached, and nobody asked for it", NAMES[h]));
        } else if busy > 0 {
            self.fail(format!(
                "{}: detached with {busy} operations in flight",
                NAMES[h]
            ));
        } else if process.buffers.held() > 0 {
            let held = process.buffers.held();
            self.fail(format!("{}: detached with {held} buffers held", NAMES[h]));
        }
        let unanswered = self.client.pending_at(h);
        if unanswered > 0 {
            self.fail(format!(
                "{}: detached with {unanswered} requests unanswered",
                NAMES[h]
            ));
        }
        // Whoever starts it again has made room on it.
        self.hosts[h].trouble = None;
        self.client_lost(h);
        self.operator_lost(h);
        self.network.host_died(self.now, h, false, &mut self.later);
        self.flush_network();
        let down = draw_down(&mut self.hosts[h].rng);
        self.start_after(h, down);
    }
}

/// A value in one short line.
fn brief(value: &dyn std::fmt::Debug) -> String {
    let mut text = format!("{value:?}");
    if text.len() > 300 {
        let end = (0..=300).rev().find(|at| text.is_char_boundary(*at));
        text.truncate(end.unwrap_or(0));
        text.push('…');
    }
    text
}

/// A payload the guest brings.
pub(super) fn guest_payload(process: &mut Process, stamps: Vec<u64>) -> Payload {
    process.buffers.give(stamps.into(), Checksum::Wanted)
}
