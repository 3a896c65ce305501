//! Cells of the handshake's truth table: the facts of both sides in, the verdict seen from both
//! sides out.

use super::parse::bytes;
use crate::node::handshake::{Verdict, decide};
use crate::types::{
    ArbiterId, DiskState, Generation, GenerationId, Holders, MirrorId, ReplicaId, Role,
};
use crate::wire::VERSIONS;
use crate::wire::message::Hello;

/// What one side says of itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Facts {
    text: String,
    hello: Hello,
}

/// Reads one side of a row: a generation, and whatever is not as it usually is.
pub(super) fn facts(side: usize, text: &str) -> Result<Facts, String> {
    let mut words = text.split_whitespace();
    let history = words.next().ok_or("a side begins with its generation")?;
    let mut hello = usual(side as u128 + 1);
    if history == "unborn" {
        hello.generation = Generation::UNBORN;
        hello.ancestry.clear();
        hello.disk = DiskState::Inconsistent;
        hello.holders = Holders::Nobody;
        hello.mirror_size = 0;
        hello.mirror = MirrorId::NONE;
        hello.peer_replica = ReplicaId::NONE;
    } else {
        (hello.generation, hello.ancestry) = read_history(history)?;
    }
    for word in words {
        apply(&mut hello, word)?;
    }
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    Ok(Facts { text, hello })
}

/// A replica that was in sync with its peer, and whose daemon has restarted since.
fn usual(replica: u128) -> Hello {
    Hello {
        versions: VERSIONS,
        cluster: "c".into(),
        mirror_name: "r0".into(),
        node: "n".into(),
        mirror: MirrorId(1),
        replica: ReplicaId(replica),
        peer_replica: ReplicaId(3 - replica),
        arbiter: ArbiterId::NONE,
        data_size: 8 << 20,
        mirror_size: 8 << 20,
        generation: Generation::UNBORN,
        ancestry: Vec::new(),
        unused_ancestors: 0,
        holders: Holders::Both,
        disk: DiskState::Consistent,
        role: Role::Secondary,
        was_primary: false,
        used: true,
        stayed_up: false,
        discard: false,
        dirty_bytes: 0,
    }
}

fn apply(hello: &mut Hello, word: &str) -> Result<(), String> {
    match word {
        "sole" => hello.holders = Holders::Sole,
        "widening" => hello.holders = Holders::Widening,
        "peer-holds" => hello.holders = Holders::Peer,
        "inconsistent" => hello.disk = DiskState::Inconsistent,
        "outdated" => hello.disk = DiskState::Outdated,
        "up-to-date" => hello.disk = DiskState::UpToDate,
        "primary" => hello.role = Role::Primary,
        "was-primary" => hello.was_primary = true,
        "unused" => hello.used = false,
        "stayed-up" => hello.stayed_up = true,
        "discard" => hello.discard = true,
        "dirty" => hello.dirty_bytes = 4096,
        "arbitrated" => hello.arbiter = ArbiterId(1),
        word => return assign(hello, word),
    }
    Ok(())
}

fn assign(hello: &mut Hello, word: &str) -> Result<(), String> {
    let unknown = || format!("`{word}` is no fact");
    let (name, value) = word.split_once('=').ok_or_else(unknown)?;
    let number = bytes(value).ok_or_else(unknown)?;
    match name {
        "replica" => hello.replica = ReplicaId(number.into()),
        "met" => hello.peer_replica = ReplicaId(number.into()),
        "pair" => hello.mirror = MirrorId(number.into()),
        "mirrored" => hello.mirror_size = number,
        "disk" => hello.data_size = number,
        "unused-ancestors" => hello.unused_ancestors = number.try_into().map_err(|_| unknown())?,
        _ => return Err(unknown()),
    }
    Ok(())
}

/// `g3` descends from g2 and g1; `g3'` is another generation of the same count; `g9<g4` descends
/// from g4 alone.
fn read_history(text: &str) -> Result<(Generation, Vec<Generation>), String> {
    let mut named = text.split('<').map(generation);
    let first = named.next().unwrap_or_else(|| generation(text))?;
    let mut ancestry = named.collect::<Result<Vec<_>, _>>()?;
    if !text.contains('<') {
        ancestry = (1..first.counter)
            .rev()
            .map(|count| numbered(count, 0))
            .collect();
    }
    Ok((first, ancestry))
}

fn generation(name: &str) -> Result<Generation, String> {
    let count = name.trim_end_matches('\'');
    let rivals = (name.len() - count.len()) as u128;
    count
        .strip_prefix('g')
        .and_then(|count| count.parse().ok())
        .map(|count| numbered(count, rivals))
        .ok_or_else(|| format!("`{name}` is no generation; they are called `g2`, `g2'`"))
}

fn numbered(counter: u64, rivals: u128) -> Generation {
    Generation {
        counter,
        id: GenerationId(u128::from(counter) << 96 | 1 << 64 | rivals),
    }
}

/// The rows as a table, and the rows that the two sides read differently.
pub(super) fn table(rows: &[[Facts; 2]]) -> (Vec<String>, Vec<String>) {
    let width = |side: usize| {
        let longest = rows.iter().map(|row| row[side].text.len()).max();
        longest.unwrap_or(0).max(1)
    };
    let widths = [width(0), width(1)];
    let mut lines = Vec::new();
    let mut violations = Vec::new();
    for [a, b] in rows {
        let verdicts = [decide(&a.hello, &b.hello), decide(&b.hello, &a.hello)];
        lines.push(format!(
            "{:<wa$} | {:<wb$} | a {:<30} | b {}",
            a.text,
            b.text,
            spelled(verdicts[0]),
            spelled(verdicts[1]),
            wa = widths[0],
            wb = widths[1],
        ));
        if verdicts[0].mirrored() != verdicts[1] {
            violations.push(format!(
                "{} | {}: the two sides read it differently",
                a.text, b.text
            ));
        }
    }
    (lines, violations)
}

fn spelled(verdict: Verdict) -> String {
    let whole = |whole| if whole { ", every block" } else { "" };
    match verdict {
        Verdict::InSync => "in sync".to_owned(),
        Verdict::Idle(id) => format!("idle: {id:?}"),
        Verdict::Source { whole: w } => format!("is source{}", whole(w)),
        Verdict::Target { whole: w } => format!("is target{}", whole(w)),
        Verdict::Refuse(id) => format!("refuses: {id:?}"),
    }
}
