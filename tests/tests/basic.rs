//! What an operator meets first: creating, promoting, asking, refusals with their ids and exit
//! codes, and the shape of what programs read.

use kagami_tests::{
    Cluster, ClusterOptions, Deadline, KIB, MIB, MetadataPlace, NbdClient, NbdError, Node, Process,
    wait_until,
};
use serde_json::Value;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::process::Stdio;

fn small() -> ClusterOptions {
    ClusterOptions {
        disk_size: 64 * MIB,
        ..ClusterOptions::default()
    }
}

/// From nothing to a mirror with a first full sync, with the metadata in either place.
fn first_full_sync(metadata: MetadataPlace) {
    let mut cluster = Cluster::new(ClusterOptions {
        metadata,
        ..small()
    });
    cluster.create_and_start();
    for node in Node::BOTH {
        assert_eq!(cluster.status(node).role, "Secondary");
    }
    cluster
        .verb(Node::A, "primary", &["--initial"])
        .expect_code(0);
    let pattern: Vec<u8> = (0..64 * KIB).map(|at| (at / 7) as u8).collect();
    let mut client = cluster.nbd(Node::A);
    let size = client.size();
    assert_eq!(size, cluster.status(Node::A).size_bytes);
    match metadata {
        MetadataPlace::External => assert_eq!(size, 64 * MIB),
        MetadataPlace::Internal => assert!(size < 64 * MIB && size > 32 * MIB, "{size}"),
    }
    client.write(5 * KIB, &pattern, true).unwrap();
    client.write(size - 64 * KIB, &pattern, false).unwrap();
    client.flush().unwrap();
    cluster.wait_mirrored();
    cluster.assert_identical();
    assert_eq!(client.read(5 * KIB, 64 << 10).unwrap(), pattern);

    // Every mirror comes back by itself after a clean stop of both daemons, as Secondary.
    drop(client);
    for node in Node::BOTH {
        cluster.stop(node);
    }
    for node in Node::BOTH {
        cluster.start(node);
    }
    cluster.wait_mirrored();
    assert_eq!(cluster.status(Node::A).role, "Secondary");
    cluster.promote(Node::B, 10);
    assert_eq!(
        cluster.nbd(Node::B).read(5 * KIB, 64 << 10).unwrap(),
        pattern
    );
}

#[test]
fn first_full_sync_with_external_metadata() {
    first_full_sync(MetadataPlace::External);
}

#[test]
fn first_full_sync_with_internal_metadata() {
    first_full_sync(MetadataPlace::Internal);
}

#[test]
fn assume_clean_copies_nothing() {
    let cluster = Cluster::mirrored(small());
    let status = cluster.status(Node::A);
    assert!(status.link_bytes() < MIB, "{} bytes", status.link_bytes());
    let mut holders = status.holders.clone();
    holders.sort();
    assert_eq!(holders, ["a", "b"]);
    cluster.assert_identical();
}

#[test]
fn status_json_has_the_fixed_layout() {
    let cluster = Cluster::mirrored(small());
    cluster.nbd(Node::A).write(0, &[1; 4096], true).unwrap();
    let text = cluster
        .kagami(Node::A, &["status", "--json"])
        .expect_code(0)
        .stdout;
    let status: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(status["schema"], 1);
    assert_eq!(status["node"], "a");
    let mirror = &status["mirrors"][0];
    for (key, value) in [
        ("name", "r0"),
        ("role", "Primary"),
        ("peer_role", "Secondary"),
        ("disk", "UpToDate"),
        ("peer_disk", "UpToDate"),
        ("link", "Connected"),
        ("arbitration", "unarbitrated"),
    ] {
        assert_eq!(mirror[key], value, "{key}");
    }
    assert!(
        mirror["generation"]
            .as_str()
            .is_some_and(|text| !text.is_empty())
    );
    assert!(
        mirror["holders"]
            .as_array()
            .is_some_and(|names| names.len() == 2)
    );
    assert!(mirror["reasons"].is_array());
    assert!(mirror["resync"].is_null() && mirror.get("resync").is_some());
    assert_eq!(mirror["size_bytes"], 64 * MIB);
    for key in ["dirty_bytes", "unsettled_bytes"] {
        assert!(mirror[key].is_u64(), "{key}");
    }
    for key in [
        "reads",
        "writes",
        "flushes",
        "read_bytes",
        "written_bytes",
        "link_sent_bytes",
        "link_received_bytes",
        "in_flight",
        "max_stall_ms",
        "resyncs",
    ] {
        assert!(mirror["counters"][key].is_u64(), "{key}");
    }
    assert_eq!(mirror["counters"]["writes"], 1);
    assert_eq!(mirror["counters"]["written_bytes"], 4096);

    // The same for a person, and what is not known is called so.
    let human = cluster.kagami(Node::A, &["status"]).expect_code(0).stdout;
    assert!(
        human.contains("Primary") && human.contains("UpToDate"),
        "{human}"
    );
    cluster.verb(Node::A, "disconnect", &[]).expect_code(0);
    let status = cluster.status(Node::A);
    assert_eq!(status.link, "StandAlone");
    assert_eq!(status.peer_role, "Unknown");
}

