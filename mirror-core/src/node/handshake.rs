//! Who wins after an outage: the handshake's truth table (R8).
//!
//! Both sides say what they know in a [`Hello`]; each reads the same table with its own facts
//! first. [`decide`] is symmetric: what is `Source` seen from one side is `Target` seen from the
//! other. The two send each other their verdicts and go on only if these mirror each other.
//!
//! ```text
//! replicas' ids equal ........................................... refuse: cloned
//! neither ever had a generation ................................. idle: never initialised
//! a mirrored size that the other side cannot hold ............... refuse: size
//! both Primary .................................................. refuse: both Primary
//! each descends from the other .................................. must not happen
//! one never had a generation .................................... the other is source, whole
//!
//! relation      | both          | one Inconsistent        | neither Inconsistent
//!               | Inconsistent  |                         |
//! --------------+---------------+-------------------------+-------------------------------------
//! equal         | idle: no good | it is target            | holders, then "equal", below
//! one descends  |   copy        | descendant is target:   | the descendant is source
//!               |               |   refuse, or discard;   |
//!               |               |   else target           |
//! diverged      |               | refuse: no good copy,   | unused generations are withdrawn and
//!               |               |   or discard            |   the table is read again; else
//!               |               |                         |   split brain, or discard
//! unrelated     |               | as diverged             | refuse: unrelated, or discard
//!
//! equal, neither Inconsistent:
//! both Sole ............................................. must not happen
//! one Sole .............................................. it is source
//! nothing dirty on either side .......................... in sync
//! one is Primary ........................................ it is source
//! one stayed up ......................................... it is source
//! one was Primary last .................................. it is source
//! else .................................................. the greater replica id is source
//!
//! A Primary is never target: refuse, the Primary is behind; but where the other side's data may go,
//! by an operator's word, and is not in the arbiter's register, the Primary is source.
//! A source that is Outdated: refuse, no good copy.
//! ```

use crate::error::ErrorId;
use crate::types::{DiskState, Generation, Holders, Role};
use crate::wire::message::Hello;

/// What a table cell says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    /// The replicas are equal.
    InSync,
    /// Connected, and there is nothing to copy from: an operator must choose.
    Idle(ErrorId),
    /// This side's data goes to the peer; `whole` if the bitmaps do not relate to each other.
    Source {
        /// Copy every block.
        whole: bool,
    },
    /// The peer's data comes here.
    Target {
        /// Copy every block.
        whole: bool,
    },
    /// The two must not be joined; the operator is told why.
    Refuse(ErrorId),
}

impl Verdict {
    /// The same cell seen from the other side.
    pub(crate) fn mirrored(self) -> Verdict {
        match self {
            Verdict::Source { whole } => Verdict::Target { whole },
            Verdict::Target { whole } => Verdict::Source { whole },
            same => same,
        }
    }

    /// How it is spelled on the link: kind, detail.
    pub(crate) fn encode(self) -> Vec<u8> {
        let (kind, detail) = match self {
            Verdict::InSync => (1, 0),
            Verdict::Idle(id) => (2, id.number()),
            Verdict::Source { whole } => (3, u16::from(whole)),
            Verdict::Target { whole } => (4, u16::from(whole)),
            Verdict::Refuse(id) => (5, id.number()),
        };
        let [low, high] = detail.to_le_bytes();
        vec![kind, 0, low, high]
    }
}

/// How two histories relate, seen from the first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Relation {
    Equal,
    /// The first side's generation descends from the second's.
    Descends,
    /// The second side's generation descends from the first's.
    Precedes,
    /// A common ancestor, and both went on.
    Diverged,
    Unrelated,
}

/// A generation and those before it.
#[derive(Clone, Copy)]
struct History<'a> {
    generation: Generation,
    ancestry: &'a [Generation],
}

