//! `kagami sim`: the simulator's front.

mod exhaustive;
mod golden;
mod script;
mod seeds;
mod totals;

use crate::output;
use clap::{ArgGroup, Args};
use mirror_core::error::{ErrorId, Refusal};
use mirror_core::sim::exhaustive::Case;
use mirror_core::sim::{self, Report};
use std::path::{Path, PathBuf};

/// Run the mirror's core in a simulated world of faults and check every promise it makes.
///
/// A seed decides everything: the load, the crashes, the cuts, the delays. The same seed of the same
/// version always does the same, so a failure is replayed with its seed, or shrunk to a short script
/// that is replayed; docs/simulation.md says how. Needs no configuration and no daemon.
#[derive(Args, Debug)]
#[command(
    group(ArgGroup::new("what").required(true).args(
        ["seed", "seeds", "until_failure", "replay", "exhaustive", "exhaustive_case", "script"])),
    after_help = "Examples:
  kagami sim --seeds 2000              many runs, on all processors; ends with 1 at a violation
  kagami sim --seeds 500 --from 7000 --json
  kagami sim --until-failure --minutes 60
                                       runs until one breaks a rule, and shrinks that one
  kagami sim --seed 17                 one run, and what the seed derived
  kagami sim --seed 17 --trace         everything that happens in it
  kagami sim --seed 17 --shrink        of a violation, a script of what it takes
  kagami sim --replay sim-seed-17.script --trace
  kagami sim --exhaustive              every small case, a crash after every action
  kagami sim --exhaustive-case 'write,disconnect/crash a@7/keep none' --trace
  kagami sim --script mirror-core/tests/scripts/a-write.txt
                                       one story, told anew"
)]
pub struct SimArgs {
    /// Run this seed and say what it derived.
    #[arg(long)]
    seed: Option<u64>,
    /// Run this many seeds.
    #[arg(long)]
    seeds: Option<u64>,
    /// Run seeds until one breaks a rule, and shrink that one.
    #[arg(long)]
    until_failure: bool,
    /// Run a script.
    #[arg(long, value_name = "FILE")]
    replay: Option<PathBuf>,
    /// Run every sequence of a few operations, with a crash after every action of either node.
    #[arg(long)]
    exhaustive: bool,
    /// Operations in the longest of them.
    #[arg(long, default_value_t = 2,
          conflicts_with_all = ["seed", "seeds", "until_failure", "replay", "exhaustive_case"],
          value_parser = clap::value_parser!(u8).range(1..=3))]
    operations: u8,
    /// Run only this many of the sequences.
    #[arg(long, conflicts_with_all = ["seed", "seeds", "until_failure", "replay", "exhaustive_case"])]
    sequences: Option<usize>,
    /// Run one case of them, by the name a violation gives.
    #[arg(long, value_name = "NAME")]
    exhaustive_case: Option<Case>,
    /// Run a golden script, a story for readers, and print it with what happens now.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["trace", "shrink", "output", "from", "minutes", "threads", "json", "operations", "sequences"])]
    script: Option<PathBuf>,
    /// Print everything that happens.
    #[arg(long, conflicts_with_all = ["seeds", "until_failure", "exhaustive", "json", "shrink"])]
    trace: bool,
    /// If the seed breaks a rule, cut it down to a script of what that takes.
    #[arg(long, conflicts_with_all = ["seeds", "until_failure", "replay", "exhaustive", "exhaustive_case"])]
    shrink: bool,
    /// Where the script of a violation goes [default: sim-seed-SEED.script].
    #[arg(long, value_name = "FILE", conflicts_with_all = ["seeds", "replay", "exhaustive", "exhaustive_case"])]
    output: Option<PathBuf>,
    /// The first seed, or the first of the sequences.
    #[arg(long, default_value_t = 0, conflicts_with_all = ["seed", "replay", "exhaustive_case"])]
    from: u64,
    /// Stop after so many minutes even if nothing failed.
    #[arg(long, conflicts_with_all = ["seed", "seeds", "replay", "exhaustive", "exhaustive_case"], value_parser = clap::value_parser!(u64).range(1..=100_000))]
    minutes: Option<u64>,
    /// Threads to run them on; as many as the machine has by default.
    #[arg(long, conflicts_with_all = ["seed", "replay", "exhaustive_case"], value_parser = clap::value_parser!(u64).range(1..=1024))]
    threads: Option<u64>,
    /// One JSON object on standard output instead of text.
    #[arg(long, conflicts_with_all = ["exhaustive", "exhaustive_case"])]
    json: bool,
}

impl SimArgs {
    fn threads_or_all(&self) -> usize {
        match self.threads {
            Some(threads) => threads as usize,
            None => std::thread::available_parallelism().map_or(1, |count| count.get()),
        }
    }
}

/// Carries out the verb; fails when a violation was found.
pub fn run(args: &SimArgs) -> Result<(), Refusal> {
    if let Some(case) = &args.exhaustive_case {
        return exhaustive::run_case(case, args.trace);
    }
    if args.exhaustive {
        return exhaustive::run_all(args);
    }
    if let Some(file) = &args.script {
        return golden::run(file);
    }
    match (&args.replay, args.seed) {
        (Some(file), _) => replay(args, file),
        (_, Some(seed)) if args.shrink => shrink(args, seed),
        (_, Some(seed)) => {
            let report = sim::run(seed, args.trace);
            show(args, &report);
            let again = format!("`kagami sim --seed {seed} --trace`");
            verdict(report.violation.is_some(), &again)
        }
        (None, None) => seeds::run(args),
    }
}

fn replay(args: &SimArgs, file: &Path) -> Result<(), Refusal> {
    let recording = script::read(file)?;
    let report = sim::replay(&recording, args.trace);
    show(args, &report);
    let again = format!("`kagami sim --replay {} --trace`", file.display());
    verdict(report.violation.is_some(), &again)
}

fn shrink(args: &SimArgs, seed: u64) -> Result<(), Refusal> {
    let report = sim::run(seed, false);
    show(args, &report);
    match report.violation {
        None => Ok(()),
        Some(_) => verdict(true, &script::shrink(seed, args.output.as_deref())?),
    }
}

fn show(args: &SimArgs, report: &Report) {
    match args.json {
        true => output::line(totals::report_json(report)),
        false => output::line(report),
    }
}

/// `again` says how the violation is seen again.
fn verdict(violated: bool, again: &str) -> Result<(), Refusal> {
    if !violated {
        return Ok(());
    }
    Err(Refusal::new(
        ErrorId::SimulationFailed,
        format!("a simulated run broke a rule; replay it with {again}"),
    ))
}
