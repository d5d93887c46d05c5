//! Sharded state: which rank owns which elements of the flat space, and how ranges move when ranks come and go.
//!
//! A shard is made of whole chunks of each bucket, so that every exchange of a bucket concerns all ranks alike, and a
//! rank's part of a norm is added up by nobody else. Its owner updates it; the owner's *buddy*, the next rank of the ring, may
//! hold a second copy, and repeats the same arithmetic on it.
//!
//! # Invariants
//! 1. For any number of ranks, each element has one owner.
//! 2. Who owns what leaves no trace in the state.

mod map;
mod reshard;
mod stretches;

pub(crate) use self::map::ShardMap;
pub(crate) use self::reshard::{Lost, Move, plan};
pub(crate) use self::stretches::Stretches;
