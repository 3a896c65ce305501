use super::*;
use crate::backend::{Completion, Descriptor};
use crate::ring::Ring;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

struct Bench {
    disk: Disk,
    ring: Ring,
    payloads: Payloads,
    pool: Pool,
    file: std::fs::File,
}

fn bench() -> Bench {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(8 << 20).expect("a size");
    file.write_all_at(&[0xaa; 3 << 20], 0).expect("a write");
    let store = Store {
        data: Descriptor::from(OwnedFd::from(file.try_clone().expect("a second handle"))),
        external: None,
        size: 8 << 20,
        direct: false,
    };
    let pool = Pool::new();
    Bench {
        disk: Disk::new("test".to_owned(), store, pool.clone()),
        ring: Ring::new().expect("a ring"),
        payloads: Payloads::default(),
        pool,
        file,
    }
}

impl Bench {
    fn next(&mut self) -> Input {
        let mut completions = Vec::new();
        loop {
            self.ring
                .wait(Some(Duration::from_secs(5)), &mut completions)
                .expect("the ring works");
            for completion in completions.drain(..) {
                let Completion {
                    token: Token::Disk(slot),
                    operation,
                    result,
                } = completion
                else {
                    panic!("not of the disk");
                };
                let (payloads, ring) = (&mut self.payloads, &mut self.ring);
                if let Some(input) = self.disk.ended(slot, operation, result, payloads, ring) {
                    return input;
                }
            }
        }
    }
}

#[test]
fn zeroes_by_every_way_and_leaves_the_neighbours() {
    for (punch_hole, zero_range) in [(true, true), (false, true), (true, false), (false, false)] {
        for (may_unmap, fua) in [(true, false), (false, true)] {
            let mut bench = bench();
            bench.disk.abilities.punch_hole = punch_hole;
            bench.disk.abilities.zero_range = zero_range;
            let range = ByteRange::new(512, (2 << 20) + 1024);
            bench
                .disk
                .zero(OpId(1), range, may_unmap, fua, &mut bench.ring);
            let input = bench.next();
            assert!(matches!(
                input,
                Input::DiskDone {
                    op: OpId(1),
                    result: Ok(None)
                }
            ));
            let mut bytes = vec![1; 3 << 20];
            bench.file.read_exact_at(&mut bytes, 0).expect("a read");
            assert!(bytes[..512].iter().all(|byte| *byte == 0xaa));
            assert!(is_zero(&bytes[512..range.end as usize]));
            assert!(bytes[range.end as usize..].iter().all(|byte| *byte == 0xaa));
        }
    }
}

#[test]
fn reads_with_a_checksum_and_gives_the_buffer_to_the_core() {
    let mut bench = bench();
    bench
        .disk
        .read(OpId(7), ByteRange::new(0, 4096), true, &mut bench.ring);
    let Input::DiskDone {
        result: Ok(Some(payload)),
        ..
    } = bench.next()
    else {
        panic!("not a read");
    };
    assert_eq!(payload.crc, crc32fast::hash(&[0xaa; 4096]));
    assert!(!payload.zero);
    drop(bench.payloads.take_back(payload));
    assert_eq!(bench.pool.in_use(), 0);
}

#[test]
fn metadata_is_read_whole_or_not_at_all() {
    let mut bench = bench();
    bench
        .disk
        .meta_write(OpId(1), 4 << 20, &[5; 8192], &mut bench.ring);
    assert!(matches!(
        bench.next(),
        Input::MetaDone { result: Ok(_), .. }
    ));
    bench
        .disk
        .meta_read(OpId(2), 4 << 20, 8192, &mut bench.ring);
    let Input::MetaDone {
        result: Ok(bytes), ..
    } = bench.next()
    else {
        panic!("not read");
    };
    assert_eq!(bytes, vec![5; 8192]);
    bench
        .disk
        .meta_read(OpId(3), (8 << 20) - 4096, 8192, &mut bench.ring);
    assert!(matches!(
        bench.next(),
        Input::MetaDone {
            result: Err(DiskError::Io),
            ..
        }
    ));
}
