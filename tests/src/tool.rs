//! External programs: the clients no one here wrote.

use crate::process::die_with_parent;
use serde_json::Value;
use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Stdio};

/// Programs the stories use and the Debian package each is in.
const PACKAGES: &[(&str, &str)] = &[
    ("fio", "fio"),
    ("nbdinfo", "libnbd-bin"),
    ("nbdcopy", "libnbd-bin"),
    ("nbdfuse", "libnbd-bin"),
    ("/usr/bin/python3", "python3-libnbd"),
    ("nbdkit", "nbdkit"),
    ("qemu-img", "qemu-utils"),
    ("qemu-io", "qemu-utils"),
    ("qemu-storage-daemon", "qemu-system-common"),
    ("mkfs.ext4", "e2fsprogs"),
    ("fsck.ext4", "e2fsprogs"),
    ("addpart", "util-linux"),
    ("delpart", "util-linux"),
    ("losetup", "mount"),
    ("mount", "mount"),
    ("umount", "mount"),
    ("mountpoint", "util-linux"),
    ("unshare", "util-linux"),
    ("cmp", "diffutils"),
    ("ip", "iproute2"),
    ("nft", "nftables"),
];

/// One run of an external program.
#[derive(Debug)]
pub struct Tool {
    command: Command,
    name: String,
}

/// What came of it.
#[derive(Debug)]
pub struct ToolOutput {
    /// The exit code; -1 when ended by a signal.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Tool {
    /// A run of the program.
    ///
    /// # Panics
    ///
    /// When the program is not installed; the message names the package.
    #[track_caller]
    pub fn new(name: &str) -> Tool {
        let path = find(name).unwrap_or_else(|| {
            let package = PACKAGES
                .iter()
                .find(|(program, _)| *program == name)
                .map_or(name, |(_, package)| package);
            panic!("{name} is not installed: apt-get install {package} (or run scripts/check)")
        });
        let mut command = Command::new(path);
        command.stdin(Stdio::null());
        Tool {
            command,
            name: name.to_owned(),
        }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Tool {
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Tool {
        self.command.args(args);
        self
    }

    /// Runs it in this directory.
    #[must_use]
    pub fn directory(mut self, directory: &Path) -> Tool {
        self.command.current_dir(directory);
        self
    }

    /// The command, to start it as a [`crate::Process`].
    pub fn into_command(self) -> Command {
        self.command
    }

    /// Runs it to its end.
    #[track_caller]
    pub fn output(mut self) -> ToolOutput {
        die_with_parent(&mut self.command);
        let output = self
            .command
            .output()
            .unwrap_or_else(|error| panic!("cannot run {}: {error}", self.name));
        ToolOutput {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Runs it and requires exit code 0; returns its standard output.
    #[track_caller]
    pub fn success(self) -> String {
        let line = format!("{:?}", self.command);
        let output = self.output();
        assert!(
            output.code == 0,
            "{line}\nended with {}\n{}{}",
            output.code,
            output.stdout,
            output.stderr
        );
        output.stdout
    }
}

fn find(name: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(name))
        .find(|candidate| candidate.is_file())
}

/// Fails the test, with the reason, when it does not run as root.
#[track_caller]
pub fn require_root(what: &str) {
    assert!(
        nix::unistd::Uid::effective().is_root(),
        "{what} needs root; run the tests as root"
    );
}

/// A run of fio over NBD.
#[derive(Debug)]
pub struct Fio {
    tool: Tool,
}

impl Fio {
    /// A run with global options, given as in a job file without the dashes (`bs=4k`).
    #[track_caller]
    pub fn new(uri: &str, options: &[&str]) -> Fio {
        let tool = Tool::new("fio")
            .args(["--output-format=json", "--ioengine=nbd"])
            // Else it leaves a file in the working directory.
            .arg("--verify_state_save=0")
            .arg(format!("--uri={uri}"))
            .args(options.iter().map(|option| format!("--{option}")));
        Fio { tool }
    }

    /// Adds a job.
    #[must_use]
    pub fn job(self, name: &str, options: &[&str]) -> Fio {
        let tool = self
            .tool
            .arg(format!("--name={name}"))
            .args(options.iter().map(|option| format!("--{option}")));
        Fio { tool }
    }

    /// Runs it; any I/O or verification error fails the test. Returns its report.
    #[track_caller]
    pub fn run(self) -> Value {
        let output = self.tool.output();
        // Messages may stand in front of the report.
        let report = output
            .stdout
            .find('{')
            .map_or("", |at| &output.stdout[at..]);
        let report: Value = serde_json::from_str(report).unwrap_or(Value::Null);
        let errors = report["jobs"].as_array().map_or(1, |jobs| {
            jobs.iter()
                .filter(|job| job["error"].as_i64() != Some(0))
                .count()
        });
        assert!(
            output.code == 0 && errors == 0,
            "fio ended with {}\n{}{}",
            output.code,
            output.stdout,
            output.stderr
        );
        report
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "is not installed")]
    fn a_missing_tool_fails_the_test() {
        let _ = Tool::new("kagami-no-such-tool");
    }

    #[test]
    fn a_tool_that_fails_is_reported() {
        let output = Tool::new("ls").arg("/nonexistent").output();
        assert_eq!(output.code, 2);
        assert!(output.stderr.contains("nonexistent"));
    }
}
