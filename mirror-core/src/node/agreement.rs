//! The handshake's exchange: facts, verdicts, and what each verdict makes durable before traffic.
//!
//! ```text
//!   both:     Hello -->  <-- Hello     (facts; from here on frozen)
//!   both:     Verdict --> <-- Verdict  (must mirror each other)
//!
//!   in sync:  flush, record            source:  shrink unless sole (R7), record
//!             Ready --> <-- Ready               SyncStart -->
//!                                      target:           drain, record Inconsistent
//!                                               <-- SyncBits ..., SyncReady
//! ```

use super::Node;
use super::boundary::{Body, ConnectionId, Severity};
use super::handshake::{Verdict, decide};
use super::link::{AfterLoss, Link, Mode};
use super::resync::{Copying, Resync};
use super::timer::Timer;
use super::transition::{AfterShrink, Kind};
use crate::error::{ErrorId, Refusal};
use crate::limits::AGREEMENT_PATIENCE;
use crate::types::{DiskState, Holders, Role};
use crate::wire::message::{Goodbye, Hello, Lineage};
use crate::wire::{FLAG_CHECKSUM, FLAG_WHOLE, FrameType, Header, VERSIONS};

/// A handshake under way.
#[derive(Debug)]
pub(super) struct Agreement {
    pub(super) connection: ConnectionId,
    /// What this node said; nothing in it may change until the agreement ends.
    mine: Hello,
    theirs: Option<Hello>,
    verdict: Option<Verdict>,
    their_verdict: Option<Vec<u8>>,
    /// Of the verdict "in sync": this side, the other side has recorded it.
    ready: (bool, bool),
    /// Of the verdict "source": the peer was told that it is the target.
    pub(super) offered: bool,
}

impl Node {
    /// States this node's facts when it is at rest.
    pub(super) fn try_greet(&mut self) {
        let Link::Arrived {
            connection,
            heard: true,
        } = self.link
        else {
            return;
        };
        let at_rest = self.transition.is_idle()
            && self.records.is_settled()
            && self.ops.peer_writes == 0
            && !self.is_ending_verify()
            && self.outdated_by.is_none()
            && !self.awaits_settling();
        if !at_rest {
            return;
        }
        let mine = self.hello();
        self.send_control(Header::bare(FrameType::Hello, 0, 0), mine.encode());
        self.link = Link::Agreeing(Box::new(Agreement {
            connection,
            mine,
            theirs: None,
            verdict: None,
            their_verdict: None,
            ready: (false, false),
            offered: false,
        }));
        let patience = if self.role == Role::Primary && !self.is_settled_source() {
            // Guests' writes wait until the verdict.
            self.config.stall_timeout
        } else {
            AGREEMENT_PATIENCE
        };
        self.timers.set(Timer::Handshake, self.now.after(patience));
        if let Some(theirs) = self.early_hello.take() {
            self.peer_greets(theirs);
        }
    }

    /// This node's facts.
    fn hello(&self) -> Hello {
        let record = &self.record;
        Hello {
            versions: VERSIONS,
            cluster: self.config.cluster.clone(),
            mirror_name: self.config.mirror.clone(),
            node: self.config.node.clone(),
            mirror: record.mirror,
            replica: record.replica,
            peer_replica: record.peer_replica,
            arbiter: self.arbiter(),
            data_size: record.data_size,
            mirror_size: record.mirror_size,
            generation: record.generation,
            ancestry: record.ancestry.clone(),
            unused_ancestors: record.unused_ancestors,
            holders: record.holders,
            // What an operator threw away is offered to nobody, whatever the disk still says.
            disk: if self.invalidating.is_some() {
                DiskState::Inconsistent
            } else {
                self.disk
            },
            role: self.role,
            was_primary: record.primary,
            used: record.used,
            stayed_up: !record.in_sync_boot.is_none() && record.in_sync_boot == self.boot,
            discard: self.discard && self.role == Role::Secondary,
            dirty_bytes: self.bitmap.dirty_bytes(),
        }
    }

