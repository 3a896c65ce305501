//! Every error an operator can meet, with its stable id and exit code.
//!
//! Ids are grouped by hundred: 01xx configuration, 02xx stores and metadata, 03xx refused in this
//! state, 04xx reaching the daemon, 05xx the link and the handshake, 06xx I/O. An id, once
//! released, keeps its meaning. The list in docs/errors.md is checked against this one.

use std::fmt;

/// What the process's exit code says (README, "Exit codes").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum ExitCode {
    /// Done.
    Done = 0,
    /// Refused, or tried and failed.
    Failed = 1,
    /// The command line or the configuration is wrong.
    Usage = 2,
    /// The daemon cannot be reached.
    Unreachable = 3,
    /// Not possible in this state; the message says which state and what to do.
    State = 4,
}

macro_rules! error_ids {
    ($($name:ident = $number:literal, $exit:ident, $summary:literal;)*) => {
        /// A stable error id, shown as `KGM-0123`.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, bincode::Encode, bincode::Decode)]
        pub enum ErrorId {
            $(#[doc = $summary] $name,)*
        }

        impl ErrorId {
            /// All ids, in order.
            pub const ALL: &'static [ErrorId] = &[$(ErrorId::$name,)*];

            /// The number behind `KGM-`.
            pub fn number(self) -> u16 {
                match self { $(ErrorId::$name => $number,)* }
            }

            /// The exit code of a command that ends with this error.
            pub fn exit_code(self) -> ExitCode {
                match self { $(ErrorId::$name => ExitCode::$exit,)* }
            }

            /// What it means, in one sentence.
            pub fn summary(self) -> &'static str {
                match self { $(ErrorId::$name => $summary,)* }
            }
        }
    };
}

error_ids! {
    ConfigUnreadable = 101, Usage, "The configuration file cannot be read.";
    ConfigSyntax = 102, Usage, "The configuration file is not valid TOML, or a key has the wrong type or is unknown.";
    ConfigValue = 103, Usage, "A value in the configuration is out of its range or not understood.";
    ConfigConflict = 104, Usage, "Two parts of the configuration contradict each other.";
    ConfigReserved = 105, Usage, "A key that this version does not support yet.";
    UnknownNode = 106, Usage, "The node is not in the configuration.";
    UnknownMirror = 107, Usage, "The mirror is not in the configuration.";
    UsageConflict = 108, Usage, "Command-line options that do not go together.";
    Declined = 109, Failed, "A question about a dangerous step was not answered with yes.";
    ScriptInvalid = 110, Usage, "A script of the simulator cannot be read, understood or written.";
    ConsentNeeded = 111, Usage, "A step that loses data was not confirmed, and there is no terminal to ask on.";

    StoreUnavailable = 201, Failed, "The disk cannot be opened.";
    StoreBusy = 202, State, "The disk is in use by another process.";
    StoreTooSmall = 203, Failed, "The disk is too small for a mirror, or smaller than its metadata says.";
    MetadataMissing = 204, Failed, "The disk carries no Kagami metadata.";
    MetadataDamaged = 205, Failed, "Neither superblock can be trusted.";
    MetadataForeign = 206, Failed, "The metadata belongs to another mirror or node.";
    MetadataVersion = 207, Failed, "The metadata was written by a newer version.";
    MetadataPresent = 208, State, "The disk already carries Kagami metadata.";
    StoreUnsupported = 209, Failed, "The disk cannot be used in this version.";
    StoreNotEmpty = 210, State, "The disk holds something else.";
    StoreNotProbed = 211, Failed, "It cannot be determined what the disk holds.";
    StoreReadOnly = 212, Failed, "The disk is read-only.";

    AlreadyInRole = 301, State, "The node has this role already.";
    PeerIsPrimary = 302, State, "The peer is Primary.";
    NotUpToDate = 303, State, "The local copy is not known to be the latest.";
    Inconsistent = 304, State, "The local copy is incomplete.";
    NoUsableDisk = 305, State, "There is no usable local disk.";
    Busy = 306, State, "Another change of role or connection is in progress.";
    NotConnected = 307, State, "The peer is not connected.";
    InUse = 308, State, "Clients use the mirror.";
    NotInitial = 309, State, "The mirror was initialised before.";
    NeverInitialised = 310, State, "The mirror was never initialised.";
    PeerRefused = 311, State, "The peer refused.";
    NotAsPrimary = 312, State, "Not possible while Primary.";
    NotRunning = 313, State, "The mirror is not up.";
    AlreadyRunning = 314, State, "The mirror is up.";
    LostPeer = 315, Failed, "The peer was lost in the middle of the operation.";
    NoResync = 316, State, "No resync is under way.";
    TimedOut = 317, Failed, "The state waited for was not reached in time.";
    RightDenied = 318, State, "The arbiter does not let this node go on alone.";
    ArbiterUnreachable = 319, Failed, "The arbiter does not answer.";
    CopiesDiffer = 320, Failed, "A verify found that the replicas differ.";
    NoVerify = 321, State, "No verify is under way, or none that could go on.";
    VerifyStopped = 322, Failed, "A verify was stopped before its end.";

    DaemonUnreachable = 401, Unreachable, "The daemon of this node is not running or does not answer.";
    DaemonDenied = 402, Unreachable, "The control socket does not let this user in.";
    DaemonProtocol = 403, Failed, "The daemon speaks another version of the control protocol.";
    DaemonRunning = 404, State, "A daemon for this node is already running.";
    ListenFailed = 405, Failed, "A socket of the daemon cannot be opened.";

    PeerVersion = 501, State, "The peer speaks no common version of the link protocol.";
    PeerForeign = 502, State, "The peer belongs to another mirror, cluster or node.";
    ClonedReplica = 503, State, "Both disks carry the same replica id: one is a copy of the other's image.";
    SplitBrain = 504, State, "Both replicas were written to independently.";
    Unrelated = 505, State, "The replicas have no common history.";
    BothPrimary = 506, State, "Both nodes are Primary.";
    NoGoodCopy = 507, State, "Neither replica can serve as the source of a resync.";
    PrimaryIsBehind = 508, State, "The Primary's copy is older than the peer's.";
    PeerSize = 509, State, "The peer's data area is of another size.";
    PeerProtocol = 510, Failed, "The peer sent something that makes no sense.";
    BothDiscard = 511, State, "Both sides were told to discard their data.";
    ImpossibleStates = 512, State, "The replicas' records contradict each other in a way that must not happen.";

    DiskFailed = 601, Failed, "The local disk reported an error.";
    Internal = 602, Failed, "A failure of Kagami or its host that has no id of its own.";
    SimulationFailed = 603, Failed, "A simulated run broke a rule of the mirror.";
    IoUringUnavailable = 604, Failed, "The host has no io_uring for the daemon.";
}

impl fmt::Display for ErrorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KGM-{:04}", self.number())
    }
}

/// An error as an operator sees it: an id, what happened where, and what to do about it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error, bincode::Encode, bincode::Decode)]
#[error("{id}: {message}")]
pub struct Refusal {
    /// Which error.
    pub id: ErrorId,
    /// Cause and remedy in one line, without a trailing full stop.
    pub message: String,
}

impl Refusal {
    /// An error with its explanation.
    pub fn new(id: ErrorId, message: impl Into<String>) -> Refusal {
        Refusal {
            id,
            message: message.into(),
        }
    }
}
