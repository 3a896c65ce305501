//! Making the superblock, the bitmap and the activity log durable, one write of each at a time.

use super::Node;
use super::activity::Room;
use super::boundary::Action;
use super::operation::Purpose;
use crate::meta::META_BLOCK;
use std::collections::VecDeque;

/// What goes on when a superblock is durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Then {
    /// Nothing waits for it.
    Nothing,
    /// The transition's next stage.
    Step,
    /// The generation is durably marked as used.
    Used,
}

/// Superblocks to be written, in order.
#[derive(Debug, Default)]
pub(super) struct RecordQueue {
    queue: VecDeque<(u64, Vec<u8>, Then)>,
    writing: Option<Then>,
}

impl RecordQueue {
    /// Whether every superblock asked for is durable.
    pub(super) fn is_settled(&self) -> bool {
        self.writing.is_none() && self.queue.is_empty()
    }

    /// Whether the mark that the generation is used is on its way to the disk.
    pub(super) fn awaits_use(&self) -> bool {
        let waiting = self.queue.iter().map(|(_, _, then)| *then);
        waiting.chain(self.writing).any(|then| then == Then::Used)
    }
}

/// Most bitmap blocks in one metadata write.
const SAVE_RUN: u64 = 64;

impl Node {
    /// Makes the superblock as it stands durable, in one slot.
    pub(super) fn commit(&mut self, then: Then) {
        self.record.sequence += 1;
        let offset = self.layout.slot_offset(self.record.slot());
        self.records
            .queue
            .push_back((offset, self.record.encode(), then));
        self.write_next_record();
    }

    /// Makes the superblock as it stands durable in both slots: a lowering of trust must not be
    /// undone by the loss of one slot (R7).
    pub(super) fn commit_both(&mut self, then: Then) {
        self.commit(Then::Nothing);
        self.commit(then);
    }

    fn write_next_record(&mut self) {
        if self.records.writing.is_some() {
            return;
        }
        if let Some((offset, bytes, then)) = self.records.queue.pop_front() {
            self.records.writing = Some(then);
            let op = self.ops.start(Purpose::Superblock);
            self.out.push(Action::MetaWrite { op, offset, bytes });
        }
    }

    /// A superblock is durable.
    pub(super) fn record_written(&mut self) {
        let then = self.records.writing.take();
        self.write_next_record();
        match then {
            Some(Then::Step) => self.transition_step(),
            Some(Then::Used) => self.use_is_durable = self.record.used,
            Some(Then::Nothing) | None => {}
        }
    }

    /// Starts writing every bitmap block that differs from its copy on disk. Nothing happens
    /// while an earlier round is still on its way: two writes of one block must not race.
    pub(super) fn save_bitmap(&mut self) {
        if self.saving > 0 {
            return;
        }
        let mut at = 0;
        while let Some(first) = self.bitmap.next_unsaved(at) {
            let mut bytes = Vec::new();
            let mut end = first;
            while end < self.bitmap.blocks()
                && end - first < SAVE_RUN
                && self.bitmap.is_unsaved(end)
            {
                bytes.extend(self.bitmap.save(end, self.record.replica));
                end += 1;
            }
            let op = self.ops.start(Purpose::Bitmap);
            self.saving += 1;
            let offset = self.layout.bitmap_block_offset(first);
            self.out.push(Action::MetaWrite { op, offset, bytes });
            at = end;
        }
    }

    /// A run of bitmap blocks is durable.
    pub(super) fn bitmap_written(&mut self) {
        self.saving -= 1;
        self.log_wanted = true;
    }

    /// Whether the bitmap on disk is the bitmap in memory.
    pub(super) fn bitmap_is_saved(&self) -> bool {
        self.saving == 0 && self.bitmap.next_unsaved(0).is_none()
    }

    /// Moves the activity log on for the requests that wait for it.
    pub(super) fn pump_log(&mut self) {
        self.log_wanted = false;
        let mut missing = 0;
        for at in 0..self.requests.log_queue.len() {
            let key = self.requests.log_queue[at];
            let Some(piece) = self.piece_of(key) else {
                continue;
            };
            missing += self.log.enter(piece);
            if missing > 0 {
                // First come, first served: the next ones wait for room behind this one.
                break;
            }
        }
        if missing > 0 && !self.settling {
            match self.log.make_room(missing, &self.bitmap, self.saving > 0) {
                Room::Made => self.log_wanted = true,
                Room::NeedsSettling => self.settle(),
                Room::NeedsBitmap => self.save_bitmap(),
                Room::AllBusy => {}
            }
        }
        self.write_log();
    }

    /// Writes the log's next transaction if one is due.
    pub(super) fn write_log(&mut self) {
        if let Some(transaction) = self.log.transaction() {
            let op = self.ops.start(Purpose::Log);
            let offset = self.layout.activity_log_offset(transaction.ring_index());
            let bytes = transaction.encode(self.record.replica);
            debug_assert_eq!(bytes.len() as u64, META_BLOCK);
            self.out.push(Action::MetaWrite { op, offset, bytes });
        }
    }

    /// A transaction of the activity log is durable.
    pub(super) fn log_written(&mut self) {
        self.log.transaction_done();
        self.retry_log_queue();
        self.log_wanted = true;
    }
}
