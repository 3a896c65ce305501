//! What can happen to a node, and what it can ask for: the whole surface between the core and
//! whatever drives it (the daemon's io_uring driver, the simulator).
//!
//! The contract is one mutation, then drain: a driver calls [`Node::handle`](super::Node::handle)
//! with one [`Input`], carries out every [`Action`] in the order given, and reports each
//! completion as a later `Input`. The core keeps no clock, socket, file or thread.
//!
//! **Ordering duty of the driver.** None beyond carrying out actions in order of emission per
//! channel: frames of one connection leave in the order of their [`Action::Send`]s. An action
//! that acknowledges a guest write, or tells the peer something, is emitted only after the input
//! that proves what it depends on; disk operations in flight together may complete in any order.
//!
//! **Buffers.** Payload bytes never enter the core. A [`Payload`] names a buffer of the driver.
//! The core holds every payload it was given by an input until it emits [`Action::Release`]
//! for it, exactly once (or hands it back inside [`Action::Complete`]). Operations hold it too: a
//! driver frees the buffer when the core has released it *and* every operation on it has ended,
//! timed out or not.

use crate::control::CommandOutcome;
use crate::error::Refusal;
use crate::types::{BootId, ByteRange, Digest, Register};
use crate::wire::Header;

/// A disk operation of the core, unique within one node's life.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub struct OpId(pub u64);

/// A guest request as the driver numbers it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// A connection to the peer as the driver numbers it; never reused within one node's life.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub struct ConnectionId(pub u64);

/// An operator's command as the driver numbers it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub struct CommandId(pub u64);

/// A question to the arbiter, unique within one node's life; later ones are greater.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub struct AskId(pub u64);

/// What is asked of the arbiter: one register per mirror, compare-and-swap.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ArbiterRequest {
    /// What does the register hold?
    Read,
    /// If it holds exactly `expected`, let it hold `new`, durably.
    Swap {
        /// The whole value it must hold; `None` for no value.
        expected: Option<Register>,
        /// The value to be.
        new: Register,
    },
}

/// What the arbiter answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ArbiterAnswer {
    /// To a read: the register holds this.
    Value(Option<Register>),
    /// To a swap: done.
    Swapped,
    /// To a swap: not done, the register holds this.
    Refused(Option<Register>),
}

/// A buffer of the driver with guest data in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Payload {
    /// The driver's name for the buffer.
    pub buffer: u32,
    /// Bytes of data in it.
    pub len: u32,
    /// CRC-32 (IEEE) of the data where the driver was asked for it or received it, else 0.
    pub crc: u32,
    /// Whether all the data is zero bytes; only looked at where a checksum was asked for.
    pub zero: bool,
}

/// What came with a frame of the peer.
#[derive(Debug)]
pub enum Body {
    /// Nothing.
    None,
    /// Guest data, in a buffer of the driver, `crc` computed from the bytes received.
    Data(Payload),
    /// A control message's bytes (at most [`crate::limits::MAX_CONTROL_PAYLOAD`]), already
    /// checked against the header's CRC.
    Control(Vec<u8>),
}

/// What a guest asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GuestOperation {
    /// Read the range.
    Read(ByteRange),
    /// Write the payload over the range; `crc` of the payload is set.
    Write {
        /// Where; as long as the payload.
        range: ByteRange,
        /// What.
        payload: Payload,
        /// Complete only when durable on every holder.
        fua: bool,
    },
    /// Make the range read as zeroes. Trims arrive as this with `may_unmap`: what a trimmed range
    /// reads as must be the same on both replicas.
    Zero {
        /// Where; any length within the device.
        range: ByteRange,
        /// Whether the store may give the space back.
        may_unmap: bool,
        /// Complete only when durable on every holder.
        fua: bool,
    },
    /// Make every write that was completed before this durable on every holder.
    Flush,
}

/// Why a guest request failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GuestError {
    /// The range is not within the device, or not aligned to [`crate::limits::SECTOR`].
    OutOfRange,
    /// The disk failed; what a write left behind is indeterminate.
    Io,
    /// This node is not Primary (any more).
    NotPrimary,
}

/// How a disk operation ended badly.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DiskError {
    /// The device reported an error.
    Io,
    /// The store has no space for the block.
    NoSpace,
}

