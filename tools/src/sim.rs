//! `kagami sim`: the simulator's front.

mod exhaustive;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use mirror_core::error::{ErrorId, Refusal};
use mirror_core::sim::exhaustive::Case;
use mirror_core::sim::{self, Report};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Run the mirror's core in a simulated world of faults and check every promise it makes.
///
/// A seed decides everything: the load, the crashes, the cuts, the delays. The same seed of the same
/// version always does the same, so a failure is replayed with its seed; docs/simulation.md says
/// how. Needs no configuration and no daemon.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  kagami sim --seeds 2000              many runs, on all processors; ends with 1 at a violation
  kagami sim --seed 17                 one run, and what the seed derived
  kagami sim --seed 17 --trace         everything that happens in it
  kagami sim --exhaustive              every small case, a crash after every action
  kagami sim --exhaustive-case 'write,disconnect/crash a@7/keep none' --trace")]
pub struct SimArgs {
    /// Run this seed and say what it derived.
    #[arg(long, group = "single")]
    seed: Option<u64>,
    /// Print everything that happens.
    #[arg(long, requires = "single")]
    trace: bool,
    /// Run this many seeds.
    #[arg(
        long,
        group = "many",
        required_unless_present_any = ["single", "exhaustive"],
        conflicts_with = "single"
    )]
    seeds: Option<u64>,
    /// Run every sequence of a few operations, with a crash after every action of either node.
    #[arg(long, group = "many", conflicts_with = "single")]
    exhaustive: bool,
    /// Operations in the longest of them.
    #[arg(long, default_value_t = 2, requires = "exhaustive",
          value_parser = clap::value_parser!(u8).range(1..=3))]
    operations: u8,
    /// Run only this many of the sequences.
    #[arg(long, requires = "exhaustive")]
    sequences: Option<usize>,
    /// Run one case of them, by the name a violation gives.
    #[arg(long, value_name = "NAME", group = "single")]
    exhaustive_case: Option<Case>,
    /// The first of the seeds or sequences.
    #[arg(long, default_value_t = 0, requires = "many")]
    from: u64,
    /// Threads to run them on; as many as the machine has by default.
    #[arg(long, requires = "many")]
    threads: Option<usize>,
}

/// Totals over seeds.
#[derive(Default)]
struct Totals {
    seeds: u64,
    requests: u64,
    acknowledged_writes: u64,
    faults: u64,
    failovers: u64,
    virtual_time: Duration,
    violations: Vec<Report>,
}

impl Totals {
    fn add(&mut self, report: Report) {
        self.seeds += 1;
        self.requests += report.stats.requests;
        self.acknowledged_writes += report.stats.acknowledged_writes;
        self.faults += report.stats.faults.total();
        self.failovers += report.stats.failovers;
        self.virtual_time += report.stats.virtual_time;
        if report.violation.is_some() {
            self.violations.push(report);
        }
    }
}

/// Carries out the verb; fails when a violation was found.
pub fn run(args: &SimArgs) -> Result<(), Refusal> {
    match (args.seed, &args.exhaustive_case) {
        (Some(seed), _) => run_one(seed, args.trace),
        (_, Some(case)) => exhaustive::run_case(case, args.trace),
        _ if args.exhaustive => exhaustive::run_all(args),
        _ => run_many(args),
    }
}

fn run_one(seed: u64, trace: bool) -> Result<(), Refusal> {
    let report = sim::run(seed, trace);
    println!("{report}");
    verdict(usize::from(report.violation.is_some()))
}

fn run_many(args: &SimArgs) -> Result<(), Refusal> {
    let seeds = args.seeds.unwrap_or(1);
    let threads = threads_or_all(args.threads);
    let bar = ProgressBar::new(seeds);
    if let Ok(style) =
        ProgressStyle::with_template("{bar:40} {pos}/{len} seeds, {per_sec}, ETA {eta}")
    {
        bar.set_style(style);
    }
    let next = AtomicU64::new(args.from);
    let stop = AtomicBool::new(false);
    let totals = Mutex::new(Totals::default());
    let started = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= args.from.saturating_add(seeds) {
                        break;
                    }
                    let report = sim::run(seed, false);
                    let mut totals = match totals.lock() {
                        Ok(totals) => totals,
                        Err(poisoned) => poisoned.into_inner(),
                    };
                    totals.add(report);
                    // A handful of examples is enough to work on.
                    stop.fetch_or(totals.violations.len() >= 10, Ordering::Relaxed);
                    bar.inc(1);
                }
            });
        }
    });
    bar.finish_and_clear();
    let totals = totals.into_inner().unwrap_or_default();
    summarise(&totals, started.elapsed());
    verdict(totals.violations.len())
}

fn threads_or_all(wanted: Option<usize>) -> usize {
    wanted.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |count| count.get()))
}

fn summarise(totals: &Totals, wall: Duration) {
    for report in &totals.violations {
        println!("{report}\n");
    }
    println!(
        "{} seeds, {} requests ({} writes acknowledged), {} faults, {} failovers, {:.1} virtual \
         hours in {:.1} s, {} violations",
        totals.seeds,
        totals.requests,
        totals.acknowledged_writes,
        totals.faults,
        totals.failovers,
        totals.virtual_time.as_secs_f64() / 3600.0,
        wall.as_secs_f64(),
        totals.violations.len()
    );
}

fn verdict(violations: usize) -> Result<(), Refusal> {
    if violations == 0 {
        return Ok(());
    }
    Err(Refusal::new(
        ErrorId::SimulationFailed,
        format!(
            "{violations} simulated runs broke a rule; replay one with `kagami sim --seed S --trace`"
        ),
    ))
}
