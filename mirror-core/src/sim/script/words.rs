//! How things are called in a script's output: small stable names instead of random ids.

use super::disk::LEFTOVER;
use super::parse::Host;
use crate::limits::SECTOR;
use crate::meta::superblock::{Proposal, Superblock, Trust};
use crate::sim::host::NAMES;
use crate::types::{ByteRange, Generation, Holders};
use crate::wire::message::{Goodbye, Hello, Lineage};
use crate::wire::{FLAG_CHECKSUM, FLAG_FUA, FLAG_WHOLE, FrameType, Header};

/// Values named in one line.
const MOST_VALUES: usize = 6;

/// The generations that were seen, in the order of their first appearance.
#[derive(Default)]
pub(super) struct Names(Vec<Generation>);

impl Names {
    /// `g2`, and `g2'` for another generation of the same count.
    pub fn of(&mut self, generation: Generation) -> String {
        if generation.is_unborn() {
            return "unborn".to_owned();
        }
        if !self.0.contains(&generation) {
            self.0.push(generation);
        }
        let rivals = self
            .0
            .iter()
            .take_while(|known| **known != generation)
            .filter(|known| known.counter == generation.counter)
            .count();
        format!("g{}{}", generation.counter, "'".repeat(rivals))
    }

    fn of_tag(&mut self, tag: u64) -> String {
        let known = self.0.iter().find(|known| known.tag() == tag).copied();
        match known {
            Some(generation) => format!(" {}", self.of(generation)),
            None if tag == 0 => String::new(),
            None => " g?".to_owned(),
        }
    }

    /// A sentence for operators, with the names of this script in it.
    pub fn within(&mut self, text: &str) -> String {
        let mut text = text.to_owned();
        for generation in self.0.clone() {
            text = text.replace(&generation.to_string(), &self.of(generation));
        }
        text
    }

    /// A record as a replica writes it down.
    pub fn record(&mut self, host: Host, record: &Superblock) -> String {
        let mut text = format!(
            "{} {} {}",
            self.of(record.generation),
            holders(host, record.holders),
            trust(record.trust)
        );
        for (so, word) in [
            (record.primary, " Primary"),
            (record.used, " used"),
            (record.all_dirty, " all-dirty"),
        ] {
            text.push_str(if so { word } else { "" });
        }
        if let Some(Proposal {
            generation,
            holders: proposed,
        }) = record.proposal
        {
            let name = self.of(generation);
            text.push_str(&format!(", proposes {name} {}", holders(host, proposed)));
        }
        text
    }

    /// A frame without a payload of data; `label` names the request it is about.
    pub fn frame(&mut self, from: Host, header: &Header, bytes: &[u8], label: &str) -> String {
        let kind = header.kind;
        let tag = self.of_tag(header.generation);
        let fua = if header.flags & FLAG_FUA != 0 {
            " fua"
        } else {
            ""
        };
        let extent = range(ByteRange::new(header.offset, header.length.into()));
        match kind {
            FrameType::Write | FrameType::Zero => format!("{kind:?} {label} {extent}{tag}{fua}"),
            FrameType::SyncWrite | FrameType::SyncZero => format!("{kind:?} {extent}{tag} {label}"),
            FrameType::Digest => format!("{kind:?} {extent}{tag}"),
            FrameType::Flush | FrameType::Done => format!("{kind:?} {label}{tag}"),
            FrameType::Hello => format!("Hello {}", self.hello(from, bytes)),
            FrameType::Verdict => format!("Verdict {}", verdict(bytes)),
            FrameType::Goodbye => self.goodbye(bytes),
            FrameType::SyncStart | FrameType::Promote => {
                format!("{kind:?} {}", self.lineage(kind, bytes))
            }
            FrameType::SyncReady => {
                let said = |flag, text| if header.flags & flag != 0 { text } else { "" };
                let (whole, compare) = (
                    said(FLAG_WHOLE, ", every block"),
                    said(FLAG_CHECKSUM, ", compared first"),
                );
                format!("SyncReady{tag}{whole}{compare}")
            }
            FrameType::PromoteRefused => {
                format!("PromoteRefused: {}", String::from_utf8_lossy(bytes))
            }
            _ => format!("{kind:?}{tag}"),
        }
    }

