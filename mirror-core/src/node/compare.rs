//! One range of the two replicas, compared by digests: the step that a verify and a resync by checksum
//! have in common, and what the other node does for it.
//!
//! Whoever compares holds the range, so that nothing changes in it on either disk meanwhile.

use super::Node;
use super::boundary::{Action, ConnectionId, DiskError, Severity};
use super::link::{Mode, PeerTag};
use super::operation::Purpose;
use crate::limits::{BLOCK, RESYNC_CHUNK, RESYNC_WINDOW_IDLE, SECTOR};
use crate::types::{ByteRange, Digest, Role, Time};
use crate::wire::message::{digest_bytes, digests_from};
use crate::wire::{FrameType, Header};

/// Ranges of the peer that are read here at once at most: those of its window, and what a slow disk
/// still reads of windows that it gave up, by stopping a verify or with a connection.
const MOST_PEER_PIECES: usize = 16 * RESYNC_WINDOW_IDLE;

/// Both disks are being read.
#[derive(Debug)]
pub(super) struct Comparison {
    since: Time,
    here: Option<Vec<Digest>>,
    there: Option<Vec<Digest>>,
}

impl Comparison {
    pub(super) fn new(now: Time) -> Comparison {
        Comparison {
            since: now,
            here: None,
            there: None,
        }
    }

    /// This node's disk was read.
    pub(super) fn read_here(&mut self, digests: Vec<Digest>) {
        self.here = Some(digests);
    }

    /// The peer has read its disk. Returns whether that was asked for.
    #[must_use]
    pub(super) fn read_there(&mut self, digests: Vec<Digest>) -> bool {
        self.there.replace(digests).is_none()
    }

    /// Since when the peer has not answered.
    pub(super) fn waits_for_peer_since(&self) -> Option<Time> {
        self.there.is_none().then_some(self.since)
    }

    /// The blocks of the range that differ, once both were read.
    pub(super) fn differing(&self, range: ByteRange) -> Option<Vec<ByteRange>> {
        let (here, there) = (self.here.as_ref()?, self.there.as_ref()?);
        let pairs = blocks_of(range).zip(here.iter().zip(there));
        let differing = pairs.filter(|(_, (ours, theirs))| ours != theirs);
        Some(differing.map(|(block, _)| block).collect())
    }
}

/// What a comparison by the peer asks of this disk.
#[derive(Debug, Default)]
pub(super) struct Compared {
    /// When it last asked for digests, to verify.
    pub(super) asked: Option<Time>,
    /// That some cannot be had was told.
    told: bool,
}

/// The blocks that a range is made of; the last one may be shorter.
fn blocks_of(range: ByteRange) -> impl Iterator<Item = ByteRange> {
    (range.start..range.end)
        .step_by(BLOCK as usize)
        .map(move |start| ByteRange {
            start,
            end: range.end.min(start + BLOCK),
        })
}

/// What the peer says of a range. No digests: it cannot be read there, which is as good as different.
pub(super) fn digests_of(range: ByteRange, bytes: &[u8]) -> Option<Vec<Digest>> {
    let blocks = blocks_of(range).count();
    match bytes.is_empty() {
        true => Some(vec![Digest::UNREADABLE; blocks]),
        false => digests_from(bytes).filter(|digests| digests.len() == blocks),
    }
}

impl Node {
    /// Has both disks read.
    pub(super) fn ask_digests(&mut self, range: ByteRange, purpose: Purpose, tag: PeerTag) {
        let op = self.ops.start(purpose);
        self.out.push(Action::Digest { op, range });
        let generation = self.record.generation.tag();
        self.send(Header {
            offset: range.start,
            length: range.len() as u32,
            ..Header::bare(FrameType::Digest, generation, tag.encode())
        });
    }

    /// The peer compares: reads a piece of this disk.
    pub(super) fn peer_asks_digests(&mut self, header: Header) {
        if let Err(what) = self.check_digest_request(&header) {
            return self.protocol_error(what);
        }
        // It did not know yet of a change of role or generation, and is about to stop.
        let stale = header.generation != self.record.generation.tag();
        if stale || self.role == Role::Primary {
            return;
        }
        let now = self.now;
        let range = ByteRange::new(header.offset, header.length.into());
        let Some(session) = self.link.session_mut() else {
            return;
        };
        let connection = session.connection;
        match &mut session.mode {
            Mode::Target(copying) => copying.compared(now, range),
            _ => {
                session.compared.asked = Some(now);
                self.settle_two_verifies();
            }
        }
        let id = header.id;
        let op = self.ops.start(Purpose::PeerPiece { connection, id });
        self.out.push(Action::Digest { op, range });
    }

    fn check_digest_request(&self, header: &Header) -> Result<(), &'static str> {
        let mode = self.link.session().map(|session| &session.mode);
        let range = ByteRange::new(header.offset, header.length.into());
        // Only a verify may cross a change of generation.
        let verifies = matches!(mode, Some(Mode::InSync));
        let before = self.record.ancestry.first().filter(|_| verifies);
        let mut known = std::iter::once(&self.record.generation).chain(before);
        if !matches!(mode, Some(Mode::InSync | Mode::Target(_))) {
            Err("a comparison with what is no copy")
        } else if !known.any(|known| known.tag() == header.generation) {
            Err("a comparison in another generation")
        } else if !range.start.is_multiple_of(BLOCK)
            || range.is_empty()
            || range.len() > RESYNC_CHUNK
            || !range.end.is_multiple_of(SECTOR)
            || range.end > self.record.mirror_size
        {
            Err("a comparison out of range")
        } else if self.ops.peer_pieces >= MOST_PEER_PIECES {
            Err("more comparisons at once than one verify makes")
        } else {
            Ok(())
        }
    }

    /// What the peer asked for was read here, or cannot be.
    pub(super) fn answer_digests(
        &mut self,
        connection: ConnectionId,
        id: u64,
        result: Result<Vec<Digest>, DiskError>,
    ) {
        if self.link.connection() == Some(connection) {
            if result.is_err() {
                self.tell_unreadable();
            }
            let generation = self.record.generation.tag();
            let bytes = digest_bytes(&result.unwrap_or_default());
            self.send_control(Header::bare(FrameType::Digests, generation, id), bytes);
        }
    }

    /// Once for a connection: a dead disk fails everywhere.
    fn tell_unreadable(&mut self) {
        let session = self.link.session_mut();
        let told = session.map(|session| std::mem::replace(&mut session.compared.told, true));
        if told == Some(false) {
            let text = format!(
                "the local disk cannot be read where {} compares, which counts as different",
                self.config.peer
            );
            self.event(Severity::Error, text);
        }
    }
}