impl<'a> History<'a> {
    fn of(hello: &'a Hello) -> History<'a> {
        History {
            generation: hello.generation,
            ancestry: &hello.ancestry,
        }
    }

    /// The history of `hello` without its last generations, as far as nothing was written in them
    /// and they are not in the register (R3). At the very first generation there is
    /// nothing to go back to.
    fn withdrawn(hello: &'a Hello) -> Option<History<'a>> {
        let before = hello.ancestry.get(hello.unused_ancestors.into()..)?;
        let (parent, ancestry) = before.split_first()?;
        let stands = hello.used || hello.is_registered_sole();
        (!stands).then_some(History {
            generation: *parent,
            ancestry,
        })
    }

    /// The generations that `hello` could go back to by withdrawing some or all of its last ones.
    fn reachable(hello: &Hello) -> &[Generation] {
        match History::withdrawn(hello) {
            Some(_) => &hello.ancestry[..=hello.unused_ancestors.into()],
            None => &[],
        }
    }

    fn contains(self, generation: Generation) -> bool {
        self.ancestry.contains(&generation)
    }

    fn relation(self, other: History<'_>) -> Relation {
        if self.generation == other.generation {
            Relation::Equal
        } else if self.contains(other.generation) {
            Relation::Descends
        } else if other.contains(self.generation) {
            Relation::Precedes
        } else if self
            .ancestry
            .iter()
            .any(|generation| other.contains(*generation))
        {
            Relation::Diverged
        } else {
            Relation::Unrelated
        }
    }
}

/// Reads the table: `me` is this side, `peer` the other.
pub(crate) fn decide(me: &Hello, peer: &Hello) -> Verdict {
    if me.replica == peer.replica {
        return Verdict::Refuse(ErrorId::ClonedReplica);
    }
    if me.generation.is_unborn() && peer.generation.is_unborn() {
        return Verdict::Idle(ErrorId::NeverInitialised);
    }
    if !sizes_agree(me, peer) {
        return Verdict::Refuse(ErrorId::PeerSize);
    }
    if me.role == Role::Primary && peer.role == Role::Primary {
        return Verdict::Refuse(ErrorId::BothPrimary);
    }
    if History::of(me).contains(peer.generation) && History::of(peer).contains(me.generation) {
        return Verdict::Refuse(ErrorId::ImpossibleStates);
    }
    let strangers = me.peer_replica != peer.replica || peer.peer_replica != me.replica;
    guard(direction(me, peer, strangers), me, peer)
}

/// No Primary is overwritten, and no copy that is known to be old is copied.
fn guard(verdict: Verdict, me: &Hello, peer: &Hello) -> Verdict {
    let (source, target) = match verdict {
        Verdict::Source { .. } => (me, peer),
        Verdict::Target { .. } => (peer, me),
        other => return other,
    };
    let usable = |hello: &Hello| matches!(hello.disk, DiskState::UpToDate | DiskState::Consistent);
    if target.role == Role::Primary {
        let given_up = source.discard && !source.is_registered_sole() && usable(target);
        if given_up {
            verdict.mirrored()
        } else {
            Verdict::Refuse(ErrorId::PrimaryIsBehind)
        }
    } else if usable(source) {
        verdict
    } else {
        Verdict::Refuse(ErrorId::NoGoodCopy)
    }
}

/// The mirrored size must fit into both data areas, and be the same where both know one.
fn sizes_agree(me: &Hello, peer: &Hello) -> bool {
    let fits = |mirrored: &Hello, other: &Hello| {
        mirrored.mirror_size == 0
            || (mirrored.mirror_size <= other.data_size
                && (other.mirror_size == 0 || other.mirror_size == mirrored.mirror_size))
    };
    fits(me, peer) && fits(peer, me)
}

fn direction(me: &Hello, peer: &Hello, strangers: bool) -> Verdict {
    if me.generation.is_unborn() {
        return Verdict::Target { whole: true };
    }
    if peer.generation.is_unborn() {
        return Verdict::Source { whole: true };
    }
    let other_pair = !me.mirror.is_none() && !peer.mirror.is_none() && me.mirror != peer.mirror;
    let relation = if other_pair {
        Relation::Unrelated
    } else {
        History::of(me).relation(History::of(peer))
    };
    let inconsistent = |hello: &Hello| hello.disk == DiskState::Inconsistent;
    match (inconsistent(me), inconsistent(peer)) {
        (true, true) => Verdict::Idle(ErrorId::NoGoodCopy),
        (true, false) => becomes_copy(me, relation, strangers),
        (false, true) => becomes_copy(peer, flip(relation), strangers).mirrored(),
        (false, false) => match relation {
            Relation::Equal => equal(me, peer, strangers),
            Relation::Descends => descends(me, peer, strangers),
            Relation::Precedes => descends(peer, me, strangers).mirrored(),
            Relation::Diverged => diverged(me, peer, strangers),
            Relation::Unrelated => discard(me, peer, true, ErrorId::Unrelated),
        },
    }
}

fn flip(relation: Relation) -> Relation {
    match relation {
        Relation::Descends => Relation::Precedes,
        Relation::Precedes => Relation::Descends,
        same => same,
    }
}

/// An Inconsistent replica against a usable one; `relation` is the Inconsistent one's.
fn becomes_copy(target: &Hello, relation: Relation, strangers: bool) -> Verdict {
    match relation {
        Relation::Equal | Relation::Precedes => Verdict::Target { whole: strangers },
        // Its source had more than the peer has: the peer's copy is of the past.
        _ if target.discard => Verdict::Target { whole: true },
        _ => Verdict::Refuse(ErrorId::NoGoodCopy),
    }
}

/// `me` descends from the peer, and both copies are usable. It has everything, unless it was promoted
/// by force while the peer went on alone in the generation they had in common.
fn descends(me: &Hello, peer: &Hello, strangers: bool) -> Verdict {
    if peer.holders != Holders::Sole || !peer.used {
        return Verdict::Source { whole: strangers };
    }
    let left = History::withdrawn(me).map(|left| left.relation(History::of(peer)));
    match left {
        Some(Relation::Equal | Relation::Precedes) => Verdict::Target { whole: strangers },
        _ => discard(me, peer, strangers, ErrorId::SplitBrain),
    }
}

/// The same generation, and both copies usable.
fn equal(me: &Hello, peer: &Hello, strangers: bool) -> Verdict {
    let source = Verdict::Source { whole: strangers };
    let target = Verdict::Target { whole: strangers };
    let first = |mine: bool, theirs: bool| match (mine, theirs) {
        (true, false) => Some(source),
        (false, true) => Some(target),
        _ => None,
    };
    let sole = |hello: &Hello| hello.holders == Holders::Sole;
    if sole(me) && sole(peer) {
        return Verdict::Refuse(ErrorId::ImpossibleStates);
    }
    if let Some(verdict) = first(sole(me), sole(peer)) {
        return verdict;
    }
    if me.dirty_bytes == 0 && peer.dirty_bytes == 0 && !strangers {
        return Verdict::InSync;
    }
    first(me.role == Role::Primary, peer.role == Role::Primary)
        .or(first(me.stayed_up, peer.stayed_up))
        .or(first(me.was_primary, peer.was_primary))
        .unwrap_or(if me.replica > peer.replica {
            source
        } else {
            target
        })
}

/// Both went on from a common ancestor. A generation in which nothing was written is withdrawn
/// first; what is left is a split brain, which only an operator resolves.
fn diverged(me: &Hello, peer: &Hello, strangers: bool) -> Verdict {
    let mine = History::withdrawn(me);
    let theirs = History::withdrawn(peer);
    if mine.is_some() || theirs.is_some() {
        let mine_left = mine.unwrap_or(History::of(me));
        let theirs_left = theirs.unwrap_or(History::of(peer));
        // One may know that an unused generation was shared, where the other only knows that it is
        // unused: the two go back no further than they must.
        let meet = History::reachable(me);
        let relation = if meet.iter().any(|it| History::reachable(peer).contains(it)) {
            Relation::Equal
        } else {
            mine_left.relation(theirs_left)
        };
        match relation {
            Relation::Descends => return Verdict::Source { whole: strangers },
            Relation::Precedes => return Verdict::Target { whole: strangers },
            // Neither wrote anything. A Primary stays; else who stayed up, which may hold what the
            // other lost; else the later claim.
            Relation::Equal => {
                let rank = |hello: &Hello| {
                    let serves = hello.role == Role::Primary;
                    (serves, hello.stayed_up, hello.generation)
                };
                return if rank(me) > rank(peer) {
                    Verdict::Source { whole: strangers }
                } else {
                    Verdict::Target { whole: strangers }
                };
            }
            Relation::Diverged | Relation::Unrelated => {}
        }
    }
    discard(me, peer, strangers, ErrorId::SplitBrain)
}

/// Only an operator's word makes one side's writes go away.
fn discard(me: &Hello, peer: &Hello, whole: bool, otherwise: ErrorId) -> Verdict {
    match (me.discard, peer.discard) {
        (true, true) => Verdict::Refuse(ErrorId::BothDiscard),
        (true, false) => Verdict::Target { whole },
        (false, true) => Verdict::Source { whole },
        (false, false) => Verdict::Refuse(otherwise),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{ArbiterId, GenerationId, ReplicaId};
    use crate::wire::message::tests::sample;
    use proptest::prelude::*;

    fn generation(n: u64) -> Generation {
        Generation {
            counter: n,
            id: GenerationId(u128::from(n) + 0x1000),
        }
    }

    /// A replica in sync with its peer, in generation 2, with nothing special about it.
    fn side(replica: u128, peer: u128) -> Hello {
        Hello {
            replica: ReplicaId(replica),
            peer_replica: ReplicaId(peer),
            generation: generation(2),
            ancestry: vec![generation(1)],
            unused_ancestors: 0,
            role: Role::Secondary,
            was_primary: false,
            used: true,
            stayed_up: false,
            dirty_bytes: 0,
            holders: Holders::Both,
            disk: DiskState::Consistent,
            mirror_size: 1 << 20,
            ..sample()
        }
    }

    fn pair() -> (Hello, Hello) {
        (side(1, 2), side(2, 1))
    }

    const SOURCE: Verdict = Verdict::Source { whole: false };
    const TARGET: Verdict = Verdict::Target { whole: false };

    /// Reads a cell from both sides.
    fn cell(change: impl FnOnce(&mut Hello, &mut Hello)) -> Verdict {
        let (mut a, mut b) = pair();
        change(&mut a, &mut b);
        let verdict = decide(&a, &b);
        assert_eq!(
            decide(&b, &a),
            verdict.mirrored(),
            "both sides read the same cell"
        );
        verdict
    }

    /// Gives a side generation `n`, begun by it alone after generation 2.
    fn went_on(hello: &mut Hello, n: u64) {
        hello.ancestry.insert(0, hello.generation);
        hello.generation = generation(n);
        hello.holders = Holders::Sole;
    }

    #[test]
    fn before_any_generation() {
        let unborn = |hello: &mut Hello| {
            hello.generation = Generation::UNBORN;
            hello.ancestry.clear();
            hello.disk = DiskState::Inconsistent;
            hello.holders = Holders::Nobody;
            hello.mirror_size = 0;
            hello.peer_replica = ReplicaId::NONE;
        };
        let both = cell(|a, b| {
            unborn(a);
            unborn(b);
        });
        assert_eq!(both, Verdict::Idle(ErrorId::NeverInitialised));
        assert_eq!(cell(|_, b| unborn(b)), Verdict::Source { whole: true });
        assert_eq!(cell(|a, _| unborn(a)), Verdict::Target { whole: true });
        let no_source = cell(|a, b| {
            unborn(a);
            b.disk = DiskState::Inconsistent;
        });
        assert_eq!(no_source, Verdict::Refuse(ErrorId::NoGoodCopy));
    }

    #[test]
    fn what_must_not_be_joined() {
        let cloned = cell(|a, b| b.replica = a.replica);
        assert_eq!(cloned, Verdict::Refuse(ErrorId::ClonedReplica));
        let size = cell(|a, _| a.mirror_size = 2 << 20);
        assert_eq!(size, Verdict::Refuse(ErrorId::PeerSize));
        let small = cell(|a, b| {
            a.data_size = a.mirror_size - 4096;
            a.mirror_size = 0;
            b.mirror_size = 1 << 20;
        });
        assert_eq!(small, Verdict::Refuse(ErrorId::PeerSize));
        let two = cell(|a, b| (a.role, b.role) = (Role::Primary, Role::Primary));
        assert_eq!(two, Verdict::Refuse(ErrorId::BothPrimary));
        let circle = cell(|a, b| {
            a.generation = generation(9);
            b.ancestry.push(generation(9));
            a.ancestry.push(b.generation);
        });
        assert_eq!(circle, Verdict::Refuse(ErrorId::ImpossibleStates));
        let sole = cell(|a, b| (a.holders, b.holders) = (Holders::Sole, Holders::Sole));
        assert_eq!(sole, Verdict::Refuse(ErrorId::ImpossibleStates));
    }

    #[test]
    fn equal_generations() {
        assert_eq!(cell(|_, _| ()), Verdict::InSync);
        // A widening that was not noted on one side yet decides nothing (story 10) …
        assert_eq!(cell(|a, _| a.holders = Holders::Widening), Verdict::InSync);
        // … but a record that names one side alone makes it the source.
        assert_eq!(cell(|a, _| a.holders = Holders::Sole), SOURCE);
        let dirty = |change: fn(&mut Hello, &mut Hello)| {
            cell(|a, b| {
                a.dirty_bytes = 4096;
                change(a, b);
            })
        };
        assert_eq!(dirty(|a, _| a.role = Role::Primary), SOURCE);
        assert_eq!(dirty(|_, b| b.role = Role::Primary), TARGET);
        // Who stayed up wins over the crashed Primary (story 1).
        assert_eq!(
            dirty(|a, b| {
                a.was_primary = true;
                b.stayed_up = true;
            }),
            TARGET
        );
        assert_eq!(dirty(|a, _| a.stayed_up = true), SOURCE);
        assert_eq!(dirty(|a, _| a.was_primary = true), SOURCE);
        assert_eq!(dirty(|_, b| b.was_primary = true), TARGET);
        assert_eq!(dirty(|_, _| ()), TARGET);
        assert_eq!(
            cell(|a, _| a.peer_replica = ReplicaId(9)),
            Verdict::Target { whole: true }
        );
    }

    #[test]
    fn one_went_on() {
        assert_eq!(cell(|a, _| went_on(a, 3)), SOURCE);
        assert_eq!(cell(|_, b| went_on(b, 3)), TARGET);
        let behind = cell(|a, b| {
            went_on(a, 3);
            b.role = Role::Primary;
        });
        assert_eq!(behind, Verdict::Refuse(ErrorId::PrimaryIsBehind));
        // An operator's word ends that: the copy that went on is thrown away …
        let discarded = |registered: bool| {
            cell(|a, b| {
                went_on(a, 3);
                a.discard = true;
                b.role = Role::Primary;
                let arbiter = ArbiterId(u128::from(registered));
                (a.arbiter, b.arbiter) = (arbiter, arbiter);
            })
        };
        assert_eq!(discarded(false), TARGET);
        // … unless the arbiter names it: then the Primary has lost its right.
        assert_eq!(discarded(true), Verdict::Refuse(ErrorId::PrimaryIsBehind));
        let outdated = cell(|a, _| {
            went_on(a, 3);
            a.disk = DiskState::Outdated;
        });
        assert_eq!(outdated, Verdict::Refuse(ErrorId::NoGoodCopy));
    }

    #[test]
    fn an_inconsistent_replica_is_only_ever_a_target() {
        let inconsistent = |hello: &mut Hello| hello.disk = DiskState::Inconsistent;
        assert_eq!(cell(|a, _| inconsistent(a)), TARGET);
        assert_eq!(
            cell(|a, b| {
                inconsistent(a);
                went_on(b, 3);
            }),
            TARGET
        );
        let old_peer = |discard: bool| {
            cell(|a, _| {
                inconsistent(a);
                went_on(a, 3);
                a.discard = discard;
            })
        };
        assert_eq!(old_peer(false), Verdict::Refuse(ErrorId::NoGoodCopy));
        assert_eq!(old_peer(true), Verdict::Target { whole: true });
        assert_eq!(
            cell(|a, b| {
                inconsistent(a);
                inconsistent(b);
            }),
            Verdict::Idle(ErrorId::NoGoodCopy)
        );
    }

    #[test]
    fn divergence_needs_an_operator_unless_nothing_was_written() {
        let split = |used_a: bool, used_b: bool, change: &dyn Fn(&mut Hello, &mut Hello)| {
            cell(|a, b| {
                went_on(a, 3);
                went_on(b, 4);
                (a.used, b.used) = (used_a, used_b);
                change(a, b);
            })
        };
        assert_eq!(
            split(true, true, &|_, _| ()),
            Verdict::Refuse(ErrorId::SplitBrain)
        );
        assert_eq!(split(true, true, &|a, _| a.discard = true), TARGET);
        assert_eq!(split(true, true, &|_, b| b.discard = true), SOURCE);
        assert_eq!(
            split(true, true, &|a, b| (a.discard, b.discard) = (true, true)),
            Verdict::Refuse(ErrorId::BothDiscard)
        );
        assert_eq!(
            split(true, true, &|a, _| (a.discard, a.role) =
                (true, Role::Primary)),
            Verdict::Refuse(ErrorId::PrimaryIsBehind)
        );
        // Story 8: an unused generation is withdrawn.
        assert_eq!(split(false, true, &|_, _| ()), TARGET);
        assert_eq!(split(true, false, &|_, _| ()), SOURCE);
        assert_eq!(split(false, false, &|_, _| ()), TARGET);
        assert_eq!(split(false, false, &|a, _| a.role = Role::Primary), SOURCE);
        // So are all those on top of each other, and none below one that was used.
        let on_top = |unused_ancestors: u8| {
            split(false, true, &move |a, _| {
                went_on(a, 5);
                a.unused_ancestors = unused_ancestors;
            })
        };
        assert_eq!(on_top(0), Verdict::Refuse(ErrorId::SplitBrain));
        assert_eq!(on_top(1), TARGET);
        let unrelated = |discard: bool| {
            cell(|a, _| {
                a.generation = generation(77);
                a.ancestry = vec![generation(76)];
                a.discard = discard;
            })
        };
        assert_eq!(unrelated(false), Verdict::Refuse(ErrorId::Unrelated));
        let other_pair = cell(|a, _| a.mirror = crate::types::MirrorId(99));
        assert_eq!(other_pair, Verdict::Refuse(ErrorId::Unrelated));
        assert_eq!(unrelated(true), Verdict::Target { whole: true });
    }

    prop_compose! {
        fn any_side(replica: u128)(
            peer in 1u128..4, g in 0u64..5, forebears in prop::sample::subsequence(vec![4u64, 3, 2, 1], 0..4),
            holders in prop::sample::select(vec![
                Holders::Nobody, Holders::Both, Holders::Sole, Holders::Widening, Holders::Peer]),
            disk in prop::sample::select(vec![
                DiskState::Inconsistent, DiskState::Outdated, DiskState::Consistent, DiskState::UpToDate]),
            primary in any::<bool>(), flags in any::<[bool; 4]>(), dirty in 0u64..2, unused in 0u8..3,
        ) -> Hello {
            let [was_primary, used, stayed_up, discard] = flags;
            Hello {
                replica: ReplicaId(replica), peer_replica: ReplicaId(peer),
                generation: if g == 0 { Generation::UNBORN } else { generation(g) },
                unused_ancestors: unused.min((forebears.iter().filter(|f| **f != g).count() as u8).saturating_sub(1)),
                ancestry: forebears.into_iter().filter(|f| *f != g).map(generation).collect(),
                holders, disk, role: if primary { Role::Primary } else { Role::Secondary },
                was_primary, used, stayed_up, discard, dirty_bytes: dirty * 4096,
                ..side(1, 2)
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(5000))]

        /// Every combination is read alike from both sides, and no Primary, and nothing from an
        /// unusable copy, is ever overwritten.
        #[test]
        fn the_table_is_symmetric_and_safe(a in any_side(1), b in any_side(2)) {
            let verdict = decide(&a, &b);
            prop_assert_eq!(decide(&b, &a), verdict.mirrored());
            let (source, target) = match verdict {
                Verdict::Source { .. } => (&a, &b),
                Verdict::Target { .. } => (&b, &a),
                Verdict::InSync => {
                    prop_assert_eq!(a.generation, b.generation);
                    prop_assert_eq!(a.dirty_bytes + b.dirty_bytes, 0);
                    prop_assert!(a.disk != DiskState::Inconsistent && b.disk != DiskState::Inconsistent);
                    return Ok(());
                }
                _ => return Ok(()),
            };
            prop_assert!(target.role != Role::Primary);
            prop_assert!(matches!(source.disk, DiskState::UpToDate | DiskState::Consistent));
        }
    }
}
