use super::*;

fn checker() -> Checker {
    Checker::new(64, Box::new(|_| 0))
}

fn write(checker: &mut Checker, number: u64, durability: Durability) {
    checker.write_asked(number, 0, [stamp(number, 0)].into_iter());
    checker.write_acknowledged(number, 0, 1, durability);
}

fn read(checker: &mut Checker, number: u64) -> Result<(), String> {
    let asked = checker.read_asked();
    let value = if number == 0 { 0 } else { stamp(number, 0) };
    checker.read_returned(asked, 0, &[value])
}

#[test]
fn lost_write_is_found() {
    let mut checker = checker();
    write(&mut checker, 1, Durability::Volatile);
    assert!(read(&mut checker, 1).is_ok());
    assert!(read(&mut checker, 0).is_err());
}

#[test]
fn stale_read_is_found_and_overlapping_read_is_not() {
    let mut checker = checker();
    write(&mut checker, 1, Durability::Volatile);
    let early = checker.read_asked();
    write(&mut checker, 2, Durability::Volatile);
    assert!(checker.read_returned(early, 0, &[stamp(1, 0)]).is_ok());
    assert!(read(&mut checker, 1).is_err());
}

#[test]
fn vanished_read_is_found() {
    let mut checker = checker();
    write(&mut checker, 1, Durability::Volatile);
    checker.write_asked(2, 0, [stamp(2, 0)].into_iter());
    assert!(read(&mut checker, 2).is_ok());
    checker.write_lost(2, 0, 1);
    assert!(read(&mut checker, 1).is_err());
}

#[test]
fn lost_write_settles_when_it_was_not_there() {
    let mut checker = checker();
    write(&mut checker, 1, Durability::Volatile);
    checker.write_asked(2, 0, [stamp(2, 0)].into_iter());
    checker.write_lost(2, 0, 1);
    assert!(read(&mut checker, 1).is_ok());
    assert!(read(&mut checker, 2).is_err());
}

#[test]
fn concurrent_writes_may_be_ordered_either_way_but_only_once() {
    let mut checker = checker();
    checker.write_asked(1, 0, [stamp(1, 0)].into_iter());
    checker.write_asked(2, 0, [stamp(2, 0)].into_iter());
    checker.write_acknowledged(2, 0, 1, Durability::Volatile);
    checker.write_acknowledged(1, 0, 1, Durability::Volatile);
    assert!(read(&mut checker, 2).is_ok());
    assert!(read(&mut checker, 1).is_err());
}

#[test]
fn power_loss_undoes_down_to_the_last_flush() {
    let mut checker = checker();
    write(&mut checker, 1, Durability::Volatile);
    write(&mut checker, 2, Durability::Volatile);
    let flush = checker.flush_asked();
    assert_eq!(checker.flush_acknowledged(flush), [(0, 1), (0, 1)]);
    write(&mut checker, 3, Durability::Volatile);
    checker.all_copies_lost_power();
    assert!(read(&mut checker, 1).is_err());
    assert!(read(&mut checker, 2).is_ok());
    assert!(read(&mut checker, 3).is_err(), "settled by the read before");
}

#[test]
fn what_was_superseded_is_not_current() {
    let mut checker = checker();
    write(&mut checker, 1, Durability::Volatile);
    write(&mut checker, 2, Durability::Volatile);
    assert!(checker.present_allowed(0, stamp(1, 0)).is_err());
    assert!(checker.present_allowed(0, stamp(2, 0)).is_ok());
    checker.write_asked(3, 0, [stamp(3, 0)].into_iter());
    assert!(
        checker.present_allowed(0, stamp(2, 0)).is_ok(),
        "not acknowledged"
    );
    assert!(
        checker.present_allowed(0, stamp(3, 0)).is_ok(),
        "perhaps landed"
    );
}

#[test]
fn fua_write_survives_power_loss() {
    let mut checker = checker();
    write(&mut checker, 1, Durability::Volatile);
    write(&mut checker, 2, Durability::Durable);
    checker.all_copies_lost_power();
    assert!(checker.durable_allowed(0, stamp(1, 0)).is_err());
    assert!(checker.durable_allowed(0, stamp(2, 0)).is_ok());
    assert!(read(&mut checker, 1).is_err());
}

