//! The payloads of control frames: fixed layouts, read with every bound checked.

use super::{FrameType, WireError};
use crate::fields::{
    MAX_PEER_COUNTER, NAME_LEN, RawGeneration, ancestry_field, holders_byte, name_field,
    parse_ancestry, parse_flag, parse_holders, parse_name, parse_unused, plausible_size,
};
use crate::limits::MAX_ANCESTRY;
use crate::types::{ArbiterId, Digest, DiskState, Generation, Holders, MirrorId, ReplicaId, Role};
use zerocopy::byteorder::little_endian::{U16, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What a node says of itself when it has heard the peer. Its layout never changes; newer versions
/// may append to it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hello {
    /// Oldest and newest protocol version spoken.
    pub versions: (u16, u16),
    /// The cluster's name.
    pub cluster: String,
    /// The mirror's name.
    pub mirror_name: String,
    /// The node's name.
    pub node: String,
    /// The pair's id, or none.
    pub mirror: MirrorId,
    /// This replica.
    pub replica: ReplicaId,
    /// The replica this one was last in sync with, or none.
    pub peer_replica: ReplicaId,
    /// Whom the record is kept with.
    pub arbiter: ArbiterId,
    /// Bytes of the data area.
    pub data_size: u64,
    /// Bytes of the mirrored device; 0 before the first generation.
    pub mirror_size: u64,
    /// The generation of the data.
    pub generation: Generation,
    /// Generations before it, newest first.
    pub ancestry: Vec<Generation>,
    /// How many of the newest of those may be withdrawn together with an unused generation.
    pub unused_ancestors: u8,
    /// Who holds it.
    pub holders: Holders,
    /// What the data may be taken for.
    pub disk: DiskState,
    /// The node's role.
    pub role: Role,
    /// Whether it was Primary and never orderly demoted.
    pub was_primary: bool,
    /// Whether anything was written in the generation.
    pub used: bool,
    /// Whether the host lost no power since the replicas were last in sync.
    pub stayed_up: bool,
    /// Whether an operator said that this side's data may go.
    pub discard: bool,
    /// Bytes of dirty blocks.
    pub dirty_bytes: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHello {
    oldest_version: U16,
    newest_version: U16,
    ancestry_len: u8,
    holders: u8,
    disk: u8,
    role: u8,
    was_primary: u8,
    used: u8,
    stayed_up: u8,
    discard: u8,
    unused_ancestors: u8,
    reserved: [u8; 3],
    cluster: [u8; NAME_LEN],
    mirror_name: [u8; NAME_LEN],
    node: [u8; NAME_LEN],
    mirror: U128,
    replica: U128,
    peer_replica: U128,
    arbiter: U128,
    data_size: U64,
    mirror_size: U64,
    dirty_bytes: U64,
    generation: RawGeneration,
    ancestry: [RawGeneration; MAX_ANCESTRY],
}

const _: () = assert!(size_of::<RawHello>() == 320 + 24 * MAX_ANCESTRY);

fn disk_byte(disk: DiskState) -> u8 {
    match disk {
        DiskState::Unknown => 0,
        DiskState::Diskless => 1,
        DiskState::Failed => 2,
        DiskState::Inconsistent => 3,
        DiskState::Outdated => 4,
        DiskState::Consistent => 5,
        DiskState::UpToDate => 6,
    }
}

fn parse_disk(byte: u8) -> Option<DiskState> {
    use DiskState::*;
    [
        Unknown,
        Diskless,
        Failed,
        Inconsistent,
        Outdated,
        Consistent,
        UpToDate,
    ]
    .into_iter()
    .find(|state| disk_byte(*state) == byte)
}

fn role_byte(role: Role) -> u8 {
    match role {
        Role::Unknown => 0,
        Role::Primary => 1,
        Role::Secondary => 2,
    }
}

fn parse_role(byte: u8) -> Option<Role> {
    [Role::Unknown, Role::Primary, Role::Secondary]
        .into_iter()
        .find(|role| role_byte(*role) == byte)
}

impl Hello {
    /// Whether the arbiter's register names this side as the sole holder of its generation, or of
    /// one that this side alone went on from.
    pub fn is_registered_sole(&self) -> bool {
        self.holders == Holders::Sole && !self.arbiter.is_none()
    }

    /// The payload's bytes.
    pub fn encode(&self) -> Vec<u8> {
        RawHello {
            oldest_version: self.versions.0.into(),
            newest_version: self.versions.1.into(),
            ancestry_len: self.ancestry.len().min(MAX_ANCESTRY) as u8,
            holders: holders_byte(self.holders),
            disk: disk_byte(self.disk),
            role: role_byte(self.role),
            was_primary: self.was_primary.into(),
            used: self.used.into(),
            stayed_up: self.stayed_up.into(),
            discard: self.discard.into(),
            unused_ancestors: self.unused_ancestors,
            reserved: [0; 3],
            cluster: name_field(&self.cluster),
            mirror_name: name_field(&self.mirror_name),
            node: name_field(&self.node),
            mirror: self.mirror.0.into(),
            replica: self.replica.0.into(),
            peer_replica: self.peer_replica.0.into(),
            arbiter: self.arbiter.0.into(),
            data_size: self.data_size.into(),
            mirror_size: self.mirror_size.into(),
            dirty_bytes: self.dirty_bytes.into(),
            generation: self.generation.into(),
            ancestry: ancestry_field(&self.ancestry),
        }
        .as_bytes()
        .to_vec()
    }

    /// Reads the payload. Bytes behind the layout are ignored: a newer version may say more.
    ///
    /// # Errors
    ///
    /// [`WireError::Malformed`]
    pub fn decode(bytes: &[u8]) -> Result<Hello, WireError> {
        let malformed = WireError::Malformed(FrameType::Hello);
        let (raw, _) = RawHello::ref_from_prefix(bytes).map_err(|_| malformed)?;
        let hello = || {
            let sizes = [raw.data_size.get(), raw.mirror_size.get()];
            let plausible = plausible_size(sizes[0])
                && (sizes[1] == 0 || plausible_size(sizes[1]))
                && raw.generation.counter.get() <= MAX_PEER_COUNTER;
            plausible.then_some(())?;
            Some(Hello {
                versions: (raw.oldest_version.get(), raw.newest_version.get()),
                cluster: parse_name(&raw.cluster)?,
                mirror_name: parse_name(&raw.mirror_name)?,
                node: parse_name(&raw.node)?,
                mirror: MirrorId(raw.mirror.get()),
                replica: ReplicaId(raw.replica.get()),
                peer_replica: ReplicaId(raw.peer_replica.get()),
                arbiter: ArbiterId(raw.arbiter.get()),
                data_size: raw.data_size.get(),
                mirror_size: raw.mirror_size.get(),
                generation: raw.generation.into(),
                ancestry: parse_ancestry(&raw.ancestry, raw.ancestry_len)?,
                unused_ancestors: parse_unused(raw.unused_ancestors, raw.ancestry_len)?,
                holders: parse_holders(raw.holders)?,
                disk: parse_disk(raw.disk)?,
                role: parse_role(raw.role)?,
                was_primary: parse_flag(raw.was_primary)?,
                used: parse_flag(raw.used)?,
                stayed_up: parse_flag(raw.stayed_up)?,
                discard: parse_flag(raw.discard)?,
                dirty_bytes: raw.dirty_bytes.get(),
            })
        };
        hello().ok_or(malformed)
    }
}

/// A generation and what it belongs to: the payload of [`FrameType::SyncStart`] and
/// [`FrameType::Promote`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lineage {
    /// The pair.
    pub mirror: MirrorId,
    /// Bytes of the mirrored device.
    pub mirror_size: u64,
    /// The generation.
    pub generation: Generation,
    /// Generations before it, newest first.
    pub ancestry: Vec<Generation>,
    /// Of a resync: how many of the newest of those may be withdrawn with an unused generation.
    pub unused_ancestors: u8,
    /// Of a resync: all blocks are copied. Of a promotion: it is the first, and the operator says
    /// that both replicas are equal.
    pub whole: bool,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawLineage {
    mirror: U128,
    mirror_size: U64,
    generation: RawGeneration,
    whole: u8,
    ancestry_len: u8,
    unused_ancestors: u8,
    reserved: [u8; 5],
    ancestry: [RawGeneration; MAX_ANCESTRY],
}

impl Lineage {
    /// The payload's bytes.
    pub fn encode(&self) -> Vec<u8> {
        RawLineage {
            mirror: self.mirror.0.into(),
            mirror_size: self.mirror_size.into(),
            generation: self.generation.into(),
            whole: self.whole.into(),
            ancestry_len: self.ancestry.len().min(MAX_ANCESTRY) as u8,
            unused_ancestors: self.unused_ancestors,
            reserved: [0; 5],
            ancestry: ancestry_field(&self.ancestry),
        }
        .as_bytes()
        .to_vec()
    }

    /// Reads the payload of a frame of type `kind`.
    ///
    /// # Errors
    ///
    /// [`WireError::Malformed`]
    pub fn decode(kind: FrameType, bytes: &[u8]) -> Result<Lineage, WireError> {
        let lineage = || {
            let raw = RawLineage::ref_from_bytes(bytes).ok()?;
            let generation = Generation::from(raw.generation);
            let plausible = !generation.is_unborn()
                && generation.counter <= MAX_PEER_COUNTER
                && plausible_size(raw.mirror_size.get());
            plausible.then_some(Lineage {
                mirror: MirrorId(raw.mirror.get()),
                mirror_size: raw.mirror_size.get(),
                generation,
                ancestry: parse_ancestry(&raw.ancestry, raw.ancestry_len)?,
                unused_ancestors: parse_unused(raw.unused_ancestors, raw.ancestry_len)?,
                whole: parse_flag(raw.whole)?,
            })
        };
        lineage().ok_or(WireError::Malformed(kind))
    }
}

/// The payload of [`FrameType::State`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PeerState {
    /// The sender's role.
    pub role: Role,
    /// The sender's disk.
    pub disk: DiskState,
    /// Whether an operator holds the resync there.
    pub paused: bool,
}

