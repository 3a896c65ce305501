//! The text of a script: prose, blocks of commands, and the golden output under each block.

use super::cells::{Facts, facts};
use crate::limits::SECTOR;
use crate::node::boundary::{self, PrimaryMode};
use crate::sim::verify::{VERIFY, VERIFY_AND_REPAIR, VERIFY_ON};
use crate::types::{ByteRange, CopyRates};
use std::fmt;
use std::num::NonZeroU64;
use std::time::Duration;

/// Between the commands of a block and its output.
pub(super) const RULE: &str = "----";

/// Why a script cannot be run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ScriptError {
    /// The script's file.
    pub file: String,
    /// The line, from 1.
    pub line: usize,
    /// What is wrong with it.
    pub cause: String,
}

impl fmt::Display for ScriptError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file, self.line, self.cause)
    }
}

impl std::error::Error for ScriptError {}

/// A part of a script.
#[derive(Debug)]
pub(super) enum Piece {
    /// A line for the reader.
    Prose(String),
    /// Commands; the golden output is not kept, because the run prints its own.
    Block(Vec<Step>),
}

/// A command and where it is.
#[derive(Debug)]
pub(super) struct Step {
    pub line: usize,
    /// As it was written, with the rows that belong to it.
    pub text: String,
    pub command: Command,
}

/// One of the two machines, as an index.
pub(super) type Host = usize;

/// A kind of disk operation that can be held back or fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Part {
    Reads,
    Writes,
    Flushes,
    Metadata,
}

/// Something that can be held back and let go.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Channel {
    Disk(Host, Part),
    /// Frames from this host to the other, from the first of the named type on.
    Link {
        from: Host,
        first: Option<String>,
    },
}

/// Which of the writes that are not durable survive a loss of power or of the process.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Kept {
    None,
    All,
    /// Those of these requests.
    These(Vec<u64>),
}

/// What a guest asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Ask {
    Read(ByteRange),
    Write {
        range: ByteRange,
        fua: bool,
    },
    Zero {
        range: ByteRange,
        may_unmap: bool,
        fua: bool,
    },
    Flush,
}

/// Where data is looked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum View {
    /// As a guest reads it.
    Guest,
    /// As the disk reads, cache included.
    Disk,
    /// As the disk would read after a loss of power that keeps nothing.
    Durable,
}

/// How far a guest's request is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Progress {
    Waiting,
    Acknowledged,
    Failed,
}

/// What must be so at this point of the story.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Expectation {
    /// The values found in a range, one for each run.
    Data {
        host: Host,
        view: View,
        range: ByteRange,
        values: Vec<String>,
    },
    Request(u64, Progress),
    /// A word about a node that its status shows, or does not show.
    Is {
        host: Host,
        word: String,
        so: bool,
    },
    /// How the node answered its operator last; `None` for success.
    Answer(Host, Option<String>),
    /// Both disks read alike.
    Identical,
    /// What the arbiter's register holds, as `{a} g2` or `nothing`.
    Register(String),
}

/// Who guards the right to go on alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Arbitration {
    Nobody,
    Arbiter,
}

/// A part of the way to the arbiter and back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Leg {
    Requests,
    /// Requests that may change the register.
    Swaps,
    Replies,
}

/// What can be done with the arbiter.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum ArbiterStep {
    Show,
    Unreachable(Vec<Host>),
    Reachable(Vec<Host>),
    Hold(Leg, Vec<Host>),
    /// Holds nothing back any more, and delivers what was.
    Release,
    /// Lets this many held messages through, or all.
    Deliver(Option<usize>),
    /// Holds nothing more, and keeps what was.
    Keep,
    /// Loses what is held.
    Lose,
    Wipe,
}

/// What a script can do.
/// What a story begins with.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Beginning {
    /// Bytes of each disk.
    pub sizes: [u64; 2],
    pub arbitration: Arbitration,
    pub copy_rates: CopyRates,
}

