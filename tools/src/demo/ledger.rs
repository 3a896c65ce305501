//! What a guest was told, kept outside everything that gets killed: which version of each block
//! was acknowledged, and which were only sent.

use fastrand::Rng;
use std::ops::RangeInclusive;

/// The size of the story's writes.
pub const BLOCK: usize = 4096;

/// Versions of every block of a device. Version 0 is the zeroes of a new disk.
#[derive(Debug)]
pub struct Ledger {
    seed: u64,
    blocks: Vec<Versions>,
}

#[derive(Clone, Copy, Default, Debug)]
struct Versions {
    acknowledged: u32,
    issued: u32,
}

impl Ledger {
    /// For a device of this many zeroed blocks.
    pub fn new(seed: u64, blocks: u64) -> Ledger {
        Ledger {
            seed,
            blocks: vec![Versions::default(); blocks as usize],
        }
    }

    /// Blocks of the device.
    pub fn len(&self) -> u64 {
        self.blocks.len() as u64
    }

    /// Blocks that were written at least once, answered or not.
    pub fn written(&self) -> impl Iterator<Item = u64> {
        let blocks = self.blocks.iter().enumerate();
        blocks
            .filter(|(_, it)| it.issued > 0)
            .map(|(block, _)| block as u64)
    }

    /// A new version of a block is about to be sent.
    pub fn issue(&mut self, block: u64) -> (u32, Vec<u8>) {
        let versions = &mut self.blocks[block as usize];
        versions.issued += 1;
        let version = versions.issued;
        (version, self.content(block, version))
    }

    /// The device answered that it has this version.
    pub fn acknowledge(&mut self, block: u64, version: u32) {
        let versions = &mut self.blocks[block as usize];
        versions.acknowledged = versions.acknowledged.max(version);
    }

    /// Checks what was read: the last acknowledged version, or one that was sent later and never
    /// answered. What was seen once must be there for good.
    pub fn check(&mut self, block: u64, data: &[u8]) -> Result<(), String> {
        let Versions {
            acknowledged,
            issued,
        } = self.blocks[block as usize];
        match self.version_of(block, data, acknowledged..=issued) {
            Some(version) => {
                self.blocks[block as usize].acknowledged = version;
                Ok(())
            }
            None => {
                let found = match self.version_of(block, data, 0..=acknowledged) {
                    Some(old) => format!("the older version {old}"),
                    None => "something that was never written there".to_owned(),
                };
                Err(format!(
                    "block {block} (byte {}) holds {found}; version {acknowledged} was \
                     acknowledged, {issued} sent",
                    block * BLOCK as u64
                ))
            }
        }
    }

    fn version_of(&self, block: u64, data: &[u8], mut among: RangeInclusive<u32>) -> Option<u32> {
        among.find(|&version| self.content(block, version) == data)
    }

    fn content(&self, block: u64, version: u32) -> Vec<u8> {
        let mut content = vec![0; BLOCK];
        if version > 0 {
            let key = self.seed ^ block.rotate_left(32) ^ u64::from(version);
            Rng::with_seed(key).fill(&mut content);
        }
        content
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_promised_is_demanded() {
        let mut ledger = Ledger::new(1, 8);
        let zeroes = vec![0; BLOCK];
        assert!(ledger.check(3, &zeroes).is_ok());
        let (one, first) = ledger.issue(3);
        assert!(
            ledger.check(3, &zeroes).is_ok(),
            "not acknowledged: may be lost"
        );
        ledger.acknowledge(3, one);
        assert!(
            ledger
                .check(3, &zeroes)
                .unwrap_err()
                .contains("older version 0")
        );
        assert!(ledger.check(3, &first).is_ok());
        let (_, second) = ledger.issue(3);
        assert!(ledger.check(3, &first).is_ok());
        assert!(ledger.check(3, &second).is_ok());
        assert!(ledger.check(3, &first).is_err(), "what was seen must stay");
        assert!(
            ledger
                .check(4, &second)
                .unwrap_err()
                .contains("never written")
        );
        assert_eq!(ledger.written().collect::<Vec<_>>(), [3]);
    }

    #[test]
    fn the_same_seed_gives_the_same_data() {
        let data = |seed| Ledger::new(seed, 8).issue(5).1;
        assert_eq!(data(7), data(7));
        assert_ne!(data(7), data(8));
    }
}
