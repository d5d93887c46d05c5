//! Membership under faults: thousands of whole runs, each replayable from one number.
//!
//! The real [`Registry`](mattock_coordinator::membership::Registry), the real
//! [`Member`](mattock_coordinator::membership::Member)s and the real [`Ledger`](mattock_coordinator::Ledger) run
//! under a simulated clock, network, launcher and data plane. A seed fixes everything: how many workers, which kinds
//! of fault, when and whom they hit, how long every message takes.
//!
//! ```text
//! swarm ──> sim (clock, queue of happenings)
//!            ├─ network      a FIFO per worker and direction, delays, stalls, lost connections
//!            ├─ worker       what worker/src/control.rs does, around a real Member
//!            ├─ session      what worker/src/session/training.rs does
//!            ├─ state        what worker/src/gate.rs does, and states whose hashes tell what was added up
//!            ├─ ring         links, transfers, and the commit point: a step needs every rank
//!            ├─ coordinator  what coordinator/src/server/core.rs does, around a real Registry, Ledger and Past
//!            ├─ succession   coordinators that die, and others that take over
//!            ├─ faults       what goes wrong
//!            └─ facts ──> invariants, one file each
//! ```
//!
//! Whatever happens to workers and coordinators, the run completes with the bits of a run of one process, and once faults stop it does so
//! soon. `MATTOCK_SIM_SEEDS=100000` tries more seeds, `MATTOCK_SIM_SEED=17` replays one with its trace.
//!
//! Deliberately absent: a store that loses or invents leases.

#![allow(clippy::unwrap_used, reason = "helpers of tests, outside of test functions")]

mod coordinator;
mod facts;
mod faults;
mod invariants;
mod network;
mod ring;
mod rng;
mod sabotage;
mod scenarios;
mod seeds;
mod session;
mod sim;
mod state;
mod succession;
mod swarm;
mod worker;