#[derive(Clone, PartialEq, Debug)]
pub(super) enum Command {
    Create(Beginning),
    Quiet,
    /// A request, or the same one at several places in turn.
    Guest(Host, Vec<Ask>),
    Operator(Host, boundary::Command),
    Hold(Channel),
    Release(Channel),
    Keep(Host, Part),
    /// Lets this many held frames through, or all.
    Deliver(Host, Option<usize>),
    /// Loses this many held frames, or all.
    Lose(Host, Option<usize>),
    /// The connection breaks; one side alone may learn of it.
    Cut(Option<Host>),
    Join,
    Kill(Host, Kept),
    PowerOff(Host, Kept),
    Start(Host),
    Replace(Host),
    Fail(Host, Part),
    Heal(Host),
    Pass(Duration),
    Status,
    Disk(Host, ByteRange),
    /// What is on a disk changes at rest.
    Rot(Host, ByteRange),
    Arbiter(ArbiterStep),
    Expect(Expectation),
    Cells(Vec<[Facts; 2]>),
}

/// Cuts a script into its pieces.
pub(super) fn parse(file: &str, text: &str) -> Result<Vec<Piece>, ScriptError> {
    let mut pieces = Vec::new();
    let mut lines = text.lines().enumerate().map(|(at, line)| (at + 1, line));
    while let Some((number, line)) = lines.next() {
        if is_prose(line) {
            pieces.push(Piece::Prose(line.to_owned()));
            continue;
        }
        let mut steps = vec![(number, line.to_owned())];
        loop {
            match lines.next() {
                Some((_, RULE)) => break,
                Some((_, row)) if row.starts_with(' ') => {
                    if let Some((_, text)) = steps.last_mut() {
                        *text = format!("{text}\n{row}");
                    }
                }
                Some((number, line)) if !is_prose(line) => steps.push((number, line.to_owned())),
                _ => {
                    let cause = format!("commands without the line `{RULE}` below them");
                    return Err(at(file, number, cause));
                }
            }
        }
        let steps = steps
            .into_iter()
            .map(|(line, text)| step(file, line, text))
            .collect::<Result<_, _>>()?;
        pieces.push(Piece::Block(steps));
        // The golden output ends with an empty line.
        for (_, line) in lines.by_ref() {
            if line.is_empty() {
                pieces.push(Piece::Prose(String::new()));
                break;
            }
        }
    }
    Ok(pieces)
}

fn is_prose(line: &str) -> bool {
    line.is_empty() || line.starts_with('#')
}

fn at(file: &str, line: usize, cause: String) -> ScriptError {
    ScriptError {
        file: file.to_owned(),
        line,
        cause,
    }
}

fn step(file: &str, line: usize, text: String) -> Result<Step, ScriptError> {
    let command = command(&text).map_err(|cause| at(file, line, cause))?;
    Ok(Step {
        line,
        text,
        command,
    })
}

fn command(text: &str) -> Result<Command, String> {
    let (first, rows) = text.split_once('\n').unwrap_or((text, ""));
    let mut words = Words(first.split_whitespace().collect());
    let verb = words.next("a command")?;
    if verb == "cells" {
        words.end()?;
        return rows
            .lines()
            .map(row)
            .collect::<Result<_, _>>()
            .map(Command::Cells);
    }
    if !rows.is_empty() {
        return Err(format!("`{verb}` has no rows below it"));
    }
    let command = match verb {
        "create" => create(&mut words)?,
        "quiet" => Command::Quiet,
        "read" | "write" | "zero" | "trim" | "flush" => guest(verb, &mut words)?,
        "hold" => Command::Hold(words.channel()?),
        "release" => Command::Release(words.channel()?),
        "keep" => Command::Keep(words.host()?, words.part()?),
        "deliver" => Command::Deliver(words.direction()?, words.count()?),
        "lose" => Command::Lose(words.direction()?, words.count()?),
        "cut" if words.is_empty() => Command::Cut(None),
        "cut" => {
            words.exactly("at")?;
            Command::Cut(Some(words.host()?))
        }
        "join" => Command::Join,
        "kill" => Command::Kill(words.host()?, words.kept()?),
        "power-off" => Command::PowerOff(words.host()?, words.kept()?),
        "start" => Command::Start(words.host()?),
        "replace" => Command::Replace(words.host()?),
        "fail" => Command::Fail(words.host()?, words.part()?),
        "heal" => Command::Heal(words.host()?),
        "pass" => Command::Pass(words.span()?),
        "status" => Command::Status,
        "disk" => Command::Disk(words.host()?, words.range()?),
        "rot" => Command::Rot(words.host()?, words.range()?),
        "arbiter" => Command::Arbiter(arbiter(&mut words)?),
        "expect" => Command::Expect(expectation(&mut words)?),
        verb => operator(verb, &mut words)?,
    };
    words.end()?;
    Ok(command)
}

