//! Small cases, all of them: every sequence of a few operations, a crash after every action of
//! either node, and what the crash leaves of the disk's cache. Seeds find what is likely; this
//! finds what is small, because nothing small is left out (docs/simulation.md).
//!
//! A sequence is run once without a crash, which counts the actions of each node from the first
//! operation until the two are in sync again. Then it is run once for each of them and each loss.
//! A crash ends the call of `Node::handle` that it falls into: its later actions are lost. The
//! operations after it go on with whoever is left, then everything is healed, and the oracle and
//! the invariants of the simulator judge as they do over seeds.

mod name;
mod world;

pub(super) use world::Enumerated;

use super::cluster::Cluster;
use super::disk::Kept;
use super::options::{Arbitration, Options};
use super::recording::Source;
use super::trace::{Mode, Trace};
use super::{Violation, guarded};
use crate::limits::EXTENT;

/// Bytes of the store: one activity-log extent, and the beginning of a second.
const STORE: u64 = EXTENT + (64 << 10);

/// What a sequence begins with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Start {
    /// `a` is Primary, `b` in sync with it; the last write was acknowledged and not flushed.
    InSync,
    /// `a` went on alone, and they met again: a resync is agreed upon and held.
    Held,
    /// The same; of three dirty runs one was copied, the other two are being read.
    Resyncing,
}

const STARTS: [Start; 3] = [Start::InSync, Start::Held, Start::Resyncing];

/// When an operation begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pace {
    /// When nothing more comes of the one before it.
    OneByOne,
    /// Together with the others.
    AtOnce,
}

/// Something that is done to the mirror.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// A small write, not aligned to blocks.
    Write,
    /// A write over resynced and not yet resynced blocks, and over the border of two extents.
    Spanning,
    /// A write that is to be durable.
    Fua,
    /// A flush.
    Flush,
    /// Zeroes, and the space may be given back.
    Trim,
    /// Zeroes.
    Zero,
    /// The link breaks, and stays broken until a resync step or the end.
    Disconnect,
    /// What keeps a resync from running is repaired, and it copies one run of blocks.
    ResyncStep,
    /// A node becomes Primary: the other one than before if it may, else one that may. While one
    /// serves, the other is asked and must refuse.
    Promote,
    /// The Primary gives its role back.
    Demote,
}

const OPERATIONS: [Operation; 10] = [
    Operation::Write,
    Operation::Spanning,
    Operation::Fua,
    Operation::Flush,
    Operation::Trim,
    Operation::Zero,
    Operation::Disconnect,
    Operation::ResyncStep,
    Operation::Promote,
    Operation::Demote,
];

/// What a crash leaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Loss {
    /// The power fails; this much of the cache, and of what was in flight, is kept.
    Power(Kept),
    /// kill -9: the cache lives on.
    Killed,
}

const LOSSES: [Loss; 6] = [
    Loss::Power(Kept::Nothing),
    Loss::Power(Kept::Everything),
    Loss::Power(Kept::Sectors),
    Loss::Power(Kept::Writes),
    Loss::Power(Kept::Metadata),
    Loss::Killed,
];

/// A crash within a case.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Crash {
    host: usize,
    /// It falls right after this action of the host, counted from 1.
    action: u64,
    loss: Loss,
}

/// A start and some operations.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sequence {
    arbitration: Arbitration,
    start: Start,
    pace: Pace,
    operations: Vec<Operation>,
}

/// One run: a sequence, and the crash in it, if any.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Case {
    sequence: Sequence,
    crash: Option<Crash>,
}

/// What came of all cases of a sequence.
#[derive(Clone, Default, Debug)]
pub struct Outcome {
    /// Cases that were run.
    pub cases: u64,
    /// Cases that broke a rule, by name, each with the rule.
    pub violations: Vec<(String, String)>,
}

/// Every sequence of one to `most` operations, from every start, at every pace, without an arbiter
/// and with one.
pub fn sequences(most: usize) -> Vec<Sequence> {
    let mut all = Vec::new();
    let mut add = |start, pace, operations: &[Operation]| {
        for arbitration in [Arbitration::Unarbitrated, Arbitration::Arbitrated] {
            all.push(Sequence {
                arbitration,
                start,
                pace,
                operations: operations.to_vec(),
            });
        }
    };
    let mut longest = vec![Vec::new()];
    for _ in 0..most {
        longest = longest
            .iter()
            .flat_map(|shorter: &Vec<Operation>| {
                OPERATIONS.map(|operation| [shorter.as_slice(), &[operation]].concat())
            })
            .collect();
        for operations in &longest {
            for start in STARTS {
                add(start, Pace::OneByOne, operations);
                if operations.len() > 1 {
                    add(start, Pace::AtOnce, operations);
                }
            }
        }
    }
    all
}

impl Sequence {
    /// Runs every case of the sequence.
    pub fn run(&self) -> Outcome {
        let mut outcome = Outcome::default();
        let quiet = Case {
            sequence: self.clone(),
            crash: None,
        };
        let actions = outcome.add(&quiet);
        for host in [0, 1] {
            for action in 1..=actions[host] {
                for loss in LOSSES {
                    let crash = Crash { host, action, loss };
                    outcome.add(&Case {
                        crash: Some(crash),
                        ..quiet.clone()
                    });
                }
            }
        }
        outcome
    }
}

impl Outcome {
    /// Runs a case and counts it; the actions of both nodes.
    fn add(&mut self, case: &Case) -> [u64; 2] {
        let cluster = case.play(Mode::Hash);
        self.cases += 1;
        if let Some(problem) = &cluster.violation {
            self.violations.push((case.to_string(), problem.clone()));
        }
        cluster.enumerated.actions()
    }
}

impl Case {
    /// Runs the case; with `trace`, prints what happens.
    pub fn run(&self, trace: bool) -> Option<Violation> {
        let cluster = self.play(if trace { Mode::Print } else { Mode::Keep });
        cluster.violation.map(|problem| Violation {
            problem,
            last_lines: cluster.trace.last_lines(),
        })
    }

    fn play(&self, mode: Mode) -> Cluster {
        let options = Options::fixed(STORE, self.sequence.arbitration);
        let mut cluster = Cluster::new(options, Source::Drawn(Vec::new()), Trace::new(mode));
        guarded(&mut cluster, |cluster| cluster.play(self));
        cluster
    }
}
