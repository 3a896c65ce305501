//! What every backend must do, asked of each.

use super::*;
use crate::buffers::Pool;
use crate::extents::{Allocation, Extent};
use crate::plain::Plain;
use crate::ring::Ring;
use mirror_core::types::ByteRange;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

/// A backend that tests can make.
pub trait Tested: Backend {
    /// A new one.
    fn new() -> Self;
}

impl Tested for Ring {
    fn new() -> Ring {
        Ring::new().expect("a ring")
    }
}

impl Tested for Plain {
    fn new() -> Plain {
        Plain::new("test").expect("a plain backend")
    }
}

/// Makes tests of functions that are generic over the backend, one per backend.
macro_rules! on_every_backend {
    ($($name:ident),* $(,)?) => {
        mod on_ring {
            $(#[test] fn $name() { super::$name::<crate::ring::Ring>(); })*
        }
        mod on_plain {
            $(#[test] fn $name() { super::$name::<crate::plain::Plain>(); })*
        }
    };
}
pub(crate) use on_every_backend;

on_every_backend!(
    writes_reads_zeroes_and_syncs_a_file,
    gathers_and_scatters_over_a_socket,
    receives_what_comes_later_and_then_the_end,
    sends_more_than_the_socket_holds_while_it_receives,
    hears_a_bell_each_time_it_rings,
    a_number_used_again_is_another_socket,
    does_many_things_at_once,
    tells_errors,
    maps_holes_and_takes_advice,
    maps_while_it_copies,
    waits_no_longer_than_it_should,
    dropping_ends_what_is_in_flight,
);

const LONG: Duration = Duration::from_secs(20);

fn next(backend: &mut impl Backend) -> Completion {
    let mut completions = next_of_several(backend);
    assert_eq!(completions.len(), 1, "one thing at a time");
    completions.remove(0)
}

fn next_of_several(backend: &mut impl Backend) -> Vec<Completion> {
    let mut completions = Vec::new();
    let start = Instant::now();
    while completions.is_empty() {
        assert!(start.elapsed() < LONG, "nothing ends");
        backend
            .wait(Some(LONG), &mut completions)
            .expect("the backend works");
    }
    completions
}

fn nothing_yet(backend: &mut impl Backend) {
    let mut completions = Vec::new();
    backend
        .wait(Some(Duration::ZERO), &mut completions)
        .expect("the backend works");
    assert!(completions.is_empty());
}

fn one(backend: &mut impl Backend, token: Token, operation: Operation) -> Completion {
    backend.submit(token, operation);
    let done = next(backend);
    assert_eq!(done.token, token);
    assert_eq!(backend.in_flight(), 0);
    done
}

fn filled(pool: &Pool, len: usize, byte: u8) -> Fresh {
    let mut fresh = pool.fresh(len);
    fresh.bytes_mut()[..len].fill(byte);
    fresh
}

fn file() -> Descriptor {
    Descriptor::from(OwnedFd::from(tempfile::tempfile().expect("a file")))
}

fn pair() -> (UnixStream, Descriptor) {
    let (here, there) = UnixStream::pair().expect("a pair");
    (here, Descriptor::from(OwnedFd::from(there)))
}

fn receive(socket: &Descriptor) -> Operation {
    Operation::Receive {
        socket: socket.clone(),
        into: Incoming::new(),
    }
}

fn send(socket: &Descriptor, pool: &Pool, len: usize) -> Operation {
    let mut what = Box::<Outgoing>::default();
    what.push_payload(filled(pool, len, 1).freeze(), len);
    let socket = socket.clone();
    Operation::Send { socket, what }
}

fn writes_reads_zeroes_and_syncs_a_file<B: Tested>() {
    let file = file();
    let mut backend = B::new();
    let pool = Pool::new();
    for durable in [false, true] {
        let write = Operation::Write {
            file: file.clone(),
            offset: 4096,
            buffer: filled(&pool, 4096, 9).freeze(),
            from: 0,
            to: 4096,
            durable,
        };
        assert_eq!(one(&mut backend, Token::Disk(1), write).result, Ok(4096));
    }
    let sync = Operation::Sync { file: file.clone() };
    assert_eq!(one(&mut backend, Token::Disk(2), sync).result, Ok(0));
    for (offset, how) in [(4096, Zeroing::PunchHole), (4096 + 512, Zeroing::ZeroRange)] {
        let zero = Operation::Zero {
            file: file.clone(),
            offset,
            len: 512,
            how,
        };
        assert_eq!(one(&mut backend, Token::Disk(3), zero).result, Ok(0));
    }
    // Part of a buffer, and more than the file has.
    let read = Operation::Read {
        file,
        offset: 4096,
        buffer: filled(&pool, 8192, 3),
        from: 1024,
        to: 8192,
    };
    let done = one(&mut backend, Token::Disk(4), read);
    assert_eq!(done.result, Ok(4096));
    let Operation::Read { buffer, .. } = done.operation else {
        panic!("another operation came back");
    };
    for (range, byte) in [
        (0..1024, 3),
        (1024..2048, 0),
        (2048..1024 + 4096, 9),
        (1024 + 4096..8192, 3),
    ] {
        let part = &buffer.bytes()[range.clone()];
        assert!(part.iter().all(|found| *found == byte), "{range:?}");
    }
}

fn gathers_and_scatters_over_a_socket<B: Tested>() {
    let (left, right) = UnixStream::pair().expect("a pair");
    let mut backend = B::new();
    let pool = Pool::new();
    let mut what = Box::<Outgoing>::default();
    what.push_bytes(b"head");
    what.push_payload(filled(&pool, 4096, 5).freeze(), 4096);
    let socket = Descriptor::from(OwnedFd::from(left));
    let send = Operation::Send { socket, what };
    assert_eq!(one(&mut backend, Token::LinkSend(0), send).result, Ok(4100));
    let socket = Descriptor::from(OwnedFd::from(right));
    let done = one(&mut backend, Token::LinkReceive(0), receive(&socket));
    assert_eq!(done.result, Ok(4100));
    let Operation::Receive { mut into, .. } = done.operation else {
        panic!("another operation came back");
    };
    into.received(4100);
    assert_eq!(into.peek::<4>(), Some(*b"head"));
}

fn receives_what_comes_later_and_then_the_end<B: Tested>() {
    let (mut here, socket) = pair();
    let mut backend = B::new();
    backend.submit(Token::GuestReceive(0), receive(&socket));
    nothing_yet(&mut backend);
    here.write_all(b"late").expect("a write");
    let done = next(&mut backend);
    assert_eq!(done.result, Ok(4));
    backend.submit(Token::GuestReceive(0), done.operation);
    drop(here);
    assert_eq!(next(&mut backend).result, Ok(0));
}

/// Both directions wait on one socket, and each goes on by itself.
fn sends_more_than_the_socket_holds_while_it_receives<B: Tested>() {
    const TOTAL: usize = 8 << 20;
    let (mut here, socket) = pair();
    let mut backend = B::new();
    let pool = Pool::new();
    backend.submit(Token::LinkReceive(0), receive(&socket));
    backend.submit(Token::LinkSend(0), send(&socket, &pool, TOTAL));
    let reader = std::thread::spawn(move || {
        let mut bytes = vec![0; TOTAL];
        here.read_exact(&mut bytes[..TOTAL / 2]).expect("half");
        here.write_all(b"on").expect("a word");
        here.read_exact(&mut bytes[TOTAL / 2..]).expect("the rest");
        assert!(bytes.iter().all(|byte| *byte == 1));
        here
    });
    let (mut sent, mut received) = (0, 0);
    while sent < TOTAL || received < 2 {
        let done = next_of_several(&mut backend);
        for done in done {
            let count = done.result.expect("no error") as usize;
            match done.operation {
                Operation::Send { socket, mut what } => {
                    sent += count;
                    what.advance(count);
                    if sent < TOTAL {
                        backend.submit(Token::LinkSend(0), Operation::Send { socket, what });
                    }
                }
                _ => received += count,
            }
        }
    }
    reader.join().expect("the reader is content");
    assert_eq!((sent, received, backend.in_flight()), (TOTAL, 2, 0));
}

fn hears_a_bell_each_time_it_rings<B: Tested>() {
    let bell = nix::sys::eventfd::EventFd::new().expect("an eventfd");
    let watched = bell.as_fd().try_clone_to_owned().expect("a second handle");
    let mut backend = B::new();
    let mut operation = Operation::Readable {
        file: Descriptor::from(watched),
    };
    for _ in 0..3 {
        backend.submit(Token::Mailbox, operation);
        nothing_yet(&mut backend);
        bell.write(1).expect("it rings");
        let done = next(&mut backend);
        assert!(done.result.is_ok());
        bell.read().expect("it rang");
        operation = done.operation;
    }
}

/// Connections come and go, and the kernel gives their numbers to others.
fn a_number_used_again_is_another_socket<B: Tested>() {
    let mut backend = B::new();
    for _ in 0..8 {
        let (mut here, socket) = pair();
        // A further handle, as of a client that is slow to leave: what is behind it stays.
        let lingering = socket.as_fd().try_clone_to_owned().expect("a handle");
        backend.submit(Token::GuestReceive(0), receive(&socket));
        nothing_yet(&mut backend);
        here.write_all(b"x").expect("a write");
        assert_eq!(next(&mut backend).result, Ok(1));
        drop(socket);
        // The first of a pair gets the number that was just freed.
        let (first, mut here) = UnixStream::pair().expect("a pair");
        let socket = Descriptor::from(OwnedFd::from(first));
        backend.submit(Token::GuestReceive(1), receive(&socket));
        nothing_yet(&mut backend);
        here.write_all(b"yz").expect("a write");
        assert_eq!(next(&mut backend).result, Ok(2));
        drop(lingering);
    }
}

fn does_many_things_at_once<B: Tested>() {
    const COUNT: u32 = 200;
    let file = file();
    let mut backend = B::new();
    let pool = Pool::new();
    for number in 0..COUNT {
        let write = Operation::Write {
            file: file.clone(),
            offset: u64::from(number) * 4096,
            buffer: filled(&pool, 4096, number as u8).freeze(),
            from: 0,
            to: 4096,
            durable: false,
        };
        backend.submit(Token::Disk(number), write);
    }
    assert_eq!(backend.in_flight(), COUNT as usize);
    let mut done = Vec::new();
    while done.len() < COUNT as usize {
        done.extend(next_of_several(&mut backend));
    }
    assert!(done.iter().all(|done| done.result == Ok(4096)));
    drop(done);
    assert_eq!(pool.in_use(), 0);
    for number in 0..COUNT {
        let read = Operation::Read {
            file: file.clone(),
            offset: u64::from(number) * 4096,
            buffer: pool.fresh(4096),
            from: 0,
            to: 4096,
        };
        let Operation::Read { buffer, .. } = one(&mut backend, Token::Disk(0), read).operation
        else {
            panic!("another operation came back");
        };
        assert!(buffer.bytes().iter().all(|byte| *byte == number as u8));
    }
}

fn tells_errors<B: Tested>() {
    let mut backend = B::new();
    let pool = Pool::new();
    let directory = std::fs::File::open("/").expect("a directory");
    let read = Operation::Read {
        file: Descriptor::from(OwnedFd::from(directory)),
        offset: 0,
        buffer: pool.fresh(4096),
        from: 0,
        to: 4096,
    };
    let done = one(&mut backend, Token::Disk(0), read);
    assert_eq!(done.result, Err(Errno::EISDIR));
    let (here, socket) = pair();
    drop(here);
    let done = one(&mut backend, Token::LinkSend(0), send(&socket, &pool, 4096));
    assert_eq!(done.result, Err(Errno::EPIPE));
}

fn map(file: &Descriptor, len: u64) -> Operation {
    Operation::Map {
        file: file.clone(),
        survey: Survey::new(ByteRange::new(0, len), 16),
    }
}

fn maps_holes_and_takes_advice<B: Tested>() {
    let mut backend = B::new();
    let file = file();
    nix::unistd::ftruncate(&file, 1 << 20).expect("a size");
    for _ in 0..3 {
        let done = one(&mut backend, Token::Disk(1), map(&file, 1 << 20));
        assert_eq!(done.result, Ok(1));
        let Operation::Map { survey, .. } = done.operation else {
            panic!("another operation came back");
        };
        let hole = Extent {
            len: 1 << 20,
            kind: Allocation::Hole,
        };
        assert_eq!(survey.found(), [hole]);
    }
    let advice = Operation::Prefetch {
        file,
        offset: 4096,
        len: 8192,
    };
    let done = one(&mut backend, Token::Disk(2), advice);
    assert_eq!(done.result, Ok(0));
}

fn maps_while_it_copies<B: Tested>() {
    let mut backend = B::new();
    let pool = Pool::new();
    let file = file();
    nix::unistd::ftruncate(&file, 1 << 20).expect("a size");
    for number in 0..64 {
        backend.submit(Token::Disk(number), map(&file, 1 << 20));
        let read = Operation::Read {
            file: file.clone(),
            offset: 0,
            buffer: pool.fresh(4096),
            from: 0,
            to: 4096,
        };
        backend.submit(Token::Disk(number + 64), read);
    }
    let mut ended = Vec::new();
    while ended.len() < 128 {
        for completion in next_of_several(&mut backend) {
            assert!(completion.result.is_ok());
            ended.push(completion.token);
        }
    }
    assert_eq!(backend.in_flight(), 0);
    // One that nobody waits for any more.
    backend.submit(Token::Disk(0), map(&file, 1 << 20));
}

fn waits_no_longer_than_it_should<B: Tested>() {
    let (_here, socket) = pair();
    let mut backend = B::new();
    backend.submit(Token::GuestReceive(0), receive(&socket));
    let mut none = Vec::new();
    let patience = Duration::from_millis(20);
    let start = Instant::now();
    backend
        .wait(Some(patience), &mut none)
        .expect("the backend works");
    assert!(none.is_empty());
    assert!((patience..LONG).contains(&start.elapsed()));
}

fn dropping_ends_what_is_in_flight<B: Tested>() {
    let (here, socket) = pair();
    let mut backend = B::new();
    let pool = Pool::new();
    backend.submit(Token::LinkSend(0), send(&socket, &pool, 32 << 20));
    backend.submit(Token::LinkReceive(0), receive(&socket));
    let write = Operation::Write {
        file: file(),
        offset: 0,
        buffer: filled(&pool, 1 << 20, 7).freeze(),
        from: 0,
        to: 1 << 20,
        durable: false,
    };
    backend.submit(Token::Disk(0), write);
    let file = socket;
    backend.submit(Token::Mailbox, Operation::Readable { file });
    let start = Instant::now();
    drop(backend);
    assert!(start.elapsed() < LAST_WAIT);
    assert_eq!(pool.in_use(), 0, "all memory came back");
    drop(here);
}
