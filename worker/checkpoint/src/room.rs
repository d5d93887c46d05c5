//! Room for large arrays, in large pages where the system has them.
//!
//! Fresh memory comes in pages, each made by the kernel when it is first touched: for a gigabyte a quarter of a million times, which
//! costs more than copying it. In pages of 2 MiB it is five hundred times.

use rustix::mm::{Advice, madvise};

/// Of a large page.
const PAGE_BYTES: usize = 2 << 20;

/// So many zeros.
pub fn zeros(elements: usize) -> Vec<f32> {
    // Of memory that the kernel has zeroed already, and nobody has touched.
    let mut values = vec![0.0; elements];
    ask_for_large_pages(values.as_mut_ptr().cast(), elements * size_of::<f32>());
    values
}

/// A copy of these values, one after the other.
pub fn copied(parts: &[&[f32]]) -> Vec<f32> {
    let elements = parts.iter().map(|part| part.len()).sum();
    let mut values: Vec<f32> = Vec::with_capacity(elements);
    ask_for_large_pages(values.as_mut_ptr().cast(), elements * size_of::<f32>());
    parts.iter().for_each(|part| values.extend_from_slice(part));
    values
}

/// Lets the kernel back a part of the heap with large pages; it may have none, or not want to.
pub(crate) fn ask_for_large_pages(start: *mut u8, bytes: usize) {
    let first = start.align_offset(PAGE_BYTES);
    let length = bytes.saturating_sub(first) / PAGE_BYTES * PAGE_BYTES;
    if length > 0 {
        // SAFETY: the range lies within one allocation, and advice on pages changes nothing that a program sees.
        let advised =
            unsafe { madvise(start.wrapping_byte_add(first).cast(), length, Advice::LinuxHugepage) };
        if let Err(error) = advised {
            tracing::debug!(%error, "no large pages");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_holds_what_it_should() {
        for elements in [0, 1, 1000, 3 << 20] {
            assert!(zeros(elements).iter().all(|&value| value == 0.0) && zeros(elements).len() == elements);
            let values: Vec<f32> = (0..elements).map(|at| at as f32).collect();
            let (a, b) = values.split_at(elements / 3);
            assert!(copied(&[a, b]) == values, "{elements}");
        }
    }
}
