//! The plain backend: epoll for sockets and a few threads for the disk.
//!
//! For hosts whose kernel has no io_uring (RHEL 8's is 4.18) or does not let us have it: a sysctl,
//! a seccomp filter, an emulator. It asks for nothing that Linux 4.18 lacks.
//!
//! Every operation in flight sits in a table, as on the ring. One on a socket is tried by the
//! mirror's thread itself, which never waits in it; where it would have to, it is parked until
//! epoll says that trying again is worth it. One on a file is done by a worker, which touches the
//! memory that the operation in the table owns; so such an operation leaves the table only when
//! its job has ended, and is leaked when that cannot be waited for.

use crate::backend::{
    Backend, Completion, Descriptor, LAST_WAIT, Operation, PIECES, Token, Zeroing,
};
use crate::extents::Survey;
use crate::slots::Slots;
use crate::workers::Workers;
use nix::errno::Errno;
use nix::fcntl::{PosixFadviseAdvice, fallocate, posix_fadvise};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{MsgFlags, recvmsg, sendmsg};
use nix::unistd::fdatasync;
use std::collections::HashMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::RawFd;
use std::time::Duration;

/// Events taken from epoll at once; the rest come with the next call.
const EVENTS: usize = 256;

/// What epoll calls the workers' bell; everything else it calls by the number of its descriptor.
const BELL: u64 = u64::MAX;

/// An epoll instance, workers, and everything in flight on them.
pub struct Plain {
    epoll: Epoll,
    workers: Workers<Result<u32, Errno>>,
    flights: Slots<Flight>,
    in_flight: usize,
    /// Operations on sockets that were not tried yet.
    untried: Vec<u32>,
    /// Operations that wait until their descriptor is ready.
    parked: HashMap<RawFd, Vec<u32>>,
    /// Operations on stores in memory, done here like the ring does them, and for its reason.
    copies: Vec<(Token, Operation)>,
    events: Vec<EpollEvent>,
    ended_jobs: Vec<(u64, Result<u32, Errno>)>,
}

struct Flight {
    token: Token,
    operation: Operation,
}

