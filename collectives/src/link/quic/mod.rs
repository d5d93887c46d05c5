//! Links over QUIC: TLS 1.3 with certificates on both sides, one connection per link.
//!
//! ```text
//! join       the way into a ring: connect to the next rank, await the previous one
//! lobby      who has connected, until somebody asks for them
//! hello      the first bytes of a connection: which ring, which rank
//! directions where a rank listens, as ranks tell each other
//! identity   certificates, and the names in them
//! obituary   peers whose host says that nobody listens there
//! tuning     windows, datagram sizes, timers
//! socket     the UDP socket
//! steady     how fast to send over long paths that lose packets
//! stream     the two halves of a link
//! ```
//!
//! The rank that sends opens the connection and a stream on it; acknowledgements are all that flows back. The rank
//! that receives may end the connection at any time: it alone knows what has been read.

pub(crate) mod directions;
pub(crate) mod hello;
pub(crate) mod identity;
pub(crate) mod join;
pub(crate) mod lobby;
pub(crate) mod obituary;
pub(crate) mod socket;
mod steady;
pub(crate) mod stream;
pub mod tuning;

pub use identity::{Identity, IdentityError};
