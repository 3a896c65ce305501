//! What a run was given, as a list that can be kept, read, cut down and run again.
//!
//! The delays of disks and of the link are not in the list: they come from the seed. So a list
//! that was not changed does what the recorded run did, and one that was cut down may meet other
//! delays.

use super::client::Ask;
use super::cluster::BEGINNING;
use super::options::Options;
use super::stimulus::Stimulus;
use super::text::{Text, number};
use crate::limits::{MAX_PAYLOAD, SECTOR};
use crate::types::Time;
use std::fmt;
use std::rc::Rc;
use std::str::FromStr;
use std::time::Duration;

/// A stimulus and when it happens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Step {
    pub at: Time,
    pub stimulus: Stimulus,
}

/// The options of a run and all its stimuli. Its text is a script for `kagami sim --replay`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Recording {
    /// What the seed derived, or what a script says instead.
    pub options: Options,
    pub(super) steps: Vec<Step>,
}

/// Where the stimuli of a run come from.
pub(super) enum Source {
    /// The seed draws them; these were drawn so far.
    Drawn(Vec<Step>),
    /// A list; those from `next` on have not happened yet.
    Listed { steps: Rc<[Step]>, next: usize },
}

impl Source {
    /// Something is done to the cluster.
    pub fn note(&mut self, at: Time, stimulus: Stimulus) {
        if let Source::Drawn(steps) = self {
            steps.push(Step { at, stimulus });
        }
    }

    pub fn is_drawn(&self) -> bool {
        matches!(self, Source::Drawn(_))
    }

    /// When the list has something to do next.
    pub fn next_at(&self) -> Option<Time> {
        match self {
            Source::Drawn(_) => None,
            Source::Listed { steps, next } => steps.get(*next).map(|step| step.at),
        }
    }

    /// Takes what the list wants done by now.
    pub fn due(&mut self, now: Time) -> Option<Stimulus> {
        let Source::Listed { steps, next } = self else {
            return None;
        };
        let step = steps.get(*next).filter(|step| step.at <= now)?;
        *next += 1;
        Some(step.stimulus)
    }
}

impl Recording {
    /// How many stimuli there are.
    pub fn len(&self) -> usize {
        self.steps.len()
    }

    /// Whether nothing is ever done.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Completes the list of a run that broke a rule after `virtual_time`: what was to come later
    /// goes, and the storm ends.
    pub(super) fn end_storm(&mut self, virtual_time: Duration) {
        let end = BEGINNING.after(virtual_time);
        self.steps.retain(|step| step.at <= end);
        if !self
            .steps
            .iter()
            .any(|step| step.stimulus == Stimulus::Calm)
        {
            self.steps.push(Step {
                at: end.after(Duration::from_millis(1)),
                stimulus: Stimulus::Calm,
            });
        }
    }

    /// The list, from its beginning.
    pub(super) fn source(&self) -> Source {
        Source::Listed {
            steps: self.steps.as_slice().into(),
            next: 0,
        }
    }

    /// What a run needs in order to be one. A list made by a run has it all; text may not.
    fn check(&self) -> Result<(), (usize, String)> {
        let sectors = self.options.layout().data_size / SECTOR;
        let mut calm = false;
        let mut last = Time(0);
        for (index, step) in self.steps.iter().enumerate() {
            let wrong = |problem: &str| Err((index, problem.to_owned()));
            if step.at < last {
                return wrong("an earlier time than the stimulus before it has");
            }
            last = step.at;
            match step.stimulus {
                Stimulus::Calm if calm => return wrong("`calm` a second time"),
                Stimulus::Calm => calm = true,
                Stimulus::Guest(ask) => check_ask(ask, sectors).map_err(|text| (index, text))?,
                _ if calm => return wrong("only guests do anything after `calm`"),
                _ => {}
            }
        }
        match calm {
            true => Ok(()),
            false => Err((
                self.steps.len(),
                "a script ends its storm with `calm`".to_owned(),
            )),
        }
    }
}

fn check_ask(ask: Ask, sectors: u64) -> Result<(), String> {
    let payload = u64::from(MAX_PAYLOAD) / SECTOR;
    let (start, count, most) = match ask {
        Ask::Read { start, count } | Ask::Write { start, count, .. } => (start, count, payload),
        Ask::Zero { start, count, .. } => (start, count, sectors),
        Ask::Flush => return Ok(()),
    };
    if count == 0 || count > most {
        Err(format!(
            "a request of {count} sectors; 1 to {most} are possible"
        ))
    } else if start >= sectors || count > sectors - start {
        Err(format!("a request beyond the disk's {sectors} sectors"))
    } else {
        Ok(())
    }
}

impl fmt::Display for Recording {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.options)?;
        for step in &self.steps {
            writeln!(f, "{} {}", clock(step.at), step.stimulus)?;
        }
        Ok(())
    }
}

/// A time of the run in seconds, as the trace counts them.
fn clock(at: Time) -> String {
    let (seconds, nanos) = (at.0 / 1_000_000_000, at.0 % 1_000_000_000);
    let fraction = format!("{nanos:09}");
    let digits = fraction.trim_end_matches('0').len().max(1);
    format!("{seconds}.{}s", &fraction[..digits])
}

/// Why a text is no script: the line, counted from 1, and the reason.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct ScriptError {
    /// Which line.
    pub line: usize,
    /// What is wrong with it.
    pub problem: String,
}

impl FromStr for Recording {
    type Err = ScriptError;

    /// First `seed N`, then options that differ from what it derives, then stimuli.
    fn from_str(text: &str) -> Result<Recording, ScriptError> {
        let mut recording: Option<Recording> = None;
        let mut lines = Vec::new();
        let at = |line: usize| move |problem: String| ScriptError { line, problem };
        for (index, line) in text.lines().enumerate() {
            let line_number = index + 1;
            let words: Vec<&str> = line
                .split_whitespace()
                .take_while(|word| !word.starts_with('#'))
                .collect();
            if !words.is_empty() {
                parse_line(&mut recording, &words).map_err(at(line_number))?;
                let steps = recording.as_ref().map_or(0, Recording::len);
                lines.resize(steps, line_number);
            }
        }
        let end = text.lines().count().max(1);
        let recording =
            recording.ok_or_else(|| at(end)("a script begins with `seed NUMBER`".to_owned()))?;
        recording
            .check()
            .map_err(|(index, problem)| at(lines.get(index).copied().unwrap_or(end))(problem))?;
        Ok(recording)
    }
}

fn parse_line(recording: &mut Option<Recording>, words: &[&str]) -> Result<(), String> {
    let is_time = |word: &str| word.starts_with(|c: char| c.is_ascii_digit());
    match (recording.as_mut(), words) {
        (None, ["seed", seed]) => {
            *recording = Some(Recording {
                options: Options::derive(number(seed)?),
                steps: Vec::new(),
            });
            Ok(())
        }
        (None, _) => Err("a script begins with `seed NUMBER`".to_owned()),
        (Some(recording), [time, stimulus @ ..]) if is_time(time) => {
            let at = Time(Duration::from_text(time)?.as_nanos() as u64);
            let stimulus = Stimulus::parse(stimulus)?;
            recording.steps.push(Step { at, stimulus });
            Ok(())
        }
        (Some(recording), [name, value]) if recording.steps.is_empty() => {
            recording.options.set(name, value)
        }
        (Some(recording), [name, _]) if recording.options.has(name) => {
            Err("options stand before the first stimulus".to_owned())
        }
        _ => Err(format!(
            "`{}` is neither an option with its value nor a time with a stimulus",
            words.join(" ")
        )),
    }
}

#[cfg(test)]
mod tests;
