//! The Primary's daemon is killed under load and its peer promoted, again and again in turns:
//! every write that was acknowledged to a client outside is there, and the node that returns
//! follows by its bitmap.
//!
//! `KAGAMI_FAILOVER_ROUNDS` sets how often (20 without it).

use kagami_tests::{
    Cluster, ClusterOptions, Ledger, LoadReport, MIB, Node, WriteLoad, pace, rounds,
};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const LOAD: WriteLoad = WriteLoad {
    first_block: 0,
    blocks: 16 * 1024,
    depth: 16,
    durable_every: 20,
};

#[test]
fn every_acknowledged_write_survives_the_primary() {
    let rounds = rounds("KAGAMI_FAILOVER_ROUNDS", 20);
    let mut cluster = Cluster::mirrored(ClusterOptions {
        disk_size: 512 * MIB,
        ..ClusterOptions::default()
    });
    let mut ledger = Ledger::default();
    let mut primary = Node::A;
    let mut slowest = Duration::ZERO;
    for round in 0..rounds {
        let lost = load_until_killed(&mut cluster, primary, &mut ledger);
        assert!(lost.lost && lost.writes > 0, "round {round}: {lost:?}");
        let dead = primary;
        primary = primary.peer();

        let killed = Instant::now();
        let promoted = cluster.promote(primary, 20);
        slowest = slowest.max(killed.elapsed());
        assert!(
            promoted.stderr.to_lowercase().contains("warning"),
            "an unarbitrated promotion warns: {promoted:?}"
        );
        cluster.verify(primary, &mut ledger);

        // The new Primary goes on alone; the old one returns as Secondary and catches up.
        let alone = load_for(&cluster, primary, &mut ledger, Duration::from_millis(300));
        assert!(!alone.lost && alone.writes > 0);
        cluster.start(dead);
        cluster.wait_mirrored();
        let returned = cluster.status(dead);
        assert_eq!(returned.role, "Secondary");
        assert!(
            returned.counters.link_received_bytes < 256 * MIB,
            "a bitmap resync moves what changed, not {} bytes",
            returned.counters.link_received_bytes
        );
        cluster.assert_identical();
    }
    cluster.verify(primary, &mut ledger);
    println!(
        "{rounds} failovers: {} acknowledged writes, none lost; slowest promotion {slowest:.0?}",
        ledger.acknowledged()
    );
}

fn load_until_killed(cluster: &mut Cluster, primary: Node, ledger: &mut Ledger) -> LoadReport {
    let stop = AtomicBool::new(false);
    let address = cluster.nbd_address(primary, 0).clone();
    std::thread::scope(|scope| {
        let load = scope.spawn(|| LOAD.run(&address, &stop, ledger));
        pace(Duration::from_millis(fastrand::u64(200..1_200)));
        cluster.kill(primary);
        load.join().expect("the load met no error")
    })
}

fn load_for(cluster: &Cluster, primary: Node, ledger: &mut Ledger, time: Duration) -> LoadReport {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let load = scope.spawn(|| LOAD.run(cluster.nbd_address(primary, 0), &stop, ledger));
        pace(time);
        stop.store(true, Ordering::Relaxed);
        load.join().expect("the load met no error")
    })
}
