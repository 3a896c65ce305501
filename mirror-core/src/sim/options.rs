//! Everything a seed decides.

use super::arbiter::ARBITER;
use super::disk::{Blank, Operation};
use super::fault_kind::FaultKind;
use super::text::Text;
use crate::limits::ACTIVITY_LOG_SLOTS;
use crate::meta::Layout;
use crate::node::MetadataPlace;
use crate::types::{ArbiterId, CopyRates};
use std::fmt;
use std::num::NonZeroU64;
use std::time::Duration;

/// How far a clock's rate may be off, in millionths: two that are so far off in opposite directions
/// differ by a little less than the eighth that leases allow for.
pub(super) const MOST_DRIFT: i32 = 55_000;

/// Extents that the longest piece of a request touches, and so what a log must have room for.
const LEAST_EXTENTS: usize = 9;

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

/// Whether the mirror has an arbiter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Arbitration {
    /// None: the operator decides after a loss.
    Unarbitrated,
    /// One that forgets nothing.
    Arbitrated,
    /// One that forgets everything in the middle of the story.
    Wiped,
}

/// What decides how long things take and how they end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Chance {
    /// The seed.
    Drawn,
    /// Nothing: every delay is the same, and a link breaks for both ends at once.
    Fixed,
}

/// Which operations of the disks take much longer than the others.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DiskBias {
    /// None: reads, and what has no bias of its own.
    Even,
    /// Writes of data.
    Writes,
    /// Flushes.
    Flushes,
    /// Writes of metadata.
    Metadata,
}

impl DiskBias {
    /// How many times longer.
    pub(super) fn factor(self) -> u64 {
        match self {
            DiskBias::Even => 1,
            DiskBias::Writes | DiskBias::Flushes | DiskBias::Metadata => 8,
        }
    }

