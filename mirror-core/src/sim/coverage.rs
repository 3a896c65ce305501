//! R6, judged from outside: whatever differs between the two disks, or may after a loss of power now,
//! is covered by the durable marks of either.

use super::cluster::Cluster;
use super::disk::{Disk, Honesty};
use super::host::Fitness;
use crate::limits::{BLOCK, SECTOR};
use crate::meta::DurableMarks;
use crate::types::ByteRange;
use std::convert::Infallible;

/// What the two sides' durable metadata was last found to cover.
#[derive(Default)]
pub(super) struct Coverage {
    marks: [Marks; 2],
    /// The disks' change counters when their differences were last found covered.
    covered_at: [u64; 2],
}

/// What the durable metadata of a disk covers, and at which of its changes that was read.
#[derive(Default, Debug)]
struct Marks {
    at: u64,
    /// The edition of the bitmap in it.
    bitmap_at: u64,
    known: Option<DurableMarks>,
    /// Something was marked when writes that are not durable yet were looked at, and may not be any more.
    receded: bool,
}

impl Cluster {
    /// R6: blocks that differ, or may after a loss of power now, are covered by the durable marks of
    /// either side.
    pub fn check_covered(&mut self) {
        let changes = self.changes();
        let fit = self.hosts.iter().all(|host| host.fitness == Fitness::Fit);
        if changes == self.coverage.covered_at || !fit {
            return;
        }
        self.coverage.covered_at = changes;
        self.read_marks();
        for run in self
            .differing_blocks()
            .chunk_by(|block, next| block + 1 == *next)
        {
            let range = ByteRange::new(run[0] * BLOCK, run.len() as u64 * BLOCK);
            let naked = |block: &&u64| !self.is_marked(ByteRange::new(*block * BLOCK, BLOCK));
            if !self.is_marked(range)
                && let Some(block) = run.iter().find(naked)
            {
                return self.fail(format!(
                    "R6: block {block} differs, and neither side's durable metadata covers it"
                ));
            }
        }
        self.check_unsettled();
    }

    /// R6: what a loss of power now may leave different is marked. Each write was looked at when it was
    /// submitted, so nothing is left to look at before marks go away.
    fn check_unsettled(&mut self) {
        if !self.coverage.marks.iter().any(|marks| marks.receded) || !self.may_judge_marks() {
            return;
        }
        for marks in &mut self.coverage.marks {
            marks.receded = false;
        }
        let disks = self.hosts.iter().map(|host| &host.disk);
        let unsettled: Vec<(u64, u64)> = disks.flat_map(Disk::unsettled).collect();
        for (start, count) in unsettled {
            self.check_marked_for_a_crash(start, count);
        }
    }

    /// Whether both disks are what they say, and mean it.
    fn may_judge_marks(&self) -> bool {
        self.hosts
            .iter()
            .all(|host| host.fitness == Fitness::Fit && host.disk.honesty() == Honesty::Honest)
    }

    /// R6: a write is on its way to the disk, or landed there and is not durable. If either machine loses
    /// power now, whatever that leaves different is marked already.
    pub fn check_marked_for_a_crash(&mut self, start: u64, count: u64) {
        if !self.may_judge_marks() {
            // Later, if it is still on its way then.
            self.coverage.marks[0].receded = true;
            return;
        }
        self.read_marks();
        let first = start * SECTOR / BLOCK;
        let end = ((start + count) * SECTOR).div_ceil(BLOCK);
        if self.is_marked(ByteRange::new(first * BLOCK, (end - first) * BLOCK)) {
            return;
        }
        for block in first..end {
            if self.is_marked(ByteRange::new(block * BLOCK, BLOCK)) {
                continue;
            }
            let sectors = block * (BLOCK / SECTOR)..(block + 1) * (BLOCK / SECTOR);
            let may_differ = sectors.clone().any(|sector| {
                let [mine, theirs] = [0, 1].map(|h| self.hosts[h].disk.possible(sector));
                mine.iter().chain(&theirs).any(|value| *value != mine[0])
            });
            if may_differ {
                return self.fail(format!(
                    "R6: block {block} may differ after a loss of power, and neither side's durable \
                     metadata covers it"
                ));
            }
        }
    }

    /// Whether the durable marks of either side, as they were last read, cover the range.
    fn is_marked(&self, range: ByteRange) -> bool {
        let mut known = self.coverage.marks.iter().flat_map(|marks| &marks.known);
        known.any(|known| known.covers(range))
    }

    /// Reads what the metadata on either disk covers, if it has changed.
    fn read_marks(&mut self) {
        let layout = self.options.layout();
        for h in [0, 1] {
            let disk = &self.hosts[h].disk;
            let marks = &mut self.coverage.marks[h];
            if disk.metadata_changes() == marks.at && marks.known.is_some() {
                continue;
            }
            let read = |offset, _| Ok::<_, Infallible>(disk.metadata_block(offset));
            let size = self.options.store_size;
            let place = self.options.metadata;
            marks.at = disk.metadata_changes();
            let bitmap_at = disk.metadata_edition(layout.bitmap_offset, layout.bitmap_blocks);
            let bitmap_kept = std::mem::replace(&mut marks.bitmap_at, bitmap_at) == bitmap_at;
            let found = match &mut marks.known {
                Some(known) if bitmap_kept => known.read_log_again(read, size, place),
                unknown => DurableMarks::read(read, size, place).map(|known| {
                    *unknown = Some(known);
                    false
                }),
            };
            match found {
                Ok(kept) => marks.receded |= !kept,
                Err(error) => {
                    marks.known = None;
                    self.fail(format!("durable metadata is unreadable: {error}"));
                }
            }
        }
    }
}
