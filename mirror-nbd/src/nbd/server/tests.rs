use super::*;
use crate::backend::Completion;
use crate::backend::Descriptor;
use crate::backing::Store;
use crate::buffers::Origin;
use crate::nbd::dialect::Contexts;
use mirror_core::limits::BLOCK;
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

/// What can be asked about a file.
fn outline(file: std::fs::File) -> Outline {
    let store = Store {
        data: Descriptor::from(OwnedFd::from(file)),
        external: None,
        size: SIZE,
        direct: false,
        durable_writes: true,
    };
    store.outline()
}

const SIZE: u64 = 1 << 40;

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
        let file = tempfile::tempfile().expect("a file");
        guests.serve(SIZE, outline(file));
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

    fn connect(&mut self, dialect: Dialect) {
        let (theirs, ours) = std::os::unix::net::UnixStream::pair().expect("a pair");
        self.clients.push(theirs);
        let (guests, mut around) = self.parts();
        guests.adopt(ours.into(), None, dialect, &mut around);
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

    /// Does what the store is asked, as a worker would.
    fn look(&mut self, file: &std::fs::File) {
        let twin = file.try_clone().expect("a second handle");
        let file = Descriptor::from(OwnedFd::from(twin));
        while let Some(place) = self
            .backend
            .submitted
            .iter()
            .position(|(token, _)| matches!(token, Token::GuestLook(_)))
        {
            let (token, operation) = self.backend.submitted.swap_remove(place);
            if let Operation::Map { survey, .. } = &operation {
                survey.carry_out(&file);
            }
            let Token::GuestLook(request) = token else {
                unreachable!("just looked");
            };
            self.guests.looked(request, operation, &mut self.inputs);
        }
    }

    /// All that is on its way to a client.
    fn sent(&mut self, client: u32) -> Vec<u8> {
        self.guests.flush(&mut self.backend);
        let mut all = Vec::new();
        while let Some(place) = self
            .backend
            .submitted
            .iter()
            .position(|(token, _)| *token == Token::GuestSend(client))
        {
            let (_, operation) = self.backend.submitted.swap_remove(place);
            let Operation::Send { what, .. } = operation else {
                panic!("not a sending");
            };
            let bytes = what.slices().collect::<Vec<_>>().concat();
            let count = bytes.len() as u32;
            all.extend(bytes);
            self.guests.sent(client, what, Ok(count), &mut self.backend);
        }
        all
    }

    /// The request that got in last but was not looked at yet.
    fn taken_in(&mut self) -> Option<RequestId> {
        self.inputs.pop_front().map(|input| match input {
            Input::Guest { request, .. } => request,
            other => panic!("{other:?}"),
        })
    }
}

fn request(command: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut request = Vec::new();
    request.extend_from_slice(&0x2560_9513_u32.to_be_bytes());
    request.extend_from_slice(&flags.to_be_bytes());
    request.extend_from_slice(&command.to_be_bytes());
    request.extend_from_slice(&cookie.to_be_bytes());
    request.extend_from_slice(&offset.to_be_bytes());
    request.extend_from_slice(&length.to_be_bytes());
    request
}

/// As many reads of the largest size, each with the client's number as its cookie.
fn reads(client: u64, count: usize) -> Vec<u8> {
    request(0, 0, client, 0, MAX_PAYLOAD).repeat(count)
}

#[test]
fn clients_that_wait_for_memory_get_it_in_turn() {
    let mut bench = Bench::new();
    for client in 0..4 {
        bench.connect(Dialect::Simple);
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
            .find(oldest)
            .map(|pending| pending.cookie);
        *share.entry(cookie.expect("known")).or_default() += 1;
        let payloads = &mut bench.payloads;
        bench.guests.complete(oldest, Err(GuestError::Io), payloads);
        let (guests, mut around) = bench.parts();
        guests.resume(&mut around);
    }
    let all = Ledger::BUDGET / MAX_PAYLOAD as usize;
    for client in 1..4 {
        let got = share.get(&client).copied().unwrap_or(0);
        assert!(got >= (40 - all) / 4 - 1, "client {client}: {share:?}");
    }
}

const ALLOCATION: Dialect = Dialect::Structured(Contexts::Allocation);

#[test]
fn a_status_is_answered_when_a_read_may_be() {
    use std::os::unix::fs::FileExt;
    let file = tempfile::tempfile().expect("a file");
    file.set_len(16 * BLOCK).expect("a size");
    file.write_all_at(&[1; BLOCK as usize], 8 * BLOCK)
        .expect("a write");
    let mut bench = Bench::new();
    bench.connect(ALLOCATION);
    bench.arrive(0, &request(7, 0, 5, 4 * BLOCK, 8 * BLOCK as u32));
    assert!(bench.inputs.is_empty(), "the store is asked first");
    bench.look(&file);
    let Some(Input::Guest { request, operation }) = bench.inputs.pop_front() else {
        panic!("the core is not asked");
    };
    let sector = ByteRange::new(4 * BLOCK, SECTOR);
    assert_eq!(operation, GuestOperation::Read(sector));
    assert!(bench.sent(0).is_empty(), "not without the core's word");

    let buffer = bench.pool.fresh(SECTOR as usize).freeze();
    let payload = bench.payloads.lend(buffer, 512, 0, Origin::Local);
    let result = Ok(Some(payload));
    bench.guests.complete(request, result, &mut bench.payloads);
    assert_eq!(bench.pool.in_use(), 0, "nobody needs the sector");
    let mut expected = b"\x66\x8e\x33\xef\0\x01\0\x05".to_vec();
    expected.extend(5_u64.to_be_bytes());
    expected.extend(28_u32.to_be_bytes());
    expected.extend(1_u32.to_be_bytes());
    for (blocks, flags) in [(4, 3), (1, 0), (3, 3)] {
        expected.extend((blocks * BLOCK as u32).to_be_bytes());
        expected.extend(u32::to_be_bytes(flags));
    }
    assert_eq!(bench.sent(0), expected);
}

