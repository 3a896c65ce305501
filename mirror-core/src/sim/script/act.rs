//! What nodes ask of the world: carried out at once, and told.

use super::disk::LEFTOVER;
use super::parse::{Ask, Host, Part};
use super::words::{listed, range, size};
use super::world::{Coming, DiskOp, DiskWork, Parcel, WireBody, World, is_worth_telling};
use crate::limits::SECTOR;
use crate::meta::activity_log::Transaction;
use crate::meta::superblock::Superblock;
use crate::meta::{ACTIVITY_LOG_BLOCKS, META_BLOCK, SLOTS};
use crate::node::boundary::{Action, Body, ConnectionId, DiskError, Input, OpId, Payload};
use crate::sim::buffers::{Checksum, digests};
use crate::sim::host::NAMES;
use crate::types::{ByteRange, ReplicaId};
use crate::wire::{FrameType, Header};

/// Where the bits that say what a frame is about begin ([`crate::wire::Header::id`]).
const TAG_SHIFT: u32 = 60;

impl World {
    pub fn perform(&mut self, host: Host, action: Action) {
        let name = NAMES[host];
        match action {
            Action::Send {
                connection,
                header,
                body,
            } => self.send(host, connection, header, body),
            Action::Close { connection } => self.close(host, connection),
            Action::StartConnecting => self.set_looking(host, true),
            Action::StopConnecting => self.set_looking(host, false),
            Action::AskArbiter { ask, request } => self.ask_arbiter(host, ask, request),
            Action::Serve(serving) => {
                if let Some(process) = &mut self.machines[host].process {
                    process.serving = serving;
                }
                let what = if serving { "serves" } else { "stops serving" };
                self.tell(format!("{name} {what}"));
            }
            Action::Complete { request, result } => {
                let result = match result {
                    Ok(None) => Ok(Vec::new()),
                    Ok(Some(payload)) => self.take_back(host, &payload).map_or(Ok(Vec::new()), Ok),
                    Err(error) => Err(error),
                };
                self.completed(host, request.0, result);
            }
            Action::Release(payload) => {
                self.take_back(host, &payload);
            }
            Action::CommandDone { result, .. } => {
                let text = match &result {
                    Ok(outcome) if outcome.warnings.is_empty() => "done".to_owned(),
                    Ok(_) => "done, with a warning".to_owned(),
                    Err(refusal) => format!("refused: {:?}: {}", refusal.id, refusal.message),
                };
                self.tell(format!("{name} answers: {text}"));
                let answer = result.map(|_| ()).map_err(|refusal| refusal.id);
                self.machines[host].answer = Some(answer);
            }
            Action::Event(event) => {
                let text = self.names.within(&event.text);
                self.tell(format!("{name} says: {text}"));
            }
            Action::Detached => {
                self.machines[host].process = None;
                self.tell(format!("{name} closes its disk"));
            }
            disk => self.disk_action(host, disk),
        }
    }

    fn set_looking(&mut self, host: Host, looking: bool) {
        if let Some(process) = &mut self.machines[host].process {
            process.looking = looking;
        }
    }

    /// The core gives a buffer up.
    fn take_back(&mut self, host: Host, payload: &Payload) -> Option<Vec<u64>> {
        let process = self.machines[host].process.as_mut()?;
        match process.buffers.release(payload) {
            Ok(stamps) => Some(stamps.to_vec()),
            Err(problem) => {
                self.violate(format!("{}: {problem}", NAMES[host]));
                None
            }
        }
    }

