//! Buffers for partial sums: lent as memory, sent as [`Bytes`], and back in the pool when the link has let go of them.
//!
//! Memory is kept in words of eight bytes, so that a buffer can be seen as elements of any type.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use crate::reduction::Element;

/// How many idle buffers a pool keeps; more than a link's window of chunks does not help.
const IDLE_BUFFERS_MAX: usize = 64;

/// A supply of buffers that hold one chunk each.
#[derive(Clone, Debug, Default)]
pub(crate) struct ChunkPool {
    idle: Arc<Mutex<Vec<Vec<u64>>>>,
}

/// Memory for one chunk.
#[derive(Debug)]
pub(crate) struct ChunkBuffer {
    words: Vec<u64>,
    bytes: usize,
    pool: ChunkPool,
}

impl ChunkPool {
    /// A buffer of `bytes`; what is in it is left from its last use.
    pub(crate) fn lend(&self, bytes: usize) -> ChunkBuffer {
        let mut words = self.idle().pop().unwrap_or_default();
        words.resize(bytes.div_ceil(size_of::<u64>()), 0);
        ChunkBuffer { words, bytes, pool: self.clone() }
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Vec<u64>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ChunkBuffer {
    /// The buffer as elements.
    pub(crate) fn elements_mut<E: Element>(&mut self) -> &mut [E] {
        bytemuck::cast_slice_mut(&mut bytemuck::cast_slice_mut::<_, u8>(&mut self.words)[..self.bytes])
    }

    /// The buffer as bytes to be sent; it goes back to the pool when the last holder drops them.
    pub(crate) fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for ChunkBuffer {
    fn as_ref(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.bytes]
    }
}

impl Drop for ChunkBuffer {
    fn drop(&mut self) {
        let words = std::mem::take(&mut self.words);
        let mut idle = self.pool.idle();
        if idle.len() < IDLE_BUFFERS_MAX {
            idle.push(words);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sent_buffer_comes_back() {
        let pool = ChunkPool::default();
        let mut buffer = pool.lend(12);
        buffer.elements_mut::<i32>().copy_from_slice(&[1, 2, 3]);
        let address = buffer.as_ref().as_ptr();
        let bytes = buffer.into_bytes();
        assert_eq!(bytes.len(), 12);
        drop(bytes);
        assert_eq!(pool.lend(8).as_ref().as_ptr(), address);
        assert_eq!(pool.lend(9).elements_mut::<crate::I24>().len(), 3, "whatever the words it is kept in");
    }
}
