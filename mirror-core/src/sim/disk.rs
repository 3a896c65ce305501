//! A disk with a volatile write cache.
//!
//! Fault model. An operation in flight takes effect at some instant between its submission and
//! its completion, in any order relative to others in flight; a read may already see a write that
//! has not completed. A write that took effect sits in the volatile cache until a flush completes
//! that was submitted after the write completed, or until its own completion if it was FUA.
//!
//! * **Power loss** keeps any subset of the sectors in the cache and of the writes in flight, so
//!   multi-sector writes tear and older contents may survive newer ones. Metadata writes in
//!   flight tear at 512 bytes.
//! * **Process crash** (kill -9) keeps everything that took effect; an operation in flight lands
//!   whole, in part at 4 KiB, or not at all, and is over when the next process opens the disk.
//! * **An error** ends an operation badly, once or until an operator acts. What a failed write left
//!   is indeterminate. A flush that failed has lost some of the cache for good: it is still read
//!   back, no later flush makes it durable, and the next flush succeeds.
//! * **A lie**: flushes and FUA complete and make nothing durable. The cache is real, so the lie
//!   shows at a power loss only.

use super::buffers::Stamps;
use crate::limits::{BLOCK, SECTOR};
use std::collections::BTreeMap;

/// Sectors in one allocation unit of the sparse image.
pub(super) const LEAF: usize = 512;
const SECTORS_PER_BLOCK: u64 = BLOCK / SECTOR;

/// An operation as the disk sees it.
#[derive(Clone, Debug)]
pub(super) enum Operation {
    Read { start: u64, count: u64 },
    Write { start: u64, data: Fill, fua: bool },
    Flush,
    MetaRead { offset: u64, len: usize },
    MetaWrite { offset: u64, bytes: Vec<u8> },
}

/// What kind of operation it is, as far as errors strike by kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Access {
    Read,
    Write,
    Flush,
    MetaRead,
    MetaWrite,
}

impl Operation {
    /// The sectors that it writes, if any: the first, and how many.
    pub fn writes(&self) -> Option<(u64, u64)> {
        match self {
            Operation::Write { start, data, .. } => Some((*start, data.len())),
            _ => None,
        }
    }

    fn access(&self) -> Access {
        match self {
            Operation::Read { .. } => Access::Read,
            Operation::Write { .. } => Access::Write,
            Operation::Flush => Access::Flush,
            Operation::MetaRead { .. } => Access::MetaRead,
            Operation::MetaWrite { .. } => Access::MetaWrite,
        }
    }
}

/// Whether the disk means it when it says "durable".
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Honesty {
    Honest,
    Lying,
}

/// What a write puts into its sectors.
#[derive(Clone, Debug)]
pub(super) enum Fill {
    Stamps(Stamps),
    Zeroes(u64),
}

impl Fill {
    fn len(&self) -> u64 {
        match self {
            Fill::Stamps(stamps) => stamps.len() as u64,
            Fill::Zeroes(count) => *count,
        }
    }

    fn at(&self, index: u64) -> u64 {
        match self {
            Fill::Stamps(stamps) => stamps[index as usize],
            Fill::Zeroes(_) => 0,
        }
    }
}

/// What a completed operation gives back.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Read(Vec<u64>),
    Done,
    Meta(Vec<u8>),
}

#[derive(Clone)]
struct Leaf {
    cache: [u64; LEAF],
    durable: [u64; LEAF],
    /// The landing number of what is in `durable`.
    durable_landing: [u32; LEAF],
}

/// A write that took effect but is not durable.
struct Landed {
    landing: u32,
    op: u64,
    start: u64,
    data: Fill,
    /// Its position in the order of completions, once it completed.
    completed: Option<u64>,
}

struct InFlight {
    operation: Operation,
    landed: bool,
    /// For a flush: it covers completions before this.
    covers: u64,
}

/// What a sector holds before anything was written to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Blank {
    Zeroes,
    /// Leftovers, told apart by this number.
    Garbage(u8),
}

