use super::*;

const SIMPLE: Outcome = Outcome::Transmission(Dialect::Simple);
const STRUCTURED: Outcome = Outcome::Transmission(Dialect::Structured(Contexts::None));
const ALLOCATION: Outcome = Outcome::Transmission(Dialect::Structured(Contexts::Allocation));

struct Disk(Option<u64>);

impl Export for Disk {
    fn name(&self) -> &str {
        "r0"
    }
    fn size(&self) -> Option<u64> {
        self.0
    }
    fn why_not(&self) -> String {
        "node a is Secondary".to_owned()
    }
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&number.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

fn go(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&(wanted.len() as u16).to_be_bytes());
    for kind in wanted {
        data.extend_from_slice(&kind.to_be_bytes());
    }
    option(OPT_GO, &data)
}

fn meta_context(number: u32, name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend_from_slice(&(query.len() as u32).to_be_bytes());
        data.extend_from_slice(query.as_bytes());
    }
    option(number, &data)
}

fn list(queries: &[&str]) -> Vec<u8> {
    meta_context(OPT_LIST_META_CONTEXT, "r0", queries)
}

fn select(name: &str, queries: &[&str]) -> Vec<u8> {
    meta_context(OPT_SET_META_CONTEXT, name, queries)
}

fn structured() -> Vec<u8> {
    option(OPT_STRUCTURED_REPLY, &[])
}

/// Sends everything, closes its side, and returns the outcome and all that came back.
async fn converse(disk: Disk, flags: u32, options: &[Vec<u8>]) -> (io::Result<Outcome>, Vec<u8>) {
    let (mut client, mut server) = tokio::io::duplex(1 << 20);
    client.write_all(&flags.to_be_bytes()).await.expect("room");
    for option in options {
        client.write_all(option).await.expect("room");
    }
    client.shutdown().await.expect("open");
    let outcome = negotiate(&mut server, &disk).await;
    drop(server);
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).await.expect("an answer");
    assert_eq!(answer[..18], *b"NBDMAGICIHAVEOPT\x00\x03");
    (outcome, answer.split_off(18))
}

fn replies(mut bytes: &[u8]) -> Vec<(u32, u32, Vec<u8>)> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let number = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four"));
        assert_eq!(bytes[..8], REPLY_MAGIC.to_be_bytes());
        let end = 20 + number(16) as usize;
        all.push((number(8), number(12), bytes[20..end].to_vec()));
        bytes = &bytes[end..];
    }
    all
}

#[tokio::test]
async fn go_tells_size_flags_and_block_sizes() {
    for name in ["", "r0"] {
        let (outcome, answer) = converse(Disk(Some(1 << 30)), 3, &[go(name, &[3])]).await;
        assert_eq!(outcome.expect("fine"), SIMPLE);
        let replies = replies(&answer);
        let facts = &replies[0].2;
        assert_eq!(facts[2..10], (1u64 << 30).to_be_bytes());
        assert_eq!(facts[10..], [0x05, 0x6d]);
        assert_eq!(replies[1].2, [0, 3, 0, 0, 2, 0, 0, 0, 0x10, 0, 2, 0, 0, 0]);
        assert_eq!(replies[2], (OPT_GO, REP_ACK, Vec::new()));
    }
}

#[tokio::test]
async fn a_secondary_says_so() {
    let (outcome, answer) = converse(Disk(None), 3, &[go("r0", &[]), option(OPT_ABORT, &[])]).await;
    assert_eq!(outcome.expect("fine"), Outcome::Over);
    let replies = replies(&answer);
    assert_eq!(replies[0].1, REP_ERR_POLICY);
    assert_eq!(replies[0].2, b"node a is Secondary");
    assert_eq!(replies[1].1, REP_ACK);
}

#[tokio::test]
async fn old_clients_get_their_zeroes() {
    let export = option(OPT_EXPORT_NAME, b"r0");
    let (outcome, answer) = converse(Disk(Some(4096)), 1, std::slice::from_ref(&export)).await;
    assert_eq!(outcome.expect("fine"), SIMPLE);
    assert_eq!(answer.len(), 134);
    let (_, answer) = converse(Disk(Some(4096)), 3, &[export]).await;
    assert_eq!(answer.len(), 10);
    let other = option(OPT_EXPORT_NAME, b"other");
    let (outcome, answer) = converse(Disk(Some(4096)), 3, &[other]).await;
    assert_eq!(outcome.expect("fine"), Outcome::Over);
    assert!(answer.is_empty());
}

