//! A disk with a volatile cache, and nothing left to chance.
//!
//! What is in a sector is the number of the request that wrote it; 0 is a sector of zeroes.

use super::parse::Kept;
use crate::limits::SECTOR;
use crate::types::ByteRange;
use std::collections::BTreeMap;

/// What a disk holds that nobody ever wrote to: leftovers of another life.
pub(super) const LEFTOVER: u64 = u64::MAX;

/// A write that is not durable.
#[derive(Debug)]
struct Landed {
    /// The disk's count of landings when it landed.
    landing: u64,
    start: u64,
    stamps: Vec<u64>,
}

/// The data area by sectors, the metadata by bytes.
pub(super) struct Disk {
    blank: u64,
    cache: BTreeMap<u64, u64>,
    /// What is on the medium, and the landing it came with.
    medium: BTreeMap<u64, (u64, u64)>,
    volatile: Vec<Landed>,
    landings: u64,
    pub metadata: Vec<u8>,
    pub size: u64,
}

impl Disk {
    pub fn new(size: u64, blank: u64, metadata: Vec<u8>) -> Disk {
        Disk {
            blank,
            cache: BTreeMap::new(),
            medium: BTreeMap::new(),
            volatile: Vec::new(),
            landings: 0,
            metadata,
            size,
        }
    }

    /// What a flush submitted now will cover.
    pub fn landings(&self) -> u64 {
        self.landings
    }

    pub fn write(&mut self, start: u64, stamps: Vec<u64>, fua: bool) {
        self.landings += 1;
        let landing = self.landings;
        for (sector, stamp) in (start / SECTOR..).zip(&stamps) {
            self.cache.insert(sector, *stamp);
        }
        let landed = Landed {
            landing,
            start,
            stamps,
        };
        if fua {
            self.keep(&landed);
        } else {
            self.volatile.push(landed);
        }
    }

    /// Makes durable what had landed by then.
    pub fn flush(&mut self, covers: u64) {
        let (durable, volatile) = std::mem::take(&mut self.volatile)
            .into_iter()
            .partition(|landed| landed.landing <= covers);
        self.volatile = volatile;
        for landed in Vec::<Landed>::into_iter(durable) {
            self.keep(&landed);
        }
    }

    /// A later landing on the medium is never overwritten by an earlier one.
    fn keep(&mut self, landed: &Landed) {
        for (sector, stamp) in (landed.start / SECTOR..).zip(&landed.stamps) {
            let there = self.medium.entry(sector).or_insert((0, self.blank));
            if there.0 < landed.landing {
                *there = (landed.landing, *stamp);
            }
        }
    }

    pub fn lose_power(&mut self, kept: &Kept) {
        for landed in std::mem::take(&mut self.volatile) {
            if landed.stamps.iter().any(|stamp| survives(kept, *stamp)) {
                self.keep(&landed);
            }
        }
        self.cache = self
            .medium
            .iter()
            .map(|(sector, (_, stamp))| (*sector, *stamp))
            .collect();
    }

    pub fn sector(&self, sector: u64) -> u64 {
        self.cache.get(&sector).copied().unwrap_or(self.blank)
    }

    pub fn durable(&self, sector: u64) -> u64 {
        self.medium
            .get(&sector)
            .map_or(self.blank, |(_, stamp)| *stamp)
    }

    pub fn read(&self, range: ByteRange) -> Vec<u64> {
        sectors(range).map(|sector| self.sector(sector)).collect()
    }

    /// Sectors below `end` that read differently on the other disk.
    pub fn differing(&self, other: &Disk, end: u64) -> Vec<u64> {
        let alike = self.blank == other.blank;
        let touched = || self.cache.keys().chain(other.cache.keys()).copied();
        let differ = |sector: &u64| self.sector(*sector) != other.sector(*sector);
        let below = |sector: &u64| *sector < end / SECTOR;
        let mut found: Vec<u64> = if alike {
            touched().filter(below).filter(differ).collect()
        } else {
            (0..end / SECTOR).filter(differ).collect()
        };
        found.sort_unstable();
        found.dedup();
        found
    }
}

/// Whether a write of this request is among what is kept.
pub(super) fn survives(kept: &Kept, stamp: u64) -> bool {
    match kept {
        Kept::None => false,
        Kept::All => true,
        Kept::These(requests) => requests.contains(&stamp),
    }
}

pub(super) fn sectors(range: ByteRange) -> std::ops::Range<u64> {
    range.start / SECTOR..range.end / SECTOR
}
