//! The mirror link's frames (docs/format.md, "The link").
//!
//! Every frame is a 48-byte header, little-endian, and a payload of the length the header names.
//! The header carries its own CRC and the payload's; a receiver believes neither length nor type
//! before the header's CRC matched and the length is within the bound of its type. `Hello` is the
//! first frame of the agreement and negotiates the version, so the layout of what it has never
//! changes.

pub mod message;

use crate::limits::{MAX_CONTROL_PAYLOAD, MAX_PAYLOAD, RESYNC_CHUNK};
use thiserror::Error;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a frame header.
pub const HEADER_LEN: usize = 48;

/// The link protocol versions this build speaks, oldest and newest.
pub const VERSIONS: (u16, u16) = (1, 1);

/// What a frame says.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum FrameType {
    /// Identity, versions and facts: the first frame of the agreement.
    Hello = 1,
    /// The sender's reading of the handshake table; both must mirror each other.
    Verdict = 2,
    /// The sender recorded the agreement durably and is ready for traffic.
    Ready = 3,
    /// The sender closes the connection on purpose; the payload says why.
    Goodbye = 4,
    /// Are you there? Carries a number.
    Ping = 5,
    /// The answer, with the same number.
    Pong = 6,
    /// The sender's role and disk state changed.
    State = 7,

    /// Guest data to write.
    Write = 16,
    /// A range to zero.
    Zero = 17,
    /// Make everything completed so far durable.
    Flush = 18,
    /// The request named by `id` completed on the sender's replica.
    Done = 19,

    /// You are the target from here on; record it.
    SyncStart = 32,
    /// A piece of the target's dirty bitmap.
    SyncBits = 33,
    /// The target recorded it and sent all its bits.
    SyncReady = 34,
    /// Resync data to write.
    SyncWrite = 35,
    /// A resync range to zero.
    SyncZero = 36,
    /// How many bytes are dirty in all, in `offset`; for the target's status only.
    SyncTotal = 39,
    /// Everything is there: become UpToDate durably.
    SyncFinish = 37,
    /// The target is UpToDate durably.
    SyncFinished = 38,

    /// The sender wants to start a generation as Primary; record it.
    Promote = 48,
    /// Recorded.
    Promoted = 49,
    /// Not granted; the payload says why.
    PromoteRefused = 50,

    /// What are the digests of this range on your replica? Of a verify, or of a chunk of a resync.
    Digest = 64,
    /// They are these; none if it cannot be read.
    Digests = 65,
}

impl FrameType {
    /// All of them.
    pub const ALL: &[FrameType] = &[
        FrameType::Hello,
        FrameType::Verdict,
        FrameType::Ready,
        FrameType::Goodbye,
        FrameType::Ping,
        FrameType::Pong,
        FrameType::State,
        FrameType::Write,
        FrameType::Zero,
        FrameType::Flush,
        FrameType::Done,
        FrameType::SyncStart,
        FrameType::SyncBits,
        FrameType::SyncReady,
        FrameType::SyncWrite,
        FrameType::SyncZero,
        FrameType::SyncTotal,
        FrameType::SyncFinish,
        FrameType::SyncFinished,
        FrameType::Promote,
        FrameType::Promoted,
        FrameType::PromoteRefused,
        FrameType::Digest,
        FrameType::Digests,
    ];

    fn parse(byte: u8) -> Option<FrameType> {
        Self::ALL.iter().copied().find(|kind| *kind as u8 == byte)
    }

    /// What the payload of such a frame is, and how long it may be.
    pub fn payload_kind(self) -> PayloadKind {
        match self {
            FrameType::Write => PayloadKind::Data { max: MAX_PAYLOAD },
            FrameType::SyncWrite => PayloadKind::Data {
                max: RESYNC_CHUNK as u32,
            },
            FrameType::Hello
            | FrameType::Verdict
            | FrameType::Goodbye
            | FrameType::State
            | FrameType::SyncStart
            | FrameType::SyncBits
            | FrameType::Promote
            | FrameType::PromoteRefused
            | FrameType::Digests => PayloadKind::Control {
                max: MAX_CONTROL_PAYLOAD,
            },
            _ => PayloadKind::None,
        }
    }
}

/// The nature and the bound of a frame's payload.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PayloadKind {
    /// No payload.
    None,
    /// Guest data, to be received into a buffer for the disk.
    Data {
        /// Most bytes.
        max: u32,
    },
    /// A message for the core.
    Control {
        /// Most bytes.
        max: u32,
    },
}

