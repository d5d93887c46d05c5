//! Checkpoints over real and misbehaving stores, through the public functions only.

#![allow(clippy::unwrap_used, reason = "helpers of tests, outside of test functions")]
#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges, of which one is the common case")]

mod claims;
mod contract;
mod corruption;
mod faults;
mod faulty;
mod records;
mod samples;
mod shares;
mod upkeep;
mod writing;
