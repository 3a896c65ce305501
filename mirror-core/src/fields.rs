//! Fixed fields that the formats of disk and link share: names, flags, generations, holders.
//!
//! Each is little-endian, has no padding, and is checked when it is read (docs/format.md).

use crate::limits::{BLOCK, MAX_ANCESTRY, MAX_DATA_SIZE, MIN_DATA_SIZE};
use crate::types::{Generation, GenerationId, Holders};
use zerocopy::byteorder::little_endian::{U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a name field; names are at most one byte shorter.
pub const NAME_LEN: usize = 64;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(crate) struct RawGeneration {
    pub(crate) counter: U64,
    pub(crate) id: U128,
}

impl From<Generation> for RawGeneration {
    fn from(generation: Generation) -> RawGeneration {
        RawGeneration {
            counter: generation.counter.into(),
            id: generation.id.0.into(),
        }
    }
}

impl From<RawGeneration> for Generation {
    fn from(raw: RawGeneration) -> Generation {
        Generation {
            counter: raw.counter.get(),
            id: GenerationId(raw.id.get()),
        }
    }
}

/// A name as a fixed field holds it.
pub(crate) fn name_field(name: &str) -> [u8; NAME_LEN] {
    let mut field = [0; NAME_LEN];
    let len = name.len().min(NAME_LEN - 1);
    field[..len].copy_from_slice(&name.as_bytes()[..len]);
    field
}

/// The name in a fixed field; `None` if there is none.
pub(crate) fn parse_name(field: &[u8; NAME_LEN]) -> Option<String> {
    let len = field.iter().position(|byte| *byte == 0)?;
    String::from_utf8(field[..len].to_vec()).ok()
}

/// A flag that has a byte of its own.
pub(crate) fn parse_flag(byte: u8) -> Option<bool> {
    match byte {
        0 => Some(false),
        1 => Some(true),
        _ => None,
    }
}

/// A list of generations as a fixed field holds it; its length is kept beside it.
pub(crate) fn ancestry_field(ancestry: &[Generation]) -> [RawGeneration; MAX_ANCESTRY] {
    let mut field = [RawGeneration::from(Generation::UNBORN); MAX_ANCESTRY];
    for (raw, generation) in field.iter_mut().zip(ancestry) {
        *raw = (*generation).into();
    }
    field
}

/// The first `len` generations of a fixed field; `None` if it has no room for so many.
pub(crate) fn parse_ancestry(
    field: &[RawGeneration; MAX_ANCESTRY],
    len: u8,
) -> Option<Vec<Generation>> {
    Some(
        field
            .get(..usize::from(len))?
            .iter()
            .map(|raw| (*raw).into())
            .collect(),
    )
}

/// How many of `len` ancestors are unused: never all of them.
pub(crate) fn parse_unused(count: u8, len: u8) -> Option<u8> {
    (count == 0 || count < len).then_some(count)
}

/// Whether a data area or mirrored device can be of this size, in bytes.
pub(crate) fn plausible_size(size: u64) -> bool {
    (MIN_DATA_SIZE..=MAX_DATA_SIZE).contains(&size) && size.is_multiple_of(BLOCK)
}

/// The highest sequence or generation counter that is believed: no life is long enough to count
/// there, and counting on from it cannot overflow.
pub(crate) const MAX_COUNTER: u64 = 1 << 62;

/// The highest generation counter that is believed of the peer. What is counted on from it must
/// still be believed when it is read from this node's own disk.
pub(crate) const MAX_PEER_COUNTER: u64 = MAX_COUNTER / 2;

/// The highest sequence and generation counter that a disk is trusted with, for the same reason:
/// what this node counts on to must be in range when it is read again.
pub(crate) const MAX_TRUSTED_COUNTER: u64 = MAX_COUNTER / 4 * 3;

/// How [`Holders`] is spelled on disk and on the link.
pub(crate) fn holders_byte(holders: Holders) -> u8 {
    match holders {
        Holders::Nobody => 0,
        Holders::Both => 1,
        Holders::Sole => 2,
        Holders::Widening => 3,
        Holders::Peer => 4,
    }
}

pub(crate) fn parse_holders(byte: u8) -> Option<Holders> {
    [
        Holders::Nobody,
        Holders::Both,
        Holders::Sole,
        Holders::Widening,
        Holders::Peer,
    ]
    .into_iter()
    .find(|holders| holders_byte(*holders) == byte)
}
