//! What the demo lays out: a directory, ports, the configuration.

use super::{DemoArgs, failed};
use mirror_core::config::Config;
use mirror_core::error::{ErrorId, Refusal};
use std::fs::{self, DirBuilder};
use std::io;
use std::net::TcpListener;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// The two nodes: name and address.
pub const NODES: [(&str, &str); 2] = [("a", "127.0.0.1"), ("b", "127.0.0.2")];

/// The mirror's name.
pub const MIRROR: &str = "r0";

/// The smallest disk with room for the story.
const MIN_SIZE: u64 = 16 << 20;

/// Everything about a demo that is fixed before it starts.
#[derive(Debug)]
pub struct Plan {
    /// Where everything is.
    pub dir: PathBuf,
    /// Size of each disk.
    pub size: u64,
    /// Whether [`Plan::dir`] is removed at the end.
    pub remove: bool,
    /// The checked configuration that [`Plan::config_file`] holds.
    pub config: Config,
}

impl Plan {
    /// Makes the directory and writes the configuration.
    pub fn new(args: &DemoArgs) -> Result<Plan, Refusal> {
        if args.size < MIN_SIZE {
            let message = format!(
                "a demo needs disks of 16MiB at least, not {} bytes",
                args.size
            );
            return Err(Refusal::new(ErrorId::UsageConflict, message));
        }
        let dir = make_directory(args.dir.as_deref())?;
        let text = configuration(&dir, free_port()?);
        let file = dir.join("kagami.toml");
        fs::write(&file, &text).map_err(|error| failed(format!("{}: {error}", file.display())))?;
        let config = Config::parse(&text, &file)?;
        let remove = args.dir.is_none() && !args.keep;
        Ok(Plan {
            dir,
            size: args.size,
            remove,
            config,
        })
    }

    /// The configuration file.
    pub fn config_file(&self) -> PathBuf {
        self.dir.join("kagami.toml")
    }

    /// Where a node's daemon writes its log.
    pub fn log(&self, node: usize) -> PathBuf {
        self.dir.join(format!("{}.log", NODES[node].0))
    }

    /// A node's NBD socket.
    pub fn nbd_socket(&self, node: usize) -> PathBuf {
        nbd_socket(&self.dir, node)
    }

    /// A node's disk.
    pub fn disk(&self, node: usize) -> &Path {
        &self.config.mirrors[0].sides[node].disk
    }
}

/// The daemon's program: as told, or beside this one.
pub fn find_daemon(told: Option<&Path>) -> Result<PathBuf, Refusal> {
    let path = match told {
        Some(path) => path.to_owned(),
        None => std::env::current_exe()
            .map_err(|error| failed(format!("this program does not know where it is: {error}")))?
            .with_file_name("kagami-mirror"),
    };
    if path.is_file() {
        return Ok(path);
    }
    Err(Refusal::new(
        ErrorId::DaemonUnreachable,
        format!(
            "{} is not there; build or install it, or pass --daemon",
            path.display()
        ),
    ))
}

fn nbd_socket(dir: &Path, node: usize) -> PathBuf {
    dir.join(format!("{MIRROR}-{}.sock", NODES[node].0))
}

fn make_directory(told: Option<&Path>) -> Result<PathBuf, Refusal> {
    let path = match told {
        Some(path) => path.to_owned(),
        None => {
            let parent = std::env::var_os("TMPDIR").map_or("/var/tmp".into(), PathBuf::from);
            let mut random = [0; 4];
            getrandom::fill(&mut random)
                .map_err(|error| failed(format!("no random numbers: {error}")))?;
            parent.join(format!("kagami-demo-{:08x}", u32::from_le_bytes(random)))
        }
    };
    let make = || -> io::Result<PathBuf> {
        if path.exists() && fs::read_dir(&path)?.next().is_some() {
            let full = "the directory is not empty; choose another with --dir";
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, full));
        }
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)?;
        path.canonicalize()
    };
    make().map_err(|error| failed(format!("{}: {error}", path.display())))
}

/// A port that is free on both nodes' addresses now.
fn free_port() -> Result<u16, Refusal> {
    let try_one = || -> io::Result<u16> {
        let first = TcpListener::bind((NODES[0].1, 0))?;
        let port = first.local_addr()?.port();
        TcpListener::bind((NODES[1].1, port))?;
        Ok(port)
    };
    let mut last = None;
    for _ in 0..20 {
        match try_one() {
            Ok(port) => return Ok(port),
            Err(error) => last = Some(error),
        }
    }
    let why = last.map(|error| error.to_string()).unwrap_or_default();
    Err(failed(format!(
        "no port is free on 127.0.0.1 and 127.0.0.2: {why}"
    )))
}

fn configuration(dir: &Path, port: u16) -> String {
    let at = dir.display();
    let mut text = String::from(
        "# Written by `kagami demo`: two nodes on one machine.\n\
         [cluster]\nname = \"demo\"\ninsecure = true\n",
    );
    for (name, address) in NODES {
        text += &format!(
            "\n[[node]]\nname = \"{name}\"\naddresses = [\"{address}\"]\n\
             run-dir = \"{at}\"\nstate-dir = \"{at}\"\n"
        );
    }
    let per_node = |value: &dyn Fn(usize) -> String| {
        format!("{{ a = \"{}\", b = \"{}\" }}", value(0), value(1))
    };
    let disk = per_node(&|node| format!("{at}/{}.img", NODES[node].0));
    let nbd = per_node(&|node| format!("unix:{}", nbd_socket(dir, node).display()));
    text += &format!(
        "\n[[mirror]]\nname = \"{MIRROR}\"\nmode = \"sync\"\nport = {port}\ndisk = {disk}\n\
         metadata = \"internal\"\nnbd = {nbd}\ndevice = \"none\"\nstall-timeout = \"2s\"\n"
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    fn args(dir: &Path, size: u64) -> DemoArgs {
        DemoArgs {
            script: true,
            size,
            dir: Some(dir.to_owned()),
            keep: false,
            daemon: None,
            seed: 1,
        }
    }

    #[test]
    fn the_configuration_is_sound() {
        let dir = TempDir::new().unwrap();
        let plan = Plan::new(&args(&dir.path().join("demo"), 64 << 20)).unwrap();
        assert_eq!(plan.config.nodes.len(), 2);
        assert!(plan.disk(1).ends_with("demo/b.img"));
        assert!(!plan.remove, "a directory that was named is kept");
        assert!(plan.config_file().is_file());
        let port = plan.config.mirrors[0].port;
        assert!(TcpListener::bind(("127.0.0.2", port)).is_ok());
    }

    #[test]
    fn a_directory_with_something_in_it_is_left_alone() {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("precious"), "x").unwrap();
        let refusal = Plan::new(&args(dir.path(), 64 << 20)).unwrap_err();
        assert!(refusal.message.contains("not empty"), "{refusal}");
    }

    #[test]
    fn too_small_a_disk() {
        let dir = TempDir::new().unwrap();
        let refusal = Plan::new(&args(&dir.path().join("x"), 1 << 20)).unwrap_err();
        assert_eq!(refusal.id, ErrorId::UsageConflict);
    }

    #[test]
    fn a_daemon_that_is_not_there() {
        let refusal = find_daemon(Some(Path::new("/nonexistent"))).unwrap_err();
        assert!(refusal.message.contains("--daemon"), "{refusal}");
    }
}
