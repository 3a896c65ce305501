//! The two directions of a byte stream, as both the NBD server and the mirror link use them.
//!
//! Receiving ([`Incoming`]) goes through a staging area, from which one system call's worth of
//! small requests is parsed at once. A payload is copied from it at most once, into the aligned
//! buffer it keeps until disk; what of it has not arrived yet is received there directly.
//! Sending ([`Outlet`]) gathers everything queued since the last system call into one.

use crate::backend::{Backend, Descriptor, Operation, Token};
use crate::buffers::{Buffer, Fresh};
use nix::errno::Errno;

/// Bytes of a staging area: dozens of small requests, yet within a core's own cache.
const STAGING: usize = 256 << 10;

/// From this much of a missing payload on, the rest is received by itself and whole, instead of
/// together with what follows it.
const WHOLE: usize = 64 << 10;

/// Most of a payload that one system call waits for: at the end of each piece the peer is known
/// to live, however slow the link.
const PIECE: usize = 1 << 20;

/// How much is received into the staging area at once after a payload of at least [`WHOLE`]: the
/// next one is likely to be as large, and what of it lands in the staging area must be copied.
const AFTER_LARGE: usize = 1 << 10;

/// What was received and not yet consumed.
#[derive(Debug)]
pub struct Incoming {
    staging: Box<[u8]>,
    start: usize,
    end: usize,
    payload: Option<Filling>,
    /// Whether the last payload was large.
    was_large: bool,
    /// Bytes of a refused payload that are to be passed over.
    skip: u64,
}

#[derive(Debug)]
struct Filling {
    buffer: Fresh,
    filled: usize,
    len: usize,
}

impl Incoming {
    /// Nothing received yet.
    pub fn new() -> Box<Incoming> {
        Box::new(Incoming {
            staging: vec![0; STAGING].into_boxed_slice(),
            start: 0,
            end: 0,
            payload: None,
            was_large: false,
            skip: 0,
        })
    }

    /// The next `N` bytes, without consuming them; `None` while there are fewer or a payload is
    /// being received.
    pub fn peek<const N: usize>(&mut self) -> Option<[u8; N]> {
        let passed = self.skip.min((self.end - self.start) as u64);
        self.start += passed as usize;
        self.skip -= passed;
        if self.skip > 0 || self.payload.is_some() {
            return None;
        }
        self.staging[self.start..self.end]
            .first_chunk::<N>()
            .copied()
    }

    /// Passes over `n` bytes that were peeked at.
    pub fn consume(&mut self, n: usize) {
        debug_assert!(n <= self.end - self.start);
        self.start += n;
    }

    /// Lets the next `n` bytes go by, whenever they arrive.
    pub fn skip(&mut self, n: u64) {
        self.skip += n;
    }

    /// The next `len` bytes are a payload for `buffer`.
    pub fn begin_payload(&mut self, mut buffer: Fresh, len: usize) {
        let here = len.min(self.end - self.start);
        buffer.bytes_mut()[..here].copy_from_slice(&self.staging[self.start..self.start + here]);
        self.start += here;
        self.was_large = len >= WHOLE;
        self.payload = Some(Filling {
            buffer,
            filled: here,
            len,
        });
    }

    /// The payload that was begun, once it is whole.
    pub fn take_payload(&mut self) -> Option<Fresh> {
        let filling = self
            .payload
            .take_if(|filling| filling.filled == filling.len)?;
        Some(filling.buffer)
    }

    /// Takes note of `n` bytes received into [`Incoming::slices`].
    pub fn received(&mut self, n: usize) {
        let mut rest = n;
        if let Some(filling) = &mut self.payload {
            let here = rest.min(filling.len - filling.filled);
            filling.filled += here;
            rest -= here;
        }
        self.end += rest;
        debug_assert!(self.end <= self.staging.len());
    }

    /// Throws away all that was received.
    pub fn forget(&mut self) {
        self.start = 0;
        self.end = 0;
        self.skip = 0;
        self.payload = None;
    }

    /// Whether the next receiving should wait until all that was asked for is there.
    pub fn wants_all(&self) -> bool {
        self.payload
            .as_ref()
            .is_some_and(|filling| filling.len - filling.filled >= WHOLE)
    }

