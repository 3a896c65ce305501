//! Two nodes and what a hostile peer, a bad disk and time can do to them, told by a script.
//!
//! A script begins with one of several situations, so that a session, a resync and a life alone
//! are a step away and not a hundred. From there each step delivers, changes, forges, loses or
//! repeats a frame; ends a disk operation well or badly; lets time pass; asks as a guest or as an
//! operator; or restarts a node. Every frame passes the decoder of headers on its way.

use crate::bytes::Bytes;
use crate::host::{HeardBody, Host, STORE};
use mirror_core::control::{Command, PrimaryMode};
use mirror_core::meta::bitmap::BITS_LEN;
use mirror_core::meta::superblock::Superblock;
use mirror_core::node::boundary::{Body, ConnectionId, DiskError, GuestOperation, Input};
use mirror_core::types::{ByteRange, DiskState, Generation, GenerationId, ReplicaId, Role};
use mirror_core::wire::message::{Goodbye, Hello, Lineage, PeerState};
use mirror_core::wire::{FrameType, Header, PayloadKind};
use std::time::Duration;

/// Most steps of a script.
const STEPS: usize = 400;

const KINDS: [FrameType; 24] = {
    use FrameType::*;
    [
        Hello,
        Verdict,
        Ready,
        Goodbye,
        Ping,
        Pong,
        State,
        Write,
        Zero,
        Flush,
        Done,
        SyncStart,
        SyncBits,
        SyncReady,
        SyncWrite,
        SyncZero,
        SyncTotal,
        SyncFinish,
        SyncFinished,
        Promote,
        Promoted,
        PromoteRefused,
        Digest,
        Digests,
    ]
};

const COMMANDS: [Command; 15] = [
    Command::Primary(PrimaryMode::Ordinary),
    Command::Primary(PrimaryMode::Initial),
    Command::Primary(PrimaryMode::InitialAssumeClean),
    Command::Primary(PrimaryMode::Force),
    Command::Secondary,
    Command::Connect {
        discard_my_data: false,
    },
    Command::Connect {
        discard_my_data: true,
    },
    Command::Disconnect,
    Command::Invalidate,
    Command::CompareFirst,
    Command::PauseResync,
    Command::ResumeResync,
    Command::Verify {
        repair: true,
        resume: false,
    },
    Command::StopVerify,
    Command::Down,
];

/// Plays a script; whether a forged or changed frame came into a connection that outlived it.
pub fn run(data: &[u8]) -> bool {
    let mut script = Bytes(data);
    let mut pair = Pair::new();
    pair.prepare(script.u8());
    for _ in 0..STEPS {
        if script.is_empty() {
            break;
        }
        pair.step(&mut script);
    }
    pair.end();
    pair.taken
}

struct Pair {
    hosts: [Host; 2],
    connections: u64,
    taken: bool,
}

impl Pair {
    fn new() -> Pair {
        let mut hosts = [
            Host::created("a", "b", ReplicaId(1)),
            Host::created("b", "a", ReplicaId(2)),
        ];
        hosts.iter_mut().for_each(Host::attach_and_settle);
        Pair {
            hosts,
            connections: 0,
            taken: false,
        }
    }

    /// Brings the nodes into one of several situations.
    fn prepare(&mut self, situation: u8) {
        let clean = Command::Primary(PrimaryMode::InitialAssumeClean);
        match situation % 6 {
            0 => {}
            1 => self.connect(),
            2 => {
                self.connect();
                self.settle();
                self.hosts[0].command(clean);
            }
            3 => {
                // The Primary has gone on alone.
                self.prepare(2);
                self.disconnect();
                self.settle();
                self.write(0, 4096, 8192, false);
                self.tick(Duration::from_secs(1));
            }
            4 => {
                // A resync is held.
                self.prepare(3);
                self.hosts[1].command(Command::PauseResync);
                self.connect();
            }
            _ => {
                // Both were told to go on alone.
                self.prepare(3);
                self.hosts[1].command(Command::Primary(PrimaryMode::Force));
                self.tick(Duration::from_secs(5));
                self.settle();
                self.write(1, 0, 4096, true);
            }
        }
        self.settle();
    }

