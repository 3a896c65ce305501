use super::*;

fn disk(seed: u64) -> Disk {
    Disk::new(4096, Blank::Zeroes, fastrand::Rng::with_seed(seed))
}

fn write(disk: &mut Disk, op: u64, start: u64, stamps: &[u64], fua: bool) {
    let data = Fill::Stamps(stamps.into());
    disk.submit(op, Operation::Write { start, data, fua })
        .unwrap();
    disk.complete(op).unwrap();
}

#[test]
fn power_loss_may_lose_what_was_not_flushed_and_never_what_was() {
    let (mut lost, mut kept, mut torn) = (0, 0, 0);
    for seed in 0..200 {
        let mut disk = disk(seed);
        write(&mut disk, 1, 0, &[1, 1], false);
        disk.submit(2, Operation::Flush).unwrap();
        disk.complete(2).unwrap();
        write(&mut disk, 3, 0, &[2, 2], false);
        write(&mut disk, 4, 8, &[3], true);
        disk.lose_power();
        assert_eq!(disk.view(8), 3);
        match (disk.view(0), disk.view(1)) {
            (1, 1) => lost += 1,
            (2, 2) => kept += 1,
            (1, 2) | (2, 1) => torn += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!(lost > 20 && kept > 20 && torn > 10, "{lost} {kept} {torn}");
}

#[test]
fn flush_covers_only_what_completed_before_it_was_submitted() {
    let mut disk = disk(0);
    let data = Fill::Stamps([7].as_slice().into());
    disk.submit(
        1,
        Operation::Write {
            start: 0,
            data,
            fua: false,
        },
    )
    .unwrap();
    disk.submit(2, Operation::Flush).unwrap();
    disk.complete(1).unwrap();
    disk.complete(2).unwrap();
    assert_eq!((disk.view(0), disk.durable(0)), (7, 0));
    disk.submit(3, Operation::Flush).unwrap();
    disk.complete(3).unwrap();
    assert_eq!(disk.durable(0), 7);
}

#[test]
fn fua_is_not_undone_by_an_older_cached_write() {
    for seed in 0..50 {
        let mut disk = disk(seed);
        write(&mut disk, 1, 0, &[1], false);
        write(&mut disk, 2, 0, &[2], true);
        disk.lose_power();
        assert_eq!(disk.view(0), 2);
    }
}

#[test]
fn process_crash_keeps_what_completed() {
    for seed in 0..50 {
        let mut disk = disk(seed);
        write(&mut disk, 1, 0, &[1], false);
        disk.lose_process();
        assert_eq!(disk.view(0), 1);
        assert_eq!(disk.durable(0), 0);
    }
}

#[test]
fn metadata_writes_in_flight_tear_at_a_sector() {
    let mut torn = 0;
    for seed in 0..100 {
        let mut disk = disk(seed);
        disk.write_metadata(0, &[1; 4096]);
        let bytes = vec![2; 4096];
        disk.submit(1, Operation::MetaWrite { offset: 0, bytes })
            .unwrap();
        disk.lose_power();
        let bytes = disk.read_metadata(0, 4096);
        torn += usize::from(bytes.contains(&1) && bytes.contains(&2));
    }
    assert!(torn > 10);
}

#[test]
fn differences_are_found_by_block() {
    let (mut a, b) = (disk(0), disk(1));
    a.take_touched();
    write(&mut a, 1, 17, &[5], false);
    assert_eq!(a.differing(&b, 0), 1 << 2);
    assert_eq!(a.take_touched(), [0]);
    a.lose_power();
    assert_eq!(a.take_touched(), [0]);
    assert_eq!(a.take_touched(), []);
}

#[test]
fn failed_flush_is_not_made_good_by_the_next() {
    let (mut lost, mut kept) = (0, 0);
    for seed in 0..100 {
        let mut disk = disk(seed);
        write(&mut disk, 1, 0, &[1], false);
        disk.submit(2, Operation::Flush).unwrap();
        assert_eq!(disk.access(2), Some(Access::Flush));
        disk.fail(2);
        assert_eq!(disk.view(0), 1);
        disk.submit(3, Operation::Flush).unwrap();
        disk.complete(3).unwrap();
        match disk.durable(0) {
            0 => lost += 1,
            _ => kept += 1,
        }
    }
    assert!(lost > 20 && kept > 20, "{lost} {kept}");
}

#[test]
fn failed_write_is_indeterminate() {
    let (mut landed, mut not) = (0, 0);
    for seed in 0..100 {
        let mut disk = disk(seed);
        let data = Fill::Stamps([7; 8].as_slice().into());
        let (start, fua) = (0, true);
        disk.submit(1, Operation::Write { start, data, fua })
            .unwrap();
        disk.fail(1);
        assert_eq!(disk.in_flight(), 0);
        match disk.view(0) {
            0 => not += 1,
            _ => landed += 1,
        }
        assert_eq!(disk.durable(0), 0);
    }
    assert!(landed > 20 && not > 20, "{landed} {not}");
}

#[test]
fn lie_shows_at_a_power_loss_and_ends_with_the_truth() {
    let lies = |honest_in_the_end| {
        let lose = |seed| {
            let mut disk = disk(seed);
            disk.set_honesty(Honesty::Lying);
            write(&mut disk, 1, 0, &[1], true);
            disk.submit(2, Operation::Flush).unwrap();
            disk.complete(2).unwrap();
            if honest_in_the_end {
                disk.set_honesty(Honesty::Honest);
            }
            disk.lose_power();
            disk.view(0) == 0
        };
        (0..50).filter(|seed| lose(*seed)).count()
    };
    assert!(lies(false) > 10);
    assert_eq!(lies(true), 0);
}

#[test]
fn copy_holds_what_is_read_and_is_durable() {
    let mut original = disk(0);
    write(&mut original, 1, 5, &[9], false);
    original.write_metadata(4096, &[3; 4096]);
    let mut copy = Disk::copy_of(&original, fastrand::Rng::with_seed(1));
    copy.lose_power();
    assert_eq!(copy.view(5), 9);
    assert_eq!(copy.metadata_block(4096), [3; 4096]);
    assert_eq!(copy.differing(&original, 0), 0);
}
