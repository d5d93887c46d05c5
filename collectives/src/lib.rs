#![doc = include_str!("../README.md")]
//!
//! # Inside
//! ```text
//! group      submit, wait            |  node     an endpoint, and rings joined from it
//! driver     loops over links, time  |  link     the contract; memory, quic, faulty
//! exchange   operations in flight    |  frame    the wire format
//! transfer   one operation           |  schedule who sends what: pure arithmetic
//! buffer     what is read and written |  shm      the ranks of one host, over memory that they share
//! message    from one rank to another |  topology which order of ranks suits their links
//! ```
//! `schedule`, `transfer`, `exchange`, `frame`, `message::mailbox` and `topology` are pure: no clock, socket, thread or random
//! number.
//!
//! Deliberately absent: models, recipes, coordinators. Here are slices, bytes and links.

#[cfg(test)]
extern crate self as mattock_collectives;

mod alarm;
mod buffer;
mod collective;
mod driver;
mod error;
mod exchange;
mod fault;
pub mod frame;
mod frame_reader;
mod group;
mod io_thread;
mod layout;
pub mod link;
pub mod memory;
mod message;
mod meter;
mod node;
mod pending;
mod pool;
mod rank;
mod recorder;
mod reduction;
mod ring;
mod schedule;
mod shm;
pub mod topology;
mod transfer;

pub use buffer::Buffer;
pub use collective::{Collective, OpId};
pub use error::{CollectiveError, Disagreement, JoinError, Payload, Phase, Place, TransportError};
pub use group::{Batch, FUSED_BYTES_MAX, Group, GroupConfig, PENDING_MAX, Transport};
pub use io_thread::IoThread;
pub use link::quic::tuning::Congestion;
pub use link::quic::{Identity, IdentityError};
pub use meter::Counters;
pub use node::{Node, NodeConfig, NodeError, RingSpec, TransportChoice};
pub use pending::Pending;
pub use rank::{Generation, Rank, WorldSize};
pub use recorder::{End, Record};
pub use reduction::{
    Element, ElementKind, I12x2, I24, Max, Mean, Min, Reduction, ReductionKind, SaturatingSum, Sum,
};
pub use ring::{Ring, Shape};
pub use schedule::segment;
pub use shm::arena::{Arena, ArenaError};
pub use shm::copy::copy_past_caches;
