//! A recorded mirror after a power cut: which moments to cut at, what each leaves of a node's
//! stores, and whether what real daemons make of it is right.

use crate::cluster::{Cluster, ClusterOptions, MIB, MetadataPlace, Node};
use crate::nbd::{NbdClient, NbdCommand};
use crate::recorder::Recorder;
use crate::timeline::{Event, Lengths, Timeline, What, oracle, stamps_of};
use crate::write_log::{Durable, Logged, Survivors, WriteLog};
use mirror_core::meta::superblock::{Superblock, Trust};
use mirror_core::meta::{Layout, META_BLOCK, SLOTS};
use mirror_core::node;
use mirror_core::sim::checker::Checker;
use mirror_core::types::Holders;
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

/// The stores of a cluster's first mirror under recording.
#[derive(Debug)]
pub struct Recorders {
    stores: [Vec<Recorder>; 2],
    options: ClusterOptions,
}

impl Recorders {
    /// Records every store from now on: before anything was created on it.
    #[track_caller]
    pub fn start(cluster: &Cluster) -> Recorders {
        let options = cluster.options().clone();
        let layout = layout(&options);
        let stores = Node::BOTH.map(|node| {
            let mut stores = vec![Recorder::start(&cluster.disk(node))];
            if options.metadata == MetadataPlace::External {
                let path = cluster.metadata(node);
                fs::File::create(&path)
                    .and_then(|file| file.set_len(layout.external_size()))
                    .expect("a file can be made");
                stores.push(Recorder::start(&path));
            }
            stores
        });
        Recorders { stores, options }
    }

    /// A timeline by the clock of this recording.
    #[track_caller]
    pub fn timeline(&self) -> Timeline {
        let [a, b] = &self.stores;
        Timeline::new([a, b].map(|stores| stores.iter().map(Recorder::log).collect()))
    }

    /// Ends the recording. The daemons must have ended.
    #[track_caller]
    pub fn finish(self, timeline: &Timeline) -> Recording {
        let layout = layout(&self.options);
        let nodes = self.stores.map(|stores| {
            let logs: Vec<WriteLog> = stores.into_iter().map(Recorder::finish).collect();
            let records = records(logs.last().expect("a store"), &layout);
            Recorded { logs, records }
        });
        Recording {
            nodes,
            events: timeline.finish(),
            layout,
            options: self.options,
        }
    }
}

/// Everything that happened to a mirror.
#[derive(Debug)]
pub struct Recording {
    nodes: [Recorded; 2],
    events: Vec<Event>,
    layout: Layout,
    options: ClusterOptions,
}

#[derive(Debug)]
struct Recorded {
    /// Of the data and, where it is external, of the metadata.
    logs: Vec<WriteLog>,
    /// Each superblock written: the log's length with it, and its generation's counter.
    records: Vec<(u64, u64)>,
}

/// A power cut of one node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Cut {
    /// How long the node's logs were.
    pub at: [u64; 2],
    /// What of the writes since the last flush is left.
    pub left: Left,
}

/// What a cut leaves of the writes that no flush covers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Left {
    /// Nothing: the cut comes right behind a flush.
    Flushed,
    /// A random subset, drawn from this seed.
    Torn(u64),
}

/// Whose power was cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Victims {
    /// That of both nodes.
    Both,
    /// That of one; the other's daemon was only killed.
    One(Node),
}

/// A power cut and the return of both nodes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PairCut {
    /// After this many events.
    pub events: usize,
    /// Whose power.
    pub victims: Victims,
    /// For what the cut leaves.
    pub seed: u64,
}

/// What one image, or one pair, turned out to be.
pub type Verdict = Result<&'static str, String>;

impl Recording {
    /// Events of the timeline.
    pub fn events(&self) -> usize {
        self.events.len()
    }

    /// Writes acknowledged to the guest.
    pub fn acknowledged(&self) -> usize {
        let writes = self.events.iter();
        writes
            .filter(|event| matches!(event.what, What::Acknowledged(_)))
            .count()
    }

