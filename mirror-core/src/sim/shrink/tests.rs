use super::super::cluster::Cluster;
use super::super::driver::Sabotage;
use super::super::options::Options;
use super::super::recording::Source;
use super::super::run_cluster;
use super::super::trace::{Mode, Trace};
use super::*;

fn sabotaged(options: &Options, source: Source) -> (Report, Source) {
    let mut cluster = Cluster::new(options.clone(), source, Trace::new(Mode::Hash));
    cluster.sabotage = Sabotage::FlushesDropped { host: 0 };
    run_cluster(cluster)
}

fn sabotaged_list(recording: &Recording) -> Report {
    sabotaged(&recording.options, recording.source()).0
}

/// A disk of node a that drops flushes: found by a seed, replayed by its list, shrunk to a script
/// of which every stimulus is needed.
#[test]
fn a_lying_disk_is_told_in_a_few_lines() {
    let mut told = 0;
    for seed in 0..20 {
        let options = Options::derive(seed);
        let (report, source) = sabotaged(&options, Source::Drawn(Vec::new()));
        let (Source::Drawn(steps), Some(found)) = (source, &report.violation) else {
            continue;
        };
        let mut recording = Recording { options, steps };
        // A violation before the storm's end leaves a list without one.
        recording.end_storm(report.stats.virtual_time);
        let again = sabotaged_list(&recording).violation.map(|v| v.problem);
        assert_eq!(again.as_ref(), Some(&found.problem), "seed {seed}");
        if recording.len() < 100 {
            continue;
        }
        let mut tries = 0;
        let mut enough = || {
            tries += 1;
            tries > 3000
        };
        let shrunk = shrink_with(&recording, &mut sabotaged_list, &mut enough).unwrap();
        let read: Recording = shrunk.recording.to_string().parse().unwrap();
        let again = sabotaged_list(&read).violation.unwrap();
        assert_eq!(again.kind(), found.kind(), "seed {seed}");
        assert!(
            shrunk.recording.len() * 10 < recording.len(),
            "seed {seed}: {} of {} stimuli are left:\n{}",
            shrunk.recording.len(),
            recording.len(),
            shrunk.recording
        );
        let healthy = replay(&read, false).violation.map(|v| v.problem);
        assert_eq!(healthy, None, "seed {seed}");
        told += 1;
        if told == 3 {
            return;
        }
    }
    panic!("only {told} seeds notice a disk that drops flushes");
}

#[test]
fn a_run_without_violation_is_not_shrunk() {
    let (_, recording) = super::super::record(1);
    assert!(shrink(&recording, &mut || false).is_none());
}