impl Blank {
    pub fn sector(self, sector: u64) -> u64 {
        match self {
            Blank::Zeroes => 0,
            Blank::Garbage(which) => (0xf0 + u64::from(which)) << 56 | sector,
        }
    }
}

/// A block of metadata, and the change that touched it last.
#[derive(Clone)]
struct MetadataBlock {
    edition: u64,
    bytes: Box<[u8; BLOCK as usize]>,
}

/// One node's disk: the data image by sector stamps, the metadata by bytes.
pub(super) struct Disk {
    sectors: u64,
    blank: Blank,
    leaves: Vec<Option<Box<Leaf>>>,
    /// For each leaf, the change that touched it last.
    editions: Vec<u64>,
    /// Leaves changed since somebody last asked.
    touched: Vec<usize>,
    is_touched: Vec<bool>,
    metadata: BTreeMap<u64, MetadataBlock>,
    in_flight: BTreeMap<u64, InFlight>,
    cached: Vec<Landed>,
    landings: u32,
    changes: u64,
    metadata_changes: u64,
    completions: u64,
    /// What the next power loss keeps, if that is decided.
    decided: Option<Kept>,
    honesty: Honesty,
    rng: fastrand::Rng,
}

impl Disk {
    pub fn new(data_sectors: u64, blank: Blank, rng: fastrand::Rng) -> Disk {
        let leaves = data_sectors.div_ceil(LEAF as u64) as usize;
        Disk {
            sectors: data_sectors,
            blank,
            leaves: std::iter::repeat_with(|| None).take(leaves).collect(),
            editions: vec![0; leaves],
            touched: (0..leaves).collect(),
            is_touched: vec![true; leaves],
            metadata: BTreeMap::new(),
            in_flight: BTreeMap::new(),
            cached: Vec::new(),
            landings: 0,
            changes: 0,
            metadata_changes: 0,
            completions: 0,
            decided: None,
            honesty: Honesty::Honest,
            rng,
        }
    }

    /// A disk with the contents of another, as somebody who copies it would read them.
    pub fn copy_of(other: &Disk, rng: fastrand::Rng) -> Disk {
        let mut copy = Disk::new(other.sectors, other.blank, rng);
        copy.leaves.clone_from(&other.leaves);
        for leaf in copy.leaves.iter_mut().flatten() {
            leaf.durable = leaf.cache;
            leaf.durable_landing = [0; LEAF];
        }
        copy.metadata.clone_from(&other.metadata);
        for block in copy.metadata.values_mut() {
            block.edition = copy.metadata_changes;
        }
        copy
    }

    /// Takes the place of another disk in its machine: changes are counted on from there.
    pub fn succeed(&mut self, predecessor: &Disk) {
        self.changes = predecessor.changes + 1;
        self.metadata_changes = predecessor.metadata_changes + 1;
        self.editions.fill(self.changes);
        for block in self.metadata.values_mut() {
            block.edition = self.metadata_changes;
        }
    }

    /// Starts an operation; the caller decides when it completes.
    pub fn submit(&mut self, op: u64, operation: Operation) -> Result<(), String> {
        let entry = InFlight {
            operation,
            landed: false,
            covers: self.completions,
        };
        match self.in_flight.insert(op, entry) {
            None => Ok(()),
            Some(_) => Err(format!("operation {op} is submitted twice")),
        }
    }

    /// Ends an operation.
    pub fn complete(&mut self, op: u64) -> Option<Outcome> {
        let InFlight {
            operation,
            landed,
            covers,
        } = self.in_flight.remove(&op)?;
        Some(match operation {
            Operation::Read { start, count } => {
                self.land_some_early(start, count);
                Outcome::Read(self.views(start, count))
            }
            Operation::Write { start, data, fua } => {
                if !landed {
                    self.land(op, start, data);
                }
                self.completions += 1;
                let completion = self.completions;
                if let Some(entry) = self.cached.iter_mut().rev().find(|entry| entry.op == op) {
                    entry.completed = Some(completion);
                }
                if fua && self.honesty == Honesty::Honest {
                    self.settle(|entry| entry.op == op);
                }
                Outcome::Done
            }
            Operation::Flush if self.honesty == Honesty::Lying => Outcome::Done,
            Operation::Flush => {
                self.settle(|entry| entry.completed.is_some_and(|at| at <= covers));
                Outcome::Done
            }
            Operation::MetaRead { offset, len } => Outcome::Meta(self.read_metadata(offset, len)),
            Operation::MetaWrite { offset, bytes } => {
                self.write_metadata(offset, &bytes);
                Outcome::Done
            }
        })
    }