    fn disk_action(&mut self, host: Host, action: Action) {
        let Some(process) = &mut self.machines[host].process else {
            return;
        };
        let mut holds = None;
        let (op, what, text) = match action {
            Action::Read {
                op,
                range: at,
                checksum,
            } => {
                let wanted = if checksum {
                    Checksum::Wanted
                } else {
                    Checksum::NotWanted
                };
                let text = format!("disk read {}", range(at));
                (op, DiskWork::Read { range: at, wanted }, Some(text))
            }
            Action::Digest { op, range: at } => {
                let text = format!("disk digests {}", range(at));
                (op, DiskWork::Digest { range: at }, Some(text))
            }
            Action::Write {
                op,
                offset,
                payload,
                fua,
            } => {
                let stamps = match process.buffers.begin(&payload) {
                    Ok(stamps) => stamps.to_vec(),
                    Err(problem) => return self.violate(format!("{}: {problem}", NAMES[host])),
                };
                holds = Some(payload.buffer);
                let at = range(ByteRange::new(offset, payload.len.into()));
                let text = format!("disk write {} {at}{}", listed(&stamps), durably(fua));
                let start = offset;
                (op, DiskWork::Write { start, stamps, fua }, Some(text))
            }
            Action::Zero {
                op, range: at, fua, ..
            } => {
                let text = format!("disk zeroes {}{}", range(at), durably(fua));
                let stamps = vec![0; (at.len() / SECTOR) as usize];
                let start = at.start;
                (op, DiskWork::Write { start, stamps, fua }, Some(text))
            }
            Action::Flush { op } => {
                let covers = self.machines[host].disk.landings();
                (
                    op,
                    DiskWork::Flush { covers },
                    Some("disk flush".to_owned()),
                )
            }
            Action::MetaRead { op, offset, len } => {
                let (offset, len) = (offset as usize, len as usize);
                (op, DiskWork::MetaRead { offset, len }, None)
            }
            Action::MetaWrite { op, offset, bytes } => {
                let offset = offset as usize;
                let text = self.metadata_in_words(host, offset, &bytes);
                (op, DiskWork::MetaWrite { offset, bytes }, Some(text))
            }
            _ => return,
        };
        if let Some(process) = &mut self.machines[host].process {
            process.operations.insert(op, holds);
        }
        self.submit(host, DiskOp { op, what }, text);
    }

    /// What a write of metadata says.
    fn metadata_in_words(&mut self, host: Host, offset: usize, bytes: &[u8]) -> String {
        let block = offset as u64 / META_BLOCK;
        if block < SLOTS {
            return match Superblock::parse(bytes) {
                Ok(slot) => {
                    let text = self.names.record(host, slot.untrusted());
                    format!("records {text}")
                }
                Err(error) => format!("records what cannot be read: {error}"),
            };
        }
        if block < SLOTS + ACTIVITY_LOG_BLOCKS {
            let replica = self.replica(host);
            return match Transaction::decode(bytes, replica) {
                Some(log) => format!("log: extents {:?}", log.extents),
                None => "log that cannot be read".to_owned(),
            };
        }
        let mut metadata = self.machines[host].disk.metadata.clone();
        metadata[offset..][..bytes.len()].copy_from_slice(bytes);
        let dirty = super::checks::bitmap_ranges(&metadata, self.machines[host].disk.size);
        match dirty {
            Ok(ranges) if ranges.is_empty() => "bitmap: clean".to_owned(),
            Ok(ranges) => format!("bitmap: {}", ranges.join(" ")),
            Err(problem) => problem,
        }
    }

    pub fn replica(&self, host: Host) -> ReplicaId {
        let slot = &self.machines[host].disk.metadata[..META_BLOCK as usize];
        Superblock::parse(slot).map_or(ReplicaId::NONE, |slot| slot.untrusted().replica)
    }

    /// A disk operation takes effect and ends.
    pub fn complete(&mut self, host: Host, operation: DiskOp) {
        let DiskOp { op, what } = operation;
        let machine = &mut self.machines[host];
        let failed = machine.failing.contains(&what.part());
        let is_metadata = what.part() == Part::Metadata;
        let held = machine.process.as_mut().and_then(|process| {
            let held = process.operations.remove(&op).flatten();
            held.inspect(|buffer| process.buffers.end(*buffer))
        });
        debug_assert!(held.is_none() || !is_metadata);
        let input = if failed {
            self.tell(format!("{} disk: I/O error", NAMES[host]));
            match what {
                DiskWork::Digest { .. } => Input::Digested {
                    op,
                    result: Err(DiskError::Io),
                },
                _ if is_metadata => meta_done(op, Err(DiskError::Io)),
                _ => disk_done(op, Err(DiskError::Io)),
            }
        } else {
            self.take_effect(host, op, what)
        };
        self.coming.push_back(Coming::Input(host, input));
    }

    fn take_effect(&mut self, host: Host, op: OpId, what: DiskWork) -> Input {
        let machine = &mut self.machines[host];
        match what {
            DiskWork::Read { range, wanted } => {
                let stamps = machine.disk.read(range);
                let payload = machine
                    .process
                    .as_mut()
                    .map(|process| process.buffers.give(stamps.into(), wanted));
                disk_done(op, Ok(payload))
            }
            DiskWork::Digest { range } => Input::Digested {
                op,
                result: Ok(digests(&machine.disk.read(range))),
            },
            DiskWork::Write { start, stamps, fua } => {
                machine.disk.write(start, stamps, fua);
                disk_done(op, Ok(None))
            }
            DiskWork::Flush { covers } => {
                machine.disk.flush(covers);
                disk_done(op, Ok(None))
            }
            DiskWork::MetaRead { offset, len } => {
                let bytes = machine.disk.metadata[offset..][..len].to_vec();
                meta_done(op, Ok(bytes))
            }
            DiskWork::MetaWrite { offset, bytes } => {
                machine.disk.metadata[offset..][..bytes.len()].copy_from_slice(&bytes);
                meta_done(op, Ok(Vec::new()))
            }
        }
    }