fn create(words: &mut Words<'_>) -> Result<Command, String> {
    let size = words.bytes("the size of a disk")?;
    let mut beginning = Beginning {
        sizes: [size; 2],
        arbitration: Arbitration::Nobody,
        copy_rates: CopyRates::default(),
    };
    while !words.is_empty() {
        if words.flag("arbitrated") {
            beginning.arbitration = Arbitration::Arbiter;
        } else if words.flag("max-rate") {
            beginning.copy_rates.max = NonZeroU64::new(words.bytes("bytes per second")?);
        } else if words.flag("min-rate") {
            beginning.copy_rates.min = NonZeroU64::new(words.bytes("bytes per second")?);
        } else {
            beginning.sizes[1] = words.bytes("the size of b's disk")?;
        }
    }
    Ok(Command::Create(beginning))
}

fn arbiter(words: &mut Words<'_>) -> Result<ArbiterStep, String> {
    Ok(match words.next("what becomes of the arbiter")? {
        "show" => ArbiterStep::Show,
        "unreachable" => ArbiterStep::Unreachable(words.hosts("from")?),
        "reachable" => ArbiterStep::Reachable(words.hosts("from")?),
        "hold" => {
            let leg = match words.next("`requests`, `swaps` or `replies`")? {
                "requests" => Leg::Requests,
                "swaps" => Leg::Swaps,
                "replies" => Leg::Replies,
                other => return Err(format!("`{other}` cannot be held")),
            };
            ArbiterStep::Hold(leg, words.hosts("of")?)
        }
        "release" => ArbiterStep::Release,
        "deliver" => ArbiterStep::Deliver(words.count()?),
        "keep" => ArbiterStep::Keep,
        "lose" => ArbiterStep::Lose,
        "wipe" => ArbiterStep::Wipe,
        other => return Err(format!("the arbiter cannot `{other}`")),
    })
}

fn guest(verb: &str, words: &mut Words<'_>) -> Result<Command, String> {
    let host = words.host()?;
    let asks = match verb {
        "flush" => vec![Ask::Flush],
        "read" => vec![Ask::Read(words.range()?)],
        verb => {
            let first = words.range()?;
            let fua = words.flag("fua");
            let change = |range| match verb {
                "write" => Ask::Write { range, fua },
                verb => Ask::Zero {
                    range,
                    may_unmap: verb == "trim",
                    fua,
                },
            };
            words.repeated(first)?.into_iter().map(change).collect()
        }
    };
    Ok(Command::Guest(host, asks))
}

fn operator(verb: &str, words: &mut Words<'_>) -> Result<Command, String> {
    use boundary::Command::*;
    if !OPERATOR_VERBS.contains(&verb) {
        return Err(format!("no command `{verb}`"));
    }
    let host = words.host()?;
    let what = match verb {
        "primary" => Primary(match words.option() {
            None => PrimaryMode::Ordinary,
            Some("--initial") => PrimaryMode::Initial,
            Some("--initial-assume-clean") => PrimaryMode::InitialAssumeClean,
            Some("--force") => PrimaryMode::Force,
            Some(other) => return Err(format!("no way to be Primary: `{other}`")),
        }),
        "secondary" => Secondary,
        "connect" => Connect {
            discard_my_data: words.flag("--discard-my-data"),
        },
        "disconnect" => Disconnect,
        "invalidate" => Invalidate,
        "compare-first" => CompareFirst,
        "pause-resync" => PauseResync,
        "resume-resync" => ResumeResync,
        "verify" => match words.option() {
            None => VERIFY,
            Some("--repair") => VERIFY_AND_REPAIR,
            Some("--resume") => VERIFY_ON,
            Some("--stop") => StopVerify,
            Some(other) => return Err(format!("no way to verify: `{other}`")),
        },
        _ => Down,
    };
    Ok(Command::Operator(host, what))
}

