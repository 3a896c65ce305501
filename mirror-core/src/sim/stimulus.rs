//! Everything that is done to the cluster in its storm, as values: a fault, an operator's command,
//! a guest's request. What draws them and what carries them out meet only here, so that a run can
//! be recorded, and a list of stimuli can be run instead of drawing.
//!
//! A kind of stimulus is a variant here, an arm of [`Cluster::stimulate`], and one of `write` and
//! `parse`; what it can be made simpler by is in `simpler`.

use super::client::Ask;
use super::cluster::Cluster;
use super::fault_kind::FaultKind;
use super::faults::{Crash, SLOW_DISK};
use super::host::NAMES;
use super::network::Break;
use super::text::{Text, among, number, one_of};
use super::verify::{VERIFY, VERIFY_AND_REPAIR, VERIFY_ON};
use crate::node::boundary::{Command, PrimaryMode};
use std::fmt;
use std::time::Duration;

/// Something done to the cluster, with everything that was drawn for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stimulus {
    /// A daemon ends, and is started again after `down`.
    Crash {
        host: usize,
        kind: Crash,
        down: Duration,
    },
    /// The link breaks, and no connection is made for `outage`.
    Cut { outage: Duration },
    /// Nothing a host sends arrives for `span`.
    Silence { host: usize, span: Duration },
    /// The disk of a host is slow for `span`.
    SlowDisk { host: usize, span: Duration },
    /// The disk of a host completes no write for `span`.
    StuckDisk { host: usize, span: Duration },
    /// A rare fault of a host, its arguments drawn from `draw`.
    Rare {
        host: usize,
        kind: FaultKind,
        draw: u64,
    },
    /// A host cannot reach the arbiter for `span`.
    PartArbiter { host: usize, span: Duration },
    /// The arbiter is slow for `span`.
    LagArbiter { span: Duration },
    /// The arbiter forgets everything.
    WipeArbiter,
    /// The arbiter restarts.
    RestartArbiter,
    /// An operator decides that a disk is to be replaced when its daemon is down.
    GiveUpDisk { host: usize },
    /// An operator's command.
    Command { host: usize, what: Command },
    /// A guest's request to whoever serves.
    Guest(Ask),
    /// The storm is over: faults are lifted, and the operator heals what they left.
    Calm,
}

const COMMANDS: &[(Command, &str)] = &[
    (Command::Primary(PrimaryMode::Ordinary), "primary"),
    (Command::Primary(PrimaryMode::Initial), "primary --initial"),
    (
        Command::Primary(PrimaryMode::InitialAssumeClean),
        "primary --initial --assume-clean",
    ),
    (Command::Primary(PrimaryMode::Force), "primary --force"),
    (Command::Secondary, "secondary"),
    (
        Command::Connect {
            discard_my_data: false,
        },
        "connect",
    ),
    (
        Command::Connect {
            discard_my_data: true,
        },
        "connect --discard-my-data",
    ),
    (Command::Disconnect, "disconnect"),
    (Command::Invalidate, "invalidate"),
    (Command::CompareFirst, "resync by checksum"),
    (Command::PauseResync, "resync pause"),
    (Command::ResumeResync, "resync resume"),
    (VERIFY, "verify"),
    (VERIFY_AND_REPAIR, "verify --repair"),
    (VERIFY_ON, "verify --resume"),
    (Command::StopVerify, "verify --stop"),
    (Command::Down, "down"),
];

const CRASHES: &[(Crash, &str)] = &[(Crash::Process, "is-killed"), (Crash::Power, "loses-power")];

impl Cluster {
    /// The one way in which a drawn or listed stimulus reaches the cluster.
    pub fn stimulate(&mut self, stimulus: Stimulus) {
        self.source.note(self.now, stimulus);
        match stimulus {
            Stimulus::Crash { host, kind, down } => self.crash(host, kind, down),
            Stimulus::Cut { outage } => self.cut(outage, Break::Clean),
            Stimulus::Silence { host, span } => self.silence(host, span),
            Stimulus::SlowDisk { host, span } => self.slow_disk(host, SLOW_DISK, span),
            Stimulus::StuckDisk { host, span } => self.stick_disk(host, span),
            Stimulus::Rare { host, kind, draw } => self.rare_fault(host, kind, draw),
            Stimulus::PartArbiter { host, span } => self.part_arbiter(host, span),
            Stimulus::LagArbiter { span } => self.lag_arbiter(span),
            Stimulus::WipeArbiter => self.wipe_arbiter(),
            Stimulus::RestartArbiter => self.restart_arbiter(),
            Stimulus::GiveUpDisk { host } => self.condemn(host),
            Stimulus::Command { host, what } => {
                self.sample_custody();
                self.command(host, what);
            }
            Stimulus::Guest(ask) => self.guest_asks(ask),
            Stimulus::Calm => self.calm(),
        }
    }
}

