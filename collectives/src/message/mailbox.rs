//! A rank's messages, as a state machine: what it sends and wants in, bytes to and from each other rank.
//!
//! ```text
//! sender                      receiver
//! offer, small: all of it ->  kept, or given to whoever has asked
//!                  <- done    where that was taken
//! offer ------------------->  kept, or held against who has asked
//!                  <- want    once somebody has
//! chunks ------------------>  put where they belong
//!                  <- done
//! ```
//!
//! What lies in memory that the receiver may read does not travel:
//!
//! ```text
//! lies there -------------->  held against who has asked, and copied
//!                  <- done
//! kept -------------------->  only now it is known that nobody else wrote there meanwhile
//! ```
//!
//! In place of `want` or `done` comes `refused`, where the receiver asked for other elements or another length. That ends this
//! message at both ranks, and nothing else.
//!
//! # Invariants
//! 1. Of messages with one tag between two ranks, the first that was sent is given to the first who asked; other tags do not
//!    wait for it.
//! 2. Of a message that nobody has asked for, nothing is here but its offer, and what came with that: of one sender
//!    [`UNASKED_BYTES_MAX`] at most. Senders keep count, so they never wait for room and nothing is turned away.
//! 3. A send is done when the receiver has all of it, so neither rank has more than [`PENDING_MAX`] under way.
//! 4. What a peer says is taken only where it fits what was said before; so no byte is written twice, or elsewhere.
//!
//! Deliberately absent: time, and links. Who drives it watches the clock, and makes a link when [`Mailbox::needs`] says so.

use bytes::Bytes;

use super::letters::{Intake, Letter};
use super::peer::{Asked, Copying, Offer, Peer, Sending, Taking, Way};
use crate::collective::{Collective, OpId};
use crate::error::{CollectiveError, Disagreement, Payload, Phase, Place, TransportError};
use crate::fault::Fault;
use crate::frame::Header;
use crate::frame_reader::Part;
use crate::group::PENDING_MAX;
use crate::rank::Rank;
use crate::ring::Ring;

/// A message up to this size travels with its offer.
pub(crate) const SMALL_BYTES: usize = 16 << 10;
/// What came with offers and lies here, of one sender, at most.
pub(crate) const UNASKED_BYTES_MAX: usize = 1 << 20;

/// What a frame says, in the place of its pass.
const OFFER: u32 = 0;
const WANT: u32 = 1;
const CHUNK: u32 = 2;
const DONE: u32 = 3;
const REFUSED: u32 = 4;
const LIES: u32 = 5;
const KEPT: u32 = 6;

/// All that one rank has to do with the others, one by one.
pub(crate) struct Mailbox {
    ring: Ring,
    chunk_bytes: u32,
    peers: Vec<Peer>,
    /// Sends and receives that are not done.
    pending: usize,
    /// What is to be copied from other ranks' memory.
    copies: Vec<Copying>,
    fault: Option<Fault>,
}

impl Mailbox {
    /// Chunks have `chunk_bytes` at most, the same on all ranks.
    pub(crate) fn new(ring: Ring, chunk_bytes: u32) -> Self {
        let peers = (0..ring.world_size().get()).map(|_| Peer::new(chunk_bytes)).collect();
        Self { ring, chunk_bytes, peers, pending: 0, copies: Vec::new(), fault: None }
    }

    /// Where the next message to a rank begins.
    pub(crate) fn next_send(&self, to: Rank, tag: u32) -> Place {
        self.place(self.peers[to.0 as usize].next_sent, tag)
    }

    /// Where the next message that is asked of a rank begins.
    pub(crate) fn next_receive(&self, from: Rank, tag: u32) -> Place {
        self.place(self.peers[from.0 as usize].next_asked, tag)
    }

    /// How many sends and receives are not done.
    pub(crate) fn pending(&self) -> usize {
        self.pending
    }

    /// Why nothing works any more, if so.
    pub(crate) fn fault(&self) -> Option<&Fault> {
        self.fault.as_ref()
    }

