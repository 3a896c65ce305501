//! What a guest asked and was told, each with how long the stores' logs were then: the common
//! clock of a recording.
//!
//! Why that tells what a power cut may take: the store answers an operation only after its entry is
//! in the log ([`crate::write_log`]). Lengths are read *after* an answer arrived, so everything
//! that the answer rests on lies within them, on both nodes; and *before* a request is sent, so
//! everything that comes of the request lies behind them. A request counts as answered before a
//! cut only if the length noted with the answer is within the cut; a request whose noted length is
//! behind the cut cannot have left anything in the image. Both err on the side of what is allowed.
//!
//! The lengths of one moment are of one moment: they are read until nothing changed meanwhile.

use crate::cluster::Node;
use mirror_core::sim::checker::{Checker, Durability, stamp};
use std::collections::HashMap;
use std::fs::File;
use std::sync::{Mutex, MutexGuard};

/// The lengths of all logs at one moment: by node, then by store (data, metadata of its own).
pub type Lengths = [[u64; 2]; 2];

/// Something that happened.
#[derive(Clone, Debug)]
pub struct Event {
    /// When.
    pub at: Lengths,
    /// The node that serves the guest.
    pub by: Node,
    /// What.
    pub what: What,
}

/// What happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum What {
    /// A write was asked for.
    Asked(Write),
    /// It was acknowledged.
    Acknowledged(Write),
    /// It got no answer: it happened or it did not.
    Lost(Write),
    /// A flush, by its number, was asked for.
    FlushAsked(u64),
    /// It was acknowledged.
    FlushAcknowledged(u64),
    /// Nothing: only the clock was read.
    Tick,
}

/// A write of a guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Write {
    /// Its number.
    pub number: u64,
    /// First sector.
    pub start: u64,
    /// Sectors.
    pub count: u64,
    /// Whether it zeroes.
    pub zero: bool,
    /// Whether it was to be durable when acknowledged.
    pub fua: bool,
}

impl Write {
    /// What a sector of the write holds.
    pub fn stamp(&self, sector: u64) -> u64 {
        if self.zero {
            0
        } else {
            stamp(self.number, sector)
        }
    }
}

/// The recording of a guest's view.
#[derive(Debug)]
pub struct Timeline {
    logs: [Vec<File>; 2],
    events: Mutex<Vec<Event>>,
}

impl Timeline {
    /// A timeline by the clock of these logs: of each node one or two.
    pub fn new(logs: [Vec<File>; 2]) -> Timeline {
        Timeline {
            logs,
            events: Mutex::new(Vec::new()),
        }
    }

    /// Notes what happened now, in the order of the calls.
    pub fn note(&self, by: Node, what: What) {
        let mut events = self.lock();
        let at = self.now();
        // A tick tells something only if the clock went on.
        if what != What::Tick || events.last().is_none_or(|last| last.at != at) {
            events.push(Event { at, by, what });
        }
    }

    /// Takes what was noted.
    pub fn finish(&self) -> Vec<Event> {
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Event>> {
        self.events.lock().expect("nobody panics while noting")
    }

    fn now(&self) -> Lengths {
        let mut before = self.read();
        loop {
            let after = self.read();
            if before == after {
                return after;
            }
            before = after;
        }
    }

    fn read(&self) -> Lengths {
        let mut lengths = Lengths::default();
        for (lengths, logs) in lengths.iter_mut().zip(&self.logs) {
            for (length, log) in lengths.iter_mut().zip(logs) {
                *length = log.metadata().expect("an open file").len();
            }
        }
        lengths
    }
}

/// Tells an oracle of these events. Of a write or flush that `counts` refuses, it hears that it was
/// asked and never that it was acknowledged.
pub fn oracle<'a>(
    sectors: u64,
    events: impl Iterator<Item = &'a Event>,
    counts: impl Fn(&Event) -> bool,
) -> Checker {
    let mut checker = Checker::new(sectors, Box::new(|_| 0));
    let mut flushes = HashMap::new();
    for event in events {
        match event.what {
            What::Asked(write) => {
                let range = write.start..write.start + write.count;
                let stamps = range.map(|sector| write.stamp(sector));
                checker.write_asked(write.number, write.start, stamps);
            }
            What::Acknowledged(write) if counts(event) => {
                let durability = if write.fua {
                    Durability::Durable
                } else {
                    Durability::Volatile
                };
                checker.write_acknowledged(write.number, write.start, write.count, durability);
            }
            What::Lost(write) => checker.write_lost(write.number, write.start, write.count),
            What::FlushAsked(number) => {
                flushes.insert(number, checker.flush_asked());
            }
            What::FlushAcknowledged(number) if counts(event) => {
                if let Some(asked) = flushes.remove(&number) {
                    checker.flush_acknowledged(asked);
                }
            }
            What::Acknowledged(_) | What::FlushAcknowledged(_) | What::Tick => {}
        }
    }
    checker
}

/// The bytes of stamps: each sector full of its own.
pub fn bytes_of(stamps: impl Iterator<Item = u64>) -> Vec<u8> {
    stamps
        .flat_map(|stamp| stamp.to_le_bytes().repeat(64))
        .collect()
}

/// The stamps of sectors; [`GARBAGE`] for a sector that is not full of one.
pub fn stamps_of(bytes: &[u8]) -> Vec<u64> {
    bytes
        .chunks_exact(512)
        .map(|sector| {
            let mut words = sector.chunks_exact(8);
            let first = words.next().expect("64 words");
            if words.all(|word| word == first) {
                u64::from_le_bytes(first.try_into().expect("8 bytes"))
            } else {
                GARBAGE
            }
        })
        .collect()
}

/// What stands for a sector that nobody wrote so.
pub const GARBAGE: u64 = u64::MAX;
