//! Checkpoints over real and misbehaving stores, through the public functions only.

#![allow(clippy::unwrap_used, reason = "helpers of tests, outside of test functions")]

mod claims;
mod contract;
mod corruption;
mod faults;
mod faulty;
mod records;
mod samples;
mod writing;