    /// Whether anything is under way between this rank and that one.
    pub(crate) fn needs(&self, peer: Rank) -> bool {
        let peer = &self.peers[peer.0 as usize];
        let receives = peer.asked.len() + peer.taking.len() + peer.copying + peer.copied.len();
        receives + peer.sends.len() > 0
    }

    /// Whether there is something to be sent to that rank.
    pub(crate) fn has_outgoing(&self, to: Rank) -> bool {
        let peer = &self.peers[to.0 as usize];
        !(peer.said.is_empty() && peer.wanted.is_empty())
    }

    /// Sends to another rank.
    pub(crate) fn send(&mut self, to: Rank, tag: u32, letter: Letter) {
        let at = self.next_send(to, tag);
        self.end_if_departed(to);
        if let Some(fault) = &self.fault {
            return (letter.told)(Err(fault.at(at)));
        }
        let room = SMALL_BYTES.min(self.chunk_bytes as usize);
        let peer = &mut self.peers[to.0 as usize];
        let length = letter.bytes.len();
        let is_small = length <= room && peer.lent_bytes + length <= UNASKED_BYTES_MAX;
        let header = header(&self.ring, at.op, letter.payload);
        let (way, what, index, with) = match (is_small, letter.lies_at) {
            (true, _) => (Way::WithOffer, OFFER, 0, letter.bytes.clone()),
            (false, None) => (Way::Offered, OFFER, 0, Bytes::new()),
            (false, Some(place)) => (Way::Lying, LIES, place, Bytes::new()),
        };
        peer.lent_bytes += with.len();
        peer.say(what, Header { index, ..header }, with);
        peer.sends.insert(at.op.sequence, Sending { tag, letter, way });
        peer.next_sent += 1;
        self.pending += 1;
    }

    /// Receives from another rank.
    pub(crate) fn receive(&mut self, from: Rank, tag: u32, intake: Box<dyn Intake>) {
        let at = self.next_receive(from, tag);
        let peer = &mut self.peers[from.0 as usize];
        peer.next_asked += 1;
        let asked = Asked { number: at.op.sequence, tag, intake };
        let offered = peer.unasked.iter().position(|offer| offer.tag == tag);
        if let Some(offer) = offered.and_then(|index| peer.unasked.remove(index)) {
            peer.unasked_bytes -= offer.small.as_ref().map_or(0, Vec::len);
            self.pending += 1;
            return self.bring_together(from, offer, asked);
        }
        self.end_if_departed(from);
        if let Some(fault) = &self.fault {
            return asked.intake.resolve(Err(fault.at(at)));
        }
        self.pending += 1;
        self.peers[from.0 as usize].asked.push_back(asked);
    }

    /// What to send to a rank next, header first.
    pub(crate) fn next_outgoing(&mut self, to: Rank) -> Option<Vec<Bytes>> {
        let peer = &mut self.peers[to.0 as usize];
        if let Some((header, payload)) = peer.said.pop_front() {
            return Some([header.encode(), payload].into_iter().filter(|piece| !piece.is_empty()).collect());
        }
        let number = *peer.wanted.front()?;
        let Some(Sending { tag, letter, way: Way::Wanted(sent) }) = peer.sends.get_mut(&number) else {
            peer.wanted.pop_front();
            return None;
        };
        let size = letter.payload.element.bytes();
        let chunk = self.chunk_bytes as usize / size * size;
        let length = chunk.min(letter.bytes.len() - *sent);
        let op = OpId { sequence: number, collective: Collective::Message { tag: *tag } };
        let header = Header {
            pass: CHUNK,
            index: (*sent / chunk) as u32,
            offset: *sent as u64,
            length: length as u32,
            ..header(&self.ring, op, letter.payload)
        };
        let piece = letter.bytes.slice(*sent..*sent + length);
        *sent += length;
        if *sent == letter.bytes.len() {
            peer.wanted.pop_front();
        }
        Some(vec![header.encode(), piece])
    }

