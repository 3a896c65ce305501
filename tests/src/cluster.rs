//! Two nodes on this machine: directories, configuration, daemons, command, faults.

use crate::binaries::binary;
use crate::ledger::Ledger;
use crate::nbd::{NbdAddress, NbdClient};
use crate::process::{Process, deny_io_uring};
use crate::proxy::Proxy;
use crate::status::{MirrorStatus, NodeStatus};
use crate::tool::{Tool, require_root};
use crate::wait::{Deadline, wait_until};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;
use nix::unistd::{Whence, lseek};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

/// 2^10.
pub const KIB: u64 = 1 << 10;
/// 2^20.
pub const MIB: u64 = 1 << 20;
/// 2^30.
pub const GIB: u64 = 1 << 30;

/// One of the two nodes. `b` connects to `a`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Node {
    /// On 127.0.0.1.
    A,
    /// On 127.0.0.2.
    B,
}

impl Node {
    /// Both, in order.
    pub const BOTH: [Node; 2] = [Node::A, Node::B];

    /// Its name in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Node::A => "a",
            Node::B => "b",
        }
    }

    /// The other one.
    pub fn peer(self) -> Node {
        match self {
            Node::A => Node::B,
            Node::B => Node::A,
        }
    }

    fn index(self) -> usize {
        self as usize
    }
}

/// Where the replicas keep their metadata.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MetadataPlace {
    /// At the tail of the disk.
    Internal,
    /// In a file of its own.
    External,
}

/// How the daemons do I/O.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IoBackend {
    /// As the host allows.
    Auto,
    /// With io_uring.
    IoUring,
    /// With epoll and threads.
    Threads,
}

impl IoBackend {
    /// What `KAGAMI_TEST_IO_BACKEND` says, so that any story can be told on any backend.
    fn of_environment() -> IoBackend {
        match std::env::var("KAGAMI_TEST_IO_BACKEND").as_deref() {
            Err(_) | Ok("auto") => IoBackend::Auto,
            Ok("io_uring") => IoBackend::IoUring,
            Ok("threads") => IoBackend::Threads,
            Ok(other) => panic!("KAGAMI_TEST_IO_BACKEND={other} is no backend"),
        }
    }

    fn name(self) -> &'static str {
        match self {
            IoBackend::Auto => "auto",
            IoBackend::IoUring => "io_uring",
            IoBackend::Threads => "threads",
        }
    }
}

/// What kind of cluster a test wants.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// Names of the mirrors; the first is the one that methods without a name mean.
    pub mirrors: Vec<String>,
    /// Bytes of each disk (sparse file). With external metadata this is the device's size.
    pub disk_size: u64,
    /// Where the metadata goes.
    pub metadata: MetadataPlace,
    /// `stall-timeout`.
    pub stall_timeout: Duration,
    /// `resync-max-rate`, in bytes per second.
    pub resync_max_rate: Option<u64>,
    /// Whether the mirror links go through a [`Proxy`] each.
    pub proxied: bool,
    /// Whether the daemons live in a network namespace of their own, so that packets can be
    /// dropped for real (needs root).
    pub own_network: bool,
    /// Whether the mirrors are exported on TCP instead of Unix sockets.
    pub nbd_on_tcp: bool,
    /// Whether everything is kept in memory, where the machine has a place for that.
    pub in_memory: bool,
    /// `io-backend` of both nodes.
    pub io_backend: IoBackend,
    /// What each node's host says to a program that wants io_uring; without it, what this one says.
    pub io_uring_denied: [Option<Errno>; 2],
}

impl Default for ClusterOptions {
    fn default() -> ClusterOptions {
        ClusterOptions {
            mirrors: vec!["r0".to_owned()],
            disk_size: 256 * MIB,
            metadata: MetadataPlace::External,
            stall_timeout: Duration::from_secs(2),
            resync_max_rate: None,
            proxied: false,
            own_network: false,
            nbd_on_tcp: false,
            in_memory: false,
            io_backend: IoBackend::of_environment(),
            io_uring_denied: [None, None],
        }
    }
}

