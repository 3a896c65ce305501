//! `kagami demo --script`: the story of two nodes, one small function per step, in order.

use super::cluster::Cluster;
use super::guest::Guest;
use super::ledger::{BLOCK, Ledger};
use super::plan::{MIRROR, NODES};
use super::{failed, interrupt};
use crate::human;
use crate::output;
use crate::wait::Goal;
use fastrand::Rng;
use mirror_core::control::{Command, MirrorStatus, PrimaryMode};
use mirror_core::error::{ErrorId, ExitCode, Refusal};
use mirror_core::types::LinkState;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

const A: usize = 0;
const B: usize = 1;

/// The story writes within this much of the device, so that the activity log of a killed Primary
/// names less than all of it.
const WORKING_SET: u64 = 128 << 20;

/// Writes per step.
const WRITES: usize = 4000;

/// A resync may cost this much on the link beyond the blocks that differ: framing, the exchange of
/// bitmaps, heartbeats meanwhile.
const RESYNC_OVERHEAD: u64 = 1 << 20;

type Step = fn(&mut Story) -> Result<(), Refusal>;

const STEPS: &[(&str, Step)] = &[
    ("Start nodes a and b", start_both),
    (
        "Make a Primary for the first time; b gets a full copy",
        first_sync,
    ),
    (
        "Write random blocks through NBD on a, read all back",
        write_and_verify,
    ),
    ("kill -9 the daemon of b, keep writing on a", lose_the_peer),
    ("Start b again; only what changed is copied", peer_returns),
    (
        "kill -9 the daemon of a in the middle of writing",
        lose_the_primary,
    ),
    ("Promote b", promote_the_peer),
    (
        "Read every acknowledged write back through NBD on b",
        verify_on_the_peer,
    ),
    (
        "Write on b, then start a again and let it catch up",
        old_primary_returns,
    ),
    ("Make b Secondary and stop both nodes", stop_both),
    (
        "Compare both disks byte for byte, and with what was acknowledged",
        compare_disks,
    ),
];

/// Runs the story; an error says which step did not hold.
pub fn run(cluster: Cluster, seed: u64) -> Result<(), Refusal> {
    let size = human::size(cluster.plan.size);
    output::line(format!(
        "Two nodes with {size} each in {}",
        cluster.plan.dir.display()
    ));
    let mut story = Story::new(cluster, seed);
    for (number, (title, step)) in STEPS.iter().enumerate() {
        let number = number + 1;
        let at = story.start.elapsed().as_secs_f64();
        output::line(format!("{at:7.2} s  {number:>2}. {title}"));
        let result = interrupt::check().and_then(|()| step(&mut story));
        if let Err(refusal) = result {
            if !interrupt::requested() {
                story.explain_failure();
            }
            let why = match refusal.id {
                ErrorId::Internal => refusal.message,
                _ => refusal.to_string(),
            };
            return Err(failed(format!(
                "step {number} ({title}) did not hold: {why}"
            )));
        }
    }
    let took = story.start.elapsed().as_secs_f64();
    output::line(format!("{took:7.2} s  All of it held."));
    Ok(())
}

struct Story {
    cluster: Cluster,
    ledger: Ledger,
    random: Rng,
    guest: Option<Guest>,
    start: Instant,
    /// Bytes of the mirrored device, once known.
    size: u64,
}

impl Story {
    fn new(cluster: Cluster, seed: u64) -> Story {
        let ledger = Ledger::new(seed, 0);
        let random = Rng::with_seed(seed);
        Story {
            cluster,
            ledger,
            random,
            guest: None,
            start: Instant::now(),
            size: 0,
        }
    }

    fn tell(&self, what: impl AsRef<str>) {
        output::line(format!("{:15}{}", "", what.as_ref()));
    }

    fn attach_guest(&mut self, node: usize) -> Result<(), Refusal> {
        let client = self.cluster.guest(node)?;
        if client.size != self.size {
            let sizes = format!("{} instead of {}", client.size, self.size);
            return Err(failed(format!("the export has another size: {sizes}")));
        }
        self.guest = Some(Guest::new(client));
        Ok(())
    }

