//! Membership: who takes part in the run, and in which ring.
//!
//! Both halves of the protocol live here: [`Registry`] on the coordinator and [`Member`] on each worker. Neither reads
//! a clock, opens a socket or draws a random number: time and messages come in as arguments, what to do comes out.
//!
//! ```text
//! Gathering --quorum, all ready--> Forming(g) --all linked--> Running(g) --all finished--> Ended
//!     |                               |                           |                          ^
//!     +-------- a member lost, silent or failed; a stop before the first ring ---------------+
//! ```
//!
//! # Invariants
//! 1. One generation, one ring: no two workers see different rings under one generation.
//! 2. Generations only grow.
//! 3. In a ring every micro-batch belongs to exactly one rank.
//! 4. Once faults stop, the run trains or has ended with a reason within three timeouts.
//!
//! Deliberately absent, so far: going on after a loss, and so a second generation. A worker that is lost ends the run with
//! an error that says which and why; training so far is in its checkpoints.

mod assign;
mod member;
mod registry;

pub use self::assign::assigned;
pub use self::member::{Instruction, Member};
pub use self::registry::{Action, Candidate, Config, Event, Outcome, Phase, Registry};
