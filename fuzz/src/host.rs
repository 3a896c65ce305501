//! A node with a disk and one end of a link, whose driver looks at everything that is asked of it
//! and refuses what no driver could carry out.

use mirror_core::control::{self, NodeStatus, Response};
use mirror_core::limits::{
    ACTIVITY_LOG_SLOTS, BLOCK, MAX_PAYLOAD, RESYNC_CHUNK, SECTOR, ZERO_PIECE,
};
use mirror_core::meta::activity_log::Transaction;
use mirror_core::meta::bitmap::{BITS_LEN, Bitmap};
use mirror_core::meta::superblock::Superblock;
use mirror_core::meta::{self, ACTIVITY_LOG_BLOCKS, Layout, META_BLOCK, NewReplica};
use mirror_core::node::boundary::{
    Action, Actions, Body, CommandId, ConnectionId, DiskError, GuestOperation, Input, OpId,
    Payload, RequestId,
};
use mirror_core::node::{MetadataPlace, Node, NodeConfig};
use mirror_core::types::{ArbiterId, BootId, ByteRange, CopyRates, Digest, ReplicaId, Time};
use mirror_core::wire::message::{Goodbye, Hello, Lineage, PeerState};
use mirror_core::wire::{FrameType, Header, PayloadKind};
use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Duration;

/// Bytes of a host's store: two extents, 32 chunks of a resync.
pub const STORE: u64 = 8 << 20;

/// More steps than any honest exchange on such a store takes.
const RESTLESS: usize = 20_000;

/// The metadata of a new replica on a store of [`STORE`] bytes.
pub fn image(replica: ReplicaId) -> (Vec<u8>, Layout) {
    image_for(replica, "a")
}

