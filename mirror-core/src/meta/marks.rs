//! What a replica's durable metadata covers (R6): bitmap, activity log and the all-dirty flag
//! together.

use super::bitmap::Bitmap;
use super::image::{Head, ImageError};
use crate::limits::EXTENT;
use crate::node::MetadataPlace;
use crate::types::{ByteRange, ReplicaId};

/// Where, by its metadata at rest alone, a replica may differ from its peer.
#[derive(Clone, Debug)]
pub struct DurableMarks {
    /// The superblock says so, or no block of the log verifies.
    everywhere: bool,
    /// The extents that the activity log names, in order.
    extents: Vec<u32>,
    bitmap: Bitmap,
    /// Whose it is, and of how many bytes.
    owner: (ReplicaId, u64),
}

impl DurableMarks {
    /// Reads them. `read` returns `len` bytes at an offset of the metadata store; `store_size` is the
    /// *data* store's.
    ///
    /// # Errors
    ///
    /// [`ImageError`]
    pub fn read<E, B: AsRef<[u8]>>(
        mut read: impl FnMut(u64, usize) -> Result<B, E>,
        store_size: u64,
        place: MetadataPlace,
    ) -> Result<DurableMarks, ImageError<E>> {
        let head = Head::read(&mut read, store_size, place)?;
        let (bitmap, _) = head.read_bitmap(&mut read)?;
        let owner = head.owner();
        let (everywhere, extents) = logged(head);
        Ok(DurableMarks {
            everywhere,
            extents,
            bitmap,
            owner,
        })
    }

    /// Reads all but the bitmap again, which has not changed since, as long as it is the same replica's.
    /// Returns whether the log and the flag cover all that they did.
    ///
    /// # Errors
    ///
    /// [`ImageError`]
    pub fn read_log_again<E, B: AsRef<[u8]>>(
        &mut self,
        mut read: impl FnMut(u64, usize) -> Result<B, E>,
        store_size: u64,
        place: MetadataPlace,
    ) -> Result<bool, ImageError<E>> {
        let head = Head::read(&mut read, store_size, place)?;
        if head.owner() != self.owner {
            *self = DurableMarks::read(read, store_size, place)?;
            return Ok(false);
        }
        let (everywhere, extents) = logged(head);
        let before = std::mem::replace(&mut self.extents, extents);
        let was_everywhere = std::mem::replace(&mut self.everywhere, everywhere);
        let named = |extent: &u32| self.extents.binary_search(extent).is_ok();
        Ok(everywhere || (!was_everywhere && before.iter().all(named)))
    }

    /// Whether every block of the range is marked; none beyond the end of the replica is.
    pub fn covers(&self, range: ByteRange) -> bool {
        if range.end > self.bitmap.size() {
            return false;
        }
        let mut extents = range.start / EXTENT..range.end.div_ceil(EXTENT);
        self.everywhere
            || extents.all(|extent| {
                let start = range.start.max(extent * EXTENT);
                let piece = ByteRange {
                    start,
                    end: range.end.min((extent + 1) * EXTENT),
                };
                self.names(extent) || self.bitmap.is_dirty_throughout(piece)
            })
    }

    fn names(&self, extent: u64) -> bool {
        u32::try_from(extent).is_ok_and(|extent| self.extents.binary_search(&extent).is_ok())
    }
}