    /// Moments right behind each flush of a node, and the last ones before each, in order.
    pub fn moments(&self, node: Node) -> [Vec<[u64; 2]>; 2] {
        let recorded = &self.nodes[node as usize];
        let Some(first) = self.events.first().map(|event| event.at[node as usize]) else {
            return [Vec::new(), Vec::new()];
        };
        if let [log] = &recorded.logs[..] {
            let stretches = log.stretches();
            let later = stretches.iter().filter(|one| one.before > first[0]);
            return [
                later.clone().map(|one| [one.flushed, 0]).collect(),
                later.map(|one| [one.before, 0]).collect(),
            ];
        }
        // Two stores have no common order but that of the clock: moments are those it was read at.
        let mut by_flushes: BTreeMap<[usize; 2], [[u64; 2]; 2]> = BTreeMap::new();
        for event in &self.events {
            let at = event.at[node as usize];
            let flushes = [0, 1].map(|store| recorded.logs[store].flushes_within(at[store]));
            by_flushes
                .entry(flushes)
                .and_modify(|moments| moments[1] = at)
                .or_insert([at; 2]);
        }
        [0, 1].map(|which| by_flushes.values().map(|moments| moments[which]).collect())
    }

    /// Begins to check images of one node, with a cluster of its own.
    #[track_caller]
    pub fn images(&self, node: Node, beside: &Cluster) -> Images<'_> {
        // A promotion without force waits so long for the peer that is not there.
        let mut cluster = beside.another(ClusterOptions {
            stall_timeout: Duration::from_millis(100),
            proxied: false,
            ..self.options.clone()
        });
        // Power comes back with a boot of its own.
        cluster.reboot(node);
        Images {
            recording: self,
            durable: self.blank(),
            node,
            cluster,
        }
    }

    /// Begins to check pairs, with a cluster of their own.
    #[track_caller]
    pub fn pairs<'a>(&'a self, beside: &'a Cluster) -> Pairs<'a> {
        Pairs {
            recording: self,
            durable: [self.blank(), self.blank()],
            cluster: beside.another(self.pair_options()),
            beside,
        }
    }

    fn pair_options(&self) -> ClusterOptions {
        ClusterOptions {
            proxied: false,
            ..self.options.clone()
        }
    }

    fn blank(&self) -> Vec<Durable> {
        let mut stores = vec![Durable::blank(self.options.disk_size as usize)];
        if self.options.metadata == MetadataPlace::External {
            stores.push(Durable::blank(self.layout.external_size() as usize));
        }
        stores
    }

    /// The generation in which an event came about, by its counter: the newest that its node had
    /// written of then. It may be later than the true one, never earlier, because a node writes
    /// of a generation before it acknowledges anything in it.
    fn generation(&self, event: &Event) -> u64 {
        let node = event.by as usize;
        let store = self.nodes[node].logs.len() - 1;
        let records = &self.nodes[node].records;
        let known = records.partition_point(|(length, _)| *length <= event.at[node][store]);
        known.checked_sub(1).map_or(0, |last| records[last].1)
    }

    fn write_stores(&self, node: Node, cluster: &Cluster, images: &[Vec<u8>]) {
        fs::write(cluster.disk(node), &images[0]).expect("a store can be written");
        if let Some(metadata) = images.get(1) {
            fs::write(cluster.metadata(node), metadata).expect("a store can be written");
        }
    }

    /// The superblock in force in an image.
    fn record(&self, images: &[Vec<u8>]) -> Result<Superblock, String> {
        let metadata = images.last().expect("a store");
        let slot = |slot: u64| {
            let at = self.layout.slot_offset(slot) as usize;
            Superblock::parse(&metadata[at..at + META_BLOCK as usize])
        };
        Superblock::trust([slot(0), slot(1)], &self.layout).map_err(|error| error.to_string())
    }

    fn sectors(&self) -> u64 {
        self.layout.data_size / 512
    }

    /// What happened to the sector that a problem names, as far as a cut knows of it.
    fn story(&self, node: Node, cut: [u64; 2], problem: &str) -> String {
        let sector = problem.split("in sector ").nth(1).and_then(|rest| {
            let digits = rest.split(|c: char| !c.is_ascii_digit()).next()?;
            digits.parse::<u64>().ok()
        });
        let Some(sector) = sector else {
            return String::new();
        };
        let mut lines = Vec::new();
        let mut touched = false;
        for event in &self.events {
            let at = event.at[node as usize];
            if !within(at, cut) {
                break;
            }
            let shown = match event.what {
                What::Asked(write) | What::Acknowledged(write) | What::Lost(write) => {
                    (write.start..write.start + write.count).contains(&sector)
                }
                What::FlushAsked(_) | What::FlushAcknowledged(_) => touched,
                What::Tick => false,
            };
            touched |= shown;
            if shown {
                let generation = self.generation(event);
                lines.push(format!(
                    "  {at:?} {:?} by {} in generation {generation}",
                    event.what,
                    event.by.name()
                ));
            }
        }
        let log = &self.nodes[node as usize].logs[0];
        for (number, entry) in log.entries().iter().enumerate() {
            if let Logged::Write { offset, data, .. } = &entry.what
                && (*offset..offset + (data.end - data.start)).contains(&(sector * 512))
                && entry.end <= cut[0]
            {
                let flushes = log.flushes_within(entry.end);
                lines.push(format!(
                    "  entry {number} until {} after {flushes} flushes",
                    entry.end
                ));
            }
        }
        let first = lines.len().saturating_sub(40);
        lines.split_off(first).join("\n")
    }

    /// Leaves the stores of a node that is to blame where they can be looked at.
    fn keep(&self, what: &str, images: &[Vec<u8>]) {
        let directory: PathBuf = crate::target_directory().join("power-cut");
        for (image, kind) in images.iter().zip(["img", "meta"]) {
            // Only a help; the violation is reported in any case.
            let _ = fs::create_dir_all(&directory)
                .and_then(|()| fs::write(directory.join(format!("{what}.{kind}")), image));
        }
    }
}

