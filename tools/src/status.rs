//! `kagami status`: the state of the mirrors, once, again and again, or until it is as wished.

use crate::context::Context;
use crate::human;
use crate::options::Place;
use crate::output;
use crate::wait::{self, Goal};
use clap::Args;
use mirror_core::config::parse_duration;
use mirror_core::control::NodeStatus;
use mirror_core::error::{ErrorId, Refusal};
use std::time::Duration;

const WATCH_EVERY: Duration = Duration::from_millis(500);

/// Show the state of the mirrors, or wait for one.
///
/// Shows role, disks, link, generation and resync of this node's mirrors, as its daemon sees
/// them, or waits until they are in a state. Of a pair like Primary/Secondary the first is this
/// node's, the second the peer's as far as it is known.
///
/// States to wait for: Primary, Secondary; UpToDate, Consistent, Outdated, Inconsistent, Failed,
/// Diskless; Connected, Connecting, StandAlone; synced (Connected, both UpToDate, no resync);
/// resync (one is under way). A daemon that does not run yet counts as "not yet".
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  kagami status
  kagami status r0 --json
  kagami status --watch
  kagami status r0 --wait-for synced --timeout 60s")]
pub struct StatusArgs {
    /// Which mirror [default: all of this node].
    pub mirror: Option<String>,

    /// Print JSON (schema 1).
    #[arg(long)]
    pub json: bool,

    /// Show it again and again until interrupted.
    #[arg(long, conflicts_with = "wait_for")]
    pub watch: bool,

    /// Wait until every mirror shown is in this state.
    #[arg(long, value_name = "STATE", value_parser = Goal::parse)]
    pub wait_for: Option<Goal>,

    /// Give up waiting after this time, like 30s [default: never].
    #[arg(long, value_name = "TIME", value_parser = parse_duration, requires = "wait_for")]
    pub timeout: Option<Duration>,
}

/// Runs the verb.
pub fn run(place: &Place, args: &StatusArgs) -> Result<(), Refusal> {
    let context = Context::load(place)?;
    let mirror = match &args.mirror {
        Some(name) => Some(context.mirror(Some(name))?.name.as_str()),
        None => None,
    };
    let look = || look(&context, mirror);
    if let Some(goal) = args.wait_for {
        let mirrors = wait::until(goal, args.timeout, || Ok(look()?.mirrors))?;
        // What was seen when the goal was reached; it may have passed since.
        let node = context.node().name.clone();
        show(
            &NodeStatus {
                schema: 1,
                node,
                mirrors,
            },
            args.json,
            Layout::Pretty,
        )
    } else if args.watch {
        watch(look, args.json)
    } else {
        show(&look()?, args.json, Layout::Pretty)
    }
}

fn look(context: &Context, mirror: Option<&str>) -> Result<NodeStatus, Refusal> {
    let mut client = context.client()?;
    let Some(mirror) = mirror else {
        return client.status(None);
    };
    let mirrors = vec![client.mirror_status(mirror)?];
    Ok(NodeStatus {
        schema: 1,
        node: context.node().name.clone(),
        mirrors,
    })
}

/// Redraws in place on a terminal; elsewhere prints what changed.
fn watch(look: impl Fn() -> Result<NodeStatus, Refusal>, json: bool) -> Result<(), Refusal> {
    let mut shown = None;
    loop {
        // A daemon that restarts is something to watch, not an end.
        let seen = look();
        if shown.as_ref() != Some(&seen) {
            if !json && output::on_terminal() {
                // Home, and clear to the end of the screen.
                output::line("\x1b[H\x1b[J");
            }
            match &seen {
                Ok(status) => show(status, json, Layout::Line)?,
                Err(refusal) => eprintln!("kagami: {refusal}"),
            }
            shown = Some(seen);
        }
        std::thread::sleep(WATCH_EVERY);
    }
}

/// How JSON is laid out.
#[derive(Clone, Copy)]
enum Layout {
    Pretty,
    Line,
}

fn show(status: &NodeStatus, json: bool, layout: Layout) -> Result<(), Refusal> {
    if !json {
        let mut paragraphs: Vec<String> = status.mirrors.iter().map(human::paragraph).collect();
        if paragraphs.is_empty() {
            paragraphs.push(format!("node {} runs no mirror", status.node));
        }
        output::line(paragraphs.join("\n"));
        return Ok(());
    }
    let json = match layout {
        Layout::Pretty => serde_json::to_string_pretty(status),
        Layout::Line => serde_json::to_string(status),
    };
    let json = json.map_err(|error| {
        Refusal::new(
            ErrorId::Internal,
            format!("the status does not fit JSON: {error}"),
        )
    })?;
    output::line(json);
    Ok(())
}
