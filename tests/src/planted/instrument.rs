//! What may find a mistake, in the order of preference: the simulator's seeds, the scripted tests
//! of the core, its unit tests.

use nix::sys::resource::{UsageWho, getrusage};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

/// Wall time after which a program counts as one that never ends, in seconds.
const HANG: &str = "900";

/// Seeds in the first batch; each further one is twice as large, up to the last.
const BATCHES: (u64, u64) = (25, 800);

/// Quick to compile, and optimised enough.
const PROFILE: &str = "--profile=mutants";

/// A way to find a mistake.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Debug)]
#[serde(rename_all = "kebab-case")]
pub enum Instrument {
    /// `kagami sim --seeds`, from seed 1.
    Seeds,
    /// The core's tests without chance: every file in `mirror-core/tests` but the seeds'.
    Scripts,
    /// The unit and property tests of the core.
    Unit,
}

/// What an instrument noticed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct Find {
    /// The instrument.
    pub by: Instrument,
    /// The seed, or the names of the tests.
    pub witness: String,
    /// What it said.
    pub problem: String,
}

/// What came of one instrument.
#[derive(Clone, Serialize, Deserialize, Debug)]
pub struct Attempt {
    /// The instrument.
    pub by: Instrument,
    /// What it did, in words.
    pub extent: String,
    /// Processor time it used.
    pub seconds: f64,
    /// What it found.
    pub find: Option<Find>,
}

/// Why an instrument could not be used.
#[derive(Debug)]
pub enum Obstacle {
    /// The tree does not compile: the table is wrong.
    Build(String),
    /// A program cannot be started or makes no sense.
    Program(String),
}

impl Instrument {
    /// All of them, in the order of preference.
    #[must_use]
    pub fn all() -> Vec<Instrument> {
        vec![Instrument::Seeds, Instrument::Scripts, Instrument::Unit]
    }

    /// What it is called on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Instrument::Seeds => "seeds",
            Instrument::Scripts => "scripts",
            Instrument::Unit => "unit",
        }
    }

    /// Uses the instrument on the tree. Seeds end with the batch in which they used `budget` of
    /// processor time; tests run to their end.
    ///
    /// # Errors
    ///
    /// [`Obstacle`]
    pub fn run(self, tree: &Path, target: &Path, budget: Duration) -> Result<Attempt, Obstacle> {
        match self {
            Instrument::Seeds => run_seeds(tree, target, budget),
            Instrument::Scripts => {
                let files = script_files(tree)?;
                let mut arguments = vec!["--features", "sim"];
                for file in &files {
                    arguments.extend(["--test", file]);
                }
                run_tests(self, tree, target, &arguments)
            }
            Instrument::Unit => run_tests(self, tree, target, &["--features", "sim", "--lib"]),
        }
    }
}

/// Builds `kagami` and runs seeds until one breaks a rule.
fn run_seeds(tree: &Path, target: &Path, budget: Duration) -> Result<Attempt, Obstacle> {
    let built = output(cargo(tree, target).args(["build", "-p", "tools", PROFILE]))?;
    if !built.status.success() {
        return Err(Obstacle::Build(text(&built.stderr)));
    }
    let kagami = target.join("mutants/kagami");
    let start = used();
    let (mut from, mut batch) = (1, BATCHES.0);
    loop {
        let ran = output(
            Command::new("timeout")
                .arg(HANG)
                .arg(&kagami)
                .args(["sim", "--from", &from.to_string()])
                .args(["--seeds", &batch.to_string()]),
        )?;
        let seconds = (used() - start).as_secs_f64();
        let find = judge_seeds(&ran, from, batch)?;
        from += batch;
        if find.is_some() || seconds >= budget.as_secs_f64() {
            return Ok(Attempt {
                by: Instrument::Seeds,
                extent: format!("{} seeds", from - 1),
                seconds,
                find,
            });
        }
        batch = (batch * 2).min(BATCHES.1);
    }
}

fn judge_seeds(ran: &Output, from: u64, batch: u64) -> Result<Option<Find>, Obstacle> {
    let said = text(&ran.stdout);
    let found = |witness: String, problem: &str| {
        Some(Find {
            by: Instrument::Seeds,
            witness,
            problem: problem.chars().take(300).collect(),
        })
    };
    let violations = said.lines().filter_map(|line| {
        let (seed, problem) = line
            .strip_prefix("VIOLATION with seed ")?
            .split_once(": ")?;
        Some((seed.parse::<u64>().ok()?, problem))
    });
    match violations.min() {
        Some((seed, problem)) => Ok(found(format!("seed {seed}"), problem)),
        None if ran.status.success() => Ok(None),
        None if ran.status.code() == Some(124) => {
            let last = from + batch - 1;
            Ok(found(format!("a seed in {from}..={last}"), "never ends"))
        }
        None => Err(Obstacle::Program(format!(
            "kagami sim ended with {}: {}",
            ran.status,
            text(&ran.stderr)
        ))),
    }
}

