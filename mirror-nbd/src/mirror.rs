//! One mirror as the main thread knows it: its configuration, and its thread while it is up.

use crate::backend::Backend;
use crate::backing::Store;
use crate::buffers::Pool;
use crate::choice::{Choice, choose};
use crate::disk::Disk;
use crate::driver::{Driver, Ending, Parts};
use crate::link::{Link, Seek};
use crate::mailbox::{CommandResult, Inbox, Letter, Mailbox, mailbox};
use crate::nbd::negotiate::Export;
use mirror_core::config::{self, Config, IoBackend, Metadata, Side};
use mirror_core::control::{Command, MirrorStatus};
use mirror_core::error::{ErrorId, Refusal};
use mirror_core::limits::{ACTIVITY_LOG_SLOTS, DEFAULT_LEASE};
use mirror_core::node::{MetadataPlace, Node, NodeConfig};
use mirror_core::types::{ArbiterId, BootId, DiskState, Role};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep, timeout};

/// How long a mirror's thread may take to say how it is.
const STATUS_PATIENCE: Duration = Duration::from_secs(2);

/// How long a daemon that starts waits for a disk that is in use. The kernel keeps a killed
/// daemon's disk locked until the last of its operations has ended, after the process is gone.
const BUSY_PATIENCE: Duration = Duration::from_secs(10);
const BUSY_POLL: Duration = Duration::from_millis(50);

/// A mirror of this node.
pub struct Mirror {
    /// Its configuration.
    pub config: config::Mirror,
    cluster: String,
    node: String,
    boot: BootId,
    io_backend: IoBackend,
    /// Whether its peer is wanted.
    pub seek: watch::Sender<Seek>,
    /// The size of the export while it serves.
    pub export: watch::Sender<Option<u64>>,
    /// Whether its thread runs.
    running: watch::Sender<bool>,
    state: Mutex<State>,
}

enum State {
    Up(Mailbox),
    /// Not up; the status says why.
    Stopped(Box<MirrorStatus>),
}

type Ready = oneshot::Sender<Result<(), Refusal>>;

impl Mirror {
    /// A mirror that is not up yet.
    pub fn new(
        config: &Config,
        mirror: &config::Mirror,
        node: &config::Node,
        boot: BootId,
    ) -> Mirror {
        let status = stopped(&mirror.name, "not started yet".to_owned());
        Mirror {
            config: mirror.clone(),
            cluster: config.cluster.clone(),
            node: node.name.clone(),
            boot,
            io_backend: node.io_backend,
            seek: watch::Sender::new(Seek::default()),
            export: watch::Sender::new(None),
            running: watch::Sender::new(false),
            state: Mutex::new(State::Stopped(Box::new(status))),
        }
    }

    /// This node's side of it.
    pub fn side(&self) -> &Side {
        self.sides().0
    }

    /// The peer's side.
    pub fn peer(&self) -> &Side {
        self.sides().1
    }

    /// Whether its thread runs.
    pub fn is_up(&self) -> bool {
        matches!(*self.state(), State::Up(_))
    }

    /// Starts its thread and waits until the disk was attached.
    ///
    /// # Errors
    ///
    /// Why it did not come up; status shows the same.
    pub async fn up(self: &Arc<Mirror>) -> Result<(), Refusal> {
        let (ready, came_up) = oneshot::channel();
        self.start(ready)?;
        came_up.await.unwrap_or_else(|_| {
            let what = format!("mirror {}: its thread ended", self.config.name);
            Err(Refusal::new(ErrorId::Internal, what))
        })
    }

    /// [`Mirror::up`] for a daemon that starts: a disk still locked, by the last operations of a
    /// daemon that was killed just before, is waited for.
    ///
    /// # Errors
    ///
    /// As [`Mirror::up`].
    pub async fn up_at_start(self: &Arc<Mirror>) -> Result<(), Refusal> {
        let until = Instant::now() + BUSY_PATIENCE;
        let mut told = false;
        loop {
            match self.up().await {
                Err(refusal) if refusal.id == ErrorId::StoreBusy && Instant::now() < until => {
                    if !told {
                        log::info!("{}: waiting for the disk: {refusal}", self.config.name);
                        told = true;
                    }
                    sleep(BUSY_POLL).await;
                }
                outcome => return outcome,
            }
        }
    }

    /// Has a command carried out.
    pub async fn command(&self, what: Command) -> CommandResult {
        let (answer, answered) = oneshot::channel();
        let letter = Letter::Command { what, answer };
        if self.post(letter)
            && let Ok(result) = answered.await
        {
            return result;
        }
        let name = &self.config.name;
        let mut message = format!("mirror {name} is not up");
        if let State::Stopped(status) = &*self.state() {
            let reasons = status.reasons.join("; ");
            message = format!("{message} ({reasons}); bring it up with `kagami up {name}`");
        }
        Err(Refusal::new(ErrorId::NotRunning, message))
    }

    /// How it is.
    pub async fn status(&self) -> MirrorStatus {
        let (answer, answered) = oneshot::channel();
        if self.post(Letter::Status { answer }) {
            match timeout(STATUS_PATIENCE, answered).await {
                Ok(Ok(status)) => return status,
                // It ends just now; its last state will tell.
                Ok(Err(_)) => {
                    let _ = timeout(STATUS_PATIENCE, self.stopped()).await;
                }
                Err(_) => return silent(&self.config.name),
            }
        }
        match &*self.state() {
            State::Stopped(status) => (**status).clone(),
            State::Up(_) => silent(&self.config.name),
        }
    }

