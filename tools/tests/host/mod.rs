//! A node's files in a directory of their own, and `kagami` run on them.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};
use tempfile::TempDir;

pub struct Host {
    dir: TempDir,
}

impl Host {
    /// With metadata in this place: `internal`, or the name of a file.
    pub fn new(metadata: &str) -> Host {
        let dir = TempDir::new().unwrap();
        let host = Host { dir };
        host.configure("c", "r0", metadata);
        host
    }

    /// Writes the configuration of a mirror anew; its disk is `a.img`.
    pub fn configure(&self, cluster: &str, mirror: &str, metadata: &str) {
        let at = self.dir.path().display();
        let metadata = match metadata {
            "internal" => metadata.to_owned(),
            name => self.path(name).display().to_string(),
        };
        let text = format!(
            r#"
[cluster]
name = "{cluster}"
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
name = "{mirror}"
port = 7790
disk = {{ a = "{at}/a.img", b = "{at}/b.img" }}
metadata = {{ a = "{metadata}", b = "internal" }}
"#
        );
        fs::write(self.config(), text).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn config(&self) -> PathBuf {
        self.path("kagami.toml")
    }

    /// The command, not run yet.
    pub fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kagami"));
        command
            .env("KAGAMI_CONFIG", self.config())
            .env("KAGAMI_NODE", "a")
            .args(line.split(' '));
        command
    }

    pub fn run(&self, line: &str) -> Output {
        self.command(line).output().unwrap()
    }

    /// Runs what is to be refused, and returns the one line that it says.
    #[track_caller]
    pub fn refused(&self, line: &str, code: i32, id: &str) -> String {
        let output = self.run(line);
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{line}: {errors}");
        assert!(errors.starts_with(&format!("kagami: {id}: ")), "{errors}");
        assert_eq!(errors.lines().count(), 1, "{line}: {errors}");
        assert!(output.stdout.is_empty(), "{line}");
        errors
    }

    /// Runs what is to succeed, and returns what it prints.
    #[track_caller]
    pub fn done(&self, line: &str) -> String {
        let output = self.run(line);
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{line}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }
}
