//! Two ranks, and every way in which what they send may be cut, delayed and wrong.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;

use super::*;
use crate::buffer::Buffer;
use crate::error::TransportError;
use crate::message::letters;
use crate::rank::{Generation, WorldSize};

type Outcome<T> = Arc<Mutex<Option<Result<T, CollectiveError>>>>;
type Tell<T> = Box<dyn FnOnce(Result<T, CollectiveError>) + Send>;
/// By receiver and tag.
type ByTag<T> = BTreeMap<(usize, u32), Vec<T>>;

/// Rank 0 and rank 1, and what is on its way from each to the other.
struct Pair {
    mailboxes: [Mailbox; 2],
    wires: [BytesMut; 2],
    /// What lies where the other rank may read it: a place is a number.
    memory: Vec<Vec<u8>>,
    /// What is to be copied, by receiver.
    copies: [Vec<Copying>; 2],
}

impl Pair {
    fn new(chunk_bytes: u32) -> Self {
        let mailbox = |rank| {
            let ring = Ring::new(Rank(rank), WorldSize::new(2).unwrap(), Generation(7)).unwrap();
            Mailbox::new(ring, chunk_bytes)
        };
        Self {
            mailboxes: [mailbox(0), mailbox(1)],
            wires: Default::default(),
            memory: Vec::new(),
            copies: Default::default(),
        }
    }

    fn send(&mut self, from: usize, tag: u32, elements: Vec<u8>) -> Outcome<()> {
        self.send_lying(from, tag, elements, false)
    }

    fn send_lying(&mut self, from: usize, tag: u32, elements: Vec<u8>, lies: bool) -> Outcome<()> {
        let (outcome, told) = outcome();
        let lies_at = lies.then_some(self.memory.len() as u32);
        self.memory.push(elements.clone());
        let letter = Letter::of(Arc::new(Buffer::from(elements)), lies_at, told);
        self.mailboxes[from].send(Rank(1 - from as u32), tag, letter);
        outcome
    }

    fn receive(&mut self, to: usize, tag: u32, len: usize) -> Outcome<Buffer<u8>> {
        let (outcome, given) = outcome();
        let intake = Box::new(letters::Into { output: Buffer::<u8>::zeroed(len), given });
        self.mailboxes[to].receive(Rank(1 - to as u32), tag, intake);
        outcome
    }

    /// Lets a rank send one frame.
    fn depart(&mut self, from: usize) -> bool {
        let pieces = self.mailboxes[from].next_outgoing(Rank(1 - from as u32));
        pieces.iter().flatten().for_each(|piece| self.wires[from].extend_from_slice(piece));
        pieces.is_some()
    }

    /// Lets so many bytes arrive.
    fn arrive(&mut self, from: usize, bytes: usize) -> Result<(), Disagreement> {
        let bytes = bytes.min(self.wires[from].len());
        let mut piece: Bytes = self.wires[from].split_to(bytes).freeze();
        self.mailboxes[1 - from].absorb(Rank(from as u32), &mut piece)
    }

    /// Copies what a rank is to copy.
    fn copy(&mut self, to: usize) {
        self.copies[to].extend(self.mailboxes[to].take_copies());
        for mut copying in self.copies[to].drain(..) {
            let lying = &self.memory[copying.lies_at as usize];
            assert_eq!((copying.bytes(), copying.from), (lying.len(), Rank(1 - to as u32)));
            copying.write(lying);
            self.mailboxes[to].copied(copying);
        }
    }

    /// Until nothing moves.
    fn settle(&mut self) {
        loop {
            [0, 1].into_iter().for_each(|to| self.copy(to));
            let departed = [self.depart(0), self.depart(1)];
            if departed == [false; 2] && self.wires.iter().all(BytesMut::is_empty) {
                return;
            }
            for from in [0, 1] {
                self.arrive(from, usize::MAX).unwrap();
            }
        }
    }

    /// What lies at a rank without having been asked for.
    fn unasked_bytes(&self, at: usize) -> usize {
        self.mailboxes[at].peers[1 - at]
            .unasked
            .iter()
            .filter_map(|offer| offer.small.as_ref())
            .map(Vec::len)
            .sum()
    }
}

fn outcome<T: Send + 'static>() -> (Outcome<T>, Tell<T>) {
    let outcome = Outcome::<T>::default();
    let place = outcome.clone();
    let tell = Box::new(move |result| {
        assert!(place.lock().unwrap().replace(result).is_none(), "told twice");
    });
    (outcome, tell)
}

fn is_done<T>(outcome: &Outcome<T>) -> bool {
    matches!(*outcome.lock().unwrap(), Some(Ok(_)))
}

