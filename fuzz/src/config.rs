//! The configuration file: any bytes, and durations and sizes on their own.

use mirror_core::config::{
    Config, IoBackend, MAX_STALL_TIMEOUT, MIN_STALL_TIMEOUT, Metadata, NbdAddress, parse_duration,
    parse_size,
};
use mirror_core::limits::MIN_COPY_RATE;
use mirror_core::types::CopyRates;
use std::fmt::Write;
use std::path::Path;

/// A message to the operator is bounded, whatever it quotes.
const MAX_MESSAGE: usize = 16 << 10;

/// Parses the input. A configuration that is accepted says the same when it is written out.
pub fn run(data: &[u8]) -> bool {
    if let Ok(text) = std::str::from_utf8(data) {
        units(text);
    }
    match Config::parse_bytes(data, Path::new("k.toml")) {
        Ok(config) => {
            check(&config);
            let text = write_out(&config);
            let again = Config::parse(&text, Path::new("again.toml"));
            assert_eq!(again.as_ref(), Ok(&config), "{text}");
            true
        }
        Err(refusal) => {
            crate::assert_harmless(&refusal.message);
            assert!(
                refusal.message.len() <= MAX_MESSAGE,
                "{}",
                refusal.message.len()
            );
            assert!(!refusal.message.ends_with('.'), "{refusal}");
            assert!((101..106).contains(&refusal.id.number()), "{refusal}");
            let line = refusal
                .message
                .strip_prefix("k.toml:")
                .expect("the file's name");
            let number = line.split(':').next().and_then(|n| n.parse::<usize>().ok());
            let lines = data.iter().filter(|byte| **byte == b'\n').count() + 1;
            assert!(
                number.is_some_and(|n| (1..=lines).contains(&n)),
                "{refusal}"
            );
            false
        }
    }
}

fn units(text: &str) {
    if let Ok(duration) = parse_duration(text) {
        let again = format!("{}ms", duration.as_millis());
        assert!(text.ends_with(['s', 'm']));
        // Whole milliseconds; beyond 64 bits of them there is no way to write it so.
        if u64::try_from(duration.as_millis()).is_ok() {
            assert_eq!(parse_duration(&again), Ok(duration));
        }
    }
    if let Ok(size) = parse_size(text) {
        assert_eq!(parse_size(&format!("{size}B")), Ok(size));
    }
}

fn check(config: &Config) {
    let named = |name: &str| {
        let sign = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
        (1..=63).contains(&name.len()) && name.bytes().all(sign)
    };
    assert!(config.insecure && named(&config.cluster) && !config.nodes.is_empty());
    for node in &config.nodes {
        assert!(named(&node.name) && !node.addresses.is_empty());
        assert!(node.run_dir.is_absolute() && node.state_dir.is_absolute());
        assert_eq!(config.node(&node.name), Some(node), "two nodes of a name");
        assert!(node.control_socket().as_os_str().len() <= 107);
    }
    for mirror in &config.mirrors {
        assert!(named(&mirror.name) && mirror.port != 0);
        assert_eq!(
            config.mirror(&mirror.name),
            Some(mirror),
            "two mirrors of a name"
        );
        let timeouts = MIN_STALL_TIMEOUT..=MAX_STALL_TIMEOUT;
        assert!(timeouts.contains(&mirror.stall_timeout));
        assert_ne!(mirror.sides[0].node, mirror.sides[1].node);
        let CopyRates { max, min } = mirror.copy_rates;
        assert!(
            max.into_iter()
                .chain(min)
                .all(|rate| rate.get() >= MIN_COPY_RATE)
        );
        assert!(max.is_none_or(|max| min.is_none_or(|min| min <= max)));
        for side in &mirror.sides {
            assert!(config.node(&side.node).is_some() && side.disk.is_absolute());
            match &side.nbd {
                Some(NbdAddress::Tcp(address)) => {
                    assert!(address.ip().is_loopback() && address.port() != 0);
                }
                Some(NbdAddress::Unix(path)) => assert!(path.as_os_str().len() <= 107),
                None => {}
            }
        }
    }
}

