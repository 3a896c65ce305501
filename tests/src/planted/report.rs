//! The table of planted bugs in docs/simulation.md.

use super::hunt::Outcome;
use super::instrument::{Attempt, Instrument};
use super::table::Bug;
use std::fmt::Write;

/// What encloses the table in the document.
const MARKS: [&str; 2] = ["<!-- planted bugs: begin -->", "<!-- planted bugs: end -->"];

/// One line for each bug: what it is, its rule, what found it, and the processor time it took.
#[must_use]
pub fn render(results: &[(Bug, Option<Outcome>)]) -> String {
    let mut text = "| planted bug | rule | found by | s |\n|---|---|---|---:|\n".to_owned();
    for (bug, outcome) in results {
        let (found_by, seconds) = match outcome {
            None => ("not hunted".to_owned(), String::new()),
            Some(outcome) => found(outcome),
        };
        let Bug { rule, what, .. } = bug;
        // Writing to a string cannot fail.
        let _ = writeln!(text, "| {what} | {rule} | {found_by} | {seconds} |");
    }
    text
}

fn found(outcome: &Outcome) -> (String, String) {
    let finds: Vec<&Attempt> = outcome
        .attempts
        .iter()
        .filter(|attempt| attempt.find.is_some())
        .collect();
    let witnesses: Vec<String> = finds.iter().map(|attempt| witness(attempt)).collect();
    match finds.first() {
        Some(first) => (witnesses.join("; "), format!("{:.1}", first.seconds)),
        None => {
            let tried: Vec<&str> = outcome.attempts.iter().map(|a| a.extent.as_str()).collect();
            (
                format!("**survives** ({})", tried.join(", ")),
                String::new(),
            )
        }
    }
}

fn witness(attempt: &Attempt) -> String {
    let Some(find) = &attempt.find else {
        return String::new();
    };
    match find.by {
        Instrument::Seeds => find.witness.clone(),
        Instrument::Scripts | Instrument::Unit => {
            let names: Vec<&str> = find.witness.split(", ").collect();
            let first = names[0].rsplit("::").next().unwrap_or(names[0]);
            let first = match first.contains("script ") {
                true => first.to_owned(),
                false => format!("`{first}`"),
            };
            match names.len() {
                1 => first,
                more => format!("{first} and {} more", more - 1),
            }
        }
    }
}

/// The document with the table in its place.
///
/// # Errors
///
/// A document without the marks.
pub fn insert(document: &str, table: &str) -> Result<String, String> {
    let [begin, end] = MARKS;
    let parts = document
        .split_once(begin)
        .and_then(|(before, rest)| Some((before, rest.split_once(end)?.1)));
    match parts {
        Some((before, after)) => Ok(format!("{before}{begin}\n{table}{end}{after}")),
        None => Err(format!("no `{begin}` and `{end}` in the document")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_takes_the_place_of_the_old_one() {
        let [begin, end] = MARKS;
        let document = format!("before\n{begin}\nold\n{end}\nafter\n");
        let renewed = insert(&document, "new\n").expect("marks are there");
        assert_eq!(renewed, format!("before\n{begin}\nnew\n{end}\nafter\n"));
        assert!(insert("nothing", "new\n").is_err());
    }
}