/// Complete only when on stable storage.
pub const FLAG_FUA: u8 = 1;
/// The store may give the zeroed space back.
pub const FLAG_MAY_UNMAP: u8 = 2;
/// In a [`FrameType::SyncReady`]: every block of the sender is dirty; no bits were sent.
pub const FLAG_WHOLE: u8 = 4;
/// In a [`FrameType::Pong`]: a lease of `length` milliseconds, from the sending of the ping on.
pub const FLAG_LEASE: u8 = 8;
/// In a [`FrameType::SyncReady`]: compare each chunk before it is sent.
pub const FLAG_CHECKSUM: u8 = 16;

/// Every flag there is.
const FLAGS: u8 = FLAG_FUA | FLAG_MAY_UNMAP | FLAG_WHOLE | FLAG_LEASE | FLAG_CHECKSUM;

/// A frame header whose CRC, type and lengths were checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// What it says.
    pub kind: FrameType,
    /// `FLAG_*`.
    pub flags: u8,
    /// The generation it speaks in ([`crate::types::Generation::tag`]); 0 in frames
    /// that speak in none.
    pub generation: u64,
    /// The request it is about, numbered by the asker within the connection.
    pub id: u64,
    /// First byte of the range it is about.
    pub offset: u64,
    /// Length of that range, in bytes.
    pub length: u32,
    /// Bytes of payload that follow.
    pub payload_len: u32,
    /// CRC-32 of the payload; 0 without one.
    pub payload_crc: u32,
}

/// Why a header is not believed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum WireError {
    /// The CRC of the header does not match its bytes.
    #[error("frame header with a bad checksum")]
    HeaderChecksum,
    /// An unknown frame type.
    #[error("frame of unknown type {0}")]
    UnknownType(u8),
    /// Flags that this version does not know.
    #[error("frame with unknown flags {0:#04x}")]
    UnknownFlags(u8),
    /// A payload longer than its type allows, or a payload where none belongs.
    #[error("{kind:?} frame with a payload of {len} bytes")]
    PayloadLength {
        /// The frame's type.
        kind: FrameType,
        /// What the header claims.
        len: u32,
    },
    /// A data frame whose range is not as long as its payload.
    #[error("{kind:?} frame whose range and payload differ in length")]
    RangeMismatch {
        /// The frame's type.
        kind: FrameType,
    },
    /// A control payload that does not decode.
    #[error("malformed {0:?} message")]
    Malformed(FrameType),
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    kind: u8,
    flags: u8,
    reserved: U16,
    payload_len: U32,
    generation: U64,
    id: U64,
    offset: U64,
    length: U32,
    payload_crc: U32,
    reserved2: U32,
    header_crc: U32,
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_LEN);

impl Header {
    /// A header without a payload or range.
    pub fn bare(kind: FrameType, generation: u64, id: u64) -> Header {
        Header {
            kind,
            flags: 0,
            generation,
            id,
            offset: 0,
            length: 0,
            payload_len: 0,
            payload_crc: 0,
        }
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut raw = RawHeader {
            kind: self.kind as u8,
            flags: self.flags,
            reserved: U16::ZERO,
            payload_len: self.payload_len.into(),
            generation: self.generation.into(),
            id: self.id.into(),
            offset: self.offset.into(),
            length: self.length.into(),
            payload_crc: self.payload_crc.into(),
            reserved2: U32::ZERO,
            header_crc: U32::ZERO,
        };
        let crc = crc32fast::hash(&raw.as_bytes()[..HEADER_LEN - 4]);
        raw.header_crc = crc.into();
        zerocopy::transmute!(raw)
    }

