//! All small cases (docs/simulation.md, "Every small case"). `KAGAMI_EXHAUSTIVE_OPERATIONS` says
//! how many operations the longest sequences have.

use mirror_core::sim::exhaustive::{Case, sequences};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

const THREADS: usize = 2;

#[test]
fn every_short_sequence_survives_every_crash() {
    let most = std::env::var("KAGAMI_EXHAUSTIVE_OPERATIONS")
        .map_or(2, |text| text.parse().expect("a number of operations"));
    let all = sequences(most);
    let (next, cases) = (AtomicUsize::new(0), AtomicU64::new(0));
    let violations = Mutex::new(Vec::new());
    let started = Instant::now();
    let work = || {
        while let Some(sequence) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
            let outcome = sequence.run();
            cases.fetch_add(outcome.cases, Ordering::Relaxed);
            let mut violations = violations.lock().unwrap();
            violations.extend(outcome.violations);
            if violations.len() > 20 {
                break;
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(work);
        }
    });
    let violations = violations.into_inner().unwrap();
    for (name, problem) in violations.iter().take(20) {
        println!("`{name}`: {problem}");
    }
    let (cases, sequences) = (cases.into_inner(), all.len());
    println!(
        "{sequences} sequences, {cases} cases in {:?}",
        started.elapsed()
    );
    assert!(violations.is_empty(), "{} cases", violations.len());
    // Fewer would mean that crashes are not enumerated any more.
    assert!(
        cases > 100 * sequences as u64,
        "{cases} cases of {sequences} sequences"
    );
}

/// A crash that no action leads to must not count as survived.
#[test]
fn a_case_without_its_crash_is_a_violation() {
    let case: Case = "write/crash a@9999/keep none".parse().expect("a case");
    let violation = case.run(false).expect("a violation");
    assert!(
        violation.problem.contains("before its crash"),
        "{}",
        violation.problem
    );
    let case: Case = "write/crash a@3/keep none".parse().expect("a case");
    assert!(case.run(false).is_none());
}
