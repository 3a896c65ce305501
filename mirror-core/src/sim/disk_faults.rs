//! What goes wrong with disks: errors, full stores, lies, rot, and disks that are another's or new.
//!
//! What is claimed, and so what is injected:
//!
//! * An **error** of a write or of metadata is final for the daemon's life. The disk may be taken
//!   up again by a new one: what the error left open is what a kill -9 would have.
//! * A **flush that failed** has lost writes for good: the operator must replace the disk. It fails
//!   only while the other copy holds everything.
//! * A disk whose **flushes lie** loses at its next power loss what it said was durable. That is
//!   noticed by nothing, so the operator must replace a disk of which he knows. The claim is that
//!   the other copy suffices: a liar loses power only while the other copy holds everything, and
//!   its own counts as lost from then on.
//! * **Rot and misdirected writes** strike metadata at rest: a slot that is not in force, or says
//!   what the other slot says; any bitmap block; blocks of the activity log that are not in force,
//!   or all of them. With both slots gone the disk must be refused, never made anew.
//!   Data rots only when everything is healed (`verify.rs`): nothing but a verify would notice.

use super::cluster::Cluster;
use super::disk::{Access, Disk, Honesty};
use super::fault_kind::FaultKind;
use super::faults::Crash;
use super::host::{Fitness, NAMES};
use crate::limits::BLOCK;
use crate::meta::activity_log::Transaction;
use crate::meta::superblock::Superblock;
use crate::meta::{ACTIVITY_LOG_BLOCKS, SLOTS};
use crate::node::boundary::DiskError;

/// The largest store that an empty disk is resynced to within the time that healing has.
const LARGEST_REPLACED: u64 = 1 << 30;

/// How a disk fails: the next operation of a kind, or all of them until an operator acts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Trouble {
    pub access: Access,
    pub error: DiskError,
    pub lasting: bool,
}

/// What of the metadata at rest rots. Numbers pick a block, whatever their size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Rot {
    OlderSlot,
    /// Only where the other slot says the same.
    NewerSlot,
    BothSlots,
    Bitmap(u64),
    OlderLog(u64),
    WholeLog,
    /// A block lands in the place of another one.
    Misdirected {
        from: u64,
        to: u64,
    },
}

impl Cluster {
    /// Whether the other copy holds everything, and will be named for it, so that this one may be lost
    /// for good. A swap on its way may yet make this one the only holder; and where nobody is asked, one
    /// that calls itself the only holder may have told the other that it becomes its copy.
    pub fn may_be_replaced(&mut self, h: usize) -> bool {
        self.sample_custody();
        !self.arbiter.may_swap_for(h)
            && (!self.claims_alone(h) || self.options.is_arbitrated())
            && self.custody.is_complete(1 - h)
            && self.options.store_size < LARGEST_REPLACED
    }

    pub fn trouble(&mut self, h: usize, trouble: Trouble) {
        self.hosts[h].trouble = Some(trouble);
    }

    /// Whether an operation of this kind ends badly now.
    pub fn strikes(&mut self, h: usize, access: Access) -> Option<DiskError> {
        let trouble = self.hosts[h].trouble.filter(|t| t.access == access)?;
        if access == Access::Flush {
            if !self.may_be_replaced(h) {
                return None;
            }
            self.condemn(h);
        }
        if !trouble.lasting {
            self.hosts[h].trouble = None;
        }
        if let Some(process) = &mut self.hosts[h].process {
            process.erred = true;
        }
        self.stats.faults.count(match trouble.error {
            DiskError::Io => FaultKind::DiskError,
            DiskError::NoSpace => FaultKind::DiskFull,
        });
        self.tell(h, "disk reports an error");
        Some(trouble.error)
    }

    /// The disk lies from here on, until it is replaced or everything is healed.
    pub fn lie(&mut self, h: usize) {
        if self.may_be_replaced(h) && self.hosts[1 - h].disk.honesty() == Honesty::Honest {
            self.stats.faults.count(FaultKind::Lie);
            self.tell(h, "disk lies about flushes");
            self.hosts[h].disk.set_honesty(Honesty::Lying);
        }
    }

