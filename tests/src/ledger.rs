//! What a client was promised: every acknowledged write by block, kept outside the processes that
//! get killed, and the load that fills it.

use crate::nbd::{NbdAddress, NbdClient, NbdCommand};
use crate::wait::{Deadline, wait_until};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The unit of the ledger's writes.
const BLOCK: usize = 4096;

/// Stamps by block: the last one acknowledged, and later ones whose fate is not known (a request
/// that got no answer is indeterminate).
#[derive(Debug, Default)]
pub struct Ledger {
    blocks: HashMap<u64, BlockFate>,
    last_stamp: u64,
    acknowledged: u64,
}

#[derive(Debug, Default)]
struct BlockFate {
    /// The last acknowledged stamp; 0 before the first.
    acknowledged: u64,
    /// Stamps sent after it without an answer.
    indeterminate: Vec<u64>,
}

impl Ledger {
    /// Writes acknowledged so far.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    /// A new stamp for the block, indeterminate until it is acknowledged.
    fn issue(&mut self, block: u64) -> u64 {
        self.last_stamp += 1;
        let fate = self.blocks.entry(block).or_default();
        fate.indeterminate.push(self.last_stamp);
        self.last_stamp
    }

    /// The write of this stamp was acknowledged: nothing older may be seen any more.
    fn acknowledge(&mut self, block: u64, stamp: u64) {
        let fate = self.blocks.entry(block).or_default();
        fate.acknowledged = stamp;
        fate.indeterminate.retain(|other| *other > stamp);
        self.acknowledged += 1;
    }

    /// Reads every block that was ever written and checks that it holds the last acknowledged
    /// write, or one that was under way later and got no answer. What is found becomes the
    /// promise: it must not change again by itself.
    ///
    /// # Panics
    ///
    /// When an acknowledged write is lost or a block holds what nobody wrote there.
    #[track_caller]
    pub fn verify(&mut self, client: &mut NbdClient) {
        let mut blocks: Vec<u64> = self.blocks.keys().copied().collect();
        blocks.sort_unstable();
        for batch in blocks.chunks(64) {
            let mut by_cookie = HashMap::new();
            for block in batch {
                let cookie = client
                    .send(NbdCommand::Read(BLOCK as u32), block * BLOCK as u64, &[])
                    .expect("the mirror serves reads");
                by_cookie.insert(cookie, *block);
            }
            for _ in batch {
                let reply = client.receive().expect("the mirror answers reads");
                let block = by_cookie[&reply.cookie];
                assert_eq!(reply.error, 0, "reading block {block} failed");
                self.verify_block(block, &reply.data);
            }
        }
    }

    #[track_caller]
    fn verify_block(&mut self, block: u64, data: &[u8]) {
        let stamp = read_stamp(block, data);
        let fate = self
            .blocks
            .get_mut(&block)
            .expect("only written blocks are read");
        let known = stamp
            .is_some_and(|stamp| stamp == fate.acknowledged || fate.indeterminate.contains(&stamp));
        assert!(
            known,
            "block {block}: acknowledged stamp {}, indeterminate {:?}, but found {stamp:?}",
            fate.acknowledged, fate.indeterminate
        );
        fate.acknowledged = stamp.expect("known");
        fate.indeterminate.clear();
    }
}

/// The content of a block for a stamp: every 16 bytes name block and stamp, so that a torn or
/// misplaced write is seen.
fn content(block: u64, stamp: u64) -> Vec<u8> {
    let mut unit = [0; 16];
    unit[..8].copy_from_slice(&block.to_le_bytes());
    unit[8..].copy_from_slice(&stamp.to_le_bytes());
    unit.repeat(BLOCK / 16)
}

/// The stamp of a whole block; 0 for a block never written, `None` for anything else.
fn read_stamp(block: u64, data: &[u8]) -> Option<u64> {
    if data.iter().all(|byte| *byte == 0) {
        return Some(0);
    }
    let stamp = u64::from_le_bytes(data[8..16].try_into().ok()?);
    (data == content(block, stamp)).then_some(stamp)
}

