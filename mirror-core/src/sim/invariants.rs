//! What must hold across the two nodes, seen from outside: images, durable metadata and statuses.

use super::cluster::{Cluster, Event, Phase};
use super::disk::{Disk, Honesty};
use super::host::{Fitness, NAMES};
use super::options::Scenario;
use super::split_brain::history;
use crate::control::{Arbitration, MirrorStatus};
use crate::error::ErrorId;
use crate::meta::superblock::Superblock;
use crate::node::Standing;
use crate::types::{DiskState, Generation, Holders, LinkState, Role, Time};
use std::collections::HashMap;

const WATCH_GAP: u64 = 20_000_000;

/// Which copies hold everything that was acknowledged, as far as an outsider can tell.
#[derive(Default, Debug)]
pub(super) struct Custody {
    /// Named a holder by the node that served last.
    pub named: [bool; 2],
    /// Lost power since it became a holder, so that its copy may lack what was not flushed.
    pub lost: [bool; 2],
    /// Its disk is gone for good, or another's, whatever its peer's record says.
    absent: [bool; 2],
    /// Who served in each generation.
    writers: HashMap<Generation, usize>,
    /// Who serves, or did last.
    keeper: Option<usize>,
    /// Writes that each had acknowledged when it began its present generation.
    pub acknowledged_before: [u64; 2],
    /// The generation that it named them in.
    pub generation: Generation,
    /// The superblocks on each disk.
    pub slots: [[Option<Superblock>; 2]; 2],
    watches: u64,
    /// The disks' change counters when their images were last found identical.
    identical_at: [u64; 2],
}

impl Custody {
    fn complete(&self) -> usize {
        (0..2).filter(|h| self.is_complete(*h)).count()
    }

    /// Whether the copy has everything that was acknowledged.
    pub fn is_complete(&self, h: usize) -> bool {
        self.named[h] && !self.lost[h]
    }

    /// The copy counts no more; only while another is complete.
    pub fn forget(&mut self, h: usize) {
        self.absent[h] = true;
        self.named[h] = false;
    }

    /// Who serves, or did last.
    pub fn keeper(&self) -> Option<usize> {
        self.keeper
    }

    /// Whether the node may go on without its peer and lose nothing.
    pub fn may_go_alone(&self, h: usize) -> bool {
        self.named[h] && (!self.lost[h] || !self.named[1 - h])
    }
}

impl Cluster {
    pub fn status(&self, h: usize) -> Option<MirrorStatus> {
        let process = self.hosts[h].process.as_ref()?;
        Some(process.node.status(self.hosts[h].now(self.now)))
    }

    /// Where the node stands, if its daemon runs.
    pub fn standing(&self, h: usize) -> Option<Standing> {
        let process = self.hosts[h].process.as_ref()?;
        Some(process.node.standing())
    }

    pub fn serving(&self, h: usize) -> bool {
        self.hosts[h].process.as_ref().is_some_and(|p| p.serving)
    }

    pub fn watch_step(&mut self) {
        self.look();
        let gap = WATCH_GAP + self.rng.u64(0..WATCH_GAP);
        self.schedule(gap, Event::Watch);
    }

    /// Checks what can be checked at any time.
    pub fn look(&mut self) {
        self.custody.watches += 1;
        self.sample_custody();
        self.check_one_right();
        for h in [0, 1] {
            self.check_stall(h);
            if self.serving(h) {
                let checked = self.check_writer(h).and_then(|()| self.check_serving(h));
                if let Err(problem) = checked {
                    self.fail(format!("{}: {problem}", NAMES[h]));
                }
            }
            self.check_clone(h);
            self.check_divergence(h);
        }
        self.check_records();
        self.check_nothing_found();
        if self.custody.watches.is_multiple_of(4) {
            self.check_covered();
        }
        if self.custody.watches.is_multiple_of(256) {
            self.check_complete();
        }
        if self.quiet() && (self.custody.watches.is_multiple_of(4) || self.phase != Phase::Storm) {
            self.check_identical();
        }
    }

