//! Stories of frames that are altered, repeated or out of place: a peer that errs, or is another one.

use super::*;
use mirror_core::wire::message::{Hello, Lineage};

/// Two replicas in sync whose connection breaks, and is made again with tampered frames.
fn meet_again(tamper: impl FnMut(usize, Control) -> Vec<Control> + 'static) -> World {
    let mut world = World::in_sync(8 * MIB);
    world.tamper = Some(Box::new(tamper));
    world.cut();
    world.pass(Duration::from_millis(200));
    world
}

/// Two replicas of which `a` went on alone, so that `b` is to be its target when they meet again.
fn meet_to_resync(tamper: impl FnMut(usize, Control) -> Vec<Control> + 'static) -> World {
    let mut world = World::parted(8 * MIB);
    world.write(A, 1, 0);
    world.pass(Duration::from_secs(1));
    world.tamper = Some(Box::new(tamper));
    world.link_possible = true;
    world.pass(Duration::from_millis(200));
    world
}

fn assert_makes_no_sense(world: &World, at: usize, what: &str) {
    let reasons = world.status(at).reasons;
    let told = format!("makes no sense: {what}");
    assert!(
        reasons.iter().any(|reason| reason.contains(&told)),
        "{what}: {:?}",
        world.status(at)
    );
}

/// R13: who is not the peer of the configuration, or speaks no version that is spoken here, is refused
/// with the error that says so.
#[test]
fn a_peer_that_is_another_is_refused() {
    type Alter = fn(&mut Hello);
    let rows: [(&str, Alter, Option<ErrorId>); 8] = [
        ("itself", |_| {}, None),
        ("of more versions", |hello| hello.versions = (0, 9), None),
        (
            "too old",
            |hello| hello.versions = (0, 0),
            Some(ErrorId::PeerVersion),
        ),
        (
            "too new",
            |hello| hello.versions = (9, 9),
            Some(ErrorId::PeerVersion),
        ),
        (
            "of another cluster",
            |hello| hello.cluster = "other".into(),
            Some(ErrorId::PeerForeign),
        ),
        (
            "of another mirror",
            |hello| hello.mirror_name = "r1".into(),
            Some(ErrorId::PeerForeign),
        ),
        (
            "another node",
            |hello| hello.node = "c".into(),
            Some(ErrorId::PeerForeign),
        ),
        (
            "of another arbiter",
            |hello| hello.arbiter = ArbiterId(5),
            Some(ErrorId::PeerForeign),
        ),
    ];
    for (what, alter, expected) in rows {
        let world = meet_again(move |from, (header, payload)| {
            let mut payload = payload;
            if from == B && header.kind == FrameType::Hello {
                let mut hello = Hello::decode(&payload).expect("a hello");
                alter(&mut hello);
                payload = hello.encode();
            }
            vec![(header, payload)]
        });
        let refusal = world.hosts[A].node.refusal().map(|refusal| refusal.id);
        assert_eq!(refusal, expected, "{what}: {:?}", world.status(A));
    }
}

/// R13: nothing of a handshake is said twice.
#[test]
fn a_handshake_that_repeats_itself_is_refused() {
    for (kind, told) in [
        (FrameType::Hello, "second hello"),
        (FrameType::Verdict, "second verdict"),
    ] {
        let world = meet_again(move |from, frame| match frame.0.kind {
            found if from == B && found == kind => vec![frame.clone(), frame],
            _ => vec![frame],
        });
        assert_makes_no_sense(&world, A, told);
    }
    let world = meet_to_resync(|from, frame| match frame.0.kind {
        FrameType::SyncStart if from == A => vec![frame.clone(), frame],
        _ => vec![frame],
    });
    assert_makes_no_sense(&world, B, "a resync that was not agreed upon");
}

/// R7, R13: a replica becomes a target only where both have agreed that it does, and of a mirror that fits
/// on its disk.
#[test]
fn a_resync_that_was_not_agreed_upon_is_refused() {
    let mut lineage = None;
    let world = meet_again(move |from, frame| {
        let (header, payload) = &frame;
        if from == A && header.kind == FrameType::Hello {
            let hello = Hello::decode(payload).expect("a hello");
            lineage = Some(Lineage {
                mirror: hello.mirror,
                mirror_size: hello.mirror_size,
                generation: hello.generation,
                ancestry: hello.ancestry,
                unused_ancestors: hello.unused_ancestors,
                whole: false,
            });
        }
        match (header.kind, &lineage) {
            // They are in sync, and b has said so.
            (FrameType::Verdict, Some(lineage)) if from == A => {
                let start = Header::bare(FrameType::SyncStart, 0, 0);
                vec![(start, lineage.encode()), frame]
            }
            _ => vec![frame],
        }
    });
    assert_makes_no_sense(&world, B, "a resync that was not agreed upon");

    let world = meet_to_resync(|from, (header, payload)| {
        let mut payload = payload;
        if from == A && header.kind == FrameType::SyncStart {
            let mut lineage = Lineage::decode(header.kind, &payload).expect("a lineage");
            lineage.mirror_size = 9 * MIB;
            payload = lineage.encode();
        }
        vec![(header, payload)]
    });
    assert_makes_no_sense(&world, B, "a mirrored size that does not fit");
}

