//! A store whose every write and flush is recorded, and which a daemon opens as a file:
//!
//! ```text
//! daemon -> file (FUSE, nbdfuse) -> NBD -> qemu-storage-daemon: blklogwrites -> backing file, log
//! ```
//!
//! QEMU has a FUSE export of its own, but it (at least up to 10.0) may overwrite the data of a
//! request under way with that of the next one; [`Recorder::finish`] noticed it.

use crate::process::Process;
use crate::tool::{Tool, require_root};
use crate::wait::{Deadline, pace, wait_until};
use crate::write_log::{Durable, Survivors, WriteLog};
use nix::sys::signal::Signal;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

/// What stands above the log in QEMU. The driver of write logs makes room for the zeroes of a
/// write-zeroes request only after it wrote the entry, and another entry may come between: such
/// requests are refused above it, and QEMU falls back to plain writes. A discard would leave
/// undefined what is read there: it is refused, and a daemon writes zeroes instead.
const PLAIN_WRITES_ONLY: &str = "driver=blkdebug,node-name=top,image=both,discard=unmap,\
    inject-error.0.event=none,inject-error.0.iotype=write-zeroes,\
    inject-error.0.errno=95,inject-error.0.immediately=on,\
    inject-error.1.event=none,inject-error.1.iotype=discard,\
    inject-error.1.errno=22,inject-error.1.immediately=on";

/// A recorded store. Dropping it takes the file away; the log stays.
#[derive(Debug)]
pub struct Recorder {
    server: Process,
    mount: Process,
    store: PathBuf,
    backing: PathBuf,
    log: PathBuf,
}

impl Recorder {
    /// Puts a recorded store in the place of the file at `store`, with its size and full of
    /// zeroes. Call it from a thread that lives as long as the store should.
    #[track_caller]
    pub fn start(store: &Path) -> Recorder {
        require_root("a FUSE mount");
        let size = fs::metadata(store).expect("the store is a file").len();
        let [backing, log, socket] = ["backing", "log", "socket"].map(|kind| appended(store, kind));
        for (path, length) in [(&backing, size), (&log, 0)] {
            File::create(path)
                .and_then(|file| file.set_len(length))
                .expect("a file can be made");
        }
        let mut command = Tool::new("qemu-storage-daemon")
            .arg("--blockdev")
            .arg(file_node("data", &backing))
            .arg("--blockdev")
            .arg(file_node("log", &log))
            .arg("--blockdev")
            .arg("driver=blklogwrites,node-name=both,file=data,log=log")
            .args(["--blockdev", PLAIN_WRITES_ONLY, "--nbd-server"])
            .arg(format!("addr.type=unix,addr.path={}", socket.display()))
            .args(["--export", "nbd,id=store,node-name=top,name=,writable=on"])
            .into_command();
        let mut server = Process::start("qemu-storage-daemon", &mut command);
        wait_until(Deadline::seconds(20), "the recorded store", || {
            match std::os::unix::net::UnixStream::connect(&socket) {
                Ok(_) => Ok(()),
                Err(error) => Err(format!("{error}; {}", server.describe())),
            }
        });
        let outside = device(store);
        let mut command = Tool::new("nbdfuse")
            .arg(store)
            .arg(format!("nbd+unix:///?socket={}", socket.display()))
            .into_command();
        // It tells of every refused discard.
        command.stderr(Stdio::null());
        let mut mount = Process::start("nbdfuse", &mut command);
        wait_until(Deadline::seconds(20), "the file of the store", || {
            if device(store) == outside {
                return Err(mount.describe());
            }
            Ok(())
        });
        Recorder {
            server,
            mount,
            store: store.to_owned(),
            backing,
            log,
        }
    }

    /// The log as it grows: whatever the store answered is within its length.
    #[track_caller]
    pub fn log(&self) -> File {
        File::open(&self.log).expect("the log is a file")
    }

    /// Ends the recording: the log, which must tell all that is in the store.
    #[track_caller]
    pub fn finish(self) -> WriteLog {
        let [log, backing] = [self.log.clone(), self.backing.clone()];
        drop(self);
        let log = File::open(log).expect("the log is a file");
        let log = WriteLog::parse(log).unwrap_or_else(|error| panic!("the log is bad: {error}"));
        let left = fs::read(backing).expect("a readable store");
        let told = Durable::blank(left.len()).cut(
            &log,
            u64::MAX,
            Survivors::Everything,
            &mut fastrand::Rng::with_seed(0),
        );
        assert!(left == told, "the log does not tell what is in the store");
        log
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        // A mount left behind would outlive the test. Lazily, because a test that fails may still
        // have daemons that hold the file.
        let _ = Tool::new("umount").arg("-l").arg(&self.store).output();
        for process in [&mut self.mount, &mut self.server] {
            if process.ended().is_none() {
                process.signal(Signal::SIGTERM);
            }
            let deadline = Deadline::seconds(5);
            while process.ended().is_none() && !deadline.passed() {
                pace(Duration::from_millis(5));
            }
        }
    }
}

fn appended(store: &Path, kind: &str) -> PathBuf {
    let mut path = store.as_os_str().to_owned();
    path.push(".");
    path.push(kind);
    path.into()
}

/// A file as QEMU sees it; its own flushes would only cost time.
fn file_node(name: &str, path: &Path) -> String {
    format!(
        "driver=file,node-name={name},cache.no-flush=on,filename={}",
        path.display()
    )
}

fn device(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.dev())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::write_log::Logged;
    use nix::fcntl::OFlag;
    use std::os::unix::fs::{FileExt, OpenOptionsExt};

    /// The recording is worth something only if flushes and durable writes arrive as flushes.
    #[test]
    fn flushes_reach_the_log() {
        let directory = tempfile::tempdir().unwrap();
        let store = directory.path().join("store");
        File::create(&store).unwrap().set_len(1 << 20).unwrap();
        let recorder = Recorder::start(&store);
        let log = recorder.log();
        let length = || log.metadata().unwrap().len();
        let open = |flags: OFlag| {
            let mut options = File::options();
            options.write(true).custom_flags(flags.bits());
            options.open(&store).unwrap()
        };
        let plain = open(OFlag::empty());
        plain.write_all_at(&[1; 4096], 8192).unwrap();
        assert_eq!(length(), 10 * 512, "an answered write is in the log");
        plain.sync_data().unwrap();
        assert_eq!(length(), 11 * 512, "an answered flush is in the log");
        plain.write_all_at(&[2; 512], 512).unwrap();
        // What RWF_DSYNC does for one write.
        open(OFlag::O_DSYNC).write_all_at(&[3; 512], 1024).unwrap();
        drop(plain);
        let flushes: Vec<bool> = recorder
            .finish()
            .entries()
            .iter()
            .map(|entry| entry.what == Logged::Flush)
            .collect();
        assert_eq!(flushes, [false, true, false, false, true]);
    }
}