const OPERATOR_VERBS: [&str; 10] = [
    "primary",
    "secondary",
    "connect",
    "disconnect",
    "invalidate",
    "compare-first",
    "pause-resync",
    "resume-resync",
    "verify",
    "down",
];

fn expectation(words: &mut Words<'_>) -> Result<Expectation, String> {
    let view = match words.peek() {
        Some("identical") => {
            words.exactly("identical")?;
            return Ok(Expectation::Identical);
        }
        Some("register") => {
            words.exactly("register")?;
            return Ok(Expectation::Register(words.rest().join(" ")));
        }
        Some("read") => View::Guest,
        Some("disk") => View::Disk,
        Some("durable") => View::Durable,
        Some(word) if word.starts_with('#') => {
            let request = words.request()?;
            let progress = match words.next("how far the request is")? {
                "waiting" => Progress::Waiting,
                "acknowledged" => Progress::Acknowledged,
                "failed" => Progress::Failed,
                other => return Err(format!("a request is never `{other}`")),
            };
            return Ok(Expectation::Request(request, progress));
        }
        _ => return about_node(words),
    };
    words.next("a view")?;
    let (host, range) = (words.host()?, words.range()?);
    let values = words.rest();
    if values.is_empty() {
        return Err("which values are expected there?".to_owned());
    }
    Ok(Expectation::Data {
        host,
        view,
        range,
        values,
    })
}

fn about_node(words: &mut Words<'_>) -> Result<Expectation, String> {
    let host = words.host()?;
    match words.next("`is`, `done` or `refused`")? {
        "done" => Ok(Expectation::Answer(host, None)),
        "refused" => {
            let why = words.next("the name of the error")?.to_owned();
            Ok(Expectation::Answer(host, Some(why)))
        }
        "is" => {
            let so = !words.flag("not");
            let word = words.next("a state")?.to_owned();
            Ok(Expectation::Is { host, word, so })
        }
        other => Err(format!("`{other}` says nothing of a node")),
    }
}

/// A row of `cells`: the facts of both sides.
fn row(text: &str) -> Result<[Facts; 2], String> {
    let sides = text.split_once('|').ok_or("a row has two sides, `A | B`")?;
    Ok([facts(0, sides.0)?, facts(1, sides.1)?])
}

/// The words of a command that were not looked at yet.
struct Words<'a>(std::collections::VecDeque<&'a str>);

