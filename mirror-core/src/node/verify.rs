//! Comparing the two replicas, block by block, while guests work (`kagami verify`).
//!
//! Two replicas that are in sync are equal, unless a disk has changed what was written on it, or a
//! bug here has. The node that was asked drives: each piece of the device takes its range like a
//! guest's write would, so that nothing changes in it on either disk, and both nodes read it and
//! compute a digest of every block. In the end what differs is marked dirty, and this node becomes
//! the sole holder, which takes the peer out of UpToDate durably, and the two part: an operator says
//! whose blocks are the right ones, or has said so before (`--repair`), and then the peer becomes the
//! target of a resync.
//!
//! A lost link or a change of role of this node does not end a verify; it goes on when the two are
//! in sync again. A peer whose disk does not answer while guests wait ends it, and so do a Primary at
//! the peer, a verify of the peer, and a copy that is made anew.

use super::Node;
use super::boundary::{CommandId, DiskError, Severity};
use super::compare::{Comparison, digests_of};
use super::link::{Mode, PeerTag};
use super::operation::Purpose;
use super::ordering::Claimant;
use super::resync::Progress;
use super::transition::{AfterShrink, Kind};
use crate::control::{VerifyState, VerifyStatus};
use crate::error::ErrorId;
use crate::limits::{BLOCK, MAX_SHOWN_RANGES, RESYNC_CHUNK};
use crate::meta::bitmap::Bitmap;
use crate::types::{ByteRange, Digest, DiskState, Holders, Role, Time};
use std::collections::BTreeSet;

/// Blocks that are noted as different at most: beyond that a full copy is what is needed.
const MOST_FOUND: usize = 1 << 16;

/// A comparison of the replicas: under way, or the last one.
#[derive(Debug)]
pub(super) struct Verify {
    course: Course,
    /// Whether the peer's copy of what differs is to be made equal to this one's.
    repair: bool,
    /// Where the next piece begins.
    cursor: u64,
    pieces: Vec<Piece>,
    progress: Progress,
    /// Blocks that differ. Only its end marks them: until then a lost link must not let the handshake
    /// choose a side, and a resync overwrite the other.
    found: BTreeSet<u64>,
    /// What was found has been marked since: a verify that goes on does not find it again.
    marked: bool,
}

/// Where a verify is.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Course {
    Running,
    /// It is over, and what was found is being acted upon.
    Acting(Over),
    Over(Over),
}

/// How a verify ended.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Over {
    Complete,
    /// Before its end, and why; an operator may let it go on.
    Stopped(String),
}

/// A piece of the device that is being compared.
#[derive(Debug)]
struct Piece {
    serial: u32,
    range: ByteRange,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    AwaitingRange,
    Reading(Comparison),
}

impl Verify {
    fn new(now: Time, size: u64, repair: bool) -> Verify {
        Verify {
            course: Course::Running,
            repair,
            cursor: 0,
            pieces: Vec::new(),
            progress: Progress::new(now, size),
            found: BTreeSet::new(),
            marked: false,
        }
    }

    fn is_running(&self) -> bool {
        self.course == Course::Running
    }

    fn is_stopped(&self) -> bool {
        matches!(self.course, Course::Over(Over::Stopped(_)))
    }

    /// Nothing more is compared; what was found is acted upon first.
    fn end(&mut self, over: Over) {
        self.course = match self.found.is_empty() {
            true => Course::Over(over),
            false => Course::Acting(over),
        };
    }

    fn piece(&mut self, serial: u32) -> Option<&mut Piece> {
        self.pieces.iter_mut().find(|piece| piece.serial == serial)
    }

    /// Takes out a piece that was read on both sides, with the blocks that differ in it.
    fn take_compared(&mut self, serial: u32) -> Option<(ByteRange, Vec<ByteRange>)> {
        let at = self
            .pieces
            .iter()
            .position(|piece| piece.serial == serial)?;
        let Piece { range, stage, .. } = &self.pieces[at];
        let Stage::Reading(comparison) = stage else {
            return None;
        };
        let (range, differing) = (*range, comparison.differing(*range)?);
        self.pieces.swap_remove(at);
        Some((range, differing))
    }

