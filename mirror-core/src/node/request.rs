//! Guest requests from arrival to completion.
//!
//! A write goes through up to four gates before it is submitted, in this order: its range is free
//! ([`super::ordering`]), its extents are in the activity log ([`super::activity`]), the
//! generation is durably marked as used (R3), and no handshake or change of record is
//! under way that froze what this node said of itself. Then both halves are submitted together.

use super::Node;
use super::boundary::{Action, DiskError, GuestError, GuestOperation, Payload, RequestId};
use super::link::PeerTag;
use super::operation::Purpose;
use super::ordering::{Claimant, Half, may_acknowledge};
use super::records::Then;
use super::request_table::{Guest, Kind, RequestKey, Stage};
use crate::limits::{MAX_PAYLOAD, SECTOR, ZERO_PIECE};
use crate::types::{ByteRange, DiskState, Holders, Role};
use crate::wire::{FLAG_FUA, FLAG_MAY_UNMAP, FrameType, Header};

impl Node {
    /// A guest asks for something.
    pub(super) fn guest_arrives(&mut self, request: RequestId, operation: GuestOperation) {
        self.guest_active = self.now;
        let (kind, range) = match operation {
            GuestOperation::Read(range) => (Kind::Read, range),
            GuestOperation::Write {
                range,
                payload,
                fua,
            } => (Kind::Write { payload, fua }, range),
            GuestOperation::Zero {
                range,
                may_unmap,
                fua,
            } => (Kind::Zero { may_unmap, fua }, range),
            GuestOperation::Flush => (Kind::Flush, ByteRange::new(0, 0)),
        };
        if let Err(error) = self.admit(kind, range) {
            if let Kind::Write { payload, .. } = kind {
                self.out.push(Action::Release(payload));
            }
            self.out.push(Action::Complete {
                request,
                result: Err(error),
            });
            return;
        }
        let key = self.requests.insert(Guest {
            request,
            kind,
            range,
            piece: range,
            arrived: self.now,
            sent: self.now,
            stage: Stage::InFlight {
                local: Half::Pending,
                peer: Half::Absent,
            },
            covers: 0,
            followed: false,
        });
        match kind {
            Kind::Read => {
                let op = self.ops.start(Purpose::Guest(key));
                self.out.push(Action::Read {
                    op,
                    range,
                    checksum: false,
                });
            }
            Kind::Flush => self.pass_gate(key),
            Kind::Write { .. } | Kind::Zero { .. } => self.begin_piece(key),
        }
    }

    fn admit(&self, kind: Kind, range: ByteRange) -> Result<(), GuestError> {
        if !self.serving {
            return Err(GuestError::NotPrimary);
        }
        if kind == Kind::Flush {
            return Ok(());
        }
        let longest = match kind {
            Kind::Zero { .. } => u64::MAX,
            _ => u64::from(MAX_PAYLOAD),
        };
        let aligned = range.start.is_multiple_of(SECTOR) && range.end.is_multiple_of(SECTOR);
        let fits = range.end <= self.record.mirror_size && range.len() <= longest;
        if aligned && fits && !range.is_empty() {
            Ok(())
        } else {
            Err(GuestError::OutOfRange)
        }
    }

    /// Cuts the next piece of a write or zeroing and takes it to the first gate.
    fn begin_piece(&mut self, key: RequestKey) {
        let Some(guest) = self.requests.find(key) else {
            return;
        };
        if matches!(guest.kind, Kind::Zero { .. }) {
            guest.piece.end = guest.range.end.min(guest.piece.start + ZERO_PIECE);
        }
        let piece = guest.piece;
        guest.stage = Stage::AwaitingRange;
        if self.locks.acquire(piece, Claimant::Guest(key)) {
            self.enter_log(key);
        }
    }

    /// The range is taken: the next gate is the activity log.
    pub(super) fn enter_log(&mut self, key: RequestKey) {
        let Some(guest) = self.requests.find(key) else {
            return;
        };
        if self.log.begin(guest.piece) {
            self.pass_gate(key);
        } else {
            guest.stage = Stage::AwaitingLog;
            self.requests.log_queue.push_back(key);
            self.log_wanted = true;
        }
    }

    /// Lets those in whose extents became active.
    pub(super) fn retry_log_queue(&mut self) {
        for _ in 0..self.requests.log_queue.len() {
            let Some(key) = self.requests.log_queue.pop_front() else {
                return;
            };
            let Some(guest) = self.requests.find(key) else {
                continue;
            };
            if self.log.begin(guest.piece) {
                self.pass_gate(key);
            } else {
                self.requests.log_queue.push_back(key);
            }
        }
    }

