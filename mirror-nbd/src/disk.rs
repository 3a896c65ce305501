//! The core's disk operations: each becomes one operation of the backend, or a short chain.
//!
//! Chains are what the kernel leaves to its callers: the rest of a short transfer, a flush where
//! a durable write is not known, plain zeroes where a store cannot give space back.

use crate::backend::{Backend, Operation, Token, Zeroing};
use crate::backing::{Outline, Store};
use crate::buffers::{Buffer, Origin, Payloads, Pool};
use crate::slots::Slots;
use mirror_core::limits::BLOCK;
use mirror_core::node::boundary::{DiskError, Input, OpId, Payload};
use mirror_core::types::{ByteRange, Digest};
use nix::errno::Errno;
use twox_hash::XxHash3_128;

/// Zeroes are written in pieces of this many bytes, from one buffer that all share.
const ZERO_PIECE: u64 = 1 << 20;

/// The disk of one mirror and what is under way on it.
pub struct Disk {
    store: Store,
    mirror: String,
    pool: Pool,
    jobs: Slots<Job>,
    abilities: Abilities,
    zeroes: Option<Buffer>,
}

/// What the store was not yet seen to refuse.
struct Abilities {
    punch_hole: bool,
    zero_range: bool,
    durable_write: bool,
}

struct Job {
    op: OpId,
    work: Work,
}

enum Work {
    Read { len: u32, checksum: bool },
    Digest { len: u32 },
    Write { durable: bool },
    Zero(ZeroJob),
    Flush,
    MetaRead,
    MetaWrite,
}

struct ZeroJob {
    /// What is still to be zeroed.
    left: ByteRange,
    fua: bool,
    /// Ways not tried yet; plain writing comes last.
    ways: [Option<Zeroing>; 2],
}

impl Disk {
    /// A disk at rest.
    pub fn new(mirror: String, store: Store, pool: Pool) -> Disk {
        let abilities = Abilities {
            punch_hole: true,
            zero_range: true,
            durable_write: store.durable_writes,
        };
        Disk {
            store,
            mirror,
            pool,
            jobs: Slots::default(),
            abilities,
            zeroes: None,
        }
    }

    /// Bytes of the data store.
    pub fn size(&self) -> u64 {
        self.store.size
    }

    /// What guests may ask about the data store.
    pub fn outline(&self) -> Outline {
        self.store.outline()
    }

    /// Carries out `Action::Read`.
    pub fn read(&mut self, op: OpId, range: ByteRange, checksum: bool, backend: &mut impl Backend) {
        let len = range.len() as u32;
        self.begin_reading(op, Work::Read { len, checksum }, range, backend);
    }

    /// Carries out `Action::Digest`.
    pub fn digest(&mut self, op: OpId, range: ByteRange, backend: &mut impl Backend) {
        let len = range.len() as u32;
        self.begin_reading(op, Work::Digest { len }, range, backend);
    }

    fn begin_reading(
        &mut self,
        op: OpId,
        work: Work,
        range: ByteRange,
        backend: &mut impl Backend,
    ) {
        let len = range.len() as u32;
        let token = self.begin(op, work);
        backend.submit(
            token,
            Operation::Read {
                file: self.store.data.clone(),
                offset: range.start,
                buffer: self.pool.fresh(len as usize),
                from: 0,
                to: len,
            },
        );
    }

    /// Carries out `Action::Write`.
    pub fn write(
        &mut self,
        op: OpId,
        offset: u64,
        buffer: Buffer,
        len: u32,
        fua: bool,
        backend: &mut impl Backend,
    ) {
        let token = self.begin(op, Work::Write { durable: fua });
        backend.submit(
            token,
            Operation::Write {
                file: self.store.data.clone(),
                offset,
                buffer,
                from: 0,
                to: len,
                durable: fua && self.abilities.durable_write,
            },
        );
    }

    /// Carries out `Action::Zero`.
    pub fn zero(
        &mut self,
        op: OpId,
        range: ByteRange,
        may_unmap: bool,
        fua: bool,
        backend: &mut impl Backend,
    ) {
        let punch = self.abilities.punch_hole.then_some(Zeroing::PunchHole);
        let range_zero = self.abilities.zero_range.then_some(Zeroing::ZeroRange);
        let ways = if may_unmap {
            [punch, range_zero]
        } else {
            [range_zero, punch]
        };
        let mut job = ZeroJob {
            left: range,
            fua,
            ways,
        };
        let operation = self.zero_operation(&mut job);
        let token = self.begin(op, Work::Zero(job));
        backend.submit(token, operation);
    }

    /// Carries out `Action::Flush`.
    pub fn flush(&mut self, op: OpId, backend: &mut impl Backend) {
        let token = self.begin(op, Work::Flush);
        let file = self.store.data.clone();
        backend.submit(token, Operation::Sync { file });
    }

