//! A child process that does not outlive its test.

use nix::errno::Errno;
use nix::libc;
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

/// Has the kernel answer the command's process, and those it starts, with this error when they ask
/// for io_uring: a seccomp filter, as hardened hosts and containers have one.
pub(crate) fn deny_io_uring(command: &mut Command, errno: Errno) {
    let statement = |code, k| libc::sock_filter {
        code,
        jt: 0,
        jf: 0,
        k,
    };
    let is_setup = libc::sock_filter {
        // Else passes over the next one.
        jf: 1,
        ..statement(
            (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
            libc::SYS_io_uring_setup as u32,
        )
    };
    let answer = |action| statement((libc::BPF_RET | libc::BPF_K) as u16, action);
    let mut filter = [
        // The number of the call is the first word of what the filter sees.
        statement((libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, 0),
        is_setup,
        answer(libc::SECCOMP_RET_ERRNO | errno as u32),
        answer(libc::SECCOMP_RET_ALLOW),
    ];
    let install = move || {
        let program = libc::sock_fprog {
            len: filter.len() as u16,
            filter: filter.as_mut_ptr(),
        };
        nix::sys::prctl::set_no_new_privs()?;
        // SAFETY: `program` and the filter it points to are whole and outlive the call.
        let result = unsafe {
            libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER as libc::c_ulong,
                &raw const program,
            )
        };
        Errno::result(result).map(drop).map_err(Into::into)
    };
    // SAFETY: between fork and exec only prctl(2) is called, which is async-signal-safe.
    unsafe {
        command.pre_exec(install);
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
