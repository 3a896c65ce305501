//! The rules of the source that a machine can check.

use serde_json::Value;
use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::process::Command;

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the crate lies in the workspace")
        .to_owned()
}

fn rust_files(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory)
        .expect("a readable directory")
        .flatten()
    {
        let path = entry.path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

/// The lines of a file without their comments, numbered from 1.
fn code(path: &Path) -> Vec<(usize, String)> {
    let text = std::fs::read_to_string(path).expect("a readable file");
    text.lines()
        .enumerate()
        .map(|(at, line)| (at + 1, line.split("//").next().unwrap_or("").to_owned()))
        .collect()
}

/// Lines of these files that contain one of these words.
fn offences(files: &[PathBuf], words: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for file in files {
        for (number, line) in code(file) {
            for word in words.iter().filter(|word| line.contains(**word)) {
                found.push(format!("{}:{number}: {word}", file.display()));
            }
        }
    }
    found
}

#[track_caller]
fn assert_none(found: Vec<String>, rule: &str) {
    assert!(found.is_empty(), "{rule}:\n{}", found.join("\n"));
}

#[test]
fn the_core_touches_no_operating_system() {
    let files = rust_files(&workspace().join("mirror-core/src"));
    let words = [
        "std::fs",
        "std::os::",
        "std::thread",
        "std::process",
        "TcpStream",
        "TcpListener",
        "UdpSocket",
        "UnixStream",
        "UnixListener",
        "Instant::",
        "SystemTime",
        "async fn",
        // Grouped imports would hide the above.
        "use std::{",
    ];
    assert!(files.len() > 5);
    assert_none(
        offences(&files, &words),
        "mirror-core is pure: no files, sockets, threads, clocks or async",
    );
}

/// Cargo's own view of what `package` links, with every feature of every crate on.
fn normal_dependencies(package: &str) -> BTreeSet<String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args([
            "metadata",
            "--format-version=1",
            "--locked",
            "--all-features",
        ])
        .current_dir(workspace())
        .output()
        .expect("cargo runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo prints JSON");
    let names: HashMap<&str, &str> = array(&metadata["packages"])
        .iter()
        .map(|package| (text(&package["id"]), text(&package["name"])))
        .collect();
    let nodes: HashMap<&str, &Value> = array(&metadata["resolve"]["nodes"])
        .iter()
        .map(|node| (text(&node["id"]), node))
        .collect();
    let root = names
        .iter()
        .find(|(_, name)| **name == package)
        .map(|(id, _)| *id)
        .expect("the package is in the workspace");
    let mut seen = BTreeSet::new();
    let mut open = vec![root];
    while let Some(id) = open.pop() {
        for dependency in array(&nodes[id]["deps"]) {
            // A null kind is a normal dependency; "dev" and "build" are not linked.
            let linked = array(&dependency["dep_kinds"])
                .iter()
                .any(|kind| kind["kind"].is_null() && for_linux(&kind["target"]));
            let id = text(&dependency["pkg"]);
            if linked && seen.insert(id) {
                open.push(id);
            }
        }
    }
    seen.into_iter().map(|id| names[id].to_owned()).collect()
}

/// Whether a dependency's target condition may hold on Linux.
fn for_linux(target: &Value) -> bool {
    target.as_str().is_none_or(|target| {
        !["windows", "wasm", "hermit", "wasi"]
            .iter()
            .any(|os| target.contains(os))
    })
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> &str {
    value.as_str().expect("a string")
}

#[test]
fn the_core_links_nothing_of_an_operating_system() {
    let linked = normal_dependencies("mirror-core");
    assert!(linked.contains("crc32fast"), "{linked:?}");
    for forbidden in [
        "io-uring", "tokio", "nix", "libc", "mio", "rustix", "socket2",
    ] {
        assert!(
            !linked.contains(forbidden),
            "mirror-core links {forbidden}: {linked:?}"
        );
    }
}

#[test]
fn crates_depend_downwards_only() {
    let ours = [
        "mirror-core",
        "mirror-nbd",
        "cluster-agent",
        "tools",
        "kagami-tests",
    ];
    for package in ours {
        let linked = normal_dependencies(package);
        for other in ours {
            let allowed = other == "mirror-core";
            assert!(
                allowed || !linked.contains(other),
                "{package} depends on {other}; only mirror-core may be shared"
            );
        }
    }
}

#[test]
fn no_file_grows_into_a_god() {
    const MOST_LINES: usize = 1_500;
    let mut found = Vec::new();
    for package in [
        "mirror-core",
        "mirror-nbd",
        "cluster-agent",
        "tools",
        "tests",
        "fuzz/src",
        "fuzz/fuzz_targets",
    ] {
        for file in rust_files(&workspace().join(package)) {
            let lines = code(&file).len();
            if lines > MOST_LINES {
                found.push(format!("{}: {lines} lines", file.display()));
            }
        }
    }
    assert_none(
        found,
        "split a file by who owns the fields before 1,500 lines",
    );
}

#[test]
fn tests_wait_for_states_not_for_time() {
    let files = rust_files(&workspace().join("tests/tests"));
    let files: Vec<_> = files
        .into_iter()
        .filter(|file| !file.ends_with("tidy.rs"))
        .collect();
    assert_none(
        offences(&files, &["sleep(", "#[ignore"]),
        "use wait_until for a state, pace for the moment of a fault; skip nothing",
    );
}

/// The Markdown files below a directory, but for what is built or hidden.
fn markdown_files(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let entries = std::fs::read_dir(directory).expect("a readable directory");
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            files.extend(markdown_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "md") {
            files.push(path);
        }
    }
    files
}

/// The targets of a text's links, with the line each is on; code blocks have none.
fn links(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut in_code = false;
    for (at, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        }
        if in_code {
            continue;
        }
        for link in line.split("](").skip(1) {
            let target = link.split(')').next().unwrap_or("").trim();
            found.push((at + 1, target.to_owned()));
        }
    }
    found
}

/// The anchor that a heading gets: lower case, words joined by dashes, no other signs.
fn anchor(heading: &str) -> String {
    let heading = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = heading
        .chars()
        .filter(|sign| sign.is_alphanumeric() || matches!(sign, ' ' | '-' | '_'));
    kept.map(|sign| if sign == ' ' { '-' } else { sign })
        .collect()
}

#[test]
fn links_between_documents_lead_somewhere() {
    let mut broken = Vec::new();
    let mut followed = 0;
    for file in markdown_files(&workspace()) {
        let text = std::fs::read_to_string(&file).expect("a readable file");
        for (line, target) in links(&text) {
            if target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            followed += 1;
            let (path, place) = target.split_once('#').unwrap_or((&target, ""));
            let directory = file.parent().expect("a file is in a directory");
            let there = if path.is_empty() {
                file.clone()
            } else {
                directory.join(path)
            };
            let has_place = || {
                let text = std::fs::read_to_string(&there).unwrap_or_default();
                let mut headings = text.lines().filter(|line| line.starts_with('#'));
                headings.any(|heading| anchor(heading) == place)
            };
            if !there.exists() || !(place.is_empty() || has_place()) {
                broken.push(format!("{}:{line}: {target}", file.display()));
            }
        }
    }
    assert!(followed > 10, "{followed} links found");
    assert_none(
        broken,
        "a link leads to a file, and a heading, that is there",
    );
}