/// A random write load over part of an export.
#[derive(Clone, Copy, Debug)]
pub struct WriteLoad {
    /// First block.
    pub first_block: u64,
    /// Number of blocks.
    pub blocks: u64,
    /// Requests in flight.
    pub depth: usize,
    /// One in so many requests is a write with FUA, one is a flush; 0 for neither.
    pub durable_every: u64,
}

/// Sets a load's stop flag when dropped, so that the load ends also when the test fails meanwhile.
#[derive(Debug)]
pub struct StopOnDrop<'a>(pub &'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What a load met.
#[derive(Clone, Copy, Debug, Default)]
pub struct LoadReport {
    /// Writes acknowledged.
    pub writes: u64,
    /// The longest a write took from sending to its reply.
    pub longest: Duration,
    /// Whether the load ended because the server was lost.
    pub lost: bool,
}

#[derive(Clone, Copy, Debug)]
enum InFlight {
    Write {
        block: u64,
        stamp: u64,
        sent: Instant,
    },
    Flush {
        sent: Instant,
    },
}

impl WriteLoad {
    /// The first so many blocks, for writing each of them once.
    #[must_use]
    pub fn first(blocks: u64) -> WriteLoad {
        WriteLoad {
            first_block: 0,
            blocks,
            depth: 32,
            durable_every: 0,
        }
    }

    /// Writes every block of the range once, from first to last.
    ///
    /// # Panics
    ///
    /// When the server is lost or answers with an error.
    pub fn write_each(&self, address: &NbdAddress, ledger: &mut Ledger) {
        let mut client = NbdClient::connect(address, "").expect("the mirror is served");
        let mut in_flight = HashMap::new();
        let mut left = self.first_block..self.first_block + self.blocks;
        loop {
            while in_flight.len() < self.depth {
                let Some(block) = left.next() else { break };
                let stamp = ledger.issue(block);
                let command = NbdCommand::Write { fua: false };
                let cookie = client
                    .send(command, block * BLOCK as u64, &content(block, stamp))
                    .expect("the mirror takes writes");
                in_flight.insert(cookie, (block, stamp));
            }
            if in_flight.is_empty() {
                return;
            }
            let reply = client.receive().expect("the mirror answers writes");
            assert_eq!(reply.error, 0, "the mirror answered a write with an error");
            let (block, stamp) = in_flight
                .remove(&reply.cookie)
                .expect("a reply to a request");
            ledger.acknowledge(block, stamp);
        }
    }

