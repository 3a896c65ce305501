//! What must hold at every point of every story, whatever it is about; and what a story expects.

use super::parse::{Ask, Expectation, Host, Progress, View};
use super::words::{range, runs, values};
use super::world::World;
use crate::limits::{BLOCK, SECTOR};
use crate::meta::superblock::{Superblock, Trust};
use crate::meta::{DurableMarks, Layout, META_BLOCK, describe};
use crate::node::{MetadataPlace, Standing};
use crate::sim::host::NAMES;
use crate::types::{ByteRange, DiskState, Holders, Role};
use std::convert::Infallible;

/// What the bitmap on disk marks.
pub(super) fn bitmap_ranges(metadata: &[u8], size: u64) -> Result<Vec<String>, String> {
    describe(reader(metadata), size, MetadataPlace::External)
        .map(|image| {
            let ranges = image.dirty_ranges.into_iter();
            ranges
                .map(|(start, len)| range(ByteRange::new(start, len)))
                .collect()
        })
        .map_err(|error| format!("metadata that cannot be read: {error}"))
}

fn reader(metadata: &[u8]) -> impl FnMut(u64, usize) -> Result<Vec<u8>, Infallible> {
    |offset, len| Ok(metadata[offset as usize..][..len].to_vec())
}

impl World {
    /// The rules that no step of a story may break.
    pub fn check(&mut self) {
        self.check_serving();
        self.check_targets();
        self.check_identical();
        self.check_covered();
        self.check_flushed();
    }

    /// R2, R7: who serves is a Primary whose copy holds everything.
    fn check_serving(&mut self) {
        for host in [0, 1] {
            let Some(process) = self.machines[host].process.as_ref().filter(|p| p.serving) else {
                continue;
            };
            let standing = process.node.standing();
            let Standing { role, disk, .. } = standing;
            if role != Role::Primary || disk != DiskState::UpToDate || !standing.names_itself() {
                let (name, holders) = (NAMES[host], standing.holders);
                self.violate(format!(
                    "{name} serves as {role}, {disk}, with holders {holders:?}"
                ));
            }
        }
    }

    /// R7: a copy that is being overwritten is named by nobody's record, and not by the register.
    fn check_targets(&mut self) {
        let records = [0, 1].map(|host| self.record(host));
        for host in self.registered_hosts().unwrap_or_default() {
            let record = records[host].as_ref();
            // Of its first generation the register knows before the replica itself.
            let copied = |record: &Superblock| {
                record.trust == Trust::Inconsistent && !record.generation.is_unborn()
            };
            if record.is_some_and(copied) {
                let name = NAMES[host];
                self.violate(format!(
                    "{name} is Inconsistent, and the register names it a holder"
                ));
            }
        }
        let [Some(a), Some(b)] = &records else {
            return;
        };
        for (host, (record, other)) in [(a, b), (b, a)].into_iter().enumerate() {
            if record.holders == Holders::Both
                && record.generation == other.generation
                && other.trust == Trust::Inconsistent
            {
                let (name, peer) = (NAMES[host], NAMES[1 - host]);
                self.violate(format!(
                    "{peer} is being overwritten, and {name}'s record names it a holder"
                ));
            }
        }
    }

    /// The record in force on a disk.
    fn record(&self, host: Host) -> Option<Superblock> {
        let disk = &self.machines[host].disk;
        let layout = Layout::new(disk.size, MetadataPlace::External).ok()?;
        let slots = disk.metadata.chunks_exact(META_BLOCK as usize);
        let mut slots = slots.take(2).map(Superblock::parse);
        Superblock::trust([slots.next()?, slots.next()?], &layout).ok()
    }