    /// The first ranges of what was found, as (offset, length).
    fn ranges(&self) -> Vec<(u64, u64)> {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for block in &self.found {
            let start = block * BLOCK;
            let full = ranges.len() == MAX_SHOWN_RANGES;
            match ranges.last_mut() {
                Some((first, length)) if *first + *length == start => *length += BLOCK,
                _ if full => break,
                _ => ranges.push((start, BLOCK)),
            }
        }
        ranges
    }

    /// As operators see it.
    pub(super) fn status(&self, now: Time) -> VerifyStatus {
        let Progress { total, done, .. } = self.progress;
        let rate = self.progress.rate(now);
        VerifyStatus {
            state: match &self.course {
                Course::Running | Course::Acting(_) => VerifyState::Running,
                Course::Over(Over::Complete) => VerifyState::Complete,
                Course::Over(Over::Stopped(_)) => VerifyState::Stopped,
            },
            cause: match &self.course {
                Course::Over(Over::Stopped(cause)) => cause.clone(),
                _ => String::new(),
            },
            repair: self.repair,
            done_bytes: done,
            total_bytes: total,
            rate_bytes_per_second: rate,
            eta_seconds: total.saturating_sub(done).checked_div(rate),
            different_bytes: self.found.len() as u64 * BLOCK,
            ranges: self.ranges(),
        }
    }
}

impl Node {
    /// An operator wants the replicas compared.
    pub(super) fn verify_command(&mut self, command: CommandId, repair: bool, resume: bool) {
        if let Err((id, text)) = self.may_begin_verify(repair) {
            return self.refuse(command, id, &text);
        }
        match &mut self.verify {
            Some(verify) if resume && verify.is_stopped() => {
                if std::mem::take(&mut verify.marked) {
                    verify.found.clear();
                }
                verify.course = Course::Running;
                verify.repair |= repair;
            }
            _ if resume => {
                let text = "no verify was stopped here that could go on";
                return self.refuse(command, ErrorId::NoVerify, text);
            }
            verify => *verify = Some(Verify::new(self.now, self.record.mirror_size, repair)),
        }
        self.event(Severity::Info, "verify begins".to_owned());
        self.done(command, Vec::new());
    }

    fn may_begin_verify(&self, repair: bool) -> Result<(), (ErrorId, String)> {
        let (peer, mirror) = (&self.config.peer, &self.config.mirror);
        let is_over = |verify: &Verify| matches!(verify.course, Course::Over(_));
        if !self.verify.as_ref().is_none_or(is_over) {
            let text = format!(
                "a verify is under way; see `kagami status {mirror}`, or end it with `kagami \
                 verify {mirror} --stop`"
            );
            return Err((ErrorId::Busy, text));
        }
        if self.peer_verifies() {
            let text = format!("{peer} verifies; see `kagami status {mirror}` there");
            return Err((ErrorId::Busy, text));
        }
        let session = self.link.session();
        let Some(session) = session.filter(|session| matches!(session.mode, Mode::InSync)) else {
            let text = format!(
                "a verify compares two copies that are in sync, and these are not; see `kagami \
                 status {mirror}`"
            );
            return Err((ErrorId::NotConnected, text));
        };
        if session.peer.role == Role::Primary {
            let text = if repair {
                format!(
                    "{peer} is Primary and serves the copy that would be overwritten; run \
                     `kagami secondary {mirror}` there first, or let {peer} be the source: \
                     `kagami verify {mirror} --repair {peer}` there"
                )
            } else {
                format!("{peer} is Primary; run `kagami verify {mirror}` there")
            };
            return Err((ErrorId::PeerIsPrimary, text));
        }
        Ok(())
    }

    /// An operator has enough of it.
    pub(super) fn stop_verify_command(&mut self, command: CommandId) {
        if self.verify.as_ref().is_some_and(Verify::is_running) {
            self.stop_verify("stopped by an operator");
            self.done(command, Vec::new());
        } else {
            self.refuse(command, ErrorId::NoVerify, "no verify is under way");
        }
    }