#[tokio::test]
async fn exports_are_listed_and_unknown_things_refused() {
    let options = [
        option(OPT_LIST, &[]),
        option(OPT_LIST, b"x"),
        option(5, &[]),
        option(11, &[]),
        go("nope", &[]),
        option(OPT_GO, b"\xff\xff\xff\xff"),
        option(OPT_GO, b"\0\0\0\0\xff\xff"),
        option(OPT_GO, &[0; 9000]),
        option(OPT_ABORT, &[]),
    ];
    let (outcome, answer) = converse(Disk(Some(4096)), 3, &options).await;
    assert_eq!(outcome.expect("fine"), Outcome::Over);
    let kinds: Vec<u32> = replies(&answer).iter().map(|reply| reply.1).collect();
    assert_eq!(
        kinds,
        [
            REP_SERVER,
            REP_ACK,
            REP_ERR_INVALID,
            REP_ERR_UNSUP,
            REP_ERR_UNSUP,
            REP_ERR_UNKNOWN,
            REP_ERR_INVALID,
            REP_ERR_INVALID,
            REP_ERR_TOO_BIG,
            REP_ACK,
        ]
    );
}

#[tokio::test]
async fn hostile_clients_are_given_up() {
    let disk = || Disk(Some(4096));
    let (outcome, _) = converse(disk(), 0xffff_ffff, &[]).await;
    assert!(outcome.is_err());
    let (outcome, _) = converse(disk(), 3, &[vec![0; 16]]).await;
    assert!(outcome.is_err());
    let mut endless = option(99, &[]);
    endless[12..16].copy_from_slice(&u32::MAX.to_be_bytes());
    let (outcome, _) = converse(disk(), 3, &[endless]).await;
    assert!(outcome.is_err());
    let many = vec![option(99, &[]); MAX_OPTIONS + 1];
    let (outcome, _) = converse(disk(), 3, &many).await;
    assert!(outcome.is_err());
    let whole = go("r0", &[3]);
    for cut in 0..whole.len() {
        let (outcome, _) = converse(disk(), 3, &[whole[..cut].to_vec()]).await;
        assert!(outcome.is_err(), "cut at {cut}");
    }
}

/// The outcome of options that end in a `GO`, and the kinds of the replies to what comes before it.
async fn agree(options: &[Vec<u8>]) -> (Outcome, Vec<u32>) {
    let (outcome, answer) = converse(Disk(Some(4096)), 3, options).await;
    let replies = replies(&answer);
    let before = replies.iter().filter(|reply| reply.0 != OPT_GO);
    (
        outcome.expect("fine"),
        before.map(|reply| reply.1).collect(),
    )
}

#[tokio::test]
async fn structured_replies_are_agreed_on_once_or_twice() {
    let (outcome, kinds) = agree(&[structured(), structured(), go("r0", &[])]).await;
    assert_eq!((outcome, kinds), (STRUCTURED, vec![REP_ACK, REP_ACK]));
    let with_data = option(OPT_STRUCTURED_REPLY, b"x");
    let (outcome, kinds) = agree(&[with_data, go("r0", &[])]).await;
    assert_eq!((outcome, kinds), (SIMPLE, vec![REP_ERR_INVALID]));
    // One chunk is promised to those who get chunks.
    let (_, answer) = converse(Disk(Some(4096)), 3, &[structured(), go("r0", &[])]).await;
    assert_eq!(replies(&answer)[1].2[10..], [0x05, 0xed]);
    let by_name = [structured(), option(OPT_EXPORT_NAME, b"r0")];
    let (outcome, answer) = converse(Disk(Some(4096)), 3, &by_name).await;
    assert_eq!(outcome.expect("fine"), STRUCTURED);
    assert_eq!(answer[answer.len() - 2..], [0x05, 0xed]);
}

#[tokio::test]
async fn contexts_are_listed_by_name_by_namespace_or_all() {
    for (queries, shown) in [
        (&[][..], true),
        (&["base:"], true),
        (&["base:allocation"], true),
        (&["x-other:", "base:allocation"], true),
        (&["base:other"], false),
        (&["qemu:dirty-bitmap:b0", "nonsense", ""], false),
    ] {
        let options = [structured(), list(queries), option(OPT_ABORT, &[])];
        let (_, answer) = converse(Disk(Some(4096)), 3, &options).await;
        let replies = replies(&answer);
        let (context, end) = (&replies[1], &replies[replies.len() - 2]);
        assert_eq!(context.1 == REP_META_CONTEXT, shown, "{queries:?}");
        if shown {
            assert_eq!(context.2, b"\0\0\0\0base:allocation");
        }
        assert_eq!((end.0, end.1), (OPT_LIST_META_CONTEXT, REP_ACK));
        assert_eq!(replies.len(), 3 + usize::from(shown));
    }
}

