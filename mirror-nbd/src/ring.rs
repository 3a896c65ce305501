//! The io_uring backend: one ring per mirror thread, one system call per turn of its loop.
//!
//! Every operation in flight sits in a table together with all that the kernel may touch; it
//! leaves the table only when its completion arrives. A ring that is dropped first cancels what
//! is in flight and waits for it, and leaks what even then does not end.

mod aside;

use crate::backend::{Backend, Completion, LAST_WAIT, Operation, PIECES, Token};
use aside::Aside;
use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use nix::errno::Errno;
use std::io;
use std::time::Duration;

const ENTRIES: u32 = 1024;
const COMPLETIONS: u32 = 8192;

/// The user data of entries that are no flight.
const NOBODY: u64 = u64::MAX;

/// The user data of the entry that waits for the workers' bell.
const BELL: u64 = u64::MAX - 1;

/// An io_uring instance and everything in flight on it.
pub struct Ring {
    ring: IoUring,
    flights: Vec<Option<Flight>>,
    vacant: Vec<u32>,
    /// Message descriptions not in use.
    #[expect(
        clippy::vec_box,
        reason = "the kernel keeps their addresses while they are in use"
    )]
    messages: Vec<Box<Message>>,
    /// What completed while the submission queue was full.
    early: Vec<Completion>,
    /// Operations on stores in memory. The kernel would hand each to a worker thread, which costs
    /// more than the copy; they are done here, after everything else was handed over, so that the
    /// peer works meanwhile.
    copies: Vec<(Token, Operation)>,
    /// What the kernel's ring cannot do; by itself, because it is rarely looked at.
    aside: Box<Aside>,
    /// Whether something was queued that somebody else waits for.
    urgent: bool,
    in_flight: usize,
}

struct Flight {
    token: Token,
    operation: Operation,
    message: Option<Box<Message>>,
}

/// What `sendmsg` and `recvmsg` are told: the kernel reads it after submission, so it is boxed
/// and lives in the table.
struct Message {
    header: libc::msghdr,
    pieces: Vec<libc::iovec>,
}

impl Ring {
    /// A ring for the calling thread.
    ///
    /// # Errors
    ///
    /// What the kernel said; `ENOSYS`, `EPERM` and `EACCES` mean that this host has no io_uring
    /// for us.
    pub fn new() -> io::Result<Ring> {
        let ring = best_ring()?;
        if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
            return Err(Errno::ENOSYS.into());
        }
        Ok(Ring {
            ring,
            flights: Vec::new(),
            vacant: Vec::new(),
            messages: Vec::new(),
            early: Vec::new(),
            copies: Vec::new(),
            aside: Box::default(),
            urgent: false,
            in_flight: 0,
        })
    }

    fn message(&mut self) -> Box<Message> {
        self.messages.pop().unwrap_or_else(|| {
            Box::new(Message {
                // SAFETY: a msghdr is plain data for which all zeroes is a valid value.
                header: unsafe { std::mem::zeroed() },
                pieces: Vec::new(),
            })
        })
    }

    fn push(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: all that the entry points to is owned by the flight whose index is its
            // user data, and stays there, unmoved on the heap, until the completion.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return;
            }
            // The queue is full: hand it over. What the kernel cannot take now (EAGAIN, EBUSY)
            // it takes after some completions were reaped.
            if self.ring.submit().is_err() {
                let mut early = std::mem::take(&mut self.early);
                self.reap(&mut early);
                self.early = early;
                std::thread::yield_now();
            }
        }
    }

    fn make_copies(&mut self, completions: &mut Vec<Completion>) {
        for (token, mut operation) in self.copies.drain(..) {
            let result = operation.copy();
            self.in_flight -= 1;
            completions.push(Completion {
                token,
                operation,
                result,
            });
        }
    }

    fn reap(&mut self, completions: &mut Vec<Completion>) {
        // SAFETY: `&mut self` makes this the only completion queue in use, and nothing called
        // while it lives reaches another.
        let queue = unsafe { self.ring.completion_shared() };
        let mut rung = false;
        for entry in queue {
            rung |= entry.user_data() == BELL;
            let index = entry.user_data() as usize;
            let Some(flight) = self.flights.get_mut(index).and_then(Option::take) else {
                continue;
            };
            self.vacant.push(index as u32);
            self.in_flight -= 1;
            if let Some(message) = flight.message {
                self.messages.push(message);
            }
            completions.push(Completion {
                token: flight.token,
                operation: flight.operation,
                result: outcome(&entry),
            });
        }
        if rung {
            self.aside.collect(completions);
            self.listen();
        }
    }

    fn put_aside(&mut self, token: Token, operation: Operation) {
        let first = self.aside.bell().is_none();
        if let Err(completion) = self.aside.submit(token, operation) {
            self.early.push(completion);
        }
        if first {
            self.listen();
        }
    }

    /// Waits for the workers' bell, if there are workers.
    fn listen(&mut self) {
        if let Some(bell) = self.aside.bell() {
            let entry = opcode::PollAdd::new(Fd(bell.raw()), libc::POLLIN as u32).build();
            self.push(&entry.user_data(BELL));
        }
    }
}