#[test]
fn a_resync_under_way_is_shown() {
    let cluster = Cluster::mirrored(small());
    cluster.verb(Node::A, "disconnect", &[]).expect_code(0);
    let mut client = cluster.nbd(Node::A);
    for at in 0..32 {
        client
            .write(at * MIB, &vec![9; MIB as usize], false)
            .unwrap();
    }
    let dirty = cluster.status(Node::A).dirty_bytes;
    assert_eq!(dirty, 32 * MIB);
    // Paused on the source before it starts, so that it can be looked at.
    cluster.verb(Node::A, "connect", &[]).expect_code(0);
    let paused = wait_until(Deadline::seconds(20), "the resync to pause or end", || {
        let result = cluster.kagami(Node::A, &["resync", "pause", "r0"]);
        match result.code {
            0 => Ok(true),
            _ if cluster.status(Node::A).is_mirrored() => Ok(false),
            _ => Err(result.stderr),
        }
    });
    if paused {
        let status = cluster.status(Node::A);
        if let Some(resync) = status.resync {
            assert_eq!(resync.direction, "source");
            assert!(resync.paused);
            assert!(resync.done_bytes <= resync.total_bytes);
            assert_eq!(cluster.status(Node::B).disk, "Inconsistent");
        }
        cluster
            .kagami(Node::A, &["resync", "status", "r0"])
            .expect_code(0);
        cluster.kagami(Node::A, &["resync", "resume", "r0"]);
    }
    cluster.wait_mirrored();
    assert!(cluster.status(Node::A).counters.resyncs >= 1);
    cluster.assert_identical();
}

#[test]
fn roles_move_on_command_only() {
    let cluster = Cluster::mirrored(small());
    // The peer's role stands in the way, whatever the force.
    let refused = cluster
        .verb(Node::B, "primary", &[])
        .expect_refusal(4, "KGM-0302");
    assert!(refused.stdout.is_empty(), "refusals go to standard error");
    // A Secondary exports nothing.
    assert!(NbdClient::connect(cluster.nbd_address(Node::B, 0), "").is_err());
    cluster.nbd(Node::A).write(0, &[3; 4096], false).unwrap();
    cluster.demote(Node::A, 10);
    assert!(NbdClient::connect(cluster.nbd_address(Node::A, 0), "").is_err());
    cluster
        .verb(Node::B, "primary", &["--initial"])
        .expect_refusal(4, "KGM-0309");
    cluster.promote(Node::B, 10);
    assert_eq!(cluster.nbd(Node::B).read(0, 4096).unwrap(), [3; 4096]);
    cluster
        .verb(Node::B, "primary", &["--initial"])
        .expect_refusal(4, "KGM-0309");
    // What is so already is no failure.
    cluster.verb(Node::B, "primary", &[]).expect_code(0);
    cluster.verb(Node::A, "secondary", &[]).expect_code(0);
}

#[test]
fn a_mirror_in_use_is_not_taken_from_its_clients() {
    let cluster = Cluster::mirrored(small());
    let mut client = cluster.nbd(Node::A);
    client.write(0, &[6; 4096], false).unwrap();
    for verb in ["secondary", "down"] {
        let refused = cluster
            .verb(Node::A, verb, &[])
            .expect_refusal(4, "KGM-0308");
        let me = format!("process {}", std::process::id());
        assert!(refused.stderr.contains(&me), "{}", refused.stderr);
        // And nothing changed for the client.
        assert_eq!(client.read(0, 4096).unwrap(), [6; 4096]);
        client.write(4096, &[7; 4096], false).unwrap();
    }
    drop(client);
    cluster.demote(Node::A, 10);
    cluster.assert_identical();
    cluster.promote(Node::B, 10);
    assert_eq!(cluster.nbd(Node::B).read(0, 4096).unwrap(), [6; 4096]);
}