    /// Takes bytes that a rank sent.
    ///
    /// # Errors
    /// Where they are not what may come from there.
    pub(crate) fn absorb(&mut self, from: Rank, piece: &mut Bytes) -> Result<(), Disagreement> {
        while let Some(part) = self.peers[from.0 as usize].reader.next(piece)? {
            match part {
                Part::Header(header) => {
                    self.check(from, &header)?;
                    self.peers[from.0 as usize].current = Some((header, 0));
                    if header.length == 0 {
                        self.take(from, header)?;
                    }
                }
                Part::Payload(bytes) => {
                    let peer = &mut self.peers[from.0 as usize];
                    let Some((header, filled)) = &mut peer.current else { continue };
                    let (header, at) = (*header, *filled);
                    *filled += bytes.len();
                    match peer.taking.get_mut(&header.op.sequence) {
                        Some(taking) if header.pass == CHUNK => {
                            taking.asked.intake.write(taking.filled + at, &bytes);
                        }
                        _ => peer.small.extend_from_slice(&bytes),
                    }
                    if at + bytes.len() == header.length as usize {
                        self.take(from, header)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// What is to be copied from other ranks' memory: give each to [`copied`](Self::copied) then.
    pub(crate) fn take_copies(&mut self) -> Vec<Copying> {
        std::mem::take(&mut self.copies)
    }

    /// A message is here.
    pub(crate) fn copied(&mut self, Copying { from, number, asked, .. }: Copying) {
        let Asked { number: own, tag, ref intake } = asked;
        let at = Place { phase: Phase::Copying { pass: 0 }, ..self.place(own, tag) };
        let header = header(&self.ring, OpId { sequence: number, ..at.op }, intake.payload());
        if let Some(fault) = &self.fault {
            return asked.intake.resolve(Err(fault.at(at)));
        }
        let peer = &mut self.peers[from.0 as usize];
        peer.copying -= 1;
        peer.copied.insert(number, asked);
        peer.say(DONE, header, Bytes::new());
    }

    /// A rank has ended its links in an orderly way.
    ///
    /// # Errors
    /// Where something is under way between it and this one.
    pub(crate) fn depart(&mut self, peer: Rank) -> Result<(), TransportError> {
        self.peers[peer.0 as usize].departed = true;
        if self.needs(peer) { Err(TransportError::ClosedByPeer) } else { Ok(()) }
    }

    /// Ends everything, now and in future, for one reason; the first one counts.
    pub(crate) fn fail(&mut self, fault: Fault) {
        let fault = self.fault.get_or_insert(fault).clone();
        let peers: Vec<Peer> = self.peers.iter_mut().map(|peer| peer.replaced(self.chunk_bytes)).collect();
        for peer in peers {
            for (number, Sending { tag, letter, way }) in peer.sends {
                let (phase, bytes_done) = match way {
                    Way::Wanted(sent) => (Phase::Copying { pass: 0 }, sent as u64),
                    Way::WithOffer | Way::Offered | Way::Lying => (Phase::Queued, 0),
                };
                (letter.told)(Err(fault.at(Place { phase, bytes_done, ..self.place(number, tag) })));
            }
            for Taking { asked: Asked { number, tag, intake }, filled, .. } in peer.taking.into_values() {
                let phase = Phase::Copying { pass: 0 };
                let at = Place { phase, bytes_done: filled as u64, ..self.place(number, tag) };
                intake.resolve(Err(fault.at(at)));
            }
            for Asked { number, tag, intake } in peer.asked.into_iter().chain(peer.copied.into_values()) {
                intake.resolve(Err(fault.at(self.place(number, tag))));
            }
        }
        for Copying { asked: Asked { number, tag, intake }, .. } in std::mem::take(&mut self.copies) {
            intake.resolve(Err(fault.at(self.place(number, tag))));
        }
        self.pending = 0;
    }

    fn place(&self, sequence: u64, tag: u32) -> Place {
        let op = OpId { sequence, collective: Collective::Message { tag } };
        let (rank, generation) = (self.ring.rank(), self.ring.generation());
        Place { rank, generation, op, phase: Phase::Queued, bytes_done: 0 }
    }

    /// Who has left can be sent nothing, and sends nothing.
    fn end_if_departed(&mut self, peer: Rank) {
        if self.peers[peer.0 as usize].departed && self.fault.is_none() {
            self.fail(Fault::Lost { peer, source: TransportError::ClosedByPeer });
        }
    }

    /// Whether a frame of that rank may come now.
    fn check(&self, from: Rank, header: &Header) -> Result<(), Disagreement> {
        let peer = &self.peers[from.0 as usize];
        let Header { generation, op, payload, pass, index, offset, length } = *header;
        if generation != self.ring.generation() {
            return Err(Disagreement::Generation { got: generation, want: self.ring.generation() });
        }
        let Collective::Message { tag } = op.collective else {
            return Err(Disagreement::Operation { got: op, want: self.place(peer.next_offered, 0).op });
        };
        let is_whole = u64::from(length) == payload.total_bytes;
        let is_ours = |wants: &dyn Fn(&Sending) -> bool| {
            let ours = peer.sends.get(&op.sequence);
            (offset, length, index) == (0, 0, 0) && ours.is_some_and(|ours| ours.tag == tag && wants(ours))
        };
        let is_due = match pass {
            OFFER => {
                let starts = op.sequence == peer.next_offered && (offset, index) == (0, 0);
                let is_small = length as usize <= SMALL_BYTES && (length == 0 || is_whole);
                starts && is_small && payload.reduction.is_none()
            }
            LIES => {
                let starts = op.sequence == peer.next_offered && (offset, length) == (0, 0);
                starts && payload.reduction.is_none()
            }
            KEPT => peer.copied.get(&op.sequence).is_some_and(|copied| {
                (copied.tag, copied.intake.payload()) == (tag, payload)
                    && (offset, length, index) == (0, 0, 0)
            }),
            WANT => is_ours(&|ours| ours.letter.payload == payload && ours.way == Way::Offered),
            CHUNK => peer.taking.get(&op.sequence).is_some_and(|taking| {
                let announced = (taking.asked.tag, taking.asked.intake.payload(), taking.chunks);
                let due = (tag, payload, index) == announced && offset == taking.filled as u64;
                due && length > 0
            }),
            DONE => is_ours(&|ours| ours.letter.payload == payload && ours.has_left()),
            REFUSED => is_ours(&|ours| ours.letter.payload != payload && !matches!(ours.way, Way::Wanted(_))),
            _ => false,
        };
        if !is_due {
            return Err(Disagreement::Chunk { pass, index, offset, length });
        }
        let is_flood =
            peer.unasked.len() >= PENDING_MAX || peer.unasked_bytes + length as usize > UNASKED_BYTES_MAX;
        if (pass == OFFER || pass == LIES) && is_flood {
            return Err(Disagreement::Unasked { messages: PENDING_MAX, bytes: UNASKED_BYTES_MAX });
        }
        Ok(())
    }

    /// A frame that was checked is here as a whole.
    fn take(&mut self, from: Rank, header: Header) -> Result<(), Disagreement> {
        let peer = &mut self.peers[from.0 as usize];
        peer.current = None;
        let (number, payload) = (header.op.sequence, header.payload);
        match header.pass {
            OFFER | LIES => {
                let Collective::Message { tag } = header.op.collective else { return Ok(()) };
                let small = std::mem::take(&mut peer.small);
                let small = (u64::from(header.length) == payload.total_bytes).then_some(small);
                let lies_at = (header.pass == LIES).then_some(header.index);
                peer.next_offered += 1;
                let offer = Offer { number, tag, payload, small, lies_at };
                let asked = peer.asked.iter().position(|asked| asked.tag == tag);
                match asked.and_then(|index| peer.asked.remove(index)) {
                    Some(asked) => self.bring_together(from, offer, asked),
                    None => {
                        peer.unasked_bytes += header.length as usize;
                        peer.unasked.push_back(offer);
                    }
                }
            }
            WANT => {
                peer.sends.entry(number).and_modify(|ours| ours.way = Way::Wanted(0));
                peer.wanted.push_back(number);
            }
            CHUNK => self.take_chunk(from, header),
            DONE | REFUSED => self.end_send(from, header),
            KEPT => {
                if let Some(asked) = peer.copied.remove(&number) {
                    self.pending -= 1;
                    asked.intake.resolve(Ok(()));
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn take_chunk(&mut self, from: Rank, header: Header) {
        let peer = &mut self.peers[from.0 as usize];
        let Some(taking) = peer.taking.get_mut(&header.op.sequence) else { return };
        taking.filled += header.length as usize;
        taking.chunks += 1;
        if taking.filled as u64 == header.payload.total_bytes
            && let Some(Taking { asked, .. }) = peer.taking.remove(&header.op.sequence)
        {
            peer.say(DONE, answer(&header), Bytes::new());
            self.pending -= 1;
            asked.intake.resolve(Ok(()));
        }
    }

    /// The receiver has one of our messages, or wants another.
    fn end_send(&mut self, peer_rank: Rank, header: Header) {
        let at = self.place(header.op.sequence, 0);
        let peer = &mut self.peers[peer_rank.0 as usize];
        let Some(Sending { letter, way, .. }) = peer.sends.remove(&header.op.sequence) else { return };
        if way == Way::WithOffer {
            peer.lent_bytes -= letter.bytes.len();
        }
        if way == Way::Lying && header.pass == DONE {
            peer.say(KEPT, answer(&header), Bytes::new());
        }
        self.pending -= 1;
        let outcome = match header.pass {
            DONE => Ok(()),
            _ => Err(mismatch(Place { op: header.op, ..at }, peer_rank, header.payload, letter.payload)),
        };
        // The caller may reuse its input as soon as it sees the outcome.
        drop(letter.bytes);
        (letter.told)(outcome);
    }

    /// A message, and who has asked for one with its tag.
    fn bring_together(&mut self, from: Rank, offer: Offer, mut asked: Asked) {
        let at = self.place(asked.number, asked.tag);
        let theirs = OpId { sequence: offer.number, ..at.op };
        let peer = &mut self.peers[from.0 as usize];
        let wanted = asked.intake.payload();
        let header = header(&self.ring, theirs, wanted);
        if offer.payload != wanted {
            peer.say(REFUSED, header, Bytes::new());
            self.pending -= 1;
            return asked.intake.resolve(Err(mismatch(at, from, offer.payload, wanted)));
        }
        match (offer.small, offer.lies_at) {
            (Some(bytes), _) => {
                asked.intake.write(0, &bytes);
                peer.say(DONE, header, Bytes::new());
                self.pending -= 1;
                asked.intake.resolve(Ok(()));
            }
            (None, Some(lies_at)) => {
                peer.copying += 1;
                self.copies.push(Copying { from, lies_at, number: offer.number, asked });
            }
            (None, None) => {
                peer.say(WANT, header, Bytes::new());
                peer.taking.insert(offer.number, Taking { asked, filled: 0, chunks: 0 });
            }
        }
    }
}

/// Of a frame without bytes.
fn header(ring: &Ring, op: OpId, payload: Payload) -> Header {
    Header { generation: ring.generation(), op, payload, pass: OFFER, index: 0, offset: 0, length: 0 }
}

/// To a frame of that message.
fn answer(to: &Header) -> Header {
    Header { index: 0, offset: 0, length: 0, ..*to }
}

fn mismatch(at: Place, peer: Rank, got: Payload, want: Payload) -> CollectiveError {
    CollectiveError::Mismatch { at, peer, disagreement: Disagreement::Payload { got, want } }
}

#[cfg(test)]
#[path = "mailbox_tests.rs"]
mod tests;
