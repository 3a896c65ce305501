//! Meeting the disk: reading the metadata, believing as much of it as is due, and marking what a
//! crash left open.

use super::activity::ActivityLog;
use super::boundary::{Action, DiskError, Severity};
use super::operation::Purpose;
use super::records::Then;
use super::{Node, Phase};
use crate::error::{ErrorId, Refusal};
use crate::limits::EXTENT;
use crate::meta::activity_log::Transaction;
use crate::meta::bitmap::Bitmap;
use crate::meta::superblock::{SlotError, Superblock, Trust, TrustError};
use crate::meta::{ACTIVITY_LOG_BLOCKS, Layout, META_BLOCK, SLOTS};
use crate::types::{BootId, ByteRange, DiskState, Holders, ReplicaId};

/// Bitmap blocks read at once.
const READ_RUN: u64 = 256;

impl Node {
    /// The store was opened.
    pub(super) fn attach(&mut self, store_size: u64, boot: BootId) {
        self.boot = boot;
        self.arbitration.started = self.now;
        match Layout::new(store_size, self.config.metadata) {
            Ok(layout) => self.layout = layout,
            Err(error) => return self.fail_attach(ErrorId::StoreTooSmall, &error.to_string()),
        }
        self.phase = Phase::Attaching;
        let op = self.ops.start(Purpose::ReadHeader);
        let len = ((SLOTS + ACTIVITY_LOG_BLOCKS) * META_BLOCK) as u32;
        self.out.push(Action::MetaRead {
            op,
            offset: self.layout.header_offset,
            len,
        });
    }

    /// Slots and activity log were read.
    pub(super) fn header_read(&mut self, bytes: &[u8]) {
        let mut blocks = bytes.chunks_exact(META_BLOCK as usize);
        let (Some(first), Some(second)) = (blocks.next(), blocks.next()) else {
            return self.fail_attach(ErrorId::StoreUnavailable, "short read of the metadata");
        };
        let slots = [Superblock::parse(first), Superblock::parse(second)];
        if let Some(lost) = slots
            .iter()
            .find(|slot| matches!(slot, Err(SlotError::Checksum)))
        {
            self.event(
                Severity::Warning,
                format!("a superblock slot is damaged: {lost:?}"),
            );
        }
        match Superblock::trust(slots, &self.layout) {
            Ok(record) => self.record = record,
            Err(error) => return self.refuse_metadata(&error),
        }
        if let Err(refusal) = self.check_ownership() {
            return self.fail_attach(refusal.id, &refusal.message);
        }
        let size = self.record.data_size;
        self.bitmap = Bitmap::new(size);
        let newest = Transaction::newest(blocks, self.record.replica);
        let sequence = newest.as_ref().map_or(0, |log| log.sequence);
        let stale = newest.as_ref().is_none_or(|log| !log.extents.is_empty());
        self.log = ActivityLog::new(self.config.log_extents, size, sequence, stale);
        self.found_log = newest;
        self.read_bitmap(0);
    }

    fn refuse_metadata(&mut self, error: &TrustError) {
        use SlotError::{Absent, Version};
        let mirror = &self.config.mirror;
        let (id, remedy) = match error {
            TrustError::NoSlot(Absent, Absent) => (
                ErrorId::MetadataMissing,
                format!("run `kagami create {mirror}` to make this disk a replica"),
            ),
            TrustError::NoSlot(Version(_), _) | TrustError::NoSlot(_, Version(_)) => {
                (ErrorId::MetadataVersion, "upgrade this node".to_owned())
            }
            TrustError::NoSlot(..) => (
                ErrorId::MetadataDamaged,
                format!(
                    "nothing on this disk can be trusted; if the peer has the data, run `kagami \
                     create {mirror} --force` here and let it resync"
                ),
            ),
            TrustError::Shrunk { .. } => (
                ErrorId::StoreTooSmall,
                "restore the disk's former size".to_owned(),
            ),
        };
        let text = format!("{error}; {remedy}");
        self.fail_attach(id, &text);
    }

    fn check_ownership(&self) -> Result<(), Refusal> {
        let (record, config) = (&self.record, &self.config);
        let names = [
            ("cluster", &record.cluster, &config.cluster),
            ("mirror", &record.mirror_name, &config.mirror),
            ("node", &record.node, &config.node),
        ];
        for (what, found, expected) in names {
            if found != expected {
                return Err(Refusal::new(
                    ErrorId::MetadataForeign,
                    format!(
                        "the disk belongs to {what} `{found}`, the configuration says \
                         `{expected}`; correct `disk` in the configuration, or re-create the \
                         replica"
                    ),
                ));
            }
        }
        if self.arbiter() != config.arbiter {
            return Err(Refusal::new(
                ErrorId::MetadataForeign,
                "the mirror's record is kept with another arbiter than the configuration names; \
                 correct the configuration",
            ));
        }
        Ok(())
    }