    /// What an operation in flight does.
    pub fn access(&self, op: u64) -> Option<Access> {
        self.in_flight
            .get(&op)
            .map(|entry| entry.operation.access())
    }

    /// Ends an operation with an error.
    pub fn fail(&mut self, op: u64) {
        let Some(entry) = self.in_flight.remove(&op) else {
            return;
        };
        match entry.operation {
            Operation::Read { .. } | Operation::MetaRead { .. } => {}
            Operation::Write { start, data, .. } => {
                if !entry.landed {
                    self.land_in_part(op, start, &data);
                }
                self.completions += 1;
                let completion = self.completions;
                for landed in self.cached.iter_mut().filter(|landed| landed.op == op) {
                    landed.completed = Some(completion);
                }
            }
            Operation::Flush => {
                // The kernel takes what it could not write for clean.
                let (rng, covers) = (&mut self.rng, entry.covers);
                self.cached
                    .retain(|landed| landed.completed.is_none_or(|at| at > covers) || rng.bool());
            }
            Operation::MetaWrite { offset, bytes } => {
                let kept = Kept::pick(&mut self.rng);
                self.tear_metadata(kept, offset, &bytes);
            }
        }
    }

    /// From here on the disk lies, or means it and makes durable what it lied about.
    pub fn set_honesty(&mut self, honesty: Honesty) {
        self.honesty = honesty;
        if honesty == Honesty::Honest {
            self.settle(|entry| entry.completed.is_some());
        }
    }

    pub fn honesty(&self) -> Honesty {
        self.honesty
    }

    /// Operations not completed.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// The sector as a read sees it.
    pub fn view(&self, sector: u64) -> u64 {
        match &self.leaves[sector as usize / LEAF] {
            Some(leaf) => leaf.cache[sector as usize % LEAF],
            None => self.blank.sector(sector),
        }
    }

    fn views(&self, start: u64, count: u64) -> Vec<u64> {
        let mut found = Vec::with_capacity(count as usize);
        let (mut at, end) = (start, start + count);
        while at < end {
            let slot = at as usize % LEAF;
            let piece = (LEAF - slot).min((end - at) as usize);
            match &self.leaves[at as usize / LEAF] {
                Some(leaf) => found.extend_from_slice(&leaf.cache[slot..slot + piece]),
                None => found.extend((at..at + piece as u64).map(|s| self.blank.sector(s))),
            }
            at += piece as u64;
        }
        found
    }

    /// Another number whenever something in these sectors may have changed, as reads see them.
    pub fn edition(&self, start: u64, count: u64) -> u64 {
        let leaves = start as usize / LEAF..=(start + count - 1) as usize / LEAF;
        self.editions[leaves].iter().copied().max().unwrap_or(0)
    }

    /// The sector as it would be found if the power failed and the cache were lost.
    pub fn durable(&self, sector: u64) -> u64 {
        match &self.leaves[sector as usize / LEAF] {
            Some(leaf) => leaf.durable[sector as usize % LEAF],
            None => self.blank.sector(sector),
        }
    }

    /// Which blocks of a leaf differ from the other image, as reads see them; a bit each.
    pub fn differing(&self, other: &Disk, leaf: usize) -> u64 {
        match (&self.leaves[leaf], &other.leaves[leaf]) {
            (None, None) if self.blank == other.blank => return 0,
            (Some(mine), Some(theirs)) if mine.cache == theirs.cache => return 0,
            _ => {}
        }
        let first = (leaf * LEAF) as u64;
        let mut found = 0;
        for block in 0..LEAF as u64 / SECTORS_PER_BLOCK {
            let start = first + block * SECTORS_PER_BLOCK;
            let mut sectors = start..start + SECTORS_PER_BLOCK;
            let differs = start < self.sectors && sectors.any(|s| self.view(s) != other.view(s));
            found |= u64::from(differs) << block;
        }
        found
    }