/// The check of single images of a node.
#[derive(Debug)]
pub struct Images<'a> {
    recording: &'a Recording,
    durable: Vec<Durable>,
    node: Node,
    cluster: Cluster,
}

impl Images<'_> {
    /// Rebuilds the node after a cut, starts its daemon, and judges. Cuts must come in order.
    pub fn check(&mut self, cut: Cut) -> Verdict {
        let images = cut_stores(
            &self.recording.nodes[self.node as usize].logs,
            &mut self.durable,
            cut.at,
            cut.left,
        );
        let verdict = catch(|| self.judge(cut, &images));
        if self.cluster.runs(self.node) {
            self.cluster.kill(self.node);
        }
        verdict.map_err(|problem| {
            let name = format!("{}-{}-{}", self.node.name(), cut.at[0], cut.at[1]);
            self.recording.keep(&name, &images);
            let story = self.recording.story(self.node, cut.at, &problem);
            format!("{}: {cut:?}: {problem}\n{story}", self.node.name())
        })
    }

    fn judge(&mut self, cut: Cut, images: &[Vec<u8>]) -> Verdict {
        let (recording, node) = (self.recording, self.node);
        recording.write_stores(node, &self.cluster, images);
        let record = recording.record(images)?;
        self.cluster.start_without_disk(node);
        let attached = self
            .cluster
            .wait(node, "the disk", |status| status.disk != "Diskless");
        let found = attached.disk;
        let honest = match (record.trust, record.holders) {
            (Trust::Inconsistent, _) => "Inconsistent",
            (Trust::Outdated, _) => "Outdated",
            (Trust::UpToDate, Holders::Sole) => "UpToDate",
            (Trust::UpToDate, _) => "Consistent",
        };
        if found != honest {
            return Err(format!("its record says {honest}, the daemon {found}"));
        }
        let plain = self.cluster.verb(node, "primary", &[]);
        let granted = plain.code == 0;
        if granted != (honest == "UpToDate") {
            return Err(format!("{honest}, and `primary` ended so: {plain:?}"));
        }
        let refused = plain.code == 4 && plain.stderr.contains("KGM-03");
        if !(granted || refused) {
            return Err(format!("refused in another way: {plain:?}"));
        }
        if honest == "Inconsistent" {
            return Ok(honest);
        }
        if !granted {
            let forced = self.cluster.verb(node, "primary", &["--force", "--yes"]);
            if forced.code != 0 {
                return Err(format!("`primary --force` on a {honest} copy: {forced:?}"));
            }
        }
        // Who is promoted without force claims to have everything. Else the copy answers for what
        // this node served itself, and for the generations that its record says it has.
        let counts = |event: &Event| {
            granted || event.by == node || recording.generation(event) <= record.generation.counter
        };
        let behind = |event: &&Event| within(event.at[node as usize], cut.at);
        let events = recording.events.iter().take_while(behind);
        let mut checker = oracle(recording.sectors(), events, counts);
        checker.all_copies_lost_power();
        let content = read_all(&mut self.cluster.nbd(node), recording.layout.data_size)?;
        judge_content(&mut checker, &content)?;
        Ok(honest)
    }
}

