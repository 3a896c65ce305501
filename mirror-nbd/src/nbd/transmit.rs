//! Requests and replies of the transmission phase, as bytes and as what they ask for.

use mirror_core::limits::{MAX_PAYLOAD, SECTOR};
use mirror_core::node::boundary::GuestError;
use mirror_core::types::ByteRange;

/// Bytes of a request without its payload.
pub const REQUEST_LEN: usize = 28;

/// Bytes of a simple reply without its payload.
pub const REPLY_LEN: usize = 16;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISC: u16 = 2;
const CMD_FLUSH: u16 = 3;
const CMD_TRIM: u16 = 4;
const CMD_WRITE_ZEROES: u16 = 6;

const FLAG_FUA: u16 = 1;
const FLAG_NO_HOLE: u16 = 2;

/// Errors as the protocol numbers them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum NbdError {
    /// The disk failed.
    Io = 5,
    /// The request makes no sense.
    Invalid = 22,
    /// A write past the end.
    NoSpace = 28,
    /// The server is about to close.
    Shutdown = 108,
}

impl From<GuestError> for NbdError {
    fn from(error: GuestError) -> NbdError {
        match error {
            GuestError::OutOfRange => NbdError::Invalid,
            GuestError::Io => NbdError::Io,
            GuestError::NotPrimary => NbdError::Shutdown,
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

/// What a request comes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Judgement {
    /// Read a range.
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
    pub fn judge(&self, size: u64) -> Judgement {
        let payload = if self.command == CMD_WRITE {
            self.length
        } else {
            0
        };
        let refuse = |error| Judgement::Refuse { error, payload };
        let allowed = match self.command {
            CMD_WRITE_ZEROES => FLAG_FUA | FLAG_NO_HOLE,
            _ => FLAG_FUA,
        };
        if self.command == CMD_DISC {
            return Judgement::Disconnect;
        }
        if self.flags & !allowed != 0 {
            return refuse(NbdError::Invalid);
        }
        let fua = self.flags & FLAG_FUA != 0;
        if self.command == CMD_FLUSH {
            return Judgement::Flush;
        }
        let past_end = match self.command {
            CMD_WRITE | CMD_WRITE_ZEROES => NbdError::NoSpace,
            CMD_READ | CMD_TRIM => NbdError::Invalid,
            _ => return refuse(NbdError::Invalid),
        };
        let length = u64::from(self.length);
        let Some(end) = self.offset.checked_add(length) else {
            return refuse(past_end);
        };
        if end > size {
            return refuse(past_end);
        }
        if !self.offset.is_multiple_of(SECTOR) || !length.is_multiple_of(SECTOR) {
            return refuse(NbdError::Invalid);
        }
        if length == 0 {
            return Judgement::Nothing;
        }
        let range = ByteRange::new(self.offset, length);
        match self.command {
            CMD_READ | CMD_WRITE if self.length > MAX_PAYLOAD => refuse(NbdError::Invalid),
            CMD_READ => Judgement::Read(range),
            CMD_WRITE => Judgement::Write { range, fua },
            _ => Judgement::Zero {
                range,
                may_unmap: self.flags & FLAG_NO_HOLE == 0,
                fua,
            },
        }
    }
}

/// The bytes of a reply; a read's data follows one without an error.
pub fn reply(cookie: u64, result: Result<(), NbdError>) -> [u8; REPLY_LEN] {
    let error = result.err().map_or(0, |error| error as u32);
    let mut bytes = [0; REPLY_LEN];
    bytes[..4].copy_from_slice(&REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 30;

    fn judge(command: u16, flags: u16, offset: u64, length: u32) -> Judgement {
        let mut bytes = [0; REQUEST_LEN];
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&command.to_be_bytes());
        bytes[8..16].copy_from_slice(&0x0102_0304_0506_0708_u64.to_be_bytes());
        bytes[16..24].copy_from_slice(&offset.to_be_bytes());
        bytes[24..].copy_from_slice(&length.to_be_bytes());
        let request = Request::decode(&bytes).expect("good magic");
        assert_eq!(request.cookie, 0x0102_0304_0506_0708);
        request.judge(SIZE)
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
        assert!(matches!(request.judge(1 << 40), Judgement::Zero { .. }));
    }

    #[test]
    fn what_cannot_be_is_refused_and_its_payload_known() {
        assert_eq!(judge(CMD_READ, 0, SIZE, 512), refused(NbdError::Invalid, 0));
        assert_eq!(
            judge(CMD_WRITE, 0, SIZE, 512),
            refused(NbdError::NoSpace, 512)
        );
        assert_eq!(
            judge(CMD_WRITE, 0, u64::MAX - 511, 1024),
            refused(NbdError::NoSpace, 1024)
        );
        assert_eq!(judge(CMD_WRITE, 0, 1, 512), refused(NbdError::Invalid, 512));
        assert_eq!(
            judge(CMD_WRITE, 0, 0, MAX_PAYLOAD + 512),
            refused(NbdError::Invalid, MAX_PAYLOAD + 512)
        );
        assert_eq!(judge(5, 0, 0, 512), refused(NbdError::Invalid, 0));
        assert_eq!(judge(CMD_READ, 16, 0, 512), refused(NbdError::Invalid, 0));
        assert_eq!(
            judge(CMD_WRITE, FLAG_NO_HOLE, 0, 512),
            refused(NbdError::Invalid, 512)
        );
    }

    #[test]
    fn a_stream_out_of_step_is_noticed() {
        assert_eq!(Request::decode(&[0xff; REQUEST_LEN]), None);
    }

    #[test]
    fn replies_carry_error_and_cookie() {
        let bytes = reply(0xaabb, Err(NbdError::Shutdown));
        assert_eq!(bytes[..4], [0x67, 0x44, 0x66, 0x98]);
        assert_eq!(bytes[4..8], [0, 0, 0, 108]);
        assert_eq!(bytes[8..], [0, 0, 0, 0, 0, 0, 0xaa, 0xbb]);
        assert_eq!(reply(0, Ok(()))[4..8], [0; 4]);
    }
}
