//! `kagami verify`: what changes on a disk at rest is found, all of it and nothing else, while a
//! guest writes; and mended from the side that the operator names.

use kagami_tests::{
    Cluster, ClusterOptions, Ledger, MIB, MirrorStatus, Node, StopOnDrop, WriteLoad,
};
use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

const SIZE: u64 = 192 * MIB;
/// The guest writes behind here; what rots lies before it, where nobody writes over it.
const QUIET: u64 = 96 * MIB;
const BLOCK: u64 = 4096;
const DIFFERENCES: usize = 1000;

/// Behind the quiet part.
const LOAD: WriteLoad = WriteLoad {
    first_block: QUIET / BLOCK,
    blocks: (SIZE - QUIET) / BLOCK,
    depth: 4,
    durable_every: 50,
};

fn cluster() -> Cluster {
    Cluster::mirrored(ClusterOptions {
        disk_size: SIZE,
        ..ClusterOptions::default()
    })
}

/// Fills the quiet part with what is not zero, so that bits can flip in it.
fn fill(cluster: &Cluster, ledger: &mut Ledger) {
    let everything = WriteLoad::first(QUIET / BLOCK);
    everything.write_each(cluster.nbd_address(Node::A, 0), ledger);
}

/// Changes so many blocks on a node's disk behind its daemon's back, most by one bit, and says which.
fn rot(cluster: &Cluster, node: Node, count: usize) -> BTreeSet<u64> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(cluster.disk(node))
        .expect("the disk of the node");
    let mut rotten = BTreeSet::new();
    while rotten.len() < count {
        let block = fastrand::u64(..QUIET / BLOCK);
        if !rotten.insert(block) {
            continue;
        }
        let at = block * BLOCK + fastrand::u64(..BLOCK);
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).expect("a read");
        byte[0] ^= 1 << fastrand::u8(..8);
        file.write_all_at(&byte, at).expect("a write");
    }
    file.sync_all().expect("the rot is on the disk");
    rotten
}

fn blocks_found(status: &MirrorStatus) -> BTreeSet<u64> {
    let verify = status.verify.as_ref().expect("a verify");
    let blocks = verify
        .ranges
        .iter()
        .flat_map(|(offset, length)| (*offset..offset + length).step_by(BLOCK as usize));
    blocks.map(|offset| offset / BLOCK).collect()
}

/// Every one of a thousand differences is found beside a guest's writes, and mended from the side that
/// was named; without any, nothing is found.
#[test]
fn all_that_differs_is_found_and_mended_under_load() {
    let cluster = cluster();
    let mut ledger = Ledger::default();
    fill(&cluster, &mut ledger);
    let stop = AtomicBool::new(false);
    let address = cluster.nbd_address(Node::A, 0).clone();
    std::thread::scope(|scope| {
        let _ends = StopOnDrop(&stop);
        let load = scope.spawn(|| LOAD.run(&address, &stop, &mut ledger));
        let clean = cluster.verb(Node::A, "verify", &["--wait"]).expect_code(0);
        assert!(clean.stdout.contains("no differences"), "{}", clean.stdout);

        let planted = rot(&cluster, Node::B, DIFFERENCES);
        let mended = cluster
            .verb(Node::A, "verify", &["--repair", "a", "--wait"])
            .expect_code(0);
        let status = cluster.status(Node::A);
        let found = status.verify.as_ref().expect("a verify").different_bytes;
        assert_eq!(found, planted.len() as u64 * BLOCK, "{}", mended.stdout);
        assert!(blocks_found(&status).is_subset(&planted));

        cluster.wait_mirrored();
        let again = cluster.verb(Node::A, "verify", &["--wait"]).expect_code(0);
        assert!(again.stdout.contains("no differences"), "{}", again.stdout);
        stop.store(true, Ordering::Relaxed);
        let report = load.join().expect("the load met no error");
        assert!(!report.lost && report.writes > 0, "{report:?}");
        println!(
            "{} differences found and mended beside {} writes, the longest {} ms",
            planted.len(),
            report.writes,
            report.longest.as_millis()
        );
    });
    cluster.assert_identical();
    cluster.verify(Node::A, &mut ledger);
}

