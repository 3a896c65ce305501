//! Verifies in the storm, which must find nothing; and rot of the copy that does not serve, when
//! everything is healed, of which a verify must find all and nothing else, and which it must mend.
//!
//! Only every eighth seed has them, so that what the other seeds do does not change.

use super::cluster::{Cluster, Phase};
use super::disk::Honesty;
use super::host::NAMES;
use super::operator::HEAL_TIME;
use super::options::Options;
use crate::control::VerifyState;
use crate::limits::{BLOCK, SECTOR};
use crate::node::boundary::Command;
use crate::types::Time;
use std::collections::BTreeSet;

pub(super) const VERIFY: Command = Command::Verify {
    repair: false,
    resume: false,
};
pub(super) const VERIFY_AND_REPAIR: Command = Command::Verify {
    repair: true,
    resume: false,
};
pub(super) const VERIFY_ON: Command = Command::Verify {
    repair: true,
    resume: true,
};

/// The operator's doubts about the copies.
pub(super) struct Doubts {
    next: Time,
    /// Blocks that rot has reached.
    rotten: BTreeSet<u64>,
    /// Whose disk they are on.
    host: usize,
    /// A block could not be read for a digest, and counted as different.
    unreadable: bool,
    rng: fastrand::Rng,
}

impl Doubts {
    pub fn new(options: &Options) -> Doubts {
        // Numbers of its own: those that others draw stay what they are without a verify.
        let rng = fastrand::Rng::with_seed(options.seed ^ 0x5eed_0fd0_0b75);
        Doubts {
            next: Time(0),
            rotten: BTreeSet::new(),
            host: 0,
            unreadable: false,
            rng,
        }
    }

    /// Whether a block may differ although nobody wrote to it.
    pub fn excuses(&self, block: u64) -> bool {
        self.rotten.contains(&block)
    }

    /// Whether a sector of a disk may hold anything.
    pub fn excuses_at(&self, host: usize, sector: u64) -> bool {
        host == self.host && self.rotten.contains(&(sector * SECTOR / BLOCK))
    }

    /// What follows depends on nothing that was drawn in the storm.
    pub fn forget_storm(&mut self, options: &Options) {
        *self = Doubts {
            unreadable: self.unreadable,
            ..Doubts::new(options)
        };
    }

    /// A disk failed to read what was to be compared.
    pub fn note_unreadable(&mut self) {
        self.unreadable = true;
    }

    /// Whether anything is rotten.
    pub fn is_any_rotten(&self) -> bool {
        !self.rotten.is_empty()
    }
}

impl Cluster {
    /// In the storm: a verify is begun, goes on, or ends, on any node; or the next resync is to compare.
    pub fn doubt(&mut self) {
        let Options {
            verifies,
            checksums,
            ..
        } = self.options;
        if !(verifies || checksums) || self.now < self.doubts.next {
            return;
        }
        let gap = self.options.operator_gap.as_nanos() as u64;
        let rng = &mut self.doubts.rng;
        self.doubts.next = Time(self.now.0 + rng.u64(gap / 4..gap * 2));
        let h = rng.usize(0..2);
        if checksums {
            return self.order(h, Command::CompareFirst);
        }
        let what = [
            VERIFY,
            VERIFY,
            VERIFY_AND_REPAIR,
            VERIFY_ON,
            Command::StopVerify,
        ];
        let what = what[rng.usize(0..what.len())];
        self.order(h, what);
    }

    /// Replicas that are in sync are equal, as long as nothing is rotten, every disk could be read, and
    /// none has lied.
    pub fn check_nothing_found(&mut self) {
        if !self.options.verifies {
            return;
        }
        let honest = (0..2).all(|h| self.hosts[h].disk.honesty() == Honesty::Honest);
        if self.doubts.is_any_rotten() || self.doubts.unreadable || !honest {
            return;
        }
        for h in 0..2 {
            let found = self.status(h).and_then(|status| status.verify);
            if found.is_some_and(|verify| verify.different_bytes > 0) {
                self.fail("a verify found a difference that nobody made".to_owned());
            }
        }
    }

    /// Everything was read back: bits flip, and blocks land in others' places, on the disk of whoever
    /// does not serve; the operator verifies, and names the other copy.
    pub fn begin_rot(&mut self) {
        let Some(serving) = (0..2).find(|h| self.serving(*h)) else {
            return self.fail("nobody serves when everything was read back".to_owned());
        };
        self.doubts.host = 1 - serving;
        let blocks = self.status(serving).map_or(0, |s| s.size_bytes) / BLOCK;
        let per_block = BLOCK / SECTOR;
        for _ in 0..self.doubts.rng.u64(1..20) {
            let rng = &mut self.doubts.rng;
            let (block, from) = (rng.u64(0..blocks), rng.u64(0..blocks));
            let (flips, at) = (rng.bool(), rng.u64(0..per_block));
            let disk = &mut self.hosts[1 - serving].disk;
            for sector in 0..per_block {
                let here = block * per_block + sector;
                let misdirected = disk.view(from * per_block + sector);
                match flips {
                    true if sector == at => disk.rot(here, disk.view(here) ^ 1 << 63),
                    true => {}
                    false => disk.rot(here, misdirected),
                }
            }
            self.doubts.rotten.insert(block);
        }
        let rotten = self.differing_anyhow();
        self.doubts.rotten.retain(|block| rotten.contains(block));
        self.stats.rotten_blocks += rotten.len() as u64;
        let deadline = self.now.after(HEAL_TIME);
        self.phase = Phase::Rot { serving, deadline };
        self.command(serving, VERIFY_AND_REPAIR);
    }

    /// The rot must be found and mended.
    pub fn watch_rot(&mut self, serving: usize, deadline: Time) {
        let status = self.status(serving);
        if self.now > deadline {
            return self.fail(format!("rot was not mended in time; {status:?}"));
        }
        self.resume_resyncs();
        let done = status
            .and_then(|status| status.verify)
            .filter(|verify| verify.state == VerifyState::Complete);
        let Some(verify) = done.filter(|_| self.in_sync() && !self.operator.busy(serving)) else {
            return;
        };
        let planted = self.doubts.rotten.len() as u64 * BLOCK;
        self.doubts.rotten.clear();
        let found = verify.different_bytes;
        if found < planted || (found > planted && !self.doubts.unreadable) {
            self.fail(format!(
                "{planted} bytes were rotten, and a verify found {found}"
            ));
        }
        self.check_identical();
        if let Err(problem) = self.check_image(1 - serving) {
            self.fail(format!("on the disk of {}, {problem}", NAMES[1 - serving]));
        }
        self.phase = Phase::Over;
    }
}
