use super::*;
use crate::wire::{FrameType, Header};

/// The network with a queue of its own.
struct Bench {
    network: Network,
    queue: Vec<(u64, u64, NetworkEvent)>,
    now: u64,
    planned: u64,
    heard: Vec<(usize, String)>,
}

impl Bench {
    fn new(seed: u64) -> Bench {
        let mut bench = Bench {
            network: Network::new(0, Chance::Drawn, 1_000_000, fastrand::Rng::with_seed(seed)),
            queue: Vec::new(),
            now: 0,
            planned: 0,
            heard: Vec::new(),
        };
        bench.with(|network, later| {
            network.start_connecting(0, later);
            network.start_connecting(1, later);
        });
        bench.run(1_000_000_000);
        bench
    }

    fn with(&mut self, act: impl FnOnce(&mut Network, &mut Later)) {
        let mut later = Vec::new();
        act(&mut self.network, &mut later);
        for (delay, event) in later {
            self.planned += 1;
            self.queue.push((self.now + delay, self.planned, event));
        }
    }

    fn run(&mut self, span: u64) {
        let end = self.now + span;
        loop {
            self.queue.sort_by_key(|(at, number, _)| (*at, *number));
            if self.queue.first().is_none_or(|(at, ..)| *at > end) {
                break;
            }
            let (at, _, event) = self.queue.remove(0);
            self.now = at;
            let mut heard = None;
            self.with(|network, later| heard = network.happen(Time(at), event, later));
            if let Some((side, what)) = heard {
                let text = match what {
                    Heard::Up(id) => format!("up {}", id.0),
                    Heard::Down(id) => format!("down {}", id.0),
                    Heard::Part(id) => format!("part {}", id.0),
                    Heard::Frame(id, frame) => {
                        let header = Header::decode(&frame.header).unwrap();
                        format!("frame {} {}", id.0, header.id)
                    }
                };
                self.heard.push((side, text));
            }
        }
        self.now = end;
    }

    fn send(&mut self, from: usize, connection: u64, number: u64) {
        let frame = Frame {
            header: Header::bare(FrameType::Ping, 0, number).encode(),
            body: WireBody::None,
            condition: Condition::Sound,
        };
        let now = Time(self.now);
        self.with(|network, later| {
            network.send(now, from, ConnectionId(connection), frame, later);
        });
    }

    fn heard_by(&self, side: usize) -> Vec<&str> {
        let mine = self.heard.iter().filter(|(at, _)| *at == side);
        mine.map(|(_, text)| text.as_str()).collect()
    }
}

#[test]
fn frames_arrive_in_order() {
    for seed in 0..20 {
        let mut bench = Bench::new(seed);
        for number in 0..50 {
            bench.send(0, 2, number);
        }
        bench.run(10_000_000_000);
        let mut expected = vec!["up 3".to_owned()];
        expected.extend((0..50).map(|number| format!("frame 3 {number}")));
        assert_eq!(bench.heard_by(1), expected);
    }
}

#[test]
fn a_stall_holds_and_then_delivers() {
    let mut bench = Bench::new(3);
    bench.with(|network, later| network.stall(0, 5_000_000_000, later));
    bench.send(0, 2, 7);
    bench.send(1, 3, 8);
    bench.run(4_000_000_000);
    assert_eq!(bench.heard_by(1), ["up 3"]);
    assert_eq!(bench.heard_by(0), ["up 2", "frame 2 8"]);
    bench.run(4_000_000_000);
    assert_eq!(bench.heard_by(1), ["up 3", "frame 3 7"]);
}

#[test]
fn a_cut_delivers_a_prefix_and_tells_both_ends() {
    for seed in 0..50 {
        let mut bench = Bench::new(seed);
        for number in 0..10 {
            bench.send(0, 2, number);
        }
        bench.with(|network, later| network.cut(0, Break::Clean, later));
        bench.send(0, 2, 99);
        bench.run(10_000_000_000);
        let heard = bench.heard_by(1);
        assert_eq!(heard.last(), Some(&"down 3"));
        for (number, text) in heard[1..heard.len() - 1].iter().enumerate() {
            assert_eq!(*text, format!("frame 3 {number}"));
        }
        assert_eq!(bench.heard_by(0).last(), Some(&"down 2"));
    }
}

