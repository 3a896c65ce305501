//! The state machine of one replica of one mirror.

pub mod boundary;

use crate::control::MirrorStatus;
use crate::types::{ReplicaId, Time};
use boundary::{Actions, Input};
use std::time::Duration;

/// What a node is told about itself when it is made: the configuration of one mirror, as this
/// node sees it.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// The cluster's name.
    pub cluster: String,
    /// The mirror's name.
    pub mirror: String,
    /// This node's name.
    pub node: String,
    /// The peer's name.
    pub peer: String,
    /// Where the metadata is.
    pub metadata: MetadataPlace,
    /// How long a silent peer may hold a guest's write (design.md R11).
    pub stall_timeout: Duration,
}

/// Where a replica's metadata is kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MetadataPlace {
    /// At the tail of the data store itself.
    Internal,
    /// In a file or device of its own.
    External,
}

/// One replica of one mirror.
#[derive(Debug)]
pub struct Node {}

impl Node {
    /// A node that has not met its disk yet. `new_id` draws a random 128-bit id per call.
    pub fn new(_config: NodeConfig, _new_id: Box<dyn FnMut() -> u128 + Send>) -> Node {
        Node {}
    }

    /// Takes one input at time `now` (never before an earlier call's) and appends what is to be
    /// done to `actions`.
    pub fn handle(&mut self, _now: Time, _input: Input, _actions: &mut Actions) {}

    /// When the node wants an [`Input::Tick`], if at all.
    pub fn next_deadline(&self) -> Option<Time> {
        None
    }

    /// What `kagami status` shows of it, but for what only the driver counts.
    pub fn status(&self, _now: Time) -> MirrorStatus {
        MirrorStatus::default()
    }

    /// The id of the replica on this node's disk, once the disk was read.
    pub fn replica(&self) -> Option<ReplicaId> {
        None
    }
}