    /// Two replicas that say that they are equal are.
    fn check_identical(&mut self) {
        let mut end = u64::MAX;
        for machine in &self.machines {
            let Some(process) = &machine.process else {
                return;
            };
            let status = process.node.status(self.now);
            if !process.node.standing().is_in_sync()
                || !process.node.is_at_rest()
                || machine.is_holding()
            {
                return;
            }
            end = end.min(status.size_bytes);
        }
        let differing = self.differing_soundly(end);
        if !differing.is_empty() {
            let runs = runs(&differing);
            self.violate(format!("both are UpToDate and clean, and differ in {runs}"));
        }
    }

    fn differing(&self, end: u64) -> Vec<u64> {
        self.machines[0].disk.differing(&self.machines[1].disk, end)
    }

    /// Sectors that differ, but for what a script has changed at rest.
    fn differing_soundly(&self, end: u64) -> Vec<u64> {
        let mut found = self.differing(end);
        found.retain(|sector| {
            let sector = ByteRange::new(sector * SECTOR, SECTOR);
            !self.rotten.iter().any(|range| range.overlaps(sector))
        });
        found
    }

    /// R6: what differs is covered by the durable marks of either side.
    fn check_covered(&mut self) {
        let mut marks = Vec::new();
        let mut end = u64::MAX;
        for machine in &self.machines {
            let disk = &machine.disk;
            let read = reader(&disk.metadata);
            marks.extend(DurableMarks::read(read, disk.size, MetadataPlace::External));
            end = end.min(disk.size);
        }
        let naked = |sector: &u64| {
            let block = ByteRange::new(sector * SECTOR / BLOCK * BLOCK, BLOCK);
            !marks.iter().any(|marks| marks.covers(block))
        };
        let naked: Vec<u64> = self
            .differing_soundly(end)
            .into_iter()
            .filter(naked)
            .collect();
        if !naked.is_empty() {
            let runs = runs(&naked);
            self.violate(format!("{runs} differs, and no durable mark covers it"));
        }
    }

    /// R1: a flush or FUA write is durable on every holder when it is acknowledged, and any
    /// write is on every holder.
    pub fn check_acknowledgement(&mut self, host: Host, number: u64) {
        let Some(request) = self.requests.get(&number) else {
            return;
        };
        let durable = match request.ask {
            Ask::Read(_) => return,
            Ask::Flush => true,
            Ask::Write { fua, .. } | Ask::Zero { fua, .. } => fua,
        };
        let ranges: Vec<ByteRange> = match request.ask {
            Ask::Write { range, .. } | Ask::Zero { range, .. } => vec![range],
            _ => self.acknowledged_before(number),
        };
        let Some(process) = &self.machines[host].process else {
            return;
        };
        for name in process.node.status(self.now).holders {
            let holder = if name == NAMES[0] { 0 } else { 1 };
            for range in &ranges {
                let (mine, theirs) = (&self.machines[host].disk, &self.machines[holder].disk);
                let same = super::disk::sectors(*range).all(|sector| {
                    let there = if durable {
                        theirs.durable(sector)
                    } else {
                        theirs.sector(sector)
                    };
                    there == mine.sector(sector)
                });
                if !same {
                    let how = if durable { " durably" } else { "" };
                    return self.violate(format!(
                        "#{number} is acknowledged, and holder {name} does not have it{how}"
                    ));
                }
            }
        }
    }

    /// Ranges whose last write was acknowledged, with none to them on its way.
    fn acknowledged_before(&self, number: u64) -> Vec<ByteRange> {
        let writes = self
            .requests
            .range(..number)
            .filter_map(|(_, request)| match request.ask {
                Ask::Write { range, .. } | Ask::Zero { range, .. } => {
                    Some((range, &request.outcome))
                }
                Ask::Read(_) | Ask::Flush => None,
            });
        let (done, open): (Vec<_>, Vec<_>) =
            writes.partition(|(_, outcome)| matches!(outcome, Some(Ok(_))));
        done.into_iter()
            .map(|(range, _)| range)
            .filter(|range| !open.iter().any(|(other, _)| other.overlaps(*range)))
            .collect()
    }

