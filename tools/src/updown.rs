//! `kagami up` and `kagami down`: a mirror enters or leaves the running daemon.

use crate::context::Context;
use crate::options::Place;
use crate::output;
use clap::Args;
use mirror_core::control::Command;
use mirror_core::error::Refusal;

/// Bring a mirror up in the running daemon.
///
/// It comes up as Secondary. A daemon that starts brings all its mirrors up by itself; this is for
/// one that was taken down, or whose disk could not be opened.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  kagami up r0
  kagami up                        all mirrors of this node")]
pub struct UpArgs {
    /// Which mirror [default: all of this node].
    pub mirror: Option<String>,
}

/// Take a mirror out of the running daemon.
///
/// The daemon finishes what is under way, flushes and closes the disk; a Primary gives its role back
/// first. Refused while clients are connected; unmount it or disconnect them first.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  kagami down r0
  kagami down r0 && kagami dump-metadata r0")]
pub struct DownArgs {
    /// Which mirror [default: the only one of this node].
    pub mirror: Option<String>,
}

/// Runs `up`.
pub fn up(place: &Place, args: &UpArgs) -> Result<(), Refusal> {
    let context = Context::load(place)?;
    let mirror = match &args.mirror {
        Some(name) => Some(context.mirror(Some(name))?.name.as_str()),
        None => None,
    };
    output::warnings(&context.client()?.up(mirror)?);
    Ok(())
}

/// Runs `down`.
pub fn down(place: &Place, args: &DownArgs) -> Result<(), Refusal> {
    let context = Context::load(place)?;
    let mirror = context.mirror(args.mirror.as_deref())?;
    output::warnings(&context.client()?.command(&mirror.name, Command::Down)?);
    Ok(())
}
