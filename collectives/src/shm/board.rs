//! What a rank shows the others of its host: how far it is, which operation it runs, and small payloads.
//!
//! ```text
//! 0      ticks     u32, grows by one with everything that others may wait for
//! 64     sleeping  u32, 1 while its owner sleeps until somebody's ticks change
//! 128    two notices of 8 words, used in turns
//! 4096   two payloads of INLINE_BYTES, used in turns
//! ```
//!
//! A board is written by its owner alone; what others read of it is data to be checked, never an address.
//!
//! # Invariants
//! 1. Who waits for ticks and who adds one do not miss each other: see [`signal`](super::signal).
//! 2. The notice and payload of operation `s` are overwritten by operation `s + 2`, which begins after everybody has
//!    announced `s + 1`, hence has done with `s`.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{fcntl_get_seals, fstat};
use rustix::thread::futex;

use super::arena::{SEALS, sealed};

/// Payloads up to this size travel on the board.
pub(crate) const INLINE_BYTES: usize = 8 << 10;
/// Words of a notice.
pub(crate) const NOTICE_WORDS: usize = 8;
const SLEEPING: usize = 64;
const NOTICES: usize = 128;
const PAYLOADS: usize = 4096;
const BOARD_BYTES: usize = PAYLOADS + 2 * INLINE_BYTES;

/// The board of this rank.
#[derive(Debug)]
pub(crate) struct Board {
    file: OwnedFd,
    view: View,
}

impl Board {
    pub(crate) fn new() -> io::Result<Self> {
        let (file, map) = sealed("mattock-board", BOARD_BYTES)?;
        Ok(Self { file, view: View { map } })
    }

    /// For peers to map.
    pub(crate) fn file(&self) -> &OwnedFd {
        &self.file
    }

    /// Writes the notice of the next operation; others see it with the next tick.
    pub(crate) fn write_notice(&self, turn: usize, words: [u64; NOTICE_WORDS]) {
        for (word, value) in self.view.notice_words(turn).iter().zip(words) {
            word.store(value, Ordering::Relaxed);
        }
    }

    /// Writes the payload of the next operation; others see it with the next tick.
    pub(crate) fn write_payload(&self, turn: usize, bytes: &[u8]) {
        assert!(bytes.len() <= INLINE_BYTES, "large payloads travel otherwise");
        // SAFETY: within the map, which is ours to write; others read it after the next tick only.
        unsafe {
            let to = self.view.map.as_mut_ptr().add(PAYLOADS + turn * INLINE_BYTES);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
    }

    /// What [`write_payload`](Self::write_payload) wrote.
    pub(crate) fn payload(&self, turn: usize, bytes: usize) -> &[u8] {
        self.view.payload(turn, bytes)
    }

    /// Adds a tick; what was written before is seen by who sees it.
    pub(crate) fn add_tick(&self) {
        self.view.ticks().fetch_add(1, Ordering::Release);
    }

    /// Wakes all who sleep until our ticks change.
    pub(crate) fn wake(&self) {
        self.view.wake();
    }

    /// Says whether this rank sleeps.
    pub(crate) fn set_sleeping(&self, sleeping: bool) {
        self.view.sleeping_word().store(sleeping.into(), Ordering::Relaxed);
    }
}

/// A rank's board as others see it.
#[derive(Debug)]
pub(crate) struct View {
    map: MmapRaw,
}

impl View {
    /// Maps a peer's board.
    ///
    /// # Errors
    /// Where it is none, or could be changed in size or by others.
    pub(crate) fn of(file: &OwnedFd) -> io::Result<Self> {
        let map = map_sealed(file)?;
        if map.len() != BOARD_BYTES {
            return Err(io::Error::other(format!("a board of {} bytes, not {BOARD_BYTES}", map.len())));
        }
        Ok(Self { map })
    }

    /// How far the rank is.
    pub(crate) fn ticks(&self) -> &AtomicU32 {
        // SAFETY: within the map, aligned, and only ever accessed atomically.
        unsafe { &*self.map.as_ptr().cast::<AtomicU32>() }
    }

    /// Whether its owner sleeps until somebody's ticks change.
    pub(crate) fn is_sleeping(&self) -> bool {
        self.sleeping_word().load(Ordering::Relaxed) != 0
    }

    /// What its owner has announced.
    pub(crate) fn notice(&self, turn: usize) -> [u64; NOTICE_WORDS] {
        std::array::from_fn(|i| self.notice_words(turn)[i].load(Ordering::Relaxed))
    }

    /// The first `bytes` of its owner's payload.
    pub(crate) fn payload(&self, turn: usize, bytes: usize) -> &[u8] {
        assert!(bytes <= INLINE_BYTES, "large payloads travel otherwise");
        // SAFETY: within the map. An owner that keeps to the protocol does not write it before all have read it; one
        // that does not can change the numbers that are read, nothing else.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().add(PAYLOADS + turn * INLINE_BYTES), bytes) }
    }

    /// Sleeps until the ticks are no longer `seen`, somebody wakes us, or the time is over.
    pub(crate) fn sleep(&self, seen: u32, limit: std::time::Duration) {
        let limit = futex::Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
        // However it ends, the caller looks again.
        let _ = futex::wait(self.ticks(), futex::Flags::empty(), seen, Some(&limit));
    }

    /// Wakes all who sleep until these ticks change.
    pub(crate) fn wake(&self) {
        // It fails for bad addresses only.
        let _ = futex::wake(self.ticks(), futex::Flags::empty(), i32::MAX as u32);
    }

    fn sleeping_word(&self) -> &AtomicU32 {
        // SAFETY: as for the ticks.
        unsafe { &*self.map.as_ptr().add(SLEEPING).cast::<AtomicU32>() }
    }

    fn notice_words(&self, turn: usize) -> &[AtomicU64; NOTICE_WORDS] {
        assert!(turn < 2, "there are two notices");
        // SAFETY: as for the ticks.
        unsafe { &*self.map.as_ptr().add(NOTICES + turn * 8 * NOTICE_WORDS).cast() }
    }
}

/// Maps a peer's memory for reading.
///
/// # Errors
/// Where its owner could still shrink it, so that a read could kill us, or cannot be stopped from sharing it for writing.
pub(crate) fn map_sealed(file: &OwnedFd) -> io::Result<MmapRaw> {
    if !fcntl_get_seals(file)?.contains(SEALS) {
        return Err(io::Error::other("the peer's memory is not sealed"));
    }
    let bytes = usize::try_from(fstat(file)?.st_size).map_err(io::Error::other)?;
    MmapOptions::new().len(bytes).map_raw_read_only(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_see_what_the_owner_writes() {
        let board = Board::new().unwrap();
        let view = View::of(board.file()).unwrap();
        board.write_notice(1, [1, 2, 3, 4, 5, 6, 7, 8]);
        board.write_payload(1, b"hello");
        board.add_tick();
        assert_eq!(view.ticks().load(Ordering::Acquire), 1);
        assert_eq!(view.notice(1), [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(view.payload(1, 5), b"hello");
        assert!(!view.is_sleeping());
        board.set_sleeping(true);
        assert!(view.is_sleeping());
    }

    #[test]
    fn unsealed_memory_is_refused() {
        let file = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&file, BOARD_BYTES as u64).unwrap();
        let error = View::of(&file).unwrap_err();
        assert!(error.to_string().contains("not sealed"), "{error}");
    }
}
