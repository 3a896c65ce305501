//! The simulator: two real nodes, their disks, the link between them, a guest and an operator, in
//! one thread, on a virtual clock, all derived from one seed (docs/simulation.md).
//!
//! The code under test is exactly the shipping core: [`crate::node::Node`] behind its boundary,
//! driven as the daemon drives it. Each part of the world documents the faults it can have: disks
//! in `disk.rs` and `disk_faults.rs`, the link in `network.rs`, the arbiter in `arbiter.rs`, machines
//! and daemons in `faults.rs` and `host_faults.rs`, clocks in `clock.rs`; `ambush.rs` strikes where
//! it hurts. What is right is decided by parts that know nothing of a node's insides but what its
//! operator sees: `checker.rs` (what a guest may see), `invariants.rs`, `records.rs` and
//! `coverage.rs` (what must hold across the two disks).
//!
//! What is done to the cluster passes one point (`stimulus.rs`), so that a run can be recorded, run
//! again from the list (`recording.rs`), and cut down to what it takes to break a rule
//! (`shrink.rs`).

mod ambush;
mod arbiter;
mod buffers;
pub mod checker;
mod client;
mod clock;
mod cluster;
mod coverage;
mod differences;
mod disk;
mod disk_faults;
mod driver;
pub mod exhaustive;
mod fault_kind;
mod faults;
mod host;
mod host_faults;
mod invariants;
mod network;
mod operator;
mod options;
mod recording;
mod records;
pub mod script;
mod shrink;
mod split_brain;
mod stimulus;
mod takeover;
mod text;
mod trace;
mod verify;

pub use fault_kind::{FaultKind, Faults};
pub use options::{Arbitration, Beginning, Options, Pace, Scenario};
pub use recording::{Recording, ScriptError};
pub use shrink::{Shrunk, shrink};

use cluster::Cluster;
use recording::Source;
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
    /// Requests that the guest asked, not counting what it read back in the end.
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
    /// Blocks that rotted in the end, all of them found and mended.
    pub rotten_blocks: u64,
    /// The longest a guest waited for an answer.
    pub longest_stall: Duration,
    /// How long the run was on its own clock.
    pub virtual_time: Duration,
}

/// Below this many requests per virtual minute a run counts as idle.
const DENSE_REQUESTS: f64 = 100.0;

/// And below this many faults per virtual minute.
const DENSE_FAULTS: f64 = 1.0;

impl Stats {
    /// Guest requests per virtual minute.
    pub fn requests_per_minute(&self) -> f64 {
        self.requests as f64 / self.minutes()
    }

    /// Faults per virtual minute.
    pub fn faults_per_minute(&self) -> f64 {
        self.faults.total() as f64 / self.minutes()
    }

    /// Whether enough happened for the run's time to count as simulated.
    pub fn is_dense(&self) -> bool {
        self.requests_per_minute() >= DENSE_REQUESTS && self.faults_per_minute() >= DENSE_FAULTS
    }

    fn minutes(&self) -> f64 {
        (self.virtual_time.as_secs_f64() / 60.0).max(f64::MIN_POSITIVE)
    }
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
    /// Whether the seed was seen to do the same twice.
    pub runs: Runs,
    /// What went wrong, if anything.
    pub violation: Option<Violation>,
}

/// How often a seed was run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Runs {
    /// Once.
    Once,
    /// A second time, and the two were compared.
    Compared,
}

/// A rule that was broken.
#[derive(Clone, Debug)]
pub struct Violation {
    /// Which, in one line.
    pub problem: String,
    /// What happened before it.
    pub last_lines: Vec<String>,
}

impl Violation {
    /// The rule without the numbers of this run: two runs that break the same rule are equal in it.
    pub fn kind(&self) -> String {
        let rule = self.problem.split(';').next().unwrap_or_default();
        let mut kind = String::new();
        for c in rule.chars() {
            match c.is_ascii_digit() {
                true if kind.ends_with('#') => {}
                true => kind.push('#'),
                false => kind.push(c),
            }
        }
        // Which unit a time is told in depends on its length.
        for unit in ["#.#s", "#.#ms", "#.#µs", "#ms", "#µs", "#ns"] {
            kind = kind.replace(unit, "#s");
        }
        kind
    }
}

/// One seed in so many is run a second time, to see that it does the same.
const TWICE: u64 = 100;

/// Runs a seed; with `trace`, prints what happens.
pub fn run(seed: u64, trace: bool) -> Report {
    let drawn = || Source::Drawn(Vec::new());
    let options = || Options::derive(seed);
    if trace {
        return run_once(options(), drawn(), Mode::Print).0;
    }
    let mut report = run_once(options(), drawn(), Mode::Hash).0;
    if seed.is_multiple_of(TWICE) {
        report.compare(&run_once(options(), drawn(), Mode::Hash).0);
    }
    match report.violation {
        // The same again, this time with words.
        Some(_) => {
            let told = run_once(options(), drawn(), Mode::Keep).0;
            Report {
                violation: told.violation.or(report.violation),
                runs: report.runs,
                ..told
            }
        }
        None => report,
    }
}

/// Runs a seed and keeps what it drew.
pub fn record(seed: u64) -> (Report, Recording) {
    let options = Options::derive(seed);
    let source = Source::Drawn(Vec::new());
    let (report, source) = run_once(options.clone(), source, Mode::Hash);
    let steps = match source {
        Source::Drawn(steps) => steps,
        Source::Listed { .. } => Vec::new(),
    };
    let mut recording = Recording { options, steps };
    if report.violation.is_some() {
        recording.end_storm(report.stats.virtual_time);
    }
    (report, recording)
}

