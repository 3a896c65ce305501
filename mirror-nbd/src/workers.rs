//! Threads for calls that block, where the kernel has no other way to make them.
//!
//! A mirror's thread must never wait for a disk. What it cannot hand to the kernel it hands to
//! these threads as a job, under a number of its choosing; the bell becomes readable when jobs
//! have ended, and the mirror's thread collects what they returned. A job owns all it needs, an
//! open file for instance as a [`Descriptor`].

use crate::backend::Descriptor;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// Threads of one mirror at most: enough to keep a disk's queue busy. They are started as work
/// comes in that finds none idle.
const THREADS: usize = 16;

/// Threads that do jobs which return an `R`.
#[derive(Debug)]
pub struct Workers<R: Send + 'static> {
    name: String,
    shared: Arc<Shared<R>>,
}

struct Shared<R> {
    state: Mutex<State<R>>,
    /// A job waits, or there will be none.
    work: Condvar,
    /// A job ended while somebody waited for it.
    rest: Condvar,
    bell: EventFd,
}

struct State<R> {
    waiting: VecDeque<(u64, Job<R>)>,
    /// What jobs returned, or how they panicked.
    ended: Vec<(u64, thread::Result<R>)>,
    threads: usize,
    idle: usize,
    /// Numbers of the jobs under way.
    running: Vec<u64>,
    closed: bool,
}

type Job<R> = Box<dyn FnOnce() -> R + Send>;

impl<R: Send + 'static> Workers<R> {
    /// Workers of which one is there already; the threads are called by `name`.
    ///
    /// # Errors
    ///
    /// When the process may have no more threads or descriptors.
    pub fn new(name: &str) -> io::Result<Workers<R>> {
        let bell = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        let workers = Workers {
            name: name.to_owned(),
            shared: Arc::new(Shared {
                state: Mutex::new(State {
                    waiting: VecDeque::new(),
                    ended: Vec::new(),
                    threads: 0,
                    idle: 0,
                    running: Vec::new(),
                    closed: false,
                }),
                work: Condvar::new(),
                rest: Condvar::new(),
                bell,
            }),
        };
        workers.shared.lock().threads += 1;
        workers.hire()?;
        Ok(workers)
    }

    /// What becomes readable when a job has ended.
    ///
    /// # Errors
    ///
    /// When the process is out of descriptors.
    pub fn bell(&self) -> io::Result<Descriptor> {
        Ok(Descriptor::from(
            self.shared.bell.as_fd().try_clone_to_owned()?,
        ))
    }

    /// Has a job done, after those that came before it were begun.
    pub fn submit(&self, number: u64, job: impl FnOnce() -> R + Send + 'static) {
        let mut state = self.shared.lock();
        state.waiting.push_back((number, Box::new(job)));
        let short = state.waiting.len() > state.idle && state.threads < THREADS;
        state.threads += usize::from(short);
        drop(state);
        self.shared.work.notify_one();
        if short && let Err(error) = self.hire() {
            // There is one at least, which gets to it.
            log::warn!("{}: no further thread for its disk: {error}", self.name);
        }
    }

    /// Silences the bell and appends what jobs returned since the last time.
    ///
    /// # Panics
    ///
    /// As a job did, so that its bug ends the mirror as one of the mirror's own thread would.
    pub fn collect(&self, into: &mut Vec<(u64, R)>) {
        // In this order: what ends in between rings again.
        let _ = self.shared.bell.read();
        let ended = std::mem::take(&mut self.shared.lock().ended);
        for (number, result) in ended {
            match result {
                Ok(value) => into.push((number, value)),
                Err(panic) => resume_unwind(panic),
            }
        }
    }

    /// Forgets what was not begun and waits, at most this long, for what was: the numbers of those
    /// that even then have not ended. Nothing is begun any more after this.
    pub fn close(&self, patience: Duration) -> Vec<u64> {
        let mut state = self.shared.lock();
        let forgotten = state.close();
        let waited = self
            .shared
            .rest
            .wait_timeout_while(state, patience, |state| !state.running.is_empty());
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let running = state.running.clone();
        drop(state);
        self.shared.work.notify_all();
        drop(forgotten);
        running
    }

    /// Starts a thread that was counted already.
    fn hire(&self) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let thread = thread::Builder::new().name(format!("{}-disk", self.name));
        let started = thread.spawn(move || shared.work_until_closed());
        if started.is_err() {
            self.shared.lock().threads -= 1;
        }
        started.map(drop)
    }
}

