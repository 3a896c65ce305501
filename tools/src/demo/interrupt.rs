//! Ctrl-C ends the demo in order: the daemons are stopped and the files removed.

use super::failed;
use mirror_core::error::Refusal;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use std::sync::atomic::{AtomicBool, Ordering};

static REQUESTED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_signal: libc::c_int) {
    REQUESTED.store(true, Ordering::Relaxed);
}

/// Turns SIGINT, SIGTERM and SIGHUP into [`requested`].
pub fn install() {
    let action = SigAction::new(
        SigHandler::Handler(note),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler only stores to an atomic, which is async-signal-safe. Where it
        // cannot be installed, the default stays: the process ends, and its children with it.
        let _ = unsafe { sigaction(signal, &action) };
    }
}

/// Whether somebody wants an end.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::Relaxed)
}

/// An error once somebody wants an end.
pub fn check() -> Result<(), Refusal> {
    if requested() {
        Err(failed("interrupted"))
    } else {
        Ok(())
    }
}