    /// The piece that a request waiting for the log needs.
    pub(super) fn piece_of(&mut self, key: RequestKey) -> Option<ByteRange> {
        self.requests.find(key).map(|guest| guest.piece)
    }

    /// The last gate: nothing is submitted while a handshake or change of record has frozen what
    /// this node said of itself, nor before the generation is marked as used.
    fn pass_gate(&mut self, key: RequestKey) {
        let closed = self.gate_closed();
        let Some(guest) = self.requests.find(key) else {
            return;
        };
        let writes = guest.kind != Kind::Flush;
        if closed || (writes && !self.use_is_durable) {
            guest.stage = Stage::AwaitingGate;
            self.requests.gate_queue.push_back(key);
        } else if writes {
            self.submit_write(key);
        } else {
            self.submit_flush(key);
        }
    }

    /// Opens the last gate if it may be open.
    pub(super) fn retry_gate(&mut self) {
        if self.requests.gate_queue.is_empty() || self.gate_closed() {
            return;
        }
        if !self.use_is_durable {
            if !self.record.used {
                self.record.used = true;
                self.commit(Then::Used);
            }
            // Flushes need no mark, and must not wait behind a write that does.
            for _ in 0..self.requests.gate_queue.len() {
                let Some(key) = self.requests.gate_queue.pop_front() else {
                    break;
                };
                self.pass_gate(key);
            }
            return;
        }
        while let Some(key) = self.requests.gate_queue.pop_front() {
            self.pass_gate(key);
        }
    }

    fn submit_write(&mut self, key: RequestKey) {
        let replicating = self.replicating();
        let op = self.ops.start(Purpose::Guest(key));
        let Some(guest) = self.requests.find(key) else {
            return;
        };
        guest.stage = Stage::InFlight {
            local: Half::Pending,
            peer: Half::Absent,
        };
        let range = guest.piece;
        self.out.push(match guest.kind {
            Kind::Write { payload, fua } => Action::Write {
                op,
                offset: range.start,
                payload,
                fua,
            },
            Kind::Zero { may_unmap, fua } => Action::Zero {
                op,
                range,
                may_unmap,
                fua,
            },
            Kind::Read | Kind::Flush => return,
        });
        if replicating {
            self.send_to_peer(key);
        } else {
            self.bitmap.mark(range);
        }
    }

    fn submit_flush(&mut self, key: RequestKey) {
        let op = self.ops.start(Purpose::Guest(key));
        let covers = self.log.local_written();
        let Some(guest) = self.requests.find(key) else {
            return;
        };
        guest.covers = covers;
        guest.stage = Stage::InFlight {
            local: Half::Pending,
            peer: Half::Absent,
        };
        self.out.push(Action::Flush { op });
        if self.replicating() {
            self.send_to_peer(key);
        }
    }

    /// Sends the peer its half of a write, zeroing or flush.
    fn send_to_peer(&mut self, key: RequestKey) {
        let generation = self.record.generation.tag();
        let now = self.now;
        let Some(guest) = self.requests.find(key) else {
            return;
        };
        let Stage::InFlight { peer, .. } = &mut guest.stage else {
            return;
        };
        *peer = Half::Pending;
        guest.sent = now;
        let range = guest.piece;
        let ranged = |kind, flags| Header {
            flags,
            offset: range.start,
            length: range.len() as u32,
            ..Header::bare(kind, generation, PeerTag::Guest(key.to_number()).encode())
        };
        let fua_flag = |fua: bool| if fua { FLAG_FUA } else { 0 };
        match guest.kind {
            Kind::Write { payload, fua } => {
                self.send_data(ranged(FrameType::Write, fua_flag(fua)), payload);
            }
            Kind::Zero { may_unmap, fua } => {
                let unmap = if may_unmap { FLAG_MAY_UNMAP } else { 0 };
                self.send(ranged(FrameType::Zero, fua_flag(fua) | unmap));
            }
            Kind::Flush => {
                guest.followed = self.log.peer_flush_begins(now);
                self.send(Header::bare(
                    FrameType::Flush,
                    generation,
                    PeerTag::Guest(key.to_number()).encode(),
                ));
            }
            Kind::Read => {}
        }
    }

    /// The local half of a request ended.
    pub(super) fn guest_disk_done(
        &mut self,
        key: RequestKey,
        result: Result<Option<Payload>, DiskError>,
    ) {
        let Some(guest) = self.requests.find(key) else {
            // Aborted meanwhile; a read's buffer still is ours to give back.
            if let Ok(Some(payload)) = result {
                self.out.push(Action::Release(payload));
            }
            return;
        };
        let (kind, piece) = (guest.kind, guest.piece);
        match (kind, result) {
            (Kind::Read, Ok(Some(payload))) => {
                self.answer_read(key, payload, self.locks.newest_ticket());
            }
            // One unreadable block does not take the disk away; the guest is told.
            (Kind::Read, _) => self.finish(key, Err(GuestError::Io)),
            (_, Err(error)) => self.fail_disk(error),
            (Kind::Write { fua, .. } | Kind::Zero { fua, .. }, Ok(_)) => {
                self.log.local_completed(piece, fua);
                self.half_done(key, true);
            }
            (Kind::Flush, Ok(_)) => {
                let covers = guest.covers;
                self.log.local_flushed(covers);
                self.half_done(key, true);
            }
        }
    }

