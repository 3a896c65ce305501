//! What happened, as a hash of every event and, when asked for, as lines of text.

use crate::types::Time;
use std::collections::VecDeque;
use std::fmt;

/// Lines a violation is reported with.
const KEPT_LINES: usize = 200;

/// The record of a run.
pub(super) struct Trace {
    hash: u64,
    mode: Mode,
    lines: VecDeque<String>,
}

/// What becomes of a line.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Mode {
    /// Only the hash: lines are not even formatted.
    Hash,
    /// The last lines are kept for a report.
    Keep,
    /// Lines go to standard output as they come, and the last are kept.
    Print,
}

impl Trace {
    pub fn new(mode: Mode) -> Trace {
        Trace {
            hash: 0xcbf2_9ce4_8422_2325,
            mode,
            lines: VecDeque::new(),
        }
    }

    /// Mixes a number into the hash.
    pub fn fold(&mut self, value: u64) {
        self.hash = (self.hash ^ value)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(23);
    }

    /// Mixes bytes that leave a node into the hash.
    pub fn fold_bytes(&mut self, bytes: &[u8]) {
        self.fold(u64::from(crc32fast::hash(bytes)));
    }

    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// Whether lines are wanted; callers need not format them otherwise.
    pub fn wants_lines(&self) -> bool {
        self.mode != Mode::Hash
    }

    pub fn line(&mut self, now: Time, text: fmt::Arguments<'_>) {
        if self.mode == Mode::Hash {
            return;
        }
        let line = format!("{:>14.6} {text}", now.0 as f64 / 1e6);
        if self.mode == Mode::Print {
            println!("{line}");
        }
        if self.lines.len() == KEPT_LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    pub fn last_lines(&self) -> Vec<String> {
        self.lines.iter().cloned().collect()
    }
}