    /// Carries out `Action::MetaRead`.
    pub fn meta_read(&mut self, op: OpId, offset: u64, len: u32, backend: &mut impl Backend) {
        let token = self.begin(op, Work::MetaRead);
        backend.submit(
            token,
            Operation::Read {
                file: self.store.metadata().clone(),
                offset,
                buffer: self.pool.fresh(len as usize),
                from: 0,
                to: len,
            },
        );
    }

    /// Carries out `Action::MetaWrite`.
    pub fn meta_write(&mut self, op: OpId, offset: u64, bytes: &[u8], backend: &mut impl Backend) {
        let mut buffer = self.pool.fresh(bytes.len());
        buffer.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
        let token = self.begin(op, Work::MetaWrite);
        backend.submit(
            token,
            Operation::Write {
                file: self.store.metadata().clone(),
                offset,
                buffer: buffer.freeze(),
                from: 0,
                to: bytes.len() as u32,
                durable: self.abilities.durable_write,
            },
        );
    }

    /// An operation of a slot ended: what to tell the core, unless the job goes on.
    pub fn ended(
        &mut self,
        slot: u32,
        operation: Operation,
        result: Result<u32, Errno>,
        payloads: &mut Payloads,
        backend: &mut impl Backend,
    ) -> Option<Input> {
        let token = Token::Disk(slot);
        let moved = match result {
            Ok(moved) => moved,
            Err(Errno::EINTR | Errno::EAGAIN) if !reports_earlier_writes(&operation) => {
                backend.submit(token, operation);
                return None;
            }
            Err(errno) => return self.failed(slot, operation, errno, backend),
        };
        match operation {
            Operation::Read {
                file,
                offset,
                buffer,
                from,
                to,
            } => {
                if from + moved < to {
                    if moved == 0 {
                        return Some(self.give_up(slot, Errno::EIO, "reading behind its end"));
                    }
                    let rest = Operation::Read {
                        file,
                        offset: offset + u64::from(moved),
                        buffer,
                        from: from + moved,
                        to,
                    };
                    backend.submit(token, rest);
                    return None;
                }
                let job = self.jobs.remove(slot)?;
                let op = job.op;
                Some(match job.work {
                    Work::Read { len, checksum } => {
                        let payload = lend_read(payloads, buffer.freeze(), len, checksum);
                        let result = Ok(Some(payload));
                        Input::DiskDone { op, result }
                    }
                    Work::Digest { len } => {
                        let result = Ok(digests(&buffer.bytes()[..len as usize]));
                        Input::Digested { op, result }
                    }
                    _ => {
                        let result = Ok(buffer.bytes()[..to as usize].to_vec());
                        Input::MetaDone { op, result }
                    }
                })
            }
            Operation::Write {
                file,
                offset,
                buffer,
                from,
                to,
                durable,
            } => {
                if from + moved < to {
                    if moved == 0 {
                        return Some(self.give_up(slot, Errno::ENOSPC, "writing"));
                    }
                    let rest = Operation::Write {
                        file,
                        offset: offset + u64::from(moved),
                        buffer,
                        from: from + moved,
                        to,
                        durable,
                    };
                    backend.submit(token, rest);
                    return None;
                }
                self.wrote(slot, file, u64::from(to), durable, backend)
            }
            Operation::Zero { file, len, .. } => self.zeroed(slot, file, len, backend),
            Operation::Sync { .. } => self.done(slot),
            _ => None,
        }
    }

    fn begin(&mut self, op: OpId, work: Work) -> Token {
        Token::Disk(self.jobs.insert(Job { op, work }))
    }

    /// A whole piece was written.
    fn wrote(
        &mut self,
        slot: u32,
        file: crate::backend::Descriptor,
        len: u64,
        durable: bool,
        backend: &mut impl Backend,
    ) -> Option<Input> {
        let wants_sync = match &self.jobs.get(slot)?.work {
            Work::Zero(_) => return self.zeroed(slot, file, len, backend),
            Work::Write { durable } => *durable,
            _ => true,
        };
        if wants_sync && !durable {
            backend.submit(Token::Disk(slot), Operation::Sync { file });
            return None;
        }
        self.done(slot)
    }

    /// `len` more bytes read as zeroes.
    fn zeroed(
        &mut self,
        slot: u32,
        file: crate::backend::Descriptor,
        len: u64,
        backend: &mut impl Backend,
    ) -> Option<Input> {
        let job = self.jobs.get_mut(slot)?;
        let Work::Zero(zero) = &mut job.work else {
            return None;
        };
        zero.left.start += len;
        if !zero.left.is_empty() {
            self.go_on_zeroing(slot, backend);
            return None;
        }
        if zero.fua {
            backend.submit(Token::Disk(slot), Operation::Sync { file });
            return None;
        }
        self.done(slot)
    }

