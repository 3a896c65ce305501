//! Requests of the transmission phase, as bytes and as what they ask for.

use crate::extents::{Extent, MOST};
use crate::nbd::dialect::Dialect;
use mirror_core::limits::{MAX_PAYLOAD, SECTOR};
use mirror_core::node::boundary::GuestError;
use mirror_core::types::ByteRange;

/// Bytes of a request without its payload.
pub const REQUEST_LEN: usize = 28;

const REQUEST_MAGIC: u32 = 0x2560_9513;

const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISC: u16 = 2;
const CMD_FLUSH: u16 = 3;
const CMD_TRIM: u16 = 4;
const CMD_CACHE: u16 = 5;
const CMD_WRITE_ZEROES: u16 = 6;
const CMD_BLOCK_STATUS: u16 = 7;

const FLAG_FUA: u16 = 1;
const FLAG_NO_HOLE: u16 = 2;
const FLAG_DF: u16 = 4;
const FLAG_REQ_ONE: u16 = 8;

/// Why a request is not carried out, or did not succeed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NbdError {
    /// The disk failed.
    Io,
    /// The mirror is not served here any more.
    NotServed,
    /// There is no such command.
    UnknownCommand,
    /// The command has no such flag, or not for this client.
    UnknownFlag,
    /// A range or a part of it is not on the device.
    PastEnd,
    /// The same, of a write.
    NoSpace,
    /// A range does not consist of sectors.
    Unaligned,
    /// More payload than a request may have.
    TooLong,
    /// More than is sent in one chunk, which the client insists on.
    TooLongForOneChunk,
    /// A flush of a range, which there is not.
    FlushOfRange,
    /// Block status without a context that was selected for this export.
    NoContext,
    /// Block status of nothing.
    StatusOfNothing,
}

impl NbdError {
    /// As the protocol numbers errors.
    pub fn number(self) -> u32 {
        match self {
            NbdError::Io => 5,
            NbdError::UnknownCommand
            | NbdError::UnknownFlag
            | NbdError::PastEnd
            | NbdError::Unaligned
            | NbdError::TooLong
            | NbdError::FlushOfRange
            | NbdError::NoContext
            | NbdError::StatusOfNothing => 22,
            NbdError::NoSpace => 28,
            NbdError::TooLongForOneChunk => 75,
            NbdError::NotServed => 108,
        }
    }

    /// For the client's user.
    pub fn text(self) -> &'static str {
        match self {
            NbdError::Io => "the disk failed",
            NbdError::NotServed => "this node does not serve the mirror any more",
            NbdError::UnknownCommand => "no such command",
            NbdError::UnknownFlag => "a flag that this command does not have",
            NbdError::PastEnd => "past the end of the device",
            NbdError::NoSpace => "a write past the end of the device",
            NbdError::Unaligned => "offset or length is not a multiple of 512",
            NbdError::TooLong => "more than 32 MiB of payload",
            NbdError::TooLongForOneChunk => "more than 32 MiB in one chunk",
            NbdError::FlushOfRange => "a flush has neither offset nor length",
            NbdError::NoContext => "no metadata context was selected for this export",
            NbdError::StatusOfNothing => "block status of no bytes",
        }
    }
}

impl From<GuestError> for NbdError {
    fn from(error: GuestError) -> NbdError {
        match error {
            GuestError::OutOfRange => NbdError::PastEnd,
            GuestError::Io => NbdError::Io,
            GuestError::NotPrimary => NbdError::NotServed,
        }
    }
}

/// A request as it stands on the wire: parsed, not judged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    flags: u16,
    command: u16,
    /// The client's name for it.
    pub cookie: u64,
    offset: u64,
    length: u32,
}