    /// The peer's half of a request ended.
    pub(super) fn guest_peer_done(&mut self, key: RequestKey) {
        let Some(guest) = self.requests.find(key) else {
            return;
        };
        // A completion that was voided meanwhile does not count (R1).
        if !matches!(
            guest.stage,
            Stage::InFlight {
                peer: Half::Pending,
                ..
            }
        ) {
            return;
        }
        match guest.kind {
            Kind::Write { fua: false, .. } | Kind::Zero { fua: false, .. } => {
                let piece = guest.piece;
                self.log.peer_completed(piece);
            }
            Kind::Flush if guest.followed => self.log.peer_flushed(),
            _ => {}
        }
        self.half_done(key, false);
    }

    fn half_done(&mut self, key: RequestKey, is_local: bool) {
        let Some(guest) = self.requests.find(key) else {
            return;
        };
        if let Stage::InFlight { local, peer } = &mut guest.stage {
            *(if is_local { local } else { peer }) = Half::Done;
        }
        if !self.requests.log_queue.is_empty() {
            self.log_wanted = true;
        }
        self.try_acknowledge(key);
    }

    fn try_acknowledge(&mut self, key: RequestKey) {
        let (replicating, by_right) = (self.replicating(), self.acts_by_right());
        let holders = self.record.holders;
        let Some(guest) = self.requests.find(key) else {
            return;
        };
        let Stage::InFlight { local, peer } = guest.stage else {
            return;
        };
        if guest.kind == Kind::Read || !may_acknowledge(local, peer, replicating, holders, by_right)
        {
            return;
        }
        if guest.kind != Kind::Flush {
            let piece = guest.piece;
            self.log.end(piece);
            if !self.requests.log_queue.is_empty() {
                self.log_wanted = true;
            }
            self.release_range(piece);
            let Some(guest) = self.requests.find(key) else {
                return;
            };
            if guest.piece.end < guest.range.end {
                guest.piece = ByteRange {
                    start: guest.piece.end,
                    end: guest.range.end,
                };
                self.begin_piece(key);
                return;
            }
        }
        self.finish(key, Ok(None));
    }

    /// Looks at every submitted request again, after what they waited for may have changed.
    pub(super) fn retry_acknowledgements(&mut self) {
        for key in self.requests.keys() {
            self.try_acknowledge(key);
        }
        self.retry_late_reads();
    }

    /// Gives a range back and lets those go on that waited for it.
    pub(super) fn release_range(&mut self, range: ByteRange) {
        let mut granted = std::mem::take(&mut self.requests.granted);
        self.locks.release(range, &mut granted);
        self.follow_grants(granted);
        if !self.requests.late_reads.is_empty() {
            self.retry_late_reads();
        }
    }

    /// Takes back a claim that still waits, and lets those go on that waited behind it.
    pub(super) fn withdraw_claim(&mut self, claimant: Claimant) {
        let mut granted = std::mem::take(&mut self.requests.granted);
        self.locks.withdraw(claimant, &mut granted);
        self.follow_grants(granted);
    }

    fn follow_grants(&mut self, mut granted: Vec<Claimant>) {
        for claimant in granted.drain(..) {
            match claimant {
                Claimant::Guest(key) => self.enter_log(key),
                Claimant::Chunk(serial) => self.chunk_has_range(serial),
                Claimant::Piece(serial) => self.piece_has_range(serial),
            }
        }
        self.requests.granted = granted;
    }

    /// Answers a read whose data is here, unless it may have seen a write that is not acknowledged
    /// yet, or the peer may serve by now.
    fn answer_read(&mut self, key: RequestKey, payload: Payload, ticket: u64) {
        let may_answer = self.may_answer_reads();
        let Some(guest) = self.requests.find(key) else {
            return;
        };
        if self.locks.written_since(guest.range, ticket) || !may_answer {
            guest.stage = Stage::AwaitingWrites { payload, ticket };
            self.requests.late_reads.push(key);
        } else {
            self.finish(key, Ok(Some(payload)));
        }
    }

