//! Blocks of the activity log: one by one, as a ring, and as a starting daemon finds them.

use crate::host::{Host, image};
use mirror_core::limits::ACTIVITY_LOG_SLOTS;
use mirror_core::meta::activity_log::Transaction;
use mirror_core::meta::{ACTIVITY_LOG_BLOCKS, META_BLOCK};
use mirror_core::types::ReplicaId;

const BLOCK: usize = META_BLOCK as usize;
/// Where a block has its replica's id, and its CRC (docs/format.md, "Activity log block").
const REPLICA_AT: usize = 8;
const CRC_AT: usize = 32;

/// Takes the input for blocks of the ring, as they are and with repaired checksums.
pub fn run(data: &[u8]) -> bool {
    Transaction::decode(data, replica_of(data));
    let mut blocks: Vec<Vec<u8>> = data
        .chunks(BLOCK)
        .take(ACTIVITY_LOG_BLOCKS as usize)
        .map(<[u8]>::to_vec)
        .collect();
    let mut taken = ring(&blocks);
    for block in &mut blocks {
        block.resize(BLOCK, 0xff);
        crate::repair_block(block, CRC_AT);
    }
    taken |= ring(&blocks);
    if taken {
        attach(&blocks);
    }
    taken
}

fn replica_of(block: &[u8]) -> ReplicaId {
    let id = block.get(REPLICA_AT..).and_then(<[u8]>::first_chunk);
    ReplicaId(id.map_or(0, |id| u128::from_le_bytes(*id)))
}

fn ring(blocks: &[Vec<u8>]) -> bool {
    let Some(first) = blocks.first() else {
        return false;
    };
    let replica = replica_of(first);
    let mut newest = None;
    for block in blocks {
        let Some(log) = Transaction::decode(block, replica) else {
            continue;
        };
        assert!(log.extents.len() <= ACTIVITY_LOG_SLOTS);
        assert!(log.ring_index() < ACTIVITY_LOG_BLOCKS);
        let again = Transaction::decode(&log.encode(replica), replica);
        assert_eq!(again.as_ref(), Some(&log));
        let stranger = ReplicaId(!replica.0);
        assert_eq!(Transaction::decode(block, stranger), None);
        newest = newest.max(Some(log.sequence));
    }
    let found = Transaction::newest(blocks.iter().map(|block| &block[..]), replica);
    // Beyond belief: then nothing is known.
    let believed = newest.filter(|sequence| *sequence <= 1 << 62);
    assert_eq!(found.map(|log| log.sequence), believed);
    newest.is_some()
}

/// A daemon that finds this ring on its disk goes on counting from it.
fn attach(blocks: &[Vec<u8>]) {
    let (mut metadata, layout) = image(replica_of(&blocks[0]));
    for (block, index) in blocks.iter().zip(0..) {
        let at = layout.activity_log_offset(index) as usize;
        metadata[at..at + BLOCK].copy_from_slice(block);
    }
    Host::found(metadata, layout).attach_and_settle();
}

/// An empty log, a full one, and a ring.
pub fn seeds() -> Vec<Vec<u8>> {
    let replica = ReplicaId(5);
    let log = |sequence, extents: Vec<u32>| Transaction { sequence, extents }.encode(replica);
    let ring = (3..6).flat_map(|n| log(n.into(), vec![0, n, 1])).collect();
    vec![
        log(0, Vec::new()),
        log(9, (0..ACTIVITY_LOG_SLOTS as u32).collect()),
        log(1 << 40, vec![1, 0, u32::MAX - 1]),
        ring,
    ]
}
