//! Memory for the parameters of one block after the other: who computes with them gives it back by dropping them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use mattock_collectives::Buffer;

/// Buffers that are kept: as many as are in use at a time.
const KEPT_MAX: usize = 2;

/// Buffers that wait to be used again.
#[derive(Clone, Default)]
pub(super) struct Room(Arc<Mutex<Vec<Buffer<f32>>>>);

impl Room {
    /// A buffer of any length; an empty one where none waits.
    pub(super) fn take(&self) -> Buffer<f32> {
        self.lock().pop().unwrap_or_default()
    }

    /// What is in a buffer, which comes back when nobody has that any more.
    pub(super) fn lend(&self, buffer: Buffer<f32>) -> Bytes {
        Bytes::from_owner(Lent { buffer, room: self.clone() })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Buffer<f32>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Lent {
    buffer: Buffer<f32>,
    room: Room,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.buffer)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut kept = self.room.lock();
        if kept.len() < KEPT_MAX {
            kept.push(std::mem::take(&mut self.buffer));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_when_the_last_part_is_dropped() {
        let room = Room::default();
        assert!(room.take().is_empty());
        let whole = room.lend(vec![1.0, 2.0].into());
        assert_eq!(whole, bytemuck::cast_slice::<f32, u8>(&[1.0, 2.0]));
        let part = whole.slice(4..);
        drop(whole);
        assert!(room.take().is_empty(), "somebody has a part of it");
        drop(part);
        assert_eq!(room.take()[..], [1.0, 2.0]);
    }

    #[test]
    fn few_are_kept() {
        let room = Room::default();
        let many: Vec<Bytes> = (0..5).map(|_| room.lend(vec![0.0].into())).collect();
        drop(many);
        assert_eq!(room.lock().len(), KEPT_MAX);
    }
}
