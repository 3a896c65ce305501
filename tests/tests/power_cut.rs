//! Power cuts on real files: real daemons run on stores that record every write and flush, under a
//! guest, kills, cut links, resyncs and changes of role. Then each node's stores are rebuilt as a
//! power cut at each flush, and between flushes, may have left them; the real daemon is started on
//! each, and the simulator's oracle judges what it serves. Pairs of images of the same instant are
//! started together and must become equal.
//!
//! `KAGAMI_POWER_CUTS` sets how many images of each node (60 without it); with it, the image right
//! behind every flush of the recording is among them.

use kagami_tests::crash::{Cut, Left, PairCut, Recorders, Recording, Verdict, Victims};
use kagami_tests::guest::{EndOnDrop, Guest, Reins};
use kagami_tests::timeline::{Timeline, What};
use kagami_tests::{
    Cluster, ClusterOptions, Deadline, MIB, MetadataPlace, Node, ProxyMode, StopOnDrop, pace,
    rounds, wait_until,
};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const SIZE: u64 = 8 * MIB;
/// The link's speed: slow enough that cuts hit the middle of a resync.
const LINK_RATE: u64 = 12 * MIB;
const SHORT: u64 = 60;

#[test]
fn what_a_power_cut_leaves_is_right() {
    let wanted = rounds("KAGAMI_POWER_CUTS", SHORT) as usize;
    let exhaustive = std::env::var_os("KAGAMI_POWER_CUTS").is_some();
    let start = Instant::now();
    let mut all = Checked::default();
    for metadata in [MetadataPlace::Internal, MetadataPlace::External] {
        let checked = cut_everywhere(metadata, wanted / 2, exhaustive);
        println!("{metadata:?} metadata: {checked}");
        all.add(checked);
    }
    for violation in &all.violations {
        println!("VIOLATION: {violation}");
    }
    for (node, found) in Node::BOTH.iter().zip(&all.images) {
        for state in ["UpToDate", "Consistent", "Inconsistent"] {
            assert!(
                found.contains_key(state),
                "no image of {} was {state}: the recording is too gentle",
                node.name()
            );
        }
    }
    let [a, b] = [0, 1].map(|node| all.images[node].values().sum::<usize>());
    println!(
        "{a} images of a, {b} of b and {} pairs recovered in {} s, {} violations",
        all.pairs.values().sum::<usize>(),
        start.elapsed().as_secs(),
        all.violations.len()
    );
    assert!(all.violations.is_empty());
}

fn cut_everywhere(metadata: MetadataPlace, wanted: usize, exhaustive: bool) -> Checked {
    let mut cluster = Cluster::new(ClusterOptions {
        disk_size: SIZE,
        metadata,
        stall_timeout: Duration::from_secs(2),
        proxied: true,
        in_memory: true,
        ..ClusterOptions::default()
    });
    let recording = record(&mut cluster);
    println!(
        "{metadata:?} metadata: {} writes acknowledged; flushes of a and b: {:?}",
        recording.acknowledged(),
        Node::BOTH.map(|node| recording.moments(node)[0].len()),
    );
    let mut checked = Checked::default();
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for node in Node::BOTH {
            let cuts = plan(&recording, node, wanted, exhaustive);
            for half in cuts.chunks(cuts.len().div_ceil(2).max(1)) {
                let (recording, cluster, half) = (&recording, &cluster, half.to_vec());
                threads.push(scope.spawn(move || {
                    let mut images = recording.images(node, cluster);
                    let mut checked = Checked::default();
                    for cut in half {
                        checked.image(node, images.check(cut));
                        if checked.violations.len() == ENOUGH {
                            break;
                        }
                    }
                    checked
                }));
            }
        }
        for thread in threads {
            checked.add(thread.join().expect("a check reports"));
        }
    });
    checked.add(check_pairs(&recording, &cluster, wanted / 5));
    checked
}

