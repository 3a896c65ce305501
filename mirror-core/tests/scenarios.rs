//! Stories of single mistakes, told step by step to two nodes.
//!
//! Each of these was a bug once. The world here is as small as can be: disks and link answer in
//! order and at once, except where a story holds something back. What happens by chance is the
//! simulator's business.

use mirror_core::control::Direction;
use mirror_core::error::ErrorId;
use mirror_core::limits::{ACTIVITY_LOG_SLOTS, BLOCK, RESYNC_WINDOW_IDLE};
use mirror_core::meta::superblock::Superblock;
use mirror_core::meta::{self, Layout, NewReplica};
use mirror_core::node::boundary::*;
use mirror_core::node::{MetadataPlace, Node, NodeConfig};
use mirror_core::types::*;
use mirror_core::wire::message::Goodbye;
use mirror_core::wire::{FrameType, Header, PayloadKind};
use std::collections::VecDeque;
use std::time::Duration;

#[path = "scenarios/tampered.rs"]
mod tampered;

const A: usize = 0;
const B: usize = 1;
const NAMES: [&str; 2] = ["a", "b"];
const MIB: u64 = 1 << 20;
const STALL: Duration = Duration::from_secs(2);
/// The virtual time between two looks at the timers.
const STEP: Duration = Duration::from_millis(10);

/// What a host's disk holds back.
#[derive(Default)]
struct Held {
    writes: bool,
    flushes: bool,
    /// Metadata writes are lost on the way, and not answered.
    metadata: bool,
    operations: Vec<OpId>,
}

struct Host {
    node: Node,
    metadata: Vec<u8>,
    store_size: u64,
    boot: u128,
    connection: Option<u64>,
    looking: bool,
    serving: bool,
    detached: bool,
    held: Held,
    flushes: u32,
    /// Bytes that were zeroed, and those of them whose space could be given back.
    zeroed: u64,
    unmapped: u64,
    /// What is on the disk reads as zeroes.
    is_blank: bool,
    completed: Vec<RequestId>,
    /// Errors that guests were answered with; `None` where no request may fail.
    errors: Option<Vec<GuestError>>,
    refused: Option<ErrorId>,
}

/// Two nodes, what is on its way to them, and whether the link can be had.
struct World {
    now: Time,
    hosts: [Host; 2],
    coming: VecDeque<(usize, Input)>,
    link_possible: bool,
    /// Frames are lost on the way.
    deaf: bool,
    /// A bitmap is being sent, and what its sender says afterwards stands behind it.
    slow_bits: Option<VecDeque<(usize, Input)>>,
    /// What arrives in place of a control frame: told who sent it.
    tamper: Option<Tamper>,
    /// The tag of the generation that was last spoken in.
    spoken: u64,
    connections: u64,
}

/// A control frame: its header, and its payload if it has any.
type Control = (Header, Vec<u8>);

type Tamper = Box<dyn FnMut(usize, Control) -> Vec<Control>>;

fn node(at: usize, generation_seed: u128) -> Node {
    let config = NodeConfig {
        cluster: "c".into(),
        mirror: "r0".into(),
        node: NAMES[at].into(),
        peer: NAMES[1 - at].into(),
        metadata: MetadataPlace::External,
        stall_timeout: STALL,
        copy_rates: CopyRates::default(),
        arbiter: ArbiterId::NONE,
        lease: Duration::from_secs(1),
        log_extents: ACTIVITY_LOG_SLOTS,
    };
    let mut id = generation_seed << 96;
    let new_id = move || {
        id += 1 << 64;
        id
    };
    Node::new(config, Box::new(new_id))
}

