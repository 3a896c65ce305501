//! One deadline per reason to be woken, in one table.

use crate::types::Time;

/// Why a node wants to be woken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Timer {
    /// Ping the peer, and look for silence and for requests it holds too long.
    Heartbeat,
    /// The handshake has taken too long.
    Handshake,
    /// Look for the peer again.
    Reconnect,
    /// A resync's confirmed blocks should become durable.
    Checkpoint,
    /// A waiting operator command gets its refusal instead.
    CommandPatience,
    /// An invalidation that has not found the peer again is given up.
    Invalidation,
    /// The arbiter has not answered.
    Arbiter,
    /// The next piece of a resync or a verify is due at the rate that is allowed.
    Pace,
    /// A lease has run half its time, or those are over that this node gave.
    Lease,
}

const TIMERS: [Timer; 9] = [
    Timer::Heartbeat,
    Timer::Handshake,
    Timer::Reconnect,
    Timer::Checkpoint,
    Timer::CommandPatience,
    Timer::Invalidation,
    Timer::Arbiter,
    Timer::Pace,
    Timer::Lease,
];

/// The deadlines.
#[derive(Debug, Default)]
pub(super) struct Timers {
    deadlines: [Option<Time>; TIMERS.len()],
}

impl Timers {
    /// Wakes the node at `at` for `timer`, in place of an earlier wish.
    pub(super) fn set(&mut self, timer: Timer, at: Time) {
        self.deadlines[timer as usize] = Some(at);
    }

    /// As [`Timers::set`], unless the timer runs already.
    pub(super) fn set_if_idle(&mut self, timer: Timer, at: Time) {
        self.deadlines[timer as usize].get_or_insert(at);
    }

    /// Forgets a wish.
    pub(super) fn cancel(&mut self, timer: Timer) {
        self.deadlines[timer as usize] = None;
    }

    /// The earliest deadline.
    pub(super) fn next(&self) -> Option<Time> {
        self.deadlines.iter().flatten().min().copied()
    }

    /// Takes one timer whose deadline has come.
    pub(super) fn take_due(&mut self, now: Time) -> Option<Timer> {
        TIMERS.into_iter().find(|timer| {
            let deadline = &mut self.deadlines[*timer as usize];
            deadline.take_if(|at| *at <= now).is_some()
        })
    }
}
