//! The transmission phase of all of a mirror's clients, on the mirror's own thread.
//!
//! A connection moves through three phases: *open*; *draining*, when nothing more is taken from
//! it but what it is owed still leaves; and *dead*, when it only waits for its operations and
//! requests to end. A client gets more requests in only while there is memory for them: it waits,
//! it does not fail.

use crate::backend::{Backend, Descriptor, Operation, Token};
use crate::buffers::{Origin, Payloads, Pool};
use crate::nbd::transmit::{self, Judgement, NbdError, REQUEST_LEN, Request};
use crate::slots::Slots;
use crate::stream::{Incoming, Outgoing, Outlet};
use mirror_core::node::boundary::{GuestError, GuestOperation, Input, Payload, RequestId};
use nix::errno::Errno;
use nix::sys::socket::{Shutdown, shutdown};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;

/// Requests of one client in flight at most.
const REQUESTS_PER_CLIENT: u32 = 256;

/// Bytes of requests in flight at most, reads and writes of all clients together.
const REQUEST_BUDGET: usize = 192 << 20;

/// Bytes of payload memory beyond which clients wait, whatever it is used for.
const POOL_BUDGET: usize = 256 << 20;

/// Bytes of replies that one client may leave unread before it gets no more in.
const REPLY_BUDGET: usize = 64 << 20;

/// Clients of one mirror at most.
pub const MAX_CLIENTS: usize = 256;

/// All clients of a mirror.
#[derive(Default)]
pub struct Guests {
    connections: Slots<Connection>,
    ledger: Ledger,
    /// Size of the export while there is one.
    serving: Option<u64>,
    /// Connections that have something to send.
    unsent: Vec<u32>,
    /// Connections that may go on when memory or places are free again, the next in turn first.
    waiting: VecDeque<u32>,
}

struct Connection {
    socket: Descriptor,
    pid: Option<i32>,
    /// Away while receiving.
    incoming: Option<Box<Incoming>>,
    /// The write whose payload is being received.
    writing: Option<(Request, GuestWrite)>,
    outlet: Outlet,
    /// Bytes of replies not sent yet.
    owed: usize,
    pending: u32,
    phase: Phase,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Open,
    Draining,
    Dead,
}

#[derive(Clone, Copy)]
struct GuestWrite {
    range: mirror_core::types::ByteRange,
    fua: bool,
}

/// Requests that the core has not answered.
#[derive(Default)]
struct Ledger {
    requests: Slots<Pending>,
    /// Counts requests, so that no two share an id.
    serial: u32,
    /// Bytes of requests in flight.
    bytes: usize,
}

