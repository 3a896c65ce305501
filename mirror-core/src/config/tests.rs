//! The file of the documents, then one line of it at a time made wrong.

use super::*;
use proptest::prelude::*;
use std::num::NonZeroU64;

const EXAMPLE: &str = r#"[cluster]
name = "branch7"
insecure = true

[[node]]
name = "a"
addresses = ["127.0.0.1"]
run-dir = "/run/kagami"
state-dir = "/var/lib/kagami"

[[node]]
name = "b"
addresses = ["127.0.0.2"]

[[mirror]]
name = "r0"
mode = "sync"
port = 7790
disk = { a = "/srv/a.img", b = "/srv/b.img" }
metadata = "internal"
nbd = { a = "unix:/run/kagami/r0-a.sock", b = "unix:/run/kagami/r0-b.sock" }
device = "auto"
stall-timeout = "2s"
resync-max-rate = "100MiB"
resync-min-rate = "4MiB"
"#;

fn parse(text: &str) -> Result<Config, Refusal> {
    Config::parse(text, Path::new("k.toml"))
}

/// The example with one line replaced (or removed, by an empty one).
fn with(line: &str, replacement: &str) -> String {
    assert!(EXAMPLE.contains(line), "{line}");
    EXAMPLE.replacen(line, replacement, 1)
}

#[track_caller]
fn refused(text: &str, id: ErrorId, at: &str, part: &str) {
    let refusal = parse(text).expect_err(text);
    assert_eq!(refusal.id, id, "{refusal}\n{text}");
    assert!(
        refusal.message.starts_with(&format!("k.toml:{at}: ")),
        "{refusal}, not {at}"
    );
    assert!(refusal.message.contains(part), "{refusal}\nlacks: {part}");
    assert!(!refusal.message.contains('\n'), "{refusal}");
    assert!(!refusal.message.ends_with('.'), "{refusal}");
}

#[test]
fn the_documented_file() {
    let config = parse(EXAMPLE).unwrap();
    assert_eq!(config.cluster, "branch7");
    assert!(config.insecure);
    assert_eq!(config.nodes.len(), 2);
    let a = config.node("a").unwrap();
    assert_eq!(a.addresses, ["127.0.0.1".parse::<IpAddr>().unwrap()]);
    assert_eq!(a.control_socket(), Path::new("/run/kagami/a-mirror.sock"));
    assert_eq!(
        config.node("b").unwrap().state_dir,
        Path::new(DEFAULT_STATE_DIR)
    );
    let r0 = config.mirror("r0").unwrap();
    assert_eq!((r0.port, r0.stall_timeout), (7790, Duration::from_secs(2)));
    let rates = CopyRates {
        max: NonZeroU64::new(100 << 20),
        min: NonZeroU64::new(4 << 20),
    };
    assert_eq!(r0.copy_rates, rates);
    let (mine, peer) = r0.sides_of("b").unwrap();
    assert_eq!((mine.node.as_str(), peer.node.as_str()), ("b", "a"));
    assert_eq!(mine.disk, Path::new("/srv/b.img"));
    assert_eq!(mine.metadata, Metadata::Internal);
    assert_eq!(
        mine.nbd,
        Some(NbdAddress::Unix("/run/kagami/r0-b.sock".into()))
    );
    assert!(r0.connects("b") && !r0.connects("a"));
}

#[test]
fn the_node_of_a_host() {
    let config = parse(EXAMPLE).unwrap();
    for (host, node) in [
        ("a", Some("a")),
        ("B", Some("b")),
        ("b.example.com", Some("b")),
        ("ab", None),
        ("", None),
    ] {
        let found = config.node_of_host(host).map(|node| node.name.as_str());
        assert_eq!(found, node, "{host}");
    }
}

