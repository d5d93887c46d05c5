//! The control plane's wire: who is refused, with what words, and that a run goes on whoever calls.
//!
//! Each test has a real coordinator on loopback and a run that real clients keep going; at its end the run must be complete.
//!
//! ```text
//! refused    strangers, other runs, other versions, damaged messages
//! members    who has a certificate, and abuses it
//! bounds     who says nothing, too much, or takes nothing
//! network    what somebody on the way sees, and can spoil
//! run        the run;  peer  QUIC by hand
//! ```
#![allow(missing_docs, unreachable_pub, clippy::unwrap_used, reason = "a test fails by panicking")]

mod bounds;
mod members;
mod network;
mod peer;
mod refused;
#[path = "../../../collectives/tests/common/relay.rs"]
mod relay;
mod run;
