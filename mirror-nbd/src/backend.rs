//! The seam between a mirror's loop and the operating system.
//!
//! The loop knows only this: operations that own what they touch, and completions that give it
//! back. io_uring ([`crate::ring`]) is one way to carry them out; epoll and a few threads
//! ([`crate::plain`]) are the other, for hosts without it. [`crate::choice`] takes one.

use crate::buffers::{Buffer, Fresh};
use crate::extents::Survey;
use crate::stream::{Incoming, Outgoing};
use mirror_core::node::boundary::RequestId;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, Flock};
use nix::sys::uio::{pread, pwrite};
use nix::unistd::fdatasync;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

/// Pieces of one sending; the kernel takes no more at once.
pub const PIECES: usize = 1024;

/// How long a backend that is dropped waits for what it cannot call back.
pub const LAST_WAIT: Duration = Duration::from_secs(2);

/// Carries out operations for one thread. One that is dropped gives up what is in flight on
/// sockets, waits a moment for the rest, and leaks what even then does not end.
pub trait Backend {
    /// Starts an operation, at the latest with the next [`Backend::wait`].
    fn submit(&mut self, token: Token, operation: Operation);

    /// Waits until at least one operation ended or `patience` is over, and appends what ended.
    ///
    /// # Errors
    ///
    /// The backend itself is broken; nothing will complete any more.
    fn wait(
        &mut self,
        patience: Option<Duration>,
        completions: &mut Vec<Completion>,
    ) -> Result<(), Errno>;

    /// Operations that have not ended.
    fn in_flight(&self) -> usize;
}

/// Whose operation it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Token {
    /// The mailbox's.
    Mailbox,
    /// That of a slot of [`crate::disk::Disk`].
    Disk(u32),
    /// Receiving on a slot of [`crate::nbd::server::Guests`].
    GuestReceive(u32),
    /// Sending on one.
    GuestSend(u32),
    /// A look at the store for a request of a guest.
    GuestLook(RequestId),
    /// Receiving on a slot of [`crate::link::Link`].
    LinkReceive(u32),
    /// Sending on one.
    LinkSend(u32),
}

/// An operation and all it touches.
#[derive(Debug)]
pub enum Operation {
    /// Fill `buffer[from..to]` from `offset` on. May end early.
    Read {
        /// Where to read.
        file: Descriptor,
        /// Byte offset of `from` in it.
        offset: u64,
        /// What to fill.
        buffer: Fresh,
        /// First byte.
        from: u32,
        /// One past the last.
        to: u32,
    },
    /// Write `buffer[from..to]` at `offset`. May end early.
    Write {
        /// Where to write.
        file: Descriptor,
        /// Byte offset of `from` in it.
        offset: u64,
        /// What to write.
        buffer: Buffer,
        /// First byte.
        from: u32,
        /// One past the last.
        to: u32,
        /// Complete only when on stable storage.
        durable: bool,
    },
    /// Make all completed writes durable (data, and what is needed to find it).
    Sync {
        /// Of what.
        file: Descriptor,
    },
    /// Change the allocation of a range so that it reads as zeroes.
    Zero {
        /// Of what.
        file: Descriptor,
        /// First byte.
        offset: u64,
        /// How many.
        len: u64,
        /// How.
        how: Zeroing,
    },
    /// Find out where a range has holes. Never fails: what cannot be told is data.
    Map {
        /// Of what.
        file: Descriptor,
        /// Which range, and what was found.
        survey: Survey,
    },
    /// Advise the kernel that a range will be read soon.
    Prefetch {
        /// Of what.
        file: Descriptor,
        /// First byte.
        offset: u64,
        /// How many.
        len: u32,
    },
    /// Receive into the free parts. May end early.
    Receive {
        /// From where.
        socket: Descriptor,
        /// Into what.
        into: Box<Incoming>,
    },
    /// Send what is left. May end early.
    Send {
        /// Where to.
        socket: Descriptor,
        /// What.
        what: Box<Outgoing>,
    },
    /// Wait until there is something to read.
    Readable {
        /// From what.
        file: Descriptor,
    },
}

impl Operation {
    /// Whether it only copies memory.
    pub fn is_copy(&self) -> bool {
        match self {
            Operation::Read { file, .. }
            | Operation::Write { file, .. }
            | Operation::Sync { file } => file.is_in_memory(),
            _ => false,
        }
    }

    /// Does what [`Operation::is_copy`] says yes to.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn copy(&mut self) -> Result<u32, Errno> {
        let moved = match self {
            Operation::Read {
                file,
                offset,
                buffer,
                from,
                to,
            } => {
                let slice = &mut buffer.bytes_mut()[*from as usize..*to as usize];
                pread(file, slice, *offset as i64)?
            }
            Operation::Write {
                file,
                offset,
                buffer,
                from,
                to,
                ..
            } => pwrite(
                file,
                &buffer.bytes()[*from as usize..*to as usize],
                *offset as i64,
            )?,
            Operation::Sync { file } => {
                fdatasync(file)?;
                0
            }
            _ => return Err(Errno::EINVAL),
        };
        Ok(moved as u32)
    }
}

/// How a range is made to read as zeroes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Zeroing {
    /// Give the space back.
    PunchHole,
    /// Keep the space.
    ZeroRange,
}

impl Zeroing {
    /// What `fallocate` is told.
    pub fn mode(self) -> FallocateFlags {
        let how = match self {
            Zeroing::PunchHole => FallocateFlags::FALLOC_FL_PUNCH_HOLE,
            Zeroing::ZeroRange => FallocateFlags::FALLOC_FL_ZERO_RANGE,
        };
        how | FallocateFlags::FALLOC_FL_KEEP_SIZE
    }
}

/// The end of an operation.
#[derive(Debug)]
pub struct Completion {
    /// Whose it was.
    pub token: Token,
    /// The operation itself, with everything it owned.
    pub operation: Operation,
    /// Bytes moved or extents found, or why not.
    pub result: Result<u32, Errno>,
}

/// An open file or socket, kept open by every operation on it, and by those that other threads
/// carry out.
#[derive(Clone, Debug)]
pub struct Descriptor(Arc<Held>);

#[derive(Debug)]
enum Held {
    Plain(OwnedFd),
    Store { file: Flock<File>, in_memory: bool },
}

impl Descriptor {
    /// Holds a store open together with its lock. A store `in_memory` (tmpfs, ramfs) never makes
    /// its caller wait for a device.
    pub fn store(file: Flock<File>, in_memory: bool) -> Descriptor {
        Descriptor(Arc::new(Held::Store { file, in_memory }))
    }

    /// Whether reading and writing it is only copying.
    pub fn is_in_memory(&self) -> bool {
        matches!(
            &*self.0,
            Held::Store {
                in_memory: true,
                ..
            }
        )
    }

    /// The number to tell the kernel.
    pub fn raw(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl From<OwnedFd> for Descriptor {
    fn from(fd: OwnedFd) -> Descriptor {
        Descriptor(Arc::new(Held::Plain(fd)))
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &*self.0 {
            Held::Plain(fd) => fd.as_fd(),
            Held::Store { file, .. } => file.as_fd(),
        }
    }
}

#[cfg(test)]
pub mod tests;