    fn step(&mut self, script: &mut Bytes<'_>) {
        let what = script.u8();
        let to = usize::from(what >> 7);
        match what & 0x1f {
            0 => self.settle(),
            1..=3 => self.deliver(to),
            4 | 5 => self.deliver_changed(to, script),
            6..=9 => self.forge(to, script),
            10 | 11 => self.end_operation(to, script, Ok(())),
            12 => {
                let error = if script.flag() {
                    DiskError::Io
                } else {
                    DiskError::NoSpace
                };
                self.end_operation(to, script, Err(error));
            }
            13 | 14 => {
                let spans = [1, 10, 100, 260, 1_100, 2_100, 6_000, 31_000];
                self.tick(Duration::from_millis(*script.pick(&spans)));
            }
            15 | 16 => self.connect(),
            17 => self.disconnect(),
            18 => self.break_one(to),
            19 | 20 => self.hosts[to].command(*script.pick(&COMMANDS)),
            21..=23 => self.guest(to, script),
            24 => self.restart(to, script.flag()),
            25 => {
                self.hosts[1 - to].sent.pop_front();
            }
            26 => self.repeat(to, script),
            27 => {
                if let Some(connection) = self.hosts[to].connection {
                    self.hosts[to].feed(Input::Heard { connection });
                }
            }
            _ => self.hosts[to].complete_all(),
        }
        self.hosts[to].look();
    }

    /// Everything that is on its way arrives.
    fn settle(&mut self) {
        for _ in 0..20_000 {
            let mut quiet = true;
            for to in [0, 1] {
                quiet &= self.hosts[to].in_flight() == 0 && self.hosts[1 - to].sent.is_empty();
                self.hosts[to].complete_all();
                self.deliver(to);
            }
            if quiet {
                return;
            }
        }
        panic!("the nodes never come to rest");
    }

    /// Ends the script: whatever a node held for others, it lets go of.
    fn end(&mut self) {
        self.disconnect();
        self.settle();
        for host in &mut self.hosts {
            host.look();
            host.assert_nothing_is_kept();
        }
    }

    /// Who looks for the peer, or has it, gets a new connection: to the other node, or to whom the
    /// script plays in its place.
    fn connect(&mut self) {
        for host in &mut self.hosts {
            self.connections += 1;
            host.sent.clear();
            if !host.seeking && host.connection.is_none() {
                continue;
            }
            host.seeking = false;
            let connection = ConnectionId(self.connections);
            host.connection = Some(connection);
            host.feed(Input::LinkUp { connection });
        }
    }

    fn disconnect(&mut self) {
        self.break_one(0);
        self.break_one(1);
    }

    fn break_one(&mut self, at: usize) {
        let host = &mut self.hosts[at];
        if let Some(connection) = host.connection.take() {
            host.feed(Input::LinkDown { connection });
        }
        self.hosts[1 - at].sent.clear();
    }

    fn restart(&mut self, at: usize, written: bool) {
        self.hosts[at].restart(written);
    }

    fn tick(&mut self, span: Duration) {
        for host in &mut self.hosts {
            host.now = host.now.after(span);
            host.feed(Input::Tick);
        }
    }

    fn end_operation(&mut self, at: usize, script: &mut Bytes<'_>, result: Result<(), DiskError>) {
        let host = &mut self.hosts[at];
        let which = usize::from(script.u8()) % host.in_flight().max(1);
        host.complete(which, result);
    }

    fn guest(&mut self, at: usize, script: &mut Bytes<'_>) {
        let how = script.u8();
        let (start, len) = (offset(script), u64::from(length(script)));
        let fua = how & 8 != 0;
        match how & 3 {
            0 => {
                let len = len.min(1 << 20);
                let range = ByteRange::new(start, len);
                self.hosts[at].ask(GuestOperation::Read(range));
            }
            1 => self.write(at, start, len as u32, fua),
            2 => self.hosts[at].ask(GuestOperation::Zero {
                range: ByteRange::new(start, len),
                may_unmap: how & 4 != 0,
                fua,
            }),
            _ => self.hosts[at].ask(GuestOperation::Flush),
        }
    }

    fn write(&mut self, at: usize, start: u64, len: u32, fua: bool) {
        let range = ByteRange::new(start, len.into());
        let host = &mut self.hosts[at];
        let payload = host.give(range.len() as u32, 7, false);
        host.ask(GuestOperation::Write {
            range,
            payload,
            fua,
        });
    }