/// A disk that is looked at again and again: everything is found, whenever it came about.
#[test]
fn what_was_allowed_once_is_looked_at_again_when_something_happened() {
    let sectors = 3 * PAGE;
    let mut checker = Checker::new(sectors, Box::new(|_| 0));
    let rng = fastrand::Rng::with_seed(1);
    let mut disk = Disk::new(sectors, crate::sim::disk::Blank::Zeroes, rng.clone());
    let at = PAGE + 5;
    checker.write_asked(1, at, [stamp(1, at)].into_iter());
    assert_eq!(checker.disk_allowed(0, &disk), Ok(()));
    checker.write_acknowledged(1, at, 1, Durability::Volatile);
    assert!(
        checker.disk_allowed(0, &disk).is_err(),
        "the write is missing"
    );
    disk.rot(at, stamp(1, at));
    assert_eq!(checker.disk_allowed(0, &disk), Ok(()));

    disk.rot(at + 1, 7);
    assert_eq!(checker.disk_allowed(0, &disk), Ok(()), "never asked about");
    disk.rot(at, 7);
    assert!(checker.disk_allowed(0, &disk).is_err(), "a sector rots");
    disk.rot(at, stamp(1, at));
    assert_eq!(checker.disk_allowed(0, &disk), Ok(()));

    let mut other = Disk::new(sectors, crate::sim::disk::Blank::Zeroes, rng);
    other.succeed(&disk);
    assert!(checker.disk_allowed(0, &other).is_err(), "another disk");
    assert!(
        checker.disk_allowed(1, &other).is_err(),
        "the other machine's"
    );

    write(&mut checker, 2, Durability::Volatile);
    disk.rot(0, stamp(2, 0));
    write(&mut checker, 3, Durability::Volatile);
    disk.rot(0, stamp(3, 0));
    assert_eq!(checker.disk_allowed(0, &disk), Ok(()));
    checker.all_copies_lost_power();
    let asked = checker.read_asked();
    let older = checker.read_returned(asked, 0, &[stamp(2, 0)]);
    assert_eq!(older, Ok(()), "a loss of power brings it back");
    assert!(checker.disk_allowed(0, &disk).is_err(), "and settles on it");
}

#[test]
fn sectors_that_nobody_wrote_hold_what_they_always_did() {
    let mut checker = Checker::new(8, Box::new(|sector| 100 + sector));
    let asked = checker.read_asked();
    assert!(checker.read_returned(asked, 2, &[102, 103]).is_ok());
    assert!(checker.read_returned(asked, 2, &[102, 0]).is_err());
    assert!(checker.present_allowed(4, 104).is_ok());
    let problem = checker.durable_allowed(4, 0).unwrap_err();
    assert!(
        problem.contains("sector 4; allowed are write 0"),
        "{problem}"
    );
    assert_eq!(checker.touched(), []);
    checker.write_asked(1, 4, [stamp(1, 4)].into_iter());
    assert_eq!(checker.touched(), [4]);
}

/// Two reads that tell of two orders of the same writes: nothing is left that a sector may hold.
#[test]
fn a_sector_that_contradicts_itself_may_hold_nothing() {
    let mut checker = checker();
    let (one, two) = (stamp(1, 0), stamp(2, 0));
    checker.write_asked(1, 0, [one].into_iter());
    checker.write_asked(2, 0, [two].into_iter());
    let read = checker.read_asked();
    assert!(checker.read_returned(read, 0, &[two]).is_ok());
    checker.write_acknowledged(1, 0, 1, Durability::Volatile);
    let (first, second) = (checker.read_asked(), checker.read_asked());
    assert!(checker.read_returned(first, 0, &[one]).is_ok());
    assert!(checker.read_returned(second, 0, &[two]).is_ok());
    let flush = checker.flush_asked();
    checker.flush_acknowledged(flush);
    checker.write_acknowledged(2, 0, 1, Durability::Volatile);
    for value in [0, one, two] {
        assert!(checker.present_allowed(0, value).is_err(), "{value}");
    }
    let disk = Disk::new(
        64,
        crate::sim::disk::Blank::Zeroes,
        fastrand::Rng::with_seed(1),
    );
    assert!(checker.disk_allowed(0, &disk).is_err());
}
