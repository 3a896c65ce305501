//! Names of cases, as they are printed and asked for:
//! `resyncing: write,disconnect,promote/crash a@17/keep none`. Operations that begin at once are joined
//! by `+`.

use super::{Case, Crash, Loss, OPERATIONS, Operation, Pace, STARTS, Sequence, Start};
use crate::sim::disk::Kept;
use crate::sim::host::NAMES;
use crate::sim::options::Arbitration;
use std::fmt;
use std::str::FromStr;

/// What the names of cases with an arbiter begin with.
const ARBITRATED: &str = "arbitrated ";

impl Start {
    fn name(self) -> &'static str {
        match self {
            Start::InSync => "in sync",
            Start::Held => "held",
            Start::Resyncing => "resyncing",
        }
    }
}

impl Pace {
    fn sign(self) -> &'static str {
        match self {
            Pace::OneByOne => ",",
            Pace::AtOnce => "+",
        }
    }
}

impl Operation {
    fn name(self) -> &'static str {
        match self {
            Operation::Write => "write",
            Operation::Spanning => "spanning",
            Operation::Fua => "fua",
            Operation::Flush => "flush",
            Operation::Trim => "trim",
            Operation::Zero => "zero",
            Operation::Disconnect => "disconnect",
            Operation::ResyncStep => "step",
            Operation::Promote => "promote",
            Operation::Demote => "demote",
        }
    }
}

impl Loss {
    /// The kind of crash, and what is kept.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Loss::Power(Kept::Nothing) => ("crash", "/keep none"),
            Loss::Power(Kept::Everything) => ("crash", "/keep all"),
            Loss::Power(Kept::Sectors) => ("crash", "/keep sectors"),
            Loss::Power(Kept::Writes) => ("crash", "/keep writes"),
            Loss::Power(Kept::Metadata) => ("crash", "/keep metadata"),
            Loss::Killed => ("kill", ""),
        }
    }
}

impl fmt::Display for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.operations.iter().map(|step| step.name()).collect();
        if self.arbitration == Arbitration::Arbitrated {
            f.write_str(ARBITRATED)?;
        }
        write!(f, "{}: {}", self.start.name(), names.join(self.pace.sign()))
    }
}

impl fmt::Display for Crash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, kept) = self.loss.names();
        write!(f, "/{kind} {}@{}{kept}", NAMES[self.host], self.action)
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.sequence.fmt(f)?;
        self.crash.map_or(Ok(()), |crash| crash.fmt(f))
    }
}

impl FromStr for Case {
    type Err = String;

    /// Reads what [`Case`]'s `Display` writes; the start may be left away if it is `in sync`.
    fn from_str(text: &str) -> Result<Case, String> {
        let (sequence, crash) = match text.split_once('/') {
            Some((sequence, crash)) => (sequence, Some(parse_crash(crash)?)),
            None => (text, None),
        };
        let sequence = parse_sequence(sequence)?;
        Ok(Case { sequence, crash })
    }
}

fn parse_sequence(text: &str) -> Result<Sequence, String> {
    let (arbitration, text) = match text.trim().strip_prefix(ARBITRATED) {
        Some(rest) => (Arbitration::Arbitrated, rest),
        None => (Arbitration::Unarbitrated, text),
    };
    let (start, operations) = text.split_once(':').unwrap_or((Start::InSync.name(), text));
    let start = start.trim();
    let unknown = |what, word: &str, all: Vec<&str>| {
        format!("`{word}` is no {what}; there are {}", all.join(", "))
    };
    let start = STARTS
        .into_iter()
        .find(|candidate| candidate.name() == start)
        .ok_or_else(|| unknown("start", start, STARTS.map(Start::name).to_vec()))?;
    let operation = |word: &str| {
        let word = word.trim();
        let found = OPERATIONS.into_iter().find(|known| known.name() == word);
        found.ok_or_else(|| unknown("operation", word, OPERATIONS.map(Operation::name).to_vec()))
    };
    let pace = match operations.contains(Pace::AtOnce.sign()) {
        true => Pace::AtOnce,
        false => Pace::OneByOne,
    };
    let operations = operations
        .split(pace.sign())
        .map(operation)
        .collect::<Result<_, _>>()?;
    Ok(Sequence {
        arbitration,
        start,
        pace,
        operations,
    })
}

fn parse_crash(text: &str) -> Result<Crash, String> {
    for loss in super::LOSSES {
        let (kind, kept) = loss.names();
        let place = text
            .strip_prefix(kind)
            .and_then(|rest| rest.strip_suffix(kept))
            .and_then(|place| place.trim().split_once('@'));
        if let Some((node, action)) = place
            && let Some(host) = NAMES.iter().position(|name| *name == node)
            && let Ok(action) = action.parse()
        {
            return Ok(Crash { host, action, loss });
        }
    }
    Err(format!(
        "`{text}` is no crash; one reads `crash a@17/keep none` (or `all`, `sectors`, `writes`, \
         `metadata`), \
         or `kill b@3`"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for text in [
            "in sync: write",
            "held: spanning,step,flush/crash a@17/keep none",
            "resyncing: fua,trim/crash b@1/keep sectors",
            "in sync: disconnect,promote,demote/kill b@204",
            "held: write+disconnect/kill a@2",
        ] {
            let case: Case = text.parse().expect(text);
            assert_eq!(case.to_string(), text);
        }
        let short: Case = "write,zero/crash a@2/keep all".parse().expect("a case");
        assert_eq!(short.to_string(), "in sync: write,zero/crash a@2/keep all");
        for text in [
            "",
            "paint",
            "write/crash c@1/keep none",
            "write/crash a@1/keep some",
        ] {
            assert!(text.parse::<Case>().is_err(), "{text}");
        }
    }
}
