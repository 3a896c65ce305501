//! Hosts without io_uring: the daemon finds another way by itself, or says that it may not.

use kagami_tests::{Cluster, ClusterOptions, IoBackend, MIB, Node};
use nix::errno::Errno;

const THREADS: &str = "epoll and threads";

fn denied(io_backend: IoBackend, io_uring_denied: [Option<Errno>; 2]) -> ClusterOptions {
    ClusterOptions {
        disk_size: 64 * MIB,
        io_backend,
        io_uring_denied,
        ..ClusterOptions::default()
    }
}

/// One node after the other is lost, and the mirror is whole again each time.
fn lose_each_in_turn(cluster: &mut Cluster) {
    cluster.nbd(Node::A).write(0, &[1; 4096], true).unwrap();
    cluster.kill(Node::B);
    cluster.wait(Node::A, "the loss of b", |status| {
        status.link != "Connected"
    });
    cluster.nbd(Node::A).write(MIB, &[2; 8192], true).unwrap();
    cluster.start(Node::B);
    cluster.wait_mirrored();
    cluster.assert_identical();
    cluster.kill(Node::A);
    cluster.promote(Node::B, 20);
    let mut client = cluster.nbd(Node::B);
    assert_eq!(client.read(0, 4096).unwrap(), [1; 4096]);
    assert_eq!(client.read(MIB, 8192).unwrap(), [2; 8192]);
    client.write(0, &[3; 4096], false).unwrap();
    client.write_zeroes(MIB, 4096).unwrap();
    cluster.start(Node::A);
    cluster.wait_mirrored();
    cluster.assert_identical();
    assert_eq!(client.read(MIB, 4096).unwrap(), [0; 4096]);
}

#[test]
fn nodes_without_io_uring_keep_a_mirror() {
    let answers = [Some(Errno::EPERM), Some(Errno::ENOSYS)];
    let mut cluster = Cluster::mirrored(denied(IoBackend::Auto, answers));
    lose_each_in_turn(&mut cluster);
    for (node, why) in [(Node::A, "seccomp"), (Node::B, "the kernel has none")] {
        let log = cluster.log_text(node);
        assert!(log.contains(THREADS) && log.contains(why), "{log}");
    }
}

#[test]
fn a_node_with_io_uring_and_one_without_keep_a_mirror() {
    let answers = [None, Some(Errno::ENOSYS)];
    let mut cluster = Cluster::mirrored(denied(IoBackend::Auto, answers));
    lose_each_in_turn(&mut cluster);
    assert!(!cluster.log_text(Node::A).contains(THREADS));
    assert!(cluster.log_text(Node::B).contains(THREADS));
}

#[test]
fn who_insists_on_io_uring_is_told_that_there_is_none() {
    let answers = [Some(Errno::EPERM), Some(Errno::EPERM)];
    let mut cluster = Cluster::new(denied(IoBackend::IoUring, answers));
    cluster.kagami(Node::A, &["create", "r0"]).expect_code(0);
    cluster.start_without_disk(Node::A);
    cluster.wait(Node::A, "the reason to be told", |status| {
        let told = |reason: &String| reason.contains("KGM-0604");
        status.disk == "Diskless" && status.reasons.iter().any(told)
    });
    cluster
        .verb(Node::A, "up", &[])
        .expect_refusal(1, "KGM-0604");
}
