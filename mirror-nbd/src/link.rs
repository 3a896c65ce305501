//! The mirror link's connections on the mirror's thread: bytes to frames and back.
//!
//! At most one connection is current; a newer one takes its place. Connections the core closed
//! linger for a moment, so that the last words queued on them can leave, and are silent from then
//! on. How connections come about is [`crate::peer`]'s business; [`Seek`] is what the two share.

use crate::backend::{Backend, Descriptor, Operation, Token};
use crate::buffers::{Buffer, Origin};
use crate::nbd::server::Surroundings;
use crate::slots::Slots;
use crate::stream::{Incoming, Outgoing, Outlet};
use mirror_core::node::boundary::{Body, ConnectionId, Input};
use mirror_core::types::Time;
use mirror_core::wire::{HEADER_LEN, Header, PayloadKind};
use nix::errno::Errno;
use nix::sys::socket::{Shutdown, shutdown};
use std::os::fd::OwnedFd;
use std::time::Duration;
use tokio::sync::watch;

/// How long the last words of a closed connection may take.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// Bytes of the peer's payloads that may wait for the local disk; beyond it the peer waits.
const PAYLOAD_BUDGET: usize = 256 << 20;

/// Whether connections to the peer are wanted; written by the mirror, read by [`crate::peer`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Seek {
    /// Between `StartConnecting` and the connection or `StopConnecting`.
    pub wanted: bool,
    /// A connection stands, which a newer one may replace.
    pub linked: bool,
    /// Counts `StartConnecting`.
    pub round: u64,
}

/// The link of one mirror.
pub struct Link {
    mirror: String,
    connections: Slots<Connection>,
    current: Option<u32>,
    last_id: u64,
    seek: watch::Sender<Seek>,
    unsent: Vec<u32>,
    /// Waits for memory.
    waiting: bool,
    /// Bytes sent to the peer, framing included.
    pub sent_bytes: u64,
    /// Bytes received from it.
    pub received_bytes: u64,
}

struct Connection {
    id: ConnectionId,
    socket: Descriptor,
    /// Away while receiving.
    incoming: Option<Box<Incoming>>,
    /// The frame whose payload is being received.
    frame: Option<Header>,
    /// Whether a byte came from the peer.
    heard: bool,
    outlet: Outlet,
    phase: Phase,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Open,
    /// Closed by the core: sends what was queued, and hears nothing.
    Parting {
        until: Time,
        said: bool,
    },
    Dead,
}

impl Link {
    /// A link that looks for nobody.
    pub fn new(mirror: String, seek: watch::Sender<Seek>) -> Link {
        seek.send_modify(|seek| {
            seek.wanted = false;
            seek.linked = false;
        });
        Link {
            mirror,
            connections: Slots::default(),
            current: None,
            last_id: 0,
            seek,
            unsent: Vec::new(),
            waiting: false,
            sent_bytes: 0,
            received_bytes: 0,
        }
    }

    /// Carries out `Action::StartConnecting`.
    pub fn start_connecting(&mut self) {
        self.seek.send_modify(|seek| {
            seek.wanted = true;
            seek.round += 1;
        });
    }

    /// Carries out `Action::StopConnecting`.
    pub fn stop_connecting(&mut self) {
        self.seek.send_modify(|seek| seek.wanted = false);
    }

    /// Takes over a connection to the peer, unless it is not wanted any more.
    pub fn adopt<B: Backend>(&mut self, fd: OwnedFd, around: &mut Surroundings<'_, B>) {
        let seek = *self.seek.borrow();
        if !seek.wanted && !seek.linked {
            return;
        }
        if let Some(old) = self.current.take() {
            self.kill(old);
        }
        self.last_id += 1;
        let id = ConnectionId(self.last_id);
        let socket = Descriptor::from(fd);
        let slot = self.connections.insert_with(|slot| Connection {
            id,
            outlet: Outlet::new(Token::LinkSend(slot), socket.clone()),
            socket,
            incoming: Some(Incoming::new()),
            frame: None,
            heard: false,
            phase: Phase::Open,
        });
        self.current = Some(slot);
        self.seek.send_modify(|seek| {
            seek.wanted = false;
            seek.linked = true;
        });
        around.inputs.push_back(Input::LinkUp { connection: id });
        self.pump(slot, around);
    }

    /// Carries out `Action::Close`.
    pub fn close(&mut self, connection: ConnectionId, now: Time) {
        let Some(slot) = self.slot_of(connection) else {
            return;
        };
        if self.current == Some(slot) {
            self.no_current();
        }
        if let Some(known) = self.connections.get_mut(slot)
            && known.phase == Phase::Open
        {
            known.phase = Phase::Parting {
                until: now.after(LAST_WORDS),
                said: false,
            };
            self.unsent.push(slot);
        }
    }