/// What a run of `kagami` came to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CommandResult {
    /// The exit code; -1 when ended by a signal.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl CommandResult {
    /// Requires this exit code.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> CommandResult {
        assert!(
            self.code == code,
            "expected exit code {code}, got {}\nstdout: {}\nstderr: {}",
            self.code,
            self.stdout,
            self.stderr
        );
        self
    }

    /// Requires a refusal with this exit code and error id on standard error.
    #[track_caller]
    pub fn expect_refusal(self, code: i32, id: &str) -> CommandResult {
        let result = self.expect_code(code);
        assert!(
            result.stderr.contains(id),
            "expected {id} in: {}",
            result.stderr
        );
        result
    }
}

/// A link of a mirror: its port and, where asked for, the proxy on it.
#[derive(Debug)]
struct Link {
    port: u16,
    proxy: Option<Proxy>,
}

/// Two nodes in a temporary directory. Dropping it ends the daemons and removes everything; when
/// a test fails, the daemons' logs are printed first.
#[derive(Debug)]
pub struct Cluster {
    // Dropped in this order: daemons before the network they are in and the files they use.
    daemons: [Option<Process>; 2],
    links: Vec<Link>,
    network: Option<Network>,
    nbd: Vec<[NbdAddress; 2]>,
    options: ClusterOptions,
    boots: [Option<PathBuf>; 2],
    directory: tempfile::TempDir,
    one_at_a_time: Arc<Flock<File>>,
}

impl Cluster {
    /// Directories, disks and configuration; nothing is created or started yet.
    #[track_caller]
    pub fn new(options: ClusterOptions) -> Cluster {
        Cluster::under(options, Arc::new(one_at_a_time()))
    }

    /// Another cluster of the same test, whose nodes, ports and files are its own.
    #[track_caller]
    pub fn another(&self, options: ClusterOptions) -> Cluster {
        Cluster::under(options, Arc::clone(&self.one_at_a_time))
    }

    #[track_caller]
    fn under(options: ClusterOptions, lock: Arc<Flock<File>>) -> Cluster {
        let memory = Path::new("/dev/shm");
        let base = match std::env::var_os("KAGAMI_TEST_DIR") {
            Some(directory) => PathBuf::from(directory),
            None if options.in_memory && memory.is_dir() => memory.to_owned(),
            None => std::env::temp_dir(),
        };
        let directory = tempfile::Builder::new()
            .prefix("kagami-")
            .tempdir_in(base)
            .expect("a temporary directory can be made");
        let network = options.own_network.then(Network::new);
        let mut links = Vec::new();
        let mut nbd = Vec::new();
        for mirror in &options.mirrors {
            let port = free_port();
            let proxy = options.proxied.then(|| {
                Proxy::start(
                    SocketAddr::new(PROXY.parse().expect("an address"), port),
                    SocketAddr::new(ADDRESSES[0].parse().expect("an address"), port),
                    ADDRESSES[1].parse().expect("an address"),
                )
            });
            links.push(Link { port, proxy });
            nbd.push(Node::BOTH.map(|node| {
                if options.nbd_on_tcp {
                    NbdAddress::Tcp(SocketAddr::new(
                        ADDRESSES[0].parse().expect("an address"),
                        free_port(),
                    ))
                } else {
                    let socket = format!("{mirror}-{}.sock", node.name());
                    NbdAddress::Unix(directory.path().join(node.name()).join("run").join(socket))
                }
            }));
        }
        let cluster = Cluster {
            daemons: [None, None],
            links,
            network,
            nbd,
            options,
            boots: [None, None],
            directory,
            one_at_a_time: lock,
        };
        for node in Node::BOTH {
            for part in ["run", "state"] {
                fs::create_dir_all(cluster.node_directory(node).join(part))
                    .expect("a directory can be made");
            }
            for mirror in &cluster.options.mirrors {
                File::create(cluster.disk_of(node, mirror))
                    .and_then(|file| file.set_len(cluster.options.disk_size))
                    .expect("a sparse file can be made");
            }
            fs::write(cluster.config(node), cluster.config_text(node))
                .expect("a file can be written");
        }
        cluster
    }

