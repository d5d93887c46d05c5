//! Copies that leave the caches alone, for results that are larger than they are.
//!
//! An ordinary store first reads the line that it will overwrite, and evicts another; where the whole result does not fit into
//! the cache that is a third of the traffic, for nothing.

/// The size of the last-level cache, or a guess.
pub(crate) fn cache_bytes() -> usize {
    const GUESS: usize = 32 << 20;
    let size = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index3/size").unwrap_or_default();
    let kibibytes = size.trim().strip_suffix('K').and_then(|digits| digits.parse::<usize>().ok());
    kibibytes.map_or(GUESS, |kibibytes| kibibytes << 10)
}

/// As `copy_from_slice`, past the caches.
///
/// # Panics
/// Where the lengths differ.
pub fn copy_past_caches(from: &[u8], to: &mut [u8]) {
    assert_eq!(from.len(), to.len(), "a copy is as long as what is copied");
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has the features that the function was compiled for.
        unsafe { avx512(from, to) };
        return;
    }
    to.copy_from_slice(from);
}

/// Whole lines of the destination go past the caches, what is before and behind them does not.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn avx512(from: &[u8], to: &mut [u8]) {
    use std::arch::x86_64::{_mm_sfence, _mm512_loadu_si512, _mm512_stream_si512};

    const LINE: usize = 64;
    let head = to.as_ptr().align_offset(LINE).min(to.len());
    let (to_head, to) = to.split_at_mut(head);
    let (from_head, from) = from.split_at(head);
    to_head.copy_from_slice(from_head);
    let (lines, rest) = from.as_chunks::<LINE>();
    let (to_lines, to_rest) = to.as_chunks_mut::<LINE>();
    for (line, to_line) in lines.iter().zip(to_lines) {
        // SAFETY: both are a line long, and the destination's lines are aligned since its head was split off.
        unsafe { _mm512_stream_si512(to_line.as_mut_ptr().cast(), _mm512_loadu_si512(line.as_ptr().cast())) };
    }
    to_rest.copy_from_slice(rest);
    // Such stores are not ordered by others: what follows them must not be seen before them.
    _mm_sfence();
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn copies_are_copies(length in 0usize..1000, from_offset in 0usize..70, to_offset in 0usize..70) {
            let from: Vec<u8> = (0..length + from_offset).map(|i| i as u8).collect();
            let mut to = vec![0xee; length + to_offset + 64];
            copy_past_caches(&from[from_offset..], &mut to[to_offset..][..length]);
            prop_assert_eq!(&to[to_offset..][..length], &from[from_offset..]);
            prop_assert!(to[..to_offset].iter().chain(&to[to_offset + length..]).all(|&byte| byte == 0xee));
        }
    }

    #[test]
    fn a_cache_has_a_size() {
        assert!(cache_bytes() >= 1 << 20);
    }
}