#[test]
fn a_status_fails_where_a_read_does() {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(BLOCK).expect("a size");
    let mut bench = Bench::new();
    bench.connect(ALLOCATION);
    bench.arrive(0, &request(7, 8, 5, 0, BLOCK as u32));
    bench.look(&file);
    let request = bench.taken_in().expect("the core is asked");
    let payloads = &mut bench.payloads;
    bench
        .guests
        .complete(request, Err(GuestError::NotPrimary), payloads);
    let sent = bench.sent(0);
    assert_eq!(sent[..8], *b"\x66\x8e\x33\xef\0\x01\x80\x01");
    assert_eq!(sent[20..24], 108_u32.to_be_bytes());
}

#[test]
fn the_end_of_a_client_waits_for_its_looks() {
    let file = tempfile::tempfile().expect("a file");
    let mut bench = Bench::new();
    bench.connect(ALLOCATION);
    bench.arrive(0, &request(7, 0, 5, 0, BLOCK as u32));
    let place = bench
        .backend
        .submitted
        .iter()
        .position(|(token, _)| *token == Token::GuestReceive(0))
        .expect("the server listens to it");
    let (_, operation) = bench.backend.submitted.swap_remove(place);
    let Operation::Receive { into, .. } = operation else {
        panic!("not a receiving");
    };
    let (guests, mut around) = bench.parts();
    guests.received(0, into, Err(Errno::ECONNRESET), &mut around);
    assert!(!bench.guests.is_empty(), "its request is under way");
    bench.look(&file);
    let request = bench.taken_in().expect("the core is asked");
    let payloads = &mut bench.payloads;
    bench
        .guests
        .complete(request, Err(GuestError::Io), payloads);
    assert!(bench.guests.is_empty());
}

#[test]
fn reads_are_answered_in_the_clients_dialect() {
    for (dialect, head) in [(Dialect::Simple, 16), (ALLOCATION, 28)] {
        let mut bench = Bench::new();
        bench.connect(dialect);
        let mut requests = request(0, 0, 9, BLOCK, 512);
        requests.extend(request(0, 0, 10, SIZE, 512));
        requests.extend(request(0, 0, 11, 0, 0));
        bench.arrive(0, &requests);
        // On the spot: an error, and nothing.
        let refused = match dialect {
            Dialect::Simple => 16 + 16,
            Dialect::Structured(_) => 26 + NbdError::PastEnd.text().len() + 20,
        };
        assert_eq!(bench.sent(0).len(), refused);
        let request = bench.taken_in().expect("the first one");
        let mut fresh = bench.pool.fresh(512);
        fresh.bytes_mut()[..512].fill(7);
        let payload = bench.payloads.lend(fresh.freeze(), 512, 0, Origin::Local);
        let result = Ok(Some(payload));
        bench.guests.complete(request, result, &mut bench.payloads);
        let sent = bench.sent(0);
        assert_eq!(sent.len(), head + 512);
        assert_eq!(sent[8..16], 9_u64.to_be_bytes());
        assert!(sent[head..].iter().all(|byte| *byte == 7));
    }
}

#[test]
fn caching_asks_the_kernel_where_its_cache_is_used() {
    let mut bench = Bench::new();
    bench.connect(Dialect::Simple);
    bench.arrive(0, &request(5, 0, 3, BLOCK, 8192));
    let advice = bench
        .backend
        .submitted
        .iter()
        .find_map(|(_, operation)| match operation {
            Operation::Prefetch { offset, len, .. } => Some((*offset, *len)),
            _ => None,
        });
    assert_eq!(advice, Some((BLOCK, 8192)));
    bench.look(&tempfile::tempfile().expect("a file"));
    assert_eq!(bench.sent(0).len(), 16);
    assert!(bench.inputs.is_empty(), "the core has no part in it");
}

#[test]
fn questions_of_the_store_count_as_memory() {
    let mut bench = Bench::new();
    let mut asked = 0;
    for client in 0..20 {
        bench.connect(ALLOCATION);
        bench.arrive(client, &request(7, 0, 1, 0, 1 << 30).repeat(256));
        let looks = bench.backend.submitted.iter();
        asked = looks
            .filter(|(token, _)| matches!(token, Token::GuestLook(_)))
            .count();
    }
    let each = crate::extents::MOST as usize * size_of::<crate::extents::Extent>();
    assert_eq!(asked, Ledger::BUDGET / each);
}

#[test]
fn a_refused_write_is_answered_behind_its_payload() {
    let mut bench = Bench::new();
    bench.connect(Dialect::Simple);
    let mut write = request(1, 0, 9, SIZE, 8192);
    write.extend([0x25; 8000]);
    bench.arrive(0, &write);
    assert!(bench.sent(0).is_empty(), "its client still sends");
    let mut rest = vec![0x60; 192];
    rest.extend(request(4, 1 << 9, 10, 0, 512));
    bench.arrive(0, &rest);
    let answers = bench.sent(0);
    let errors: Vec<&[u8]> = answers.chunks(16).map(|reply| &reply[4..8]).collect();
    assert_eq!(errors, [[0, 0, 0, 28], [0, 0, 0, 22]]);
}
