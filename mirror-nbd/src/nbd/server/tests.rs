use super::*;
use crate::backend::Completion;
use mirror_core::limits::MAX_PAYLOAD;
use std::collections::HashMap;
use std::time::Duration;

/// Carries nothing out: a test says when an operation ends, and how.
#[derive(Default)]
struct Idle {
    submitted: Vec<(Token, Operation)>,
}

impl Backend for Idle {
    fn submit(&mut self, token: Token, operation: Operation) {
        self.submitted.push((token, operation));
    }

    fn wait(&mut self, _: Option<Duration>, _: &mut Vec<Completion>) -> Result<(), Errno> {
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.submitted.len()
    }
}

struct Bench {
    guests: Guests,
    backend: Idle,
    pool: Pool,
    payloads: Payloads,
    inputs: VecDeque<Input>,
    /// The clients' ends.
    clients: Vec<std::os::unix::net::UnixStream>,
}

impl Bench {
    fn new() -> Bench {
        let mut guests = Guests::default();
        guests.serve(1 << 40);
        Bench {
            guests,
            backend: Idle::default(),
            pool: Pool::new(),
            payloads: Payloads::default(),
            inputs: VecDeque::new(),
            clients: Vec::new(),
        }
    }

    fn parts(&mut self) -> (&mut Guests, Surroundings<'_, Idle>) {
        let around = Surroundings {
            backend: &mut self.backend,
            pool: &self.pool,
            payloads: &mut self.payloads,
            inputs: &mut self.inputs,
        };
        (&mut self.guests, around)
    }

    fn connect(&mut self) {
        let (theirs, ours) = std::os::unix::net::UnixStream::pair().expect("a pair");
        self.clients.push(theirs);
        let (guests, mut around) = self.parts();
        guests.adopt(ours.into(), None, &mut around);
    }

    /// A client's bytes arrive.
    fn arrive(&mut self, client: u32, bytes: &[u8]) {
        let place = self
            .backend
            .submitted
            .iter()
            .position(|(token, _)| *token == Token::GuestReceive(client))
            .expect("the server listens to it");
        let (_, operation) = self.backend.submitted.swap_remove(place);
        let Operation::Receive { mut into, .. } = operation else {
            panic!("not a receiving");
        };
        let [direct, staged] = into.slices();
        assert!(direct.is_empty());
        staged[..bytes.len()].copy_from_slice(bytes);
        let (guests, mut around) = self.parts();
        guests.received(client, into, Ok(bytes.len() as u32), &mut around);
    }

    /// The request that got in last but was not looked at yet.
    fn taken_in(&mut self) -> Option<RequestId> {
        self.inputs.pop_front().map(|input| match input {
            Input::Guest { request, .. } => request,
            other => panic!("{other:?}"),
        })
    }
}

/// As many reads of the largest size, each with the client's number as its cookie.
fn reads(client: u64, count: usize) -> Vec<u8> {
    let mut request = Vec::new();
    request.extend_from_slice(&0x2560_9513_u32.to_be_bytes());
    request.extend_from_slice(&[0; 4]);
    request.extend_from_slice(&client.to_be_bytes());
    request.extend_from_slice(&0_u64.to_be_bytes());
    request.extend_from_slice(&MAX_PAYLOAD.to_be_bytes());
    request.repeat(count)
}

#[test]
fn clients_that_wait_for_memory_get_it_in_turn() {
    let mut bench = Bench::new();
    for client in 0..4 {
        bench.connect();
        bench.arrive(client, &reads(u64::from(client), 100));
    }
    let mut in_flight = VecDeque::new();
    let mut share: HashMap<u64, usize> = HashMap::new();
    for _ in 0..40 {
        while let Some(request) = bench.taken_in() {
            in_flight.push_back(request);
        }
        let oldest = in_flight.pop_front().expect("the budget is never idle");
        let cookie = bench
            .guests
            .ledger
            .requests
            .get(oldest.0 as u32)
            .map(|pending| pending.cookie);
        *share.entry(cookie.expect("known")).or_default() += 1;
        let payloads = &mut bench.payloads;
        bench.guests.complete(oldest, Err(GuestError::Io), payloads);
        let (guests, mut around) = bench.parts();
        guests.resume(&mut around);
    }
    let all = REQUEST_BUDGET / MAX_PAYLOAD as usize;
    for client in 1..4 {
        let got = share.get(&client).copied().unwrap_or(0);
        assert!(got >= (40 - all) / 4 - 1, "client {client}: {share:?}");
    }
}
