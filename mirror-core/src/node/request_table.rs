//! The table of guest requests: what each is, and how far it got.

use super::boundary::{Payload, RequestId};
use super::ordering::{Claimant, Half};
use crate::types::{ByteRange, Time};
use std::collections::VecDeque;

/// A request's place in the table of requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct RequestKey {
    index: u32,
    generation: u32,
}

impl RequestKey {
    /// As a number within a [`PeerTag`]: the generation counter loses its top bits, so that a
    /// number returns only after 2^28 requests in one place.
    pub(super) fn to_number(self) -> u64 {
        u64::from(self.generation & 0x0fff_ffff) << 32 | u64::from(self.index)
    }

    #[cfg(test)]
    pub(super) fn test(index: u32) -> RequestKey {
        RequestKey {
            index,
            generation: 0,
        }
    }
}

/// What a guest wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Read,
    Write { payload: Payload, fua: bool },
    Zero { may_unmap: bool, fua: bool },
    Flush,
}

/// How far it got.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stage {
    /// Waits for overlapping writes.
    AwaitingRange,
    /// Waits for a transaction of the activity log.
    AwaitingLog,
    /// Waits for the generation to be marked as used, or for a handshake or a change of record to
    /// end.
    AwaitingGate,
    /// Submitted.
    InFlight { local: Half, peer: Half },
    /// A read whose data is here, but a write it may have seen is not acknowledged yet, or there is
    /// no lease.
    AwaitingWrites { payload: Payload, ticket: u64 },
}

/// A guest's request.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) request: RequestId,
    pub(super) kind: Kind,
    /// All of it.
    pub(super) range: ByteRange,
    /// The part being worked on; zeroing goes piece by piece.
    pub(super) piece: ByteRange,
    pub(super) arrived: Time,
    /// When the current piece was sent to the peer.
    pub(super) sent: Time,
    pub(super) stage: Stage,
    /// Of a flush: what it covers locally, and whether the log follows its peer half.
    pub(super) covers: u64,
    pub(super) followed: bool,
}

/// All requests of guests.
#[derive(Debug, Default)]
pub(super) struct Requests {
    slots: Vec<(u32, Option<Guest>)>,
    free: Vec<u32>,
    /// Waiting for the activity log, in order of arrival.
    pub(super) log_queue: VecDeque<RequestKey>,
    /// Waiting at the last gate, in order of arrival.
    pub(super) gate_queue: VecDeque<RequestKey>,
    /// Reads in [`Stage::AwaitingWrites`].
    pub(super) late_reads: Vec<RequestKey>,
    pub(super) granted: Vec<Claimant>,
}

impl Requests {
    pub(super) fn insert(&mut self, guest: Guest) -> RequestKey {
        match self.free.pop() {
            Some(index) => {
                let slot = &mut self.slots[index as usize];
                slot.1 = Some(guest);
                RequestKey {
                    index,
                    generation: slot.0,
                }
            }
            None => {
                self.slots.push((0, Some(guest)));
                RequestKey {
                    index: (self.slots.len() - 1) as u32,
                    generation: 0,
                }
            }
        }
    }

    pub(super) fn find(&mut self, key: RequestKey) -> Option<&mut Guest> {
        let slot = self.slots.get_mut(key.index as usize)?;
        if slot.0 == key.generation {
            slot.1.as_mut()
        } else {
            None
        }
    }

    pub(super) fn remove(&mut self, key: RequestKey) -> Option<Guest> {
        self.find(key)?;
        let slot = &mut self.slots[key.index as usize];
        slot.0 = slot.0.wrapping_add(1) & 0x0fff_ffff;
        self.free.push(key.index);
        slot.1.take()
    }

    /// The request behind a number of [`RequestKey::to_number`].
    pub(super) fn by_number(&self, number: u64) -> Option<RequestKey> {
        let index = number as u32;
        let slot = self.slots.get(index as usize)?;
        let key = RequestKey {
            index,
            generation: slot.0,
        };
        (slot.1.is_some() && key.to_number() == number).then_some(key)
    }

    /// Requests not completed.
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(super) fn keys(&self) -> Vec<RequestKey> {
        let occupied = self
            .slots
            .iter()
            .enumerate()
            .filter(|(_, slot)| slot.1.is_some());
        occupied
            .map(|(i, slot)| RequestKey {
                index: i as u32,
                generation: slot.0,
            })
            .collect()
    }

    /// When the oldest request went to the peer that the peer has not answered.
    pub(super) fn oldest_at_peer(&self) -> Option<Time> {
        let guests = self.slots.iter().filter_map(|slot| slot.1.as_ref());
        guests
            .filter(|guest| {
                matches!(
                    guest.stage,
                    Stage::InFlight {
                        peer: Half::Pending,
                        ..
                    }
                )
            })
            .map(|guest| guest.sent)
            .min()
    }

    /// Whether a request waits before submission.
    pub(super) fn any_waits(&self) -> bool {
        let guests = self.slots.iter().filter_map(|slot| slot.1.as_ref());
        guests.map(|guest| guest.stage).any(|stage| {
            matches!(
                stage,
                Stage::AwaitingRange | Stage::AwaitingLog | Stage::AwaitingGate
            )
        })
    }

    /// Whether a write or flush is submitted that needs the peer, or a right to do without.
    pub(super) fn any_needs_peer(&self) -> bool {
        let guests = self.slots.iter().filter_map(|slot| slot.1.as_ref());
        guests
            .filter(|guest| guest.kind != Kind::Read)
            .any(|guest| matches!(guest.stage, Stage::InFlight { .. }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flush(request: u64) -> Guest {
        let range = ByteRange::new(0, 0);
        Guest {
            request: RequestId(request),
            kind: Kind::Flush,
            range,
            piece: range,
            arrived: Time(0),
            sent: Time(0),
            stage: Stage::AwaitingGate,
            covers: 0,
            followed: false,
        }
    }

    /// An answer of the peer names a request by its number, and may come long after that request.
    #[test]
    fn a_number_means_one_request() {
        let mut requests = Requests::default();
        let first = requests.insert(flush(1));
        let second = requests.insert(flush(2));
        let numbers = [first, second].map(RequestKey::to_number);
        assert_eq!(requests.by_number(numbers[0]), Some(first));
        assert_eq!(requests.by_number(numbers[1]), Some(second));
        requests.remove(first);
        assert_eq!(requests.by_number(numbers[0]), None);
        let third = requests.insert(flush(3));
        assert_eq!(requests.by_number(numbers[0]), None);
        assert_eq!(requests.by_number(third.to_number()), Some(third));
        assert_ne!(third.to_number(), numbers[0]);
        assert_eq!(requests.find(first).map(|guest| guest.request), None);
        let mut last = third;
        let mut seen = vec![numbers[0], third.to_number()];
        for _ in 0..9 {
            requests.remove(last);
            last = requests.insert(flush(4));
            assert!(!seen.contains(&last.to_number()), "{last:?}");
            seen.push(last.to_number());
        }
    }
}
