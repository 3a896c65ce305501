//! NBD's handshake: everything a client can send before its first request.

use crate::bytes::Bytes;
use mirror_nbd::nbd::dialect::{Contexts, Dialect};
use mirror_nbd::nbd::negotiate::{Export, Outcome, negotiate};
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

const NAME: &str = "r0";
const SIZE: u64 = 1 << 30;
const WHY_NOT: &str = "node a is Secondary";

const OPTION_MAGIC: [u8; 8] = *b"IHAVEOPT";
const REPLY_MAGIC: [u8; 8] = 0x0003_e889_0455_65a9_u64.to_be_bytes();
const GREETING: [u8; 18] = *b"NBDMAGICIHAVEOPT\x00\x03";

/// Most options that are read, and more than any one answer takes.
const MAX_OPTIONS: usize = 64;
const MAX_ANSWER: usize = 256;

struct Mirror {
    served: bool,
}

impl Export for Mirror {
    fn name(&self) -> &str {
        NAME
    }

    fn size(&self) -> Option<u64> {
        self.served.then_some(SIZE)
    }

    fn why_not(&self) -> String {
        WHY_NOT.to_owned()
    }
}

/// A client that sends in pieces of some length, then ends, and takes every answer.
struct Client<'d> {
    sends: &'d [u8],
    piece: usize,
    got: Vec<u8>,
}

impl AsyncRead for Client<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let len = self.piece.min(into.remaining()).min(self.sends.len());
        let (piece, rest) = self.sends.split_at(len);
        into.put_slice(piece);
        self.sends = rest;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Client<'_> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.got.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

struct Conversation {
    outcome: io::Result<Outcome>,
    read: usize,
    got: Vec<u8>,
}

fn converse(sends: &[u8], piece: usize, served: bool) -> Conversation {
    let mut client = Client {
        sends,
        piece,
        got: Vec::new(),
    };
    let mirror = Mirror { served };
    let outcome = {
        let mut future = pin!(negotiate(&mut client, &mirror));
        let mut context = Context::from_waker(Waker::noop());
        // A client that is never slow keeps nobody waiting, but for a fairness of tokio's.
        (0..100)
            .find_map(|_| match future.as_mut().poll(&mut context) {
                Poll::Ready(outcome) => Some(outcome),
                Poll::Pending => None,
            })
            .expect("the negotiation hangs")
    };
    Conversation {
        outcome,
        read: sends.len() - client.sends.len(),
        got: client.got,
    }
}

/// A byte that says how the client is met, and what it sends: as it is, and once more as a list of
/// options whose magic numbers and lengths are right.
pub fn run(data: &[u8]) -> bool {
    let mut bytes = Bytes(data);
    let how = bytes.u8();
    let taken = check(bytes.0, how);
    check(&well_formed(bytes), how) | taken
}

fn well_formed(mut bytes: Bytes<'_>) -> Vec<u8> {
    let mut sends = vec![0, 0, 0, bytes.u8() & 3];
    while !bytes.is_empty() && sends.len() < 1 << 20 {
        let option = u32::from(bytes.u8() % 13);
        let len = usize::from(bytes.u16() % 9_000);
        let data = match (option, len % 2) {
            (9 | 10, 0) => queries(&mut bytes, len / 2),
            _ if len > 4096 => vec![bytes.u8(); len],
            _ => bytes.take(len).to_vec(),
        };
        sends.extend(OPTION_MAGIC);
        sends.extend(option.to_be_bytes());
        sends.extend((data.len() as u32).to_be_bytes());
        sends.extend(data);
    }
    sends
}

/// A question about metadata contexts whose lengths add up.
fn queries(bytes: &mut Bytes<'_>, count: usize) -> Vec<u8> {
    const WORDS: [&[u8]; 5] = [
        b"base:allocation",
        b"base:",
        b"x-other:",
        b"",
        b"base:other",
    ];
    let name: &[u8] = [&b"r0"[..], b"", b"no"][usize::from(bytes.u8() % 3)];
    let count = count % 80;
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name);
    data.extend((count as u32).to_be_bytes());
    for _ in 0..count {
        let word = WORDS[usize::from(bytes.u8() % 5)];
        data.extend((word.len() as u32).to_be_bytes());
        data.extend(word);
    }
    data
}

