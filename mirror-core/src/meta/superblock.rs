//! The superblock: what a replica knows about itself, its history and who holds what.
//!
//! Two slots are written in turn, so that a torn write leaves the other in force. Reading is in
//! two steps with two types: [`ParsedSlot`] is a block whose CRC and fields are in range;
//! [`Superblock`] is the newer of two parsed slots that fits the store it was found on. Only the
//! second has anything a decision may use.

use super::{Layout, META_BLOCK, checksum};
use crate::fields::{
    MAX_COUNTER, MAX_TRUSTED_COUNTER, NAME_LEN, RawGeneration, ancestry_field, holders_byte,
    name_field, parse_ancestry, parse_flag, parse_holders, parse_name, parse_unused,
    plausible_size,
};
use crate::limits::{ACTIVITY_LOG_SLOTS, BLOCK, EXTENT, MAX_ANCESTRY};
use crate::types::{ArbiterId, BootId, Generation, Holders, MirrorId, ReplicaId};
use std::cmp::Ordering;
use std::mem::offset_of;
use thiserror::Error;
use zerocopy::byteorder::little_endian::{U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

const MAGIC: u64 = u64::from_le_bytes(*b"KGMSUPER");

/// The format version this build writes and reads.
pub const VERSION: u32 = 1;

/// What the disk's data may be taken for after everything volatile was lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trust {
    /// Blocks of different points in time.
    Inconsistent,
    /// A usable copy of the past.
    Outdated,
    /// Had every acknowledged write when this was recorded.
    UpToDate,
}

/// A generation that was noted before the right to it was asked for (R2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Proposal {
    /// The generation. Where both are to hold a generation that one holds already, only its id is
    /// of use: the id of the value to be in the arbiter's register.
    pub generation: Generation,
    /// Whether both replicas, or only this one, would hold it.
    pub holders: Holders,
}

/// Bounds on what an asynchronous mirror may lose (R10). Kept in the format; the
/// synchronous mode leaves them zero.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct AsyncState {
    /// The lag budget in bytes.
    pub budget_bytes: u64,
    /// The lag budget in milliseconds.
    pub budget_ms: u64,
    /// The last write, by the queue's number, that the peer confirmed.
    pub confirmed: u64,
}

/// A replica's durable facts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Superblock {
    /// Counts the writes of superblock slots; the higher slot is in force.
    pub sequence: u64,
    /// The pair, once there is one.
    pub mirror: MirrorId,
    /// This copy.
    pub replica: ReplicaId,
    /// The copy this one was last in sync with, or is a copy of.
    pub peer_replica: ReplicaId,
    /// Whom the record is kept with.
    pub arbiter: ArbiterId,
    /// The cluster's name at creation.
    pub cluster: String,
    /// The mirror's name at creation.
    pub mirror_name: String,
    /// The node's name at creation.
    pub node: String,
    /// Bytes of this replica's data area.
    pub data_size: u64,
    /// Bytes of the mirrored device, the same on both replicas; 0 before the first generation.
    pub mirror_size: u64,
    /// What the data may be taken for.
    pub trust: Trust,
    /// Whether the node was Primary: cleared only by an orderly demotion.
    pub primary: bool,
    /// Whether anything was written or acknowledged in [`Superblock::generation`].
    pub used: bool,
    /// Whether every block counts as dirty, whatever the bitmap says.
    pub all_dirty: bool,
    /// The generation of the data; for an Inconsistent replica, of the source it is a copy of.
    pub generation: Generation,
    /// Who holds it.
    pub holders: Holders,
    /// A change of record whose outcome was not known when this was written.
    pub proposal: Option<Proposal>,
    /// The boot in which the replicas were last in sync.
    pub in_sync_boot: BootId,
    /// Generations before [`Superblock::generation`], newest first, at most [`MAX_ANCESTRY`].
    pub ancestry: Vec<Generation>,
    /// How many of the newest ancestors are generations in which nothing was written, which only
    /// this replica had, and which the arbiter's register never named: they may be withdrawn
    /// together with a present one of that kind (R3). Fewer than there are ancestors.
    pub unused_ancestors: u8,
    /// The newest generation that both replicas shared; never dropped from the ancestry.
    pub last_common: Generation,
    /// The generation that the arbiter's register names, as far as this replica knows. Planned
    /// promotions leave the register behind; it is never dropped from the ancestry, because who asks
    /// the arbiter must show that it descends from it (R2).
    pub registered: Generation,
    /// For the asynchronous mode.
    pub asynchronous: AsyncState,
}

