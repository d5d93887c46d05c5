//! Checkpoints over real and misbehaving stores, through the public functions only.

mod claims;
mod contract;
mod corruption;
mod faults;
mod faulty;
mod samples;
mod writing;
