//! The driver's payload buffers, and the check that the core keeps the boundary's contract about
//! them: every payload given to it is released exactly once, and never used after that.
//!
//! A 512-byte sector is represented by the 64-bit stamp that names the write it came from; the
//! core never sees payload bytes, so nothing of it can tell the difference.

use crate::node::boundary::Payload;
use std::collections::HashMap;
use std::rc::Rc;

use crate::limits::{BLOCK, SECTOR};
use crate::types::Digest;

/// The contents of a buffer: one stamp per sector.
pub(super) type Stamps = Rc<[u64]>;

struct Buffer {
    stamps: Stamps,
    held_by_core: bool,
    operations: u32,
}

/// The buffers of one process.
#[derive(Default)]
pub(super) struct Buffers {
    table: HashMap<u32, Buffer>,
    next: u32,
}

/// The checksum a driver would compute over the bytes.
pub(super) fn checksum(stamps: &[u64]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    for piece in stamps.chunks(64) {
        let mut bytes = [0u8; 512];
        for (slot, stamp) in bytes.chunks_exact_mut(8).zip(piece) {
            slot.copy_from_slice(&stamp.to_le_bytes());
        }
        hasher.update(&bytes[..piece.len() * 8]);
    }
    hasher.finalize()
}

/// The digests a driver would compute over the blocks: those of other stamps are others.
pub(super) fn digests(stamps: &[u64]) -> Vec<Digest> {
    let mix = |digest: u128, stamp: &u64| {
        let mixed =
            (digest ^ u128::from(*stamp)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        mixed.rotate_left(61)
    };
    stamps
        .chunks((BLOCK / SECTOR) as usize)
        .map(|block| Digest(block.iter().fold(0x6c62_272e_07bb_0142, mix)))
        .collect()
}

/// Whether the checksum of a fresh payload is wanted by the core.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Checksum {
    Wanted,
    NotWanted,
}

impl Buffers {
    /// A fresh buffer that is about to be given to the core.
    pub fn give(&mut self, stamps: Stamps, wanted: Checksum) -> Payload {
        let buffer = self.next;
        self.next += 1;
        let (crc, zero) = match wanted {
            Checksum::Wanted => (checksum(&stamps), stamps.iter().all(|stamp| *stamp == 0)),
            Checksum::NotWanted => (0, false),
        };
        let len = (stamps.len() as u64 * SECTOR) as u32;
        self.table.insert(
            buffer,
            Buffer {
                stamps,
                held_by_core: true,
                operations: 0,
            },
        );
        Payload {
            buffer,
            len,
            crc,
            zero,
        }
    }

    /// The contents of a payload that the core uses in an action.
    pub fn look(&self, payload: &Payload) -> Result<Stamps, String> {
        match self.table.get(&payload.buffer) {
            Some(buffer) if buffer.held_by_core => {
                if buffer.stamps.len() as u64 * SECTOR == u64::from(payload.len) {
                    Ok(buffer.stamps.clone())
                } else {
                    Err(format!("buffer {} changed its length", payload.buffer))
                }
            }
            _ => Err(format!("buffer {} is used after release", payload.buffer)),
        }
    }

    /// An operation on the buffer starts.
    pub fn begin(&mut self, payload: &Payload) -> Result<Stamps, String> {
        let stamps = self.look(payload)?;
        if let Some(buffer) = self.table.get_mut(&payload.buffer) {
            buffer.operations += 1;
        }
        Ok(stamps)
    }

    /// An operation on the buffer ended.
    pub fn end(&mut self, buffer: u32) {
        if let Some(entry) = self.table.get_mut(&buffer) {
            entry.operations -= 1;
            if entry.operations == 0 && !entry.held_by_core {
                self.table.remove(&buffer);
            }
        }
    }

    /// The core gives the payload up.
    pub fn release(&mut self, payload: &Payload) -> Result<Stamps, String> {
        let stamps = self
            .look(payload)
            .map_err(|_| format!("buffer {} is released twice", payload.buffer))?;
        if let Some(entry) = self.table.get_mut(&payload.buffer) {
            entry.held_by_core = false;
            if entry.operations == 0 {
                self.table.remove(&payload.buffer);
            }
        }
        Ok(stamps)
    }

    /// Buffers the core or an operation still holds.
    pub fn held(&self) -> usize {
        self.table.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contract_is_checked() {
        let mut buffers = Buffers::default();
        let payload = buffers.give(Rc::from([1, 2].as_slice()), Checksum::Wanted);
        assert_eq!(payload.len, 1024);
        assert!(buffers.begin(&payload).is_ok());
        assert!(buffers.release(&payload).is_ok());
        assert!(buffers.release(&payload).is_err());
        assert!(buffers.begin(&payload).is_err());
        assert_eq!(buffers.held(), 1);
        buffers.end(payload.buffer);
        assert_eq!(buffers.held(), 0);
    }
}
