//! A child process that does not outlive its test.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};

/// A process the harness started. Dropping it kills it; so does the end of the thread that started
/// it (a parent-death signal), should the test process die without dropping anything. Start
/// processes therefore from a thread that lives as long as they should.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
}

impl Process {
    /// Starts it.
    #[track_caller]
    pub fn start(name: &str, command: &mut Command) -> Process {
        die_with_parent(command);
        let child = command
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {name} ({command:?}): {error}"));
        Process {
            child,
            name: name.to_owned(),
        }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The child, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Sends it a signal.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        // The child is not yet waited for, so the id is still its own.
        kill(Pid::from_raw(self.child.id() as i32), signal)
            .unwrap_or_else(|error| panic!("cannot send {signal} to {}: {error}", self.name));
    }

    /// Ends it with SIGKILL and waits until it is gone.
    pub fn kill(mut self) {
        self.end();
    }

    /// The exit status, if it has ended by itself.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// A line about how it is, for messages.
    pub fn describe(&mut self) -> String {
        match self.ended() {
            None => format!("{} runs as {}", self.name, self.child.id()),
            Some(status) => match status.signal() {
                Some(signal) => format!("{} was ended by signal {signal}", self.name),
                None => format!("{} ended with {status}", self.name),
            },
        }
    }

    fn end(&mut self) {
        // Both fail only if the child is gone already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

/// Has the kernel kill the command's process when the thread that starts it ends.
pub(crate) fn die_with_parent(command: &mut Command) {
    // SAFETY: between fork and exec only prctl(2) is called, which is async-signal-safe.
    unsafe {
        command.pre_exec(|| nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(Into::into));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_process_is_gone() {
        let process = Process::start("sleep", Command::new("sleep").arg("600"));
        let id = Pid::from_raw(process.id() as i32);
        process.signal(Signal::SIGSTOP);
        drop(process);
        assert!(kill(id, None).is_err());
    }
}
