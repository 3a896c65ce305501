//! Many seeds, on several threads, by number or by time.

use super::totals::Totals;
use super::{SimArgs, script, verdict};
use crate::output;
use indicatif::{ProgressBar, ProgressStyle};
use mirror_core::error::Refusal;
use mirror_core::sim;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A handful of examples is enough to work on.
const MOST_VIOLATIONS: usize = 10;

/// Runs the seeds and sums up.
pub fn run(args: &SimArgs) -> Result<(), Refusal> {
    let totals = run_all(args);
    let Some(first) = totals.violations.first() else {
        show(args, &totals, None);
        return Ok(());
    };
    let seed = first.options.seed;
    let again = match args.until_failure {
        true => script::shrink(seed, args.output.as_deref())?,
        false => format!("`kagami sim --seed {seed} --trace`"),
    };
    show(args, &totals, Some(&again));
    verdict(true, &again)
}

fn show(args: &SimArgs, totals: &Totals, again: Option<&str>) {
    match args.json {
        true => output::line(totals.json(again)),
        false => output::line(totals),
    }
}

fn run_all(args: &SimArgs) -> Totals {
    let threads = match args.threads {
        Some(threads) => threads as usize,
        None => std::thread::available_parallelism().map_or(1, |count| count.get()),
    };
    let end = args
        .seeds
        .map_or(u64::MAX, |seeds| args.from.saturating_add(seeds));
    let time = Duration::from_secs(60).checked_mul(args.minutes.unwrap_or(0) as u32);
    let deadline = time.filter(|time| !time.is_zero());
    let most = if args.until_failure {
        1
    } else {
        MOST_VIOLATIONS
    };
    let bar = progress(args);
    let next = AtomicU64::new(args.from);
    let totals = Mutex::new(Totals::begin(args.from));
    let started = Instant::now();
    let work = || {
        loop {
            let late = deadline.is_some_and(|deadline| started.elapsed() >= deadline);
            let found = lock(&totals).violations.len();
            if late || found >= most {
                return;
            }
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= end {
                return;
            }
            let report = sim::run(seed, false);
            lock(&totals).add(report);
            bar.inc(1);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(work);
        }
    });
    bar.finish_and_clear();
    let mut totals = totals.into_inner().unwrap_or_else(PoisonError::into_inner);
    totals.end();
    totals
}

fn lock(totals: &Mutex<Totals>) -> std::sync::MutexGuard<'_, Totals> {
    totals.lock().unwrap_or_else(PoisonError::into_inner)
}

fn progress(args: &SimArgs) -> ProgressBar {
    let (bar, template) = match args.seeds {
        Some(seeds) => (
            ProgressBar::new(seeds),
            "{bar:40} {pos}/{len} seeds, {per_sec}, ETA {eta}",
        ),
        None => (
            ProgressBar::new_spinner(),
            "{spinner} {pos} seeds, {per_sec}, {elapsed}",
        ),
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}
