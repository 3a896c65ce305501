//! The world of a script: two machines, a cable, a guest, and a clock that moves when told to.
//!
//! Disks and link answer in order and at once, except where the script holds something back.

use super::arbiter::{ARBITER, Arbiter};
use super::disk::{Disk, LEFTOVER, survives};
use super::parse::{Arbitration, Ask, Beginning, Channel, Host, Kept, Part};
use super::promises::{Promises, Written};
use super::words::{Names, values};
use crate::error::ErrorId;
use crate::limits::{ACTIVITY_LOG_SLOTS, SECTOR};
use crate::meta::{self, Layout, NewReplica};
use crate::node::boundary::{
    self, CommandId, ConnectionId, GuestOperation, Input, OpId, RequestId,
};
use crate::node::{MetadataPlace, Node, NodeConfig};
use crate::sim::buffers::{Buffers, Checksum, Stamps};
use crate::sim::host::NAMES;
use crate::types::{ArbiterId, BootId, ByteRange, CopyRates, ReplicaId, Time};
use crate::wire::{FrameType, Header};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

const STALL: Duration = Duration::from_secs(2);
const LEASE: Duration = Duration::from_secs(1);
/// Time in which two new replicas meet, and after which a node may ask the arbiter for a right.
const START: Duration = Duration::from_secs(2);
/// How long two daemons that look for each other take to find each other.
const MEETING: Duration = Duration::from_millis(10);
/// Inputs in one `pass` after which the nodes are said to go round in circles.
const MOST_STEPS: usize = 200_000;
/// Lines in a row that differ in their ranges only.
const MOST_ALIKE: usize = 3;

/// The daemon on a machine.
pub(super) struct Process {
    pub node: Node,
    pub buffers: Buffers,
    /// Buffers that operations hold.
    pub operations: HashMap<OpId, Option<u32>>,
    pub connection: Option<u64>,
    pub looking: bool,
    pub serving: bool,
}

/// A disk operation on its way.
pub(super) struct DiskOp {
    pub op: OpId,
    pub what: DiskWork,
}

pub(super) enum DiskWork {
    Read {
        range: ByteRange,
        wanted: Checksum,
    },
    Digest {
        range: ByteRange,
    },
    Write {
        start: u64,
        stamps: Vec<u64>,
        fua: bool,
    },
    Flush {
        covers: u64,
    },
    MetaRead {
        offset: usize,
        len: usize,
    },
    MetaWrite {
        offset: usize,
        bytes: Vec<u8>,
    },
}

impl DiskWork {
    pub fn part(&self) -> Part {
        match self {
            DiskWork::Read { .. } | DiskWork::Digest { .. } => Part::Reads,
            DiskWork::Write { .. } => Part::Writes,
            DiskWork::Flush { .. } => Part::Flushes,
            DiskWork::MetaRead { .. } | DiskWork::MetaWrite { .. } => Part::Metadata,
        }
    }
}

/// A part of a disk that operations hang in.
struct HeldPart {
    part: Part,
    operations: VecDeque<DiskOp>,
    /// Whether those to come will hang as well.
    holding: bool,
}

/// A machine.
pub(super) struct Machine {
    pub process: Option<Process>,
    pub disk: Disk,
    boot: u128,
    pub lives: u128,
    /// What a script holds back of the disk's work.
    held: Vec<HeldPart>,
    pub failing: Vec<Part>,
    pub answer: Option<Result<(), ErrorId>>,
}

impl Machine {
    pub fn is_holding(&self) -> bool {
        !self.held.is_empty()
    }

    fn held_part(&mut self, part: Part) -> Option<&mut HeldPart> {
        self.held.iter_mut().find(|held| held.part == part)
    }
}

/// What is on its way over the cable.
pub(super) enum Parcel {
    Frame {
        to: u64,
        header: Header,
        body: WireBody,
        text: String,
    },
    /// The sender closed the connection.
    End { to: u64 },
}

impl Parcel {
    /// What a script's reader is told of it, if anything.
    fn worth_telling(&self) -> Option<&str> {
        match self {
            Parcel::Frame { text, header, .. } if is_worth_telling(header) => Some(text),
            _ => None,
        }
    }
}

pub(super) enum WireBody {
    None,
    Data(Stamps),
    Control(Vec<u8>),
}

/// One direction of the cable.
#[derive(Default)]
pub(super) struct Pipe {
    /// Held back from the first frame whose name begins so.
    pub hold_from: Option<String>,
    pub holding: bool,
    pub held: VecDeque<Parcel>,
}

