//! The link as a stream of frames: headers, and the messages of control frames.

use mirror_core::limits::{MAX_ANCESTRY, MAX_PAYLOAD, MIN_DATA_SIZE};
use mirror_core::meta::bitmap::{BITS_LEN, Bitmap};
use mirror_core::types::{
    ArbiterId, DiskState, Generation, GenerationId, Holders, MirrorId, ReplicaId, Role,
};
use mirror_core::wire::message::{Goodbye, Hello, Lineage, PeerState, text_bytes, text_from};
use mirror_core::wire::{FLAG_FUA, FrameType, HEADER_LEN, Header, PayloadKind};

/// Where a header has its parts (docs/format.md, "Frame header").
const CRC_AT: usize = HEADER_LEN - 4;
const RESERVED: [std::ops::Range<usize>; 2] = [2..4, 40..44];

/// Longest name and longest text of the peer, in bytes.
const MAX_NAME: usize = 63;
const MAX_TEXT: usize = 512;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Checksums {
    AsTheyAre,
    Repaired,
}

/// Reads frames until one is not believed.
pub fn run(data: &[u8]) -> bool {
    stream(data, Checksums::AsTheyAre) | stream(data, Checksums::Repaired)
}

fn stream(data: &[u8], checksums: Checksums) -> bool {
    let mut rest = data;
    let mut taken = false;
    while let Some((raw, behind)) = rest.split_first_chunk::<HEADER_LEN>() {
        let mut raw = *raw;
        if checksums == Checksums::Repaired {
            let crc = crc32fast::hash(&raw[..CRC_AT]);
            raw[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        }
        let Ok(header) = Header::decode(&raw) else {
            break;
        };
        check_header(&raw, header);
        let Some((payload, behind)) = behind.split_at_checked(header.payload_len as usize) else {
            break;
        };
        let damaged = crc32fast::hash(payload) != header.payload_crc;
        if checksums == Checksums::AsTheyAre && damaged {
            break;
        }
        check_message(&header, payload);
        taken = true;
        rest = behind;
    }
    taken
}

fn check_header(raw: &[u8; HEADER_LEN], header: Header) {
    let longest = match header.kind.payload_kind() {
        PayloadKind::None => 0,
        PayloadKind::Control { max } | PayloadKind::Data { max } => max,
    };
    assert!(header.payload_len <= longest && longest <= MAX_PAYLOAD);
    assert_eq!(Header::decode(&header.encode()), Ok(header));
    // But for what is reserved, nothing of a header is lost.
    let mut plain = *raw;
    RESERVED.into_iter().for_each(|range| plain[range].fill(0));
    assert_eq!(header.encode()[..CRC_AT], plain[..CRC_AT]);
}

fn check_message(header: &Header, payload: &[u8]) {
    let kind = header.kind;
    match kind {
        FrameType::Hello => {
            if let Ok(hello) = Hello::decode(payload) {
                for name in [&hello.cluster, &hello.mirror_name, &hello.node] {
                    assert!(name.len() <= MAX_NAME);
                }
                assert!(hello.ancestry.len() <= MAX_ANCESTRY);
                assert!(
                    usize::from(hello.unused_ancestors) <= hello.ancestry.len().saturating_sub(1)
                );
                assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
            }
        }
        FrameType::SyncStart | FrameType::Promote => {
            if let Ok(lineage) = Lineage::decode(kind, payload) {
                assert!(lineage.ancestry.len() <= MAX_ANCESTRY);
                assert!(
                    usize::from(lineage.unused_ancestors)
                        <= lineage.ancestry.len().saturating_sub(1)
                );
                assert!(lineage.mirror_size >= MIN_DATA_SIZE);
                assert_eq!(Lineage::decode(kind, &lineage.encode()), Ok(lineage));
            }
        }
        FrameType::State => {
            if let Ok(state) = PeerState::decode(payload) {
                assert_eq!(PeerState::decode(&state.encode()), Ok(state));
            }
        }
        FrameType::Goodbye => {
            if let Ok(goodbye) = Goodbye::decode(payload) {
                assert!(goodbye.reason.len() <= MAX_TEXT);
                crate::assert_harmless(&goodbye.reason);
                assert_eq!(Goodbye::decode(&goodbye.encode()), Ok(goodbye));
            }
        }
        FrameType::PromoteRefused => {
            let text = text_from(payload);
            assert!(text.len() <= MAX_TEXT);
            crate::assert_harmless(&text);
            assert_eq!(text_from(text_bytes(&text)), text);
        }
        FrameType::SyncBits => {
            let mut bitmap = Bitmap::new(300 << 20);
            let fits = header.offset < bitmap.blocks() && payload.len() == BITS_LEN;
            assert_eq!(bitmap.merge(header.offset, payload), fits);
        }
        _ => {}
    }
}

fn frame(kind: FrameType, payload: &[u8]) -> Vec<u8> {
    let is_data = matches!(kind.payload_kind(), PayloadKind::Data { .. });
    let header = Header {
        flags: FLAG_FUA,
        length: if is_data { payload.len() as u32 } else { 0 },
        payload_len: payload.len() as u32,
        payload_crc: crc32fast::hash(payload),
        ..Header::bare(kind, 0x1122, 3)
    };
    [&header.encode(), payload].concat()
}

/// One frame of each kind that has a payload, and a stream of those that have none.
pub fn seeds() -> Vec<Vec<u8>> {
    let generation = |n: u64| Generation {
        counter: n,
        id: GenerationId(u128::from(n) << 64),
    };
    let hello = Hello {
        versions: (1, 1),
        cluster: "c".into(),
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
    };
    let lineage = Lineage {
        mirror: MirrorId(1),
        mirror_size: 1 << 29,
        generation: generation(4),
        ancestry: vec![generation(3)],
        unused_ancestors: 0,
        whole: true,
    };
    let state = PeerState {
        role: Role::Primary,
        disk: DiskState::Outdated,
        paused: true,
    };
    let goodbye = Goodbye {
        outdated_by: Some(generation(4)),
        reason: "operator".into(),
    };
    use FrameType::{
        Done, Flush, Ping, Pong, Promote, PromoteRefused, Promoted, Ready, State, SyncBits,
        SyncFinish, SyncFinished, SyncReady, SyncStart, SyncTotal, SyncWrite, SyncZero, Verdict,
        Write, Zero,
    };
    let bare = [
        Ready,
        Ping,
        Pong,
        Zero,
        Flush,
        Done,
        SyncReady,
        SyncZero,
        SyncTotal,
        SyncFinish,
        SyncFinished,
        Promoted,
    ];
    vec![
        frame(FrameType::Hello, &hello.encode()),
        frame(SyncStart, &lineage.encode()),
        frame(Promote, &lineage.encode()),
        frame(State, &state.encode()),
        frame(FrameType::Goodbye, &goodbye.encode()),
        frame(PromoteRefused, b"busy"),
        frame(Verdict, &[3, 0, 1, 0]),
        frame(SyncBits, &[0x5a; BITS_LEN]),
        [frame(Write, &[7; 512]), frame(SyncWrite, &[8; 512])].concat(),
        bare.into_iter().flat_map(|kind| frame(kind, &[])).collect(),
    ]
}