impl Plain {
    /// A backend for the calling thread; its workers are called by `name`.
    ///
    /// # Errors
    ///
    /// When the process may have no more threads or descriptors.
    pub fn new(name: &str) -> io::Result<Plain> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let workers = Workers::new(name)?;
        epoll.add(workers.bell()?, EpollEvent::new(EpollFlags::EPOLLIN, BELL))?;
        Ok(Plain {
            epoll,
            workers,
            flights: Slots::default(),
            in_flight: 0,
            untried: Vec::new(),
            parked: HashMap::new(),
            copies: Vec::new(),
            events: vec![EpollEvent::empty(); EVENTS],
            ended_jobs: Vec::new(),
        })
    }

    fn end(&mut self, slot: u32, result: Result<u32, Errno>, completions: &mut Vec<Completion>) {
        let Some(Flight { token, operation }) = self.flights.remove(slot) else {
            return;
        };
        self.in_flight -= 1;
        completions.push(Completion {
            token,
            operation,
            result,
        });
    }

    fn try_new(&mut self, completions: &mut Vec<Completion>) {
        for slot in std::mem::take(&mut self.untried) {
            match self.flights.get(slot).map(|flight| &flight.operation) {
                // Only epoll can tell.
                Some(Operation::Readable { .. }) => self.park(slot, completions),
                _ => self.try_now(slot, completions),
            }
        }
    }

    fn try_now(&mut self, slot: u32, completions: &mut Vec<Completion>) {
        let Some(flight) = self.flights.get_mut(slot) else {
            return;
        };
        match attempt(&mut flight.operation) {
            Err(Errno::EAGAIN) => self.park(slot, completions),
            result => self.end(slot, result, completions),
        }
    }

    /// Has an operation wait for its descriptor.
    fn park(&mut self, slot: u32, completions: &mut Vec<Completion>) {
        let Some(operation) = self.flights.get(slot).map(|flight| &flight.operation) else {
            return;
        };
        let Some((descriptor, mut interest)) = awaited(operation) else {
            return;
        };
        let neighbours = self.parked.entry(descriptor.raw()).or_default();
        for neighbour in neighbours.iter() {
            let neighbour = self.flights.get(*neighbour);
            interest |=
                neighbour.map_or(EpollFlags::empty(), |known| interest_of(&known.operation));
        }
        match arm(&self.epoll, descriptor, interest) {
            Ok(()) => neighbours.push(slot),
            Err(errno) => self.end(slot, Err(errno), completions),
        }
    }

    /// A descriptor is ready, and epoll does not watch it any more.
    fn ready(&mut self, fd: RawFd, events: EpollFlags, completions: &mut Vec<Completion>) {
        // Both ends of a broken connection are worth a try: it tells why.
        let broken = events.intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP);
        for slot in self.parked.remove(&fd).unwrap_or_default() {
            let Some(flight) = self.flights.get(slot) else {
                continue;
            };
            if !broken && !events.intersects(interest_of(&flight.operation)) {
                self.park(slot, completions);
            } else if matches!(flight.operation, Operation::Readable { .. }) {
                self.end(slot, Ok(events.bits() as u32), completions);
            } else {
                self.try_now(slot, completions);
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

    fn collect_jobs(&mut self, completions: &mut Vec<Completion>) {
        let mut ended = std::mem::take(&mut self.ended_jobs);
        self.workers.collect(&mut ended);
        for (slot, result) in ended.drain(..) {
            self.end(slot as u32, result, completions);
        }
        self.ended_jobs = ended;
    }
}

impl Backend for Plain {
    fn submit(&mut self, token: Token, operation: Operation) {
        self.in_flight += 1;
        if operation.is_copy() {
            self.copies.push((token, operation));
            return;
        }
        let slot = self.flights.insert(Flight { token, operation });
        let flight = self.flights.get_mut(slot).expect("just inserted");
        match Job::of(&mut flight.operation) {
            Some(job) => self.workers.submit(u64::from(slot), move || job.run()),
            None => self.untried.push(slot),
        }
    }

    fn wait(
        &mut self,
        patience: Option<Duration>,
        completions: &mut Vec<Completion>,
    ) -> Result<(), Errno> {
        self.try_new(completions);
        // After what was sent, so that the peer works meanwhile.
        self.make_copies(completions);
        let patience = if completions.is_empty() {
            patience
        } else {
            Some(Duration::ZERO)
        };
        let mut events = std::mem::take(&mut self.events);
        let count = match self.epoll.wait(&mut events, timeout(patience)) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(errno),
        };
        for event in &events[..count] {
            match event.data() {
                BELL => self.collect_jobs(completions),
                fd => self.ready(fd as RawFd, event.events(), completions),
            }
        }
        self.events = events;
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        let running = self.workers.close(LAST_WAIT);
        if running.is_empty() {
            return;
        }
        log::error!(
            "{} operations never ended; their memory is given up",
            running.len()
        );
        for slot in running {
            // Its worker may still touch what it owns.
            std::mem::forget(self.flights.remove(slot as u32));
        }
    }
}

/// Rounded up: who looks too early looks again and again.
fn timeout(patience: Option<Duration>) -> EpollTimeout {
    let Some(patience) = patience else {
        return EpollTimeout::NONE;
    };
    let milliseconds = patience.as_nanos().div_ceil(1_000_000);
    EpollTimeout::try_from(milliseconds).unwrap_or(EpollTimeout::MAX)
}

/// Has epoll tell once when a descriptor is ready. What it knows by this number may be gone, or
/// another file that had the number before; it tells them apart.
fn arm(epoll: &Epoll, descriptor: &Descriptor, interest: EpollFlags) -> Result<(), Errno> {
    let number = descriptor.raw() as u64;
    let mut event = EpollEvent::new(interest | EpollFlags::EPOLLONESHOT, number);
    match epoll.modify(descriptor, &mut event) {
        Err(Errno::ENOENT) => epoll.add(descriptor, event),
        result => result,
    }
}

