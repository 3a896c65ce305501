//! The loop of a mirror's thread: what happened goes into the core, what it asks for is done.
//!
//! Each mirror has a thread with a backend and a core of its own, so nothing here takes a lock
//! and no mirror waits for another. [`Driver::run`] is the table of contents.

use crate::backend::{Backend, Completion, Operation, Token};
use crate::buffers::{Payloads, Pool};
use crate::clock;
use crate::desk::Desk;
use crate::disk::Disk;
use crate::link::Link;
use crate::mailbox::{Inbox, Letter};
use crate::nbd::server::{Guests, Surroundings};
use mirror_core::control::{Command, MirrorStatus};
use mirror_core::error::{ErrorId, Refusal};
use mirror_core::node::Node;
use mirror_core::node::boundary::{Action, Actions, Body, Event, Input, Severity};
use mirror_core::types::{BootId, Time};
use nix::errno::Errno;
use std::collections::VecDeque;
use std::time::Duration;
use tokio::sync::{oneshot, watch};

/// How long clients may take to get their last replies when the daemon ends.
const DRAIN: Duration = Duration::from_secs(3);

/// When a refused shutdown of the core is tried again.
const DOWN_AGAIN: Duration = Duration::from_millis(200);

/// How long operations may take to end after the core is at rest.
const LAST_OPERATIONS: Duration = Duration::from_secs(5);

/// The driver of one mirror, from the opening of its store to its closing.
pub struct Driver<B> {
    name: String,
    node: Node,
    now: Time,
    inputs: VecDeque<Input>,
    actions: Actions,
    backend: B,
    completions: Vec<Completion>,
    pool: Pool,
    payloads: Payloads,
    disk: Disk,
    guests: Guests,
    link: Link,
    inbox: Inbox,
    desk: Desk,
    export: watch::Sender<Option<u64>>,
    ready: Option<oneshot::Sender<Result<(), Refusal>>>,
    life: Life,
}

/// What a driver is made of.
pub struct Parts<B> {
    /// The mirror's name.
    pub name: String,
    /// The core, new.
    pub node: Node,
    /// How operations are carried out.
    pub backend: B,
    /// The open store.
    pub disk: Disk,
    /// The memory that `disk` uses too.
    pub pool: Pool,
    /// The link, at rest.
    pub link: Link,
    /// Where letters come in.
    pub inbox: Inbox,
    /// Where the size of the export is shown while the mirror serves.
    pub export: watch::Sender<Option<u64>>,
    /// Told once whether the mirror came up.
    pub ready: oneshot::Sender<Result<(), Refusal>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Life {
    /// In service.
    Up,
    /// The daemon ends: the clients get what they are owed until then.
    Leaving { until: Time },
    /// The daemon ends: the core was told, and is told again then if it refused.
    Descending { again: Option<Time> },
    /// The core is at rest; what is in flight may end until then.
    AtRest { until: Time },
}

/// How a mirror's life ended.
pub enum Ending {
    /// Brought down.
    Down,
    /// Its disk could not be attached; the state says why.
    NeverUp(Box<MirrorStatus>),
}

impl<B: Backend> Driver<B> {
    /// A driver that has done nothing yet.
    pub fn new(parts: Parts<B>) -> Driver<B> {
        Driver {
            name: parts.name,
            node: parts.node,
            now: clock::now(),
            inputs: VecDeque::new(),
            actions: Actions::new(),
            backend: parts.backend,
            completions: Vec::new(),
            pool: parts.pool,
            payloads: Payloads::default(),
            disk: parts.disk,
            guests: Guests::default(),
            link: parts.link,
            inbox: parts.inbox,
            desk: Desk::default(),
            export: parts.export,
            ready: Some(parts.ready),
            life: Life::Up,
        }
    }

    /// Attaches the store and serves until the core is at rest.
    ///
    /// # Errors
    ///
    /// The backend broke.
    pub fn run(mut self, boot: BootId) -> Result<Ending, Errno> {
        self.watch_inbox()?;
        let store_size = self.disk.size();
        self.inputs.push_back(Input::Attach { store_size, boot });
        loop {
            self.feed_core();
            self.start_sending();
            self.report_readiness();
            if self.is_over() {
                return Ok(match self.node.replica() {
                    Some(_) => Ending::Down,
                    None => Ending::NeverUp(Box::new(self.status())),
                });
            }
            self.backend.wait(self.patience(), &mut self.completions)?;
            self.now = clock::now().max(self.now);
            self.sort_completions();
            self.keep_time();
        }
    }

    /// Gives the core what happened, one by one, and carries out what it asks for; then lets
    /// those go on that waited for memory, which may make more happen.
    fn feed_core(&mut self) {
        loop {
            while let Some(input) = self.inputs.pop_front() {
                self.node.handle(self.now, input, &mut self.actions);
                let mut actions = std::mem::take(&mut self.actions);
                for action in actions.drain(..) {
                    self.carry_out(action);
                }
                self.actions = actions;
            }
            let (guests, link, mut around) = self.parts();
            guests.resume(&mut around);
            link.resume(&mut around);
            if self.inputs.is_empty() {
                return;
            }
        }
    }

