//! Faults with an aim. A transition is a handful of disk and network operations among thousands;
//! faults at random instants hardly ever fall between two of them. A trap waits for the n-th
//! operation of a kind on a machine and strikes while it is on its way, or just after it ended.
//! What follows a fault is where the next one hurts, so every second trap is set at once behind
//! the last.

use super::cluster::{Cluster, Event, Phase};
use super::faults::{Crash, LONGEST_STUCK, draw_down, draw_millis, draw_outage};
use super::split_brain::SplitBrain;
use super::stimulus::Stimulus;
use super::takeover::ATTEMPTS;
use crate::wire::FrameType;

const MILLISECOND: u64 = 1_000_000;

/// What a trap waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Moment {
    /// A write of a superblock slot.
    Superblock,
    /// A write of the activity log.
    Log,
    /// A write of bitmap blocks.
    Bitmap,
    /// A flush of the disk.
    Flush,
    /// A frame of a handshake arrives.
    Handshake,
    /// A frame arrives that changes a role or ends a resync.
    Change,
    /// A piece of a resync arrives.
    Copy,
    /// A swap is asked of the arbiter.
    Swap,
}

impl Moment {
    /// What the arrival of a frame is.
    pub fn of_frame(kind: FrameType) -> Option<Moment> {
        use FrameType::*;
        match kind {
            Hello | Verdict | Ready | SyncStart | SyncBits | SyncReady => Some(Moment::Handshake),
            Promote | Promoted | SyncFinish | SyncFinished => Some(Moment::Change),
            SyncWrite | SyncZero => Some(Moment::Copy),
            _ => None,
        }
    }
}

/// What a trap does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Blow {
    /// To the machine that was watched.
    Here(Crash),
    /// To the other one.
    There(Crash),
    Both(Crash, Crash),
    Cut,
    /// The link goes, and soon after it a machine: the survivor has begun to go on alone.
    CutThen(Crash),
    /// The writes on their way to the disk take very long, and the link is cut meanwhile.
    CutOverSlowWrites,
    /// The machine that was watched hears nothing any more, not of the arbiter either, and the other
    /// one is asked to take over.
    Replace,
}

#[derive(Clone, Copy, Debug)]
struct Trap {
    host: usize,
    moment: Moment,
    /// Moments to let pass.
    countdown: u32,
    blow: Blow,
}

/// The trap that is set, if any, and the blow that is about to fall.
pub(super) struct Ambush {
    trap: Option<Trap>,
    falling: Option<(usize, Blow)>,
    rng: fastrand::Rng,
}

impl Ambush {
    pub fn new(rng: fastrand::Rng) -> Ambush {
        Ambush {
            trap: None,
            falling: None,
            rng,
        }
    }

    fn set(&mut self, near: Option<usize>, arbitrated: bool) {
        use Crash::{Power, Process};
        let rng = &mut self.rng;
        let (moment, most) = match rng.u8(0..if arbitrated { 20 } else { 16 }) {
            0..5 => (Moment::Superblock, 6),
            5..7 => (Moment::Log, 12),
            7..9 => (Moment::Bitmap, 4),
            9..11 => (Moment::Flush, 8),
            11..13 => (Moment::Change, 2),
            13..15 => (Moment::Handshake, 6),
            15 => (Moment::Copy, 12),
            _ => (Moment::Swap, 3),
        };
        let crash = if rng.bool() { Power } else { Process };
        let blow = match rng.u8(0..if arbitrated { 19 } else { 16 }) {
            0..5 => Blow::Here(crash),
            5..8 => Blow::There(crash),
            8 => Blow::Both(crash, Power),
            9 => Blow::Both(Process, crash),
            10..12 => Blow::Cut,
            12..15 => Blow::CutThen(crash),
            15 => Blow::CutOverSlowWrites,
            _ => Blow::Replace,
        };
        let host = match near {
            Some(host) if rng.u8(0..4) > 0 => host,
            _ => rng.usize(0..2),
        };
        // What follows a fault happens at once.
        let most = if near.is_some() { most.min(4) } else { most };
        self.trap = Some(Trap {
            host,
            moment,
            countdown: rng.u32(0..most),
            blow,
        });
    }
}