    /// A frame of the handshake, or one that came before its time.
    pub(super) fn agreement_frame(&mut self, header: Header, body: Body) {
        let bytes = match body {
            Body::Control(bytes) => bytes,
            Body::None => Vec::new(),
            Body::Data(payload) => {
                self.out.push(super::boundary::Action::Release(payload));
                self.protocol_error("data before agreement");
                return;
            }
        };
        if header.kind == FrameType::Hello {
            match (Hello::decode(&bytes), &self.link) {
                (Ok(hello), Link::Arrived { .. }) => self.early_hello = Some(hello),
                (Ok(hello), _) => self.peer_greets(hello),
                (Err(error), _) => self.protocol_error(&error.to_string()),
            }
            return;
        }
        let Link::Agreeing(agreement) = &mut self.link else {
            self.protocol_error(&format!("{:?} before agreement", header.kind));
            return;
        };
        match header.kind {
            FrameType::Verdict if agreement.their_verdict.is_some() => {
                self.protocol_error("second verdict");
            }
            FrameType::Verdict => {
                agreement.their_verdict = Some(bytes);
                self.compare_verdicts();
            }
            FrameType::Ready => {
                agreement.ready.1 = true;
                self.both_ready();
            }
            FrameType::SyncStart => self.sync_start(&bytes),
            FrameType::SyncBits => {
                if agreement.offered && self.bitmap.merge(header.offset, &bytes) {
                    self.more_patience();
                    self.assure_talker();
                } else {
                    self.protocol_error("bitmap piece out of range or out of turn");
                }
            }
            FrameType::SyncReady => self.target_is_ready(header),
            kind => self.protocol_error(&format!("{kind:?} before agreement")),
        }
    }

    fn peer_greets(&mut self, theirs: Hello) {
        if let Err(refusal) = self.check_identity(&theirs) {
            self.refuse_peer(refusal);
            return;
        }
        let Link::Agreeing(agreement) = &mut self.link else {
            self.protocol_error("second hello");
            return;
        };
        if agreement.theirs.is_some() {
            self.protocol_error("second hello");
            return;
        }
        // A copy may be thrown away only for one that no crash has touched since: a peer that has
        // restarted may have lost what only this copy still has.
        if self.invalidating.is_some() && theirs.disk != DiskState::UpToDate {
            self.lose_link(
                "it has restarted, so nothing is invalidated",
                AfterLoss::Search,
            );
            return;
        }
        if self.lost_right_to(&theirs) {
            self.lose_link("it went on alone", AfterLoss::Search);
            self.lost_right(theirs.generation);
            return;
        }
        let Link::Agreeing(agreement) = &mut self.link else {
            return;
        };
        let verdict = decide(&agreement.mine, &theirs);
        agreement.verdict = Some(verdict);
        agreement.theirs = Some(theirs);
        self.send_control(Header::bare(FrameType::Verdict, 0, 0), verdict.encode());
        self.compare_verdicts();
    }

    fn check_identity(&self, theirs: &Hello) -> Result<(), Refusal> {
        let (oldest, newest) = theirs.versions;
        if newest < VERSIONS.0 || oldest > VERSIONS.1 {
            return Err(Refusal::new(
                ErrorId::PeerVersion,
                format!(
                    "{} speaks link versions {oldest} to {newest}, this node {} to {}; upgrade \
                     the older one",
                    self.config.peer, VERSIONS.0, VERSIONS.1
                ),
            ));
        }
        let config = &self.config;
        let expected = [
            ("cluster", &config.cluster, &theirs.cluster),
            ("mirror", &config.mirror, &theirs.mirror_name),
            ("node", &config.peer, &theirs.node),
        ];
        for (what, ours, their) in expected {
            if ours != their {
                return Err(Refusal::new(
                    ErrorId::PeerForeign,
                    format!(
                        "the peer says it is {what} `{}`, expected `{ours}`; compare the \
                         configuration files of both nodes",
                        crate::wire::message::text_from(their.as_bytes())
                    ),
                ));
            }
        }
        if theirs.arbiter != self.arbiter() {
            return Err(Refusal::new(
                ErrorId::PeerForeign,
                "the peer obeys another arbiter; compare the configuration files of both nodes",
            ));
        }
        Ok(())
    }

    /// Parts from the peer until an operator acts.
    pub(super) fn refuse_peer(&mut self, refusal: Refusal) {
        self.event(
            Severity::Error,
            format!("not joining {}: {refusal}", self.config.peer),
        );
        let goodbye = Goodbye {
            outdated_by: None,
            reason: refusal.to_string(),
        };
        self.part(&refusal.message, goodbye, AfterLoss::StandAlone);
        self.refusal = Some(refusal);
    }

