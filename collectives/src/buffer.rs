//! Memory that operations read from and write to: ordinary, or shared with the processes of this host.
//!
//! Over shared memory, peers read a [`Buffer`] of an [`Arena`](crate::Arena) where it lies; an ordinary one is copied
//! into the arena first. Over other links both are the same.

use std::ops::{Deref, DerefMut};

use crate::reduction::Element;
use crate::shm::arena::Region;

/// A fixed number of elements.
pub struct Buffer<E> {
    memory: Memory<E>,
}

enum Memory<E> {
    Own(Vec<E>),
    Shared { region: Region, len: usize },
}

impl<E: Element> Buffer<E> {
    /// `len` zeros in ordinary memory.
    pub fn zeroed(len: usize) -> Self {
        vec![E::zeroed(); len].into()
    }

    pub(crate) fn shared(region: Region, len: usize) -> Self {
        assert!(region.bytes() >= len * size_of::<E>(), "a region holds its elements");
        Self { memory: Memory::Shared { region, len } }
    }

    /// The region that peers may read, if it is one.
    pub(crate) fn region(&self) -> Option<&Region> {
        match &self.memory {
            Memory::Own(_) => None,
            Memory::Shared { region, .. } => Some(region),
        }
    }

    /// Whether peers on this host can read it where it lies.
    pub fn is_shared(&self) -> bool {
        self.region().is_some()
    }

    /// Makes it `len` elements long, of any values; memory of the same kind, if there is enough.
    pub(crate) fn resize(&mut self, len: usize) {
        match &mut self.memory {
            Memory::Own(vec) => vec.resize(len, E::zeroed()),
            Memory::Shared { region, len: current } if region.bytes() >= len * size_of::<E>() => {
                *current = len
            }
            Memory::Shared { region, .. } => {
                let larger = region.arena().buffer(len);
                *self = larger.unwrap_or_else(|_| Self::zeroed(len));
            }
        }
    }

    /// Only these elements, moved to its beginning.
    pub(crate) fn keep(mut self, range: std::ops::Range<usize>) -> Self {
        let len = range.len();
        self.copy_within(range, 0);
        match &mut self.memory {
            Memory::Own(vec) => vec.truncate(len),
            Memory::Shared { len: current, .. } => *current = len,
        }
        self
    }

    /// The elements as a vector; copied where they are shared.
    pub fn into_vec(self) -> Vec<E> {
        match self.memory {
            Memory::Own(vec) => vec,
            Memory::Shared { .. } => self.to_vec(),
        }
    }
}

impl<E> Default for Buffer<E> {
    /// No elements, in ordinary memory.
    fn default() -> Self {
        Self { memory: Memory::Own(Vec::new()) }
    }
}

impl<E> From<Vec<E>> for Buffer<E> {
    fn from(vec: Vec<E>) -> Self {
        Self { memory: Memory::Own(vec) }
    }
}

impl<E: Element> Deref for Buffer<E> {
    type Target = [E];

    fn deref(&self) -> &[E] {
        match &self.memory {
            Memory::Own(vec) => vec,
            Memory::Shared { region, len } => {
                bytemuck::cast_slice(&region.as_slice()[..*len * size_of::<E>()])
            }
        }
    }
}

impl<E: Element> DerefMut for Buffer<E> {
    fn deref_mut(&mut self) -> &mut [E] {
        match &mut self.memory {
            Memory::Own(vec) => vec,
            Memory::Shared { region, len } => {
                bytemuck::cast_slice_mut(&mut region.as_mut_slice()[..*len * size_of::<E>()])
            }
        }
    }
}

impl<E: Element> Clone for Buffer<E> {
    /// In ordinary memory where the arena is full.
    fn clone(&self) -> Self {
        let mut copy = Self::default();
        if let Some(region) = self.region() {
            copy = region.arena().buffer(self.len()).unwrap_or_default();
        }
        copy.resize(self.len());
        copy.copy_from_slice(self);
        copy
    }
}

impl<E: Element + std::fmt::Debug> std::fmt::Debug for Buffer<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl<E: Element + PartialEq> PartialEq for Buffer<E> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl<E: Element + PartialEq> PartialEq<Vec<E>> for Buffer<E> {
    fn eq(&self, other: &Vec<E>) -> bool {
        **self == **other
    }
}

impl<E: Element + PartialEq> PartialEq<[E]> for Buffer<E> {
    fn eq(&self, other: &[E]) -> bool {
        **self == *other
    }
}
