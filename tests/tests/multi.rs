//! Several mirrors in one daemon: the trouble of one is not the trouble of another.

use kagami_tests::{
    Cluster, ClusterOptions, Ledger, LoadReport, MIB, Node, ProxyMode, StopOnDrop, WriteLoad, pace,
};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const STALL_TIMEOUT: Duration = Duration::from_secs(5);

const LOAD: WriteLoad = WriteLoad {
    first_block: 0,
    blocks: 4 * 1024,
    depth: 8,
    durable_every: 20,
};

#[test]
fn a_stuck_peer_of_one_mirror_does_not_hold_another() {
    let mirrors = ["r0", "r1", "r2"];
    let cluster = Cluster::mirrored(ClusterOptions {
        mirrors: mirrors.map(str::to_owned).to_vec(),
        disk_size: 64 * MIB,
        stall_timeout: STALL_TIMEOUT,
        proxied: true,
        ..ClusterOptions::default()
    });
    let stop = AtomicBool::new(false);
    let reports: Vec<LoadReport> = std::thread::scope(|scope| {
        let _ends = StopOnDrop(&stop);
        let loads: Vec<_> = (0..mirrors.len())
            .map(|mirror| {
                let (cluster, stop) = (&cluster, &stop);
                scope.spawn(move || {
                    let mut ledger = Ledger::default();
                    LOAD.run(cluster.nbd_address(Node::A, mirror), stop, &mut ledger)
                })
            })
            .collect();
        pace(Duration::from_millis(500));
        cluster.proxy(1).set(ProxyMode::BlackHole);
        cluster.wait_for(Node::A, "r1", 20, "r1 to go on alone", |status| {
            status.holders == ["a"]
        });
        for healthy in ["r0", "r2"] {
            let status = cluster.status_of(Node::A, healthy);
            assert_eq!(status.link, "Connected", "{healthy}");
            assert_eq!(status.holders.len(), 2, "{healthy}");
        }
        cluster.proxy(1).set(ProxyMode::Forward);
        pace(Duration::from_millis(500));
        stop.store(true, Ordering::Relaxed);
        loads
            .into_iter()
            .map(|load| load.join().expect("the load met no error"))
            .collect()
    });
    for (mirror, report) in mirrors.iter().zip(&reports) {
        println!(
            "{mirror}: {} writes, the longest took {} ms",
            report.writes,
            report.longest.as_millis()
        );
        assert!(!report.lost && report.writes > 0);
    }
    assert!(
        reports[1].longest >= Duration::from_secs(2),
        "r1 was never held: {reports:?}"
    );
    for healthy in [0, 2] {
        assert!(
            reports[healthy].longest < Duration::from_secs(1),
            "{} waited {:?} for another mirror's peer",
            mirrors[healthy],
            reports[healthy].longest
        );
    }
    cluster.wait_mirrored();
    cluster.assert_identical();
}

#[test]
fn mirrors_go_down_and_up_one_by_one() {
    let cluster = Cluster::mirrored(ClusterOptions {
        mirrors: vec!["r0".to_owned(), "r1".to_owned()],
        disk_size: 64 * MIB,
        ..ClusterOptions::default()
    });
    let mut client = cluster.nbd(Node::A);
    cluster.kagami(Node::B, &["down", "r1"]).expect_code(0);
    client.write(0, &[4; 4096], true).unwrap();
    let status = cluster.status_of(Node::A, "r0");
    assert_eq!(status.link, "Connected");
    cluster.kagami(Node::B, &["up", "r1"]).expect_code(0);
    cluster.wait_mirrored();
    cluster.assert_identical();
}
