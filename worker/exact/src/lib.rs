//! Exact gradient sums: why the number of workers leaves no trace in the result.
//!
//! Floating-point addition depends on order, and order depends on who computed what. So each micro-batch's gradient
//! is rounded *once* to integers, under a power-of-two scale that every rank knows beforehand, and integers are added:
//! any order, any grouping, any number of ranks give the same sum. The scale is per block of 256 elements and follows
//! the gradient's size ([`Exponents`]). Most sums fit 32 bits; a block's *bound* tells when one may not, and then its
//! 64-bit sum follows in a second, small exchange: overflow costs bytes, never a repeat. For slow links a sum may have
//! fewer bits ([`Bits`]): each micro-batch's integers are made shorter at random ([`Dither`]), and all else stays as it is.
//!
//! ```text
//! gradient ─ round ─> low words, packed ── wrapping sum over ranks ─────┐
//!                └──> bounds (u32, saturating sum) ─ wide blocks? ──────┼─> decode ─> mean gradient
//!                └──> 64-bit sums of promoted blocks ─ sum, where wide ─┘        └─> next exponents
//! ```
//!
//! # Invariants
//! 1. Equal sets of micro-batches give equal sums, bounds and next exponents, however they were split over
//!    accumulators.
//! 2. Where the summed bound stays below [`Rounding::wide_from`], the wrapped sum *is* the sum.
//! 3. Nothing here depends on vector width: every wide form has the bits of the scalar one.
//!
//! Deliberately absent: IO, threads, clocks, FMA, the system's `libm`.

mod accumulator;
mod dither;
mod exponents;
mod hash;
mod norm;
mod pack;
mod rounding;
mod simd;
mod total;
mod update;

pub use accumulator::{Accumulator, WideAccumulator};
pub use dither::Dither;
pub use exponents::{Exponents, block_maxima};
pub use hash::{exponent_hash, parameter_hash, range_hash, state_hash};
pub use norm::{CHUNK, chunk_squares, norm};
pub use pack::{pack, packed_bytes, unpack};
pub use rounding::{Bits, Rounding};
pub use total::{WideBlocks, decode, decode_wide, decode_words, wide_blocks};
pub use update::{AdamW, AdamWStep, adamw};

/// Elements of a block: what shares an exponent and a bound.
pub const BLOCK: usize = 256;

#[cfg(test)]
mod tests;
