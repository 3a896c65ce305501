//! The arbiter: one register with compare-and-swap, and what a network does to it.
//!
//! Fault model. A request is carried out once, late or never, whether or not its asker still
//! lives; a reply arrives late or never. While a machine cannot reach the arbiter, its requests are
//! lost or, as often, carried out and only their replies are lost. A **straggler** is carried out
//! many seconds after it was sent, or answered many seconds after it was carried out. A **restart** loses what is on its way and keeps the value. A
//! **wipe** loses the value, and with it every right to change it.
//!
//! The oracle sees every swap. The register names who holds every acknowledged write, so when a
//! value takes effect that names a sole holder, every write acknowledged so far must be durable on
//! that holder's disk; and who is newly named must have on its disk whatever was flushed.

use super::ambush::Moment;
use super::cluster::{Cluster, Event};
use super::host::{Fitness, NAMES};
use crate::node::boundary::{ArbiterAnswer, ArbiterRequest, AskId, Input};
use crate::types::{ArbiterId, Register, ReplicaId, Time};
use std::collections::HashSet;

const MILLISECOND: u64 = 1_000_000;

/// The arbiter's identity in every simulated mirror that has one.
pub(super) const ARBITER: ArbiterId = ArbiterId(0xa1b1);

/// A request or reply on its way.
#[derive(Clone, Copy, Debug)]
pub(super) enum Message {
    Request(ArbiterRequest),
    Reply(ArbiterAnswer),
}

/// Who asked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asker {
    pub host: usize,
    pub life: u32,
    pub ask: AskId,
}

/// The register, and the state of the ways to it.
pub(super) struct Arbiter {
    value: Option<Register>,
    ids: HashSet<u128>,
    created: bool,
    wiped: bool,
    /// Until when each machine cannot reach it.
    unreachable: [Time; 2],
    /// Until when requests become stragglers.
    lagging: Time,
    /// Swaps of each machine on their way, whether or not the asker still lives.
    swaps: [u32; 2],
    /// Requests and replies of earlier epochs were lost in a restart.
    epoch: u32,
    /// Until when its faults may have held a node up.
    troubled: Time,
    max_delay: u64,
    rng: fastrand::Rng,
}

impl Arbiter {
    pub fn new(max_delay: u64, rng: fastrand::Rng) -> Arbiter {
        Arbiter {
            value: None,
            ids: HashSet::new(),
            created: false,
            wiped: false,
            unreachable: [Time(0); 2],
            lagging: Time(0),
            swaps: [0; 2],
            epoch: 0,
            troubled: Time(0),
            max_delay,
            rng,
        }
    }

    /// Whether its faults may have held a node up lately.
    pub fn troubled(&self, now: Time) -> bool {
        now < self.troubled
    }

    /// Whether it has forgotten the mirror: some things can then not go on without an operator.
    pub fn is_wiped(&self) -> bool {
        self.wiped
    }

    /// Whether the register may change yet by what the machine asked for.
    pub fn may_swap_for(&self, host: usize) -> bool {
        self.swaps[host] > 0
    }

    /// A machine cannot reach it for `span` nanoseconds.
    pub fn part(&mut self, now: Time, host: usize, span: u64) {
        self.unreachable[host] = self.unreachable[host].max(Time(now.0 + span));
        self.trouble(now, span);
    }

    /// Some requests and replies of the next `span` nanoseconds become stragglers.
    pub fn lag(&mut self, now: Time, span: u64) {
        self.lagging = self.lagging.max(Time(now.0 + span));
        self.trouble(now, span);
    }

    /// It is restarted: what is on its way is lost.
    pub fn restart(&mut self, now: Time) {
        self.epoch += 1;
        self.trouble(now, 0);
    }

    /// It forgets everything.
    pub fn wipe(&mut self) {
        self.wiped = true;
        self.value = None;
    }

    /// Its faults end, but for stragglers under way.
    pub fn heal(&mut self, now: Time) {
        self.unreachable = [now; 2];
        self.lagging = now;
    }

    fn trouble(&mut self, now: Time, span: u64) {
        // A node asks again after a pause that may have grown meanwhile.
        let end = Time(now.0 + span + 12_000 * MILLISECOND);
        self.troubled = self.troubled.max(end);
    }

    /// How long a request or a reply is on its way.
    fn delay(&mut self, now: Time) -> u64 {
        let straggles = now < self.lagging && self.rng.u8(0..3) == 0;
        let extra = if straggles {
            self.rng.u64(0..10_000) * MILLISECOND
        } else {
            0
        };
        self.rng.u64(0..=self.max_delay * 2) + extra
    }

    /// How long a request takes; `None` if it is lost.
    fn request_delay(&mut self, now: Time, host: usize) -> Option<u64> {
        if now < self.unreachable[host] && self.rng.bool() {
            return None;
        }
        Some(self.delay(now))
    }

