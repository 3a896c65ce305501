//! The activity log in memory: active extents, and within them the unsettled set.
//!
//! A write may be submitted anywhere only while every extent it touches is in a durable
//! transaction of the log ([`crate::meta::activity_log`]). An extent leaves the log only when no
//! write in it is on its way, every write in it is durable on both replicas, and the bitmap block
//! that covers it is on disk (R6). So after any crash, bitmap and log together cover
//! whatever may differ.
//!
//! The unsettled set of the peer is kept per block, because it becomes dirty when the peer is
//! lost; of the local replica only "how far was it flushed" is needed.

use crate::limits::{ACTIVITY_LOG_SLOTS, BLOCK, EXTENT};
use crate::meta::activity_log::Transaction;
use crate::meta::bitmap::Bitmap;
use crate::types::{ByteRange, Time};

const NO_SLOT: u16 = u16::MAX;
const BLOCK_WORDS: usize = (EXTENT / BLOCK / 64) as usize;
/// Extents evicted together, so that not every new one costs a transaction of its own; of a small log
/// a quarter.
const EVICTION_BATCH: usize = 64;

/// A set of blocks within one extent.
type BlockSet = [u64; BLOCK_WORDS];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum SlotState {
    Free,
    /// For the next transaction.
    Entering,
    /// In the transaction that is being written.
    Committing,
    Active,
}

#[derive(Debug)]
struct Slot {
    state: SlotState,
    extent: u32,
    /// Writes on their way.
    users: u32,
    last_use: u64,
    /// The number of the last local write completed in it.
    local_write: u64,
    /// Blocks completed by the peer since its last flush was asked for, and those that the flush
    /// on its way covers. Allocated on first use.
    peer: Option<Box<[BlockSet; 2]>>,
}

/// What stands between the log and room for new extents.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Room {
    /// Enough extents were evicted.
    Made,
    /// A flush of both replicas is needed.
    NeedsSettling,
    /// Bitmap blocks must be written first.
    NeedsBitmap,
    /// Every extent has writes on their way.
    AllBusy,
}

/// The active extents.
#[derive(Debug)]
pub(super) struct ActivityLog {
    /// Extents that may be active at once.
    capacity: usize,
    slots: Vec<Slot>,
    /// Slot of each extent of the device, or [`NO_SLOT`].
    by_extent: Vec<u16>,
    free: Vec<u16>,
    uses: u64,
    sequence: u64,
    writing: bool,
    changed: bool,
    /// Local writes completed, and how many of them a successful flush covered.
    local_writes: u64,
    local_settled: u64,
    /// When the peer flush on its way was asked for that covers the second of the two sets.
    peer_flushing: Option<Time>,
}

/// The extents that a range touches.
pub(super) fn extents(range: ByteRange) -> std::ops::Range<u32> {
    (range.start / EXTENT) as u32..range.end.div_ceil(EXTENT) as u32
}

impl ActivityLog {
    /// An empty log of `capacity` extents for `size` bytes, following transaction `sequence`; `stale` if
    /// that transaction is not empty.
    pub(super) fn new(capacity: usize, size: u64, sequence: u64, stale: bool) -> ActivityLog {
        ActivityLog {
            capacity: capacity.min(ACTIVITY_LOG_SLOTS),
            slots: Vec::new(),
            by_extent: vec![NO_SLOT; size.div_ceil(EXTENT) as usize],
            free: Vec::new(),
            uses: 0,
            sequence,
            writing: false,
            changed: stale,
            local_writes: 0,
            local_settled: 0,
            peer_flushing: None,
        }
    }

    fn slot_of(&self, extent: u32) -> Option<usize> {
        match self.by_extent.get(extent as usize) {
            Some(&slot) if slot != NO_SLOT => Some(usize::from(slot)),
            _ => None,
        }
    }

    /// Begins a write if all its extents are active; `false` if it must wait for a transaction.
    pub(super) fn begin(&mut self, range: ByteRange) -> bool {
        let active = |extent| {
            self.slot_of(extent)
                .is_some_and(|slot| self.slots[slot].state == SlotState::Active)
        };
        if !extents(range).all(active) {
            return false;
        }
        self.uses += 1;
        for extent in extents(range) {
            if let Some(slot) = self.slot_of(extent) {
                self.slots[slot].users += 1;
                self.slots[slot].last_use = self.uses;
            }
        }
        true
    }

