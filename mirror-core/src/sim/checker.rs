//! The oracle of guest-visible data. It knows what guests asked and were told, which machines
//! lost power, and nothing of how a node works.
//!
//! For each sector it keeps the values that may be its current content. A write joins them when it
//! is asked for. Something *definite* (a write acknowledged, a value read) with a window of time
//! supersedes every value that must have taken effect before that window began; a superseded value
//! may be read only by a read that began before the window ended. When the last copy that held
//! everything loses power, superseded values come back, but for those that were superseded before
//! the last completed flush was asked for, or by a FUA write.
//!
//! The simulator judges itself by it, and so does the end-to-end story of power cuts on real
//! files (`tests/tests/power_cut.rs`).

use super::disk::Disk;
use smallvec::SmallVec;
use std::collections::BTreeSet;
use std::rc::Rc;

const NEVER: u64 = u64::MAX;
const PAGE: u64 = u64::BITS as u64;

/// A point in the order in which the oracle heard of things.
pub type Moment = u64;

/// A value that is or was possible in a sector.
#[derive(Clone, Debug)]
struct Version {
    write: u64,
    stamp: u64,
    asked: Moment,
    /// When it has taken effect at the latest, if it has at all.
    in_effect_by: Moment,
    superseded: Moment,
    /// Superseded by something durable: not even a power loss brings it back.
    gone: bool,
}

/// What a sector holds or held; nothing as long as it was never asked about.
#[derive(Clone, Default, Debug)]
struct Sector {
    /// Mostly there is one.
    versions: SmallVec<[Version; 1]>,
}

/// Sectors that lie together.
#[derive(Clone, Debug)]
struct Page {
    sectors: Vec<Sector>,
    /// Which of them were ever asked to be written; a bit each.
    written: u64,
    /// When something was last heard of them.
    heard: Moment,
    /// For the disk of each machine: `heard` and its edition when every sector was last found allowed.
    approved: [Option<(Moment, u64)>; 2],
}

/// Whether a write was to be durable when acknowledged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Durability {
    /// Only a later flush makes it so.
    Volatile,
    /// It was asked for with FUA.
    Durable,
}

/// The oracle's memory.
#[derive(Clone)]
pub struct Checker {
    sectors: u64,
    initial: Rc<dyn Fn(u64) -> u64>,
    pages: Vec<Option<Box<Page>>>,
    clock: Moment,
    floor: Moment,
    reads: BTreeSet<Moment>,
    /// Acknowledged writes not covered by a completed flush: when, first sector, sectors.
    unflushed: Vec<(Moment, u64, u64)>,
}

/// The stamp of a sector written by a write: which write, and which sector it belongs to.
pub fn stamp(write: u64, sector: u64) -> u64 {
    write << 28 | (sector & 0x0fff_ffff)
}

/// Which write a sector is from, counted from 0; zeroes and leftovers are from none that is known.
pub(super) fn writer(stamp: u64) -> Option<usize> {
    (stamp != 0 && stamp >> 60 != 0xf).then(|| (stamp >> 28) as usize - 1)
}

/// A stamp in words.
pub fn describe(stamp: u64) -> String {
    match stamp {
        0 => "zeroes".to_owned(),
        _ if stamp >> 60 == 0xf => format!("leftovers of sector {}", stamp & 0x0fff_ffff),
        _ => format!("write {} of sector {}", stamp >> 28, stamp & 0x0fff_ffff),
    }
}

impl Checker {
    /// An oracle for a device of so many sectors that begins with these values.
    pub fn new(sectors: u64, initial: Box<dyn Fn(u64) -> u64>) -> Checker {
        Checker {
            sectors,
            initial: initial.into(),
            pages: vec![None; sectors.div_ceil(PAGE) as usize],
            clock: 1,
            floor: 0,
            reads: BTreeSet::new(),
            unflushed: Vec::new(),
        }
    }

    /// A guest asks for a write; a value per sector.
    pub fn write_asked(
        &mut self,
        write: u64,
        start: u64,
        stamps: impl Iterator<Item = u64>,
    ) -> Moment {
        let asked = self.tick();
        for (number, stamp) in (start..).zip(stamps) {
            let (page, slot) = self.page(number);
            page.written |= 1 << slot;
            page.sectors[slot].versions.push(Version {
                write,
                stamp,
                asked,
                in_effect_by: NEVER,
                superseded: NEVER,
                gone: false,
            });
        }
        asked
    }

