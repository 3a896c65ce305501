//! `kagami status --json` as an outside program reads it.

use serde::Deserialize;

/// The whole answer.
#[derive(Clone, Debug, Deserialize)]
pub struct NodeStatus {
    /// Version of the layout: 1.
    pub schema: u32,
    /// The node that answers.
    pub node: String,
    /// Its mirrors.
    pub mirrors: Vec<MirrorStatus>,
}

/// One mirror.
#[derive(Clone, Debug, Deserialize)]
#[allow(missing_docs)] // `mirror_core::control` describes each field; names are the JSON's
pub struct MirrorStatus {
    pub name: String,
    pub role: String,
    pub peer_role: String,
    pub disk: String,
    pub peer_disk: String,
    pub link: String,
    pub generation: String,
    pub holders: Vec<String>,
    pub arbitration: String,
    pub size_bytes: u64,
    pub dirty_bytes: u64,
    pub unsettled_bytes: u64,
    pub resync: Option<ResyncStatus>,
    pub verify: Option<VerifyStatus>,
    pub reasons: Vec<String>,
    pub counters: Counters,
}

/// A resync under way.
#[derive(Clone, Debug, Deserialize)]
#[allow(missing_docs)]
pub struct ResyncStatus {
    pub direction: String,
    pub done_bytes: u64,
    pub total_bytes: u64,
    pub sent_bytes: u64,
    pub rate_bytes_per_second: u64,
    pub eta_seconds: Option<u64>,
    pub paused: bool,
}

/// A comparison of the replicas.
#[derive(Clone, Debug, Deserialize)]
#[allow(missing_docs)]
pub struct VerifyStatus {
    pub state: String,
    pub cause: String,
    pub repair: bool,
    pub done_bytes: u64,
    pub total_bytes: u64,
    pub rate_bytes_per_second: u64,
    pub eta_seconds: Option<u64>,
    pub different_bytes: u64,
    pub ranges: Vec<(u64, u64)>,
}

/// Totals since the daemon started.
#[derive(Clone, Debug, Deserialize)]
#[allow(missing_docs)]
pub struct Counters {
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub link_sent_bytes: u64,
    pub link_received_bytes: u64,
    pub in_flight: u64,
    pub max_stall_ms: u64,
    pub resyncs: u64,
}

impl MirrorStatus {
    /// Connected, both replicas UpToDate, nothing left to copy: as seen from this node.
    pub fn is_mirrored(&self) -> bool {
        self.link == "Connected"
            && self.disk == "UpToDate"
            && self.peer_disk == "UpToDate"
            && self.resync.is_none()
            && self.dirty_bytes == 0
    }

    /// Bytes that crossed the link in either direction since the daemon started.
    pub fn link_bytes(&self) -> u64 {
        self.counters.link_sent_bytes + self.counters.link_received_bytes
    }
}
