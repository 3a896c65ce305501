//! Making the peer's replica equal again, block by dirty block (R9).
//!
//! The source drives. It walks its dirty bitmap; each run of dirty blocks takes its range like a
//! guest's write would, is read, sent, written by the target, and gives the range back. A block
//! leaves the bitmap only when a flush of the target covered it. Guest writes go to both replicas
//! all the while, so one walk finds everything; what a walk leaves over, the next one takes. When
//! nothing is dirty the source widens the holders ([`super::transition`]). Where an operator asked for it
//! (`--checksum`), both nodes read a chunk first, and only what differs is sent.

use super::Node;
use super::boundary::{Action, Body, ConnectionId, DiskError, Payload};
use super::compare::{Comparison, digests_of};
use super::link::{Mode, PeerTag};
use super::operation::Purpose;
use super::ordering::Claimant;
use super::timer::Timer;
use super::transition::Kind;
use crate::error::{ErrorId, Refusal};
use crate::limits::{RESYNC_CHECKPOINT_BYTES, RESYNC_CHECKPOINT_TIME, RESYNC_CHUNK};
use crate::types::{ByteRange, Digest, Time};
use crate::wire::{FLAG_MAY_UNMAP, FrameType, Header};
use std::time::Duration;

/// The source's side of a resync.
#[derive(Debug)]
pub(super) struct Resync {
    /// Where the walk is.
    cursor: u64,
    chunks: Vec<Chunk>,
    /// Written by the target, not known to be durable there.
    written: Vec<ByteRange>,
    written_bytes: u64,
    /// Covered by the flush that is on its way.
    flushing: Option<Vec<ByteRange>>,
    /// Blocks that are equal already are found by their digests, and not sent.
    by_checksum: bool,
    pub(super) progress: Progress,
}

#[derive(Debug)]
struct Chunk {
    serial: u32,
    range: ByteRange,
    stage: ChunkStage,
}

#[derive(Debug)]
enum ChunkStage {
    AwaitingRange,
    Comparing(Comparison),
    /// What is to be sent of it.
    Reading(ByteRange),
    /// With the peer, since then.
    Sent(Time),
}

/// The target's side of a resync.
#[derive(Debug)]
pub(super) struct Copying {
    /// Written here, not covered by a flush yet.
    written: Vec<ByteRange>,
    /// The source compares first, and what it has compared counts as done.
    by_checksum: bool,
    pub(super) progress: Progress,
}

/// How far a resync or a verify is.
#[derive(Debug)]
pub(super) struct Progress {
    /// Bytes that were dirty when it began.
    pub(super) total: u64,
    /// Bytes that the target has written, or was found to have; of a verify, bytes compared.
    pub(super) done: u64,
    /// Bytes of payload that crossed the link.
    pub(super) sent: u64,
    /// The last two marks, half a second or more apart: when, and `done` then.
    marks: [(Time, u64); 2],
}

impl Progress {
    pub(super) fn new(now: Time, total: u64) -> Progress {
        Progress {
            total,
            done: 0,
            sent: 0,
            marks: [(now, 0); 2],
        }
    }

    /// Counts `done` bytes more.
    pub(super) fn advance(&mut self, now: Time, done: u64) {
        self.done += done;
        if now.since(self.marks[1].0) >= Duration::from_millis(500) {
            self.marks = [self.marks[1], (now, self.done)];
        }
    }

    /// Recent speed in bytes per second.
    pub(super) fn rate(&self, now: Time) -> u64 {
        let (since, done) = self.marks[0];
        let seconds = now.since(since).as_secs_f64();
        if seconds > 0.0 {
            (self.done.saturating_sub(done) as f64 / seconds) as u64
        } else {
            0
        }
    }
}

impl Resync {
    pub(super) fn new(now: Time, total: u64, by_checksum: bool) -> Resync {
        Resync {
            by_checksum,
            cursor: 0,
            chunks: Vec::new(),
            written: Vec::new(),
            written_bytes: 0,
            flushing: None,
            progress: Progress::new(now, total),
        }
    }

    fn chunk(&mut self, serial: u32) -> Option<&mut Chunk> {
        self.chunks.iter_mut().find(|chunk| chunk.serial == serial)
    }

    fn take_chunk(&mut self, serial: u32) -> Option<Chunk> {
        let at = self
            .chunks
            .iter()
            .position(|chunk| chunk.serial == serial)?;
        Some(self.chunks.swap_remove(at))
    }
}

impl Copying {
    pub(super) fn new(now: Time) -> Copying {
        Copying {
            written: Vec::new(),
            by_checksum: false,
            progress: Progress::new(now, 0),
        }
    }