    /// Ends a write that [`ActivityLog::begin`] began.
    pub(super) fn end(&mut self, range: ByteRange) {
        for extent in extents(range) {
            if let Some(slot) = self.slot_of(extent) {
                self.slots[slot].users -= 1;
            }
        }
    }

    /// Adds the extents of `range` to the next transaction as far as there is room. Returns how
    /// many slots are missing.
    pub(super) fn enter(&mut self, range: ByteRange) -> usize {
        let mut missing = 0;
        for extent in extents(range) {
            if self.slot_of(extent).is_some() {
                continue;
            }
            let Some(slot) = self.take_slot() else {
                missing += 1;
                continue;
            };
            self.uses += 1;
            let entry = &mut self.slots[usize::from(slot)];
            entry.state = SlotState::Entering;
            entry.extent = extent;
            entry.last_use = self.uses;
            entry.local_write = 0;
            self.by_extent[extent as usize] = slot;
            self.changed = true;
        }
        missing
    }

    fn take_slot(&mut self) -> Option<u16> {
        if let Some(slot) = self.free.pop() {
            return Some(slot);
        }
        (self.slots.len() < self.capacity).then(|| {
            self.slots.push(Slot {
                state: SlotState::Free,
                extent: 0,
                users: 0,
                last_use: 0,
                local_write: 0,
                peer: None,
            });
            (self.slots.len() - 1) as u16
        })
    }

    /// Tries to evict extents so that at least `missing` slots get free. `saving` says whether
    /// bitmap blocks are being written right now.
    pub(super) fn make_room(&mut self, missing: usize, bitmap: &Bitmap, saving: bool) -> Room {
        let mut idle: Vec<usize> = (0..self.slots.len())
            .filter(|&slot| {
                self.slots[slot].state == SlotState::Active && self.slots[slot].users == 0
            })
            .collect();
        idle.sort_by_key(|&slot| self.slots[slot].last_use);
        idle.truncate(missing.max(EVICTION_BATCH.min(self.capacity / 4)));
        let mut evicted = 0;
        let mut obstacle = Room::AllBusy;
        for slot in idle {
            let unsaved = bitmap.is_unsaved(Bitmap::block_of_extent(self.slots[slot].extent));
            if !self.is_settled(slot) {
                obstacle = Room::NeedsSettling;
            } else if unsaved || saving {
                if obstacle == Room::AllBusy {
                    obstacle = Room::NeedsBitmap;
                }
            } else {
                self.evict(slot);
                evicted += 1;
            }
        }
        if evicted >= missing {
            Room::Made
        } else {
            obstacle
        }
    }

    fn is_settled(&self, slot: usize) -> bool {
        let slot = &self.slots[slot];
        slot.local_write <= self.local_settled
            && slot
                .peer
                .as_ref()
                .is_none_or(|sets| sets.as_flattened().iter().all(|w| *w == 0))
    }

    fn evict(&mut self, slot: usize) {
        let entry = &mut self.slots[slot];
        entry.state = SlotState::Free;
        if let Some(sets) = &mut entry.peer {
            **sets = [[0; BLOCK_WORDS]; 2];
        }
        self.by_extent[entry.extent as usize] = NO_SLOT;
        self.free.push(slot as u16);
        self.changed = true;
    }

    /// The next transaction to write durably, if one is due and none is being written.
    pub(super) fn transaction(&mut self) -> Option<Transaction> {
        if self.writing || !self.changed {
            return None;
        }
        self.writing = true;
        self.changed = false;
        self.sequence += 1;
        let extents = self
            .slots
            .iter()
            .filter(|slot| slot.state != SlotState::Free)
            .map(|slot| slot.extent)
            .collect();
        // What enters the table from here on belongs to the next transaction.
        self.turn(SlotState::Entering, SlotState::Committing);
        Some(Transaction {
            sequence: self.sequence,
            extents,
        })
    }

    /// The transaction is durable: what entered with it is active.
    pub(super) fn transaction_done(&mut self) {
        self.writing = false;
        self.turn(SlotState::Committing, SlotState::Active);
    }

    fn turn(&mut self, from: SlotState, to: SlotState) {
        for slot in self.slots.iter_mut().filter(|slot| slot.state == from) {
            slot.state = to;
        }
    }

    /// Whether a transaction is being written.
    pub(super) fn is_writing(&self) -> bool {
        self.writing
    }

