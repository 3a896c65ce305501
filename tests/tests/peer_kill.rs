//! The peer's daemon is killed and restarted every few seconds while fio writes and verifies: the
//! guest sees no error and no wrong byte, and the replicas are equal in the end.
//!
//! `KAGAMI_KILL_ROUNDS` sets how often (20 without it).

use kagami_tests::{Cluster, ClusterOptions, Fio, GIB, Node, StopOnDrop, pace, rounds};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

#[test]
fn fio_verifies_while_the_peer_is_killed() {
    let kills = rounds("KAGAMI_KILL_ROUNDS", 20);
    let mut cluster = Cluster::mirrored(ClusterOptions {
        disk_size: GIB,
        ..ClusterOptions::default()
    });
    let uri = cluster.uri(Node::A);
    let start = Instant::now();
    let enough = AtomicBool::new(false);
    let passes = std::thread::scope(|scope| {
        // The load ends also when a kill fails and unwinds.
        let _ends = StopOnDrop(&enough);
        let load = scope.spawn(|| {
            let mut passes = 0;
            while !enough.load(Ordering::Relaxed) {
                write_and_verify(&uri, passes);
                passes += 1;
            }
            passes
        });
        for _ in 0..kills {
            pace(Duration::from_millis(fastrand::u64(1_000..3_000)));
            cluster.kill(Node::B);
            pace(Duration::from_millis(fastrand::u64(200..1_500)));
            cluster.start(Node::B);
        }
        enough.store(true, Ordering::Relaxed);
        load.join().expect("fio met no error")
    });
    cluster.nbd(Node::A).flush().unwrap();
    cluster.wait_mirrored();
    cluster.assert_identical();
    let status = cluster.status(Node::A);
    println!(
        "{kills} kills of the peer in {:.0?}: {passes} fio passes, {} writes, longest stall {} ms",
        start.elapsed(),
        status.counters.writes,
        status.counters.max_stall_ms,
    );
    assert!(passes > 0);
}

/// One pass: 4 KiB random writes at depth 32 over half of the device, 128 KiB sequential ones over
/// the other half, each read back and checked.
fn write_and_verify(uri: &str, pass: u64) {
    let seed = format!("randseed={}", pass + 1);
    Fio::new(
        uri,
        &["verify=crc32c", "do_verify=1", "verify_fatal=1", &seed],
    )
    .job(
        "random",
        &[
            "rw=randwrite",
            "bs=4k",
            "iodepth=32",
            "offset=0",
            "size=512m",
            "io_size=96m",
        ],
    )
    .job(
        "sequential",
        &[
            "rw=write",
            "bs=128k",
            "iodepth=8",
            "offset=512m",
            "size=512m",
        ],
    )
    .run();
}