#[test]
fn exit_codes_say_what_kind_of_failure_it_is() {
    let mut cluster = Cluster::new(small());
    // 3: no daemon.
    cluster
        .kagami(Node::A, &["status"])
        .expect_refusal(3, "KGM-0401");
    cluster
        .verb(Node::A, "primary", &[])
        .expect_refusal(3, "KGM-0401");
    // 2: command line and configuration.
    cluster.kagami(Node::A, &["no-such-verb"]).expect_code(2);
    cluster
        .kagami(Node::A, &["create", "r9"])
        .expect_refusal(2, "KGM-0107");
    cluster.kagami(Node::A, &["check"]).expect_code(0);
    let good = std::fs::read_to_string(cluster.config(Node::A)).unwrap();
    for (bad, id, place) in [
        (
            good.replace("insecure = true", "insecure = true\nspeed = 9"),
            "KGM-0102",
            "4",
        ),
        (
            good.replace("stall-timeout = \"2000ms\"", "stall-timeout = \"soon\""),
            "KGM-0103",
            "",
        ),
        (
            good.replace("device = \"none\"", "arbiter = \"w\""),
            "KGM-0105",
            "arbiter",
        ),
    ] {
        std::fs::write(cluster.config(Node::A), bad).unwrap();
        let refused = cluster.kagami(Node::A, &["check"]).expect_refusal(2, id);
        assert!(refused.stderr.contains(place), "{}", refused.stderr);
    }
    std::fs::write(cluster.config(Node::A), good).unwrap();
    // 4: not possible in this state; the message says what to do.
    cluster.create_and_start();
    cluster.verb(Node::A, "create", &[]).expect_code(4);
    cluster
        .verb(Node::A, "primary", &[])
        .expect_refusal(4, "KGM-0310");
    // 1: tried and failed.
    cluster
        .kagami(
            Node::A,
            &["status", "--wait-for", "UpToDate", "--timeout", "300ms"],
        )
        .expect_refusal(1, "KGM-0317");
}

#[test]
fn waiting_for_a_state_ends_when_it_is_reached() {
    let mut cluster = Cluster::mirrored(small());
    cluster.kill(Node::B);
    cluster.wait(Node::A, "the loss of b", |status| {
        status.link != "Connected"
    });
    cluster.nbd(Node::A).write(0, &[1; 4096], false).unwrap();
    cluster.start(Node::B);
    for state in ["Connected", "UpToDate"] {
        cluster
            .kagami(
                Node::B,
                &["status", "r0", "--wait-for", state, "--timeout", "20s"],
            )
            .expect_code(0);
    }
    cluster.wait_mirrored();
    cluster.assert_identical();
}

#[test]
fn down_and_up_without_ending_the_daemon() {
    let cluster = Cluster::mirrored(small());
    cluster.nbd(Node::A).write(0, &[1; 4096], false).unwrap();
    cluster.verb(Node::B, "down", &[]).expect_code(0);
    cluster.wait(Node::A, "the loss of b", |status| {
        status.link != "Connected"
    });
    // The disk is free now: what is offline works, and a second look at it agrees.
    cluster.verb(Node::B, "dump-metadata", &[]).expect_code(0);
    cluster.nbd(Node::A).write(4096, &[2; 4096], false).unwrap();
    cluster.verb(Node::B, "up", &[]).expect_code(0);
    cluster.wait_mirrored();
    cluster.assert_identical();
}

#[test]
fn a_disk_has_one_user() {
    let mut cluster = Cluster::mirrored(small());
    // A second daemon of the same node.
    let mut second = Process::start(
        "second daemon",
        cluster
            .daemon_command(Node::A)
            .stdout(Stdio::null())
            .stderr(Stdio::null()),
    );
    let status = wait_until(
        Deadline::seconds(20),
        "the second daemon to give up",
        || second.ended().ok_or_else(|| "it runs".to_owned()),
    );
    assert!(!status.success());
    assert!(cluster.runs(Node::A));
    // Offline tools while the daemon has the disk.
    cluster.verb(Node::A, "create", &[]).expect_code(4);
    cluster.verb(Node::A, "dump-metadata", &[]).expect_code(4);
    cluster.nbd(Node::A).write(0, &[1; 4096], true).unwrap();
    cluster.stop(Node::A);
    let dump = cluster
        .verb(Node::A, "dump-metadata", &[])
        .expect_code(0)
        .stdout;
    assert!(!dump.is_empty());
    cluster
        .verb(Node::A, "create", &[])
        .expect_refusal(4, "KGM-0208");
}

