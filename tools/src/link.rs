//! `kagami connect`, `disconnect` and `invalidate`: how this node stands to its peer.

use crate::client::Client;
use crate::consent::Consent;
use crate::context::Context;
use crate::loss;
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
  kagami connect r0 --checksum             over a slow link: what is equal already is not sent
  kagami connect r0 --discard-my-data      end a split brain: the peer's data is kept; it is said
                                           what is lost here, and asked
  kagami connect r0 --discard-my-data --yes")]
pub struct ConnectArgs {
    /// Which mirror [default: the only one of this node].
    pub mirror: Option<String>,

    /// After a split brain: throw away what only this node has, take the peer's data.
    #[arg(long)]
    pub discard_my_data: bool,

    /// Read both replicas and send only what differs, in place of everything that is marked.
    #[arg(long)]
    pub checksum: bool,

    /// Wait until both replicas are in sync, and show the progress.
    #[arg(long)]
    pub wait: bool,

    /// Before --discard-my-data.
    #[command(flatten)]
    pub consent: Consent,
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
/// Until that is done, the peer holds the only good copy. It is said what is lost, and asked.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  kagami invalidate r0
  kagami invalidate r0 --yes --wait
  kagami invalidate r0 --yes --checksum    over a slow link: what is equal already is not sent")]
pub struct InvalidateArgs {
    /// Which mirror [default: the only one of this node].
    pub mirror: Option<String>,

    /// Read both replicas and send only what differs, in place of everything.
    #[arg(long)]
    pub checksum: bool,

    /// Wait until both replicas are in sync, and show the progress.
    #[arg(long)]
    pub wait: bool,

    /// Before anything.
    #[command(flatten)]
    pub consent: Consent,
}

/// Runs `connect`.
pub fn connect(place: &Place, args: &ConnectArgs) -> Result<(), Refusal> {
    let context = Context::load(place)?;
    let mirror = context.mirror(args.mirror.as_deref())?;
    let mut client = context.client()?;
    let discard_my_data =
        args.discard_my_data && discard_if_needed(&mut client, &mirror.name, args.consent)?;
    compare_first(&mut client, &mirror.name, args.checksum)?;
    output::warnings(&client.command(&mirror.name, Command::Connect { discard_my_data })?);
    if args.wait {
        progress::until_synced(&context, &mirror.name)
    } else {
        Ok(())
    }
}

/// With --checksum: the resync that follows sends only what differs.
fn compare_first(client: &mut Client, mirror: &str, checksum: bool) -> Result<(), Refusal> {
    if checksum {
        output::warnings(&client.command(mirror, Command::CompareFirst)?);
    }
    Ok(())
}

/// Whether to discard, only with consent. Where there is nothing to discard the plain command is given
/// instead: should the state change before it arrives, nothing is lost unasked.
fn discard_if_needed(client: &mut Client, mirror: &str, consent: Consent) -> Result<bool, Refusal> {
    if consent.is_given() {
        return Ok(true);
    }
    let Some(loss) = loss::of_discarding(&client.mirror_status(mirror)?) else {
        return Ok(false);
    };
    consent.obtain(&loss)?;
    Ok(true)
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
    let mut client = context.client()?;
    if !args.consent.is_given() {
        let loss = loss::of_invalidating(&client.mirror_status(&mirror.name)?);
        args.consent.obtain(&loss)?;
    }
    compare_first(&mut client, &mirror.name, args.checksum)?;
    output::warnings(&client.command(&mirror.name, Command::Invalidate)?);
    if args.wait {
        progress::until_synced(&context, &mirror.name)
    } else {
        Ok(())
    }
}
