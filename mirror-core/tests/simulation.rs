//! Many seeds of the simulator (docs/simulation.md). `KAGAMI_SIM_SEEDS` says how many and
//! `KAGAMI_SIM_FROM` the first one.

use mirror_core::sim;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const THREADS: usize = 2;

fn variable(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect(name))
}

#[test]
fn seeds_hold() {
    let first = variable("KAGAMI_SIM_FROM", 0);
    let seeds = variable("KAGAMI_SIM_SEEDS", 2000);
    let next = AtomicU64::new(first);
    let failures = Mutex::new(Vec::new());
    let started = Instant::now();
    let work = || {
        let mut reported = Instant::now();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + seeds || failures.lock().unwrap().len() >= 5 {
                break;
            }
            let report = sim::run(seed, false);
            if report.violation.is_some() {
                failures.lock().unwrap().push(report);
            }
            if reported.elapsed() > Duration::from_secs(20) {
                reported = Instant::now();
                println!("{} seeds after {:?}", seed - first, started.elapsed());
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(work);
        }
    });
    let failures = failures.into_inner().unwrap();
    for report in &failures {
        println!("{report}\n");
    }
    assert!(
        failures.is_empty(),
        "{} seeds with violations",
        failures.len()
    );
}

#[test]
fn seed_replays_exactly() {
    for seed in 0..5 {
        let (first, second) = (sim::run(seed, false), sim::run(seed, false));
        assert_eq!(first.trace_hash, second.trace_hash, "seed {seed}");
        assert_eq!(first.stats, second.stats, "seed {seed}");
    }
}
