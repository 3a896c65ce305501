//! How a case is played: the operations, until nothing more happens by itself, then the healing,
//! then everything read back.

use super::{Case, Crash, Loss, Operation, Pace, Start};
use crate::node::boundary::{Command, Input, PrimaryMode};
use crate::sim::client::Ask;
use crate::sim::cluster::{Cluster, Phase};
use crate::sim::disk::Kept;
use crate::sim::faults;
use crate::sim::host::NAMES;
use crate::sim::network::Break;
use crate::types::{Generation, Time};
use std::time::Duration;

/// An event further away than this is a timer: what goes on by itself takes microseconds.
const HORIZON: u64 = 5_000_000;

/// The border of the two extents, in sectors.
const BORDER: u64 = crate::limits::EXTENT / crate::limits::SECTOR;

/// A range in sectors: first, and how many.
type Sectors = (u64, u64);

/// Everything that a case writes is in here.
const AREA: Sectors = (BORDER - 80, 160);
/// What is there from the beginning. The second extent is not in the activity log.
const BASE: Sectors = (BORDER - 80, 80);
/// Acknowledged after that, and not flushed.
const UNFLUSHED: Sectors = (BORDER - 70, 20);
/// What makes a resync necessary: three runs of blocks, the second over the border of the extents.
const RUNS: [Sectors; 3] = [(BORDER - 60, 10), (BORDER - 12, 24), (BORDER + 40, 16)];
/// Within the first run and before it.
const WRITE: Sectors = (BORDER - 66, 12);
/// From the middle of the first run into the second.
const SPANNING: Sectors = (BORDER - 54, 60);
/// Within the second run.
const FUA: Sectors = (BORDER - 10, 8);
/// Over the first run and half of the second, at odd sectors.
const TRIM: Sectors = (BORDER - 59, 57);
/// Whole blocks of the second and third run.
const ZERO: Sectors = (BORDER + 8, 48);

/// What only an enumerated case has: where it crashes, and what is held back.
#[derive(Default)]
pub(in crate::sim) struct Enumerated {
    /// Actions carried out by each node since the first operation.
    actions: [u64; 2],
    counting: Counting,
    crash: Option<(Crash, u64)>,
    reads: Reads,
    /// Who was named a holder before the last event, and in which generation.
    named: ([bool; 2], Generation),
}

#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
enum Counting {
    #[default]
    Off,
    On,
}

/// When a node hears that a read of its resync ended.
#[derive(Default)]
enum Reads {
    #[default]
    Free,
    /// As far as it is let.
    Held {
        let_through: u32,
        waiting: Vec<(usize, u32, Input)>,
    },
}

fn write((start, count): Sectors) -> Ask {
    let fua = false;
    Ask::Write { start, count, fua }
}

fn zero((start, count): Sectors, unmap: bool) -> Ask {
    Ask::Zero {
        start,
        count,
        unmap,
        fua: false,
    }
}

impl Enumerated {
    pub fn actions(&self) -> [u64; 2] {
        self.actions
    }
}

impl Cluster {
    /// A node's action was carried out: the case's crash may be due.
    pub fn action_carried_out(&mut self, h: usize) {
        // Reading everything back at the end is the judge's work, not the case's.
        let judged = matches!(self.phase, Phase::Verify { .. } | Phase::Over);
        let enumerated = &mut self.enumerated;
        if enumerated.counting == Counting::Off || judged {
            return;
        }
        enumerated.actions[h] += 1;
        let done = enumerated.actions[h];
        let due = enumerated
            .crash
            .take_if(|(crash, _)| (crash.host, crash.action) == (h, done));
        match due.map(|(crash, seed)| (crash.loss, seed)) {
            Some((Loss::Power(kept), seed)) => {
                self.hosts[h].disk.decide_loss(kept, seed);
                self.crash(h, faults::Crash::Power, Duration::ZERO);
            }
            Some((Loss::Killed, seed)) => {
                self.hosts[h].disk.decide_loss(Kept::Everything, seed);
                self.crash(h, faults::Crash::Process, Duration::ZERO);
            }
            None => {}
        }
    }