/// What a request comes to. Ranges are not empty, lie on the device and consist of sectors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Judgement {
    /// Read a range, which is one chunk.
    Read(ByteRange),
    /// Write the payload that follows.
    Write {
        /// Where to.
        range: ByteRange,
        /// Force unit access.
        fua: bool,
    },
    /// Zero or trim a range.
    Zero {
        /// Which.
        range: ByteRange,
        /// Whether holes are welcome.
        may_unmap: bool,
        /// Force unit access.
        fua: bool,
    },
    /// Flush.
    Flush,
    /// Have a range at hand.
    Cache(ByteRange),
    /// Tell where a range has holes.
    Status {
        /// Which.
        range: ByteRange,
        /// In how many extents at most.
        most: u32,
    },
    /// The client is done.
    Disconnect,
    /// Nothing to do: an empty range.
    Nothing,
    /// Not to be carried out.
    Refuse {
        /// What to answer.
        error: NbdError,
        /// Bytes of payload that follow all the same.
        payload: u32,
    },
}

impl Judgement {
    /// Bytes of memory that carrying it out takes.
    pub fn memory(&self) -> usize {
        match self {
            Judgement::Read(range) | Judgement::Write { range, .. } => range.len() as usize,
            Judgement::Status { most, .. } => *most as usize * size_of::<Extent>(),
            _ => 0,
        }
    }
}

