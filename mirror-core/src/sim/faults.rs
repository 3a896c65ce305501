//! What goes wrong: crashes, power losses, cuts, stalls and slow disks, at random.

use super::cluster::{Cluster, Event, Phase};
use super::options::{Arbitration, Chance};
use super::split_brain::SplitBrain;
use super::stimulus::Stimulus;
use crate::types::{BootId, Time};
use std::ops::Range;
use std::time::Duration;

const MILLISECOND: u64 = 1_000_000;

/// The longest an operation takes now and then on a disk with spikes.
pub(super) const DISK_SPIKE: Duration = Duration::from_millis(200);

/// How many times slower a slow disk is.
pub(super) const SLOW_DISK: u32 = 30;

/// How a machine's daemon ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Crash {
    /// kill -9.
    Process,
    /// The power fails.
    Power,
}

impl Cluster {
    /// Draws a fault.
    pub fn fault_step(&mut self) {
        // A split brain is a story without other faults.
        if self.phase != Phase::Storm || self.operator.split != SplitBrain::Not {
            return;
        }
        let h = self.whims.usize(0..2);
        if self.options.is_arbitrated() && self.whims.u8(0..4) == 0 {
            self.draw_arbiter_fault(h);
            if self.whims.bool() {
                return self.next_fault();
            }
            // On top of it comes another, close in time.
            let soon = self.whims.u64(0..500) * MILLISECOND;
            return self.schedule(soon, Event::Fault);
        }
        match self.whims.u8(0..16) {
            0..3 => self.draw_crash(h, Crash::Process),
            3..5 => self.draw_crash(h, Crash::Power),
            5 => {
                self.draw_crash(h, Crash::Power);
                self.draw_crash(1 - h, Crash::Power);
            }
            6 => {
                self.draw_crash(h, Crash::Process);
                let kind = [Crash::Process, Crash::Power][self.whims.usize(0..2)];
                self.draw_crash(1 - h, kind);
            }
            7..10 => self.draw_cut(),
            10..12 => self.draw_silence(&[h]),
            12 => self.draw_silence(&[0, 1]),
            13 => {
                let span = draw_millis(&mut self.whims, 50..3000);
                self.stimulate(Stimulus::SlowDisk { host: h, span });
            }
            _ => {
                // A fault on top of another, close in time.
                self.draw_cut();
                let soon = self.whims.u64(1..300) * MILLISECOND;
                self.schedule(soon, Event::Fault);
                return;
            }
        }
        self.next_fault();
    }

    fn draw_arbiter_fault(&mut self, host: usize) {
        let span = draw_millis(&mut self.whims, 50..4000);
        match self.whims.u8(0..6) {
            0 | 1 => self.stimulate(Stimulus::PartArbiter { host, span }),
            2 => {
                self.stimulate(Stimulus::PartArbiter { host: 0, span });
                self.stimulate(Stimulus::PartArbiter { host: 1, span });
            }
            3 | 4 => self.stimulate(Stimulus::LagArbiter { span }),
            _ if self.options.arbitration == Arbitration::Wiped => {
                self.stimulate(Stimulus::WipeArbiter);
            }
            _ => self.stimulate(Stimulus::RestartArbiter),
        }
    }

    /// Parts a host from the arbiter.
    pub fn part_arbiter(&mut self, h: usize, span: Duration) {
        self.stats.faults.arbiter += 1;
        self.tell(h, "cannot reach the arbiter");
        self.arbiter.part(self.now, h, span.as_nanos() as u64);
    }

    /// Slows the arbiter down.
    pub fn lag_arbiter(&mut self, span: Duration) {
        self.stats.faults.arbiter += 1;
        self.tell(0, "and b find the arbiter slow");
        self.arbiter.lag(self.now, span.as_nanos() as u64);
    }

    /// Lets the arbiter forget everything.
    pub fn wipe_arbiter(&mut self) {
        self.stats.faults.arbiter += 1;
        self.tell(0, "and b have an arbiter that forgot everything");
        self.arbiter.wipe();
    }

    /// Restarts the arbiter.
    pub fn restart_arbiter(&mut self) {
        self.stats.faults.arbiter += 1;
        self.tell(0, "and b have an arbiter that restarts");
        self.arbiter.restart(self.now);
    }

    pub fn next_fault(&mut self) {
        let gap = self.options.fault_gap.as_nanos() as u64;
        let delay = self.whims.u64(gap / 4..gap * 2);
        self.schedule(delay, Event::Fault);
    }

    fn draw_crash(&mut self, host: usize, kind: Crash) {
        let down = draw_down(&mut self.whims);
        self.stimulate(Stimulus::Crash { host, kind, down });
    }

    fn draw_cut(&mut self) {
        let outage = draw_outage(&mut self.whims);
        self.stimulate(Stimulus::Cut { outage });
    }

