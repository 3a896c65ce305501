//! What goes wrong: what a fault is drawn from, and the crashes and the faults of the link. Those of
//! disks are in `disk_faults.rs`, those of processes and clocks in `host_faults.rs`.
//!
//! [`Cluster::fault_step`] draws; what it calls only acts, on the arguments it was given.

use super::cluster::{Cluster, Event, Phase};
use super::disk::{Access, Honesty};
use super::disk_faults::{Rot, Trouble};
use super::fault_kind::FaultKind;
use super::host::{Fitness, Wake};
use super::network::{Break, Condition, Frame, WireBody};
use super::split_brain::SplitBrain;
use crate::limits::{MAX_CONTROL_PAYLOAD, SECTOR};
use crate::node::boundary::DiskError;
use crate::types::{BootId, Time};
use crate::wire::{FrameType, Header, PayloadKind};
use std::time::Duration;

const MILLISECOND: u64 = 1_000_000;

/// The longest an operation takes now and then on a disk with spikes.
pub(super) const DISK_SPIKE: Duration = Duration::from_millis(200);

/// How many times slower a slow disk is, and a very slow one.
const SLOW_DISK: u32 = 30;
const VERY_SLOW_DISK: u32 = 100;

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
        if !self.options.rare_faults.is_empty() && self.rng.u8(0..5) < 2 {
            let at = self.rng.usize(0..self.options.rare_faults.len());
            self.rare_fault(h, self.options.rare_faults[at]);
            return self.next_fault();
        }
        match self.rng.u8(0..16) {
            0..3 => self.crash(h, Crash::Process),
            3..5 => self.crash(h, Crash::Power),
            5 => {
                self.crash(h, Crash::Power);
                self.crash(1 - h, Crash::Power);
            }
            6 => {
                self.crash(h, Crash::Process);
                let kind = self.draw_crash();
                self.crash(1 - h, kind);
            }
            7..10 => {
                let outage = self.draw_outage();
                self.cut(outage, Break::Clean);
            }
            10..12 => {
                let span = self.span(10..6000);
                self.stall(&[h], span);
            }
            12 => {
                let span = self.span(10..6000);
                self.stall(&[0, 1], span);
            }
            13 => {
                let span = self.span(50..3000);
                self.slow_down(h, SLOW_DISK, span);
            }
            _ => {
                // A fault on top of another, close in time.
                let outage = self.draw_outage();
                self.cut(outage, Break::Clean);
                let soon = self.span(0..300);
                self.schedule(soon, Event::Fault);
                return;
            }
        }
        self.next_fault();
    }

    fn rare_fault(&mut self, h: usize, kind: FaultKind) {
        match kind {
            FaultKind::VerySlow => {
                let span = self.span(50..2000);
                self.slow_down(h, VERY_SLOW_DISK, span);
            }
            FaultKind::DiskError => {
                let access = self.draw_access();
                let (error, lasting) = (DiskError::Io, false);
                self.trouble(
                    h,
                    Trouble {
                        access,
                        error,
                        lasting,
                    },
                );
            }
            FaultKind::DiskFull => {
                let access = [Access::Write, Access::MetaWrite][self.rng.usize(0..2)];
                let (error, lasting) = (DiskError::NoSpace, true);
                self.trouble(
                    h,
                    Trouble {
                        access,
                        error,
                        lasting,
                    },
                );
            }
            FaultKind::Lie => self.lie(h),
            FaultKind::RottenSlot => {
                let rot = [Rot::OlderSlot, Rot::NewerSlot, Rot::BothSlots][self.rng.usize(0..3)];
                self.rot_after_crash(h, rot);
            }
            FaultKind::RottenBlock => {
                let number = self.rng.u64(..);
                let rot = match self.rng.u8(0..4) {
                    0 => Rot::WholeLog,
                    1 => Rot::OlderLog(number),
                    _ => Rot::Bitmap(number),
                };
                self.rot_after_crash(h, rot);
            }
            FaultKind::Misdirected => {
                let (from, to) = (self.rng.u64(..), self.rng.u64(..));
                self.rot_after_crash(h, Rot::Misdirected { from, to });
            }
            FaultKind::HalfOpen => {
                let outage = self.draw_outage();
                self.cut(outage, Break::HalfOpen { unaware: h });
            }
            FaultKind::MidFrame => {
                let outage = self.draw_outage();
                self.cut(outage, Break::MidFrame { to: h });
            }
            FaultKind::Flip => {
                let bit = self.rng.u32(0..1000);
                self.flip_next_frame(h, bit);
            }
            FaultKind::Garbage => {
                let frame = self.draw_garbage();
                self.inject_garbage(h, frame);
            }
            FaultKind::MidCall => {
                let (actions, kind) = (self.rng.u32(1..200), self.draw_crash());
                self.crash_after(h, actions, kind);
            }
            FaultKind::Pause => {
                let wake = [Wake::TimersFirst, Wake::InputsFirst][self.rng.usize(0..2)];
                let span = self.span(10..6000);
                self.pause(h, span, wake);
            }
            FaultKind::Replacement => self.replace(h),
            FaultKind::Clone => self.clone_image(h),
            FaultKind::ClockStep => {
                let span = self.span(1..20_000);
                self.step_clock(h, span);
            }
            FaultKind::ClockStop => {
                let span = self.span(10..5000);
                self.stop_clock(h, span);
            }
            FaultKind::Kill
            | FaultKind::PowerLoss
            | FaultKind::Cut
            | FaultKind::Stall
            | FaultKind::Slow => {}
        }
    }

    pub fn next_fault(&mut self) {
        let gap = self.options.fault_gap.as_nanos() as u64;
        let delay = self.rng.u64(gap / 4..gap * 2);
        self.schedule(delay, Event::Fault);
    }

    fn span(&mut self, milliseconds: std::ops::Range<u64>) -> u64 {
        self.rng.u64(milliseconds) * MILLISECOND
    }

    fn draw_crash(&mut self) -> Crash {
        [Crash::Process, Crash::Power][self.rng.usize(0..2)]
    }

    fn draw_outage(&mut self) -> u64 {
        match self.rng.u8(0..3) {
            0 => 0,
            1 => self.span(0..500),
            _ => self.span(0..6000),
        }
    }

    fn draw_access(&mut self) -> Access {
        use Access::*;
        [Read, Write, Flush, MetaRead, MetaWrite][self.rng.usize(0..5)]
    }

    /// A frame that is one by its form, and makes no sense.
    fn draw_garbage(&mut self) -> Frame {
        let rng = &mut self.rng;
        let kind = FrameType::ALL[rng.usize(0..FrameType::ALL.len())];
        let mut header = Header {
            offset: rng.u64(..),
            length: rng.u32(..),
            ..Header::bare(kind, rng.u64(..), rng.u64(..))
        };
        let body = match kind.payload_kind() {
            PayloadKind::None => WireBody::None,
            PayloadKind::Data { .. } => {
                let stamps: Vec<u64> = (0..rng.usize(1..64)).map(|_| rng.u64(..)).collect();
                header.length = (stamps.len() as u64 * SECTOR) as u32;
                header.payload_len = header.length;
                header.payload_crc = super::buffers::checksum(&stamps);
                WireBody::Data(stamps.into())
            }
            PayloadKind::Control { .. } => {
                let len = rng.usize(0..MAX_CONTROL_PAYLOAD as usize);
                let len = len >> rng.u32(0..16);
                let bytes: Vec<u8> = (0..len).map(|_| rng.u8(..)).collect();
                header.payload_len = len as u32;
                header.payload_crc = crc32fast::hash(&bytes);
                WireBody::Control(bytes)
            }
        };
        Frame {
            header: header.encode(),
            body,
            condition: Condition::Garbage,
        }
    }

    fn cut(&mut self, outage: u64, how: Break) {
        let (kind, words) = match how {
            Break::Clean => (FaultKind::Cut, "link is cut"),
            Break::HalfOpen { .. } => (FaultKind::HalfOpen, "link is cut, half-open"),
            Break::MidFrame { .. } => (FaultKind::MidFrame, "link is cut in mid-frame"),
        };
        self.stats.faults.count(kind);
        self.tell(0, words);
        self.network.cut(outage, how, &mut self.later);
        self.flush_network();
    }

    fn stall(&mut self, from: &[usize], span: u64) {
        self.stats.faults.count(FaultKind::Stall);
        for h in from {
            self.tell(*h, "is not heard any more");
            self.network.stall(*h, span, &mut self.later);
        }
        self.flush_network();
    }

    fn flip_next_frame(&mut self, to: usize, bit: u32) {
        self.stats.faults.count(FaultKind::Flip);
        self.network.damage(to, bit);
    }

    fn inject_garbage(&mut self, to: usize, frame: Frame) {
        if self.network.inject(self.now, to, frame, &mut self.later) {
            self.stats.faults.count(FaultKind::Garbage);
        }
        self.flush_network();
    }

    fn slow_down(&mut self, h: usize, factor: u32, span: u64) {
        self.stats.faults.count(match factor {
            VERY_SLOW_DISK => FaultKind::VerySlow,
            _ => FaultKind::Slow,
        });
        self.hosts[h].slow_until = Time(self.now.0 + span);
        self.hosts[h].slowness = factor;
        self.tell(h, "disk is slow");
    }

    /// Ends the daemon of a machine; it is started again later.
    pub fn crash(&mut self, h: usize, kind: Crash) {
        if self.hosts[h].process.is_none() {
            return;
        }
        self.sample_custody();
        // A liar loses power only where another copy is left to go by.
        let lies = self.hosts[h].disk.honesty() == Honesty::Lying;
        let kind = match kind {
            Crash::Power if lies && !self.may_be_replaced(h) => Crash::Process,
            kind => kind,
        };
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
                self.stats.faults.count(FaultKind::Kill);
                self.hosts[h].disk.lose_process();
            }
            Crash::Power => {
                self.stats.faults.count(FaultKind::PowerLoss);
                if lies && self.hosts[h].fitness == Fitness::Fit {
                    self.condemn(h);
                }
                self.hosts[h].disk.lose_power();
                self.hosts[h].boot = BootId(self.hosts[h].rng.u128(1..));
                self.power_was_lost(h);
            }
        }
        self.hosts[h].end_process();
        self.network
            .host_died(self.now, h, silently, &mut self.later);
        self.flush_network();
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
            self.heal_disk(h);
            self.heal_host(h);
            if self.hosts[h].process.is_none() {
                self.tell(h, "is started for good");
                self.schedule(MILLISECOND, Event::Start { host: h });
            }
        }
    }

    /// What disks and links may add to a bounded stall.
    pub fn slack(&self) -> Duration {
        let slow = self.hosts.iter().filter(|host| {
            let held = host.slow_until.max(host.held_until);
            self.now < Time(held.0 + 5_000 * MILLISECOND)
        });
        // Two of the disk's worst moments in one request's way, besides its ordinary latency.
        let spikes = if self.options.disk_spikes {
            DISK_SPIKE * 2
        } else {
            Duration::ZERO
        };
        let slowdown = slow.map(|host| host.slowness).max().unwrap_or(1);
        let disk = (self.options.disk_latency * 100 + spikes) * slowdown;
        Duration::from_secs(2) + disk + self.options.network_delay * 100
    }
}
