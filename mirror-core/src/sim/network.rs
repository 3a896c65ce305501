//! The link between the two nodes.
//!
//! Fault model. One connection at a time, first in first out in both directions, with random
//! delay. A **cut** ends it: each direction still delivers a random number of the frames under
//! way, and each end hears of it at its own time, up to seconds apart. A **stall** of one
//! direction holds its bytes and reports nothing, until it is lifted or the connection dies, and no
//! connection is made meanwhile. A **hold** does so to the connection that stands, and a newer one
//! beside it works: its bytes may be released when that one long agreed. A process crash closes the connection in order; a power loss closes it for the other side late
//! or not at all. Frames of a connection that an end replaced by a newer one may still be
//! delivered to it under the old number. A cut may be **half-open** (one end is never told: it
//! stands there until it notices the silence) or **in mid-frame** (an end hears a part of a frame,
//! which is never completed). A frame may be **damaged** on the way, and **garbage** may come in.

use super::buffers::Stamps;
use super::options::Chance;
use crate::node::boundary::ConnectionId;
use crate::types::Time;
use crate::wire::HEADER_LEN;
use std::collections::VecDeque;

const MILLISECOND: u64 = 1_000_000;

/// A frame on the wire.
#[derive(Debug)]
pub(super) struct Frame {
    pub header: [u8; HEADER_LEN],
    pub body: WireBody,
    pub condition: Condition,
}

/// What became of a frame on the way; for the judge, not for who receives it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Condition {
    Sound,
    /// A bit is flipped.
    Damaged,
    /// The peer never sent it.
    Garbage,
}

/// How a cut ends a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Break {
    /// Between two frames; each end is told in its own time.
    Clean,
    /// This end is never told.
    HalfOpen { unaware: usize },
    /// Within a frame to this end.
    MidFrame { to: usize },
}

/// The payload of a frame on the wire.
#[derive(Debug)]
pub(super) enum WireBody {
    None,
    Data(Stamps),
    Control(Vec<u8>),
}

/// What happens on the network at a point in time.
#[derive(Clone, Copy, Debug)]
pub(super) enum NetworkEvent {
    /// The initiator tries.
    Attempt,
    /// An end learns that the connection stands.
    Up { connection: usize, side: usize },
    /// Something may be delivered to an end.
    Deliver { connection: usize, side: usize },
    /// An end learns that the connection broke.
    Down { connection: usize, side: usize },
    /// A stall ends.
    Unstall { from: usize },
    /// What was held for an end of a connection is released.
    Release { connection: usize, side: usize },
    /// A cut is repaired.
    Repair,
}

/// What a host hears.
#[derive(Debug)]
pub(super) enum Heard {
    Up(ConnectionId),
    Down(ConnectionId),
    /// A part of a frame.
    Part(ConnectionId),
    Frame(ConnectionId, Frame),
}

enum Item {
    Frame(Frame),
    Part,
    End,
}

/// One end's view of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    /// Stands, and the host was not told yet.
    Untold,
    Up,
    Gone,
}

struct Connection {
    ends: [End; 2],
    /// By receiver.
    pipes: [VecDeque<(Time, Item)>; 2],
    last: [Time; 2],
    /// By receiver: nothing is delivered.
    held: [bool; 2],
    broken: bool,
}

/// What a host lets its driver do.
#[derive(Clone, Copy, Default, Debug)]
struct Wish {
    seeking: bool,
    welcome: bool,
}

/// New events, with their delays in nanoseconds.
pub(super) type Later = Vec<(u64, NetworkEvent)>;

/// The link and all connections it ever carried.
pub(super) struct Network {
    initiator: usize,
    chance: Chance,
    max_delay: u64,
    wishes: [Wish; 2],
    cuts: u32,
    stalled: [bool; 2],
    /// Which bit of the next frame to an end flips.
    damage: [Option<u32>; 2],
    attempt_scheduled: bool,
    connections: Vec<Connection>,
    rng: fastrand::Rng,
}

impl Network {
    pub fn new(initiator: usize, chance: Chance, max_delay: u64, rng: fastrand::Rng) -> Network {
        Network {
            initiator,
            chance,
            max_delay,
            wishes: [Wish::default(); 2],
            cuts: 0,
            stalled: [false; 2],
            damage: [None; 2],
            attempt_scheduled: false,
            connections: Vec::new(),
            rng,
        }
    }

    pub fn start_connecting(&mut self, host: usize, later: &mut Later) {
        self.wishes[host] = Wish {
            seeking: true,
            welcome: true,
        };
        self.schedule_attempt(later);
    }

    pub fn stop_connecting(&mut self, now: Time, host: usize, later: &mut Later) {
        self.wishes[host] = Wish::default();
        for index in self.live() {
            if self.connections[index].ends[host] == End::Untold {
                self.leave(now, index, host, later);
            }
        }
    }