/// The check of pairs of images of one moment.
#[derive(Debug)]
pub struct Pairs<'a> {
    recording: &'a Recording,
    durable: [Vec<Durable>; 2],
    cluster: Cluster,
    beside: &'a Cluster,
}

impl Pairs<'_> {
    /// Rebuilds both nodes, starts both daemons, lets them resync, and judges. Cuts must come in
    /// order.
    pub fn check(&mut self, cut: PairCut) -> Verdict {
        let at = match cut.events.checked_sub(1) {
            Some(last) => self.recording.events[last].at,
            None => return Ok("nothing"),
        };
        let images = Node::BOTH.map(|node| {
            let survivors = match cut.victims {
                Victims::One(victim) if victim != node => None,
                _ => Some(Left::Torn(cut.seed ^ node as u64)),
            };
            let logs = &self.recording.nodes[node as usize].logs;
            let durable = &mut self.durable[node as usize];
            match survivors {
                Some(left) => cut_stores(logs, durable, at[node as usize], left),
                None => whole_stores(logs, durable, at[node as usize]),
            }
        });
        // A cluster of its own, because a node that lost power has another boot id for good.
        self.cluster = self.beside.another(self.recording.pair_options());
        let verdict = catch(|| self.judge(cut, at, &images));
        for node in Node::BOTH {
            if self.cluster.runs(node) {
                self.cluster.kill(node);
            }
        }
        verdict.map_err(|problem| {
            for (node, images) in Node::BOTH.iter().zip(&images) {
                let name = format!("pair-{}-{}", cut.events, node.name());
                self.recording.keep(&name, images);
            }
            format!("{cut:?}: {problem}")
        })
    }

    fn judge(&mut self, cut: PairCut, at: Lengths, images: &[Vec<Vec<u8>>; 2]) -> Verdict {
        let recording = self.recording;
        let lost = |node: Node| cut.victims == Victims::Both || cut.victims == Victims::One(node);
        let events = &recording.events[..cut.events];
        // Whether a copy that has everything is left that lost no power.
        let mut complete = false;
        for (node, images) in Node::BOTH.into_iter().zip(images) {
            recording.write_stores(node, &self.cluster, images);
            let record = recording.record(images)?;
            if lost(node) {
                self.cluster.reboot(node);
            } else if record.trust == Trust::UpToDate {
                complete = events.iter().all(|event| {
                    event.by == node || recording.generation(event) <= record.generation.counter
                });
            }
        }
        for node in Node::BOTH {
            self.cluster.start(node);
        }
        self.cluster.wait_mirrored();
        self.cluster.assert_identical();
        let mut checker = oracle(recording.sectors(), events.iter(), |_| true);
        if !complete {
            checker.all_copies_lost_power();
        }
        debug_assert!(at == events[events.len() - 1].at);
        let mut content =
            fs::read(self.cluster.disk(Node::A)).map_err(|error| error.to_string())?;
        content.truncate(recording.layout.data_size as usize);
        judge_content(&mut checker, &content)?;
        Ok(if complete {
            "one stayed up"
        } else {
            "both lost"
        })
    }
}

