//! What goes wrong: what a fault is drawn from, and the crashes and the faults of the link. Those of
//! disks are in `disk_faults.rs`, those of processes and clocks in `host_faults.rs`.
//!
//! [`Cluster::fault_step`] draws; what it calls acts on the arguments it was given. Only how long a
//! machine is down after a rare kind of crash is drawn when it happens, by the machine.

use super::cluster::{Cluster, Event, Phase};
use super::disk::{Access, Honesty};
use super::disk_faults::{Rot, Trouble};
use super::fault_kind::FaultKind;
use super::host::{Fitness, Wake};
use super::network::{Break, Condition, Frame, WireBody};
use super::options::{Arbitration, Chance};
use super::split_brain::SplitBrain;
use super::stimulus::Stimulus;
use crate::limits::{MAX_CONTROL_PAYLOAD, SECTOR};
use crate::node::boundary::DiskError;
use crate::types::{BootId, Time};
use crate::wire::{FrameType, Header, PayloadKind};
use std::ops::Range;
use std::time::Duration;

const MILLISECOND: u64 = 1_000_000;

/// The longest an operation takes now and then on a disk with spikes.
pub(super) const DISK_SPIKE: Duration = Duration::from_millis(200);

/// The longest that a disk holds what is written to it.
pub(super) const LONGEST_STUCK: Duration = Duration::from_secs(4);

