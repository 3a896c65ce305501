//! The kinds of faults, and how many of each there were.

use std::fmt;

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident = $name:literal,)*) => {
        /// A kind of fault.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum FaultKind {
            $($(#[$doc])* $kind,)*
        }

        impl FaultKind {
            /// All of them.
            pub const ALL: &[FaultKind] = &[$(FaultKind::$kind,)*];

            /// In words.
            pub fn name(self) -> &'static str {
                match self {
                    $(FaultKind::$kind => $name,)*
                }
            }
        }
    };
}

kinds! {
    /// A daemon is killed.
    Kill = "kills",
    /// A machine loses power.
    PowerLoss = "power losses",
    /// The link is cut.
    Cut = "cuts",
    /// An end is not heard.
    Stall = "stalls",
    /// A disk is slow.
    Slow = "slow disks",
    /// A disk holds what is written.
    Stuck = "stuck disks",
    /// The arbiter, or a way to it, fails.
    Arbiter = "arbiter faults",
    /// A disk is a hundred times slow.
    VerySlow = "very slow disks",
    /// An operation ends with an I/O error.
    DiskError = "disk errors",
    /// A store has no space.
    DiskFull = "full stores",
    /// A disk's flushes make nothing durable.
    Lie = "lying disks",
    /// Superblock slots rot.
    RottenSlot = "rotten slots",
    /// Blocks of the bitmap or the activity log rot.
    RottenBlock = "rotten blocks",
    /// A metadata block lands in another's place.
    Misdirected = "misdirected blocks",
    /// One end is not told of a cut.
    HalfOpen = "half-open links",
    /// A connection breaks within a frame.
    MidFrame = "cuts in mid-frame",
    /// The bytes of a connection are held while a newer one works.
    Held = "held connections",
    /// A bit flips on the link.
    Flip = "flipped bits",
    /// A frame comes that the peer never sent.
    Garbage = "garbage frames",
    /// A crash between two actions of one call.
    MidCall = "crashes in mid-call",
    /// A daemon stands still.
    Pause = "pauses",
    /// A node comes back with an empty disk.
    Replacement = "replaced nodes",
    /// A node comes back with an image of its peer's disk.
    Clone = "cloned images",
    /// A clock jumps forward.
    ClockStep = "clock steps",
    /// A clock stands still.
    ClockStop = "stopped clocks",
}

impl FaultKind {
    /// Those that only some seeds have, so that each has its room there.
    pub(super) const RARE: &[FaultKind] = &[
        FaultKind::VerySlow,
        FaultKind::DiskError,
        FaultKind::DiskFull,
        FaultKind::Lie,
        FaultKind::RottenSlot,
        FaultKind::RottenBlock,
        FaultKind::Misdirected,
        FaultKind::HalfOpen,
        FaultKind::MidFrame,
        FaultKind::Held,
        FaultKind::Flip,
        FaultKind::Garbage,
        FaultKind::MidCall,
        FaultKind::Pause,
        FaultKind::Replacement,
        FaultKind::Clone,
        FaultKind::ClockStep,
        FaultKind::ClockStop,
    ];
}

/// Faults by kind.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Faults([u64; FaultKind::ALL.len()]);

impl FaultKind {
    /// Whether the judges of an arbitrated mirror follow it. An image with another's id, and a disk that
    /// loses what it promised, are stories of mirrors without an arbiter.
    pub(super) fn is_known_to_the_arbiter(self) -> bool {
        !matches!(self, FaultKind::Lie | FaultKind::Clone)
    }
}

impl Faults {
    /// Each kind with its count.
    pub fn list(&self) -> Vec<(&'static str, u64)> {
        let counts = FaultKind::ALL.iter().zip(self.0);
        counts.map(|(kind, count)| (kind.name(), count)).collect()
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// One more.
    pub fn count(&mut self, kind: FaultKind) {
        self.0[kind as usize] += 1;
    }

    /// Adds those of another run.
    pub fn add(&mut self, other: &Faults) {
        for (mine, theirs) in self.0.iter_mut().zip(other.0) {
            *mine += theirs;
        }
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counted = FaultKind::ALL.iter().zip(self.0);
        let some: Vec<String> = counted
            .filter(|(_, count)| *count > 0)
            .map(|(kind, count)| format!("{count} {}", kind.name()))
            .collect();
        f.write_str(&some.join(", "))
    }
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{{self}}}")
    }
}
