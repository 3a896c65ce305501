//! What the ring cannot do and must not wait for: a few workers do it, started when first needed.

use crate::backend::{Completion, Descriptor, Operation, Token};
use crate::slots::Slots;
use crate::workers::Workers;
use nix::errno::Errno;

/// Operations that workers carry out.
#[derive(Default)]
pub struct Aside {
    staff: Option<Staff>,
    operations: Slots<(Token, Operation)>,
    ended: Vec<(u64, u32)>,
}

struct Staff {
    workers: Workers<u32>,
    bell: Descriptor,
}

impl Staff {
    /// Named after the mirror's thread, which is the calling one.
    fn hire() -> Result<Staff, Errno> {
        let thread = std::thread::current();
        let hired = Workers::new(thread.name().unwrap_or("mirror"))
            .and_then(|workers| workers.bell().map(|bell| Staff { workers, bell }));
        hired.map_err(|error| Errno::try_from(error).unwrap_or(Errno::EAGAIN))
    }
}

impl Aside {
    /// What becomes readable when something has ended, once there are workers.
    pub fn bell(&self) -> Option<&Descriptor> {
        self.staff.as_ref().map(|staff| &staff.bell)
    }

    /// Operations that have not ended.
    pub fn in_flight(&self) -> usize {
        self.operations.len()
    }

    /// Has a [`Operation::Map`] carried out, or ends it at once where there can be no workers.
    pub fn submit(&mut self, token: Token, operation: Operation) -> Result<(), Completion> {
        let refuse = |operation, errno| Completion {
            token,
            operation,
            result: Err(errno),
        };
        let Operation::Map { file, survey } = &operation else {
            return Err(refuse(operation, Errno::EINVAL));
        };
        let staff = match &mut self.staff {
            Some(staff) => staff,
            None => match Staff::hire() {
                Ok(staff) => self.staff.insert(staff),
                Err(errno) => return Err(refuse(operation, errno)),
            },
        };
        // The job owns what it touches, so it may outlive this ring.
        let (file, survey) = (file.clone(), survey.clone());
        let slot = self.operations.insert((token, operation));
        staff
            .workers
            .submit(slot.into(), move || survey.carry_out(&file));
        Ok(())
    }

    /// Appends what has ended since the last time.
    pub fn collect(&mut self, completions: &mut Vec<Completion>) {
        let Some(staff) = &self.staff else {
            return;
        };
        staff.workers.collect(&mut self.ended);
        for (slot, found) in self.ended.drain(..) {
            if let Some((token, operation)) = self.operations.remove(slot as u32) {
                completions.push(Completion {
                    token,
                    operation,
                    result: Ok(found),
                });
            }
        }
    }
}
