//! Membership: who takes part in the run, and in which ring.
//!
//! Both halves of the protocol live here: [`Registry`] on the coordinator and [`Member`] on each worker. Neither reads
//! a clock, opens a socket or draws a random number: time and messages come in as arguments, what to do comes out.
//!
//! # Invariants
//! 1. One generation, one ring: no two workers see different rings under one generation.
//! 2. Generations only grow.
//! 3. In every step of a ring every micro-batch belongs to exactly one rank; in its first, what a member has computed
//!    already belongs to that member.
//! 4. A ring is formed only when every live member of the one before has said what it holds, and adds nothing to it.
//! 5. Once faults stop, the run trains, waits for workers that it lacks, or has ended with a reason, within three timeouts.
//!
//! Where a coordinator takes over from a dead one, a new registry begins with what those tell who come back to it. Which of two is
//! the coordinator, a lease says that this module knows nothing of.

mod assign;
mod detector;
mod member;
mod registry;
mod vocabulary;

pub use self::assign::{assigned, resumed};
pub use self::member::{Instruction, Member};
pub use self::registry::Registry;
pub use self::vocabulary::{Action, Candidate, Config, Dissent, Event, Outcome, Phase};
