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

use std::collections::BTreeSet;
use std::rc::Rc;

const NEVER: u64 = u64::MAX;
const PAGE: u64 = 64;

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

#[derive(Clone, Default, Debug)]
struct Sector {
    versions: Vec<Version>,
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
    pages: Vec<Option<Vec<Sector>>>,
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
        for (index, stamp) in stamps.enumerate() {
            let sector = self.sector(start + index as u64);
            sector.versions.push(Version {
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
    pub fn durable_allowed(&mut self, number: u64, value: u64) -> Result<(), String> {
        let floor = self.floor;
        let sector = self.sector(number);
        let allowed = |v: &Version| v.superseded == NEVER || (!v.gone && v.superseded >= floor);
        if sector
            .versions
            .iter()
            .any(|v| v.stamp == value && allowed(v))
        {
            return Ok(());
        }
        let list: Vec<_> = sector.versions.iter().filter(|v| allowed(v)).collect();
        Err(format!(
            "{} is on stable storage in sector {number}; allowed are {}",
            describe(value),
            words(list.into_iter())
        ))
    }

    /// Whether an image that holds every acknowledged write may hold this value, flushed or not.
    pub fn present_allowed(&mut self, number: u64, value: u64) -> Result<(), String> {
        let sector = self.sector(number);
        let current = |v: &&Version| v.superseded == NEVER;
        if sector
            .versions
            .iter()
            .filter(current)
            .any(|v| v.stamp == value)
        {
            return Ok(());
        }
        Err(format!(
            "{} is in sector {number}; present are {}",
            describe(value),
            words(sector.versions.iter().filter(current))
        ))
    }

    /// The last copy that held everything lost power: what was not flushed may be undone.
    pub fn all_copies_lost_power(&mut self) {
        let now = self.tick();
        let floor = self.floor;
        for version in self
            .pages
            .iter_mut()
            .flatten()
            .flatten()
            .flat_map(|s| &mut s.versions)
        {
            if version.superseded != NEVER && !version.gone && version.superseded >= floor {
                version.superseded = NEVER;
                version.in_effect_by = now;
            }
        }
    }

    /// Every sector that was ever asked about, in order.
    pub fn touched(&self) -> Vec<u64> {
        let pages = self.pages.iter().enumerate();
        pages
            .flat_map(|(page, sectors)| {
                let sectors = sectors.iter().flatten().enumerate();
                let used = sectors.filter(|(_, s)| s.versions.iter().any(|v| v.asked > 0));
                used.map(move |(index, _)| page as u64 * PAGE + index as u64)
            })
            .collect()
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

    fn sector(&mut self, number: u64) -> &mut Sector {
        let page = number / PAGE;
        let (initial, all) = (&self.initial, self.sectors);
        let sectors = self.pages[page as usize].get_or_insert_with(|| {
            (0..PAGE.min(all - page * PAGE))
                .map(|index| Sector {
                    versions: vec![Version {
                        write: 0,
                        stamp: initial(page * PAGE + index),
                        asked: 0,
                        in_effect_by: 0,
                        superseded: NEVER,
                        gone: false,
                    }],
                })
                .collect()
        });
        &mut sectors[(number % PAGE) as usize]
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