impl<R: Send + 'static> Drop for Workers<R> {
    fn drop(&mut self) {
        let forgotten = self.shared.lock().close();
        self.shared.work.notify_all();
        drop(forgotten);
    }
}

impl<R> Shared<R> {
    fn work_until_closed(&self) {
        let mut state = self.lock();
        while !state.closed {
            let Some((number, job)) = state.waiting.pop_front() else {
                state.idle += 1;
                let woken = self.work.wait(state);
                state = woken.unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
                continue;
            };
            state.running.push(number);
            drop(state);
            let result = catch_unwind(AssertUnwindSafe(job));
            state = self.lock();
            state.running.retain(|running| *running != number);
            state.ended.push((number, result));
            if state.ended.len() == 1 {
                // Cannot fail but by overflow, when the bell rings anyway.
                let _ = self.bell.write(1);
            }
            if state.closed {
                self.rest.notify_all();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<R>> {
        // Jobs run without it, so nothing that can panic is done with it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<R> State<R> {
    /// Ends the work; what was not begun is to be dropped without the lock.
    #[must_use]
    fn close(&mut self) -> VecDeque<(u64, Job<R>)> {
        self.closed = true;
        std::mem::take(&mut self.waiting)
    }
}

impl<R> std::fmt::Debug for Shared<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.lock();
        f.debug_struct("Shared")
            .field("waiting", &state.waiting.len())
            .field("running", &state.running)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::sync::mpsc::channel;

    const LONG: Duration = Duration::from_secs(20);

    fn next<R: Send>(workers: &Workers<R>) -> Vec<(u64, R)> {
        let bell = workers.bell().expect("a bell");
        let mut watched = [PollFd::new(bell.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(LONG).expect("in range");
        assert_eq!(poll(&mut watched, timeout), Ok(1), "nothing ended");
        let mut ended = Vec::new();
        workers.collect(&mut ended);
        ended
    }

    #[test]
    fn every_job_is_done_once_and_told_of() {
        let workers = Workers::new("test").expect("workers");
        for number in 0..1000_u64 {
            workers.submit(number, move || number * 2);
        }
        let mut all = Vec::new();
        while all.len() < 1000 {
            all.extend(next(&workers));
        }
        all.sort_unstable();
        assert!(all.iter().map(|(number, _)| *number).eq(0..1000));
        assert!(all.iter().all(|(number, value)| *value == number * 2));
        assert_eq!(workers.close(LONG), []);
    }

    #[test]
    fn a_job_that_waits_holds_up_no_other() {
        let workers = Workers::new("test").expect("workers");
        let (go_on, waits) = channel::<()>();
        workers.submit(1, move || waits.recv().is_ok());
        workers.submit(2, || true);
        assert_eq!(next(&workers), [(2, true)]);
        go_on.send(()).expect("it waits");
        assert_eq!(next(&workers), [(1, true)]);
    }

    #[test]
    fn closing_forgets_what_was_not_begun_and_waits_for_the_rest() {
        let workers = Workers::new("test").expect("workers");
        let (begun, begins) = channel();
        let mut releases = Vec::new();
        for number in 0..THREADS as u64 {
            let (release, waits) = channel::<()>();
            let begun = begun.clone();
            releases.push(release);
            workers.submit(number, move || {
                begun.send(()).expect("the test listens");
                waits.recv().is_ok()
            });
        }
        for _ in 0..THREADS {
            begins.recv_timeout(LONG).expect("all have begun");
        }
        let (never, forgotten) = channel::<()>();
        workers.submit(99, move || never.send(()).is_ok());
        let running = workers.close(Duration::from_millis(10));
        assert_eq!(running.len(), THREADS, "they still wait");
        drop(releases);
        assert_eq!(workers.close(LONG), []);
        assert!(forgotten.recv_timeout(LONG).is_err(), "it was dropped");
        let mut ended = Vec::new();
        workers.collect(&mut ended);
        assert_eq!(ended.len(), THREADS);
    }

    #[test]
    #[should_panic(expected = "a bug")]
    fn a_panic_is_passed_on() {
        let workers = Workers::<()>::new("test").expect("workers");
        workers.submit(1, || panic!("a bug"));
        next(&workers);
    }
}
