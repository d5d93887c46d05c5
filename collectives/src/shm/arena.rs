//! Memory that the other processes of a host may read: one memfd, cut into regions.
//!
//! A memfd is nameless, so nothing is left behind when a process is killed, is not bound by the size of `/dev/shm`, and
//! takes memory only where it was written. It is sealed: nobody can shrink it under a reader, and nobody but its owner
//! can write to it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::{MmapOptions, MmapRaw};
use range_alloc::RangeAllocator;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use crate::buffer::Buffer;
use crate::reduction::Element;

/// What regions begin and end at a multiple of: a cache line, and any element.
pub(crate) const ALIGNMENT: usize = 64;

/// Why an arena gives no memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArenaError {
    /// The system has no such memory, or none to give.
    #[error("this system gives no memory that processes can share: {0}")]
    Unavailable(#[from] io::Error),
    /// It is used up.
    #[error(
        "{wanted} bytes do not fit into an arena of {limit}, of which {free} are free; give it a higher limit"
    )]
    Full {
        /// What was asked for.
        wanted: usize,
        /// What the arena may hold.
        limit: usize,
        /// What is left, perhaps in pieces.
        free: usize,
    },
}

/// Memory for [`Buffer`]s that the peers on this host read where they lie. A handle: clones are the same arena.
#[derive(Clone, Debug)]
pub struct Arena {
    core: Arc<Core>,
}

#[derive(Debug)]
struct Core {
    file: OwnedFd,
    map: MmapRaw,
    free: Mutex<RangeAllocator<usize>>,
}

impl Arena {
    /// An arena of `limit` bytes at most; none of them is taken before it is used.
    ///
    /// # Errors
    /// Where the system has no sealed memory files (Linux 5.1 has), or the process may map no more.
    pub fn new(limit: usize) -> io::Result<Self> {
        let limit = limit.max(1).next_multiple_of(ALIGNMENT);
        let (file, map) = sealed("mattock-arena", limit)?;
        let free = Mutex::new(RangeAllocator::new(0..limit / ALIGNMENT));
        Ok(Self { core: Arc::new(Core { file, map, free }) })
    }

    /// `len` zeros.
    ///
    /// # Errors
    /// [`ArenaError::Full`].
    pub fn buffer<E: Element>(&self, len: usize) -> Result<Buffer<E>, ArenaError> {
        let region = self.region(len.saturating_mul(size_of::<E>()))?;
        let mut buffer = Buffer::shared(region, len);
        buffer.fill(E::zeroed());
        Ok(buffer)
    }

    /// Bytes with whatever was in them.
    pub(crate) fn region(&self, bytes: usize) -> Result<Region, ArenaError> {
        let units = bytes.max(1).div_ceil(ALIGNMENT);
        let mut free = self.core.free.lock().unwrap_or_else(PoisonError::into_inner);
        let range = free.allocate_range(units).map_err(|_| ArenaError::Full {
            wanted: bytes,
            limit: self.core.map.len(),
            free: free.total_available() * ALIGNMENT,
        })?;
        Ok(Region { arena: self.clone(), offset: range.start * ALIGNMENT, bytes: units * ALIGNMENT })
    }

    /// For peers to map.
    pub(crate) fn file(&self) -> &OwnedFd {
        &self.core.file
    }

    /// Whether the region is one of this arena.
    pub(crate) fn holds(&self, region: &Region) -> bool {
        Arc::ptr_eq(&self.core, &region.arena.core)
    }
}

/// A nameless file of that size, mapped for writing here and sealed against everybody else's.
pub(crate) fn sealed(name: &str, bytes: usize) -> io::Result<(OwnedFd, MmapRaw)> {
    let file = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, bytes as u64)?;
    let map = MmapOptions::new().len(bytes).map_raw(&file)?;
    fcntl_add_seals(&file, SEALS | SealFlags::SEAL)?;
    Ok((file, map))
}

/// What a peer's memory must be sealed against before it is mapped: it then keeps its size, so no read can fail.
pub(crate) const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::FUTURE_WRITE);

/// Bytes of an arena, given back on drop.
#[derive(Debug)]
pub(crate) struct Region {
    arena: Arena,
    offset: usize,
    bytes: usize,
}

impl Region {
    pub(crate) fn arena(&self) -> &Arena {
        &self.arena
    }

    /// Where it begins in its arena.
    pub(crate) fn offset(&self) -> usize {
        self.offset
    }

    /// Its size.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: the allocator gives each byte of the map to one region only, and the map lives as long as the arena.
        // Peers read, they cannot write: the file is sealed.
        unsafe { std::slice::from_raw_parts(self.core_ptr(), self.bytes) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.core_ptr(), self.bytes) }
    }

    fn core_ptr(&self) -> *mut u8 {
        // SAFETY: regions lie within the map.
        unsafe { self.arena.core.map.as_mut_ptr().add(self.offset) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let range = self.offset / ALIGNMENT..(self.offset + self.bytes) / ALIGNMENT;
        self.arena.core.free.lock().unwrap_or_else(PoisonError::into_inner).free_range(range);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn buffers_are_zeroed_and_disjoint_and_their_memory_is_used_again() {
        let arena = Arena::new(1 << 20).unwrap();
        let mut a = arena.buffer::<u32>(100).unwrap();
        let b = arena.buffer::<u32>(100).unwrap();
        a.fill(7);
        assert!(b.iter().all(|&x| x == 0));
        let offset = a.region().unwrap().offset();
        drop(a);
        let again = arena.buffer::<u32>(100).unwrap();
        assert_eq!(again.region().unwrap().offset(), offset);
        assert!(again.iter().all(|&x| x == 0));
    }

    #[test]
    fn a_full_arena_says_how_much_is_left() {
        let arena = Arena::new(4096).unwrap();
        let _half = arena.buffer::<u8>(2048).unwrap();
        let error = arena.buffer::<u8>(4096).unwrap_err();
        assert!(matches!(error, ArenaError::Full { wanted: 4096, limit: 4096, free: 2048 }), "{error}");
        assert!(arena.buffer::<i64>(usize::MAX).is_err());
    }

    #[test]
    fn nobody_else_can_write_or_shrink_it() {
        let arena = Arena::new(4096).unwrap();
        let file = File::from(arena.file().try_clone().unwrap());
        assert!(MmapOptions::new().map_raw(&file).is_err());
        assert!(MmapOptions::new().map_raw_read_only(&file).is_ok());
        assert!(file.set_len(0).is_err());
    }
}
