//! What the agent and the CLI say to the daemon, and what it answers.
//!
//! A message on the control socket is a little-endian `u32` length and that many bytes of
//! [`bincode`] in its fixed-width little-endian configuration, at most
//! [`MAX_CONTROL_MESSAGE`]. A client sends one [`Request`]
//! and reads one [`Response`]; the connection may carry any number of such pairs. [`PROTOCOL`]
//! changes when the encoding of any of these types does.

use crate::error::Refusal;
use crate::limits::MAX_CONTROL_MESSAGE;
pub use crate::node::boundary::{Command, PrimaryMode};
use crate::types::{DiskState, LinkState, Role};
use bincode::{Decode, Encode};
use serde::Serialize;
use std::fmt;
use thiserror::Error;

/// The version of these messages; a daemon refuses another one with an error both can read.
pub const PROTOCOL: u32 = 5;

/// What a client asks.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub enum Request {
    /// Opens every connection; must be answered with [`Response::Welcome`] or a refusal.
    Hello {
        /// The client's [`PROTOCOL`].
        protocol: u32,
    },
    /// The state of one mirror or of all.
    Status {
        /// Which; all without it.
        mirror: Option<String>,
    },
    /// An operator's command for one mirror; answered when it is carried out or refused.
    Mirror {
        /// Which.
        mirror: String,
        /// What.
        command: Command,
    },
    /// Bring a mirror up (again) in a running daemon.
    Up {
        /// Which; all without it.
        mirror: Option<String>,
    },
}

/// What the daemon answers.
#[derive(Clone, PartialEq, Debug, Encode, Decode)]
pub enum Response {
    /// To [`Request::Hello`].
    Welcome {
        /// The daemon's node name.
        node: String,
        /// The daemon's version, as in `--version`.
        version: String,
        /// The daemon's process id.
        pid: u32,
    },
    /// To [`Request::Status`].
    Status(NodeStatus),
    /// Carried out.
    Done(CommandOutcome),
    /// Not carried out.
    Refused(Refusal),
}

/// What came of a command that was carried out.
#[derive(Clone, PartialEq, Eq, Debug, Default, Encode, Decode)]
pub struct CommandOutcome {
    /// What the operator should know, one sentence each: rules overridden, data at risk.
    pub warnings: Vec<String>,
}

/// `kagami status --json` (schema 1).
#[derive(Clone, PartialEq, Debug, Serialize, Encode, Decode)]
pub struct NodeStatus {
    /// The version of this layout.
    pub schema: u32,
    /// The node that answers.
    pub node: String,
    /// Its mirrors, in the order of the configuration.
    pub mirrors: Vec<MirrorStatus>,
}

/// One mirror as its daemon sees it.
#[derive(Clone, PartialEq, Debug, Serialize, Encode, Decode)]
pub struct MirrorStatus {
    /// Name in the configuration.
    pub name: String,
    /// This node's role.
    pub role: Role,
    /// The peer's role.
    pub peer_role: Role,
    /// The local replica.
    pub disk: DiskState,
    /// The peer's replica.
    pub peer_disk: DiskState,
    /// The mirror link.
    pub link: LinkState,
    /// The generation, `COUNTER:ID`, or empty before the first.
    pub generation: String,
    /// Names of the nodes whose replicas hold every acknowledged write.
    pub holders: Vec<String>,
    /// Who guards the right to go on alone.
    pub arbitration: Arbitration,
    /// Bytes of the mirrored device.
    pub size_bytes: u64,
    /// Bytes of blocks in which the replicas may differ.
    pub dirty_bytes: u64,
    /// Bytes of blocks completed but not yet known durable on some replica.
    pub unsettled_bytes: u64,
    /// The resync under way.
    pub resync: Option<ResyncStatus>,
    /// The comparison of the replicas under way, or the last one that was begun here.
    pub verify: Option<VerifyStatus>,
    /// Why things are as they are: the last refusal, a slow peer, a paused resync.
    pub reasons: Vec<String>,
    /// What was done since the daemon started.
    pub counters: Counters,
}