    /// Carries out `Action::Send`; `payload` is the data that belongs to a `Body::Data`.
    pub fn send(
        &mut self,
        connection: ConnectionId,
        header: &Header,
        body: &Body,
        payload: Option<Buffer>,
    ) {
        let slot = self.current.filter(|slot| {
            let current = self.connections.get(*slot);
            current.is_some_and(|known| known.id == connection)
        });
        let Some(slot) = slot else {
            return;
        };
        let Some(known) = self.connections.get_mut(slot) else {
            return;
        };
        let queue = known.outlet.queue();
        queue.push_bytes(&header.encode());
        match (body, payload) {
            (Body::Control(bytes), _) => queue.push_bytes(bytes),
            (Body::Data(data), Some(buffer)) => queue.push_payload(buffer, data.len as usize),
            _ => {}
        }
        self.unsent.push(slot);
    }

    /// A receiving ended.
    pub fn received<B: Backend>(
        &mut self,
        slot: u32,
        mut incoming: Box<Incoming>,
        result: Result<u32, Errno>,
        around: &mut Surroundings<'_, B>,
    ) {
        let Some(known) = self.connections.get_mut(slot) else {
            return;
        };
        let end = match result {
            Ok(0) => Some("closed by the peer".to_owned()),
            Ok(count) => {
                self.received_bytes += u64::from(count);
                known.heard = true;
                incoming.received(count as usize);
                None
            }
            Err(Errno::EINTR | Errno::EAGAIN) => None,
            Err(errno) => Some(errno.desc().to_owned()),
        };
        known.incoming = Some(incoming);
        let connection = known.id;
        let told = around.inputs.len();
        match end {
            None => {
                self.pump(slot, around);
                // Part of a large frame: the peer lives, and the core should know.
                if around.inputs.len() == told {
                    around.inputs.push_back(Input::Heard { connection });
                }
            }
            Some(why) => self.broken(slot, &why, around),
        }
        self.settle(slot);
    }

    /// A sending ended.
    pub fn sent<B: Backend>(
        &mut self,
        slot: u32,
        what: Box<Outgoing>,
        result: Result<u32, Errno>,
        around: &mut Surroundings<'_, B>,
    ) {
        let Some(known) = self.connections.get_mut(slot) else {
            return;
        };
        match known.outlet.sent(what, result, around.backend) {
            Ok(count) => self.sent_bytes += u64::from(count),
            Err(errno) => self.broken(slot, errno.desc(), around),
        }
        self.unsent.push(slot);
        self.settle(slot);
    }

    /// Starts to send what was queued since the last time.
    pub fn flush(&mut self, backend: &mut impl Backend) {
        while let Some(slot) = self.unsent.pop() {
            if let Some(known) = self.connections.get_mut(slot) {
                known.outlet.flush(backend);
            }
            self.settle(slot);
        }
    }

    /// Goes on receiving where memory was short.
    pub fn resume<B: Backend>(&mut self, around: &mut Surroundings<'_, B>) {
        if std::mem::take(&mut self.waiting)
            && let Some(slot) = self.current
        {
            self.pump(slot, around);
            self.settle(slot);
        }
    }

    /// When a closed connection's time is over.
    pub fn next_deadline(&self) -> Option<Time> {
        let phases = self.connections.iter().map(|(_, known)| known.phase);
        phases
            .filter_map(|phase| match phase {
                Phase::Parting { until, .. } => Some(until),
                _ => None,
            })
            .min()
    }

    /// Ends closed connections whose time is over.
    pub fn expire(&mut self, now: Time) {
        loop {
            let over = |phase| matches!(phase, Phase::Parting { until, .. } if until <= now);
            let mut all = self.connections.iter();
            let due = all.find(|(_, known)| over(known.phase));
            let Some(slot) = due.map(|(slot, _)| slot) else {
                return;
            };
            drop(all);
            self.kill(slot);
        }
    }

    /// The mirror goes down: a connection that still stands gets its last words out.
    pub fn leave(&mut self, now: Time) {
        self.stop_connecting();
        let current = self.current.and_then(|slot| self.connections.get(slot));
        if let Some(connection) = current.map(|known| known.id) {
            self.close(connection, now);
        }
    }

    fn slot_of(&self, connection: ConnectionId) -> Option<u32> {
        let mut all = self.connections.iter();
        all.find(|(_, known)| known.id == connection)
            .map(|(slot, _)| slot)
    }

    fn no_current(&mut self) {
        self.current = None;
        self.waiting = false;
        self.seek.send_modify(|seek| seek.linked = false);
    }