    /// Whether the story is where it says it is.
    pub fn expect(&mut self, expectation: &Expectation) -> Result<(), String> {
        let found = match expectation {
            Expectation::Data {
                host,
                view,
                range,
                values: expected,
            } => {
                let found = self.found(*host, *view, *range)?;
                (found != *expected).then(|| {
                    let (expected, found) = (expected.join(" "), found.join(" "));
                    format!("{} has {found} there, not {expected}", NAMES[*host])
                })
            }
            Expectation::Request(number, expected) => {
                let request = self.requests.get(number);
                let outcome = &request.ok_or(format!("there is no #{number}"))?.outcome;
                let found = match outcome {
                    None => Progress::Waiting,
                    Some(Ok(_)) => Progress::Acknowledged,
                    Some(Err(_)) => Progress::Failed,
                };
                let text = format!("#{number} is {found:?}, not {expected:?}").to_lowercase();
                (found != *expected).then_some(text)
            }
            Expectation::Is { host, word, so } => {
                let words = self.words_about(*host)?;
                let is = words.iter().any(|known| known == word);
                let text = format!("{} is {}", NAMES[*host], words.join(", "));
                (is != *so).then_some(text)
            }
            Expectation::Answer(host, expected) => {
                let found = match &self.machines[*host].answer {
                    None => "no answer".to_owned(),
                    Some(Ok(())) => "done".to_owned(),
                    Some(Err(id)) => format!("{id:?}"),
                };
                let expected = expected.as_deref().unwrap_or("done");
                let text = format!("{} answered: {found}, not {expected}", NAMES[*host]);
                (found != expected).then_some(text)
            }
            Expectation::Register(expected) => {
                let found = self.register_in_words();
                (found != *expected).then(|| format!("the register: {found}, not {expected}"))
            }
            Expectation::Identical => {
                let end = self.machines.iter().map(|machine| machine.disk.size).min();
                let differing = self.differing(end.unwrap_or(0));
                (!differing.is_empty()).then(|| format!("they differ in {}", runs(&differing)))
            }
        };
        match found {
            None => self.answer("as expected".to_owned()),
            Some(problem) => self.violate(problem),
        }
        Ok(())
    }

    fn found(&mut self, host: Host, view: View, range: ByteRange) -> Result<Vec<String>, String> {
        let disk = &self.machines[host].disk;
        let sectors = super::disk::sectors(range);
        Ok(match view {
            View::Guest => self.read(host, range)?,
            View::Disk => values(&disk.read(range)),
            View::Durable => values(
                &sectors
                    .map(|sector| disk.durable(sector))
                    .collect::<Vec<_>>(),
            ),
        })
    }

    /// Every word that fits a node now.
    fn words_about(&mut self, host: Host) -> Result<Vec<String>, String> {
        let now = self.now;
        let Some(process) = &self.machines[host].process else {
            return Ok(vec!["down".to_owned()]);
        };
        let status = process.node.status(now);
        let mut words = vec![
            status.role.to_string(),
            status.disk.to_string(),
            status.link.to_string(),
            self.names.within(&status.generation),
            format!("{{{}}}", status.holders.join(",")),
        ];
        if let Some(resync) = &status.resync {
            words.push(format!("{:?}", resync.direction).to_lowercase());
        }
        if status.dirty_bytes == 0 {
            words.push("clean".to_owned());
        }
        if process.serving {
            words.push("serving".to_owned());
        }
        Ok(words)
    }

    /// What a disk holds, as it reads and as it would after a loss of power.
    pub fn disk_lines(&mut self, host: Host, range: ByteRange) -> Result<(), String> {
        let read = self.found(host, View::Disk, range)?.join(" ");
        let durable = self.found(host, View::Durable, range)?.join(" ");
        let note = if read == durable {
            String::new()
        } else {
            format!(", durable {durable}")
        };
        self.answer(format!(
            "{} {}: {read}{note}",
            NAMES[host],
            super::words::range(range)
        ));
        Ok(())
    }
}
