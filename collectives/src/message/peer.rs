//! What there is between one rank and another: messages under way, and what is to be said about them.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

use super::letters::{Intake, Letter};
use crate::error::Payload;
use crate::frame::Header;
use crate::frame_reader::FrameReader;
use crate::rank::Rank;

/// What there is between this rank and another.
pub(super) struct Peer {
    /// Our messages, and theirs, are numbered as they are offered; what we ask for, as it is asked.
    pub(super) next_sent: u64,
    pub(super) next_offered: u64,
    pub(super) next_asked: u64,
    pub(super) sends: BTreeMap<u64, Sending>,
    /// Bytes that travelled with our offers and are not done.
    pub(super) lent_bytes: usize,
    pub(super) asked: VecDeque<Asked>,
    pub(super) unasked: VecDeque<Offer>,
    pub(super) unasked_bytes: usize,
    pub(super) taking: BTreeMap<u64, Taking>,
    /// Messages that are being copied.
    pub(super) copying: usize,
    /// Messages that were copied, and whose sender has not said that it kept them.
    pub(super) copied: BTreeMap<u64, Asked>,
    /// What is said before any chunk is sent.
    pub(super) said: VecDeque<(Header, Bytes)>,
    /// Our messages whose chunks are to be sent.
    pub(super) wanted: VecDeque<u64>,
    pub(super) reader: FrameReader,
    /// The frame that is arriving, and how much of its payload has.
    pub(super) current: Option<(Header, usize)>,
    /// What comes with an offer.
    pub(super) small: Vec<u8>,
    /// It wants nothing more, and says nothing more.
    pub(super) departed: bool,
}

/// One of our messages.
pub(super) struct Sending {
    pub(super) tag: u32,
    pub(super) letter: Letter,
    pub(super) way: Way,
}

/// How far one of our messages is.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Way {
    /// All of it went with the offer.
    WithOffer,
    Offered,
    /// It lies where the receiver reads it.
    Lying,
    /// So many bytes have been sent.
    Wanted(usize),
}

/// A message that we want, and that nobody has offered.
pub(super) struct Asked {
    pub(super) number: u64,
    pub(super) tag: u32,
    pub(super) intake: Box<dyn Intake>,
}

/// A message that nobody has asked for.
pub(super) struct Offer {
    pub(super) number: u64,
    pub(super) tag: u32,
    pub(super) payload: Payload,
    /// All of it, where it came with the offer.
    pub(super) small: Option<Vec<u8>>,
    /// Where it lies in its sender's memory, if we may read it there.
    pub(super) lies_at: Option<u32>,
}

/// A message that is to be copied from its sender's memory.
pub(crate) struct Copying {
    pub(crate) from: Rank,
    /// As its sender names the place.
    pub(crate) lies_at: u32,
    pub(super) number: u64,
    pub(super) asked: Asked,
}

impl Copying {
    /// How long it is.
    pub(crate) fn bytes(&self) -> usize {
        self.asked.intake.payload().total_bytes as usize
    }

    /// All of it.
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        self.asked.intake.write(0, bytes);
    }
}

/// A message that is on its way here.
pub(super) struct Taking {
    pub(super) asked: Asked,
    pub(super) filled: usize,
    pub(super) chunks: u32,
}

impl Peer {
    pub(super) fn new(chunk_bytes: u32) -> Self {
        Self {
            next_sent: 0,
            next_offered: 0,
            next_asked: 0,
            sends: BTreeMap::new(),
            lent_bytes: 0,
            asked: VecDeque::new(),
            unasked: VecDeque::new(),
            unasked_bytes: 0,
            taking: BTreeMap::new(),
            copying: 0,
            copied: BTreeMap::new(),
            said: VecDeque::new(),
            wanted: VecDeque::new(),
            reader: FrameReader::new(chunk_bytes),
            current: None,
            small: Vec::new(),
            departed: false,
        }
    }

    /// What it was, with nothing left in its place but its numbers.
    pub(super) fn replaced(&mut self, chunk_bytes: u32) -> Self {
        let (next_sent, next_asked) = (self.next_sent, self.next_asked);
        std::mem::replace(self, Self { next_sent, next_asked, ..Self::new(chunk_bytes) })
    }

    pub(super) fn say(&mut self, what: u32, header: Header, payload: Bytes) {
        let length = payload.len() as u32;
        self.said.push_back((Header { pass: what, length, ..header }, payload));
    }
}

impl Sending {
    /// Whether all of it was sent.
    pub(super) fn has_left(&self) -> bool {
        match self.way {
            Way::WithOffer | Way::Lying => true,
            Way::Offered => false,
            Way::Wanted(sent) => sent == self.letter.bytes.len(),
        }
    }
}