    /// Whether the log on disk is the log in memory.
    pub(super) fn is_saved(&self) -> bool {
        !self.writing && !self.changed
    }

    /// Whether no extent is active.
    pub(super) fn is_empty(&self) -> bool {
        self.slots.iter().all(|slot| slot.state == SlotState::Free)
    }

    /// Drops every extent. Only when all writes are durable on both replicas, or marked dirty in
    /// a bitmap that is on disk.
    pub(super) fn evict_all(&mut self) {
        for slot in 0..self.slots.len() {
            if self.slots[slot].state != SlotState::Free {
                self.evict(slot);
            }
        }
    }

    /// A local write completed in `range`; `durable` if it needs no flush.
    pub(super) fn local_completed(&mut self, range: ByteRange, durable: bool) {
        if durable {
            return;
        }
        self.local_writes += 1;
        for extent in extents(range) {
            if let Some(slot) = self.slot_of(extent) {
                self.slots[slot].local_write = self.local_writes;
            }
        }
    }

    /// How many local writes a flush submitted now will cover.
    pub(super) fn local_written(&self) -> u64 {
        self.local_writes
    }

    /// A local flush succeeded that was submitted when `upto` writes had completed.
    pub(super) fn local_flushed(&mut self, upto: u64) {
        self.local_settled = self.local_settled.max(upto);
    }

    /// Whether a local flush would settle anything.
    pub(super) fn has_unsettled_here(&self) -> bool {
        self.local_writes > self.local_settled
    }

    /// The peer completed a write in `range` that is not known to be durable there.
    pub(super) fn peer_completed(&mut self, range: ByteRange) {
        for extent in extents(range) {
            let Some(slot) = self.slot_of(extent) else {
                continue;
            };
            let sets = self.slots[slot].peer.get_or_insert_default();
            let base = u64::from(extent) * EXTENT;
            let first = range.start.max(base) - base;
            let end = range.end.min(base + EXTENT) - base;
            for block in first / BLOCK..end.div_ceil(BLOCK) {
                sets[0][(block / 64) as usize] |= 1 << (block % 64);
            }
        }
    }

    /// A flush is about to be asked of the peer. Returns whether this one is followed: what it
    /// covers is settled by [`ActivityLog::peer_flushed`].
    pub(super) fn peer_flush_begins(&mut self, now: Time) -> bool {
        if self.peer_flushing.is_some() {
            return false;
        }
        self.peer_flushing = Some(now);
        for sets in self.slots.iter_mut().filter_map(|slot| slot.peer.as_mut()) {
            let [recent, flushing] = &mut **sets;
            for (flushing, recent) in flushing.iter_mut().zip(recent) {
                *flushing |= std::mem::take(recent);
            }
        }
        true
    }

    /// Since when the flush that is followed is with the peer.
    pub(super) fn peer_flush_since(&self) -> Option<Time> {
        self.peer_flushing
    }

    /// The peer's flush that is followed succeeded.
    pub(super) fn peer_flushed(&mut self) {
        self.peer_flushing = None;
        for sets in self.slots.iter_mut().filter_map(|slot| slot.peer.as_mut()) {
            sets[1] = [0; BLOCK_WORDS];
        }
    }

    /// The peer is lost: whatever it had not settled becomes dirty.
    pub(super) fn peer_lost(&mut self, bitmap: &mut Bitmap) {
        self.peer_flushing = None;
        for slot in &mut self.slots {
            let Some(sets) = slot.peer.as_mut() else {
                continue;
            };
            let base = u64::from(slot.extent) * EXTENT;
            for word in 0..BLOCK_WORDS {
                let mut bits = sets[0][word] | sets[1][word];
                while bits != 0 {
                    let block = word as u64 * 64 + u64::from(bits.trailing_zeros());
                    bitmap.mark(ByteRange::new(base + block * BLOCK, BLOCK));
                    bits &= bits - 1;
                }
            }
            **sets = [[0; BLOCK_WORDS]; 2];
        }
    }

