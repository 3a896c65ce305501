//! The state machine of one replica of one mirror.
//!
//! [`Node::handle`] is the whole of it: one [`boundary::Input`] in, [`boundary::Action`]s out. The
//! rest of this directory is that function cut by who owns the fields, in reading order:
//!
//! | module | owns |
//! |---|---|
//! | [`boundary`] | what can happen and what can be asked for |
//! | `request`, `request_table` | guest requests and their gates |
//! | `ordering` | overlapping ranges; when a write may be acknowledged |
//! | `activity` | the activity log and the unsettled set |
//! | `records` | making superblock, bitmap and log durable |
//! | `link` | finding the peer, and noticing that it is gone |
//! | `agreement`, `handshake` | the handshake's exchange, and its truth table |
//! | `arbitration` | the right to go on alone, and leases |
//! | `transition`, `effect` | changes of role, generation and holders, stage by stage |
//! | `resync` | making the peer's replica equal again |
//! | `compare` | digests of one range on both replicas |
//! | `verify` | comparing the two replicas |
//! | `pace` | how fast those two go |
//! | `replica` | the peer's writes on this disk |
//! | `commands`, `attach`, `status`, `timer`, `operation` | the rest |

mod activity;
mod agreement;
mod arbitration;
mod attach;
pub mod boundary;
mod commands;
mod compare;
mod effect;
pub(crate) mod handshake;
mod link;
mod operation;
mod ordering;
mod pace;
mod records;
mod replica;
mod request;
mod request_table;
mod resync;
mod status;
mod timer;
mod transition;
mod verify;

pub use status::Standing;

use crate::error::{ErrorId, Refusal};
use crate::meta::Layout;
use crate::meta::activity_log::Transaction;
use crate::meta::bitmap::Bitmap;
use crate::meta::superblock::Superblock;
use crate::types::{
    ArbiterId, BootId, ByteRange, CopyRates, Digest, DiskState, Generation, ReplicaId, Role, Time,
};
use crate::wire::message::{Hello, PeerState};
use crate::wire::{FrameType, Header};
use activity::ActivityLog;
use arbitration::Arbitration;
use boundary::{
    Action, Actions, Body, CommandId, ConnectionId, DiskError, Event, GuestError, Input, Payload,
    Severity,
};
use link::{AfterLoss, Link, PeerTag, SlowPeer};
use operation::{Operations, Purpose};
use ordering::RangeLocks;
use pace::Pace;
use records::RecordQueue;
use request_table::Requests;
use status::Totals;
use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;
use timer::{Timer, Timers};
use transition::Transition;
use verify::Verify;

/// What a node is told about itself when it is made: the configuration of one mirror, as this
/// node sees it.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// The cluster's name.
    pub cluster: String,
    /// The mirror's name.
    pub mirror: String,
    /// This node's name.
    pub node: String,
    /// The peer's name.
    pub peer: String,
    /// Where the metadata is.
    pub metadata: MetadataPlace,
    /// How long a silent peer may hold a guest's write (R11).
    pub stall_timeout: Duration,
    /// Whom the mirror's record is kept with; [`ArbiterId::NONE`] for nobody. The driver reaches
    /// it on [`boundary::Action::AskArbiter`].
    pub arbiter: ArbiterId,
    /// How fast a resync or a verify may go, and is to.
    pub copy_rates: CopyRates,
    /// How long the peer's word lets a Primary answer reads (R4); both nodes alike.
    pub lease: Duration,
    /// Extents that the activity log keeps active at once: [`crate::limits::ACTIVITY_LOG_SLOTS`], or
    /// fewer where the log is to be full all the time. One request must find room in it.
    pub log_extents: usize,
}

/// Where a replica's metadata is kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MetadataPlace {
    /// At the tail of the data store itself.
    Internal,
    /// In a file or device of its own.
    External,
}

/// A source of random ids.
struct IdSource(Box<dyn FnMut() -> u128 + Send>);

impl fmt::Debug for IdSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("IdSource")
    }
}

/// How far the node is with its disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    New,
    /// Reading metadata.
    Attaching,
    /// Bringing the metadata on disk up to what a crash requires.
    Settling,
    Running,
    /// The disk is not used any more; operations on it are still in flight.
    Closing,
    /// The disk is not used (any more).
    Closed,
}