    /// A cluster whose mirrors are created, connected and Primary on `a`, with equal (empty)
    /// replicas.
    #[track_caller]
    pub fn mirrored(options: ClusterOptions) -> Cluster {
        let mut cluster = Cluster::new(options);
        cluster.create_and_start();
        for mirror in cluster.options.mirrors.clone() {
            cluster
                .kagami(
                    Node::A,
                    &["primary", &mirror, "--initial", "--assume-clean"],
                )
                .expect_code(0);
        }
        cluster.wait_mirrored();
        cluster
    }

    /// `kagami create` for every mirror on both nodes, then both daemons, connected.
    #[track_caller]
    pub fn create_and_start(&mut self) {
        for node in Node::BOTH {
            for mirror in self.options.mirrors.clone() {
                self.kagami(node, &["create", &mirror]).expect_code(0);
            }
            self.start(node);
        }
        for mirror in self.options.mirrors.clone() {
            self.wait_for(Node::A, &mirror, 20, "Connected", |status| {
                status.link == "Connected"
            });
        }
    }

    /// The options it was made with.
    pub fn options(&self) -> &ClusterOptions {
        &self.options
    }

    /// The name of the first mirror.
    pub fn mirror(&self) -> &str {
        &self.options.mirrors[0]
    }

    /// The temporary directory of it all.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    fn node_directory(&self, node: Node) -> PathBuf {
        self.directory().join(node.name())
    }

    /// A node's configuration file.
    pub fn config(&self, node: Node) -> PathBuf {
        self.directory().join(format!("{}.toml", node.name()))
    }

    /// A node's disk of the first mirror.
    pub fn disk(&self, node: Node) -> PathBuf {
        self.disk_of(node, self.mirror())
    }

    /// Locks a node's disk of the first mirror as another program would, as soon as it is free.
    #[track_caller]
    pub fn lock_disk(&self, node: Node) -> Flock<File> {
        let disk = File::open(self.disk(node)).expect("the disk can be opened");
        Flock::lock(disk, FlockArg::LockExclusive).expect("a lock on a file")
    }

    fn disk_of(&self, node: Node, mirror: &str) -> PathBuf {
        self.node_directory(node).join(format!("{mirror}.img"))
    }

    fn metadata_of(&self, node: Node, mirror: &str) -> PathBuf {
        self.node_directory(node).join(format!("{mirror}.meta"))
    }

    /// A node's metadata file of the first mirror, where it is external.
    pub fn metadata(&self, node: Node) -> PathBuf {
        self.metadata_of(node, self.mirror())
    }

    /// A daemon's control socket.
    pub fn control_socket(&self, node: Node) -> PathBuf {
        self.node_directory(node)
            .join("run")
            .join(format!("{}-mirror.sock", node.name()))
    }

    /// Where the listening node of a mirror waits for its peer.
    pub fn link_address(&self, mirror: usize) -> SocketAddr {
        SocketAddr::new(
            ADDRESSES[0].parse().expect("an address"),
            self.links[mirror].port,
        )
    }

    /// The proxy on a mirror's link.
    #[track_caller]
    pub fn proxy(&self, mirror: usize) -> &Proxy {
        self.links[mirror]
            .proxy
            .as_ref()
            .expect("the cluster was made with `proxied`")
    }

    /// The configuration as this node reads it: with a proxy, `b` finds `a` at the proxy's address.
    pub fn config_text(&self, reader: Node) -> String {
        let mut text = String::from("[cluster]\nname = \"test\"\ninsecure = true\n");
        for node in Node::BOTH {
            let proxied = self.options.proxied && reader == Node::B && node == Node::A;
            let address = if proxied {
                PROXY
            } else {
                ADDRESSES[node.index()]
            };
            let directory = self.node_directory(node);
            write!(
                text,
                "\n[[node]]\nname = \"{}\"\naddresses = [\"{address}\"]\n\
                 run-dir = \"{dir}/run\"\nstate-dir = \"{dir}/state\"\nio-backend = \"{io}\"\n",
                node.name(),
                dir = directory.display(),
                io = self.options.io_backend.name(),
            )
            .expect("writing to a string");
        }
        for (index, mirror) in self.options.mirrors.iter().enumerate() {
            let both = |value: &dyn Fn(Node) -> String| {
                let [a, b] = Node::BOTH.map(value);
                format!("{{ a = \"{a}\", b = \"{b}\" }}")
            };
            let metadata = match self.options.metadata {
                MetadataPlace::Internal => "\"internal\"".to_owned(),
                MetadataPlace::External => {
                    both(&|node| self.metadata_of(node, mirror).display().to_string())
                }
            };
            write!(
                text,
                "\n[[mirror]]\nname = \"{mirror}\"\nmode = \"sync\"\nport = {port}\n\
                 disk = {disk}\nmetadata = {metadata}\nnbd = {nbd}\ndevice = \"none\"\n\
                 stall-timeout = \"{stall}ms\"\n",
                port = self.links[index].port,
                disk = both(&|node| self.disk_of(node, mirror).display().to_string()),
                nbd = both(&|node| self.nbd[index][node.index()].config()),
                stall = self.options.stall_timeout.as_millis(),
            )
            .expect("writing to a string");
            if let Some(rate) = self.options.resync_max_rate {
                writeln!(text, "resync-max-rate = \"{rate}B\"").expect("writing to a string");
            }
        }
        text
    }

    /// Lets a node's next daemons find that the machine was started anew: they see a boot id
    /// that was never seen before (needs root).
    #[track_caller]
    pub fn reboot(&mut self, node: Node) {
        require_root("a mount namespace");
        let path = self.node_directory(node).join("boot_id");
        let id = fastrand::u128(..) >> 4;
        let text = format!("{id:032x}");
        let parts = [
            &text[..8],
            &text[8..12],
            &text[12..16],
            &text[16..20],
            &text[20..],
        ];
        fs::write(&path, parts.join("-") + "\n").expect("a file can be written");
        self.boots[node.index()] = Some(path);
    }

    /// The daemon's command line for a node.
    pub fn daemon_command(&self, node: Node) -> Command {
        let daemon = binary("kagami-mirror");
        let mut command = match (&self.network, &self.boots[node.index()]) {
            (None, None) => Command::new(daemon),
            (None, Some(boot)) => {
                let script = "mount --bind \"$0\" /proc/sys/kernel/random/boot_id && exec \"$@\"";
                let mut tool = Tool::new("unshare")
                    .args(["--mount", "--propagation", "private", "sh", "-c", script])
                    .into_command();
                tool.arg(boot).arg(daemon);
                tool
            }
            (Some(network), _) => {
                let mut tool = Tool::new("ip").into_command();
                tool.args(["netns", "exec", &network.name]).arg(daemon);
                tool
            }
        };
        command
            .arg("--config")
            .arg(self.config(node))
            .args(["--node", node.name()])
            .env_remove("KAGAMI_CONFIG")
            .env_remove("KAGAMI_NODE");
        if let Some(errno) = self.options.io_uring_denied[node.index()] {
            deny_io_uring(&mut command, errno);
        }
        command
    }

    /// Starts a node's daemon and waits until it has all its disks. Call it from the test's own
    /// thread: the daemon ends with the thread that started it.
    #[track_caller]
    pub fn start(&mut self, node: Node) {
        self.start_without_disk(node);
        for mirror in &self.options.mirrors {
            self.wait_for(node, mirror, 20, "the disk", |status| {
                status.disk != "Diskless"
            });
        }
    }

    /// Starts a node's daemon and waits until it answers, whatever its disks are like.
    #[track_caller]
    pub fn start_without_disk(&mut self, node: Node) {
        assert!(
            self.daemons[node.index()].is_none(),
            "the daemon of {} runs already",
            node.name()
        );
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log(node))
            .expect("a log file can be opened");
        let mut command = self.daemon_command(node);
        command
            .stdin(std::process::Stdio::null())
            .stdout(log.try_clone().expect("a file handle"))
            .stderr(log);
        let name = format!("kagami-mirror of {}", node.name());
        self.daemons[node.index()] = Some(Process::start(&name, &mut command));
        wait_until(Deadline::seconds(20), &format!("{name} to answer"), || {
            let status = self.kagami(node, &["status", "--json"]);
            if status.code == 0 {
                return Ok(());
            }
            Err(format!(
                "{}; status says {}: {}",
                self.daemons[node.index()]
                    .as_mut()
                    .expect("just started")
                    .describe(),
                status.code,
                status.stderr
            ))
        });
    }

    #[track_caller]
    fn daemon(&self, node: Node) -> &Process {
        self.daemons[node.index()]
            .as_ref()
            .unwrap_or_else(|| panic!("no daemon of {} was started", node.name()))
    }

    /// Ends a node's daemon with SIGKILL.
    #[track_caller]
    pub fn kill(&mut self, node: Node) {
        self.daemons[node.index()]
            .take()
            .unwrap_or_else(|| panic!("no daemon of {} was started", node.name()))
            .kill();
    }

    /// Ends a node's daemon with SIGTERM and requires that it exits with 0.
    #[track_caller]
    pub fn stop(&mut self, node: Node) {
        self.daemon(node).signal(Signal::SIGTERM);
        let mut daemon = self.daemons[node.index()].take().expect("it was signalled");
        let status = wait_until(Deadline::seconds(20), "the daemon to end", || {
            daemon.ended().ok_or_else(|| "it still runs".to_owned())
        });
        assert!(status.success(), "the daemon ended with {status}");
    }

    /// Stops a node's daemon in its tracks (SIGSTOP).
    #[track_caller]
    pub fn freeze(&self, node: Node) {
        self.daemon(node).signal(Signal::SIGSTOP);
    }

    /// Lets a frozen daemon go on.
    #[track_caller]
    pub fn thaw(&self, node: Node) {
        self.daemon(node).signal(Signal::SIGCONT);
    }

    /// Whether a node's daemon was started and has not ended by itself.
    pub fn runs(&mut self, node: Node) -> bool {
        self.daemons[node.index()]
            .as_mut()
            .is_some_and(|daemon| daemon.ended().is_none())
    }

    fn log(&self, node: Node) -> PathBuf {
        self.directory().join(format!("{}.log", node.name()))
    }

    /// What a node's daemons have logged.
    pub fn log_text(&self, node: Node) -> String {
        // A daemon that was never started has no log.
        let bytes = fs::read(self.log(node)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Runs `kagami --config FILE --node NODE ARGS`.
    #[track_caller]
    pub fn kagami(&self, node: Node, args: &[&str]) -> CommandResult {
        let mut command = self.kagami_command(node);
        crate::process::die_with_parent(command.args(args));
        let output = command.output().expect("kagami runs");
        CommandResult {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    fn kagami_command(&self, node: Node) -> Command {
        let mut command = Command::new(binary("kagami"));
        command
            .arg("--config")
            .arg(self.config(node))
            .args(["--node", node.name()])
            .stdin(std::process::Stdio::null());
        command
    }

    /// Runs a verb on the first mirror: `kagami … VERB MIRROR OPTIONS`.
    #[track_caller]
    pub fn verb(&self, node: Node, verb: &str, options: &[&str]) -> CommandResult {
        let mut args = vec![verb, self.mirror()];
        args.extend_from_slice(options);
        self.kagami(node, &args)
    }

    /// The status of a node as its JSON.
    #[track_caller]
    pub fn node_status(&self, node: Node) -> NodeStatus {
        let result = self.kagami(node, &["status", "--json"]).expect_code(0);
        serde_json::from_str(&result.stdout)
            .unwrap_or_else(|error| panic!("status --json: {error}\n{}", result.stdout))
    }

    /// The status of a mirror on a node.
    #[track_caller]
    pub fn status_of(&self, node: Node, mirror: &str) -> MirrorStatus {
        let status = self.node_status(node);
        let found = status.mirrors.iter().find(|one| one.name == mirror);
        found
            .unwrap_or_else(|| panic!("no mirror {mirror} in {status:?}"))
            .clone()
    }

    /// The status of the first mirror on a node.
    #[track_caller]
    pub fn status(&self, node: Node) -> MirrorStatus {
        self.status_of(node, self.mirror())
    }

    /// Waits until a mirror's status on a node is as wanted.
    #[track_caller]
    pub fn wait_for(
        &self,
        node: Node,
        mirror: &str,
        seconds: u64,
        what: &str,
        mut wanted: impl FnMut(&MirrorStatus) -> bool,
    ) -> MirrorStatus {
        wait_until(Deadline::seconds(seconds), what, || {
            let result = self.kagami(node, &["status", "--json"]);
            if result.code != 0 {
                return Err(format!("status says {}: {}", result.code, result.stderr));
            }
            let status: NodeStatus = serde_json::from_str(&result.stdout)
                .map_err(|error| format!("{error}: {}", result.stdout))?;
            let status = status
                .mirrors
                .into_iter()
                .find(|one| one.name == mirror)
                .ok_or("no such mirror")?;
            if wanted(&status) {
                Ok(status)
            } else {
                Err(format!("{}: {status:#?}", node.name()))
            }
        })
    }

    /// Waits until the first mirror's status on a node is as wanted, for at most 20 s.
    #[track_caller]
    pub fn wait(
        &self,
        node: Node,
        what: &str,
        wanted: impl FnMut(&MirrorStatus) -> bool,
    ) -> MirrorStatus {
        self.wait_for(node, self.mirror(), 20, what, wanted)
    }

    /// Waits until every mirror is Connected with both replicas UpToDate, seen from both nodes.
    #[track_caller]
    pub fn wait_mirrored(&self) {
        for mirror in &self.options.mirrors {
            for node in Node::BOTH {
                self.wait_for(node, mirror, 60, "both replicas UpToDate", |status| {
                    status.is_mirrored()
                });
            }
        }
    }

    /// Promotes a node without force, as soon as it lets itself be promoted, within so many
    /// seconds: it may have to notice first that its Primary is gone.
    #[track_caller]
    pub fn promote(&self, node: Node, seconds: u64) -> CommandResult {
        wait_until(Deadline::seconds(seconds), "the promotion", || {
            let result = self.verb(node, "primary", &[]);
            match result.code {
                0 => Ok(result),
                4 => Err(result.stderr),
                code => panic!("kagami primary ended with {code}: {}", result.stderr),
            }
        })
    }

    /// Gives a node's role back as soon as its daemon has noticed, within so many seconds, that
    /// the clients are gone.
    #[track_caller]
    pub fn demote(&self, node: Node, seconds: u64) -> CommandResult {
        wait_until(Deadline::seconds(seconds), "the clients to be gone", || {
            let result = self.verb(node, "secondary", &[]);
            if result.code == 4 && result.stderr.contains("KGM-0308") {
                return Err(result.stderr);
            }
            Ok(result.expect_code(0))
        })
    }

    /// Where a node exports a mirror.
    pub fn nbd_address(&self, node: Node, mirror: usize) -> &NbdAddress {
        &self.nbd[mirror][node.index()]
    }

    /// The URI of the first mirror on a node.
    pub fn uri(&self, node: Node) -> String {
        self.nbd_address(node, 0).uri("")
    }

    /// A connection to the first mirror on a node, as soon as it is served.
    #[track_caller]
    pub fn nbd(&self, node: Node) -> NbdClient {
        wait_until(Deadline::seconds(20), "the NBD export", || {
            NbdClient::connect(self.nbd_address(node, 0), "").map_err(|error| error.to_string())
        })
    }

    /// Checks the first mirror's ledger at a node.
    #[track_caller]
    pub fn verify(&self, node: Node, ledger: &mut Ledger) {
        ledger.verify(&mut self.nbd(node));
    }

    /// Compares every mirror's replicas byte for byte, over the mirrored device's size. Guests
    /// must be quiet and the replicas in sync.
    #[track_caller]
    pub fn assert_identical(&self) {
        for mirror in &self.options.mirrors {
            let size = self.status_of(Node::A, mirror).size_bytes;
            assert_eq!(size, self.status_of(Node::B, mirror).size_bytes);
            assert!(size > 0, "the mirror has no size");
            let [a, b] = Node::BOTH.map(|node| self.disk_of(node, mirror));
            if let Some(offset) = first_difference(&a, &b, size) {
                panic!("the replicas of {mirror} differ at byte {offset} of {size}");
            }
        }
    }

    /// Drops every packet of the first mirror's link until the rule is dropped (needs
    /// `own_network`).
    #[track_caller]
    pub fn drop_link_packets(&self) -> DropRule<'_> {
        let network = self
            .network
            .as_ref()
            .expect("the cluster was made with `own_network`");
        let port = self.links[0].port;
        network.nft(&format!(
            "add table inet cut; \
             add chain inet cut input {{ type filter hook input priority 0; }}; \
             add rule inet cut input tcp dport {port} drop; \
             add rule inet cut input tcp sport {port} drop"
        ));
        DropRule { network }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for node in Node::BOTH {
                let text = self.log_text(node);
                let lines: Vec<&str> = text.lines().collect();
                if lines.is_empty() {
                    continue;
                }
                let tail = &lines[lines.len().saturating_sub(60)..];
                eprintln!("--- log of {} (its end)\n{}", node.name(), tail.join("\n"));
            }
        }
    }
}

const ADDRESSES: [&str; 2] = ["127.0.0.1", "127.0.0.2"];
const PROXY: &str = "127.0.0.3";

/// A network namespace of the test's own.
#[derive(Debug)]
struct Network {
    name: String,
}

impl Network {
    #[track_caller]
    fn new() -> Network {
        require_root("a network namespace");
        let name = format!("kagami-{}", std::process::id());
        Tool::new("ip").args(["netns", "add", &name]).success();
        let network = Network { name };
        Tool::new("ip")
            .args(["-n", &network.name, "link", "set", "lo", "up"])
            .success();
        network
    }

    #[track_caller]
    fn nft(&self, commands: &str) {
        // Looked up here, so that a missing nft is named.
        let nft = Tool::new("nft").into_command();
        Tool::new("ip")
            .args(["netns", "exec", &self.name])
            .arg(nft.get_program())
            .arg(commands)
            .success();
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // The namespace was made by this test; if removing it fails there is nothing to add.
        let _ = Tool::new("ip").args(["netns", "del", &self.name]).output();
    }
}

/// Packets of a link are dropped while this lives.
#[derive(Debug)]
pub struct DropRule<'a> {
    network: &'a Network,
}