/// The test that runs all golden scripts.
const GOLDEN: &str = "scripts_tell_what_happens";

/// Runs tests of the core; what fails has found the mistake.
fn run_tests(
    by: Instrument,
    tree: &Path,
    target: &Path,
    arguments: &[&str],
) -> Result<Attempt, Obstacle> {
    let test = ["test", "-p", "mirror-core", PROFILE];
    let built = output(
        cargo(tree, target)
            .args(test)
            .args(arguments)
            .arg("--no-run"),
    )?;
    if !built.status.success() {
        return Err(Obstacle::Build(text(&built.stderr)));
    }
    let start = used();
    let ran = output(
        cargo(tree, target)
            .args(test)
            .args(arguments)
            .arg("--no-fail-fast")
            .env("KAGAMI_EXHAUSTIVE_OPERATIONS", "1"),
    )?;
    let said = text(&ran.stdout);
    let failed: Vec<&str> = said
        .lines()
        .filter_map(|line| line.strip_prefix("test ")?.strip_suffix(" ... FAILED"))
        .collect();
    // A script that could not be run to its end has told nothing.
    let (told, problem) = told(&said).unwrap_or_else(|| (GOLDEN.to_owned(), String::new()));
    let named = |test: &&str| match *test {
        GOLDEN => told.clone(),
        other => other.to_owned(),
    };
    let witness = match ran.status.code() {
        Some(0) => None,
        Some(124) => Some("a test that never ends".to_owned()),
        _ if failed.is_empty() => return Err(Obstacle::Program(text(&ran.stderr))),
        _ => Some(failed.iter().map(named).collect::<Vec<_>>().join(", ")),
    };
    Ok(Attempt {
        by,
        extent: "all".to_owned(),
        seconds: (used() - start).as_secs_f64(),
        find: witness.map(|witness| Find {
            by,
            witness,
            problem,
        }),
    })
}

/// The first golden script in which a rule was broken, and how; else the first that told another
/// story than before, which is less: it may be as good.
fn told(said: &str) -> Option<(String, String)> {
    let about = |line: &str| {
        let (file, what) = line.split_once(".txt: ")?;
        let (name, _) = file.split_once('-')?;
        Some((
            name.to_owned(),
            what.strip_prefix("VIOLATION ").map(str::to_owned),
        ))
    };
    let all: Vec<(String, Option<String>)> = said.lines().filter_map(about).collect();
    let broken = all
        .iter()
        .find_map(|(name, rule)| Some((format!("script {name}"), rule.clone()?)));
    let other = |(name, _): &(String, _)| (format!("the text of script {name}"), String::new());
    broken.or(all.first().map(other))
}

/// The tests of the core that tell a story without chance.
fn script_files(tree: &Path) -> Result<Vec<String>, Obstacle> {
    let directory = tree.join("mirror-core/tests");
    let entries =
        std::fs::read_dir(&directory).map_err(|error| Obstacle::Program(error.to_string()))?;
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            Some(name.strip_suffix(".rs")?.to_owned())
        })
        .filter(|name| name != "simulation")
        .collect();
    names.sort();
    Ok(names)
}

/// Cargo in the tree, set up to compile fast: most of a hunt for an obvious mistake is compiling.
fn cargo(tree: &Path, target: &Path) -> Command {
    let mut command = Command::new("timeout");
    command
        .args([HANG, "cargo"])
        .current_dir(tree)
        .env("CARGO_TARGET_DIR", target)
        .env("CARGO_INCREMENTAL", "1")
        .env("RUSTFLAGS", "--cap-lints=warn");
    command
}

fn output(command: &mut Command) -> Result<Output, Obstacle> {
    let ran = command.output();
    ran.map_err(|error| Obstacle::Program(format!("{command:?}: {error}")))
}

/// Processor time of every program waited for so far.
fn used() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).expect("usage of children is always known");
    let spent = |time: nix::sys::time::TimeVal| {
        Duration::new(time.tv_sec() as u64, time.tv_usec() as u32 * 1000)
    };
    spent(usage.user_time()) + spent(usage.system_time())
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_rule_counts_more_than_another_text() {
        let other = "05-the-unflushed-asker.txt: line 3:\n  golden: x\n  now:    y";
        let broken = "z9-the-log-is-full.txt: VIOLATION 4K differs";
        let pair = |witness: &str, problem: &str| Some((witness.to_owned(), problem.to_owned()));
        assert_eq!(told("nothing"), None);
        assert_eq!(told(other), pair("the text of script 05", ""));
        let both = format!("{other}\n{broken}");
        assert_eq!(told(&both), pair("script z9", "4K differs"));
    }
}
