use super::*;

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
        assert_eq!(outcome.expect("fine"), Outcome::Transmission);
        let replies = replies(&answer);
        let facts = &replies[0].2;
        assert_eq!(facts[2..10], (1u64 << 30).to_be_bytes());
        assert_eq!(facts[10..], [0x01, 0x6d]);
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
    assert_eq!(outcome.expect("fine"), Outcome::Transmission);
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
        option(8, &[]),
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
