//! `kagami-agent`: the first of observe -> plan -> execute.
//!
//! In this version it observes: it asks the node's daemon for its mirrors and writes every change
//! of role, disk, link and holders to the log, and it says when the daemon is gone. It changes
//! nothing; rights belong to the daemon, and stay there when an agent plans and executes.

mod daemon;
mod observe;

use anyhow::{Context, Result, anyhow};
use clap::Parser;
use mirror_core::config::{Config, MAX_CONFIG, Node};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// Watch this node's mirrors and log every change of their state.
#[derive(Parser)]
#[command(name = "kagami-agent", version)]
struct Options {
    /// The configuration, the same file on every node
    #[arg(long, env = "KAGAMI_CONFIG", default_value = "/etc/kagami/kagami.toml")]
    config: PathBuf,
    /// This node's name [default: the host name]
    #[arg(long, env = "KAGAMI_NODE")]
    node: Option<String>,
    /// Milliseconds between two looks
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(10..=60_000))]
    interval: u64,
}

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
    let options = Options::parse();
    let node = match configured_node(&options) {
        Ok(node) => node,
        Err(error) => {
            log::error!("{error:#}");
            return ExitCode::from(2);
        }
    };
    let interval = Duration::from_millis(options.interval);
    match run(&node, interval) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn configured_node(options: &Options) -> Result<Node> {
    let path: &Path = &options.config;
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_CONFIG as u64 + 1).read_to_end(&mut bytes))
        .with_context(|| path.display().to_string())?;
    let config = Config::parse_bytes(&bytes, path).map_err(|refusal| anyhow!("{refusal}"))?;
    let (name, node) = match &options.node {
        Some(name) => (name.clone(), config.node(name)),
        None => {
            let host = nix::unistd::gethostname()?.to_string_lossy().into_owned();
            let node = config.node_of_host(&host);
            (host, node)
        }
    };
    node.cloned().ok_or_else(|| {
        anyhow!(
            "node `{name}` is not in {}; name one with --node",
            path.display()
        )
    })
}

#[tokio::main(flavor = "current_thread")]
async fn run(node: &Node, interval: Duration) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut view = observe::View::default();
    log::info!("watching node {} every {interval:?}", node.name);
    loop {
        tokio::select! {
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            _ = ticks.tick() => {
                let seen = daemon::status(node).await;
                for change in view.update(seen) {
                    log::log!(change.level, "{}", change.text);
                }
            }
        }
    }
}
