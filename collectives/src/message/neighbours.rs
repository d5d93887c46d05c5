//! Those with whom a rank shares memory: messages between them are read where they lie.

use std::sync::Arc;

use super::mailbox::SMALL_BYTES;
use crate::buffer::Buffer;
use crate::rank::Rank;
use crate::reduction::Element;
use crate::shm::arena::ALIGNMENT;
use crate::shm::engine::Engine;

/// The ranks of this host, and the memory of each.
pub(crate) struct Neighbours {
    engine: Arc<Engine>,
    /// As the group calls them, in the order in which the host does.
    ranks: Vec<Rank>,
}

impl Neighbours {
    pub(crate) fn new(engine: Arc<Engine>, ranks: Vec<Rank>) -> Self {
        Self { engine, ranks }
    }

    /// A message's elements, and where that rank may read them; copied into the arena where they are not there. The elements alone
    /// where that rank is elsewhere, the arena is full, or it is so small a message that it travels better.
    pub(crate) fn place<E: Element>(&self, to: Rank, input: Arc<Buffer<E>>) -> (Arc<Buffer<E>>, Option<u32>) {
        if !self.ranks.contains(&to) || size_of_val(&input[..]) <= SMALL_BYTES {
            return (input, None);
        }
        let name = |buffer: &Buffer<E>| u32::try_from(self.engine.offset_of(buffer)? / ALIGNMENT).ok();
        if let Some(place) = name(&input) {
            return (input, Some(place));
        }
        let mut copy = self.engine.scratch(input.len());
        match name(&copy) {
            Some(place) => {
                copy.copy_from_slice(&input);
                (Arc::new(copy), Some(place))
            }
            None => (input, None),
        }
    }

    /// Bytes that lie there in that rank's memory; `None` where it shares no such bytes.
    pub(crate) fn read(&self, from: Rank, place: u32, bytes: usize) -> Option<&[u8]> {
        let rank = self.ranks.iter().position(|&rank| rank == from)?;
        self.engine.memory_of(rank as u32, (place as usize).checked_mul(ALIGNMENT)?, bytes)
    }
}
