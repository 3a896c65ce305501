//! A guest whose sectors name the write they come from, and who keeps a [`Timeline`].

use crate::cluster::Node;
use crate::nbd::{NbdAddress, NbdClient, NbdCommand};
use crate::timeline::{Timeline, What, Write, bytes_of};
use crate::wait::{Deadline, pace, wait_until};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

/// Requests in flight.
const DEPTH: usize = 8;

/// Between two requests: a recording is about the moments of faults, not about bytes.
const THINK: Duration = Duration::from_millis(2);

/// Where a guest is told to go, and where it is.
#[derive(Debug)]
pub struct Reins {
    state: Mutex<State>,
}

#[derive(Clone, Debug)]
struct State {
    wanted: Wanted,
    connected: bool,
    answered: u64,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Wanted {
    Serve(Node, NbdAddress),
    Rest,
    End,
}

impl Reins {
    /// Of a guest at rest.
    pub fn new() -> Reins {
        Reins {
            state: Mutex::new(State {
                wanted: Wanted::Rest,
                connected: false,
                answered: 0,
            }),
        }
    }

    /// Sends the guest to a node, and waits until it was answered there.
    #[track_caller]
    pub fn work_at(&self, node: Node, address: &NbdAddress) {
        let before = self.lock().answered;
        self.lock().wanted = Wanted::Serve(node, address.clone());
        wait_until(Deadline::seconds(20), "the guest to be served", || {
            let state = self.lock().clone();
            if state.answered > before + 10 {
                return Ok(());
            }
            Err(format!("{state:?}"))
        });
    }

    /// Has the guest let its requests end and go away, and waits for that.
    #[track_caller]
    pub fn rest(&self) {
        self.lock().wanted = Wanted::Rest;
        wait_until(Deadline::seconds(20), "the guest to rest", || {
            match self.lock().connected {
                false => Ok(()),
                true => Err("it is connected".to_owned()),
            }
        });
    }

    /// Lets the guest end.
    pub fn end(&self) {
        self.lock().wanted = Wanted::End;
    }

    /// Requests answered so far.
    pub fn answered(&self) -> u64 {
        self.lock().answered
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics while holding it")
    }
}

impl Default for Reins {
    fn default() -> Reins {
        Reins::new()
    }
}

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Ends the guest when dropped, so that it ends also when the test fails meanwhile.
#[derive(Debug)]
pub struct EndOnDrop<'a>(pub &'a Reins);

/// The guest.
#[derive(Debug)]
pub struct Guest<'a> {
    timeline: &'a Timeline,
    sectors: u64,
    hot: [u64; 4],
    writes: u64,
    flushes: u64,
    random: fastrand::Rng,
}

#[derive(Clone, Copy, Debug)]
enum InFlight {
    Write(Write),
    Flush(u64),
}

impl<'a> Guest<'a> {
    /// A guest of a device of so many sectors.
    pub fn new(timeline: &'a Timeline, sectors: u64, mut random: fastrand::Rng) -> Guest<'a> {
        Guest {
            timeline,
            sectors,
            hot: [(); 4].map(|()| random.u64(..sectors - 1024)),
            writes: 0,
            flushes: 0,
            random,
        }
    }

    /// Works where it is told to until it is told to end.
    pub fn run(&mut self, reins: &Reins) {
        loop {
            let wanted = reins.lock().wanted.clone();
            match wanted {
                Wanted::End => return,
                Wanted::Rest => pace(Duration::from_millis(1)),
                Wanted::Serve(node, address) => match NbdClient::connect(&address, "") {
                    Ok(mut client) => {
                        reins.lock().connected = true;
                        self.work(node, &address, &mut client, reins);
                        drop(client);
                        reins.lock().connected = false;
                    }
                    Err(_) => pace(Duration::from_millis(5)),
                },
            }
        }
    }

    fn work(&mut self, node: Node, address: &NbdAddress, client: &mut NbdClient, reins: &Reins) {
        let here = Wanted::Serve(node, address.clone());
        let mut in_flight = HashMap::new();
        loop {
            while reins.lock().wanted == here && in_flight.len() < DEPTH {
                let Some((cookie, asked)) = self.ask(node, client) else {
                    return self.lose(node, in_flight);
                };
                in_flight.insert(cookie, asked);
                pace(THINK);
            }
            if in_flight.is_empty() {
                return;
            }
            let Ok(reply) = client.receive() else {
                return self.lose(node, in_flight);
            };
            let asked = in_flight
                .remove(&reply.cookie)
                .expect("a reply to a request");
            match (asked, reply.error) {
                (InFlight::Write(write), 0) => self.timeline.note(node, What::Acknowledged(write)),
                (InFlight::Flush(number), 0) => {
                    self.timeline.note(node, What::FlushAcknowledged(number));
                }
                (InFlight::Write(write), _) => self.timeline.note(node, What::Lost(write)),
                (InFlight::Flush(_), _) => {}
            }
            reins.lock().answered += 1;
        }
    }

    fn lose(&self, node: Node, in_flight: HashMap<u64, InFlight>) {
        for asked in in_flight.into_values() {
            if let InFlight::Write(write) = asked {
                self.timeline.note(node, What::Lost(write));
            }
        }
    }

    /// Asks for something; `None` when the server is gone.
    fn ask(&mut self, node: Node, client: &mut NbdClient) -> Option<(u64, InFlight)> {
        let draw = self.random.u32(..100);
        if draw < 4 {
            self.flushes += 1;
            self.timeline.note(node, What::FlushAsked(self.flushes));
            let cookie = client.send(NbdCommand::Flush, 0, &[]).ok()?;
            return Some((cookie, InFlight::Flush(self.flushes)));
        }
        let (start, count) = self.range();
        self.writes += 1;
        let write = Write {
            number: self.writes,
            start,
            count,
            zero: draw < 10,
            fua: (10..14).contains(&draw),
        };
        self.timeline.note(node, What::Asked(write));
        let len = (count * 512) as u32;
        let sectors = start..start + count;
        let sent = match draw {
            ..7 => client.send(NbdCommand::Trim(len), start * 512, &[]),
            7..10 => client.send(NbdCommand::WriteZeroes(len), start * 512, &[]),
            _ => {
                let data = bytes_of(sectors.map(|sector| write.stamp(sector)));
                client.send(NbdCommand::Write { fua: write.fua }, start * 512, &data)
            }
        };
        match sent {
            Ok(cookie) => Some((cookie, InFlight::Write(write))),
            Err(_) => {
                self.timeline.note(node, What::Lost(write));
                None
            }
        }
    }

    fn range(&mut self) -> (u64, u64) {
        let count = match self.random.u32(..100) {
            0..20 => 1,
            20..60 => 8,
            60..90 => self.random.u64(1..=32),
            _ => self.random.u64(32..=256),
        };
        let near = self.hot[self.random.usize(..self.hot.len())];
        let start = match self.random.u32(..4) {
            0 => self.random.u64(..self.sectors),
            1 => near,
            _ => near + self.random.u64(..256),
        };
        (start.min(self.sectors - count), count)
    }
}