    fn compare_verdicts(&mut self) {
        let Link::Agreeing(agreement) = &self.link else {
            return;
        };
        let (Some(verdict), Some(their_verdict)) = (agreement.verdict, &agreement.their_verdict)
        else {
            return;
        };
        if *their_verdict != verdict.mirrored().encode() {
            self.refuse_peer(Refusal::new(
                ErrorId::ImpossibleStates,
                "the two nodes read the handshake table differently; upgrade the older one",
            ));
            return;
        }
        match verdict {
            Verdict::Refuse(id) => {
                let refusal = Refusal::new(id, self.remedy(id));
                self.refuse_peer(refusal);
            }
            Verdict::Idle(id) => {
                if let Some(theirs) = self.take_their_hello() {
                    self.connected(theirs, Mode::Idle(id));
                }
            }
            Verdict::InSync => self.begin_transition(Kind::Agree),
            Verdict::Source { whole } => self.prepare_source(whole),
            // The source speaks next.
            Verdict::Target { .. } => {}
        }
    }

    /// What an operator can do about a refusal.
    pub(super) fn remedy(&self, id: ErrorId) -> String {
        let peer = &self.config.peer;
        let mirror = &self.config.mirror;
        match id {
            ErrorId::SplitBrain | ErrorId::Unrelated => format!(
                "{} choose whose data goes: there, run `kagami secondary {mirror}` and \
                 `kagami connect {mirror} --discard-my-data`; on the other node \
                 `kagami connect {mirror}`",
                id.summary()
            ),
            ErrorId::BothPrimary => format!(
                "this node and {peer} are both Primary; stop the service on the one whose data \
                 goes, run `kagami secondary {mirror}` and `kagami connect {mirror} \
                 --discard-my-data` there, then `kagami connect {mirror}` on the other"
            ),
            ErrorId::PrimaryIsBehind => format!(
                "the Primary's copy is older than the other node's; run `kagami secondary \
                 {mirror}` on the Primary, then `kagami connect {mirror}` on both"
            ),
            ErrorId::ClonedReplica => format!(
                "this disk and {peer}'s carry the same replica id; re-create one of them with \
                 `kagami create {mirror} --force`"
            ),
            ErrorId::PeerSize => format!(
                "the mirrored size does not fit both disks; re-create the smaller one on a disk \
                 of at least {} bytes",
                self.record.mirror_size
            ),
            ErrorId::NoGoodCopy => format!(
                "no side has a copy that is known to be whole and recent; choose one with \
                 `kagami primary {mirror} --force`"
            ),
            other => other.summary().to_owned(),
        }
    }

    /// No guest waits for this handshake any more, and the peer makes progress.
    fn more_patience(&mut self) {
        self.timers
            .set(Timer::Handshake, self.now.after(AGREEMENT_PATIENCE));
    }

    /// A sign of life for a peer whose bitmap takes long to send: its own pings stand behind that, and
    /// it would take the silence for a stall.
    fn assure_talker(&mut self) {
        if self.now >= self.heartbeat_due {
            self.heartbeat_due = self.now.after(self.heartbeat_interval());
            self.ping();
        }
    }

    fn take_their_hello(&mut self) -> Option<Hello> {
        if let Link::Agreeing(agreement) = &mut self.link {
            agreement.theirs.clone()
        } else {
            None
        }
    }

    /// What the peer stated, while agreeing.
    pub(super) fn agreeing_with(&self) -> Option<&Hello> {
        if let Link::Agreeing(agreement) = &self.link {
            agreement.theirs.as_ref()
        } else {
            None
        }
    }

    /// This side has recorded that the replicas are equal.
    pub(super) fn agreed_in_sync(&mut self) {
        self.by_checksum = false;
        self.disk = DiskState::UpToDate;
        if let Link::Agreeing(agreement) = &mut self.link {
            agreement.ready.0 = true;
            self.send(Header::bare(
                FrameType::Ready,
                self.record.generation.tag(),
                0,
            ));
            self.both_ready();
        }
    }

    fn both_ready(&mut self) {
        let Link::Agreeing(agreement) = &self.link else {
            return;
        };
        if agreement.verdict != Some(Verdict::InSync) {
            self.protocol_error("ready without being in sync");
        } else if agreement.ready == (true, true)
            && let Some(theirs) = self.take_their_hello()
        {
            self.connected(theirs, Mode::InSync);
        }
    }

    /// Before the peer becomes a target, neither record nor register may name it a holder (R7).
    fn prepare_source(&mut self, whole: bool) {
        // The register may name the peer, whose data an operator gave up: it must not any more.
        let named = self.agreeing_with().is_some_and(Hello::is_registered_sole);
        if self.record.holders == Holders::Sole && !named {
            self.begin_transition(Kind::OfferSync { whole });
        } else {
            self.begin_transition(Kind::Shrink {
                after: AfterShrink::OfferSync { whole },
            });
        }
    }

