//! The order of overlapping writes, and when a write may be acknowledged.
//!
//! Overlapping writes take the same order on both replicas because at most one of them is on its
//! way at a time: a write holds its range from before it is submitted anywhere until it completed
//! everywhere it must. A resync chunk holds its range in the same way from before it is read
//! until the target has written it, so that no block is both resynced and guest-written in an
//! unordered way (R9). Waiting is first come, first served among overlapping ranges.

use super::request_table::RequestKey;
use crate::types::{ByteRange, Holders};
use std::collections::VecDeque;

/// Who holds or waits for a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Claimant {
    /// A guest's write or zeroing.
    Guest(RequestKey),
    /// A chunk of the resync, by its serial number.
    Chunk(u32),
    /// A piece that is compared with the peer's, by its serial number.
    Piece(u32),
}

#[derive(Debug)]
struct Held {
    range: ByteRange,
    claimant: Claimant,
    ticket: u64,
}

/// Which ranges are being written.
#[derive(Debug, Default)]
pub(super) struct RangeLocks {
    /// Sorted by start; the ranges do not overlap each other.
    held: Vec<Held>,
    /// In order of arrival.
    waiting: VecDeque<(ByteRange, Claimant)>,
    tickets: u64,
}

impl RangeLocks {
    /// Takes `range`, or queues for it. Returns whether it was taken.
    pub(super) fn acquire(&mut self, range: ByteRange, claimant: Claimant) -> bool {
        let free = self.overlapping(range).is_none()
            && !self
                .waiting
                .iter()
                .any(|(waiting, _)| waiting.overlaps(range));
        if free {
            self.hold(range, claimant);
        } else {
            self.waiting.push_back((range, claimant));
        }
        free
    }

    fn hold(&mut self, range: ByteRange, claimant: Claimant) {
        self.tickets += 1;
        let at = self
            .held
            .partition_point(|held| held.range.start < range.start);
        self.held.insert(
            at,
            Held {
                range,
                claimant,
                ticket: self.tickets,
            },
        );
    }

    fn overlapping(&self, range: ByteRange) -> Option<usize> {
        // Held ranges are disjoint and sorted, so only the last one that starts before the end
        // of `range` can reach into it, or those between.
        let end = self
            .held
            .partition_point(|held| held.range.start < range.end);
        let last = end.checked_sub(1)?;
        self.held[last].range.overlaps(range).then_some(last)
    }

    /// Gives `range` back and appends to `granted` those who get theirs now.
    pub(super) fn release(&mut self, range: ByteRange, granted: &mut Vec<Claimant>) {
        let at = self
            .held
            .partition_point(|held| held.range.start < range.start);
        debug_assert!(self.held.get(at).is_some_and(|held| held.range == range));
        if self.held.get(at).is_some_and(|held| held.range == range) {
            self.held.remove(at);
        }
        self.grant_waiting(granted);
    }

    /// Takes back a claim that still waits.
    pub(super) fn withdraw(&mut self, claimant: Claimant, granted: &mut Vec<Claimant>) {
        self.waiting.retain(|(_, waiting)| *waiting != claimant);
        self.grant_waiting(granted);
    }

    /// Gives back everything that guests' writes hold or wait for.
    pub(super) fn release_guests(&mut self, granted: &mut Vec<Claimant>) {
        let of_guest = |claimant: Claimant| matches!(claimant, Claimant::Guest(_));
        self.waiting.retain(|(_, waiting)| !of_guest(*waiting));
        self.held.retain(|held| !of_guest(held.claimant));
        self.grant_waiting(granted);
    }

    fn grant_waiting(&mut self, granted: &mut Vec<Claimant>) {
        let mut at = 0;
        while at < self.waiting.len() {
            let (range, claimant) = self.waiting[at];
            let behind_another = self.waiting.iter().take(at).any(|(r, _)| r.overlaps(range));
            if behind_another || self.overlapping(range).is_some() {
                at += 1;
            } else {
                self.waiting.remove(at);
                self.hold(range, claimant);
                granted.push(claimant);
            }
        }
    }

    /// Whether a guest's write to a part of `range` is on its way that was so when `ticket` was
    /// the newest ([`RangeLocks::newest_ticket`]).
    ///
    /// A read that raced with a write may have seen its data, so it is answered after the write
    /// is: what a reader saw must not vanish in a failover.
    pub(super) fn written_since(&self, range: ByteRange, ticket: u64) -> bool {
        let end = self
            .held
            .partition_point(|held| held.range.start < range.end);
        self.held[..end]
            .iter()
            .rev()
            .take_while(|held| held.range.end > range.start)
            .any(|held| held.ticket <= ticket && matches!(held.claimant, Claimant::Guest(_)))
    }

    /// The ticket of the range taken last.
    pub(super) fn newest_ticket(&self) -> u64 {
        self.tickets
    }
}

/// One half of a write: what became of it on one replica.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Half {
    /// Not submitted there, or submitted over a connection that is gone: whatever was completed
    /// there does not count any more.
    Absent,
    /// On its way.
    Pending,
    /// Completed (durably, if that was asked for).
    Done,
}

