//! Blocks of the dirty bitmap, from a disk and from the peer, against a plain list of bits.

use crate::bytes::Bytes;
use mirror_core::limits::{BLOCK, MIN_DATA_SIZE};
use mirror_core::meta::META_BLOCK;
use mirror_core::meta::bitmap::{BITS_LEN, Bitmap, SPAN, encode_block};
use mirror_core::types::ReplicaId;

/// Where a block has its parts (docs/format.md, "Bitmap block").
const REPLICA_AT: usize = 8;
const INDEX_AT: usize = 24;
const CRC_AT: usize = 32;
const BITS_AT: usize = META_BLOCK as usize - BITS_LEN;
const BITS_PER_BLOCK: u64 = SPAN / BLOCK;

/// A size, the block to be loaded, the new end of the device; then the block, from disk once as it
/// is and once repaired; then bits that the peer sent.
pub fn run(data: &[u8]) -> bool {
    let mut bytes = Bytes(data);
    let size = MIN_DATA_SIZE + u64::from(bytes.u16()) * BLOCK;
    let limit = u64::from(bytes.u16()) * BLOCK;
    let index = u64::from(bytes.u8()) % Bitmap::new(size).blocks();
    let block = bytes.take(META_BLOCK as usize);
    let peers_index = u64::from(bytes.u8());
    let peers = bytes.0;

    let mut repaired = block.to_vec();
    repaired.resize(META_BLOCK as usize, 0);
    repaired[INDEX_AT..INDEX_AT + 8].copy_from_slice(&index.to_le_bytes());
    crate::repair_block(&mut repaired, CRC_AT);

    let taken = load(size, index, limit, block) | load(size, index, limit, &repaired);
    merge(size, peers_index, peers) | taken
}

fn load(size: u64, index: u64, limit: u64, block: &[u8]) -> bool {
    let id = block.get(REPLICA_AT..).and_then(<[u8]>::first_chunk);
    let replica = ReplicaId(id.map_or(0, |id| u128::from_le_bytes(*id)));
    let mut bitmap = Bitmap::new(size);
    let verified = bitmap.load(index, block, replica);

    // What does not verify counts as dirty from end to end.
    let bits = if verified {
        &block[BITS_AT..]
    } else {
        &[0xff; BITS_LEN]
    };
    let mut expected = vec![false; (size / BLOCK) as usize];
    mark(&mut expected, index, bits);
    assert_same(&bitmap, &expected);

    // Bits beyond the end of the device are gone, so what is saved may differ from what came; from
    // then on it stays.
    let saved = bitmap.save(index, replica);
    assert!(!bitmap.is_unsaved(index));
    let mut again = Bitmap::new(size);
    assert!(again.load(index, &saved, replica));
    assert_same(&again, &expected);
    assert_eq!(again.save(index, replica), saved);
    if let Some(exported) = bitmap.export(index) {
        let mut peers = Bitmap::new(size);
        assert!(peers.merge(index, &exported));
        assert_same(&peers, &expected);
        assert_eq!(encode_block(index, replica, &exported), saved);
    }

    bitmap.limit(limit);
    let kept = (limit / BLOCK).min(size / BLOCK) as usize;
    expected.truncate(kept);
    assert_same(&bitmap, &expected);
    verified
}

fn merge(size: u64, index: u64, bits: &[u8]) -> bool {
    let mut bitmap = Bitmap::new(size);
    let fits = index < bitmap.blocks() && bits.len() == BITS_LEN;
    assert_eq!(bitmap.merge(index, bits), fits);
    let mut expected = vec![false; (size / BLOCK) as usize];
    if fits {
        mark(&mut expected, index, bits);
    }
    assert_same(&bitmap, &expected);
    fits
}

fn mark(expected: &mut [bool], index: u64, bits: &[u8]) {
    let first = (index * BITS_PER_BLOCK) as usize;
    let Some(there) = expected.get_mut(first..) else {
        return;
    };
    let bits = bits
        .iter()
        .flat_map(|byte| (0..8).map(move |at| byte >> at & 1 == 1));
    for (slot, bit) in there.iter_mut().zip(bits) {
        *slot = bit;
    }
}

#[track_caller]
fn assert_same(bitmap: &Bitmap, expected: &[bool]) {
    let mut at = 0;
    let mut dirty = 0;
    while let Some(run) = bitmap.next_dirty(at as u64 * BLOCK, u64::MAX) {
        let (start, end) = ((run.start / BLOCK) as usize, (run.end / BLOCK) as usize);
        assert!(start >= at && end > start);
        assert!(!expected[at..start].contains(&true), "clean before {run:?}");
        assert!(!expected[start..end].contains(&false), "dirty in {run:?}");
        dirty += run.len();
        at = end;
    }
    assert!(!expected[at..].contains(&true), "clean from {at} on");
    assert_eq!(bitmap.dirty_bytes(), dirty);
    assert_eq!(bitmap.is_clean(), dirty == 0);
    assert_eq!(
        bitmap.is_all_dirty(),
        dirty == expected.len() as u64 * BLOCK
    );
}

/// A clean block, a dirty one, and one with holes on a device of two blocks.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut holes = [0; BITS_LEN];
    for (at, byte) in holes.iter_mut().enumerate() {
        *byte = (at * 37 % 251) as u8;
    }
    let seed = |blocks: u16, index: u8, bits: &[u8]| {
        let mut seed = blocks.to_le_bytes().to_vec();
        seed.extend((blocks / 2).to_le_bytes());
        seed.push(index);
        seed.extend(encode_block(index.into(), ReplicaId(5), bits));
        seed.push(index);
        seed.extend(bits);
        seed
    };
    vec![
        seed(300, 0, &[0; BITS_LEN]),
        seed(301, 0, &[0xff; BITS_LEN]),
        seed(33_000, 1, &holes),
    ]
}