    /// Where the next bytes belong, in order; either may be empty, not both.
    pub fn slices(&mut self) -> [&mut [u8]; 2] {
        if self.start > 0 {
            self.staging.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let alone = self.wants_all();
        let direct: &mut [u8] = match &mut self.payload {
            Some(filling) => {
                let end = filling.len.min(filling.filled + PIECE);
                &mut filling.buffer.bytes_mut()[filling.filled..end]
            }
            None => &mut [],
        };
        let staged: &mut [u8] = if alone {
            &mut []
        } else if self.was_large {
            let end = self.staging.len().min(self.end + AFTER_LARGE);
            &mut self.staging[self.end..end]
        } else {
            &mut self.staging[self.end..]
        };
        [direct, staged]
    }
}

/// What is to be sent: pieces, in order.
#[derive(Debug, Default)]
pub struct Outgoing {
    arena: Vec<u8>,
    pieces: Vec<Piece>,
    /// First piece not sent whole …
    next: usize,
    /// … and how much of it was.
    sent: usize,
}

#[derive(Debug)]
enum Piece {
    Arena { start: usize, end: usize },
    Payload { buffer: Buffer, len: usize },
}

impl Outgoing {
    /// Whether all is sent.
    pub fn is_empty(&self) -> bool {
        self.next == self.pieces.len()
    }

    /// Appends bytes by copying them.
    pub fn push_bytes(&mut self, bytes: &[u8]) {
        let start = self.arena.len();
        self.arena.extend_from_slice(bytes);
        let end = self.arena.len();
        match self.pieces.last_mut() {
            Some(Piece::Arena { end: last, .. }) => *last = end,
            _ => self.pieces.push(Piece::Arena { start, end }),
        }
    }

    /// Appends the first `len` bytes of a buffer.
    pub fn push_payload(&mut self, buffer: Buffer, len: usize) {
        self.pieces.push(Piece::Payload { buffer, len });
    }

    /// What is left to send, in order.
    pub fn slices(&self) -> impl Iterator<Item = &[u8]> {
        let mut skip = self.sent;
        self.pieces[self.next..].iter().map(move |piece| {
            let whole = self.bytes_of(piece);
            &whole[std::mem::take(&mut skip)..]
        })
    }

    /// Takes note of `n` bytes sent.
    pub fn advance(&mut self, mut n: usize) {
        while let Some(piece) = self.pieces.get(self.next) {
            let left = self.bytes_of(piece).len() - self.sent;
            if n < left {
                self.sent += n;
                return;
            }
            n -= left;
            self.next += 1;
            self.sent = 0;
        }
    }

    fn bytes_of<'a>(&'a self, piece: &'a Piece) -> &'a [u8] {
        match piece {
            Piece::Arena { start, end } => &self.arena[*start..*end],
            Piece::Payload { buffer, len } => &buffer.bytes()[..*len],
        }
    }

    fn clear(&mut self) {
        self.arena.clear();
        self.pieces.clear();
        self.next = 0;
        self.sent = 0;
    }
}

/// The sending half of a connection: at most one operation, and what waits behind it.
pub struct Outlet {
    token: Token,
    socket: Descriptor,
    queue: Box<Outgoing>,
    /// The other queue; away while it is being sent.
    spare: Option<Box<Outgoing>>,
}

impl Outlet {
    /// Nothing to send yet.
    pub fn new(token: Token, socket: Descriptor) -> Outlet {
        Outlet {
            token,
            socket,
            queue: Box::default(),
            spare: Some(Box::default()),
        }
    }

    /// What leaves with the next [`Outlet::flush`].
    pub fn queue(&mut self) -> &mut Outgoing {
        &mut self.queue
    }

    /// Whether an operation is under way.
    pub fn is_sending(&self) -> bool {
        self.spare.is_none()
    }

    /// Whether all has left.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty() && !self.is_sending()
    }

    /// Throws away what is not under way yet.
    pub fn discard(&mut self) {
        self.queue.clear();
    }

