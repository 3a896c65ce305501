//! The program as a script meets it: standard output, standard error, exit codes.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output};
use tempfile::TempDir;

struct Host {
    dir: TempDir,
}

impl Host {
    fn new() -> Host {
        let dir = TempDir::new().unwrap();
        let at = dir.path().display();
        let text = format!(
            r#"
[cluster]
name = "c"
insecure = true
[[node]]
name = "a"
addresses = ["127.0.0.1"]
run-dir = "{at}"
[[node]]
name = "b"
addresses = ["127.0.0.2"]
run-dir = "{at}"
[[mirror]]
name = "r0"
port = 7790
disk = {{ a = "{at}/a.img", b = "{at}/b.img" }}
"#
        );
        fs::write(dir.path().join("kagami.toml"), text).unwrap();
        Host { dir }
    }

    fn config(&self) -> std::path::PathBuf {
        self.dir.path().join("kagami.toml")
    }

    fn run(&self, line: &str) -> Output {
        kagami(&self.config(), line)
    }

    #[track_caller]
    fn fails(&self, line: &str, code: i32, part: &str) {
        let output = self.run(line);
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{line}: {errors}");
        assert!(errors.contains(part), "{line}: {errors}");
        assert!(output.stdout.is_empty(), "{line}");
        if part.starts_with("KGM-") {
            assert_eq!(errors.lines().count(), 1, "{line}: {errors}");
            assert!(
                errors.starts_with(&format!("kagami: {part}: ")),
                "{line}: {errors}"
            );
        }
    }
}

fn kagami(config: &Path, line: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kagami"))
        .env("KAGAMI_CONFIG", config)
        .env("KAGAMI_NODE", "a")
        .args(line.split(' '))
        .output()
        .unwrap()
}

#[test]
fn every_exit_code() {
    let host = Host::new();
    assert_eq!(host.run("check").status.code(), Some(0));
    host.fails("create", 1, "KGM-0201");
    host.fails("frobnicate", 2, "unrecognized");
    host.fails("status r9", 2, "KGM-0107");
    host.fails("--node z status", 2, "KGM-0106");
    host.fails("--config /nonexistent status", 2, "KGM-0101");
    for verb in [
        "status",
        "up",
        "down",
        "primary",
        "secondary",
        "connect",
        "disconnect",
    ] {
        host.fails(verb, 3, "KGM-0401");
    }
    host.fails("status --wait-for synced --timeout 100ms", 1, "KGM-0317");
    assert_eq!(host.run("create --size 64MiB").status.code(), Some(0));
    host.fails("create", 4, "KGM-0208");
}

#[test]
fn a_configuration_error_names_its_place() {
    let host = Host::new();
    let text = fs::read_to_string(host.config())
        .unwrap()
        .replace("port = 7790", "prot = 7790");
    fs::write(host.config(), text).unwrap();
    host.fails("check", 2, "KGM-0102");
    host.fails("check", 2, "kagami.toml:15:1: unknown key `prot`");
}

#[test]
fn metadata_from_the_disk() {
    let host = Host::new();
    host.fails("dump-metadata", 1, "KGM-0201");
    assert_eq!(host.run("create --size 64MiB").status.code(), Some(0));
    let text = String::from_utf8(host.run("dump-metadata").stdout).unwrap();
    assert!(
        text.contains("created as      cluster c, mirror r0, node a"),
        "{text}"
    );
    let json = host.run("dump-metadata --json").stdout;
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(json["names"][1], "r0");
    fs::write(host.dir.path().join("a.img"), vec![0; 64 << 20]).unwrap();
    host.fails("dump-metadata", 1, "KGM-0204");
}

#[test]
fn the_simulator_and_its_scripts() {
    let host = Host::new();
    for line in [
        "sim",
        "sim --seed 1 --seeds 2",
        "sim --seed x",
        "sim --seeds 2 --trace",
        "sim --seeds 2 --shrink",
        "sim --seed 1 --from 3",
        "sim --seed 1 --minutes 3",
        "sim --until-failure --minutes 0",
        "sim --seeds 2 --threads 0",
        "sim --replay f --output g",
        "sim --seeds 2 --sequences 3",
        "sim --exhaustive --operations 4",
        "sim --exhaustive --json",
        "sim --exhaustive-case nonsense",
        "sim --script f --threads 2",
    ] {
        host.fails(line, 2, "error: ");
    }
    host.fails("sim --replay /nonexistent", 2, "KGM-0110");
    let file = host.dir.path().join("script");
    let replay = format!("sim --replay {}", file.display());
    fs::write(&file, "seed 1\n3s cut soon\n4s calm\n").unwrap();
    host.fails(&replay, 2, "KGM-0110");
    host.fails(&replay, 2, "script: line 2: `soon` is no time like 300ms");
    fs::write(&file, [0xff]).unwrap();
    host.fails(&replay, 2, "KGM-0110");
    fs::write(
        &file,
        "seed 1\n2s cut 300ms # and back\n2.1s guest write 64+8 fua\n2.2s calm\n",
    )
    .unwrap();
    let output = host.run(&replay);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.contains("cuts 1"), "{text}");
    let json = host.run(&format!("{replay} --json")).stdout;
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(json["stats"]["faults"]["cuts"], 1);
    assert_eq!(json["stats"]["requests"], 1);
}

#[test]
fn what_many_seeds_did() {
    let host = Host::new();
    let output = host.run("sim --seeds 3 --from 99 --threads 1 --json");
    assert_eq!(output.status.code(), Some(0));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["seeds"], 3);
    assert_eq!(json["from"], 99);
    assert_eq!(json["run_twice"], 1);
    assert_eq!(json["violations"].as_array().unwrap().len(), 0);
    assert!(json["cpu_seconds"].as_f64().unwrap() > 0.0, "{json}");
    assert!(json["cluster_hours"].as_f64().unwrap() > 0.0, "{json}");
}

#[test]
fn completions_for_a_shell() {
    let output = kagami(Path::new("/nonexistent"), "completions bash");
    assert!(output.status.success());
    assert!(
        String::from_utf8(output.stdout)
            .unwrap()
            .contains("dump-metadata")
    );
}

/// `kagami … | head -n 1`
#[test]
fn a_reader_that_has_enough_is_no_mistake() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let ended = Command::new(env!("CARGO_BIN_EXE_kagami"))
        .args(["completions", "bash"])
        .stdout(writer)
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&ended.stderr), "");
    assert_eq!(ended.status.signal(), Some(libc::SIGPIPE));
}