/// What happens next.
#[derive(Clone, Debug)]
enum Event {
    Send { from: usize, tag: u32, len: usize, lies: bool },
    Receive { to: usize, tag: u32 },
    Depart { from: usize },
    Copy { to: usize },
    Arrive { from: usize, bytes: usize },
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let lens = prop_oneof![0usize..50, 0usize..3000, Just(SMALL_BYTES), Just(SMALL_BYTES + 1)];
    let event = prop_oneof![
        2 => (0usize..2, 0u32..3, lens, any::<bool>())
            .prop_map(|(from, tag, len, lies)| Event::Send { from, tag, len, lies }),
        1 => (0usize..2).prop_map(|to| Event::Copy { to }),
        2 => (0usize..2, 0u32..3).prop_map(|(to, tag)| Event::Receive { to, tag }),
        3 => (0usize..2).prop_map(|from| Event::Depart { from }),
        3 => (0usize..2, 1usize..200).prop_map(|(from, bytes)| Event::Arrive { from, bytes }),
    ];
    // An interpreter takes a thousand times as long.
    proptest::collection::vec(event, 0..if cfg!(miri) { 30 } else { 120 })
}

proptest! {
    /// Whatever is sent, asked for and delayed: of each tag the n-th message that was sent is the n-th that is received, once, and
    /// senders are told when it is.
    #[test]
    fn messages_come_by_tag_in_order(events in events(), chunk in prop_oneof![Just(8u32), Just(504), Just(1 << 16)]) {
        let mut pair = Pair::new(chunk);
        let mut sent = ByTag::<(Vec<u8>, Outcome<()>)>::new();
        let mut received = ByTag::<Outcome<Buffer<u8>>>::new();
        // Receivers know how long the n-th message with a tag is, also before it is sent.
        let mut lens = ByTag::<usize>::new();
        for event in &events {
            if let Event::Send { from, tag, len, .. } = event {
                lens.entry((1 - from, *tag)).or_default().push(*len);
            }
        }
        for event in events {
            match event {
                Event::Send { from, tag, len, lies } => {
                    let sent = sent.entry((1 - from, tag)).or_default();
                    let elements: Vec<u8> = (0..len).map(|i| (i * 7 + sent.len() * 31 + tag as usize) as u8).collect();
                    sent.push((elements.clone(), pair.send_lying(from, tag, elements, lies)));
                }
                Event::Receive { to, tag } => {
                    let received = received.entry((to, tag)).or_default();
                    if let Some(len) = lens.get(&(to, tag)).and_then(|lens| lens.get(received.len())) {
                        received.push(pair.receive(to, tag, *len));
                    }
                }
                Event::Depart { from } => drop(pair.depart(from)),
                Event::Copy { to } => pair.copy(to),
                Event::Arrive { from, bytes } => pair.arrive(from, bytes).unwrap(),
            }
        }
        pair.settle();
        for (key, received) in &received {
            let sent = sent.get(key).map_or(&[][..], Vec::as_slice);
            for (index, received) in received.iter().enumerate() {
                let outcome = received.lock().unwrap().clone();
                match sent.get(index) {
                    Some((elements, told)) => {
                        prop_assert_eq!(&outcome.unwrap().unwrap(), elements);
                        prop_assert!(is_done(told));
                    }
                    None => prop_assert!(outcome.is_none(), "nobody has sent it"),
                }
            }
            prop_assert!(sent.iter().skip(received.len()).all(|(_, told)| !is_done(told)));
        }
    }

    /// Any bytes, also those that begin like a frame, are taken or refused; nothing panics, and nothing is received of them.
    #[test]
    fn nonsense_is_refused(
        what in 0u32..8, sequence in 0u64..3, index in 0u32..2, offset in 0u64..20, length in 0u32..20, tag in 0u32..2,
    ) {
        let mut pair = Pair::new(64);
        let told = [pair.send(1, 0, vec![1; 10]), pair.send(1, 0, vec![1; 20_000])];
        let outcome = pair.receive(1, 0, 30);
        let payload = Payload { element: crate::ElementKind::U8, reduction: None, total_bytes: 40 };
        let op = OpId { sequence, collective: Collective::Message { tag } };
        let header = Header { generation: Generation(7), op, payload, pass: what, index, offset, length };
        pair.wires[0].extend_from_slice(&header.encode());
        pair.wires[0].extend_from_slice(&vec![0; length as usize]);
        let taken = pair.arrive(0, usize::MAX);
        // An offer of another length than was asked for, and a refusal of what was offered, are what they are.
        prop_assert!(taken.is_err() || [OFFER, LIES, REFUSED].contains(&what), "{header:?}");
        prop_assert!(!is_done(&outcome) && !told.iter().any(is_done));
    }
}

#[test]
fn what_nobody_asked_for_has_a_bound_and_nothing_is_lost() {
    let mut pair = Pair::new(1 << 16);
    let told: Vec<_> = (0..200).map(|tag| pair.send(0, tag, vec![tag as u8; SMALL_BYTES])).collect();
    pair.settle();
    assert_eq!(pair.unasked_bytes(1), UNASKED_BYTES_MAX);
    assert!(!told.iter().any(is_done));
    // The last first: tags do not wait for each other.
    let received: Vec<_> = (0..200).rev().map(|tag| (tag, pair.receive(1, tag, SMALL_BYTES))).collect();
    pair.settle();
    for (tag, outcome) in received {
        assert_eq!(outcome.lock().unwrap().take().unwrap().unwrap(), vec![tag as u8; SMALL_BYTES]);
    }
    assert!(told.iter().all(is_done));
    assert_eq!((pair.unasked_bytes(1), pair.mailboxes[0].pending(), pair.mailboxes[1].pending()), (0, 0, 0));
    assert_eq!(pair.mailboxes[0].peers[1].lent_bytes, 0);
}

