//! The world: a virtual clock, the event queue, and the parts that events are handed to.

use super::Stats;
use super::ambush::Ambush;
use super::arbiter::{Arbiter, Asker, Message};
use super::checker::Checker;
use super::client::Client;
use super::coverage::Coverage;
use super::differences::Differences;
use super::disk::Blank;
use super::exhaustive::Enumerated;
use super::host::{Host, NAMES};
use super::invariants::Custody;
use super::network::{Later, Network, NetworkEvent};
use super::operator::Operator;
use super::options::Options;
use super::recording::Source;
use super::takeover::Takeover;
use super::trace::Trace;
use super::verify::Doubts;
use crate::limits::SECTOR;
use crate::node::boundary::{Actions, OpId};
use crate::types::Time;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Events after which a run counts as a live-lock.
const MOST_EVENTS: u64 = 3_000_000;

/// When a run begins, on its own clock.
pub(super) const BEGINNING: Time = Time(1_000_000);

/// Something that happens at a point in time.
#[derive(Clone, Copy, Debug)]
pub(super) enum Event {
    Disk {
        host: usize,
        life: u32,
        op: OpId,
    },
    Tick {
        host: usize,
        life: u32,
        at: Time,
    },
    /// A pause ends.
    Wake {
        host: usize,
        life: u32,
    },
    ClockGoes {
        host: usize,
    },
    Network(NetworkEvent),
    Arbiter {
        asker: Asker,
        epoch: u32,
        message: Message,
    },
    Start {
        host: usize,
    },
    Client,
    Operator,
    Fault,
    Ambush,
    /// A replacement of the Primary goes on.
    Takeover {
        heir: usize,
        next: Takeover,
    },
    Watch,
    /// The list of stimuli has something to do.
    Listed,
    /// The guest reads back what was ever written.
    Verify,
}

struct Scheduled {
    at: Time,
    sequence: u64,
    event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Scheduled) -> bool {
        (self.at, self.sequence) == (other.at, other.sequence)
    }
}
impl Eq for Scheduled {}
impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Scheduled) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Scheduled {
    fn cmp(&self, other: &Scheduled) -> std::cmp::Ordering {
        (self.at, self.sequence).cmp(&(other.at, other.sequence))
    }
}

/// Where a run is in its story.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    /// The first Primary is being made.
    Setup,
    /// Faults and commands at random.
    Storm,
    /// No more faults: the operator heals everything, by this time at the latest.
    Heal {
        deadline: Time,
    },
    /// Everything ever written is read back.
    Verify {
        deadline: Time,
    },
    /// The copy that does not serve is rotten, and an operator has it mended.
    Rot {
        serving: usize,
        deadline: Time,
    },
    Over,
}

/// Two machines, their link, a guest, an operator, and the oracle.
pub(super) struct Cluster {
    pub now: Time,
    pub options: Options,
    pub phase: Phase,
    pub hosts: [Host; 2],
    pub network: Network,
    pub arbiter: Arbiter,
    pub client: Client,
    pub operator: Operator,
    pub checker: Checker,
    /// In a split brain, the history of each side.
    pub apart: Option<[Checker; 2]>,
    pub custody: Custody,
    pub coverage: Coverage,
    pub ambush: Ambush,
    pub trace: Trace,
    pub stats: Stats,
    pub violation: Option<String>,
    pub rng: fastrand::Rng,
    /// What the seed draws faults with.
    pub whims: fastrand::Rng,
    pub source: Source,
    pub differences: Differences,
    pub doubts: Doubts,
    #[cfg(test)]
    pub sabotage: super::driver::Sabotage,
    /// Of a run that is one case of an enumeration.
    pub enumerated: Enumerated,
    /// Reused between calls.
    pub actions: Actions,
    pub later: Later,
    queue: BinaryHeap<Reverse<Scheduled>>,
    sequence: u64,
}

impl Cluster {
    pub fn new(options: Options, source: Source, trace: Trace) -> Cluster {
        let mut rng = options.rng();
        let hosts = [0, 1].map(|index| Host::new(&options, index, rng.fork()));
        let max_delay = options.network_delay.as_nanos() as u64;
        let network = Network::new(options.initiator, options.chance, max_delay, rng.fork());
        let arbiter = Arbiter::new(max_delay, rng.fork());
        let client = Client::new(&options, rng.fork());
        let blank: Blank = options.blank(options.first_primary);
        let sectors = options.layout().data_size / SECTOR;
        Cluster {
            now: BEGINNING,
            phase: Phase::Setup,
            hosts,
            network,
            arbiter,
            client,
            operator: Operator::new(rng.fork()),
            checker: Checker::new(sectors, Box::new(move |sector| blank.sector(sector))),
            apart: None,
            custody: Custody::default(),
            coverage: Coverage::default(),
            ambush: Ambush::new(fastrand::Rng::with_seed(options.seed ^ 0xa3b5)),
            trace,
            stats: Stats::default(),
            violation: None,
            whims: rng.fork(),
            rng,
            source,
            differences: Differences::default(),
            doubts: Doubts::new(&options),
            #[cfg(test)]
            sabotage: super::driver::Sabotage::None,
            enumerated: Enumerated::default(),
            actions: Vec::new(),
            later: Vec::new(),
            queue: BinaryHeap::new(),
            sequence: 0,
            options,
        }
    }