/// A resync under way.
#[derive(Clone, PartialEq, Debug, Serialize, Encode, Decode)]
pub struct ResyncStatus {
    /// Which way the data goes, seen from this node.
    pub direction: Direction,
    /// Bytes of the device in sync again since this resync began.
    pub done_bytes: u64,
    /// Bytes that were out of sync when it began.
    pub total_bytes: u64,
    /// Bytes of payload that crossed the link; less than `done_bytes` where zeroes were skipped.
    pub sent_bytes: u64,
    /// Recent speed.
    pub rate_bytes_per_second: u64,
    /// Time left at that speed; absent while there is none.
    pub eta_seconds: Option<u64>,
    /// Held by an operator, here or at the peer.
    pub paused: bool,
}

/// A comparison of the two replicas (`kagami verify`).
#[derive(Clone, PartialEq, Debug, Serialize, Encode, Decode)]
pub struct VerifyStatus {
    /// How far it came.
    pub state: VerifyState,
    /// Why it was stopped, else empty.
    pub cause: String,
    /// Whether the peer's copy of what differs is made equal to this node's.
    pub repair: bool,
    /// Bytes compared.
    pub done_bytes: u64,
    /// Bytes to compare.
    pub total_bytes: u64,
    /// Recent speed.
    pub rate_bytes_per_second: u64,
    /// Time left at that speed; absent while there is none.
    pub eta_seconds: Option<u64>,
    /// Bytes of blocks that differ.
    pub different_bytes: u64,
    /// The first ranges of them, as (offset, length) in bytes, at most
    /// [`MAX_SHOWN_RANGES`](crate::limits::MAX_SHOWN_RANGES).
    pub ranges: Vec<(u64, u64)>,
}

/// How far a comparison came.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Encode, Decode)]
#[serde(rename_all = "lowercase")]
pub enum VerifyState {
    /// It goes on, or will when the two are in sync again.
    Running,
    /// Everything was compared.
    Complete,
    /// It was ended before its end; `kagami verify --resume` lets it go on.
    Stopped,
}

/// Who guards a mirror's right to go on alone (R2).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Encode, Decode)]
#[serde(rename_all = "lowercase")]
pub enum Arbitration {
    /// Nobody: an operator decides after the loss of a node.
    Unarbitrated,
    /// An arbiter, and it need not be asked at present.
    Arbitrated,
    /// An arbiter, and its answer is awaited.
    Asking,
}

impl fmt::Display for Arbitration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Arbitration::Unarbitrated => "unarbitrated",
            Arbitration::Arbitrated => "arbitrated",
            Arbitration::Asking => "asking",
        })
    }
}

/// Which end of a resync a node is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Encode, Decode)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Data goes to the peer.
    Source,
    /// Data comes from the peer.
    Target,
}

/// Totals since the daemon started.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Encode, Decode)]
pub struct Counters {
    /// Guest reads completed.
    pub reads: u64,
    /// Guest writes completed, zeroing and trims included.
    pub writes: u64,
    /// Guest flushes completed.
    pub flushes: u64,
    /// Bytes guests read.
    pub read_bytes: u64,
    /// Bytes guests wrote.
    pub written_bytes: u64,
    /// Bytes sent to the peer, framing included.
    pub link_sent_bytes: u64,
    /// Bytes received from the peer, framing included.
    pub link_received_bytes: u64,
    /// Guest requests not completed now.
    pub in_flight: u64,
    /// The longest any guest write or flush took, in milliseconds.
    pub max_stall_ms: u64,
    /// Resyncs that were completed.
    pub resyncs: u64,
}