/// Something that a node is about to be told.
pub(super) enum Coming {
    Input(Host, Input),
    Parcel(Host, Parcel),
}

/// A request of the guest.
pub(super) struct Request {
    pub host: Host,
    pub ask: Ask,
    /// What had been acknowledged when it was asked for.
    pub covers: Written,
    /// What came of it; of a read, the values.
    pub outcome: Option<Result<Vec<u64>, boundary::GuestError>>,
}

pub(super) struct World {
    pub now: Time,
    pub machines: [Machine; 2],
    pub pipes: [Pipe; 2],
    /// The numbers of the connection that stands, at either end.
    pub pair: Option<[u64; 2]>,
    cable: bool,
    connections: u64,
    meeting_at: Option<Time>,
    copy_rates: CopyRates,
    pub arbiter: Option<Arbiter>,
    /// The ids of the register's values, in the order of their first appearance.
    pub registered: Vec<u128>,
    pub promises: Promises,
    pub coming: VecDeque<Coming>,
    pub requests: BTreeMap<u64, Request>,
    /// What the numbers in frames stand for, by the host that gave them.
    pub labels: HashMap<(Host, u64), String>,
    pub names: Names,
    lines: Vec<String>,
    pub quiet: bool,
    block_began: Time,
    told_at: Time,
    pub violations: Vec<String>,
    /// What was changed on a disk at rest.
    pub rotten: Vec<ByteRange>,
}

impl World {
    /// Two new replicas whose daemons run and have met.
    pub fn create(beginning: Beginning) -> Result<World, String> {
        let Beginning {
            sizes,
            arbitration,
            copy_rates,
        } = beginning;
        let machines = [machine(0, sizes[0], 0)?, machine(1, sizes[1], 0)?];
        let mut world = World {
            now: Time(1),
            machines,
            pipes: Default::default(),
            pair: None,
            cable: true,
            connections: 0,
            meeting_at: None,
            copy_rates,
            arbiter: (arbitration == Arbitration::Arbiter).then(Arbiter::default),
            registered: Vec::new(),
            promises: Promises::default(),
            coming: VecDeque::new(),
            requests: BTreeMap::new(),
            labels: HashMap::new(),
            names: Names::default(),
            lines: Vec::new(),
            quiet: true,
            block_began: Time(1),
            told_at: Time(1),
            violations: Vec::new(),
            rotten: Vec::new(),
        };
        for host in [0, 1] {
            world.start(host)?;
        }
        world.pass(START)?;
        Ok(world)
    }

    /// Begins a block of the script.
    pub fn begin_block(&mut self, quiet: bool) {
        self.quiet = quiet;
        self.block_began = self.now;
        self.told_at = self.now;
    }

    /// What was told since the last time; of many lines alike the first and the last.
    pub fn take_lines(&mut self) -> Vec<String> {
        let lines = std::mem::take(&mut self.lines);
        let alike = |one: &String, next: &String| shape(one) == shape(next);
        let mut told = Vec::new();
        for run in lines.chunk_by(alike) {
            match run {
                [first, .., last] if run.len() > MOST_ALIKE => {
                    told.extend([first.clone(), "…".to_owned(), last.clone()]);
                }
                run => told.extend_from_slice(run),
            }
        }
        told
    }

    /// A line about what happens.
    pub fn tell(&mut self, text: String) {
        if !self.quiet {
            if self.told_at != self.now {
                self.told_at = self.now;
                let after = self.now.since(self.block_began);
                self.lines.push(format!("after {} ms:", after.as_millis()));
            }
            self.lines.push(text);
        }
    }

    /// A line that was asked for.
    pub fn answer(&mut self, text: String) {
        self.lines.push(text);
    }

    /// A rule is broken.
    pub fn violate(&mut self, problem: String) {
        if !self.violations.contains(&problem) {
            self.lines.push(format!("VIOLATION {problem}"));
            self.violations.push(problem);
        }
    }

    pub fn process(&mut self, host: Host) -> Result<&mut Process, String> {
        let process = self.machines[host].process.as_mut();
        process.ok_or_else(|| format!("no daemon runs on {}", NAMES[host]))
    }

    pub fn feed(&mut self, host: Host, input: Input) {
        let mut actions = Vec::new();
        let now = self.now;
        let Some(process) = &mut self.machines[host].process else {
            return;
        };
        process.node.handle(now, input, &mut actions);
        for action in actions {
            self.perform(host, action);
        }
    }

