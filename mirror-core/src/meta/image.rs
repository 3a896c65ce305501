//! Whole metadata areas at rest: making a new one, and describing one for people and tests.

use super::activity_log::Transaction;
use super::bitmap::{self, BITS_LEN, Bitmap};
use super::superblock::{SlotError, Superblock, TrustError};
use super::{ACTIVITY_LOG_BLOCKS, Layout, LayoutError, META_BLOCK, SLOTS};
use crate::node::MetadataPlace;
use crate::types::ReplicaId;
use serde::Serialize;
use thiserror::Error;

/// What `kagami create` writes down about a new replica.
#[derive(Clone, Debug)]
pub struct NewReplica {
    /// Its random id.
    pub replica: ReplicaId,
    /// The cluster's name.
    pub cluster: String,
    /// The mirror's name.
    pub mirror: String,
    /// The node's name.
    pub node: String,
}

/// The blocks of a new replica's metadata, as (offset in the metadata store, bytes), in the order
/// in which they must be written: the superblock slots come last, so that a half-made replica is
/// none.
pub fn create(layout: &Layout, new: &NewReplica) -> impl Iterator<Item = (u64, Vec<u8>)> + use<> {
    let layout = *layout;
    let replica = new.replica;
    let mut superblock = Superblock::unborn(replica, layout.data_size);
    superblock.cluster.clone_from(&new.cluster);
    superblock.mirror_name.clone_from(&new.mirror);
    superblock.node.clone_from(&new.node);

    let erase =
        (0..SLOTS).map(move |slot| (layout.slot_offset(slot), vec![0; META_BLOCK as usize]));
    let bits = (0..layout.bitmap_blocks).map(move |index| {
        let block = bitmap::encode_block(index, replica, &[0; BITS_LEN]);
        (layout.bitmap_block_offset(index), block)
    });
    let log = (0..ACTIVITY_LOG_BLOCKS).map(move |index| {
        let empty = Transaction {
            sequence: index,
            extents: Vec::new(),
        };
        (layout.activity_log_offset(index), empty.encode(replica))
    });
    let slots = (0..SLOTS).map(move |slot| {
        let superblock = Superblock {
            sequence: slot,
            ..superblock.clone()
        };
        (layout.slot_offset(slot), superblock.encode())
    });
    erase.chain(bits).chain(log).chain(slots)
}

/// Why metadata at rest cannot be read as a whole.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ImageError<E> {
    /// The store could not be read.
    #[error(transparent)]
    Read(E),
    /// The store cannot hold a replica.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// No superblock can be trusted.
    #[error(transparent)]
    Trust(#[from] TrustError),
}

/// A replica's metadata in words, for `kagami dump-metadata`.
#[derive(Clone, Debug, Serialize)]
pub struct Description {
    /// Each slot: its sequence number if it verifies, or why it does not.
    pub slots: Vec<Result<u64, String>>,
    /// `mirror` id.
    pub mirror: String,
    /// `replica` id.
    pub replica: String,
    /// The peer's replica id.
    pub peer_replica: String,
    /// Names at creation: cluster, mirror, node.
    pub names: [String; 3],
    /// Bytes of the data area.
    pub data_size: u64,
    /// Bytes of the mirrored device; 0 before the first generation.
    pub mirror_size: u64,
    /// "Inconsistent", "Outdated" or "UpToDate", as recorded.
    pub trust: String,
    /// Whether the node was Primary when this was recorded.
    pub primary: bool,
    /// Whether anything was written in the generation.
    pub used: bool,
    /// Whether every block counts as dirty.
    pub all_dirty: bool,
    /// The generation, `COUNTER:ID`.
    pub generation: String,
    /// Who holds it: "Nobody", "Both", "Sole", "Widening", "Peer".
    pub holders: String,
    /// A change of record that was under way.
    pub proposal: Option<String>,
    /// Generations before, newest first.
    pub ancestry: Vec<String>,
    /// How many of the newest of those nothing was written in, so that they may be withdrawn.
    pub unused_ancestors: u8,
    /// The newest generation that both replicas shared.
    pub last_common: String,
    /// The boot in which the replicas were last in sync.
    pub in_sync_boot: String,
    /// Extents of 4 MiB that the activity log names; `None` if no log block verifies.
    pub active_extents: Option<Vec<u32>>,
    /// Bytes that the bitmap marks dirty.
    pub dirty_bytes: u64,
    /// The first dirty ranges, as (offset, length) in bytes.
    pub dirty_ranges: Vec<(u64, u64)>,
    /// Bitmap blocks that do not verify (they count as all dirty).
    pub damaged_bitmap_blocks: u64,
}

