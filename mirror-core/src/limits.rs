//! The bounds that several parts share: sizes, counts and times, each with its reason.

use std::time::Duration;

/// The unit of the dirty bitmap and of resync, in bytes.
pub const BLOCK: u64 = 4096;

/// The smallest unit of guest I/O, in bytes: the sector of 512-byte disks.
pub const SECTOR: u64 = 512;

/// The unit of the activity log, in bytes. A crash of a busy Primary dirties whole extents.
pub const EXTENT: u64 = 4 << 20;

/// Extents that may be active at once; they fill one 4 KiB metadata block. With [`EXTENT`] this
/// is the activity log's reach: what a crash of a busy Primary costs in resync at most.
pub const ACTIVITY_LOG_SLOTS: usize = 1000;

/// The largest guest request payload, in bytes (the NBD specification's recommended maximum).
pub const MAX_PAYLOAD: u32 = 32 << 20;

/// The largest payload of a resync frame, in bytes: large enough to amortise a seek, small enough
/// that a guest write behind it waits little.
pub const RESYNC_CHUNK: u64 = 256 << 10;

/// How much earlier than `resync-max-rate` has it pieces may begin, so that some go together.
pub const COPY_BURST: Duration = Duration::from_millis(100);

/// The least that `resync-max-rate` and `resync-min-rate` may be, in bytes per second.
pub const MIN_COPY_RATE: u64 = 64 << 10;

/// Resync chunks in flight while the guest is idle.
pub const RESYNC_WINDOW_IDLE: usize = 16;

/// Resync chunks in flight while the guest is active.
pub const RESYNC_WINDOW_BUSY: usize = 2;

/// The guest counts as active for this long after its last request.
pub const GUEST_ACTIVE: Duration = Duration::from_millis(200);

/// A resync asks the target for a flush, and forgets what became durable, this often in bytes …
pub const RESYNC_CHECKPOINT_BYTES: u64 = 64 << 20;

/// … or in time, whichever comes first.
pub const RESYNC_CHECKPOINT_TIME: Duration = Duration::from_secs(1);

/// Zeroing and trimming go in pieces of this size, so that one request cannot fill the activity
/// log or hold a lock for long.
pub const ZERO_PIECE: u64 = 32 << 20;

/// The largest payload of a control frame on the link (hello, bitmap pieces), in bytes.
pub const MAX_CONTROL_PAYLOAD: u32 = 64 << 10;

/// Ranges of blocks that differ which a status lists.
pub const MAX_SHOWN_RANGES: usize = 64;

/// The largest message on the control socket, in bytes.
pub const MAX_CONTROL_MESSAGE: usize = 4 << 20;

/// Generations a replica remembers behind its own.
pub const MAX_ANCESTRY: usize = 64;

/// The shortest time between two attempts to reach the peer …
pub const CONNECT_BACKOFF_MIN: Duration = Duration::from_millis(100);

/// … and the longest.
pub const CONNECT_BACKOFF_MAX: Duration = Duration::from_secs(5);

/// The default of `stall-timeout`.
pub const DEFAULT_STALL_TIMEOUT: Duration = Duration::from_secs(2);

/// The smallest data area of a mirror, in bytes.
pub const MIN_DATA_SIZE: u64 = 1 << 20;

/// The largest data area: 64 TiB.
pub const MAX_DATA_SIZE: u64 = 64 << 40;

/// How long a fresh connection may stay without a sign of life from the peer. It holds nothing up.
pub const ARRIVAL_PATIENCE: Duration = Duration::from_secs(5);

/// The first pause before a peer that was dropped for slowness is let in again; it doubles …
pub const SLOW_PEER_BACKOFF_MIN: Duration = Duration::from_secs(1);

/// … up to this, and starts anew after a connection that held that long.
pub const SLOW_PEER_BACKOFF_MAX: Duration = Duration::from_secs(30);

/// How long a handshake may go on that holds no guest up, without progress of the peer.
pub const AGREEMENT_PATIENCE: Duration = Duration::from_secs(10);

/// How long the peer may take for its part of a change of role or of the end of a resync.
pub const ASK_PATIENCE: Duration = Duration::from_secs(30);

/// The default of `lease`: how long the peer's word lets a Primary answer reads (R4).
pub const DEFAULT_LEASE: Duration = Duration::from_secs(1);

/// How long the arbiter may take before it is asked again, at first …
pub const ARBITER_PATIENCE_MIN: Duration = Duration::from_millis(500);

/// … and at most.
pub const ARBITER_PATIENCE_MAX: Duration = Duration::from_secs(4);

/// How long a promotion waits for an arbiter that does not answer at all.
pub const ARBITER_COMMAND_PATIENCE: Duration = Duration::from_secs(10);
