use super::super::faults::Crash;
use super::super::verify::{VERIFY, VERIFY_AND_REPAIR, VERIFY_ON};
use super::super::{record, replay};
use super::*;
use crate::node::boundary::{Command, PrimaryMode};
use proptest::prelude::*;

fn span() -> impl Strategy<Value = Duration> {
    (1..10_000_000_000u64).prop_map(Duration::from_nanos)
}

fn ask() -> impl Strategy<Value = Ask> {
    // Within the smallest disk that a seed derives.
    (0..2000u64, 1..100u64, any::<bool>(), any::<bool>(), 0..4u8).prop_map(
        |(start, count, fua, unmap, kind)| match kind {
            0 => Ask::Read { start, count },
            1 => Ask::Write { start, count, fua },
            2 => Ask::Zero {
                start,
                count,
                unmap,
                fua,
            },
            _ => Ask::Flush,
        },
    )
}

fn command() -> impl Strategy<Value = Command> {
    let discard = |discard_my_data| Command::Connect { discard_my_data };
    prop_oneof![
        Just(Command::Primary(PrimaryMode::Ordinary)),
        Just(Command::Primary(PrimaryMode::Initial)),
        Just(Command::Primary(PrimaryMode::InitialAssumeClean)),
        Just(Command::Primary(PrimaryMode::Force)),
        Just(Command::Secondary),
        any::<bool>().prop_map(discard),
        Just(Command::Disconnect),
        Just(Command::Invalidate),
        Just(Command::CompareFirst),
        Just(Command::PauseResync),
        Just(Command::ResumeResync),
        Just(VERIFY),
        Just(VERIFY_AND_REPAIR),
        Just(VERIFY_ON),
        Just(Command::StopVerify),
        Just(Command::Down),
    ]
}

fn stimulus() -> impl Strategy<Value = Stimulus> {
    let crash = prop_oneof![Just(Crash::Process), Just(Crash::Power)];
    prop_oneof![
        (0..2usize, crash, span()).prop_map(|(host, kind, down)| Stimulus::Crash {
            host,
            kind,
            down
        }),
        span().prop_map(|outage| Stimulus::Cut { outage }),
        (0..2usize, span()).prop_map(|(host, span)| Stimulus::Silence { host, span }),
        (0..2usize, span()).prop_map(|(host, span)| Stimulus::SlowDisk { host, span }),
        (0..2usize, command()).prop_map(|(host, what)| Stimulus::Command { host, what }),
        (0..2usize, span()).prop_map(|(host, span)| Stimulus::PartArbiter { host, span }),
        span().prop_map(|span| Stimulus::LagArbiter { span }),
        Just(Stimulus::WipeArbiter),
        Just(Stimulus::RestartArbiter),
        ask().prop_map(Stimulus::Guest),
    ]
}

prop_compose! {
    fn recording()(
        seed in any::<u64>(),
        stimuli in prop::collection::vec((0..1_000_000_000u64, stimulus()), 0..40),
        luck in any::<u64>(),
    ) -> Recording {
        let mut options = Options::derive(seed);
        options.luck = luck;
        let mut at = Time(0);
        let mut steps = Vec::new();
        for (gap, stimulus) in stimuli {
            at = Time(at.0 + gap);
            steps.push(Step { at, stimulus });
        }
        steps.push(Step { at, stimulus: Stimulus::Calm });
        Recording { options, steps }
    }
}

proptest! {
    #[test]
    fn a_recording_survives_its_text(recording in recording()) {
        prop_assert_eq!(recording.to_string().parse::<Recording>(), Ok(recording));
    }

    #[test]
    fn no_text_is_too_strange(text in "(seed 1\n)?[ -~\n]{0,200}") {
        let _ = text.parse::<Recording>();
    }

    #[test]
    fn simpler_stimuli_are_others_and_can_be_said(stimulus in stimulus()) {
        for simpler in stimulus.simpler() {
            prop_assert_ne!(simpler, stimulus);
            let text = simpler.to_string();
            let words: Vec<&str> = text.split(' ').collect();
            prop_assert_eq!(Stimulus::parse(&words), Ok(simpler));
        }
    }
}

/// What is drawn and what is listed are the same run: the same requests, answers and faults, and
/// as long to the nanosecond.
#[test]
fn an_unchanged_list_is_the_same_run() {
    for seed in 0..12 {
        let (drawn, recording) = record(seed);
        let read = recording.to_string().parse().unwrap();
        assert_eq!(recording, read, "seed {seed}");
        let listed = replay(&read, false);
        let (mut first, mut second) = (drawn.stats, listed.stats);
        // Drawing takes events of its own, and a list is known to be over where a slow guest is
        // waited for.
        (first.events, second.events) = (0, 0);
        (first.virtual_time, second.virtual_time) = Default::default();
        assert_eq!(first, second, "seed {seed}");
        assert!(first.requests > 50, "seed {seed}");
    }
}

#[test]
fn errors_name_their_line() {
    let cases = [
        ("", 1, "begins with `seed NUMBER`"),
        ("# nothing\n", 1, "begins with `seed NUMBER`"),
        ("1s calm", 1, "begins with `seed NUMBER`"),
        ("seed x", 1, "`x` is no number"),
        ("seed 1\n\nspeed 3", 3, "unknown option `speed`"),
        ("seed 1\ndisk-latency 0s", 2, "disk-latency"),
        ("seed 1\ninitiator 2", 2, "initiator"),
        ("seed 1\nstore-size 5", 2, "store-size"),
        ("seed 1\nfua-percent 101", 2, "fua-percent"),
        (
            "seed 1\nmetadata both",
            2,
            "`both` is none of `internal`, `external`",
        ),
        ("seed 1\n1s calm\ndepth 3", 3, "before the first stimulus"),
        ("seed 1\n1s cut", 2, "`cut` is no stimulus"),
        ("seed 1\n1 cut 3s", 2, "`1` is no time"),
        ("seed 1\n1s cut 3", 2, "`3` is no time"),
        ("seed 1\n1s a explodes for 3s", 2, "`explodes` is none of"),
        ("seed 1\n1s c is-killed for 3s", 2, "is no stimulus"),
        ("seed 1\n1s operator c down", 2, "`c` is none of `a`, `b`"),
        ("seed 1\n1s operator a up", 2, "`up` is none of"),
        ("seed 1\n1s guest write 8", 2, "`8` is no range like 64+8"),
        (
            "seed 1\n1s guest write 8+0\n2s calm",
            2,
            "a request of 0 sectors",
        ),
        (
            "seed 1\n1s guest read 99999999+8\n2s calm",
            2,
            "beyond the disk's",
        ),
        ("seed 1\n1s guest read 0+8 fua", 2, "is no request"),
        ("seed 1\n1s guest", 2, "is no request"),
        ("seed 1\n2s cut 1s\n1s calm", 3, "an earlier time"),
        ("seed 1\n1s calm\n2s calm", 3, "`calm` a second time"),
        (
            "seed 1\n1s calm\n2s cut 1s",
            3,
            "only guests do anything after `calm`",
        ),
        ("seed 1\n2s cut 1s", 2, "ends its storm with `calm`"),
    ];
    for (text, line, part) in cases {
        let error = text.parse::<Recording>().expect_err(text);
        assert_eq!(error.line, line, "{text:?}: {error}");
        assert!(error.problem.contains(part), "{text:?}: {error}");
    }
}
