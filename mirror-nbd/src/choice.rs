//! Which backend a mirror's thread gets: what the configuration says, or what the host allows.

use crate::plain::Plain;
use crate::ring::Ring;
use mirror_core::config::IoBackend;
use mirror_core::error::{ErrorId, Refusal};
use nix::errno::Errno;
use std::fmt;
use std::io;

/// A backend of one kind or the other.
pub enum Choice {
    /// io_uring.
    Ring(Ring),
    /// epoll and threads.
    Plain(Plain),
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Choice::Ring(_) => "io_uring",
            Choice::Plain(_) => "epoll and threads",
        })
    }
}

/// A backend for the calling thread, which is the mirror's of this name.
///
/// # Errors
///
/// [`ErrorId::IoUringUnavailable`], or [`ErrorId::Internal`] when the process is out of means.
pub fn choose(wanted: IoBackend, mirror: &str) -> Result<Choice, Refusal> {
    choose_with(wanted, mirror, Ring::new)
}

fn choose_with(
    wanted: IoBackend,
    mirror: &str,
    ring: impl FnOnce() -> io::Result<Ring>,
) -> Result<Choice, Refusal> {
    let error = match wanted {
        IoBackend::Threads => return plain(mirror),
        IoBackend::Auto | IoBackend::IoUring => match ring() {
            Ok(ring) => return Ok(Choice::Ring(ring)),
            Err(error) => error,
        },
    };
    let why = why(&error);
    if wanted == IoBackend::Auto && is_denial(&error) {
        log::info!("{mirror}: no io_uring on this host ({why}); using epoll and threads");
        return plain(mirror);
    }
    let what = format!(
        "mirror {mirror}: io_uring: {why}; allow it, or write io-backend = \"threads\" for this node"
    );
    Err(Refusal::new(ErrorId::IoUringUnavailable, what))
}

fn plain(mirror: &str) -> Result<Choice, Refusal> {
    let plain = Plain::new(mirror).map_err(|error| {
        let what = format!("mirror {mirror}: threads for its disk: {error}");
        Refusal::new(ErrorId::Internal, what)
    })?;
    Ok(Choice::Plain(plain))
}

/// Whether a host's answer means that it has no io_uring for us, now and later.
fn is_denial(error: &io::Error) -> bool {
    let denials = [Errno::ENOSYS, Errno::EPERM, Errno::EACCES];
    denials.into_iter().any(|denial| is(error, denial))
}

fn why(error: &io::Error) -> String {
    if is(error, Errno::ENOSYS) {
        return "the kernel has none, or too old a one".to_owned();
    }
    if is_denial(error) {
        return format!("{error}; a seccomp filter or kernel.io_uring_disabled forbids it");
    }
    error.to_string()
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on_host_that_says(errno: Errno, wanted: IoBackend) -> Result<Choice, Refusal> {
        choose_with(wanted, "r0", || Err(errno.into()))
    }

    #[test]
    fn a_host_without_io_uring_gets_threads() {
        for errno in [Errno::ENOSYS, Errno::EPERM, Errno::EACCES] {
            let choice = on_host_that_says(errno, IoBackend::Auto);
            assert!(matches!(choice, Ok(Choice::Plain(_))), "{errno}");
        }
    }

    #[test]
    fn another_failure_is_not_hidden() {
        for wanted in [IoBackend::Auto, IoBackend::IoUring] {
            let refusal = on_host_that_says(Errno::EMFILE, wanted)
                .err()
                .expect("refused");
            assert_eq!(refusal.id, ErrorId::IoUringUnavailable);
        }
    }

    #[test]
    fn who_asked_for_io_uring_is_told_why_there_is_none() {
        for (errno, part) in [(Errno::ENOSYS, "the kernel"), (Errno::EPERM, "seccomp")] {
            let refusal = on_host_that_says(errno, IoBackend::IoUring).err();
            let refusal = refusal.expect("refused");
            assert_eq!(refusal.id, ErrorId::IoUringUnavailable);
            assert!(refusal.message.contains(part), "{refusal}");
            assert!(refusal.message.contains("io-backend"), "{refusal}");
        }
    }

    #[test]
    fn who_asked_for_threads_gets_them_without_a_try() {
        let choice = choose_with(IoBackend::Threads, "r0", || panic!("tried"));
        assert!(matches!(choice, Ok(Choice::Plain(_))));
    }

    #[test]
    fn a_host_with_io_uring_gives_it() {
        for wanted in [IoBackend::Auto, IoBackend::IoUring] {
            assert!(matches!(choose(wanted, "r0"), Ok(Choice::Ring(_))));
        }
    }
}
