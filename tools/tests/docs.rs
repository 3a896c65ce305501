//! The documents say what the program does.

use mirror_core::config::Config;
use mirror_core::error::{ErrorId, ExitCode};
use std::path::Path;

const ERRORS: &str = include_str!("../../docs/errors.md");
const CONFIG: &str = include_str!("../../docs/config.md");

#[test]
fn every_error_is_documented_as_it_is() {
    let rows: Vec<Vec<&str>> = ERRORS
        .lines()
        .filter(|line| line.starts_with("| KGM-"))
        .map(|line| line.trim_matches('|').split(" | ").map(str::trim).collect())
        .collect();
    let documented: Vec<&str> = rows.iter().map(|row| row[0]).collect();
    let known: Vec<String> = ErrorId::ALL.iter().map(ToString::to_string).collect();
    assert_eq!(
        documented, known,
        "docs/errors.md lists other ids than the program"
    );
    for (row, id) in rows.iter().zip(ErrorId::ALL) {
        let [_, exit, meaning, remedy] = row.as_slice() else {
            panic!("{id}: a row has four columns: {row:?}");
        };
        assert_eq!(*exit, (id.exit_code() as u8).to_string(), "{id}");
        assert_eq!(*meaning, id.summary(), "{id}");
        assert!(!remedy.is_empty(), "{id} has no remedy");
    }
}

#[test]
fn no_error_ends_as_if_all_were_well() {
    assert!(
        ErrorId::ALL
            .iter()
            .all(|id| id.exit_code() != ExitCode::Done)
    );
}

#[test]
fn the_documented_configuration_is_one() {
    let (_, after) = CONFIG.split_once("```toml\n").unwrap();
    let (example, _) = after.split_once("```").unwrap();
    Config::parse(example, Path::new("docs/config.md")).unwrap();
    for line in example.lines().filter(|line| line.contains(" = ")) {
        let key = line.split(' ').next().unwrap();
        assert!(
            CONFIG.contains(&format!("| `{key}` |")),
            "`{key}` is not explained"
        );
    }
}