#[tokio::test]
async fn a_context_is_selected_for_one_name_until_the_next_try() {
    let allocation = |name| select(name, &["base:allocation", "base:allocation"]);
    let selected = [REP_ACK, REP_META_CONTEXT, REP_ACK];
    let (outcome, kinds) = agree(&[structured(), allocation("r0"), go("r0", &[])]).await;
    assert_eq!((outcome, &kinds[..]), (ALLOCATION, &selected[..]));
    let (outcome, _) = agree(&[structured(), allocation(""), go("", &[])]).await;
    assert_eq!(outcome, ALLOCATION);
    // A repeated agreement on structured replies takes nothing back.
    let again = [structured(), allocation("r0"), structured(), go("r0", &[])];
    assert_eq!(agree(&again).await.0, ALLOCATION);
    // Another name, though of the same export.
    let (outcome, _) = agree(&[structured(), allocation(""), go("r0", &[])]).await;
    assert_eq!(outcome, STRUCTURED);
    let by_name = [
        structured(),
        allocation("r0"),
        option(OPT_EXPORT_NAME, b"r0"),
    ];
    let (outcome, _) = converse(Disk(Some(4096)), 3, &by_name).await;
    assert_eq!(outcome.expect("fine"), ALLOCATION);

    // Whatever comes of the next try, the earlier selection is over.
    for (next, kind) in [
        (select("r0", &[]), REP_ACK),
        (select("r0", &["base:"]), REP_ACK),
        (select("r0", &["x-other:allocation"]), REP_ACK),
        (select("other", &["base:allocation"]), REP_ERR_UNKNOWN),
        (option(OPT_SET_META_CONTEXT, b"\0\0"), REP_ERR_INVALID),
        (option(OPT_SET_META_CONTEXT, &[0; 9000]), REP_ERR_TOO_BIG),
    ] {
        let options = [structured(), allocation("r0"), next, go("r0", &[])];
        let (outcome, kinds) = agree(&options).await;
        assert_eq!((outcome, kinds.last()), (STRUCTURED, Some(&kind)));
    }
    // A list is no selection and ends none.
    let options = [structured(), allocation("r0"), list(&[]), go("r0", &[])];
    assert_eq!(agree(&options).await.0, ALLOCATION);
}

#[tokio::test]
async fn contexts_need_structured_replies_first() {
    let options = [
        list(&[]),
        select("r0", &["base:allocation"]),
        structured(),
        go("r0", &[]),
    ];
    let (outcome, kinds) = agree(&options).await;
    assert_eq!(outcome, STRUCTURED);
    assert_eq!(kinds, [REP_ERR_INVALID, REP_ERR_INVALID, REP_ACK]);
}

#[tokio::test]
async fn hostile_queries_are_refused() {
    let malformed: [&[u8]; 6] = [
        b"",
        b"\0\0\0\x02r0",
        b"\0\0\0\x02r0\0\0\0\x01",
        b"\0\0\0\x02r0\0\0\0\x01\0\0\0\x06base:",
        b"\0\0\0\x02r0\0\0\0\0x",
        b"\xff\xff\xff\xffr0\0\0\0\0",
    ];
    for data in malformed {
        for number in [OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT] {
            let options = [structured(), option(number, data), go("r0", &[])];
            let (outcome, kinds) = agree(&options).await;
            assert_eq!((outcome, kinds[1]), (STRUCTURED, REP_ERR_INVALID));
        }
    }
    let long = "x".repeat(5000);
    let many = vec!["base:allocation"; 65];
    let options = [structured(), list(&[&long]), list(&many), go("r0", &[])];
    let (_, kinds) = agree(&options).await;
    assert_eq!(kinds[1..], [REP_ERR_INVALID, REP_ERR_TOO_BIG]);
    let absurd = option(OPT_SET_META_CONTEXT, b"\0\0\0\x02r0\xff\xff\xff\xff");
    let (_, kinds) = agree(&[structured(), absurd, go("r0", &[])]).await;
    assert_eq!(kinds[1], REP_ERR_TOO_BIG);
}