#[test]
fn what_may_be_left_out() {
    let mut text = EXAMPLE.to_owned();
    for line in [
        "mode = \"sync\"\n",
        "metadata = \"internal\"\n",
        "device = \"auto\"\n",
    ] {
        text = text.replacen(line, "", 1);
    }
    for key in [
        "nbd = ",
        "stall-timeout = ",
        "resync-max-rate = ",
        "resync-min-rate = ",
    ] {
        let line = text
            .lines()
            .find(|line| line.starts_with(key))
            .unwrap()
            .to_owned();
        text = text.replacen(&line, "", 1);
    }
    let config = parse(&text).unwrap();
    let r0 = &config.mirrors[0];
    assert_eq!(r0.stall_timeout, crate::limits::DEFAULT_STALL_TIMEOUT);
    assert_eq!(r0.copy_rates, CopyRates::default());
    assert!(r0.sides.iter().all(|side| side.nbd.is_none()));
    assert!(
        r0.sides
            .iter()
            .all(|side| side.metadata == Metadata::Internal)
    );
}

#[test]
fn one_value_for_all_nodes_or_one_per_node() {
    let text = with(
        "disk = { a = \"/srv/a.img\", b = \"/srv/b.img\" }",
        "disk = \"/dev/vg/r0\"",
    )
    .replace(
        "metadata = \"internal\"",
        "metadata = { a = \"internal\", b = \"/dev/vg/r0-meta\" }",
    )
    .replace("nbd = { a = \"unix:/run/kagami/r0-a.sock\", b", "nbd = { b")
    .replace("unix:/run/kagami/r0-b.sock", "tcp:[::1]:10809");
    let config = parse(&text).unwrap();
    let [a, b] = &config.mirrors[0].sides;
    assert_eq!(
        (&a.disk, &b.disk),
        (&PathBuf::from("/dev/vg/r0"), &PathBuf::from("/dev/vg/r0"))
    );
    assert_eq!(a.metadata, Metadata::Internal);
    assert_eq!(b.metadata, Metadata::External("/dev/vg/r0-meta".into()));
    assert_eq!(a.nbd, None);
    assert_eq!(b.nbd, Some(NbdAddress::Tcp("[::1]:10809".parse().unwrap())));
}

#[test]
fn three_nodes_and_a_chain_of_mirrors() {
    let text = EXAMPLE.to_owned()
        + "[[node]]\nname = \"c\"\naddresses = [\"127.0.0.3\"]\n\
           [[mirror]]\nname = \"r1\"\nport = 7791\ndisk = { c = \"/srv/c.img\", b = \"/srv/b1.img\" }\n";
    let config = parse(&text).unwrap();
    let r1 = config.mirror("r1").unwrap();
    assert_eq!(
        r1.sides.each_ref().map(|side| side.node.as_str()),
        ["b", "c"]
    );
    assert!(r1.sides_of("a").is_none());
    let one_disk = text.replace(
        "disk = { a = \"/srv/a.img\", b = \"/srv/b.img\" }",
        "disk = \"/x\"",
    );
    refused(
        &one_disk,
        ErrorId::ConfigValue,
        "19:8",
        "needs exactly two [[node]], there are 3",
    );
    let same_port = text.replace("port = 7791", "port = 7790");
    refused(
        &same_port,
        ErrorId::ConfigConflict,
        "31:8",
        "port 7790 on 127.0.0.2 (node `b`)",
    );
    let foreign = text.replace(
        "metadata = \"internal\"",
        "metadata = { a = \"/m\", c = \"/m\" }",
    );
    refused(
        &foreign,
        ErrorId::ConfigConflict,
        "20:24",
        "joins `a` and `b`",
    );
}

