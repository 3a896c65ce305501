//! Clients' requests that were not answered yet, and the memory they take.

use crate::extents::Extent;
use crate::slots::Slots;
use mirror_core::node::boundary::RequestId;

/// Bytes of requests in flight at most, those of all clients together.
const REQUEST_BUDGET: usize = 192 << 20;

/// Requests under way.
#[derive(Default)]
pub struct Ledger {
    requests: Slots<Pending>,
    /// Counts requests, so that no two share an id.
    serial: u32,
    /// Bytes of requests in flight.
    bytes: usize,
}

/// One of them.
pub struct Pending {
    /// The slot of its client.
    pub connection: u32,
    serial: u32,
    /// The client's name for it.
    pub cookie: u64,
    bytes: usize,
    /// What its answer holds besides success.
    pub wanted: Wanted,
}

/// What a client gets when its request succeeds.
pub enum Wanted {
    /// The word that it did.
    Success,
    /// What a read finds from here on.
    Data {
        /// Where the read begins.
        offset: u64,
    },
    /// What the store says of a range; empty until it was asked.
    Status {
        /// Where the range begins.
        start: u64,
        /// What it said.
        extents: Vec<Extent>,
    },
}

impl Ledger {
    /// Takes a request in that needs so many bytes.
    pub fn enter(
        &mut self,
        connection: u32,
        cookie: u64,
        bytes: usize,
        wanted: Wanted,
    ) -> RequestId {
        self.serial = self.serial.wrapping_add(1);
        self.bytes += bytes;
        let slot = self.requests.insert(Pending {
            connection,
            serial: self.serial,
            cookie,
            bytes,
            wanted,
        });
        RequestId(u64::from(self.serial) << 32 | u64::from(slot))
    }

    /// A request under way.
    pub fn find(&mut self, request: RequestId) -> Option<&mut Pending> {
        let (slot, serial) = (request.0 as u32, (request.0 >> 32) as u32);
        self.requests
            .get_mut(slot)
            .filter(|known| known.serial == serial)
    }

    /// Takes out a request that is to be answered.
    pub fn leave(&mut self, request: RequestId) -> Option<Pending> {
        self.find(request)?;
        let pending = self.requests.remove(request.0 as u32)?;
        self.bytes -= pending.bytes;
        Some(pending)
    }

    /// Whether a request that needs so many bytes must wait for others.
    pub fn is_full(&self, bytes: usize) -> bool {
        self.bytes > 0 && self.bytes + bytes > REQUEST_BUDGET
    }

    /// Whether nothing with memory of its own is under way.
    pub fn is_idle(&self) -> bool {
        self.bytes == 0
    }

    /// Changes whenever a request gets in.
    pub fn serial(&self) -> u32 {
        self.serial
    }

    /// What [`Ledger::is_full`] goes by.
    #[cfg(test)]
    pub const BUDGET: usize = REQUEST_BUDGET;
}