    /// Learns from the node that serves, or did last, who holds everything.
    pub fn sample_custody(&mut self) {
        if self.options.is_arbitrated() {
            // The register says who is named, and was looked at when it changed. Where every copy
            // had lost something, what serves again is the copy that counts from then on; a Primary
            // that does not know yet that it was replaced may seem to serve beside it.
            let in_force = (0..2).find(|h| self.serving(*h) && self.custody.named[*h]);
            self.custody.keeper = in_force.or(self.custody.keeper);
            if let Some(h) = in_force.filter(|_| self.custody.complete() == 0) {
                self.custody.lost[h] = false;
            }
            self.forget_losses_in_sync();
            return;
        }
        let serving = (0..2).find(|h| self.serving(*h));
        self.custody.keeper = serving.or(self.custody.keeper);
        let own = |h: &usize| self.hosts[*h].fitness != Fitness::Clone;
        let keeper = self.custody.keeper.filter(own);
        let (Some(h), false) = (keeper, self.client.parted) else {
            return;
        };
        // The disk says what counts; what the node says may not be durable yet.
        let Some(recorded) = self.named_by(h) else {
            return;
        };
        self.meet_new_copies();
        let named = [0, 1].map(|at| recorded[at] && !self.custody.absent[at]);
        let before = self.custody.named;
        self.leave_behind(before, named);
        self.custody.named = named;
        if serving.is_some() {
            self.custody.lost[h] = false;
        }
        self.custody.generation = self.record(h).map_or(Generation::UNBORN, |r| r.generation);
        self.forget_losses_in_sync();
        for other in 0..2 {
            let joins = named[other] && !before[other] && self.custody.watches > 0;
            if joins && let Err(problem) = self.check_flushed_on(other) {
                self.fail(format!("{} became a holder: {problem}", NAMES[other]));
            }
        }
    }

    /// Copies that are in sync lack nothing any more.
    fn forget_losses_in_sync(&mut self) {
        if self.custody.lost != [false; 2] && self.in_sync() {
            self.custody.lost = [false; 2];
        }
    }

    /// Whether the node's disk says that it is the sole holder.
    pub fn claims_alone(&self, h: usize) -> bool {
        self.record(h)
            .is_some_and(|record| record.holders == Holders::Sole)
    }

    /// A promotion of this node was not answered: if its disk says that it is the sole holder, it is
    /// in charge, whether or not it ever served.
    pub fn look_up_keeper(&mut self, h: usize) {
        if self.claims_alone(h) && !self.options.is_arbitrated() && !self.client.parted {
            self.custody.keeper = Some(h);
            self.custody.named = [h == 0, h == 1];
            self.custody.lost[1 - h] = false;
        }
    }

    /// R2: who begins to serve was named a holder by whoever served last, or is by the register.
    pub fn check_right(&self, h: usize) -> Result<(), String> {
        if self.options.is_arbitrated() {
            return match self.custody.named[h] {
                true => Ok(()),
                false => Err("serves, and the register does not name it".to_owned()),
            };
        }
        // With a widening pending the record decides nothing: the peer may be the better copy. Nor does
        // the claim of a sole holder that acknowledged nothing since. What a clone says is its peer's.
        let decides = |last: &usize| {
            let own = self.hosts[*last].fitness != Fitness::Clone;
            let record = self.record(*last);
            own && record.is_none_or(|record| match record.holders {
                Holders::Widening => false,
                Holders::Sole => {
                    self.client.acknowledged[*last] > self.custody.acknowledged_before[*last]
                }
                _ => true,
            })
        };
        let keeper = self.custody.keeper.filter(decides);
        let named = keeper.and_then(|last| self.named_by(last));
        match named {
            Some(named) if !named[h] && !self.operator.forced => {
                Err("serves, and who served last named it no holder".to_owned())
            }
            _ => Ok(()),
        }
    }

    /// A new disk counts when it has become a copy.
    fn meet_new_copies(&mut self) {
        for h in 0..2 {
            if self.custody.absent[h]
                && self.hosts[h].fitness == Fitness::Fit
                && self
                    .standing(h)
                    .is_some_and(|standing| standing.disk == DiskState::UpToDate)
            {
                self.custody.absent[h] = false;
            }
        }
    }