/// One replica of one mirror.
#[derive(Debug)]
pub struct Node {
    config: NodeConfig,
    id_source: IdSource,
    now: Time,
    out: Actions,
    timers: Timers,
    ops: Operations,
    phase: Phase,

    // The disk and what is durable on it.
    boot: BootId,
    layout: Layout,
    disk: DiskState,
    record: Superblock,
    records: RecordQueue,
    bitmap: Bitmap,
    /// Writes of bitmap blocks in flight.
    saving: usize,
    log: ActivityLog,
    /// Whether a flush since the attach has covered what was written before it.
    old_writes_durable: bool,
    /// The log as attach found it.
    found_log: Option<Transaction>,
    /// Something happened that may move the activity log on.
    log_wanted: bool,
    /// A local flush that settles writes is in flight.
    settling: bool,
    /// Whether `used` of the present generation is set on disk.
    use_is_durable: bool,

    // The guest.
    role: Role,
    serving: bool,
    requests: Requests,
    locks: RangeLocks,
    /// When a guest last asked for something.
    guest_active: Time,
    /// What submitted requests wait for may have changed.
    acknowledgements_due: bool,
    counters: Totals,

    // The peer.
    link: Link,
    transition: Transition,
    arbitration: Arbitration,
    heartbeat_due: Time,
    slow_peer: SlowPeer,
    /// A hello that came before this node was at rest.
    early_hello: Option<Hello>,
    /// What the peer said when it parted last.
    parted: Option<String>,
    /// Why the link stands alone, or the disk is not used.
    refusal: Option<Refusal>,
    /// An operator said that this side's data may go.
    discard: bool,
    /// The peer went on alone; to be recorded.
    outdated_by: Option<Generation>,
    /// Whether the peer was met since the search began, and when it began.
    met_peer: bool,
    search_since: Time,
    /// Whether the last promotion was that of a sole holder.
    was_sole: bool,

    // Resync.
    chunk_serial: u32,
    checkpoint_due: bool,
    resync_paused: bool,
    /// Of a target: what flushes of the peer in flight will have made durable, oldest first.
    flushing_copied: VecDeque<Vec<ByteRange>>,
    /// The command that threw this copy away, until it is recorded.
    invalidating: Option<CommandId>,

    commands: VecDeque<commands::Waiting>,

    /// The comparison under way, or the last one.
    verify: Option<Verify>,
    /// An operator wants the next resync to send only what differs.
    by_checksum: bool,
    pace: Pace,
}

impl Node {
    /// A node that has not met its disk yet. `new_id` draws a random 128-bit id per call.
    pub fn new(config: NodeConfig, new_id: Box<dyn FnMut() -> u128 + Send>) -> Node {
        Node {
            config,
            id_source: IdSource(new_id),
            now: Time::default(),
            out: Vec::new(),
            timers: Timers::default(),
            ops: Operations::default(),
            phase: Phase::New,
            boot: BootId::NONE,
            layout: Layout {
                data_size: 0,
                header_offset: 0,
                bitmap_offset: 0,
                bitmap_blocks: 0,
            },
            disk: DiskState::Diskless,
            record: Superblock::unborn(ReplicaId::NONE, 0),
            records: RecordQueue::default(),
            bitmap: Bitmap::new(0),
            saving: 0,
            log: ActivityLog::new(0, 0, 0, false),
            old_writes_durable: false,
            found_log: None,
            log_wanted: false,
            settling: false,
            use_is_durable: false,
            role: Role::Secondary,
            serving: false,
            requests: Requests::default(),
            locks: RangeLocks::default(),
            guest_active: Time::default(),
            acknowledgements_due: false,
            counters: Totals::default(),
            link: Link::StandAlone,
            transition: Transition::default(),
            arbitration: Arbitration::default(),
            heartbeat_due: Time::default(),
            slow_peer: SlowPeer::default(),
            early_hello: None,
            parted: None,
            refusal: None,
            discard: false,
            outdated_by: None,
            met_peer: false,
            search_since: Time::default(),
            was_sole: false,
            chunk_serial: 0,
            checkpoint_due: false,
            resync_paused: false,
            flushing_copied: VecDeque::new(),
            invalidating: None,
            commands: VecDeque::new(),
            verify: None,
            by_checksum: false,
            pace: Pace::default(),
        }
    }