    /// Delivers all that is on its way.
    pub fn settle(&mut self) -> Result<(), String> {
        for _ in 0..MOST_STEPS {
            match self.coming.pop_front() {
                None => return Ok(()),
                Some(Coming::Input(host, input)) => self.feed(host, input),
                Some(Coming::Parcel(host, parcel)) => self.arrive(host, parcel),
            }
        }
        Err("the two nodes go round in circles".to_owned())
    }

    /// Lets time pass.
    pub fn pass(&mut self, span: Duration) -> Result<(), String> {
        let end = self.now.after(span);
        for _ in 0..MOST_STEPS {
            self.settle()?;
            self.plan_meeting();
            let deadlines = [0, 1].map(|host| self.deadline(host));
            let next = deadlines
                .into_iter()
                .chain([self.meeting_at])
                .flatten()
                .min();
            let Some(next) = next.filter(|next| *next <= end) else {
                self.now = end;
                return self.settle();
            };
            self.now = self.now.max(next);
            if self.meeting_at.is_some_and(|at| at <= self.now) {
                self.meet();
            }
            for host in [0, 1] {
                if self.deadline(host).is_some_and(|at| at <= self.now) {
                    self.feed(host, Input::Tick);
                }
            }
        }
        Err("the two nodes go round in circles".to_owned())
    }

    fn deadline(&self, host: Host) -> Option<Time> {
        self.machines[host].process.as_ref()?.node.next_deadline()
    }

    /// Daemons that look for each other find each other, if the cable is whole. One whose peer
    /// is gone without a word can be found as well.
    fn plan_meeting(&mut self) {
        let looks = |host: Host| {
            self.machines[host]
                .process
                .as_ref()
                .is_some_and(|p| p.looking)
        };
        let reachable = |host: Host| {
            let process = self.machines[host].process.as_ref();
            process.is_some_and(|p| p.looking || (p.connection.is_some() && self.pair.is_none()))
        };
        let can = self.cable && (looks(0) || looks(1)) && reachable(0) && reachable(1);
        self.meeting_at = can.then(|| self.meeting_at.unwrap_or(self.now.after(MEETING)));
    }

    fn meet(&mut self) {
        self.meeting_at = None;
        self.connections += 2;
        let pair = [self.connections - 1, self.connections];
        self.pair = Some(pair);
        self.tell("a and b are connected".to_owned());
        for host in [0, 1] {
            if let Some(process) = &mut self.machines[host].process {
                process.connection = Some(pair[host]);
                process.looking = false;
                let connection = ConnectionId(pair[host]);
                self.coming
                    .push_back(Coming::Input(host, Input::LinkUp { connection }));
            }
        }
    }

    /// Starts the daemon of a machine.
    pub fn start(&mut self, host: Host) -> Result<(), String> {
        let machine = &mut self.machines[host];
        if machine.process.is_some() {
            return Err(format!("a daemon runs on {} already", NAMES[host]));
        }
        machine.lives += 1;
        let config = NodeConfig {
            cluster: "c".into(),
            mirror: "r0".into(),
            node: NAMES[host].into(),
            peer: NAMES[1 - host].into(),
            metadata: MetadataPlace::External,
            stall_timeout: STALL,
            copy_rates: self.copy_rates,
            arbiter: match self.arbiter {
                Some(_) => ARBITER,
                None => ArbiterId::NONE,
            },
            lease: LEASE,
            log_extents: ACTIVITY_LOG_SLOTS,
        };
        let mut id = (host as u128 + 1) << 120 | machine.lives << 96;
        let new_id = move || {
            id += 1 << 64;
            id
        };
        machine.process = Some(Process {
            node: Node::new(config, Box::new(new_id)),
            buffers: Buffers::default(),
            operations: HashMap::new(),
            connection: None,
            looking: false,
            serving: false,
        });
        let (store_size, boot) = (machine.disk.size, BootId(machine.boot));
        self.feed(host, Input::Attach { store_size, boot });
        self.settle()
    }

    /// The daemon is gone; its kernel closes its connection, unless that is gone as well.
    pub fn end_process(&mut self, host: Host, kept: &Kept) -> Result<(), String> {
        self.process(host)?;
        let machine = &mut self.machines[host];
        machine.process = None;
        for held in &mut machine.held {
            for DiskOp { what, .. } in held.operations.drain(..) {
                if let DiskWork::Write { start, stamps, fua } = what
                    && stamps.iter().any(|stamp| survives(kept, *stamp))
                {
                    machine.disk.write(start, stamps, fua);
                }
            }
        }
        self.labels.retain(|(of, _), _| *of != host);
        Ok(())
    }