    /// A replica that is no holder any more and calls itself UpToDate contains every write that was
    /// acknowledged while it was one.
    fn leave_behind(&mut self, before: [bool; 2], named: [bool; 2]) {
        for h in 0..2 {
            let left = before[h] && !named[h] && !self.custody.lost[h];
            let claims = self
                .standing(h)
                .is_some_and(|standing| standing.disk == DiskState::UpToDate);
            if left
                && claims
                && self.hosts[h].fitness == Fitness::Fit
                && let Err(problem) = self.check_image(h)
            {
                self.fail(format!("{} is left behind UpToDate: {problem}", NAMES[h]));
            }
        }
    }

    /// Every sector of the replica, as reads see it, holds a value that a guest may read now.
    pub fn check_image(&mut self, h: usize) -> Result<(), String> {
        if self.doubts.is_any_rotten() {
            let touched = self.oracle(h).touched();
            return self.check_sectors(h, Disk::view, touched);
        }
        let oracle = history(&mut self.apart, &mut self.checker, h);
        oracle.disk_allowed(h, &self.hosts[h].disk)
    }

    fn check_sectors(
        &mut self,
        h: usize,
        look: fn(&Disk, u64) -> u64,
        sectors: impl IntoIterator<Item = u64>,
    ) -> Result<(), String> {
        for sector in sectors {
            if self.doubts.excuses_at(h, sector) {
                continue;
            }
            let value = look(&self.hosts[h].disk, sector);
            self.oracle(h).present_allowed(sector, value)?;
        }
        Ok(())
    }

    /// Who serves goes on until its operator, its disk or the arbiter stops it.
    pub fn check_stopping(&self, h: usize) -> Result<(), String> {
        let replaced = self.options.is_arbitrated() && !self.custody.named[h];
        let erred = self.hosts[h].process.as_ref().is_none_or(|p| p.erred);
        if self.operator.busy(h) || replaced || erred || self.operator.forced {
            return Ok(());
        }
        Err("stops serving, and nobody asked for that".to_owned())
    }

    /// R1, R3: what is acknowledged is on every copy that counts, and in one generation only one node
    /// acknowledges.
    pub fn check_acknowledged(
        &mut self,
        by: usize,
        (start, count): (u64, u64),
    ) -> Result<(), String> {
        self.sample_custody();
        self.check_writer(by)
            .map_err(|problem| format!("acknowledged by {}, which {problem}", NAMES[by]))?;
        for h in [0, 1] {
            if self.counts(h) {
                self.check_sectors(h, Disk::view, start..start + count)
                    .map_err(|problem| {
                        let (by, at) = (NAMES[by], NAMES[h]);
                        format!("acknowledged by {by}, and at {at}, a holder, {problem}")
                    })?;
            }
        }
        Ok(())
    }

    /// Whether the copy must have everything that was acknowledged.
    fn counts(&self, h: usize) -> bool {
        self.custody.is_complete(h)
            && self.hosts[h].fitness == Fitness::Fit
            && !self.client.parted
            && !self.operator.forced
    }

    /// R2: a write that is acknowledged by whom the register does not name is on those that it does,
    /// unless they lost power since it was asked for.
    pub fn check_registered_have(
        &mut self,
        by: usize,
        since: Time,
        (start, count): (u64, u64),
    ) -> Result<(), String> {
        let other = 1 - by;
        let named = self.custody.named;
        let judged = self.options.is_arbitrated() && !self.client.parted && !named[by];
        if !judged || !named[other] || self.hosts[other].powerless_at > since {
            return Ok(());
        }
        self.check_sectors(other, Disk::view, start..start + count)
            .map_err(|problem| {
                let name = NAMES[other];
                format!("acknowledged without a right, and on {name}: {problem}")
            })
    }

    /// Every copy that is complete has all that was acknowledged.
    pub fn check_complete(&mut self) {
        for h in [0, 1] {
            if self.counts(h)
                && let Err(problem) = self.check_image(h)
            {
                self.fail(format!("{} is a holder: {problem}", NAMES[h]));
            }
        }
    }

