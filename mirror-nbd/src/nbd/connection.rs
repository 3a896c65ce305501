//! One NBD client in the transmission phase: how far it is, and what it is owed.

use crate::backend::{Descriptor, Token};
use crate::buffers::Buffer;
use crate::extents::Extent;
use crate::nbd::dialect::Dialect;
use crate::nbd::reply;
use crate::nbd::transmit::NbdError;
use crate::stream::{Incoming, Outlet};
use mirror_core::types::ByteRange;

/// Requests of one client in flight at most.
const REQUESTS: u32 = 256;

/// Bytes of replies that one client may leave unread before it gets no more in.
const REPLY_BUDGET: usize = 64 << 20;

/// A client's connection.
pub struct Connection {
    /// Its socket.
    pub socket: Descriptor,
    /// Its process, where that is known.
    pub pid: Option<i32>,
    /// Away while receiving.
    pub incoming: Option<Box<Incoming>>,
    /// What its next bytes are.
    pub next: Next,
    /// What leaves.
    pub outlet: Outlet,
    /// Bytes of replies not sent yet.
    pub owed: usize,
    /// Requests that got in and were not answered.
    pub pending: u32,
    /// How far it is.
    pub phase: Phase,
    dialect: Dialect,
}

/// How far a connection is. Phases only advance.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Requests get in.
    Open,
    /// What it is owed still leaves.
    Draining,
    /// It waits for its operations to end.
    Dead,
}

/// What a client sends next.
#[derive(Clone, Copy)]
pub enum Next {
    /// A request.
    Request,
    /// The payload of a write.
    Payload(GuestWrite),
    /// What belongs to a request that is refused. The answer waits for its end: a client that
    /// still sends a payload does not expect one.
    Refused {
        /// The client's name for the request.
        cookie: u64,
        /// What to answer.
        error: NbdError,
    },
}

/// A write without its payload.
#[derive(Clone, Copy)]
pub struct GuestWrite {
    /// The client's name for it.
    pub cookie: u64,
    /// Where to.
    pub range: ByteRange,
    /// Force unit access.
    pub fua: bool,
}

impl Connection {
    /// A connection that enters transmission.
    pub fn new(slot: u32, socket: Descriptor, pid: Option<i32>, dialect: Dialect) -> Connection {
        Connection {
            outlet: Outlet::new(Token::GuestSend(slot), socket.clone()),
            socket,
            pid,
            incoming: Some(Incoming::new()),
            next: Next::Request,
            owed: 0,
            pending: 0,
            phase: Phase::Open,
            dialect,
        }
    }

    /// What was agreed on with the client.
    pub fn dialect(&self) -> Dialect {
        self.dialect
    }

    /// Whether requests get in.
    pub fn is_open(&self) -> bool {
        self.phase == Phase::Open
    }

    /// Whether the client has as much under way as one may have.
    pub fn is_sated(&self) -> bool {
        self.pending >= REQUESTS || self.owed > REPLY_BUDGET
    }

    /// Queues the word that a request succeeded.
    pub fn answer_success(&mut self, cookie: u64) {
        self.push(reply::done(cookie).bytes());
    }

    /// Queues the answer to a request for nothing.
    pub fn answer_nothing(&mut self, cookie: u64) {
        self.push(reply::nothing(self.dialect, cookie).bytes());
    }

    /// Queues what a read found.
    pub fn answer_data(&mut self, cookie: u64, offset: u64, data: Buffer, len: usize) {
        self.push(reply::data(self.dialect, cookie, offset, len).bytes());
        self.owed += len;
        self.outlet.queue().push_payload(data, len);
    }

    /// Queues the status of a range.
    pub fn answer_status(&mut self, cookie: u64, extents: &[Extent]) {
        self.push(&reply::status(cookie, extents));
    }

    /// Queues an error.
    pub fn answer_error(&mut self, cookie: u64, error: NbdError) {
        self.push(&reply::error(self.dialect, cookie, error));
    }

    fn push(&mut self, bytes: &[u8]) {
        self.owed += bytes.len();
        self.outlet.queue().push_bytes(bytes);
    }
}