    /// Takes one input at time `now` (never before an earlier call's) and appends what is to be
    /// done to `actions`.
    pub fn handle(&mut self, now: Time, input: Input, actions: &mut Actions) {
        self.now = now;
        std::mem::swap(&mut self.out, actions);
        match input {
            Input::Attach { store_size, boot } => self.attach(store_size, boot),
            Input::Tick => {}
            Input::Guest { request, operation } => self.guest_arrives(request, operation),
            Input::DiskDone { op, result } => self.disk_done(op, result),
            Input::Digested { op, result } => self.digested(op, result),
            Input::MetaDone { op, result } => self.meta_done(op, result),
            Input::LinkUp { connection } => self.link_up(connection),
            Input::LinkDown { connection } => self.link_down(connection),
            Input::Frame {
                connection,
                header,
                body,
            } => self.frame(connection, header, body),
            Input::Heard { connection } => self.part_arrived(connection),
            Input::Arbiter { ask, answer } => self.arbiter_answers(ask, answer),
            Input::Command { command, what } => self.command_arrives(command, what),
        }
        while let Some(timer) = self.timers.take_due(now) {
            self.timer_fired(timer);
        }
        self.follow_up();
        std::mem::swap(&mut self.out, actions);
    }

    /// When the node wants an [`Input::Tick`], if at all.
    pub fn next_deadline(&self) -> Option<Time> {
        self.timers.next()
    }

    /// The id of the replica on this node's disk, once the disk was attached.
    pub fn replica(&self) -> Option<ReplicaId> {
        let attached = !matches!(self.phase, Phase::New | Phase::Attaching | Phase::Settling);
        (attached && !self.record.replica.is_none()).then_some(self.record.replica)
    }

    /// Why the disk is not used or the link stands alone, as an operator is told.
    pub fn refusal(&self) -> Option<&Refusal> {
        self.refusal.as_ref()
    }

    /// Whether no operation, request or transition is under way.
    pub fn is_at_rest(&self) -> bool {
        self.ops.len() == 0 && self.requests.len() == 0 && self.transition.is_idle()
    }

    /// Does what the input made possible, until nothing more is.
    fn follow_up(&mut self) {
        loop {
            match self.phase {
                Phase::Settling => self.settle_metadata(),
                Phase::Running => self.keep_running(),
                Phase::Closing => self.close_at_rest(),
                Phase::New | Phase::Attaching | Phase::Closed => {}
            }
            // An acknowledgement or a command may make more possible, and nothing else need ever
            // come: a guest may wait for just this answer, and without a peer no timer runs.
            let running = self.phase == Phase::Running;
            let more = running && (self.log_wanted || self.acknowledgements_due);
            if !(self.pump_commands() || more) {
                return;
            }
        }
    }

    fn keep_running(&mut self) {
        self.poll_transition();
        if self.phase != Phase::Running {
            // The transition was the last one: nothing more touches the store.
            return;
        }
        self.start_waiting_transition();
        self.settle_proposal();
        self.prefer_peer_to_arbiter();
        self.try_greet();
        self.retry_gate();
        self.retry_held_frames();
        if self.log_wanted {
            self.pump_log();
        }
        if std::mem::take(&mut self.acknowledgements_due) {
            self.retry_acknowledgements();
            self.start_waiting_transition();
        }
        self.watch_lease();
        self.pump_resync();
        self.pump_verify();
        self.forget_all_dirty();
        self.tell_peer();
    }

    /// Once every bitmap block is on disk, the bitmap alone says what is dirty: an interrupted
    /// full sync then goes on where it was.
    fn forget_all_dirty(&mut self) {
        let born = !self.record.generation.is_unborn();
        if self.record.all_dirty && born && self.transition.is_idle() && self.bitmap_is_saved() {
            self.record.all_dirty = false;
            self.commit(records::Then::Nothing);
        }
    }