/// What an operator can tell a mirror to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub enum Command {
    /// Become Primary.
    Primary(PrimaryMode),
    /// Become Secondary: drain, flush, give the role back.
    Secondary,
    /// Leave StandAlone and look for the peer.
    Connect {
        /// Resolve a split brain by becoming its target.
        discard_my_data: bool,
    },
    /// Part from the peer and stay StandAlone.
    Disconnect,
    /// Throw the local copy away and take a full one from the peer.
    Invalidate,
    /// Hold the resync.
    PauseResync,
    /// Let the resync go on.
    ResumeResync,
    /// Drain, flush, close: the mirror leaves the daemon ([`Action::Detached`] follows).
    Down,
    /// Compare the two replicas while guests work.
    Verify {
        /// Make the peer's copy of what differs equal to this one's.
        repair: bool,
        /// Go on with the one that was stopped.
        resume: bool,
    },
    /// End the comparison.
    StopVerify,
    /// The next resync, whichever way it goes, sends only what differs.
    CompareFirst,
}

/// Under which claim a node is to become Primary.
#[derive(Clone, Copy, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub enum PrimaryMode {
    /// The ordinary one.
    Ordinary,
    /// First time in the mirror's life; the other replica gets a full sync.
    Initial,
    /// First time in the mirror's life; the operator says that both replicas are equal.
    InitialAssumeClean,
    /// Also with a copy that is not known to be the latest, or is known not to be.
    Force,
}

impl PrimaryMode {
    /// Whether the mirror's first generation is asked for.
    pub fn is_initial(self) -> bool {
        matches!(self, PrimaryMode::Initial | PrimaryMode::InitialAssumeClean)
    }

    /// Whether rules are overridden.
    pub fn is_forced(self) -> bool {
        self == PrimaryMode::Force
    }
}

/// Everything that can happen to a node.
#[derive(Debug)]
pub enum Input {
    /// The store was opened. First input of a node's life; the node reads its metadata.
    Attach {
        /// Bytes of the data store (for internal metadata: the whole device).
        store_size: u64,
        /// The running kernel's boot.
        boot: BootId,
    },
    /// Time passed; `now` is at or after [`Node::next_deadline`](super::Node::next_deadline).
    Tick,
    /// A guest asks for something.
    Guest {
        /// To be given back in [`Action::Complete`].
        request: RequestId,
        /// What.
        operation: GuestOperation,
    },
    /// A data operation ended. `payload` carries the data of a read.
    DiskDone {
        /// Which.
        op: OpId,
        /// The read's data (only for [`Action::Read`]), or why not.
        result: Result<Option<Payload>, DiskError>,
    },
    /// The range of an [`Action::Digest`] was read, or why not.
    Digested {
        /// Which.
        op: OpId,
        /// A digest of each of its blocks of [`crate::limits::BLOCK`] bytes; the last block may be
        /// shorter.
        result: Result<Vec<Digest>, DiskError>,
    },
    /// A metadata operation ended. The bytes are those of a [`Action::MetaRead`], else empty.
    MetaDone {
        /// Which.
        op: OpId,
        /// The bytes read (always of the length asked for), or why not.
        result: Result<Vec<u8>, DiskError>,
    },
    /// A connection to the peer's daemon stands (connected or accepted). A newer connection
    /// replaces an older one.
    LinkUp {
        /// Its number.
        connection: ConnectionId,
    },
    /// A connection broke or was closed by the peer.
    LinkDown {
        /// Which; stale ones are ignored.
        connection: ConnectionId,
    },
    /// A whole frame of the peer arrived; framing and CRCs were checked by the driver with
    /// [`crate::wire`].
    Frame {
        /// On which connection; frames of replaced connections are ignored.
        connection: ConnectionId,
        /// Its header.
        header: Header,
        /// Its payload.
        body: Body,
    },
    /// A part of a frame arrived: the peer lives, although the frame takes its time.
    Heard {
        /// On which connection.
        connection: ConnectionId,
    },
    /// The arbiter answered. A question that is never answered needs no input: the core asks again.
    Arbiter {
        /// Which question; of a life of this node, not of an earlier one.
        ask: AskId,
        /// What it said.
        answer: ArbiterAnswer,
    },
    /// An operator asks for something.
    Command {
        /// To be given back in [`Action::CommandDone`].
        command: CommandId,
        /// What.
        what: Command,
    },
}

