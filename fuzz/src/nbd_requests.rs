//! Requests of NBD's transmission phase: a device size, and a stream of request headers.

use crate::bytes::Bytes;
use mirror_core::limits::{MAX_DATA_SIZE, MAX_PAYLOAD, SECTOR};
use mirror_core::types::ByteRange;
use mirror_nbd::nbd::dialect::{Contexts, Dialect};
use mirror_nbd::nbd::reply;
use mirror_nbd::nbd::transmit::{Judgement, NbdError, REQUEST_LEN, Request};

/// The most memory that a request takes which moves no data.
const MAX_STATUS: usize = 64 << 10;

const DIALECTS: [Dialect; 3] = [
    Dialect::Simple,
    Dialect::Structured(Contexts::None),
    Dialect::Structured(Contexts::Allocation),
];

const MAGIC: [u8; 4] = 0x2560_9513_u32.to_be_bytes();

/// Reads requests until one is out of step; the second time each gets its magic number.
pub fn run(data: &[u8]) -> bool {
    let mut bytes = Bytes(data);
    let size = (bytes.u64() % (MAX_DATA_SIZE + 1)) / SECTOR * SECTOR;
    let mut taken = false;
    for chunk in bytes.0.chunks_exact(REQUEST_LEN) {
        let mut raw: [u8; REQUEST_LEN] = chunk.try_into().expect("a whole chunk");
        let decoded = Request::decode(&raw);
        assert_eq!(decoded.is_some(), raw[..4] == MAGIC);
        raw[..4].copy_from_slice(&MAGIC);
        let repaired = Request::decode(&raw).expect("the magic is right");
        assert!(decoded.is_none_or(|decoded| decoded == repaired));
        for dialect in DIALECTS {
            check(&raw, &repaired, size, dialect);
        }
        taken = true;
    }
    taken
}

fn check(raw: &[u8; REQUEST_LEN], request: &Request, size: u64, dialect: Dialect) {
    let word = |at: usize| u16::from_be_bytes([raw[at], raw[at + 1]]);
    let (flags, command) = (word(4), word(6));
    let cookie = u64::from_be_bytes(raw[8..16].try_into().expect("eight"));
    let offset = u64::from_be_bytes(raw[16..24].try_into().expect("eight"));
    let length = u32::from_be_bytes(raw[24..].try_into().expect("four"));
    let (is_read, is_write) = (command == 0, command == 1);
    assert_eq!(request.cookie, cookie);

    let within = |range: ByteRange, longest: u64| {
        assert_eq!((range.start, range.len()), (offset, u64::from(length)));
        assert!(!range.is_empty() && range.end <= size && range.len() <= longest);
        assert!(range.start.is_multiple_of(SECTOR) && range.end.is_multiple_of(SECTOR));
    };
    let judgement = request.judge(size, dialect);
    let moved = if is_read || is_write {
        length as usize
    } else {
        0
    };
    assert!(judgement.memory() <= moved.max(MAX_STATUS));
    match judgement {
        Judgement::Read(range) => {
            within(range, MAX_PAYLOAD.into());
            assert!(is_read && (flags & 4 == 0 || dialect != Dialect::Simple));
        }
        Judgement::Write { range, fua } => {
            within(range, MAX_PAYLOAD.into());
            assert!(is_write && fua == (flags & 1 == 1));
        }
        Judgement::Zero {
            range,
            may_unmap,
            fua,
        } => {
            within(range, u32::MAX.into());
            assert!(command == 4 || command == 6);
            assert!(fua == (flags & 1 == 1) && may_unmap == (flags & 2 == 0));
        }
        Judgement::Flush => assert!(command == 3 && offset == 0 && length == 0),
        Judgement::Cache(range) => {
            within(range, u32::MAX.into());
            assert_eq!(command, 5);
        }
        Judgement::Status { range, most } => {
            within(range, u32::MAX.into());
            assert!(command == 7 && dialect.tells_allocation());
            assert!(most >= 1 && (most == 1 || flags & 8 == 0));
        }
        Judgement::Disconnect => assert_eq!(command, 2),
        Judgement::Nothing => assert!(length == 0 && offset <= size && command != 7),
        Judgement::Refuse { error, payload } => {
            // Else the stream would be out of step from here on.
            assert_eq!(payload, if is_write { length } else { 0 });
            let answer = reply::error(dialect, cookie, error);
            let at = if dialect == Dialect::Simple { 4 } else { 20 };
            assert_eq!(answer[at..at + 4], error.number().to_be_bytes());
            assert_eq!(answer[8..16], cookie.to_be_bytes());
            crate::assert_harmless(error.text());
            assert!(error != NbdError::Io && error != NbdError::NotServed);
        }
    }
    if is_write {
        let known = matches!(
            judgement,
            Judgement::Write { .. } | Judgement::Nothing | Judgement::Refuse { .. }
        );
        assert!(
            known,
            "the payload of a write must not be taken for requests"
        );
    }
}

/// Every command, with ordinary and with odd ranges.
pub fn seeds() -> Vec<Vec<u8>> {
    let request = |command: u16, flags: u16, offset: u64, length: u32| {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(7_u64.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes
    };
    let mut all = (1_u64 << 30).to_le_bytes().to_vec();
    for command in 0..8 {
        all.extend(request(command, 0, 4096, 8192));
        all.extend(request(command, 1, 0, 512));
    }
    let mut odd = (1_u64 << 20).to_le_bytes().to_vec();
    odd.extend(request(6, 2, 0, u32::MAX));
    odd.extend(request(1, 0, u64::MAX - 511, 1024));
    odd.extend(request(0, 0, 1, 1));
    odd.extend(request(0, 4, 0, 512));
    odd.extend(request(0, 4, 0, u32::MAX - 511));
    odd.extend(request(7, 8, 0, 4096));
    odd.extend(request(7, 0, 0, 0));
    odd.extend(request(5, 0, 512, 1));
    odd.extend(request(3, 0, 0, 512));
    vec![all, odd]
}