impl fmt::Display for Stimulus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stimulus::Crash { host, kind, down } => {
                let what = one_of(CRASHES, kind);
                write!(f, "{} {what} for {}", NAMES[*host], down.to_text())
            }
            Stimulus::Cut { outage } => write!(f, "cut {}", outage.to_text()),
            Stimulus::Silence { host, span } => {
                write!(f, "{} is-silent for {}", NAMES[*host], span.to_text())
            }
            Stimulus::SlowDisk { host, span } => {
                write!(f, "{} has-slow-disk for {}", NAMES[*host], span.to_text())
            }
            Stimulus::StuckDisk { host, span } => {
                write!(f, "{} has-stuck-disk for {}", NAMES[*host], span.to_text())
            }
            Stimulus::Rare { host, kind, draw } => {
                write!(f, "{} suffers {} {draw}", NAMES[*host], kind.to_text())
            }
            Stimulus::PartArbiter { host, span } => {
                write!(f, "{} has-no-arbiter for {}", NAMES[*host], span.to_text())
            }
            Stimulus::LagArbiter { span } => write!(f, "arbiter slow {}", span.to_text()),
            Stimulus::WipeArbiter => f.write_str("arbiter wiped"),
            Stimulus::RestartArbiter => f.write_str("arbiter restarts"),
            Stimulus::GiveUpDisk { host } => {
                write!(f, "operator {} replaces-disk", NAMES[*host])
            }
            Stimulus::Command { host, what } => {
                write!(f, "operator {} {}", NAMES[*host], one_of(COMMANDS, what))
            }
            Stimulus::Guest(ask) => write!(f, "guest {ask}"),
            Stimulus::Calm => f.write_str("calm"),
        }
    }
}

impl fmt::Display for Ask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ask::Read { start, count } => write!(f, "read {start}+{count}"),
            Ask::Write { start, count, fua } => {
                write!(f, "write {start}+{count}{}", flag(*fua, " fua"))
            }
            Ask::Zero {
                start,
                count,
                unmap,
                fua,
            } => {
                let unmap = flag(*unmap, " unmap");
                write!(f, "zero {start}+{count}{unmap}{}", flag(*fua, " fua"))
            }
            Ask::Flush => f.write_str("flush"),
        }
    }
}

fn flag(set: bool, text: &str) -> &str {
    if set { text } else { "" }
}

impl Stimulus {
    /// The stimulus that prints as these words.
    pub fn parse(words: &[&str]) -> Result<Stimulus, String> {
        match words {
            ["calm"] => Ok(Stimulus::Calm),
            ["cut", outage] => Ok(Stimulus::Cut {
                outage: Duration::from_text(outage)?,
            }),
            ["arbiter", "slow", span] => Ok(Stimulus::LagArbiter {
                span: Duration::from_text(span)?,
            }),
            ["arbiter", "wiped"] => Ok(Stimulus::WipeArbiter),
            ["arbiter", "restarts"] => Ok(Stimulus::RestartArbiter),
            ["guest", ask @ ..] => parse_ask(ask).map(Stimulus::Guest),
            ["operator", host, "replaces-disk"] => Ok(Stimulus::GiveUpDisk {
                host: parse_host(host)?,
            }),
            ["operator", host, what @ ..] => Ok(Stimulus::Command {
                host: parse_host(host)?,
                what: among(COMMANDS, &what.join(" "))?,
            }),
            [host, "suffers", kind, draw] => Ok(Stimulus::Rare {
                host: parse_host(host)?,
                kind: FaultKind::from_text(kind)?,
                draw: number(draw)?,
            }),
            [host, what, "for", span] if parse_host(host).is_ok() => {
                let (host, span) = (parse_host(host)?, Duration::from_text(span)?);
                match *what {
                    "is-silent" => Ok(Stimulus::Silence { host, span }),
                    "has-no-arbiter" => Ok(Stimulus::PartArbiter { host, span }),
                    "has-stuck-disk" => Ok(Stimulus::StuckDisk { host, span }),
                    "has-slow-disk" => Ok(Stimulus::SlowDisk { host, span }),
                    _ => Ok(Stimulus::Crash {
                        host,
                        kind: among(CRASHES, what)?,
                        down: span,
                    }),
                }
            }
            _ => Err(format!("`{}` is no stimulus", words.join(" "))),
        }
    }

