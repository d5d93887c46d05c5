//! Mattock: a distributed training orchestrator whose results do not depend on how many workers there were.
//!
//! This crate is the program and a thin facade over the crates that do the work.

pub mod cli;
pub mod exit;
pub mod launch;
pub mod progress;
pub mod recipe;
pub mod run_dir;
