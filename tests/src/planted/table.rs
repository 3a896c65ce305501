//! The list of planted bugs, and how one is applied to a tree.

use super::instrument::Instrument;
use serde::Deserialize;
use std::path::Path;

/// A mistake.
#[derive(Clone, Deserialize, Debug)]
#[serde(deny_unknown_fields)]
pub struct Bug {
    /// What it is called: `scripts/planted-bugs --only NAME`.
    pub name: String,
    /// The rule of ARCHITECTURE.md that it breaks, `R1` to `R14`.
    pub rule: String,
    /// What it is, in one line.
    pub what: String,
    /// The text that makes it.
    pub edit: Vec<Edit>,
    /// Instruments to try, in this order.
    #[serde(default = "Instrument::all")]
    pub hunt: Vec<Instrument>,
}

/// One piece of text in place of another.
#[derive(Clone, Deserialize, Debug)]
#[serde(deny_unknown_fields)]
pub struct Edit {
    /// The file, from the root of the tree.
    pub file: String,
    /// Text that occurs in it exactly once.
    pub find: String,
    /// What takes its place.
    pub replace: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    bug: Vec<Bug>,
}

/// Reads `tests/planted/*.toml` of the tree at `root`, in order of their names.
///
/// # Errors
///
/// A file that cannot be read or understood, in words.
pub fn read_table(root: &Path) -> Result<Vec<Bug>, String> {
    let directory = root.join("tests/planted");
    let entries = std::fs::read_dir(&directory)
        .map_err(|error| format!("{}: {error}", directory.display()))?;
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|end| end == "toml"));
    paths.sort();
    let mut bugs = Vec::new();
    for path in paths {
        let told = |error: String| format!("{}: {error}", path.display());
        let text = std::fs::read_to_string(&path).map_err(|error| told(error.to_string()))?;
        let file: File = toml::from_str(&text).map_err(|error| told(error.to_string()))?;
        bugs.extend(file.bug);
    }
    Ok(bugs)
}

impl Bug {
    /// The files that this bug changes, with their new text.
    ///
    /// # Errors
    ///
    /// An edit whose text is not there exactly once, or that changes nothing.
    pub fn applied(&self, root: &Path) -> Result<Vec<(String, String)>, String> {
        let mut changed: Vec<(String, String)> = Vec::new();
        for edit in &self.edit {
            let told = |what: String| format!("{}: {}: {what}", self.name, edit.file);
            let at = match changed.iter().position(|(file, _)| *file == edit.file) {
                Some(at) => at,
                None => {
                    let text = std::fs::read_to_string(root.join(&edit.file))
                        .map_err(|error| told(error.to_string()))?;
                    changed.push((edit.file.clone(), text));
                    changed.len() - 1
                }
            };
            let text = &mut changed[at].1;
            let found = text.matches(&edit.find).count();
            if found != 1 {
                return Err(told(format!("found {found} times:\n{}", edit.find)));
            }
            if edit.find == edit.replace {
                return Err(told("an edit that changes nothing".to_owned()));
            }
            *text = text.replacen(&edit.find, &edit.replace, 1);
        }
        Ok(changed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    fn root() -> &'static Path {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
        manifest.parent().expect("the crate lies in the workspace")
    }

    #[test]
    fn every_planted_bug_still_fits_the_code() {
        let bugs = read_table(root()).expect("a readable table");
        let errors: Vec<String> = bugs
            .iter()
            .filter_map(|bug| bug.applied(root()).err())
            .collect();
        assert!(errors.is_empty(), "{}", errors.join("\n"));
    }

    #[test]
    fn every_rule_has_planted_bugs() {
        let bugs = read_table(root()).expect("a readable table");
        let names: BTreeSet<_> = bugs.iter().map(|bug| &bug.name).collect();
        assert_eq!(names.len(), bugs.len(), "names are unique");
        let mut by_rule: BTreeMap<&str, usize> = BTreeMap::new();
        for bug in &bugs {
            assert!(!bug.edit.is_empty() && !bug.hunt.is_empty(), "{}", bug.name);
            *by_rule.entry(&bug.rule).or_default() += 1;
        }
        for rule in 1..=9 {
            let count = by_rule.remove(format!("R{rule}").as_str()).unwrap_or(0);
            assert!(count >= 2, "R{rule} has {count} planted bugs");
        }
        // Of what an operator meets when things fail there are some, too.
        by_rule.retain(|rule, _| !matches!(*rule, "R11" | "R12"));
        assert!(by_rule.is_empty(), "unknown rules: {by_rule:?}");
    }

    #[test]
    fn an_edit_that_does_not_fit_is_refused() {
        let bug = |find: &str, replace: &str| Bug {
            name: "x".into(),
            rule: "R1".into(),
            what: String::new(),
            edit: vec![Edit {
                file: "tests/Cargo.toml".into(),
                find: find.into(),
                replace: replace.into(),
            }],
            hunt: Instrument::all(),
        };
        let fits = bug("name = \"kagami-tests\"", "name = \"x\"").applied(root());
        assert!(fits.is_ok_and(|changed| changed[0].1.contains("name = \"x\"")));
        assert!(bug("this is not there", "x").applied(root()).is_err());
        assert!(bug("workspace", "x").applied(root()).is_err(), "many times");
        let same = "name = \"kagami-tests\"";
        assert!(bug(same, same).applied(root()).is_err(), "nothing changed");
    }
}