/// How many times slower a slow disk is, and a very slow one.
pub(super) const SLOW_DISK: u32 = 30;
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
        if !self.options.rare_faults.is_empty() && self.whims.u8(0..5) < 2 {
            let at = self.whims.usize(0..self.options.rare_faults.len());
            let (kind, draw) = (self.options.rare_faults[at], self.whims.u64(..));
            self.stimulate(Stimulus::Rare {
                host: h,
                kind,
                draw,
            });
            return self.next_fault();
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
                let kind = draw_kind(&mut self.whims);
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
        match self.whims.u8(0..10) {
            6.. => self.draw_takeover(),
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
        self.stats.faults.count(FaultKind::Arbiter);
        self.tell(h, "cannot reach the arbiter");
        self.arbiter.part(self.now, h, span.as_nanos() as u64);
    }

    /// Slows the arbiter down.
    pub fn lag_arbiter(&mut self, span: Duration) {
        self.stats.faults.count(FaultKind::Arbiter);
        self.tell(0, "and b find the arbiter slow");
        self.arbiter.lag(self.now, span.as_nanos() as u64);
    }

    /// Lets the arbiter forget everything.
    pub fn wipe_arbiter(&mut self) {
        self.stats.faults.count(FaultKind::Arbiter);
        self.tell(0, "and b have an arbiter that forgot everything");
        self.arbiter.wipe();
    }

    /// Restarts the arbiter.
    pub fn restart_arbiter(&mut self) {
        self.stats.faults.count(FaultKind::Arbiter);
        self.tell(0, "and b have an arbiter that restarts");
        self.arbiter.restart(self.now);
    }

    /// A rare fault, its arguments drawn from `draw`.
    pub fn rare_fault(&mut self, h: usize, kind: FaultKind, draw: u64) {
        let rng = &mut fastrand::Rng::with_seed(draw);
        match kind {
            FaultKind::VerySlow => {
                let span = draw_span(rng, 50..2000);
                self.slow_disk(h, VERY_SLOW_DISK, Duration::from_nanos(span));
            }
            FaultKind::DiskError => {
                let access = draw_access(rng);
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
                let access = [Access::Write, Access::MetaWrite][rng.usize(0..2)];
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
                let rot = [Rot::OlderSlot, Rot::NewerSlot, Rot::BothSlots][rng.usize(0..3)];
                self.rot_after_crash(h, rot);
            }
            FaultKind::RottenBlock => {
                let number = rng.u64(..);
                let rot = match rng.u8(0..4) {
                    0 => Rot::WholeLog,
                    1 => Rot::OlderLog(number),
                    _ => Rot::Bitmap(number),
                };
                self.rot_after_crash(h, rot);
            }
            FaultKind::Misdirected => {
                let (from, to) = (rng.u64(..), rng.u64(..));
                self.rot_after_crash(h, Rot::Misdirected { from, to });
            }
            FaultKind::HalfOpen => {
                let outage = draw_outage(rng);
                self.cut(outage, Break::HalfOpen { unaware: h });
            }
            FaultKind::MidFrame => {
                let outage = draw_outage(rng);
                self.cut(outage, Break::MidFrame { to: h });
            }
            FaultKind::Held => {
                let (span, actions) = (draw_span(rng, 200..6000), rng.u32(1..100));
                self.hold_connection(h, span, actions);
            }
            FaultKind::Flip => {
                let bit = rng.u32(0..1000);
                self.flip_next_frame(h, bit);
            }
            FaultKind::Garbage => {
                let frame = draw_garbage(rng);
                self.inject_garbage(h, frame);
            }
            FaultKind::MidCall => {
                let (actions, kind) = (rng.u32(1..200), draw_kind(rng));
                self.crash_after(h, actions, kind);
            }
            FaultKind::Pause => {
                let wake = [Wake::TimersFirst, Wake::InputsFirst][rng.usize(0..2)];
                let span = draw_span(rng, 10..6000);
                self.pause(h, span, wake);
            }
            FaultKind::Replacement => self.replace(h),
            FaultKind::Clone => self.clone_image(h),
            FaultKind::ClockStep => {
                let span = draw_span(rng, 1..20_000);
                self.step_clock(h, span);
            }
            FaultKind::ClockStop => {
                let span = draw_span(rng, 10..5000);
                self.stop_clock(h, span);
            }
            FaultKind::Kill
            | FaultKind::PowerLoss
            | FaultKind::Cut
            | FaultKind::Stall
            | FaultKind::Slow
            | FaultKind::Stuck
            | FaultKind::Arbiter => {}
        }
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
    pub fn cut(&mut self, outage: Duration, how: Break) {
        let (kind, words) = match how {
            Break::Clean => (FaultKind::Cut, "link is cut"),
            Break::HalfOpen { .. } => (FaultKind::HalfOpen, "link is cut, half-open"),
            Break::MidFrame { .. } => (FaultKind::MidFrame, "link is cut in mid-frame"),
        };
        self.stats.faults.count(kind);
        self.tell(0, words);
        let outage = outage.as_nanos() as u64;
        self.network.cut(outage, how, &mut self.later);
        self.flush_network();
    }

    /// Holds what a host sends.
    pub fn silence(&mut self, h: usize, span: Duration) {
        self.stats.faults.count(FaultKind::Stall);
        self.tell(h, "is not heard any more");
        let span = span.as_nanos() as u64;
        self.network.stall(h, span, &mut self.later);
        self.flush_network();
    }

    /// Holds what a host sends over the connection that stands, and ends its daemon after so many
    /// actions: the next one connects anew.
    fn hold_connection(&mut self, h: usize, span: u64, actions: u32) {
        if self.network.hold(h, span, &mut self.later) {
            self.stats.faults.count(FaultKind::Held);
            self.tell(h, "has a connection whose bytes are held");
            self.crash_after(h, actions, Crash::Process);
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

    /// Slows the disk of a host down, so many times.
    pub fn slow_disk(&mut self, h: usize, factor: u32, span: Duration) {
        self.stats.faults.count(match factor {
            VERY_SLOW_DISK => FaultKind::VerySlow,
            _ => FaultKind::Slow,
        });
        self.hosts[h].slow_until = self.now.after(span);
        self.hosts[h].slowness = factor;
        self.tell(h, "disk is slow");
    }

    /// Holds what is written to the disk of a host.
    pub fn stick_disk(&mut self, h: usize, span: Duration) {
        self.stats.faults.count(FaultKind::Stuck);
        self.hosts[h].stuck_until = self.now.after(span);
        self.tell(h, "disk holds what is written");
    }

    /// Ends the daemon of a machine; it is started again after `down`.
    pub fn crash(&mut self, h: usize, kind: Crash, down: Duration) {
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
                self.check_new_generation(h);
            }
            Crash::Power => {
                self.stats.faults.count(FaultKind::PowerLoss);
                if lies && self.hosts[h].fitness == Fitness::Fit {
                    self.condemn(h);
                }
                self.hosts[h].disk.lose_power();
                // A record may have landed of which nobody was told.
                self.check_new_generation(h);
                self.hosts[h].boot = BootId(self.hosts[h].rng.u128(1..));
                self.hosts[h].powerless_at = self.now;
                self.power_was_lost(h);
            }
        }
        self.hosts[h].end_process();
        self.network
            .host_died(self.now, h, silently, &mut self.later);
        self.flush_network();
        self.sample_custody();
        self.check_records();
        self.check_covered();
        self.start_after(h, down);
    }

    /// Ends the daemon of a machine; it is started again some time later.
    pub fn crash_for_a_while(&mut self, h: usize, kind: Crash) {
        let down = draw_down(&mut self.hosts[h].rng);
        self.crash(h, kind, down);
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
            let stuck = self.hosts[h].stuck_until;
            self.hosts[h].stuck_until = stuck.min(self.now);
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
        let bias = self.options.disk_bias.factor() as u32;
        let disk = (self.options.disk_latency * 100 * bias + spikes) * slowdown;
        let recently =
            |until: Time| until > Time(0) && self.now < Time(until.0 + 5_000 * MILLISECOND);
        let stuck = match self.hosts.iter().any(|host| recently(host.stuck_until)) {
            true => LONGEST_STUCK,
            false => Duration::ZERO,
        };
        Duration::from_secs(2) + disk + stuck + self.options.network_delay * 100
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

/// A frame that is one by its form, and makes no sense.
fn draw_garbage(rng: &mut fastrand::Rng) -> Frame {
    let kind = match FrameType::ALL[rng.usize(0..FrameType::ALL.len())] {
        // Nearly any bytes are a goodbye that makes sense.
        FrameType::Goodbye => FrameType::Verdict,
        kind => kind,
    };
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

fn draw_span(rng: &mut fastrand::Rng, milliseconds: Range<u64>) -> u64 {
    rng.u64(milliseconds) * MILLISECOND
}

fn draw_kind(rng: &mut fastrand::Rng) -> Crash {
    [Crash::Process, Crash::Power][rng.usize(0..2)]
}

fn draw_access(rng: &mut fastrand::Rng) -> Access {
    use Access::*;
    [Read, Write, Flush, MetaRead, MetaWrite][rng.usize(0..5)]
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
