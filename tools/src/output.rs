//! Standard output that may be closed early, and warnings.

use mirror_core::control::CommandOutcome;
use std::fmt::Display;
use std::io::{self, IsTerminal, Write};

/// Prints a line. A reader that went away (`kagami status | head`) ends the command quietly.
pub fn line(text: impl Display) {
    let mut out = io::stdout().lock();
    if writeln!(out, "{text}").and_then(|()| out.flush()).is_err() {
        std::process::exit(0);
    }
}

/// Whether a person watches standard output.
pub fn on_terminal() -> bool {
    io::stdout().is_terminal()
}

/// How wide the terminal is; without one, as wide as most are.
pub fn columns() -> usize {
    terminal_size::terminal_size().map_or(80, |(width, _)| usize::from(width.0))
}

/// Shows what the operator should know about a command that was carried out.
pub fn warnings(outcome: &CommandOutcome) {
    for warning in &outcome.warnings {
        eprintln!("kagami: warning: {warning}");
    }
}
