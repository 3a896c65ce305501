//! Scripts in files: read, and written for a seed that broke a rule.

use mirror_core::error::{ErrorId, Refusal};
use mirror_core::sim::{self, Recording, Shrunk};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a violation is shrunk at most.
const BUDGET: Duration = Duration::from_secs(60);

/// No recording is near this size.
const LARGEST: u64 = 64 << 20;

/// Reads a script.
pub fn read(file: &Path) -> Result<Recording, Refusal> {
    let wrong = |problem: String| {
        let problem = format!("{}: {problem}", file.display());
        Refusal::new(ErrorId::ScriptInvalid, problem)
    };
    let mut text = String::new();
    fs::File::open(file)
        .and_then(|opened| opened.take(LARGEST).read_to_string(&mut text))
        .map_err(|error| wrong(format!("cannot be read: {error}")))?;
    text.parse()
        .map_err(|error: sim::ScriptError| wrong(error.to_string()))
}

/// Shrinks a seed that broke a rule and writes the script; how to see the violation again.
pub fn shrink(seed: u64, output: Option<&Path>) -> Result<String, Refusal> {
    let (_, recording) = sim::record(seed);
    eprintln!(
        "shrinking {} stimuli, for {} s at most",
        recording.len(),
        BUDGET.as_secs()
    );
    let deadline = Instant::now() + BUDGET;
    // Runs that panic again and again need not say so each time.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let shrunk = sim::shrink(&recording, &mut || Instant::now() >= deadline);
    std::panic::set_hook(hook);
    let Some(shrunk) = shrunk else {
        eprintln!("the list of its stimuli does not break the rule again; there is no script");
        return Ok(format!("`kagami sim --seed {seed} --trace`"));
    };
    let file = output.map_or_else(|| format!("sim-seed-{seed}.script").into(), Path::to_owned);
    write(&file, &shrunk)?;
    eprintln!(
        "{} of {} stimuli are left after {} runs, in {}",
        shrunk.recording.len(),
        recording.len(),
        shrunk.tries,
        file.display()
    );
    Ok(format!("`kagami sim --replay {} --trace`", file.display()))
}

fn write(file: &PathBuf, shrunk: &Shrunk) -> Result<(), Refusal> {
    let problem = shrunk.report.violation.as_ref().map(|v| v.problem.as_str());
    let comment = problem.unwrap_or_default().replace('\n', " ");
    let text = format!("# {comment}\n{}", shrunk.recording);
    fs::write(file, text).map_err(|error| {
        let problem = format!("{}: cannot be written: {error}", file.display());
        Refusal::new(ErrorId::ScriptInvalid, problem)
    })
}
