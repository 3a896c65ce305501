//! A silent peer holds a guest's write for the stall timeout at most, however it falls silent.

use kagami_tests::{
    Cluster, ClusterOptions, Ledger, MIB, Node, ProxyMode, StopOnDrop, WriteLoad, pace,
};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const STALL_TIMEOUT: Duration = Duration::from_secs(2);
/// What the interface allows on top, for the decision itself.
const GRACE: Duration = Duration::from_millis(500);

const LOAD: WriteLoad = WriteLoad {
    first_block: 0,
    blocks: 8 * 1024,
    depth: 8,
    durable_every: 10,
};

fn options() -> ClusterOptions {
    ClusterOptions {
        disk_size: 128 * MIB,
        stall_timeout: STALL_TIMEOUT,
        ..ClusterOptions::default()
    }
}

/// Runs the load while `silence` makes the peer silent and speak again; prints and checks the
/// longest write.
fn measure(what: &str, cluster: &Cluster, silence: impl FnOnce(&dyn Fn())) {
    let mut ledger = Ledger::default();
    let stop = AtomicBool::new(false);
    let report = std::thread::scope(|scope| {
        let _ends = StopOnDrop(&stop);
        let load = scope.spawn(|| LOAD.run(cluster.nbd_address(Node::A, 0), &stop, &mut ledger));
        pace(Duration::from_millis(500));
        silence(&|| {
            // Silent until the Primary goes on alone, and for a while after that.
            cluster.wait(Node::A, "the Primary to go on alone", |status| {
                status.link != "Connected" && status.holders == ["a"]
            });
            pace(STALL_TIMEOUT);
        });
        pace(Duration::from_millis(500));
        stop.store(true, Ordering::Relaxed);
        load.join().expect("the load met no error")
    });
    println!(
        "{what}: longest guest write {} ms (stall-timeout {} ms), {} writes",
        report.longest.as_millis(),
        STALL_TIMEOUT.as_millis(),
        report.writes
    );
    assert!(!report.lost);
    assert!(
        report.longest <= STALL_TIMEOUT + GRACE,
        "{:?}",
        report.longest
    );
    let told = Duration::from_millis(cluster.status(Node::A).counters.max_stall_ms);
    assert!(
        told <= report.longest + Duration::from_millis(50),
        "status tells {told:?} of {:?}",
        report.longest
    );
    cluster.wait_mirrored();
    cluster.assert_identical();
    cluster.verify(Node::A, &mut ledger);
}

#[test]
fn a_frozen_peer() {
    let cluster = Cluster::mirrored(options());
    measure("peer stopped by SIGSTOP", &cluster, |silent| {
        cluster.freeze(Node::B);
        silent();
        cluster.thaw(Node::B);
    });
}

#[test]
fn a_link_that_swallows_bytes() {
    let cluster = Cluster::mirrored(ClusterOptions {
        proxied: true,
        ..options()
    });
    measure("link swallows bytes", &cluster, |silent| {
        cluster.proxy(0).set(ProxyMode::BlackHole);
        silent();
        cluster.proxy(0).set(ProxyMode::Forward);
    });
}

#[test]
fn a_network_that_drops_packets() {
    let cluster = Cluster::mirrored(ClusterOptions {
        own_network: true,
        ..options()
    });
    measure("network drops packets", &cluster, |silent| {
        let rule = cluster.drop_link_packets();
        silent();
        drop(rule);
    });
}

/// A broken connection is no silence: the guest hardly notices.
#[test]
fn a_cut_link_holds_hardly_anything() {
    let cluster = Cluster::mirrored(ClusterOptions {
        proxied: true,
        ..options()
    });
    measure("link cut", &cluster, |silent| {
        cluster.proxy(0).set(ProxyMode::Cut);
        silent();
        cluster.proxy(0).set(ProxyMode::Forward);
    });
}
