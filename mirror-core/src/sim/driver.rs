//! The driver: carries out a node's actions, and tells it what came of them, exactly as the daemon
//! does; and refuses what a daemon could not carry out.

use super::ambush::Moment;
use super::buffers::{Buffers, Checksum, digests};
use super::cluster::{Cluster, Event};
use super::disk::{Fill, Operation, Outcome};
use super::faults::DISK_SPIKE;
use super::host::NAMES;
use super::network::{Condition, Frame, Heard, WireBody};
use super::options::{Chance, DiskBias};
use crate::limits::{
    COPY_BURST, MAX_CONTROL_PAYLOAD, MAX_PAYLOAD, RESYNC_CHUNK, RESYNC_WINDOW_IDLE, SECTOR,
    ZERO_PIECE,
};
use crate::node::MetadataPlace;
use crate::node::boundary::{Action, Body, ConnectionId, DiskError, Input, OpId};
use crate::types::{ByteRange, Time};
use crate::wire::{FrameType, Header, PayloadKind};

/// What is to be reported when a disk operation ends.
pub(super) enum Purpose {
    Read(Checksum),
    Digest,
    /// A data operation, with the buffer it holds.
    Data(Option<u32>),
    Metadata,
    Superblock,
}

impl Cluster {
    /// Carries out an action. Fails where a daemon could not, or must not, carry it out.
    pub fn perform(&mut self, h: usize, action: Action) -> Result<(), String> {
        let now = self.now;
        let Some(process) = &mut self.hosts[h].process else {
            return Ok(());
        };
        match action {
            Action::Read { .. }
            | Action::Digest { .. }
            | Action::Write { .. }
            | Action::Zero { .. } => {
                return self.perform_on_data(h, action);
            }
            Action::Flush { op } => {
                process.operations.insert(op, Purpose::Data(None));
                return self.submit(h, op, Operation::Flush);
            }
            Action::MetaRead { .. } | Action::MetaWrite { .. } => {
                return self.perform_on_metadata(h, action);
            }
            Action::StartConnecting => self.network.start_connecting(h, &mut self.later),
            Action::StopConnecting => self.network.stop_connecting(now, h, &mut self.later),
            Action::Close { connection } => {
                self.network.close(now, h, connection, &mut self.later);
            }
            Action::Send {
                connection,
                header,
                body,
            } => return self.send(h, connection, header, body),
            Action::AskArbiter { ask, request } => self.ask_arbiter(h, ask, request),
            Action::Complete { request, result } => {
                let result = match result {
                    Ok(Some(payload)) => Ok(Some(process.buffers.release(&payload)?)),
                    Ok(None) => Ok(None),
                    Err(error) => Err(error),
                };
                return self.completed(h, request, result);
            }
            Action::Release(payload) => {
                process.buffers.release(&payload)?;
            }
            Action::CommandDone { command, result } => self.commanded(h, command, result),
            Action::Serve(serving) => {
                process.serving = serving;
                return self.serve_changed(h, serving);
            }
            Action::Detached => process.detached = true,
            Action::Event(_) => {}
        }
        Ok(())
    }

    fn perform_on_data(&mut self, h: usize, action: Action) -> Result<(), String> {
        let data_size = self.options.layout().data_size;
        let Some(process) = &mut self.hosts[h].process else {
            return Ok(());
        };
        match action {
            Action::Read {
                op,
                range,
                checksum,
            } => {
                within(range, data_size, u64::from(MAX_PAYLOAD))?;
                let wanted = match checksum {
                    true => Checksum::Wanted,
                    false => Checksum::NotWanted,
                };
                if checksum {
                    self.check_copy_rate(h, range.len())?;
                }
                let Some(process) = &mut self.hosts[h].process else {
                    return Ok(());
                };
                process.operations.insert(op, Purpose::Read(wanted));
                let (start, count) = (range.start / SECTOR, range.len() / SECTOR);
                self.submit(h, op, Operation::Read { start, count })
            }
            Action::Digest { op, range } => {
                within(range, data_size, RESYNC_CHUNK)?;
                process.operations.insert(op, Purpose::Digest);
                let (start, count) = (range.start / SECTOR, range.len() / SECTOR);
                self.submit(h, op, Operation::Read { start, count })
            }
            Action::Write {
                op,
                offset,
                payload,
                fua,
            } => {
                let range = ByteRange::new(offset, u64::from(payload.len));
                within(range, data_size, u64::from(MAX_PAYLOAD))?;
                let data = Fill::Stamps(process.buffers.begin(&payload)?);
                let purpose = Purpose::Data(Some(payload.buffer));
                process.operations.insert(op, purpose);
                let start = offset / SECTOR;
                self.submit(h, op, Operation::Write { start, data, fua })
            }
            Action::Zero { op, range, fua, .. } => {
                within(range, data_size, ZERO_PIECE)?;
                process.operations.insert(op, Purpose::Data(None));
                let start = range.start / SECTOR;
                let data = Fill::Zeroes(range.len() / SECTOR);
                self.submit(h, op, Operation::Write { start, data, fua })
            }
            other => Err(format!("{other:?} is not for the data")),
        }
    }

