use super::*;
use crate::backend::tests::{Tested, on_every_backend};
use crate::backend::{Completion, Descriptor};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

on_every_backend!(
    an_interrupted_read_goes_on,
    what_failed_to_make_durable_is_not_tried_again,
    zeroes_by_every_way_and_leaves_the_neighbours,
    reads_with_a_checksum_and_gives_the_buffer_to_the_core,
    digests_each_block,
    metadata_is_read_whole_or_not_at_all,
);

struct Bench<B> {
    disk: Disk,
    backend: B,
    payloads: Payloads,
    pool: Pool,
    file: std::fs::File,
}

fn bench<B: Tested>() -> Bench<B> {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(8 << 20).expect("a size");
    file.write_all_at(&[0xaa; 3 << 20], 0).expect("a write");
    let store = Store {
        data: Descriptor::from(OwnedFd::from(file.try_clone().expect("a second handle"))),
        external: None,
        size: 8 << 20,
        direct: false,
        durable_writes: true,
    };
    let pool = Pool::new();
    Bench {
        disk: Disk::new("test".to_owned(), store, pool.clone()),
        backend: B::new(),
        payloads: Payloads::default(),
        pool,
        file,
    }
}

impl<B: Tested> Bench<B> {
    fn next(&mut self) -> Input {
        let mut completions = Vec::new();
        loop {
            self.backend
                .wait(Some(Duration::from_secs(5)), &mut completions)
                .expect("the backend works");
            for completion in completions.drain(..) {
                let Completion {
                    token: Token::Disk(slot),
                    operation,
                    result,
                } = completion
                else {
                    panic!("not of the disk");
                };
                let (payloads, backend) = (&mut self.payloads, &mut self.backend);
                if let Some(input) = self.disk.ended(slot, operation, result, payloads, backend) {
                    return input;
                }
            }
        }
    }

    /// The end of the operation under way, as the kernel might have told it.
    fn ends_with(&mut self, result: Result<u32, Errno>) -> Option<Input> {
        let mut completions = Vec::new();
        while completions.is_empty() {
            self.backend
                .wait(Some(Duration::from_secs(5)), &mut completions)
                .expect("the backend works");
        }
        let Completion {
            token: Token::Disk(slot),
            operation,
            ..
        } = completions.remove(0)
        else {
            panic!("not of the disk");
        };
        let (payloads, backend) = (&mut self.payloads, &mut self.backend);
        self.disk.ended(slot, operation, result, payloads, backend)
    }
}

fn has_failed(input: &Option<Input>) -> bool {
    matches!(
        input,
        Some(Input::DiskDone { result: Err(_), .. } | Input::MetaDone { result: Err(_), .. })
    )
}

fn an_interrupted_read_goes_on<B: Tested>() {
    let mut bench = bench::<B>();
    bench
        .disk
        .read(OpId(1), ByteRange::new(0, 4096), false, &mut bench.backend);
    assert!(bench.ends_with(Err(Errno::EINTR)).is_none());
    let input = bench.next();
    assert!(matches!(input, Input::DiskDone { result: Ok(_), .. }));
}

fn what_failed_to_make_durable_is_not_tried_again<B: Tested>() {
    for errno in [Errno::EINTR, Errno::EAGAIN, Errno::EIO] {
        let mut bench = bench::<B>();
        bench.disk.flush(OpId(1), &mut bench.backend);
        assert!(has_failed(&bench.ends_with(Err(errno))), "flush, {errno}");
        let buffer = bench.pool.fresh(4096).freeze();
        let fua = true;
        bench
            .disk
            .write(OpId(2), 0, buffer, 4096, fua, &mut bench.backend);
        assert!(has_failed(&bench.ends_with(Err(errno))), "write, {errno}");
        bench
            .disk
            .meta_write(OpId(3), 4 << 20, &[5; 4096], &mut bench.backend);
        assert!(has_failed(&bench.ends_with(Err(errno))), "meta, {errno}");
        assert_eq!(bench.backend.in_flight(), 0);
    }
}

fn zeroes_by_every_way_and_leaves_the_neighbours<B: Tested>() {
    for (punch_hole, zero_range) in [(true, true), (false, true), (true, false), (false, false)] {
        for (may_unmap, fua) in [(true, false), (false, true)] {
            let mut bench = bench::<B>();
            bench.disk.abilities.punch_hole = punch_hole;
            bench.disk.abilities.zero_range = zero_range;
            let range = ByteRange::new(512, (2 << 20) + 1024);
            bench
                .disk
                .zero(OpId(1), range, may_unmap, fua, &mut bench.backend);
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

fn reads_with_a_checksum_and_gives_the_buffer_to_the_core<B: Tested>() {
    let mut bench = bench::<B>();
    bench
        .disk
        .read(OpId(7), ByteRange::new(0, 4096), true, &mut bench.backend);
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

/// The two nodes may run on different machines: the values are those of the xxHash specification's
/// XXH3_128bits with seed 0, as `xxhsum -H128` prints them.
fn digests_each_block<B: Tested>() {
    let mut bench = bench::<B>();
    let range = ByteRange {
        start: (3 << 20) - 4096,
        end: (3 << 20) + 512,
    };
    bench.disk.digest(OpId(9), range, &mut bench.backend);
    let Input::Digested {
        op: OpId(9),
        result: Ok(digests),
    } = bench.next()
    else {
        panic!("not digested");
    };
    let expected = [
        0x8663_b555_86e2_6bff_b7c7_ce22_ac58_ddb7,
        0x3258_ca92_e0a0_0944_b298_7a9d_949e_807c,
    ];
    let expected = expected.map(Digest);
    assert_eq!(digests, expected);
    assert_eq!(bench.pool.in_use(), 0);
}

fn metadata_is_read_whole_or_not_at_all<B: Tested>() {
    let mut bench = bench::<B>();
    bench
        .disk
        .meta_write(OpId(1), 4 << 20, &[5; 8192], &mut bench.backend);
    assert!(matches!(
        bench.next(),
        Input::MetaDone { result: Ok(_), .. }
    ));
    bench
        .disk
        .meta_read(OpId(2), 4 << 20, 8192, &mut bench.backend);
    let Input::MetaDone {
        result: Ok(bytes), ..
    } = bench.next()
    else {
        panic!("not read");
    };
    assert_eq!(bytes, vec![5; 8192]);
    bench
        .disk
        .meta_read(OpId(3), (8 << 20) - 4096, 8192, &mut bench.backend);
    assert!(matches!(
        bench.next(),
        Input::MetaDone {
            result: Err(DiskError::Io),
            ..
        }
    ));
}
