//! The one clock of a mirror: it goes on while the machine sleeps, as leases must.

use mirror_core::types::Time;
use nix::time::{ClockId, clock_gettime};

/// Now, in nanoseconds since the boot.
pub fn now() -> Time {
    let spec = clock_gettime(ClockId::CLOCK_BOOTTIME)
        .or_else(|_| clock_gettime(ClockId::CLOCK_MONOTONIC))
        .expect("Linux has these clocks");
    Time(spec.tv_sec() as u64 * 1_000_000_000 + spec.tv_nsec() as u64)
}