    /// The leaves that may have changed since the last call; at first, all.
    pub fn take_touched(&mut self) -> Vec<usize> {
        let touched = std::mem::take(&mut self.touched);
        for leaf in &touched {
            self.is_touched[*leaf] = false;
        }
        touched
    }

    /// Ranges that a loss of power may leave in more than one way: first sector, sectors.
    pub fn unsettled(&self) -> impl Iterator<Item = (u64, u64)> {
        let cached = self.cached.iter();
        let cached = cached.map(|landed| (landed.start, landed.data.len()));
        cached.chain(self.writing().map(|(start, data)| (start, data.len())))
    }

    /// The writes in flight, whether they took effect or not.
    fn writing(&self) -> impl Iterator<Item = (u64, &Fill)> {
        let in_flight = self.in_flight.values();
        in_flight.filter_map(|entry| match &entry.operation {
            Operation::Write { start, data, .. } => Some((*start, data)),
            _ => None,
        })
    }

    /// Whatever the sector may hold after a loss of power now.
    pub fn possible(&self, sector: u64) -> Vec<u64> {
        let cached = self.cached.iter();
        let cached = cached.map(|landed| (landed.start, &landed.data));
        let writes = cached.chain(self.writing());
        let mut values = vec![self.durable(sector)];
        values.extend(writes.filter_map(|(start, data)| {
            let index = sector.checked_sub(start)?;
            (index < data.len()).then(|| data.at(index))
        }));
        values
    }

    /// Bytes of the metadata as they are on stable storage; whole blocks.
    pub fn read_metadata(&self, offset: u64, len: usize) -> Vec<u8> {
        debug_assert!(offset.is_multiple_of(BLOCK) && (len as u64).is_multiple_of(BLOCK));
        let mut bytes = Vec::with_capacity(len);
        for at in (offset..offset + len as u64).step_by(BLOCK as usize) {
            bytes.extend_from_slice(self.metadata_block(at));
        }
        bytes
    }

    /// A block of the metadata as it is on stable storage.
    pub fn metadata_block(&self, offset: u64) -> &[u8] {
        match self.metadata.get(&(offset / BLOCK)) {
            Some(block) => &block.bytes[..],
            None => self.leftover(),
        }
    }

