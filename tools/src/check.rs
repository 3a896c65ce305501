//! `kagami check`: is the configuration sound?

use crate::context::read_config;
use crate::human;
use crate::options::Place;
use crate::output;
use clap::Args;
use mirror_core::error::Refusal;

/// Check the configuration file.
///
/// Reads the configuration, says what is wrong with it in one line with file, line and column, or
/// what it describes. Touches no disk and no daemon.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  kagami check
  kagami check --config ./kagami.toml")]
pub struct CheckArgs {}

/// Runs the verb.
pub fn run(place: &Place, _args: &CheckArgs) -> Result<(), Refusal> {
    let config = read_config(&place.config)?;
    output::line(format!(
        "{}: cluster {}, {}, {}",
        place.config.display(),
        config.cluster,
        human::count(config.nodes.len(), "node"),
        human::count(config.mirrors.len(), "mirror"),
    ));
    for mirror in &config.mirrors {
        let sides = mirror
            .sides
            .each_ref()
            .map(|it| format!("{}:{}", it.node, it.disk.display()));
        output::line(format!("  {}  {}", mirror.name, sides.join("  ")));
    }
    if config.insecure {
        eprintln!("kagami: warning: insecure = true: links between nodes are in plain text");
    }
    Ok(())
}