    /// The copy counts no more, and the disk will be replaced before it is used again.
    pub fn condemn(&mut self, h: usize) {
        self.hosts[h].fitness = Fitness::Condemned;
        self.custody.forget(h);
    }

    /// The machine burns down; another one takes its place.
    pub fn replace(&mut self, h: usize) {
        if self.may_be_replaced(h) {
            self.stats.faults.count(FaultKind::Replacement);
            self.condemn(h);
            self.crash_for_a_while(h, Crash::Power);
        }
    }

    /// The machine comes back with an image of its peer's disk.
    pub fn clone_image(&mut self, h: usize) {
        if self.hosts[h].fitness != Fitness::Fit || !self.may_be_replaced(h) {
            return;
        }
        self.crash_for_a_while(h, Crash::Power);
        if !self.may_be_replaced(h) || self.hosts[h].fitness != Fitness::Fit {
            return;
        }
        self.stats.faults.count(FaultKind::Clone);
        self.tell(h, "gets an image of its peer's disk");
        self.custody.forget(h);
        self.hosts[h].fitness = Fitness::Clone;
        let rng = self.hosts[h].rng.fork();
        let disk = Disk::copy_of(&self.hosts[1 - h].disk, rng);
        self.hosts[h].install(disk);
        // As somebody would do it who means well: the image gets the name of its new node.
        for slot in 0..SLOTS {
            let offset = self.options.layout().slot_offset(slot);
            let block = self.hosts[h].disk.metadata_block(offset);
            if let Ok(parsed) = Superblock::parse(block) {
                let mut superblock = parsed.untrusted().clone();
                NAMES[h].clone_into(&mut superblock.node);
                let bytes = superblock.encode();
                self.hosts[h].disk.write_metadata(offset, &bytes);
            }
        }
    }

    /// Metadata rots while its daemon is down.
    pub fn rot_after_crash(&mut self, h: usize, rot: Rot) {
        self.crash_for_a_while(h, Crash::Process);
        if self.hosts[h].fitness != Fitness::Fit {
            return;
        }
        match rot {
            Rot::OlderSlot => self.rot_slot(h, |older, _| Some(older)),
            Rot::NewerSlot => self.rot_slot(h, |older, equal| equal.then_some(1 - older)),
            Rot::BothSlots => self.rot_both_slots(h),
            Rot::Bitmap(number) => {
                let layout = self.options.layout();
                let offset = layout.bitmap_block_offset(number % layout.bitmap_blocks);
                self.rot_block(h, FaultKind::RottenBlock, offset);
            }
            Rot::OlderLog(number) => {
                if let Some(offset) = self.log_block_not_in_force(h, number) {
                    self.rot_block(h, FaultKind::RottenBlock, offset);
                }
            }
            Rot::WholeLog => {
                for index in 0..ACTIVITY_LOG_BLOCKS {
                    let offset = self.options.layout().activity_log_offset(index);
                    self.rot_block(h, FaultKind::RottenBlock, offset);
                }
            }
            Rot::Misdirected { from, to } => self.misdirect(h, from, to),
        }
        self.check_covered();
    }

    /// Spoils the slot that `which` names, told which one is older and whether they say the same.
    fn rot_slot(&mut self, h: usize, which: impl FnOnce(u64, bool) -> Option<u64>) {
        let Some((older, equal)) = self.older_slot(h) else {
            return;
        };
        if let Some(slot) = which(older, equal) {
            let offset = self.options.layout().slot_offset(slot);
            self.rot_block(h, FaultKind::RottenSlot, offset);
        }
    }

    fn rot_both_slots(&mut self, h: usize) {
        if !self.may_be_replaced(h) {
            return;
        }
        for slot in 0..SLOTS {
            let offset = self.options.layout().slot_offset(slot);
            self.rot_block(h, FaultKind::RottenSlot, offset);
        }
        self.custody.forget(h);
        self.hosts[h].fitness = Fitness::Unreadable;
    }

