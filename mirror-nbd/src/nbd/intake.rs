//! How a client's requests get in: parsed from what was received, judged, and handed to the core
//! or to the store, or answered on the spot.
//!
//! **Block status.** Clients take "zero" for the content, so a status is a read in disguise, and
//! true only while a read would be. The store is asked first; then one sector of the range is read
//! through the core, and the status is answered when and if that read is. So it waits as reads do
//! while the right to answer them is in doubt, and fails where they fail. What was a hole when the
//! store was asked then read as zeroes through the mirror, because reads are served from this
//! replica's store, and every write acknowledged before had completed on it.

use crate::backend::{Backend, Operation, Token};
use crate::backing::Outline;
use crate::buffers::Origin;
use crate::nbd::connection::{Connection, GuestWrite, Next, Phase};
use crate::nbd::ledger::{Ledger, Wanted};
use crate::nbd::server::Surroundings;
use crate::nbd::transmit::{Judgement, NbdError, REQUEST_LEN, Request};
use crate::stream::Incoming;
use mirror_core::node::boundary::{GuestOperation, Input};
use mirror_core::types::ByteRange;

/// Bytes of payload memory beyond which clients wait, whatever it is used for.
const POOL_BUDGET: usize = 256 << 20;

/// What is exported while the mirror is served here.
pub struct Serving {
    /// Bytes of the device.
    pub size: u64,
    /// What can be asked about it besides its data.
    pub store: Outline,
}

/// One client's requests on their way in.
pub struct Intake<'a, 's, B> {
    /// The client's slot.
    pub slot: u32,
    /// The client.
    pub guest: &'a mut Connection,
    /// Where requests under way are kept.
    pub ledger: &'a mut Ledger,
    /// What they are about.
    pub serving: &'a Serving,
    /// Everything else.
    pub around: &'a mut Surroundings<'s, B>,
}

/// Why no more of a client's requests get in for now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pause {
    /// What was received holds no further request.
    Starved,
    /// There is no memory or no place for the next one.
    Crowded,
    /// The client is done, or makes no sense.
    Over(Phase),
}

impl<B: Backend> Intake<'_, '_, B> {
    /// Lets in what there is.
    pub fn run(&mut self, incoming: &mut Incoming) -> Pause {
        loop {
            if let Err(pause) = self.step(incoming) {
                return pause;
            }
        }
    }

    fn step(&mut self, incoming: &mut Incoming) -> Result<(), Pause> {
        match self.guest.next {
            Next::Request => self.begin_request(incoming),
            Next::Payload(write) => self.finish_write(incoming, write),
            Next::Refused { cookie, error } => self.finish_refusal(incoming, cookie, error),
        }
    }

    fn begin_request(&mut self, incoming: &mut Incoming) -> Result<(), Pause> {
        let head = incoming.peek::<REQUEST_LEN>().ok_or(Pause::Starved)?;
        let Some(request) = Request::decode(&head) else {
            log::warn!("a client sent something that is no NBD request; disconnecting it");
            return Err(Pause::Over(Phase::Dead));
        };
        let judgement = request.judge(self.serving.size, self.guest.dialect());
        if self.is_crowded(judgement.memory()) {
            return Err(Pause::Crowded);
        }
        incoming.consume(REQUEST_LEN);
        self.carry_out(request.cookie, judgement, incoming)
    }

    fn is_crowded(&self, need: usize) -> bool {
        let no_memory = !self.ledger.is_idle() && self.around.pool.in_use() + need > POOL_BUDGET;
        no_memory || self.ledger.is_full(need) || self.guest.is_sated()
    }

    fn carry_out(
        &mut self,
        cookie: u64,
        judgement: Judgement,
        incoming: &mut Incoming,
    ) -> Result<(), Pause> {
        let need = judgement.memory();
        match judgement {
            Judgement::Read(range) => {
                let offset = range.start;
                let operation = GuestOperation::Read(range);
                self.enter(cookie, need, Wanted::Data { offset }, operation);
            }
            Judgement::Write { range, fua } => {
                incoming.begin_payload(self.around.pool.fresh(need), need);
                self.guest.next = Next::Payload(GuestWrite { cookie, range, fua });
            }
            Judgement::Zero {
                range,
                may_unmap,
                fua,
            } => {
                let operation = GuestOperation::Zero {
                    range,
                    may_unmap,
                    fua,
                };
                self.enter(cookie, need, Wanted::Success, operation);
            }
            Judgement::Flush => self.enter(cookie, need, Wanted::Success, GuestOperation::Flush),
            Judgement::Cache(range) => self.prefetch(cookie, range),
            Judgement::Status { range, most } => {
                let (start, extents) = (range.start, Vec::new());
                let operation = self.serving.store.map(range, most);
                self.look(cookie, need, Wanted::Status { start, extents }, operation);
            }
            Judgement::Nothing => self.guest.answer_nothing(cookie),
            Judgement::Refuse { error, payload } => {
                incoming.skip(u64::from(payload));
                self.guest.next = Next::Refused { cookie, error };
            }
            Judgement::Disconnect => return Err(Pause::Over(Phase::Draining)),
        }
        Ok(())
    }

    /// Lets a write in whose payload has arrived.
    fn finish_write(&mut self, incoming: &mut Incoming, write: GuestWrite) -> Result<(), Pause> {
        let fresh = incoming.take_payload().ok_or(Pause::Starved)?;
        self.guest.next = Next::Request;
        let len = write.range.len() as usize;
        let crc = crc32fast::hash(&fresh.bytes()[..len]);
        let buffer = fresh.freeze();
        let payloads = &mut self.around.payloads;
        let payload = payloads.lend(buffer, len as u32, crc, Origin::Local);
        let operation = GuestOperation::Write {
            range: write.range,
            payload,
            fua: write.fua,
        };
        self.enter(write.cookie, len, Wanted::Success, operation);
        Ok(())
    }

    /// Answers a request that was refused, when what belongs to it went by.
    fn finish_refusal(
        &mut self,
        incoming: &mut Incoming,
        cookie: u64,
        error: NbdError,
    ) -> Result<(), Pause> {
        incoming.peek::<0>().ok_or(Pause::Starved)?;
        self.guest.next = Next::Request;
        self.guest.answer_error(cookie, error);
        Ok(())
    }

    fn enter(&mut self, cookie: u64, need: usize, wanted: Wanted, operation: GuestOperation) {
        self.guest.pending += 1;
        let request = self.ledger.enter(self.slot, cookie, need, wanted);
        let input = Input::Guest { request, operation };
        self.around.inputs.push_back(input);
    }

    /// Advice changes no answer, so where it is no use it is not given.
    fn prefetch(&mut self, cookie: u64, range: ByteRange) {
        match self.serving.store.prefetch(range) {
            Some(operation) => self.look(cookie, 0, Wanted::Success, operation),
            None => self.guest.answer_success(cookie),
        }
    }

    /// Asks the store; [`super::server::Guests::looked`] goes on.
    fn look(&mut self, cookie: u64, need: usize, wanted: Wanted, operation: Operation) {
        self.guest.pending += 1;
        let request = self.ledger.enter(self.slot, cookie, need, wanted);
        let token = Token::GuestLook(request);
        self.around.backend.submit(token, operation);
    }
}