#[test]
fn each_node_has_its_own_way_to_do_io() {
    let on_a = |value: &str| {
        with(
            "name = \"a\"",
            &format!("name = \"a\"\nio-backend = {value}"),
        )
    };
    for (value, backend) in [
        ("\"auto\"", IoBackend::Auto),
        ("\"io_uring\"", IoBackend::IoUring),
        ("\"threads\"", IoBackend::Threads),
    ] {
        let config = parse(&on_a(value)).unwrap();
        assert_eq!(config.node("a").unwrap().io_backend, backend);
        assert_eq!(config.node("b").unwrap().io_backend, IoBackend::Auto);
    }
    refused(&on_a("true"), ErrorId::ConfigSyntax, "7:14", "; write ");
    for wrong in ["\"\"", "\"io-uring\"", "\"epoll\"", "\"Auto\""] {
        refused(&on_a(wrong), ErrorId::ConfigValue, "7:14", "\"threads\"");
    }
    let of_a_mirror = with("port = 7790", "port = 7790\nio-backend = \"auto\"");
    refused(&of_a_mirror, ErrorId::ConfigSyntax, "19:1", "io-backend");
}

#[test]
fn every_key_missing() {
    let syntax = ErrorId::ConfigSyntax;
    refused("", syntax, "1:1", "no `cluster`");
    refused(&with("name = \"branch7\"", ""), syntax, "1:1", "no `name`");
    refused(
        &with("insecure = true", ""),
        ErrorId::ConfigReserved,
        "1:1",
        "insecure = true",
    );
    refused(
        &with("name = \"a\"", ""),
        syntax,
        "5:1",
        "[[node]] has no `name`",
    );
    refused(
        &with("addresses = [\"127.0.0.1\"]", ""),
        syntax,
        "5:1",
        "no `addresses`",
    );
    refused(
        &with("name = \"r0\"", ""),
        syntax,
        "15:1",
        "[[mirror]] has no `name`",
    );
    refused(&with("port = 7790", ""), syntax, "15:1", "no `port`");
    refused(&with("disk =", "# disk ="), syntax, "15:1", "no `disk`");
    let no_nodes = "[cluster]\nname = \"x\"\ninsecure = true\n";
    refused(no_nodes, syntax, "1:1", "no [[node]]");
    let half = with(
        "{ a = \"/srv/a.img\", b = \"/srv/b.img\" }",
        "{ a = \"/srv/a.img\" }",
    );
    refused(
        &half,
        ErrorId::ConfigValue,
        "19:8",
        "joins two nodes, this names 1",
    );
    let half = with("metadata = \"internal\"", "metadata = { a = \"internal\" }");
    refused(&half, ErrorId::ConfigValue, "20:12", "nothing for node `b`");
}

#[test]
fn every_key_of_the_wrong_type() {
    for (line, wrong, at) in [
        ("name = \"branch7\"", "name = 7", "2:8"),
        ("insecure = true", "insecure = \"true\"", "3:12"),
        ("name = \"a\"", "name = true", "6:8"),
        (
            "addresses = [\"127.0.0.1\"]",
            "addresses = \"127.0.0.1\"",
            "7:13",
        ),
        (
            "addresses = [\"127.0.0.1\"]",
            "addresses = [\"127.0.0.1\", 2]",
            "7:27",
        ),
        ("run-dir = \"/run/kagami\"", "run-dir = 1.5", "8:11"),
        ("state-dir = \"/var/lib/kagami\"", "state-dir = []", "9:13"),
        ("name = \"r0\"", "name = { a = 1 }", "16:8"),
        ("mode = \"sync\"", "mode = true", "17:8"),
        ("port = 7790", "port = \"7790\"", "18:8"),
        ("port = 7790", "port = 7790.5", "18:8"),
        ("disk = { a = \"/srv/a.img\",", "disk = { a = 3,", "19:14"),
        ("metadata = \"internal\"", "metadata = 1979-05-27", "20:12"),
        (
            "nbd = { a = \"unix:/run/kagami/r0-a.sock\"",
            "nbd = { a = false",
            "21:13",
        ),
        ("device = \"auto\"", "device = 1", "22:10"),
        ("stall-timeout = \"2s\"", "stall-timeout = 2", "23:17"),
        (
            "resync-max-rate = \"100MiB\"",
            "resync-max-rate = 100",
            "24:19",
        ),
    ] {
        refused(&with(line, wrong), ErrorId::ConfigSyntax, at, "; write ");
    }
    refused(
        "cluster = 3",
        ErrorId::ConfigSyntax,
        "1:11",
        "write a table",
    );
    refused(
        &EXAMPLE.replacen("[[mirror]]", "[mirror]", 1),
        ErrorId::ConfigSyntax,
        "15:1",
        "[[mirror]]",
    );
    refused(
        &EXAMPLE.replacen("[cluster]", "[[cluster]]", 1),
        ErrorId::ConfigSyntax,
        "1:1",
        "a table",
    );
}