    /// The write was acknowledged.
    pub fn write_acknowledged(
        &mut self,
        write: u64,
        start: u64,
        count: u64,
        durability: Durability,
    ) {
        let now = self.tick();
        let keep = self.keep_from();
        for sector in start..start + count {
            let entry = self.sector(sector);
            let Some(mine) = entry.versions.iter_mut().find(|v| v.write == write) else {
                continue;
            };
            mine.in_effect_by = mine.in_effect_by.min(now);
            let asked = mine.asked;
            for other in &mut entry.versions {
                if other.write != write && other.in_effect_by < asked {
                    other.superseded = other.superseded.min(now);
                    other.gone |= durability == Durability::Durable;
                }
            }
            entry.prune(keep);
        }
        self.unflushed.push((now, start, count));
    }

    /// The write failed, or whoever would answer is gone: it happened or it did not.
    pub fn write_lost(&mut self, write: u64, start: u64, count: u64) {
        let now = self.tick();
        for sector in start..start + count {
            for version in &mut self.sector(sector).versions {
                if version.write == write {
                    version.in_effect_by = version.in_effect_by.min(now);
                }
            }
        }
    }

    /// A guest asks for a read.
    pub fn read_asked(&mut self) -> Moment {
        let asked = self.tick();
        self.reads.insert(asked);
        asked
    }

    /// A read ended without data.
    pub fn read_lost(&mut self, asked: Moment) {
        self.reads.remove(&asked);
    }

    /// A read returned.
    pub fn read_returned(
        &mut self,
        asked: Moment,
        start: u64,
        values: &[u64],
    ) -> Result<(), String> {
        let now = self.tick();
        for (index, value) in values.iter().enumerate() {
            let number = start + index as u64;
            if self.holds_only(number, *value) {
                continue;
            }
            self.sector(number)
                .observe(asked, now, *value)
                .map_err(|allowed| {
                    format!(
                        "a read returned {} in sector {number}; allowed are {allowed}",
                        describe(*value)
                    )
                })?;
        }
        self.reads.remove(&asked);
        Ok(())
    }

    /// A guest asks for a flush.
    pub fn flush_asked(&mut self) -> Moment {
        self.tick()
    }

    /// The flush completed. The returned ranges must now be durable on every holder.
    pub fn flush_acknowledged(&mut self, asked: Moment) -> Vec<(u64, u64)> {
        self.tick();
        self.floor = self.floor.max(asked);
        let covered = self.unflushed.iter().filter(|(at, ..)| *at < asked);
        let ranges = covered.map(|(_, start, count)| (*start, *count)).collect();
        self.unflushed.retain(|(at, ..)| *at >= asked);
        ranges
    }

    /// Whether a durable image may hold this value in the sector, given the last flush.
    pub fn durable_allowed(&self, number: u64, value: u64) -> Result<(), String> {
        let floor = self.floor;
        let allowed = |v: &Version| v.superseded == NEVER || (!v.gone && v.superseded >= floor);
        self.allowed(number, value, allowed).map_err(|list| {
            let found = describe(value);
            format!("{found} is on stable storage in sector {number}; allowed are {list}")
        })
    }

    /// Whether an image that holds every acknowledged write may hold this value, flushed or not.
    pub fn present_allowed(&self, number: u64, value: u64) -> Result<(), String> {
        self.allowed(number, value, |v| v.superseded == NEVER)
            .map_err(|list| {
                let found = describe(value);
                format!("{found} is in sector {number}; present are {list}")
            })
    }

    /// Fails with the values that are allowed.
    fn allowed(
        &self,
        number: u64,
        value: u64,
        allowed: impl Fn(&Version) -> bool,
    ) -> Result<(), String> {
        let Some(known) = self.look_up(number) else {
            let initial = (self.initial)(number);
            return match value == initial {
                true => Ok(()),
                false => Err(describe(initial)),
            };
        };
        match known.iter().any(|v| v.stamp == value && allowed(v)) {
            true => Ok(()),
            false => Err(words(known.iter().filter(|v| allowed(v)))),
        }
    }

    /// Whether the disk of a machine, as it is read, may hold what it does if it is to hold every
    /// acknowledged write, flushed or not. What was found allowed is not looked at again until the disk
    /// changes there or something is heard of it.
    pub(super) fn disk_allowed(&mut self, machine: usize, disk: &Disk) -> Result<(), String> {
        for at in 0..self.pages.len() {
            let Some(page) = &self.pages[at] else {
                continue;
            };
            let first = at as u64 * PAGE;
            let state = Some((
                page.heard,
                disk.edition(first, PAGE.min(self.sectors - first)),
            ));
            if page.approved[machine] == state {
                continue;
            }
            let written = (0..PAGE).filter(|slot| page.written >> slot & 1 == 1);
            for number in written.map(|slot| first + slot) {
                self.present_allowed(number, disk.view(number))?;
            }
            if let Some(page) = &mut self.pages[at] {
                page.approved[machine] = state;
            }
        }
        Ok(())
    }