    /// R9: a resync is no faster than it may be, counted from its first chunk in a daemon's life. Chunks of
    /// one window may have waited for their ranges, and be read together.
    fn check_copy_rate(&mut self, h: usize, bytes: u64) -> Result<(), String> {
        let now = self.hosts[h].now(self.now);
        let (Some(rate), Some(process)) =
            (self.options.copy_rates().max, &mut self.hosts[h].process)
        else {
            return Ok(());
        };
        let (since, before) = *process.copied.get_or_insert((now, 0));
        process.copied = Some((since, before + bytes));
        let spent = (now.since(since) + COPY_BURST).as_nanos();
        let allowed = spent * u128::from(rate.get()) / 1_000_000_000;
        let together = RESYNC_WINDOW_IDLE as u64 * RESYNC_CHUNK;
        match u128::from(before) <= allowed + u128::from(together) {
            true => Ok(()),
            false => Err(format!(
                "R9: {before} bytes were copied, and {allowed} were due"
            )),
        }
    }

    fn perform_on_metadata(&mut self, h: usize, action: Action) -> Result<(), String> {
        let layout = self.options.layout();
        let Some(process) = &mut self.hosts[h].process else {
            return Ok(());
        };
        match action {
            Action::MetaRead { op, offset, len } => {
                process.operations.insert(op, Purpose::Metadata);
                let len = len as usize;
                self.within_metadata(offset, len)?;
                self.submit(h, op, Operation::MetaRead { offset, len })
            }
            Action::MetaWrite { op, offset, bytes } => {
                let slots = layout.slot_offset(0)..=layout.slot_offset(1);
                let purpose = match slots.contains(&offset) {
                    true => Purpose::Superblock,
                    false => Purpose::Metadata,
                };
                process.record_changes |= slots.contains(&offset);
                process.operations.insert(op, purpose);
                self.within_metadata(offset, bytes.len())?;
                self.trace.fold_bytes(&bytes);
                self.submit(h, op, Operation::MetaWrite { offset, bytes })
            }
            other => Err(format!("{other:?} is not for the metadata")),
        }
    }

    fn send(
        &mut self,
        h: usize,
        connection: ConnectionId,
        header: Header,
        body: Body,
    ) -> Result<(), String> {
        let Some(process) = &mut self.hosts[h].process else {
            return Ok(());
        };
        let body = match body {
            Body::None => WireBody::None,
            Body::Data(payload) => WireBody::Data(process.buffers.look(&payload)?),
            Body::Control(bytes) => WireBody::Control(bytes),
        };
        let header = header.encode();
        self.trace.fold_bytes(&header);
        let frame = Frame {
            header,
            body,
            condition: Condition::Sound,
        };
        self.network
            .send(self.now, h, connection, frame, &mut self.later);
        Ok(())
    }

    fn within_metadata(&self, offset: u64, len: usize) -> Result<(), String> {
        let layout = self.options.layout();
        let area = match self.options.metadata {
            MetadataPlace::Internal => layout.data_size..self.options.store_size,
            MetadataPlace::External => 0..layout.external_size(),
        };
        let end = offset + len as u64;
        if len == 0 || !len.is_multiple_of(4096) || !offset.is_multiple_of(4096) {
            Err(format!(
                "metadata operation at {offset} of {len} bytes is not aligned"
            ))
        } else if offset < area.start || end > area.end {
            Err(format!(
                "metadata operation at {offset} is outside the metadata"
            ))
        } else {
            Ok(())
        }
    }

