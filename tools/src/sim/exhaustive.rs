//! `kagami sim --exhaustive`: every small case instead of many seeds.

use super::SimArgs;
use indicatif::{ProgressBar, ProgressStyle};
use mirror_core::error::{ErrorId, Refusal};
use mirror_core::sim::exhaustive::{Case, Outcome, Sequence, sequences};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Violations after which no further sequence is begun: enough to work on.
const ENOUGH: usize = 20;

/// What came of the sequences so far.
#[derive(Default)]
struct Totals {
    sequences: u64,
    cases: u64,
    violations: Vec<(String, String)>,
}

impl Totals {
    fn add(&mut self, outcome: Outcome) {
        self.sequences += 1;
        self.cases += outcome.cases;
        self.violations.extend(outcome.violations);
    }
}

/// Runs the sequences that were asked for; fails when a case broke a rule.
pub fn run_all(args: &SimArgs) -> Result<(), Refusal> {
    let all = sequences(args.operations.into());
    let first = usize::try_from(args.from).map_or(all.len(), |from| from.min(all.len()));
    let count = args.sequences.unwrap_or(all.len()).min(all.len() - first);
    let started = Instant::now();
    let totals = run_some(&all[first..first + count], args.threads_or_all());
    summarise(&totals, started.elapsed());
    verdict(totals.violations.len())
}

fn run_some(asked: &[Sequence], threads: usize) -> Totals {
    let bar = ProgressBar::new(asked.len() as u64);
    let style = "{bar:40} {pos}/{len} sequences, {msg} cases, ETA {eta}";
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style);
    }
    let next = AtomicUsize::new(0);
    let totals = Mutex::new(Totals::default());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(sequence) = asked.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let outcome = sequence.run();
                    let mut totals = match totals.lock() {
                        Ok(totals) => totals,
                        Err(poisoned) => poisoned.into_inner(),
                    };
                    totals.add(outcome);
                    bar.set_message(totals.cases.to_string());
                    bar.inc(1);
                    if totals.violations.len() >= ENOUGH {
                        next.store(asked.len(), Ordering::Relaxed);
                    }
                }
            });
        }
    });
    bar.finish_and_clear();
    totals.into_inner().unwrap_or_default()
}

fn summarise(totals: &Totals, wall: Duration) {
    for (name, problem) in totals.violations.iter().take(ENOUGH) {
        println!("VIOLATION in `{name}`: {problem}");
        println!("replay: kagami sim --exhaustive-case '{name}' --trace\n");
    }
    let seconds = wall.as_secs_f64();
    println!(
        "{} sequences, {} cases in {seconds:.1} s ({:.0} per second), {} violations",
        totals.sequences,
        totals.cases,
        totals.cases as f64 / seconds.max(0.001),
        totals.violations.len()
    );
}

/// Runs one case again.
pub fn run_case(case: &Case, trace: bool) -> Result<(), Refusal> {
    let Some(violation) = case.run(trace) else {
        println!("{case}: no violation");
        return Ok(());
    };
    if !trace {
        for line in &violation.last_lines {
            println!("{line}");
        }
    }
    println!("VIOLATION in `{case}`: {}", violation.problem);
    verdict(1)
}

fn verdict(violations: usize) -> Result<(), Refusal> {
    if violations == 0 {
        return Ok(());
    }
    let text = format!(
        "{violations} enumerated cases broke a rule; replay one with `kagami sim --exhaustive-case \
         NAME --trace`"
    );
    Err(Refusal::new(ErrorId::SimulationFailed, text))
}