    /// The host closes its end.
    pub fn close(&mut self, now: Time, host: usize, id: ConnectionId, later: &mut Later) {
        if let Some(index) = self.index(host, id)
            && self.connections[index].ends[host] != End::Gone
        {
            self.leave(now, index, host, later);
        }
    }

    pub fn send(
        &mut self,
        now: Time,
        host: usize,
        id: ConnectionId,
        frame: Frame,
        later: &mut Later,
    ) {
        if let Some(index) = self.index(host, id)
            && self.connections[index].ends[host] == End::Up
            && !self.connections[index].broken
        {
            let delay = self.delay();
            self.push(now, index, 1 - host, delay, Item::Frame(frame), later);
        }
    }

    /// The host's process is gone, with its sockets; `silently` if the power failed.
    pub fn host_died(&mut self, now: Time, host: usize, silently: bool, later: &mut Later) {
        self.wishes[host] = Wish::default();
        for index in self.live() {
            if self.connections[index].ends[host] != End::Gone {
                self.connections[index].ends[host] = End::Gone;
                self.connections[index].pipes[host].clear();
                let delay = match silently {
                    _ if self.chance == Chance::Fixed => self.delay(),
                    false => self.delay(),
                    true if self.rng.bool() => continue,
                    true => self.rng.u64(0..4000) * MILLISECOND,
                };
                self.push(now, index, 1 - host, delay, Item::End, later);
            }
        }
    }

    /// Breaks the connection, and lets none be made for `outage` nanoseconds.
    pub fn cut(&mut self, outage: u64, how: Break, later: &mut Later) {
        self.cuts += 1;
        later.push((outage, NetworkEvent::Repair));
        for index in self.live() {
            self.connections[index].broken = true;
            for side in 0..2 {
                let pipe = &mut self.connections[index].pipes[side];
                let kept = match self.chance {
                    Chance::Drawn => self.rng.usize(0..=pipe.len()),
                    Chance::Fixed => 0,
                };
                pipe.truncate(kept);
                if how == (Break::MidFrame { to: side }) {
                    let at = pipe.back().map_or(Time(0), |(at, _)| *at);
                    pipe.push_back((at, Item::Part));
                    later.push((
                        0,
                        NetworkEvent::Deliver {
                            connection: index,
                            side,
                        },
                    ));
                }
                if how == (Break::HalfOpen { unaware: side }) {
                    continue;
                }
                let heard = match self.rng.u8(0..4) {
                    _ if self.chance == Chance::Fixed => 0,
                    0 => 0,
                    1 => self.rng.u64(0..10) * MILLISECOND,
                    2 => self.rng.u64(0..500) * MILLISECOND,
                    _ => self.rng.u64(0..4000) * MILLISECOND,
                };
                later.push((
                    heard,
                    NetworkEvent::Down {
                        connection: index,
                        side,
                    },
                ));
            }
        }
    }

    /// Holds everything that `from` sends for `span` nanoseconds.
    pub fn stall(&mut self, from: usize, span: u64, later: &mut Later) {
        if !self.stalled[from] {
            self.stalled[from] = true;
            later.push((span, NetworkEvent::Unstall { from }));
        }
    }

    /// Holds everything that `from` sends over the connection that stands, for `span` nanoseconds.
    /// Returns whether there is one.
    pub fn hold(&mut self, from: usize, span: u64, later: &mut Later) -> bool {
        let side = 1 - from;
        let Some(connection) = self.newest(side).filter(|newest| {
            let entry = &self.connections[*newest];
            entry.ends == [End::Up; 2] && !entry.broken && !entry.held[side]
        }) else {
            return false;
        };
        self.connections[connection].held[side] = true;
        later.push((span, NetworkEvent::Release { connection, side }));
        true
    }

    /// Flips a bit of the next frame to `side`.
    pub fn damage(&mut self, side: usize, bit: u32) {
        self.damage[side] = Some(bit);
    }

    /// Slips a frame into the connection that stands. Returns whether there is one.
    pub fn inject(&mut self, now: Time, side: usize, frame: Frame, later: &mut Later) -> bool {
        let Some(index) = self.newest(side) else {
            return false;
        };
        let stands = self.connections[index].ends == [End::Up; 2];
        if stands && !self.connections[index].broken {
            let delay = self.delay();
            self.push(now, index, side, delay, Item::Frame(frame), later);
        }
        stands
    }

    /// The connection is of no use to the driver of `host`, which closes it.
    pub fn refuse(&mut self, now: Time, host: usize, id: ConnectionId, later: &mut Later) {
        if let Some(index) = self.index(host, id) {
            later.push((
                0,
                NetworkEvent::Down {
                    connection: index,
                    side: host,
                },
            ));
            if !self.connections[index].broken {
                let delay = self.delay();
                self.push(now, index, 1 - host, delay, Item::End, later);
            }
        }
    }

