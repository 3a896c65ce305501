//! Following a resync or a verify: a bar on a terminal, a line per change otherwise.

use crate::context::Context;
use crate::human;
use crate::output;
use crate::wait::{Goal, POLL};
use indicatif::{ProgressBar, ProgressStyle};
use mirror_core::control::{MirrorStatus, VerifyState, VerifyStatus};
use mirror_core::error::{ErrorId, Refusal};
use mirror_core::types::LinkState;
use std::time::{Duration, Instant};

/// Without a terminal, a line is printed this often.
const LINE_EVERY: Duration = Duration::from_secs(2);

/// Stays until both replicas are in sync. Ends with an error when that cannot come any more
/// without an operator.
pub fn until_synced(context: &Context, mirror: &str) -> Result<(), Refusal> {
    let mut display = Display::new();
    loop {
        let status = context.client()?.mirror_status(mirror)?;
        if Goal::Synced.is_reached(&status) {
            display.finish(&status);
            return Ok(());
        }
        refuse_alone(&mut display, &status)?;
        display.show(&status);
        std::thread::sleep(POLL);
    }
}

/// Stays until the verify of this node is over, and returns what was seen then.
pub fn until_verified(context: &Context, mirror: &str) -> Result<MirrorStatus, Refusal> {
    let mut display = Display::new();
    loop {
        let status = context.client()?.mirror_status(mirror)?;
        let running = |verify: &VerifyStatus| verify.state == VerifyState::Running;
        if !status.verify.as_ref().is_some_and(running) {
            display.clear();
            return Ok(status);
        }
        refuse_alone(&mut display, &status)?;
        display.show(&status);
        std::thread::sleep(POLL);
    }
}

/// Nothing that takes both nodes ends while this one looks for no peer.
fn refuse_alone(display: &mut Display, status: &MirrorStatus) -> Result<(), Refusal> {
    if status.link != LinkState::StandAlone {
        return Ok(());
    }
    display.clear();
    let mut what = human::headline(status);
    for reason in &status.reasons {
        what = format!("{what}; {reason}");
    }
    let mirror = &status.name;
    let message = format!("{what}; run `kagami connect {mirror}` on both nodes");
    Err(Refusal::new(ErrorId::NotConnected, message))
}

enum Display {
    Bar(ProgressBar),
    Lines { last: Option<Instant> },
}

impl Display {
    fn new() -> Display {
        if !output::on_terminal() {
            return Display::Lines { last: None };
        }
        let bar = ProgressBar::new(0);
        let style = ProgressStyle::with_template("{prefix} [{bar:30}] {percent:>3} %  {msg}");
        bar.set_style(
            style
                .expect("the template is well-formed")
                .progress_chars("=>-"),
        );
        Display::Bar(bar)
    }

    fn show(&mut self, status: &MirrorStatus) {
        match self {
            Display::Bar(bar) => {
                bar.set_prefix(status.name.clone());
                match (&status.resync, &status.verify) {
                    (Some(resync), _) => {
                        bar.set_length(resync.total_bytes);
                        bar.set_position(resync.done_bytes);
                        bar.set_message(pace(status));
                    }
                    (None, Some(verify)) if verify.state == VerifyState::Running => {
                        bar.set_length(verify.total_bytes);
                        bar.set_position(verify.done_bytes);
                        bar.set_message(format!(
                            "{}/s, {} differ",
                            human::size(verify.rate_bytes_per_second),
                            human::size(verify.different_bytes)
                        ));
                    }
                    _ => bar.set_message(human::headline(status)),
                }
            }
            Display::Lines { last } => {
                if last.is_some_and(|at| at.elapsed() < LINE_EVERY) {
                    return;
                }
                *last = Some(Instant::now());
                output::line(match (&status.resync, &status.verify) {
                    (Some(resync), _) => format!("{}: {}", status.name, human::resync_line(resync)),
                    (None, Some(verify)) if verify.state == VerifyState::Running => {
                        format!("{}: {}", status.name, human::verify_line(verify))
                    }
                    _ => human::headline(status),
                });
            }
        }
    }

    fn finish(&mut self, status: &MirrorStatus) {
        self.clear();
        output::line(format!("{}: in sync", status.name));
    }

    fn clear(&mut self) {
        if let Display::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

/// What stands right of the bar: amounts, rate, time left.
fn pace(status: &MirrorStatus) -> String {
    let Some(resync) = &status.resync else {
        return String::new();
    };
    let amounts = format!(
        "{} of {}",
        human::size(resync.done_bytes),
        human::size(resync.total_bytes)
    );
    if resync.paused {
        return format!("{amounts}, paused");
    }
    let rate = human::size(resync.rate_bytes_per_second);
    match resync.eta_seconds {
        Some(left) => format!("{amounts}, {rate}/s, {} left", human::span(left)),
        None => format!("{amounts}, {rate}/s"),
    }
}