    /// Reads and checks a header.
    ///
    /// # Errors
    ///
    /// [`WireError`] when the bytes are not a header this version would send; the connection
    /// must be closed, because the stream can no longer be framed.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Header, WireError> {
        let raw: &RawHeader = zerocopy::transmute_ref!(bytes);
        if crc32fast::hash(&bytes[..HEADER_LEN - 4]) != raw.header_crc.get() {
            return Err(WireError::HeaderChecksum);
        }
        if raw.flags & !FLAGS != 0 {
            return Err(WireError::UnknownFlags(raw.flags));
        }
        let kind = FrameType::parse(raw.kind).ok_or(WireError::UnknownType(raw.kind))?;
        let header = Header {
            kind,
            flags: raw.flags,
            generation: raw.generation.get(),
            id: raw.id.get(),
            offset: raw.offset.get(),
            length: raw.length.get(),
            payload_len: raw.payload_len.get(),
            payload_crc: raw.payload_crc.get(),
        };
        let len = header.payload_len;
        let fits = match kind.payload_kind() {
            PayloadKind::None => len == 0,
            PayloadKind::Control { max } => len <= max,
            PayloadKind::Data { max } => len > 0 && len <= max,
        };
        if !fits {
            return Err(WireError::PayloadLength { kind, len });
        }
        if matches!(kind.payload_kind(), PayloadKind::Data { .. }) && header.length != len {
            return Err(WireError::RangeMismatch { kind });
        }
        Ok(header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn write() -> Header {
        Header {
            kind: FrameType::Write,
            flags: FLAG_FUA,
            generation: 0x1122,
            id: 3,
            offset: 0x1_0000_0000,
            length: 512,
            payload_len: 512,
            payload_crc: 0xdead_beef,
        }
    }

    #[test]
    fn golden_bytes() {
        let bytes = write().encode();
        #[rustfmt::skip]
        assert_eq!(&bytes[..44], [
            16, 1, 0, 0, 0, 2, 0, 0,
            0x22, 0x11, 0, 0, 0, 0, 0, 0,
            3, 0, 0, 0, 0, 0, 0, 0,
            0, 0, 0, 0, 1, 0, 0, 0,
            0, 2, 0, 0, 0xef, 0xbe, 0xad, 0xde,
            0, 0, 0, 0,
        ]);
        assert_eq!(bytes[44..], crc32fast::hash(&bytes[..44]).to_le_bytes());
        assert_eq!(Header::decode(&bytes), Ok(write()));
    }

    /// docs/format.md, "Frame header" and "Frame types".
    #[test]
    fn offsets_and_numbers_are_as_documented() {
        use core::mem::offset_of;
        assert_eq!(offset_of!(RawHeader, kind), 0);
        assert_eq!(offset_of!(RawHeader, flags), 1);
        assert_eq!(offset_of!(RawHeader, reserved), 2);
        assert_eq!(offset_of!(RawHeader, payload_len), 4);
        assert_eq!(offset_of!(RawHeader, generation), 8);
        assert_eq!(offset_of!(RawHeader, id), 16);
        assert_eq!(offset_of!(RawHeader, offset), 24);
        assert_eq!(offset_of!(RawHeader, length), 32);
        assert_eq!(offset_of!(RawHeader, payload_crc), 36);
        assert_eq!(offset_of!(RawHeader, reserved2), 40);
        assert_eq!(offset_of!(RawHeader, header_crc), 44);
        let known: Vec<u8> = (0..=u8::MAX)
            .filter(|byte| FrameType::parse(*byte).is_some())
            .collect();
        let documented: Vec<u8> = (1..=7)
            .chain(16..=19)
            .chain(32..=39)
            .chain(48..=50)
            .chain(64..=65)
            .collect();
        assert_eq!(known, documented);
    }

    #[test]
    fn lengths_are_bounded_by_type() {
        let decode = |header: Header| Header::decode(&header.encode());
        let len = |kind, len| Header {
            kind,
            length: len,
            payload_len: len,
            ..write()
        };
        assert!(decode(len(FrameType::Write, MAX_PAYLOAD)).is_ok());
        assert!(decode(len(FrameType::Write, MAX_PAYLOAD + 1)).is_err());
        assert!(decode(len(FrameType::Write, 0)).is_err());
        assert!(decode(len(FrameType::SyncWrite, RESYNC_CHUNK as u32 + 1)).is_err());
        assert!(decode(len(FrameType::Hello, MAX_CONTROL_PAYLOAD + 1)).is_err());
        assert!(decode(len(FrameType::Ping, 1)).is_err());
        assert!(
            decode(Header {
                length: 511,
                ..write()
            })
            .is_err()
        );
    }

    proptest! {
        #[test]
        fn a_flipped_bit_is_noticed(at in 0usize..HEADER_LEN, bit in 0u8..8) {
            let mut bytes = write().encode();
            bytes[at] ^= 1 << bit;
            prop_assert_eq!(Header::decode(&bytes), Err(WireError::HeaderChecksum));
        }
    }
}