struct Pending {
    connection: u32,
    serial: u32,
    cookie: u64,
    bytes: usize,
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
    pub fn serve(&mut self, size: u64) {
        self.serving = Some(size);
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
        around: &mut Surroundings<'_, B>,
    ) {
        if self.serving.is_none() || self.connections.len() >= MAX_CLIENTS {
            return;
        }
        let socket = Descriptor::from(fd);
        let slot = self.connections.insert_with(|slot| Connection {
            outlet: Outlet::new(Token::GuestSend(slot), socket.clone()),
            socket,
            pid,
            incoming: Some(Incoming::new()),
            writing: None,
            owed: 0,
            pending: 0,
            phase: Phase::Open,
        });
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

    /// Carries out `Action::Complete`.
    pub fn complete(
        &mut self,
        request: RequestId,
        result: Result<Option<Payload>, GuestError>,
        payloads: &mut Payloads,
    ) {
        let data = match result {
            Ok(Some(payload)) => Some((payloads.take_back(payload), payload.len as usize)),
            _ => None,
        };
        let Some(pending) = self.ledger.leave(request) else {
            log::error!("an answer to a request that nobody made");
            return;
        };
        let Some(guest) = self.connections.get_mut(pending.connection) else {
            return;
        };
        guest.pending -= 1;
        if guest.phase != Phase::Dead {
            let outcome = result.map(|_| ()).map_err(NbdError::from);
            guest.answer(pending.cookie, outcome);
            if let Some((buffer, len)) = data {
                guest.owed += len;
                guest.outlet.queue().push_payload(buffer, len);
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
            let serial = self.ledger.serial;
            self.pump(slot, around);
            if self.ledger.serial != serial {
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
            guest.writing = None;
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

    /// Parses what was received and goes on receiving.
    fn pump<B: Backend>(&mut self, slot: u32, around: &mut Surroundings<'_, B>) {
        let Guests {
            connections,
            ledger,
            serving,
            unsent,
            waiting,
        } = self;
        let Some(guest) = connections.get_mut(slot) else {
            return;
        };
        let (Phase::Open, Some(size)) = (guest.phase, *serving) else {
            return;
        };
        let Some(mut incoming) = guest.incoming.take() else {
            return;
        };
        loop {
            if let Some((request, write)) = guest.writing {
                let Some(fresh) = incoming.take_payload() else {
                    break;
                };
                guest.writing = None;
                let len = write.range.len() as usize;
                let crc = crc32fast::hash(&fresh.bytes()[..len]);
                let buffer = fresh.freeze();
                let payload = around.payloads.lend(buffer, len as u32, crc, Origin::Local);
                let operation = GuestOperation::Write {
                    range: write.range,
                    payload,
                    fua: write.fua,
                };
                guest.pending += 1;
                let request = ledger.enter(slot, request.cookie, len);
                around.inputs.push_back(Input::Guest { request, operation });
                continue;
            }
            let Some(head) = incoming.peek::<REQUEST_LEN>() else {
                break;
            };
            let Some(request) = Request::decode(&head) else {
                log::warn!("a client sent something that is no NBD request; disconnecting it");
                guest.incoming = Some(incoming);
                self.set_phase(slot, Phase::Dead);
                return;
            };
            let judgement = request.judge(size);
            let need = match judgement {
                Judgement::Read(range) | Judgement::Write { range, .. } => range.len() as usize,
                _ => 0,
            };
            let crowded = ledger.bytes > 0
                && (ledger.bytes + need > REQUEST_BUDGET
                    || around.pool.in_use() + need > POOL_BUDGET);
            if crowded || guest.pending >= REQUESTS_PER_CLIENT || guest.owed > REPLY_BUDGET {
                guest.incoming = Some(incoming);
                waiting.push_back(slot);
                return;
            }
            incoming.consume(REQUEST_LEN);
            let cookie = request.cookie;
            let operation = match judgement {
                Judgement::Read(range) => GuestOperation::Read(range),
                Judgement::Zero {
                    range,
                    may_unmap,
                    fua,
                } => GuestOperation::Zero {
                    range,
                    may_unmap,
                    fua,
                },
                Judgement::Flush => GuestOperation::Flush,
                Judgement::Write { range, fua } => {
                    incoming.begin_payload(around.pool.fresh(need), need);
                    guest.writing = Some((request, GuestWrite { range, fua }));
                    continue;
                }
                Judgement::Nothing => {
                    guest.answer(cookie, Ok(()));
                    unsent.push(slot);
                    continue;
                }
                Judgement::Refuse { error, payload } => {
                    incoming.skip(u64::from(payload));
                    guest.answer(cookie, Err(error));
                    unsent.push(slot);
                    continue;
                }
                Judgement::Disconnect => {
                    guest.incoming = Some(incoming);
                    self.set_phase(slot, Phase::Draining);
                    return;
                }
            };
            guest.pending += 1;
            let request = ledger.enter(slot, cookie, need);
            around.inputs.push_back(Input::Guest { request, operation });
        }
        let socket = guest.socket.clone();
        let into = incoming;
        around.backend.submit(
            Token::GuestReceive(slot),
            Operation::Receive { socket, into },
        );
    }
}

impl Ledger {
    fn enter(&mut self, connection: u32, cookie: u64, bytes: usize) -> RequestId {
        self.serial = self.serial.wrapping_add(1);
        self.bytes += bytes;
        let slot = self.requests.insert(Pending {
            connection,
            serial: self.serial,
            cookie,
            bytes,
        });
        RequestId(u64::from(self.serial) << 32 | u64::from(slot))
    }

    fn leave(&mut self, request: RequestId) -> Option<Pending> {
        let (slot, serial) = (request.0 as u32, (request.0 >> 32) as u32);
        self.requests
            .get(slot)
            .filter(|known| known.serial == serial)?;
        let pending = self.requests.remove(slot)?;
        self.bytes -= pending.bytes;
        Some(pending)
    }
}

impl Connection {
    fn is_open(&self) -> bool {
        self.phase == Phase::Open
    }

    fn answer(&mut self, cookie: u64, result: Result<(), NbdError>) {
        self.owed += transmit::REPLY_LEN;
        self.outlet
            .queue()
            .push_bytes(&transmit::reply(cookie, result));
    }
}

#[cfg(test)]
mod tests;