/// Everything but the bitmap.
pub(super) struct Head {
    layout: Layout,
    slots: [Result<u64, SlotError>; 2],
    pub superblock: Superblock,
    pub log: Option<Transaction>,
}

impl Head {
    pub fn read<E, B: AsRef<[u8]>>(
        read: &mut impl FnMut(u64, usize) -> Result<B, E>,
        store_size: u64,
        place: MetadataPlace,
    ) -> Result<Head, ImageError<E>> {
        let layout = Layout::new(store_size, place)?;
        let mut block = |offset| read(offset, META_BLOCK as usize).map_err(ImageError::Read);
        let slots = [
            Superblock::parse(block(layout.slot_offset(0))?.as_ref()),
            Superblock::parse(block(layout.slot_offset(1))?.as_ref()),
        ];
        let sequences = slots.each_ref().map(|slot| match slot {
            Ok(parsed) => Ok(parsed.untrusted().sequence),
            Err(error) => Err(error.clone()),
        });
        let superblock = Superblock::trust(slots, &layout)?;
        let ring = (0..ACTIVITY_LOG_BLOCKS)
            .map(|index| block(layout.activity_log_offset(index)))
            .collect::<Result<Vec<_>, _>>()?;
        let log = Transaction::newest(ring.iter().map(AsRef::as_ref), superblock.replica);
        Ok(Head {
            layout,
            slots: sequences,
            superblock,
            log,
        })
    }

    /// Whose metadata it is, and of how many bytes.
    pub fn owner(&self) -> (ReplicaId, u64) {
        (self.superblock.replica, self.superblock.data_size)
    }

    /// The bitmap, and how many of its blocks do not verify.
    pub fn read_bitmap<E, B: AsRef<[u8]>>(
        &self,
        read: &mut impl FnMut(u64, usize) -> Result<B, E>,
    ) -> Result<(Bitmap, u64), ImageError<E>> {
        let mut bitmap = Bitmap::new(self.superblock.data_size);
        let mut damaged = 0;
        for index in 0..bitmap.blocks() {
            let offset = self.layout.bitmap_block_offset(index);
            let bytes = read(offset, META_BLOCK as usize).map_err(ImageError::Read)?;
            let verified = bitmap.load(index, bytes.as_ref(), self.superblock.replica);
            damaged += u64::from(!verified);
        }
        Ok((bitmap, damaged))
    }
}

