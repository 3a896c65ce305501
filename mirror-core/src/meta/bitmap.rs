//! The dirty bitmap: which 4 KiB blocks may differ between the replicas (R6).
//!
//! In memory it is a plain array of bits with a count per metadata block, so that scanning a
//! nearly clean bitmap costs next to nothing. On disk each 4 KiB metadata block holds a header of
//! 128 bytes and the bits of 31 activity-log extents (124 MiB of data). A block whose CRC fails
//! counts as all dirty.
//!
//! Bits are set in memory at once. What makes them durable in time is the activity log: an extent
//! is not evicted before the bitmap block that covers it was written (see
//! [`crate::node`]'s activity log).

use super::{META_BLOCK, checksum};
use crate::limits::{BLOCK, EXTENT};
use crate::types::{ByteRange, ReplicaId};
use std::mem::offset_of;
use zerocopy::byteorder::little_endian::{U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Activity-log extents whose bits share one metadata block.
pub const EXTENTS_PER_BLOCK: u64 = 31;
/// Bytes of data that one metadata block of the bitmap covers.
pub const SPAN: u64 = EXTENTS_PER_BLOCK * EXTENT;
/// Bytes of bits in one metadata block.
pub const BITS_LEN: usize = (SPAN / BLOCK / 8) as usize;
/// 64-bit words of bits in one metadata block.
const WORDS: usize = BITS_LEN / 8;
/// Bits in one metadata block.
const BITS: u64 = SPAN / BLOCK;
const HEADER_LEN: usize = META_BLOCK as usize - BITS_LEN;
const MAGIC: u64 = u64::from_le_bytes(*b"KGMBITMP");

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawBlock {
    magic: U64,
    replica: U128,
    index: U64,
    crc: U32,
    reserved: [u8; HEADER_LEN - 36],
    bits: [u8; BITS_LEN],
}
const _: () = assert!(size_of::<RawBlock>() == META_BLOCK as usize);

/// Metadata blocks needed for `data_size` bytes.
pub fn blocks_for(data_size: u64) -> u64 {
    data_size.div_ceil(SPAN)
}

/// Which blocks may differ.
#[derive(Clone, Debug)]
pub struct Bitmap {
    words: Vec<u64>,
    /// Dirty bits per metadata block.
    counts: Vec<u32>,
    /// Metadata blocks that differ from what is on disk.
    unsaved: Vec<bool>,
    unsaved_count: usize,
    /// Bits beyond this one do not exist.
    bits: u64,
    dirty: u64,
}

impl Bitmap {
    /// A clean bitmap for `data_size` bytes.
    pub fn new(data_size: u64) -> Bitmap {
        let blocks = blocks_for(data_size) as usize;
        Bitmap {
            words: vec![0; blocks * WORDS],
            counts: vec![0; blocks],
            unsaved: vec![false; blocks],
            unsaved_count: 0,
            bits: data_size.div_ceil(BLOCK),
            dirty: 0,
        }
    }

    /// From here on only the first `size` bytes of the device exist.
    pub fn limit(&mut self, size: u64) {
        let bits = size.div_ceil(BLOCK).min(self.bits);
        self.change(bits, self.bits, false);
        self.bits = bits;
    }

    /// Bytes of blocks that exist.
    pub fn size(&self) -> u64 {
        self.bits * BLOCK
    }

    /// Bytes of dirty blocks.
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty * BLOCK
    }

    /// Whether no block is dirty.
    pub fn is_clean(&self) -> bool {
        self.dirty == 0
    }

    /// Whether every block is dirty.
    pub fn is_all_dirty(&self) -> bool {
        self.dirty == self.bits
    }

    /// The blocks that a byte range touches, as a half-open range of bit numbers.
    fn touched(&self, range: ByteRange) -> (u64, u64) {
        (
            range.start / BLOCK,
            range.end.div_ceil(BLOCK).min(self.bits),
        )
    }

    /// Marks every block that `range` touches, even partly.
    pub fn mark(&mut self, range: ByteRange) {
        let (first, end) = self.touched(range);
        self.change(first, end, true);
    }

    /// Marks all blocks.
    pub fn mark_all(&mut self) {
        self.change(0, self.bits, true);
    }

    /// Clears the blocks that lie whole within `range` (or up to the device's end).
    pub fn clear(&mut self, range: ByteRange) {
        let first = range.start.div_ceil(BLOCK);
        let end = if range.end >= self.bits * BLOCK {
            self.bits
        } else {
            range.end / BLOCK
        };
        self.change(first, end, false);
    }

    /// Clears all blocks.
    pub fn clear_all(&mut self) {
        self.change(0, self.bits, false);
    }

    fn change(&mut self, first: u64, end: u64, set: bool) {
        let mut bit = first;
        while bit < end {
            let word = (bit / 64) as usize;
            let low = bit % 64;
            let n = (64 - low).min(end - bit);
            let mask = (u64::MAX >> (64 - n)) << low;
            let old = self.words[word];
            self.replace(word, if set { old | mask } else { old & !mask });
            bit += n;
        }
    }

    fn replace(&mut self, word: usize, new: u64) {
        let old = std::mem::replace(&mut self.words[word], new);
        if new != old {
            let block = word / WORDS;
            self.counts[block] = self.counts[block] - old.count_ones() + new.count_ones();
            self.dirty = self.dirty - u64::from(old.count_ones()) + u64::from(new.count_ones());
            if !self.unsaved[block] {
                self.unsaved[block] = true;
                self.unsaved_count += 1;
            }
        }
    }

    /// Whether a block that `range` touches is dirty.
    pub fn is_dirty(&self, range: ByteRange) -> bool {
        let (first, end) = self.touched(range);
        self.next_bit(first).is_some_and(|bit| bit < end)
    }

    /// Whether every block that `range` touches is dirty, and there is one.
    pub fn is_dirty_throughout(&self, range: ByteRange) -> bool {
        let (mut bit, end) = self.touched(range);
        let any = bit < end;
        while bit < end {
            let rest = self.words[(bit / 64) as usize] >> (bit % 64);
            match rest.trailing_ones() {
                0 => return false,
                run => bit += u64::from(run),
            }
        }
        any
    }

    fn next_bit(&self, from: u64) -> Option<u64> {
        let mut bit = from;
        while bit < self.bits {
            let word = (bit / 64) as usize;
            if self.counts[word / WORDS] == 0 {
                bit = (word / WORDS + 1) as u64 * BITS;
                continue;
            }
            let rest = self.words[word] >> (bit % 64);
            if rest != 0 {
                return Some(bit + u64::from(rest.trailing_zeros()));
            }
            bit = (word as u64 + 1) * 64;
        }
        None
    }

    /// The next run of dirty blocks at or behind byte `from`, at most `max_len` bytes long.
    pub fn next_dirty(&self, from: u64, max_len: u64) -> Option<ByteRange> {
        let first = self.next_bit(from.div_ceil(BLOCK))?;
        let limit = self.bits.min(first + (max_len / BLOCK).max(1));
        let mut end = first;
        while end < limit {
            let rest = self.words[(end / 64) as usize] >> (end % 64);
            let run = u64::from(rest.trailing_ones());
            end += run;
            // Further only if the run goes on to the end of its word.
            if run == 0 || !end.is_multiple_of(64) {
                break;
            }
        }
        Some(ByteRange {
            start: first * BLOCK,
            end: end.min(limit) * BLOCK,
        })
    }

    /// Metadata blocks of the bitmap.
    pub fn blocks(&self) -> u64 {
        self.counts.len() as u64
    }

    /// The metadata block that holds the bits of an activity-log extent.
    pub fn block_of_extent(extent: u32) -> u64 {
        u64::from(extent) / EXTENTS_PER_BLOCK
    }

    /// Whether metadata block `index` differs from what is on disk.
    pub fn is_unsaved(&self, index: u64) -> bool {
        self.unsaved[index as usize]
    }

    /// The first metadata block at or behind `from` that differs from what is on disk.
    pub fn next_unsaved(&self, from: u64) -> Option<u64> {
        if self.unsaved_count == 0 {
            return None;
        }
        let from = from as usize;
        let found = self
            .unsaved
            .get(from..)?
            .iter()
            .position(|unsaved| *unsaved)?;
        Some((from + found) as u64)
    }

    /// The bytes of metadata block `index` for `replica`'s disk; it counts as saved from here on.
    pub fn save(&mut self, index: u64, replica: ReplicaId) -> Vec<u8> {
        let block = index as usize;
        if std::mem::take(&mut self.unsaved[block]) {
            self.unsaved_count -= 1;
        }
        encode_block(index, replica, &self.raw_bits(index))
    }

    /// The bits of metadata block `index`, as they cross the link; `None` if all are clean.
    pub fn export(&self, index: u64) -> Option<Vec<u8>> {
        (self.counts[index as usize] != 0).then(|| self.raw_bits(index))
    }

    fn raw_bits(&self, index: u64) -> Vec<u8> {
        let first = index as usize * WORDS;
        let mut bits = Vec::with_capacity(BITS_LEN);
        for word in &self.words[first..first + WORDS] {
            bits.extend_from_slice(&word.to_le_bytes());
        }
        bits
    }

    /// Adds the bits of metadata block `index`, as exported by another bitmap. Bits that do not
    /// exist here are ignored. Returns whether `index` and length make sense.
    #[must_use]
    pub fn merge(&mut self, index: u64, bits: &[u8]) -> bool {
        if index >= self.blocks() || bits.len() != BITS_LEN {
            return false;
        }
        let first = index as usize * WORDS;
        for (at, word) in (first..).zip(bits.chunks_exact(8)) {
            let word = u64::from_le_bytes(word.try_into().unwrap_or_default());
            if word == 0 {
                continue;
            }
            let exist = self.bits.saturating_sub(at as u64 * 64).min(64);
            if exist == 0 {
                break;
            }
            self.replace(at, self.words[at] | word & (u64::MAX >> (64 - exist)));
        }
        true
    }

    /// Takes metadata block `index` from disk. A block that does not verify counts as all dirty;
    /// returns whether it did verify.
    pub fn load(&mut self, index: u64, bytes: &[u8], replica: ReplicaId) -> bool {
        match decode_block(index, replica, bytes) {
            Some(bits) => {
                let verified = self.merge(index, bits);
                if std::mem::take(&mut self.unsaved[index as usize]) {
                    self.unsaved_count -= 1;
                }
                verified
            }
            None => {
                let first = index * BITS;
                self.change(first, (first + BITS).min(self.bits), true);
                false
            }
        }
    }
}