    fn hello(&mut self, from: Host, bytes: &[u8]) -> String {
        let Ok(hello) = Hello::decode(bytes) else {
            return "that cannot be read".to_owned();
        };
        let mut text = format!(
            "{} {} {} {}",
            self.of(hello.generation),
            holders(from, hello.holders),
            hello.disk,
            hello.role
        );
        for (so, word) in [
            (hello.was_primary, " was-Primary"),
            (hello.used, " used"),
            (hello.stayed_up, " stayed-up"),
            (hello.discard, " discard"),
        ] {
            text.push_str(if so { word } else { "" });
        }
        if hello.dirty_bytes > 0 {
            text.push_str(&format!(" dirty={}", size(hello.dirty_bytes)));
        }
        text
    }

    fn goodbye(&mut self, bytes: &[u8]) -> String {
        match Goodbye::decode(bytes) {
            Ok(Goodbye {
                outdated_by: Some(generation),
                reason,
            }) => format!("Goodbye, going on in {}: {reason}", self.of(generation)),
            Ok(goodbye) => format!("Goodbye: {}", goodbye.reason),
            Err(_) => "Goodbye that cannot be read".to_owned(),
        }
    }

    fn lineage(&mut self, kind: FrameType, bytes: &[u8]) -> String {
        match Lineage::decode(kind, bytes) {
            Ok(lineage) if lineage.whole => format!("{}, every block", self.of(lineage.generation)),
            Ok(lineage) => self.of(lineage.generation),
            Err(_) => "that cannot be read".to_owned(),
        }
    }
}

/// The holders as this host's record names them.
pub(super) fn holders(host: Host, holders: Holders) -> String {
    let (me, peer) = (NAMES[host], NAMES[1 - host]);
    match holders {
        Holders::Nobody => "{}".to_owned(),
        Holders::Both => "{a,b}".to_owned(),
        Holders::Sole => format!("{{{me}}}"),
        Holders::Widening => format!("{{{me}, {peer} pending}}"),
        Holders::Peer => format!("{{{peer}}}"),
    }
}

fn trust(trust: Trust) -> &'static str {
    match trust {
        Trust::Inconsistent => "Inconsistent",
        Trust::Outdated => "Outdated",
        Trust::UpToDate => "UpToDate",
    }
}

fn verdict(bytes: &[u8]) -> &'static str {
    match bytes.first() {
        Some(1) => "in sync",
        Some(2) => "idle",
        Some(3) => "I am source",
        Some(4) => "I am target",
        Some(5) => "refused",
        _ => "that cannot be read",
    }
}

/// Bytes in the largest binary multiple that is exact.
pub(super) fn size(bytes: u64) -> String {
    match [(30, "G"), (20, "M"), (10, "K")]
        .into_iter()
        .find(|(shift, _)| bytes != 0 && bytes.is_multiple_of(1 << shift))
    {
        Some((shift, unit)) => format!("{}{unit}", bytes >> shift),
        None => bytes.to_string(),
    }
}

pub(super) fn range(range: ByteRange) -> String {
    format!("{}..{}", size(range.start), size(range.end))
}

/// The values of a range, one for each run of sectors with the same.
pub(super) fn values(stamps: &[u64]) -> Vec<String> {
    stamps
        .chunk_by(|one, next| one == next)
        .map(|run| match run[0] {
            0 => "-".to_owned(),
            LEFTOVER => "?".to_owned(),
            request => format!("#{request}"),
        })
        .collect()
}

/// The same for a line, shortened if need be.
pub(super) fn listed(stamps: &[u64]) -> String {
    let mut values = values(stamps);
    if values.len() > MOST_VALUES {
        values.truncate(MOST_VALUES);
        values.push("…".to_owned());
    }
    values.join(" ")
}

/// Sectors as ranges of bytes.
pub(super) fn runs(sectors: &[u64]) -> String {
    sectors
        .chunk_by(|one, next| one + 1 == *next)
        .map(|run| {
            let len = run.len() as u64 * SECTOR;
            range(ByteRange::new(run[0] * SECTOR, len))
        })
        .collect::<Vec<_>>()
        .join(" ")
}