impl Request {
    /// Reads a request; `None` when the stream is out of step and must be closed.
    pub fn decode(bytes: &[u8; REQUEST_LEN]) -> Option<Request> {
        let u16_at = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) << 16 | u32::from(u16_at(at + 2));
        let u64_at = |at: usize| u64::from(u32_at(at)) << 32 | u64::from(u32_at(at + 4));
        (u32_at(0) == REQUEST_MAGIC).then(|| Request {
            flags: u16_at(4),
            command: u16_at(6),
            cookie: u64_at(8),
            offset: u64_at(16),
            length: u32_at(24),
        })
    }

    /// What it asks of a device of `size` bytes.
    pub fn judge(&self, size: u64, dialect: Dialect) -> Judgement {
        self.examine(size, dialect).unwrap_or_else(|error| {
            let payload = match self.command {
                CMD_WRITE => self.length,
                _ => 0,
            };
            Judgement::Refuse { error, payload }
        })
    }

    fn examine(&self, size: u64, dialect: Dialect) -> Result<Judgement, NbdError> {
        if self.command == CMD_DISC {
            return Ok(Judgement::Disconnect);
        }
        if self.flags & !self.allowed_flags(dialect) != 0 {
            return Err(NbdError::UnknownFlag);
        }
        match self.command {
            CMD_FLUSH if self.offset != 0 || self.length != 0 => Err(NbdError::FlushOfRange),
            CMD_FLUSH => Ok(Judgement::Flush),
            CMD_BLOCK_STATUS if !dialect.tells_allocation() => Err(NbdError::NoContext),
            CMD_BLOCK_STATUS if self.length == 0 => Err(NbdError::StatusOfNothing),
            CMD_READ | CMD_WRITE | CMD_TRIM | CMD_CACHE | CMD_WRITE_ZEROES | CMD_BLOCK_STATUS => {
                let range = self.range(size)?;
                if range.is_empty() {
                    return Ok(Judgement::Nothing);
                }
                self.examine_range(range)
            }
            _ => Err(NbdError::UnknownCommand),
        }
    }

    /// FUA is welcome with every command, and means nothing where nothing is written.
    fn allowed_flags(&self, dialect: Dialect) -> u16 {
        let own = match (self.command, dialect) {
            (CMD_READ, Dialect::Structured(_)) => FLAG_DF,
            (CMD_WRITE_ZEROES, _) => FLAG_NO_HOLE,
            (CMD_BLOCK_STATUS, _) => FLAG_REQ_ONE,
            _ => 0,
        };
        FLAG_FUA | own
    }

    fn range(&self, size: u64) -> Result<ByteRange, NbdError> {
        let length = u64::from(self.length);
        let end = self.offset.checked_add(length);
        if end.is_none_or(|end| end > size) {
            return Err(match self.command {
                CMD_WRITE | CMD_WRITE_ZEROES => NbdError::NoSpace,
                _ => NbdError::PastEnd,
            });
        }
        if !self.offset.is_multiple_of(SECTOR) || !length.is_multiple_of(SECTOR) {
            return Err(NbdError::Unaligned);
        }
        Ok(ByteRange::new(self.offset, length))
    }

    fn examine_range(&self, range: ByteRange) -> Result<Judgement, NbdError> {
        let has = |flag| self.flags & flag != 0;
        let fua = has(FLAG_FUA);
        match self.command {
            CMD_READ if self.length > MAX_PAYLOAD && has(FLAG_DF) => {
                Err(NbdError::TooLongForOneChunk)
            }
            CMD_READ | CMD_WRITE if self.length > MAX_PAYLOAD => Err(NbdError::TooLong),
            CMD_READ => Ok(Judgement::Read(range)),
            CMD_WRITE => Ok(Judgement::Write { range, fua }),
            CMD_CACHE => Ok(Judgement::Cache(range)),
            CMD_BLOCK_STATUS => Ok(Judgement::Status {
                range,
                most: if has(FLAG_REQ_ONE) { 1 } else { MOST },
            }),
            _ => Ok(Judgement::Zero {
                range,
                may_unmap: !has(FLAG_NO_HOLE),
                fua,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::dialect::Contexts;

    const SIZE: u64 = 1 << 30;

    fn judge(command: u16, flags: u16, offset: u64, length: u32) -> Judgement {
        judge_in(Dialect::Simple, command, flags, offset, length)
    }

    fn judge_in(dialect: Dialect, command: u16, flags: u16, offset: u64, length: u32) -> Judgement {
        let mut bytes = [0; REQUEST_LEN];
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&command.to_be_bytes());
        bytes[8..16].copy_from_slice(&0x0102_0304_0506_0708_u64.to_be_bytes());
        bytes[16..24].copy_from_slice(&offset.to_be_bytes());
        bytes[24..].copy_from_slice(&length.to_be_bytes());
        let request = Request::decode(&bytes).expect("good magic");
        assert_eq!(request.cookie, 0x0102_0304_0506_0708);
        request.judge(SIZE, dialect)
    }

    fn refused(error: NbdError, payload: u32) -> Judgement {
        Judgement::Refuse { error, payload }
    }

    #[test]
    fn ordinary_requests_are_understood() {
        let range = ByteRange::new(4096, 512);
        assert_eq!(judge(CMD_READ, 0, 4096, 512), Judgement::Read(range));
        let write = Judgement::Write { range, fua: true };
        assert_eq!(judge(CMD_WRITE, FLAG_FUA, 4096, 512), write);
        let trim = Judgement::Zero {
            range,
            may_unmap: true,
            fua: false,
        };
        assert_eq!(judge(CMD_TRIM, 0, 4096, 512), trim);
        let zero = Judgement::Zero {
            range,
            may_unmap: false,
            fua: false,
        };
        assert_eq!(judge(CMD_WRITE_ZEROES, FLAG_NO_HOLE, 4096, 512), zero);
        assert_eq!(judge(CMD_FLUSH, 0, 0, 0), Judgement::Flush);
        assert_eq!(judge(CMD_DISC, 0, 0, 0), Judgement::Disconnect);
        assert_eq!(judge(CMD_READ, 0, SIZE, 0), Judgement::Nothing);
    }

    #[test]
    fn a_whole_device_may_be_zeroed_at_once() {
        let length = (u32::MAX >> 9) << 9;
        let request = Request {
            flags: 0,
            command: CMD_WRITE_ZEROES,
            cookie: 0,
            offset: 0,
            length,
        };
        assert!(matches!(
            request.judge(1 << 40, Dialect::Simple),
            Judgement::Zero { .. }
        ));
    }

    #[test]
    fn what_cannot_be_is_refused_and_its_payload_known() {
        assert_eq!(judge(CMD_READ, 0, SIZE, 512), refused(NbdError::PastEnd, 0));
        assert_eq!(
            judge(CMD_WRITE, 0, SIZE, 512),
            refused(NbdError::NoSpace, 512)
        );
        assert_eq!(
            judge(CMD_WRITE, 0, u64::MAX - 511, 1024),
            refused(NbdError::NoSpace, 1024)
        );
        assert_eq!(judge(CMD_TRIM, 0, SIZE, 512), refused(NbdError::PastEnd, 0));
        assert_eq!(
            judge(CMD_WRITE_ZEROES, 0, SIZE - 512, 1024),
            refused(NbdError::NoSpace, 0)
        );
        assert_eq!(
            judge(CMD_WRITE, 0, 1, 512),
            refused(NbdError::Unaligned, 512)
        );
        assert_eq!(
            judge(CMD_WRITE, 0, 0, MAX_PAYLOAD + 512),
            refused(NbdError::TooLong, MAX_PAYLOAD + 512)
        );
        assert_eq!(judge(9, 0, 0, 512), refused(NbdError::UnknownCommand, 0));
        assert_eq!(
            judge(CMD_READ, 16, 0, 512),
            refused(NbdError::UnknownFlag, 0)
        );
        // FAST_ZERO.
        assert_eq!(
            judge(CMD_WRITE_ZEROES, 16, 0, 512),
            refused(NbdError::UnknownFlag, 0)
        );
        assert_eq!(
            judge(CMD_WRITE, FLAG_NO_HOLE, 0, 512),
            refused(NbdError::UnknownFlag, 512)
        );
        assert_eq!(
            judge(CMD_FLUSH, 0, 0, 512),
            refused(NbdError::FlushOfRange, 0)
        );
    }

    #[test]
    fn one_chunk_is_promised_only_where_chunks_are() {
        let range = ByteRange::new(0, 512);
        for contexts in [Contexts::None, Contexts::Allocation] {
            let dialect = Dialect::Structured(contexts);
            let read = |length| judge_in(dialect, CMD_READ, FLAG_DF, 0, length);
            assert_eq!(read(512), Judgement::Read(range));
            assert_eq!(
                read(MAX_PAYLOAD + 512),
                refused(NbdError::TooLongForOneChunk, 0)
            );
        }
        assert_eq!(
            judge(CMD_READ, FLAG_DF, 0, 512),
            refused(NbdError::UnknownFlag, 0)
        );
        assert_eq!(
            judge(CMD_READ, 0, 0, MAX_PAYLOAD + 512),
            refused(NbdError::TooLong, 0)
        );
    }

    #[test]
    fn block_status_needs_its_context() {
        for dialect in [Dialect::Simple, Dialect::Structured(Contexts::None)] {
            let judgement = judge_in(dialect, CMD_BLOCK_STATUS, 0, 0, 512);
            assert_eq!(judgement, refused(NbdError::NoContext, 0));
        }
        let ask = |flags, offset, length| {
            let dialect = Dialect::Structured(Contexts::Allocation);
            judge_in(dialect, CMD_BLOCK_STATUS, flags, offset, length)
        };
        let range = ByteRange::new(0, SIZE);
        let status = |most| Judgement::Status { range, most };
        assert_eq!(ask(0, 0, SIZE as u32), status(MOST));
        assert_eq!(ask(FLAG_REQ_ONE, 0, SIZE as u32), status(1));
        assert_eq!(ask(0, 0, 0), refused(NbdError::StatusOfNothing, 0));
        assert_eq!(ask(0, SIZE, 512), refused(NbdError::PastEnd, 0));
        assert_eq!(ask(0, 512, 1), refused(NbdError::Unaligned, 0));
        assert_eq!(ask(FLAG_DF, 0, 512), refused(NbdError::UnknownFlag, 0));
    }

    #[test]
    fn caching_has_the_bounds_of_a_read_but_no_limit() {
        let all = ByteRange::new(0, SIZE);
        assert_eq!(judge(CMD_CACHE, 0, 0, SIZE as u32), Judgement::Cache(all));
        assert_eq!(judge(CMD_CACHE, 0, SIZE, 0), Judgement::Nothing);
        assert_eq!(
            judge(CMD_CACHE, 0, SIZE, 512),
            refused(NbdError::PastEnd, 0)
        );
        assert_eq!(judge(CMD_CACHE, 0, 1, 512), refused(NbdError::Unaligned, 0));
        assert_eq!(
            judge(CMD_CACHE, 2, 0, 512),
            refused(NbdError::UnknownFlag, 0)
        );
    }

    #[test]
    fn a_stream_out_of_step_is_noticed() {
        assert_eq!(Request::decode(&[0xff; REQUEST_LEN]), None);
    }
}