    /// A read of a resync ended. The node may hear of it later.
    pub fn resync_read(&mut self, h: usize, life: u32, done: Input) {
        match &mut self.enumerated.reads {
            Reads::Held {
                let_through: 0,
                waiting,
            } => return waiting.push((h, life, done)),
            Reads::Held { let_through, .. } => *let_through -= 1,
            Reads::Free => {}
        }
        self.feed(h, done);
    }

    /// Runs a case.
    pub fn play(&mut self, case: &Case) {
        self.phase = Phase::Storm;
        self.begin(case.sequence.start);
        self.enumerated.counting = Counting::On;
        let seed = crc32fast::hash(case.to_string().as_bytes());
        self.enumerated.crash = case.crash.map(|crash| (crash, u64::from(seed)));
        for operation in &case.sequence.operations {
            self.carry_on(*operation);
            if case.sequence.pace == Pace::OneByOne {
                self.settle();
            }
        }
        self.settle();
        if let Some(serving) = self.serving_by_right() {
            let (start, count) = AREA;
            self.ask_of(serving, Ask::Read { start, count });
            self.settle();
        }
        self.recover();
        self.enumerated.counting = Counting::Off;
        if let Some((crash, _)) = self.enumerated.crash {
            self.fail(format!("the case ends before its crash: {crash:?}"));
        }
        while self.violation.is_none() && self.phase != Phase::Over {
            self.verify_step();
            self.settle();
        }
    }

    fn begin(&mut self, start: Start) {
        self.start_all();
        self.settle();
        self.command(0, Command::Primary(PrimaryMode::InitialAssumeClean));
        self.settle();
        self.ask_of(0, write(BASE));
        self.settle();
        self.ask_of(0, Ask::Flush);
        self.settle();
        self.ask_of(0, write(UNFLUSHED));
        self.settle();
        self.hold_reads();
        if start == Start::InSync {
            return;
        }
        self.disconnect();
        self.settle();
        for run in RUNS {
            self.ask_of(0, write(run));
        }
        self.settle();
        match start {
            Start::Held => {
                self.command(0, Command::PauseResync);
                self.reconnect();
            }
            _ => self.resync_step(),
        }
        self.settle();
    }

    /// One operation, as far as whoever is left can do it.
    fn carry_on(&mut self, operation: Operation) {
        let guest = self.serving_by_right();
        match (operation, guest) {
            (Operation::Write, Some(h)) => self.ask_of(h, write(WRITE)),
            (Operation::Spanning, Some(h)) => self.ask_of(h, write(SPANNING)),
            (Operation::Fua, Some(h)) => {
                let (start, count) = FUA;
                let fua = true;
                self.ask_of(h, Ask::Write { start, count, fua });
            }
            (Operation::Flush, Some(h)) => self.ask_of(h, Ask::Flush),
            (Operation::Trim, Some(h)) => self.ask_of(h, zero(TRIM, true)),
            (Operation::Zero, Some(h)) => self.ask_of(h, zero(ZERO, false)),
            (Operation::Demote, Some(h)) => self.command(h, Command::Secondary),
            (Operation::Disconnect, _) => self.disconnect(),
            (Operation::ResyncStep, _) => self.resync_step(),
            (Operation::Promote, serving) => self.promote(serving),
            // Nobody serves: there is nobody to ask.
            (_, None) => {}
        }
    }

    /// Who is asked: who serves; of two, the one by right, not a Primary that does not know yet that it
    /// was replaced.
    fn serving_by_right(&self) -> Option<usize> {
        let serving = (0..2).filter(|h| self.serving(*h));
        serving.max_by_key(|h| self.custody.named[*h])
    }