    /// What is on a disk changes at rest; only a verify can notice.
    pub fn rot(&mut self, host: Host, range: ByteRange) {
        let leftovers = vec![LEFTOVER; (range.len() / SECTOR) as usize];
        self.machines[host].disk.write(range.start, leftovers, true);
        self.rotten.push(range);
    }

    fn send(&mut self, host: Host, connection: ConnectionId, header: Header, body: Body) {
        let Some(process) = &self.machines[host].process else {
            return;
        };
        let open = process.connection == Some(connection.0);
        let (body, text) = match body {
            Body::None => (
                WireBody::None,
                self.frame_in_words(host, &header, &[], None),
            ),
            Body::Control(bytes) => {
                let text = self.frame_in_words(host, &header, &bytes, None);
                (WireBody::Control(bytes), text)
            }
            Body::Data(payload) => match process.buffers.look(&payload) {
                Ok(stamps) => {
                    let text = self.frame_in_words(host, &header, &[], Some(&stamps));
                    (WireBody::Data(stamps), text)
                }
                Err(problem) => return self.violate(format!("{}: {problem}", NAMES[host])),
            },
        };
        let there = self.pair.filter(|pair| open && pair[host] == connection.0);
        let pipe = &mut self.pipes[host];
        if let Some(first) = &pipe.hold_from
            && there.is_some()
            && text.starts_with(first.as_str())
        {
            pipe.holding = true;
            pipe.hold_from = None;
        }
        let held = pipe.holding && there.is_some();
        if is_worth_telling(&header) {
            let note = match (there, held) {
                (None, _) => "  (lost)",
                (Some(_), true) => "  (held)",
                (Some(_), false) => "",
            };
            self.tell(format!(
                "{} -> {}  {text}{note}",
                NAMES[host],
                NAMES[1 - host]
            ));
        }
        if let Some(pair) = there {
            let to = pair[1 - host];
            let parcel = Parcel::Frame {
                to,
                header,
                body,
                text,
            };
            self.put_on_the_way(host, parcel);
        }
    }

    fn put_on_the_way(&mut self, from: Host, parcel: Parcel) {
        let pipe = &mut self.pipes[from];
        if pipe.holding {
            pipe.held.push_back(parcel);
        } else {
            self.coming.push_back(Coming::Parcel(1 - from, parcel));
        }
    }

    fn frame_in_words(
        &mut self,
        host: Host,
        header: &Header,
        bytes: &[u8],
        data: Option<&[u64]>,
    ) -> String {
        let label = match (header.kind, data) {
            (FrameType::Done, _) => self.labels.get(&(1 - host, header.id)).cloned(),
            (FrameType::Write | FrameType::SyncWrite, Some(stamps)) => Some(listed(stamps)),
            (FrameType::SyncZero, _) => Some("-".to_owned()),
            (FrameType::Zero | FrameType::Flush, _) => Some(self.label_of_request(host, header)),
            _ => None,
        };
        let label = label.unwrap_or_default();
        match header.kind {
            FrameType::Write | FrameType::Zero | FrameType::Flush => {
                self.labels.insert((host, header.id), label.clone());
            }
            FrameType::SyncWrite | FrameType::SyncZero => {
                let at = range(ByteRange::new(header.offset, header.length.into()));
                self.labels
                    .insert((host, header.id), format!("resync {at}"));
            }
            _ => {}
        }
        self.names.frame(host, header, bytes, &label)
    }

    /// Which request a flush or zeroing without data belongs to.
    fn label_of_request(&self, host: Host, header: &Header) -> String {
        match header.id >> TAG_SHIFT {
            1 => {}
            2 => return "to settle the log".to_owned(),
            3 => return "for the change of record".to_owned(),
            _ => return "of what was copied".to_owned(),
        }
        let fits = |ask: &Ask| match ask {
            Ask::Flush => header.kind == FrameType::Flush,
            Ask::Zero { range, .. } => {
                let piece = ByteRange::new(header.offset, header.length.into());
                header.kind == FrameType::Zero && range.overlaps(piece)
            }
            Ask::Read(_) | Ask::Write { .. } => false,
        };
        let mut open = self.requests.iter().filter(|(_, request)| {
            request.host == host && request.outcome.is_none() && fits(&request.ask)
        });
        let known = self.labels.get(&(host, header.id));
        let candidates: Vec<String> = open
            .by_ref()
            .map(|(number, _)| format!("#{number}"))
            .collect();
        match known.filter(|label| candidates.contains(label)) {
            Some(label) => label.clone(),
            None => candidates
                .iter()
                .find(|label| !self.labels.values().any(|other| other == *label))
                .or(candidates.first())
                .cloned()
                .unwrap_or_default(),
        }
    }