#[test]
fn every_value_out_of_range() {
    let long = format!("name = \"{}\"", "x".repeat(64));
    let deep = format!("run-dir = \"/{}\"", "x".repeat(100));
    for (line, wrong, at) in [
        ("name = \"branch7\"", "name = \"\"", "2:8"),
        ("name = \"branch7\"", long.as_str(), "2:8"),
        ("name = \"a\"", "name = \"../a\"", "6:8"),
        ("name = \"a\"", "name = \"A\"", "6:8"),
        ("addresses = [\"127.0.0.1\"]", "addresses = []", "7:13"),
        (
            "addresses = [\"127.0.0.1\"]",
            "addresses = [\"localhost\"]",
            "7:14",
        ),
        (
            "addresses = [\"127.0.0.1\"]",
            "addresses = [\"0.0.0.0\"]",
            "7:14",
        ),
        ("run-dir = \"/run/kagami\"", "run-dir = \"run\"", "8:11"),
        ("run-dir = \"/run/kagami\"", deep.as_str(), "8:11"),
        (
            "state-dir = \"/var/lib/kagami\"",
            "state-dir = \"\"",
            "9:13",
        ),
        ("name = \"r0\"", "name = \"r 0\"", "16:8"),
        ("mode = \"sync\"", "mode = \"semi\"", "17:8"),
        ("port = 7790", "port = 0", "18:8"),
        ("port = 7790", "port = 65536", "18:8"),
        ("port = 7790", "port = -1", "18:8"),
        (
            "port = 7790",
            "port = 0xffffffffffffffffffffffffffffffffffff",
            "18:8",
        ),
        (
            "disk = { a = \"/srv/a.img\"",
            "disk = { a = \"a.img\"",
            "19:14",
        ),
        (
            "disk = { a = \"/srv/a.img\"",
            "disk = { a = \"/a\\u0000\"",
            "19:14",
        ),
        (
            "metadata = \"internal\"",
            "metadata = \"external\"",
            "20:12",
        ),
        ("unix:/run/kagami/r0-a.sock", "unix:r0.sock", "21:13"),
        (
            "unix:/run/kagami/r0-a.sock",
            "/run/kagami/r0-a.sock",
            "21:13",
        ),
        ("unix:/run/kagami/r0-a.sock", "tcp:localhost:10809", "21:13"),
        ("unix:/run/kagami/r0-a.sock", "tcp:192.0.2.1:10809", "21:13"),
        ("unix:/run/kagami/r0-a.sock", "tcp:127.0.0.1:0", "21:13"),
        ("device = \"auto\"", "device = \"zvol\"", "22:10"),
        (
            "stall-timeout = \"2s\"",
            "stall-timeout = \"99ms\"",
            "23:17",
        ),
        ("stall-timeout = \"2s\"", "stall-timeout = \"61s\"", "23:17"),
        (
            "stall-timeout = \"2s\"",
            "stall-timeout = \"soon\"",
            "23:17",
        ),
        (
            "resync-max-rate = \"100MiB\"",
            "resync-max-rate = \"63KiB\"",
            "24:19",
        ),
        (
            "resync-max-rate = \"100MiB\"",
            "resync-max-rate = \"fast\"",
            "24:19",
        ),
        (
            "resync-min-rate = \"4MiB\"",
            "resync-min-rate = \"0\"",
            "25:19",
        ),
    ] {
        refused(&with(line, wrong), ErrorId::ConfigValue, at, "; ");
    }
    refused(
        &with("resync-min-rate = \"4MiB\"", "resync-min-rate = \"1GiB\""),
        ErrorId::ConfigConflict,
        "25:19",
        "more than `resync-max-rate`",
    );
    assert!(parse(&with("stall-timeout = \"2s\"", "stall-timeout = \"1m\"")).is_ok());
    assert!(parse(&with("stall-timeout = \"2s\"", "stall-timeout = \"100ms\"")).is_ok());
}