fn check(sends: &[u8], how: u8) -> bool {
    let (served, piece) = (how & 1 == 1, usize::from(how >> 1) + 1);
    let whole = converse(sends, piece, served);
    let answers = check_answers(&whole);

    // How the bytes are cut, and what follows the end, makes no difference.
    let read = &sends[..whole.read];
    let cut = converse(read, usize::MAX, served);
    assert_eq!(cut.got, whole.got);
    assert_eq!(cut.read, whole.read);
    let outcome = whole.outcome.as_ref().ok();
    assert_eq!(cut.outcome.as_ref().ok(), outcome);
    if let Some(Outcome::Transmission(dialect)) = outcome {
        assert!(served, "nothing is served");
        check_dialect(*dialect, &answers);
        let short = converse(&read[..read.len() - 1], piece, served);
        assert!(short.outcome.is_err(), "not a byte too many was read");
    }
    !answers.is_empty() || outcome.is_some()
}

/// Nothing was agreed on that was not granted, and what was granted last counts.
fn check_dialect(dialect: Dialect, answers: &[(u32, u32)]) {
    const ACK: u32 = 1;
    const META_CONTEXT: u32 = 4;
    let structured = answers.contains(&(8, ACK));
    assert_eq!(dialect != Dialect::Simple, structured);
    let mut about = answers.iter().filter(|(option, _)| *option == 10).rev();
    let last = (about.next(), about.next());
    if dialect == Dialect::Structured(Contexts::Allocation) {
        let granted = (Some(&(10, ACK)), Some(&(10, META_CONTEXT)));
        assert_eq!(last, granted);
    }
}

/// Every answer is whole and bounded; returns the option and the kind of each.
fn check_answers(talk: &Conversation) -> Vec<(u32, u32)> {
    let mut rest = talk.got.strip_prefix(&GREETING).expect("a greeting");
    assert!(rest.len() <= MAX_OPTIONS * MAX_ANSWER);
    let mut answers = Vec::new();
    while let Some(answer) = rest.strip_prefix(&REPLY_MAGIC) {
        let number = |at: usize| u32::from_be_bytes(answer[at..at + 4].try_into().expect("four"));
        let (option, kind, len) = (number(0), number(4), number(8) as usize);
        let text = &answer[12..12 + len];
        if kind >> 31 == 1 {
            crate::assert_harmless(std::str::from_utf8(text).expect("text"));
        }
        rest = &answer[12 + len..];
        answers.push((option, kind));
    }
    // What is left is the answer to EXPORT_NAME, which has no header.
    match talk.outcome {
        Ok(Outcome::Transmission(_)) if rest.is_empty() => {
            assert_eq!(answers.last(), Some(&(7, 1)));
        }
        Ok(Outcome::Transmission(dialect)) => {
            assert_eq!(rest[..8], SIZE.to_be_bytes());
            assert_eq!(rest[8..10], dialect.flags().to_be_bytes());
            assert!(rest.len() == 10 || rest.len() == 134);
        }
        _ => assert!(rest.is_empty()),
    }
    answers
}

/// The ways clients ask for an export, and what only hostile ones do.
pub fn seeds() -> Vec<Vec<u8>> {
    let option = |number: u32, data: &[u8]| {
        let mut bytes = OPTION_MAGIC.to_vec();
        bytes.extend(number.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
        bytes
    };
    let talk = |how: u8, flags: u8, options: &[Vec<u8>]| {
        [&[how, 0, 0, 0, flags][..], &options.concat()].concat()
    };
    let select = b"\0\0\0\x02r0\0\0\0\x01\0\0\0\x0fbase:allocation";
    let list = b"\0\0\0\x02r0\0\0\0\0";
    let go = b"\0\0\0\x02r0\0\x02\0\x03\0\x01";
    vec![
        talk(0xff, 3, &[option(7, go)]),
        talk(0xfe, 3, &[option(7, go), option(2, &[])]),
        talk(7, 1, &[option(3, &[]), option(6, go), option(1, b"r0")]),
        talk(
            1,
            3,
            &[
                option(11, &[]),
                option(7, b"\0\0\0\x02no\0\0"),
                option(7, &[0; 7]),
            ],
        ),
        talk(0xff, 3, &[option(5, &[0; 9_000]), option(1, b"")]),
        talk(
            0xff,
            3,
            &[
                option(8, &[]),
                option(9, list),
                option(10, select),
                option(7, go),
            ],
        ),
        talk(
            1,
            3,
            &[
                option(10, select),
                option(8, &[]),
                option(10, select),
                option(10, list),
                option(1, b"r0"),
            ],
        ),
    ]
}