    /// The source compares a range that is dirty.
    pub(super) fn compared(&mut self, now: Time, range: ByteRange) {
        self.by_checksum = true;
        self.progress.advance(now, range.len());
    }
}

impl Node {
    fn resync(&mut self) -> Option<&mut Resync> {
        match &mut self.link.session_mut()?.mode {
            Mode::Source(resync) => Some(resync),
            _ => None,
        }
    }

    /// Whether an operator holds the resync, here or at the peer.
    pub(super) fn resync_is_held(&self) -> bool {
        self.resync_paused
            || self
                .link
                .session()
                .is_some_and(|session| session.peer.paused)
    }

    /// Keeps the resync going: fills its window, makes progress durable, and ends it.
    pub(super) fn pump_resync(&mut self) {
        if self.resync().is_none() {
            return;
        }
        if !self.resync_is_held() {
            while self.start_chunk() {}
        }
        self.checkpoint_if_due();
        let clean = self.bitmap.is_clean();
        let Some(resync) = self.resync() else { return };
        let walked =
            resync.chunks.is_empty() && resync.flushing.is_none() && resync.written.is_empty();
        if walked && clean && self.transition.is_idle() {
            self.begin_transition(Kind::Widen);
        }
    }

    /// Since when the peer has the oldest chunk that it has not written.
    pub(super) fn oldest_chunk_at_peer(&self) -> Option<Time> {
        let Mode::Source(resync) = &self.link.session()?.mode else {
            return None;
        };
        let sent = |chunk: &Chunk| match &chunk.stage {
            ChunkStage::Sent(since) => Some(*since),
            ChunkStage::Comparing(comparison) => comparison.waits_for_peer_since(),
            ChunkStage::AwaitingRange | ChunkStage::Reading(_) => None,
        };
        resync.chunks.iter().filter_map(sent).min()
    }

    /// The source says how much is dirty in all: only it knows.
    pub(super) fn learn_total(&mut self, total: u64) {
        if let Some(Mode::Target(copying)) = self.link.session_mut().map(|s| &mut s.mode) {
            copying.progress.total = total;
        }
    }

    /// Takes the next dirty run into the window. Returns whether there was room and one to take.
    fn start_chunk(&mut self) -> bool {
        let window = self.copy_window();
        let Some(resync) = self.resync() else {
            return false;
        };
        if resync.chunks.len() >= window {
            return false;
        }
        let cursor = resync.cursor;
        let resting =
            resync.chunks.is_empty() && resync.written.is_empty() && resync.flushing.is_none();
        let Some(range) = self.bitmap.next_dirty(cursor, RESYNC_CHUNK) else {
            // The end of a walk. The next one may only begin when everything this one sent is
            // accounted for, or it would send it again.
            if cursor > 0 && resting && !self.bitmap.is_clean() {
                if let Some(resync) = self.resync() {
                    resync.cursor = 0;
                }
                return true;
            }
            return false;
        };
        if !self.copy_may_go_on() {
            return false;
        }
        self.copy_begins(range.len());
        self.chunk_serial = self.chunk_serial.wrapping_add(1);
        let serial = self.chunk_serial;
        let Some(resync) = self.resync() else {
            return false;
        };
        resync.cursor = range.end;
        resync.chunks.push(Chunk {
            serial,
            range,
            stage: ChunkStage::AwaitingRange,
        });
        if self.locks.acquire(range, Claimant::Chunk(serial)) {
            self.chunk_has_range(serial);
        }
        true
    }

    /// A chunk's range is its own: read it, or find out first whether it is equal already.
    pub(super) fn chunk_has_range(&mut self, serial: u32) {
        let now = self.now;
        let Some(resync) = self.resync() else { return };
        let by_checksum = resync.by_checksum;
        let Some(chunk) = resync.chunk(serial) else {
            return;
        };
        let range = chunk.range;
        if by_checksum {
            chunk.stage = ChunkStage::Comparing(Comparison::new(now));
            self.ask_digests(range, Purpose::ChunkDigests(serial), PeerTag::Chunk(serial));
        } else {
            self.read_chunk(serial, range);
        }
    }

    fn read_chunk(&mut self, serial: u32, range: ByteRange) {
        let Some(chunk) = self.resync().and_then(|resync| resync.chunk(serial)) else {
            return;
        };
        chunk.stage = ChunkStage::Reading(range);
        let op = self.ops.start(Purpose::Chunk(serial));
        self.out.push(Action::Read {
            op,
            range,
            checksum: true,
        });
    }