    fn retry_late_reads(&mut self) {
        for key in std::mem::take(&mut self.requests.late_reads) {
            let stage = self.requests.find(key).map(|guest| guest.stage);
            if let Some(Stage::AwaitingWrites { payload, ticket }) = stage {
                self.answer_read(key, payload, ticket);
            }
        }
    }

    fn finish(&mut self, key: RequestKey, result: Result<Option<Payload>, GuestError>) {
        let Some(guest) = self.requests.remove(key) else {
            return;
        };
        if let Kind::Write { payload, .. } = guest.kind {
            self.out.push(Action::Release(payload));
        }
        if result.is_ok() {
            let took = self.now.since(guest.arrived).as_millis() as u64;
            self.counters.count(guest.kind, guest.range.len(), took);
        }
        self.out.push(Action::Complete {
            request: guest.request,
            result,
        });
    }

    /// The peer's half of everything in flight is void: the connection is gone, or the peer is
    /// about to be resynced. What was sent and is not known durable there becomes dirty.
    pub(super) fn void_peer_halves(&mut self) {
        self.log.peer_lost(&mut self.bitmap);
        for key in self.requests.keys() {
            let Some(guest) = self.requests.find(key) else {
                continue;
            };
            if let Stage::InFlight { peer, .. } = &mut guest.stage {
                *peer = Half::Absent;
                guest.followed = false;
                if matches!(guest.kind, Kind::Write { .. } | Kind::Zero { .. }) {
                    let piece = guest.piece;
                    self.bitmap.mark(piece);
                }
            }
        }
    }

    /// A peer takes writes from now on: it gets all that are in flight.
    pub(super) fn resend_to_peer(&mut self) {
        for key in self.requests.keys() {
            let Some(guest) = self.requests.find(key) else {
                continue;
            };
            let wants = guest.kind != Kind::Read;
            if wants
                && matches!(
                    guest.stage,
                    Stage::InFlight {
                        peer: Half::Absent,
                        ..
                    }
                )
            {
                self.send_to_peer(key);
            }
        }
    }

    /// Ends every request with an error, because the disk or the role is gone. Operations in
    /// flight go on holding their buffers in the driver. What they leave on the disk is dirty, also
    /// while the link still stands: nobody waits for the peer's word on it any more.
    pub(super) fn abort_requests(&mut self, error: GuestError) {
        self.void_peer_halves();
        self.give_back_claims();
        self.requests.log_queue.clear();
        self.requests.gate_queue.clear();
        self.requests.late_reads.clear();
        for key in self.requests.keys() {
            let Some(guest) = self.requests.find(key) else {
                continue;
            };
            if let Stage::AwaitingWrites { payload, .. } = guest.stage {
                self.out.push(Action::Release(payload));
            }
            self.finish(key, Err(error));
        }
    }

    /// Gives back the ranges and extents that requests hold or wait for.
    fn give_back_claims(&mut self) {
        for key in self.requests.keys() {
            let Some(guest) = self.requests.find(key) else {
                continue;
            };
            let writes = matches!(guest.kind, Kind::Write { .. } | Kind::Zero { .. });
            if writes && matches!(guest.stage, Stage::AwaitingGate | Stage::InFlight { .. }) {
                self.log.end(guest.piece);
            }
        }
        let mut granted = std::mem::take(&mut self.requests.granted);
        self.locks.release_guests(&mut granted);
        if self.disk == DiskState::Failed {
            // The resync ends with the link, a moment from now.
            granted.clear();
        }
        self.follow_grants(granted);
    }

    /// Whether what this node said of itself is frozen.
    ///
    /// A sole holder is the source of any resync, and what it writes meanwhile is dirty: its guests
    /// need not wait for a handshake, once its generation is used or the peer has accepted it.
    fn gate_closed(&self) -> bool {
        self.transition.changes_record() || (self.link.is_agreeing() && !self.is_settled_source())
    }

    /// Whether a handshake under way can have no other outcome than that this node is the source.
    pub(super) fn is_settled_source(&self) -> bool {
        let accepted = self.use_is_durable || self.link.has_offered();
        self.record.holders == Holders::Sole && accepted
    }

    /// Whether the record that [`Holders`] describes is durable and no change of it is under way.
    fn acts_by_right(&self) -> bool {
        self.role == Role::Primary
            && !self.transition.changes_record()
            && !self.transition.is_settling()
    }

    /// Whether a request waits for a peer that is not there, and a shrinking would help.
    pub(super) fn needs_shrinking(&self) -> bool {
        self.role == Role::Primary
            && self.record.holders != Holders::Sole
            && !self.replicating()
            && !self.link.is_agreeing()
            && !self.prefers_peer()
            && (self.requests.any_needs_peer()
                || (self.requests.len() > 0 && self.lease_runs_out()))
    }
}
