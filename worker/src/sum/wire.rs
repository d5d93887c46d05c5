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
    fn input_mut(&mut self) -> &mut [u8];
    fn send(&mut self, group: &Group);
    fn wait(&mut self) -> Result<&[u8], CollectiveError>;
}

impl<R: Reduction> PackedFlight for Flight<R> {
    fn input_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(Flight::input_mut(self))
    }

    fn send(&mut self, group: &Group) {
        Flight::send(self, group);
    }

    fn wait(&mut self) -> Result<&[u8], CollectiveError> {
        Flight::wait(self).map(bytemuck::cast_slice)
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

    /// Sends the words on their way.
    pub(super) fn send(&mut self, group: &Group) {
        match self {
            Self::Whole(flight) => flight.send(group),
            Self::Packed { bits, words, flight } => {
                pack(words, *bits, flight.input_mut());
                flight.send(group);
            }
        }
    }

    /// Waits for the sum over all ranks, packed as it travelled.
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