/// Why a control message does not decode.
#[derive(Debug, Error)]
pub enum CodecError {
    /// Longer than [`MAX_CONTROL_MESSAGE`].
    #[error("control message of {0} bytes; at most {MAX_CONTROL_MESSAGE} are allowed")]
    TooLong(usize),
    /// Not an encoding of the expected type.
    #[error("malformed control message: {0}")]
    Malformed(#[from] bincode::error::DecodeError),
    /// Bytes behind the end of the message.
    #[error("control message with trailing bytes")]
    Trailing,
}

fn codec() -> impl bincode::config::Config {
    bincode::config::standard()
        .with_little_endian()
        .with_fixed_int_encoding()
        .with_limit::<MAX_CONTROL_MESSAGE>()
}

/// Encodes a message with its length in front.
///
/// # Errors
///
/// [`CodecError::TooLong`] for a message beyond the limit (a status of very many mirrors).
pub fn encode<T: Encode>(message: &T) -> Result<Vec<u8>, CodecError> {
    let body = bincode::encode_to_vec(message, codec()).unwrap_or_default();
    if body.is_empty() || body.len() > MAX_CONTROL_MESSAGE {
        return Err(CodecError::TooLong(body.len()));
    }
    let mut bytes = Vec::with_capacity(4 + body.len());
    bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

/// Reads the length in front of a message.
///
/// # Errors
///
/// [`CodecError::TooLong`] when the sender claims more than the limit; nothing was allocated.
pub fn decode_length(prefix: [u8; 4]) -> Result<usize, CodecError> {
    let len = u32::from_le_bytes(prefix) as usize;
    if len > MAX_CONTROL_MESSAGE {
        Err(CodecError::TooLong(len))
    } else {
        Ok(len)
    }
}

/// Decodes a message's body.
///
/// # Errors
///
/// [`CodecError`] for anything but exactly one message.
pub fn decode<T: Decode<()>>(body: &[u8]) -> Result<T, CodecError> {
    let (message, used) = bincode::decode_from_slice(body, codec())?;
    if used == body.len() {
        Ok(message)
    } else {
        Err(CodecError::Trailing)
    }
}

impl Default for MirrorStatus {
    /// A mirror of which nothing is known yet.
    fn default() -> MirrorStatus {
        MirrorStatus {
            name: String::new(),
            role: Role::Secondary,
            peer_role: Role::Unknown,
            disk: DiskState::Diskless,
            peer_disk: DiskState::Unknown,
            link: LinkState::StandAlone,
            generation: String::new(),
            holders: Vec::new(),
            arbitration: Arbitration::Unarbitrated,
            size_bytes: 0,
            dirty_bytes: 0,
            unsettled_bytes: 0,
            resync: None,
            verify: None,
            reasons: Vec::new(),
            counters: Counters::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorId;

    /// docs/format.md, "The control socket".
    #[test]
    fn golden_bytes() {
        let hello = Request::Hello { protocol: PROTOCOL };
        assert_eq!(
            encode(&hello).unwrap(),
            [8, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0]
        );
        let primary = Request::Mirror {
            mirror: "r0".into(),
            command: Command::Primary(PrimaryMode::Force),
        };
        #[rustfmt::skip]
        assert_eq!(encode(&primary).unwrap(), [
            22, 0, 0, 0,
            2, 0, 0, 0,
            2, 0, 0, 0, 0, 0, 0, 0, b'r', b'0',
            0, 0, 0, 0, 3, 0, 0, 0,
        ]);
        let status = Request::Status { mirror: None };
        assert_eq!(encode(&status).unwrap(), [5, 0, 0, 0, 1, 0, 0, 0, 0]);
        let refused = Response::Refused(Refusal::new(ErrorId::ConfigUnreadable, "x"));
        #[rustfmt::skip]
        assert_eq!(encode(&refused).unwrap(), [
            17, 0, 0, 0,
            3, 0, 0, 0,
            0, 0, 0, 0,
            1, 0, 0, 0, 0, 0, 0, 0, b'x',
        ]);
    }

    #[test]
    fn exactly_one_message_decodes() {
        let body = &encode(&Request::Hello { protocol: 7 }).unwrap()[4..];
        assert_eq!(
            decode::<Request>(body).unwrap(),
            Request::Hello { protocol: 7 }
        );
        let longer = [body, &[0]].concat();
        assert!(matches!(
            decode::<Request>(&longer),
            Err(CodecError::Trailing)
        ));
        assert!(decode::<Request>(&body[..7]).is_err());
        assert!(decode_length([0, 0, 0x40, 0]).is_ok());
        assert!(decode_length([1, 0, 0x40, 0]).is_err());
        // A length inside the message is bounded before anything is allocated.
        let huge = [&[1u8, 0, 0, 0, 1][..], &u64::MAX.to_le_bytes()].concat();
        assert!(decode::<Request>(&huge).is_err());
    }
}