    /// This node's disk was read, to compare a chunk.
    pub(super) fn chunk_digested(&mut self, serial: u32, result: Result<Vec<Digest>, DiskError>) {
        let Ok(digests) = result else {
            return self.chunk_unreadable(serial);
        };
        let chunk = self.resync().and_then(|resync| resync.chunk(serial));
        if let Some(ChunkStage::Comparing(comparison)) = chunk.map(|chunk| &mut chunk.stage) {
            comparison.read_here(digests);
            self.chunk_compared(serial);
        }
    }

    /// The peer has read its disk, to compare a chunk.
    pub(super) fn chunk_digested_there(&mut self, serial: u32, bytes: &[u8]) {
        let Some(chunk) = self.resync().and_then(|resync| resync.chunk(serial)) else {
            return self.protocol_error("digests of nothing");
        };
        let digests = digests_of(chunk.range, bytes);
        let taken = match (&mut chunk.stage, digests) {
            (ChunkStage::Comparing(comparison), Some(digests)) => comparison.read_there(digests),
            _ => false,
        };
        match taken {
            true => self.chunk_compared(serial),
            false => self.protocol_error("digests that were not asked for"),
        }
    }

    /// Sends what differs in a chunk, from the first block to the last. What the peer has already need
    /// only become durable there.
    fn chunk_compared(&mut self, serial: u32) {
        let Some(chunk) = self.resync().and_then(|resync| resync.chunk(serial)) else {
            return;
        };
        let ChunkStage::Comparing(comparison) = &chunk.stage else {
            return;
        };
        let Some(differing) = comparison.differing(chunk.range) else {
            return;
        };
        match (differing.first(), differing.last()) {
            (Some(first), Some(last)) => {
                let (start, end) = (first.start, last.end);
                self.read_chunk(serial, ByteRange { start, end });
            }
            _ => self.chunk_is_there(serial),
        }
    }

    /// A chunk was read: send it, or the word that it is all zeroes.
    pub(super) fn chunk_read(&mut self, serial: u32, payload: Payload) {
        let now = self.now;
        let generation = self.record.generation.tag();
        let chunk = self.resync().and_then(|resync| resync.chunk(serial));
        let stage = chunk.map(|chunk| &mut chunk.stage);
        let Some((stage, range)) = stage.and_then(|stage| match *stage {
            ChunkStage::Reading(range) => Some((stage, range)),
            _ => None,
        }) else {
            self.out.push(Action::Release(payload));
            return;
        };
        *stage = ChunkStage::Sent(now);
        let header = Header {
            offset: range.start,
            length: range.len() as u32,
            ..Header::bare(
                FrameType::SyncWrite,
                generation,
                PeerTag::Chunk(serial).encode(),
            )
        };
        if payload.zero {
            let flags = FLAG_MAY_UNMAP;
            self.send(Header {
                kind: FrameType::SyncZero,
                flags,
                ..header
            });
        } else {
            if let Some(resync) = self.resync() {
                resync.progress.sent += range.len();
            }
            self.send_data(header, payload);
        }
        self.out.push(Action::Release(payload));
    }

    /// A chunk cannot be read. The resync cannot end, and trying again would not help: the link
    /// stays down until an operator acts, and the service goes on with what it has.
    pub(super) fn chunk_unreadable(&mut self, serial: u32) {
        let Some(range) = self
            .resync()
            .and_then(|r| r.chunk(serial))
            .map(|chunk| chunk.range)
        else {
            return;
        };
        let text = format!(
            "the local disk cannot be read at {} (+{} bytes), so the peer cannot be made equal; \
             replace the disk, or write that range, then `kagami connect {}`",
            range.start,
            range.len(),
            self.config.mirror
        );
        let refusal = Refusal::new(ErrorId::DiskFailed, text);
        self.refuse_peer(refusal);
    }

    /// The target has written a chunk; it is not durable there yet.
    pub(super) fn chunk_written(&mut self, serial: u32) {
        let Some(resync) = self.resync() else { return };
        let stage = resync.chunk(serial).map(|chunk| &chunk.stage);
        match stage {
            Some(ChunkStage::Sent(_)) => self.chunk_is_there(serial),
            _ => self.protocol_error("a chunk is written that was not sent"),
        }
    }

    /// The target's disk has a chunk; a flush is to make it durable.
    fn chunk_is_there(&mut self, serial: u32) {
        let now = self.now;
        let Some(resync) = self.resync() else { return };
        let Some(chunk) = resync.take_chunk(serial) else {
            return;
        };
        resync.written.push(chunk.range);
        resync.written_bytes += chunk.range.len();
        resync.progress.advance(now, chunk.range.len());
        self.timers
            .set_if_idle(Timer::Checkpoint, self.now.after(RESYNC_CHECKPOINT_TIME));
        self.release_range(chunk.range);
    }