    pub fn kill(&mut self, host: Host, kept: &Kept) -> Result<(), String> {
        self.end_process(host, kept)?;
        if let Some(pair) = self.pair.take() {
            self.send_end(1 - host, pair[1 - host]);
        }
        self.settle()
    }

    pub fn power_off(&mut self, host: Host, kept: &Kept) -> Result<(), String> {
        if self.machines[host].process.is_some() {
            self.end_process(host, kept)?;
        }
        let machine = &mut self.machines[host];
        machine.disk.lose_power(kept);
        machine.boot += 1;
        self.forgive_what_all_holders_lost();
        // The peer hears nothing of it: it has to notice.
        self.pair = None;
        Ok(())
    }

    /// Another disk, fresh from `kagami create`.
    pub fn replace(&mut self, host: Host) -> Result<(), String> {
        if self.machines[host].process.is_some() {
            return Err("a disk is replaced while no daemon runs".to_owned());
        }
        let old = &self.machines[host];
        let (boot, lives) = (old.boot, old.lives);
        let fresh = machine(host, old.disk.size, lives)?;
        self.machines[host] = Machine {
            boot,
            lives,
            ..fresh
        };
        Ok(())
    }

    /// The connection breaks: what is under way is lost, and `only`, or both, learn of it.
    pub fn cut(&mut self, only: Option<Host>) -> Result<(), String> {
        self.cable = false;
        let pair = self.pair.take();
        for host in [0, 1] {
            if only.is_none_or(|only| only == host) {
                self.pipes[1 - host].held.clear();
                let connection = match (pair, &self.machines[host].process) {
                    (Some(pair), _) => Some(pair[host]),
                    (None, Some(process)) => process.connection,
                    (None, None) => None,
                };
                if let Some(to) = connection {
                    self.coming
                        .push_back(Coming::Parcel(host, Parcel::End { to }));
                }
            }
        }
        self.settle()
    }

    pub fn join(&mut self) {
        self.cable = true;
    }

    pub fn hold(&mut self, channel: &Channel) {
        match channel {
            Channel::Disk(host, part) => {
                let machine = &mut self.machines[*host];
                match machine.held_part(*part) {
                    Some(held) => held.holding = true,
                    None => machine.held.push(HeldPart {
                        part: *part,
                        operations: VecDeque::new(),
                        holding: true,
                    }),
                }
            }
            Channel::Link { from, first } => {
                let pipe = &mut self.pipes[*from];
                pipe.holding = first.is_none();
                pipe.hold_from.clone_from(first);
            }
        }
    }

    pub fn release(&mut self, channel: &Channel) -> Result<(), String> {
        match channel {
            Channel::Disk(host, part) => {
                let held = &mut self.machines[*host].held;
                let Some(at) = held.iter().position(|held| held.part == *part) else {
                    return Err("nothing is held there".to_owned());
                };
                let held = held.remove(at);
                for operation in held.operations {
                    self.complete(*host, operation);
                }
                self.settle()
            }
            Channel::Link { from, .. } => {
                let pipe = &mut self.pipes[*from];
                pipe.holding = false;
                pipe.hold_from = None;
                self.deliver(*from, None)
            }
        }
    }

    /// What a part of a disk holds goes on hanging there; what comes later passes it by.
    pub fn keep(&mut self, host: Host, part: Part) -> Result<(), String> {
        let held = self.machines[host].held_part(part);
        held.ok_or("nothing is held there")?.holding = false;
        Ok(())
    }

    /// Lets held frames through.
    pub fn deliver(&mut self, from: Host, count: Option<usize>) -> Result<(), String> {
        for parcel in self.take_held(from, count)? {
            if let Some(text) = parcel.worth_telling() {
                let text = format!("{} receives {text}", NAMES[1 - from]);
                self.tell(text);
            }
            self.coming.push_back(Coming::Parcel(1 - from, parcel));
            self.settle()?;
        }
        Ok(())
    }

    /// Loses held frames.
    pub fn lose(&mut self, from: Host, count: Option<usize>) -> Result<(), String> {
        for parcel in self.take_held(from, count)? {
            if let Some(text) = parcel.worth_telling() {
                let text = format!("lost: {} -> {}  {text}", NAMES[from], NAMES[1 - from]);
                self.tell(text);
            }
        }
        Ok(())
    }

