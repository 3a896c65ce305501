//! `kagami verify`: compare the two copies, and mend what differs.

use crate::context::Context;
use crate::human;
use crate::options::Place;
use crate::output;
use crate::progress;
use clap::Args;
use mirror_core::control::{Command, MirrorStatus, VerifyState, VerifyStatus};
use mirror_core::error::{ErrorId, Refusal};

/// Ranges that an error message lists.
const LISTED: usize = 4;

/// Compare the two copies, block by block, while guests work.
///
/// Run it on the Primary; where nobody is Primary, on either node. Where the copies differ, the peer's
/// is not trusted any more (Outdated, StandAlone), and the service goes on with this node's: which of
/// them is right, an operator decides. With --repair the peer's blocks that differ are overwritten at once.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  kagami verify r0 --wait            with a progress bar; exit code 1 if the copies differ
  kagami verify r0 --repair a        on a: what differs on the other node is copied from a
  kagami verify r0 --stop            and later, from there on: kagami verify r0 --resume
  kagami status r0                   how far it is, and what it found")]
pub struct VerifyArgs {
    /// Which mirror [default: the only one of this node].
    pub mirror: Option<String>,

    /// Copy what differs from this node, which must be the one that is asked.
    #[arg(long, value_name = "NODE", conflicts_with = "stop")]
    pub repair: Option<String>,

    /// Go on with the verify that was stopped.
    #[arg(long, conflicts_with = "stop")]
    pub resume: bool,

    /// End the verify under way.
    #[arg(long)]
    pub stop: bool,

    /// Wait until it ends, and show the progress.
    #[arg(long, conflicts_with = "stop")]
    pub wait: bool,
}

/// Runs the verb.
pub fn run(place: &Place, args: &VerifyArgs) -> Result<(), Refusal> {
    let context = Context::load(place)?;
    let mirror = &context.mirror(args.mirror.as_deref())?.name;
    if let Some(source) = &args.repair {
        check_source(&context, mirror, source)?;
    }
    let command = match args.stop {
        true => Command::StopVerify,
        false => Command::Verify {
            repair: args.repair.is_some(),
            resume: args.resume,
        },
    };
    output::warnings(&context.client()?.command(mirror, command)?);
    if !args.wait {
        return Ok(());
    }
    let status = progress::until_verified(&context, mirror)?;
    let Some(verify) = &status.verify else {
        return Err(Refusal::new(
            ErrorId::NoVerify,
            "its daemon was restarted and knows of no verify; begin it again",
        ));
    };
    if args.repair.is_some() && verify.state == VerifyState::Complete {
        progress::until_synced(&context, mirror)?;
    }
    conclude(&context, &status, verify)
}

/// A node drives the comparison whose copy is to win.
fn check_source(context: &Context, mirror: &str, source: &str) -> Result<(), Refusal> {
    let config = &context.config;
    if config.node(source).is_none() {
        return Err(Refusal::new(
            ErrorId::UnknownNode,
            format!("--repair: no node {source} in the configuration"),
        ));
    }
    if source == context.node().name {
        return Ok(());
    }
    Err(Refusal::new(
        ErrorId::UsageConflict,
        format!(
            "--repair {source}: the node whose copy is to win does the work; run `kagami verify \
             {mirror} --repair {source}` on {source}, or name {}",
            context.node().name
        ),
    ))
}

fn conclude(
    context: &Context,
    status: &MirrorStatus,
    verify: &VerifyStatus,
) -> Result<(), Refusal> {
    let mirror = &status.name;
    if verify.state == VerifyState::Stopped {
        return Err(Refusal::new(
            ErrorId::VerifyStopped,
            format!(
                "{}; `kagami verify {mirror} --resume` goes on from there",
                verify.cause
            ),
        ));
    }
    let found = human::size(verify.different_bytes);
    if verify.different_bytes == 0 {
        let compared = human::size(verify.total_bytes);
        output::line(format!("{mirror}: {compared} compared, no differences"));
    } else if verify.repair {
        let (node, ranges) = (&context.node().name, ranges_in_words(verify));
        output::line(format!(
            "{mirror}: {found} differed ({ranges}), and are made equal to {node}'s"
        ));
    } else {
        let (node, ranges) = (&context.node().name, ranges_in_words(verify));
        return Err(Refusal::new(
            ErrorId::CopiesDiffer,
            format!(
                "{mirror}: {found} differ ({ranges}); to keep what {node} has, run `kagami connect \
                 {mirror}`, to keep what the other node has, see docs/verify.md"
            ),
        ));
    }
    Ok(())
}

/// The first ranges, as OFFSET+LENGTH in bytes.
fn ranges_in_words(verify: &VerifyStatus) -> String {
    let listed = verify.ranges.iter().take(LISTED);
    let mut words: Vec<String> = listed
        .map(|(offset, length)| format!("{offset}+{length}"))
        .collect();
    let bytes: u64 = verify.ranges.iter().take(LISTED).map(|(_, len)| len).sum();
    if bytes < verify.different_bytes {
        words.push("…".to_owned());
    }
    words.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(ranges: &[(u64, u64)]) -> VerifyStatus {
        VerifyStatus {
            state: VerifyState::Complete,
            cause: String::new(),
            repair: false,
            done_bytes: 1 << 20,
            total_bytes: 1 << 20,
            rate_bytes_per_second: 0,
            eta_seconds: None,
            different_bytes: ranges.iter().map(|(_, length)| length).sum(),
            ranges: ranges.to_vec(),
        }
    }

    #[test]
    fn few_ranges_are_listed_whole() {
        assert_eq!(ranges_in_words(&found(&[(0, 4096)])), "0+4096");
        let many: Vec<(u64, u64)> = (0..9).map(|n| (n * 8192, 4096)).collect();
        assert_eq!(
            ranges_in_words(&found(&many)),
            "0+4096, 8192+4096, 16384+4096, 24576+4096, …"
        );
    }
}