impl PeerState {
    /// The payload's bytes.
    pub fn encode(&self) -> Vec<u8> {
        vec![
            role_byte(self.role),
            disk_byte(self.disk),
            self.paused.into(),
            0,
        ]
    }

    /// Reads the payload.
    ///
    /// # Errors
    ///
    /// [`WireError::Malformed`]
    pub fn decode(bytes: &[u8]) -> Result<PeerState, WireError> {
        let state = || {
            let [role, disk, paused, _] = *bytes else {
                return None;
            };
            Some(PeerState {
                role: parse_role(role)?,
                disk: parse_disk(disk)?,
                paused: parse_flag(paused)?,
            })
        };
        state().ok_or(WireError::Malformed(FrameType::State))
    }
}

/// The payload of [`FrameType::Goodbye`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Goodbye {
    /// The sender goes on alone in this generation: the receiver is Outdated.
    pub outdated_by: Option<Generation>,
    /// Why, for the log and for `status`; printable, bounded.
    pub reason: String,
}

impl Goodbye {
    /// The payload's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = RawGeneration::from(self.outdated_by.unwrap_or_default())
            .as_bytes()
            .to_vec();
        bytes.extend(text_bytes(&self.reason));
        bytes
    }

    /// Reads the payload.
    ///
    /// # Errors
    ///
    /// [`WireError::Malformed`]
    pub fn decode(bytes: &[u8]) -> Result<Goodbye, WireError> {
        let (raw, text) = RawGeneration::ref_from_prefix(bytes)
            .map_err(|_| WireError::Malformed(FrameType::Goodbye))?;
        let generation = Generation::from(*raw);
        Ok(Goodbye {
            outdated_by: (!generation.is_unborn()).then_some(generation),
            reason: text_from(text),
        })
    }
}