    pub(super) fn of(operation: &Operation) -> DiskBias {
        match operation {
            Operation::Write { .. } => DiskBias::Writes,
            Operation::Flush => DiskBias::Flushes,
            Operation::MetaWrite { .. } => DiskBias::Metadata,
            Operation::Read { .. } | Operation::MetaRead { .. } => DiskBias::Even,
        }
    }
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

/// Declares the options with a list of them, so that each is printed, read and set by its name.
macro_rules! options {
    ($(#[$about:meta])* pub struct Options { $(pub $name:ident: $type:ty,)* }) => {
        $(#[$about])*
        pub struct Options {
            $(pub $name: $type,)*
        }

        impl Options {
            /// Every option with its value, as scripts write it.
            pub fn list(&self) -> Vec<(&'static str, String)> {
                vec![$((stringify!($name), self.$name.to_text())),*]
            }

            fn assign(&mut self, name: &str, value: &str) -> Result<(), String> {
                match name {
                    $(stringify!($name) => self.$name = Text::from_text(value)?,)*
                    _ => return Err("unknown option".to_owned()),
                }
                Ok(())
            }
        }
    };
}

options! {
/// What a seed derives.
#[derive(Clone, PartialEq, Eq, Debug)]
#[allow(missing_docs)] // The names are the documentation; they are printed with a report.
pub struct Options {
    pub seed: u64,
    pub luck: u64,
    pub chance: Chance,
    pub scenario: Scenario,
    pub beginning: Beginning,
    pub metadata: MetadataPlace,
    pub store_size: u64,
    pub log_extents: usize,
    pub stall_timeout: Duration,
    pub arbitration: Arbitration,
    pub lease: Duration,
    pub disk_latency: Duration,
    pub disk_spikes: bool,
    pub disk_bias: DiskBias,
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
    pub ambushes: bool,
    pub heals_without_primary: bool,
    pub sweep: bool,
    pub verifies: bool,
    pub copy_rate: u64,
    pub checksums: bool,
    pub rare_faults: Vec<FaultKind>,
    pub drift: [i32; 2],
}
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
        let store_size = store_size(&mut rng, wide);
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
        let stall_timeout = Duration::from_millis(pick(&mut rng, &[300, 1000, 2000]));
        let mut disk_latency = Duration::from_micros(pick(&mut rng, &[30, 200, 2000, 10_000]));
        let mut network_delay = Duration::from_micros(pick(&mut rng, &[50, 500, 3000, 20_000]));
        if wide {
            // A full sync of so much must end within the time that healing has.
            disk_latency = disk_latency.min(Duration::from_micros(200));
            network_delay = network_delay.min(Duration::from_micros(500));
        }
        let disk_bias = disk_bias(&mut rng);
        if disk_bias != DiskBias::Even {
            disk_latency = disk_latency.min(Duration::from_millis(2));
        }
        // A link or disk whose ordinary delays are beyond the timeout would never connect at all.
        let least = (network_delay * 100).max(disk_latency * 60 * disk_bias.factor() as u32);
        let (scenario, arbitration) = story(&mut rng);
        let lease = Duration::from_millis(pick(&mut rng, &[200, 1000, 3000]));
        Options {
            seed,
            luck: 0,
            chance: Chance::Drawn,
            scenario,
            arbitration,
            lease: lease.max(network_delay * 100),
            beginning,
            metadata: match rng.bool() {
                true => MetadataPlace::Internal,
                false => MetadataPlace::External,
            },
            store_size,
            log_extents: [LEAST_EXTENTS, LEAST_EXTENTS, 12, ACTIVITY_LOG_SLOTS][rng.usize(0..4)],
            stall_timeout: stall_timeout.max(least),
            disk_latency,
            disk_spikes: rng.bool(),
            disk_bias,
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
            ambushes: rng.u8(0..3) > 0,
            heals_without_primary: scenario == Scenario::SaneOperator
                && arbitration != Arbitration::Wiped
                && seed.is_multiple_of(4),
            sweep: store_size >= 64 << 20 && rng.bool(),
            verifies: seed % 8 == 5 && store_size < 1 << 30,
            // All of it in one to eight seconds.
            copy_rate: match seed % 8 {
                7 => store_size / (1 + seed / 8 % 8),
                _ => 0,
            },
            checksums: seed % 8 == 3,
            rare_faults: rare_faults(&mut rng, arbitration),
            drift: match rng.u8(0..6) {
                0 => [(); 2].map(|()| rng.i32(-MOST_DRIFT..MOST_DRIFT)),
                _ => [0; 2],
            },
        }
    }

    /// The random numbers of a run. Another `luck` gives the same story other delays.
    pub(super) fn rng(&self) -> fastrand::Rng {
        fastrand::Rng::with_seed(self.seed ^ self.luck.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// Whether there is an option of this name.
    pub(super) fn has(&self, name: &str) -> bool {
        let mut names = self.list().into_iter().map(|(known, _)| known);
        names.any(|known| known == name.replace('-', "_"))
    }

    /// Gives an option the value that a script has for it.
    pub(super) fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        if !self.has(name) {
            return Err(format!("unknown option `{name}`"));
        }
        self.assign(&name.replace('-', "_"), value)
            .and_then(|()| self.check())
            .map_err(|problem| format!("{name}: {problem}"))
    }

    /// What the parts of the world take for granted.
    fn check(&self) -> Result<(), String> {
        let least = Duration::from_micros(1);
        let spans = [
            self.lease,
            self.stall_timeout,
            self.disk_latency,
            self.network_delay,
            self.think,
            self.storm,
            self.fault_gap,
            self.operator_gap,
        ];
        let percents = [
            self.read_percent,
            self.zero_percent,
            self.fua_percent,
            self.flush_percent,
        ];
        if let Err(error) = Layout::new(self.store_size, self.metadata) {
            Err(error.to_string())
        } else if self.store_size > 1 << 40 {
            Err("at most 1 TiB can be simulated".to_owned())
        } else if spans.iter().any(|span| *span < least) {
            Err(format!("at least {least:?} is needed"))
        } else if percents.iter().any(|percent| *percent > 100) {
            Err("at most 100 percent".to_owned())
        } else if self.initiator > 1 || self.first_primary > 1 {
            Err("the nodes are 0 and 1".to_owned())
        } else if !(LEAST_EXTENTS..=ACTIVITY_LOG_SLOTS).contains(&self.log_extents) {
            Err(format!(
                "{LEAST_EXTENTS} to {ACTIVITY_LOG_SLOTS} are possible"
            ))
        } else if !(1..=100_000).contains(&self.hot_ranges) {
            Err("1 to 100000 are possible".to_owned())
        } else {
            Ok(())
        }
    }

    /// How fast a resync or a verify may go, if that is bounded, and is to go beside guests.
    pub(super) fn copy_rates(&self) -> CopyRates {
        CopyRates {
            max: NonZeroU64::new(self.copy_rate),
            min: NonZeroU64::new(self.copy_rate / 4),
        }
    }

    /// Whom the mirror's record is kept with.
    pub(super) fn arbiter(&self) -> ArbiterId {
        match self.arbitration {
            Arbitration::Unarbitrated => ArbiterId::NONE,
            Arbitration::Arbitrated | Arbitration::Wiped => ARBITER,
        }
    }

    /// Whether it is the arbiter who decides after a loss, and not the operator.
    pub(super) fn is_arbitrated(&self) -> bool {
        self.arbitration != Arbitration::Unarbitrated
    }

    /// Whether a peer that is not faulty is always heard, and always answers, in good time: the worst
    /// moments of disks and link are far below what is waited.
    pub(super) fn patience_suffices(&self) -> bool {
        let patience = self.stall_timeout.min(self.lease / 2);
        let disk = self.disk_latency * self.disk_bias.factor() as u32;
        !self.disk_spikes && patience > 200 * self.network_delay.max(disk)
    }

    /// The world of the enumerated cases (`exhaustive.rs`): nothing happens that a case does not
    /// name, and everything is fast.
    pub(super) fn fixed(store_size: u64, arbitration: Arbitration) -> Options {
        Options {
            seed: 0,
            luck: 0,
            chance: Chance::Fixed,
            scenario: Scenario::SaneOperator,
            arbitration,
            lease: Duration::from_millis(1),
            beginning: Beginning::AssumeClean,
            metadata: MetadataPlace::External,
            store_size,
            log_extents: ACTIVITY_LOG_SLOTS,
            stall_timeout: Duration::from_secs(2),
            disk_latency: Duration::from_micros(10),
            disk_spikes: false,
            disk_bias: DiskBias::Even,
            network_delay: Duration::from_micros(10),
            initiator: 0,
            first_primary: 0,
            requests: 0,
            depth: 0,
            think: Duration::ZERO,
            hot_ranges: 0,
            read_percent: 0,
            zero_percent: 0,
            fua_percent: 0,
            flush_percent: 0,
            storm: Duration::ZERO,
            fault_gap: Duration::ZERO,
            operator_gap: Duration::ZERO,
            ambushes: false,
            heals_without_primary: false,
            sweep: false,
            verifies: false,
            copy_rate: 0,
            checksums: false,
            pace: Pace::Steady,
            small_requests: false,
            rare_faults: Vec::new(),
            drift: [0; 2],
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

fn pick(rng: &mut fastrand::Rng, list: &[u64]) -> u64 {
    list[rng.usize(0..list.len())]
}

/// Bytes of each store. A wide one is wider than any activity log reaches, so that extents are evicted.
fn store_size(rng: &mut fastrand::Rng, wide: bool) -> u64 {
    match (wide, rng.u8(0..4)) {
        (true, _) => 6 << 30,
        (_, 0) => 64 << 20,
        (_, 1) => rng.u64(8..32) << 20,
        _ => (1 << 20) + (rng.u64(20..2000) << 12) + (rng.u64(0..8) << 9),
    }
}

fn disk_bias(rng: &mut fastrand::Rng) -> DiskBias {
    match rng.u8(0..8) {
        0 => DiskBias::Writes,
        1 => DiskBias::Flushes,
        2 => DiskBias::Metadata,
        _ => DiskBias::Even,
    }
}

fn story(rng: &mut fastrand::Rng) -> (Scenario, Arbitration) {
    match rng.u8(0..20) {
        0 | 1 => (Scenario::InsaneOperator, Arbitration::Unarbitrated),
        2..7 => (Scenario::SaneOperator, Arbitration::Unarbitrated),
        7 => (Scenario::SaneOperator, Arbitration::Wiped),
        _ => (Scenario::SaneOperator, Arbitration::Arbitrated),
    }
}

/// Most seeds have few kinds of rare faults, so that each of them comes often.
fn rare_faults(rng: &mut fastrand::Rng, arbitration: Arbitration) -> Vec<FaultKind> {
    let count = [0, 0, 1, 1, 2, 3, 6][rng.usize(0..7)];
    let known = |kind: &FaultKind| {
        arbitration == Arbitration::Unarbitrated || kind.is_known_to_the_arbiter()
    };
    let kinds = FaultKind::RARE.iter().copied().filter(known);
    rng.choose_multiple(kinds, count)
}

impl fmt::Display for Options {
    /// A line each, as the head of a script.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (name, value)) in self.list().into_iter().enumerate() {
            let end = if index == 0 { "" } else { "\n" };
            write!(f, "{end}{} {value}", name.replace('_', "-"))?;
        }
        Ok(())
    }
}
