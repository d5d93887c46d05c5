//! Real processes of a run, coordinator included, killed, stopped, sent away and added by a schedule that a seed fixes; at the end the run is held
//! against one to which nothing happened.
//!
//! ```text
//! schedule(seed) ──faults by step──> disturbed run ──events──> audit <──events── undisturbed run, once
//! ```
//!
//! # What must hold
//! 1. Every step's loss and state hash are those of the undisturbed run.
//! 2. Every micro-batch of every step was counted exactly once.
//! 3. A worker to which nothing happened is the same process from the first step to the last.
//! 4. Nothing is read from storage, unless all workers were gone at once.
//! 5. A worker whose memory failed is named before anything of it counts, and no other is.
//! 6. A worker that was to die at a moment has died there, and no other is lost.
//!
//! [`aimed`] draws one death at the worst moments of a step, and the kind of run that it happens to.
//!
//! [`divided`] cuts the ways between hosts instead, which are network namespaces, and heals them before and after the timeout;
//! what heals before it costs no ring.
//!
//! Deliberately absent: a coordinator that comes back after another took over.

pub mod aimed;
pub mod audit;
pub mod disturb;
pub mod divided;
pub mod events;
pub mod hosts;
pub mod partitions;
pub mod schedule;
pub mod stop;