impl Drop for DropRule<'_> {
    fn drop(&mut self) {
        self.network.nft("delete table inet cut");
    }
}

/// Waits until no other test on this machine has a cluster.
fn one_at_a_time() -> Flock<File> {
    let path = std::env::temp_dir().join("kagami-tests.lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .unwrap_or_else(|error| panic!("cannot open {}: {error}", path.display()));
    Flock::lock(file, FlockArg::LockExclusive).expect("a lock on a file of our own")
}

/// A port that is free on the nodes' addresses and the proxy's.
#[track_caller]
fn free_port() -> u16 {
    wait_until(Deadline::seconds(5), "a free port", || {
        let first = TcpListener::bind((ADDRESSES[0], 0)).map_err(|error| error.to_string())?;
        let port = first
            .local_addr()
            .map_err(|error| error.to_string())?
            .port();
        for address in [ADDRESSES[1], PROXY] {
            TcpListener::bind((address, port)).map_err(|error| error.to_string())?;
        }
        Ok(port)
    })
}

/// The first byte in which two files differ within their first `size` bytes. What is a hole in both
/// is not read.
fn first_difference(a: &Path, b: &Path, size: u64) -> Option<u64> {
    let [a, b] = [a, b].map(|path| {
        let file = File::open(path)
            .unwrap_or_else(|error| panic!("cannot open {}: {error}", path.display()));
        let length = file.metadata().expect("an open file").len();
        assert!(length >= size, "{} is too short", path.display());
        file
    });
    let (mut left, mut right) = (vec![0; MIB as usize], vec![0; MIB as usize]);
    let mut offset = 0;
    loop {
        offset = next_data(&a, offset).min(next_data(&b, offset));
        if offset >= size {
            return None;
        }
        let step = (size - offset).min(MIB) as usize;
        for (file, buffer) in [(&a, &mut left), (&b, &mut right)] {
            file.read_exact_at(&mut buffer[..step], offset)
                .expect("a readable replica");
        }
        if left[..step] != right[..step] {
            let at = left.iter().zip(&right).position(|(x, y)| x != y);
            return at.map(|at| offset + at as u64);
        }
        offset += step as u64;
    }
}

/// Where the next byte that is no hole lies; past everything when there is none.
fn next_data(file: &File, offset: u64) -> u64 {
    match lseek(file, offset as i64, Whence::SeekData) {
        Ok(at) => at as u64,
        Err(Errno::ENXIO) => u64::MAX,
        Err(errno) => panic!("cannot look for data: {errno}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_is_what_the_interface_says() {
        let cluster = Cluster::new(ClusterOptions {
            proxied: true,
            ..ClusterOptions::default()
        });
        let [a, b] = Node::BOTH.map(|node| cluster.config_text(node));
        assert!(a.contains("addresses = [\"127.0.0.1\"]") && !a.contains(PROXY));
        assert!(b.contains("addresses = [\"127.0.0.3\"]") && !b.contains("\"127.0.0.1\""));
        assert!(a.contains("stall-timeout = \"2000ms\""));
        assert!(cluster.disk(Node::A).is_file());
    }

    #[test]
    fn differences_are_found_within_the_device_only() {
        let directory = tempfile::tempdir().unwrap();
        let [a, b] = ["a", "b"].map(|name| directory.path().join(name));
        let mut data = vec![1; 3 * MIB as usize + 10];
        fs::write(&a, &data).unwrap();
        data[2 * MIB as usize + 7] = 2;
        fs::write(&b, &data).unwrap();
        assert_eq!(
            first_difference(&a, &b, data.len() as u64),
            Some(2 * MIB + 7)
        );
        assert_eq!(first_difference(&a, &b, 2 * MIB + 7), None);
        // A hole equals zeroes and nothing else.
        data.fill(0);
        fs::write(&a, &data).unwrap();
        let holes = File::create(&b).unwrap();
        holes.set_len(data.len() as u64).unwrap();
        assert_eq!(first_difference(&a, &b, data.len() as u64), None);
        holes.write_all_at(&[1], MIB).unwrap();
        assert_eq!(first_difference(&a, &b, data.len() as u64), Some(MIB));
    }

    #[test]
    fn a_network_of_its_own_drops_packets() {
        let cluster = Cluster::new(ClusterOptions {
            own_network: true,
            ..ClusterOptions::default()
        });
        let rule = cluster.drop_link_packets();
        drop(rule);
    }
}