/// The on-disk bytes of metadata block `index`.
pub fn encode_block(index: u64, replica: ReplicaId, bits: &[u8]) -> Vec<u8> {
    let mut raw = RawBlock {
        magic: MAGIC.into(),
        replica: replica.0.into(),
        index: index.into(),
        crc: U32::ZERO,
        reserved: [0; HEADER_LEN - 36],
        bits: [0; BITS_LEN],
    };
    raw.bits.copy_from_slice(bits);
    raw.crc = crc32fast::hash(raw.as_bytes()).into();
    raw.as_bytes().to_vec()
}

fn decode_block(index: u64, replica: ReplicaId, bytes: &[u8]) -> Option<&[u8; BITS_LEN]> {
    let raw = RawBlock::ref_from_bytes(bytes).ok()?;
    let good = raw.magic.get() == MAGIC
        && raw.replica.get() == replica.0
        && raw.index.get() == index
        && raw.crc.get() == checksum(bytes, offset_of!(RawBlock, crc));
    good.then_some(&raw.bits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn dirty_blocks(bitmap: &Bitmap) -> BTreeSet<u64> {
        let mut found = BTreeSet::new();
        let mut at = 0;
        while let Some(run) = bitmap.next_dirty(at, u64::MAX) {
            found.extend(run.start / BLOCK..run.end / BLOCK);
            at = run.end;
        }
        found
    }

    proptest! {
        /// The bitmap against a set of block numbers.
        #[test]
        fn agrees_with_a_set(
            ops in prop::collection::vec((any::<bool>(), 0u64..300 << 20, 0u64..20 << 20), 0..40),
            other in (0u64..280 << 20, 0u64..20 << 20),
        ) {
            let size = 300u64 << 20;
            let mut bitmap = Bitmap::new(size);
            let mut model = BTreeSet::new();
            for (set, start, len) in ops {
                let range = ByteRange { start, end: (start + len).min(size) };
                for block in range.start / BLOCK..range.end.div_ceil(BLOCK) {
                    let whole = range.start <= block * BLOCK && (block + 1) * BLOCK <= range.end;
                    if set { model.insert(block); } else if whole { model.remove(&block); }
                }
                if set { bitmap.mark(range) } else { bitmap.clear(range) }
            }
            prop_assert_eq!(bitmap.dirty_bytes(), model.len() as u64 * BLOCK);
            prop_assert_eq!(&dirty_blocks(&bitmap), &model);

            let replica = ReplicaId(7);
            let clean = model.clone();
            let there = ByteRange::new(other.0, other.1);
            let mut loaded = Bitmap::new(size);
            let mut merged = Bitmap::new(size);
            merged.mark(there);
            model.extend(there.start / BLOCK..there.end.div_ceil(BLOCK));
            for index in 0..bitmap.blocks() {
                if let Some(bits) = bitmap.export(index) { prop_assert!(merged.merge(index, &bits)); }
                let bytes = bitmap.save(index, replica);
                prop_assert!(loaded.load(index, &bytes, replica));
            }
            prop_assert_eq!(dirty_blocks(&loaded), clean);
            prop_assert_eq!(dirty_blocks(&merged), model);
            prop_assert_eq!(bitmap.next_unsaved(0), None);
            prop_assert_eq!(loaded.next_unsaved(0), None);
        }
    }

    #[test]
    fn a_block_that_does_not_verify_is_all_dirty() {
        let replica = ReplicaId(7);
        let good = Bitmap::new(SPAN * 2).save(1, replica);
        for (what, index, owner, flip) in [
            ("a flipped bit", 1, replica, Some(200)),
            ("a misdirected block", 0, replica, None),
            ("another replica's block", 1, ReplicaId(8), None),
        ] {
            let mut bytes = good.clone();
            if let Some(at) = flip {
                bytes[at] ^= 1;
            }
            let mut bitmap = Bitmap::new(SPAN * 2);
            assert!(!bitmap.load(index, &bytes, owner), "{what}");
            assert_eq!(bitmap.dirty_bytes(), SPAN, "{what}");
            let its_own = ByteRange::new(index * SPAN, SPAN);
            assert_eq!(bitmap.next_dirty(0, u64::MAX), Some(its_own), "{what}");
        }
    }

    #[test]
    fn questions_end_where_they_should() {
        let mut bitmap = Bitmap::new(2 * SPAN);
        bitmap.mark(ByteRange::new(5 * BLOCK, 10 * BLOCK));
        let run = bitmap.next_dirty(0, 2 * BLOCK);
        assert_eq!(run, Some(ByteRange::new(5 * BLOCK, 2 * BLOCK)));
        assert!(!bitmap.is_dirty(ByteRange::new(0, 5 * BLOCK)));
        assert!(bitmap.is_dirty(ByteRange::new(0, 5 * BLOCK + 1)));
        assert_eq!(bitmap.next_dirty(2 * SPAN, u64::MAX), None);
        assert!(!bitmap.is_all_dirty());
        bitmap.mark(ByteRange::new(100 * BLOCK, 100 * BLOCK));
        let runs = [
            (100, 100, true),
            (128, 64, true),
            (99, 2, false),
            (199, 2, false),
        ];
        for (first, blocks, all) in runs {
            let range = ByteRange::new(first * BLOCK, blocks * BLOCK);
            assert_eq!(bitmap.is_dirty_throughout(range), all, "{range:?}");
        }
        assert!(!bitmap.is_dirty_throughout(ByteRange::new(2 * SPAN, BLOCK)));
        let run = bitmap.next_dirty(100 * BLOCK, u64::MAX);
        assert_eq!(run, Some(ByteRange::new(100 * BLOCK, 100 * BLOCK)));
        let run = bitmap.next_dirty(100 * BLOCK, 70 * BLOCK);
        assert_eq!(run, Some(ByteRange::new(100 * BLOCK, 70 * BLOCK)));
        bitmap.mark_all();
        assert!(bitmap.is_all_dirty());
    }

    #[test]
    fn an_extent_lies_in_one_metadata_block() {
        let blocks = [0, 30, 31, 61, 62].map(Bitmap::block_of_extent);
        assert_eq!(blocks, [0, 0, 1, 1, 2]);
    }

    #[test]
    fn bits_beyond_the_device_are_never_set() {
        let mut bitmap = Bitmap::new(10 * BLOCK);
        assert!(bitmap.merge(0, &[0xff; BITS_LEN]));
        assert_eq!(bitmap.dirty_bytes(), 10 * BLOCK);
        assert!(!bitmap.merge(1, &[0xff; BITS_LEN]));
        assert!(!bitmap.merge(0, &[0xff; 3]));
    }

    /// docs/format.md, "Bitmap block".
    #[test]
    fn offsets_are_as_documented() {
        use core::mem::offset_of;
        assert_eq!(offset_of!(RawBlock, magic), 0);
        assert_eq!(offset_of!(RawBlock, replica), 8);
        assert_eq!(offset_of!(RawBlock, index), 24);
        assert_eq!(offset_of!(RawBlock, crc), 32);
        assert_eq!(offset_of!(RawBlock, reserved), 36);
        assert_eq!(offset_of!(RawBlock, bits), 128);
        assert_eq!(size_of::<RawBlock>(), 4096);
        assert_eq!((BITS_LEN, BITS, SPAN), (3968, 31_744, 124 << 20));
        // Bit 0 of byte 0 is the lowest block.
        let mut bitmap = Bitmap::new(SPAN);
        bitmap.mark(ByteRange::new(9 * BLOCK, 1));
        let bytes = bitmap.save(0, ReplicaId(1));
        assert_eq!(bytes[128..132], [0, 0b10, 0, 0]);
    }

    #[test]
    fn golden_bytes() {
        let bytes = encode_block(3, ReplicaId(0x0102), &[0xa5; BITS_LEN]);
        assert_eq!(bytes.len(), 4096);
        assert_eq!(&bytes[..8], b"KGMBITMP");
        assert_eq!(&bytes[8..12], [2, 1, 0, 0]);
        assert_eq!(&bytes[24..32], [3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(crc32fast::hash(&bytes), GOLDEN_CRC);
    }
    const GOLDEN_CRC: u32 = 2_214_517_589;
}
