//! The words everything else is written in: identities, generations, roles and states.
//!
//! The vocabulary is DRBD's, the field's standard (see the glossary in ARCHITECTURE.md). Every
//! state has one definition, here; the CLI, JSON, metrics and the wire are projections of it.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::num::NonZeroU64;
use std::time::Duration;

/// A point on the driver's monotonic clock, in nanoseconds since an epoch of the driver's choice.
///
/// The core never reads a clock: every [`crate::node::Node::handle`] call is told the time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Hash)]
pub struct Time(pub u64);

/// How fast a resync or a verify is to go over the device, in bytes per second.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CopyRates {
    /// `resync-max-rate`: no faster.
    pub max: Option<NonZeroU64>,
    /// `resync-min-rate`: no slower on account of guests, as far as disks and link allow.
    pub min: Option<NonZeroU64>,
}

impl Time {
    /// The time `span` after this one; saturates.
    pub fn after(self, span: Duration) -> Time {
        Time(
            self.0
                .saturating_add(u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)),
        )
    }

    /// How long ago `earlier` was; zero if it is in the future.
    pub fn since(self, earlier: Time) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default,
            Serialize, Deserialize, bincode::Encode, bincode::Decode,
        )]
        pub struct $name(pub u128);

        impl $name {
            /// The value that means "none yet".
            pub const NONE: $name = $name(0);

            /// Whether an id was ever assigned.
            pub fn is_none(self) -> bool {
                self.0 == 0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                // Eight digits tell ids apart in a trace.
                write!(f, "{:08x}", (self.0 >> 96) as u32)
            }
        }
    };
}

id_type!(
    /// One copy of the data: random, from `kagami create`. Two replicas with the same id are
    /// cloned images and are refused.
    ReplicaId
);
id_type!(
    /// The pair of replicas: chosen with the first generation, adopted by the second replica when
    /// it first meets the first.
    MirrorId
);
id_type!(
    /// One boot of one host, as `/proc/sys/kernel/random/boot_id` gives it. Volatile caches live
    /// exactly as long as a boot id.
    BootId
);
id_type!(
    /// The random half of a [`Generation`].
    GenerationId
);
id_type!(
    /// Which arbiter a mirror obeys; [`ArbiterId::NONE`] means unarbitrated.
    ArbiterId
);

/// A span of history in which one set of holders took all acknowledged writes (R3).
///
/// Equal counters with different ids are divergence.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Generation {
    /// Grows by one with every promotion and every shrinking.
    pub counter: u64,
    /// Random, so that two generations of equal counter are told apart.
    pub id: GenerationId,
}

impl Generation {
    /// The generation of a replica that never belonged to a mirror.
    pub const UNBORN: Generation = Generation {
        counter: 0,
        id: GenerationId::NONE,
    };

    /// Whether no generation was ever recorded.
    pub fn is_unborn(self) -> bool {
        self.id.is_none()
    }

    /// The 64 bits that every frame on the link carries to show what generation it speaks in.
    ///
    /// Half of a random id: enough to refuse a stale frame, and small enough for every header.
    pub fn tag(self) -> u64 {
        (self.id.0 >> 64) as u64 ^ self.counter
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.counter, self.id)
    }
}

impl fmt::Debug for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "g{}:{:?}", self.counter, self.id)
    }
}

/// What a replica does for its service.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    Debug,
    Hash,
    Serialize,
    Deserialize,
    bincode::Encode,
    bincode::Decode,
)]
pub enum Role {
    /// Serves guest reads and writes.
    Primary,
    /// Keeps a copy; serves nothing.
    Secondary,
    /// Not told, by the peer or by a mirror that does not answer its own daemon.
    Unknown,
}

/// How far a replica's data may be believed.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    Debug,
    Hash,
    Serialize,
    Deserialize,
    bincode::Encode,
    bincode::Decode,
)]
pub enum DiskState {
    /// No disk attached, or its metadata is unreadable.
    Diskless,
    /// The disk reported an I/O error and is no longer used.
    Failed,
    /// Some blocks are of one point in time and some of another: never promotable without force.
    Inconsistent,
    /// A usable copy of the past: a later generation is known to exist.
    Outdated,
    /// A usable copy; whether it is the latest is not known until the peer says so.
    Consistent,
    /// Contains every acknowledged write.
    UpToDate,
    /// Not told, by the peer or by a mirror that does not answer its own daemon.
    Unknown,
}

/// The state of the mirror link.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    Debug,
    Hash,
    Serialize,
    Deserialize,
    bincode::Encode,
    bincode::Decode,
)]
pub enum LinkState {
    /// Not connected and not trying: an operator's wish, or a refusal that needs one.
    StandAlone,
    /// Trying to reach the peer, or agreeing with it.
    Connecting,
    /// Agreed with the peer.
    Connected,
}

macro_rules! spelled_as_variant {
    ($($name:ty),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&format!("{self:?}"))
            }
        }
    )*};
}
spelled_as_variant!(Role, DiskState, LinkState);

/// Which replicas contain every acknowledged write, seen from one of them (R1, R2, R5).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Holders {
    /// Neither side was ever given the right: before the first generation.
    Nobody,
    /// Both replicas. A write needs both completions.
    Both,
    /// Only this replica; the peer may be missing writes.
    Sole,
    /// This replica, and the peer as soon as a widening that is under way takes effect. A write
    /// needs both completions, and the local record decides nothing against a peer of the same
    /// generation that is not Inconsistent.
    Widening,
    /// Only the peer: this replica is a resync target, or was left behind.
    Peer,
}

/// What the arbiter keeps of a mirror: the record, as one value that is only ever swapped whole
/// (R2).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Register {
    /// Random: no two values of a mirror's register have the same, so none ever recurs.
    pub id: u128,
    /// The generation whose right it is; replicas may have gone on to a planned descendant.
    pub generation: Generation,
    /// Who contains every acknowledged write; the second is [`ReplicaId::NONE`] where the first is
    /// the sole holder.
    pub holders: [ReplicaId; 2],
}

impl Register {
    /// Whether the replica is one of the holders.
    pub fn names(&self, replica: ReplicaId) -> bool {
        !replica.is_none() && self.holders.contains(&replica)
    }

    /// Whether everybody is a holder whom the other value names.
    pub fn covers(&self, other: Register) -> bool {
        let mut others = other.holders.iter().filter(|holder| !holder.is_none());
        others.all(|holder| self.names(*holder))
    }

    /// Whether the replica is one of two holders.
    pub fn names_both(&self, replica: ReplicaId) -> bool {
        self.names(replica) && self.holders.iter().all(|holder| !holder.is_none())
    }
}

/// A half-open range of bytes on the mirrored device.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct ByteRange {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
}

impl ByteRange {
    /// The range of `len` bytes from `start`; saturates at the end of the address space.
    pub fn new(start: u64, len: u64) -> ByteRange {
        ByteRange {
            start,
            end: start.saturating_add(len),
        }
    }

    /// Length in bytes.
    pub fn len(self) -> u64 {
        self.end - self.start
    }

    /// Whether it covers no byte.
    pub fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// Whether the two share a byte.
    pub fn overlaps(self, other: ByteRange) -> bool {
        self.start < other.end && other.start < self.end
    }
}
/// What a block's bytes come to: xxh3-128, seed 0. Equal bytes have equal digests on every machine;
/// other bytes have others, but for one chance in 2^128. It withstands accidents, not forgery.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Digest(pub u128);

impl Digest {
    /// Stands for a block that cannot be read.
    pub const UNREADABLE: Digest = Digest(0);
}