/// Runs a recording; with `trace`, prints what happens.
pub fn replay(recording: &Recording, trace: bool) -> Report {
    let again = |mode| run_once(recording.options.clone(), recording.source(), mode).0;
    if trace {
        return again(Mode::Print);
    }
    let report = again(Mode::Hash);
    match report.violation {
        Some(_) => again(Mode::Keep),
        None => report,
    }
}

fn run_once(options: Options, source: Source, mode: Mode) -> (Report, Source) {
    run_cluster(Cluster::new(options, source, Trace::new(mode)))
}

fn run_cluster(mut cluster: Cluster) -> (Report, Source) {
    let options = cluster.options.clone();
    guarded(&mut cluster, Cluster::run);
    let report = Report {
        options,
        stats: cluster.stats,
        trace_hash: cluster.trace.hash(),
        runs: Runs::Once,
        violation: cluster.violation.take().map(|problem| Violation {
            problem,
            last_lines: cluster.trace.last_lines(),
        }),
    };
    (report, cluster.source)
}

impl Report {
    /// The same run again must have ended the same.
    fn compare(&mut self, again: &Report) {
        self.runs = Runs::Compared;
        if (self.trace_hash, self.stats) != (again.trace_hash, again.stats) {
            self.violation.get_or_insert(Violation {
                problem: format!(
                    "the seed does not replay: trace hash {:016x}, then {:016x}",
                    self.trace_hash, again.trace_hash
                ),
                last_lines: Vec::new(),
            });
        }
    }
}

/// Does something to a world; a panic is a violation.
fn guarded(cluster: &mut Cluster, work: impl FnOnce(&mut Cluster)) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| work(cluster))) {
        let text = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_default();
        cluster.fail(format!("panic: {text}"));
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "options:")?;
        for line in self.options.to_string().lines() {
            writeln!(f, "  {line}")?;
        }
        writeln!(f, "stats:\n{}", self.stats)?;
        writeln!(f, "trace hash: {:016x}", self.trace_hash)?;
        let seed = self.options.seed;
        let Some(violation) = &self.violation else {
            return write!(f, "seed {seed}: no violation");
        };
        for line in &violation.last_lines {
            writeln!(f, "{line}")?;
        }
        write!(f, "VIOLATION with seed {seed}: {}", violation.problem)
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "  virtual time     {:.3} s, {} events",
            self.virtual_time.as_secs_f64(),
            self.events
        )?;
        writeln!(
            f,
            "  guest            {} requests ({:.0} a minute): {} reads, {} writes, {} flushes, {} \
             errors",
            self.requests,
            self.requests_per_minute(),
            self.reads,
            self.acknowledged_writes,
            self.flushes,
            self.errors
        )?;
        writeln!(
            f,
            "  operator         {} commands, {} refused; {} promotions, {} tried alone",
            self.commands, self.refusals, self.promotions, self.failovers
        )?;
        write!(
            f,
            "  faults           {} ({:.1} a minute):",
            self.faults.total(),
            self.faults_per_minute()
        )?;
        for (kind, count) in self.faults.list() {
            write!(f, " {} {count}", kind.replace(' ', "-"))?;
        }
        write!(
            f,
            "\n  recovery         {} resyncs; longest stall {:.3} s",
            self.resyncs,
            self.longest_stall.as_secs_f64()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn violation(problem: &str) -> Violation {
        Violation {
            problem: problem.to_owned(),
            last_lines: Vec::new(),
        }
    }

    #[test]
    fn a_kind_is_the_rule_without_its_numbers() {
        let same = [
            ("R6: block 12 differs", "R6: block 7 differs"),
            ("waits for 1.5s", "waits for 300.25ms"),
            ("waits for 2s", "waits for 300µs"),
            ("not healed in time; 3 of 4", "not healed in time; 9 frames"),
        ];
        for (one, other) in same {
            assert_eq!(violation(one).kind(), violation(other).kind());
        }
        assert_ne!(
            violation("R6: a differs").kind(),
            violation("R6: b differs").kind()
        );
        assert_ne!(
            violation("3 blocks differ").kind(),
            violation("3 reads fail").kind()
        );
    }

    #[test]
    fn a_run_that_ends_differently_is_noticed() {
        let report = run(1, false);
        let compared = |change: &dyn Fn(&mut Report)| {
            let (mut first, mut again) = (report.clone(), report.clone());
            change(&mut again);
            first.compare(&again);
            assert_eq!(first.runs, Runs::Compared);
            first.violation
        };
        assert!(compared(&|_| {}).is_none());
        assert!(compared(&|again| again.trace_hash ^= 1).is_some());
        assert!(compared(&|again| again.stats.reads += 1).is_some());
    }

    #[test]
    fn one_seed_in_a_hundred_is_run_twice() {
        assert_eq!(run(100, false).runs, Runs::Compared);
        assert_eq!(run(101, false).runs, Runs::Once);
    }

    #[test]
    fn idle_runs_are_not_dense() {
        let mut stats = Stats {
            virtual_time: Duration::from_secs(120),
            requests: 200,
            ..Stats::default()
        };
        stats.faults.count(FaultKind::Cut);
        stats.faults.count(FaultKind::Cut);
        assert!(stats.is_dense());
        stats.requests = 199;
        assert!(!stats.is_dense());
        stats.requests = 200;
        stats.faults = Faults::default();
        stats.faults.count(FaultKind::Cut);
        assert!(!stats.is_dense());
    }
}