    fn go_on_zeroing(&mut self, slot: u32, backend: &mut impl Backend) {
        let Some(mut job) = self.jobs.take(slot) else {
            return;
        };
        if let Work::Zero(zero) = &mut job.work {
            let operation = self.zero_operation(zero);
            backend.submit(Token::Disk(slot), operation);
        }
        self.jobs.put_back(slot, job);
    }

    fn zero_operation(&mut self, zero: &mut ZeroJob) -> Operation {
        let file = self.store.data.clone();
        let offset = zero.left.start;
        if let Some(how) = zero.ways.into_iter().flatten().next() {
            let len = zero.left.len();
            return Operation::Zero {
                file,
                offset,
                len,
                how,
            };
        }
        let buffer = self
            .zeroes
            .get_or_insert_with(|| {
                let mut fresh = self.pool.fresh(ZERO_PIECE as usize);
                fresh.bytes_mut().fill(0);
                fresh.freeze()
            })
            .clone();
        Operation::Write {
            file,
            offset,
            buffer,
            from: 0,
            to: zero.left.len().min(ZERO_PIECE) as u32,
            durable: false,
        }
    }

    fn failed(
        &mut self,
        slot: u32,
        operation: Operation,
        errno: Errno,
        backend: &mut impl Backend,
    ) -> Option<Input> {
        let unknown = matches!(errno, Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL);
        match operation {
            Operation::Zero { how, .. } if unknown => {
                // EINVAL may be about this range alone.
                if errno != Errno::EINVAL {
                    match how {
                        Zeroing::PunchHole => self.abilities.punch_hole = false,
                        Zeroing::ZeroRange => self.abilities.zero_range = false,
                    }
                }
                if let Some(Work::Zero(zero)) = self.jobs.get_mut(slot).map(|job| &mut job.work) {
                    for way in &mut zero.ways {
                        *way = way.filter(|way| *way != how);
                    }
                }
                self.go_on_zeroing(slot, backend);
                None
            }
            Operation::Write {
                file,
                offset,
                buffer,
                from,
                to,
                durable: true,
            } if errno == Errno::EOPNOTSUPP => {
                self.abilities.durable_write = false;
                let again = Operation::Write {
                    file,
                    offset,
                    buffer,
                    from,
                    to,
                    durable: false,
                };
                backend.submit(Token::Disk(slot), again);
                None
            }
            Operation::Read { .. } => Some(self.give_up(slot, errno, "reading")),
            Operation::Write { .. } => Some(self.give_up(slot, errno, "writing")),
            Operation::Zero { .. } => Some(self.give_up(slot, errno, "zeroing")),
            Operation::Sync { .. } => Some(self.give_up(slot, errno, "flushing")),
            _ => None,
        }
    }

    fn give_up(&mut self, slot: u32, errno: Errno, doing: &str) -> Input {
        log::error!("{}: {doing} the disk failed: {errno}", self.mirror);
        let error = match errno {
            Errno::ENOSPC | Errno::EDQUOT => DiskError::NoSpace,
            _ => DiskError::Io,
        };
        let job = self.jobs.remove(slot).expect("its operation just ended");
        report(job, Err(error))
    }

    fn done(&mut self, slot: u32) -> Option<Input> {
        let job = self.jobs.remove(slot)?;
        Some(report(job, Ok(())))
    }
}

/// Whether the kernel may tell with this operation, and only once, that an earlier write was lost:
/// after any error such an operation would succeed without the data being there.
fn reports_earlier_writes(operation: &Operation) -> bool {
    matches!(
        operation,
        Operation::Sync { .. } | Operation::Write { durable: true, .. }
    )
}

fn report(job: Job, result: Result<(), DiskError>) -> Input {
    let op = job.op;
    match job.work {
        Work::MetaRead | Work::MetaWrite => Input::MetaDone {
            op,
            result: result.map(|()| Vec::new()),
        },
        Work::Digest { .. } => Input::Digested {
            op,
            result: result.map(|()| Vec::new()),
        },
        _ => Input::DiskDone {
            op,
            result: result.map(|()| None),
        },
    }
}

fn lend_read(payloads: &mut Payloads, buffer: Buffer, len: u32, checksum: bool) -> Payload {
    let (crc, zero) = if checksum {
        let data = &buffer.bytes()[..len as usize];
        (crc32fast::hash(data), is_zero(data))
    } else {
        (0, false)
    };
    let payload = payloads.lend(buffer, len, crc, Origin::Local);
    Payload { zero, ..payload }
}

/// A digest of each block.
fn digests(data: &[u8]) -> Vec<Digest> {
    data.chunks(BLOCK as usize)
        .map(|block| Digest(XxHash3_128::oneshot(block)))
        .collect()
}

/// Whether all bytes are zero: cheap for data that is not, because it ends at the first word.
fn is_zero(data: &[u8]) -> bool {
    data.chunks(4096)
        .all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
mod tests;