    /// Writes random blocks, flushes, and says how it went.
    fn write(&mut self) -> Result<(), Refusal> {
        let guest = self.guest.as_mut().ok_or_else(|| failed("no guest"))?;
        guest.longest = Duration::ZERO;
        let start = Instant::now();
        let written = guest
            .write(&mut self.ledger, &mut self.random, WRITES)
            .and_then(|()| guest.client.flush());
        written.map_err(|error| failed(format!("a guest's write failed: {error}")))?;
        let rate = WRITES as f64 / start.elapsed().as_secs_f64();
        let stall = guest.longest;
        self.tell(format!(
            "{WRITES} writes of 4 KiB acknowledged and flushed, {rate:.0} per second, longest \
             write stall {:.1} ms",
            stall.as_secs_f64() * 1000.0
        ));
        Ok(())
    }

    fn verify(&mut self) -> Result<(), Refusal> {
        let guest = self.guest.as_mut().ok_or_else(|| failed("no guest"))?;
        let blocks = guest.verify(&mut self.ledger)?;
        self.tell(format!(
            "{blocks} blocks read back, every acknowledged write is there"
        ));
        Ok(())
    }

    /// Waits until `source` has brought its peer up to date; returns bytes it sent meanwhile.
    fn follow_resync(&mut self, source: usize) -> Result<u64, Refusal> {
        let before = self.cluster.status(source)?.counters.link_sent_bytes;
        let start = Instant::now();
        let done = self.cluster.wait_for(source, Goal::Synced)?;
        let sent = done.counters.link_sent_bytes.saturating_sub(before);
        self.tell(format!(
            "in sync after {:.2} s, {} sent over the link",
            start.elapsed().as_secs_f64(),
            human::size(sent)
        ));
        Ok(sent)
    }

    fn explain_failure(&mut self) {
        self.cluster.plan.remove = false;
        for (node, (name, _)) in NODES.iter().enumerate() {
            match self.cluster.status(node) {
                Ok(status) => eprintln!("{name}: {}", human::paragraph(&status)),
                Err(refusal) => eprintln!("{name}: {refusal}"),
            }
            eprintln!("{name}: the end of its log:");
            for line in self.cluster.log_tail(node, 20) {
                eprintln!("    {line}");
            }
        }
        eprintln!("the files are kept in {}", self.cluster.plan.dir.display());
    }
}

fn start_both(story: &mut Story) -> Result<(), Refusal> {
    story.cluster.start(A)?;
    story.cluster.start(B)?;
    let status = story
        .cluster
        .wait_for(A, Goal::Link(LinkState::Connected))?;
    story.tell(human::headline(&status));
    Ok(())
}

fn first_sync(story: &mut Story) -> Result<(), Refusal> {
    story
        .cluster
        .order(A, Command::Primary(PrimaryMode::Initial))?;
    story.follow_resync(A)?;
    let status = story.cluster.wait_for(B, Goal::Synced)?;
    story.size = status.size_bytes;
    let set = story.size.min(WORKING_SET) / BLOCK as u64;
    story.ledger = Ledger::new(story.random.u64(..), set);
    Ok(())
}

fn write_and_verify(story: &mut Story) -> Result<(), Refusal> {
    story.attach_guest(A)?;
    story.write()?;
    story.verify()
}

fn lose_the_peer(story: &mut Story) -> Result<(), Refusal> {
    story.cluster.kill(B);
    story.write()?;
    let status = story.cluster.status(A)?;
    story.tell(human::headline(&status));
    Ok(())
}

fn peer_returns(story: &mut Story) -> Result<(), Refusal> {
    let dirty = story.cluster.status(A)?.dirty_bytes;
    story.tell(format!("{} differ by a's bitmap", human::size(dirty)));
    if dirty == 0 {
        return Err(failed("the bitmap is empty although b missed writes"));
    }
    let before = story.cluster.status(A)?.counters.link_sent_bytes;
    story.cluster.start(B)?;
    story.follow_resync(A)?;
    let sent = story
        .cluster
        .status(A)?
        .counters
        .link_sent_bytes
        .saturating_sub(before);
    let most = dirty + dirty / 33 + RESYNC_OVERHEAD;
    if sent > most {
        let sizes = format!("{sent} bytes sent for {dirty} bytes that differ");
        return Err(failed(format!(
            "the resync moved more than what changed: {sizes}"
        )));
    }
    Ok(())
}