    /// Whether this is the newest connection of the host, and it has not closed it.
    pub fn is_in_use(&self, host: usize, id: ConnectionId) -> bool {
        let index = self.index(host, id);
        index.is_some()
            && index == self.newest(host)
            && index.is_some_and(|index| self.connections[index].ends[host] == End::Up)
    }

    fn newest(&self, side: usize) -> Option<usize> {
        let told = |index: &usize| self.connections[*index].ends[side] != End::Untold;
        (0..self.connections.len()).rev().take(8).find(told)
    }

    /// Lifts every fault.
    pub fn heal(&mut self, later: &mut Later) {
        self.cuts = 0;
        self.damage = [None; 2];
        for from in 0..2 {
            self.unstall(from, later);
        }
        for connection in self.live() {
            for side in 0..2 {
                self.release(connection, side, later);
            }
        }
        self.schedule_attempt(later);
    }

    /// Whether no fault is on the link.
    pub fn sound(&self) -> bool {
        let held = |index: usize| self.connections[index].held != [false; 2];
        self.cuts == 0 && self.stalled == [false; 2] && !self.live().into_iter().any(held)
    }

    /// Frames and ends of connections under way.
    pub fn under_way(&self) -> usize {
        self.connections
            .iter()
            .map(|connection| connection.pipes[0].len() + connection.pipes[1].len())
            .sum()
    }

    /// Carries out an event; what a host hears of it, and which.
    pub fn happen(
        &mut self,
        now: Time,
        event: NetworkEvent,
        later: &mut Later,
    ) -> Option<(usize, Heard)> {
        match event {
            NetworkEvent::Attempt => {
                self.attempt_scheduled = false;
                self.attempt(later);
                None
            }
            NetworkEvent::Up { connection, side } => {
                if self.connections[connection].ends[side] != End::Untold {
                    return None;
                }
                self.replace_older(now, connection, side, later);
                self.wishes[side].seeking = false;
                self.connections[connection].ends[side] = End::Up;
                for _ in 0..self.connections[connection].pipes[side].len() {
                    later.push((0, NetworkEvent::Deliver { connection, side }));
                }
                Some((side, Heard::Up(id(connection, side))))
            }
            NetworkEvent::Deliver { connection, side } => self.deliver(now, connection, side),
            NetworkEvent::Down { connection, side } => {
                let told = self.connections[connection].ends[side];
                self.connections[connection].ends[side] = End::Gone;
                self.connections[connection].pipes[side].clear();
                match told {
                    End::Up => Some((side, Heard::Down(id(connection, side)))),
                    End::Untold => {
                        // The driver's attempt failed before it was reported; it tries again.
                        self.wishes[side].seeking = self.wishes[side].welcome;
                        self.schedule_attempt(later);
                        None
                    }
                    End::Gone => None,
                }
            }
            NetworkEvent::Unstall { from } => {
                self.unstall(from, later);
                None
            }
            NetworkEvent::Release { connection, side } => {
                self.release(connection, side, later);
                None
            }
            NetworkEvent::Repair => {
                self.cuts = self.cuts.saturating_sub(1);
                None
            }
        }
    }

    fn attempt(&mut self, later: &mut Later) {
        if !self.wishes[self.initiator].seeking {
            return;
        }
        let possible =
            self.cuts == 0 && self.stalled == [false; 2] && self.wishes[1 - self.initiator].welcome;
        if !possible {
            // Without chance nothing changes by itself: whatever makes it possible tries again.
            if self.chance == Chance::Drawn {
                self.schedule_attempt(later);
            }
            return;
        }
        self.wishes[self.initiator].seeking = false;
        let connection = self.connections.len();
        self.connections.push(Connection {
            ends: [End::Untold; 2],
            pipes: [VecDeque::new(), VecDeque::new()],
            last: [Time(0); 2],
            held: [false; 2],
            broken: false,
        });
        for side in 0..2 {
            let delay = self.delay();
            later.push((delay, NetworkEvent::Up { connection, side }));
        }
    }

    fn deliver(&mut self, now: Time, connection: usize, side: usize) -> Option<(usize, Heard)> {
        let entry = &mut self.connections[connection];
        if entry.ends[side] == End::Gone {
            entry.pipes[side].clear();
            return None;
        }
        let held = (self.stalled[1 - side] || entry.held[side]) && !entry.broken;
        let due = entry.pipes[side].front().is_some_and(|(at, _)| *at <= now);
        if held || !due || entry.ends[side] == End::Untold {
            return None;
        }
        match entry.pipes[side].pop_front()?.1 {
            Item::Frame(mut frame) => {
                if let Some(bit) = self.damage[side].take() {
                    flip(&mut frame, bit);
                }
                Some((side, Heard::Frame(id(connection, side), frame)))
            }
            Item::Part => Some((side, Heard::Part(id(connection, side)))),
            Item::End => {
                entry.ends[side] = End::Gone;
                entry.pipes[side].clear();
                Some((side, Heard::Down(id(connection, side))))
            }
        }
    }

