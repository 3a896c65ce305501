//! What goes wrong with processes and clocks: a crash between two actions, a pause, and clocks that
//! jump or stand still.

use super::cluster::{Cluster, Event};
use super::fault_kind::FaultKind;
use super::faults::Crash;
use super::host::Wake;
use crate::types::Time;

impl Cluster {
    /// Ends the daemon when it has carried out this many more actions: most often in the middle of
    /// a call, whose other actions are lost.
    pub fn crash_after(&mut self, h: usize, actions: u32, kind: Crash) {
        if self.hosts[h].process.is_some() {
            self.stats.faults.count(FaultKind::MidCall);
            self.hosts[h].crash_in = Some((actions, kind));
        }
    }

    /// An action was carried out; how the daemon ends if it was the last one.
    pub fn crash_is_due(&mut self, h: usize) -> Option<Crash> {
        let (left, kind) = self.hosts[h].crash_in?;
        self.hosts[h].crash_in = (left > 1).then_some((left - 1, kind));
        (left <= 1).then_some(kind)
    }

    /// The daemon stands still for `span` nanoseconds; its kernel does not. Not while it has a
    /// command to look at: carried out after the pause, it would be none of a sane operator.
    pub fn pause(&mut self, h: usize, span: u64, wake: Wake) {
        if self.hosts[h].process.is_none() || self.is_paused(h) || self.operator.busy(h) {
            return;
        }
        let host = &mut self.hosts[h];
        host.paused = Some(wake);
        host.excuse(Time(self.now.0 + span));
        let life = host.lives;
        self.stats.faults.count(FaultKind::Pause);
        self.tell(h, "stands still");
        self.schedule(span, Event::Wake { host: h, life });
    }

    pub fn is_paused(&self, h: usize) -> bool {
        self.hosts[h].paused.is_some()
    }

    /// The daemon goes on, with all that happened meanwhile.
    pub fn wake(&mut self, h: usize, life: u32) {
        if self.hosts[h].lives != life {
            return;
        }
        let Some(wake) = self.hosts[h].paused.take() else {
            return;
        };
        self.tell(h, "goes on");
        if wake == Wake::TimersFirst {
            self.tick_if_due(h);
        }
        for input in std::mem::take(&mut self.hosts[h].missed) {
            // It may end in the middle of them.
            if self.hosts[h].lives == life {
                self.feed(h, input);
            }
        }
        self.tick_if_due(h);
    }

    /// The clock jumps forward by `span` nanoseconds. What hangs on clocks is only the freshness of
    /// reads: a lease that was given counts as over too early (R4).
    pub fn step_clock(&mut self, h: usize, span: u64) {
        self.stats.faults.count(FaultKind::ClockStep);
        self.tell(h, "has its clock jump");
        self.hosts[h].clock.step(self.now, span);
        self.doubt_leases(0);
        self.replan_tick(h);
    }

    /// What a lease promises does not hold for `span` nanoseconds, nor for as long as one that was
    /// given or taken meanwhile may last.
    fn doubt_leases(&mut self, span: u64) {
        if self.options.is_arbitrated() {
            let until = Time(self.now.0 + span).after(self.options.lease * 2);
            self.client.leases_hold_from = self.client.leases_hold_from.max(until);
        }
    }

    /// The clock stands still for `span` nanoseconds.
    pub fn stop_clock(&mut self, h: usize, span: u64) {
        self.stats.faults.count(FaultKind::ClockStop);
        self.tell(h, "has its clock stop");
        self.hosts[h].clock.stop(self.now);
        self.doubt_leases(span);
        self.hosts[h].excuse(Time(self.now.0 + span));
        self.replan_tick(h);
        self.schedule(span, Event::ClockGoes { host: h });
    }

    pub fn clock_goes(&mut self, h: usize) {
        self.hosts[h].clock.go(self.now);
        self.replan_tick(h);
    }

    pub fn heal_host(&mut self, h: usize) {
        self.hosts[h].crash_in = None;
        self.clock_goes(h);
        self.wake(h, self.hosts[h].lives);
    }
}