    /// Ends a verify before its end; an operator may let it go on.
    pub(super) fn stop_verify(&mut self, cause: &str) {
        self.abandon_pieces();
        if let Some(verify) = self.verify.as_mut().filter(|verify| verify.is_running()) {
            verify.end(Over::Stopped(cause.to_owned()));
            self.event(Severity::Warning, format!("verify stopped: {cause}"));
        }
    }

    /// Ends a verify whose findings mean nothing any more. What a complete one found is shown on.
    pub(super) fn void_verify(&mut self, cause: &str) {
        let complete = Course::Over(Over::Complete);
        if let Some(verify) = self.verify.as_mut().filter(|it| it.course != complete) {
            verify.found.clear();
        }
        self.stop_verify(cause);
    }

    /// This copy becomes the target of a resync: what differs in it is copied like everything else.
    pub(super) fn hand_findings_over(&mut self) {
        let is_open =
            |verify: &&Verify| !verify.marked && verify.course != Course::Over(Over::Complete);
        if self.verify.as_ref().filter(is_open).is_some() {
            self.for_each_found(Bitmap::mark);
            let cause = format!("this copy is made equal to that of {}", self.config.peer);
            self.void_verify(&cause);
        }
    }

    /// A piece that the peer does not read holds guests up: they go on, and so does the link.
    pub(super) fn stop_stalled_verify(&mut self) {
        let stalled = self
            .oldest_piece_at_peer()
            .is_some_and(|since| self.now.since(since) >= self.config.stall_timeout);
        if stalled && self.requests.any_waits() {
            let cause = format!(
                "the disk of {} took longer than the stall timeout to read what guests waited for",
                self.config.peer
            );
            self.stop_verify(&cause);
        }
    }

    /// Gives the ranges of all pieces back; a verify that goes on takes them again.
    pub(super) fn abandon_pieces(&mut self) {
        let Some(verify) = &mut self.verify else {
            return;
        };
        let pieces = std::mem::take(&mut verify.pieces);
        let first = pieces.iter().map(|piece| piece.range.start).min();
        verify.cursor = verify.cursor.min(first.unwrap_or(u64::MAX));
        // What was compared behind the first of them is compared again.
        verify.progress.done = verify.progress.done.min(verify.cursor);
        for piece in pieces {
            match piece.stage {
                Stage::AwaitingRange => self.withdraw_claim(Claimant::Piece(piece.serial)),
                Stage::Reading(_) => self.release_range(piece.range),
            }
        }
    }

    /// Keeps a verify going, and ends it.
    pub(super) fn pump_verify(&mut self) {
        self.act_on_findings();
        if !self.verify.as_ref().is_some_and(Verify::is_running) {
            return;
        }
        let peer_serves = self
            .link
            .session()
            .is_some_and(|session| session.peer.role == Role::Primary);
        if peer_serves {
            let cause = format!("{} became Primary", self.config.peer);
            return self.stop_verify(&cause);
        }
        while self.start_piece() {}
        let through = self.verify.as_ref().is_some_and(|verify| {
            verify.pieces.is_empty() && verify.cursor >= self.record.mirror_size
        });
        if through && self.may_compare() {
            self.conclude_verify();
            self.act_on_findings();
        }
    }

    /// Whether the replicas may be compared now. A change of role or record waits for nothing here,
    /// and nothing here for it.
    fn may_compare(&self) -> bool {
        let in_sync = matches!(self.link.session().map(|s| &s.mode), Some(Mode::InSync));
        in_sync && self.transition.is_idle() && self.records.is_settled()
    }

    /// Takes the next piece into the window. Returns whether there was room and one to take.
    fn start_piece(&mut self) -> bool {
        let (window, size) = (self.copy_window(), self.record.mirror_size);
        if !self.may_compare() {
            return false;
        }
        let Some(verify) = &mut self.verify else {
            return false;
        };
        let full = verify.pieces.len() >= window || verify.cursor >= size;
        if full || !self.copy_may_go_on() {
            return false;
        }
        let Some(verify) = &mut self.verify else {
            return false;
        };
        let range = ByteRange {
            start: verify.cursor,
            end: size.min(verify.cursor + RESYNC_CHUNK),
        };
        self.chunk_serial = self.chunk_serial.wrapping_add(1);
        let serial = self.chunk_serial;
        verify.cursor = range.end;
        verify.pieces.push(Piece {
            serial,
            range,
            stage: Stage::AwaitingRange,
        });
        self.copy_begins(range.len());
        if self.locks.acquire(range, Claimant::Piece(serial)) {
            self.piece_has_range(serial);
        }
        true
    }