    /// Runs the whole story, or until a violation.
    pub fn run(&mut self) {
        for host in [0, 1] {
            let delay = self.rng.u64(0..50_000_000);
            self.schedule(delay, Event::Start { host });
        }
        self.schedule(1, Event::Operator);
        self.schedule(1, Event::Watch);
        while self.violation.is_none() && self.phase != Phase::Over {
            self.step();
        }
        self.stats.virtual_time = self.now.since(BEGINNING);
    }

    /// Lets the next event happen.
    pub fn step(&mut self) {
        let Some(Reverse(next)) = self.queue.pop() else {
            return self.fail("nothing is left to happen".to_owned());
        };
        self.now = next.at;
        self.stats.events += 1;
        if self.stats.events > MOST_EVENTS {
            self.fail(format!("no end after {MOST_EVENTS} events"));
        }
        self.fold(next.event);
        self.happen(next.event);
    }

    /// When the next event happens, if any is planned.
    pub fn next_event(&self) -> Option<Time> {
        self.queue.peek().map(|Reverse(next)| next.at)
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Disk { host, life, op } => self.disk_done(host, life, op),
            Event::Tick { host, life, at } => self.tick(host, life, at),
            Event::Network(event) => {
                let heard = self.network.happen(self.now, event, &mut self.later);
                self.flush_network();
                if let Some((host, heard)) = heard {
                    self.heard(host, heard);
                }
            }
            Event::Arbiter {
                asker,
                epoch,
                message,
            } => self.arbiter_hears(asker, epoch, message),
            Event::Start { host } => self.start(host),
            Event::Wake { host, life } => self.wake(host, life),
            Event::ClockGoes { host } => self.clock_goes(host),
            Event::Client => self.client_step(),
            Event::Operator => self.operator_step(),
            Event::Fault => self.fault_step(),
            Event::Ambush => self.ambush_step(),
            Event::Takeover { heir, next } => self.takeover_step(heir, next),
            Event::Watch => self.watch_step(),
            Event::Listed => self.listed_step(),
            Event::Verify => self.verify_step(),
        }
    }

    fn fold(&mut self, event: Event) {
        let (kind, detail) = match event {
            Event::Disk { host, op, .. } => (1 + host as u64, op.0),
            Event::Tick { host, .. } => (3 + host as u64, 0),
            Event::Network(NetworkEvent::Deliver { connection, side }) => {
                (5 + side as u64, connection as u64)
            }
            Event::Network(_) => (7, 0),
            Event::Start { host } => (8 + host as u64, 0),
            Event::Client => (10, 0),
            Event::Operator => (11, 0),
            Event::Fault => (12, 0),
            Event::Watch => (13, 0),
            Event::Listed => (14, 0),
            Event::Verify => (15, 0),
            Event::Arbiter { asker, .. } => (16 + asker.host as u64, asker.ask.0),
            Event::Ambush => (18, 0),
            Event::Wake { host, .. } => (19 + host as u64, 0),
            Event::ClockGoes { host } => (21 + host as u64, 0),
            Event::Takeover { heir, .. } => (23 + heir as u64, 0),
        };
        self.trace.fold(self.now.0);
        self.trace.fold(kind << 56 ^ detail);
    }

    /// Plans an event `delay` nanoseconds from now.
    pub fn schedule(&mut self, delay: u64, event: Event) {
        self.sequence += 1;
        self.queue.push(Reverse(Scheduled {
            at: Time(self.now.0 + delay),
            sequence: self.sequence,
            event,
        }));
    }

    /// Does what the list has for now, and plans the rest of it.
    pub fn listed_step(&mut self) {
        while let Some(stimulus) = self.source.due(self.now) {
            self.stimulate(stimulus);
        }
        if let Some(at) = self.source.next_at() {
            self.schedule(at.0.saturating_sub(self.now.0), Event::Listed);
        }
    }

    /// Plans what the network asked for.
    pub fn flush_network(&mut self) {
        let mut later = std::mem::take(&mut self.later);
        for (delay, event) in later.drain(..) {
            self.schedule(delay, Event::Network(event));
        }
        self.later = later;
    }

    /// The first violation ends the run.
    pub fn fail(&mut self, problem: String) {
        self.trace
            .line(self.now, format_args!("VIOLATION {problem}"));
        self.violation.get_or_insert(problem);
    }

    /// A line of the story.
    pub fn tell(&mut self, host: usize, text: &str) {
        if self.trace.wants_lines() {
            self.trace
                .line(self.now, format_args!("== {} {text}", NAMES[host]));
        }
    }
}