    fn timer_fired(&mut self, timer: Timer) {
        match timer {
            Timer::Heartbeat => self.heartbeat(),
            Timer::Handshake => self.handshake_timed_out(),
            Timer::Reconnect => self.search(),
            Timer::Checkpoint => self.checkpoint_due = true,
            // The waiting command is looked at again, and finds its patience gone.
            Timer::CommandPatience => {}
            // Whatever happens lets resync and verify look whether they may go on.
            Timer::Pace => {}
            Timer::Invalidation => self.invalidation_timed_out(),
            Timer::Arbiter => self.arbiter_is_late(),
            // Who waits for a lease, or for its end, is looked at again.
            Timer::Lease => self.acknowledgements_due = true,
        }
    }

    fn disk_done(&mut self, op: boundary::OpId, result: Result<Option<Payload>, DiskError>) {
        let Some(purpose) = self.ops.finish(op) else {
            return;
        };
        if self.is_disk_given_up() {
            if let Ok(Some(payload)) = result {
                self.out.push(Action::Release(payload));
            }
            return;
        }
        match (purpose, result) {
            (Purpose::Guest(key), result) => self.guest_disk_done(key, result),
            (
                Purpose::Peer {
                    connection,
                    id,
                    resync,
                },
                result,
            ) => {
                self.peer_write_done(connection, id, resync, result.map(|_| ()));
            }
            (Purpose::PeerFlush { connection, id }, result) => {
                self.peer_flush_done(connection, id, result.map(|_| ()));
            }
            (Purpose::Chunk(serial), Ok(Some(payload))) => self.chunk_read(serial, payload),
            (Purpose::Chunk(serial), _) => self.chunk_unreadable(serial),
            (Purpose::Settle { upto }, Ok(_)) => {
                self.settling = false;
                self.log.local_flushed(upto);
                self.log_wanted = true;
            }
            (Purpose::Step(serial), Ok(_)) => self.step_flushed_here(serial),
            (Purpose::AttachFlush, Ok(_)) => self.attach_flushed(),
            (Purpose::AttachFlush, Err(error)) => self.attach_io_failed(error),
            (_, Err(error)) => self.fail_disk(error),
            (_, Ok(_)) => {}
        }
    }

    fn digested(&mut self, op: boundary::OpId, result: Result<Vec<Digest>, DiskError>) {
        let purpose = self.ops.finish(op);
        if self.is_disk_given_up() {
            return;
        }
        match purpose {
            Some(Purpose::Piece(serial)) => self.piece_digested(serial, result),
            Some(Purpose::ChunkDigests(serial)) => self.chunk_digested(serial, result),
            Some(Purpose::PeerPiece { connection, id }) => {
                self.answer_digests(connection, id, result);
            }
            _ => {}
        }
    }

    fn meta_done(&mut self, op: boundary::OpId, result: Result<Vec<u8>, DiskError>) {
        let Some(purpose) = self.ops.finish(op) else {
            return;
        };
        if self.is_disk_given_up() {
            return;
        }
        let bytes = match result {
            Ok(bytes) => bytes,
            Err(error) if self.phase == Phase::Running => return self.fail_disk(error),
            Err(error) => return self.attach_io_failed(error),
        };
        match purpose {
            Purpose::ReadHeader => self.header_read(&bytes),
            Purpose::ReadBitmap(first) => self.bitmap_read(first, &bytes),
            Purpose::Superblock => self.record_written(),
            Purpose::Log => self.log_written(),
            Purpose::Bitmap => self.bitmap_written(),
            _ => {}
        }
    }

    fn frame(&mut self, connection: ConnectionId, header: Header, body: Body) {
        if self.link.connection() != Some(connection) {
            return self.release_body(body);
        }
        self.heard_peer();
        match (header.kind, body) {
            (FrameType::Ping, _) => self.answer_ping(header.id),
            (FrameType::Pong, _) => self.ping_answered(header),
            (FrameType::Goodbye, Body::Control(bytes)) => self.peer_says_goodbye(&bytes),
            (_, body) if self.link.session().is_some() => self.session_frame(header, body),
            (_, body) => self.agreement_frame(header, body),
        }
    }

    fn part_arrived(&mut self, connection: ConnectionId) {
        if self.link.connection() == Some(connection) {
            self.heard_peer();
        }
    }