/// The configuration as a file.
fn write_out(config: &Config) -> String {
    let mut text = format!(
        "[cluster]\nname = {}\ninsecure = {}\n",
        quoted(&config.cluster),
        config.insecure
    );
    for node in &config.nodes {
        let addresses: Vec<String> = node
            .addresses
            .iter()
            .map(|it| format!("\"{it}\""))
            .collect();
        let written = write!(
            text,
            "[[node]]\nname = {}\naddresses = [{}]\nrun-dir = {}\nstate-dir = {}\nio-backend = \"{}\"\n",
            quoted(&node.name),
            addresses.join(", "),
            quoted_path(&node.run_dir),
            quoted_path(&node.state_dir),
            match node.io_backend {
                IoBackend::Auto => "auto",
                IoBackend::IoUring => "io_uring",
                IoBackend::Threads => "threads",
            },
        );
        written.expect("a string takes everything");
    }
    for mirror in &config.mirrors {
        let mut disk = Vec::new();
        let mut metadata = Vec::new();
        let mut nbd = Vec::new();
        for side in &mirror.sides {
            let node = quoted(&side.node);
            disk.push(format!("{node} = {}", quoted_path(&side.disk)));
            metadata.push(match &side.metadata {
                Metadata::Internal => format!("{node} = \"internal\""),
                Metadata::External(path) => format!("{node} = {}", quoted_path(path)),
            });
            match &side.nbd {
                Some(NbdAddress::Unix(path)) => {
                    let path = path.to_str().expect("the file was text");
                    nbd.push(format!("{node} = {}", quoted(&format!("unix:{path}"))));
                }
                Some(NbdAddress::Tcp(address)) => {
                    nbd.push(format!("{node} = \"tcp:{address}\""));
                }
                None => {}
            }
        }
        let written = write!(
            text,
            "[[mirror]]\nname = {}\nport = {}\nstall-timeout = \"{}ms\"\ndisk = {{ {} }}\n\
             metadata = {{ {} }}\nnbd = {{ {} }}\n",
            quoted(&mirror.name),
            mirror.port,
            mirror.stall_timeout.as_millis(),
            disk.join(", "),
            metadata.join(", "),
            nbd.join(", "),
        );
        written.expect("a string takes everything");
        let rates = [
            ("max", mirror.copy_rates.max),
            ("min", mirror.copy_rates.min),
        ];
        for (which, rate) in rates {
            if let Some(rate) = rate {
                let written = writeln!(text, "resync-{which}-rate = \"{rate}\"");
                written.expect("a string takes everything");
            }
        }
    }
    text
}

fn quoted_path(path: &Path) -> String {
    quoted(path.to_str().expect("the file was text"))
}

fn quoted(text: &str) -> String {
    let mut quoted = String::from('"');
    for sign in text.chars() {
        if sign == '"' || sign == '\\' {
            quoted.push('\\');
        }
        quoted.push(sign);
    }
    quoted.push('"');
    quoted
}

/// A file with everything in it, and a short one.
pub fn seeds() -> Vec<Vec<u8>> {
    const NODES: &str = r#"[cluster]
name = "branch7"
insecure = true
[[node]]
name = "a"
addresses = ["192.0.2.1", "2001:db8::1"]
[[node]]
name = "b"
addresses = ["192.0.2.2"]
run-dir = "/run/k"
state-dir = '/var/k'
io-backend = "threads"
"#;
    const FULL: &str = r#"[[mirror]]
name = "r0"
mode = "sync"
port = 7790
disk = { a = "/srv/a.img", b = "/srv/b.img" }
metadata = { a = "internal", b = "/srv/m" }
nbd = { a = "unix:/run/r0.sock", b = "tcp:127.0.0.1:10809" }
device = "auto"
stall-timeout = "500ms"
"#;
    const SHORT: &str = r#"[[mirror]]
name = "r1"
port = 7_791
disk = "/dev/sd\u0062"
"#;
    vec![
        [NODES, FULL].concat().into(),
        [NODES, SHORT].concat().into(),
        NODES.into(),
    ]
}