    fn carry_out(&mut self, action: Action) {
        let backend = &mut self.backend;
        match action {
            Action::Read {
                op,
                range,
                checksum,
            } => self.disk.read(op, range, checksum, backend),
            Action::Digest { op, range } => self.disk.digest(op, range, backend),
            Action::Write {
                op,
                offset,
                payload,
                fua,
            } => {
                let buffer = self.payloads.share(payload);
                self.disk
                    .write(op, offset, buffer, payload.len, fua, backend);
            }
            Action::Zero {
                op,
                range,
                may_unmap,
                fua,
            } => self.disk.zero(op, range, may_unmap, fua, backend),
            Action::Flush { op } => self.disk.flush(op, backend),
            Action::MetaRead { op, offset, len } => self.disk.meta_read(op, offset, len, backend),
            Action::MetaWrite { op, offset, bytes } => {
                self.disk.meta_write(op, offset, &bytes, backend);
            }
            Action::StartConnecting => self.link.start_connecting(),
            Action::StopConnecting => self.link.stop_connecting(),
            Action::Close { connection } => self.link.close(connection, self.now),
            Action::Send {
                connection,
                header,
                body,
            } => {
                let data = match body {
                    Body::Data(payload) => Some(self.payloads.share(payload)),
                    _ => None,
                };
                self.link.send(connection, &header, &body, data);
            }
            Action::Complete { request, result } => {
                self.guests.complete(request, result, &mut self.payloads);
            }
            Action::Release(payload) => drop(self.payloads.take_back(payload)),
            Action::CommandDone { command, result } => {
                if let Life::Descending { again } = &mut self.life
                    && result.is_err()
                {
                    *again = Some(self.now.after(DOWN_AGAIN));
                }
                self.desk.answer(command, result);
            }
            Action::Serve(true) => self.serve(),
            Action::Serve(false) => {
                self.export.send_replace(None);
                self.guests.drain();
            }
            // Mirrors without an arbiter never ask; an unanswered question is asked again.
            Action::AskArbiter { .. } => {}
            Action::Detached => self.come_to_rest(),
            Action::Event(event) => self.tell(&event),
        }
    }

    fn start_sending(&mut self) {
        self.link.flush(&mut self.backend);
        self.guests.flush(&mut self.backend);
    }

    fn sort_completions(&mut self) {
        let mut completions = std::mem::take(&mut self.completions);
        for completion in completions.drain(..) {
            self.sort(completion);
        }
        self.completions = completions;
    }

    fn sort(&mut self, completion: Completion) {
        let Completion {
            token,
            operation,
            result,
        } = completion;
        let (guests, link, mut around) = self.parts();
        match (token, operation) {
            (Token::Disk(slot), operation) => {
                let (payloads, backend) = (&mut self.payloads, &mut self.backend);
                let input = self.disk.ended(slot, operation, result, payloads, backend);
                self.inputs.extend(input);
            }
            (Token::GuestReceive(slot), Operation::Receive { into, .. }) => {
                guests.received(slot, into, result, &mut around);
            }
            (Token::GuestSend(slot), Operation::Send { what, .. }) => {
                guests.sent(slot, what, result, around.backend);
            }
            (Token::GuestLook(request), operation) => {
                guests.looked(request, operation, around.inputs);
            }
            (Token::LinkReceive(slot), Operation::Receive { into, .. }) => {
                link.received(slot, into, result, &mut around);
            }
            (Token::LinkSend(slot), Operation::Send { what, .. }) => {
                link.sent(slot, what, result, &mut around);
            }
            (Token::Mailbox, Operation::Readable { file }) => {
                self.inbox.heard();
                self.backend
                    .submit(Token::Mailbox, Operation::Readable { file });
                while let Some(letter) = self.inbox.next() {
                    self.read_letter(letter);
                }
            }
            (token, operation) => unreachable!("{operation:?} for {token:?}"),
        }
    }

    fn read_letter(&mut self, letter: Letter) {
        let (guests, link, mut around) = self.parts();
        match letter {
            Letter::Guest { fd, pid, dialect } => guests.adopt(fd, pid, dialect, &mut around),
            Letter::Peer { fd } => link.adopt(fd, &mut around),
            Letter::Status { answer } => {
                // Who asked may have left.
                let _ = answer.send(self.status());
            }
            Letter::Command { what, answer } => match self.objection(what) {
                Some(refusal) => {
                    let _ = answer.send(Err(refusal));
                }
                None => {
                    let command = self.desk.take(answer);
                    self.inputs.push_back(Input::Command { command, what });
                }
            },
            Letter::Shutdown => {
                if self.life == Life::Up {
                    self.export.send_replace(None);
                    self.guests.drain();
                    let until = self.now.after(DRAIN);
                    self.life = Life::Leaving { until };
                }
            }
        }
    }