    fn session_frame(&mut self, header: Header, body: Body) {
        use FrameType::*;
        match (header.kind, body) {
            (Write | Zero | Flush | SyncWrite | SyncZero, body) => self.peer_request(header, body),
            (Done, _) if !self.is_current(header.generation) => {
                self.protocol_error("an answer in another generation");
            }
            (Done, _) => self.peer_done(header.id),
            (State, Body::Control(bytes)) => self.peer_tells_state(&bytes),
            (Digest, _) => self.peer_asks_digests(header),
            (Digests, Body::Control(bytes)) => self.peer_compares(header.id, &bytes),
            (SyncTotal, _) => self.learn_total(header.offset),
            (SyncFinish, _) => self.source_finished(header),
            (SyncFinished | Promoted, _) => self.peer_answered(header),
            (Promote, Body::Control(bytes)) => self.peer_wants_promotion(&bytes),
            (PromoteRefused, Body::Control(bytes)) => self.promotion_refused(header.id, &bytes),
            (kind, body) => {
                self.release_body(body);
                self.protocol_error(&format!("{kind:?} in the middle of a session"));
            }
        }
    }

    /// Whether a frame speaks in the present generation, or in the one that a change of record
    /// under way is about to end.
    fn is_current(&self, tag: u64) -> bool {
        let ending = self
            .record
            .ancestry
            .first()
            .map(|generation| generation.tag());
        tag == self.record.generation.tag() || (!self.transition.is_idle() && Some(tag) == ending)
    }

    fn peer_done(&mut self, id: u64) {
        match PeerTag::decode(id) {
            Some(PeerTag::Guest(number)) => {
                if let Some(key) = self.requests.by_number(number) {
                    self.guest_peer_done(key);
                }
            }
            Some(PeerTag::Chunk(serial)) => self.chunk_written(serial),
            Some(PeerTag::Settle) => {
                self.log.peer_flushed();
                self.log_wanted = true;
            }
            Some(PeerTag::Step) => self.step_flushed_there(),
            Some(PeerTag::Checkpoint) => self.checkpoint_done(),
            Some(PeerTag::Piece(_)) | None => self.protocol_error("an answer to nothing"),
        }
    }

    fn peer_compares(&mut self, id: u64, bytes: &[u8]) {
        match PeerTag::decode(id) {
            Some(PeerTag::Piece(serial)) => self.peer_digested(serial, bytes),
            Some(PeerTag::Chunk(serial)) => self.chunk_digested_there(serial, bytes),
            _ => self.protocol_error("digests of nothing"),
        }
    }

    fn peer_tells_state(&mut self, bytes: &[u8]) {
        match PeerState::decode(bytes) {
            Ok(state) => {
                if let Some(session) = self.link.session_mut() {
                    session.peer = state;
                }
            }
            Err(error) => self.protocol_error(&error.to_string()),
        }
    }

    /// Whether operations on the disk end without being of use to anybody.
    fn is_disk_given_up(&self) -> bool {
        let closed = matches!(self.phase, Phase::Closing | Phase::Closed);
        closed || self.disk == DiskState::Failed
    }

    /// The local disk reported an error: it is not used any more, and a Primary stops
    /// (R12). The peer keeps what it has and may be promoted.
    fn fail_disk(&mut self, error: DiskError) {
        if self.disk == DiskState::Failed {
            return;
        }
        let cause = match error {
            DiskError::Io => "an I/O error",
            DiskError::NoSpace => "no space for a block",
        };
        let remedy = "replace it, then `kagami down` and `kagami up`";
        let refusal = Refusal::new(
            ErrorId::DiskFailed,
            format!("the local disk reported {cause}; {remedy}"),
        );
        self.event(Severity::Error, refusal.to_string());
        self.disk = DiskState::Failed;
        if self.role == Role::Primary {
            self.role = Role::Secondary;
            self.serving = false;
            self.out.push(Action::Serve(false));
        }
        self.abort_requests(GuestError::Io);
        self.abort_transition();
        // There is nothing left to record it on.
        self.outdated_by = None;
        self.lose_link("the local disk failed", AfterLoss::StandAlone);
        self.stop_verify("the local disk failed");
        self.refusal = Some(refusal);
    }

    fn event(&mut self, severity: Severity, text: String) {
        self.out.push(Action::Event(Event { severity, text }));
    }
}
