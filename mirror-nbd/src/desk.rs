//! Operators' commands that the core has not answered yet.

use crate::mailbox::CommandResult;
use mirror_core::node::boundary::CommandId;
use tokio::sync::oneshot;

/// Who waits for which answer.
#[derive(Default)]
pub struct Desk {
    last: u64,
    waiting: Vec<(CommandId, oneshot::Sender<CommandResult>)>,
}

impl Desk {
    /// Numbers a command; the answer goes to `answer`.
    pub fn take(&mut self, answer: oneshot::Sender<CommandResult>) -> CommandId {
        let command = self.own();
        self.waiting.push((command, answer));
        command
    }

    /// Numbers a command of the daemon itself.
    pub fn own(&mut self) -> CommandId {
        self.last += 1;
        CommandId(self.last)
    }

    /// Passes an answer on.
    pub fn answer(&mut self, command: CommandId, result: CommandResult) {
        let place = self.waiting.iter().position(|(known, _)| *known == command);
        match (place, result) {
            (Some(place), result) => {
                // Who asked may have left.
                let _ = self.waiting.swap_remove(place).1.send(result);
            }
            (None, Err(refusal)) => log::warn!("a command of the daemon's own failed: {refusal}"),
            (None, Ok(_)) => {}
        }
    }
}
