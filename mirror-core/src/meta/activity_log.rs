//! The activity log on disk: which 4 MiB extents may have writes on their way (R6).
//!
//! One transaction is one 4 KiB block with the whole table of active extents, written durably to
//! the next place of a ring of eight. The valid block of the highest sequence is the log: a torn
//! transaction leaves the one before it in force, and no write that needed the torn one was begun.

use super::{ACTIVITY_LOG_BLOCKS, META_BLOCK, checksum};
use crate::fields::MAX_COUNTER;
use crate::limits::ACTIVITY_LOG_SLOTS;
use crate::types::ReplicaId;
use std::mem::offset_of;
use zerocopy::byteorder::little_endian::{U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

const MAGIC: u64 = u64::from_le_bytes(*b"KGMACTLG");
const FREE: u32 = u32::MAX;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawLog {
    magic: U64,
    replica: U128,
    sequence: U64,
    crc: U32,
    reserved: [u8; 60],
    extents: [U32; ACTIVITY_LOG_SLOTS],
}
const _: () = assert!(size_of::<RawLog>() == META_BLOCK as usize);

/// One transaction: the extents active from it on.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Transaction {
    /// Grows by one with each transaction of a replica.
    pub sequence: u64,
    /// The active extents, at most [`ACTIVITY_LOG_SLOTS`].
    pub extents: Vec<u32>,
}

impl Transaction {
    /// Where in the ring this transaction belongs.
    pub fn ring_index(&self) -> u64 {
        self.sequence % ACTIVITY_LOG_BLOCKS
    }

    /// The block's bytes for `replica`'s disk.
    pub fn encode(&self, replica: ReplicaId) -> Vec<u8> {
        let mut raw = RawLog {
            magic: MAGIC.into(),
            replica: replica.0.into(),
            sequence: self.sequence.into(),
            crc: U32::ZERO,
            reserved: [0; 60],
            extents: [FREE.into(); ACTIVITY_LOG_SLOTS],
        };
        for (slot, extent) in raw.extents.iter_mut().zip(&self.extents) {
            *slot = (*extent).into();
        }
        raw.crc = crc32fast::hash(raw.as_bytes()).into();
        raw.as_bytes().to_vec()
    }

    /// The transaction in a block, if the block verifies and belongs to `replica`.
    pub fn decode(bytes: &[u8], replica: ReplicaId) -> Option<Transaction> {
        let raw = RawLog::ref_from_bytes(bytes).ok()?;
        let good = raw.magic.get() == MAGIC
            && raw.replica.get() == replica.0
            && raw.crc.get() == checksum(bytes, offset_of!(RawLog, crc));
        good.then(|| Transaction {
            sequence: raw.sequence.get(),
            extents: raw
                .extents
                .iter()
                .map(|extent| extent.get())
                .filter(|e| *e != FREE)
                .collect(),
        })
    }

    /// The log in force, from the ring's blocks. `None` when no block verifies, or when the highest
    /// sequence is one that no life counts to: then nothing is known and every extent counts as
    /// active.
    pub fn newest<'a>(
        blocks: impl Iterator<Item = &'a [u8]>,
        replica: ReplicaId,
    ) -> Option<Transaction> {
        blocks
            .filter_map(|block| Transaction::decode(block, replica))
            .max_by_key(|transaction| transaction.sequence)
            .filter(|transaction| transaction.sequence <= MAX_COUNTER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_transaction_leaves_the_one_before_in_force() {
        let replica = ReplicaId(9);
        let old = Transaction {
            sequence: 4,
            extents: vec![1, 2, 3],
        };
        let new = Transaction {
            sequence: 5,
            extents: vec![2, 3, 4],
        };
        let mut torn = new.encode(replica);
        let stale = Transaction {
            sequence: 1,
            extents: vec![7],
        }
        .encode(replica);
        let blocks = [stale.clone(), old.encode(replica), torn.clone()];
        assert_eq!(
            Transaction::newest(blocks.iter().map(|b| &b[..]), replica),
            Some(new)
        );
        torn[512..1024].fill(0);
        let blocks = [stale, old.encode(replica), torn];
        assert_eq!(
            Transaction::newest(blocks.iter().map(|b| &b[..]), replica),
            Some(old)
        );
        assert_eq!(
            Transaction::newest(blocks.iter().map(|b| &b[..]), ReplicaId(8)),
            None
        );
    }

    /// Counting on from it would overflow, and an older block must not take its place.
    #[test]
    fn a_sequence_beyond_belief_makes_the_log_unknown() {
        let replica = ReplicaId(9);
        let newest = |sequences: [u64; 2]| {
            let blocks = sequences.map(|sequence| {
                let extents = vec![1];
                Transaction { sequence, extents }.encode(replica)
            });
            let newest = Transaction::newest(blocks.iter().map(|b| &b[..]), replica);
            newest.map(|transaction| transaction.sequence)
        };
        assert_eq!(newest([MAX_COUNTER - 1, MAX_COUNTER]), Some(MAX_COUNTER));
        assert_eq!(newest([4, MAX_COUNTER + 1]), None);
        assert_eq!(newest([4, u64::MAX]), None);
    }

    /// docs/format.md, "Activity log block".
    #[test]
    fn offsets_are_as_documented() {
        use core::mem::offset_of;
        assert_eq!(offset_of!(RawLog, magic), 0);
        assert_eq!(offset_of!(RawLog, replica), 8);
        assert_eq!(offset_of!(RawLog, sequence), 24);
        assert_eq!(offset_of!(RawLog, crc), 32);
        assert_eq!(offset_of!(RawLog, reserved), 36);
        assert_eq!(offset_of!(RawLog, extents), 96);
        assert_eq!(size_of::<RawLog>(), 4096);
    }

    /// One that is being written never takes the place of the one in force.
    #[test]
    fn transactions_go_round_the_ring() {
        let index = |sequence| {
            let extents = Vec::new();
            Transaction { sequence, extents }.ring_index()
        };
        let n = ACTIVITY_LOG_BLOCKS;
        assert_eq!([0, 1, n - 1, n, 2 * n + 3].map(index), [0, 1, n - 1, 0, 3]);
    }

    #[test]
    fn golden_bytes() {
        let bytes = Transaction {
            sequence: 0x0102,
            extents: vec![5, 0x0a0b],
        }
        .encode(ReplicaId(3));
        assert_eq!(bytes.len(), 4096);
        assert_eq!(&bytes[..8], b"KGMACTLG");
        assert_eq!(&bytes[24..32], [2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(
            &bytes[96..108],
            [5, 0, 0, 0, 0x0b, 0x0a, 0, 0, 0xff, 0xff, 0xff, 0xff]
        );
        assert_eq!(crc32fast::hash(&bytes), GOLDEN_CRC);
    }
    const GOLDEN_CRC: u32 = 3_840_211_615;
}