#[test]
fn every_key_twice() {
    for line in EXAMPLE.lines().filter(|line| line.contains(" = ")) {
        let text = with(line, &format!("{line}\n{line}"));
        let refusal = parse(&text).expect_err(line);
        assert_eq!(refusal.id, ErrorId::ConfigSyntax, "{refusal}");
        assert!(refusal.message.contains("duplicate"), "{refusal}");
    }
    refused(
        &(EXAMPLE.to_owned() + "[cluster]\n"),
        ErrorId::ConfigSyntax,
        "26:2",
        "duplicate",
    );
}

#[test]
fn contradictions() {
    let conflict = ErrorId::ConfigConflict;
    let second = "\n[[mirror]]\nname = \"r1\"\nport = 7791\ndisk = \"/srv/r1.img\"\n";
    let two = EXAMPLE.to_owned() + second;
    assert!(parse(&two).is_ok());
    refused(
        &two.replace("\"r1\"", "\"r0\""),
        conflict,
        "28:8",
        "mirror `r0` is defined twice, first on line 16",
    );
    refused(
        &two.replace("7791", "7790"),
        conflict,
        "29:8",
        "port 7790 on 127.0.0.1 (node `a`) is used twice",
    );
    refused(
        &two.replace("/srv/r1.img", "/srv//./a.img"),
        conflict,
        "30:8",
        "first on line 19",
    );
    refused(
        &(two.clone() + "metadata = \"/srv/b.img\"\n"),
        conflict,
        "31:12",
        "node `b`",
    );
    refused(
        &(two.clone() + "metadata = \"/srv/r1.img\"\n"),
        conflict,
        "31:12",
        "is used twice",
    );
    let nbd = "nbd = { a = \"unix:/run/kagami/r0-a.sock\" }\n";
    refused(
        &(two.clone() + nbd),
        conflict,
        "31:13",
        "is used twice on node `a`",
    );
    refused(
        &(two.clone() + "nbd = \"tcp:127.0.0.2:7790\"\n"),
        conflict,
        "31:7",
        "node `b`",
    );
    refused(
        &with("name = \"b\"", "name = \"a\""),
        conflict,
        "12:8",
        "node `a` is defined twice",
    );
    refused(
        &with("127.0.0.2", "127.0.0.1"),
        conflict,
        "16:8",
        "share the address 127.0.0.1",
    );
    refused(
        &with("[\"127.0.0.2\"]", "[\"127.0.0.2\", \"127.0.0.2\"]"),
        conflict,
        "13:27",
        "twice",
    );
    refused(
        &with("b = \"/srv/b.img\"", "z = \"/srv/b.img\""),
        conflict,
        "19:28",
        "no [[node]] named `z`",
    );
}

