//! Who reads what is printed may have enough of it: `kagami … | head`.

use nix::sys::signal::{SigHandler, Signal, signal};

/// Lets a closed standard output end the program without a word, as it ends others. Rust programs
/// begin with the signal ignored, and printing then panics. Sockets are written to without it.
pub fn end_quietly() {
    // SAFETY: the default action replaces "ignore"; no handler runs in this process.
    let _ = unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) };
}