#[test]
fn another_length_ends_this_message_at_both_ranks_and_nothing_else() {
    for len in [10, 100_000] {
        let mut pair = Pair::new(1 << 12);
        let told = pair.send(0, 1, vec![5; len]);
        let outcome = pair.receive(1, 1, len + 1);
        let (next, last) = (pair.send(0, 1, vec![6; len]), pair.receive(1, 1, len));
        pair.settle();
        for (error, got, want) in [
            (told.lock().unwrap().take().unwrap().unwrap_err(), len + 1, len),
            (outcome.lock().unwrap().take().unwrap().unwrap_err(), len, len + 1),
        ] {
            let CollectiveError::Mismatch {
                disagreement: Disagreement::Payload { got: theirs, want: ours },
                ..
            } = &error
            else {
                panic!("{error}")
            };
            assert_eq!((theirs.total_bytes, ours.total_bytes), (got as u64, want as u64));
        }
        assert!(is_done(&next) && is_done(&last));
    }
}

#[test]
fn a_peer_that_sends_more_than_may_lie_here_is_refused() {
    let mut pair = Pair::new(1 << 16);
    let payload =
        Payload { element: crate::ElementKind::U8, reduction: None, total_bytes: SMALL_BYTES as u64 };
    let offer = |sequence| {
        let op = OpId { sequence, collective: Collective::Message { tag: 0 } };
        let length = SMALL_BYTES as u32;
        Header { generation: Generation(7), op, payload, pass: OFFER, index: 0, offset: 0, length }.encode()
    };
    let mut taken = Vec::new();
    for sequence in 0..=(UNASKED_BYTES_MAX / SMALL_BYTES) as u64 {
        pair.wires[0].extend_from_slice(&offer(sequence));
        pair.wires[0].extend_from_slice(&[0; SMALL_BYTES]);
        taken.push(pair.arrive(0, usize::MAX));
    }
    assert!(matches!(taken.pop(), Some(Err(Disagreement::Unasked { .. }))));
    assert!(taken.iter().all(Result::is_ok));
}

#[test]
fn what_was_copied_counts_when_its_sender_has_kept_it() {
    let len = SMALL_BYTES + 1;
    let mut pair = Pair::new(1 << 12);
    let (told, outcome) = (pair.send_lying(0, 1, vec![9; len], true), pair.receive(1, 1, len));
    while pair.depart(0) {}
    pair.arrive(0, usize::MAX).unwrap();
    pair.copy(1);
    // The sender fails before it hears that its memory was read: what was read may be anything.
    pair.mailboxes[0].fail(Fault::Closed);
    assert!(matches!(*told.lock().unwrap(), Some(Err(_))) && outcome.lock().unwrap().is_none());
    pair.mailboxes[1].fail(Fault::Closed);
    assert!(matches!(*outcome.lock().unwrap(), Some(Err(CollectiveError::Closed { .. }))));
    assert_eq!(pair.mailboxes[1].pending(), 0);
}

#[test]
fn a_fault_ends_what_is_under_way_and_what_comes_later() {
    let mut pair = Pair::new(64);
    let (told, outcome) = (pair.send(0, 1, vec![1; 1000]), pair.receive(0, 2, 5));
    pair.mailboxes[0].fail(Fault::Lost { peer: Rank(1), source: TransportError::TimedOut });
    let (late, later) = (pair.send(0, 1, vec![1]), pair.receive(0, 1, 1));
    for error in [told, late].map(|told| told.lock().unwrap().take().unwrap().unwrap_err()) {
        assert!(matches!(error, CollectiveError::PeerLost { peer: Rank(1), .. }), "{error}");
    }
    assert!([outcome, later].iter().all(|outcome| matches!(*outcome.lock().unwrap(), Some(Err(_)))));
    assert_eq!(pair.mailboxes[0].pending(), 0);
}

#[test]
fn who_has_left_is_missed_as_soon_as_somebody_needs_it_but_what_it_sent_is_here() {
    let mut pair = Pair::new(64);
    let _told = pair.send(0, 1, vec![1; 10]);
    pair.settle();
    assert_eq!(pair.mailboxes[1].depart(Rank(0)), Ok(()));
    assert!(is_done(&pair.receive(1, 1, 10)));
    let missed = pair.receive(1, 1, 10).lock().unwrap().take().unwrap().unwrap_err();
    assert!(
        matches!(missed, CollectiveError::PeerLost { source: TransportError::ClosedByPeer, .. }),
        "{missed}"
    );
}
