//! A host's own clock: what it shows is a function of the world's, and never runs backwards.
//!
//! Fault model. A clock runs up to 5.5 percent fast or slow, jumps forward (a suspended machine
//! that counts sleep), and stands still for a while (a virtual machine whose clock source is
//! stuck) before it goes on from there.

use crate::types::Time;

const MILLION: u64 = 1_000_000;

/// A clock of a host.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    /// When the present course began, on the world's clock and on this one.
    world: Time,
    shown: Time,
    /// Nanoseconds shown per millisecond that passes; 0 while it stands still.
    rate: u64,
    /// The rate while it runs.
    natural_rate: u64,
}

impl Clock {
    /// A clock that shows the world's time at `start` and gains `drift` millionths from there.
    pub fn new(start: Time, drift: i32) -> Clock {
        let rate = MILLION.saturating_add_signed(i64::from(drift));
        Clock {
            world: start,
            shown: start,
            rate,
            natural_rate: rate,
        }
    }

    /// What it shows.
    pub fn at(&self, now: Time) -> Time {
        let passed = now.0.saturating_sub(self.world.0);
        Time(self.shown.0 + scale(passed, self.rate, MILLION))
    }

    /// When it will show `shown`; `None` while it stands still.
    pub fn when(&self, shown: Time) -> Option<Time> {
        let to_pass = shown.0.saturating_sub(self.shown.0);
        let passes = scale(to_pass, MILLION, self.rate.max(1));
        // Rounded up: at that time it must show no less.
        (self.rate > 0).then(|| Time(self.world.0 + passes + 2))
    }

    /// Jumps forward by `span` nanoseconds.
    pub fn step(&mut self, now: Time, span: u64) {
        self.change(now, self.rate);
        self.shown.0 += span;
    }

    /// Stands still until [`Clock::go`].
    pub fn stop(&mut self, now: Time) {
        self.change(now, 0);
    }

    /// Goes on.
    pub fn go(&mut self, now: Time) {
        self.change(now, self.natural_rate);
    }

    fn change(&mut self, now: Time, rate: u64) {
        self.shown = self.at(now);
        self.world = now;
        self.rate = rate;
    }
}

fn scale(value: u64, by: u64, of: u64) -> u64 {
    (u128::from(value) * u128::from(by) / u128::from(of)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clock_never_runs_backwards() {
        let mut rng = fastrand::Rng::with_seed(1);
        for _ in 0..200 {
            let mut clock = Clock::new(Time(5), rng.i32(-20_000..20_000));
            let (mut now, mut last) = (Time(5), Time(5));
            for _ in 0..50 {
                now.0 += rng.u64(0..10_000_000);
                match rng.u8(0..4) {
                    0 => clock.step(now, rng.u64(0..1_000_000_000)),
                    1 => clock.stop(now),
                    2 => clock.go(now),
                    _ => {}
                }
                assert!(clock.at(now) >= last);
                last = clock.at(now);
            }
        }
    }

    #[test]
    fn deadline_is_reached_when_it_says_so() {
        for drift in [-20_000, -7, 0, 3, 20_000] {
            let mut clock = Clock::new(Time(1_000), drift);
            clock.step(Time(2_000_000), 77);
            for shown in [3_000_000, 1_234_567_891, 9_000_000_000_000] {
                let when = clock.when(Time(shown)).unwrap();
                let at = clock.at(when);
                assert!(
                    at >= Time(shown) && at.0 < shown + 10,
                    "{drift} {shown} {at:?}"
                );
            }
            clock.stop(Time(3_000_000));
            assert_eq!(clock.when(Time(u64::MAX / 2)), None);
        }
    }

    #[test]
    fn drift_is_what_was_asked_for() {
        let clock = Clock::new(Time(0), 20_000);
        assert_eq!(clock.at(Time(1_000_000_000)), Time(1_020_000_000));
    }
}