/// Reads a replica's metadata and puts it in words. `read` returns `len` bytes at an offset of
/// the metadata store; `store_size` is the *data* store's.
///
/// # Errors
///
/// [`ImageError`]
pub fn describe<E>(
    mut read: impl FnMut(u64, usize) -> Result<Vec<u8>, E>,
    store_size: u64,
    place: MetadataPlace,
) -> Result<Description, ImageError<E>> {
    let head = Head::read(&mut read, store_size, place)?;
    let (bitmap, damaged) = head.read_bitmap(&mut read)?;
    let Head {
        slots,
        superblock,
        log,
        ..
    } = head;
    const RANGES_SHOWN: usize = 64;
    let mut dirty_ranges = Vec::new();
    let mut at = 0;
    while let Some(run) = bitmap.next_dirty(at, u64::MAX) {
        if dirty_ranges.len() == RANGES_SHOWN {
            break;
        }
        dirty_ranges.push((run.start, run.len()));
        at = run.end;
    }
    Ok(Description {
        slots: slots
            .map(|slot| slot.map_err(|error| error.to_string()))
            .into(),
        mirror: superblock.mirror.to_string(),
        replica: superblock.replica.to_string(),
        peer_replica: superblock.peer_replica.to_string(),
        data_size: superblock.data_size,
        mirror_size: superblock.mirror_size,
        trust: format!("{:?}", superblock.trust),
        primary: superblock.primary,
        used: superblock.used,
        all_dirty: superblock.all_dirty,
        generation: superblock.generation.to_string(),
        holders: format!("{:?}", superblock.holders),
        proposal: superblock
            .proposal
            .map(|p| format!("{} for {:?}", p.generation, p.holders)),
        ancestry: superblock
            .ancestry
            .iter()
            .map(ToString::to_string)
            .collect(),
        unused_ancestors: superblock.unused_ancestors,
        last_common: superblock.last_common.to_string(),
        in_sync_boot: superblock.in_sync_boot.to_string(),
        names: [superblock.cluster, superblock.mirror_name, superblock.node],
        active_extents: log.map(|log| log.extents),
        dirty_bytes: bitmap.dirty_bytes(),
        dirty_ranges,
        damaged_bitmap_blocks: damaged,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::meta::DurableMarks;
    use crate::types::ByteRange;
    use std::convert::Infallible;

    fn created(place: MetadataPlace) -> (Vec<u8>, u64) {
        let store_size = 8 << 20;
        let layout = Layout::new(store_size, place).unwrap();
        let new = NewReplica {
            replica: ReplicaId(5),
            cluster: "c".into(),
            mirror: "r0".into(),
            node: "a".into(),
        };
        let mut disk = vec![0x5a; (9 << 20) as usize];
        for (offset, bytes) in create(&layout, &new) {
            let at = offset as usize;
            disk[at..at + bytes.len()].copy_from_slice(&bytes);
        }
        (disk, store_size)
    }

    #[test]
    fn a_new_replica_describes_itself() {
        for place in [MetadataPlace::Internal, MetadataPlace::External] {
            let (disk, size) = created(place);
            let read = |offset: u64, len: usize| {
                Ok::<_, Infallible>(disk[offset as usize..offset as usize + len].to_vec())
            };
            let text = describe(read, size, place).unwrap();
            assert_eq!(text.names, ["c", "r0", "a"]);
            assert_eq!(text.slots, [Ok(0), Ok(1)]);
            assert_eq!(text.holders, "Nobody");
            assert_eq!(text.active_extents, Some(vec![]));
            assert_eq!((text.dirty_bytes, text.damaged_bitmap_blocks), (0, 0));
            let marks = DurableMarks::read(read, size, place).unwrap();
            assert!(marks.covers(ByteRange::new(0, text.data_size)));
            assert!(!marks.covers(ByteRange::new(text.data_size, META_BLOCK)));
        }
    }

    #[test]
    fn damaged_bitmap_blocks_are_counted() {
        let size = 1 << 30;
        let (mut disk, place) = (vec![0; 1 << 20], MetadataPlace::External);
        let layout = Layout::new(size, place).unwrap();
        let new = NewReplica {
            replica: ReplicaId(5),
            cluster: "c".into(),
            mirror: "r0".into(),
            node: "a".into(),
        };
        for (offset, bytes) in create(&layout, &new) {
            disk[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
        for index in [1, 4] {
            disk[layout.bitmap_block_offset(index) as usize + 200] ^= 1;
        }
        let read =
            |offset: u64, len: usize| Ok::<_, Infallible>(disk[offset as usize..][..len].to_vec());
        let text = describe(read, size, place).unwrap();
        assert_eq!(text.damaged_bitmap_blocks, 2);
        assert_eq!(text.dirty_bytes, 2 * crate::meta::bitmap::SPAN);
    }
}
