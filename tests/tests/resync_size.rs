//! A resync moves what changed and little more.

use kagami_tests::{
    Cluster, ClusterOptions, Deadline, GIB, Ledger, MIB, NbdCommand, Node, WriteLoad, pace,
    wait_until,
};
use mirror_core::limits::{ACTIVITY_LOG_SLOTS, BLOCK, EXTENT, RESYNC_CHUNK};
use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// What the protocol may add to `bytes` of blocks: 3 %.
fn with_overhead(bytes: u64) -> u64 {
    bytes + bytes * 3 / 100
}

#[test]
fn after_a_disconnection_only_written_blocks_move() {
    let cluster = Cluster::mirrored(ClusterOptions {
        disk_size: GIB,
        ..ClusterOptions::default()
    });
    for count in [2_000, 8_000] {
        cluster.verb(Node::A, "disconnect", &[]).expect_code(0);
        let mut client = cluster.nbd(Node::A);
        let mut blocks = HashSet::new();
        while blocks.len() < count {
            blocks.insert(fastrand::u64(..GIB / BLOCK));
        }
        let data: Vec<u8> = (0..BLOCK).map(|_| fastrand::u8(1..)).collect();
        for batch in blocks.iter().collect::<Vec<_>>().chunks(32) {
            for block in batch {
                let command = NbdCommand::Write { fua: false };
                client.send(command, *block * BLOCK, &data).unwrap();
            }
            for _ in batch {
                assert_eq!(client.receive().unwrap().error, 0);
            }
        }
        client.flush().unwrap();
        let before = cluster.status(Node::A);
        assert_eq!(before.dirty_bytes, count as u64 * BLOCK);

        // The peer noticed the parting and looks for us by itself.
        cluster.verb(Node::A, "connect", &[]).expect_code(0);
        cluster.wait_mirrored();
        let after = cluster.status(Node::A);
        cluster.assert_identical();

        let written = count as u64 * BLOCK;
        let moved = after.link_bytes() - before.link_bytes();
        println!(
            "{count} blocks ({written} bytes) written apart: {moved} bytes on the link, {:+.2} %",
            100.0 * (moved as f64 / written as f64 - 1.0)
        );
        assert!(moved >= written, "unequal blocks cannot have been copied");
        assert!(
            moved <= with_overhead(written),
            "{moved} bytes for {written}"
        );
    }
}

/// A copy that is thrown away, but for a few blocks, for nothing.
#[test]
fn by_checksum_little_more_than_what_differs_moves() {
    const SIZE: u64 = 64 * MIB;
    const DIFFERENT: u64 = 20;
    let cluster = Cluster::mirrored(ClusterOptions {
        disk_size: SIZE,
        ..ClusterOptions::default()
    });
    let everything = WriteLoad::first(SIZE / BLOCK);
    everything.write_each(cluster.nbd_address(Node::A, 0), &mut Ledger::default());
    let disk = File::options().write(true).open(cluster.disk(Node::B));
    let disk = disk.expect("the disk of b");
    for index in 0..DIFFERENT {
        let block = index * (SIZE / BLOCK / DIFFERENT);
        disk.write_all_at(&[0xa5; 100], block * BLOCK)
            .expect("a write");
    }
    let mut moved = Vec::new();
    for args in [&["--yes", "--checksum", "--wait"][..], &["--yes", "--wait"]] {
        let before = cluster.status(Node::A).link_bytes();
        cluster.verb(Node::B, "invalidate", args).expect_code(0);
        cluster.wait_mirrored();
        cluster.assert_identical();
        moved.push(cluster.status(Node::A).link_bytes() - before);
    }
    let (by_checksum, whole) = (moved[0], moved[1]);
    println!(
        "{DIFFERENT} of {} blocks differ: {by_checksum} bytes on the link by checksum, \
              {whole} without",
        SIZE / BLOCK
    );
    // A digest has 16 bytes, and each chunk a question and an answer.
    let digests = SIZE / BLOCK * 16 + SIZE / RESYNC_CHUNK * 256;
    assert!(
        (DIFFERENT * BLOCK..=with_overhead(DIFFERENT * BLOCK) + digests).contains(&by_checksum)
    );
    assert!(whole >= SIZE);
}

/// What follows from a rate is how long it takes at least; a slow machine only makes it longer.
#[test]
fn neither_resync_nor_verify_is_faster_than_it_may_be() {
    const RATE: u64 = 16 * MIB;
    const SIZE: u64 = 48 * MIB;
    let cluster = Cluster::mirrored(ClusterOptions {
        disk_size: SIZE,
        resync_max_rate: Some(RATE),
        ..ClusterOptions::default()
    });
    let least = |bytes: u64| Duration::from_secs(bytes).div_f64(RATE as f64);
    cluster.verb(Node::A, "disconnect", &[]).expect_code(0);
    let everything = WriteLoad::first(SIZE / BLOCK);
    everything.write_each(cluster.nbd_address(Node::A, 0), &mut Ledger::default());
    // A piece and a tenth of a second's worth may be ahead of the rate.
    let paced = SIZE - RATE / 10 - RESYNC_CHUNK;
    for (verb, args) in [("connect", &[][..]), ("verify", &["--wait"])] {
        let begun = Instant::now();
        cluster.verb(Node::A, verb, args).expect_code(0);
        cluster.wait_mirrored();
        let took = begun.elapsed();
        println!("{verb}: {SIZE} bytes at {RATE} a second in {took:?}");
        assert!(took >= least(paced), "{verb}: {took:?}");
    }
    cluster.assert_identical();
}

#[test]
fn after_a_crash_of_a_busy_primary_only_the_activity_log_moves() {
    const BUSY_EXTENTS: u64 = 24;
    let mut cluster = Cluster::mirrored(ClusterOptions {
        disk_size: 8 * GIB,
        ..ClusterOptions::default()
    });
    let load = WriteLoad {
        first_block: 3 * GIB / BLOCK,
        blocks: BUSY_EXTENTS * EXTENT / BLOCK,
        depth: 32,
        durable_every: 0,
    };
    let mut ledger = Ledger::default();
    let stop = AtomicBool::new(false);
    let address = cluster.nbd_address(Node::A, 0).clone();
    std::thread::scope(|scope| {
        let running = scope.spawn(|| load.run(&address, &stop, &mut ledger));
        pace(Duration::from_secs(2));
        cluster.kill(Node::A);
        assert!(running.join().expect("the load met no error").lost);
    });
    cluster.start(Node::A);
    cluster.wait_mirrored();
    let moved = cluster.status(Node::A).link_bytes();
    let busy = BUSY_EXTENTS * EXTENT;
    let reach = ACTIVITY_LOG_SLOTS as u64 * EXTENT;
    println!(
        "killed while writing to {} MiB: {} MiB on the link; the activity log reaches {} MiB",
        busy / MIB,
        moved / MIB,
        reach / MIB
    );
    // Never more than the log's reach, and not even that where the guest was not busy. Control
    // frames and heartbeats get a mebibyte.
    assert!(busy <= reach);
    assert!(moved <= with_overhead(busy) + MIB, "{moved} bytes moved");
    cluster.assert_identical();
    wait_until(Deadline::seconds(10), "the promotion", || {
        let result = cluster.verb(Node::A, "primary", &[]);
        if result.code == 0 {
            Ok(())
        } else {
            Err(result.stderr)
        }
    });
    cluster.verify(Node::A, &mut ledger);
}