/// A guest works while everything is done to the mirror that changes its metadata.
fn record(cluster: &mut Cluster) -> Recording {
    let recorders = Recorders::start(cluster);
    cluster.create_and_start();
    cluster
        .verb(Node::A, "primary", &["--initial", "--assume-clean"])
        .expect_code(0);
    cluster.wait_mirrored();
    let size = cluster.status(Node::A).size_bytes;
    let timeline = recorders.timeline();
    timeline.note(Node::A, What::Tick);
    let reins = Reins::new();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _ends = (EndOnDrop(&reins), StopOnDrop(&over));
        scope.spawn(|| Guest::new(&timeline, size / 512, fastrand::Rng::new()).run(&reins));
        scope.spawn(|| tick(&timeline, &over));
        let mut story = Story {
            cluster,
            reins: &reins,
            primary: Node::A,
        };
        story.tell();
        reins.rest();
    });
    for node in Node::BOTH {
        cluster.kill(node);
    }
    recorders.finish(&timeline)
}

/// Reads the clock also while the guest is not served.
fn tick(timeline: &Timeline, over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        timeline.note(Node::A, What::Tick);
        pace(Duration::from_micros(200));
    }
}

struct Story<'a> {
    cluster: &'a mut Cluster,
    reins: &'a Reins,
    primary: Node,
}

impl Story<'_> {
    fn tell(&mut self) {
        for _ in Node::BOTH {
            self.serve();
            self.work(60);
            // First, because after each loss of the link the nodes meet again a little later.
            self.invalidate();
            self.part_and_meet();
            self.kill_the_secondary();
            self.interrupt_a_resync();
            self.disconnect();
            self.hand_over();
            self.work(60);
            self.fail_over();
            self.kill_the_source();
            self.kill_both();
            // The second time with the other one as Primary.
            self.hand_over();
        }
    }

    fn secondary(&self) -> Node {
        self.primary.peer()
    }

    fn serve(&self) {
        let address = self.cluster.nbd_address(self.primary, 0);
        self.reins.work_at(self.primary, address);
    }

    /// Lets the guest have so many more answers.
    fn work(&self, answers: u64) {
        let enough = self.reins.answered() + answers;
        wait_until(
            Deadline::seconds(30),
            "the guest's answers",
            || match self.reins.answered() {
                so_far if so_far >= enough => Ok(()),
                so_far => Err(format!("{so_far} of {enough}")),
            },
        );
    }

    fn slow_link(&self) {
        self.cluster.proxy(0).set(ProxyMode::Throttle(LINK_RATE));
    }

    fn until_mirrored(&self) {
        self.cluster.wait_mirrored();
        self.cluster.proxy(0).set(ProxyMode::Forward);
    }

    fn until_resync(&self) {
        self.cluster.wait(self.secondary(), "a resync", |status| {
            status.resync.is_some()
        });
    }

    fn part_and_meet(&mut self) {
        self.cluster.proxy(0).set(ProxyMode::Cut);
        self.work(150);
        self.slow_link();
        self.until_mirrored();
    }

    fn kill_the_secondary(&mut self) {
        let secondary = self.secondary();
        self.cluster.kill(secondary);
        self.work(100);
        self.slow_link();
        self.cluster.start(secondary);
        self.until_mirrored();
    }

    fn interrupt_a_resync(&mut self) {
        let secondary = self.secondary();
        self.cluster.proxy(0).set(ProxyMode::Cut);
        self.work(200);
        self.slow_link();
        self.until_resync();
        self.cluster.kill(secondary);
        self.work(60);
        self.cluster.start(secondary);
        self.until_resync();
        self.cluster.proxy(0).set(ProxyMode::Cut);
        self.work(60);
        self.slow_link();
        self.until_mirrored();
    }

    fn disconnect(&mut self) {
        self.cluster
            .verb(self.primary, "disconnect", &[])
            .expect_code(0);
        self.work(100);
        self.cluster
            .verb(self.primary, "connect", &[])
            .expect_code(0);
        self.cluster.wait_mirrored();
    }

    fn hand_over(&mut self) {
        self.reins.rest();
        self.cluster.wait_mirrored();
        self.cluster.demote(self.primary, 20);
        self.primary = self.secondary();
        self.cluster.promote(self.primary, 20);
        self.serve();
    }

    fn invalidate(&mut self) {
        wait_until(Deadline::seconds(20), "a copy thrown away", || {
            let result = self
                .cluster
                .verb(self.secondary(), "invalidate", &["--yes"]);
            // It parts from its peer to do it, and may not meet it again in time.
            match result.code {
                0 => Ok(()),
                _ => Err(result.stderr),
            }
        });
        self.slow_link();
        self.work(60);
        self.until_mirrored();
    }

    fn fail_over(&mut self) {
        // Only a holder may take over.
        self.cluster.wait_mirrored();
        let dead = self.primary;
        self.cluster.kill(dead);
        self.primary = dead.peer();
        self.cluster.promote(self.primary, 20);
        self.serve();
        self.work(100);
        self.slow_link();
        self.cluster.start(dead);
        self.until_mirrored();
    }

    fn kill_the_source(&mut self) {
        self.cluster.proxy(0).set(ProxyMode::Cut);
        self.work(200);
        self.slow_link();
        self.until_resync();
        self.cluster.kill(self.primary);
        self.cluster.start(self.primary);
        self.cluster.promote(self.primary, 20);
        self.serve();
        self.until_mirrored();
    }

    fn kill_both(&mut self) {
        for node in Node::BOTH {
            self.cluster.kill(node);
        }
        for node in Node::BOTH {
            self.cluster.start(node);
        }
        self.cluster.wait_mirrored();
        self.cluster.promote(self.primary, 20);
        self.serve();
    }
}

