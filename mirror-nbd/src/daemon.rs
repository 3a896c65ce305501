//! The daemon as a whole: its lock, its mirrors, and how it starts and ends.

use crate::control_socket;
use crate::mailbox::Letter;
use crate::mirror::Mirror;
use crate::unix_socket::UnixSocket;
use crate::{nbd, peer};
use mirror_core::config::{self, Config};
use mirror_core::error::{ErrorId, Refusal};
use mirror_core::types::BootId;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// How long all mirrors may take to come to rest.
const SHUTDOWN: Duration = Duration::from_secs(12);

/// This node's daemon.
pub struct Daemon {
    node: config::Node,
    control_socket: PathBuf,
    mirrors: Vec<Arc<Mirror>>,
    _lock: Flock<File>,
}

impl Daemon {
    /// A daemon for a node, locked against a second one; nothing runs yet.
    ///
    /// # Errors
    ///
    /// A [`Refusal`] that says why it cannot be.
    pub fn new(config: &Config, node: &str) -> Result<Daemon, Refusal> {
        let Some(node) = config.node(node) else {
            let known: Vec<&str> = config.nodes.iter().map(|node| node.name.as_str()).collect();
            let message = format!(
                "node {node} is not in the configuration, which has {}; name one with --node",
                known.join(", ")
            );
            return Err(Refusal::new(ErrorId::UnknownNode, message));
        };
        let lock = lock(node)?;
        let boot = boot_id()?;
        let ours = config.mirrors.iter();
        let ours = ours.filter(|mirror| mirror.sides_of(&node.name).is_some());
        Ok(Daemon {
            node: node.clone(),
            control_socket: node.control_socket(),
            mirrors: ours
                .map(|mirror| Arc::new(Mirror::new(config, mirror, node, boot)))
                .collect(),
            _lock: lock,
        })
    }

    /// Serves until a signal ends it.
    ///
    /// # Errors
    ///
    /// A [`Refusal`] when it could not start.
    pub async fn run(self, config: &Config) -> Result<(), Refusal> {
        let daemon = Arc::new(self);
        let internal = |error: std::io::Error| Refusal::new(ErrorId::Internal, error.to_string());
        let mut terminate = signal(SignalKind::terminate()).map_err(internal)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(internal)?;

        let path = daemon.control_socket();
        let socket = UnixSocket::bind(path).await.map_err(|error| {
            let message = format!("control socket {}: {error}", path.display());
            Refusal::new(ErrorId::ListenFailed, message)
        })?;
        let mut doors = JoinSet::new();
        for mirror in &daemon.mirrors {
            doors.spawn(nbd::listen::serve(Arc::clone(mirror)));
            daemon.seek_peer(mirror, config);
        }
        // At once, so that a slow disk holds up no other mirror.
        let mut starting = JoinSet::new();
        for mirror in &daemon.mirrors {
            let mirror = Arc::clone(mirror);
            starting.spawn(async move {
                let outcome = mirror.up_at_start().await;
                if let Err(refusal) = &outcome {
                    log::error!("{}: {refusal}", mirror.config.name);
                }
                outcome.is_ok()
            });
        }
        doors.spawn(control_socket::serve(socket, Arc::clone(&daemon)));
        let serving = {
            let daemon = Arc::clone(&daemon);
            tokio::spawn(async move {
                let mut up = 0;
                while let Some(came_up) = starting.join_next().await {
                    up += usize::from(came_up.unwrap_or(false));
                }
                let path = daemon.control_socket().display();
                let all = daemon.mirrors.len();
                log::info!(
                    "node {} serves: {up} of {all} mirrors up, control socket {path}",
                    daemon.node()
                );
            })
        };

        let signal = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        log::info!("{signal}: going down");
        // A mirror that still waits for its disk must not start behind the others' end.
        serving.abort();
        let _ = serving.await;
        daemon.descend().await;
        // While the lock is held, so that no socket of the next daemon is taken away.
        doors.shutdown().await;
        log::info!("node {} is down", daemon.node());
        Ok(())
    }

    /// Its node's name.
    pub fn node(&self) -> &str {
        &self.node.name
    }

    /// Where it is controlled.
    pub fn control_socket(&self) -> &Path {
        &self.control_socket
    }