impl Cluster {
    /// Sets a trap, or lets the blow fall.
    pub fn ambush_step(&mut self) {
        if self.phase != Phase::Storm || self.operator.split != SplitBrain::Not {
            return;
        }
        let near = self.ambush.falling.take().map(|(host, blow)| {
            self.strike(host, blow);
            host
        });
        let at_once = near.is_none() || self.ambush.rng.bool();
        if at_once {
            let arbitrated = self.options.is_arbitrated();
            self.ambush.set(near, arbitrated);
        }
        // A trap that nothing falls into is set anew.
        self.next_ambush();
    }

    /// Plans the next trap.
    pub fn next_ambush(&mut self) {
        if self.options.ambushes {
            let gap = self.options.fault_gap.as_nanos() as u64;
            let delay = self.ambush.rng.u64(gap / 2..gap * 3);
            self.schedule(delay, Event::Ambush);
        }
    }

    /// Something happens that a trap may wait for, and takes `span` nanoseconds.
    pub fn ambush_sees(&mut self, host: usize, moment: Moment, span: u64) {
        let Some(trap) = &mut self.ambush.trap else {
            return;
        };
        if trap.host != host || trap.moment != moment || self.ambush.falling.is_some() {
            return;
        }
        if trap.countdown > 0 {
            trap.countdown -= 1;
            return;
        }
        let blow = trap.blow;
        self.ambush.trap = None;
        self.ambush.falling = Some((host, blow));
        let rng = &mut self.ambush.rng;
        let delay = match rng.u8(0..4) {
            0 => rng.u64(0..=span),
            1 => span + rng.u64(0..=span),
            2 => span + rng.u64(0..20) * MILLISECOND,
            _ => span + 1,
        };
        self.schedule(delay, Event::Ambush);
    }

    fn strike(&mut self, here: usize, blow: Blow) {
        let there = 1 - here;
        match blow {
            Blow::Here(kind) => self.ambush_crash(here, kind),
            Blow::There(kind) => self.ambush_crash(there, kind),
            Blow::Both(kind, other) => {
                self.ambush_crash(here, kind);
                self.ambush_crash(there, other);
            }
            Blow::Cut => self.ambush_cut(),
            Blow::Replace => self.ambush_replace(here),
            Blow::CutThen(kind) => {
                self.ambush_cut();
                let rng = &mut self.ambush.rng;
                let victim = if rng.bool() { here } else { there };
                let delay = rng.u64(0..=2 * self.options.stall_timeout.as_nanos() as u64);
                self.ambush.falling = Some((victim, Blow::Here(kind)));
                self.schedule(delay, Event::Ambush);
            }
            Blow::CutOverSlowWrites => {
                let span = draw_millis(&mut self.ambush.rng, 500..LONGEST_STUCK.as_millis() as u64);
                self.stimulate(Stimulus::StuckDisk { host: here, span });
                let soon = self.ambush.rng.u64(0..=20) * MILLISECOND;
                self.ambush.falling = Some((here, Blow::Cut));
                self.schedule(soon, Event::Ambush);
            }
        }
    }

    fn ambush_replace(&mut self, old: usize) {
        let rng = &mut self.ambush.rng;
        let (span, told) = (draw_millis(rng, 50..5000), rng.bool());
        self.stimulate(Stimulus::PartArbiter { host: old, span });
        match told {
            true => self.ambush_cut(),
            false => self.break_unaware(old),
        }
        self.ask_heir(1 - old, ATTEMPTS);
    }

    fn ambush_crash(&mut self, host: usize, kind: Crash) {
        let down = draw_down(&mut self.ambush.rng);
        self.stimulate(Stimulus::Crash { host, kind, down });
    }

    fn ambush_cut(&mut self) {
        let outage = draw_outage(&mut self.ambush.rng);
        self.stimulate(Stimulus::Cut { outage });
    }
}
