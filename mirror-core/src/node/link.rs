//! The mirror link: finding the peer, noticing that it is gone, and saying so once.
//!
//! ```text
//! StandAlone --connect--> Searching --connection--> Arrived --sign of life--> Agreeing --> Connected
//!     ^                     ^   ^                      |                         |            |
//!     |                     |   `------- lost ---------+-------------------------+------------+
//!     `-- refusal, operator |                                                    |            |
//!                        Waiting <---------------- too slow, no sense -----------+------------'
//! ```

use super::Node;
use super::agreement::Agreement;
use super::boundary::{Action, Body, ConnectionId, Payload, Severity};
use super::compare::Compared;
use super::operation::Purpose;
use super::resync::{Copying, Resync};
use super::timer::Timer;
use crate::error::{ErrorId, Refusal};
use crate::limits::{
    ARRIVAL_PATIENCE, ASK_PATIENCE, CONNECT_BACKOFF_MIN, SLOW_PEER_BACKOFF_MAX,
    SLOW_PEER_BACKOFF_MIN,
};
use crate::types::{DiskState, LinkState, Role, Time};
use crate::wire::message::{Goodbye, Hello, PeerState};
use crate::wire::{FrameType, Header};
use std::collections::VecDeque;
use std::time::Duration;

/// The state of the link.
#[derive(Debug)]
pub(super) enum Link {
    /// Not looking for the peer.
    StandAlone,
    /// Looking again when [`Timer::Reconnect`] is due.
    Waiting,
    /// The driver looks for the peer.
    Searching,
    /// A connection stands. Facts are exchanged when this node is at rest and the peer has shown
    /// that it lives: a frozen peer accepts connections, too, and must not hold anything up.
    Arrived {
        connection: ConnectionId,
        heard: bool,
    },
    /// Facts are being exchanged and agreed upon.
    Agreeing(Box<Agreement>),
    /// Agreed.
    Connected(Box<Session>),
}

/// A connection on which both sides agreed.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) connection: ConnectionId,
    /// What the peer said at the start.
    pub(super) hello: Hello,
    /// What the peer said last.
    pub(super) peer: PeerState,
    pub(super) mode: Mode,
    /// When a frame of the peer arrived last.
    heard: Time,
    since: Time,
    /// What the peer was told last.
    told: Option<PeerState>,
    /// Frames that wait until the generation is durably marked as used.
    pub(super) held: VecDeque<(Header, Body)>,
    /// What a comparison by the peer asks of this disk.
    pub(super) compared: Compared,
}

/// What the connected pair does.
#[derive(Debug)]
pub(super) enum Mode {
    /// Nothing to copy from; an operator must choose.
    Idle(ErrorId),
    /// The replicas are equal, and every write goes to both.
    InSync,
    /// The peer is made equal, and every write goes to both.
    Source(Resync),
    /// This replica is made equal to the peer's.
    Target(Copying),
}

/// What a number in a frame's `id` field stands for. The peer gives it back as it came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum PeerTag {
    /// A guest's request, by its number in the table of requests.
    Guest(u64),
    /// A flush that settles writes for the activity log.
    Settle,
    /// A flush within a transition.
    Step,
    /// A chunk of the resync.
    Chunk(u32),
    /// The flush of a resync checkpoint.
    Checkpoint,
    /// A piece that is compared.
    Piece(u32),
}

impl PeerTag {
    const KIND_SHIFT: u32 = 60;

    pub(super) fn encode(self) -> u64 {
        let (kind, number) = match self {
            PeerTag::Guest(number) => (1, number),
            PeerTag::Settle => (2, 0),
            PeerTag::Step => (3, 0),
            PeerTag::Chunk(serial) => (4, u64::from(serial)),
            PeerTag::Checkpoint => (5, 0),
            PeerTag::Piece(serial) => (6, u64::from(serial)),
        };
        kind << Self::KIND_SHIFT | number
    }