    /// A piece's range is its own: read it on both sides.
    pub(super) fn piece_has_range(&mut self, serial: u32) {
        if !self.may_compare() {
            return self.put_piece_back(serial);
        }
        let now = self.now;
        let Some(piece) = self.verify.as_mut().and_then(|verify| verify.piece(serial)) else {
            return;
        };
        piece.stage = Stage::Reading(Comparison::new(now));
        let range = piece.range;
        self.ask_digests(range, Purpose::Piece(serial), PeerTag::Piece(serial));
    }

    /// The record changed while a piece waited for its range: the peer would not know the generation
    /// that this node speaks in. It is taken again later.
    fn put_piece_back(&mut self, serial: u32) {
        let Some(verify) = &mut self.verify else {
            return;
        };
        if let Some(at) = verify.pieces.iter().position(|it| it.serial == serial) {
            let range = verify.pieces.swap_remove(at).range;
            verify.cursor = verify.cursor.min(range.start);
            self.release_range(range);
        }
    }

    /// Since when the peer has the oldest piece that it has not answered.
    pub(super) fn oldest_piece_at_peer(&self) -> Option<Time> {
        let asked = |piece: &Piece| match &piece.stage {
            Stage::Reading(comparison) => comparison.waits_for_peer_since(),
            Stage::AwaitingRange => None,
        };
        self.verify.as_ref()?.pieces.iter().filter_map(asked).min()
    }

    /// This node's disk was read.
    pub(super) fn piece_digested(&mut self, serial: u32, result: Result<Vec<Digest>, DiskError>) {
        let Some(piece) = self.verify.as_mut().and_then(|verify| verify.piece(serial)) else {
            return;
        };
        let range = piece.range;
        let Ok(digests) = result else {
            let cause = format!(
                "the local disk cannot be read at {} (+{} bytes)",
                range.start,
                range.len()
            );
            return self.stop_verify(&cause);
        };
        if let Stage::Reading(comparison) = &mut piece.stage {
            comparison.read_here(digests);
        }
        self.compare(serial);
    }

    /// The peer has read its disk. Answers to what was given up meanwhile mean nothing.
    pub(super) fn peer_digested(&mut self, serial: u32, bytes: &[u8]) {
        let Some(piece) = self.verify.as_mut().and_then(|verify| verify.piece(serial)) else {
            return;
        };
        let Some(digests) = digests_of(piece.range, bytes) else {
            return self.protocol_error("digests of another range");
        };
        let expected = match &mut piece.stage {
            Stage::Reading(comparison) => comparison.read_there(digests),
            Stage::AwaitingRange => false,
        };
        if !expected {
            return self.protocol_error("digests that were not asked for");
        }
        self.compare(serial);
    }

    fn compare(&mut self, serial: u32) {
        let now = self.now;
        let Some(verify) = &mut self.verify else {
            return;
        };
        let Some((range, differing)) = verify.take_compared(serial) else {
            return;
        };
        verify.progress.advance(now, range.len());
        let first = verify.found.is_empty();
        let differs = !differing.is_empty();
        let found = differing.iter().map(|block| block.start / BLOCK);
        verify.found.extend(found);
        let too_many = verify.found.len() > MOST_FOUND;
        if differs && first {
            let text = format!(
                "verify: {} differs, first within {} (+{} bytes); `kagami status {}` shows where",
                self.config.peer,
                range.start,
                range.len(),
                self.config.mirror
            );
            self.event(Severity::Error, text);
        }
        self.release_range(range);
        if too_many {
            self.stop_verify(
                "more differs than can be noted; `kagami invalidate` copies everything",
            );
        }
    }

