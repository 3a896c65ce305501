//! `kagami demo`: two nodes on this machine, to look at or to tell their story by themselves.

mod cluster;
mod guest;
mod interrupt;
mod ledger;
mod live;
mod plan;
mod story;

use clap::Args;
use mirror_core::config::parse_size;
use mirror_core::error::{ErrorId, Refusal};
use std::path::PathBuf;

/// Show Kagami at work: two nodes on this machine.
///
/// Starts two nodes, "a" and "b", on this machine over loopback with sparse files, and shows how
/// they do until Ctrl-C. Needs no root, no configuration and no other program.
///
/// With --script it runs a story by itself: write and verify through NBD, kill the peer with -9,
/// keep writing, bring it back, copy only what changed, kill the Primary, promote the peer, verify
/// every acknowledged write, compare both disks. Ends with 0 only if all of it held.
#[derive(Args, Debug, Clone)]
#[command(after_help = "Examples:
  kagami demo                      two nodes to play with
  kagami demo --script             the story, in ten to twenty seconds
  kagami demo --script --size 4GiB --dir /srv/demo")]
pub struct DemoArgs {
    /// Run the story by itself, then end.
    #[arg(long)]
    pub script: bool,

    /// Size of each node's disk.
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = parse_size)]
    pub size: u64,

    /// Where to put the files: a directory that is empty or not there yet; it is kept [default: a
    /// new one under $TMPDIR or /var/tmp, removed at the end].
    #[arg(long)]
    pub dir: Option<PathBuf>,

    /// Do not remove the files at the end.
    #[arg(long)]
    pub keep: bool,

    /// The daemon to run [default: kagami-mirror beside this program].
    #[arg(long, value_name = "PROGRAM")]
    pub daemon: Option<PathBuf>,

    /// Where the story's random numbers begin; the same seed writes the same data.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// Runs the verb.
pub fn run(args: &DemoArgs) -> Result<(), Refusal> {
    let daemon = plan::find_daemon(args.daemon.as_deref())?;
    let plan = plan::Plan::new(args)?;
    interrupt::install();
    let cluster = cluster::Cluster::new(plan, daemon)?;
    if args.script {
        story::run(cluster, args.seed)
    } else {
        live::run(cluster)
    }
}

/// A failure of the demo or of the host it runs on.
fn failed(message: impl Into<String>) -> Refusal {
    Refusal::new(ErrorId::Internal, message)
}