    /// The next frame arrives.
    fn deliver(&mut self, to: usize) {
        let Some((header, body)) = self.hosts[1 - to].sent.pop_front() else {
            return;
        };
        if let Some(connection) = self.hosts[to].connection {
            let good = self.hosts[to].hear(connection, header, heard(&header, body));
            assert!(good, "{header:?} of a node is no frame");
        }
    }

    /// The next frame arrives with something in it changed.
    fn deliver_changed(&mut self, to: usize, script: &mut Bytes<'_>) {
        let Some((mut header, body)) = self.hosts[1 - to].sent.pop_front() else {
            return;
        };
        let mut body = heard(&header, body);
        match script.u8() % 8 {
            0 => header.kind = *script.pick(&KINDS),
            1 => header.flags = script.u8(),
            2 => header.generation = self.tag(to, script),
            3 => header.id = self.id(to, script),
            4 => header.offset = offset(script),
            5 => {
                header.length = length(script);
                if let HeardBody::Data { .. } = body {
                    header.payload_len = header.length;
                }
            }
            _ => match &mut body {
                HeardBody::Control(bytes) if !bytes.is_empty() => {
                    let at = usize::from(script.u16()) % bytes.len();
                    let patch = script.u8();
                    let len = usize::from(patch >> 5).min(bytes.len() - at - 1) + 1;
                    bytes[at..at + len].fill(patch);
                }
                HeardBody::Control(_) => {}
                HeardBody::Data { crc } => *crc ^= 1,
            },
        }
        self.inject(to, header, body);
    }

    /// A frame like one of the last, again, perhaps on a connection that was replaced.
    fn repeat(&mut self, to: usize, script: &mut Bytes<'_>) {
        let from = &self.hosts[1 - to].sent;
        let Some((header, body)) = from.get(usize::from(script.u8()) % from.len().max(1)) else {
            return;
        };
        let header = *header;
        let body = match body {
            Body::None => HeardBody::Control(Vec::new()),
            Body::Control(bytes) => HeardBody::Control(bytes.clone()),
            Body::Data(payload) => HeardBody::Data { crc: payload.crc },
        };
        if script.flag() {
            let stale = ConnectionId(self.connections.saturating_sub(2));
            self.hosts[to].hear(stale, header, body);
        } else {
            self.inject(to, header, body);
        }
    }

    /// A frame that nobody sent.
    fn forge(&mut self, to: usize, script: &mut Bytes<'_>) {
        let kind = *script.pick(&KINDS);
        let how = script.u8();
        let mut header = Header::bare(kind, self.tag(to, script), self.id(to, script));
        header.flags = how & 7;
        let body = match kind.payload_kind() {
            PayloadKind::Data { .. } => {
                header.offset = offset(script);
                header.length = length(script);
                header.payload_len = header.length;
                header.payload_crc = 7;
                HeardBody::Data {
                    crc: if how & 0x10 == 0 { 7 } else { 8 },
                }
            }
            PayloadKind::None => {
                header.offset = offset(script);
                header.length = length(script);
                HeardBody::Control(Vec::new())
            }
            PayloadKind::Control { .. } => {
                let bytes = if how & 0xe0 == 0xe0 {
                    let len = script.u8().into();
                    script.take(len).to_vec()
                } else {
                    self.message(to, kind, &mut header, script)
                };
                header.payload_len = bytes.len() as u32;
                header.payload_crc = crc32fast::hash(&bytes);
                HeardBody::Control(bytes)
            }
        };
        self.inject(to, header, body);
    }

    fn inject(&mut self, to: usize, header: Header, body: HeardBody) {
        let host = &mut self.hosts[to];
        if let Some(connection) = host.connection {
            let good = host.hear(connection, header, body);
            self.taken |= good && host.connection == Some(connection);
        }
    }

