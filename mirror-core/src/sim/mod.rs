//! The simulator: two real nodes, their disks, the link between them, a guest and an operator, in
//! one thread, on a virtual clock, all derived from one seed (docs/simulation.md).
//!
//! The code under test is exactly the shipping core: [`crate::node::Node`] behind its boundary,
//! driven as the daemon drives it. Each part of the world documents the faults it can have: disks
//! in `disk.rs` and `disk_faults.rs`, the link in `network.rs`, machines and daemons in `faults.rs`
//! and `host_faults.rs`, clocks in `clock.rs`. What is right is
//! decided by two parts that know nothing of a node's insides: `checker.rs` (what a guest may see)
//! and `invariants.rs` (what must hold across the two disks).

mod buffers;
mod checker;
mod client;
mod clock;
mod cluster;
mod disk;
mod disk_faults;
mod driver;
mod fault_kind;
mod faults;
mod host;
mod host_faults;
mod invariants;
mod network;
mod operator;
mod options;
mod split_brain;
mod trace;

pub use fault_kind::{FaultKind, Faults};
pub use options::{Beginning, Options, Pace, Scenario};

use cluster::Cluster;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;
use trace::{Mode, Trace};

/// What a run did.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Stats {
    /// Events of the world.
    pub events: u64,
    /// Faults by kind.
    pub faults: Faults,
    /// Guest requests asked.
    pub requests: u64,
    /// Reads that returned data.
    pub reads: u64,
    /// Writes acknowledged.
    pub acknowledged_writes: u64,
    /// Flushes acknowledged.
    pub flushes: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Commands given.
    pub commands: u64,
    /// Commands refused.
    pub refusals: u64,
    /// Promotions that succeeded.
    pub promotions: u64,
    /// Promotions tried without the peer.
    pub failovers: u64,
    /// Resyncs completed by the daemons that ran last.
    pub resyncs: u64,
    /// The longest a guest waited for an answer.
    pub longest_stall: Duration,
    /// How long the run was on its own clock.
    pub virtual_time: Duration,
}

/// What came of a seed.
#[derive(Clone, Debug)]
pub struct Report {
    /// What the seed derived.
    pub options: Options,
    /// What was done.
    pub stats: Stats,
    /// A hash of everything that happened, in order.
    pub trace_hash: u64,
    /// What went wrong, if anything.
    pub violation: Option<Violation>,
}

/// A rule that was broken.
#[derive(Clone, Debug)]
pub struct Violation {
    /// Which, in one line.
    pub problem: String,
    /// What happened before it.
    pub last_lines: Vec<String>,
}

/// Runs a seed; with `trace`, prints what happens.
pub fn run(seed: u64, trace: bool) -> Report {
    let report = run_once(seed, if trace { Mode::Print } else { Mode::Hash });
    if report.violation.is_some() && !trace {
        // The same again, this time with words.
        run_once(seed, Mode::Keep)
    } else {
        report
    }
}

fn run_once(seed: u64, mode: Mode) -> Report {
    let options = Options::derive(seed);
    let mut cluster = Cluster::new(options.clone(), Trace::new(mode));
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| cluster.run())) {
        let text = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_default();
        cluster.fail(format!("panic: {text}"));
    }
    Report {
        options,
        stats: cluster.stats,
        trace_hash: cluster.trace.hash(),
        violation: cluster.violation.take().map(|problem| Violation {
            problem,
            last_lines: cluster.trace.last_lines(),
        }),
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "options: {}", self.options)?;
        writeln!(f, "stats: {:?}", self.stats)?;
        writeln!(f, "trace hash: {:016x}", self.trace_hash)?;
        if let Some(violation) = &self.violation {
            for line in &violation.last_lines {
                writeln!(f, "{line}")?;
            }
            writeln!(
                f,
                "VIOLATION with seed {}: {}",
                self.options.seed, violation.problem
            )?;
            write!(f, "replay: kagami sim --seed {} --trace", self.options.seed)?;
        } else {
            write!(f, "seed {}: no violation", self.options.seed)?;
        }
        Ok(())
    }
}