    fn draw_silence(&mut self, from: &[usize]) {
        let span = draw_millis(&mut self.whims, 10..6000);
        for host in from {
            self.stimulate(Stimulus::Silence { host: *host, span });
        }
    }

    /// Breaks the link.
    pub fn cut(&mut self, outage: Duration) {
        self.stats.faults.cuts += 1;
        self.tell(0, "link is cut");
        let outage = outage.as_nanos() as u64;
        self.network.cut(outage, &mut self.later);
        self.flush_network();
    }

    /// Holds what a host sends.
    pub fn silence(&mut self, h: usize, span: Duration) {
        self.stats.faults.stalls += 1;
        self.tell(h, "is not heard any more");
        let span = span.as_nanos() as u64;
        self.network.stall(h, span, &mut self.later);
        self.flush_network();
    }

    /// Slows the disk of a host down.
    pub fn slow_disk(&mut self, h: usize, span: Duration) {
        self.stats.faults.slow += 1;
        self.hosts[h].slow_until = self.now.after(span);
        self.tell(h, "disk is slow");
    }

    /// Holds what is written to the disk of a host.
    pub fn stick_disk(&mut self, h: usize, span: Duration) {
        self.stats.faults.stuck += 1;
        self.hosts[h].stuck_until = self.now.after(span);
        self.tell(h, "disk holds what is written");
    }

    /// Ends the daemon of a machine; it is started again after `down`.
    pub fn crash(&mut self, h: usize, kind: Crash, down: Duration) {
        if self.hosts[h].process.is_none() {
            return;
        }
        self.sample_custody();
        self.tell(
            h,
            match kind {
                Crash::Process => "is killed",
                Crash::Power => "loses power",
            },
        );
        self.client_lost(h);
        self.operator_lost(h);
        let silently = kind == Crash::Power;
        match kind {
            Crash::Process => {
                self.stats.faults.process_crashes += 1;
                self.hosts[h].disk.lose_process();
            }
            Crash::Power => {
                self.stats.faults.power_losses += 1;
                self.hosts[h].disk.lose_power();
                self.hosts[h].boot = BootId(self.hosts[h].rng.u128(1..));
                self.power_was_lost(h);
            }
        }
        self.hosts[h].process = None;
        self.network
            .host_died(self.now, h, silently, &mut self.later);
        self.flush_network();
        // What was on its way to the disk may have landed.
        self.read_slots(h);
        self.sample_custody();
        self.check_records();
        self.check_covered();
        self.start_after(h, down);
    }

    /// Plans the start of a daemon that is down.
    pub fn start_after(&mut self, h: usize, down: Duration) {
        // In an enumerated case a daemon starts when the case says so.
        if !self.hosts[h].starting && self.options.chance == Chance::Drawn {
            self.hosts[h].starting = true;
            let delay = down.as_nanos() as u64;
            self.schedule(delay, Event::Start { host: h });
        }
    }

    /// Lifts every fault.
    pub fn heal_faults(&mut self) {
        self.network.heal(&mut self.later);
        self.flush_network();
        self.arbiter.heal(self.now);
        for h in 0..2 {
            self.hosts[h].slow_until = Time(0);
            self.hosts[h].stuck_until = Time(0);
            if self.hosts[h].process.is_none() {
                self.tell(h, "is started for good");
                self.schedule(MILLISECOND, Event::Start { host: h });
            }
        }
    }

    /// What disks and links may add to a bounded stall.
    pub fn slack(&self) -> Duration {
        let slow = self.hosts.iter().any(|host| {
            let held = host.slow_until.max(host.held_until);
            self.now < Time(held.0 + 5_000 * MILLISECOND)
        });
        // Two of the disk's worst moments in one request's way, besides its ordinary latency.
        let spikes = if self.options.disk_spikes {
            DISK_SPIKE * 2
        } else {
            Duration::ZERO
        };
        let slowdown = if slow { SLOW_DISK } else { 1 };
        let bias = self.options.disk_bias.factor() as u32;
        let disk = (self.options.disk_latency * 100 * bias + spikes) * slowdown;
        Duration::from_secs(2) + disk + self.options.network_delay * 100
    }
}

/// How long a daemon stays down.
pub(super) fn draw_down(rng: &mut fastrand::Rng) -> Duration {
    match rng.u8(0..3) {
        0 => draw_millis(rng, 1..100),
        1 => draw_millis(rng, 100..2000),
        _ => draw_millis(rng, 1000..8000),
    }
}

/// How long no connection is made after a cut.
pub(super) fn draw_outage(rng: &mut fastrand::Rng) -> Duration {
    match rng.u8(0..3) {
        0 => Duration::ZERO,
        1 => draw_millis(rng, 0..500),
        _ => draw_millis(rng, 0..6000),
    }
}

pub(super) fn draw_millis(rng: &mut fastrand::Rng, range: Range<u64>) -> Duration {
    Duration::from_millis(rng.u64(range))
}