/// Which images of a node are rebuilt, in order.
fn plan(recording: &Recording, node: Node, wanted: usize, exhaustive: bool) -> Vec<Cut> {
    let [flushed, before] = recording.moments(node);
    let behind_flushes = if exhaustive {
        flushed.len()
    } else {
        (wanted / 2).min(flushed.len())
    };
    let torn = wanted
        .saturating_sub(behind_flushes)
        .max(behind_flushes * 2 / 5);
    let mut cuts: Vec<Cut> = Vec::new();
    for index in 0..behind_flushes {
        let at = flushed[index * flushed.len() / behind_flushes];
        cuts.push(Cut {
            at,
            left: Left::Flushed,
        });
    }
    for index in 0..torn {
        let at = before[index * before.len() / torn];
        cuts.push(Cut {
            at,
            left: Left::Torn(fastrand::u64(..)),
        });
    }
    cuts.sort();
    cuts
}

fn check_pairs(recording: &Recording, cluster: &Cluster, wanted: usize) -> Checked {
    let victims = [Victims::Both, Victims::One(Node::A), Victims::One(Node::B)];
    let cuts: Vec<PairCut> = (0..wanted)
        .map(|index| PairCut {
            events: 1 + index * (recording.events() - 1) / wanted,
            victims: victims[index % 3],
            seed: fastrand::u64(..),
        })
        .collect();
    let mut checked = Checked::default();
    std::thread::scope(|scope| {
        let halves = [0, 1].map(|half| {
            let cuts = &cuts;
            scope.spawn(move || {
                let mut pairs = recording.pairs(cluster);
                let mut checked = Checked::default();
                for cut in cuts.iter().skip(half).step_by(2) {
                    checked.pair(pairs.check(*cut));
                    if checked.violations.len() == ENOUGH {
                        break;
                    }
                }
                checked
            })
        });
        for thread in halves {
            checked.add(thread.join().expect("a check reports"));
        }
    });
    checked
}

/// More violations than these would tell nothing more.
const ENOUGH: usize = 5;

/// What checks came to: how many images and pairs turned out to be what.
#[derive(Debug, Default)]
struct Checked {
    images: [BTreeMap<&'static str, usize>; 2],
    pairs: BTreeMap<&'static str, usize>,
    violations: Vec<String>,
}

impl Checked {
    fn image(&mut self, node: Node, verdict: Verdict) {
        match verdict {
            Ok(found) => *self.images[node as usize].entry(found).or_default() += 1,
            Err(problem) => self.violations.push(problem),
        }
    }

    fn pair(&mut self, verdict: Verdict) {
        match verdict {
            Ok(found) => *self.pairs.entry(found).or_default() += 1,
            Err(problem) => self.violations.push(problem),
        }
    }

    fn add(&mut self, other: Checked) {
        let [a, b] = other.images;
        let [mine_a, mine_b] = &mut self.images;
        for (mine, theirs) in [(mine_a, a), (mine_b, b), (&mut self.pairs, other.pairs)] {
            for (found, count) in theirs {
                *mine.entry(found).or_default() += count;
            }
        }
        self.violations.extend(other.violations);
    }
}

impl fmt::Display for Checked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b] = &self.images;
        write!(f, "a {a:?}, b {b:?}, pairs {:?}", self.pairs)?;
        write!(f, ", {} violations", self.violations.len())
    }
}
