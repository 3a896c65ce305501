//! The Primary that does not know yet that it was replaced (R4). Its end of the link
//! stands, but nothing comes in; or it stands still itself. Meanwhile the other node is asked to take
//! over, again and again, as an agent would. The guest asks both, so that a read that the replaced
//! one answers without a lease, or under one that was counted too long, is seen to be stale.

use super::cluster::{Cluster, Event, Phase};
use super::fault_kind::FaultKind;
use super::faults::{Crash, draw_millis};
use super::operator::PRIMARY;
use super::options::Options;
use super::split_brain::SplitBrain;
use super::stimulus::Stimulus;
use std::time::Duration;

const MILLISECOND: u64 = 1_000_000;

/// How often the heir is asked to take over.
pub(super) const ATTEMPTS: u32 = 10;

/// What is done next to replace the Primary.
#[derive(Clone, Copy, Debug)]
pub(super) enum Takeover {
    /// The heir's end of the link breaks.
    Break,
    /// The heir is asked.
    Ask { attempts: u32 },
}

/// How the Primary is kept from hearing of it.
#[derive(Clone, Copy, Debug)]
enum Veil {
    /// Its end of a broken link stands.
    HalfOpen,
    /// What the heir sent, answers to questions about leases among it, arrives late; then the link
    /// breaks, and its end stands.
    LateAnswers,
    /// The heir is silent, and its daemon is restarted meanwhile.
    Restart,
    /// It stands still.
    Pause,
}

impl Cluster {
    /// Draws a takeover, if somebody serves.
    pub fn draw_takeover(&mut self) {
        let Some(old) = (0..2).find(|h| self.serving(*h)) else {
            return;
        };
        let (heir, lease) = (1 - old, lease(&self.options));
        let until_break = self.whims.u64(0..lease);
        let span = Duration::from_nanos(until_break + self.whims.u64(lease / 2..lease * 3));
        let veil = [
            Veil::HalfOpen,
            Veil::LateAnswers,
            Veil::Restart,
            Veil::Pause,
        ][self.whims.usize(0..4)];
        match veil {
            Veil::HalfOpen => self.break_unaware(old),
            Veil::LateAnswers => {
                self.stimulate(Stimulus::Silence { host: heir, span });
                let next = Takeover::Break;
                self.schedule(until_break, Event::Takeover { heir, next });
                return;
            }
            Veil::Restart => {
                self.stimulate(Stimulus::Silence { host: heir, span });
                let (kind, down) = (Crash::Process, draw_millis(&mut self.whims, 1..50));
                self.stimulate(Stimulus::Crash {
                    host: heir,
                    kind,
                    down,
                });
            }
            Veil::Pause => {
                let (kind, draw) = (FaultKind::Pause, self.whims.u64(..));
                self.stimulate(Stimulus::Rare {
                    host: old,
                    kind,
                    draw,
                });
                self.break_unaware(old);
            }
        }
        self.ask_heir(heir, ATTEMPTS);
    }

    /// The link breaks, and this end is not told.
    pub fn break_unaware(&mut self, unaware: usize) {
        let (kind, draw) = (FaultKind::HalfOpen, self.whims.u64(..));
        self.stimulate(Stimulus::Rare {
            host: unaware,
            kind,
            draw,
        });
    }

    /// Plans to ask the heir to take over, again and again.
    pub fn ask_heir(&mut self, heir: usize, attempts: u32) {
        let pause = self.whims.u64(0..MILLISECOND + lease(&self.options) / 3);
        let next = Takeover::Ask { attempts };
        self.schedule(pause, Event::Takeover { heir, next });
    }

    pub fn takeover_step(&mut self, heir: usize, next: Takeover) {
        if self.phase != Phase::Storm || self.operator.split != SplitBrain::Not {
            return;
        }
        match next {
            Takeover::Break => {
                self.break_unaware(1 - heir);
                self.ask_heir(heir, ATTEMPTS);
            }
            Takeover::Ask { attempts } => {
                if !self.serving(heir) && !self.operator.busy(heir) {
                    self.order(heir, PRIMARY);
                }
                if attempts > 1 && !self.serving(heir) {
                    self.ask_heir(heir, attempts - 1);
                }
            }
        }
    }
}

fn lease(options: &Options) -> u64 {
    options.lease.as_nanos() as u64
}