    /// What the peer gave back; `None` if this node never sends such a number.
    pub(super) fn decode(id: u64) -> Option<PeerTag> {
        let number = id & ((1 << Self::KIND_SHIFT) - 1);
        let tag = match id >> Self::KIND_SHIFT {
            1 => PeerTag::Guest(number),
            2 => PeerTag::Settle,
            3 => PeerTag::Step,
            4 => PeerTag::Chunk(u32::try_from(number).ok()?),
            5 => PeerTag::Checkpoint,
            6 => PeerTag::Piece(u32::try_from(number).ok()?),
            _ => return None,
        };
        (tag.encode() == id).then_some(tag)
    }
}

/// What follows the loss of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum AfterLoss {
    /// Look for the peer at once.
    Search,
    /// The peer was too slow: look for it after a pause that grows.
    BackOff,
    /// Wait for an operator.
    StandAlone,
}

/// How slow peers were dealt with lately.
#[derive(Debug, Default)]
pub(super) struct SlowPeer {
    pause: Option<Duration>,
    reason: String,
}

impl Link {
    pub(super) fn connection(&self) -> Option<ConnectionId> {
        match self {
            Link::StandAlone | Link::Waiting | Link::Searching => None,
            Link::Arrived { connection, .. } => Some(*connection),
            Link::Agreeing(agreement) => Some(agreement.connection),
            Link::Connected(session) => Some(session.connection),
        }
    }

    /// Whether facts this node stated are being relied upon by the peer.
    pub(super) fn is_agreeing(&self) -> bool {
        matches!(self, Link::Agreeing(_))
    }

    /// Whether the peer was told in the handshake under way that it is the target.
    pub(super) fn has_offered(&self) -> bool {
        matches!(self, Link::Agreeing(agreement) if agreement.offered)
    }

    pub(super) fn session(&self) -> Option<&Session> {
        if let Link::Connected(session) = self {
            Some(session)
        } else {
            None
        }
    }

    pub(super) fn session_mut(&mut self) -> Option<&mut Session> {
        if let Link::Connected(session) = self {
            Some(session)
        } else {
            None
        }
    }

    /// As operators see it.
    pub(super) fn state(&self) -> LinkState {
        match self {
            Link::StandAlone => LinkState::StandAlone,
            Link::Connected(_) => LinkState::Connected,
            _ => LinkState::Connecting,
        }
    }
}

impl Node {
    /// Whether a connected peer takes every write.
    pub(super) fn replicating(&self) -> bool {
        let session = self.link.session();
        session.is_some_and(|session| matches!(session.mode, Mode::InSync | Mode::Source(_)))
    }

    /// Sends a frame without a payload to the peer, if there is a connection.
    pub(super) fn send(&mut self, header: Header) {
        self.send_body(header, Body::None);
    }

    /// Sends guest data.
    pub(super) fn send_data(&mut self, header: Header, payload: Payload) {
        let header = Header {
            payload_len: payload.len,
            payload_crc: payload.crc,
            ..header
        };
        self.send_body(header, Body::Data(payload));
    }

    /// Sends a control message.
    pub(super) fn send_control(&mut self, header: Header, bytes: Vec<u8>) {
        let header = Header {
            payload_len: bytes.len() as u32,
            payload_crc: crc32fast::hash(&bytes),
            ..header
        };
        self.send_body(header, Body::Control(bytes));
    }

    fn send_body(&mut self, header: Header, body: Body) {
        if let Some(connection) = self.link.connection() {
            self.out.push(Action::Send {
                connection,
                header,
                body,
            });
        }
    }

    /// Gives back what came with a frame that is not used.
    pub(super) fn release_body(&mut self, body: Body) {
        if let Body::Data(payload) = body {
            self.out.push(Action::Release(payload));
        }
    }

    /// Begins to look for the peer.
    pub(super) fn search(&mut self) {
        self.timers.cancel(Timer::Reconnect);
        self.link = Link::Searching;
        self.out.push(Action::StartConnecting);
    }