/// Whether a write, zeroing or flush may be acknowledged (R1).
///
/// `replicating` says whether a connected peer takes every write; `by_right` whether the record
/// that `holders` describes is durable and no change of it is under way.
pub(super) fn may_acknowledge(
    local: Half,
    peer: Half,
    replicating: bool,
    holders: Holders,
    by_right: bool,
) -> bool {
    let on_both = local == Half::Done && peer == Half::Done && replicating;
    let alone = local == Half::Done && !replicating && holders == Holders::Sole;
    by_right && (on_both || alone)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange { start, end }
    }

    fn chunk(n: u32) -> Claimant {
        Claimant::Chunk(n)
    }

    #[test]
    fn overlapping_claims_wait_in_order() {
        let mut locks = RangeLocks::default();
        let mut granted = Vec::new();
        assert!(locks.acquire(range(0, 10), chunk(1)));
        assert!(locks.acquire(range(20, 30), chunk(2)));
        assert!(!locks.acquire(range(5, 25), chunk(3)));
        // Free by itself, but it would overtake 3.
        assert!(!locks.acquire(range(10, 15), chunk(4)));
        assert!(locks.acquire(range(30, 40), chunk(5)));
        locks.release(range(0, 10), &mut granted);
        assert_eq!(granted, []);
        locks.release(range(20, 30), &mut granted);
        assert_eq!(granted, [chunk(3)]);
        locks.release(range(5, 25), &mut granted);
        assert_eq!(granted, [chunk(3), chunk(4)]);
    }

    #[test]
    fn a_large_range_sees_every_small_one() {
        let mut locks = RangeLocks::default();
        assert!(locks.acquire(range(10, 11), chunk(1)));
        assert!(locks.acquire(range(50, 51), chunk(2)));
        assert!(!locks.acquire(range(0, 20), chunk(3)));
        assert!(!locks.acquire(range(40, 60), chunk(4)));
        assert!(locks.acquire(range(60, 61), chunk(5)));
    }

    #[test]
    fn a_neighbour_hides_nobody_before_it() {
        let mut locks = RangeLocks::default();
        assert!(locks.acquire(range(0, 10), chunk(1)));
        assert!(locks.acquire(range(20, 30), chunk(2)));
        assert!(!locks.acquire(range(5, 20), chunk(3)));
    }

    #[test]
    fn withdrawing_a_claim_lets_the_next_in() {
        let mut locks = RangeLocks::default();
        let mut granted = Vec::new();
        assert!(locks.acquire(range(0, 10), chunk(1)));
        assert!(!locks.acquire(range(5, 20), chunk(2)));
        assert!(!locks.acquire(range(15, 30), chunk(3)));
        locks.withdraw(chunk(2), &mut granted);
        assert_eq!(granted, [chunk(3)]);
    }

    #[test]
    fn guests_give_everything_back_at_once() {
        let mut locks = RangeLocks::default();
        let mut granted = Vec::new();
        let guest = |n| Claimant::Guest(RequestKey::test(n));
        assert!(locks.acquire(range(0, 10), guest(1)));
        assert!(!locks.acquire(range(5, 15), guest(2)));
        assert!(!locks.acquire(range(12, 20), chunk(1)));
        assert!(!locks.acquire(range(18, 30), guest(3)));
        locks.release_guests(&mut granted);
        assert_eq!(granted, [chunk(1)]);
        assert!(locks.acquire(range(0, 12), chunk(2)));
        assert!(locks.acquire(range(20, 40), chunk(3)));
    }

    #[test]
    fn a_read_waits_only_for_guest_writes_that_were_there() {
        let mut locks = RangeLocks::default();
        let write = Claimant::Guest(RequestKey::test(1));
        assert!(locks.acquire(range(0, 10), write));
        assert!(locks.acquire(range(10, 20), chunk(1)));
        let ticket = locks.newest_ticket();
        assert!(locks.acquire(range(20, 30), Claimant::Guest(RequestKey::test(2))));
        assert!(locks.written_since(range(9, 30), ticket));
        assert!(!locks.written_since(range(10, 30), ticket));
        assert!(!locks.written_since(range(10, 20), locks.newest_ticket()));
        assert!(locks.written_since(range(10, 30), locks.newest_ticket()));
    }

    #[test]
    fn the_acknowledgement_rule() {
        use Half::{Absent, Done, Pending};
        let rule = may_acknowledge;
        assert!(rule(Done, Done, true, Holders::Both, true));
        assert!(rule(Done, Done, true, Holders::Sole, true));
        assert!(rule(Done, Absent, false, Holders::Sole, true));
        // Without the peer nothing is acknowledged before the record says so.
        for holders in [
            Holders::Both,
            Holders::Widening,
            Holders::Peer,
            Holders::Nobody,
        ] {
            assert!(!rule(Done, Absent, false, holders, true), "{holders:?}");
            assert!(!rule(Done, Done, false, holders, true), "{holders:?}");
        }
        // Nor while the record changes, nor on one half while the peer takes writes.
        assert!(!rule(Done, Absent, false, Holders::Sole, false));
        assert!(!rule(Done, Done, true, Holders::Both, false));
        assert!(!rule(Done, Pending, true, Holders::Sole, true));
        assert!(!rule(Pending, Done, true, Holders::Both, true));
    }
}
