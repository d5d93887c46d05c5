//! Room for large arrays, in large pages where the system has them.
//!
//! Fresh memory comes in pages, each made by the kernel when it is first touched: for a gigabyte a quarter of a million times, which
//! costs more than copying it. In pages of 2 MiB it is five hundred times.

use rustix::mm::{Advice, madvise};

/// Of a large page.
const PAGE_BYTES: usize = 2 << 20;

/// What the kernel takes back at least.
const SMALL_PAGE_BYTES: usize = 64 << 10;

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

/// Gives an array's memory up at once: an allocator may keep what it gets back, and count as large as before.
pub fn give_back<T: Copy>(mut values: Vec<T>) {
    let (start, bytes) = (values.as_mut_ptr().cast::<u8>(), size_of_val(&values[..]));
    let first = start.align_offset(SMALL_PAGE_BYTES);
    let length = bytes.saturating_sub(first) / SMALL_PAGE_BYTES * SMALL_PAGE_BYTES;
    if length > 0 {
        // SAFETY: the range lies within this allocation, which nobody else has, and its values are neither read nor dropped any more.
        let advised = unsafe { madvise(start.wrapping_add(first).cast(), length, Advice::LinuxDontNeed) };
        if let Err(error) = advised {
            tracing::debug!(%error, "memory is kept for later");
        }
    }
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

    fn resident_bytes() -> usize {
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
    }

    #[test]
    fn what_is_given_back_is_gone() {
        const BYTES: usize = 256 << 20;
        let values = copied(&[&vec![1.0; BYTES / 4]]);
        let before = resident_bytes();
        give_back(values);
        // Other tests take some meanwhile.
        assert!(resident_bytes() + BYTES / 2 < before);
        give_back(Vec::<f32>::new());
        give_back(vec![1; 3]);
    }

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
