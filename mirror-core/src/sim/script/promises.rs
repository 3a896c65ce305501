//! What guests were promised, and whether those whom the register names can keep it.

use super::disk::{LEFTOVER, sectors};
use super::parse::{Ask, Host};
use super::words::runs;
use super::world::World;
use crate::sim::host::NAMES;
use crate::types::ByteRange;
use std::collections::BTreeMap;

/// The newest request that wrote each sector and was acknowledged. Requests that write the same
/// sector are acknowledged in the order of their numbers.
pub(super) type Written = BTreeMap<u64, u64>;

/// What was acknowledged, and how much of it a flush or FUA made durable.
#[derive(Default)]
pub(super) struct Promises {
    pub acknowledged: Written,
    durable: Written,
}

impl Promises {
    /// A request was acknowledged. Of a flush, `covers` is what had been when it was asked for.
    pub fn made(&mut self, number: u64, ask: Ask, covers: &Written) {
        match ask {
            Ask::Read(_) => {}
            Ask::Flush => self
                .durable
                .extend(covers.iter().map(|(at, by)| (*at, *by))),
            Ask::Write { range, fua } => {
                let written = || sectors(range).map(|sector| (sector, number));
                self.acknowledged.extend(written());
                if fua {
                    self.durable.extend(written());
                }
            }
            Ask::Zero { range, .. } => {
                // Zeroes have no number: nothing is remembered of them.
                for sector in sectors(range) {
                    self.acknowledged.remove(&sector);
                    self.durable.remove(&sector);
                }
            }
        }
    }
}

impl World {
    /// Whoever answers a guest is named by the register, and so is nobody without the data.
    pub fn check_right(&mut self, host: Host, number: u64) {
        let Some(named) = self.registered_hosts() else {
            return;
        };
        let Some(request) = self.requests.get(&number) else {
            return;
        };
        let (ask, outcome) = (request.ask, &request.outcome);
        if let (Ask::Read(range), Some(Ok(found))) = (ask, outcome) {
            let stale: Vec<u64> = sectors(range)
                .zip(found)
                .filter(|(sector, value)| self.promised(*sector) > **value)
                .map(|(sector, _)| sector)
                .collect();
            if !stale.is_empty() {
                let runs = runs(&stale);
                self.violate(format!(
                    "#{number} reads old data in {runs} from {}",
                    NAMES[host]
                ));
            }
        }
        if !named.contains(&host) {
            let name = NAMES[host];
            self.violate(format!(
                "{name} answers #{number}, and the register does not name it"
            ));
        }
        if let Ask::Write { range, .. } = ask {
            for holder in named {
                self.check_holder_has(holder, range, number);
            }
        }
    }

    fn check_holder_has(&mut self, holder: Host, range: ByteRange, number: u64) {
        let disk = &self.machines[holder].disk;
        if sectors(range).any(|sector| is_older(disk.sector(sector), number)) {
            let name = NAMES[holder];
            self.violate(format!(
                "#{number} is acknowledged, and the register's {name} lacks it"
            ));
        }
    }

    fn promised(&self, sector: u64) -> u64 {
        self.promises
            .acknowledged
            .get(&sector)
            .copied()
            .unwrap_or(0)
    }

    /// The register has a new value: who is named has all that was acknowledged, durably what
    /// was flushed; and who is named alone has all of it durably.
    pub fn check_register(&mut self) {
        self.check_flushed();
        for host in self.registered_hosts().unwrap_or_default() {
            let disk = &self.machines[host].disk;
            let written = self.promises.acknowledged.iter();
            let lacks = |(sector, by): &(&u64, &u64)| is_older(disk.sector(**sector), **by);
            let lacking: Vec<u64> = written.filter(lacks).map(|(sector, _)| *sector).collect();
            if !lacking.is_empty() {
                let (name, runs) = (NAMES[host], runs(&lacking));
                self.violate(format!("the register names {name}, which lacks {runs}"));
            }
        }
        if let Some([alone]) = self.registered_hosts().as_deref() {
            let written = self.promises.acknowledged.clone();
            self.check_durable_at(*alone, &written, "acknowledged");
        }
    }

    /// Who is named by the register has all that was flushed.
    pub fn check_flushed(&mut self) {
        let written = self.promises.durable.clone();
        for host in self.registered_hosts().unwrap_or_default() {
            self.check_durable_at(host, &written, "flushed");
        }
    }

    fn check_durable_at(&mut self, host: Host, written: &Written, what: &str) {
        let disk = &self.machines[host].disk;
        let lacking: Vec<u64> = written
            .iter()
            .filter(|(sector, by)| is_older(disk.durable(**sector), **by))
            .map(|(sector, _)| *sector)
            .collect();
        if !lacking.is_empty() {
            let (name, runs) = (NAMES[host], runs(&lacking));
            self.violate(format!(
                "the register names {name}, and what was {what} in {runs} is not durable there"
            ));
        }
    }

    /// A machine lost its power: what no holder has any more nobody is promised.
    pub fn forgive_what_all_holders_lost(&mut self) {
        let Some(named) = self.registered_hosts() else {
            return;
        };
        let machines = &self.machines;
        self.promises.acknowledged.retain(|sector, by| {
            named
                .iter()
                .any(|host| machines[*host].disk.sector(*sector) >= *by)
        });
    }
}

/// Whether a disk's value is not the request's, nor that of a later one. What a disk held before it came
/// here is older than all.
fn is_older(value: u64, number: u64) -> bool {
    value < number || value == LEFTOVER
}