    /// The same with simpler arguments, the simplest first.
    pub fn simpler(self) -> Vec<Stimulus> {
        let mut found = Vec::new();
        match self {
            Stimulus::Crash { host, kind, down } => {
                found.extend(shorter(down).map(|down| Stimulus::Crash { host, kind, down }));
            }
            Stimulus::Cut { outage } => {
                found.extend(shorter(outage).map(|outage| Stimulus::Cut { outage }));
            }
            Stimulus::Silence { host, span } => {
                found.extend(shorter(span).map(|span| Stimulus::Silence { host, span }));
            }
            Stimulus::SlowDisk { host, span } => {
                found.extend(shorter(span).map(|span| Stimulus::SlowDisk { host, span }));
            }
            Stimulus::StuckDisk { host, span } => {
                found.extend(shorter(span).map(|span| Stimulus::StuckDisk { host, span }));
            }
            Stimulus::PartArbiter { host, span } => {
                found.extend(shorter(span).map(|span| Stimulus::PartArbiter { host, span }));
            }
            Stimulus::LagArbiter { span } => {
                found.extend(shorter(span).map(|span| Stimulus::LagArbiter { span }));
            }
            Stimulus::Guest(ask) => found.extend(ask.simpler().map(Stimulus::Guest)),
            Stimulus::WipeArbiter
            | Stimulus::RestartArbiter
            | Stimulus::Rare { .. }
            | Stimulus::GiveUpDisk { .. }
            | Stimulus::Command { .. }
            | Stimulus::Calm => {}
        }
        found.retain(|candidate| *candidate != self);
        found
    }
}

/// Rounder times below this one.
fn shorter(span: Duration) -> impl Iterator<Item = Duration> {
    let millis = span.as_millis() as u64;
    [1000, 100, 10, 1]
        .into_iter()
        .map(move |unit| Duration::from_millis(millis / unit * unit))
        .filter(|candidate| !candidate.is_zero())
}

impl Ask {
    fn simpler(self) -> impl Iterator<Item = Ask> {
        let candidates = match self {
            Ask::Read { start, count } => {
                let read = move |start, count| Ask::Read { start, count };
                vec![read(0, 8), read(start / 8 * 8, 8), read(start, 8)]
                    .into_iter()
                    .filter(|_| count > 8)
                    .collect()
            }
            Ask::Write { start, count, fua } => {
                let write = move |start, count, fua| Ask::Write { start, count, fua };
                let mut list = vec![write(start, count, false)];
                if count > 8 {
                    list.extend([write(0, 8, fua), write(start / 8 * 8, 8, fua)]);
                    list.push(write(start, 8, fua));
                }
                list
            }
            Ask::Zero {
                start, count, fua, ..
            } => vec![Ask::Write { start, count, fua }]
                .into_iter()
                .filter(|_| count <= 2048)
                .collect(),
            Ask::Flush => Vec::new(),
        };
        candidates.into_iter()
    }
}

fn parse_host(word: &str) -> Result<usize, String> {
    among(&[(0, NAMES[0]), (1, NAMES[1])], word)
}

fn parse_ask(words: &[&str]) -> Result<Ask, String> {
    let unknown = || format!("`guest {}` is no request", words.join(" "));
    let [what, rest @ ..] = words else {
        return Err(unknown());
    };
    if let ("flush", []) = (*what, rest) {
        return Ok(Ask::Flush);
    }
    let [range, flags @ ..] = rest else {
        return Err(unknown());
    };
    let (start, count) = range
        .split_once('+')
        .ok_or_else(|| format!("`{range}` is no range like 64+8 (sectors)"))?;
    let (start, count) = (number(start)?, number(count)?);
    match (*what, flags) {
        ("read", []) => Ok(Ask::Read { start, count }),
        ("write", ["fua"] | []) => Ok(Ask::Write {
            start,
            count,
            fua: !flags.is_empty(),
        }),
        ("zero", ["unmap", "fua"] | ["unmap"] | ["fua"] | []) => Ok(Ask::Zero {
            start,
            count,
            unmap: flags.contains(&"unmap"),
            fua: flags.contains(&"fua"),
        }),
        _ => Err(unknown()),
    }
}
