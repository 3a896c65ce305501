//! Golden scripts: text in, text out, prose between (docs/simulation.md, "Golden scripts").
//!
//! A script tells two real nodes one story, step by step, in a world where nothing is left to
//! chance: disks and link answer in order and at once except where the script holds something
//! back, and the clock moves when it says so. Below each block of commands stands what happened.
//! What seeds find by chance is told here for a reader.

mod act;
mod arbiter;
mod cells;
mod checks;
mod disk;
mod parse;
mod promises;
mod words;
mod world;

pub use parse::ScriptError;

use parse::{Command, Piece, RULE, Step};
use world::World;

/// What came of a script.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Outcome {
    /// The script with what happened below each block.
    pub text: String,
    /// Rules and expectations that were broken.
    pub violations: Vec<String>,
}

/// Runs the script `text` of `file`.
///
/// # Errors
///
/// [`ScriptError`] when a command is not understood, or cannot be carried out at its place.
pub fn run(file: &str, text: &str) -> Result<Outcome, ScriptError> {
    let mut world = None;
    let mut violations = Vec::new();
    let mut out = Vec::new();
    for piece in parse::parse(file, text)? {
        match piece {
            Piece::Prose(line) => out.push(line),
            Piece::Block(steps) => {
                for step in &steps {
                    out.extend(step.text.lines().map(str::to_owned));
                }
                out.push(RULE.to_owned());
                out.extend(run_block(file, &mut world, &steps, &mut violations)?);
            }
        }
    }
    let text = out.join("\n") + "\n";
    if let Some(world) = &mut world {
        violations.append(&mut world.violations);
    }
    Ok(Outcome { text, violations })
}

fn run_block(
    file: &str,
    world: &mut Option<World>,
    steps: &[Step],
    violations: &mut Vec<String>,
) -> Result<Vec<String>, ScriptError> {
    let mut lines = Vec::new();
    if let Some(world) = world {
        world.begin_block(false);
    }
    for step in steps {
        run_step(world, &step.command, &mut lines, violations).map_err(|cause| ScriptError {
            file: file.to_owned(),
            line: step.line,
            cause,
        })?;
        if let Some(world) = world {
            world.check();
            lines.extend(world.take_lines());
        }
    }
    if lines.is_empty() {
        lines.push("(nothing to tell)".to_owned());
    }
    Ok(lines)
}

fn run_step(
    world: &mut Option<World>,
    command: &Command,
    lines: &mut Vec<String>,
    violations: &mut Vec<String>,
) -> Result<(), String> {
    match (command, world) {
        (Command::Cells(rows), _) => {
            let (table, broken) = cells::table(rows);
            lines.extend(table);
            lines.extend(broken.iter().map(|problem| format!("VIOLATION {problem}")));
            violations.extend(broken);
            Ok(())
        }
        (Command::Create(..), Some(_)) => Err("there are two machines already".to_owned()),
        (Command::Create(beginning), world) => {
            *world = Some(World::create(*beginning)?);
            Ok(())
        }
        (_, None) => Err("there is no machine yet: `create 8M`".to_owned()),
        (command, Some(world)) => happen(world, command),
    }
}

fn happen(world: &mut World, command: &Command) -> Result<(), String> {
    match command {
        Command::Create(..) | Command::Cells(_) => Ok(()),
        Command::Quiet => {
            world.begin_block(true);
            Ok(())
        }
        Command::Guest(host, asks) => asks
            .iter()
            .try_for_each(|ask| world.ask(*host, *ask).map(|_| ())),
        Command::Operator(host, what) => world.command(*host, *what),
        Command::Hold(channel) => {
            world.hold(channel);
            Ok(())
        }
        Command::Release(channel) => world.release(channel),
        Command::Keep(host, part) => world.keep(*host, *part),
        Command::Deliver(from, count) => world.deliver(*from, *count),
        Command::Lose(from, count) => world.lose(*from, *count),
        Command::Cut(only) => world.cut(*only),
        Command::Join => {
            world.join();
            Ok(())
        }
        Command::Kill(host, kept) => world.kill(*host, kept),
        Command::PowerOff(host, kept) => world.power_off(*host, kept),
        Command::Start(host) => world.start(*host),
        Command::Replace(host) => world.replace(*host),
        Command::Fail(host, part) => {
            world.machines[*host].failing.push(*part);
            Ok(())
        }
        Command::Heal(host) => {
            world.machines[*host].failing.clear();
            Ok(())
        }
        Command::Pass(span) => world.pass(*span),
        Command::Status => {
            world.status_lines();
            Ok(())
        }
        Command::Disk(host, range) => world.disk_lines(*host, *range),
        Command::Rot(host, range) => {
            world.rot(*host, *range);
            Ok(())
        }
        Command::Arbiter(step) => world.arbiter_step(step),
        Command::Expect(expectation) => world.expect(expectation),
    }
}
