//! The golden scripts in `tests/scripts` (docs/simulation.md, "Golden scripts").
//!
//! `KAGAMI_UPDATE_SCRIPTS=1` writes what happens now below each block.

use mirror_core::limits::MAX_ANCESTRY;
use mirror_core::sim::script;
use std::path::{Path, PathBuf};

fn scripts() -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scripts");
    let entries = std::fs::read_dir(directory).expect("a readable directory");
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "txt"));
    files.sort();
    files
}

/// The first line in which the two differ.
fn first_difference(golden: &str, found: &str) -> String {
    let mut found = found.lines();
    for (at, line) in golden.lines().enumerate() {
        let now = found.next().unwrap_or("(the end)");
        if line != now {
            return format!("line {}:\n  golden: {line}\n  now:    {now}", at + 1);
        }
    }
    format!("behind the end: {}", found.next().unwrap_or_default())
}

#[test]
fn scripts_tell_what_happens() {
    let update = std::env::var_os("KAGAMI_UPDATE_SCRIPTS").is_some();
    let files = scripts();
    let mut problems = Vec::new();
    if files.len() < 10 {
        problems.push(format!("only {} scripts found", files.len()));
    }
    for file in files {
        let golden = std::fs::read_to_string(&file).expect("a readable script");
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        println!("{name}");
        match script::run(&name, &golden) {
            Err(error) => problems.push(error.to_string()),
            Ok(outcome) => {
                for violation in &outcome.violations {
                    problems.push(format!("{name}: VIOLATION {violation}"));
                }
                if outcome.text != golden && update {
                    std::fs::write(&file, &outcome.text).expect("a writable script");
                } else if outcome.text != golden {
                    let difference = first_difference(&golden, &outcome.text);
                    problems.push(format!("{name}: {difference}"));
                }
            }
        }
    }
    assert!(
        problems.is_empty(),
        "{}\n(KAGAMI_UPDATE_SCRIPTS=1 writes the new text; look at what changed)",
        problems.join("\n")
    );
}

#[test]
fn what_is_wrong_with_a_script_is_named() {
    let causes = [
        (
            "write a 0 4K\n",
            "x.txt:1: commands without the line `----` below them",
        ),
        (
            "# prose\n\nwirte a 0 4K\n----\n",
            "x.txt:3: no command `wirte`",
        ),
        (
            "create 8M\nwrite c 0 4K\n----\n",
            "x.txt:2: `c` is no node; they are `a` and `b`",
        ),
        (
            "write a 0 100\n----\n",
            "x.txt:1: a range is made of sectors of 512 bytes",
        ),
        ("write a 0 4K fua now\n----\n", "x.txt:1: `now` is too much"),
        (
            "write a 0 4K\n----\n",
            "x.txt:1: there is no machine yet: `create 8M`",
        ),
        (
            "create 8M\nkill a\nkill a\n----\n",
            "x.txt:3: no daemon runs on a",
        ),
        ("pass 5\n----\n", "x.txt:1: `5` is no time; `500ms`, `2s`"),
        (
            "cells\n  g2 | g2 happy\n----\n",
            "x.txt:1: `happy` is no fact",
        ),
        (
            "expect #1 acknowledged\n----\n",
            "x.txt:1: there is no machine yet: `create 8M`",
        ),
    ];
    for (text, expected) in causes {
        let error = script::run("x.txt", text).expect_err(text);
        assert_eq!(error.to_string(), expected);
    }
}

/// An expectation that is not met is a violation, not a golden line.
#[test]
fn an_expectation_can_fail() {
    let text = "create 8M\nexpect a is Primary\nexpect disk b 0 4K #1\n----\n";
    let outcome = script::run("x.txt", text).expect("a script");
    assert_eq!(outcome.violations.len(), 2, "{outcome:?}");
}

/// A mirror whose service starts again and again on one node begins more generations than a replica
/// remembers. Those that others know it by are among them.
#[test]
fn the_generations_that_count_are_remembered() {
    let restarts = "secondary a\nprimary a\n".repeat(2 * MAX_ANCESTRY);
    // Of a sole holder: the one in the arbiter's register.
    let registered = format!(
        "create 8M arbitrated\nprimary a --initial-assume-clean\ncut\nwrite a 0 4K\npass 3s\n{restarts}\
         join\npass 5s\nexpect identical\nexpect b is UpToDate\nexpect a is {{a,b}}\n----\n"
    );
    // Of one whose peer was Primary twice without a write: the one that both had last.
    let forced = "secondary a\nprimary a --force\n".repeat(2 * MAX_ANCESTRY);
    let common = format!(
        "create 8M\nprimary a --initial-assume-clean\nwrite a 0 4K\nsecondary a\nprimary b\n\
         secondary b\nprimary b\ncut\npower-off b\npass 3s\n{forced}write a 0 4K\nstart b\njoin\n\
         pass 5s\nexpect identical\nexpect b is UpToDate\n----\n"
    );
    for text in [registered, common] {
        let outcome = script::run("x.txt", &text).expect("a script");
        assert_eq!(outcome.violations, [""; 0], "{outcome:?}");
    }
}