/// Everything a node can ask of its driver.
#[derive(Debug)]
pub enum Action {
    /// Read guest data into a fresh buffer. With `checksum`, fill in the payload's `crc` and
    /// `zero`.
    Read {
        /// To be given back in [`Input::DiskDone`].
        op: OpId,
        /// Where; at most [`crate::limits::MAX_PAYLOAD`] long.
        range: ByteRange,
        /// Whether the payload's checksum is wanted.
        checksum: bool,
    },
    /// Read guest data for the digests of its blocks.
    Digest {
        /// To be given back in [`Input::Digested`].
        op: OpId,
        /// Where: begins at a multiple of [`crate::limits::BLOCK`], at most
        /// [`crate::limits::RESYNC_CHUNK`] long.
        range: ByteRange,
    },
    /// Write guest data.
    Write {
        /// To be given back in [`Input::DiskDone`].
        op: OpId,
        /// Where the payload starts.
        offset: u64,
        /// What.
        payload: Payload,
        /// Complete only when the data is on stable storage.
        fua: bool,
    },
    /// Make a range read as zeroes.
    Zero {
        /// To be given back in [`Input::DiskDone`].
        op: OpId,
        /// Where; at most [`crate::limits::ZERO_PIECE`] long.
        range: ByteRange,
        /// Whether the store may give the space back.
        may_unmap: bool,
        /// Complete only when the zeroes are on stable storage.
        fua: bool,
    },
    /// Make every data operation that completed before this durable.
    Flush {
        /// To be given back in [`Input::DiskDone`].
        op: OpId,
    },
    /// Read metadata.
    MetaRead {
        /// To be given back in [`Input::MetaDone`].
        op: OpId,
        /// Byte offset within the metadata area's device or file.
        offset: u64,
        /// Bytes; a multiple of 4096.
        len: u32,
    },
    /// Write metadata; complete only when it is on stable storage.
    MetaWrite {
        /// To be given back in [`Input::MetaDone`].
        op: OpId,
        /// Byte offset within the metadata area's device or file; a multiple of 4096.
        offset: u64,
        /// What; a multiple of 4096 long.
        bytes: Vec<u8>,
    },
    /// Look for the peer: connect (the initiator) or accept (the other). Ends with
    /// [`Input::LinkUp`]; the driver keeps trying, with the driver's own pause between attempts,
    /// until then or until [`Action::StopConnecting`].
    StartConnecting,
    /// Stop looking for the peer and refuse its connections.
    StopConnecting,
    /// Close a connection. Nothing of it is reported any more, [`Input::LinkDown`] included.
    Close {
        /// Which.
        connection: ConnectionId,
    },
    /// Send a frame. Frames of one connection leave in this order; frames to connections that
    /// are gone are dropped.
    Send {
        /// On which connection.
        connection: ConnectionId,
        /// The header; its lengths and CRCs are already right.
        header: Header,
        /// The payload.
        body: Body,
    },
    /// Ask the arbiter. The request may be sent once, late or never; it must not be sent twice.
    AskArbiter {
        /// To be given back in [`Input::Arbiter`].
        ask: AskId,
        /// What.
        request: ArbiterRequest,
    },
    /// Answer a guest. A read's payload goes back to the driver with it.
    Complete {
        /// Which.
        request: RequestId,
        /// The read's data (only for reads), or the error.
        result: Result<Option<Payload>, GuestError>,
    },
    /// The core needs this buffer no more.
    Release(Payload),
    /// Answer an operator.
    CommandDone {
        /// Which.
        command: CommandId,
        /// What came of it.
        result: Result<CommandOutcome, Refusal>,
    },
    /// The mirror may serve guests from now on (`true`) or must not (`false`): export it, or
    /// close its clients' connections.
    Serve(bool),
    /// The node is at rest after [`Command::Down`] or a failed attach: close the store.
    Detached,
    /// Something worth a line in the log, in words for an operator.
    Event(Event),
}

/// How much an [`Event`] matters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Severity {
    /// The course of things.
    Info,
    /// Redundancy or progress is impaired, or an operator overrode a rule.
    Warning,
    /// Service or data is impaired.
    Error,
}

/// A line for the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Event {
    /// How much it matters.
    pub severity: Severity,
    /// One sentence.
    pub text: String,
}

/// The actions of one [`Node::handle`](super::Node::handle) call, in order. Reused between calls.
pub type Actions = Vec<Action>;