#[test]
fn what_comes_later_is_refused_as_such() {
    let reserved = ErrorId::ConfigReserved;
    for key in [
        "arbiter",
        "agent-port",
        "keys-dir",
        "secondary-export",
        "on-lost-right",
        "max-loss",
    ] {
        for table in ["[cluster]", "[[node]]", "[[mirror]]"] {
            let text = with(table, &format!("{table}\n{key} = 1"));
            let line = EXAMPLE.lines().position(|line| line == table).unwrap() + 2;
            refused(&text, reserved, &format!("{line}:1"), "not supported yet");
        }
        refused(
            &format!("{key} = 1\n{EXAMPLE}"),
            reserved,
            "1:1",
            "not supported yet",
        );
    }
    refused(
        &(EXAMPLE.to_owned() + "[[group]]\n"),
        reserved,
        "26:3",
        "[[group]] is not supported yet",
    );
    refused(
        &(EXAMPLE.to_owned() + "[[monitor]]\n"),
        reserved,
        "26:3",
        "[[monitor]]",
    );
    refused(
        &with("insecure = true", "insecure = false"),
        reserved,
        "3:12",
        "TLS comes in a later",
    );
    refused(
        &with("mode = \"sync\"", "mode = \"async\""),
        reserved,
        "17:8",
        "not supported yet",
    );
    refused(
        &with("device = \"auto\"", "device = \"ublk\""),
        reserved,
        "22:10",
        "not supported yet",
    );
    refused(
        &with("device = \"auto\"", "device = \"nbd\""),
        reserved,
        "22:10",
        "not supported yet",
    );
}

#[test]
fn unknown_keys() {
    let syntax = ErrorId::ConfigSyntax;
    refused(
        &with("port = 7790", "prot = 7790"),
        syntax,
        "18:1",
        "did you mean `port`?",
    );
    refused(
        &with("run-dir", "run_dir"),
        syntax,
        "8:1",
        "did you mean `run-dir`?",
    );
    refused(
        &with("port = 7790", "port = 7790\nzzz = 1"),
        syntax,
        "19:1",
        "known keys are name, mode",
    );
    refused(
        &with("insecure", "group = 1\ninsecure"),
        syntax,
        "3:1",
        "unknown key `group`",
    );
    refused(
        &(EXAMPLE.to_owned() + "\"two\\nlines\" = 1\n"),
        syntax,
        "26:1",
        "two\\nlines",
    );
    refused(
        "[cluster]\nname = \"é\" x\n",
        syntax,
        "2:12",
        "; correct the TOML here",
    );
}

#[test]
fn what_is_no_configuration_at_all() {
    let huge = "#".repeat(MAX_CONFIG + 1);
    assert_eq!(parse(&huge).unwrap_err().id, ErrorId::ConfigUnreadable);
    let refusal =
        Config::parse_bytes(b"[cluster]\nname = \"\xff\"", Path::new("k.toml")).unwrap_err();
    assert!(
        refusal
            .message
            .starts_with("k.toml:2:9: bytes that are not UTF-8"),
        "{refusal}"
    );
    for open in ["[", "{", "a=[", "a={b=", "[a.", "a."] {
        assert!(parse(&open.repeat(20_000)).is_err());
    }
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = Config::parse_bytes(&bytes, Path::new("k.toml"));
    }

    /// The example with some bytes changed parses, or says in one line where it does not.
    #[test]
    fn no_change_of_the_example_panics(
        changes in proptest::collection::vec((0..EXAMPLE.len(), any::<u8>()), 1..4),
        cut in 0..EXAMPLE.len(),
    ) {
        let mut bytes = EXAMPLE.as_bytes().to_vec();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        for bytes in [&bytes[..], &bytes[..cut]] {
            if let Err(refusal) = Config::parse_bytes(bytes, Path::new("k.toml")) {
                prop_assert!(refusal.message.starts_with("k.toml:"));
                prop_assert!(!refusal.message.contains('\n'));
            }
        }
    }

    /// Lines of the example in any order, some lost, some doubled.
    #[test]
    fn no_shuffle_of_the_example_panics(lines in proptest::collection::vec(0..23usize, 0..40)) {
        let all: Vec<&str> = EXAMPLE.lines().collect();
        let text: Vec<&str> = lines.into_iter().map(|line| all[line]).collect();
        let _ = parse(&text.join("\n"));
    }
}