    fn read_bitmap(&mut self, first: u64) {
        let blocks = READ_RUN.min(self.bitmap.blocks() - first);
        let op = self.ops.start(Purpose::ReadBitmap(first));
        let offset = self.layout.bitmap_block_offset(first);
        self.out.push(Action::MetaRead {
            op,
            offset,
            len: (blocks * META_BLOCK) as u32,
        });
    }

    /// A run of bitmap blocks was read.
    pub(super) fn bitmap_read(&mut self, first: u64, bytes: &[u8]) {
        let mut damaged = 0;
        let mut next = first;
        for block in bytes.chunks_exact(META_BLOCK as usize) {
            damaged += u32::from(!self.bitmap.load(next, block, self.record.replica));
            next += 1;
        }
        if damaged > 0 {
            let text = format!("{damaged} bitmap blocks are damaged and count as all dirty");
            self.event(Severity::Warning, text);
        }
        if next < self.bitmap.blocks() {
            self.read_bitmap(next);
        } else {
            self.metadata_read();
        }
    }

    /// All metadata is here: what the log names may differ, so the bitmap takes it over, durably,
    /// before the log is emptied.
    fn metadata_read(&mut self) {
        if self.record.mirror_size > 0 {
            self.bitmap.limit(self.record.mirror_size);
        }
        match self.found_log.take() {
            Some(log) => {
                for extent in log.extents {
                    self.bitmap
                        .mark(ByteRange::new(u64::from(extent) * EXTENT, EXTENT));
                }
            }
            None => self.bitmap.mark_all(),
        }
        if self.record.all_dirty {
            self.bitmap.mark_all();
        }
        self.phase = Phase::Settling;
        // What a daemon wrote that died in this boot may still be volatile. The log covers it; it
        // must be durable before the log is emptied.
        let op = self.ops.start(Purpose::AttachFlush);
        self.out.push(Action::Flush { op });
    }

    /// What was written before the attach is durable.
    pub(super) fn attach_flushed(&mut self) {
        self.old_writes_durable = true;
    }

    /// Brings the metadata on disk to what was made of it; then the node is up.
    pub(super) fn settle_metadata(&mut self) {
        let born = !self.record.generation.is_unborn();
        if !self.old_writes_durable {
            return;
        }
        if born && !self.bitmap_is_saved() {
            self.save_bitmap();
        } else if !self.log.is_saved() {
            self.write_log();
        } else if self.record.proposal.is_some() && !self.is_arbitrated() {
            // Without an arbiter nobody else can have seen it, and nothing was done by it.
            self.record.proposal = None;
            self.commit(Then::Nothing);
        } else if self.records.is_settled() {
            self.attached();
        }
    }

    fn attached(&mut self) {
        self.phase = Phase::Running;
        self.use_is_durable = self.record.used;
        let sole = self.record.holders == Holders::Sole;
        self.disk = match self.record.trust {
            Trust::Inconsistent => DiskState::Inconsistent,
            Trust::Outdated => DiskState::Outdated,
            // A sole holder has every acknowledged write. Whether a shared one has, the peer says.
            Trust::UpToDate if sole => DiskState::UpToDate,
            Trust::UpToDate => DiskState::Consistent,
        };
        let text = format!(
            "disk attached: {}, generation {}",
            self.disk, self.record.generation
        );
        self.event(Severity::Info, text);
        self.search_since = self.now;
        self.search();
        // Nothing else need ever happen to a node without a peer.
        self.settle_proposal();
    }

    /// The disk cannot be used.
    pub(super) fn fail_attach(&mut self, id: ErrorId, text: &str) {
        let refusal = Refusal::new(id, text);
        self.event(Severity::Error, format!("cannot use the disk: {refusal}"));
        self.refusal = Some(refusal);
        self.record = Superblock::unborn(ReplicaId::NONE, 0);
        self.disk = DiskState::Diskless;
        self.close();
    }

    /// A metadata operation of the attach failed.
    pub(super) fn attach_io_failed(&mut self, error: DiskError) {
        let text = match error {
            DiskError::Io => "the metadata cannot be read or written; replace the disk",
            DiskError::NoSpace => "no space for the metadata; make room on the store",
        };
        self.fail_attach(ErrorId::StoreUnavailable, text);
    }

    /// Nothing more is done with the store; it is let go when nothing of it is in flight.
    pub(super) fn close(&mut self) {
        self.phase = Phase::Closing;
        self.close_at_rest();
    }

    /// Lets go of the store. An operation still holds its buffer, and may land.
    pub(super) fn close_at_rest(&mut self) {
        if self.ops.len() == 0 {
            self.phase = Phase::Closed;
            self.out.push(Action::Detached);
        }
    }
}