    /// What never written blocks of the metadata hold: leftovers of whatever used the disk before.
    fn leftover(&self) -> &'static [u8; BLOCK as usize] {
        match self.blank {
            Blank::Zeroes => &[0; BLOCK as usize],
            Blank::Garbage(_) => &[0xa7; BLOCK as usize],
        }
    }

    /// Another number whenever one of these blocks of the metadata may have changed.
    pub fn metadata_edition(&self, offset: u64, blocks: u64) -> u64 {
        let first = offset / BLOCK;
        let found = self.metadata.range(first..first + blocks);
        found.map(|(_, block)| block.edition).max().unwrap_or(0)
    }

    /// Puts metadata bytes on stable storage; within one block, or whole blocks.
    pub fn write_metadata(&mut self, offset: u64, bytes: &[u8]) {
        self.changes += 1;
        self.metadata_changes += 1;
        let leftover = self.leftover();
        let inside = (offset % BLOCK) as usize;
        for (index, piece) in (offset / BLOCK..).zip(bytes.chunks(BLOCK as usize)) {
            let block = self.metadata.entry(index).or_insert_with(|| MetadataBlock {
                edition: 0,
                bytes: Box::new(*leftover),
            });
            block.edition = self.metadata_changes;
            block.bytes[inside..inside + piece.len()].copy_from_slice(piece);
        }
    }

    /// Grows whenever metadata may have changed.
    pub fn metadata_changes(&self) -> u64 {
        self.metadata_changes
    }

    /// Grows whenever data or metadata may have changed.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// Decides what the next power loss keeps; `seed` draws the subset if it is one.
    pub fn decide_loss(&mut self, kept: Kept, seed: u64) {
        self.decided = Some(kept);
        self.rng = fastrand::Rng::with_seed(seed);
    }

    /// The power fails: the volatile cache is gone, but for what happened to reach the medium.
    pub fn lose_power(&mut self) {
        let drawn = Kept::pick(&mut self.rng);
        let kept = self.decided.take().unwrap_or(drawn);
        let in_flight = std::mem::take(&mut self.in_flight);
        let mut pending = Vec::new();
        for (op, entry) in in_flight {
            match entry.operation {
                Operation::Write { start, data, .. } if !entry.landed => {
                    pending.push((op, start, data));
                }
                Operation::MetaWrite { offset, bytes } => self.tear_metadata(kept, offset, &bytes),
                _ => {}
            }
        }
        self.rng.shuffle(&mut pending);
        for (op, start, data) in pending {
            self.land(op, start, data);
        }
        let cached = std::mem::take(&mut self.cached);
        for entry in cached {
            let whole = kept.write(&mut self.rng);
            for index in 0..entry.data.len() {
                if whole || kept.sector(&mut self.rng) {
                    let (sector, stamp) = (entry.start + index, entry.data.at(index));
                    self.make_durable(sector, stamp, entry.landing);
                }
            }
        }
        self.changes += 1;
        for index in 0..self.leaves.len() {
            if let Some(leaf) = &mut self.leaves[index] {
                leaf.cache = leaf.durable;
                self.touch(index);
            }
        }
    }

    fn tear_metadata(&mut self, kept: Kept, offset: u64, bytes: &[u8]) {
        let whole = kept == Kept::Metadata || kept.write(&mut self.rng);
        for (index, piece) in bytes.chunks(SECTOR as usize).enumerate() {
            if whole || kept.sector(&mut self.rng) {
                self.write_metadata(offset + index as u64 * SECTOR, piece);
            }
        }
    }

    /// The process is killed; the kernel and its caches live on.
    pub fn lose_process(&mut self) {
        let in_flight = std::mem::take(&mut self.in_flight);
        for (op, entry) in in_flight {
            match entry.operation {
                Operation::Write { start, data, .. } if !entry.landed => {
                    self.land_in_part(op, start, &data);
                }
                Operation::MetaWrite { offset, bytes } => {
                    let lands = self.rng.u8(0..4);
                    for (index, piece) in bytes.chunks(BLOCK as usize).enumerate() {
                        if lands >= 2 || (lands == 1 && self.rng.bool()) {
                            self.write_metadata(offset + index as u64 * BLOCK, piece);
                        }
                    }
                }
                _ => {}
            }
        }
        // The kernel ended them all: a later flush covers them. Operation numbers start anew.
        for entry in &mut self.cached {
            entry.completed.get_or_insert(self.completions);
            entry.op = u64::MAX;
        }
    }

    /// The write takes effect whole, in part, or not at all.
    fn land_in_part(&mut self, op: u64, start: u64, data: &Fill) {
        match self.rng.u8(0..4) {
            0 => {}
            1 => {
                let half = self.rng.u64(0..=data.len()) / SECTORS_PER_BLOCK * SECTORS_PER_BLOCK;
                let part = match data {
                    Fill::Zeroes(_) => Fill::Zeroes(half),
                    Fill::Stamps(stamps) => Fill::Stamps(stamps[..half as usize].into()),
                };
                self.land(op, start, part);
            }
            _ => self.land(op, start, data.clone()),
        }
    }

    fn land_some_early(&mut self, start: u64, count: u64) {
        let early: Vec<u64> = self
            .in_flight
            .iter()
            .filter(|(_, entry)| match &entry.operation {
                Operation::Write {
                    start: at, data, ..
                } => !entry.landed && *at < start + count && start < at + data.len(),
                _ => false,
            })
            .map(|(op, _)| *op)
            .collect();
        for op in early {
            if self.rng.bool()
                && let Some(entry) = self.in_flight.get_mut(&op)
                && let Operation::Write { start, data, .. } = &entry.operation
            {
                entry.landed = true;
                let (start, data) = (*start, data.clone());
                self.land(op, start, data);
            }
        }
    }

    fn land(&mut self, op: u64, start: u64, data: Fill) {
        self.landings += 1;
        self.changes += 1;
        let mut index = 0;
        while index < data.len() {
            let sector = start + index;
            let slot = sector as usize % LEAF;
            let piece = (LEAF - slot).min((data.len() - index) as usize);
            let untouched = self.leaves[sector as usize / LEAF].is_none();
            match &data {
                // Zeroes over what was never anything else.
                Fill::Zeroes(_) if untouched && self.blank == Blank::Zeroes => {}
                Fill::Zeroes(_) => self.leaf(sector).cache[slot..slot + piece].fill(0),
                Fill::Stamps(stamps) => {
                    let stamps = &stamps[index as usize..][..piece];
                    self.leaf(sector).cache[slot..slot + piece].copy_from_slice(stamps);
                }
            }
            index += piece as u64;
        }
        self.cached.push(Landed {
            landing: self.landings,
            op,
            start,
            data,
            completed: None,
        });
    }

    fn settle(&mut self, mut covered: impl FnMut(&Landed) -> bool) {
        let mut index = 0;
        while index < self.cached.len() {
            if covered(&self.cached[index]) {
                let entry = self.cached.remove(index);
                for offset in 0..entry.data.len() {
                    let stamp = entry.data.at(offset);
                    self.make_durable(entry.start + offset, stamp, entry.landing);
                }
            } else {
                index += 1;
            }
        }
    }

    fn make_durable(&mut self, sector: u64, stamp: u64, landing: u32) {
        if self.leaves[sector as usize / LEAF].is_none() {
            // Zeroes landed here, where nothing ever was.
            return;
        }
        let leaf = self.leaf(sector);
        let slot = sector as usize % LEAF;
        if landing >= leaf.durable_landing[slot] {
            leaf.durable[slot] = stamp;
            leaf.durable_landing[slot] = landing;
        }
    }

    /// A sector changes at rest.
    pub fn rot(&mut self, sector: u64, stamp: u64) {
        self.changes += 1;
        let leaf = self.leaf(sector);
        let slot = sector as usize % LEAF;
        leaf.cache[slot] = stamp;
        leaf.durable[slot] = stamp;
    }

    fn touch(&mut self, leaf: usize) {
        self.editions[leaf] = self.changes;
        if !std::mem::replace(&mut self.is_touched[leaf], true) {
            self.touched.push(leaf);
        }
    }

    fn leaf(&mut self, sector: u64) -> &mut Leaf {
        let index = sector as usize / LEAF;
        let blank = self.blank;
        self.touch(index);
        self.leaves[index].get_or_insert_with(|| {
            let first = (index * LEAF) as u64;
            let content = std::array::from_fn(|slot| blank.sector(first + slot as u64));
            Box::new(Leaf {
                cache: content,
                durable: content,
                durable_landing: [0; LEAF],
            })
        })
    }
}

/// How much of the cache, and of what is in flight, a power loss keeps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kept {
    Nothing,
    Everything,
    /// Any sectors.
    Sectors,
    /// Any writes, each whole.
    Writes,
    /// The metadata in flight, and nothing else: the record is there, what it speaks of is not.
    Metadata,
}

impl Kept {
    /// Each of them.
    pub const ALL: [Kept; 5] = [
        Kept::Nothing,
        Kept::Everything,
        Kept::Sectors,
        Kept::Writes,
        Kept::Metadata,
    ];

    fn pick(rng: &mut fastrand::Rng) -> Kept {
        Kept::ALL[rng.usize(0..Kept::ALL.len())]
    }

    fn write(self, rng: &mut fastrand::Rng) -> bool {
        match self {
            Kept::Everything => true,
            Kept::Writes => rng.bool(),
            Kept::Nothing | Kept::Sectors | Kept::Metadata => false,
        }
    }

    fn sector(self, rng: &mut fastrand::Rng) -> bool {
        match self {
            Kept::Everything => true,
            Kept::Sectors => rng.bool(),
            Kept::Nothing | Kept::Writes | Kept::Metadata => false,
        }
    }
}

#[cfg(test)]
mod tests;
