//! A guest of the demo's story: several requests at a time, every answer noted.

use super::failed;
use super::ledger::{BLOCK, Ledger};
use crate::nbd_client::{Cookie, NbdClient};
use fastrand::Rng;
use mirror_core::error::Refusal;
use std::collections::HashMap;
use std::io;
use std::time::{Duration, Instant};

/// Requests in flight.
const DEPTH: usize = 8;

/// Someone who uses the mirror, several requests at a time.
pub struct Guest {
    /// The connection.
    pub client: NbdClient,
    in_flight: HashMap<Cookie, Write>,
    /// The longest any write took.
    pub longest: Duration,
}

struct Write {
    block: u64,
    version: u32,
    since: Instant,
}

impl Guest {
    /// A guest with nothing in flight.
    pub fn new(client: NbdClient) -> Guest {
        Guest {
            client,
            in_flight: HashMap::new(),
            longest: Duration::ZERO,
        }
    }

    /// Writes random blocks and waits for all answers.
    pub fn write(&mut self, ledger: &mut Ledger, random: &mut Rng, count: usize) -> io::Result<()> {
        for _ in 0..count {
            if self.in_flight.len() >= DEPTH {
                self.take_reply(ledger)?;
            }
            self.send_one(ledger, random)?;
        }
        while !self.in_flight.is_empty() {
            self.take_reply(ledger)?;
        }
        Ok(())
    }

    /// Sends until the depth is reached, and leaves it at that.
    pub fn fill(&mut self, ledger: &mut Ledger, random: &mut Rng) -> io::Result<()> {
        while self.in_flight.len() < DEPTH {
            self.send_one(ledger, random)?;
        }
        Ok(())
    }

    /// One write, to a block that no other write in flight is for: their order would be open.
    fn send_one(&mut self, ledger: &mut Ledger, random: &mut Rng) -> io::Result<()> {
        let block = loop {
            let block = random.u64(..ledger.len());
            if !self.in_flight.values().any(|write| write.block == block) {
                break block;
            }
        };
        let (version, data) = ledger.issue(block);
        let cookie = self
            .client
            .submit_write(block * BLOCK as u64, &data, false)?;
        self.in_flight.insert(
            cookie,
            Write {
                block,
                version,
                since: Instant::now(),
            },
        );
        Ok(())
    }

    /// Takes one answer; an error is a connection that is gone, or a write that failed.
    pub fn take_reply(&mut self, ledger: &mut Ledger) -> io::Result<()> {
        let reply = self.client.next_reply()?;
        reply
            .result
            .map_err(|number| io::Error::from_raw_os_error(number as i32))?;
        if let Some(write) = self.in_flight.remove(&reply.cookie) {
            self.longest = self.longest.max(write.since.elapsed());
            ledger.acknowledge(write.block, write.version);
        }
        Ok(())
    }

    /// Reads every block that was ever written and checks it.
    pub fn verify(&mut self, ledger: &mut Ledger) -> Result<usize, Refusal> {
        let lost = |error: io::Error| failed(format!("a guest's read failed: {error}"));
        let blocks: Vec<u64> = ledger.written().collect();
        let mut reading = HashMap::new();
        let mut rest = blocks.iter();
        loop {
            while reading.len() < DEPTH
                && let Some(&block) = rest.next()
            {
                let offset = block * BLOCK as u64;
                let cookie = self
                    .client
                    .submit_read(offset, BLOCK as u32)
                    .map_err(lost)?;
                reading.insert(cookie, block);
            }
            if reading.is_empty() {
                return Ok(blocks.len());
            }
            let reply = self.client.next_reply().map_err(lost)?;
            let data = reply
                .result
                .map_err(|number| lost(io::Error::from_raw_os_error(number as i32)))?;
            if let Some(block) = reading.remove(&reply.cookie) {
                ledger.check(block, &data).map_err(failed)?;
            }
        }
    }
}
