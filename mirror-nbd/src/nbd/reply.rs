//! Replies of the transmission phase as bytes.
//!
//! A client that agreed on structured replies gets every read, every error and every block status
//! as one chunk. Other successes stay simple replies, which the protocol allows: they are smaller.

use crate::extents::{Allocation, Extent};
use crate::nbd::dialect::Dialect;
use crate::nbd::transmit::NbdError;

const SIMPLE_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;

const SIMPLE_LEN: usize = 16;
const CHUNK_LEN: usize = 20;

/// The chunk is the reply's last.
const DONE: u16 = 1;

const TYPE_NONE: u16 = 0;
const TYPE_OFFSET_DATA: u16 = 1;
const TYPE_BLOCK_STATUS: u16 = 5;
const TYPE_ERROR: u16 = 0x8001;

const STATE_HOLE: u32 = 1;
const STATE_ZERO: u32 = 2;

/// The number by which clients know `base:allocation` once they selected it.
pub const ALLOCATION_ID: u32 = 1;

/// What stands before the data of a read, or is a whole reply.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    bytes: [u8; CHUNK_LEN + 8],
    len: usize,
}

impl Head {
    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    fn of(parts: &[&[u8]]) -> Head {
        let mut head = Head {
            bytes: [0; CHUNK_LEN + 8],
            len: 0,
        };
        for part in parts {
            head.bytes[head.len..head.len + part.len()].copy_from_slice(part);
            head.len += part.len();
        }
        head
    }
}

/// A success without data.
pub fn done(cookie: u64) -> Head {
    Head::of(&[&simple(cookie, 0)])
}

/// A success of a request for nothing, which may have been a read.
pub fn nothing(dialect: Dialect, cookie: u64) -> Head {
    match dialect {
        Dialect::Simple => done(cookie),
        Dialect::Structured(_) => Head::of(&[&chunk(TYPE_NONE, cookie, 0)]),
    }
}

/// What stands before the `len` bytes that a read found at `offset`.
pub fn data(dialect: Dialect, cookie: u64, offset: u64, len: usize) -> Head {
    match dialect {
        Dialect::Simple => done(cookie),
        Dialect::Structured(_) => {
            let chunk = chunk(TYPE_OFFSET_DATA, cookie, 8 + len);
            Head::of(&[&chunk, &offset.to_be_bytes()])
        }
    }
}

/// A failure, with a text for the client's user where there is a place for it.
pub fn error(dialect: Dialect, cookie: u64, error: NbdError) -> Vec<u8> {
    let number = error.number();
    match dialect {
        Dialect::Simple => simple(cookie, number).to_vec(),
        Dialect::Structured(_) => {
            let text = error.text().as_bytes();
            let mut bytes = chunk(TYPE_ERROR, cookie, 6 + text.len()).to_vec();
            bytes.extend_from_slice(&number.to_be_bytes());
            bytes.extend_from_slice(&(text.len() as u16).to_be_bytes());
            bytes.extend_from_slice(text);
            bytes
        }
    }
}

/// The status of consecutive extents, of which there is at least one.
pub fn status(cookie: u64, extents: &[Extent]) -> Vec<u8> {
    let mut bytes = chunk(TYPE_BLOCK_STATUS, cookie, 4 + 8 * extents.len()).to_vec();
    bytes.reserve_exact(4 + 8 * extents.len());
    bytes.extend_from_slice(&ALLOCATION_ID.to_be_bytes());
    for extent in extents {
        let flags = match extent.kind {
            Allocation::Data => 0,
            Allocation::Hole => STATE_HOLE | STATE_ZERO,
        };
        bytes.extend_from_slice(&extent.len.to_be_bytes());
        bytes.extend_from_slice(&flags.to_be_bytes());
    }
    bytes
}

fn simple(cookie: u64, error: u32) -> [u8; SIMPLE_LEN] {
    let mut bytes = [0; SIMPLE_LEN];
    bytes[..4].copy_from_slice(&SIMPLE_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

/// The header of a reply's only chunk.
fn chunk(kind: u16, cookie: u64, len: usize) -> [u8; CHUNK_LEN] {
    let mut bytes = [0; CHUNK_LEN];
    bytes[..4].copy_from_slice(&CHUNK_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&DONE.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..].copy_from_slice(&(len as u32).to_be_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::dialect::Contexts;

    const STRUCTURED: Dialect = Dialect::Structured(Contexts::Allocation);
    const COOKIE: u64 = 0x0102_0304_0506_0708;

    #[test]
    fn simple_replies_carry_error_and_cookie() {
        let bytes = error(Dialect::Simple, 0xaabb, NbdError::NotServed);
        assert_eq!(bytes[..4], [0x67, 0x44, 0x66, 0x98]);
        assert_eq!(bytes[4..8], [0, 0, 0, 108]);
        assert_eq!(bytes[8..], [0, 0, 0, 0, 0, 0, 0xaa, 0xbb]);
        for head in [
            done(COOKIE),
            nothing(Dialect::Simple, COOKIE),
            data(Dialect::Simple, COOKIE, 512, 512),
        ] {
            assert_eq!(
                head.bytes(),
                b"\x67\x44\x66\x98\0\0\0\0\x01\x02\x03\x04\x05\x06\x07\x08"
            );
        }
    }

    #[test]
    fn a_read_is_one_chunk_that_says_where_its_data_belongs() {
        let head = data(STRUCTURED, COOKIE, 0x1_0000_0200, 4096);
        let mut expected = b"\x66\x8e\x33\xef\0\x01\0\x01".to_vec();
        expected.extend(COOKIE.to_be_bytes());
        expected.extend(4104_u32.to_be_bytes());
        expected.extend(0x1_0000_0200_u64.to_be_bytes());
        assert_eq!(head.bytes(), expected);
    }

    #[test]
    fn nothing_read_is_an_empty_chunk() {
        let head = nothing(STRUCTURED, COOKIE);
        let mut expected = b"\x66\x8e\x33\xef\0\x01\0\0".to_vec();
        expected.extend(COOKIE.to_be_bytes());
        expected.extend([0; 4]);
        assert_eq!(head.bytes(), expected);
    }

    #[test]
    fn an_error_chunk_has_a_number_and_a_text() {
        let bytes = error(STRUCTURED, COOKIE, NbdError::PastEnd);
        assert_eq!(bytes[..8], *b"\x66\x8e\x33\xef\0\x01\x80\x01");
        let text = NbdError::PastEnd.text();
        assert_eq!(bytes[16..20], (6 + text.len() as u32).to_be_bytes());
        assert_eq!(bytes[20..24], [0, 0, 0, 22]);
        assert_eq!(bytes[24..26], (text.len() as u16).to_be_bytes());
        assert_eq!(bytes[26..], *text.as_bytes());
    }

    #[test]
    fn a_hole_reads_as_zeroes_and_nothing_is_known_of_data() {
        let extents = [
            Extent {
                len: 4096,
                kind: Allocation::Hole,
            },
            Extent {
                len: 512,
                kind: Allocation::Data,
            },
        ];
        let bytes = status(COOKIE, &extents);
        assert_eq!(bytes[..8], *b"\x66\x8e\x33\xef\0\x01\0\x05");
        assert_eq!(bytes[16..20], 20_u32.to_be_bytes());
        assert_eq!(bytes[20..24], ALLOCATION_ID.to_be_bytes());
        assert_eq!(bytes[24..32], [0, 0, 0x10, 0, 0, 0, 0, 3]);
        assert_eq!(bytes[32..], [0, 0, 2, 0, 0, 0, 0, 0]);
    }
}
