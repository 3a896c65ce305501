//! Golden scripts: stories that a reader wants to understand, run and printed.

use mirror_core::error::{ErrorId, Refusal};
use mirror_core::sim::script;
use std::path::Path;

/// Runs one and prints it; fails when it breaks a rule, or tells another story than it says.
pub fn run(file: &Path) -> Result<(), Refusal> {
    let failed = |text: String| Refusal::new(ErrorId::SimulationFailed, text);
    let name = file.display().to_string();
    let invalid = |text: String| Refusal::new(ErrorId::ScriptInvalid, text);
    let golden =
        std::fs::read_to_string(file).map_err(|error| invalid(format!("{name}: {error}")))?;
    let outcome = script::run(&name, &golden).map_err(|error| invalid(error.to_string()))?;
    crate::output::line(outcome.text.trim_end());
    match outcome.violations.first() {
        Some(violation) => Err(failed(format!("{name}: {violation}"))),
        None if outcome.text != golden => {
            let text = format!("{name}: something else happened than the script says");
            Err(failed(text))
        }
        None => Ok(()),
    }
}
