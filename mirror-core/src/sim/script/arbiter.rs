//! The arbiter of a script: one register with compare-and-swap, and a way to it that can be held
//! up at either end.

use super::parse::{ArbiterStep, Host, Leg};
use super::world::{Coming, World};
use crate::node::boundary::{ArbiterAnswer, ArbiterRequest, AskId, Input};
use crate::sim::host::NAMES;
use crate::types::{ArbiterId, Register, ReplicaId};
use std::collections::VecDeque;

/// Whom the record of every arbitrated script is kept with.
pub(super) const ARBITER: ArbiterId = ArbiterId(0xa1b);

/// The register, and what is on its way to it and from it.
#[derive(Default)]
pub(super) struct Arbiter {
    pub value: Option<Register>,
    unreachable: Vec<Host>,
    holding: Vec<(Host, Leg)>,
    held: VecDeque<Message>,
}

/// A question or an answer, and the life of the daemon that asked.
struct Message {
    host: Host,
    life: u128,
    ask: AskId,
    what: Way,
}

#[derive(Clone, Copy)]
enum Way {
    There(ArbiterRequest),
    Back(ArbiterAnswer),
}

impl Way {
    fn is_held_by(self, leg: Leg) -> bool {
        match (self, leg) {
            (Way::There(_), Leg::Requests) | (Way::Back(_), Leg::Replies) => true,
            (Way::There(request), Leg::Swaps) => matches!(request, ArbiterRequest::Swap { .. }),
            _ => false,
        }
    }
}

impl World {
    /// A node asks the arbiter.
    pub fn ask_arbiter(&mut self, host: Host, ask: AskId, request: ArbiterRequest) {
        let life = self.machines[host].lives;
        let what = Way::There(request);
        self.send_message(Message {
            host,
            life,
            ask,
            what,
        });
    }

    fn send_message(&mut self, message: Message) {
        let text = self.message_in_words(&message);
        let Some(arbiter) = &mut self.arbiter else {
            return self.violate(format!("{} asks an arbiter", NAMES[message.host]));
        };
        let mut legs = arbiter.holding.iter();
        if arbiter.unreachable.contains(&message.host) {
            self.tell(format!("{text}  (lost)"));
        } else if legs.any(|(host, leg)| *host == message.host && message.what.is_held_by(*leg)) {
            arbiter.held.push_back(message);
            self.tell(format!("{text}  (held)"));
        } else {
            self.tell(text);
            self.message_arrives(message);
        }
    }

    fn message_arrives(&mut self, message: Message) {
        let Message {
            host,
            life,
            ask,
            what,
        } = message;
        match what {
            Way::There(request) => {
                let answer = self.carry_out(request);
                let what = Way::Back(answer);
                self.send_message(Message {
                    host,
                    life,
                    ask,
                    what,
                });
            }
            Way::Back(answer) => {
                let machine = &self.machines[host];
                if machine.process.is_some() && machine.lives == life {
                    let input = Input::Arbiter { ask, answer };
                    self.coming.push_back(Coming::Input(host, input));
                }
            }
        }
    }

    fn carry_out(&mut self, request: ArbiterRequest) -> ArbiterAnswer {
        let Some(arbiter) = &mut self.arbiter else {
            return ArbiterAnswer::Value(None);
        };
        match request {
            ArbiterRequest::Read => ArbiterAnswer::Value(arbiter.value),
            ArbiterRequest::Swap { expected, new } if expected == arbiter.value => {
                arbiter.value = Some(new);
                self.check_register();
                ArbiterAnswer::Swapped
            }
            ArbiterRequest::Swap { .. } => ArbiterAnswer::Refused(arbiter.value),
        }
    }

    fn message_in_words(&mut self, message: &Message) -> String {
        let name = NAMES[message.host];
        match message.what {
            Way::There(ArbiterRequest::Read) => format!("{name} asks the arbiter: what is it?"),
            Way::There(ArbiterRequest::Swap { expected, new }) => {
                let (old, new) = (self.register(expected), self.register(Some(new)));
                format!("{name} asks the arbiter: {new}, if it is {old}")
            }
            Way::Back(ArbiterAnswer::Value(value)) => {
                format!("the arbiter tells {name}: {}", self.register(value))
            }
            Way::Back(ArbiterAnswer::Swapped) => format!("the arbiter tells {name}: done"),
            Way::Back(ArbiterAnswer::Refused(value)) => {
                format!(
                    "the arbiter tells {name}: no, it is {}",
                    self.register(value)
                )
            }
        }
    }

