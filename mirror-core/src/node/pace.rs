//! How fast a resync or a verify goes over the device, where an operator has set bounds.
//!
//! Without bounds the window of pieces on their way adapts: it is wide while no guest asks for
//! anything and narrow while one does ([`Node::copy_window`]). `resync-max-rate` holds pieces back
//! that would come too early; `resync-min-rate` opens the window again while guests are at work and
//! less was done than promised. Each is kept as the time at which the next piece is due at that rate
//! (the generic cell rate algorithm of ITU-T I.371).

use super::Node;
use super::timer::Timer;
use crate::limits::{COPY_BURST, GUEST_ACTIVE, RESYNC_WINDOW_BUSY, RESYNC_WINDOW_IDLE};
use crate::types::{CopyRates, Time};
use std::num::NonZeroU64;
use std::time::Duration;

/// When the next piece is due.
#[derive(Debug, Default)]
pub(super) struct Pace {
    at_most: Time,
    at_least: Time,
}

impl Pace {
    /// When the next piece may begin, if that is not now.
    fn wait(&self, now: Time) -> Option<Time> {
        let from = Time(self.at_most.0.saturating_sub(COPY_BURST.as_nanos() as u64));
        (from > now).then_some(from)
    }

    fn begins(&mut self, now: Time, bytes: u64, rates: CopyRates) {
        if let Some(rate) = rates.max {
            self.at_most = self.at_most.max(now).after(span(bytes, rate));
        }
        if let Some(rate) = rates.min {
            // What was too fast for a long time does not excuse standing still now.
            let piece = span(bytes, rate);
            let latest = now.after(COPY_BURST.max(piece));
            self.at_least = self.at_least.max(now).after(piece).min(latest);
        }
    }
}

/// How long so many bytes take at a rate in bytes per second.
fn span(bytes: u64, rate: NonZeroU64) -> Duration {
    let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(rate.get());
    Duration::from_nanos(nanos.try_into().unwrap_or(u64::MAX))
}

impl Node {
    /// How many chunks of a resync, or pieces of a verify, may be on their way at once.
    pub(super) fn copy_window(&self) -> usize {
        let busy = self.now.since(self.guest_active) < GUEST_ACTIVE && self.requests.len() > 0;
        let late = self.config.copy_rates.min.is_some() && self.pace.at_least <= self.now;
        match busy && !late {
            true => RESYNC_WINDOW_BUSY,
            false => RESYNC_WINDOW_IDLE,
        }
    }

    /// Whether the next piece may begin now; if not, the node wakes when it may.
    pub(super) fn copy_may_go_on(&mut self) -> bool {
        match self.pace.wait(self.now) {
            Some(from) => {
                self.timers.set(Timer::Pace, from);
                false
            }
            None => true,
        }
    }

    /// A piece of so many bytes begins.
    pub(super) fn copy_begins(&mut self, bytes: u64) {
        self.pace.begins(self.now, bytes, self.config.copy_rates);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::RESYNC_CHUNK;

    const SECOND: u64 = 1_000_000_000;

    /// Bounds in bytes per second; 0 for none.
    fn rates(max: u64, min: u64) -> CopyRates {
        CopyRates {
            max: NonZeroU64::new(max),
            min: NonZeroU64::new(min),
        }
    }

    /// Bytes that begin within ten seconds when somebody asks every millisecond.
    fn in_ten_seconds(rate: u64) -> u64 {
        let mut pace = Pace::default();
        let mut done = 0;
        for millis in 5000..15_000 {
            let now = Time(millis * SECOND / 1000);
            while pace.wait(now).is_none() {
                pace.begins(now, RESYNC_CHUNK, rates(rate, 0));
                done += RESYNC_CHUNK;
            }
        }
        done
    }

    #[test]
    fn no_more_begins_than_is_allowed() {
        for rate in [64 << 10, 1 << 20, 100 << 20] {
            let (done, due) = (in_ten_seconds(rate), 10 * rate);
            // The first piece begins at once, and a burst may be ahead.
            let ahead = RESYNC_CHUNK + rate / 10;
            let bounds = due.saturating_sub(RESYNC_CHUNK)..=due + ahead;
            assert!(bounds.contains(&done), "{done} at {rate}");
        }
    }

    #[test]
    fn who_did_enough_is_not_late_until_it_stands_still() {
        let mut pace = Pace::default();
        let now = Time(SECOND);
        assert!(pace.at_least <= now, "late at first");
        for _ in 0..100 {
            pace.begins(now, RESYNC_CHUNK, rates(0, 1 << 20));
        }
        assert!(pace.at_least > now);
        assert!(
            pace.at_least <= now.after(Duration::from_millis(250)),
            "not for long"
        );
    }

    #[test]
    fn rates_beyond_reason_do_no_harm() {
        let mut pace = Pace::default();
        for rate in [1, u64::MAX] {
            pace.begins(Time(SECOND), RESYNC_CHUNK, rates(rate, rate));
        }
        assert!(pace.wait(Time(SECOND)).is_some());
    }
}
