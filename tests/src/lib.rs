//! The harness of the end-to-end tests: it starts the real daemons, drives them with the real
//! command and real NBD clients, injects faults from outside and judges what comes of it.
//!
//! The stories are in `tests/`, one file each. A test reads like what an operator would do:
//!
//! ```no_run
//! use kagami_tests::{Cluster, ClusterOptions, Node};
//!
//! let mut cluster = Cluster::mirrored(ClusterOptions::default());
//! cluster.kill(Node::B);
//! cluster.nbd(Node::A).write(0, &[7; 4096], false).unwrap();
//! cluster.start(Node::B);
//! cluster.wait_mirrored();
//! cluster.assert_identical();
//! ```
//!
//! What the harness holds itself to:
//!
//! - It sees Kagami only from outside: processes, sockets, files, exit codes, JSON. Of the core it
//!   uses the published limits and, to judge power cuts, the formats on disk and the simulator's
//!   oracle.
//! - It ends only processes it started, by their handles; they also end when the test does.
//! - Tests wait for a state with a deadline ([`wait_until`]), never for a while and hope.
//! - A tool that is missing fails the test and says which package has it; nothing is skipped.
//! - One cluster runs at a time on a machine, so that a test's timing is its own.

mod binaries;
mod cluster;
pub mod crash;
pub mod guest;
mod ledger;
mod nbd;
pub mod planted;
mod process;
mod proxy;
mod recorder;
mod status;
pub mod timeline;
mod tool;
mod wait;
pub mod write_log;

pub use binaries::{binary, target_directory};
pub use cluster::{
    Cluster, ClusterOptions, CommandResult, DropRule, GIB, IoBackend, KIB, MIB, MetadataPlace, Node,
};
pub use ledger::{Ledger, LoadReport, StopOnDrop, WriteLoad};
pub use nbd::{NbdAddress, NbdClient, NbdCommand, NbdError, Reply};
pub use process::Process;
pub use proxy::{Proxy, ProxyMode};
pub use recorder::Recorder;
pub use status::{Counters, MirrorStatus, NodeStatus, ResyncStatus};
pub use tool::{Fio, Tool, ToolOutput, require_root};
pub use wait::{Deadline, pace, rounds, wait_until};
