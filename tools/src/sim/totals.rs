//! What many runs did together, as text and as JSON.

use mirror_core::sim::{Faults, Report, Runs, Stats};
use nix::time::{ClockId, clock_gettime};
use serde_json::{Map, Value, json};
use std::fmt;
use std::time::{Duration, Instant};

/// Sums over seeds. Only dense runs count for the hours, requests and faults: idle time is cheap.
pub struct Totals {
    from: u64,
    seeds: u64,
    compared: u64,
    dense: u64,
    requests: u64,
    acknowledged_writes: u64,
    faults: Faults,
    failovers: u64,
    virtual_time: Duration,
    /// When it began: on the clock on the wall, and of this process's processors.
    began: (Instant, Duration),
    wall: Duration,
    cpu: Duration,
    /// Runs that broke a rule.
    pub violations: Vec<Report>,
}

/// The processor time of this process, all threads together.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

impl Totals {
    /// Nothing yet; the clocks start.
    pub fn begin(from: u64) -> Totals {
        Totals {
            from,
            seeds: 0,
            compared: 0,
            dense: 0,
            requests: 0,
            acknowledged_writes: 0,
            faults: Faults::default(),
            failovers: 0,
            virtual_time: Duration::ZERO,
            began: (Instant::now(), cpu_time()),
            wall: Duration::ZERO,
            cpu: Duration::ZERO,
            violations: Vec::new(),
        }
    }

    /// Counts a run.
    pub fn add(&mut self, report: Report) {
        self.seeds += 1;
        self.compared += u64::from(report.runs == Runs::Compared);
        let stats = &report.stats;
        if stats.is_dense() {
            self.dense += 1;
            self.requests += stats.requests;
            self.acknowledged_writes += stats.acknowledged_writes;
            self.faults.add(&stats.faults);
            self.failovers += stats.failovers;
            self.virtual_time += stats.virtual_time;
        }
        if report.violation.is_some() {
            self.violations.push(report);
        }
    }

    /// The clocks stop.
    pub fn end(&mut self) {
        self.wall = self.began.0.elapsed();
        self.cpu = cpu_time().saturating_sub(self.began.1);
    }

    fn hours(&self) -> f64 {
        self.virtual_time.as_secs_f64() / 3600.0
    }

    fn per_minute(&self, count: u64) -> f64 {
        count as f64 / (self.virtual_time.as_secs_f64() / 60.0).max(f64::MIN_POSITIVE)
    }

    fn per_cpu_second(&self, amount: f64) -> f64 {
        amount / self.cpu.as_secs_f64().max(f64::MIN_POSITIVE)
    }

    /// One object; docs/simulation.md says what each member is.
    pub fn json(&self, again: Option<&str>) -> Value {
        json!({
            "from": self.from,
            "seeds": self.seeds,
            "run_twice": self.compared,
            "dense": self.dense,
            "cluster_hours": self.hours(),
            "requests": self.requests,
            "acknowledged_writes": self.acknowledged_writes,
            "requests_per_minute": self.per_minute(self.requests),
            "faults": faults_json(&self.faults),
            "faults_per_minute": self.per_minute(self.faults.total()),
            "failovers": self.failovers,
            "wall_seconds": self.wall.as_secs_f64(),
            "cpu_seconds": self.cpu.as_secs_f64(),
            "requests_per_cpu_second": self.per_cpu_second(self.requests as f64),
            "times_real_time": self.per_cpu_second(self.virtual_time.as_secs_f64()),
            "violations": self.violations.iter().map(report_json).collect::<Vec<_>>(),
            "replay": again,
        })
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for report in &self.violations {
            writeln!(f, "{report}\n")?;
        }
        write!(f, "faults:")?;
        for (kind, count) in self.faults.list() {
            write!(f, " {} {count}", kind.replace(' ', "-"))?;
        }
        writeln!(
            f,
            "\nload: {:.0} requests and {:.1} faults a virtual minute; {} writes acknowledged, {} \
             failovers; {} seeds run twice",
            self.per_minute(self.requests),
            self.per_minute(self.faults.total()),
            self.acknowledged_writes,
            self.failovers,
            self.compared
        )?;
        write!(
            f,
            "{} seeds from {}, {} dense: {:.1} cluster-hours, {} requests, {} faults; {:.0} s wall, \
             {:.0} s CPU; {:.0} requests per CPU second, {:.0} x real time on one core; {} violations",
            self.seeds,
            self.from,
            self.dense,
            self.hours(),
            self.requests,
            self.faults.total(),
            self.wall.as_secs_f64(),
            self.cpu.as_secs_f64(),
            self.per_cpu_second(self.requests as f64),
            self.per_cpu_second(self.virtual_time.as_secs_f64()),
            self.violations.len()
        )
    }
}

/// One run as an object.
pub fn report_json(report: &Report) -> Value {
    let options = report.options.list().into_iter();
    let options: Map<String, Value> = options
        .map(|(name, value)| {
            let value = value.parse::<u64>().map_or(Value::from(value), Value::from);
            (name.to_owned(), value)
        })
        .collect();
    json!({
        "seed": report.options.seed,
        "options": options,
        "stats": stats_json(&report.stats),
        "trace_hash": format!("{:016x}", report.trace_hash),
        "violation": report.violation.as_ref().map(|violation| &violation.problem),
    })
}

fn stats_json(stats: &Stats) -> Value {
    json!({
        "virtual_seconds": stats.virtual_time.as_secs_f64(),
        "dense": stats.is_dense(),
        "events": stats.events,
        "requests": stats.requests,
        "requests_per_minute": stats.requests_per_minute(),
        "reads": stats.reads,
        "acknowledged_writes": stats.acknowledged_writes,
        "flushes": stats.flushes,
        "errors": stats.errors,
        "commands": stats.commands,
        "refusals": stats.refusals,
        "promotions": stats.promotions,
        "failovers": stats.failovers,
        "resyncs": stats.resyncs,
        "longest_stall_seconds": stats.longest_stall.as_secs_f64(),
        "faults": faults_json(&stats.faults),
        "faults_per_minute": stats.faults_per_minute(),
    })
}

fn faults_json(faults: &Faults) -> Value {
    let list = faults.list().into_iter();
    let counts: Map<String, Value> = list
        .map(|(kind, count)| (kind.to_owned(), Value::from(count)))
        .collect();
    Value::Object(counts)
}
