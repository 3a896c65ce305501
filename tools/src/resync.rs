//! `kagami resync`: show, hold or continue the copying of what differs.

use crate::context::Context;
use crate::human;
use crate::options::Place;
use crate::output;
use crate::progress;
use crate::wait::Goal;
use clap::{Args, Subcommand};
use mirror_core::control::Command;
use mirror_core::error::{ErrorId, Refusal};

/// Show, hold or continue a resync.
///
/// A resync copies what differs between the replicas, and starts by itself when they meet. On hold,
/// it stays where it is; nothing starts over.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  kagami resync status r0
  kagami resync status r0 --follow
  kagami resync pause r0
  kagami resync resume r0")]
pub struct ResyncArgs {
    /// What to do.
    #[command(subcommand)]
    pub verb: ResyncVerb,
}

/// What to do with a resync.
#[derive(Subcommand, Debug)]
pub enum ResyncVerb {
    /// Show how far the resync is.
    #[command(after_help = "Examples:\n  kagami resync status r0 --follow")]
    Status {
        /// Which mirror [default: the only one of this node].
        mirror: Option<String>,
        /// Stay until both replicas are in sync, and show the progress.
        #[arg(long, visible_alias = "wait")]
        follow: bool,
    },
    /// Hold the resync; guests go on.
    #[command(after_help = "Examples:\n  kagami resync pause r0")]
    Pause {
        /// Which mirror [default: the only one of this node].
        mirror: Option<String>,
    },
    /// Let a held resync go on.
    #[command(after_help = "Examples:\n  kagami resync resume r0")]
    Resume {
        /// Which mirror [default: the only one of this node].
        mirror: Option<String>,
    },
}

/// Runs the verb.
pub fn run(place: &Place, args: &ResyncArgs) -> Result<(), Refusal> {
    let context = Context::load(place)?;
    let (mirror, command) = match &args.verb {
        ResyncVerb::Status { mirror, follow } => {
            return status(&context, mirror.as_deref(), *follow);
        }
        ResyncVerb::Pause { mirror } => (mirror, Command::PauseResync),
        ResyncVerb::Resume { mirror } => (mirror, Command::ResumeResync),
    };
    let mirror = context.mirror(mirror.as_deref())?;
    output::warnings(&context.client()?.command(&mirror.name, command)?);
    Ok(())
}

fn status(context: &Context, mirror: Option<&str>, follow: bool) -> Result<(), Refusal> {
    let mirror = context.mirror(mirror)?;
    let status = context.client()?.mirror_status(&mirror.name)?;
    match &status.resync {
        Some(_) if follow => progress::until_synced(context, &mirror.name),
        Some(resync) => {
            output::line(format!("{}: {}", mirror.name, human::resync_line(resync)));
            Ok(())
        }
        None if follow && !Goal::Synced.is_reached(&status) => Err(Refusal::new(
            ErrorId::NoResync,
            format!("{}; nothing to follow", human::headline(&status)),
        )),
        None => {
            let dirty = human::size(status.dirty_bytes);
            output::line(format!("{}: no resync, {dirty} out of sync", mirror.name));
            Ok(())
        }
    }
}