/// The payload of a `Digests` frame: 16 bytes for each block, little-endian.
pub fn digest_bytes(digests: &[Digest]) -> Vec<u8> {
    digests
        .iter()
        .flat_map(|digest| digest.0.to_le_bytes())
        .collect()
}

/// Reads the payload of a `Digests` frame; `None` if it is not made of digests.
pub fn digests_from(bytes: &[u8]) -> Option<Vec<Digest>> {
    let (digests, rest) = bytes.as_chunks::<16>();
    let read = |digest: &[u8; 16]| Digest(u128::from_le_bytes(*digest));
    rest.is_empty().then(|| digests.iter().map(read).collect())
}

/// Longest free text sent to the peer and accepted from it, in bytes.
const MAX_TEXT: usize = 512;

/// Free text as it is sent.
pub fn text_bytes(text: &str) -> &[u8] {
    &text.as_bytes()[..text_end(text)]
}

/// Free text of the peer, made harmless for logs and terminals.
pub fn text_from(bytes: &[u8]) -> String {
    let mut text: String = String::from_utf8_lossy(&bytes[..bytes.len().min(MAX_TEXT)])
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    // What stands for bytes that are no text is longer than they were.
    text.truncate(text_end(&text));
    text
}

/// Where a text ends that is cut to its bound between two characters.
fn text_end(text: &str) -> usize {
    let mut end = text.len().min(MAX_TEXT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    end
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::types::GenerationId;
    use proptest::prelude::*;

    fn generation(n: u64) -> Generation {
        Generation {
            counter: n,
            id: GenerationId(u128::from(n) * 0x0101),
        }
    }

    pub(crate) fn sample() -> Hello {
        Hello {
            versions: (1, 3),
            cluster: "branch7".into(),
            mirror_name: "r0".into(),
            node: "a".into(),
            mirror: MirrorId(1),
            replica: ReplicaId(2),
            peer_replica: ReplicaId(3),
            arbiter: ArbiterId::NONE,
            data_size: 1 << 30,
            mirror_size: 1 << 29,
            generation: generation(3),
            ancestry: vec![generation(2), generation(1)],
            unused_ancestors: 1,
            holders: Holders::Both,
            disk: DiskState::UpToDate,
            role: Role::Primary,
            was_primary: true,
            used: false,
            stayed_up: true,
            discard: false,
            dirty_bytes: 4096,
        }
    }

    #[test]
    fn round_trips() {
        let hello = sample();
        assert_eq!(Hello::decode(&hello.encode()), Ok(hello.clone()));
        let mut longer = hello.encode();
        longer.extend([1, 2, 3]);
        assert_eq!(Hello::decode(&longer), Ok(hello));
        let lineage = Lineage {
            mirror: MirrorId(7),
            mirror_size: 1 << 20,
            generation: generation(9),
            unused_ancestors: 1,
            ancestry: (0..MAX_ANCESTRY as u64)
                .map(|n| generation(n + 1))
                .collect(),
            whole: true,
        };
        let kind = FrameType::SyncStart;
        assert_eq!(Lineage::decode(kind, &lineage.encode()), Ok(lineage));
        let state = PeerState {
            role: Role::Primary,
            disk: DiskState::Outdated,
            paused: true,
        };
        assert_eq!(PeerState::decode(&state.encode()), Ok(state));
        let goodbye = Goodbye {
            outdated_by: Some(generation(4)),
            reason: "operator".into(),
        };
        assert_eq!(Goodbye::decode(&goodbye.encode()), Ok(goodbye));
    }

    #[test]
    fn golden_bytes() {
        let bytes = sample().encode();
        assert_eq!(&bytes[..13], [1, 0, 3, 0, 2, 1, 6, 1, 1, 0, 1, 0, 1]);
        assert_eq!(&bytes[16..24], b"branch7\0");
        assert_eq!(crc32fast::hash(&bytes), GOLDEN_CRC);
    }
    const GOLDEN_CRC: u32 = 760_539_306;

    /// docs/format.md, "Payloads".
    #[test]
    fn offsets_are_as_documented() {
        use core::mem::offset_of;
        assert_eq!(offset_of!(RawHello, oldest_version), 0);
        assert_eq!(offset_of!(RawHello, newest_version), 2);
        assert_eq!(offset_of!(RawHello, ancestry_len), 4);
        assert_eq!(offset_of!(RawHello, holders), 5);
        assert_eq!(offset_of!(RawHello, disk), 6);
        assert_eq!(offset_of!(RawHello, role), 7);
        assert_eq!(offset_of!(RawHello, was_primary), 8);
        assert_eq!(offset_of!(RawHello, used), 9);
        assert_eq!(offset_of!(RawHello, stayed_up), 10);
        assert_eq!(offset_of!(RawHello, discard), 11);
        assert_eq!(offset_of!(RawHello, unused_ancestors), 12);
        assert_eq!(offset_of!(RawHello, reserved), 13);
        assert_eq!(offset_of!(RawHello, cluster), 16);
        assert_eq!(offset_of!(RawHello, mirror_name), 80);
        assert_eq!(offset_of!(RawHello, node), 144);
        assert_eq!(offset_of!(RawHello, mirror), 208);
        assert_eq!(offset_of!(RawHello, replica), 224);
        assert_eq!(offset_of!(RawHello, peer_replica), 240);
        assert_eq!(offset_of!(RawHello, arbiter), 256);
        assert_eq!(offset_of!(RawHello, data_size), 272);
        assert_eq!(offset_of!(RawHello, mirror_size), 280);
        assert_eq!(offset_of!(RawHello, dirty_bytes), 288);
        assert_eq!(offset_of!(RawHello, generation), 296);
        assert_eq!(offset_of!(RawHello, ancestry), 320);
        assert_eq!(size_of::<RawHello>(), 1856);
        assert_eq!(offset_of!(RawLineage, mirror), 0);
        assert_eq!(offset_of!(RawLineage, mirror_size), 16);
        assert_eq!(offset_of!(RawLineage, generation), 24);
        assert_eq!(offset_of!(RawLineage, whole), 48);
        assert_eq!(offset_of!(RawLineage, ancestry_len), 49);
        assert_eq!(offset_of!(RawLineage, unused_ancestors), 50);
        assert_eq!(offset_of!(RawLineage, reserved), 51);
        assert_eq!(offset_of!(RawLineage, ancestry), 56);
        assert_eq!(size_of::<RawLineage>(), 1592);
    }

    #[test]
    fn text_of_the_peer_is_harmless() {
        assert_eq!(text_from(b"bad\x1b[2J\n"), "bad [2J ");
        assert_eq!(text_from(&[b'x'; 9999]).len(), MAX_TEXT);
        // Three bytes stand for each of these; the last of them has no room.
        let odd = text_from(&[0xff; MAX_TEXT]);
        assert_eq!(odd.len(), MAX_TEXT - MAX_TEXT % 3);
        assert_eq!(text_from(text_bytes(&odd)), odd);
        let long = format!("x{}", "é".repeat(MAX_TEXT));
        assert_eq!(text_bytes(&long), &long.as_bytes()[..MAX_TEXT - 1]);
    }

    /// A generation that follows one of the peer's is recorded, and must be readable again.
    #[test]
    fn a_counter_that_leaves_no_room_is_not_believed() {
        use crate::meta::superblock::Superblock;
        for (counter, good) in [(MAX_PEER_COUNTER, true), (MAX_PEER_COUNTER + 1, false)] {
            let generation = generation(counter);
            let hello = Hello {
                generation,
                ..sample()
            };
            assert_eq!(Hello::decode(&hello.encode()).is_ok(), good);
            let lineage = Lineage {
                mirror: MirrorId(7),
                mirror_size: 1 << 20,
                generation,
                ancestry: Vec::new(),
                unused_ancestors: 0,
                whole: false,
            };
            let kind = FrameType::SyncStart;
            assert_eq!(Lineage::decode(kind, &lineage.encode()).is_ok(), good);
        }
        let mut next = Superblock::unborn(ReplicaId(1), 1 << 20);
        next.begin_generation(generation(MAX_PEER_COUNTER + 1));
        assert!(Superblock::parse(&next.encode()).is_ok());
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_not_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
            let _ = Hello::decode(&bytes);
            let _ = Lineage::decode(FrameType::Promote, &bytes);
            let _ = PeerState::decode(&bytes);
            let _ = Goodbye::decode(&bytes);
        }
    }
}