    /// The machine has lost power.
    pub fn power_was_lost(&mut self, h: usize) {
        let before = self.custody.complete();
        self.custody.lost[h] = true;
        if self.client.parted {
            return self.oracle(h).all_copies_lost_power();
        }
        if before > 0 && self.custody.complete() == 0 {
            self.tell(
                h,
                "was the last complete copy: what was not flushed may be undone",
            );
            self.checker.all_copies_lost_power();
        }
    }

    /// R2, R7: who serves has a right to.
    pub fn check_serving(&mut self, h: usize) -> Result<(), String> {
        let Some(standing) = self.standing(h) else {
            return Ok(());
        };
        if self.operator.forced {
            return Ok(());
        }
        // R12: one whose flush failed does not go on, whatever the next flush says. A daemon that stands
        // still has not heard of it.
        if self.hosts[h].fitness != Fitness::Fit && !self.is_paused(h) {
            return Err("serves from a disk that failed or is another's".to_owned());
        }
        if standing.disk != DiskState::UpToDate {
            return Err(format!("serves, and its disk is {}", standing.disk));
        }
        if standing.role != Role::Primary {
            return Err(format!("serves as {}", standing.role));
        }
        if !standing.names_itself() {
            return Err("serves, and is no holder".to_owned());
        }
        Ok(())
    }

    /// Who begins to serve has everything, in a generation of its own (R3).
    pub fn check_beginning(&mut self, h: usize) -> Result<(), String> {
        let Some(record) = self.record(h) else {
            return Err("serves without a record".to_owned());
        };
        let generation = record.generation;
        if let Some(other) = self.custody.writers.insert(generation, h) {
            let other = NAMES[other];
            return Err(format!(
                "serves in generation {generation}, in which {other} served before"
            ));
        }
        if self.operator.forced {
            return Ok(());
        }
        self.check_image(h)
            .map_err(|problem| format!("begins to serve: {problem}"))
    }

    /// R3: who serves, or acknowledges, is the only one to do so in the generation on its disk.
    fn check_writer(&mut self, h: usize) -> Result<(), String> {
        let Some(generation) = self.record(h).map(|record| record.generation) else {
            return Err("serves without a record".to_owned());
        };
        let writer = *self.custody.writers.entry(generation).or_insert(h);
        if writer != h {
            return Err(format!(
                "serves in generation {generation}, in which {} does too",
                NAMES[writer]
            ));
        }
        Ok(())
    }

    /// R1: what a flush or FUA write was acknowledged for is durable on every holder.
    pub fn check_durable(&mut self, by: usize, ranges: &[(u64, u64)]) -> Result<(), String> {
        self.sample_custody();
        for h in [0, 1] {
            // Apart each is the only holder of its own history.
            let holds = match self.client.parted {
                true => h == by,
                false => self.custody.named[h],
            };
            if holds {
                self.check_durable_on(h, ranges)
                    .map_err(|problem| format!("acknowledged by {}: {problem}", NAMES[by]))?;
            }
        }
        Ok(())
    }

    /// Everything that was flushed is durable on this disk.
    pub fn check_flushed_on(&mut self, h: usize) -> Result<(), String> {
        let ranges: Vec<_> = self.checker.touched().iter().map(|s| (*s, 1)).collect();
        self.check_durable_on(h, &ranges)
    }

    /// Everything that was acknowledged is durable on this disk, flushed or not.
    pub fn check_present_on(&mut self, h: usize) -> Result<(), String> {
        // See [`Cluster::check_durable_on`].
        if self.hosts[h].disk.honesty() == Honesty::Lying {
            return Ok(());
        }
        let touched = self.oracle(h).touched();
        self.check_sectors(h, Disk::durable, touched)
            .map_err(|problem| format!("on the disk of {}, {problem}", NAMES[h]))
    }

    fn check_durable_on(&mut self, h: usize, ranges: &[(u64, u64)]) -> Result<(), String> {
        // A liar's word counts until its next power loss, and nobody can look behind it.
        if self.hosts[h].disk.honesty() == Honesty::Lying {
            return Ok(());
        }
        for (start, count) in ranges {
            for sector in *start..start + count {
                if self.doubts.excuses_at(h, sector) {
                    continue;
                }
                let value = self.hosts[h].disk.durable(sector);
                self.oracle(h)
                    .durable_allowed(sector, value)
                    .map_err(|problem| format!("on the disk of {}, {problem}", NAMES[h]))?;
            }
        }
        Ok(())
    }