    /// A mirror of this node.
    ///
    /// # Errors
    ///
    /// [`ErrorId::UnknownMirror`].
    pub fn mirror(&self, name: &str) -> Result<&Arc<Mirror>, Refusal> {
        let mut mirrors = self.mirrors.iter();
        mirrors
            .find(|mirror| mirror.config.name == name)
            .ok_or_else(|| {
                let message = format!(
                    "node {} has no mirror {name} in the configuration its daemon started with",
                    self.node()
                );
                Refusal::new(ErrorId::UnknownMirror, message)
            })
    }

    /// One mirror, or all without a name.
    ///
    /// # Errors
    ///
    /// [`ErrorId::UnknownMirror`].
    pub fn chosen(&self, name: Option<&str>) -> Result<&[Arc<Mirror>], Refusal> {
        match name {
            Some(name) => self.mirror(name).map(std::slice::from_ref),
            None => Ok(&self.mirrors),
        }
    }

    fn seek_peer(&self, mirror: &Arc<Mirror>, config: &Config) {
        let port = mirror.config.port;
        let address = |node: &config::Node| node.addresses.first().copied();
        let mirror = Arc::clone(mirror);
        if mirror.config.connects(self.node()) {
            let peer = config.node(&mirror.peer().node).and_then(address);
            if let Some(peer) = peer {
                tokio::spawn(peer::connect(mirror, SocketAddr::new(peer, port)));
            }
        } else if let Some(own) = address(&self.node) {
            tokio::spawn(peer::accept(mirror, SocketAddr::new(own, port)));
        }
    }

    /// Brings all mirrors to rest, within bounded time.
    async fn descend(&self) {
        for mirror in &self.mirrors {
            mirror.post(Letter::Shutdown);
        }
        let all = async {
            for mirror in &self.mirrors {
                mirror.stopped().await;
            }
        };
        if timeout(SHUTDOWN, all).await.is_err() {
            for mirror in self.mirrors.iter().filter(|mirror| mirror.is_up()) {
                let name = &mirror.config.name;
                log::error!("{name}: did not come to rest; the next start treats it as a crash");
            }
        }
    }
}

fn lock(node: &config::Node) -> Result<Flock<File>, Refusal> {
    let path = node.run_dir.join(format!("{}-mirror.pid", node.name));
    let failed = |error: std::io::Error| {
        Refusal::new(ErrorId::Internal, format!("{}: {error}", path.display()))
    };
    std::fs::create_dir_all(&node.run_dir).map_err(failed)?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(failed)?;
    let mut file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| {
        let owner = std::fs::read_to_string(&path).unwrap_or_default();
        let message = format!(
            "a daemon of node {} is running (process {}); stop that one first",
            node.name,
            owner.trim()
        );
        Refusal::new(ErrorId::DaemonRunning, message)
    })?;
    file.set_len(0).map_err(failed)?;
    writeln!(file, "{}", std::process::id()).map_err(failed)?;
    Ok(file)
}

fn boot_id() -> Result<BootId, Refusal> {
    const PLACE: &str = "/proc/sys/kernel/random/boot_id";
    let unknown = |error: String| Refusal::new(ErrorId::Internal, format!("{PLACE}: {error}"));
    let text = std::fs::read_to_string(PLACE).map_err(|error| unknown(error.to_string()))?;
    let digits = text.trim().replace('-', "");
    u128::from_str_radix(&digits, 16)
        .map(BootId)
        .map_err(|error| unknown(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_daemon_of_the_same_node_is_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let node = config::Node {
            name: "a".to_owned(),
            addresses: Vec::new(),
            run_dir: directory.path().to_owned(),
            state_dir: directory.path().to_owned(),
            io_backend: config::IoBackend::Auto,
        };
        let first = lock(&node).expect("free");
        let refusal = lock(&node).expect_err("taken");
        assert_eq!(refusal.id, ErrorId::DaemonRunning);
        assert!(refusal.message.contains(&std::process::id().to_string()));
        drop(first);
        lock(&node).expect("free again");
    }

    #[test]
    fn the_boot_has_an_id() {
        assert!(!boot_id().expect("an id").is_none());
    }
}
