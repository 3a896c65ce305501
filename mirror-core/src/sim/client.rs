//! The guest: keeps several requests in flight on whichever node serves, and tells the oracle.

use super::buffers::Stamps;
use super::checker::{Checker, Durability, Moment, describe, stamp, writer};
use super::cluster::{Cluster, Event, Phase};
use super::host::{NAMES, guest_payload};
use super::options::{Options, Pace, Scenario};
use super::split_brain::history;
use super::stimulus::Stimulus;
use crate::limits::{EXTENT, SECTOR};
use crate::node::boundary::{GuestError, GuestOperation, Input, RequestId};
use crate::types::{ByteRange, Generation, Time};
use std::collections::BTreeMap;

/// Nanoseconds between two looks at how far reading back has come.
const VERIFY_GAP: u64 = 1_000_000;

/// Sectors that one request reads at most.
const MOST_READ: u64 = 256;

/// Reads beyond the usual depth while two nodes serve.
const SPARE_READS: usize = 8;

/// A request, with all that the guest decides about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Ask {
    Read {
        start: u64,
        count: u64,
    },
    Write {
        start: u64,
        count: u64,
        fua: bool,
    },
    Zero {
        start: u64,
        count: u64,
        unmap: bool,
        fua: bool,
    },
    Flush,
}

/// What was asked, as far as the answer needs it.
#[derive(Clone, Copy, Debug)]
enum Asked {
    Read {
        at: Moment,
        start: u64,
        count: u64,
    },
    Write {
        number: u64,
        start: u64,
        count: u64,
        durability: Durability,
    },
    Flush {
        at: Moment,
    },
}

impl Asked {
    fn write(number: u64, start: u64, count: u64, fua: bool) -> Asked {
        let durability = match fua {
            true => Durability::Durable,
            false => Durability::Volatile,
        };
        Asked::Write {
            number,
            start,
            count,
            durability,
        }
    }
}