    /// Commands that would take the device from under clients are refused here: the core does
    /// not know who is connected.
    fn objection(&self, what: Command) -> Option<Refusal> {
        if self.life != Life::Up {
            return Some(Refusal::new(
                ErrorId::NotRunning,
                format!("mirror {} is going down", self.name),
            ));
        }
        let clients = self.guests.count();
        if clients == 0 || !matches!(what, Command::Secondary | Command::Down) {
            return None;
        }
        let mut message = match clients {
            1 => format!("one client uses mirror {}", self.name),
            n => format!("{n} clients use mirror {}", self.name),
        };
        let mut pids = self.guests.pids();
        pids.sort_unstable();
        pids.dedup();
        if !pids.is_empty() {
            let pids: Vec<String> = pids.iter().map(i32::to_string).collect();
            message.push_str(&format!(" (process {})", pids.join(", ")));
        }
        message.push_str("; unmount it or disconnect them first");
        Some(Refusal::new(ErrorId::InUse, message))
    }

    /// Does what is due: ticks of the core, last words on the link, the steps of going down.
    fn keep_time(&mut self) {
        self.link.expire(self.now);
        if self.node.next_deadline().is_some_and(|due| due <= self.now) {
            self.inputs.push_back(Input::Tick);
        }
        let descend = match self.life {
            Life::Leaving { until } => self.guests.is_empty() || until <= self.now,
            Life::Descending { again } => again.is_some_and(|again| again <= self.now),
            Life::Up | Life::AtRest { .. } => false,
        };
        if descend {
            self.guests.abort();
            self.life = Life::Descending { again: None };
            let command = self.desk.own();
            let what = Command::Down;
            self.inputs.push_back(Input::Command { command, what });
        }
    }

    fn patience(&self) -> Option<Duration> {
        let own = match self.life {
            Life::Leaving { .. } if self.guests.is_empty() => Some(self.now),
            Life::Leaving { until } | Life::AtRest { until } => Some(until),
            Life::Descending { again } => again,
            Life::Up => None,
        };
        let due = [self.node.next_deadline(), self.link.next_deadline(), own];
        let next = due.into_iter().flatten().min()?;
        Some(next.since(self.now))
    }

    fn serve(&mut self) {
        if self.life == Life::Up {
            let size = self.node.status(self.now).size_bytes;
            self.guests.serve(size, self.disk.outline());
            self.export.send_replace(Some(size));
        }
    }

    fn come_to_rest(&mut self) {
        self.export.send_replace(None);
        self.guests.abort();
        self.link.leave(self.now);
        let until = self.now.after(LAST_OPERATIONS);
        self.life = Life::AtRest { until };
    }

    fn is_over(&self) -> bool {
        let Life::AtRest { until } = self.life else {
            return false;
        };
        // The mailbox's is always there.
        self.backend.in_flight() <= 1 || until <= self.now
    }

    /// Whoever brought the mirror up hears of it as soon as its disk was read, or could not be.
    fn report_readiness(&mut self) {
        if self.ready.is_none() {
            return;
        }
        let outcome = if self.node.replica().is_some() {
            Ok(())
        } else if self.life == Life::Up {
            return;
        } else {
            Err(self.why_not())
        };
        if let Some(ready) = self.ready.take() {
            let _ = ready.send(outcome);
        }
    }

    fn why_not(&self) -> Refusal {
        self.node.refusal().cloned().unwrap_or_else(|| {
            let text = format!("the disk of mirror {} could not be attached", self.name);
            Refusal::new(ErrorId::StoreUnavailable, text)
        })
    }

    fn status(&self) -> MirrorStatus {
        let mut status = self.node.status(self.now);
        status.counters.link_sent_bytes = self.link.sent_bytes;
        status.counters.link_received_bytes = self.link.received_bytes;
        status
    }

    fn tell(&self, event: &Event) {
        let level = match event.severity {
            Severity::Info => log::Level::Info,
            Severity::Warning => log::Level::Warn,
            Severity::Error => log::Level::Error,
        };
        log::log!(level, "{}: {}", self.name, event.text);
    }

    fn watch_inbox(&mut self) -> Result<(), Errno> {
        let readable = self.inbox.readable();
        let file = readable.map_err(|error| Errno::try_from(error).unwrap_or(Errno::EIO))?;
        self.backend
            .submit(Token::Mailbox, Operation::Readable { file });
        Ok(())
    }

    fn parts(&mut self) -> (&mut Guests, &mut Link, Surroundings<'_, B>) {
        let around = Surroundings {
            backend: &mut self.backend,
            pool: &self.pool,
            payloads: &mut self.payloads,
            inputs: &mut self.inputs,
        };
        (&mut self.guests, &mut self.link, around)
    }
}