    fn disconnect(&mut self) {
        if self.network.sound() {
            // Repaired long after the case is over, unless the case does it before.
            let outage = u64::from(u32::MAX) << 10;
            self.network.cut(outage, Break::Clean, &mut self.later);
            self.flush_network();
        }
    }

    /// Starts the daemons that do not run.
    fn start_all(&mut self) {
        for host in [0, 1] {
            self.start(host);
        }
    }

    fn reconnect(&mut self) {
        self.network.heal(&mut self.later);
        self.flush_network();
    }

    fn resync_step(&mut self) {
        self.reconnect();
        self.start_all();
        self.settle();
        for host in [0, 1] {
            self.command(host, Command::ResumeResync);
        }
        self.let_reads_through(1);
        self.settle();
        self.let_reads_through(0);
    }

    fn promote(&mut self, serving: Option<usize>) {
        if self.operator.promoting() {
            return;
        }
        match serving {
            // The node must refuse: it knows that its peer is Primary.
            Some(s) if self.connected(1 - s) => {
                self.command(1 - s, Command::Primary(PrimaryMode::Ordinary));
            }
            // Here the arbiter decides.
            Some(s) if self.options.is_arbitrated() => {
                self.command(1 - s, Command::Primary(PrimaryMode::Ordinary));
            }
            // It might not refuse, and a sane operator does not try.
            Some(_) => {}
            None => {
                self.operator.heir = self.custody.keeper().map(|keeper| 1 - keeper);
                self.promote_somebody();
            }
        }
    }

    /// From now on a node hears of its resync's reads only when it is let.
    fn hold_reads(&mut self) {
        self.enumerated.reads = Reads::Held {
            let_through: 0,
            waiting: Vec::new(),
        };
    }

    /// Lets a node hear of so many of its resync's reads: those that wait, then those that come.
    fn let_reads_through(&mut self, count: u32) {
        let Reads::Held {
            let_through,
            waiting,
        } = &mut self.enumerated.reads
        else {
            return;
        };
        waiting.retain(|(h, life, _)| {
            let process = self.hosts[*h].process.as_ref();
            process.is_some_and(|process| process.life == *life)
        });
        let ready = waiting.len().min(count as usize);
        *let_through = count - ready as u32;
        for (host, _, done) in waiting.drain(..ready).collect::<Vec<_>>() {
            self.feed(host, done);
        }
    }

    /// Heals everything, until both are in sync.
    fn recover(&mut self) {
        self.let_reads_through(u32::MAX);
        self.enumerated.reads = Reads::Free;
        self.begin_healing();
        self.settle();
        while let (None, Phase::Heal { deadline }) = (&self.violation, self.phase) {
            self.start_all();
            self.heal(deadline);
            let before = self.now;
            self.settle();
            if matches!(self.phase, Phase::Heal { .. }) && self.now == before {
                // Only a timer can help.
                self.step();
            }
        }
    }

    /// R3: a generation that leaves a holder behind begins after a flush. (In the same one, a
    /// widening came to nothing.) Must be asked after every event: what is written alone later need
    /// not be flushed.
    fn check_left_behind(&mut self) {
        self.sample_custody();
        let now @ (named, _) = (self.custody.named, self.custody.generation);
        if now == self.enumerated.named {
            return;
        }
        let before = std::mem::replace(&mut self.enumerated.named, now);
        if before.0 == [true; 2] && named != before.0 && before.1 != now.1 {
            let holder = usize::from(named[1]);
            if let Err(problem) = self.check_present_on(holder) {
                self.fail(format!("{} is the only holder: {problem}", NAMES[holder]));
            }
        }
    }

    /// Lets happen what happens by itself.
    fn settle(&mut self) {
        while self.violation.is_none()
            && self
                .next_event()
                .is_some_and(|at| at < Time(self.now.0 + HORIZON))
        {
            self.step();
            self.check_left_behind();
            self.check_records();
            self.check_covered();
        }
        self.look();
        if self.quiet() {
            self.check_identical();
        }
    }
}