fn image_for(replica: ReplicaId, node: &str) -> (Vec<u8>, Layout) {
    let layout = Layout::new(STORE, MetadataPlace::External).expect("a good size");
    let mut metadata = vec![0; layout.external_size() as usize];
    let new = NewReplica {
        replica,
        cluster: "c".into(),
        mirror: "r0".into(),
        node: node.into(),
    };
    for (offset, bytes) in meta::create(&layout, &new) {
        metadata[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
    }
    (metadata, layout)
}

/// A disk operation that has not ended.
enum Pending {
    Read { len: u32, checksum: bool },
    Digest { blocks: usize },
    Data,
    MetaRead { offset: usize, len: usize },
    MetaWrite { offset: usize, bytes: Vec<u8> },
}

/// A node and what its driver knows.
pub struct Host {
    node: Node,
    config: NodeConfig,
    layout: Layout,
    metadata: Vec<u8>,
    lives: u128,
    pub now: Time,
    actions: Actions,
    operations: VecDeque<(OpId, Pending)>,
    /// Buffers that the core holds, and their lengths.
    held: HashMap<u32, u32>,
    next_buffer: u32,
    /// Requests without an answer, and what a read is to bring.
    requests: HashMap<RequestId, u32>,
    commands: HashSet<CommandId>,
    asked: u64,
    detached: bool,
    /// Connections are wanted.
    pub seeking: bool,
    /// The connection that stands, from this side.
    pub connection: Option<ConnectionId>,
    /// Frames for the peer.
    pub sent: VecDeque<(Header, Body)>,
    /// The superblock that was found or written last.
    pub record: Superblock,
    /// Numbers of the latest requests to the peer.
    pub ids: VecDeque<u64>,
    /// The latest verdict sent.
    pub verdict: Vec<u8>,
}

impl Host {
    /// A node called `node` on a new replica.
    pub fn created(node: &str, peer: &str, replica: ReplicaId) -> Host {
        let (metadata, layout) = image_for(replica, node);
        Host::new(node, peer, metadata, layout)
    }

    /// Node `a` on metadata of whatever content.
    pub fn found(metadata: Vec<u8>, layout: Layout) -> Host {
        Host::new("a", "b", metadata, layout)
    }

    fn new(node: &str, peer: &str, metadata: Vec<u8>, layout: Layout) -> Host {
        let config = NodeConfig {
            cluster: "c".into(),
            mirror: "r0".into(),
            node: node.into(),
            peer: peer.into(),
            metadata: MetadataPlace::External,
            stall_timeout: Duration::from_secs(2),
            copy_rates: CopyRates::default(),
            arbiter: ArbiterId::NONE,
            lease: Duration::from_secs(1),
            log_extents: ACTIVITY_LOG_SLOTS,
        };
        Host {
            node: Node::new(config.clone(), ids(&config, 0)),
            config,
            layout,
            metadata,
            lives: 0,
            now: Time(1),
            actions: Vec::new(),
            operations: VecDeque::new(),
            held: HashMap::new(),
            next_buffer: 0,
            requests: HashMap::new(),
            commands: HashSet::new(),
            asked: 0,
            detached: false,
            seeking: false,
            connection: None,
            sent: VecDeque::new(),
            record: Superblock::unborn(ReplicaId::NONE, layout.data_size),
            ids: VecDeque::new(),
            verdict: Vec::new(),
        }
    }

    /// Calls the node as its disk says it is called.
    pub fn take_names(&mut self, superblock: &Superblock) {
        self.config.cluster.clone_from(&superblock.cluster);
        self.config.mirror.clone_from(&superblock.mirror_name);
        self.config.node.clone_from(&superblock.node);
        self.node = Node::new(self.config.clone(), ids(&self.config, self.lives));
    }

    pub fn attach(&mut self) {
        let slot = |index| {
            let at = self.layout.slot_offset(index) as usize;
            Superblock::parse(&self.metadata[at..at + META_BLOCK as usize])
        };
        if let Ok(record) = Superblock::trust([slot(0), slot(1)], &self.layout) {
            self.record = record;
        }
        self.feed(Input::Attach {
            store_size: self.layout.data_size,
            boot: BootId(50),
        });
    }

    /// Attaches, and lets the disk answer until nothing more is asked of it.
    pub fn attach_and_settle(&mut self) {
        self.attach();
        self.complete_all();
    }

    /// The daemon ends without a word, and starts again. Metadata on its way was written or not.
    pub fn restart(&mut self, written: bool) {
        if written {
            while let Some((_, operation)) = self.operations.pop_front() {
                self.write_metadata(&operation);
            }
        }
        self.lives += 1;
        self.node = Node::new(self.config.clone(), ids(&self.config, self.lives));
        self.operations.clear();
        self.held.clear();
        self.requests.clear();
        self.commands.clear();
        self.detached = false;
        self.seeking = false;
        self.connection = None;
        self.sent.clear();
        self.attach();
    }

    /// Disk operations that have not ended.
    pub fn in_flight(&self) -> usize {
        self.operations.len()
    }

    /// Ends all disk operations well, and those that follow.
    pub fn complete_all(&mut self) {
        for _ in 0..RESTLESS {
            if self.operations.is_empty() {
                return;
            }
            self.complete(0, Ok(()));
        }
        panic!("the disk never comes to rest");
    }

    /// Ends the `at`-th disk operation in flight.
    pub fn complete(&mut self, at: usize, result: Result<(), DiskError>) {
        let Some((op, operation)) = self.operations.remove(at) else {
            return;
        };
        if result.is_ok() {
            self.write_metadata(&operation);
        }
        let input = match operation {
            Pending::Read { len, checksum } => {
                let result = result.map(|()| {
                    let crc = if checksum { len } else { 0 };
                    Some(self.give(len, crc, checksum && len % 8192 == 0))
                });
                Input::DiskDone { op, result }
            }
            Pending::Digest { blocks } => Input::Digested {
                op,
                result: result.map(|()| vec![Digest(1); blocks]),
            },
            Pending::Data => Input::DiskDone {
                op,
                result: result.map(|()| None),
            },
            Pending::MetaRead { offset, len } => Input::MetaDone {
                op,
                result: result.map(|()| self.metadata[offset..offset + len].to_vec()),
            },
            Pending::MetaWrite { .. } => Input::MetaDone {
                op,
                result: result.map(|()| Vec::new()),
            },
        };
        self.feed(input);
    }

    fn write_metadata(&mut self, operation: &Pending) {
        if let Pending::MetaWrite { offset, bytes } = operation {
            self.metadata[*offset..*offset + bytes.len()].copy_from_slice(bytes);
        }
    }

    /// A fresh buffer for the core.
    pub fn give(&mut self, len: u32, crc: u32, zero: bool) -> Payload {
        let buffer = self.next_buffer;
        self.next_buffer += 1;
        self.held.insert(buffer, len);
        Payload {
            buffer,
            len,
            crc,
            zero,
        }
    }

    pub fn ask(&mut self, operation: GuestOperation) {
        self.asked += 1;
        let request = RequestId(self.asked);
        let brings = match operation {
            GuestOperation::Read(range) => range.len() as u32,
            _ => 0,
        };
        self.requests.insert(request, brings);
        self.feed(Input::Guest { request, operation });
    }

    pub fn command(&mut self, what: control::Command) {
        self.asked += 1;
        let command = CommandId(self.asked);
        self.commands.insert(command);
        self.feed(Input::Command { command, what });
    }

    /// A frame of the peer, as a driver hands it on; whether it was one.
    pub fn hear(&mut self, connection: ConnectionId, header: Header, body: HeardBody) -> bool {
        let Ok(header) = Header::decode(&header.encode()) else {
            return false;
        };
        let body = match (header.kind.payload_kind(), body) {
            (PayloadKind::None, _) => Body::None,
            (PayloadKind::Data { .. }, HeardBody::Data { crc }) => {
                Body::Data(self.give(header.payload_len, crc, false))
            }
            (PayloadKind::Control { .. }, HeardBody::Control(bytes))
                if bytes.len() == header.payload_len as usize =>
            {
                Body::Control(bytes)
            }
            _ => return false,
        };
        self.feed(Input::Frame {
            connection,
            header,
            body,
        });
        true
    }

    pub fn feed(&mut self, input: Input) {
        let mut actions = std::mem::take(&mut self.actions);
        self.node.handle(self.now, input, &mut actions);
        for action in actions.drain(..) {
            self.carry_out(action);
        }
        self.actions = actions;
        assert!(
            self.node.next_deadline().is_none_or(|due| due > self.now),
            "a deadline in the past"
        );
    }

    /// What an operator is shown can be shown.
    pub fn look(&self) {
        let status = self.node.status(self.now);
        for reason in &status.reasons {
            crate::assert_harmless(reason);
        }
        let status = Response::Status(NodeStatus {
            schema: 1,
            node: self.config.node.clone(),
            mirrors: vec![status],
        });
        control::encode(&status).expect("a status of bounded length");
    }

    /// Without a peer, a guest or work on the disk nothing may be held.
    pub fn assert_nothing_is_kept(&self) {
        if self.requests.is_empty() && self.operations.is_empty() && self.connection.is_none() {
            assert!(
                self.held.is_empty(),
                "buffers never released: {:?}",
                self.held
            );
        }
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::Read {
                op,
                range,
                checksum,
            } => {
                self.assert_on_disk(range, MAX_PAYLOAD.into());
                let len = range.len() as u32;
                self.start(op, Pending::Read { len, checksum });
            }
            Action::Digest { op, range } => {
                self.assert_on_disk(range, RESYNC_CHUNK);
                assert!(range.start.is_multiple_of(BLOCK), "{range:?}");
                let blocks = range.len().div_ceil(BLOCK) as usize;
                self.start(op, Pending::Digest { blocks });
            }
            Action::Write {
                op,
                offset,
                payload,
                ..
            } => {
                self.assert_held(payload);
                let range = ByteRange::new(offset, payload.len.into());
                self.assert_on_disk(range, MAX_PAYLOAD.into());
                self.start(op, Pending::Data);
            }
            Action::Zero { op, range, .. } => {
                self.assert_on_disk(range, ZERO_PIECE);
                self.start(op, Pending::Data);
            }
            Action::Flush { op } => self.start(op, Pending::Data),
            Action::MetaRead { op, offset, len } => {
                self.assert_in_metadata(offset, len.into());
                let (offset, len) = (offset as usize, len as usize);
                self.start(op, Pending::MetaRead { offset, len });
            }
            Action::MetaWrite { op, offset, bytes } => {
                self.assert_in_metadata(offset, bytes.len() as u64);
                self.assert_readable(offset, &bytes);
                let offset = offset as usize;
                self.start(op, Pending::MetaWrite { offset, bytes });
            }
            Action::StartConnecting => self.seeking = true,
            Action::StopConnecting => self.seeking = false,
            Action::Close { connection } => {
                assert!(self.connection.is_some(), "{connection:?} closed twice");
                assert_eq!(self.connection.take(), Some(connection));
            }
            Action::Send {
                connection,
                header,
                body,
            } => {
                assert_eq!(self.connection, Some(connection), "{header:?}");
                self.assert_sendable(header, &body);
                self.remember(header, &body);
                self.sent.push_back((header, body));
            }
            Action::Complete { request, result } => {
                let brings = self.requests.remove(&request);
                let brings = brings.unwrap_or_else(|| panic!("{request:?} answered twice"));
                match result {
                    Ok(Some(payload)) => {
                        assert_eq!(payload.len, brings);
                        self.release(payload);
                    }
                    Ok(None) => assert_eq!(brings, 0, "a read without data"),
                    Err(_) => {}
                }
            }
            Action::Release(payload) => self.release(payload),
            Action::CommandDone { command, result } => {
                assert!(self.commands.remove(&command), "{command:?} answered twice");
                match result {
                    Ok(outcome) => outcome
                        .warnings
                        .iter()
                        .for_each(|w| crate::assert_harmless(w)),
                    Err(refusal) => crate::assert_harmless(&refusal.message),
                }
            }
            Action::Serve(_) => assert!(!self.detached),
            Action::Detached => {
                assert!(!self.detached, "detached twice");
                self.detached = true;
            }
            Action::AskArbiter { .. } => panic!("a node without an arbiter asks one"),
            Action::Event(event) => crate::assert_harmless(&event.text),
        }
    }

    fn start(&mut self, op: OpId, operation: Pending) {
        assert!(!self.detached, "the store is closed");
        let twice = self.operations.iter().any(|(known, _)| *known == op);
        assert!(!twice, "{op:?} is in flight already");
        self.operations.push_back((op, operation));
    }

    fn release(&mut self, payload: Payload) {
        self.assert_held(payload);
        self.held.remove(&payload.buffer);
    }

    #[track_caller]
    fn assert_held(&self, payload: Payload) {
        let len = self.held.get(&payload.buffer);
        assert_eq!(len, Some(&payload.len), "{payload:?} is not the core's");
    }

    #[track_caller]
    fn assert_on_disk(&self, range: ByteRange, longest: u64) {
        let aligned = range.start.is_multiple_of(SECTOR) && range.end.is_multiple_of(SECTOR);
        let fits = range.start < range.end && range.end <= self.layout.data_size;
        assert!(aligned && fits && range.len() <= longest, "{range:?}");
    }

    #[track_caller]
    fn assert_in_metadata(&self, offset: u64, len: u64) {
        let aligned = offset.is_multiple_of(META_BLOCK) && len.is_multiple_of(META_BLOCK);
        let fits = len > 0 && offset + len <= self.metadata.len() as u64;
        assert!(aligned && fits, "metadata at {offset}, {len} bytes");
    }

    /// The next attach must be able to read what is written.
    fn assert_readable(&mut self, offset: u64, bytes: &[u8]) {
        let layout = self.layout;
        for (block, at) in bytes.chunks(META_BLOCK as usize).zip(0..) {
            let offset = offset + at * META_BLOCK;
            if offset >= layout.bitmap_offset {
                let index = (offset - layout.bitmap_offset) / META_BLOCK;
                let mut bitmap = Bitmap::new(layout.data_size);
                assert!(bitmap.load(index, block, self.record.replica));
            } else if offset >= layout.activity_log_offset(0) {
                assert!(offset < layout.activity_log_offset(ACTIVITY_LOG_BLOCKS));
                let log = Transaction::decode(block, self.record.replica).expect("a log");
                assert_eq!(layout.activity_log_offset(log.ring_index()), offset);
            } else {
                let slot = Superblock::parse(block).expect("a superblock");
                let superblock = slot.untrusted();
                assert_eq!(layout.slot_offset(superblock.slot()), offset);
                let slots = [Ok(slot.clone()), Ok(slot.clone())];
                Superblock::trust(slots, &layout).expect("it fits the store");
                self.record.clone_from(superblock);
            }
        }
    }

    /// The peer must be able to read what is sent.
    fn assert_sendable(&self, header: Header, body: &Body) {
        assert_eq!(Header::decode(&header.encode()), Ok(header));
        let kind = header.kind;
        match body {
            Body::None => assert_eq!(header.payload_len, 0),
            Body::Data(payload) => {
                self.assert_held(*payload);
                assert!(matches!(kind.payload_kind(), PayloadKind::Data { .. }));
                let (len, crc) = (header.payload_len, header.payload_crc);
                assert_eq!((len, crc), (payload.len, payload.crc));
            }
            Body::Control(bytes) => {
                assert!(matches!(kind.payload_kind(), PayloadKind::Control { .. }));
                assert_eq!(header.payload_len as usize, bytes.len());
                assert_eq!(header.payload_crc, crc32fast::hash(bytes));
                let good = match kind {
                    FrameType::Hello => Hello::decode(bytes).is_ok(),
                    FrameType::SyncStart | FrameType::Promote => {
                        Lineage::decode(kind, bytes).is_ok()
                    }
                    FrameType::State => PeerState::decode(bytes).is_ok(),
                    FrameType::Goodbye => Goodbye::decode(bytes).is_ok(),
                    FrameType::SyncBits => bytes.len() == BITS_LEN,
                    _ => true,
                };
                assert!(good, "{header:?} with {bytes:?}");
            }
        }
    }

    fn remember(&mut self, header: Header, body: &Body) {
        const REMEMBERED: usize = 16;
        if let (FrameType::Verdict, Body::Control(bytes)) = (header.kind, body) {
            self.verdict.clone_from(bytes);
        }
        if header.id != 0 {
            self.ids.push_back(header.id);
            if self.ids.len() > REMEMBERED {
                self.ids.pop_front();
            }
        }
    }
}

/// What came with a frame, before the core's driver makes it its own.
pub enum HeardBody {
    /// Nothing, or bytes for the core.
    Control(Vec<u8>),
    /// Data with this checksum.
    Data {
        /// Of the bytes that came.
        crc: u32,
    },
}

/// A life's random ids: no two are alike, and each run has the same.
fn ids(config: &NodeConfig, life: u128) -> Box<dyn FnMut() -> u128 + Send> {
    let node = u128::from(config.node.as_bytes().first().copied().unwrap_or(1));
    let mut id = (node << 8 | life) << 96;
    Box::new(move || {
        id += 1 << 64;
        id
    })
}
