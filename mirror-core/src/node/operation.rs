//! Disk operations in flight and what each is for.

use super::boundary::{ConnectionId, OpId};
use super::request_table::RequestKey;
use crate::types::ByteRange;

/// What a disk operation is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Purpose {
    /// The local part of a guest's request.
    Guest(RequestKey),
    /// A flush that settles writes so that their extents can leave the activity log. `upto`
    /// counts the writes that had completed when it was submitted.
    Settle {
        /// Local writes it covers.
        upto: u64,
    },
    /// A write or zeroing that the peer asked for.
    Peer {
        /// Where the answer goes.
        connection: ConnectionId,
        /// The peer's number for it.
        id: u64,
        /// Whether it is resync data, and for which range.
        resync: Option<ByteRange>,
    },
    /// A flush that the peer asked for.
    PeerFlush {
        /// Where the answer goes.
        connection: ConnectionId,
        /// The peer's number for it.
        id: u64,
    },
    /// The read of a resync chunk.
    Chunk(u32),
    /// The read of a resync chunk that is compared with the target's.
    ChunkDigests(u32),
    /// The read of a piece that is compared with the peer's.
    Piece(u32),
    /// The read of a piece that the peer compares with its own.
    PeerPiece {
        /// Where the answer goes.
        connection: ConnectionId,
        /// The peer's number for it.
        id: u64,
    },
    /// A flush within the transition of this serial number.
    Step(u32),
    /// A flush of what an earlier daemon of this boot wrote.
    AttachFlush,
    /// Metadata: reading the header at attach.
    ReadHeader,
    /// Metadata: reading bitmap blocks from this one on.
    ReadBitmap(u64),
    /// Metadata: a superblock slot.
    Superblock,
    /// Metadata: an activity log transaction.
    Log,
    /// Metadata: a run of bitmap blocks.
    Bitmap,
}

/// The operations in flight.
#[derive(Debug, Default)]
pub(super) struct Operations {
    slots: Vec<Option<Purpose>>,
    generations: Vec<u32>,
    free: Vec<u32>,
    /// Operations that write data for the peer.
    pub(super) peer_writes: usize,
    /// Reads of pieces that the peer compares.
    pub(super) peer_pieces: usize,
    /// Operations for guests, also for those that were answered with an error meanwhile.
    pub(super) guests: usize,
}

impl Operations {
    /// Registers an operation that is about to start.
    pub(super) fn start(&mut self, purpose: Purpose) -> OpId {
        if let Some(count) = self.count(purpose) {
            *count += 1;
        }
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.generations.push(0);
            (self.slots.len() - 1) as u32
        });
        self.slots[index as usize] = Some(purpose);
        OpId(u64::from(self.generations[index as usize]) << 32 | u64::from(index))
    }

    /// Takes an operation that ended; `None` if there is no such operation.
    pub(super) fn finish(&mut self, op: OpId) -> Option<Purpose> {
        let index = op.0 as u32 as usize;
        if self.generations.get(index).copied()? != (op.0 >> 32) as u32 {
            return None;
        }
        let purpose = self.slots[index].take()?;
        self.generations[index] = self.generations[index].wrapping_add(1);
        self.free.push(index as u32);
        if let Some(count) = self.count(purpose) {
            *count -= 1;
        }
        Some(purpose)
    }

    fn count(&mut self, purpose: Purpose) -> Option<&mut usize> {
        match purpose {
            Purpose::Peer { .. } | Purpose::PeerFlush { .. } => Some(&mut self.peer_writes),
            Purpose::PeerPiece { .. } => Some(&mut self.peer_pieces),
            Purpose::Guest(_) => Some(&mut self.guests),
            _ => None,
        }
    }

    /// Whether nothing that was submitted for guests or the peer is on its way to the disk.
    pub(super) fn is_drained(&self) -> bool {
        self.peer_writes == 0 && self.guests == 0
    }

    /// Operations in flight.
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}