    fn submit(&mut self, h: usize, op: OpId, operation: Operation) -> Result<(), String> {
        let mean = self.options.disk_latency.as_nanos() as u64;
        let host = &mut self.hosts[h];
        let mut delay = match self.options.chance {
            Chance::Drawn => host.rng.u64(mean / 4..mean * 2),
            Chance::Fixed => mean,
        };
        if matches!(operation, Operation::Flush) {
            delay *= 3;
        }
        let bias = self.options.disk_bias;
        if bias == DiskBias::of(&operation) {
            delay *= bias.factor();
        }
        if self.options.disk_spikes && host.rng.u16(0..500) == 0 {
            delay += host.rng.u64(0..DISK_SPIKE.as_nanos() as u64);
        }
        if self.now < host.slow_until {
            delay *= u64::from(host.slowness);
        }
        #[cfg(test)]
        let operation = self.sabotage.of(h, operation);
        let host = &mut self.hosts[h];
        if matches!(operation, Operation::Write { .. }) && self.now < host.stuck_until {
            delay += host.stuck_until.0 - self.now.0;
        }
        if delay > DISK_SPIKE.as_nanos() as u64 {
            host.held_until = host.held_until.max(Time(self.now.0 + delay));
        }
        let life = host.lives;
        let moment = self.moment_of(&operation);
        let writes = operation.writes();
        self.hosts[h].disk.submit(op.0, operation)?;
        if let Some((start, count)) = writes {
            self.check_marked_for_a_crash(start, count);
        }
        self.schedule(delay, Event::Disk { host: h, life, op });
        if let Some(moment) = moment {
            self.ambush_sees(h, moment, delay);
        }
        Ok(())
    }

    /// What a trap may take the operation for.
    fn moment_of(&self, operation: &Operation) -> Option<Moment> {
        let layout = self.options.layout();
        match operation {
            Operation::Flush => Some(Moment::Flush),
            Operation::MetaWrite { offset, .. } if *offset < layout.header_offset => {
                Some(Moment::Bitmap)
            }
            Operation::MetaWrite { offset, .. } if *offset <= layout.slot_offset(1) => {
                Some(Moment::Superblock)
            }
            Operation::MetaWrite { offset, .. } if *offset < layout.activity_log_end() => {
                Some(Moment::Log)
            }
            Operation::MetaWrite { .. } => Some(Moment::Bitmap),
            _ => None,
        }
    }

    /// A disk operation ends.
    pub fn disk_done(&mut self, h: usize, life: u32, op: OpId) {
        if self.hosts[h]
            .process
            .as_ref()
            .is_none_or(|p| p.life != life)
        {
            return;
        }
        let access = self.hosts[h].disk.access(op.0);
        if let Some(error) = access.and_then(|access| self.strikes(h, access)) {
            return self.disk_failed(h, op, error);
        }
        let host = &mut self.hosts[h];
        let Some(process) = host.process.as_mut() else {
            return;
        };
        let Some(outcome) = host.disk.complete(op.0) else {
            return;
        };
        let purpose = process.operations.remove(&op);
        let of_resync = matches!(purpose, Some(Purpose::Read(Checksum::Wanted)));
        let landed = matches!(purpose, Some(Purpose::Superblock));
        let marks_changed = matches!(purpose, Some(Purpose::Metadata));
        let input = match (outcome, purpose) {
            (Outcome::Read(stamps), Some(Purpose::Read(wanted))) => Input::DiskDone {
                op,
                result: Ok(Some(process.buffers.give(stamps.into(), wanted))),
            },
            (Outcome::Read(stamps), _) => Input::Digested {
                op,
                result: Ok(digests(&stamps)),
            },
            (Outcome::Meta(bytes), _) => Input::MetaDone {
                op,
                result: Ok(bytes),
            },
            (_, Some(Purpose::Metadata | Purpose::Superblock)) => Input::MetaDone {
                op,
                result: Ok(Vec::new()),
            },
            (_, purpose) => {
                if let Some(Purpose::Data(Some(buffer))) = purpose {
                    process.buffers.end(buffer);
                }
                Input::DiskDone {
                    op,
                    result: Ok(None),
                }
            }
        };
        if landed {
            self.check_new_generation(h);
        }
        if marks_changed {
            self.check_covered();
        }
        if of_resync {
            self.resync_read(h, life, input);
        } else {
            self.feed(h, input);
        }
        if landed {
            self.check_records();
        }
    }

    /// A disk operation ends with an error.
    fn disk_failed(&mut self, h: usize, op: OpId, error: DiskError) {
        let host = &mut self.hosts[h];
        let Some(process) = host.process.as_mut() else {
            return;
        };
        host.disk.fail(op.0);
        let purpose = process.operations.remove(&op);
        if matches!(purpose, Some(Purpose::Digest)) {
            self.doubts.note_unreadable();
        }
        let input = match purpose {
            Some(Purpose::Metadata | Purpose::Superblock) => Input::MetaDone {
                op,
                result: Err(error),
            },
            Some(Purpose::Digest) => Input::Digested {
                op,
                result: Err(error),
            },
            purpose => {
                if let Some(Purpose::Data(Some(buffer))) = purpose {
                    process.buffers.end(buffer);
                }
                Input::DiskDone {
                    op,
                    result: Err(error),
                }
            }
        };
        // It may have landed all the same.
        self.check_new_generation(h);
        self.feed(h, input);
    }

