//! `kagami sim`: the simulator's front.

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use mirror_core::error::{ErrorId, Refusal};
use mirror_core::sim::{self, Faults, Report};
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
  kagami sim --seed 17 --trace         everything that happens in it")]
pub struct SimArgs {
    /// Run this seed and say what it derived.
    #[arg(long, conflicts_with = "seeds")]
    seed: Option<u64>,
    /// Print everything that happens.
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Run this many seeds.
    #[arg(long, required_unless_present = "seed")]
    seeds: Option<u64>,
    /// The first of them.
    #[arg(long, default_value_t = 0, requires = "seeds")]
    from: u64,
    /// Threads to run them on; as many as the machine has by default.
    #[arg(long, requires = "seeds")]
    threads: Option<usize>,
}

/// Totals over seeds.
#[derive(Default)]
struct Totals {
    seeds: u64,
    requests: u64,
    acknowledged_writes: u64,
    faults: Faults,
    failovers: u64,
    virtual_time: Duration,
    violations: Vec<Report>,
}

impl Totals {
    fn add(&mut self, report: Report) {
        self.seeds += 1;
        self.requests += report.stats.requests;
        self.acknowledged_writes += report.stats.acknowledged_writes;
        self.faults.add(&report.stats.faults);
        self.failovers += report.stats.failovers;
        self.virtual_time += report.stats.virtual_time;
        if report.violation.is_some() {
            self.violations.push(report);
        }
    }
}

/// Carries out the verb; fails when a violation was found.
pub fn run(args: &SimArgs) -> Result<(), Refusal> {
    match args.seed {
        Some(seed) => run_one(seed, args.trace),
        None => run_many(args),
    }
}

fn run_one(seed: u64, trace: bool) -> Result<(), Refusal> {
    let report = sim::run(seed, trace);
    println!("{report}");
    verdict(usize::from(report.violation.is_some()))
}

fn run_many(args: &SimArgs) -> Result<(), Refusal> {
    let seeds = args.seeds.unwrap_or(1);
    let threads = args
        .threads
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |count| count.get()));
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
        totals.faults.total(),
        totals.failovers,
        totals.virtual_time.as_secs_f64() / 3600.0,
        wall.as_secs_f64(),
        totals.violations.len()
    );
    println!("faults: {}", totals.faults);
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
