//! Either daemon, or both, killed at a random instant of a resync under write load: a half-copied
//! replica is never promotable, and the replicas are equal in the end.
//!
//! `KAGAMI_RESYNC_ROUNDS` sets how often (20 without it).

use kagami_tests::{
    Cluster, ClusterOptions, Ledger, MIB, Node, ProxyMode, StopOnDrop, WriteLoad, pace, rounds,
};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const SIZE: u64 = 192 * MIB;
/// Written while parted, so that there is something to copy.
const DIRTY: u64 = 64 * MIB;
/// The link's speed during a resync: slow enough to hit its middle.
const LINK_RATE: u64 = 80 * MIB;

const LOAD: WriteLoad = WriteLoad {
    first_block: 0,
    blocks: SIZE / 4096,
    depth: 4,
    durable_every: 50,
};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Victim {
    Source,
    Target,
    Both,
}

#[test]
fn no_half_copied_replica_is_promotable() {
    let rounds = rounds("KAGAMI_RESYNC_ROUNDS", 20);
    let mut cluster = Cluster::mirrored(ClusterOptions {
        disk_size: SIZE,
        proxied: true,
        ..ClusterOptions::default()
    });
    let mut ledger = Ledger::default();
    let mut half_copied = 0;
    for round in 0..rounds {
        let victim = [Victim::Source, Victim::Target, Victim::Both][fastrand::usize(..3)];
        let hit = one_round(&mut cluster, victim, &mut ledger);
        half_copied += u64::from(hit);
        cluster.wait_mirrored();
        cluster.assert_identical();
        cluster.verify(Node::A, &mut ledger);
        println!("round {round}: {victim:?} killed, target half copied: {hit}");
    }
    println!(
        "{rounds} kills during a resync, {half_copied} with a half-copied target, {} writes kept",
        ledger.acknowledged()
    );
    assert!(
        half_copied * 2 >= rounds,
        "too few kills hit the middle of a resync"
    );
}

/// Parts the nodes, writes, reunites them under load and kills. Returns whether the target was
/// half copied then (and was asked to become Primary).
fn one_round(cluster: &mut Cluster, victim: Victim, ledger: &mut Ledger) -> bool {
    let (source, target) = (Node::A, Node::B);
    cluster.verb(source, "disconnect", &[]).expect_code(0);
    dirty_some(cluster, source, ledger);
    cluster.proxy(0).set(ProxyMode::Throttle(LINK_RATE));

    let stop = AtomicBool::new(false);
    let address = cluster.nbd_address(source, 0).clone();
    let hit = std::thread::scope(|scope| {
        let _ends = StopOnDrop(&stop);
        let load = scope.spawn(|| LOAD.run(&address, &stop, ledger));
        cluster.verb(source, "connect", &[]).expect_code(0);
        cluster.wait(target, "the start of the resync", |status| {
            status.resync.is_some()
        });
        pace(Duration::from_millis(fastrand::u64(..700)));
        // Asked while its Primary lives, and again below when it does not.
        refused_if_half_copied(cluster, target);
        if victim != Victim::Target {
            cluster.kill(source);
        }
        if victim != Victim::Source {
            cluster.kill(target);
            if victim == Victim::Both {
                cluster.start(target);
            }
        }
        let hit = if victim == Victim::Target {
            // Alone with its disk: the way to its source is cut.
            cluster.proxy(0).set(ProxyMode::Cut);
            cluster.start(target);
            refused_if_half_copied(cluster, target)
        } else {
            refused_if_half_copied(cluster, target)
        };
        stop.store(true, Ordering::Relaxed);
        let report = load.join().expect("the load met no error");
        assert_eq!(report.lost, victim != Victim::Target);
        hit
    });

    cluster.proxy(0).set(ProxyMode::Forward);
    if victim != Victim::Target {
        cluster.start(source);
        cluster.wait_mirrored();
        cluster.promote(source, 20);
    }
    hit
}

/// Asks the target to become Primary. If it is Inconsistent before and after, that must have been
/// refused; where the kill came after the end of the resync it may be granted, and is given back.
fn refused_if_half_copied(cluster: &Cluster, target: Node) -> bool {
    let before = cluster.status(target).disk;
    let result = cluster.verb(target, "primary", &[]);
    let status = cluster.status(target);
    let half_copied = before == "Inconsistent" && status.disk == "Inconsistent";
    if half_copied {
        let result = result.expect_code(4);
        assert!(result.stderr.contains("KGM-03"), "{}", result.stderr);
        assert_eq!(status.role, "Secondary");
    } else if result.code == 0 {
        cluster.demote(target, 10);
    }
    half_copied
}

/// Writes whole mebibytes at random places, noted in the ledger block by block.
fn dirty_some(cluster: &Cluster, node: Node, ledger: &mut Ledger) {
    let load = WriteLoad {
        first_block: fastrand::u64(..(SIZE - DIRTY) / 4096),
        blocks: DIRTY / 4096,
        depth: 32,
        durable_every: 0,
    };
    load.write_each(cluster.nbd_address(node, 0), ledger);
}