    /// Takes the oldest frames that are held, or all of them.
    fn take_held(&mut self, from: Host, count: Option<usize>) -> Result<Vec<Parcel>, String> {
        let held = &mut self.pipes[from].held;
        let count = count.unwrap_or(held.len());
        if count > held.len() {
            return Err(format!("only {} frames are held", held.len()));
        }
        Ok(held.drain(..count).collect())
    }

    /// A disk operation is held back, or takes effect.
    pub fn submit(&mut self, host: Host, operation: DiskOp, text: Option<String>) {
        let part = operation.what.part();
        let holds = |held: &&mut HeldPart| held.holding;
        let held = self.machines[host].held_part(part).filter(holds).is_some();
        if let Some(text) = text {
            let note = if held { "  (held)" } else { "" };
            self.tell(format!("{} {text}{note}", NAMES[host]));
        }
        match self.machines[host].held_part(part).filter(holds) {
            Some(held) => held.operations.push_back(operation),
            None => self.complete(host, operation),
        }
    }

    /// An operator asks for something.
    pub fn command(&mut self, host: Host, what: boundary::Command) -> Result<(), String> {
        self.process(host)?;
        self.machines[host].answer = None;
        let command = CommandId(self.now.0);
        self.feed(host, Input::Command { command, what });
        self.settle()
    }

    /// A guest asks for something. Returns the request's number.
    pub fn ask(&mut self, host: Host, ask: Ask) -> Result<u64, String> {
        let number = self.requests.len() as u64 + 1;
        let process = self.process(host)?;
        let operation = match ask {
            Ask::Flush => GuestOperation::Flush,
            Ask::Read(range) => GuestOperation::Read(range),
            Ask::Zero {
                range,
                may_unmap,
                fua,
            } => GuestOperation::Zero {
                range,
                may_unmap,
                fua,
            },
            Ask::Write { range, fua } => {
                let stamps = vec![number; (range.len() / SECTOR) as usize];
                let payload = process.buffers.give(stamps.into(), Checksum::Wanted);
                GuestOperation::Write {
                    range,
                    payload,
                    fua,
                }
            }
        };
        let request = Request {
            host,
            ask,
            covers: self.promises.acknowledged.clone(),
            outcome: None,
        };
        self.requests.insert(number, request);
        let request = RequestId(number);
        self.feed(host, Input::Guest { request, operation });
        self.settle()?;
        Ok(number)
    }

    /// What the guest's read of a range finds, in words.
    pub fn read(&mut self, host: Host, range: ByteRange) -> Result<Vec<String>, String> {
        let quiet = std::mem::replace(&mut self.quiet, true);
        let number = self.ask(host, Ask::Read(range))?;
        self.quiet = quiet;
        // It has no number in the story.
        let request = self.requests.remove(&number);
        Ok(match request.and_then(|request| request.outcome) {
            Some(Ok(stamps)) => values(&stamps),
            Some(Err(error)) => vec![format!("{error:?}")],
            None => vec!["no answer".to_owned()],
        })
    }
}

/// Whether a frame says more than that its sender lives.
pub(super) fn is_worth_telling(header: &Header) -> bool {
    !matches!(
        header.kind,
        FrameType::Ping | FrameType::Pong | FrameType::State
    )
}

/// A line without its numbers.
fn shape(line: &str) -> Vec<&str> {
    let numbered = |word: &&str| word.contains("..");
    line.split(' ').filter(|word| !numbered(word)).collect()
}

/// A machine with a new replica, whose daemon does not run yet. `lives` tells a replacement from
/// the disk before it.
fn machine(host: Host, size: u64, lives: u128) -> Result<Machine, String> {
    let layout = Layout::new(size, MetadataPlace::External).map_err(|error| error.to_string())?;
    let mut metadata = vec![0; layout.external_size() as usize];
    let new = NewReplica {
        replica: ReplicaId(lives << 8 | (host as u128 + 1)),
        cluster: "c".into(),
        mirror: "r0".into(),
        node: NAMES[host].into(),
    };
    for (offset, bytes) in meta::create(&layout, &new) {
        metadata[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
    }
    let blank = if lives == 0 { 0 } else { LEFTOVER };
    Ok(Machine {
        process: None,
        disk: Disk::new(size, blank, metadata),
        boot: 50 * (host as u128 + 1),
        lives: 0,
        held: Vec::new(),
        failing: Vec::new(),
        answer: None,
    })
}
