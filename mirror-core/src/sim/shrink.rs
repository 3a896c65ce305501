//! Cutting a recording down to what it takes to break the same rule: first whole chunks of the list
//! go (delta debugging), then single stimuli, then what is left gets simpler arguments and rounder
//! times.
//!
//! A shorter list meets other delays of disks and link, so that one which could break the rule may
//! miss it. Each candidate is therefore tried with a few numbers of the option `luck`.

use super::recording::{Recording, Step};
use super::stimulus::Stimulus;
use super::{Report, replay};
use crate::types::Time;

/// How many numbers of `luck` a candidate is tried with, besides the one that broke the rule last.
const OTHER_LUCK: u64 = 2;

/// What came of shrinking.
#[derive(Clone, Debug)]
pub struct Shrunk {
    /// The shortest list found that breaks the rule.
    pub recording: Recording,
    /// How it ended.
    pub report: Report,
    /// Runs made.
    pub tries: u64,
}

/// Shrinks a recording that breaks a rule until nothing can go or `enough` says so. `None` if the
/// recording breaks no rule when it is run again.
pub fn shrink(recording: &Recording, enough: &mut dyn FnMut() -> bool) -> Option<Shrunk> {
    shrink_with(recording, &mut |candidate| replay(candidate, false), enough)
}

fn shrink_with(
    recording: &Recording,
    run: &mut dyn FnMut(&Recording) -> Report,
    enough: &mut dyn FnMut() -> bool,
) -> Option<Shrunk> {
    let report = run(recording);
    let kind = report.violation.as_ref()?.kind();
    let mut shrinker = Shrinker {
        kind,
        run,
        enough,
        best: Shrunk {
            recording: recording.clone(),
            report,
            tries: 1,
        },
    };
    shrinker.drop_what_came_later();
    loop {
        let before = shrinker.steps().to_vec();
        shrinker.remove_chunks();
        shrinker.simplify();
        shrinker.round_times();
        if shrinker.steps() == before || (shrinker.enough)() {
            return Some(shrinker.best);
        }
    }
}

struct Shrinker<'a> {
    kind: String,
    run: &'a mut dyn FnMut(&Recording) -> Report,
    enough: &'a mut dyn FnMut() -> bool,
    best: Shrunk,
}

impl Shrinker<'_> {
    fn steps(&self) -> &[Step] {
        &self.best.recording.steps
    }

    /// Takes the candidate if it breaks the same rule.
    fn try_steps(&mut self, steps: Vec<Step>) -> bool {
        let luck = self.best.recording.options.luck;
        for other in 0..=OTHER_LUCK {
            if (self.enough)() {
                return false;
            }
            let mut candidate = Recording {
                options: self.best.recording.options.clone(),
                steps: steps.clone(),
            };
            candidate.options.luck = luck.wrapping_add(other);
            let report = (self.run)(&candidate);
            self.best.tries += 1;
            if report.violation.as_ref().map(|violation| violation.kind())
                == Some(self.kind.clone())
            {
                self.best.recording = candidate;
                self.best.report = report;
                return true;
            }
        }
        false
    }

    /// What would have happened after the violation.
    fn drop_what_came_later(&mut self) {
        let mut earlier = self.best.recording.clone();
        earlier.end_storm(self.best.report.stats.virtual_time);
        if earlier.len() < self.steps().len() {
            self.try_steps(earlier.steps);
        }
    }

    fn remove_chunks(&mut self) {
        let mut size = self.steps().len().div_ceil(2);
        while size > 0 {
            let mut from = 0;
            while from < self.steps().len() {
                let to = (from + size).min(self.steps().len());
                let steps = self.steps();
                let calm = |step: &&Step| step.stimulus == Stimulus::Calm;
                let kept = steps[from..to].iter().filter(calm);
                let rest = steps[..from].iter().chain(kept).chain(&steps[to..]);
                let candidate: Vec<Step> = rest.copied().collect();
                let fewer = candidate.len() < steps.len();
                if !fewer || !self.try_steps(candidate) {
                    from = to;
                }
                if (self.enough)() {
                    return;
                }
            }
            size /= 2;
        }
    }

    fn simplify(&mut self) {
        for index in 0..self.steps().len() {
            for simpler in self.steps()[index].stimulus.simpler() {
                let mut steps = self.steps().to_vec();
                steps[index].stimulus = simpler;
                if self.try_steps(steps) {
                    break;
                }
            }
        }
    }

    /// Times in round numbers; the order stays.
    fn round_times(&mut self) {
        for unit in [100_000_000, 10_000_000, 1_000_000] {
            let rounded = |at: Time| Time(at.0.div_ceil(unit) * unit);
            let mut steps = self.steps().to_vec();
            for step in &mut steps {
                step.at = rounded(step.at);
            }
            if steps == self.steps() || self.try_steps(steps) {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests;