    /// A message that is well made and says what the script wants.
    fn message(
        &mut self,
        to: usize,
        kind: FrameType,
        header: &mut Header,
        script: &mut Bytes<'_>,
    ) -> Vec<u8> {
        match kind {
            FrameType::Hello => self.hello(to, script).encode(),
            FrameType::SyncStart | FrameType::Promote => self.lineage(to, script).encode(),
            FrameType::Verdict => {
                let mut verdict = self.hosts[to].verdict.clone();
                if let Some(kind) = verdict.first_mut() {
                    *kind = match *kind {
                        3 => 4,
                        4 => 3,
                        other => other,
                    };
                }
                verdict
            }
            FrameType::State => PeerState {
                role: *script.pick(&ROLES),
                disk: *script.pick(&DISKS),
                paused: script.flag(),
            }
            .encode(),
            FrameType::Goodbye => {
                let alone = script.flag();
                let generation = self.generation(to, script);
                let len = script.u8().into();
                let reason = String::from_utf8_lossy(script.take(len)).into_owned();
                Goodbye {
                    outdated_by: alone.then_some(generation),
                    reason,
                }
                .encode()
            }
            FrameType::SyncBits => {
                header.offset = (script.u8() % 3).into();
                let mut bits = vec![script.u8(); BITS_LEN];
                bits[..8].copy_from_slice(&script.array::<8>());
                bits
            }
            _ => {
                let len = script.u8().into();
                script.take(len).to_vec()
            }
        }
    }

    /// What the peer would say of itself, and something else.
    fn hello(&self, to: usize, script: &mut Bytes<'_>) -> Hello {
        let record = &self.hosts[1 - to].record;
        let born = !record.generation.is_unborn();
        let mut hello = Hello {
            versions: (1, 1),
            cluster: "c".into(),
            mirror_name: "r0".into(),
            node: ["b", "a"][to].into(),
            mirror: record.mirror,
            replica: ReplicaId(2 - to as u128),
            peer_replica: record.peer_replica,
            arbiter: record.arbiter,
            data_size: STORE,
            mirror_size: record.mirror_size,
            generation: record.generation,
            ancestry: record.ancestry.clone(),
            unused_ancestors: record.unused_ancestors,
            holders: record.holders,
            disk: if born {
                DiskState::Consistent
            } else {
                DiskState::Inconsistent
            },
            role: Role::Secondary,
            was_primary: record.primary,
            used: record.used,
            stayed_up: false,
            discard: false,
            dirty_bytes: 0,
        };
        for _ in 0..script.u8() % 4 {
            match script.u8() % 16 {
                0 => hello.generation = self.generation(to, script),
                1 => {
                    hello.ancestry.insert(0, self.generation(to, script));
                    hello.unused_ancestors += 1;
                }
                2 => hello.ancestry.clear(),
                3 => hello.disk = *script.pick(&DISKS),
                4 => hello.role = *script.pick(&ROLES),
                5 => hello.was_primary = script.flag(),
                6 => hello.used = script.flag(),
                7 => hello.stayed_up = script.flag(),
                8 => hello.discard = script.flag(),
                9 => hello.dirty_bytes = script.u64(),
                10 => hello.mirror_size = size(script),
                11 => hello.data_size = size(script),
                12 => hello.peer_replica = ReplicaId(script.u8().into()),
                13 => hello.holders = self.hosts[to].record.holders,
                14 => hello.mirror = self.hosts[to].record.mirror,
                _ => hello.versions = (script.u8().into(), script.u8().into()),
            }
        }
        hello.ancestry.truncate(64);
        let most = hello.ancestry.len().saturating_sub(1) as u8;
        hello.unused_ancestors = hello.unused_ancestors.min(most);
        hello
    }

    fn lineage(&self, to: usize, script: &mut Bytes<'_>) -> Lineage {
        let what = script.u8();
        let from = if what & 1 == 0 { 1 - to } else { to };
        let record: &Superblock = &self.hosts[from].record;
        let mut lineage = Lineage {
            mirror: record.mirror,
            mirror_size: record.mirror_size,
            generation: record.generation,
            ancestry: record.ancestry.clone(),
            unused_ancestors: record.unused_ancestors,
            whole: what & 2 != 0,
        };
        if what & 4 != 0 {
            lineage.ancestry.insert(0, record.generation);
            lineage.generation = self.generation(to, script);
        }
        if what & 8 != 0 {
            lineage.mirror_size = size(script);
        }
        if what & 16 != 0 {
            lineage.mirror.0 += 1;
        }
        lineage.ancestry.truncate(64);
        lineage
    }