impl Asked {
    /// Nobody will hear an answer.
    fn forget(self, oracle: &mut Checker) {
        match self {
            Asked::Read { at, .. } => oracle.read_lost(at),
            Asked::Write {
                number,
                start,
                count,
                ..
            } => oracle.write_lost(number, start, count),
            Asked::Flush { .. } => {}
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Pending {
    host: usize,
    asked: Asked,
    since: Time,
    /// The guest's connection was closed: whatever is answered, nobody hears it.
    orphaned: bool,
}

/// Where a write was asked for.
#[derive(Clone, Copy, Debug)]
struct Origin {
    host: usize,
    /// The generation on the node's disk then.
    generation: Generation,
}

/// The guest.
pub(super) struct Client {
    pending: BTreeMap<RequestId, Pending>,
    next_request: u64,
    /// Where each write was asked for; its number counts from 1.
    writes: Vec<Origin>,
    sectors: u64,
    hot: Vec<u64>,
    /// The next sector of a guest that walks over the whole device.
    sweep: Option<u64>,
    /// Only requests of parts of blocks, close together.
    small: bool,
    /// The last write that was answered.
    recent: Option<(u64, u64)>,
    /// Ranges to read back in the end.
    verify: Vec<(u64, u64)>,
    stepping: bool,
    rng: fastrand::Rng,
    /// Writes answered in the affirmative, by node; for the operator's curiosity.
    pub acknowledged: [u64; 2],
    /// In a split brain, until the two are together again: who holds what is not asked.
    pub parted: bool,
    /// Before this time a lease may not hold, and a replaced Primary may read what is old.
    pub leases_hold_from: Time,
    /// No new requests.
    pub held: bool,
}

impl Client {
    pub fn new(options: &Options, mut rng: fastrand::Rng) -> Client {
        let sectors = options.layout().data_size / SECTOR;
        let hot = (0..options.hot_ranges)
            .map(|_| rng.u64(0..sectors) / 8 * 8)
            .collect();
        Client {
            pending: BTreeMap::new(),
            next_request: 0,
            writes: Vec::new(),
            sectors,
            hot,
            sweep: options.sweep.then_some(0),
            small: options.small_requests,
            recent: None,
            verify: Vec::new(),
            stepping: false,
            rng,
            acknowledged: [0; 2],
            parted: false,
            leases_hold_from: Time(0),
            held: false,
        }
    }

    /// Requests asked so far.
    pub fn asked(&self) -> u64 {
        self.next_request
    }

    /// Requests a node has not answered, the guest listening or not.
    pub fn pending_at(&self, host: usize) -> usize {
        self.pending.values().filter(|p| p.host == host).count()
    }

    /// When the oldest request somebody waits for was asked.
    pub fn oldest(&self, host: usize) -> Option<Time> {
        let mine = self
            .pending
            .values()
            .filter(|p| p.host == host && !p.orphaned);
        mine.map(|p| p.since).min()
    }

    fn range(&mut self, sectors_at_most: u64) -> (u64, u64) {
        let count = match self.rng.u8(0..100) {
            0..25 => 1,
            25..60 => 8,
            60..80 => self.rng.u64(1..=16),
            80..97 => self.rng.u64(1..=256),
            _ => self.rng.u64(256..=2048),
        }
        .min(sectors_at_most)
        .min(self.sectors / 2);
        if let Some(at) = &mut self.sweep {
            // Every request touches another extent than the one before.
            *at = (*at + EXTENT / SECTOR) % self.sectors;
            let start = *at + self.rng.u64(0..64);
            return (start.min(self.sectors - count), count.min(8));
        }
        if self.small {
            // Sectors of a few blocks, over and over.
            let count = count.min(self.rng.u64(1..12));
            let start = self.hot[0] + self.rng.u64(0..24);
            return (start.min(self.sectors - count), count);
        }
        let near = self.hot[self.rng.usize(0..self.hot.len())];
        let start = match self.rng.u8(0..8) {
            0 => self.rng.u64(0..self.sectors),
            1..4 => near,
            _ => near + self.rng.u64(0..64),
        };
        (start.min(self.sectors - count), count)
    }

    /// Draws a request.
    fn draw(&mut self, options: &Options) -> Ask {
        let dice = self.rng.u32(0..100);
        let fua = self.rng.u32(0..100) < options.fua_percent;
        let (reads, zeroes) = (options.read_percent, options.zero_percent);
        if dice < options.flush_percent {
            Ask::Flush
        } else if dice < options.flush_percent + reads {
            let (start, count) = self.range(MOST_READ);
            Ask::Read { start, count }
        } else if dice < options.flush_percent + reads + zeroes {
            let (start, mut count) = self.range(512);
            if self.rng.u8(0..8) == 0 {
                count = self.rng.u64(1..=20_000).min(self.sectors - start);
            }
            Ask::Zero {
                start,
                count,
                unmap: self.rng.bool(),
                fua,
            }
        } else {
            let (start, count) = self.range(2048);
            Ask::Write { start, count, fua }
        }
    }

    /// What is on its way at the node was lost, as far as this history goes.
    pub fn lost_at(&self, host: usize, oracle: &mut Checker) {
        let there = self.pending.values().filter(|pending| pending.host == host);
        for pending in there.filter(|pending| !pending.orphaned) {
            pending.asked.forget(oracle);
        }
    }

    fn number_write(&mut self, origin: Origin) -> u64 {
        self.writes.push(origin);
        self.writes.len() as u64
    }
}

impl Cluster {
    /// Lets the guest begin.
    pub fn start_client(&mut self) {
        if !self.client.stepping {
            self.client.stepping = true;
            self.schedule(1, Event::Client);
        }
    }

    pub fn client_step(&mut self) {
        if matches!(
            self.phase,
            Phase::Verify { .. } | Phase::Rot { .. } | Phase::Over
        ) {
            return;
        }
        let think = self.options.think.as_nanos() as u64;
        let mut pause = self.client.rng.u64(1..think * 2) * 2;
        let burst = match self.options.pace {
            Pace::Steady => self.client.rng.usize(1..4),
            Pace::Single => 1,
            Pace::Bursts => {
                pause *= 20;
                40
            }
        };
        for _ in 0..burst {
            self.ask_something();
        }
        self.schedule(pause, Event::Client);
    }

    /// Who is asked. Two serve in a split brain, and where one does not know yet that it was
    /// replaced: both are to be asked, even if one of them does not answer.
    fn serving_host(&self, ask: Ask) -> Option<usize> {
        let first = self.client.asked() as usize % 2;
        let order = [first, 1 - first];
        let mut serving = order.into_iter().filter(|h| self.serving(*h));
        let roomy = serving.clone().find(|h| self.has_room(*h, ask));
        roomy.or(serving.next())
    }

    fn two_serve(&self) -> bool {
        self.serving(0) && self.serving(1)
    }

    /// Whether the guest would let one more request wait at a node.
    fn has_room(&self, host: usize, ask: Ask) -> bool {
        // Writes that a replaced Primary holds are not to hide what it reads.
        let spare = match ask {
            Ask::Read { .. } if self.two_serve() => SPARE_READS,
            _ => 0,
        };
        self.client.pending_at(host) < self.options.depth + spare
    }

    /// What is asked next.
    fn draw_ask(&mut self) -> Ask {
        let unknowing = self.two_serve() && !self.client.parted;
        match self.client.recent {
            // What the one was just written, the other may not know.
            Some((start, count)) if unknowing && self.client.rng.bool() => {
                Ask::Read { start, count }
            }
            _ => self.client.draw(&self.options),
        }
    }

    fn ask_something(&mut self) {
        if self.client.held || self.client.asked() >= self.options.requests {
            return;
        }
        let ask = self.draw_ask();
        if self
            .serving_host(ask)
            .is_some_and(|host| self.has_room(host, ask))
        {
            self.stimulate(Stimulus::Guest(ask));
        }
    }

    /// A guest's request reaches whoever serves.
    pub fn guest_asks(&mut self, ask: Ask) {
        let (Some(host), false) = (self.serving_host(ask), self.client.held) else {
            return;
        };
        self.ask_of(host, ask);
    }

    /// A guest's request to this node.
    pub fn ask_of(&mut self, host: usize, ask: Ask) {
        self.stats.requests += 1;
        match ask {
            Ask::Read { start, count } => self.read(host, start, count),
            Ask::Write { start, count, fua } => {
                let number = self.number_write(host);
                let stamps: Vec<u64> = (start..start + count).map(|s| stamp(number, s)).collect();
                self.oracle(host)
                    .write_asked(number, start, stamps.iter().copied());
                let Some(process) = &mut self.hosts[host].process else {
                    return;
                };
                let range = ByteRange::new(start * SECTOR, count * SECTOR);
                let payload = guest_payload(process, stamps);
                let operation = GuestOperation::Write {
                    range,
                    payload,
                    fua,
                };
                self.ask(host, Asked::write(number, start, count, fua), operation);
            }
            Ask::Zero {
                start,
                count,
                unmap,
                fua,
            } => {
                let number = self.number_write(host);
                let zeroes = (0..count).map(|_| 0);
                self.oracle(host).write_asked(number, start, zeroes);
                let operation = GuestOperation::Zero {
                    range: ByteRange::new(start * SECTOR, count * SECTOR),
                    may_unmap: unmap,
                    fua,
                };
                self.ask(host, Asked::write(number, start, count, fua), operation);
            }
            Ask::Flush => {
                let at = self.oracle(host).flush_asked();
                self.ask(host, Asked::Flush { at }, GuestOperation::Flush);
            }
        }
    }

    fn number_write(&mut self, host: usize) -> u64 {
        let record = self.record(host);
        let generation = record.map_or(Generation::UNBORN, |record| record.generation);
        self.client.number_write(Origin { host, generation })
    }

    /// R3, R8: whatever the node reads was written in its generation or in one that this descends from,
    /// acknowledged or not.
    fn check_lineage(&self, host: usize, stamps: &[u64]) -> Result<(), String> {
        let Some(record) = self.record(host) else {
            return Ok(());
        };
        let remembered = || std::iter::once(&record.generation).chain(&record.ancestry);
        // Each generation counts one more than the one before it; a gap is where some were forgotten, and
        // what is kept below it says nothing of those.
        let mut oldest = record.generation.counter;
        for before in &record.ancestry {
            if before.counter + 1 < oldest {
                break;
            }
            oldest = before.counter;
        }
        for same in stamps.chunk_by(|one, next| writer(*one) == writer(*next)) {
            let Some(origin) = writer(same[0]).and_then(|at| self.client.writes.get(at)) else {
                continue;
            };
            let forgotten = origin.generation.counter < oldest;
            if !forgotten && !remembered().any(|known| *known == origin.generation) {
                return Err(format!(
                    "{} reads {}, which {} was asked for in generation {}; its own is {}",
                    NAMES[host],
                    describe(same[0]),
                    NAMES[origin.host],
                    origin.generation,
                    record.generation
                ));
            }
        }
        Ok(())
    }

    /// Asks for a read.
    pub fn read(&mut self, host: usize, start: u64, count: u64) {
        let at = self.oracle(host).read_asked();
        let range = ByteRange::new(start * SECTOR, count * SECTOR);
        self.ask(
            host,
            Asked::Read { at, start, count },
            GuestOperation::Read(range),
        );
    }

    fn ask(&mut self, host: usize, asked: Asked, operation: GuestOperation) {
        self.client.next_request += 1;
        let request = RequestId(self.client.next_request);
        let pending = Pending {
            host,
            asked,
            since: self.now,
            orphaned: false,
        };
        self.client.pending.insert(request, pending);
        self.feed(host, Input::Guest { request, operation });
    }

    /// A node answers.
    pub fn completed(
        &mut self,
        host: usize,
        request: RequestId,
        result: Result<Option<Stamps>, GuestError>,
    ) -> Result<(), String> {
        let Some(pending) = self.client.pending.remove(&request) else {
            return Err(format!("{request:?} is answered, and nobody asked"));
        };
        if pending.host != host {
            return Err(format!("{request:?} is answered by the wrong node"));
        }
        if pending.orphaned {
            return Ok(());
        }
        let took = self.now.since(pending.since);
        self.stats.longest_stall = self.stats.longest_stall.max(took);
        match result {
            Err(error) => self.failed(host, request, pending.asked, error),
            Ok(stamps) => self.answered(host, request, &pending, stamps),
        }
    }

    /// A request ends with an error: was there a reason?
    fn failed(
        &mut self,
        host: usize,
        request: RequestId,
        asked: Asked,
        error: GuestError,
    ) -> Result<(), String> {
        self.stats.errors += 1;
        let disk_erred = self.hosts[host].process.as_ref().is_some_and(|p| p.erred);
        let expected = match error {
            // Requests under way when it stops are not waited for.
            GuestError::NotPrimary => !self.serving(host),
            GuestError::Io => disk_erred,
            GuestError::OutOfRange => false,
        };
        if !expected {
            return Err(format!("{request:?} {asked:?} failed: {error:?}"));
        }
        asked.forget(self.oracle(host));
        Ok(())
    }

    /// A request is answered: is it an answer that may be given?
    fn answered(
        &mut self,
        host: usize,
        request: RequestId,
        pending: &Pending,
        stamps: Option<Stamps>,
    ) -> Result<(), String> {
        match (pending.asked, stamps) {
            (Asked::Read { at, start, count }, Some(stamps)) => {
                self.stats.reads += 1;
                if stamps.len() as u64 != count {
                    return Err(format!("{request:?} read {} sectors", stamps.len()));
                }
                // Whom the register does not name reads under a lease, or under none.
                let doubtful = self.now < self.client.leases_hold_from && !self.registered()[host];
                if doubtful {
                    self.oracle(host).read_lost(at);
                    return Ok(());
                }
                self.check_lineage(host, &stamps)?;
                self.oracle(host).read_returned(at, start, &stamps)
            }
            (
                Asked::Write {
                    number,
                    start,
                    count,
                    durability,
                },
                None,
            ) => {
                self.stats.acknowledged_writes += 1;
                self.client.acknowledged[host] += 1;
                self.client.recent = Some((start, count.min(MOST_READ)));
                self.oracle(host)
                    .write_acknowledged(number, start, count, durability);
                self.check_registered_have(host, pending.since, (start, count))?;
                self.check_acknowledged(host, (start, count))?;
                match durability {
                    Durability::Durable => self.check_durable(host, &[(start, count)]),
                    Durability::Volatile => Ok(()),
                }
            }
            (Asked::Flush { at }, None) => {
                self.stats.flushes += 1;
                let ranges = self.oracle(host).flush_acknowledged(at);
                self.check_durable(host, &ranges)
            }
            (asked, _) => Err(format!(
                "{request:?} {asked:?} got an answer of another kind"
            )),
        }
    }

    /// The node may serve guests, or must not any more.
    pub fn serve_changed(&mut self, host: usize, serving: bool) -> Result<(), String> {
        self.tell(host, if serving { "serves" } else { "serves no more" });
        if !serving {
            self.orphan(host);
            return self.check_stopping(host);
        }
        let other = self.hosts[1 - host].process.as_ref();
        // With an arbiter, a Primary that was cut off may not know yet that it is replaced.
        let unknowing = self.options.is_arbitrated() && !self.custody.named[1 - host];
        let sane = self.options.scenario == Scenario::SaneOperator;
        if other.is_some_and(|p| p.serving) && sane && !unknowing {
            return Err(format!("serves while {} serves", NAMES[1 - host]));
        }
        self.check_right(host)?;
        // A node may serve and stop in one moment; it served last all the same.
        self.sample_custody();
        self.check_serving(host)?;
        self.check_beginning(host)
    }

    /// The guest's connections to this node are closed.
    fn orphan(&mut self, host: usize) {
        let mut lost = Vec::new();
        for pending in self.client.pending.values_mut() {
            if pending.host == host && !pending.orphaned {
                pending.orphaned = true;
                lost.push(pending.asked);
            }
        }
        for asked in lost {
            asked.forget(self.oracle(host));
        }
    }

    /// The node is gone: nothing it was asked will be answered.
    pub fn client_lost(&mut self, host: usize) {
        self.orphan(host);
        self.client
            .pending
            .retain(|_, pending| pending.host != host);
    }

    /// What guests of the node know: there are two histories while a split brain lasts.
    pub fn oracle(&mut self, host: usize) -> &mut Checker {
        history(&mut self.apart, &mut self.checker, host)
    }

    /// Plans to read back everything that was ever written.
    pub fn begin_verification(&mut self) {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for sector in self.checker.touched() {
            match ranges.last_mut() {
                Some((start, count)) if *start + *count == sector && *count < 256 => *count += 1,
                _ => ranges.push((sector, 1)),
            }
        }
        self.client.verify = ranges;
        self.schedule(1, Event::Verify);
    }

    pub fn verify_step(&mut self) {
        while self.client.pending.len() < 32 {
            let Some((start, count)) = self.client.verify.pop() else {
                if self.client.pending.is_empty() {
                    return self.verified();
                }
                break;
            };
            let ask = Ask::Read { start, count };
            let Some(host) = self.serving_host(ask) else {
                return self.fail("the Primary stopped serving without a reason".to_owned());
            };
            self.read(host, start, count);
        }
        self.schedule(VERIFY_GAP, Event::Verify);
    }
}
