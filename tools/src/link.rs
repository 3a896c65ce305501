//! `kagami connect`, `disconnect` and `invalidate`: how this node stands to its peer.

use crate::context::Context;
use crate::options::Place;
use crate::output;
use crate::progress;
use clap::Args;
use mirror_core::control::Command;
use mirror_core::error::Refusal;

/// Look for the peer again.
///
/// Ends StandAlone: the daemon tries until it finds the peer. What differs is then copied.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  kagami connect r0
  kagami connect r0 --wait                 until both are in sync again
  kagami connect r0 --discard-my-data      end a split brain: the peer's data is kept")]
pub struct ConnectArgs {
    /// Which mirror [default: the only one of this node].
    pub mirror: Option<String>,

    /// After a split brain: throw away what only this node has, take the peer's data.
    #[arg(long)]
    pub discard_my_data: bool,

    /// Wait until both replicas are in sync, and show the progress.
    #[arg(long)]
    pub wait: bool,

    /// Do not ask before --discard-my-data.
    #[arg(long, short)]
    pub yes: bool,
}

/// Part from the peer and stay apart.
///
/// The mirror is StandAlone until `kagami connect`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  kagami disconnect r0")]
pub struct DisconnectArgs {
    /// Which mirror [default: the only one of this node].
    pub mirror: Option<String>,
}

/// Throw this node's copy away and take a full one from the peer.
///
/// Until that is done, the peer holds the only good copy.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  kagami invalidate r0
  kagami invalidate r0 --yes --wait")]
pub struct InvalidateArgs {
    /// Which mirror [default: the only one of this node].
    pub mirror: Option<String>,

    /// Wait until both replicas are in sync, and show the progress.
    #[arg(long)]
    pub wait: bool,

    /// Do not ask.
    #[arg(long, short)]
    pub yes: bool,
}

/// Runs `connect`.
pub fn connect(place: &Place, args: &ConnectArgs) -> Result<(), Refusal> {
    let context = Context::load(place)?;
    let mirror = context.mirror(args.mirror.as_deref())?;
    let discard_my_data = args.discard_my_data;
    if discard_my_data {
        let risk = format!(
            "If {} was written to on both nodes, what was written only here is lost.",
            mirror.name
        );
        output::confirm(&risk, args.yes)?;
    }
    let mut client = context.client()?;
    output::warnings(&client.command(&mirror.name, Command::Connect { discard_my_data })?);
    if args.wait {
        progress::until_synced(&context, &mirror.name)
    } else {
        Ok(())
    }
}

/// Runs `disconnect`.
pub fn disconnect(place: &Place, args: &DisconnectArgs) -> Result<(), Refusal> {
    let context = Context::load(place)?;
    let mirror = context.mirror(args.mirror.as_deref())?;
    output::warnings(
        &context
            .client()?
            .command(&mirror.name, Command::Disconnect)?,
    );
    Ok(())
}

/// Runs `invalidate`.
pub fn invalidate(place: &Place, args: &InvalidateArgs) -> Result<(), Refusal> {
    let context = Context::load(place)?;
    let mirror = context.mirror(args.mirror.as_deref())?;
    let risk = format!(
        "This node's copy of {} is thrown away. Until the peer has copied everything here, the \
         peer's disk is the only good one.",
        mirror.name
    );
    output::confirm(&risk, args.yes)?;
    let mut client = context.client()?;
    output::warnings(&client.command(&mirror.name, Command::Invalidate)?);
    if args.wait {
        progress::until_synced(&context, &mirror.name)
    } else {
        Ok(())
    }
}
