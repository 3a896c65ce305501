//! `kagami-mirror`: the daemon that keeps mirrors.

use clap::Parser;
use mirror_core::config::{Config, MAX_CONFIG};
use mirror_core::error::{ErrorId, ExitCode, Refusal};
use mirror_nbd::daemon::Daemon;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// The daemon that keeps this node's mirrors.
#[derive(Parser)]
#[command(name = "kagami-mirror", version)]
struct Arguments {
    /// The configuration, the same file on every node.
    #[arg(
        long,
        env = "KAGAMI_CONFIG",
        value_name = "FILE",
        default_value = "/etc/kagami/kagami.toml"
    )]
    config: PathBuf,

    /// This node's name in the configuration [default: the host name].
    #[arg(long, env = "KAGAMI_NODE", value_name = "NAME")]
    node: Option<String>,
}

fn main() {
    let arguments = Arguments::parse();
    let log = env_logger::Env::default().default_filter_or("info");
    env_logger::Builder::from_env(log)
        .format_timestamp_millis()
        .init();
    let code = match run(arguments) {
        Ok(()) => ExitCode::Done,
        Err(refusal) => {
            log::error!("{refusal}");
            refusal.id.exit_code()
        }
    };
    // Not a return: a mirror that did not come to rest must not hold the process, and its
    // memory must stay until the kernel has let go of it.
    std::process::exit(code as i32);
}

fn run(arguments: Arguments) -> Result<(), Refusal> {
    let config = read_config(&arguments.config)?;
    let node = match arguments.node {
        Some(node) => node,
        None => node_of_host(&config)?,
    };
    let daemon = Daemon::new(&config, &node)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Refusal::new(ErrorId::Internal, error.to_string()))?;
    runtime.block_on(daemon.run(&config))
}

fn read_config(path: &Path) -> Result<Config, Refusal> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_CONFIG as u64 + 1).read_to_end(&mut bytes))
        .map_err(|error| {
            let message = format!("{}: {error}", path.display());
            Refusal::new(ErrorId::ConfigUnreadable, message)
        })?;
    Config::parse_bytes(&bytes, path)
}

fn node_of_host(config: &Config) -> Result<String, Refusal> {
    let host = nix::unistd::gethostname().map_err(|errno| {
        let message = format!("the host has no name ({errno}); name the node with --node");
        Refusal::new(ErrorId::UnknownNode, message)
    })?;
    let host = host.to_string_lossy();
    // A host that is no node is refused by its own name.
    let node = config.node_of_host(&host).map(|node| &node.name);
    Ok(node.map_or_else(|| host.to_string(), String::clone))
}
