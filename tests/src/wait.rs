//! Waiting for a state with a deadline, and the pace of fault injection.

use std::time::{Duration, Instant};

/// Between two looks at a state that is waited for.
const POLL: Duration = Duration::from_millis(20);

/// A moment by which something must have happened.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    start: Instant,
    limit: Duration,
}

impl Deadline {
    /// The moment `limit` from now.
    pub fn within(limit: Duration) -> Deadline {
        Deadline {
            start: Instant::now(),
            limit,
        }
    }

    /// The moment this many seconds from now.
    pub fn seconds(seconds: u64) -> Deadline {
        Deadline::within(Duration::from_secs(seconds))
    }

    /// Whether it has passed.
    pub fn passed(&self) -> bool {
        self.start.elapsed() >= self.limit
    }
}

/// Looks again and again until `look` says `Ok`, and returns what it found; its `Err` describes
/// the state it saw instead.
///
/// # Panics
///
/// When the deadline passes first; the message tells what was waited for and the last state seen.
#[track_caller]
pub fn wait_until<T>(
    deadline: Deadline,
    what: &str,
    mut look: impl FnMut() -> Result<T, String>,
) -> T {
    loop {
        match look() {
            Ok(found) => return found,
            Err(last) if deadline.passed() => {
                panic!(
                    "waited {:?} in vain for: {what}\nlast state seen: {last}",
                    deadline.limit
                )
            }
            Err(_) => std::thread::sleep(POLL),
        }
    }
}

/// Lets a load or a fault go on for a while. This is for choosing the moment of a fault, never for
/// hoping that something has happened by then.
pub fn pace(time: Duration) {
    std::thread::sleep(time);
}

/// How often a story repeats its fault: the environment variable, as `scripts/soak` sets it, or
/// the short form for CI.
#[track_caller]
pub fn rounds(variable: &str, short: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{variable}={text} is not a number")),
        Err(_) => short,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_returns_what_was_found() {
        let mut looks = 0;
        let found = wait_until(Deadline::seconds(5), "the third look", || {
            looks += 1;
            if looks == 3 {
                Ok(looks)
            } else {
                Err(format!("look {looks}"))
            }
        });
        assert_eq!(found, 3);
    }

    #[test]
    #[should_panic(expected = "last state seen: always this")]
    fn waiting_in_vain_tells_the_last_state() {
        wait_until::<()>(Deadline::within(Duration::from_millis(50)), "never", || {
            Err("always this".to_owned())
        });
    }
}