    /// Sends a letter to its thread; whether there is one.
    pub fn post(&self, letter: Letter) -> bool {
        match &*self.state() {
            State::Up(mailbox) => {
                mailbox.post(letter);
                true
            }
            State::Stopped(_) => false,
        }
    }

    /// Waits until its thread has ended.
    pub async fn stopped(&self) {
        // Cannot fail: the sender lives in `self`.
        let _ = self.running.subscribe().wait_for(|running| !running).await;
    }

    fn start(self: &Arc<Mirror>, ready: Ready) -> Result<(), Refusal> {
        let name = &self.config.name;
        let mut state = self.state();
        if matches!(*state, State::Up(_)) {
            let message = format!("mirror {name} is up");
            return Err(Refusal::new(ErrorId::AlreadyRunning, message));
        }
        let internal = |error| Refusal::new(ErrorId::Internal, format!("mirror {name}: {error}"));
        let (mailbox, inbox) = mailbox().map_err(internal)?;
        let mirror = Arc::clone(self);
        // The kernel cuts the name at 15 bytes.
        let thread = std::thread::Builder::new().name(name.clone());
        thread
            .spawn(move || mirror.live(inbox, ready))
            .map_err(internal)?;
        *state = State::Up(mailbox);
        self.running.send_replace(true);
        Ok(())
    }

    /// The whole life of its thread.
    fn live(&self, inbox: Inbox, ready: Ready) {
        let name = &self.config.name;
        let work = AssertUnwindSafe(|| self.work(inbox, ready));
        let last = match catch_unwind(work) {
            Ok(Ok(status)) => status,
            Ok(Err(refusal)) => stopped(name, refusal.to_string()),
            Err(_) => {
                log::error!("{name}: its thread met a bug and was stopped");
                let what = "its thread met a bug and was stopped; the log says where";
                stopped(name, format!("{}: {what}", ErrorId::Internal))
            }
        };
        self.export.send_replace(None);
        self.seek.send_replace(Seek::default());
        *self.state() = State::Stopped(Box::new(last));
        self.running.send_replace(false);
    }

    fn work(&self, inbox: Inbox, ready: Ready) -> Result<MirrorStatus, Refusal> {
        let name = &self.config.name;
        let (store, choice) = match self.open() {
            Ok(opened) => opened,
            Err(refusal) => {
                // Who started it may have left.
                let _ = ready.send(Err(refusal.clone()));
                return Err(refusal);
            }
        };
        let ending = match choice {
            Choice::Ring(ring) => self.drive(store, ring, inbox, ready),
            Choice::Plain(plain) => self.drive(store, plain, inbox, ready),
        };
        Ok(match ending? {
            Ending::Down => stopped(name, format!("down; `kagami up {name}` brings it up")),
            Ending::NeverUp(status) => *status,
        })
    }

    fn drive(
        &self,
        store: Store,
        backend: impl Backend,
        inbox: Inbox,
        ready: Ready,
    ) -> Result<Ending, Refusal> {
        let name = &self.config.name;
        let pool = Pool::new();
        let parts = Parts {
            name: name.clone(),
            node: Node::new(self.node_config(), Box::new(random_id)),
            backend,
            disk: Disk::new(name.clone(), store, pool.clone()),
            pool,
            link: Link::new(name.clone(), self.seek.clone()),
            inbox,
            export: self.export.clone(),
            ready,
        };
        Driver::new(parts).run(self.boot).map_err(|errno| {
            let what = format!("mirror {name}: waiting for I/O failed: {errno}");
            Refusal::new(ErrorId::Internal, what)
        })
    }

    fn open(&self) -> Result<(Store, Choice), Refusal> {
        let store = Store::open(self.side())?;
        let name = &self.config.name;
        let choice = choose(self.io_backend, name)?;
        log::info!(
            "{name}: {} opened, {} bytes{}, {choice}",
            self.side().disk.display(),
            store.size,
            if store.direct { ", direct I/O" } else { "" }
        );
        Ok((store, choice))
    }

    fn node_config(&self) -> NodeConfig {
        NodeConfig {
            cluster: self.cluster.clone(),
            mirror: self.config.name.clone(),
            node: self.node.clone(),
            peer: self.peer().node.clone(),
            metadata: match self.side().metadata {
                Metadata::Internal => MetadataPlace::Internal,
                Metadata::External(_) => MetadataPlace::External,
            },
            stall_timeout: self.config.stall_timeout,
            copy_rates: self.config.copy_rates,
            arbiter: ArbiterId::NONE,
            lease: DEFAULT_LEASE,
            log_extents: ACTIVITY_LOG_SLOTS,
        }
    }

    fn sides(&self) -> (&Side, &Side) {
        let sides = self.config.sides_of(&self.node);
        sides.expect("the daemon takes only mirrors of its node")
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // The state is replaced whole, so a panic elsewhere leaves it good.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Export for Mirror {
    fn name(&self) -> &str {
        &self.config.name
    }

    fn size(&self) -> Option<u64> {
        *self.export.borrow()
    }

    fn why_not(&self) -> String {
        format!(
            "mirror {} is not served on node {}, which is not its Primary; \
             use the Primary, or make this node Primary",
            self.config.name, self.node
        )
    }
}

fn stopped(name: &str, reason: String) -> MirrorStatus {
    MirrorStatus {
        name: name.to_owned(),
        reasons: vec![reason],
        ..MirrorStatus::default()
    }
}

/// A mirror that is up, but does not tell how it is.
fn silent(name: &str) -> MirrorStatus {
    MirrorStatus {
        role: Role::Unknown,
        disk: DiskState::Unknown,
        ..stopped(name, "its thread does not answer".to_owned())
    }
}

fn random_id() -> u128 {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("Linux gives random bytes");
    u128::from_le_bytes(bytes)
}
