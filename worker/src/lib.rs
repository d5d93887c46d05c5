//! The worker: Burn training, exact gradient sums, checkpoints.
//!
//! A [`Task`](task::Task) says what is trained; [`trainer`] runs one step of it; what lies between the two is how the
//! number of workers leaves no trace: [`plan`] without world size, gradients block by block, exact sums, a commit point.
//!
//! Deliberately absent here: the recipe's text, launching, and anything about other workers but their sums.

mod balance;
mod beginning;
pub mod bits;
mod commit;
mod control;
pub mod estimate;
mod evaluate;
mod faults;
pub mod gate;
mod gradients;
pub mod host;
mod journal;
pub mod lease;
mod origin;
mod params;
mod partition;
pub mod phases;
pub mod plan;
pub mod samples;
pub mod schedule;
pub mod session;
pub mod settings;
pub mod shards;
pub mod state;
pub mod storage;
mod succession;
mod sum;
pub mod task;
pub mod trainer;
mod update;

pub use mattock_kernels::{Device, DeviceChoice, DeviceError, Kernels, cpu_features};
pub use params::{Parameter, Space};
