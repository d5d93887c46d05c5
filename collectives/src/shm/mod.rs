//! Collectives between the processes of one host, over memory that each shares and the others read.
//!
//! ```text
//! arena   memory that peers may read       |  board   how far a rank is; small payloads
//! meet    how the ranks of a host connect  |  signal  why nobody sleeps too long
//! engine  turns, waiting, faults           |  calls   the operations themselves
//! ```
//!
//! Nobody writes another's memory. A rank's board and arena are mapped by its peers for reading only, and sealed so that
//! they can be neither shrunk nor mapped for writing; so a peer that breaks the rules can spoil results or cause an error,
//! but no write and no access outside what is mapped. And when an operation fails, a rank may use its buffers at once: who
//! still reads them fails as well, because the rank never said that it was done.

pub(crate) mod arena;
pub(crate) mod board;
pub(crate) mod calls;
pub(crate) mod copy;
pub(crate) mod engine;
pub(crate) mod meet;
mod signal;

#[cfg(test)]
mod tests;