    /// Asks the target for a flush when enough was written, or nothing more will be.
    fn checkpoint_if_due(&mut self) {
        let end_of_walk = self
            .resync()
            .map(|resync| (resync.cursor, resync.chunks.is_empty()))
            .is_some_and(|(cursor, idle)| idle && self.bitmap.next_dirty(cursor, 1).is_none());
        let due = self.checkpoint_due;
        let Some(resync) = self.resync() else { return };
        let enough = resync.written_bytes >= RESYNC_CHECKPOINT_BYTES;
        if resync.flushing.is_some() || resync.written.is_empty() || !(enough || due || end_of_walk)
        {
            return;
        }
        resync.flushing = Some(std::mem::take(&mut resync.written));
        resync.written_bytes = 0;
        self.checkpoint_due = false;
        self.timers.cancel(Timer::Checkpoint);
        let generation = self.record.generation.tag();
        self.send(Header::bare(
            FrameType::Flush,
            generation,
            PeerTag::Checkpoint.encode(),
        ));
    }

    /// What the target wrote before the checkpoint is durable there: it is dirty no more.
    pub(super) fn checkpoint_done(&mut self) {
        let Some(ranges) = self.resync().and_then(|resync| resync.flushing.take()) else {
            return;
        };
        for range in ranges {
            self.bitmap.clear(range);
        }
        self.save_bitmap();
    }

    /// The link is gone: nothing that was on its way counts.
    pub(super) fn abandon_resync(&mut self, resync: Resync) {
        for chunk in resync.chunks {
            match chunk.stage {
                ChunkStage::AwaitingRange => self.withdraw_claim(Claimant::Chunk(chunk.serial)),
                ChunkStage::Comparing(_) | ChunkStage::Reading(_) | ChunkStage::Sent(_) => {
                    self.release_range(chunk.range);
                }
            }
        }
        self.checkpoint_due = false;
    }

    /// The target wrote a piece of resync data.
    pub(super) fn copied(&mut self, connection: ConnectionId, range: ByteRange) {
        let now = self.now;
        let Some(session) = self.link.session_mut() else {
            return;
        };
        if let Mode::Target(copying) = &mut session.mode
            && session.connection == connection
        {
            copying.written.push(range);
            if !copying.by_checksum {
                copying.progress.advance(now, range.len());
            }
        }
    }

    /// What the target had written when a flush was submitted; taken out until the flush ends.
    pub(super) fn copied_before_flush(&mut self) -> Vec<ByteRange> {
        match self.link.session_mut().map(|session| &mut session.mode) {
            Some(Mode::Target(copying)) => std::mem::take(&mut copying.written),
            _ => Vec::new(),
        }
    }

    /// The flush ended well: the target's own marks for these blocks are settled, so that an
    /// interrupted resync does not copy them again.
    pub(super) fn copied_durably(&mut self, ranges: Vec<ByteRange>) {
        for range in &ranges {
            self.bitmap.clear(*range);
        }
        if !ranges.is_empty() {
            self.save_bitmap();
        }
    }

    /// Adds the payload of resync data to the target's progress.
    pub(super) fn count_copied_payload(&mut self, body: &Body) {
        if let Body::Data(payload) = body
            && let Some(Mode::Target(copying)) =
                self.link.session_mut().map(|session| &mut session.mode)
        {
            copying.progress.sent += u64::from(payload.len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rate is that of the last half second or second, not of the whole resync.
    #[test]
    fn a_rate_is_a_recent_one() {
        let at = |milliseconds: u64| Time(milliseconds * 1_000_000);
        let mut progress = Progress::new(at(1000), 100 << 20);
        assert_eq!(progress.rate(at(1000)), 0);
        let mut sudden = Progress::new(at(1000), 100);
        sudden.advance(at(1000), 50);
        assert_eq!(sudden.rate(at(1000)), 0);
        for step in 1..=10 {
            progress.advance(at(1000 + step * 100), 1 << 20);
        }
        assert_eq!((progress.done, progress.total), (10 << 20, 100 << 20));
        assert_eq!(progress.rate(at(2000)), 10 << 20);
        // From here on it is ten times slower, and what was before is forgotten.
        for step in 1..=5 {
            progress.advance(at(2000 + step * 1000), 1 << 20);
        }
        assert_eq!(progress.rate(at(7000)), 1 << 20);
    }
}
