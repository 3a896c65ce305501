//! A hunt: a copy of the tree in which one bug after the other is planted, and what was found.
//!
//! Results are kept per bug under `target/planted/results`, with a fingerprint of the core, the
//! simulator and the bug, so that a hunt that was stopped goes on where it was and a change of any
//! of them begins anew.

use super::instrument::{Attempt, Obstacle};
use super::table::Bug;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// What decides how a bug behaves and what may find it.
const DECISIVE: [&str; 3] = ["mirror-core/", "tools/src/sim", "Cargo.lock"];

/// When a hunt for one bug ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Until {
    /// At the first instrument that finds it.
    Found,
    /// When every instrument was used.
    Everything,
}

/// What came of the hunt for one bug.
#[derive(Clone, Serialize, Deserialize, Debug)]
pub struct Outcome {
    /// Of what was hunted, and in which code.
    pub fingerprint: String,
    /// The instruments, in the order of their use.
    pub attempts: Vec<Attempt>,
}

impl Outcome {
    /// Whether any instrument found it.
    #[must_use]
    pub fn is_found(&self) -> bool {
        self.attempts.iter().any(|attempt| attempt.find.is_some())
    }
}

/// The tree, its copy, and the results.
pub struct Hunt {
    root: PathBuf,
    tree: PathBuf,
    target: PathBuf,
    results: PathBuf,
    budget: Duration,
    until: Until,
    /// The tree's files, by path.
    files: BTreeMap<String, Vec<u8>>,
}

impl Hunt {
    /// Copies the tree at `root` for hunts of at most `budget` of processor time per instrument.
    ///
    /// # Errors
    ///
    /// What cannot be read or written, in words.
    pub fn new(root: &Path, budget: Duration, until: Until) -> Result<Hunt, String> {
        let place = root.join("target/planted");
        let mut hunt = Hunt {
            root: root.to_owned(),
            tree: place.join("tree"),
            target: place.join("build"),
            results: place.join("results"),
            budget,
            until,
            files: BTreeMap::new(),
        };
        std::fs::create_dir_all(&hunt.results).map_err(|error| error.to_string())?;
        let listed = Command::new("git")
            .args([
                "ls-files",
                "-z",
                "--cached",
                "--others",
                "--exclude-standard",
            ])
            .current_dir(root)
            .output()
            .map_err(|error| format!("git ls-files: {error}"))?;
        for path in String::from_utf8_lossy(&listed.stdout).split_terminator('\0') {
            // What was deleted and not committed is listed all the same.
            if let Ok(bytes) = std::fs::read(root.join(path)) {
                hunt.files.insert(path.to_owned(), bytes);
            }
        }
        for (path, bytes) in &hunt.files {
            write_if_changed(&hunt.tree.join(path), bytes)?;
        }
        hunt.remove_others(&hunt.tree)?;
        Ok(hunt)
    }

    /// Removes from the copy what the tree has no more.
    fn remove_others(&self, directory: &Path) -> Result<(), String> {
        let told = |error: std::io::Error| format!("{}: {error}", directory.display());
        for entry in std::fs::read_dir(directory).map_err(told)?.flatten() {
            let path = entry.path();
            let inside = path.strip_prefix(&self.tree).unwrap_or(&path);
            if path.is_dir() {
                self.remove_others(&path)?;
            } else if !self.files.contains_key(&*inside.to_string_lossy()) {
                std::fs::remove_file(&path).map_err(told)?;
            }
        }
        Ok(())
    }

    /// Hunts for one bug, or looks up what came of it in this very code. An empty list of edits is
    /// the control: nothing may be found.
    ///
    /// # Errors
    ///
    /// A bug that does not fit the code or does not compile, and what cannot be run.
    pub fn run(&self, bug: &Bug) -> Result<Outcome, String> {
        let fingerprint = self.fingerprint(bug);
        if let Some(known) = self.known(bug).filter(|known| self.is_enough(bug, known)) {
            return Ok(known);
        }
        let changed = bug.applied(&self.root)?;
        for (file, text) in &changed {
            write_if_changed(&self.tree.join(file), text.as_bytes())?;
        }
        let attempts = self.attempts(bug);
        for (file, _) in &changed {
            write_if_changed(&self.tree.join(file), &self.files[file])?;
        }
        let outcome = Outcome {
            fingerprint,
            attempts: attempts.map_err(|obstacle| format!("{}: {obstacle:?}", bug.name))?,
        };
        let text = toml::to_string(&outcome).map_err(|error| error.to_string())?;
        std::fs::write(self.result_path(bug), text).map_err(|error| error.to_string())?;
        Ok(outcome)
    }

    fn attempts(&self, bug: &Bug) -> Result<Vec<Attempt>, Obstacle> {
        let mut attempts = Vec::new();
        for instrument in &bug.hunt {
            let attempt = instrument.run(&self.tree, &self.target, self.budget)?;
            let found = attempt.find.is_some();
            attempts.push(attempt);
            if found && self.until == Until::Found {
                break;
            }
        }
        Ok(attempts)
    }

    /// What an earlier hunt in this very code found.
    #[must_use]
    pub fn known(&self, bug: &Bug) -> Option<Outcome> {
        let text = std::fs::read_to_string(self.result_path(bug)).ok()?;
        let outcome: Outcome = toml::from_str(&text).ok()?;
        (outcome.fingerprint == self.fingerprint(bug)).then_some(outcome)
    }

    fn is_enough(&self, bug: &Bug, known: &Outcome) -> bool {
        let whole = known.attempts.len() == bug.hunt.len();
        let long_enough = known.attempts.first().is_some_and(|first| {
            first.find.is_some() || first.seconds >= self.budget.as_secs_f64()
        });
        match self.until {
            Until::Found => known.is_found() || (whole && long_enough),
            Until::Everything => whole && long_enough,
        }
    }

    fn result_path(&self, bug: &Bug) -> PathBuf {
        self.results.join(format!("{}.toml", bug.name))
    }

    fn fingerprint(&self, bug: &Bug) -> String {
        let mut hasher = DefaultHasher::new();
        for (path, bytes) in &self.files {
            if DECISIVE.iter().any(|start| path.starts_with(start)) {
                (path, bytes).hash(&mut hasher);
            }
        }
        for edit in &bug.edit {
            (&edit.file, &edit.find, &edit.replace).hash(&mut hasher);
        }
        format!("{:016x}", hasher.finish())
    }
}

/// Leaves a file alone that is right already, so that nothing is compiled again for it.
fn write_if_changed(path: &Path, bytes: &[u8]) -> Result<(), String> {
    if std::fs::read(path).is_ok_and(|there| there == bytes) {
        return Ok(());
    }
    let told = |error: std::io::Error| format!("{}: {error}", path.display());
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).map_err(told)?;
    }
    std::fs::write(path, bytes).map_err(told)
}