impl<'a> Words<'a> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn peek(&self) -> Option<&'a str> {
        self.0.front().copied()
    }

    fn option(&mut self) -> Option<&'a str> {
        self.0.pop_front()
    }

    fn next(&mut self, what: &str) -> Result<&'a str, String> {
        self.0
            .pop_front()
            .ok_or_else(|| format!("{what} is missing"))
    }

    fn rest(&mut self) -> Vec<String> {
        self.0.drain(..).map(str::to_owned).collect()
    }

    fn end(&self) -> Result<(), String> {
        match self.peek() {
            None => Ok(()),
            Some(word) => Err(format!("`{word}` is too much")),
        }
    }

    fn exactly(&mut self, word: &str) -> Result<(), String> {
        match self.next(word)? {
            found if found == word => Ok(()),
            found => Err(format!("`{found}` where `{word}` is expected")),
        }
    }

    fn flag(&mut self, word: &str) -> bool {
        let there = self.peek() == Some(word);
        if there {
            self.0.pop_front();
        }
        there
    }

    fn host(&mut self) -> Result<Host, String> {
        host(self.next("a node, `a` or `b`")?)
    }

    /// `from a`, or nothing for both.
    fn hosts(&mut self, preposition: &str) -> Result<Vec<Host>, String> {
        if self.is_empty() {
            return Ok(vec![0, 1]);
        }
        self.exactly(preposition)?;
        Ok(vec![self.host()?])
    }

    fn direction(&mut self) -> Result<Host, String> {
        let word = self.next("a direction, `a->b` or `b->a`")?;
        direction(word).ok_or_else(|| format!("`{word}` is no direction"))
    }

    fn channel(&mut self) -> Result<Channel, String> {
        match self.peek().and_then(direction) {
            Some(from) => {
                self.0.pop_front();
                let first = self.option().map(str::to_owned);
                Ok(Channel::Link { from, first })
            }
            None => Ok(Channel::Disk(self.host()?, self.part()?)),
        }
    }

    fn part(&mut self) -> Result<Part, String> {
        match self.next("`disk-reads`, `disk-writes`, `flushes` or `metadata`")? {
            "disk-reads" => Ok(Part::Reads),
            "disk-writes" => Ok(Part::Writes),
            "flushes" => Ok(Part::Flushes),
            "metadata" => Ok(Part::Metadata),
            other => Err(format!("a disk has no `{other}`")),
        }
    }

    fn count(&mut self) -> Result<Option<usize>, String> {
        self.option()
            .map(|word| word.parse().map_err(|_| format!("`{word}` is no number")))
            .transpose()
    }

    fn bytes(&mut self, what: &str) -> Result<u64, String> {
        let word = self.next(what)?;
        bytes(word).ok_or_else(|| format!("`{word}` is no number of bytes"))
    }

    fn range(&mut self) -> Result<ByteRange, String> {
        let start = self.bytes("where it begins")?;
        let len = self.bytes("how long it is")?;
        if start % SECTOR != 0 || len % SECTOR != 0 || len == 0 {
            return Err(format!("a range is made of sectors of {SECTOR} bytes"));
        }
        Ok(ByteRange::new(start, len))
    }

    /// `1000 times every 4M`, or nothing for once.
    fn repeated(&mut self, first: ByteRange) -> Result<Vec<ByteRange>, String> {
        let Some(count) = self.peek().and_then(|word| word.parse().ok()) else {
            return Ok(vec![first]);
        };
        self.0.pop_front();
        self.exactly("times")?;
        self.exactly("every")?;
        let distance = self.bytes("how far apart")?;
        let at = |n: usize| ByteRange::new(first.start + n as u64 * distance, first.len());
        Ok((0..count).map(at).collect())
    }

    fn request(&mut self) -> Result<u64, String> {
        request(self.next("a request, `#1`")?)
    }

    fn kept(&mut self) -> Result<Kept, String> {
        let Some(word) = self.option() else {
            return Ok(Kept::None);
        };
        match word.strip_prefix("keep=") {
            Some("none") => Ok(Kept::None),
            Some("all") => Ok(Kept::All),
            Some(list) => list
                .split(',')
                .map(request)
                .collect::<Result<_, _>>()
                .map(Kept::These),
            None => Err(format!("`{word}` is not `keep=…`")),
        }
    }

    fn span(&mut self) -> Result<Duration, String> {
        let word = self.next("how long")?;
        let parse = |number: &str| number.parse().ok();
        let span = match (word.strip_suffix("ms"), word.strip_suffix('s')) {
            (Some(number), _) => parse(number).map(Duration::from_millis),
            (None, Some(number)) => parse(number).map(Duration::from_secs),
            (None, None) => None,
        };
        span.ok_or_else(|| format!("`{word}` is no time; `500ms`, `2s`"))
    }
}

fn host(word: &str) -> Result<Host, String> {
    match word {
        "a" => Ok(0),
        "b" => Ok(1),
        other => Err(format!("`{other}` is no node; they are `a` and `b`")),
    }
}

fn direction(word: &str) -> Option<Host> {
    match word {
        "a->b" => Some(0),
        "b->a" => Some(1),
        _ => None,
    }
}

fn request(word: &str) -> Result<u64, String> {
    word.strip_prefix('#')
        .and_then(|number| number.parse().ok())
        .ok_or_else(|| format!("`{word}` is no request; they are called `#1`, `#2`"))
}

/// A number of bytes, in binary multiples.
pub(super) fn bytes(word: &str) -> Option<u64> {
    let (number, shift) = match word.strip_suffix(['K', 'M', 'G']) {
        Some(number) if word.ends_with('K') => (number, 10),
        Some(number) if word.ends_with('M') => (number, 20),
        Some(number) => (number, 30),
        None => (word, 0),
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}