    /// The network tells a host something.
    pub fn heard(&mut self, h: usize, heard: Heard) {
        let Some(process) = &mut self.hosts[h].process else {
            return;
        };
        let input = match heard {
            Heard::Up(connection) => {
                process.fresh = false;
                Input::LinkUp { connection }
            }
            Heard::Down(connection) => Input::LinkDown { connection },
            Heard::Part(connection) => Input::Heard { connection },
            Heard::Frame(connection, frame) => return self.frame_heard(h, connection, frame),
        };
        self.feed(h, input);
    }

    fn frame_heard(&mut self, h: usize, connection: ConnectionId, frame: Frame) {
        let Some(process) = &mut self.hosts[h].process else {
            return;
        };
        let condition = frame.condition;
        let (header, body) = match receive(&mut process.buffers, frame) {
            Ok(received) => received,
            Err(_) if condition == Condition::Damaged => {
                self.tell(h, "refuses a damaged frame");
                self.network
                    .refuse(self.now, h, connection, &mut self.later);
                return self.flush_network();
            }
            Err(problem) => return self.fail(format!("to {}: {problem}", NAMES[h])),
        };
        let (kind, paused) = (header.kind, self.hosts[h].paused.is_some());
        if let Some(moment) = Moment::of_frame(kind) {
            let span = self.options.network_delay.as_nanos() as u64;
            self.ambush_sees(h, moment, span);
        }
        let must_refuse = condition != Condition::Sound
            && self.connected(h)
            && !paused
            && !is_harmless(kind)
            && self.network.is_in_use(h, connection)
            && self.hosts[h].crash_in.is_none();
        let input = Input::Frame {
            connection,
            header,
            body,
        };
        self.feed(h, input);
        if must_refuse && self.network.is_in_use(h, connection) {
            let condition = format!("{condition:?}").to_lowercase();
            self.fail(format!(
                "{} goes on after a {condition} {kind:?} frame",
                NAMES[h]
            ));
        }
    }
}

/// A driver that breaks its contract, for tests of what comes after a violation.
#[cfg(test)]
#[derive(Clone, Copy)]
pub(super) enum Sabotage {
    None,
    FlushesDropped { host: usize },
}

#[cfg(test)]
impl Sabotage {
    fn of(self, h: usize, operation: Operation) -> Operation {
        match (self, operation) {
            (Sabotage::FlushesDropped { host }, Operation::Flush) if host == h => {
                Operation::Write {
                    start: 0,
                    data: Fill::Zeroes(0),
                    fua: false,
                }
            }
            (_, operation) => operation,
        }
    }
}

/// Frames that may say anything and still change nothing that counts.
fn is_harmless(kind: FrameType) -> bool {
    use FrameType::*;
    matches!(kind, Ping | Pong | SyncTotal)
}

/// What a driver does with the bytes of a frame before the core sees it. The checksum of data is
/// the core's to compare.
fn receive(buffers: &mut Buffers, frame: Frame) -> Result<(Header, Body), String> {
    let header = Header::decode(&frame.header).map_err(|error| error.to_string())?;
    let (len, crc, body) = match frame.body {
        WireBody::None => (0, 0, Body::None),
        WireBody::Data(stamps) => {
            let payload = buffers.give(stamps, Checksum::Wanted);
            (payload.len, payload.crc, Body::Data(payload))
        }
        WireBody::Control(bytes) => {
            let (len, crc) = (bytes.len() as u32, crc32fast::hash(&bytes));
            (len, crc, Body::Control(bytes))
        }
    };
    let fits = match (header.kind.payload_kind(), &body) {
        (PayloadKind::Data { .. }, Body::Data(_)) | (PayloadKind::None, Body::None) => true,
        (PayloadKind::Control { .. }, Body::Control(_)) => len <= MAX_CONTROL_PAYLOAD,
        (PayloadKind::Control { .. }, Body::None) => true,
        _ => false,
    };
    if !fits || header.payload_len != len {
        Err(format!(
            "{:?} frame with a payload of {len} bytes",
            header.kind
        ))
    } else if header.payload_crc != crc && !matches!(body, Body::Data(_)) {
        Err(format!(
            "{:?} frame whose payload has another checksum",
            header.kind
        ))
    } else {
        Ok((header, body))
    }
}

fn within(range: ByteRange, size: u64, most: u64) -> Result<(), String> {
    let aligned = range.start.is_multiple_of(SECTOR) && range.end.is_multiple_of(SECTOR);
    if range.start >= range.end || range.end > size || range.len() > most || !aligned {
        Err(format!("disk operation on {range:?} of {size} bytes"))
    } else {
        Ok(())
    }
}