    fn conclude_verify(&mut self) {
        let Some(verify) = &mut self.verify else {
            return;
        };
        verify.end(Over::Complete);
        let found = verify.found.len() as u64 * BLOCK;
        if found == 0 {
            self.event(Severity::Info, "verify complete: no differences".to_owned());
        } else {
            let text = format!("verify complete: {found} bytes differ");
            self.event(Severity::Error, text);
        }
    }

    /// Marks what was found, and then becomes the sole holder: only from then on is it certain which
    /// way it will be copied. No handshake begins meanwhile.
    fn act_on_findings(&mut self) {
        if !self.is_ending_verify() || !self.transition.is_idle() || !self.records.is_settled() {
            return;
        }
        self.for_each_found(Bitmap::mark);
        // Nothing is decided on marks that a crash would lose.
        if !self.bitmap_is_saved() {
            return self.save_bitmap();
        }
        let repair = self.verify.as_ref().is_some_and(|verify| verify.repair);
        if self.record.holders == Holders::Both {
            let after = AfterShrink::Verified { repair };
            self.begin_transition(Kind::Shrink { after });
        } else {
            self.verify_ended();
        }
    }

    fn for_each_found(&mut self, change: fn(&mut Bitmap, ByteRange)) {
        let size = self.record.mirror_size;
        for block in self.verify.iter().flat_map(|verify| &verify.found) {
            let start = block * BLOCK;
            let end = size.min(start + BLOCK);
            change(&mut self.bitmap, ByteRange { start, end });
        }
    }

    /// Whether what a verify has found is about to be acted upon.
    pub(super) fn is_ending_verify(&self) -> bool {
        let acting = |verify: &Verify| matches!(verify.course, Course::Acting(_));
        self.verify.as_ref().is_some_and(acting) && self.disk == DiskState::UpToDate
    }

    /// What was found has been acted upon, or cannot be.
    pub(super) fn verify_ended(&mut self) {
        if let Some(verify) = &mut self.verify
            && let Course::Acting(over) = &verify.course
        {
            verify.course = Course::Over(over.clone());
            verify.marked = true;
        }
    }

    /// The right to go on alone cannot be had: nothing is marked after all, and an operator may try
    /// again.
    pub(super) fn verify_without_right(&mut self, cause: &str) {
        self.for_each_found(Bitmap::clear);
        self.save_bitmap();
        if let Some(verify) = &mut self.verify {
            verify.course = Course::Over(Over::Stopped(cause.to_owned()));
        }
    }

    /// Why the two parted that a verify found to differ.
    pub(super) fn verdict_of_verify(&self) -> String {
        let (peer, node) = (&self.config.peer, &self.config.node);
        let found = self.verify.as_ref().map_or(0, |verify| verify.found.len());
        let found = found as u64 * BLOCK;
        format!(
            "a verify found {found} bytes that differ, and connecting makes {peer}'s copy equal to \
             {node}'s"
        )
    }

    /// Both nodes were asked to verify at once. Both would find the same and each leave the other behind:
    /// the one with the smaller replica id goes on.
    pub(super) fn settle_two_verifies(&mut self) {
        let theirs = self.link.session().map(|session| session.hello.replica);
        let goes_on = theirs.is_some_and(|theirs| self.record.replica < theirs);
        if !goes_on && self.verify.as_ref().is_some_and(Verify::is_running) {
            let cause = format!("{} verifies at the same time", self.config.peer);
            self.void_verify(&cause);
        }
    }

    /// Whether the peer is verifying, as far as can be told: it does not say when it has done.
    fn peer_verifies(&self) -> bool {
        let asked = self
            .link
            .session()
            .and_then(|session| session.compared.asked);
        asked.is_some_and(|at| self.now.since(at) < self.config.stall_timeout)
    }

    /// Whether a change of role must wait until an operator has dealt with what was found.
    pub(super) fn has_found_differences(&self) -> bool {
        let open = |verify: &Verify| verify.course != Course::Over(Over::Complete);
        let verify = self.verify.as_ref().filter(|verify| open(verify));
        verify.is_some_and(|verify| !verify.found.is_empty())
            && self.record.holders == Holders::Both
    }
}