fn lose_the_primary(story: &mut Story) -> Result<(), Refusal> {
    let guest = story.guest.as_mut().ok_or_else(|| failed("no guest"))?;
    let lost = guest
        .write(&mut story.ledger, &mut story.random, WRITES / 2)
        .and_then(|()| guest.fill(&mut story.ledger, &mut story.random));
    lost.map_err(|error| failed(format!("a guest's write failed: {error}")))?;
    let in_flight = guest.client.in_flight();
    story.cluster.kill(A);
    // Answers that were on their way count; the rest may or may not have happened.
    while guest.take_reply(&mut story.ledger).is_ok() {}
    let open = guest.client.in_flight();
    story.guest = None;
    story.tell(format!(
        "{} writes acknowledged, {in_flight} in flight at the kill, {open} never answered",
        WRITES / 2
    ));
    Ok(())
}

fn promote_the_peer(story: &mut Story) -> Result<(), Refusal> {
    let start = Instant::now();
    let gone = |status: &MirrorStatus| status.link != LinkState::Connected;
    story.cluster.wait(B, "the link to a is down", gone)?;
    let outcome = loop {
        interrupt::check()?;
        match story
            .cluster
            .order(B, Command::Primary(PrimaryMode::Ordinary))
        {
            Ok(outcome) => break outcome,
            Err(refusal)
                if refusal.id.exit_code() == ExitCode::State
                    && start.elapsed() < Duration::from_secs(10) =>
            {
                std::thread::sleep(crate::wait::POLL);
            }
            Err(refusal) => return Err(refusal),
        }
    };
    for warning in outcome.warnings {
        story.tell(format!("warning: {warning}"));
    }
    story.attach_guest(B)?;
    story.tell(format!(
        "b serves {MIRROR} after {:.2} s",
        start.elapsed().as_secs_f64()
    ));
    Ok(())
}

fn verify_on_the_peer(story: &mut Story) -> Result<(), Refusal> {
    story.verify()
}

fn old_primary_returns(story: &mut Story) -> Result<(), Refusal> {
    story.write()?;
    story.cluster.start(A)?;
    story.follow_resync(B)?;
    story.tell("the writes of b, and what a's activity log says a may have alone");
    let status = story.cluster.status(B)?;
    story.tell(human::headline(&status));
    Ok(())
}

fn stop_both(story: &mut Story) -> Result<(), Refusal> {
    if let Some(guest) = story.guest.take() {
        guest
            .client
            .disconnect()
            .map_err(|error| failed(error.to_string()))?;
    }
    story.cluster.order(B, Command::Secondary)?;
    story.cluster.stop(A)?;
    story.cluster.stop(B)
}

fn compare_disks(story: &mut Story) -> Result<(), Refusal> {
    let plan = &story.cluster.plan;
    let compared = compare(plan.disk(A), plan.disk(B), story.size)
        .map_err(|error| failed(format!("the disks cannot be read: {error}")))?;
    if let Some(at) = compared {
        return Err(failed(format!("the disks differ at byte {at}")));
    }
    let disk = File::open(plan.disk(A)).map_err(|error| failed(error.to_string()))?;
    let blocks: Vec<u64> = story.ledger.written().collect();
    for block in &blocks {
        let mut data = vec![0; BLOCK];
        disk.read_exact_at(&mut data, block * BLOCK as u64)
            .map_err(|error| failed(error.to_string()))?;
        story.ledger.check(*block, &data).map_err(failed)?;
    }
    let size = human::size(story.size);
    story.tell(format!(
        "{size} equal, {} blocks hold what was acknowledged",
        blocks.len()
    ));
    Ok(())
}

/// The first byte in which two files differ within `len` bytes.
fn compare(a: &Path, b: &Path, len: u64) -> io::Result<Option<u64>> {
    let (a, b) = (File::open(a)?, File::open(b)?);
    let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0;
    while at < len {
        let piece = (len - at).min(left.len() as u64) as usize;
        a.read_exact_at(&mut left[..piece], at)?;
        b.read_exact_at(&mut right[..piece], at)?;
        if left[..piece] != right[..piece] {
            let differs = (0..piece).find(|&i| left[i] != right[i]).unwrap_or(0);
            return Ok(Some(at + differs as u64));
        }
        at += piece as u64;
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_first_difference() {
        let dir = tempfile::TempDir::new().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let mut data = vec![7; 3 << 20];
        std::fs::write(&a, &data).unwrap();
        data[(2 << 20) + 5] = 8;
        std::fs::write(&b, &data).unwrap();
        assert_eq!(compare(&a, &b, 3 << 20).unwrap(), Some((2 << 20) + 5));
        assert_eq!(compare(&a, &b, 2 << 20).unwrap(), None);
        assert!(
            compare(&a, &a, 4 << 20).is_err(),
            "shorter than it should be"
        );
    }
}
