//! The demo's two daemons: started, killed, asked, and never left behind.

use super::plan::{MIRROR, NODES, Plan};
use super::{failed, interrupt};
use crate::client::Client;
use crate::create::{self, CreateArgs};
use crate::human;
use crate::nbd_client::NbdClient;
use crate::wait::{Goal, POLL};
use mirror_core::control::{Command as Order, CommandOutcome, MirrorStatus};
use mirror_core::error::Refusal;
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, OpenOptions};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long anything in a demo may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a daemon may take to end in order.
const STOP_TIMEOUT: Duration = Duration::from_secs(15);

/// How long a guest request may take before the story calls it lost.
const NBD_TIMEOUT: Duration = Duration::from_secs(20);

/// Two nodes, their files and their processes.
#[derive(Debug)]
pub struct Cluster {
    /// What was laid out.
    pub plan: Plan,
    daemon: PathBuf,
    children: [Option<Child>; 2],
}

impl Cluster {
    /// Makes both disks replicas. Starts nothing yet.
    pub fn new(plan: Plan, daemon: PathBuf) -> Result<Cluster, Refusal> {
        let cluster = Cluster {
            plan,
            daemon,
            children: [None, None],
        };
        let mirror = &cluster.plan.config.mirrors[0];
        for side in &mirror.sides {
            let args = CreateArgs {
                size: Some(cluster.plan.size),
                ..CreateArgs::default()
            };
            create::create(&cluster.plan.config, mirror, side, &args)?;
        }
        Ok(cluster)
    }

    /// Starts a node's daemon and waits until it answers.
    pub fn start(&mut self, node: usize) -> Result<(), Refusal> {
        let log = self.plan.log(node);
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .map_err(|error| failed(format!("{}: {error}", log.display())))?;
        let errors = log.try_clone().map_err(|error| failed(error.to_string()))?;
        let mut command = Command::new(&self.daemon);
        command
            .arg("--config")
            .arg(self.plan.config_file())
            .args(["--node", NODES[node].0])
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            // Ctrl-C is for the demo, which then stops its daemons in order.
            .process_group(0);
        let with_parent = || prctl::set_pdeathsig(Signal::SIGTERM).map_err(Into::into);
        // SAFETY: between fork and exec the closure makes one system call and allocates nothing.
        // It lets a daemon end when the demo is killed in a way that it cannot catch.
        unsafe { command.pre_exec(with_parent) };
        let child = command
            .spawn()
            .map_err(|error| failed(format!("{}: {error}", self.daemon.display())))?;
        self.children[node] = Some(child);
        self.wait(node, "the daemon answers", |_| true).map(drop)
    }

    /// kill -9: the node's daemon is gone at once, whatever it was doing.
    pub fn kill(&mut self, node: usize) {
        if let Some(mut child) = self.children[node].take() {
            // Fails only for a child that has ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Has a node's daemon end in order.
    pub fn stop(&mut self, node: usize) -> Result<(), Refusal> {
        let Some(child) = &mut self.children[node] else {
            return Ok(());
        };
        let _ = kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM);
        let start = Instant::now();
        while start.elapsed() < STOP_TIMEOUT {
            if let Ok(Some(status)) = child.try_wait() {
                self.children[node] = None;
                let name = NODES[node].0;
                return if status.success() {
                    Ok(())
                } else {
                    Err(failed(format!(
                        "the daemon of {name} ended badly: {status}"
                    )))
                };
            }
            std::thread::sleep(POLL);
        }
        self.kill(node);
        let name = NODES[node].0;
        Err(failed(format!(
            "the daemon of {name} did not end within {STOP_TIMEOUT:?}"
        )))
    }

    /// What a node's daemon says about the mirror.
    pub fn status(&self, node: usize) -> Result<MirrorStatus, Refusal> {
        self.client(node)?.mirror_status(MIRROR)
    }

    /// Has a node's daemon carry out a command.
    pub fn order(&self, node: usize, order: Order) -> Result<CommandOutcome, Refusal> {
        self.client(node)?.command(MIRROR, order)
    }

    /// Waits for a state that `kagami status --wait-for` knows.
    pub fn wait_for(&mut self, node: usize, goal: Goal) -> Result<MirrorStatus, Refusal> {
        self.wait(node, &format!("{goal:?}"), |status| goal.is_reached(status))
    }

    /// Waits until a node's status is as wished, and shows each look to the predicate.
    pub fn wait(
        &mut self,
        node: usize,
        what: &str,
        mut reached: impl FnMut(&MirrorStatus) -> bool,
    ) -> Result<MirrorStatus, Refusal> {
        let start = Instant::now();
        let name = NODES[node].0;
        loop {
            interrupt::check()?;
            if let Some(child) = &mut self.children[node]
                && let Ok(Some(status)) = child.try_wait()
            {
                return Err(failed(format!(
                    "the daemon of {name} ended by itself: {status}"
                )));
            }
            let seen = match self.status(node) {
                Ok(status) if reached(&status) => return Ok(status),
                Ok(status) => human::headline(&status),
                Err(refusal) => refusal.to_string(),
            };
            if start.elapsed() > PATIENCE {
                return Err(failed(format!(
                    "{name} never came to: {what}; it is {seen}"
                )));
            }
            std::thread::sleep(POLL / 5);
        }
    }

    /// A guest's connection to the mirror on a node; waits for the export to appear.
    pub fn guest(&self, node: usize) -> Result<NbdClient, Refusal> {
        let socket = self.plan.nbd_socket(node);
        let start = Instant::now();
        loop {
            interrupt::check()?;
            match NbdClient::connect(&socket, MIRROR, NBD_TIMEOUT) {
                Ok(client) => return Ok(client),
                Err(error) if start.elapsed() > Duration::from_secs(5) => {
                    return Err(failed(format!("{}: {error}", socket.display())));
                }
                Err(_) => std::thread::sleep(POLL / 5),
            }
        }
    }

    /// The end of a node's log.
    pub fn log_tail(&self, node: usize, lines: usize) -> Vec<String> {
        let text = fs::read(self.plan.log(node)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..]
            .iter()
            .map(|line| (*line).to_owned())
            .collect()
    }

    fn client(&self, node: usize) -> Result<Client, Refusal> {
        Client::connect(&self.plan.config.nodes[node])
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for node in 0..2 {
            self.kill(node);
        }
        if self.plan.remove && fs::remove_dir_all(&self.plan.dir).is_err() {
            eprintln!(
                "kagami: warning: {} could not be removed",
                self.plan.dir.display()
            );
        }
    }
}