    fn carry_out(&mut self, request: ArbiterRequest) -> ArbiterAnswer {
        match request {
            ArbiterRequest::Read => ArbiterAnswer::Value(self.value),
            ArbiterRequest::Swap { expected, new } if expected == self.value => {
                self.value = Some(new);
                ArbiterAnswer::Swapped
            }
            ArbiterRequest::Swap { .. } => ArbiterAnswer::Refused(self.value),
        }
    }
}

impl Cluster {
    /// A node asks.
    pub fn ask_arbiter(&mut self, host: usize, ask: AskId, request: ArbiterRequest) {
        let Some(process) = &self.hosts[host].process else {
            return;
        };
        let asker = Asker {
            host,
            life: process.life,
            ask,
        };
        if let Some(delay) = self.arbiter.request_delay(self.now, host) {
            if matches!(request, ArbiterRequest::Swap { .. }) {
                self.arbiter.swaps[host] += 1;
                self.ambush_sees(host, Moment::Swap, delay);
            }
            self.send_arbiter(delay, asker, Message::Request(request));
        }
    }

    fn send_arbiter(&mut self, delay: u64, asker: Asker, message: Message) {
        let epoch = self.arbiter.epoch;
        let event = Event::Arbiter {
            asker,
            epoch,
            message,
        };
        self.schedule(delay, event);
    }

    /// A request or reply arrives.
    pub fn arbiter_hears(&mut self, asker: Asker, epoch: u32, message: Message) {
        if matches!(message, Message::Request(ArbiterRequest::Swap { .. })) {
            self.arbiter.swaps[asker.host] -= 1;
        }
        if epoch != self.arbiter.epoch {
            return;
        }
        match message {
            Message::Request(request) => {
                let before = self.arbiter.value;
                let answer = self.arbiter.carry_out(request);
                if self.trace.wants_lines() {
                    let text = format!("to the arbiter: {request:?}: {answer:?}");
                    self.tell(asker.host, &text);
                }
                if let (ArbiterAnswer::Swapped, Some(new)) = (answer, self.arbiter.value) {
                    self.check_swap(asker.host, before, new);
                }
                if self.now >= self.arbiter.unreachable[asker.host] {
                    let delay = self.arbiter.delay(self.now);
                    self.send_arbiter(delay, asker, Message::Reply(answer));
                }
            }
            Message::Reply(answer) => {
                let lives = |host: &super::host::Host| {
                    host.process.as_ref().is_some_and(|p| p.life == asker.life)
                };
                if lives(&self.hosts[asker.host]) {
                    let ask = asker.ask;
                    self.feed(asker.host, Input::Arbiter { ask, answer });
                }
            }
        }
    }

    /// Whom the register names.
    pub fn registered(&self) -> [bool; 2] {
        let value = self.arbiter.value;
        [0, 1].map(|h| {
            let replica = self.replica_on(h).unwrap_or(ReplicaId::NONE);
            value.is_some_and(|value| value.names(replica))
        })
    }

    /// The register changed: was that a right the asker had, and do the holders hold?
    fn check_swap(&mut self, by: usize, before: Option<Register>, new: Register) {
        let asker = self.replica_on(by).unwrap_or(ReplicaId::NONE);
        if !self.arbiter.ids.insert(new.id) {
            return self.fail(format!("a register value recurs: {new:?}"));
        }
        match before {
            None if self.arbiter.created => {
                return self.fail(format!("{} has a right from a wiped arbiter", NAMES[by]));
            }
            Some(before) if !before.names(asker) && !self.operator.forced => {
                return self.fail(format!(
                    "{} swapped a register that does not name it: {before:?}",
                    NAMES[by]
                ));
            }
            _ => self.arbiter.created = true,
        }
        let named = self.registered();
        let was = self.custody.named;
        // A disk that was given up may still ask; it is about to be replaced, and counts no more.
        let fit = [0, 1].map(|h| self.hosts[h].fitness == Fitness::Fit);
        self.custody.named = [named[0] && fit[0], named[1] && fit[1]];
        if self.operator.forced || self.client.parted {
            return;
        }
        if before.is_none() || named == was {
            return;
        }
        for h in (0..2).filter(|h| fit[*h]) {
            let sole = named[h] && !named[1 - h];
            let checked = match (named[h], was[h]) {
                (true, _) if sole => self.check_present_on(h),
                (true, false) => self.check_flushed_on(h),
                (true, true) => Ok(()),
                // Who is left behind had everything until now.
                (false, true) if !self.custody.lost[h] => self.check_image(h),
                (false, _) => Ok(()),
            };
            if let Err(problem) = checked {
                let names = if named[h] { "names" } else { "leaves behind" };
                self.fail(format!("the register {names} {}: {problem}", NAMES[h]));
            }
            // What it holds was durable when it became the only holder. Who becomes one again may have
            // lost power since it was copied to, and with it what was acknowledged and not flushed.
            self.custody.lost[h] &= named[h] && !sole;
        }
    }
}