    /// A connection stands.
    pub(super) fn link_up(&mut self, connection: ConnectionId) {
        match self.link {
            // Not wanted (any more).
            Link::StandAlone | Link::Waiting => {
                self.out.push(Action::Close { connection });
                return;
            }
            Link::Searching => {}
            _ => self.drop_link("the peer opened a new connection"),
        }
        self.link = Link::Arrived {
            connection,
            heard: false,
        };
        self.timers
            .set(Timer::Handshake, self.now.after(ARRIVAL_PATIENCE));
        self.ping();
    }

    /// A connection is gone.
    pub(super) fn link_down(&mut self, connection: ConnectionId) {
        if self.link.connection() == Some(connection) {
            self.after_loss("the connection broke", AfterLoss::Search);
        }
    }

    /// Parts from the peer on purpose: it is told why.
    pub(super) fn part(&mut self, reason: &str, goodbye: Goodbye, after: AfterLoss) {
        self.send_control(Header::bare(FrameType::Goodbye, 0, 0), goodbye.encode());
        self.lose_link(reason, after);
    }

    /// Closes the connection, if there is one, and does `after`.
    pub(super) fn lose_link(&mut self, reason: &str, after: AfterLoss) {
        if let Some(connection) = self.link.connection() {
            self.out.push(Action::Close { connection });
        }
        self.after_loss(reason, after);
    }

    fn after_loss(&mut self, reason: &str, after: AfterLoss) {
        self.drop_link(reason);
        match after {
            AfterLoss::Search => self.search(),
            AfterLoss::StandAlone => {
                self.link = Link::StandAlone;
                self.timers.cancel(Timer::Reconnect);
                self.out.push(Action::StopConnecting);
            }
            AfterLoss::BackOff => {
                let pause = self
                    .slow_peer
                    .pause
                    .map_or(SLOW_PEER_BACKOFF_MIN, |last| last * 2);
                let pause = pause.min(SLOW_PEER_BACKOFF_MAX);
                self.slow_peer.pause = Some(pause);
                reason.clone_into(&mut self.slow_peer.reason);
                self.link = Link::Waiting;
                self.timers.set(Timer::Reconnect, self.now.after(pause));
                self.out.push(Action::StopConnecting);
            }
        }
    }

    /// Forgets the connection and voids everything that went over it. Leaves the link in
    /// [`Link::Searching`], with nothing asked of the driver.
    fn drop_link(&mut self, reason: &str) {
        self.timers.cancel(Timer::Heartbeat);
        self.timers.cancel(Timer::Handshake);
        self.timers.cancel(Timer::Checkpoint);
        if let Link::Agreeing(agreement) = &self.link
            && let Some(id) = agreement.refuses()
            // With an arbiter one of two Primaries has only not heard yet that it lost its right.
            && (id != ErrorId::BothPrimary || !self.is_arbitrated())
        {
            // The peer's table says the same; its word may have been lost with the connection.
            self.refusal = Some(Refusal::new(id, self.remedy(id)));
        }
        let old = std::mem::replace(&mut self.link, Link::Searching);
        if let Link::Connected(session) = old {
            self.event(
                Severity::Warning,
                format!("lost {}: {reason}", self.config.peer),
            );
            for (_, body) in session.held {
                self.release_body(body);
            }
            if let Mode::Source(resync) = session.mode {
                self.abandon_resync(resync);
            }
            self.abandon_pieces();
        }
        self.early_hello = None;
        self.void_peer_halves();
        self.transition_lost_link();
        self.give_up_invalidation();
        self.acknowledgements_due = true;
        // What the peer had not settled is dirty now, and holds no extent in the log any more.
        self.log_wanted = true;
    }