/// Why a slot is not a superblock.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum SlotError {
    /// No Kagami superblock was ever here.
    #[error("no superblock")]
    Absent,
    /// Its CRC fails.
    #[error("checksum mismatch")]
    Checksum,
    /// Written by a newer version.
    #[error("format version {0}; this build knows {VERSION}")]
    Version(u32),
    /// A field outside its range although the CRC matches.
    #[error("field `{0}` out of range")]
    Field(&'static str),
}

/// Why a store's metadata cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum TrustError {
    /// Neither slot is a superblock; the two causes.
    #[error("slot 0: {0}; slot 1: {1}")]
    NoSlot(SlotError, SlotError),
    /// The store is smaller than when the superblock was written.
    #[error("the store has room for {store} bytes of data, the superblock says {superblock}")]
    Shrunk {
        /// What fits now.
        store: u64,
        /// What was there.
        superblock: u64,
    },
}

/// A slot whose CRC matched and whose fields are in range; not yet trusted to belong to the store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ParsedSlot(Superblock);

impl ParsedSlot {
    /// For display only.
    pub fn untrusted(&self) -> &Superblock {
        &self.0
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSuperblock {
    magic: U64,
    version: U32,
    crc: U32,
    sequence: U64,
    mirror: U128,
    replica: U128,
    peer_replica: U128,
    arbiter: U128,
    in_sync_boot: U128,
    data_size: U64,
    mirror_size: U64,
    block_size: U32,
    extent_size: U32,
    activity_log_slots: U32,
    trust: u8,
    primary: u8,
    used: u8,
    all_dirty: u8,
    holders: u8,
    proposal_holders: u8,
    ancestry_len: u8,
    unused_ancestors: u8,
    generation: RawGeneration,
    proposal: RawGeneration,
    last_common: RawGeneration,
    async_budget_bytes: U64,
    async_budget_ms: U64,
    async_confirmed: U64,
    cluster: [u8; NAME_LEN],
    mirror_name: [u8; NAME_LEN],
    node: [u8; NAME_LEN],
    ancestry: [RawGeneration; MAX_ANCESTRY],
    registered: RawGeneration,
    reserved: [u8; RESERVED_LEN],
}

const RESERVED_LEN: usize = META_BLOCK as usize - 428 - (MAX_ANCESTRY + 1) * 24;
const _: () = assert!(size_of::<RawSuperblock>() == META_BLOCK as usize);
const CRC_OFFSET: usize = offset_of!(RawSuperblock, crc);

/// How [`Trust`] is spelled on disk and on the link.
pub(crate) fn trust_byte(trust: Trust) -> u8 {
    match trust {
        Trust::Inconsistent => 1,
        Trust::Outdated => 2,
        Trust::UpToDate => 3,
    }
}

pub(crate) fn parse_trust(byte: u8) -> Option<Trust> {
    [Trust::Inconsistent, Trust::Outdated, Trust::UpToDate]
        .into_iter()
        .find(|trust| trust_byte(*trust) == byte)
}

fn is_newer(slot: &Result<ParsedSlot, SlotError>) -> bool {
    matches!(slot, Err(SlotError::Version(_)))
}

impl Superblock {
    /// The superblock of a replica that never belonged to a mirror.
    pub fn unborn(replica: ReplicaId, data_size: u64) -> Superblock {
        Superblock {
            sequence: 0,
            mirror: MirrorId::NONE,
            replica,
            peer_replica: ReplicaId::NONE,
            arbiter: ArbiterId::NONE,
            cluster: String::new(),
            mirror_name: String::new(),
            node: String::new(),
            data_size,
            mirror_size: 0,
            trust: Trust::Inconsistent,
            primary: false,
            used: false,
            all_dirty: true,
            generation: Generation::UNBORN,
            holders: Holders::Nobody,
            proposal: None,
            in_sync_boot: BootId::NONE,
            ancestry: Vec::new(),
            unused_ancestors: 0,
            last_common: Generation::UNBORN,
            registered: Generation::UNBORN,
            asynchronous: AsyncState::default(),
        }
    }

    /// Starts `generation` as a descendant of the current one, with nothing written in it yet.
    pub fn begin_generation(&mut self, generation: Generation) {
        if !self.generation.is_unborn() {
            self.unused_ancestors = if self.stands() {
                0
            } else {
                self.unused_ancestors.saturating_add(1)
            };
            self.ancestry.insert(0, self.generation);
            self.forget_oldest();
        }
        self.generation = generation;
        self.used = false;
    }

    /// Whether the present generation is one that later ones are never withdrawn together with:
    /// something was written in it, or both replicas had it, or the arbiter's register names it, or
    /// this replica is its sole holder by the arbiter's word. So is the first: there is nothing to
    /// go back to before it.
    fn stands(&self) -> bool {
        let named = self.registered == self.generation || self.holders == Holders::Sole;
        self.used
            || self.last_common == self.generation
            || (named && !self.arbiter.is_none())
            || self.ancestry.is_empty()
    }

    /// Keeps the ancestry within its bound. What goes is the oldest generation but for two: without
    /// the last one that both replicas shared they would look unrelated, and without the one in the
    /// register this replica would look like a stranger to the arbiter. When the one goes that a
    /// withdrawal of the unused ones would go back to, these stand from then on: what is left below
    /// them is older than the last write.
    fn forget_oldest(&mut self) {
        while self.ancestry.len() > MAX_ANCESTRY {
            let kept = [self.last_common, self.registered];
            let oldest = self.ancestry.iter().rposition(|g| !kept.contains(g));
            let gone = oldest.unwrap_or(MAX_ANCESTRY);
            self.ancestry.remove(gone);
            self.unused_ancestors = match gone.cmp(&self.unused_ancestors.into()) {
                Ordering::Less => self.unused_ancestors - 1,
                Ordering::Equal => 0,
                Ordering::Greater => self.unused_ancestors,
            };
        }
    }

    /// Takes over another replica's history, as a target does from its source.
    pub fn adopt_history(&mut self, generation: Generation, ancestry: &[Generation], unused: u8) {
        self.generation = generation;
        self.ancestry = ancestry.to_vec();
        self.ancestry.truncate(MAX_ANCESTRY);
        self.unused_ancestors = unused;
    }

    /// Where this superblock goes: slots take turns.
    pub fn slot(&self) -> u64 {
        self.sequence % super::SLOTS
    }

    /// The slot's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let proposal = self.proposal.map(|p| p.generation).unwrap_or_default();
        let mut raw = RawSuperblock {
            magic: MAGIC.into(),
            version: VERSION.into(),
            crc: U32::ZERO,
            sequence: self.sequence.into(),
            mirror: self.mirror.0.into(),
            replica: self.replica.0.into(),
            peer_replica: self.peer_replica.0.into(),
            arbiter: self.arbiter.0.into(),
            in_sync_boot: self.in_sync_boot.0.into(),
            data_size: self.data_size.into(),
            mirror_size: self.mirror_size.into(),
            block_size: (BLOCK as u32).into(),
            extent_size: (EXTENT as u32).into(),
            activity_log_slots: (ACTIVITY_LOG_SLOTS as u32).into(),
            trust: trust_byte(self.trust),
            primary: self.primary.into(),
            used: self.used.into(),
            all_dirty: self.all_dirty.into(),
            holders: holders_byte(self.holders),
            proposal_holders: self.proposal.map_or(0, |p| holders_byte(p.holders)),
            ancestry_len: self.ancestry.len().min(MAX_ANCESTRY) as u8,
            unused_ancestors: self.unused_ancestors,
            generation: self.generation.into(),
            proposal: proposal.into(),
            last_common: self.last_common.into(),
            async_budget_bytes: self.asynchronous.budget_bytes.into(),
            async_budget_ms: self.asynchronous.budget_ms.into(),
            async_confirmed: self.asynchronous.confirmed.into(),
            cluster: name_field(&self.cluster),
            mirror_name: name_field(&self.mirror_name),
            node: name_field(&self.node),
            ancestry: ancestry_field(&self.ancestry),
            registered: self.registered.into(),
            reserved: [0; RESERVED_LEN],
        };
        raw.crc = checksum(raw.as_bytes(), CRC_OFFSET).into();
        raw.as_bytes().to_vec()
    }

    /// Reads a slot.
    ///
    /// # Errors
    ///
    /// [`SlotError`] when the block is not a superblock this version can read.
    pub fn parse(bytes: &[u8]) -> Result<ParsedSlot, SlotError> {
        let raw = RawSuperblock::ref_from_bytes(bytes).map_err(|_| SlotError::Absent)?;
        if raw.magic.get() != MAGIC {
            return Err(SlotError::Absent);
        }
        if checksum(bytes, CRC_OFFSET) != raw.crc.get() {
            return Err(SlotError::Checksum);
        }
        if raw.version.get() != VERSION {
            return Err(SlotError::Version(raw.version.get()));
        }
        if u64::from(raw.block_size.get()) != BLOCK
            || u64::from(raw.extent_size.get()) != EXTENT
            || raw.activity_log_slots.get() as usize != ACTIVITY_LOG_SLOTS
        {
            return Err(SlotError::Field("block, extent or activity log size"));
        }
        let mirror_size = raw.mirror_size.get();
        if !plausible_size(raw.data_size.get())
            || (mirror_size != 0 && !plausible_size(mirror_size))
        {
            return Err(SlotError::Field("size"));
        }
        let counters = [raw.sequence, raw.generation.counter, raw.proposal.counter];
        if counters.iter().any(|counter| counter.get() > MAX_COUNTER) {
            return Err(SlotError::Field("counter"));
        }
        let ancestry =
            parse_ancestry(&raw.ancestry, raw.ancestry_len).ok_or(SlotError::Field("ancestry"))?;
        let unused_ancestors = parse_unused(raw.unused_ancestors, raw.ancestry_len)
            .ok_or(SlotError::Field("unused ancestors"))?;
        let proposal = match (Generation::from(raw.proposal), raw.proposal_holders) {
            (generation, 0) if generation.is_unborn() => None,
            (generation, holders) => Some(Proposal {
                generation,
                holders: parse_holders(holders).ok_or(SlotError::Field("proposal"))?,
            }),
        };
        Ok(ParsedSlot(Superblock {
            sequence: raw.sequence.get(),
            mirror: MirrorId(raw.mirror.get()),
            replica: ReplicaId(raw.replica.get()),
            peer_replica: ReplicaId(raw.peer_replica.get()),
            arbiter: ArbiterId(raw.arbiter.get()),
            cluster: parse_name(&raw.cluster).ok_or(SlotError::Field("cluster"))?,
            mirror_name: parse_name(&raw.mirror_name).ok_or(SlotError::Field("mirror name"))?,
            node: parse_name(&raw.node).ok_or(SlotError::Field("node"))?,
            data_size: raw.data_size.get(),
            mirror_size: raw.mirror_size.get(),
            trust: parse_trust(raw.trust).ok_or(SlotError::Field("trust"))?,
            primary: parse_flag(raw.primary).ok_or(SlotError::Field("primary"))?,
            used: parse_flag(raw.used).ok_or(SlotError::Field("used"))?,
            all_dirty: parse_flag(raw.all_dirty).ok_or(SlotError::Field("all dirty"))?,
            generation: raw.generation.into(),
            holders: parse_holders(raw.holders).ok_or(SlotError::Field("holders"))?,
            proposal,
            in_sync_boot: BootId(raw.in_sync_boot.get()),
            ancestry,
            unused_ancestors,
            last_common: raw.last_common.into(),
            registered: raw.registered.into(),
            asynchronous: AsyncState {
                budget_bytes: raw.async_budget_bytes.get(),
                budget_ms: raw.async_budget_ms.get(),
                confirmed: raw.async_confirmed.get(),
            },
        }))
    }

    /// The superblock in force, from both slots and the store they were found on.
    ///
    /// A slot from before a *lowering* of trust cannot come back to power: a lowering is written
    /// to both slots before it counts (R7).
    ///
    /// # Errors
    ///
    /// [`TrustError`]; the store is then Diskless and never re-created silently.
    pub fn trust(
        slots: [Result<ParsedSlot, SlotError>; 2],
        layout: &Layout,
    ) -> Result<Superblock, TrustError> {
        let superblock = match slots {
            // The other slot is older than what a newer build knows of this replica.
            [a, b] if is_newer(&a) || is_newer(&b) => {
                let cause = |slot: Result<ParsedSlot, SlotError>| {
                    slot.err()
                        .unwrap_or(SlotError::Field("superseded by a newer version"))
                };
                return Err(TrustError::NoSlot(cause(a), cause(b)));
            }
            [Ok(a), Ok(b)] if a.0.replica == b.0.replica || a.0.sequence == b.0.sequence => {
                if a.0.sequence >= b.0.sequence {
                    a.0
                } else {
                    b.0
                }
            }
            // Two replicas' slots on one store: a half-finished re-creation.
            [Ok(_), Ok(_)] => {
                let mixed = SlotError::Field("replica (the slots differ)");
                return Err(TrustError::NoSlot(mixed.clone(), mixed));
            }
            [Ok(only), Err(_)] | [Err(_), Ok(only)] => only.0,
            [Err(a), Err(b)] => return Err(TrustError::NoSlot(a, b)),
        };
        if superblock.data_size > layout.data_size || superblock.mirror_size > superblock.data_size
        {
            return Err(TrustError::Shrunk {
                store: layout.data_size,
                superblock: superblock.data_size.max(superblock.mirror_size),
            });
        }
        let proposed = superblock
            .proposal
            .map_or(0, |proposal| proposal.generation.counter);
        let counters = [superblock.sequence, superblock.generation.counter, proposed];
        if counters
            .iter()
            .any(|counter| *counter > MAX_TRUSTED_COUNTER)
        {
            let worn = SlotError::Field("counter");
            return Err(TrustError::NoSlot(worn.clone(), worn));
        }
        Ok(superblock)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::types::GenerationId;
    use proptest::prelude::*;

    fn layout() -> Layout {
        Layout::new(64 << 20, crate::node::MetadataPlace::Internal).unwrap()
    }

    pub(crate) fn sample() -> Superblock {
        let generation = |n: u64| Generation {
            counter: n,
            id: GenerationId(u128::from(n) << 64 | 5),
        };
        Superblock {
            sequence: 7,
            mirror: MirrorId(1),
            replica: ReplicaId(2),
            peer_replica: ReplicaId(3),
            arbiter: ArbiterId(4),
            cluster: "branch7".into(),
            mirror_name: "r0".into(),
            node: "a".into(),
            data_size: 32 << 20,
            mirror_size: 31 << 20,
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
            asynchronous: AsyncState {
                budget_bytes: 1,
                budget_ms: 2,
                confirmed: 3,
            },
        }
    }

    #[test]
    fn unused_generations_are_no_more_than_are_remembered() {
        let generation = |counter: u64| Generation {
            counter,
            id: GenerationId(counter.into()),
        };
        let mut superblock = Superblock::unborn(ReplicaId(1), 1 << 20);
        // Which is kept however old it gets.
        superblock.last_common = generation(1);
        for counter in 1..=3 * MAX_ANCESTRY as u64 {
            superblock.begin_generation(generation(counter));
            let unused = usize::from(superblock.unused_ancestors);
            assert!(unused <= superblock.ancestry.len(), "{counter}: {unused}");
        }
        assert_eq!(superblock.ancestry.len(), MAX_ANCESTRY);
    }

    #[test]
    fn slots_take_turns() {
        let slot = |sequence| {
            let superblock = Superblock::unborn(ReplicaId(1), 1 << 20);
            Superblock {
                sequence,
                ..superblock
            }
            .slot()
        };
        assert_eq!([0, 1, 2, 3].map(slot), [0, 1, 0, 1]);
    }

    #[test]
    fn round_trip() {
        let superblock = sample();
        let parsed = Superblock::parse(&superblock.encode()).unwrap();
        assert_eq!(parsed.untrusted(), &superblock);
    }

    #[test]
    fn golden_bytes() {
        let bytes = sample().encode();
        assert_eq!(&bytes[..8], b"KGMSUPER");
        assert_eq!(&bytes[8..12], [1, 0, 0, 0]);
        assert_eq!(&bytes[16..24], [7, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(crc32fast::hash(&bytes), GOLDEN_CRC);
    }
    const GOLDEN_CRC: u32 = 3_492_801_011;

    /// docs/format.md, "Superblock slot".
    #[test]
    fn offsets_are_as_documented() {
        use core::mem::offset_of;
        assert_eq!(offset_of!(RawGeneration, counter), 0);
        assert_eq!(offset_of!(RawGeneration, id), 8);
        assert_eq!(size_of::<RawGeneration>(), 24);
        assert_eq!(offset_of!(RawSuperblock, magic), 0);
        assert_eq!(offset_of!(RawSuperblock, version), 8);
        assert_eq!(offset_of!(RawSuperblock, crc), 12);
        assert_eq!(offset_of!(RawSuperblock, sequence), 16);
        assert_eq!(offset_of!(RawSuperblock, mirror), 24);
        assert_eq!(offset_of!(RawSuperblock, replica), 40);
        assert_eq!(offset_of!(RawSuperblock, peer_replica), 56);
        assert_eq!(offset_of!(RawSuperblock, arbiter), 72);
        assert_eq!(offset_of!(RawSuperblock, in_sync_boot), 88);
        assert_eq!(offset_of!(RawSuperblock, data_size), 104);
        assert_eq!(offset_of!(RawSuperblock, mirror_size), 112);
        assert_eq!(offset_of!(RawSuperblock, block_size), 120);
        assert_eq!(offset_of!(RawSuperblock, extent_size), 124);
        assert_eq!(offset_of!(RawSuperblock, activity_log_slots), 128);
        assert_eq!(offset_of!(RawSuperblock, trust), 132);
        assert_eq!(offset_of!(RawSuperblock, primary), 133);
        assert_eq!(offset_of!(RawSuperblock, used), 134);
        assert_eq!(offset_of!(RawSuperblock, all_dirty), 135);
        assert_eq!(offset_of!(RawSuperblock, holders), 136);
        assert_eq!(offset_of!(RawSuperblock, proposal_holders), 137);
        assert_eq!(offset_of!(RawSuperblock, ancestry_len), 138);
        assert_eq!(offset_of!(RawSuperblock, unused_ancestors), 139);
        assert_eq!(offset_of!(RawSuperblock, generation), 140);
        assert_eq!(offset_of!(RawSuperblock, proposal), 164);
        assert_eq!(offset_of!(RawSuperblock, last_common), 188);
        assert_eq!(offset_of!(RawSuperblock, async_budget_bytes), 212);
        assert_eq!(offset_of!(RawSuperblock, async_budget_ms), 220);
        assert_eq!(offset_of!(RawSuperblock, async_confirmed), 228);
        assert_eq!(offset_of!(RawSuperblock, cluster), 236);
        assert_eq!(offset_of!(RawSuperblock, mirror_name), 300);
        assert_eq!(offset_of!(RawSuperblock, node), 364);
        assert_eq!(offset_of!(RawSuperblock, ancestry), 428);
        assert_eq!(offset_of!(RawSuperblock, registered), 1964);
        assert_eq!(offset_of!(RawSuperblock, reserved), 1988);
        assert_eq!(size_of::<RawSuperblock>(), 4096);
    }

    #[test]
    fn the_newer_valid_slot_is_in_force() {
        let old = sample();
        let new = Superblock {
            sequence: 8,
            primary: false,
            ..sample()
        };
        let slots = |a: &[u8], b: &[u8]| [Superblock::parse(a), Superblock::parse(b)];
        let (a, b) = (old.encode(), new.encode());
        assert_eq!(Superblock::trust(slots(&a, &b), &layout()).unwrap(), new);
        assert_eq!(Superblock::trust(slots(&b, &a), &layout()).unwrap(), new);
        let mut torn = b.clone();
        torn[600] ^= 1;
        assert_eq!(Superblock::trust(slots(&a, &torn), &layout()).unwrap(), old);
        let blank = vec![0; 4096];
        assert_eq!(
            Superblock::trust(slots(&blank, &torn), &layout()),
            Err(TrustError::NoSlot(SlotError::Absent, SlotError::Checksum))
        );
    }

    #[test]
    fn a_slot_of_a_newer_version_is_not_overruled_by_an_older_one() {
        let mut newer = Superblock {
            sequence: 8,
            ..sample()
        }
        .encode();
        newer[8..12].copy_from_slice(&2u32.to_le_bytes());
        let crc = checksum(&newer, CRC_OFFSET);
        newer[12..16].copy_from_slice(&crc.to_le_bytes());
        let slots = [
            Superblock::parse(&sample().encode()),
            Superblock::parse(&newer),
        ];
        assert!(matches!(
            Superblock::trust(slots, &layout()),
            Err(TrustError::NoSlot(_, SlotError::Version(2)))
        ));
    }

    #[test]
    fn implausible_sizes_and_counters_are_refused() {
        for wrong in [
            Superblock {
                mirror_size: 5000,
                ..sample()
            },
            Superblock {
                data_size: 1,
                ..sample()
            },
            Superblock {
                sequence: u64::MAX,
                ..sample()
            },
            Superblock {
                generation: Generation {
                    counter: u64::MAX,
                    ..sample().generation
                },
                ..sample()
            },
            proposing(u64::MAX),
        ] {
            assert!(matches!(
                Superblock::parse(&wrong.encode()),
                Err(SlotError::Field(_))
            ));
        }
    }

    /// A slot whose checksum is right, and a field of it wrong.
    fn altered(at: usize, bytes: &[u8]) -> Result<ParsedSlot, SlotError> {
        let mut slot = sample().encode();
        slot[at..][..bytes.len()].copy_from_slice(bytes);
        let crc = checksum(&slot, CRC_OFFSET);
        slot[CRC_OFFSET..][..4].copy_from_slice(&crc.to_le_bytes());
        Superblock::parse(&slot)
    }

    #[test]
    fn each_constant_is_looked_at_by_itself() {
        for at in [
            offset_of!(RawSuperblock, block_size),
            offset_of!(RawSuperblock, extent_size),
            offset_of!(RawSuperblock, activity_log_slots),
        ] {
            let size = SlotError::Field("block, extent or activity log size");
            assert_eq!(altered(at, &[1, 0, 0, 0]).err(), Some(size), "{at}");
        }
        let largest = MAX_COUNTER.to_le_bytes();
        assert!(altered(offset_of!(RawSuperblock, sequence), &largest).is_ok());
    }

    #[test]
    fn slots_of_two_replicas_are_not_taken_for_one() {
        let other = Superblock {
            sequence: 8,
            replica: ReplicaId(77),
            ..sample()
        };
        let slots = [sample(), other].map(|slot| Superblock::parse(&slot.encode()));
        assert!(Superblock::trust(slots, &layout()).is_err());
    }

    /// What is counted on from there could not be read again (found by fuzzing).
    fn proposing(counter: u64) -> Superblock {
        Superblock {
            proposal: Some(Proposal {
                generation: Generation {
                    counter,
                    ..sample().generation
                },
                holders: Holders::Sole,
            }),
            ..sample()
        }
    }

    #[test]
    fn counters_without_room_are_refused() {
        let trusted = |worn: Superblock| {
            Superblock::trust(
                [Superblock::parse(&worn.encode()), Err(SlotError::Absent)],
                &layout(),
            )
            .is_ok()
        };
        let after = |sequence| Superblock {
            sequence,
            ..sample()
        };
        assert!(trusted(after(MAX_TRUSTED_COUNTER)));
        assert!(!trusted(after(MAX_TRUSTED_COUNTER + 1)));
        assert!(trusted(proposing(MAX_TRUSTED_COUNTER)));
        assert!(!trusted(proposing(MAX_TRUSTED_COUNTER + 1)));
    }

    #[test]
    fn a_shrunken_store_is_refused() {
        let big = Superblock {
            data_size: 65 << 20,
            ..sample()
        };
        let slots = [Superblock::parse(&big.encode()), Err(SlotError::Absent)];
        assert!(matches!(
            Superblock::trust(slots, &layout()),
            Err(TrustError::Shrunk { .. })
        ));
    }

    #[test]
    fn the_last_common_generation_is_never_forgotten() {
        let mut superblock = sample();
        for counter in 10..200 {
            superblock.begin_generation(Generation {
                counter,
                id: GenerationId(counter.into()),
            });
        }
        assert_eq!(superblock.ancestry.len(), MAX_ANCESTRY);
        assert!(superblock.ancestry.contains(&superblock.last_common));
        assert!(superblock.ancestry.contains(&superblock.registered));
        assert_eq!(superblock.ancestry[0].counter, 198);
    }

    /// Generations that may be withdrawn are counted from the newest on, as long as the one that
    /// was written in below them is known.
    #[test]
    fn unused_ancestors_are_counted_while_what_they_follow_is_known() {
        let generation = |counter: u64| Generation {
            counter,
            id: GenerationId(counter.into()),
        };
        let mut superblock = sample();
        superblock.arbiter = ArbiterId::NONE;
        superblock.begin_generation(generation(10));
        assert_eq!(superblock.unused_ancestors, 0, "generation 3 was used");
        for counter in 11..40 {
            superblock.begin_generation(generation(counter));
        }
        assert_eq!(superblock.unused_ancestors, 29);
        assert_eq!(superblock.ancestry[29].counter, 3);
        superblock.used = true;
        superblock.begin_generation(generation(40));
        assert_eq!(superblock.unused_ancestors, 0);
        // Generation 39 is forgotten, and 2 and 1 are not: going back to them would lose a write.
        let mut was = 0;
        while superblock.ancestry.contains(&generation(39)) {
            was = superblock.unused_ancestors;
            superblock.begin_generation(generation(superblock.generation.counter + 1));
        }
        assert_eq!(usize::from(was), MAX_ANCESTRY - 3);
        assert_eq!(superblock.unused_ancestors, 0);
    }

    #[test]
    fn what_stands_is_not_counted_as_unused() {
        let unused = Superblock {
            used: false,
            holders: Holders::Both,
            unused_ancestors: 0,
            ..sample()
        };
        let counted = |change: fn(&mut Superblock)| {
            let mut superblock = unused.clone();
            change(&mut superblock);
            superblock.begin_generation(Generation {
                counter: 4,
                id: GenerationId(4),
            });
            superblock.unused_ancestors
        };
        assert_eq!(counted(|_| ()), 1);
        assert_eq!(counted(|it| it.used = true), 0);
        assert_eq!(counted(|it| it.last_common = it.generation), 0);
        assert_eq!(counted(|it| it.registered = it.generation), 0);
        assert_eq!(counted(|it| it.holders = Holders::Sole), 0);
        assert_eq!(counted(|it| it.ancestry.clear()), 0);
        // Without an arbiter nothing is registered.
        let alone = |it: &mut Superblock| {
            (it.arbiter, it.holders) = (ArbiterId::NONE, Holders::Sole);
            it.registered = it.generation;
        };
        assert_eq!(counted(alone), 1);
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_without_panic(mut bytes in prop::collection::vec(any::<u8>(), 4096)) {
            let _ = Superblock::parse(&bytes);
            bytes[..8].copy_from_slice(b"KGMSUPER");
            bytes[8..12].copy_from_slice(&1u32.to_le_bytes());
            let crc = checksum(&bytes, CRC_OFFSET);
            bytes[12..16].copy_from_slice(&crc.to_le_bytes());
            let _ = Superblock::parse(&bytes);
        }
    }
}
