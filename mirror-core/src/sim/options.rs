//! Everything a seed decides.

use super::disk::Blank;
use super::fault_kind::FaultKind;
use crate::meta::Layout;
use crate::node::MetadataPlace;
use std::fmt;
use std::time::Duration;

/// Which story a seed tells.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scenario {
    /// The operator promotes a node without its peer only when that is safe.
    SaneOperator,
    /// The operator promotes a node by force while the peer serves: a split brain to be found.
    InsaneOperator,
}

/// How the mirror begins its life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Beginning {
    /// Both disks hold leftovers; `primary --initial` copies one to the other.
    FullSync,
    /// Both disks are blank; `primary --initial --assume-clean`.
    AssumeClean,
}

/// How the guest asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pace {
    /// Some requests, a short pause.
    Steady,
    /// One at a time with long pauses, so that nothing but its own answer moves a node on.
    Single,
    /// As many as it may at once, and a long pause.
    Bursts,
}

/// What a seed derives.
#[derive(Clone, Debug)]
#[allow(missing_docs)] // The names are the documentation; they are printed with a report.
pub struct Options {
    pub seed: u64,
    pub scenario: Scenario,
    pub beginning: Beginning,
    pub metadata: MetadataPlace,
    pub store_size: u64,
    pub stall_timeout: Duration,
    pub disk_latency: Duration,
    pub disk_spikes: bool,
    pub network_delay: Duration,
    pub initiator: usize,
    pub first_primary: usize,
    pub requests: u64,
    pub depth: usize,
    pub think: Duration,
    pub pace: Pace,
    pub small_requests: bool,
    pub hot_ranges: u64,
    pub read_percent: u32,
    pub zero_percent: u32,
    pub fua_percent: u32,
    pub flush_percent: u32,
    pub storm: Duration,
    pub fault_gap: Duration,
    pub operator_gap: Duration,
    pub rare_faults: Vec<FaultKind>,
    /// How much the two clocks gain, in millionths.
    pub drift: [i32; 2],
}

impl Options {
    pub(super) fn derive(seed: u64) -> Options {
        let mut rng = fastrand::Rng::with_seed(seed ^ 0x5eed);
        let wide = rng.u8(0..12) == 0;
        let beginning = if wide || rng.bool() {
            Beginning::AssumeClean
        } else {
            Beginning::FullSync
        };
        let store_size = match (wide, rng.u8(0..4)) {
            // Wider than the activity log reaches, so that extents are evicted.
            (true, _) => 6 << 30,
            (_, 0) => 64 << 20,
            (_, 1) => rng.u64(8..32) << 20,
            _ => (1 << 20) + (rng.u64(20..2000) << 12) + (rng.u64(0..8) << 9),
        };
        let storm = Duration::from_millis(rng.u64(4_000..40_000));
        let pace = match rng.u8(0..8) {
            0 | 1 => Pace::Single,
            2 => Pace::Bursts,
            _ => Pace::Steady,
        };
        let (storm, requests) = match pace {
            // 200 requests a minute, and time for as many as matter.
            Pace::Single => (storm * 3, storm.as_millis() as u64 / 100),
            _ => (storm, rng.u64(300..3000)),
        };
        let pick = |rng: &mut fastrand::Rng, list: &[u64]| list[rng.usize(0..list.len())];
        let stall_timeout = Duration::from_millis(pick(&mut rng, &[300, 1000, 2000]));
        let mut disk_latency = Duration::from_micros(pick(&mut rng, &[30, 200, 2000, 10_000]));
        let mut network_delay = Duration::from_micros(pick(&mut rng, &[50, 500, 3000, 20_000]));
        if wide {
            // A full sync of so much must end within the time that healing has.
            disk_latency = disk_latency.min(Duration::from_micros(200));
            network_delay = network_delay.min(Duration::from_micros(500));
        }
        // A link or disk whose ordinary delays are beyond the timeout would never connect at all.
        let least = (network_delay * 100).max(disk_latency * 60);
        Options {
            seed,
            scenario: match rng.u8(0..10) {
                0 => Scenario::InsaneOperator,
                _ => Scenario::SaneOperator,
            },
            beginning,
            metadata: match rng.bool() {
                true => MetadataPlace::Internal,
                false => MetadataPlace::External,
            },
            store_size,
            stall_timeout: stall_timeout.max(least),
            disk_latency,
            disk_spikes: rng.bool(),
            network_delay,
            initiator: rng.usize(0..2),
            first_primary: rng.usize(0..2),
            requests,
            depth: match pace {
                Pace::Single => 1,
                Pace::Bursts => 32,
                Pace::Steady => pick(&mut rng, &[1, 4, 16, 32]) as usize,
            },
            pace,
            small_requests: rng.u8(0..6) == 0,
            think: storm / requests as u32,
            hot_ranges: pick(&mut rng, &[1, 3, 10, 1000]),
            read_percent: rng.u32(10..60),
            zero_percent: pick(&mut rng, &[0, 3, 10]) as u32,
            fua_percent: pick(&mut rng, &[0, 5, 30]) as u32,
            flush_percent: pick(&mut rng, &[1, 5, 15]) as u32,
            storm,
            fault_gap: Duration::from_millis(pick(&mut rng, &[300, 1000, 3000, 8000]))
                .min(storm / 5),
            operator_gap: Duration::from_millis(pick(&mut rng, &[300, 1000, 5000])),
            rare_faults: rare_faults(&mut rng),
            drift: match rng.u8(0..6) {
                0 => [rng.i32(-20_000..20_000), rng.i32(-20_000..20_000)],
                _ => [0; 2],
            },
        }
    }

    /// What the disk of `host` holds before the mirror's life.
    pub(super) fn blank(&self, host: usize) -> Blank {
        match self.beginning {
            Beginning::AssumeClean => Blank::Zeroes,
            Beginning::FullSync => Blank::Garbage(host as u8),
        }
    }

    pub(super) fn layout(&self) -> Layout {
        Layout::new(self.store_size, self.metadata)
            .unwrap_or_else(|error| unreachable!("store sizes are within bounds: {error}"))
    }
}

/// Most seeds have few kinds of rare faults, so that each of them comes often.
fn rare_faults(rng: &mut fastrand::Rng) -> Vec<FaultKind> {
    let count = [0, 0, 1, 1, 2, 3, 6][rng.usize(0..7)];
    rng.choose_multiple(FaultKind::RARE.iter().copied(), count)
}

impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}
