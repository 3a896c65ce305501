//! How the main thread speaks to a mirror's thread: letters, and an eventfd that its backend
//! watches.

use crate::backend::Descriptor;
use crate::nbd::dialect::Dialect;
use mirror_core::control::{Command, CommandOutcome, MirrorStatus};
use mirror_core::error::Refusal;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use tokio::sync::oneshot;

/// What a command came to.
pub type CommandResult = Result<CommandOutcome, Refusal>;

/// What the main thread has for a mirror.
#[derive(Debug)]
pub enum Letter {
    /// A client whose negotiation is complete.
    Guest {
        /// Its socket.
        fd: OwnedFd,
        /// Its process, on a Unix socket.
        pid: Option<i32>,
        /// What was agreed on.
        dialect: Dialect,
    },
    /// A connection to the peer's daemon.
    Peer {
        /// Its socket.
        fd: OwnedFd,
    },
    /// An operator's command.
    Command {
        /// What.
        what: Command,
        /// Where the answer goes.
        answer: oneshot::Sender<CommandResult>,
    },
    /// A look at the mirror.
    Status {
        /// Where it goes.
        answer: oneshot::Sender<MirrorStatus>,
    },
    /// The daemon ends: be at rest soon.
    Shutdown,
}

/// The main thread's end.
#[derive(Clone, Debug)]
pub struct Mailbox {
    letters: Sender<Letter>,
    bell: Arc<EventFd>,
}

/// The mirror thread's end.
#[derive(Debug)]
pub struct Inbox {
    letters: Receiver<Letter>,
    bell: Arc<EventFd>,
}

/// A new mailbox.
///
/// # Errors
///
/// When the process is out of descriptors.
pub fn mailbox() -> io::Result<(Mailbox, Inbox)> {
    let (sender, letters) = channel();
    let bell = Arc::new(EventFd::from_flags(
        EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC,
    )?);
    let mailbox = Mailbox {
        letters: sender,
        bell: Arc::clone(&bell),
    };
    Ok((mailbox, Inbox { letters, bell }))
}

impl Mailbox {
    /// Sends a letter; one to a mirror that is gone is dropped, and its answer with it.
    pub fn post(&self, letter: Letter) {
        if self.letters.send(letter).is_ok() {
            // Cannot fail but by overflow, when the bell rings anyway.
            let _ = self.bell.write(1);
        }
    }
}

impl Inbox {
    /// What becomes readable when there is a letter.
    ///
    /// # Errors
    ///
    /// When the process is out of descriptors.
    pub fn readable(&self) -> io::Result<Descriptor> {
        // Not the descriptor that rings, which may be non-blocking: only readiness matters here.
        Ok(Descriptor::from(self.bell.as_fd().try_clone_to_owned()?))
    }

    /// Silences the bell; letters that come later ring it again.
    pub fn heard(&self) {
        let _ = self.bell.read();
    }

    /// The next letter, if there is one.
    pub fn next(&self) -> Option<Letter> {
        self.letters.try_recv().ok()
    }
}
