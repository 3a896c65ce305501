//! The insane operator: with the peer alive and serving behind a cut link, he promotes the other
//! node by force. The split brain must be noticed and told on both sides, never merged silently, and end
//! when one side discards its data. Until then each side has a history of its own, and keeps it.

use super::checker::Checker;
use super::client::Ask;
use super::cluster::Cluster;
use super::faults::{Crash, draw_millis};
use super::host::NAMES;
use super::network::Break;
use crate::node::boundary::{Command, PrimaryMode};
use crate::types::{LinkState, Role, Time};

const SECOND: u64 = 1_000_000_000;

/// How far the story has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum SplitBrain {
    Not,
    /// Wait until both are in sync and one serves.
    Begin,
    /// The link is cut; promote the other by force.
    Force {
        other: usize,
        until: Time,
    },
    /// Both serve; wait until both acknowledged writes.
    Diverge {
        acknowledged: [u64; 2],
        until: Time,
    },
    /// The link is back: nothing may be merged until this time.
    Stand {
        until: Time,
    },
    /// The loser gives up its role and its data.
    Resolve {
        loser: usize,
        until: Time,
    },
}

/// The history that guests of the node know: each side's own while a split brain lasts.
pub(super) fn history<'a>(
    apart: &'a mut Option<[Checker; 2]>,
    common: &'a mut Checker,
    h: usize,
) -> &'a mut Checker {
    match apart {
        Some(both) => &mut both[h],
        None => common,
    }
}

impl Cluster {
    pub fn split_brain_step(&mut self) {
        match self.operator.split {
            SplitBrain::Not => {}
            SplitBrain::Begin => self.split_begin(),
            SplitBrain::Force { other, until } => self.split_force(other, until),
            SplitBrain::Diverge {
                acknowledged,
                until,
            } => self.split_diverge(acknowledged, until),
            SplitBrain::Stand { until } => self.split_stand(until),
            SplitBrain::Resolve { loser, until } => self.split_resolve(loser, until),
        }
    }

    fn split_begin(&mut self) {
        // What was asked before is not to take effect in the middle of the story.
        if self.operator.busy(0) || self.operator.busy(1) {
            return;
        }
        let Some(serving) = (0..2).find(|h| self.serving(*h)) else {
            // Faults left nobody in service: this seed tells the sane story.
            self.operator.split = SplitBrain::Not;
            return self.begin_healing();
        };
        if !self.in_sync() || self.serving(1 - serving) {
            self.operator.split = SplitBrain::Not;
            return self.begin_healing();
        }
        self.tell(serving, "and its peer are parted for a split brain");
        // A story without other faults, those under way included.
        for h in 0..2 {
            self.heal_disk(h);
            self.heal_host(h);
        }
        self.operator.forced = true;
        self.part_histories();
        self.network
            .cut(100 * SECOND, Break::Clean, &mut self.later);
        self.flush_network();
        self.operator.split = SplitBrain::Force {
            other: 1 - serving,
            until: Time(self.now.0 + 15 * SECOND),
        };
    }

    fn split_force(&mut self, other: usize, until: Time) {
        if self.serving(other) && self.serving(1 - other) {
            // The guest's history so far was checked; the budget for what follows is extra.
            self.options.requests = self.options.requests.max(self.client.asked() + 400);
            self.operator.split = SplitBrain::Diverge {
                acknowledged: self.client.acknowledged,
                until: Time(self.now.0 + 60 * SECOND),
            };
        } else if self.now > until {
            self.fail(format!("{} cannot be promoted by force", NAMES[other]));
        } else if !self.operator.busy(other) && !self.serving(other) {
            self.command(other, Command::Primary(PrimaryMode::Force));
        }
    }

