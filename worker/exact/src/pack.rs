//! Sums as they cross the ring: the low bits of each word, close together, little endian.
//!
//! Fewer bits than a word's are a sum modulo a smaller power of two. Such sums may be added on their way like any other:
//! what wraps does no harm where the total fits, and where it may not the block is wide.

use crate::Bits;

/// Bytes that so many words take; for 12 bits the number of words must be even.
pub fn packed_bytes(words: usize, bits: Bits) -> usize {
    words * bits.count() as usize / 8
}

/// The low bits of each word.
///
/// # Panics
/// Where `packed` is not as long as [`packed_bytes`] says.
pub fn pack(words: &[i32], bits: Bits, packed: &mut [u8]) {
    assert_eq!(packed.len(), packed_bytes(words.len(), bits), "packed words fill their bytes");
    match bits {
        Bits::B8 => words.iter().zip(packed).for_each(|(word, byte)| *byte = *word as u8),
        Bits::B12 => {
            let (pairs, _) = words.as_chunks();
            pairs.iter().zip(packed.as_chunks_mut().0).for_each(|(&[low, high], bytes)| {
                let both = (low as u32 & 0xfff) | (high as u32) << 12;
                *bytes = three(both);
            });
        }
        Bits::B16 => {
            let places = packed.as_chunks_mut().0.iter_mut();
            words.iter().zip(places).for_each(|(word, bytes)| *bytes = (*word as u16).to_le_bytes());
        }
        Bits::B24 => {
            let places = packed.as_chunks_mut().0.iter_mut();
            words.iter().zip(places).for_each(|(word, bytes)| *bytes = three(*word as u32));
        }
        Bits::B32 => {
            let places = packed.as_chunks_mut().0.iter_mut();
            words.iter().zip(places).for_each(|(word, bytes)| *bytes = word.to_le_bytes());
        }
    }
}

/// The words of packed bits, with their sign extended.
///
/// # Panics
/// Where `packed` is not as long as [`packed_bytes`] says.
pub fn unpack(packed: &[u8], bits: Bits, words: &mut [i32]) {
    assert_eq!(packed.len(), packed_bytes(words.len(), bits), "packed words fill their bytes");
    match bits {
        Bits::B8 => words.iter_mut().zip(packed).for_each(|(word, byte)| *word = i32::from(*byte as i8)),
        Bits::B12 => {
            let (pairs, _) = words.as_chunks_mut();
            pairs.iter_mut().zip(packed.as_chunks().0).for_each(|([low, high], &[a, b, c])| {
                let both = u32::from_le_bytes([0, a, b, c]);
                *low = (both << 12) as i32 >> 20;
                *high = both as i32 >> 20;
            });
        }
        Bits::B16 => {
            let places = packed.as_chunks().0.iter();
            words.iter_mut().zip(places).for_each(|(word, bytes)| *word = i16::from_le_bytes(*bytes).into());
        }
        Bits::B24 => {
            let places = packed.as_chunks().0.iter();
            words
                .iter_mut()
                .zip(places)
                .for_each(|(word, &[a, b, c])| *word = i32::from_le_bytes([0, a, b, c]) >> 8);
        }
        Bits::B32 => {
            let places = packed.as_chunks().0.iter();
            words.iter_mut().zip(places).for_each(|(word, bytes)| *word = i32::from_le_bytes(*bytes));
        }
    }
}

/// The low three bytes.
fn three(word: u32) -> [u8; 3] {
    let [a, b, c, _] = word.to_le_bytes();
    [a, b, c]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_fits_comes_back(words in proptest::collection::vec(any::<i32>(), 0..40), bits in 0usize..5) {
            let bits = Bits::ALL[bits];
            let spare = 32 - bits.count();
            let mut words: Vec<i32> = words.iter().map(|word| word >> spare).collect();
            words.truncate(words.len() / 2 * 2);
            let mut packed = vec![0; packed_bytes(words.len(), bits)];
            pack(&words, bits, &mut packed);
            let mut unpacked = vec![0; words.len()];
            unpack(&packed, bits, &mut unpacked);
            prop_assert_eq!(&unpacked, &words);
            // What does not fit is cut to its low bits.
            let more = words.iter().map(|word| word.wrapping_add(1i32.checked_shl(bits.count()).unwrap_or(0)));
            let mut cut = vec![0; packed.len()];
            pack(&more.collect::<Vec<_>>(), bits, &mut cut);
            prop_assert_eq!(cut, packed);
        }
    }

    #[test]
    fn bytes_are_pinned() {
        let packed = |bits| {
            let mut packed = vec![0; packed_bytes(2, bits)];
            pack(&[-2, 0x0102_0304], bits, &mut packed);
            packed
        };
        assert_eq!(packed(Bits::B8), [0xfe, 0x04]);
        assert_eq!(packed(Bits::B12), [0xfe, 0x4f, 0x30]);
        assert_eq!(packed(Bits::B16), [0xfe, 0xff, 0x04, 0x03]);
        assert_eq!(packed(Bits::B24), [0xfe, 0xff, 0xff, 0x04, 0x03, 0x02]);
        assert_eq!(packed(Bits::B32), [0xfe, 0xff, 0xff, 0xff, 0x04, 0x03, 0x02, 0x01]);
    }
}