    /// Ends a connection without a word to the core.
    fn kill(&mut self, slot: u32) {
        if let Some(known) = self.connections.get_mut(slot) {
            known.phase = Phase::Dead;
            known.outlet.discard();
            known.frame = None;
            // Ends the operations that are under way. An error means that it is closed already.
            let _ = shutdown(known.socket.raw(), Shutdown::Both);
        }
        self.settle(slot);
    }

    /// Ends a connection that failed, and tells the core if it still cared.
    fn broken<B: Backend>(&mut self, slot: u32, why: &str, around: &mut Surroundings<'_, B>) {
        if self.current == Some(slot)
            && let Some(known) = self.connections.get(slot)
        {
            // A peer that wants no connection, StandAlone say, closes each at once without a word:
            // that is not worth a line every few seconds.
            let level = if known.heard {
                log::Level::Info
            } else {
                log::Level::Debug
            };
            log::log!(level, "{}: the link to the peer ended: {why}", self.mirror);
            let connection = known.id;
            around.inputs.push_back(Input::LinkDown { connection });
            self.no_current();
        }
        self.kill(slot);
    }

    /// Lets go of a connection that is through.
    fn settle(&mut self, slot: u32) {
        let Some(known) = self.connections.get_mut(slot) else {
            return;
        };
        let quiet = known.outlet.is_empty();
        match &mut known.phase {
            Phase::Parting { said, .. } if quiet && !*said => {
                *said = true;
                // Only this half, so that the peer reads our last words before the end; a full
                // close could overtake them with a reset.
                let _ = shutdown(known.socket.raw(), Shutdown::Write);
            }
            Phase::Dead if quiet && known.incoming.is_some() => {
                self.connections.remove(slot);
            }
            _ => {}
        }
    }

    /// Parses what was received and goes on receiving.
    fn pump<B: Backend>(&mut self, slot: u32, around: &mut Surroundings<'_, B>) {
        let Some(known) = self.connections.get_mut(slot) else {
            return;
        };
        let Some(mut incoming) = known.incoming.take() else {
            return;
        };
        let outcome = match known.phase {
            Phase::Open => known.parse(&mut incoming, around),
            Phase::Parting { .. } => {
                incoming.forget();
                Parsed::All
            }
            Phase::Dead => Parsed::Wait,
        };
        match outcome {
            Parsed::All => {
                let socket = known.socket.clone();
                let into = incoming;
                let receive = Operation::Receive { socket, into };
                around.backend.submit(Token::LinkReceive(slot), receive);
            }
            Parsed::Wait => {
                known.incoming = Some(incoming);
                self.waiting |= self.current == Some(slot);
            }
            Parsed::Garbage(why) => {
                known.incoming = Some(incoming);
                self.broken(slot, &why, around);
            }
        }
    }
}

enum Parsed {
    All,
    Wait,
    Garbage(String),
}

impl Connection {
    fn parse<B: Backend>(
        &mut self,
        incoming: &mut Incoming,
        around: &mut Surroundings<'_, B>,
    ) -> Parsed {
        let connection = self.id;
        loop {
            if let Some(header) = self.frame {
                let Some(fresh) = incoming.take_payload() else {
                    return Parsed::All;
                };
                self.frame = None;
                let len = header.payload_len as usize;
                let bytes = &fresh.bytes()[..len];
                let crc = crc32fast::hash(bytes);
                if crc != header.payload_crc {
                    return Parsed::Garbage(format!("{:?} frame with a bad payload", header.kind));
                }
                let body = match header.kind.payload_kind() {
                    PayloadKind::Data { .. } => {
                        let buffer = fresh.freeze();
                        let lent = around.payloads.lend(buffer, len as u32, crc, Origin::Link);
                        Body::Data(lent)
                    }
                    _ => Body::Control(bytes.to_vec()),
                };
                around.inputs.push_back(Input::Frame {
                    connection,
                    header,
                    body,
                });
                continue;
            }
            let Some(head) = incoming.peek::<HEADER_LEN>() else {
                return Parsed::All;
            };
            let header = match Header::decode(&head) {
                Ok(header) => header,
                Err(error) => return Parsed::Garbage(error.to_string()),
            };
            let len = header.payload_len as usize;
            let held = around.payloads.of_link();
            if held > 0 && held + len > PAYLOAD_BUDGET {
                return Parsed::Wait;
            }
            incoming.consume(HEADER_LEN);
            if len > 0 {
                incoming.begin_payload(around.pool.fresh(len), len);
                self.frame = Some(header);
                continue;
            }
            // A control frame without a payload still has a body: an empty one.
            let body = match header.kind.payload_kind() {
                PayloadKind::Control { .. } => Body::Control(Vec::new()),
                _ => Body::None,
            };
            around.inputs.push_back(Input::Frame {
                connection,
                header,
                body,
            });
        }
    }
}