    /// Starts to send what is queued, unless an earlier sending is under way.
    pub fn flush(&mut self, backend: &mut impl Backend) {
        if self.queue.is_empty() {
            return;
        }
        if let Some(spare) = self.spare.take() {
            let what = std::mem::replace(&mut self.queue, spare);
            let socket = self.socket.clone();
            backend.submit(self.token, Operation::Send { socket, what });
        }
    }

    /// An operation ended: goes on with its rest, or gets ready for the next.
    ///
    /// # Errors
    ///
    /// The connection is of no use any more.
    pub fn sent(
        &mut self,
        mut what: Box<Outgoing>,
        result: Result<u32, Errno>,
        backend: &mut impl Backend,
    ) -> Result<u32, Errno> {
        let (count, outcome) = match result {
            Ok(count) => (count, Ok(count)),
            Err(Errno::EINTR | Errno::EAGAIN) => (0, Ok(0)),
            Err(errno) => (0, Err(errno)),
        };
        what.advance(count as usize);
        if outcome.is_ok() && !what.is_empty() {
            let socket = self.socket.clone();
            backend.submit(self.token, Operation::Send { socket, what });
        } else {
            what.clear();
            self.spare = Some(what);
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffers::Pool;

    fn receive(incoming: &mut Incoming, mut bytes: &[u8]) {
        let total = bytes.len();
        for slice in incoming.slices() {
            let n = slice.len().min(bytes.len());
            slice[..n].copy_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
        }
        assert!(bytes.is_empty());
        incoming.received(total);
    }

    #[test]
    fn small_messages_are_parsed_from_one_receiving() {
        let mut incoming = Incoming::new();
        receive(&mut incoming, b"aabbc");
        assert_eq!(incoming.peek::<2>(), Some(*b"aa"));
        incoming.consume(2);
        assert_eq!(incoming.peek::<2>(), Some(*b"bb"));
        incoming.consume(2);
        assert_eq!(incoming.peek::<2>(), None);
        receive(&mut incoming, b"c");
        assert_eq!(incoming.peek::<2>(), Some(*b"cc"));
    }

    #[test]
    fn a_payload_is_split_between_staging_and_its_buffer() {
        let pool = Pool::new();
        let mut incoming = Incoming::new();
        receive(&mut incoming, b"hxyz");
        incoming.consume(1);
        incoming.begin_payload(pool.fresh(6), 6);
        assert!(incoming.take_payload().is_none());
        assert_eq!(incoming.peek::<1>(), None, "a payload comes first");
        receive(&mut incoming, b"123nn");
        let payload = incoming.take_payload().expect("whole");
        assert_eq!(&payload.bytes()[..6], b"xyz123");
        assert_eq!(incoming.peek::<2>(), Some(*b"nn"));
    }

    #[test]
    fn a_large_rest_is_received_alone() {
        let pool = Pool::new();
        let mut incoming = Incoming::new();
        incoming.begin_payload(pool.fresh(WHOLE), WHOLE);
        assert!(incoming.wants_all());
        assert!(incoming.slices()[1].is_empty());
    }

    #[test]
    fn a_refused_payload_goes_by() {
        let mut incoming = Incoming::new();
        receive(&mut incoming, b"12");
        incoming.skip(4);
        assert_eq!(incoming.peek::<1>(), None);
        receive(&mut incoming, b"34n");
        assert_eq!(incoming.peek::<1>(), Some(*b"n"));
    }

    #[test]
    fn sending_goes_on_where_it_stopped() {
        let pool = Pool::new();
        let mut payload = pool.fresh(4);
        payload.bytes_mut()[..4].copy_from_slice(b"DATA");
        let mut out = Outgoing::default();
        out.push_bytes(b"ab");
        out.push_bytes(b"cd");
        out.push_payload(payload.freeze(), 4);
        out.push_bytes(b"ef");
        let left = |out: &Outgoing| out.slices().collect::<Vec<_>>().concat();
        assert_eq!(
            out.slices().count(),
            3,
            "neighbouring headers are one piece"
        );
        assert_eq!(left(&out), b"abcdDATAef");
        out.advance(3);
        assert_eq!(left(&out), b"dDATAef");
        out.advance(3);
        assert_eq!(left(&out), b"TAef");
        out.advance(4);
        assert!(out.is_empty());
    }
}