    /// Both sides agreed: `mode` begins.
    pub(super) fn connected(&mut self, hello: Hello, mode: Mode) {
        let Some(connection) = self.link.connection() else {
            return;
        };
        self.timers.cancel(Timer::Handshake);
        let disk = match mode {
            Mode::Source(_) => DiskState::Inconsistent,
            Mode::InSync | Mode::Target(_) => DiskState::UpToDate,
            Mode::Idle(_) => hello.disk,
        };
        let peer = PeerState {
            role: hello.role,
            disk,
            paused: false,
        };
        self.link = Link::Connected(Box::new(Session {
            connection,
            hello,
            peer,
            mode,
            heard: self.now,
            since: self.now,
            told: None,
            held: VecDeque::new(),
            compared: Compared::default(),
        }));
        self.met_peer = true;
        self.discard = false;
        self.refusal = None;
        self.parted = None;
        self.heartbeat_due = self.now.after(self.heartbeat_interval());
        self.timers.set(Timer::Heartbeat, self.heartbeat_due);
        let (peer, mode) = (self.config.peer.clone(), self.mode_in_words());
        self.event(Severity::Info, format!("connected to {peer}: {mode}"));
        if self.replicating() {
            self.resend_to_peer();
        }
        self.begin_leasing();
        self.acknowledgements_due = true;
    }

