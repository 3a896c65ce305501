//! `kagami.toml`: the same file on every node, parsed and checked in one place.
//!
//! Parsing yields a [`Config`] whose every value is in range and whose parts agree with each
//! other; nothing else in Kagami reads the file.

mod check;
mod document;
mod taken;
#[cfg(test)]
mod tests;
mod units;

pub use units::{UnitError, parse_duration, parse_size};

use crate::error::{ErrorId, Refusal};
use crate::types::CopyRates;
use document::Document;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The largest configuration file, in bytes.
pub const MAX_CONFIG: usize = 1 << 20;

/// The default of `run-dir`.
pub const DEFAULT_RUN_DIR: &str = "/run/kagami";

/// The default of `state-dir`.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/kagami";

/// The shortest `stall-timeout`.
pub const MIN_STALL_TIMEOUT: Duration = Duration::from_millis(100);

/// The longest `stall-timeout`.
pub const MAX_STALL_TIMEOUT: Duration = Duration::from_secs(60);

/// A configuration that was checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// `[cluster] name`.
    pub cluster: String,
    /// `[cluster] insecure`: links in plain text. The only mode until keys exist.
    pub insecure: bool,
    /// `[[node]]`, in order.
    pub nodes: Vec<Node>,
    /// `[[mirror]]`, in order.
    pub mirrors: Vec<Mirror>,
}

/// One server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Where its peers reach it, preferred first; at least one.
    pub addresses: Vec<IpAddr>,
    /// Directory of sockets and pid files.
    pub run_dir: PathBuf,
    /// Directory of what must survive a reboot; nothing is kept there yet.
    pub state_dir: PathBuf,
    /// How its daemon does I/O.
    pub io_backend: IoBackend,
}

/// How a node's daemon does I/O: a property of the host, so each node has its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum IoBackend {
    /// io_uring where the host allows it, else threads.
    #[default]
    Auto,
    /// io_uring or not at all.
    IoUring,
    /// epoll and threads.
    Threads,
}

/// One mirrored device, seen from the pair that keeps it. The sides are in the order of the
/// `[[node]]` tables; the second connects to the first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mirror {
    /// Its name.
    pub name: String,
    /// TCP port of the mirror link, on each node's first address.
    pub port: u16,
    /// The two replicas.
    pub sides: [Side; 2],
    /// How long a silent peer may hold a guest's write.
    pub stall_timeout: Duration,
    /// How fast a resync or a verify may go, and is to.
    pub copy_rates: CopyRates,
}

/// One node's part of a mirror.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Side {
    /// The node's name.
    pub node: String,
    /// The data store: block device or file.
    pub disk: PathBuf,
    /// Where its metadata is.
    pub metadata: Metadata,
    /// Where it exports the mirror by NBD.
    pub nbd: Option<NbdAddress>,
}

/// Where a replica's metadata is kept.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Metadata {
    /// At the tail of the data store.
    Internal,
    /// In a file or device of its own.
    External(PathBuf),
}

/// Where an NBD server listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NbdAddress {
    /// `unix:PATH`.
    Unix(PathBuf),
    /// `tcp:ADDR:PORT`; loopback addresses only while links are in plain text.
    Tcp(SocketAddr),
}

impl Config {
    /// Parses and checks the text of a configuration; `origin` names it in messages.
    ///
    /// # Errors
    ///
    /// A [`Refusal`] of the 01xx group that names line and column where it can.
    pub fn parse(text: &str, origin: &Path) -> Result<Config, Refusal> {
        if text.len() > MAX_CONFIG {
            return Err(Refusal::new(
                ErrorId::ConfigUnreadable,
                format!(
                    "{}: {} bytes; a configuration has at most {MAX_CONFIG}, is this the right file?",
                    origin.display(),
                    text.len()
                ),
            ));
        }
        let doc = Document { text, origin };
        doc.parse(|tree| check::config(doc, tree))
    }

    /// [`Config::parse`] for a file's bytes, which may be no text at all.
    ///
    /// # Errors
    ///
    /// As [`Config::parse`]; also for bytes that are not UTF-8.
    pub fn parse_bytes(bytes: &[u8], origin: &Path) -> Result<Config, Refusal> {
        match std::str::from_utf8(bytes) {
            Ok(text) => Config::parse(text, origin),
            Err(error) => {
                let text = std::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default();
                Err(Document { text, origin }.refuse(
                    text.len(),
                    ErrorId::ConfigSyntax,
                    "bytes that are not UTF-8; save the file as UTF-8 text",
                ))
            }
        }
    }

    /// The node of this name.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.name == name)
    }

    /// The node called like a host, by the host's full or its first name.
    pub fn node_of_host(&self, host: &str) -> Option<&Node> {
        let host = host.to_ascii_lowercase();
        let first = host.split('.').next().unwrap_or_default();
        self.node(&host).or_else(|| self.node(first))
    }

    /// The mirror of this name.
    pub fn mirror(&self, name: &str) -> Option<&Mirror> {
        self.mirrors.iter().find(|mirror| mirror.name == name)
    }
}

impl Node {
    /// The daemon's control socket: `RUN-DIR/NODE-mirror.sock`.
    pub fn control_socket(&self) -> PathBuf {
        self.run_dir.join(format!("{}-mirror.sock", self.name))
    }
}

impl Mirror {
    /// This node's side and the peer's, if the node is one of the pair.
    pub fn sides_of(&self, node: &str) -> Option<(&Side, &Side)> {
        let [first, second] = &self.sides;
        if first.node == node {
            Some((first, second))
        } else if second.node == node {
            Some((second, first))
        } else {
            None
        }
    }

    /// Whether this node is the one that connects; the other listens.
    pub fn connects(&self, node: &str) -> bool {
        self.sides[1].node == node
    }
}