fn host(at: usize, store_size: u64) -> Host {
    let layout = Layout::new(store_size, MetadataPlace::External).expect("a store of good size");
    let mut metadata = vec![0; layout.external_size() as usize];
    let new = NewReplica {
        replica: ReplicaId(at as u128 + 1),
        cluster: "c".into(),
        mirror: "r0".into(),
        node: NAMES[at].into(),
    };
    for (offset, bytes) in meta::create(&layout, &new) {
        metadata[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
    }
    Host {
        node: node(at, at as u128 + 1),
        metadata,
        store_size,
        boot: 50 + at as u128,
        connection: None,
        looking: false,
        serving: false,
        detached: false,
        held: Held::default(),
        flushes: 0,
        zeroed: 0,
        unmapped: 0,
        is_blank: true,
        completed: Vec::new(),
        errors: None,
        refused: None,
    }
}

impl World {
    /// Two fresh replicas that have met.
    fn new(sizes: [u64; 2]) -> World {
        let mut world = World {
            now: Time(1),
            hosts: [host(A, sizes[A]), host(B, sizes[B])],
            coming: VecDeque::new(),
            link_possible: true,
            deaf: false,
            slow_bits: None,
            tamper: None,
            spoken: 0,
            connections: 0,
        };
        world.attach(A);
        world.attach(B);
        world.pass(Duration::from_secs(1));
        world
    }

    /// Two replicas in sync, `a` Primary.
    fn in_sync(size: u64) -> World {
        let mut world = World::new([size; 2]);
        world.command(A, Command::Primary(PrimaryMode::InitialAssumeClean));
        world.pass(Duration::from_secs(1));
        assert!(world.hosts[A].serving);
        world
    }

    /// The same, and then the link is gone.
    fn parted(size: u64) -> World {
        let mut world = World::in_sync(size);
        world.link_possible = false;
        world.cut();
        world
    }

    fn attach(&mut self, at: usize) {
        let (store_size, boot) = (self.hosts[at].store_size, BootId(self.hosts[at].boot));
        self.feed(at, Input::Attach { store_size, boot });
    }

    /// The daemon ends without a word and starts again.
    fn restart(&mut self, at: usize) {
        self.cut();
        self.hosts[at].node = node(at, 100 + self.connections as u128 + at as u128);
        self.hosts[at].serving = false;
        self.hosts[at].looking = false;
        self.coming.retain(|(to, _)| *to != at);
        self.attach(at);
    }

    fn feed(&mut self, at: usize, input: Input) {
        let mut actions = Vec::new();
        self.hosts[at].node.handle(self.now, input, &mut actions);
        for action in actions {
            self.carry_out(at, action);
        }
    }

    fn carry_out(&mut self, at: usize, action: Action) {
        let host = &mut self.hosts[at];
        if let Action::Zero {
            range, may_unmap, ..
        } = &action
        {
            host.zeroed += range.len();
            host.unmapped += if *may_unmap { range.len() } else { 0 };
        }
        let done = |op, payload| Input::DiskDone {
            op,
            result: Ok(payload),
        };
        match action {
            Action::MetaRead { op, offset, len } => {
                let bytes = host.metadata[offset as usize..][..len as usize].to_vec();
                self.coming.push_back((
                    at,
                    Input::MetaDone {
                        op,
                        result: Ok(bytes),
                    },
                ));
            }
            Action::MetaWrite { op, .. } if host.held.metadata => host.held.operations.push(op),
            Action::MetaWrite { op, offset, bytes } => {
                host.metadata[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
                self.coming.push_back((
                    at,
                    Input::MetaDone {
                        op,
                        result: Ok(Vec::new()),
                    },
                ));
            }
            Action::Flush { op } if host.held.flushes => host.held.operations.push(op),
            Action::Write { op, .. } | Action::Zero { op, .. } if host.held.writes => {
                host.held.operations.push(op);
            }
            Action::Flush { op } => {
                host.flushes += 1;
                self.coming.push_back((at, done(op, None)));
            }
            Action::Write { op, .. } | Action::Zero { op, .. } => {
                self.coming.push_back((at, done(op, None)));
            }
            Action::Digest { op, range } => {
                let blocks = range.len().div_ceil(BLOCK) as usize;
                let result = Ok(vec![Digest(1); blocks]);
                self.coming.push_back((at, Input::Digested { op, result }));
            }
            Action::Read { op, range, .. } => {
                let payload = Payload {
                    buffer: 0,
                    len: range.len() as u32,
                    crc: 0,
                    zero: host.is_blank,
                };
                self.coming.push_back((at, done(op, Some(payload))));
            }
            Action::Send {
                connection,
                header,
                body,
            } => {
                if !self.deaf
                    && host.connection == Some(connection.0)
                    && let Some(peers) = self.hosts[1 - at].connection
                {
                    let connection = ConnectionId(peers);
                    if let Some(tamper) = &mut self.tamper
                        && !matches!(body, Body::Data(_))
                    {
                        let payload = match body {
                            Body::Control(bytes) => bytes,
                            _ => Vec::new(),
                        };
                        for (header, payload) in tamper(at, (header, payload)) {
                            let frame = control_frame(connection, header, payload);
                            self.coming.push_back((1 - at, frame));
                        }
                        return;
                    }
                    let frame = Input::Frame {
                        connection,
                        header,
                        body,
                    };
                    if header.generation != 0 {
                        self.spoken = header.generation;
                    }
                    let bits = header.kind == FrameType::SyncBits;
                    match &mut self.slow_bits {
                        Some(behind) if bits || behind.front().is_some_and(|(to, _)| *to != at) => {
                            behind.push_back((1 - at, frame));
                        }
                        _ => self.coming.push_back((1 - at, frame)),
                    }
                }
            }
            Action::Close { connection } => {
                if host.connection == Some(connection.0) {
                    // What was sent before still arrives.
                    host.connection = None;
                    self.tell_link_is_down();
                }
            }
            Action::StartConnecting => host.looking = true,
            Action::StopConnecting => host.looking = false,
            Action::Serve(serving) => host.serving = serving,
            Action::Detached => host.detached = true,
            Action::Complete { request, result } => match (result, &mut host.errors) {
                (Ok(_), _) => host.completed.push(request),
                (Err(error), Some(errors)) => errors.push(error),
                (Err(error), None) => panic!("{request:?} failed: {error:?}"),
            },
            Action::CommandDone { result, .. } => host.refused = result.err().map(|r| r.id),
            Action::AskArbiter { .. } | Action::Release(_) | Action::Event(_) => {}
        }
    }

    /// Who has not closed it learns that the connection is gone.
    fn tell_link_is_down(&mut self) {
        for at in [A, B] {
            if let Some(connection) = self.hosts[at].connection.take() {
                let connection = ConnectionId(connection);
                self.coming.push_back((at, Input::LinkDown { connection }));
            }
        }
    }

    fn cut(&mut self) {
        self.coming
            .retain(|(_, input)| !matches!(input, Input::Frame { .. }));
        self.tell_link_is_down();
        self.settle();
    }

    /// Delivers all that is on its way.
    fn settle(&mut self) {
        while let Some((at, input)) = self.coming.pop_front() {
            self.feed(at, input);
        }
    }

    /// Lets time pass.
    fn pass(&mut self, span: Duration) {
        let end = self.now.after(span);
        while self.now < end {
            self.settle();
            let free = self
                .hosts
                .iter()
                .all(|host| host.connection.is_none() && host.looking);
            if self.link_possible && free {
                for at in [A, B] {
                    self.connections += 1;
                    self.hosts[at].connection = Some(self.connections);
                    self.hosts[at].looking = false;
                    let connection = ConnectionId(self.connections);
                    self.coming.push_back((at, Input::LinkUp { connection }));
                }
            }
            self.now = self.now.after(STEP);
            self.feed(A, Input::Tick);
            self.feed(B, Input::Tick);
        }
        self.settle();
    }

    fn command(&mut self, at: usize, what: Command) {
        self.hosts[at].refused = None;
        let command = CommandId(self.now.0);
        self.feed(at, Input::Command { command, what });
    }

    fn write(&mut self, at: usize, request: u64, offset: u64) {
        let payload = Payload {
            buffer: request as u32,
            len: 4096,
            crc: 7,
            zero: false,
        };
        let range = ByteRange::new(offset, 4096);
        let operation = GuestOperation::Write {
            range,
            payload,
            fua: false,
        };
        let request = RequestId(request);
        self.feed(at, Input::Guest { request, operation });
    }

    fn release_held(&mut self, at: usize) {
        self.hosts[at].held.writes = false;
        self.hosts[at].held.flushes = false;
        for op in std::mem::take(&mut self.hosts[at].held.operations) {
            self.feed(
                at,
                Input::DiskDone {
                    op,
                    result: Ok(None),
                },
            );
        }
    }

    fn status(&self, at: usize) -> mirror_core::control::MirrorStatus {
        self.hosts[at].node.status(self.now)
    }

    /// The superblock in force on a disk.
    fn record(&self, at: usize) -> Superblock {
        let host = &self.hosts[at];
        let layout = Layout::new(host.store_size, MetadataPlace::External).expect("its layout");
        let slots = [0, 1].map(|slot| {
            let offset = layout.slot_offset(slot) as usize;
            let bytes = &host.metadata[offset..][..meta::META_BLOCK as usize];
            Superblock::parse(bytes).expect("a superblock")
        });
        let slots = slots.iter().map(|slot| slot.untrusted());
        let newest = slots.max_by_key(|slot| slot.sequence);
        newest.expect("two slots").clone()
    }

    fn assert_healthy(&self) {
        for at in [A, B] {
            let status = self.status(at);
            assert_eq!(status.link, LinkState::Connected, "{status:?}");
            assert_eq!(status.disk, DiskState::UpToDate, "{status:?}");
            assert_eq!(status.peer_disk, DiskState::UpToDate, "{status:?}");
            assert_eq!(status.holders, ["a", "b"], "{status:?}");
            assert_eq!(status.dirty_bytes, 0, "{status:?}");
        }
    }
}

/// R3: a write of the dead connection must not land over one that the new Primary acknowledged.
#[test]
fn a_promotion_waits_for_writes_of_the_dead_connection() {
    let mut world = World::in_sync(8 * MIB);
    world.hosts[B].held.writes = true;
    world.write(A, 1, 0);
    world.settle();
    world.link_possible = false;
    world.cut();
    world.command(B, Command::Primary(PrimaryMode::Ordinary));
    world.pass(Duration::from_secs(1));
    assert!(!world.hosts[B].serving, "promoted over a write on its way");
    world.release_held(B);
    world.pass(Duration::from_secs(1));
    assert!(world.hosts[B].serving);
}

/// The smaller of two disks decides the size of a first generation, on whichever node it begins.
#[test]
fn the_first_generation_fits_the_smaller_disk() {
    for first in [A, B] {
        let mut world = World::new([16 * MIB, 8 * MIB]);
        world.command(first, Command::Primary(PrimaryMode::Initial));
        world.pass(Duration::from_secs(5));
        assert_eq!(
            world.status(first).size_bytes,
            8 * MIB,
            "first on {}",
            NAMES[first]
        );
        world.assert_healthy();
    }
}

/// R11: a peer that answers pings but never a flush holds a guest's write no longer than the
/// stall timeout, and the local disk is not flushed over and over meanwhile.
#[test]
fn a_hung_flush_of_the_peer_holds_nobody_up() {
    const EXTENT: u64 = 4 * MIB;
    let mut world = World::in_sync(1100 * EXTENT);
    for extent in 0..1000 {
        world.write(A, extent, extent * EXTENT);
        world.settle();
    }
    world.hosts[B].held.flushes = true;
    world.hosts[A].flushes = 0;
    world.write(A, 5000, 1050 * EXTENT);
    world.pass(STALL + Duration::from_millis(500));
    assert!(
        world.hosts[A].completed.contains(&RequestId(5000)),
        "{:?}",
        world.status(A)
    );
    assert!(
        world.hosts[A].flushes < 10,
        "{} local flushes",
        world.hosts[A].flushes
    );
}

/// R8: an operator's word that this side's data may go is spent when this side begins to serve.
#[test]
fn a_promotion_ends_the_wish_to_discard() {
    let mut world = World::in_sync(8 * MIB);
    world.command(A, Command::Secondary);
    world.pass(Duration::from_secs(1));
    world.link_possible = false;
    world.cut();
    world.command(
        B,
        Command::Connect {
            discard_my_data: true,
        },
    );
    world.command(A, Command::Primary(PrimaryMode::Ordinary));
    world.command(B, Command::Primary(PrimaryMode::Force));
    world.pass(Duration::from_secs(1));
    for at in [A, B] {
        world.write(at, 1, 0);
        world.pass(Duration::from_secs(1));
        world.command(at, Command::Secondary);
        world.pass(Duration::from_secs(1));
    }
    world.link_possible = true;
    world.pass(Duration::from_secs(2));
    for at in [A, B] {
        let status = world.status(at);
        assert_eq!(status.link, LinkState::StandAlone);
        assert!(
            status.reasons[0].starts_with("KGM-0504"),
            "{:?}",
            status.reasons
        );
    }
    // A fresh word resolves it.
    world.command(
        B,
        Command::Connect {
            discard_my_data: true,
        },
    );
    world.command(
        A,
        Command::Connect {
            discard_my_data: false,
        },
    );
    world.pass(Duration::from_secs(5));
    world.assert_healthy();
}

/// A source that the handshake chose among two restarted nodes is UpToDate, not Consistent.
#[test]
fn a_chosen_source_is_up_to_date() {
    let mut world = World::in_sync(8 * MIB);
    world.write(A, 1, 0);
    world.settle();
    world.restart(A);
    world.restart(B);
    world.pass(Duration::from_secs(5));
    world.assert_healthy();
}

/// A mirror lets go of its store only when nothing is in flight on it.
#[test]
fn going_down_waits_for_the_disk() {
    let mut world = World::in_sync(8 * MIB);
    world.hosts[B].held.writes = true;
    world.write(A, 1, 0);
    world.settle();
    world.command(B, Command::Down);
    world.pass(Duration::from_secs(5));
    assert!(!world.hosts[B].detached);
    world.release_held(B);
    world.pass(Duration::from_secs(1));
    assert!(world.hosts[B].detached);
}

/// A first generation is begun once.
#[test]
fn a_second_initial_promotion_is_refused() {
    let mut world = World::in_sync(8 * MIB);
    world.command(A, Command::Primary(PrimaryMode::Initial));
    world.settle();
    assert_eq!(world.hosts[A].refused, Some(ErrorId::NotInitial));
    world.command(A, Command::Primary(PrimaryMode::Ordinary));
    world.settle();
    assert_eq!(world.hosts[A].refused, None);
}

/// R2: a copy is thrown away only after the other has become the sole holder, and only if no
/// crash has touched that one since.
#[test]
fn an_invalidation_is_given_up_when_the_peer_has_restarted() {
    let mut world = World::in_sync(8 * MIB);
    world.link_possible = false;
    world.command(B, Command::Invalidate);
    world.restart(A);
    world.link_possible = true;
    world.pass(Duration::from_secs(5));
    assert_eq!(world.hosts[B].refused, Some(ErrorId::LostPeer));
    world.assert_healthy();

    world.command(B, Command::Invalidate);
    world.pass(Duration::from_secs(5));
    assert_eq!(world.hosts[B].refused, None);
    world.assert_healthy();
}

/// R6: a daemon that died in this boot may have left writes in the disk's cache. The log that
/// covers them is emptied only after a flush (simulator seed 13150).
#[test]
fn an_attach_flushes_before_it_empties_the_log() {
    let mut world = World::in_sync(8 * MIB);
    world.write(A, 1, 0);
    world.settle();
    world.hosts[A].held.flushes = true;
    world.restart(A);
    world.pass(Duration::from_secs(1));
    assert_eq!(
        world.status(A).disk,
        DiskState::Diskless,
        "attached without a flush"
    );
    world.release_held(A);
    world.pass(Duration::from_secs(5));
    world.assert_healthy();
}

/// R11: a peer that hangs in the middle of the handshake does not hold up the guest of a sole
/// holder, not even its first write in a new generation (simulator seed 13108).
#[test]
fn a_hung_handshake_holds_nobody_up() {
    let mut world = World::parted(8 * MIB);
    world.write(A, 1, 0);
    world.pass(Duration::from_secs(1));
    world.command(A, Command::Secondary);
    world.pass(Duration::from_secs(1));
    world.command(A, Command::Primary(PrimaryMode::Ordinary));
    world.pass(Duration::from_secs(1));
    world.hosts[B].held.metadata = true;
    world.link_possible = true;
    world.pass(Duration::from_millis(100));
    world.write(A, 2, 0);
    world.pass(STALL);
    assert!(world.hosts[A].completed.contains(&RequestId(2)));
}

/// R11: a large frame on a slow link is no silence.
#[test]
fn parts_of_a_frame_are_signs_of_life() {
    let mut world = World::in_sync(8 * MIB);
    world.deaf = true;
    for _ in 0..5 {
        world.pass(STALL / 2);
        for at in [A, B] {
            let connection = ConnectionId(world.hosts[at].connection.expect("a connection"));
            world.feed(at, Input::Heard { connection });
        }
    }
    world.assert_healthy();
    world.pass(STALL * 2);
    assert_eq!(world.status(A).link, LinkState::Connecting);
}

/// What an acknowledgement makes possible happens at once, and not with the next thing that
/// happens to come: a guest that waits for this answer sends nothing more.
#[test]
fn the_next_piece_of_a_zeroing_needs_no_other_event() {
    let mut world = World::in_sync(128 * MIB);
    world.hosts[B].held.writes = true;
    let operation = GuestOperation::Zero {
        range: ByteRange::new(0, 96 * MIB),
        may_unmap: true,
        fua: false,
    };
    let request = RequestId(1);
    world.feed(A, Input::Guest { request, operation });
    world.settle();
    world.link_possible = false;
    world.cut();
    assert!(world.hosts[A].completed.contains(&request));
}

/// As above, for a write that waits for room in a full activity log.
#[test]
fn room_in_the_log_is_seen_when_the_peer_is_lost() {
    const EXTENT: u64 = 4 * MIB;
    let mut world = World::in_sync(1100 * EXTENT);
    world.hosts[B].held.writes = true;
    for extent in 0..1001 {
        world.write(A, extent, extent * EXTENT);
    }
    world.settle();
    world.link_possible = false;
    world.cut();
    assert!(world.hosts[A].completed.contains(&RequestId(1000)));
}

/// As above, for a command that ends the need of the peer.
#[test]
fn a_disconnect_lets_the_writes_of_a_sole_holder_go_on() {
    let mut world = World::parted(8 * MIB);
    world.write(A, 1, 0);
    world.pass(Duration::from_secs(1));
    world.command(A, Command::PauseResync);
    world.link_possible = true;
    world.pass(Duration::from_secs(1));
    assert_eq!(world.status(B).disk, DiskState::Inconsistent);
    world.hosts[B].held.writes = true;
    world.write(A, 2, MIB);
    world.settle();
    assert!(!world.hosts[A].completed.contains(&RequestId(2)));
    world.command(A, Command::Disconnect);
    world.settle();
    assert!(world.hosts[A].completed.contains(&RequestId(2)));
}

/// An invalidation whose peer never comes back is given up: nothing was thrown away yet, and this
/// copy may be the last one.
#[test]
fn an_invalidation_without_a_peer_does_not_block_a_takeover() {
    let mut world = World::in_sync(8 * MIB);
    world.link_possible = false;
    world.command(B, Command::Invalidate);
    world.cut();
    world.pass(Duration::from_secs(5));
    assert_eq!(world.hosts[B].refused, Some(ErrorId::LostPeer));
    world.command(B, Command::Primary(PrimaryMode::Ordinary));
    world.pass(Duration::from_secs(1));
    assert!(world.hosts[B].serving, "{:?}", world.status(B));
}

/// R8: a copy that was promoted by force in the middle of a resync never takes the place of its
/// source without an operator's word, whether anything was written on either side or not.
#[test]
fn a_forced_half_copy_overwrites_nobody() {
    for write in [false, true] {
        let mut world = World::in_sync(8 * MIB);
        world.write(A, 1, 0);
        world.settle();
        world.restart(A);
        world.restart(B);
        world.command(A, Command::PauseResync);
        world.pass(Duration::from_secs(5));
        assert_eq!(world.status(B).disk, DiskState::Inconsistent);
        world.link_possible = false;
        world.cut();
        world.command(B, Command::Primary(PrimaryMode::Force));
        world.pass(Duration::from_secs(1));
        assert!(world.hosts[B].serving);
        if write {
            world.write(B, 2, MIB);
            world.pass(Duration::from_secs(1));
        }
        world.command(B, Command::Secondary);
        world.pass(Duration::from_secs(1));
        world.link_possible = true;
        world.pass(Duration::from_secs(5));
        for at in [A, B] {
            let status = world.status(at);
            assert_eq!(status.link, LinkState::StandAlone, "{status:?}");
            assert_eq!(status.disk, DiskState::UpToDate, "{status:?}");
        }
    }
}

/// R3: a planned handover is shared history, however long one side goes on alone afterwards.
#[test]
fn a_handover_is_remembered_over_many_generations() {
    for alone in [A, B] {
        let mut world = World::in_sync(8 * MIB);
        for at in [B, A] {
            world.command(1 - at, Command::Secondary);
            world.pass(Duration::from_secs(1));
            world.command(at, Command::Primary(PrimaryMode::Ordinary));
            world.pass(Duration::from_secs(1));
            world.write(at, 1, 0);
            world.pass(Duration::from_secs(1));
        }
        world.command(A, Command::Secondary);
        world.pass(Duration::from_secs(1));
        world.link_possible = false;
        world.cut();
        for _ in 0..70 {
            world.command(alone, Command::Primary(PrimaryMode::Ordinary));
            world.settle();
            world.write(alone, 2, 0);
            world.settle();
            world.command(alone, Command::Secondary);
            world.settle();
        }
        world.link_possible = true;
        world.pass(Duration::from_secs(5));
        world.assert_healthy();
    }
}

/// R8: when both sides claimed a generation and wrote nothing in it, the claims are withdrawn, and
/// the replica that stayed up is the source: the other may have lost what was acknowledged before.
#[test]
fn an_empty_claim_does_not_beat_the_replica_that_stayed_up() {
    for lost_power in [A, B] {
        let stayed_up = 1 - lost_power;
        let mut world = World::in_sync(8 * MIB);
        world.write(A, 1, 0);
        world.settle();
        world.link_possible = false;
        world.cut();
        world.command(A, Command::Secondary);
        world.pass(Duration::from_secs(1));
        world.hosts[lost_power].boot += 100;
        world.restart(lost_power);
        world.pass(Duration::from_secs(5));
        for (at, mode) in [
            (lost_power, PrimaryMode::Force),
            (stayed_up, PrimaryMode::Ordinary),
        ] {
            world.command(at, Command::Primary(mode));
            world.pass(Duration::from_secs(1));
            assert!(world.hosts[at].serving);
            world.command(at, Command::Secondary);
            world.command(at, Command::PauseResync);
            world.pass(Duration::from_secs(1));
        }
        world.link_possible = true;
        world.pass(Duration::from_secs(5));
        let direction = |at| world.status(at).resync.map(|resync| resync.direction);
        assert_eq!(direction(stayed_up), Some(Direction::Source));
        assert_eq!(direction(lost_power), Some(Direction::Target));
    }
}

/// A Secondary whose Primary is back after a moment does not promote past it.
#[test]
fn a_peer_that_was_just_heard_is_asked_before_a_promotion() {
    let mut world = World::in_sync(8 * MIB);
    world.hosts[B].held.writes = true;
    world.write(A, 1, 0);
    world.settle();
    world.cut();
    world.pass(Duration::from_millis(100));
    // Connected again, but not at rest: a write of the old connection is on its way.
    world.command(B, Command::Primary(PrimaryMode::Ordinary));
    world.pass(Duration::from_millis(100));
    world.release_held(B);
    world.pass(Duration::from_secs(2));
    assert!(!world.hosts[B].serving);
    assert_eq!(world.hosts[B].refused, Some(ErrorId::PeerIsPrimary));
    world.assert_healthy();
}

/// A Secondary was promoted by force and wrote, while the Primary it could not see wrote nothing.
/// Its data can be given up: the Primary then is the source (recorded by the simulator as
/// `cut 2s`, `guest write 5184+8`, `calm` of seed 16).
#[test]
fn what_a_forced_primary_wrote_can_be_discarded_for_an_older_primary() {
    let mut world = World::parted(8 * MIB);
    world.pass(Duration::from_secs(1));
    world.command(B, Command::Primary(PrimaryMode::Force));
    world.pass(Duration::from_secs(1));
    world.write(B, 1, 0);
    world.settle();
    world.link_possible = true;
    world.pass(Duration::from_secs(5));
    world.command(B, Command::Secondary);
    world.pass(Duration::from_secs(1));
    let connect = |discard_my_data| Command::Connect { discard_my_data };
    world.command(B, connect(true));
    world.command(A, connect(false));
    world.pass(Duration::from_secs(5));
    assert!(world.hosts[A].serving);
    world.assert_healthy();
}

/// R12: a disk that failed is let go only when nothing of it is in flight.
#[test]
fn a_failed_disk_is_not_closed_under_a_write() {
    let mut world = World::in_sync(8 * MIB);
    world.hosts[B].held.writes = true;
    world.write(A, 1, 0);
    world.write(A, 2, 64 << 10);
    world.settle();
    let op = world.hosts[B].held.operations.remove(0);
    let result = Err(DiskError::Io);
    world.feed(B, Input::DiskDone { op, result });
    assert_eq!(world.status(B).disk, DiskState::Failed);
    world.command(B, Command::Down);
    world.pass(Duration::from_secs(1));
    assert!(!world.hosts[B].detached, "closed with a write in flight");
    world.release_held(B);
    assert!(world.hosts[B].detached);
}

/// The same while the metadata is brought up to date after a start.
#[test]
fn a_disk_that_fails_at_attach_is_not_closed_under_a_write() {
    let size = 10 << 30;
    let mut world = World::in_sync(size);
    world.hosts[A].held.metadata = true;
    // The log names nothing any more: everything is dirty, and saved in several writes.
    let layout = Layout::new(size, MetadataPlace::External).expect("a store of good size");
    let log = layout.activity_log_offset(0) as usize;
    world.hosts[A].metadata[log..][..8 * 4096].fill(0);
    world.restart(A);
    world.pass(Duration::from_secs(1));
    let ops = std::mem::take(&mut world.hosts[A].held.operations);
    assert!(ops.len() > 1, "{ops:?}");
    for (at, op) in ops.iter().enumerate() {
        assert!(!world.hosts[A].detached, "closed with a write in flight");
        let result = if at == 0 {
            Err(DiskError::Io)
        } else {
            Ok(Vec::new())
        };
        world.feed(A, Input::MetaDone { op: *op, result });
    }
    assert!(world.hosts[A].detached);
}

/// A guest cannot ask for what is not a range of whole sectors within the device, nor for more data at
/// once than a frame carries; zeroes it may have as many as there is room for.
#[test]
fn a_request_that_does_not_fit_the_device_is_refused() {
    const SIZE: u64 = 64 * MIB;
    const MOST: u64 = 32 * MIB;
    let refused = [
        (SIZE - 4096, SIZE + 4096),
        (SIZE, SIZE + 512),
        (100, 612),
        (0, 100),
        (512, 512),
        (0, MOST + 512),
    ];
    let mut world = World::in_sync(SIZE);
    world.hosts[A].errors = Some(Vec::new());
    let ask = |world: &mut World, operation| {
        let request = RequestId(1);
        world.feed(A, Input::Guest { request, operation });
        world.settle();
        std::mem::take(world.hosts[A].errors.as_mut().expect("errors are expected"))
    };
    for (start, end) in refused {
        let errors = ask(&mut world, GuestOperation::Read(ByteRange { start, end }));
        assert_eq!(errors, [GuestError::OutOfRange], "{start} to {end}");
    }
    let all = ByteRange::new(0, SIZE);
    let zeroes = GuestOperation::Zero {
        range: all,
        may_unmap: true,
        fua: false,
    };
    assert_eq!(ask(&mut world, zeroes), []);
    // In pieces, all of it on both.
    assert_eq!([A, B].map(|at| world.hosts[at].zeroed), [SIZE; 2]);
    for (start, end) in [(SIZE - 512, SIZE), (0, MOST), (512, 1024)] {
        let errors = ask(&mut world, GuestOperation::Read(ByteRange { start, end }));
        assert_eq!(errors, [], "{start} to {end}");
    }
    assert_eq!(world.hosts[A].completed.len(), 4);
}

fn frame_to(world: &World, at: usize, kind: FrameType, generation: u64) -> Input {
    let connection = world.hosts[at].connection.expect("a connection");
    let header = Header::bare(kind, generation, 0);
    control_frame(ConnectionId(connection), header, b"no".to_vec())
}

fn control_frame(connection: ConnectionId, header: Header, payload: Vec<u8>) -> Input {
    let body = match header.kind.payload_kind() {
        PayloadKind::Control { .. } => Body::Control(payload),
        _ => Body::None,
    };
    Input::Frame {
        connection,
        header,
        body,
    }
}

/// R3: an answer to no question, or one that speaks in another generation, ends the connection.
#[test]
fn an_answer_that_was_not_asked_for_is_refused() {
    let mut world = World::in_sync(8 * MIB);
    let refusal = frame_to(&world, A, FrameType::PromoteRefused, 0);
    world.feed(A, refusal);
    assert_eq!(world.hosts[A].connection, None, "{:?}", world.status(A));

    let mut world = World::in_sync(8 * MIB);
    world.command(A, Command::Secondary);
    world.settle();
    world.hosts[A].held.metadata = true;
    world.command(B, Command::Primary(PrimaryMode::Ordinary));
    world.settle();
    let grant = frame_to(&world, B, FrameType::Promoted, 0x5111);
    world.feed(B, grant);
    world.pass(Duration::from_millis(100));
    assert!(!world.hosts[B].serving, "promoted by a stale answer");
}

/// R9: a target whose bitmap takes longer to send than the stall timeout is not left in silence: its
/// pings stand behind the bitmap, so it hears nothing unless the source speaks by itself.
#[test]
fn a_bitmap_that_takes_long_is_heard_to_its_end() {
    let mut world = World::in_sync(8 << 30);
    world.command(A, Command::Secondary);
    world.pass(Duration::from_secs(1));
    world.command(B, Command::Primary(PrimaryMode::Ordinary));
    world.pass(Duration::from_secs(1));
    for extent in 0..900 {
        world.write(B, extent, extent * 4 * MIB);
        world.settle();
    }
    world.link_possible = false;
    world.restart(B);
    world.command(A, Command::Primary(PrimaryMode::Ordinary));
    world.pass(Duration::from_secs(1));
    world.slow_bits = Some(VecDeque::new());
    world.link_possible = true;
    world.pass(Duration::from_secs(1));
    for sent in 0..20 {
        assert_eq!(world.status(B).link, LinkState::Connected, "after {sent}");
        let next = world.slow_bits.as_mut().and_then(VecDeque::pop_front);
        world.coming.extend(next);
        world.pass(Duration::from_millis(200));
    }
    let rest = world.slow_bits.take().unwrap_or_default();
    assert!(matches!(rest[0].1, Input::Frame { header, .. } if header.kind == FrameType::SyncBits));
    world.coming.extend(rest);
    world.pass(Duration::from_secs(20));
    world.assert_healthy();
}

/// R9: a chunk that waits for its range was not sent, so nobody can have written it. Taken for written,
/// it would be forgotten in the queue for its range, and a later write there would wait for ever.
#[test]
fn a_chunk_that_was_not_sent_is_not_written() {
    let mut world = World::parted(8 * MIB);
    world.write(A, 1, 0);
    world.pass(Duration::from_secs(1));
    world.command(A, Command::PauseResync);
    world.link_possible = true;
    world.pass(Duration::from_secs(1));
    world.hosts[A].held.writes = true;
    world.write(A, 2, 0);
    world.settle();
    world.command(A, Command::ResumeResync);
    world.settle();
    assert_eq!(world.status(A).link, LinkState::Connected);
    let connection = ConnectionId(world.hosts[A].connection.expect("a connection"));
    let generation = world.spoken;
    for serial in 0..4 {
        let header = Header::bare(FrameType::Done, generation, 4 << 60 | serial);
        let body = Body::None;
        world.feed(
            A,
            Input::Frame {
                connection,
                header,
                body,
            },
        );
    }
    assert_eq!(world.hosts[A].connection, None, "{:?}", world.status(A));
    world.release_held(A);
    world.pass(Duration::from_secs(5));
    world.write(A, 3, 0);
    world.pass(Duration::from_secs(1));
    assert!(world.hosts[A].completed.contains(&RequestId(3)));
    world.assert_healthy();
}

/// R3: while the record of a generation is on its way to the disk nothing is said in it. The peer would
/// take it for nonsense, part, and never hear that it is outdated.
#[test]
fn nothing_is_said_in_a_generation_that_is_not_recorded() {
    const EXTENT: u64 = 4 * MIB;
    let mut world = World::in_sync(1100 * EXTENT);
    for extent in 0..1000 {
        world.write(A, extent, extent * EXTENT);
        world.settle();
    }
    world.hosts[A].held.metadata = true;
    world.command(A, Command::Disconnect);
    world.settle();
    // What it is about to do is noted; then the log has no room for a write.
    answer_metadata(&mut world, A);
    world.write(A, 5000, 1050 * EXTENT);
    world.settle();
    assert!(world.hosts[B].connection.is_some(), "{:?}", world.status(B));
    for _ in 0..2 {
        answer_metadata(&mut world, A);
    }
    world.hosts[A].held.metadata = false;
    world.pass(Duration::from_secs(1));
    assert_eq!(world.status(B).disk, DiskState::Outdated);
}

/// The metadata writes that are held are on the disk.
fn answer_metadata(world: &mut World, at: usize) {
    for op in std::mem::take(&mut world.hosts[at].held.operations) {
        let result = Ok(Vec::new());
        world.feed(at, Input::MetaDone { op, result });
    }
    world.settle();
}

/// What was on its way when a newer connection took the place of an older one says nothing any more.
#[test]
fn a_frame_of_an_older_connection_is_not_heard() {
    let mut world = World::in_sync(8 * MIB);
    let old = ConnectionId(world.hosts[B].connection.expect("a connection"));
    let connection = ConnectionId(77);
    world.hosts[B].connection = Some(connection.0);
    world.feed(B, Input::LinkUp { connection });
    let goodbye = Goodbye {
        outdated_by: None,
        reason: "of long ago".to_owned(),
    };
    let header = Header::bare(FrameType::Goodbye, 0, 0);
    let body = Body::Control(goodbye.encode());
    let connection = old;
    world.feed(
        B,
        Input::Frame {
            connection,
            header,
            body,
        },
    );
    assert_eq!(world.hosts[B].connection, Some(77));
    assert!(world.status(B).reasons.is_empty(), "{:?}", world.status(B));
}

/// What both sides show of a resync: how much there is to copy, on the target as well, which does not
/// know by itself; and nothing done yet while an operator holds it.
#[test]
fn both_sides_show_how_much_there_is_to_copy() {
    let mut world = World::parted(8 * MIB);
    for block in 0..3 {
        world.write(A, block, block * MIB);
    }
    world.pass(Duration::from_secs(1));
    world.command(A, Command::PauseResync);
    world.link_possible = true;
    world.pass(Duration::from_secs(1));
    for (at, direction) in [(A, Direction::Source), (B, Direction::Target)] {
        let resync = world.status(at).resync.expect("a resync");
        assert_eq!(resync.direction, direction);
        assert_eq!((resync.total_bytes, resync.done_bytes), (3 * 4096, 0));
        assert!(resync.paused);
    }
    world.command(A, Command::ResumeResync);
    world.pass(Duration::from_secs(5));
    world.assert_healthy();
}

/// R11: a peer that answers pings and nothing else holds a change of role up no longer than is documented.
#[test]
fn a_change_of_role_does_not_wait_for_ever() {
    let patience = Duration::from_secs(35);
    // For its record of the promotion.
    let mut world = World::in_sync(8 * MIB);
    world.command(A, Command::Secondary);
    world.settle();
    world.hosts[A].held.metadata = true;
    world.command(B, Command::Primary(PrimaryMode::Ordinary));
    world.pass(patience);
    assert_eq!(world.hosts[B].refused, Some(ErrorId::LostPeer));

    // For its flush before a demotion.
    let mut world = World::in_sync(8 * MIB);
    world.write(A, 1, 0);
    world.settle();
    world.hosts[B].held.flushes = true;
    world.command(A, Command::Secondary);
    world.pass(patience);
    assert_eq!(world.status(A).role, Role::Secondary);
    assert_eq!(world.hosts[A].refused, None);
}

/// R9: holes stay holes, and only what is no hole counts as sent, on both sides.
#[test]
fn a_resync_keeps_holes_and_counts_what_it_sends() {
    for blank in [true, false] {
        let mut world = World::parted(8 * MIB);
        for block in 0..3 {
            world.write(A, block, block * MIB);
        }
        world.pass(Duration::from_secs(1));
        world.hosts[A].is_blank = blank;
        world.hosts[B].held.writes = true;
        world.link_possible = true;
        world.pass(Duration::from_millis(500));
        let sent = if blank { 0 } else { 3 * 4096 };
        for at in [A, B] {
            let resync = world.status(at).resync.expect("a resync");
            assert_eq!((resync.sent_bytes, resync.done_bytes), (sent, 0), "{at}");
        }
        world.release_held(B);
        world.pass(Duration::from_secs(5));
        world.assert_healthy();
        let holes = if blank { 3 * 4096 } else { 0 };
        assert_eq!(world.hosts[B].unmapped, holes);
        assert_eq!(world.hosts[B].zeroed, holes);
        for at in [A, B] {
            assert_eq!(world.status(at).counters.resyncs, 1, "{at}");
        }
    }
}

/// R2: who goes on alone is named in the register by the generation it began then. Those that it
/// begins as sole holder afterwards need no question.
#[test]
fn a_record_tells_what_the_register_names() {
    let mut world = World::parted(8 * MIB);
    world.command(B, Command::Primary(PrimaryMode::Force));
    world.pass(Duration::from_secs(1));
    let alone = world.record(B);
    assert_eq!(alone.registered, alone.generation);
    world.command(B, Command::Secondary);
    world.pass(Duration::from_secs(1));
    world.command(B, Command::Primary(PrimaryMode::Ordinary));
    world.pass(Duration::from_secs(1));
    let again = world.record(B);
    assert_eq!(again.generation.counter, alone.generation.counter + 1);
    assert_eq!(again.registered, alone.generation);
}

/// R13: a question of a few bytes costs a read and a buffer, so only so many are answered at once.
#[test]
fn a_peer_compares_only_so_much_at_once() {
    let mut world = World::in_sync(8 * MIB);
    let connection = ConnectionId(world.hosts[B].connection.expect("a connection"));
    for serial in 0..1000 {
        let header = Header {
            length: 4096,
            ..Header::bare(FrameType::Digest, world.spoken, serial)
        };
        // Its disk answers later.
        world.feed(B, control_frame(connection, header, Vec::new()));
        let connected = world.status(B).link == LinkState::Connected;
        assert_eq!(
            connected,
            serial < 16 * RESYNC_WINDOW_IDLE as u64,
            "{serial}"
        );
        if !connected {
            return;
        }
    }
}
