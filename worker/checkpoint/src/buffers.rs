//! Buffers for reading files, used again: memory that nobody has touched yet has to be cleared page by page
//! first, which costs more than reading into it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use crate::folder::{ALIGNMENT, align};
use crate::room::ask_for_large_pages;

/// Buffers that came back are kept, so many at most: as many as a load has under way.
const KEPT_MAX: usize = 8;

/// Buffers that wait to be used again, as long as the store that reads into them is open.
#[derive(Debug, Clone, Default)]
pub(crate) struct Buffers(Arc<Mutex<Vec<Vec<u8>>>>);

impl Buffers {
    /// A buffer with room for so many bytes, the first of which lies at an aligned address, behind what is in it.
    pub(crate) fn lend(&self, bytes: usize) -> Lent {
        let kept = self.lock().pop();
        let mut buffer = kept.filter(|kept| kept.capacity() >= bytes + ALIGNMENT).unwrap_or_else(|| {
            let mut fresh = Vec::with_capacity(bytes + ALIGNMENT);
            ask_for_large_pages(fresh.as_mut_ptr(), fresh.capacity());
            fresh
        });
        align(&mut buffer);
        Lent { buffer, buffers: self.clone() }
    }

    /// How many wait.
    #[cfg(test)]
    pub(crate) fn kept(&self) -> usize {
        self.lock().len()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A buffer, until it is dropped.
pub(crate) struct Lent {
    pub(crate) buffer: Vec<u8>,
    buffers: Buffers,
}

impl Lent {
    /// What is in it; it comes back when nobody has that any more.
    pub(crate) fn bytes(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut kept = self.buffers.lock();
        if kept.len() < KEPT_MAX {
            kept.push(std::mem::take(&mut self.buffer));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_used_again_and_few_are_kept() {
        let buffers = Buffers::default();
        let mut first = buffers.lend(10_000);
        first.buffer.push(7);
        let first = first.bytes();
        let part = first.slice(..1);
        drop(first);
        assert!(buffers.lock().is_empty(), "somebody has a part of it");
        drop(part);
        assert_eq!(buffers.kept(), 1);
        let again = buffers.lend(5_000);
        assert_eq!(again.buffer.as_ptr().wrapping_add(again.buffer.len()).align_offset(ALIGNMENT), 0);
        assert!(again.buffer.capacity() >= 10_000 && buffers.lock().is_empty());
        drop(again);
        let longer = buffers.lend(20_000);
        assert!(longer.buffer.capacity() >= longer.buffer.len() + 20_000);
        drop(longer);
        let many: Vec<Lent> = (0..2 * KEPT_MAX).map(|_| buffers.lend(100)).collect();
        drop(many);
        assert_eq!(buffers.kept(), KEPT_MAX);
    }
}
