//! What the durable superblocks of the two disks say, read as an outsider would read them, and
//! what may never stand in them together.
//!
//! What a node says of itself runs ahead of its disk or behind it; what a crash leaves is the disk.

use super::cluster::Cluster;
use super::host::{Fitness, NAMES};
use crate::control::Direction;
use crate::meta::superblock::{Superblock, Trust};
use crate::types::{DiskState, Generation, Holders, Role};

impl Cluster {
    /// Reads both slots of a disk, as far as they are superblocks. Called whenever one may have
    /// changed.
    pub fn read_slots(&mut self, h: usize) {
        let layout = self.options.layout();
        let disk = &self.hosts[h].disk;
        self.custody.slots[h] = [0, 1].map(|slot| {
            let bytes = disk.metadata_block(layout.slot_offset(slot));
            let parsed = Superblock::parse(bytes).ok()?;
            Some(parsed.untrusted().clone())
        });
    }

    /// The superblock in force on a disk.
    pub fn record(&self, h: usize) -> Option<&Superblock> {
        let slots = self.custody.slots[h].iter().flatten();
        slots.max_by_key(|slot| slot.sequence)
    }

    /// Who holds everything, by the durable record of a node that is or was in charge.
    pub fn named_by(&self, h: usize) -> Option<[bool; 2]> {
        let mut named = [false; 2];
        match self.record(h)?.holders {
            Holders::Nobody => return None,
            Holders::Both => named = [true; 2],
            // Until a widening takes effect the record names this replica alone.
            Holders::Sole | Holders::Widening => named[h] = true,
            Holders::Peer => named[1 - h] = true,
        }
        Some(named)
    }

    /// What may not stand on the two disks at any instant, whichever slot a crash leaves.
    pub fn check_records(&mut self) {
        // A disk that is another's, or nobody's any more, says nothing that counts.
        let fit = self.hosts.iter().all(|host| host.fitness == Fitness::Fit);
        if self.operator.forced || self.violation.is_some() || !fit {
            return;
        }
        // With an arbiter a replica may claim what a widening that came to nothing would have given
        // it: there the register decides, and is judged by itself.
        let beside = match self.options.is_arbitrated() {
            true => None,
            false => sole_beside_another(&self.custody.slots),
        };
        let problem = beside
            .or_else(|| self.half_copy_named())
            .or_else(|| (0..2).find_map(|h| self.status_without_record(h)));
        if let Some(problem) = problem {
            self.fail(problem);
        }
    }

    /// R7: no record names a replica a holder that is a copy in the making.
    fn half_copy_named(&self) -> Option<String> {
        let records = [self.record(0)?, self.record(1)?];
        (0..2).find_map(|h| {
            let (mine, theirs) = (records[h], records[1 - h]);
            let named = mine.holders == Holders::Both && mine.peer_replica == theirs.replica;
            let copy = theirs.trust == Trust::Inconsistent && theirs.generation == mine.generation;
            (named && copy).then(|| {
                let (a, b) = (NAMES[h], NAMES[1 - h]);
                format!("R7: the record of {a} names {b} a holder, whose disk is Inconsistent")
            })
        })
    }

    /// R7: what a node says of its disk is what a crash would leave.
    fn status_without_record(&self, h: usize) -> Option<String> {
        // A node that stands still has not heard yet of what landed.
        let standing = self.standing(h).filter(|_| !self.is_paused(h))?;
        let slots = self.custody.slots[h].iter().flatten();
        let trusts: Vec<Trust> = slots.map(|slot| slot.trust).collect();
        let honest = match (standing.disk, standing.resync) {
            // Blocks are being overwritten: not even the loss of a slot may hide that.
            (_, Some(Direction::Target)) => trusts.iter().all(|t| *t == Trust::Inconsistent),
            // A lowering may be on its way to the second slot, a rise is in one slot only.
            (DiskState::UpToDate, _) => trusts.contains(&Trust::UpToDate),
            _ => true,
        };
        (!honest).then(|| {
            let name = NAMES[h];
            format!("R7: {name} is {}, its slots say {trusts:?}", standing.disk)
        })
    }

    /// R3: a holder that begins a generation has everything that was acknowledged before, durably.
    /// Called when a superblock landed, before the node hears of it.
    pub fn check_new_generation(&mut self, h: usize) {
        let generation = |record: &Superblock| record.generation;
        let before = self.record(h).map_or(Generation::UNBORN, generation);
        self.read_slots(h);
        let mut slots = self.custody.slots[h].iter().flatten();
        if slots.all(|s| s.trust == Trust::Inconsistent) {
            // What it lost is copied anew.
            self.custody.lost[h] = false;
        }
        let Some(record) = self.record(h) else { return };
        let begun = before != record.generation && before != Generation::UNBORN;
        let holds = matches!(record.holders, Holders::Sole | Holders::Both);
        if begun {
            self.custody.acknowledged_before[h] = self.client.acknowledged[h];
        }
        let served = self.standing(h).is_some_and(|s| s.role == Role::Primary);
        let complete = self.custody.named[h] && (!self.custody.lost[h] || served);
        if begun && holds && complete && !self.operator.forced && !self.client.parted {
            let found = self.check_present_on(h);
            if let Err(problem) = found {
                self.fail(format!("{} began a generation: {problem}", NAMES[h]));
            }
        }
    }
}

/// R2, R5: a sole holder's generation is claimed by nobody else, even when the newer slot is lost.
fn sole_beside_another(slots: &[[Option<Superblock>; 2]; 2]) -> Option<String> {
    let claims = |slot: &Superblock| {
        matches!(
            slot.holders,
            Holders::Sole | Holders::Both | Holders::Widening
        )
    };
    (0..2).find_map(|h| {
        let mine = slots[h].iter().flatten();
        let mut sole = mine.filter(|slot| slot.holders == Holders::Sole);
        let both = sole.any(|mine| {
            let mut theirs = slots[1 - h].iter().flatten();
            theirs.any(|theirs| claims(theirs) && theirs.generation == mine.generation)
        });
        both.then(|| {
            let (a, b) = (NAMES[h], NAMES[1 - h]);
            format!("R2: {a} is recorded as sole holder of a generation that {b} claims to hold")
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{GenerationId, ReplicaId};

    fn slot(counter: u64, holders: Holders) -> Option<Superblock> {
        let id = GenerationId(u128::from(counter));
        Some(Superblock {
            generation: Generation { counter, id },
            holders,
            ..Superblock::unborn(ReplicaId(1), 0)
        })
    }

    #[test]
    fn a_sole_holder_stands_alone_whichever_slot_is_left() {
        let sole = [slot(2, Holders::Sole), slot(1, Holders::Both)];
        let behind = [slot(1, Holders::Both), None];
        assert_eq!(sole_beside_another(&[sole.clone(), behind]), None);
        let target = [slot(2, Holders::Peer), slot(2, Holders::Peer)];
        assert_eq!(sole_beside_another(&[target, sole.clone()]), None);
        // The right was given up in the newer slot only, and the peer became a holder.
        let finished = [slot(2, Holders::Peer), slot(2, Holders::Both)];
        let half = [slot(2, Holders::Sole), slot(2, Holders::Widening)];
        assert!(sole_beside_another(&[half.clone(), finished.clone()]).is_some());
        assert!(sole_beside_another(&[finished.clone(), half]).is_some());
        let given_up = [slot(2, Holders::Widening), slot(2, Holders::Widening)];
        assert_eq!(sole_beside_another(&[given_up, finished]), None);
    }
}