    /// A value of the register: who holds, in which generation, and which value of those it is.
    fn register(&mut self, value: Option<Register>) -> String {
        let Some(value) = value else {
            return "nothing".to_owned();
        };
        if !self.registered.contains(&value.id) {
            self.registered.push(value.id);
        }
        let number = self.registered.iter().position(|id| *id == value.id);
        let number = number.map_or(0, |at| at + 1);
        let generation = self.names.of(value.generation);
        format!("r{number} {{{}}} {generation}", self.named(value))
    }

    /// The names of the hosts that a value of the register names.
    fn named(&self, value: Register) -> String {
        let mut names: Vec<&str> = value
            .holders
            .iter()
            .filter(|replica| !replica.is_none())
            .map(|replica| self.host_of(*replica).map_or("?", |host| NAMES[host]))
            .collect();
        names.sort_unstable();
        names.join(",")
    }

    /// Which host has this replica on its disk.
    pub fn host_of(&self, replica: ReplicaId) -> Option<Host> {
        [0, 1]
            .into_iter()
            .find(|host| self.replica(*host) == replica)
    }

    /// The hosts that the register names, if there is a register with a value.
    pub fn registered_hosts(&self) -> Option<Vec<Host>> {
        let value = self.arbiter.as_ref()?.value?;
        Some(
            value
                .holders
                .iter()
                .filter_map(|replica| self.host_of(*replica))
                .collect(),
        )
    }

    /// What the register holds, without the number of the value.
    pub fn register_in_words(&mut self) -> String {
        match self.arbiter.as_ref().and_then(|arbiter| arbiter.value) {
            None => "nothing".to_owned(),
            Some(value) => {
                let generation = self.names.of(value.generation);
                format!("{{{}}} {generation}", self.named(value))
            }
        }
    }

    /// Carries out a step of the script that is about the arbiter.
    pub fn arbiter_step(&mut self, step: &ArbiterStep) -> Result<(), String> {
        let arbiter = self
            .arbiter
            .as_mut()
            .ok_or("there is no arbiter: `create 8M arbitrated`")?;
        match step {
            ArbiterStep::Show => {
                let value = arbiter.value;
                let text = self.register(value);
                self.answer(format!("the register: {text}"));
            }
            ArbiterStep::Unreachable(hosts) => arbiter.unreachable.extend(hosts),
            ArbiterStep::Reachable(hosts) => {
                arbiter.unreachable.retain(|host| !hosts.contains(host));
            }
            ArbiterStep::Hold(leg, hosts) => {
                arbiter
                    .holding
                    .extend(hosts.iter().map(|host| (*host, *leg)));
            }
            ArbiterStep::Release => {
                arbiter.holding.clear();
                return self.deliver_messages(None);
            }
            ArbiterStep::Deliver(count) => return self.deliver_messages(*count),
            ArbiterStep::Keep => arbiter.holding.clear(),
            ArbiterStep::Lose => arbiter.held.clear(),
            ArbiterStep::Wipe => {
                arbiter.value = None;
                arbiter.held.clear();
            }
        }
        Ok(())
    }

    fn deliver_messages(&mut self, count: Option<usize>) -> Result<(), String> {
        let held = self
            .arbiter
            .as_ref()
            .map_or(0, |arbiter| arbiter.held.len());
        let count = count.unwrap_or(held);
        if count > held {
            return Err(format!("only {held} messages are held"));
        }
        for _ in 0..count {
            let message = self
                .arbiter
                .as_mut()
                .and_then(|arbiter| arbiter.held.pop_front());
            if let Some(message) = message {
                let text = self.message_in_words(&message);
                self.tell(format!("late: {text}"));
                self.message_arrives(message);
                self.settle()?;
            }
        }
        Ok(())
    }
}