#[test]
fn a_closed_end_hears_nothing_more() {
    let mut bench = Bench::new(1);
    bench.send(1, 3, 5);
    let now = Time(bench.now);
    bench.with(|network, later| network.close(now, 0, ConnectionId(2), later));
    bench.run(10_000_000_000);
    assert_eq!(bench.heard_by(0), ["up 2"]);
    assert_eq!(bench.heard_by(1), ["up 3", "down 3"]);
}

#[test]
fn a_half_open_cut_tells_one_end() {
    for seed in 0..20 {
        let mut bench = Bench::new(seed);
        let how = Break::HalfOpen { unaware: 0 };
        bench.with(|network, later| network.cut(60_000_000_000, how, later));
        bench.send(0, 2, 7);
        bench.run(20_000_000_000);
        assert_eq!(bench.heard_by(0), ["up 2"], "it stands there");
        assert_eq!(bench.heard_by(1), ["up 3", "down 3"]);
    }
}

#[test]
fn a_cut_in_mid_frame_delivers_a_part_and_no_more() {
    let mut parts = 0;
    for seed in 0..50 {
        let mut bench = Bench::new(seed);
        for number in 0..4 {
            bench.send(0, 2, number);
        }
        let how = Break::MidFrame { to: 1 };
        bench.with(|network, later| network.cut(0, how, later));
        bench.run(10_000_000_000);
        let heard = bench.heard_by(1);
        assert_eq!(heard.last(), Some(&"down 3"));
        // The break may be told before the part arrives; then nothing of it is.
        if let Some(at) = heard.iter().position(|text| *text == "part 3") {
            assert_eq!(at, heard.len() - 2, "{heard:?}");
            parts += 1;
        }
    }
    assert!(parts > 10, "{parts}");
}

#[test]
fn a_flipped_bit_is_in_the_next_frame_only() {
    for bit in [0, 100, 383, 384, 999] {
        let bytes = vec![1, 2, 3];
        let header = Header {
            payload_len: 3,
            payload_crc: crc32fast::hash(&bytes),
            ..Header::bare(FrameType::State, 0, 0)
        };
        let mut frame = Frame {
            header: header.encode(),
            body: WireBody::Control(bytes),
            condition: Condition::Sound,
        };
        flip(&mut frame, bit);
        let WireBody::Control(bytes) = &frame.body else {
            panic!("another body");
        };
        let verifies = Header::decode(&frame.header)
            .is_ok_and(|header| header.payload_crc == crc32fast::hash(bytes));
        assert!(!verifies, "bit {bit}");
        assert_eq!(frame.condition, Condition::Damaged);
    }
    let mut bench = Bench::new(2);
    bench.with(|network, _| network.damage(1, 400));
    assert_eq!(bench.network.damage, [None, Some(400)]);
    let ping = |number| Frame {
        header: Header::bare(FrameType::Ping, 0, number).encode(),
        body: WireBody::None,
        condition: Condition::Sound,
    };
    let now = Time(bench.now);
    bench.with(|network, later| {
        network.send(now, 0, ConnectionId(2), ping(1), later);
        assert!(network.inject(now, 1, ping(2), later));
    });
    let mut conditions = Vec::new();
    for _ in 0..100_000 {
        bench.now += 1_000_000;
        let (now, mut later) = (Time(bench.now), Vec::new());
        let deliver = NetworkEvent::Deliver {
            connection: 0,
            side: 1,
        };
        if let Some((_, Heard::Frame(_, frame))) = bench.network.happen(now, deliver, &mut later) {
            conditions.push(frame.condition);
        }
        if conditions.len() == 2 {
            break;
        }
    }
    assert_eq!(conditions, [Condition::Damaged, Condition::Sound]);
}