    fn mode_in_words(&self) -> &'static str {
        match self.link.session().map(|session| &session.mode) {
            Some(Mode::InSync) => "in sync",
            Some(Mode::Source(_)) => "resync source",
            Some(Mode::Target(_)) => "resync target",
            Some(Mode::Idle(_)) | None => "nothing to copy from",
        }
    }

    /// Tells the peer of a changed role or disk.
    pub(super) fn tell_peer(&mut self) {
        let state = PeerState {
            role: self.role,
            disk: self.disk,
            paused: self.resync_paused,
        };
        if let Some(session) = self.link.session_mut()
            && session.told != Some(state)
        {
            session.told = Some(state);
            self.send_control(Header::bare(FrameType::State, 0, 0), state.encode());
        }
    }

    pub(super) fn heartbeat_interval(&self) -> Duration {
        let slowest = if self.is_arbitrated() {
            self.config.lease / 8
        } else {
            Duration::from_millis(250)
        };
        let interval = (self.config.stall_timeout / 8).min(slowest);
        interval.clamp(Duration::from_millis(10), Duration::from_millis(250))
    }

    /// A frame of the peer is proof of life.
    pub(super) fn heard_peer(&mut self) {
        let now = self.now;
        match &mut self.link {
            Link::Arrived { heard, .. } => *heard = true,
            Link::Connected(session) => session.heard = now,
            _ => {}
        }
    }

    /// Looks for silence, and for requests the peer holds too long (R11).
    pub(super) fn heartbeat(&mut self) {
        let interval = self.heartbeat_interval();
        let late = self.now.since(self.heartbeat_due);
        self.heartbeat_due = self.now.after(interval);
        self.timers.set(Timer::Heartbeat, self.heartbeat_due);
        if late > self.config.lease / 4 {
            // As below: the peer's lease may be waiting to be read.
            self.begin_leasing();
        }
        if late <= self.config.stall_timeout / 2 {
            self.stop_stalled_verify();
        }
        let oldest = self.oldest_wait_for_peer();
        let Some(session) = self.link.session_mut() else {
            return;
        };
        // This node itself stood still: what the peer sent meanwhile is not read yet.
        if late > self.config.stall_timeout / 2 {
            session.heard = self.now;
        }
        let silent = self.now.since(session.heard) >= self.config.stall_timeout;
        let holds = oldest.map_or(Duration::ZERO, |at| self.now.since(at));
        let slow = holds >= self.config.stall_timeout && late <= self.config.stall_timeout / 2;
        if self.now.since(session.since) > SLOW_PEER_BACKOFF_MAX {
            self.slow_peer.pause = None;
        }
        if silent {
            self.lose_link(
                "it has been silent for the stall timeout",
                AfterLoss::BackOff,
            );
        } else if slow {
            self.lose_link("it held a write for the stall timeout", AfterLoss::BackOff);
        } else if self.requests.len() > 0 && self.lease_runs_out() {
            self.lose_link("it gives no lease", AfterLoss::BackOff);
        } else {
            self.ping();
        }
    }

    /// Since when the peer holds something up: a guest's request, or what a guest's request waits
    /// for. Changes of role and the end of a resync may take longer.
    fn oldest_wait_for_peer(&self) -> Option<Time> {
        let behind = if self.requests.any_waits() {
            [self.log.peer_flush_since(), self.oldest_chunk_at_peer()]
        } else {
            [None; 2]
        };
        let extra = ASK_PATIENCE.saturating_sub(self.config.stall_timeout);
        let asked = self
            .transition
            .waits_for_peer_since()
            .map(|since| since.after(extra));
        behind
            .into_iter()
            .chain([self.requests.oldest_at_peer(), asked])
            .flatten()
            .min()
    }

    /// The handshake took too long.
    pub(super) fn handshake_timed_out(&mut self) {
        match self.link {
            Link::Arrived { .. } => self.lose_link("it does not answer", AfterLoss::Search),
            Link::Agreeing(_) => {
                self.lose_link("the handshake took too long", AfterLoss::BackOff);
            }
            _ => {}
        }
    }

    /// Flushes both replicas so that extents can leave the activity log.
    pub(super) fn settle(&mut self) {
        if !self.settling && self.log.has_unsettled_here() {
            self.settling = true;
            let op = self.ops.start(Purpose::Settle {
                upto: self.log.local_written(),
            });
            self.out.push(Action::Flush { op });
        }
        // While the record changes the peer may not know yet of the generation this side speaks in.
        let speaks = self.replicating() && !self.transition.changes_record();
        if speaks && self.log.peer_flush_begins(self.now) {
            let generation = self.record.generation.tag();
            self.send(Header::bare(
                FrameType::Flush,
                generation,
                PeerTag::Settle.encode(),
            ));
        }
    }

    /// A frame that makes no sense: the connection cannot be trusted any more.
    pub(super) fn protocol_error(&mut self, what: &str) {
        let reason = format!("it sent something that makes no sense: {what}");
        self.event(Severity::Error, format!("{}: {reason}", self.config.peer));
        self.lose_link(&reason, AfterLoss::BackOff);
    }

    /// The peer parts on purpose.
    pub(super) fn peer_says_goodbye(&mut self, bytes: &[u8]) {
        let Ok(goodbye) = Goodbye::decode(bytes) else {
            self.protocol_error("malformed goodbye");
            return;
        };
        if let Some(generation) = goodbye.outdated_by
            && self.role == Role::Secondary
            && generation.counter > self.record.generation.counter
        {
            self.outdated_by = Some(generation);
        }
        let reason = format!("it said goodbye: {}", goodbye.reason);
        self.lose_link(&reason, AfterLoss::Search);
        self.parted = Some(goodbye.reason);
    }

    /// How the link's trouble reads in `status`.
    pub(super) fn link_reasons(&self, reasons: &mut Vec<String>) {
        if let Some(refusal) = &self.refusal {
            reasons.push(refusal.to_string());
        }
        match (&self.parted, self.link.state()) {
            (Some(parted), LinkState::Connecting) => {
                reasons.push(format!("{} parted: {parted}", self.config.peer));
            }
            (Some(parted), LinkState::StandAlone) => {
                let mirror = &self.config.mirror;
                reasons.push(format!("{parted}; `kagami connect {mirror}` ends it"));
            }
            _ => {}
        }
        if let (Link::Waiting, Some(pause)) = (&self.link, self.slow_peer.pause) {
            reasons.push(format!(
                "{} was dropped because {}; it is let in again after {pause:?}",
                self.config.peer, self.slow_peer.reason
            ));
        }
        if let Some(Mode::Idle(id)) = self.link.session().map(|session| &session.mode) {
            reasons.push(format!("{id}: {}", id.summary()));
        }
    }

    /// How long the first meeting after `up` or `connect` may be awaited by a command.
    pub(super) fn search_patience(&self) -> Time {
        self.search_since
            .after(self.config.stall_timeout + CONNECT_BACKOFF_MIN)
    }
}
