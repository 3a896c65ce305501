//! The transmission phase of all of a mirror's clients, on the mirror's own thread.
//!
//! A connection moves through three phases: *open*; *draining*, when nothing more is taken from
//! it but what it is owed still leaves; and *dead*, when it only waits for its operations and
//! requests to end. A client gets more requests in only while there is memory for them: it waits,
//! it does not fail.

use crate::backend::{Backend, Descriptor, Operation, Token};
use crate::backing::Outline;
use crate::buffers::{Buffer, Payloads, Pool};
use crate::nbd::connection::{Connection, Next, Phase};
use crate::nbd::dialect::Dialect;
use crate::nbd::intake::{Intake, Pause, Serving};
use crate::nbd::ledger::{Ledger, Wanted};
use crate::nbd::transmit::NbdError;
use crate::slots::Slots;
use crate::stream::{Incoming, Outgoing};
use mirror_core::limits::SECTOR;
use mirror_core::node::boundary::{GuestError, GuestOperation, Input, Payload, RequestId};
use mirror_core::types::ByteRange;
use nix::errno::Errno;
use nix::sys::socket::{Shutdown, shutdown};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;

/// Clients of one mirror at most.
pub const MAX_CLIENTS: usize = 256;

/// All clients of a mirror.
#[derive(Default)]
pub struct Guests {
    connections: Slots<Connection>,
    ledger: Ledger,
    /// The export while there is one.
    serving: Option<Serving>,
    /// Connections that have something to send.
    unsent: Vec<u32>,
    /// Connections that may go on when memory or places are free again, the next in turn first.
    waiting: VecDeque<u32>,
}

/// What the parser needs besides the clients themselves.
pub struct Surroundings<'a, B> {
    /// Where receiving is started.
    pub backend: &'a mut B,
    /// Where payloads come from.
    pub pool: &'a Pool,
    /// Where the core's payloads are kept.
    pub payloads: &'a mut Payloads,
    /// What is to be told to the core.
    pub inputs: &'a mut VecDeque<Input>,
}

impl Guests {
    /// How many clients are connected.
    pub fn count(&self) -> usize {
        self.open().count()
    }

    /// Process ids of the clients, where they are known.
    pub fn pids(&self) -> Vec<i32> {
        self.open().filter_map(|guest| guest.pid).collect()
    }

    /// Whether nothing of any client is left.
    pub fn is_empty(&self) -> bool {
        self.connections.is_empty()
    }

    /// Carries out `Action::Serve(true)`.
    pub fn serve(&mut self, size: u64, store: Outline) {
        self.serving = Some(Serving { size, store });
    }

    /// Carries out `Action::Serve(false)`: every client gets what it is owed, and no more.
    pub fn drain(&mut self) {
        self.serving = None;
        self.each(|guests, slot| {
            if guests
                .connections
                .get(slot)
                .is_some_and(Connection::is_open)
            {
                guests.set_phase(slot, Phase::Draining);
            }
        });
    }

    /// Parts with all clients at once.
    pub fn abort(&mut self) {
        self.serving = None;
        self.each(|guests, slot| guests.set_phase(slot, Phase::Dead));
    }

    /// Takes over a connection whose negotiation is complete.
    pub fn adopt<B: Backend>(
        &mut self,
        fd: OwnedFd,
        pid: Option<i32>,
        dialect: Dialect,
        around: &mut Surroundings<'_, B>,
    ) {
        if self.serving.is_none() || self.connections.len() >= MAX_CLIENTS {
            return;
        }
        let socket = Descriptor::from(fd);
        let slot = self
            .connections
            .insert_with(|slot| Connection::new(slot, socket, pid, dialect));
        self.pump(slot, around);
    }

    /// A receiving ended.
    pub fn received<B: Backend>(
        &mut self,
        slot: u32,
        mut incoming: Box<Incoming>,
        result: Result<u32, Errno>,
        around: &mut Surroundings<'_, B>,
    ) {
        let Some(guest) = self.connections.get_mut(slot) else {
            return;
        };
        let phase = match result {
            Ok(0) => Some(Phase::Draining),
            Ok(count) => {
                incoming.received(count as usize);
                None
            }
            Err(Errno::EINTR | Errno::EAGAIN) => None,
            Err(_) => Some(Phase::Dead),
        };
        guest.incoming = Some(incoming);
        match phase {
            None => self.pump(slot, around),
            // Of a draining connection only the end is of interest, and here it is.
            Some(phase) => self.set_phase(slot, phase),
        }
        self.settle(slot);
    }

    /// A sending ended.
    pub fn sent(
        &mut self,
        slot: u32,
        what: Box<Outgoing>,
        result: Result<u32, Errno>,
        backend: &mut impl Backend,
    ) {
        let Some(guest) = self.connections.get_mut(slot) else {
            return;
        };
        match guest.outlet.sent(what, result, backend) {
            Ok(count) => guest.owed = guest.owed.saturating_sub(count as usize),
            Err(_) => self.set_phase(slot, Phase::Dead),
        }
        self.unsent.push(slot);
        self.settle(slot);
    }