    fn generation(&self, to: usize, script: &mut Bytes<'_>) -> Generation {
        let own = self.hosts[to].record.generation;
        let theirs = self.hosts[1 - to].record.generation;
        let counters = [
            own.counter,
            own.counter.saturating_add(1),
            own.counter.saturating_add(9),
            1 << 61,
            1 << 62,
            (1 << 62) + 1,
            u64::MAX,
            0,
        ];
        let ids = [GenerationId(7 << 64), own.id, theirs.id, GenerationId::NONE];
        Generation {
            counter: *script.pick(&counters),
            id: *script.pick(&ids),
        }
    }

    /// A generation's tag as frames carry it: mostly the right one.
    fn tag(&self, to: usize, script: &mut Bytes<'_>) -> u64 {
        let record = &self.hosts[to].record;
        match script.u8() {
            0 => 0,
            1 => record.ancestry.first().map_or(1, |before| before.tag()),
            2 => script.u64(),
            _ => record.generation.tag(),
        }
    }

    /// A request's number: one of the latest, or one like them.
    fn id(&self, to: usize, script: &mut Bytes<'_>) -> u64 {
        let ids = &self.hosts[to].ids;
        let which = usize::from(script.u8());
        match ids.get(which) {
            Some(id) => *id,
            None if which & 1 == 0 => script.u64(),
            None => (which as u64 & 7) << 60 | u64::from(script.u8()),
        }
    }
}

const ROLES: [Role; 3] = [Role::Primary, Role::Secondary, Role::Unknown];

const DISKS: [DiskState; 7] = [
    DiskState::Unknown,
    DiskState::Diskless,
    DiskState::Failed,
    DiskState::Inconsistent,
    DiskState::Outdated,
    DiskState::Consistent,
    DiskState::UpToDate,
];

fn heard(header: &Header, body: Body) -> HeardBody {
    match body {
        Body::None => HeardBody::Control(Vec::new()),
        Body::Control(bytes) => HeardBody::Control(bytes),
        Body::Data(_) => HeardBody::Data {
            crc: header.payload_crc,
        },
    }
}

/// A place on the device, mostly.
fn offset(script: &mut Bytes<'_>) -> u64 {
    match script.u8() {
        0 => script.u64(),
        1 => STORE,
        2 => STORE - 4096,
        3 => u64::MAX - 511,
        4 => u64::from(script.u16()) * 512,
        blocks => u64::from(blocks) * 4096,
    }
}

/// The length of a request, mostly.
fn length(script: &mut Bytes<'_>) -> u32 {
    match script.u8() {
        0 => script.u32(),
        1 => 512,
        2 => 256 << 10,
        3 => 32 << 20,
        4 => STORE as u32,
        blocks => u32::from(blocks % 16) * 4096,
    }
}

fn size(script: &mut Bytes<'_>) -> u64 {
    let sizes = [
        0,
        1 << 20,
        2 << 20,
        STORE - 4096,
        STORE,
        STORE + 4096,
        1 << 40,
    ];
    *script.pick(&sizes)
}

/// Every situation with a frame forged into it that is taken, and some ordinary courses.
pub fn seeds() -> Vec<Vec<u8>> {
    // A number of the peer is asked for with a byte beyond the table of those remembered, then the
    // eight bytes of zeroes that follow the end of a script.
    let forge = |to: u8, kind: u8, rest: &[u8]| {
        let mut step = vec![to << 7 | 6, kind, 0, 9, 17, 0];
        step.extend(rest);
        step
    };
    let ping = forge(1, 4, &[9, 9]);
    let state = forge(1, 6, &[0, 6, 0]);
    let mut seeds = vec![
        [vec![0, 15], ping.clone(), vec![0]].concat(),
        [vec![1], ping.clone(), vec![0]].concat(),
    ];
    for situation in [2, 4] {
        let write = vec![21, 1, 9, 9];
        seeds.push(
            [
                vec![situation],
                state.clone(),
                write,
                vec![0],
                ping.clone(),
                vec![0],
            ]
            .concat(),
        );
    }
    for situation in [3, 5] {
        seeds.push([vec![situation, 15], ping.clone(), vec![0]].concat());
    }
    seeds
}