/// What an operation that is not a file's waits for, and on what.
fn awaited(operation: &Operation) -> Option<(&Descriptor, EpollFlags)> {
    match operation {
        Operation::Receive { socket, .. } => Some((socket, EpollFlags::EPOLLIN)),
        Operation::Send { socket, .. } => Some((socket, EpollFlags::EPOLLOUT)),
        Operation::Readable { file } => Some((file, EpollFlags::EPOLLIN)),
        Operation::Read { .. }
        | Operation::Write { .. }
        | Operation::Sync { .. }
        | Operation::Zero { .. }
        | Operation::Map { .. }
        | Operation::Prefetch { .. } => None,
    }
}

fn interest_of(operation: &Operation) -> EpollFlags {
    awaited(operation).map_or(EpollFlags::empty(), |(_, interest)| interest)
}

/// Does what can be done on a socket without waiting; `EAGAIN` where nothing can.
fn attempt(operation: &mut Operation) -> Result<u32, Errno> {
    let moved = match operation {
        Operation::Receive { socket, into } => {
            let mut pieces: Vec<IoSliceMut<'_>> = into
                .slices()
                .into_iter()
                .filter(|slice| !slice.is_empty())
                .map(IoSliceMut::new)
                .collect();
            recvmsg::<()>(socket.raw(), &mut pieces, None, MsgFlags::MSG_DONTWAIT)?.bytes
        }
        Operation::Send { socket, what } => {
            let pieces: Vec<IoSlice<'_>> = what.slices().map(IoSlice::new).take(PIECES).collect();
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            sendmsg::<()>(socket.raw(), &pieces, &[], flags, None)?
        }
        _ => return Err(Errno::EINVAL),
    };
    Ok(moved as u32)
}

/// An operation on a file as a worker is told of it.
struct Job {
    file: Descriptor,
    call: Call,
}

enum Call {
    Read {
        into: Memory,
        offset: u64,
    },
    Write {
        from: Memory,
        offset: u64,
        /// As `pwritev2` takes them.
        flags: i32,
    },
    Sync,
    Zero {
        how: Zeroing,
        offset: u64,
        len: u64,
    },
    Map(Survey),
    Prefetch {
        offset: u64,
        len: u32,
    },
}

/// Memory that an operation in the table of flights owns.
struct Memory {
    start: *mut u8,
    len: usize,
}

// SAFETY: from the making of a job to the collecting of its end its operation stays in the table
// and is not touched there (`Plain::submit`, `end`), and is forgotten rather than dropped if the job
// does not end (`Drop`); so its memory, which is on the heap and does not move with it, stays. Of
// what is read into, the job is the only user, because a `Fresh` has one owner; what is written
// from nobody changes, because it is a `Buffer`.
unsafe impl Send for Memory {}

impl Job {
    /// The job of an operation on a file.
    fn of(operation: &mut Operation) -> Option<Job> {
        let (file, call) = match operation {
            Operation::Read {
                file,
                offset,
                buffer,
                from,
                to,
            } => {
                let part = &mut buffer.bytes_mut()[*from as usize..*to as usize];
                let into = Memory {
                    start: part.as_mut_ptr(),
                    len: part.len(),
                };
                let offset = *offset;
                (file, Call::Read { into, offset })
            }
            Operation::Write {
                file,
                offset,
                buffer,
                from,
                to,
                durable,
            } => {
                let part = &buffer.bytes()[*from as usize..*to as usize];
                let from = Memory {
                    start: part.as_ptr().cast_mut(),
                    len: part.len(),
                };
                let call = Call::Write {
                    from,
                    offset: *offset,
                    flags: if *durable { libc::RWF_DSYNC } else { 0 },
                };
                (file, call)
            }
            Operation::Sync { file } => (file, Call::Sync),
            Operation::Zero {
                file,
                offset,
                len,
                how,
            } => {
                let (how, offset, len) = (*how, *offset, *len);
                (file, Call::Zero { how, offset, len })
            }
            Operation::Map { file, survey } => (file, Call::Map(survey.clone())),
            Operation::Prefetch { file, offset, len } => {
                let (offset, len) = (*offset, *len);
                (file, Call::Prefetch { offset, len })
            }
            Operation::Receive { .. } | Operation::Send { .. } | Operation::Readable { .. } => {
                return None;
            }
        };
        let file = file.clone();
        Some(Job { file, call })
    }