    /// The store was asked for a request: to answer it, or to go on with it.
    pub fn looked(
        &mut self,
        request: RequestId,
        operation: Operation,
        inputs: &mut VecDeque<Input>,
    ) {
        let Some(pending) = self.ledger.find(request) else {
            log::error!("an answer to a question that nobody asked");
            return;
        };
        if let (Wanted::Status { start, extents }, Operation::Map { survey, .. }) =
            (&mut pending.wanted, operation)
        {
            *extents = survey.found();
            let operation = GuestOperation::Read(ByteRange::new(*start, SECTOR));
            inputs.push_back(Input::Guest { request, operation });
        } else {
            self.answer(request, Ok(None));
        }
    }

    /// Carries out `Action::Complete`.
    pub fn complete(
        &mut self,
        request: RequestId,
        result: Result<Option<Payload>, GuestError>,
        payloads: &mut Payloads,
    ) {
        let data = result.map(|payload| {
            payload.map(|payload| (payloads.take_back(payload), payload.len as usize))
        });
        self.answer(request, data);
    }

    fn answer(&mut self, request: RequestId, result: Result<Option<(Buffer, usize)>, GuestError>) {
        let Some(pending) = self.ledger.leave(request) else {
            log::error!("an answer to a request that nobody made");
            return;
        };
        let Some(guest) = self.connections.get_mut(pending.connection) else {
            return;
        };
        guest.pending -= 1;
        if guest.phase != Phase::Dead {
            let cookie = pending.cookie;
            match (result, pending.wanted) {
                (Err(error), _) => guest.answer_error(cookie, NbdError::from(error)),
                (Ok(Some((data, len))), Wanted::Data { offset }) => {
                    guest.answer_data(cookie, offset, data, len);
                }
                (Ok(_), Wanted::Status { extents, .. }) => {
                    guest.answer_status(cookie, &extents);
                }
                (Ok(_), Wanted::Success | Wanted::Data { .. }) => guest.answer_success(cookie),
            }
            self.unsent.push(pending.connection);
        }
        self.settle(pending.connection);
    }

    /// Starts to send what was queued since the last time.
    pub fn flush(&mut self, backend: &mut impl Backend) {
        while let Some(slot) = self.unsent.pop() {
            if let Some(guest) = self.connections.get_mut(slot) {
                guest.outlet.flush(backend);
            }
            self.settle(slot);
        }
    }

    /// Lets those that waited go on, if they can: in turn, so that none takes all there is.
    pub fn resume<B: Backend>(&mut self, around: &mut Surroundings<'_, B>) {
        let mut served = 0;
        let mut left = self.waiting.len();
        while left > 0
            && let Some(slot) = self.waiting.pop_front()
        {
            left -= 1;
            let serial = self.ledger.serial();
            self.pump(slot, around);
            if self.ledger.serial() != serial {
                served = self.waiting.len() - left;
            }
            self.settle(slot);
        }
        // Next time it begins behind the last one that got something in.
        self.waiting.rotate_left(served);
    }

    fn open(&self) -> impl Iterator<Item = &Connection> {
        let all = self.connections.iter().map(|(_, guest)| guest);
        all.filter(|guest| guest.phase == Phase::Open)
    }

    fn each(&mut self, mut what: impl FnMut(&mut Guests, u32)) {
        let slots: Vec<u32> = self.connections.iter().map(|(slot, _)| slot).collect();
        for slot in slots {
            what(self, slot);
            self.settle(slot);
        }
    }

    /// Phases only advance.
    fn set_phase(&mut self, slot: u32, phase: Phase) {
        let Some(guest) = self.connections.get_mut(slot) else {
            return;
        };
        if guest.phase == Phase::Dead {
            return;
        }
        guest.phase = phase;
        if phase == Phase::Dead {
            guest.outlet.discard();
            guest.next = Next::Request;
            // Ends the operations that are under way. An error means that it is closed already.
            let _ = shutdown(guest.socket.raw(), Shutdown::Both);
        }
    }

    /// Lets go of a connection that is through.
    fn settle(&mut self, slot: u32) {
        let Some(guest) = self.connections.get(slot) else {
            return;
        };
        let idle = guest.pending == 0 && guest.outlet.is_empty();
        if guest.phase == Phase::Draining && idle {
            self.set_phase(slot, Phase::Dead);
        }
        let Some(guest) = self.connections.get(slot) else {
            return;
        };
        if guest.phase == Phase::Dead && idle && guest.incoming.is_some() {
            self.connections.remove(slot);
        }
    }

    /// Lets requests in from what was received, and goes on receiving.
    fn pump<B: Backend>(&mut self, slot: u32, around: &mut Surroundings<'_, B>) {
        let Some(guest) = self.connections.get_mut(slot) else {
            return;
        };
        let (Phase::Open, Some(serving)) = (guest.phase, &self.serving) else {
            return;
        };
        let Some(mut incoming) = guest.incoming.take() else {
            return;
        };
        let mut intake = Intake {
            slot,
            guest,
            ledger: &mut self.ledger,
            serving,
            around,
        };
        let pause = intake.run(&mut incoming);
        // What was answered on the spot.
        self.unsent.push(slot);
        match pause {
            Pause::Starved => {
                let socket = guest.socket.clone();
                let into = incoming;
                around.backend.submit(
                    Token::GuestReceive(slot),
                    Operation::Receive { socket, into },
                );
            }
            Pause::Crowded => {
                guest.incoming = Some(incoming);
                self.waiting.push_back(slot);
            }
            Pause::Over(phase) => {
                guest.incoming = Some(incoming);
                self.set_phase(slot, phase);
            }
        }
    }
}

#[cfg(test)]
mod tests;
