//! A machine: its disk, and the daemon's process with the node.

use super::buffers::{Buffers, Checksum};
use super::cluster::{Cluster, Event};
use super::disk::Disk;
use super::driver::Purpose;
use super::faults::draw_down;
use super::options::{Chance, Options};
use crate::limits::SECTOR;
use crate::meta;
use crate::node::boundary::{Input, OpId, Payload};
use crate::node::{Node, NodeConfig};
use crate::types::{BootId, ReplicaId, Time};
use std::collections::HashMap;

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
    pub tick_at: Option<Time>,
    pub operations: HashMap<OpId, Purpose>,
}

/// A machine of the cluster.
pub(super) struct Host {
    pub process: Option<Process>,
    pub disk: Disk,
    /// The id of the replica on the disk.
    pub replica: ReplicaId,
    pub boot: BootId,
    pub lives: u32,
    pub slow_until: Time,
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
        let layout = options.layout();
        let mut disk = Disk::new(layout.data_size / SECTOR, options.blank(index), rng.fork());
        let replica = ReplicaId(rng.u128(1..));
        let new = meta::NewReplica {
            replica,
            cluster: "sim".to_owned(),
            mirror: "r0".to_owned(),
            node: NAMES[index].to_owned(),
        };
        for (offset, bytes) in meta::create(&layout, &new) {
            disk.write_metadata(offset, &bytes);
        }
        Host {
            process: None,
            disk,
            replica,
            boot: BootId(rng.u128(1..)),
            lives: 0,
            slow_until: Time(0),
            stuck_until: Time(0),
            held_until: Time(0),
            starting: false,
            rng,
        }
    }
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
        let config = NodeConfig {
            cluster: "sim".to_owned(),
            mirror: "r0".to_owned(),
            node: NAMES[h].to_owned(),
            peer: NAMES[1 - h].to_owned(),
            metadata: self.options.metadata,
            stall_timeout: self.options.stall_timeout,
            arbiter: self.options.arbiter(),
            lease: self.options.lease,
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
        let mut actions = std::mem::take(&mut self.actions);
        let now = self.now;
        let Some(process) = &mut self.hosts[h].process else {
            return;
        };
        process.node.handle(now, input, &mut actions);
        for action in actions.drain(..) {
            // A machine that crashed amid these actions carries out no more of them.
            if self.violation.is_some() || self.hosts[h].process.is_none() {
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
        }
        self.actions = actions;
        self.flush_network();
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
        let at = Time(deadline.max(now).0 + late);
        if process.tick_at.is_none_or(|planned| at < planned) {
            process.tick_at = Some(at);
            let life = process.life;
            self.schedule(at.0 - now.0, Event::Tick { host: h, life, at });
        }
    }

    pub fn tick(&mut self, h: usize, life: u32, at: Time) {
        let now = self.now;
        let Some(process) = &mut self.hosts[h].process else {
            return;
        };
        if process.life != life || process.tick_at != Some(at) {
            return;
        }
        process.tick_at = None;
        match process.node.next_deadline() {
            Some(deadline) if deadline <= now => self.feed(h, Input::Tick),
            _ => self.plan_tick(h),
        }
    }

    /// The node is at rest and asked for its store to be closed.
    fn detach(&mut self, h: usize) {
        self.sample_custody();
        let Some(process) = self.hosts[h].process.take() else {
            return;
        };
        let busy = self.hosts[h].disk.in_flight();
        if !process.asked_down {
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
