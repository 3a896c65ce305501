//! What goes wrong: crashes, power losses, cuts, stalls and slow disks, at random.

use super::cluster::{Cluster, Event, Phase};
use super::split_brain::SplitBrain;
use crate::types::{BootId, Time};
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
    pub fn fault_step(&mut self) {
        // A split brain is a story without other faults.
        if self.phase != Phase::Storm || self.operator.split != SplitBrain::Not {
            return;
        }
        let h = self.rng.usize(0..2);
        match self.rng.u8(0..16) {
            0..3 => self.crash(h, Crash::Process),
            3..5 => self.crash(h, Crash::Power),
            5 => {
                self.crash(h, Crash::Power);
                self.crash(1 - h, Crash::Power);
            }
            6 => {
                self.crash(h, Crash::Process);
                let kind = [Crash::Process, Crash::Power][self.rng.usize(0..2)];
                self.crash(1 - h, kind);
            }
            7..10 => self.cut(),
            10..12 => self.stall(&[h]),
            12 => self.stall(&[0, 1]),
            13 => {
                let span = self.rng.u64(50..3000) * MILLISECOND;
                self.hosts[h].slow_until = Time(self.now.0 + span);
                self.stats.faults.slow += 1;
                self.tell(h, "disk is slow");
            }
            _ => {
                // A fault on top of another, close in time.
                self.cut();
                let soon = self.rng.u64(0..300) * MILLISECOND;
                self.schedule(soon, Event::Fault);
                return;
            }
        }
        self.next_fault();
    }

    pub fn next_fault(&mut self) {
        let gap = self.options.fault_gap.as_nanos() as u64;
        let delay = self.rng.u64(gap / 4..gap * 2);
        self.schedule(delay, Event::Fault);
    }

    pub fn cut(&mut self) {
        let outage = match self.rng.u8(0..3) {
            0 => 0,
            1 => self.rng.u64(0..500) * MILLISECOND,
            _ => self.rng.u64(0..6000) * MILLISECOND,
        };
        self.stats.faults.cuts += 1;
        self.tell(0, "link is cut");
        self.network.cut(outage, &mut self.later);
        self.flush_network();
    }

    fn stall(&mut self, from: &[usize]) {
        let span = self.rng.u64(10..6000) * MILLISECOND;
        self.stats.faults.stalls += 1;
        for h in from {
            self.tell(*h, "is not heard any more");
            self.network.stall(*h, span, &mut self.later);
        }
        self.flush_network();
    }

    /// Ends the daemon of a machine; it is started again later.
    pub fn crash(&mut self, h: usize, kind: Crash) {
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
        self.start_later(h);
    }

    /// Plans the start of a daemon that is down.
    pub fn start_later(&mut self, h: usize) {
        if !self.hosts[h].starting {
            self.hosts[h].starting = true;
            let delay = match self.rng.u8(0..3) {
                0 => self.rng.u64(1..100),
                1 => self.rng.u64(100..2000),
                _ => self.rng.u64(1000..8000),
            };
            self.schedule(delay * MILLISECOND, Event::Start { host: h });
        }
    }

    /// Lifts every fault.
    pub fn heal_faults(&mut self) {
        self.network.heal(&mut self.later);
        self.flush_network();
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
