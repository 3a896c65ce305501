//! Plants one bug after the other in a copy of the tree and says what found it
//! (`scripts/planted-bugs`).

use kagami_tests::planted::hunt::{Outcome, Until};
use kagami_tests::planted::{Bug, Hunt, instrument::Instrument, read_table, report};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

const USAGE: &str = "\
usage: planted [--minutes N] [--everything] [--by INSTRUMENT] [--write] [--only NAME...]

  --minutes N    processor time for the seeds of each bug (default 10)
  --everything   use every instrument on every bug, found or not
  --by NAME      use only `seeds`, `scripts` or `unit`
  --write        put the table into docs/simulation.md
  --only NAME    these bugs (`control` is none)";

struct Request {
    budget: Duration,
    until: Until,
    by: Vec<Instrument>,
    write: bool,
    only: Vec<String>,
}

fn request() -> Result<Request, String> {
    let mut request = Request {
        budget: Duration::from_secs(600),
        until: Until::Found,
        by: Instrument::all(),
        write: false,
        only: Vec::new(),
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--minutes" => {
                let minutes: f64 = arguments
                    .next()
                    .and_then(|text| text.parse().ok())
                    .ok_or(USAGE)?;
                request.budget = Duration::from_secs_f64(minutes * 60.0);
            }
            "--everything" => request.until = Until::Everything,
            "--by" => {
                let name = arguments.next().unwrap_or_default();
                request.by.retain(|instrument| instrument.name() == name);
                if request.by.is_empty() {
                    return Err(USAGE.to_owned());
                }
            }
            "--write" => request.write = true,
            "--only" => request.only = arguments.by_ref().collect(),
            _ => return Err(USAGE.to_owned()),
        }
    }
    Ok(request)
}

fn main() -> ExitCode {
    match request().and_then(|request| hunt_all(&request)) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(survivors) => {
            eprintln!("{survivors} planted bugs survive");
            ExitCode::FAILURE
        }
        Err(problem) => {
            eprintln!("{problem}");
            ExitCode::FAILURE
        }
    }
}

fn hunt_all(request: &Request) -> Result<usize, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .ok_or("the crate lies in no workspace")?;
    let mut bugs = read_table(root)?;
    // A table that does not fit the code is known before anything is compiled.
    for bug in &mut bugs {
        bug.applied(root)?;
        bug.hunt
            .retain(|instrument| request.by.contains(instrument));
    }
    let hunt = Hunt::new(root, request.budget, request.until)?;
    for name in &request.only {
        if *name != "control" && !bugs.iter().any(|bug| bug.name == *name) {
            return Err(format!("there is no planted bug `{name}` in tests/planted"));
        }
    }
    let wanted = |name: &str| request.only.is_empty() || request.only.iter().any(|n| n == name);
    let control = control(request.by.clone());
    if wanted(&control.name) {
        let outcome = hunt.run(&control)?;
        tell(&control, &outcome);
        if outcome.is_found() {
            return Err("the tree breaks a rule without any planted bug".to_owned());
        }
    }
    let mut survivors = 0;
    for bug in bugs.iter().filter(|bug| wanted(&bug.name)) {
        let outcome = hunt.run(bug)?;
        tell(bug, &outcome);
        survivors += usize::from(!outcome.is_found());
    }
    if request.write {
        write_table(root, &hunt, bugs)?;
    }
    Ok(survivors)
}

/// No bug at all: the same hunt must find nothing.
fn control(hunt: Vec<Instrument>) -> Bug {
    Bug {
        name: "control".to_owned(),
        rule: String::new(),
        what: "nothing".to_owned(),
        edit: Vec::new(),
        hunt,
    }
}

fn tell(bug: &Bug, outcome: &Outcome) {
    for attempt in &outcome.attempts {
        let (seconds, extent) = (attempt.seconds, &attempt.extent);
        match &attempt.find {
            Some(find) => println!(
                "{}: {:?} after {seconds:.1} s: {} {}",
                bug.name, find.by, find.witness, find.problem
            ),
            None => println!(
                "{}: not found by {:?} ({extent}, {seconds:.1} s)",
                bug.name, attempt.by
            ),
        }
    }
}

fn write_table(root: &Path, hunt: &Hunt, bugs: Vec<Bug>) -> Result<(), String> {
    let path = root.join("docs/simulation.md");
    let document = std::fs::read_to_string(&path).map_err(|error| error.to_string())?;
    let results: Vec<_> = bugs
        .into_iter()
        .map(|bug| {
            let known = hunt.known(&bug);
            (bug, known)
        })
        .collect();
    let renewed = report::insert(&document, &report::render(&results))?;
    std::fs::write(&path, renewed).map_err(|error| error.to_string())
}
