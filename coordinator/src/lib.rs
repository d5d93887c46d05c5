//! The control plane of a run: who takes part, in which ring, and what they did.
//!
//! ```text
//! server    QUIC, timers ─┐                    ┌─ client   the same for a worker
//!                    membership  pure decisions │
//!                    ledger      who did what   │
//!                    past        the same, as it was told to a coordinator that took over from another
//! lease     who coordinates: numbered records in a store that the caller brings
//! identity  authority, tokens   protocol + wire  checked messages   status  HTTP on loopback
//! ```
//!
//! Deliberately absent: tensors, models, object storage. The recipe is opaque text here.

mod client;
pub mod event;
pub mod identity;
mod ids;
pub mod lease;
mod ledger;
pub mod membership;
mod past;
pub mod protocol;
mod reach;
mod recovery;
mod server;
mod status;
mod stream;
pub mod wire;

pub use client::{Client, ClientError, Enrollment, JoinError, Passport, Report, Reporter};
pub use ids::WorkerId;
pub use ledger::{Disagreement, Ledger};
pub use past::{Past, REPORTS_MAX, RINGS_MAX};
pub use reach::{Reach, reach};
pub use recovery::Recovery;
pub use server::{Command, Failover, RunEnd, Server, ServerConfig, ServerError};
pub use stream::StreamError;