/// Who names no source gets no copy overwritten: the peer's is not trusted any more, and the operator
/// can keep either.
#[test]
fn without_a_source_an_operator_decides() {
    let cluster = cluster();
    let mut ledger = Ledger::default();
    fill(&cluster, &mut ledger);

    let planted = rot(&cluster, Node::B, 3);
    let refused = cluster
        .verb(Node::A, "verify", &["--wait"])
        .expect_refusal(1, "KGM-0320");
    let first = planted.first().expect("three") * BLOCK;
    assert!(
        refused.stderr.contains(&format!("{first}+")),
        "{}",
        refused.stderr
    );
    let status = cluster.status(Node::A);
    assert_eq!(blocks_found(&status), planted);
    assert_eq!(
        (status.link.as_str(), status.holders.len()),
        ("StandAlone", 1)
    );
    cluster.wait(Node::B, "the end of its trust", |status| {
        status.disk == "Outdated"
    });
    cluster
        .verb(Node::B, "primary", &[])
        .expect_refusal(4, "KGM-0303");

    // To keep what a has.
    cluster.verb(Node::A, "connect", &["--wait"]).expect_code(0);
    cluster.wait_mirrored();
    cluster.assert_identical();
    cluster.verify(Node::A, &mut ledger);

    // To keep what b has (docs/verify.md).
    rot(&cluster, Node::A, 2);
    cluster
        .verb(Node::A, "verify", &["--wait"])
        .expect_refusal(1, "KGM-0320");
    cluster.demote(Node::A, 20);
    cluster
        .verb(Node::B, "primary", &["--force", "--yes"])
        .expect_code(0);
    cluster
        .verb(Node::A, "connect", &["--discard-my-data", "--yes"])
        .expect_code(0);
    cluster.verb(Node::B, "connect", &["--wait"]).expect_code(0);
    cluster.wait_mirrored();
    cluster.assert_identical();
    cluster.demote(Node::B, 20);
    cluster.promote(Node::A, 20);
    cluster.verify(Node::A, &mut ledger);

    // A Primary's copy is overwritten by nobody; and to name a source means to ask it.
    rot(&cluster, Node::A, 3);
    cluster
        .verb(Node::B, "verify", &["--repair", "b"])
        .expect_refusal(4, "KGM-0302");
    cluster
        .verb(Node::A, "verify", &["--repair", "b"])
        .expect_refusal(2, "KGM-0108");
    cluster
        .verb(Node::A, "verify", &["--repair", "c"])
        .expect_refusal(2, "KGM-0106");
    cluster.demote(Node::A, 20);
    cluster
        .verb(Node::B, "verify", &["--repair", "b", "--wait"])
        .expect_code(0);
    cluster.wait_mirrored();
    cluster.assert_identical();
    cluster.promote(Node::A, 20);
    cluster.verify(Node::A, &mut ledger);
}

/// Stopped by an operator or by the loss of the peer, it goes on where it was.
#[test]
fn a_verify_goes_on() {
    let mut cluster = cluster();
    let verify = |options: &[&str]| cluster.verb(Node::A, "verify", options);
    verify(&["--stop"]).expect_refusal(4, "KGM-0321");
    verify(&["--resume"]).expect_refusal(4, "KGM-0321");
    // The peer stands still, so it comes to no end meanwhile.
    cluster.freeze(Node::B);
    verify(&[]).expect_code(0);
    verify(&[]).expect_refusal(4, "KGM-0306");
    verify(&["--stop"]).expect_code(0);
    cluster.thaw(Node::B);
    cluster.wait_mirrored();
    let verify = |options: &[&str]| cluster.verb(Node::A, "verify", options);
    verify(&["--resume", "--wait"]).expect_code(0);

    cluster.freeze(Node::B);
    verify(&[]).expect_code(0);
    cluster.kill(Node::B);
    cluster.start(Node::B);
    cluster.wait(Node::A, "the end of the verify", |status| {
        let verify = status.verify.as_ref();
        verify.is_some_and(|verify| verify.state == "complete" && verify.different_bytes == 0)
    });
}