    /// How often each disk has changed.
    pub fn changes(&self) -> [u64; 2] {
        [self.hosts[0].disk.changes(), self.hosts[1].disk.changes()]
    }

    /// Nothing is under way anywhere.
    pub fn quiet(&self) -> bool {
        let idle = |h: usize| {
            self.hosts[h].process.is_some()
                && self.hosts[h].missed.is_empty()
                && self.hosts[h].disk.in_flight() == 0
                && self.client.pending_at(h) == 0
        };
        idle(0) && idle(1) && self.network.under_way() == 0
    }

    /// Both nodes say that they are in sync.
    pub fn in_sync(&self) -> bool {
        (0..2).all(|h| {
            self.standing(h)
                .is_some_and(|standing| standing.is_in_sync())
        })
    }

    /// Two replicas that call themselves equal are.
    pub fn check_identical(&mut self) {
        let changes = self.changes();
        if changes == self.custody.identical_at || !self.in_sync() || self.doubts.is_any_rotten() {
            return;
        }
        self.custody.identical_at = changes;
        let differing = self.differing_blocks();
        if let Some(block) = differing.first() {
            self.fail(format!(
                "both replicas are UpToDate, Connected and clean, and {} blocks differ, first {block}",
                differing.len()
            ));
        } else if self.custody.named == [true; 2] {
            // Both are complete, whatever happened before.
            self.custody.lost = [false; 2];
        }
    }

    /// R2: two nodes never act alone by right.
    fn check_one_right(&mut self) {
        let alone = |h: usize| {
            self.standing(h).is_some_and(|standing| {
                standing.arbitration == Arbitration::Arbitrated
                    && standing.names_itself_alone()
                    && standing.disk == DiskState::UpToDate
            })
        };
        if !self.operator.forced && alone(0) && alone(1) {
            self.fail("both nodes act as the sole holder".to_owned());
        }
    }

    /// R8: two images with one replica id are not let together.
    fn check_clone(&mut self, h: usize) {
        let joined = self.hosts[h].fitness == Fitness::Clone
            && self
                .standing(h)
                .is_some_and(|standing| standing.link == LinkState::Connected);
        if joined {
            self.fail(format!("{} is a clone, and Connected", NAMES[h]));
        }
    }

    /// R8: a node reports a divergence only where an operator made one.
    fn check_divergence(&mut self, h: usize) {
        if self.options.scenario == Scenario::SaneOperator && self.reports_divergence(h) {
            self.fail(format!(
                "{} reports a split brain, and there is none",
                NAMES[h]
            ));
        }
    }

    /// Whether the node tells its operator that the two have diverged.
    pub fn reports_divergence(&self, h: usize) -> bool {
        let process = self.hosts[h].process.as_ref();
        let refusal = process.and_then(|process| process.node.refusal());
        refusal
            .is_some_and(|refusal| matches!(refusal.id, ErrorId::SplitBrain | ErrorId::BothPrimary))
    }

    /// R11: a silent peer holds a guest no longer than the stall timeout.
    fn check_stall(&mut self, h: usize) {
        let excused = self.hosts[0].excused_until.max(self.hosts[1].excused_until);
        let allowed = self.options.stall_timeout * 2 + self.slack();
        if excused > Time(0) && self.now < excused.after(allowed) {
            return;
        }
        if let Some(since) = self.client.oldest(h) {
            let spent = self.now.since(since);
            let allowed = self.options.stall_timeout * 2 + self.options.lease * 2 + self.slack();
            // Without the arbiter's word there is no bound: no right, no answer.
            let excused = self.arbiter.is_wiped() || self.arbiter.troubled(self.now);
            if self.serving(h) && spent > allowed && !excused {
                self.fail(format!("a request on {} waits for {spent:?}", NAMES[h]));
            }
        }
    }
}
