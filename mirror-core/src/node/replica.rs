//! The Secondary's side of replication: the peer's writes on this node's disk.
//!
//! Frames are served in the order of their arrival, but complete in any order: the Primary never
//! has two overlapping writes on their way. A frame that speaks in another generation than this
//! replica's is refused together with its connection (R3).

use super::Node;
use super::boundary::{Action, Body, ConnectionId, DiskError};
use super::link::Mode;
use super::operation::Purpose;
use super::records::Then;
use crate::limits::{SECTOR, ZERO_PIECE};
use crate::types::{ByteRange, Role};
use crate::wire::{FLAG_FUA, FLAG_MAY_UNMAP, FrameType, Header};

impl Node {
    /// A frame that works on this node's disk.
    pub(super) fn peer_request(&mut self, header: Header, body: Body) {
        if let Err(what) = self.check_peer_request(&header, &body) {
            self.release_body(body);
            self.protocol_error(what);
            return;
        }
        let marks_use = matches!(header.kind, FrameType::Write | FrameType::Zero);
        let must_wait = marks_use && !self.use_is_durable;
        let Some(session) = self.link.session_mut() else {
            return;
        };
        if must_wait || !session.held.is_empty() {
            session.held.push_back((header, body));
            if !self.record.used {
                self.record.used = true;
                // Who writes in it has recorded it.
                self.record.last_common = self.record.generation;
                self.commit(Then::Used);
            }
            return;
        }
        self.serve_peer(header, body);
    }

    /// Serves the frames that waited for the generation to be marked as used.
    pub(super) fn retry_held_frames(&mut self) {
        if !self.use_is_durable {
            return;
        }
        while let Some((header, body)) = self
            .link
            .session_mut()
            .and_then(|session| session.held.pop_front())
        {
            self.serve_peer(header, body);
        }
    }

    fn check_peer_request(&self, header: &Header, body: &Body) -> Result<(), &'static str> {
        let Some(session) = self.link.session() else {
            return Err("a write before agreement");
        };
        let resync = matches!(header.kind, FrameType::SyncWrite | FrameType::SyncZero);
        match session.mode {
            Mode::Target(_) => {}
            Mode::InSync if !resync => {
                let writes = header.kind != FrameType::Flush;
                if writes && session.peer.role != Role::Primary {
                    return Err("a write of a node that is not Primary");
                }
            }
            _ => return Err("a write that this replica has no part in"),
        }
        if self.role == Role::Primary {
            return Err("a write to a Primary");
        }
        if header.generation != self.record.generation.tag() {
            return Err("a write in another generation");
        }
        if header.kind == FrameType::Flush {
            return Ok(());
        }
        let range = ByteRange::new(header.offset, header.length.into());
        let aligned = range.start.is_multiple_of(SECTOR) && range.end.is_multiple_of(SECTOR);
        if !aligned || range.is_empty() || range.end > self.record.mirror_size {
            return Err("a write out of range");
        }
        match body {
            Body::Data(payload) if payload.crc != header.payload_crc => Err("damaged data"),
            Body::None if range.len() > ZERO_PIECE => Err("zeroing too much at once"),
            _ => Ok(()),
        }
    }

    fn serve_peer(&mut self, header: Header, body: Body) {
        let Some(connection) = self.link.connection() else {
            return self.release_body(body);
        };
        let id = header.id;
        let range = ByteRange::new(header.offset, header.length.into());
        let fua = header.flags & FLAG_FUA != 0;
        let may_unmap = header.flags & FLAG_MAY_UNMAP != 0;
        if header.kind == FrameType::Flush {
            let copied = self.copied_before_flush();
            self.flushing_copied.push_back(copied);
            let op = self.ops.start(Purpose::PeerFlush { connection, id });
            self.out.push(Action::Flush { op });
            return;
        }
        let resync = matches!(header.kind, FrameType::SyncWrite | FrameType::SyncZero);
        if resync {
            self.count_copied_payload(&body);
        }
        let op = self.ops.start(Purpose::Peer {
            connection,
            id,
            resync: resync.then_some(range),
        });
        match body {
            Body::Data(payload) => {
                self.out.push(Action::Write {
                    op,
                    offset: range.start,
                    payload,
                    fua,
                });
                // The operation holds the buffer from here on.
                self.out.push(Action::Release(payload));
            }
            _ => self.out.push(Action::Zero {
                op,
                range,
                may_unmap,
                fua,
            }),
        }
    }

    /// A write of the peer ended on this disk.
    pub(super) fn peer_write_done(
        &mut self,
        connection: ConnectionId,
        id: u64,
        resync: Option<ByteRange>,
        result: Result<(), DiskError>,
    ) {
        if let Err(error) = result {
            return self.fail_disk(error);
        }
        if let Some(range) = resync {
            self.copied(connection, range);
        }
        self.answer_peer(connection, id);
    }

    /// A flush of the peer ended on this disk.
    pub(super) fn peer_flush_done(
        &mut self,
        connection: ConnectionId,
        id: u64,
        result: Result<(), DiskError>,
    ) {
        let copied = self.flushing_copied.pop_front().unwrap_or_default();
        match result {
            Err(error) => self.fail_disk(error),
            Ok(()) => {
                if self.link.connection() == Some(connection) {
                    self.copied_durably(copied);
                }
                self.answer_peer(connection, id);
            }
        }
    }

    fn answer_peer(&mut self, connection: ConnectionId, id: u64) {
        // An answer belongs to the connection its request came over.
        if self.link.connection() == Some(connection) {
            let generation = self.record.generation.tag();
            self.send(Header::bare(FrameType::Done, generation, id));
        }
    }
}
