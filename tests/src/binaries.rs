//! Where the programs under test are.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The path of `kagami` or `kagami-mirror`.
///
/// `KAGAMI_BIN_DIR` names a directory of programs built elsewhere (`scripts/check` does). Without
/// it they are built here, optimised, the first time a test process asks; cargo makes that cheap
/// when nothing changed and keeps two test processes from doing it at once.
///
/// # Panics
///
/// When there is no such program or the build fails.
#[track_caller]
pub fn binary(name: &str) -> PathBuf {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    let directory = DIRECTORY.get_or_init(|| match std::env::var_os("KAGAMI_BIN_DIR") {
        Some(directory) => PathBuf::from(directory),
        None => build(),
    });
    let path = directory.join(name);
    assert!(path.is_file(), "there is no program {}", path.display());
    path
}

/// Cargo's target directory, as far as this test was built in it.
pub fn target_directory() -> PathBuf {
    // .../target/PROFILE/deps/test-0123456789abcdef
    let test = std::env::current_exe().expect("a test has a path");
    test.ancestors()
        .nth(3)
        .expect("a test lies in a target directory")
        .to_owned()
}

fn build() -> PathBuf {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let target = target_directory();
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let status = Command::new(cargo)
        .args(["build", "--quiet", "--locked", "--release"])
        .args(["-p", "mirror-nbd", "-p", "tools", "--target-dir"])
        .arg(&target)
        .current_dir(workspace)
        .status()
        .expect("cargo runs");
    assert!(status.success(), "the programs under test do not build");
    target.join("release")
}
