//! Messages of the control socket: both directions, with the length in front.

use mirror_core::control::{
    self, Command, CommandOutcome, Counters, Direction, MirrorStatus, NodeStatus, PrimaryMode,
    Request, Response, ResyncStatus,
};
use mirror_core::error::{ErrorId, Refusal};
use mirror_core::limits::MAX_CONTROL_MESSAGE;

/// Decodes the input as a body of either kind, and as a message with its length.
pub fn run(data: &[u8]) -> bool {
    let mut taken = either(data);
    if let Some((prefix, rest)) = data.split_first_chunk() {
        match control::decode_length(*prefix) {
            Ok(len) => {
                assert!(len <= MAX_CONTROL_MESSAGE);
                taken |= rest.get(..len).is_some_and(either);
            }
            Err(error) => crate::assert_harmless(&error.to_string()),
        }
    }
    taken
}

fn either(body: &[u8]) -> bool {
    let request = control::decode::<Request>(body);
    let response = control::decode::<Response>(body);
    // Widths are fixed and nothing is left out: what decodes has one encoding.
    if let Ok(request) = &request {
        let again = control::encode(request).expect("no longer than it came");
        assert_eq!(&again[4..], body, "{request:?}");
        assert_eq!(again[..4], (body.len() as u32).to_le_bytes());
    }
    if let Ok(response) = &response {
        let again = control::encode(response).expect("no longer than it came");
        assert_eq!(&again[4..], body, "{response:?}");
    }
    request.is_ok() || response.is_ok()
}

/// One message of each kind, with and without its length.
pub fn seeds() -> Vec<Vec<u8>> {
    let mirror = |command| Request::Mirror {
        mirror: "r0".into(),
        command,
    };
    let connect = Command::Connect {
        discard_my_data: true,
    };
    let requests = [
        Request::Hello {
            protocol: control::PROTOCOL,
        },
        Request::Status {
            mirror: Some("r0".into()),
        },
        mirror(Command::Primary(PrimaryMode::Force)),
        mirror(connect),
        Request::Up { mirror: None },
    ];
    let resync = ResyncStatus {
        direction: Direction::Source,
        done_bytes: 1,
        total_bytes: 2,
        sent_bytes: 3,
        rate_bytes_per_second: 4,
        eta_seconds: Some(5),
        paused: false,
    };
    let status = MirrorStatus {
        name: "r0".into(),
        holders: vec!["a".into(), "b".into()],
        resync: Some(resync),
        reasons: vec!["why".into()],
        counters: Counters::default(),
        ..MirrorStatus::default()
    };
    let responses = [
        Response::Welcome {
            node: "a".into(),
            version: "0.1.0".into(),
            pid: 7,
        },
        Response::Status(NodeStatus {
            schema: 1,
            node: "a".into(),
            mirrors: vec![status],
        }),
        Response::Done(CommandOutcome {
            warnings: vec!["w".into()],
        }),
        Response::Refused(Refusal::new(ErrorId::Busy, "later")),
    ];
    let requests = requests.iter().map(control::encode);
    let messages = requests.chain(responses.iter().map(control::encode));
    let whole: Vec<Vec<u8>> = messages.map(|bytes| bytes.expect("short")).collect();
    let bodies = whole.iter().map(|bytes| bytes[4..].to_vec());
    bodies.chain(whole.clone()).collect()
}