    /// Writes until `stop` is set or the server is lost, and notes every acknowledgement.
    ///
    /// # Panics
    ///
    /// When the server answers a request with an error, or never serves the export.
    pub fn run(&self, address: &NbdAddress, stop: &AtomicBool, ledger: &mut Ledger) -> LoadReport {
        let mut client = wait_until(Deadline::seconds(20), "the NBD export", || {
            NbdClient::connect(address, "").map_err(|error| error.to_string())
        });
        let mut report = LoadReport::default();
        let mut random = fastrand::Rng::new();
        let mut in_flight: HashMap<u64, InFlight> = HashMap::new();
        let mut busy = std::collections::HashSet::new();
        loop {
            let stopping = stop.load(Ordering::Relaxed);
            while !stopping && in_flight.len() < self.depth {
                let sent = Instant::now();
                let draw = if self.durable_every == 0 {
                    2
                } else {
                    random.u64(..self.durable_every)
                };
                let result = if draw == 0 {
                    client
                        .send(NbdCommand::Flush, 0, &[])
                        .map(|cookie| (cookie, InFlight::Flush { sent }))
                } else {
                    let block = self.first_block + random.u64(..self.blocks);
                    // Two writes of one block in flight would have no order to check.
                    if !busy.insert(block) {
                        continue;
                    }
                    let stamp = ledger.issue(block);
                    let command = NbdCommand::Write { fua: draw == 1 };
                    client
                        .send(command, block * BLOCK as u64, &content(block, stamp))
                        .map(|cookie| (cookie, InFlight::Write { block, stamp, sent }))
                };
                match result {
                    Ok((cookie, request)) => drop(in_flight.insert(cookie, request)),
                    Err(_) => {
                        report.lost = true;
                        return report;
                    }
                }
            }
            if in_flight.is_empty() {
                return report;
            }
            let Ok(reply) = client.receive() else {
                report.lost = true;
                return report;
            };
            assert_eq!(
                reply.error, 0,
                "the mirror answered a request with an error"
            );
            let sent = match in_flight
                .remove(&reply.cookie)
                .expect("a reply to a request")
            {
                InFlight::Write { block, stamp, sent } => {
                    ledger.acknowledge(block, stamp);
                    busy.remove(&block);
                    report.writes += 1;
                    sent
                }
                InFlight::Flush { sent } => sent,
            };
            report.longest = report.longest.max(sent.elapsed());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Process;
    use crate::tool::Tool;
    use crate::wait::pace;

    fn ledger_with(acknowledged: bool) -> (Ledger, u64) {
        let mut ledger = Ledger::default();
        let first = ledger.issue(5);
        ledger.acknowledge(5, first);
        let second = ledger.issue(5);
        if acknowledged {
            ledger.acknowledge(5, second);
        }
        (ledger, second)
    }

    #[test]
    fn an_unanswered_write_may_be_there_or_not() {
        for stamp in 1..=2 {
            let (mut ledger, _) = ledger_with(false);
            ledger.verify_block(5, &content(5, stamp));
            // But what was seen once must stay.
            assert_eq!(ledger.blocks[&5].acknowledged, stamp);
            assert!(ledger.blocks[&5].indeterminate.is_empty());
        }
    }

    #[test]
    #[should_panic(expected = "acknowledged stamp 2")]
    fn a_lost_write_is_found() {
        let (mut ledger, second) = ledger_with(true);
        ledger.verify_block(5, &content(5, second - 1));
    }

    #[test]
    #[should_panic(expected = "found None")]
    fn a_torn_write_is_found() {
        let (mut ledger, second) = ledger_with(true);
        let mut data = content(5, second);
        data[2048..].copy_from_slice(&content(5, second - 1)[2048..]);
        ledger.verify_block(5, &data);
    }

    #[test]
    #[should_panic(expected = "found None")]
    fn a_misplaced_write_is_found() {
        let (mut ledger, second) = ledger_with(true);
        ledger.verify_block(5, &content(6, second));
    }

    /// Against a server that is known to be right: the load runs, every write is found again, and
    /// a write behind the ledger's back is noticed.
    #[test]
    fn load_and_ledger_agree_with_nbdkit() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("nbd.sock");
        let mut command = Tool::new("nbdkit")
            .args(["--foreground", "--unix"])
            .arg(&socket)
            .args(["memory", "16M"])
            .into_command();
        let server = Process::start("nbdkit", &mut command);
        let address = NbdAddress::Unix(socket);
        let load = WriteLoad {
            first_block: 100,
            blocks: 1000,
            depth: 8,
            durable_every: 10,
        };
        let mut ledger = Ledger::default();
        let stop = AtomicBool::new(false);
        let report = std::thread::scope(|scope| {
            let running = scope.spawn(|| load.run(&address, &stop, &mut ledger));
            pace(Duration::from_millis(200));
            stop.store(true, Ordering::Relaxed);
            running.join().unwrap()
        });
        assert!(!report.lost && report.writes > 0);
        load.write_each(&address, &mut ledger);
        assert_eq!(ledger.acknowledged(), report.writes + 1000);
        let mut client = NbdClient::connect(&address, "").unwrap();
        assert_eq!(client.size(), 16 << 20);
        ledger.verify(&mut client);
        client.write(500 * 4096, &content(500, 1), true).unwrap();
        let betrayed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            ledger.verify(&mut client);
        }));
        assert!(betrayed.is_err());

        // A server that dies ends the load with what was acknowledged.
        let stop = AtomicBool::new(false);
        let report = std::thread::scope(|scope| {
            let running = scope.spawn(|| load.run(&address, &stop, &mut ledger));
            pace(Duration::from_millis(100));
            server.kill();
            running.join().unwrap()
        });
        assert!(report.lost);
    }
}