    /// A newer connection came up at `side`: the driver drops older ones now or a little later.
    fn replace_older(&mut self, now: Time, newer: usize, side: usize, later: &mut Later) {
        for index in self.live() {
            if index < newer
                && self.connections[index].ends[side] != End::Gone
                && (self.chance == Chance::Fixed || self.rng.bool())
            {
                self.leave(now, index, side, later);
            }
        }
    }

    fn leave(&mut self, now: Time, index: usize, host: usize, later: &mut Later) {
        self.connections[index].ends[host] = End::Gone;
        self.connections[index].pipes[host].clear();
        if self.connections[index].broken {
            return;
        }
        // A reset may discard what was under way to the other end.
        if self.chance == Chance::Drawn && self.rng.bool() {
            let pipe = &mut self.connections[index].pipes[1 - host];
            let kept = self.rng.usize(0..=pipe.len());
            pipe.truncate(kept);
        }
        let delay = self.delay();
        self.push(now, index, 1 - host, delay, Item::End, later);
    }

    fn push(
        &mut self,
        now: Time,
        connection: usize,
        side: usize,
        delay: u64,
        item: Item,
        later: &mut Later,
    ) {
        let entry = &mut self.connections[connection];
        let at = Time(now.0 + delay).max(entry.last[side]);
        entry.last[side] = at;
        entry.pipes[side].push_back((at, item));
        later.push((
            at.0.saturating_sub(now.0),
            NetworkEvent::Deliver { connection, side },
        ));
    }

    fn unstall(&mut self, from: usize, later: &mut Later) {
        self.stalled[from] = false;
        for connection in self.live() {
            self.look_again(connection, 1 - from, later);
        }
    }

    fn release(&mut self, connection: usize, side: usize, later: &mut Later) {
        if std::mem::take(&mut self.connections[connection].held[side]) {
            self.look_again(connection, side, later);
        }
    }

    /// Due or not, one more look at each thing in the pipe does no harm.
    fn look_again(&self, connection: usize, side: usize, later: &mut Later) {
        for _ in &self.connections[connection].pipes[side] {
            later.push((1, NetworkEvent::Deliver { connection, side }));
        }
    }

    fn schedule_attempt(&mut self, later: &mut Later) {
        if !self.attempt_scheduled && self.wishes[self.initiator].seeking {
            self.attempt_scheduled = true;
            let pause = match self.chance {
                Chance::Drawn => self.rng.u64(1..200) * MILLISECOND,
                Chance::Fixed => self.max_delay,
            };
            later.push((pause, NetworkEvent::Attempt));
        }
    }

    fn delay(&mut self) -> u64 {
        match self.rng.u8(0..16) {
            _ if self.chance == Chance::Fixed => self.max_delay,
            0..4 => 0,
            4..15 => self.rng.u64(0..=self.max_delay),
            _ => self.rng.u64(0..=self.max_delay * 20),
        }
    }

    fn live(&self) -> Vec<usize> {
        let first = self.connections.len().saturating_sub(64);
        (first..self.connections.len())
            .filter(|index| self.connections[*index].ends != [End::Gone; 2])
            .collect()
    }

    fn index(&self, host: usize, id: ConnectionId) -> Option<usize> {
        let index = (id.0 / 2).checked_sub(1)? as usize;
        (id.0 as usize % 2 == host && index < self.connections.len()).then_some(index)
    }
}

/// Flips a bit of a frame, in its payload if it has one and the bit is beyond the header.
fn flip(frame: &mut Frame, bit: u32) {
    frame.condition = Condition::Damaged;
    let bit = bit as usize;
    match &mut frame.body {
        WireBody::Data(stamps) if bit >= HEADER_LEN * 8 => {
            let mut damaged = stamps.to_vec();
            let at = bit / 64 % damaged.len();
            damaged[at] ^= 1 << (bit % 64);
            *stamps = damaged.into();
        }
        WireBody::Control(bytes) if bit >= HEADER_LEN * 8 && !bytes.is_empty() => {
            let at = bit / 8 % bytes.len();
            bytes[at] ^= 1 << (bit % 8);
        }
        _ => frame.header[bit / 8 % HEADER_LEN] ^= 1 << (bit % 8),
    }
}

/// The two ends number a connection differently, so that mixing them up shows.
fn id(connection: usize, side: usize) -> ConnectionId {
    ConnectionId((connection as u64 + 1) * 2 + side as u64)
}

#[cfg(test)]
mod tests;