    /// Bytes of blocks that the peer has not settled.
    pub(super) fn unsettled_bytes(&self) -> u64 {
        let blocks: u64 = self
            .slots
            .iter()
            .filter_map(|slot| slot.peer.as_ref())
            .flat_map(|sets| sets[0].iter().zip(&sets[1]))
            .map(|(recent, flushing)| u64::from((recent | flushing).count_ones()))
            .sum();
        blocks * BLOCK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(n: u64) -> ByteRange {
        ByteRange::new(n * EXTENT, BLOCK)
    }

    fn commit(log: &mut ActivityLog) -> Vec<u32> {
        let transaction = log.transaction().expect("a transaction is due");
        log.transaction_done();
        transaction.extents
    }

    #[test]
    fn a_write_begins_only_in_a_durable_extent() {
        let mut log = ActivityLog::new(ACTIVITY_LOG_SLOTS, 100 * EXTENT, 8, false);
        assert!(!log.begin(extent(3)));
        assert_eq!(log.enter(extent(3)), 0);
        assert!(!log.begin(extent(3)));
        let transaction = log.transaction().unwrap();
        assert_eq!((transaction.sequence, transaction.extents), (9, vec![3]));
        assert!(!log.begin(extent(3)));
        // Entering while a transaction is written is for the next one.
        assert_eq!(log.enter(extent(4)), 0);
        log.transaction_done();
        assert!(log.begin(extent(3)));
        assert!(!log.begin(extent(4)));
        assert_eq!(commit(&mut log), [3, 4]);
        assert!(log.begin(ByteRange {
            start: 4 * EXTENT - 1,
            end: 4 * EXTENT + 1
        }));
    }

    fn full() -> (ActivityLog, Bitmap) {
        let slots = ACTIVITY_LOG_SLOTS as u64;
        let size = (slots + 100) * EXTENT;
        let mut log = ActivityLog::new(ACTIVITY_LOG_SLOTS, size, 0, false);
        assert_eq!(
            log.enter(ByteRange {
                start: 0,
                end: slots * EXTENT
            }),
            0
        );
        commit(&mut log);
        (log, Bitmap::new(size))
    }

    #[test]
    fn nothing_is_evicted_before_it_is_durable_on_both() {
        let (mut log, mut bitmap) = full();
        let beyond = extent(ACTIVITY_LOG_SLOTS as u64);
        assert_eq!(log.enter(beyond), 1);

        // Every extent: a local write that no flush covered, then a peer's.
        let all = ByteRange {
            start: 0,
            end: ACTIVITY_LOG_SLOTS as u64 * EXTENT,
        };
        assert!(log.begin(all));
        assert_eq!(log.make_room(1, &bitmap, false), Room::AllBusy);
        log.local_completed(all, false);
        log.peer_completed(all);
        log.end(all);
        assert_eq!(log.make_room(1, &bitmap, false), Room::NeedsSettling);
        log.local_flushed(log.local_written());
        assert_eq!(log.make_room(1, &bitmap, false), Room::NeedsSettling);
        assert!(log.peer_flush_begins(Time(1)));
        assert!(!log.peer_flush_begins(Time(1)));
        assert_eq!(log.make_room(1, &bitmap, false), Room::NeedsSettling);
        log.peer_flushed();

        // Nor before the bitmap that covers it is on disk.
        bitmap.mark_all();
        assert_eq!(log.make_room(1, &bitmap, false), Room::NeedsBitmap);
        for index in 0..bitmap.blocks() {
            bitmap.save(index, crate::types::ReplicaId(1));
        }
        assert_eq!(log.make_room(1, &bitmap, true), Room::NeedsBitmap);
        assert_eq!(log.make_room(1, &bitmap, false), Room::Made);
        assert_eq!(log.enter(beyond), 0);
        assert!(commit(&mut log).contains(&(ACTIVITY_LOG_SLOTS as u32)));
    }

    #[test]
    fn what_the_lost_peer_had_not_settled_becomes_dirty() {
        let (mut log, mut bitmap) = full();
        let write = |n: u64| ByteRange::new(n * BLOCK + 512, 512);
        log.peer_completed(write(1));
        assert!(log.peer_flush_begins(Time(1)));
        log.peer_completed(write(2000));
        log.peer_flushed();
        log.peer_completed(write(3000));
        assert!(log.peer_flush_begins(Time(1)));
        log.peer_completed(write(5));
        assert_eq!(log.unsettled_bytes(), 3 * BLOCK);
        log.peer_lost(&mut bitmap);
        assert_eq!(bitmap.dirty_bytes(), 3 * BLOCK);
        assert!(!bitmap.is_dirty(write(1)));
        for block in [2000, 3000, 5] {
            assert!(bitmap.is_dirty(write(block)), "{block}");
        }
        assert_eq!(log.unsettled_bytes(), 0);
    }
}
