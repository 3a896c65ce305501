//! What is on disk beside the data: two superblock slots, the activity log and the dirty bitmap
//! (docs/format.md, "The disk").
//!
//! Everything is little-endian with a fixed layout, in blocks of 4 KiB that each carry a CRC, so
//! that a torn or rotten block is noticed and a disk can move between architectures. Parsing a
//! block and trusting it are two steps with two types: see [`superblock`].
//!
//! ```text
//! internal:  | data ... | bitmap ... | slot 0 | slot 1 | activity log | reserved |   end of store
//! external:  | slot 0 | slot 1 | activity log | reserved | bitmap ... |
//!              `----------- HEADER_SIZE = 64 KiB ------'
//! ```

pub mod activity_log;
pub mod bitmap;
mod image;
mod marks;
pub mod superblock;

pub use image::{Description, ImageError, NewReplica, create, describe};
pub use marks::DurableMarks;

use crate::limits::{MAX_DATA_SIZE, MIN_DATA_SIZE};
use crate::node::MetadataPlace;
use thiserror::Error;

/// The size and alignment of every metadata block, in bytes.
pub const META_BLOCK: u64 = 4096;

/// Slots, activity log and reserve, in bytes.
pub const HEADER_SIZE: u64 = 64 << 10;

/// Superblock slots.
pub const SLOTS: u64 = 2;

/// Blocks of the activity log's ring.
pub const ACTIVITY_LOG_BLOCKS: u64 = 8;

const _: () = assert!((SLOTS + ACTIVITY_LOG_BLOCKS) * META_BLOCK <= HEADER_SIZE);

/// Where things are in a replica's store or stores. All offsets in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    /// Bytes of the data area, which begins at offset 0 of the data store; a multiple of 4 KiB.
    pub data_size: u64,
    /// Where the header begins in the metadata store.
    pub header_offset: u64,
    /// Where the bitmap begins in the metadata store.
    pub bitmap_offset: u64,
    /// Blocks of the bitmap.
    pub bitmap_blocks: u64,
}

/// Why a store cannot hold a replica.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum LayoutError {
    /// Too small for the smallest mirror.
    #[error(
        "{0} bytes are too few: a mirror needs at least {MIN_DATA_SIZE} bytes of data and its \
         metadata"
    )]
    TooSmall(u64),
    /// Larger than the formats allow.
    #[error("{0} bytes are too many: a mirror has at most {MAX_DATA_SIZE} bytes of data")]
    TooLarge(u64),
}

impl Layout {
    /// The layout for a data store of `store_size` bytes.
    ///
    /// # Errors
    ///
    /// [`LayoutError`] when the store is outside the formats' range.
    pub fn new(store_size: u64, place: MetadataPlace) -> Result<Layout, LayoutError> {
        if store_size > MAX_DATA_SIZE + MAX_DATA_SIZE / 64 {
            return Err(LayoutError::TooLarge(store_size));
        }
        let usable = store_size / META_BLOCK * META_BLOCK;
        let layout = match place {
            MetadataPlace::External => Layout {
                data_size: usable,
                header_offset: 0,
                bitmap_offset: HEADER_SIZE,
                bitmap_blocks: bitmap::blocks_for(usable),
            },
            MetadataPlace::Internal => {
                let room = usable
                    .checked_sub(HEADER_SIZE)
                    .ok_or(LayoutError::TooSmall(store_size))?;
                let bitmap_blocks = bitmap::blocks_for(room);
                let bitmap_offset = room
                    .checked_sub(bitmap_blocks * META_BLOCK)
                    .ok_or(LayoutError::TooSmall(store_size))?;
                Layout {
                    data_size: bitmap_offset,
                    header_offset: room,
                    bitmap_offset,
                    bitmap_blocks,
                }
            }
        };
        if layout.data_size < MIN_DATA_SIZE {
            Err(LayoutError::TooSmall(store_size))
        } else if layout.data_size > MAX_DATA_SIZE {
            Err(LayoutError::TooLarge(store_size))
        } else {
            Ok(layout)
        }
    }

    /// Bytes that an external metadata store must have.
    pub fn external_size(&self) -> u64 {
        HEADER_SIZE + self.bitmap_blocks * META_BLOCK
    }

    /// Where superblock slot `slot` (0 or 1) is.
    pub fn slot_offset(&self, slot: u64) -> u64 {
        self.header_offset + slot * META_BLOCK
    }

    /// Where block `index` of the activity log's ring is.
    pub fn activity_log_offset(&self, index: u64) -> u64 {
        self.header_offset + (SLOTS + index) * META_BLOCK
    }

    /// Where the activity log's ring ends.
    #[cfg(feature = "sim")]
    pub(crate) fn activity_log_end(&self) -> u64 {
        self.activity_log_offset(ACTIVITY_LOG_BLOCKS)
    }

    /// Where block `index` of the bitmap is.
    pub fn bitmap_block_offset(&self, index: u64) -> u64 {
        self.bitmap_offset + index * META_BLOCK
    }
}

/// The CRC-32 of a metadata block, with the CRC's own field (at byte `crc_at`) taken as zero.
fn checksum(bytes: &[u8], crc_at: usize) -> u32 {
    let mut hash = crc32fast::Hasher::new();
    hash.update(&bytes[..crc_at]);
    hash.update(&[0; 4]);
    hash.update(&bytes[crc_at + 4..]);
    hash.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn internal_metadata_fits_behind_the_data(size in 0u64..(1 << 47)) {
            if let Ok(layout) = Layout::new(size, MetadataPlace::Internal) {
                prop_assert_eq!(layout.data_size % META_BLOCK, 0);
                prop_assert!(layout.bitmap_offset >= layout.data_size);
                prop_assert!(layout.bitmap_blocks >= bitmap::blocks_for(layout.data_size));
                prop_assert_eq!(
                    layout.bitmap_block_offset(layout.bitmap_blocks), layout.header_offset
                );
                prop_assert!(layout.header_offset + HEADER_SIZE <= size);
            }
        }
    }

    /// The examples of docs/format.md, "Where things are".
    #[test]
    fn offsets_are_as_documented() {
        let internal = Layout::new(1 << 30, MetadataPlace::Internal).unwrap();
        assert_eq!(internal.header_offset, (1 << 30) - (64 << 10));
        assert_eq!(internal.slot_offset(1), internal.header_offset + 4096);
        assert_eq!(
            internal.activity_log_offset(0),
            internal.header_offset + 8192
        );
        assert_eq!(internal.bitmap_blocks, 9);
        assert_eq!(
            internal.bitmap_offset,
            internal.header_offset - internal.bitmap_blocks * META_BLOCK
        );
        assert_eq!(internal.data_size, internal.bitmap_offset);
        let external = Layout::new(1 << 30, MetadataPlace::External).unwrap();
        assert_eq!((external.data_size, external.header_offset), (1 << 30, 0));
        assert_eq!(external.bitmap_offset, 64 << 10);
        assert_eq!(external.external_size(), (64 << 10) + 9 * META_BLOCK);
    }

    #[test]
    fn the_bitmap_costs_32_mib_per_tib() {
        let layout = Layout::new(1 << 40, MetadataPlace::External).unwrap();
        let overhead = layout.external_size() as f64 / (32u64 << 20) as f64;
        assert!((1.0..1.05).contains(&overhead), "{overhead}");
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        assert_eq!(
            Layout::new(70_000, MetadataPlace::Internal),
            Err(LayoutError::TooSmall(70_000))
        );
        assert_eq!(
            Layout::new(u64::MAX, MetadataPlace::External),
            Err(LayoutError::TooLarge(u64::MAX))
        );
    }
}