    fn run(self) -> Result<u32, Errno> {
        match self.call {
            Call::Read { into, offset } => read(&self.file, &into, offset),
            Call::Write {
                from,
                offset,
                flags,
            } => write(&self.file, &from, offset, flags),
            Call::Sync => fdatasync(&self.file).map(|()| 0),
            Call::Zero { how, offset, len } => {
                fallocate(&self.file, how.mode(), offset as i64, len as i64).map(|()| 0)
            }
            Call::Map(survey) => Ok(survey.carry_out(&self.file)),
            Call::Prefetch { offset, len } => {
                let advice = PosixFadviseAdvice::POSIX_FADV_WILLNEED;
                posix_fadvise(&self.file, offset as i64, len.into(), advice).map(|()| 0)
            }
        }
    }
}

fn read(file: &Descriptor, into: &Memory, offset: u64) -> Result<u32, Errno> {
    // SAFETY: the memory is there, and this job's alone, while the job runs: see `Memory`.
    let moved = unsafe { libc::pread(file.raw(), into.start.cast(), into.len, offset as i64) };
    Errno::result(moved).map(|moved| moved as u32)
}

/// Where there is no `pwritev2`, the C library says `EOPNOTSUPP` to flags, like a kernel that does
/// not know them, and does without it else.
fn write(file: &Descriptor, from: &Memory, offset: u64, flags: i32) -> Result<u32, Errno> {
    let piece = libc::iovec {
        iov_base: from.start.cast(),
        iov_len: from.len,
    };
    // SAFETY: the memory is there, and nobody writes it, while the job runs: see `Memory`.
    let moved = unsafe { libc::pwritev2(file.raw(), &raw const piece, 1, offset as i64, flags) };
    Errno::result(moved).map(|moved| moved as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffers::Pool;
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::time::Instant;

    #[test]
    fn what_does_not_end_keeps_its_memory_when_the_backend_is_dropped() {
        let (mut reader, writer) = io::pipe().expect("a pipe");
        let mut backend = Plain::new("test").expect("a backend");
        let pool = Pool::new();
        const LEN: usize = 1 << 20;
        let mut buffer = pool.fresh(LEN);
        buffer.bytes_mut().fill(7);
        // A pipe takes what has no offset, and then lets its writer wait.
        let write = Operation::Write {
            file: Descriptor::from(OwnedFd::from(writer)),
            offset: u64::MAX,
            buffer: buffer.freeze(),
            from: 0,
            to: LEN as u32,
            durable: false,
        };
        backend.submit(Token::Disk(0), write);
        let mut first = [0];
        reader.read_exact(&mut first).expect("it has begun");
        let start = Instant::now();
        drop(backend);
        assert!(start.elapsed() >= LAST_WAIT, "it is waited for");
        assert_eq!(pool.in_use(), LEN, "given up");
        drop(pool);
        let mut rest = vec![0; LEN - 1];
        reader.read_exact(&mut rest).expect("it goes on");
        assert!(rest.iter().all(|byte| *byte == 7));
    }

    #[test]
    fn patience_is_rounded_up() {
        assert_eq!(timeout(None), EpollTimeout::NONE);
        for (patience, milliseconds) in [
            (Duration::ZERO, 0),
            (Duration::from_nanos(1), 1),
            (Duration::from_millis(7), 7),
            (Duration::from_micros(7_001), 8),
        ] {
            assert_eq!(
                timeout(Some(patience)),
                EpollTimeout::from(milliseconds as u8)
            );
        }
        assert_eq!(timeout(Some(Duration::MAX)), EpollTimeout::MAX);
    }
}