    fn older_slot(&self, h: usize) -> Option<(u64, bool)> {
        let slot = |number| {
            let offset = self.options.layout().slot_offset(number);
            let block = self.hosts[h].disk.read_metadata(offset, BLOCK as usize);
            Some(Superblock::parse(&block).ok()?.untrusted().clone())
        };
        let (first, second) = (slot(0)?, slot(1)?);
        let older = u64::from(second.sequence < first.sequence);
        let sequence = first.sequence;
        Some((older, first == Superblock { sequence, ..second }))
    }

    fn log_block_not_in_force(&self, h: usize, number: u64) -> Option<u64> {
        let layout = self.options.layout();
        let disk = &self.hosts[h].disk;
        let replica = self.replica_on(h)?;
        let ring: Vec<Vec<u8>> = (0..ACTIVITY_LOG_BLOCKS)
            .map(|index| disk.read_metadata(layout.activity_log_offset(index), BLOCK as usize))
            .collect();
        let newest = Transaction::newest(ring.iter().map(|b| &b[..]), replica)?.ring_index();
        let others = ACTIVITY_LOG_BLOCKS - 1;
        let index = (newest + 1 + number % others) % ACTIVITY_LOG_BLOCKS;
        Some(layout.activity_log_offset(index))
    }

    /// Which replica the disk says it is, if any.
    pub fn replica_on(&self, h: usize) -> Option<crate::types::ReplicaId> {
        (0..SLOTS).find_map(|slot| {
            let offset = self.options.layout().slot_offset(slot);
            let block = self.hosts[h].disk.read_metadata(offset, BLOCK as usize);
            Some(Superblock::parse(&block).ok()?.untrusted().replica)
        })
    }

    fn rot_block(&mut self, h: usize, kind: FaultKind, offset: u64) {
        self.stats.faults.count(kind);
        self.tell(h, "metadata rots");
        let disk = &mut self.hosts[h].disk;
        let mut block = disk.read_metadata(offset, BLOCK as usize);
        let at = (offset / BLOCK * 1237 + disk.changes()) as usize % block.len();
        block[at] ^= 0x40;
        disk.write_metadata(offset, &block);
        self.read_slots(h);
    }

    /// A write of one block lands on another; what it overwrites must be one that may rot.
    fn misdirect(&mut self, h: usize, from: u64, to: u64) {
        let layout = self.options.layout();
        let victim = match to % 3 {
            0 => self
                .older_slot(h)
                .map(|(older, _)| layout.slot_offset(older)),
            1 => self.log_block_not_in_force(h, to / 3),
            _ => Some(layout.bitmap_block_offset(to / 3 % layout.bitmap_blocks)),
        };
        let source = match from % 3 {
            0 => layout.slot_offset(from / 3 % SLOTS),
            1 => layout.activity_log_offset(from / 3 % ACTIVITY_LOG_BLOCKS),
            _ => layout.bitmap_block_offset(from / 3 % layout.bitmap_blocks),
        };
        // Where a block from elsewhere landed none is taken from: back at its own place it would be a
        // write that was lost, which no checksum tells.
        let victim = victim.filter(|_| !self.hosts[h].astray.contains(&source));
        if let Some(victim) = victim {
            self.hosts[h].astray.push(victim);
            self.stats.faults.count(FaultKind::Misdirected);
            self.tell(h, "has a metadata block land in another's place");
            let disk = &mut self.hosts[h].disk;
            let block = disk.read_metadata(source, BLOCK as usize);
            disk.write_metadata(victim, &block);
            self.read_slots(h);
        }
    }

    /// The disk is in order again, as far as it can be.
    pub fn heal_disk(&mut self, h: usize) {
        self.hosts[h].trouble = None;
        self.hosts[h].disk.set_honesty(Honesty::Honest);
    }
}