    /// A node closes its connection: what it sent before still arrives.
    fn close(&mut self, host: Host, connection: ConnectionId) {
        let Some(process) = &mut self.machines[host].process else {
            return;
        };
        if process.connection == Some(connection.0) {
            process.connection = None;
            if let Some(pair) = self.pair.filter(|pair| pair[host] == connection.0) {
                self.pair = None;
                self.send_end(1 - host, pair[1 - host]);
            }
        }
    }

    /// The other side learns, behind what was sent before, that the connection is closed.
    pub fn send_end(&mut self, host: Host, to: u64) {
        self.put_on_the_way(1 - host, Parcel::End { to });
    }

    /// Something reaches a host over the cable.
    pub fn arrive(&mut self, host: Host, parcel: Parcel) {
        let Some(process) = &mut self.machines[host].process else {
            return;
        };
        match parcel {
            Parcel::End { to } if process.connection == Some(to) => {
                process.connection = None;
                let connection = ConnectionId(to);
                self.feed(host, Input::LinkDown { connection });
            }
            Parcel::Frame {
                to, header, body, ..
            } if process.connection == Some(to) => {
                let body = match body {
                    WireBody::None => Body::None,
                    WireBody::Control(bytes) => Body::Control(bytes),
                    WireBody::Data(stamps) => {
                        Body::Data(process.buffers.give(stamps, Checksum::Wanted))
                    }
                };
                let connection = ConnectionId(to);
                self.feed(
                    host,
                    Input::Frame {
                        connection,
                        header,
                        body,
                    },
                );
            }
            // Of a connection that this host has closed or replaced.
            _ => {}
        }
    }

    fn completed(
        &mut self,
        host: Host,
        number: u64,
        result: Result<Vec<u64>, crate::node::boundary::GuestError>,
    ) {
        let text = match &result {
            Ok(stamps) if stamps.is_empty() => format!("acknowledges #{number}"),
            Ok(stamps) => format!("acknowledges #{number}: {}", listed(stamps)),
            Err(error) => format!("fails #{number}: {error:?}"),
        };
        self.tell(format!("{} {text}", NAMES[host]));
        let succeeded = result.is_ok();
        if let Some(request) = self.requests.get_mut(&number) {
            request.outcome = Some(result);
            if succeeded {
                self.promises.made(number, request.ask, &request.covers);
            }
        }
        if succeeded {
            self.check_acknowledgement(host, number);
            self.check_right(host, number);
        }
    }

    /// One line about each node, as its operator sees it.
    pub fn status_lines(&mut self) {
        for host in [0, 1] {
            let name = NAMES[host];
            let Some(process) = &self.machines[host].process else {
                self.answer(format!("{name} is down"));
                continue;
            };
            let status = process.node.status(self.now);
            let generation = match status.generation.as_str() {
                "" => "unborn".to_owned(),
                text => self.names.within(text),
            };
            let mut text = format!(
                "{name} {} {} (peer {}) {} {generation} {{{}}}",
                status.role,
                status.disk,
                status.peer_disk,
                status.link,
                status.holders.join(",")
            );
            if status.dirty_bytes > 0 {
                text.push_str(&format!(" dirty={}", size(status.dirty_bytes)));
            }
            if let Some(resync) = &status.resync {
                let held = if resync.paused { ", held" } else { "" };
                text.push_str(&format!(" (resync {:?}{held})", resync.direction).to_lowercase());
            }
            for reason in &status.reasons {
                let id = reason.split([':', ' ']).next().unwrap_or_default();
                match id.starts_with("KGM-") {
                    true => text.push_str(&format!(" {id}")),
                    false => text.push_str(&format!("; {reason}")),
                }
            }
            self.answer(text);
        }
    }
}

fn durably(fua: bool) -> &'static str {
    if fua { " fua" } else { "" }
}

fn disk_done(op: OpId, result: Result<Option<Payload>, DiskError>) -> Input {
    Input::DiskDone { op, result }
}

fn meta_done(op: OpId, result: Result<Vec<u8>, DiskError>) -> Input {
    Input::MetaDone { op, result }
}
