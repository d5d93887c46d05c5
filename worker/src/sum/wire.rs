//! Sums as they cross the ring: words of 32 bits as they are, shorter ones packed.
//!
//! A rank adds in words of 32 bits whatever the bits of a sum are; what leaves is cut to them.

use mattock_collectives::{CollectiveError, Group, I12x2, I24, Reduction, Sum};
use mattock_exact::{Bits, pack, packed_bytes};

use super::flight::Flight;

/// One bucket's words, and their exchange.
pub(super) enum Wire {
    /// The words are what travels.
    Whole(Flight<Sum<i32>>),
    /// The words' low bits travel.
    Packed { bits: Bits, words: Vec<i32>, flight: Box<dyn PackedFlight> },
}

/// A flight whose elements are packed words: bytes, to whoever fills and reads it.
pub(super) trait PackedFlight: Send {
    fn is_free(&self) -> bool;
    fn input_mut(&mut self) -> &mut [u8];
    fn send(&mut self, group: &Group, lens: Option<&[usize]>);
    fn wait(&mut self) -> Result<&[u8], CollectiveError>;
    fn element_bytes(&self) -> usize;
}

impl<R: Reduction> PackedFlight for Flight<R> {
    fn is_free(&self) -> bool {
        Flight::is_free(self)
    }

    fn input_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(Flight::input_mut(self))
    }

    fn send(&mut self, group: &Group, lens: Option<&[usize]>) {
        Flight::send(self, group, lens);
    }

    fn wait(&mut self) -> Result<&[u8], CollectiveError> {
        Flight::wait(self).map(bytemuck::cast_slice)
    }

    fn element_bytes(&self) -> usize {
        size_of::<R::Element>()
    }
}

impl Wire {
    /// For so many words, whose number is even.
    pub(super) fn new(words: usize, bits: Bits) -> Self {
        let flight = match bits {
            Bits::B32 => return Self::Whole(Flight::new(words)),
            Bits::B24 => packed::<Sum<I24>>(words, bits),
            Bits::B16 => packed::<Sum<i16>>(words, bits),
            Bits::B12 => packed::<Sum<I12x2>>(words, bits),
            Bits::B8 => packed::<Sum<u8>>(words, bits),
        };
        Self::Packed { bits, words: vec![0; words], flight }
    }

    /// Whether what was sent last can be written over without a copy.
    pub(super) fn is_free(&self) -> bool {
        match self {
            Self::Whole(flight) => flight.is_free(),
            Self::Packed { flight, .. } => flight.is_free(),
        }
    }

    /// This rank's words.
    pub(super) fn words(&self) -> &[i32] {
        match self {
            Self::Whole(flight) => flight.input(),
            Self::Packed { words, .. } => words,
        }
    }

    /// This rank's words, to be added to.
    pub(super) fn words_mut(&mut self) -> &mut [i32] {
        match self {
            Self::Whole(flight) => flight.input_mut(),
            Self::Packed { words, .. } => words,
        }
    }

    /// Sends the words on their way; where `lens` say how many of them are each rank's part, a rank receives its own only.
    pub(super) fn send(&mut self, group: &Group, lens: Option<&[usize]>) {
        match self {
            Self::Whole(flight) => flight.send(group, lens),
            Self::Packed { bits, words, flight } => {
                pack(words, *bits, flight.input_mut());
                let elements = flight.input_mut().len() / flight.element_bytes();
                let scaled = |len: &usize| len * elements / words.len().max(1);
                let lens: Option<Vec<usize>> = lens.map(|lens| lens.iter().map(scaled).collect());
                flight.send(group, lens.as_deref());
            }
        }
    }

    /// Waits for the sum over all ranks, or this rank's part of it, packed as it travelled.
    pub(super) fn wait(&mut self) -> Result<&[u8], CollectiveError> {
        match self {
            Self::Whole(flight) => flight.wait().map(bytemuck::cast_slice),
            Self::Packed { flight, .. } => flight.wait(),
        }
    }
}

fn packed<R: Reduction>(words: usize, bits: Bits) -> Box<dyn PackedFlight> {
    Box::new(Flight::<R>::new(packed_bytes(words, bits) / size_of::<R::Element>()))
}