    /// The last copy that held everything lost power: what was not flushed may be undone.
    pub fn all_copies_lost_power(&mut self) {
        let now = self.tick();
        let floor = self.floor;
        // Nothing that was allowed is forbidden by that, so what was approved stays so.
        let sectors = self.pages.iter_mut().flatten().flat_map(|p| &mut p.sectors);
        for version in sectors.flat_map(|s| &mut s.versions) {
            if version.superseded != NEVER && !version.gone && version.superseded >= floor {
                version.superseded = NEVER;
                version.in_effect_by = now;
            }
        }
    }

    /// Every sector that was ever asked to be written, in order.
    pub fn touched(&self) -> Vec<u64> {
        let mut found = Vec::new();
        for (at, page) in self.pages.iter().enumerate() {
            let mut written = page.as_ref().map_or(0, |page| page.written);
            while written != 0 {
                found.push(at as u64 * PAGE + u64::from(written.trailing_zeros()));
                written &= written - 1;
            }
        }
        found
    }

    fn tick(&mut self) -> Moment {
        self.clock += 1;
        self.clock
    }

    /// Values superseded before this moment matter to nobody.
    fn keep_from(&self) -> (Moment, Moment) {
        (
            self.floor,
            self.reads.first().copied().unwrap_or(self.clock),
        )
    }

    /// What is known of a sector; `None` if it holds what it always did.
    fn look_up(&self, number: u64) -> Option<&[Version]> {
        let page = self.pages[(number / PAGE) as usize].as_ref()?;
        let slot = (number % PAGE) as usize;
        let versions = &page.sectors[slot].versions[..];
        (page.written >> slot & 1 == 1 || !versions.is_empty()).then_some(versions)
    }

    /// Whether the sector can hold nothing but this, and did for as long as anybody remembers.
    fn holds_only(&self, number: u64, value: u64) -> bool {
        match self.look_up(number) {
            None => value == (self.initial)(number),
            Some([only]) => {
                only.stamp == value && only.in_effect_by != NEVER && only.superseded == NEVER
            }
            Some(_) => false,
        }
    }

    /// The sector, of which something is heard.
    fn sector(&mut self, number: u64) -> &mut Sector {
        let (page, slot) = self.page(number);
        &mut page.sectors[slot]
    }

    /// The page of a sector of which something is heard, and the sector's place in it.
    fn page(&mut self, number: u64) -> (&mut Page, usize) {
        let most = self.sectors - number / PAGE * PAGE;
        let page = self.pages[(number / PAGE) as usize].get_or_insert_with(|| {
            Box::new(Page {
                sectors: vec![Sector::default(); PAGE.min(most) as usize],
                written: 0,
                heard: 0,
                approved: [None; 2],
            })
        });
        page.heard = self.clock;
        let slot = (number % PAGE) as usize;
        let versions = &mut page.sectors[slot].versions;
        if versions.is_empty() && page.written >> slot & 1 == 0 {
            versions.push(Version {
                write: 0,
                stamp: (self.initial)(number),
                asked: 0,
                in_effect_by: 0,
                superseded: NEVER,
                gone: false,
            });
        }
        (page, slot)
    }
}

impl Sector {
    fn observe(&mut self, asked: Moment, now: Moment, value: u64) -> Result<(), String> {
        let current = |v: &Version| v.superseded >= asked;
        let matches = self
            .versions
            .iter()
            .filter(|v| v.stamp == value && current(v))
            .count();
        if matches == 0 {
            return Err(words(self.versions.iter().filter(|v| current(v))));
        }
        for version in &mut self.versions {
            if version.stamp != value {
                if version.in_effect_by < asked {
                    version.superseded = version.superseded.min(now);
                }
            } else if matches == 1 && current(version) {
                version.in_effect_by = version.in_effect_by.min(now);
            }
        }
        Ok(())
    }

    fn prune(&mut self, (floor, oldest_read): (Moment, Moment)) {
        self.versions.retain(|v| {
            v.superseded == NEVER
                || v.superseded >= oldest_read
                || (!v.gone && v.superseded >= floor)
        });
    }
}

fn words<'a>(versions: impl Iterator<Item = &'a Version>) -> String {
    let list: Vec<String> = versions.map(|v| describe(v.stamp)).collect();
    list.join(", ")
}

#[cfg(test)]
mod tests;