/// R7: a source believes that its target is ready only after it made the offer, in its generation.
#[test]
fn a_target_that_is_ready_out_of_turn_is_refused() {
    let mut tag = 0;
    let world = meet_again(move |from, frame| {
        let (header, payload) = &frame;
        if from == A && header.kind == FrameType::Hello {
            tag = Hello::decode(payload).expect("a hello").generation.tag();
        }
        match header.kind {
            FrameType::Hello if from == B => {
                let ready = Header::bare(FrameType::SyncReady, tag, 0);
                vec![frame, (ready, Vec::new())]
            }
            _ => vec![frame],
        }
    });
    assert_makes_no_sense(&world, A, "resync ready out of turn");

    let world = meet_to_resync(|from, (header, payload)| {
        let mut header = header;
        if from == B && header.kind == FrameType::SyncReady {
            header.generation ^= 1;
        }
        vec![(header, payload)]
    });
    assert_makes_no_sense(&world, A, "resync ready out of turn");
}

/// R3: only the refusal of the promotion that was asked for ends it.
#[test]
fn a_refusal_of_another_promotion_ends_nothing() {
    let mut world = World::in_sync(8 * MIB);
    world.command(A, Command::Secondary);
    world.settle();
    world.hosts[A].held.metadata = true;
    world.command(B, Command::Primary(PrimaryMode::Ordinary));
    world.settle();
    let connection = ConnectionId(world.hosts[B].connection.expect("a connection"));
    let header = Header::bare(FrameType::PromoteRefused, world.spoken, 0x5111);
    world.feed(B, control_frame(connection, header, b"no".to_vec()));
    assert_makes_no_sense(&world, B, "an answer to no question");
}

/// A first promotion is granted only for a mirror that fits on this disk, and only where nothing was.
#[test]
fn a_first_generation_that_does_not_fit_is_refused() {
    // Nothing at all makes no sense to begin with.
    for (size, refused) in [(0, ErrorId::LostPeer), (9 * MIB, ErrorId::PeerRefused)] {
        let mut world = World::new([8 * MIB; 2]);
        world.tamper = Some(Box::new(move |from, (header, payload)| {
            let mut payload = payload;
            if from == A && header.kind == FrameType::Promote {
                let mut lineage = Lineage::decode(header.kind, &payload).expect("a lineage");
                lineage.mirror_size = size;
                payload = lineage.encode();
            }
            vec![(header, payload)]
        }));
        world.command(A, Command::Primary(PrimaryMode::InitialAssumeClean));
        world.pass(Duration::from_secs(1));
        assert_eq!(world.hosts[A].refused, Some(refused), "{size}");
        assert!(world.status(B).generation.is_empty(), "{size}");
    }
}

/// R5: the end of a resync is for a target, in the generation of the resync.
#[test]
fn the_end_of_no_resync_is_refused() {
    let told = "the end of a resync that this replica has no part in";
    let mut world = World::in_sync(8 * MIB);
    let connection = ConnectionId(world.hosts[B].connection.expect("a connection"));
    let header = Header::bare(FrameType::SyncFinish, world.spoken, 0);
    world.feed(B, control_frame(connection, header, Vec::new()));
    assert_makes_no_sense(&world, B, told);

    let mut world = World::parted(8 * MIB);
    world.write(A, 1, 0);
    world.pass(Duration::from_secs(1));
    world.command(A, Command::PauseResync);
    world.link_possible = true;
    world.pass(Duration::from_secs(1));
    let connection = ConnectionId(world.hosts[B].connection.expect("a connection"));
    let header = Header::bare(FrameType::SyncFinish, world.spoken ^ 1, 0);
    world.feed(B, control_frame(connection, header, Vec::new()));
    assert_makes_no_sense(&world, B, told);
}