    /// The record is right: tells the peer that it is the target.
    pub(super) fn offer_sync(&mut self, whole: bool) {
        let Link::Agreeing(agreement) = &mut self.link else {
            return;
        };
        agreement.offered = true;
        self.more_patience();
        // The table has said that this copy is the one that counts.
        self.disk = DiskState::UpToDate;
        let lineage = self.lineage(whole);
        let generation = self.record.generation.tag();
        self.send_control(
            Header::bare(FrameType::SyncStart, generation, 0),
            lineage.encode(),
        );
    }

    /// The history this node's data belongs to.
    pub(super) fn lineage(&self, whole: bool) -> Lineage {
        Lineage {
            mirror: self.record.mirror,
            mirror_size: self.record.mirror_size,
            generation: self.record.generation,
            ancestry: self.record.ancestry.clone(),
            unused_ancestors: self.record.unused_ancestors,
            whole,
        }
    }

    /// The source has spoken: this node is the target.
    pub(super) fn sync_start(&mut self, bytes: &[u8]) {
        let lineage = match Lineage::decode(FrameType::SyncStart, bytes) {
            Ok(lineage) => lineage,
            Err(error) => return self.protocol_error(&error.to_string()),
        };
        let Link::Agreeing(agreement) = &self.link else {
            return;
        };
        let Some(theirs) = &agreement.theirs else {
            return;
        };
        let expected = matches!(agreement.verdict, Some(Verdict::Target { .. }));
        let peer_replica = theirs.replica;
        if !expected || !self.transition.is_idle() || self.role == Role::Primary {
            self.protocol_error("a resync that was not agreed upon");
        } else if lineage.mirror_size == 0 || lineage.mirror_size > self.record.data_size {
            self.protocol_error("a mirrored size that does not fit");
        } else {
            self.hand_findings_over();
            self.begin_transition(Kind::BecomeTarget {
                lineage,
                peer_replica,
            });
        }
    }

    /// This node recorded that it is the target: says what it knows to differ.
    pub(super) fn announce_target(&mut self, whole: bool) {
        let Some(theirs) = self.take_their_hello() else {
            return;
        };
        let generation = self.record.generation.tag();
        let everything = !whole && self.bitmap.is_all_dirty();
        if !everything {
            for index in 0..self.bitmap.blocks() {
                if let Some(bits) = self.bitmap.export(index) {
                    let header = Header {
                        offset: index,
                        ..Header::bare(FrameType::SyncBits, generation, 0)
                    };
                    self.send_control(header, bits);
                }
            }
        }
        let mut flags = if everything { FLAG_WHOLE } else { 0 };
        if self.by_checksum {
            flags |= FLAG_CHECKSUM;
        }
        self.send(Header {
            flags,
            ..Header::bare(FrameType::SyncReady, generation, 0)
        });
        self.connected(theirs, Mode::Target(Copying::new(self.now)));
    }

    fn target_is_ready(&mut self, header: Header) {
        let Some(theirs) = self.take_their_hello() else {
            return self.protocol_error("resync ready before the hello");
        };
        let offered = self.link.has_offered();
        let current = header.generation == self.record.generation.tag();
        if !offered || !current || !self.transition.is_idle() {
            return self.protocol_error("resync ready out of turn");
        }
        if header.flags & FLAG_WHOLE != 0 {
            self.bitmap.mark_all();
        }
        let by_checksum = self.by_checksum || header.flags & FLAG_CHECKSUM != 0;
        let resync = Resync::new(self.now, self.bitmap.dirty_bytes(), by_checksum);
        let total = resync.progress.total;
        self.connected(theirs, Mode::Source(resync));
        let generation = self.record.generation.tag();
        let header = Header {
            offset: total,
            ..Header::bare(FrameType::SyncTotal, generation, 0)
        };
        self.send(header);
    }

    /// Looks for the peer on an operator's word.
    pub(super) fn search_anew(&mut self) {
        self.refusal = None;
        self.parted = None;
        self.met_peer = false;
        self.search_since = self.now;
        self.search();
    }
}

impl Agreement {
    /// Why this node will not join the peer, if it has decided so.
    pub(super) fn refuses(&self) -> Option<ErrorId> {
        match self.verdict {
            Some(Verdict::Refuse(id)) => Some(id),
            _ => None,
        }
    }
}