fn layout(options: &ClusterOptions) -> Layout {
    let place = match options.metadata {
        MetadataPlace::Internal => node::MetadataPlace::Internal,
        MetadataPlace::External => node::MetadataPlace::External,
    };
    Layout::new(options.disk_size, place).expect("the size of a mirror")
}

/// The superblocks that were written, from the log of the metadata.
fn records(log: &WriteLog, layout: &Layout) -> Vec<(u64, u64)> {
    let slots: Vec<u64> = (0..SLOTS).map(|slot| layout.slot_offset(slot)).collect();
    let mut records = Vec::new();
    for entry in log.entries() {
        if let Logged::Write { offset, data, .. } = &entry.what
            && slots.contains(offset)
            && let Ok(slot) = Superblock::parse(&log.data(data))
        {
            records.push((entry.end, slot.untrusted().generation.counter));
        }
    }
    records
}

fn within(lengths: [u64; 2], cut: [u64; 2]) -> bool {
    lengths[0] <= cut[0] && lengths[1] <= cut[1]
}

fn cut_stores(
    logs: &[WriteLog],
    durable: &mut [Durable],
    at: [u64; 2],
    left: Left,
) -> Vec<Vec<u8>> {
    let (mut random, torn) = match left {
        Left::Flushed => (fastrand::Rng::with_seed(0), false),
        Left::Torn(seed) => (fastrand::Rng::with_seed(seed), true),
    };
    let stores = logs.iter().zip(durable).zip(at);
    stores
        .map(|((log, durable), length)| {
            let survivors = match torn {
                false => Survivors::Nothing,
                true => KINDS[random.usize(..KINDS.len())],
            };
            durable.cut(log, length, survivors, &mut random)
        })
        .collect()
}

const KINDS: [Survivors; 5] = [
    Survivors::Nothing,
    Survivors::Everything,
    Survivors::Writes,
    Survivors::Sectors,
    Survivors::ButSome,
];

fn whole_stores(logs: &[WriteLog], durable: &mut [Durable], at: [u64; 2]) -> Vec<Vec<u8>> {
    let stores = logs.iter().zip(durable).zip(at);
    stores
        .map(|((log, durable), length)| {
            let mut random = fastrand::Rng::with_seed(0);
            durable.cut(log, length, Survivors::Everything, &mut random)
        })
        .collect()
}

fn read_all(client: &mut NbdClient, size: u64) -> Result<Vec<u8>, String> {
    let size = size.min(client.size());
    let mut content = vec![0; size as usize];
    let mut offsets = std::collections::HashMap::new();
    for offset in (0..size).step_by(MIB as usize) {
        let len = (size - offset).min(MIB) as u32;
        let cookie = client.send(NbdCommand::Read(len), offset, &[]);
        offsets.insert(cookie.map_err(|error| error.to_string())?, offset as usize);
    }
    for _ in 0..offsets.len() {
        let reply = client.receive().map_err(|error| error.to_string())?;
        let offset = offsets[&reply.cookie];
        if reply.error != 0 {
            return Err(format!("reading at {offset} failed with {}", reply.error));
        }
        content[offset..offset + reply.data.len()].copy_from_slice(&reply.data);
    }
    Ok(content)
}

fn judge_content(checker: &mut Checker, content: &[u8]) -> Result<(), String> {
    let asked = checker.read_asked();
    checker.read_returned(asked, 0, &stamps_of(content))
}

/// A condition that was waited for in vain is a violation like any other.
fn catch(check: impl FnOnce() -> Verdict) -> Verdict {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(check)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        Err(text.unwrap_or_else(|| "a check panicked".to_owned()))
    })
}