#[test]
fn a_lock_that_a_killed_daemon_leaves_for_a_moment_is_waited_for() {
    let mut cluster = Cluster::mirrored(small());
    // The kernel keeps a killed process's disk locked until its last operations have ended.
    cluster.kill(Node::B);
    let held = cluster.lock_disk(Node::B);
    cluster.start_without_disk(Node::B);
    cluster.wait(Node::B, "the reason to be told", |status| {
        let told = |reason: &String| reason.contains("KGM-0202");
        status.disk == "Diskless" && status.reasons.iter().any(told)
    });
    drop(held);
    cluster.wait_mirrored();
}

#[test]
fn the_control_socket_is_for_its_group_only() {
    let cluster = Cluster::mirrored(small());
    let socket = std::fs::metadata(cluster.control_socket(Node::A)).unwrap();
    assert!(socket.file_type().is_socket());
    assert_eq!(socket.permissions().mode() & 0o777, 0o660);
}

#[test]
fn nbd_has_both_export_names_and_refuses_what_is_out_of_range() {
    let cluster = Cluster::mirrored(ClusterOptions {
        nbd_on_tcp: true,
        ..small()
    });
    let address = cluster.nbd_address(Node::A, 0);
    for export in ["", "r0"] {
        let mut client = NbdClient::connect(address, export).unwrap();
        let size = client.size();
        assert_eq!(size, 64 * MIB);
        // FLUSH, FUA, TRIM, WRITE_ZEROES and multi-conn.
        for bit in [2, 3, 5, 6, 8] {
            assert!(client.flags() & (1 << bit) != 0, "flag bit {bit}");
        }
        assert!(matches!(
            client.read(size, 4096),
            Err(NbdError::Refused(22))
        ));
        assert!(matches!(
            client.write(size - 512, &[0; 4096], false),
            Err(NbdError::Refused(28))
        ));
        client.write(MIB, &[5; 8192], true).unwrap();
        client.write_zeroes(MIB, 4096).unwrap();
        client.trim(MIB + 4096, 4096).unwrap();
        assert_eq!(client.read(MIB, 4096).unwrap(), [0; 4096]);
    }
    assert!(NbdClient::connect(address, "nonsense").is_err());
    cluster.assert_identical();
}

#[test]
fn invalidate_copies_everything_again() {
    let cluster = Cluster::mirrored(small());
    let mut client = cluster.nbd(Node::A);
    client.write(0, &vec![8; 8 * MIB as usize], true).unwrap();
    let before = cluster.status(Node::A).counters.resyncs;
    cluster
        .verb(Node::B, "invalidate", &["--yes"])
        .expect_code(0);
    cluster.wait(Node::A, "a resync", |status| {
        status.counters.resyncs > before
    });
    cluster.wait_mirrored();
    cluster.assert_identical();
}

#[test]
fn divergence_is_shown_and_resolved_only_by_the_operator() {
    let mut cluster = Cluster::mirrored(small());
    cluster.kill(Node::B);
    cluster.wait(Node::A, "the loss of b", |status| {
        status.link != "Connected"
    });
    cluster.nbd(Node::A).write(0, &[1; 4096], true).unwrap();
    cluster.kill(Node::A);
    cluster.start(Node::B);
    // b does not know what a did meanwhile: only by force, and that is how histories part.
    cluster.verb(Node::B, "primary", &[]).expect_code(4);
    cluster
        .verb(Node::B, "primary", &["--force", "--yes"])
        .expect_code(0);
    cluster.nbd(Node::B).write(MIB, &[2; 4096], true).unwrap();
    cluster.start(Node::A);
    for node in Node::BOTH {
        let status = cluster.wait(node, "StandAlone after the split", |status| {
            status.link == "StandAlone"
        });
        assert!(
            status
                .reasons
                .iter()
                .any(|reason| reason.contains("KGM-0504")),
            "{:?}",
            status.reasons
        );
    }
    assert_eq!(cluster.nbd(Node::B).read(0, 4096).unwrap(), [0; 4096]);
    cluster
        .verb(Node::A, "connect", &["--discard-my-data", "--yes"])
        .expect_code(0);
    // b may have given up looking for its peer.
    let code = cluster.verb(Node::B, "connect", &[]).code;
    assert!(code == 0 || code == 4, "{code}");
    cluster.wait_mirrored();
    cluster.assert_identical();
    let mut client = cluster.nbd(Node::B);
    assert_eq!(client.read(0, 4096).unwrap(), [0; 4096]);
    assert_eq!(client.read(MIB, 4096).unwrap(), [2; 4096]);
}
