//! Superblock slots: parsed, trusted, described, and met by a starting daemon.

use crate::host::{Host, image};
use mirror_core::limits::MAX_ANCESTRY;
use mirror_core::meta::superblock::{
    AsyncState, ParsedSlot, Proposal, SlotError, Superblock, Trust,
};
use mirror_core::meta::{DurableMarks, META_BLOCK, describe};
use mirror_core::node::MetadataPlace;
use mirror_core::types::{
    ArbiterId, BootId, ByteRange, Generation, GenerationId, Holders, MirrorId, ReplicaId,
};
use std::convert::Infallible;

const BLOCK: usize = META_BLOCK as usize;
/// Where a slot has its CRC (docs/format.md, "Superblock slot").
const CRC_AT: usize = 12;

/// Takes the input for one slot or two, as they are and with repaired checksums.
pub fn run(data: &[u8]) -> bool {
    let mut slots = [Vec::new(), Vec::new()];
    for (slot, bytes) in slots.iter_mut().zip(data.chunks(BLOCK)) {
        *slot = bytes.to_vec();
    }
    let mut taken = parse(&slots[0]).is_ok();
    for slot in slots.iter_mut().filter(|slot| !slot.is_empty()) {
        slot.resize(BLOCK, 0);
        crate::repair_block(slot, CRC_AT);
    }
    let parsed = [parse(&slots[0]), parse(&slots[1])];
    taken |= parsed.iter().any(Result::is_ok);
    if taken {
        store(&slots, parsed);
    }
    taken
}

fn parse(bytes: &[u8]) -> Result<ParsedSlot, SlotError> {
    let parsed = Superblock::parse(bytes);
    if let Ok(slot) = &parsed {
        let superblock = slot.untrusted();
        assert!(superblock.ancestry.len() <= MAX_ANCESTRY);
        assert_eq!(Superblock::parse(&superblock.encode()).as_ref(), Ok(slot));
    }
    parsed
}

/// These slots on a store.
fn store(slots: &[Vec<u8>; 2], parsed: [Result<ParsedSlot, SlotError>; 2]) {
    let (mut metadata, layout) = image(ReplicaId(5));
    for (slot, index) in slots.iter().zip(0..) {
        let at = layout.slot_offset(index) as usize;
        metadata[at..at + BLOCK].fill(0);
        metadata[at..at + slot.len()].copy_from_slice(slot);
    }
    let trusted = Superblock::trust(parsed, &layout);
    let read = |offset: u64, len: usize| {
        Ok::<_, Infallible>(metadata[offset as usize..offset as usize + len].to_vec())
    };
    let size = layout.data_size;
    let described = describe(read, size, MetadataPlace::External);
    let marks = DurableMarks::read(read, size, MetadataPlace::External);
    assert_eq!(described.is_ok(), trusted.is_ok());
    assert_eq!(marks.is_ok(), trusted.is_ok());
    match &trusted {
        Ok(superblock) => {
            assert!(superblock.data_size <= layout.data_size);
            assert!(superblock.mirror_size <= superblock.data_size);
            let marks = marks.expect("as trusted");
            let size = superblock.data_size;
            let behind = ByteRange::new(size.next_multiple_of(BLOCK as u64), BLOCK as u64);
            assert!(!marks.covers(behind), "blocks beyond the end");
            assert!(!superblock.all_dirty || marks.covers(ByteRange::new(0, size)));
        }
        Err(error) => crate::assert_harmless(&error.to_string()),
    }
    let mut host = Host::found(metadata, layout);
    if let Ok(superblock) = trusted {
        host.take_names(&superblock);
    }
    host.attach_and_settle();
}

fn sample() -> Superblock {
    let generation = |n: u64| Generation {
        counter: n,
        id: GenerationId(u128::from(n) << 64 | 5),
    };
    Superblock {
        sequence: 7,
        mirror: MirrorId(1),
        replica: ReplicaId(5),
        peer_replica: ReplicaId(3),
        arbiter: ArbiterId::NONE,
        cluster: "c".into(),
        mirror_name: "r0".into(),
        node: "a".into(),
        data_size: 6 << 20,
        mirror_size: 5 << 20,
        trust: Trust::UpToDate,
        primary: true,
        used: true,
        all_dirty: false,
        generation: generation(3),
        holders: Holders::Widening,
        proposal: Some(Proposal {
            generation: generation(4),
            holders: Holders::Sole,
        }),
        in_sync_boot: BootId(9),
        ancestry: vec![generation(2), generation(1)],
        unused_ancestors: 1,
        last_common: generation(2),
        registered: generation(1),
        asynchronous: AsyncState::default(),
    }
}

/// A replica with a history, a new one, and a pair of slots.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut unborn = Superblock::unborn(ReplicaId(5), 8 << 20);
    unborn.cluster = "c".into();
    unborn.mirror_name = "r0".into();
    unborn.node = "a".into();
    let later = Superblock {
        sequence: 8,
        holders: Holders::Sole,
        proposal: None,
        trust: Trust::Outdated,
        ..sample()
    };
    vec![
        sample().encode(),
        unborn.encode(),
        [sample().encode(), later.encode()].concat(),
    ]
}