/// Whether everything counts as dirty, and the extents that the log names, in order.
fn logged(head: Head) -> (bool, Vec<u32>) {
    let everywhere = head.superblock.all_dirty || head.log.is_none();
    let mut extents = head.log.map_or_else(Vec::new, |log| log.extents);
    extents.sort_unstable();
    (everywhere, extents)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::BLOCK;
    use crate::meta::activity_log::Transaction;
    use crate::meta::superblock::Superblock;
    use crate::meta::{Layout, NewReplica, create};
    use std::convert::Infallible;

    const SIZE: u64 = 1 << 30;
    const PLACE: MetadataPlace = MetadataPlace::External;

    /// The metadata of a replica that is not dirty everywhere.
    struct Store {
        bytes: Vec<u8>,
        layout: Layout,
        sequence: u64,
    }

    impl Store {
        fn new() -> Store {
            let layout = Layout::new(SIZE, PLACE).unwrap();
            let new = NewReplica {
                replica: ReplicaId(5),
                cluster: "c".into(),
                mirror: "r0".into(),
                node: "a".into(),
            };
            let bytes = vec![0; layout.external_size() as usize];
            let mut store = Store {
                bytes,
                layout,
                sequence: 100,
            };
            for (offset, block) in create(&layout, &new) {
                store.put(offset, &block);
            }
            let slot = layout.slot_offset(1);
            let parsed = Superblock::parse(&store.bytes[slot as usize..][..4096]).unwrap();
            let clean = Superblock {
                sequence: 2,
                all_dirty: false,
                ..parsed.untrusted().clone()
            };
            store.put(layout.slot_offset(0), &clean.encode());
            store
        }

        fn put(&mut self, offset: u64, block: &[u8]) {
            self.bytes[offset as usize..][..block.len()].copy_from_slice(block);
        }

        fn log(&mut self, extents: &[u32]) {
            self.sequence += 1;
            let transaction = Transaction {
                sequence: self.sequence,
                extents: extents.to_vec(),
            };
            let offset = self.layout.activity_log_offset(transaction.ring_index());
            self.put(offset, &transaction.encode(ReplicaId(5)));
        }

        fn read<'a>(&'a self) -> impl FnMut(u64, usize) -> Result<&'a [u8], Infallible> {
            |offset, len| Ok(&self.bytes[offset as usize..][..len])
        }

        fn marks(&self) -> DurableMarks {
            DurableMarks::read(self.read(), SIZE, PLACE).unwrap()
        }
    }

    #[test]
    fn log_and_bitmap_cover_together_what_neither_does_alone() {
        let mut store = Store::new();
        let mut bitmap = Bitmap::new(SIZE);
        bitmap.mark(ByteRange::new(2 * EXTENT, 2 * BLOCK));
        let block = bitmap.save(0, ReplicaId(5));
        store.put(store.layout.bitmap_block_offset(0), &block);
        store.log(&[1, 0]);
        let marks = store.marks();
        assert!(marks.covers(ByteRange::new(0, 2 * EXTENT + 2 * BLOCK)));
        assert!(!marks.covers(ByteRange::new(0, 2 * EXTENT + 3 * BLOCK)));
        assert!(!marks.covers(ByteRange::new(3 * EXTENT, BLOCK)));
    }

    #[test]
    fn what_the_log_no_longer_names_is_noticed() {
        let mut store = Store::new();
        store.log(&[1, 2]);
        let mut marks = store.marks();
        for (extents, kept) in [(&[2, 3, 1][..], true), (&[3, 1], false), (&[1, 3], true)] {
            store.log(extents);
            let found = marks.read_log_again(store.read(), SIZE, PLACE).unwrap();
            assert_eq!(found, kept, "{extents:?}");
        }
        assert!(!marks.covers(ByteRange::new(2 * EXTENT, BLOCK)));
    }

    #[test]
    fn a_log_that_does_not_verify_covers_everything() {
        let mut store = Store::new();
        let mut marks = store.marks();
        assert!(!marks.covers(ByteRange::new(0, BLOCK)));
        let ring = store.layout.activity_log_offset(0)..store.layout.activity_log_end();
        let log = store.bytes.clone();
        store.bytes[ring.start as usize..ring.end as usize].fill(0);
        assert_eq!(marks.read_log_again(store.read(), SIZE, PLACE), Ok(true));
        assert!(marks.covers(ByteRange::new(0, SIZE)));
        store.bytes = log;
        assert_eq!(marks.read_log_again(store.read(), SIZE, PLACE), Ok(false));
    }
}
