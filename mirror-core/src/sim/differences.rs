//! Where the two disks differ, kept up to date: comparing whole images again and again was half of
//! what a run cost.

use super::cluster::Cluster;
use super::disk::LEAF;
use crate::limits::{BLOCK, SECTOR};
use std::collections::BTreeMap;

const BLOCKS_PER_LEAF: u64 = LEAF as u64 / (BLOCK / SECTOR);

/// The leaves that differ, with a bit for each of their blocks.
#[derive(Default)]
pub(super) struct Differences {
    leaves: BTreeMap<usize, u64>,
}

impl Differences {
    /// The blocks, in order.
    fn blocks(&self) -> Vec<u64> {
        let mut found = Vec::new();
        for (leaf, mask) in &self.leaves {
            let first = *leaf as u64 * BLOCKS_PER_LEAF;
            let set = (0..BLOCKS_PER_LEAF).filter(|block| mask >> block & 1 == 1);
            found.extend(set.map(|block| first + block));
        }
        found
    }
}

impl Cluster {
    /// Blocks in which the two images differ, as reads see them, but for what is rotten.
    pub fn differing_blocks(&mut self) -> Vec<u64> {
        let mut found = self.differing_anyhow();
        found.retain(|block| !self.doubts.excuses(*block));
        found
    }

    /// Blocks in which the two images differ, as reads see them.
    pub fn differing_anyhow(&mut self) -> Vec<u64> {
        let mut touched = self.hosts[0].disk.take_touched();
        touched.extend(self.hosts[1].disk.take_touched());
        let [mine, theirs] = &self.hosts;
        for leaf in touched {
            match mine.disk.differing(&theirs.disk, leaf) {
                0 => self.differences.leaves.remove(&leaf),
                mask => self.differences.leaves.insert(leaf, mask),
            };
        }
        self.differences.blocks()
    }
}
