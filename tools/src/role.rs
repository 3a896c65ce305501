//! `kagami primary` and `kagami secondary`: which node serves a mirror.

use crate::client::Client;
use crate::consent::Consent;
use crate::context::Context;
use crate::loss;
use crate::options::Place;
use crate::output;
use crate::progress;
use clap::Args;
use mirror_core::control::{Command, PrimaryMode};
use mirror_core::error::Refusal;

/// Make this node the one that serves the mirror.
///
/// Needs a copy that is up to date and no other Primary. A new mirror needs --initial once.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  kagami primary r0
  kagami primary r0 --initial                 first time: copy this node's data to the peer
  kagami primary r0 --initial --assume-clean  first time: both disks are known to be equal
  kagami primary r0 --force                   with a copy that may lack the last writes: it is said
                                              what is lost, and asked
  kagami primary r0 --force --yes             without a question, for scripts")]
pub struct PrimaryArgs {
    /// Which mirror [default: the only one of this node].
    pub mirror: Option<String>,

    /// First time in the mirror's life: this node's data is kept, the peer gets a full copy.
    #[arg(long, conflicts_with = "force")]
    pub initial: bool,

    /// With --initial: both disks hold the same bytes (both new and all zero, say), copy nothing.
    #[arg(long, requires = "initial")]
    pub assume_clean: bool,

    /// Also with a copy that is not known to be the latest: writes may be lost.
    #[arg(long)]
    pub force: bool,

    /// Wait until both replicas are in sync, and show the progress.
    #[arg(long)]
    pub wait: bool,

    /// Before --force.
    #[command(flatten)]
    pub consent: Consent,
}

impl PrimaryArgs {
    fn mode(&self) -> PrimaryMode {
        match (self.initial, self.assume_clean, self.force) {
            (true, true, _) => PrimaryMode::InitialAssumeClean,
            (true, false, _) => PrimaryMode::Initial,
            (false, _, true) => PrimaryMode::Force,
            (false, _, false) => PrimaryMode::Ordinary,
        }
    }
}

/// Make this node stop serving the mirror.
///
/// Refused while clients are connected; unmount it or disconnect them first. What they wrote is
/// flushed on both nodes before the role is given back.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  kagami secondary r0")]
pub struct SecondaryArgs {
    /// Which mirror [default: the only one of this node].
    pub mirror: Option<String>,
}

/// Runs `primary`.
pub fn primary(place: &Place, args: &PrimaryArgs) -> Result<(), Refusal> {
    let context = Context::load(place)?;
    let mirror = context.mirror(args.mirror.as_deref())?;
    let mut client = context.client()?;
    let mode = match args.mode() {
        PrimaryMode::Force => force_if_needed(&mut client, &mirror.name, args.consent)?,
        mode => mode,
    };
    output::warnings(&client.command(&mirror.name, Command::Primary(mode))?);
    if args.wait {
        return progress::until_synced(&context, &mirror.name);
    }
    if args.initial && !args.assume_clean {
        output::line(format!(
            "{0} is Primary; the peer gets its copy meanwhile: `kagami resync status {0} --follow`",
            mirror.name
        ));
    }
    Ok(())
}

/// Force only with consent. Where the plain command does the same, that is given instead: should the
/// state change before it arrives, nothing is lost unasked.
fn force_if_needed(
    client: &mut Client,
    mirror: &str,
    consent: Consent,
) -> Result<PrimaryMode, Refusal> {
    if consent.is_given() {
        return Ok(PrimaryMode::Force);
    }
    let Some(loss) = loss::of_force(&client.mirror_status(mirror)?) else {
        return Ok(PrimaryMode::Ordinary);
    };
    consent.obtain(&loss)?;
    Ok(PrimaryMode::Force)
}

/// Runs `secondary`.
pub fn secondary(place: &Place, args: &SecondaryArgs) -> Result<(), Refusal> {
    let context = Context::load(place)?;
    let mirror = context.mirror(args.mirror.as_deref())?;
    output::warnings(
        &context
            .client()?
            .command(&mirror.name, Command::Secondary)?,
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::options::{Options, Verb};
    use clap::Parser;
    use mirror_core::control::PrimaryMode;

    #[test]
    fn each_claim_has_its_option() {
        for (line, mode) in [
            ("kagami primary", PrimaryMode::Ordinary),
            ("kagami primary r0 --initial", PrimaryMode::Initial),
            (
                "kagami primary --initial --assume-clean",
                PrimaryMode::InitialAssumeClean,
            ),
            ("kagami primary r0 --force --yes", PrimaryMode::Force),
        ] {
            let options = Options::try_parse_from(line.split(' ')).unwrap();
            let Verb::Primary(args) = options.verb else {
                panic!("{line}")
            };
            assert_eq!(args.mode(), mode, "{line}");
        }
    }
}