/// Nothing to worry about in what entering the ring returned?
fn settled(result: io::Result<usize>) -> Result<(), Errno> {
    match result.map_err(|error| Errno::try_from(error).unwrap_or(Errno::EIO)) {
        Ok(_) | Err(Errno::ETIME | Errno::EINTR | Errno::EAGAIN | Errno::EBUSY) => Ok(()),
        Err(errno) => Err(errno),
    }
}

fn outcome(entry: &cqueue::Entry) -> Result<u32, Errno> {
    u32::try_from(entry.result()).map_err(|_| Errno::from_raw(-entry.result()))
}

/// The kernel's fastest mode first: completions run only when this thread asks for them.
fn best_ring() -> io::Result<IoUring> {
    let deferred = IoUring::builder()
        .setup_cqsize(COMPLETIONS)
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_submit_all()
        .build(ENTRIES);
    if deferred.is_ok() {
        return deferred;
    }
    let cooperative = IoUring::builder()
        .setup_cqsize(COMPLETIONS)
        .setup_coop_taskrun()
        .build(ENTRIES);
    if cooperative.is_ok() {
        return cooperative;
    }
    IoUring::builder().setup_cqsize(COMPLETIONS).build(ENTRIES)
}

impl Backend for Ring {
    fn submit(&mut self, token: Token, operation: Operation) {
        if operation.is_copy() {
            self.in_flight += 1;
            self.copies.push((token, operation));
            return;
        }
        if let Operation::Map { .. } = operation {
            self.put_aside(token, operation);
            return;
        }
        self.urgent |= !matches!(
            operation,
            Operation::Receive { .. } | Operation::Readable { .. }
        );
        let index = self.vacant.pop().unwrap_or_else(|| {
            self.flights.push(None);
            (self.flights.len() - 1) as u32
        });
        let message = match operation {
            Operation::Send { .. } | Operation::Receive { .. } => Some(self.message()),
            _ => None,
        };
        let flight = self.flights[index as usize].insert(Flight {
            token,
            operation,
            message,
        });
        let entry = entry(flight).user_data(u64::from(index));
        self.in_flight += 1;
        self.push(&entry);
    }

    fn wait(
        &mut self,
        patience: Option<Duration>,
        completions: &mut Vec<Completion>,
    ) -> Result<(), Errno> {
        completions.append(&mut self.early);
        if !self.copies.is_empty() {
            // Receiving anew can be handed over with the next call; a message to the peer cannot.
            let submitted = if std::mem::take(&mut self.urgent) {
                self.ring.submit()
            } else {
                Ok(0)
            };
            self.make_copies(completions);
            self.reap(completions);
            return settled(submitted);
        }
        self.urgent = false;
        let patience = if completions.is_empty() {
            patience
        } else {
            Some(Duration::ZERO)
        };
        let timespec = patience.map(Timespec::from);
        let args = match &timespec {
            Some(timespec) => SubmitArgs::new().timespec(timespec),
            None => SubmitArgs::new(),
        };
        let result = self.ring.submitter().submit_with_args(1, &args);
        self.reap(completions);
        settled(result)
    }

