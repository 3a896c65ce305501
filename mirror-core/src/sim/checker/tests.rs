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