    fn split_diverge(&mut self, before: [u64; 2], until: Time) {
        // A list may have no writes for now, and the story needs some on both sides.
        if !self.source.is_drawn() && self.source.next_at().is_none_or(|at| at > until) {
            self.guest_asks(Ask::Write {
                start: 0,
                count: 8,
                fua: false,
            });
        }
        let now = self.client.acknowledged;
        if now[0] > before[0] + 3 && now[1] > before[1] + 3 {
            self.client.held = true;
            self.split_crashes();
            self.network.heal(&mut self.later);
            self.flush_network();
            self.operator.split = SplitBrain::Stand {
                until: Time(self.now.0 + 10 * SECOND),
            };
        } else if self.now > until {
            self.fail("two forced Primaries do not serve".to_owned());
        }
    }

    /// Each side's history is its own from here on. What is on its way at one may have reached the
    /// other, or not.
    fn part_histories(&mut self) {
        self.client.parted = true;
        let mut both = [self.checker.clone(), self.checker.clone()];
        for (h, oracle) in both.iter_mut().enumerate() {
            self.client.lost_at(1 - h, oracle);
        }
        self.apart = Some(both);
    }

    /// Each side holds what it promised, whatever became of the other; and both tell their operators.
    fn check_apart(&mut self) -> Result<(), String> {
        for h in [0, 1] {
            self.check_image(h)
                .map_err(|problem| format!("{} alone: {problem}", NAMES[h]))?;
            if !self.reports_divergence(h) {
                return Err(format!("{} does not report the split brain", NAMES[h]));
            }
        }
        Ok(())
    }

    /// The operator chose: the other side's history never was.
    fn go_on_with_history_of(&mut self, winner: usize) {
        if let Some([mine, theirs]) = self.apart.take() {
            self.checker = match winner {
                0 => mine,
                _ => theirs,
            };
        }
    }

    /// Either side may have been killed, or have lost power, before the two meet again: what it says of
    /// itself then is on its disk.
    fn split_crashes(&mut self) {
        for h in 0..2 {
            let down = draw_millis(&mut self.operator.rng, 1..2000);
            match self.operator.rng.u8(0..4) {
                0 => self.crash(h, Crash::Process, down),
                1 => self.crash(h, Crash::Power, down),
                _ => {}
            }
        }
    }

    fn split_stand(&mut self, until: Time) {
        // One end may not have been told of the cut yet.
        let copies = |h| {
            self.standing(h)
                .is_some_and(|standing| standing.resync.is_some())
        };
        let merged = (self.connected(0) && self.connected(1)) || (0..2).any(copies);
        if merged {
            return self.fail("a split brain is merged silently".to_owned());
        }
        if self.now > until {
            if self.client.pending_at(0) + self.client.pending_at(1) > 0 {
                return self.fail("requests are stuck in a split brain".to_owned());
            }
            if let Err(problem) = self.check_apart() {
                return self.fail(problem);
            }
            let loser = self.operator.rng.usize(0..2);
            self.tell(loser, "is to discard its data");
            self.go_on_with_history_of(1 - loser);
            self.custody.named = [loser == 1, loser == 0];
            self.custody.lost = [false; 2];
            self.operator.split = SplitBrain::Resolve {
                loser,
                until: Time(self.now.0 + 60 * SECOND),
            };
        }
    }

    fn split_resolve(&mut self, loser: usize, until: Time) {
        let (Some(mine), Some(winner)) = (self.standing(loser), self.standing(1 - loser)) else {
            return;
        };
        if self.operator.busy(loser) || self.operator.busy(1 - loser) {
            return;
        }
        if mine.role == Role::Primary {
            self.command(loser, Command::Secondary);
        } else if mine.link != LinkState::Connected {
            if mine.link == LinkState::StandAlone {
                self.command(
                    loser,
                    Command::Connect {
                        discard_my_data: true,
                    },
                );
            }
            if winner.link == LinkState::StandAlone {
                self.command(
                    1 - loser,
                    Command::Connect {
                        discard_my_data: false,
                    },
                );
            }
        } else {
            self.operator.split = SplitBrain::Not;
            self.operator.forced = false;
            self.client.parted = false;
            self.client.held = false;
            self.begin_healing();
        }
        if self.now > until {
            self.fail("discarding one side does not end the split brain".to_owned());
        }
    }
}