    fn in_flight(&self) -> usize {
        self.in_flight + self.aside.in_flight()
    }
}

fn entry(flight: &mut Flight) -> squeue::Entry {
    match &mut flight.operation {
        Operation::Read {
            file,
            offset,
            buffer,
            from,
            to,
        } => {
            let slice = &mut buffer.bytes_mut()[*from as usize..*to as usize];
            opcode::Read::new(Fd(file.raw()), slice.as_mut_ptr(), slice.len() as u32)
                .offset(*offset)
                .build()
        }
        Operation::Write {
            file,
            offset,
            buffer,
            from,
            to,
            durable,
        } => {
            let slice = &buffer.bytes()[*from as usize..*to as usize];
            opcode::Write::new(Fd(file.raw()), slice.as_ptr(), slice.len() as u32)
                .offset(*offset)
                .rw_flags(if *durable { libc::RWF_DSYNC } else { 0 })
                .build()
        }
        Operation::Sync { file } => opcode::Fsync::new(Fd(file.raw()))
            .flags(FsyncFlags::DATASYNC)
            .build(),
        Operation::Zero {
            file,
            offset,
            len,
            how,
        } => opcode::Fallocate::new(Fd(file.raw()), *len)
            .offset(*offset)
            .mode(how.mode().bits())
            .build(),
        Operation::Prefetch { file, offset, len } => {
            let advice = libc::POSIX_FADV_WILLNEED;
            opcode::Fadvise::new(Fd(file.raw()), i64::from(*len), advice)
                .offset(*offset)
                .build()
        }
        Operation::Map { .. } => unreachable!("`submit` leaves it to the workers"),
        Operation::Receive { socket, into } => {
            let all = into.wants_all();
            let pieces = into.slices().into_iter().map(|slice| libc::iovec {
                iov_base: slice.as_mut_ptr().cast(),
                iov_len: slice.len(),
            });
            let header = describe(
                &mut flight.message,
                pieces.filter(|piece| piece.iov_len > 0),
            );
            opcode::RecvMsg::new(Fd(socket.raw()), header)
                .flags(if all { libc::MSG_WAITALL as u32 } else { 0 })
                .build()
        }
        Operation::Send { socket, what } => {
            let pieces = what.slices().map(|slice| libc::iovec {
                iov_base: slice.as_ptr().cast_mut().cast(),
                iov_len: slice.len(),
            });
            let header = describe(&mut flight.message, pieces);
            opcode::SendMsg::new(Fd(socket.raw()), header)
                .flags((libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32)
                .build()
        }
        Operation::Readable { file } => {
            opcode::PollAdd::new(Fd(file.raw()), libc::POLLIN as u32).build()
        }
    }
}

fn describe(
    message: &mut Option<Box<Message>>,
    pieces: impl Iterator<Item = libc::iovec>,
) -> *mut libc::msghdr {
    let message = message.as_mut().expect("set by submit");
    message.pieces.clear();
    message.pieces.extend(pieces.take(PIECES));
    message.header.msg_iov = message.pieces.as_mut_ptr();
    message.header.msg_iovlen = message.pieces.len() as _;
    &raw mut message.header
}

impl Drop for Ring {
    fn drop(&mut self) {
        let mut ended = Vec::new();
        let deadline = std::time::Instant::now() + LAST_WAIT;
        // Hands over what is queued, so that it can be cancelled.
        let _ = self.wait(Some(Duration::ZERO), &mut ended);
        // One by one: a call that cancels everything came with Linux 6.0.
        for index in 0..self.flights.len() {
            if self.flights[index].is_some() {
                let cancel = opcode::AsyncCancel::new(index as u64).build();
                self.push(&cancel.user_data(NOBODY));
            }
        }
        let patience = Some(Duration::from_millis(50));
        while self.in_flight > 0
            && std::time::Instant::now() < deadline
            && self.wait(patience, &mut ended).is_ok()
        {
            ended.clear();
        }
        if self.in_flight > 0 {
            log::error!(
                "{} operations never ended; their memory is given up",
                self.in_flight
            );
            // The kernel may still write to it.
            std::mem::forget(std::mem::take(&mut self.flights));
        }
    }
}
