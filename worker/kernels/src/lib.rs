//! The only crate that names a Burn backend type: which devices there are, and the operations in which a language
//! model spends its time, fused where a backend gains by it.
//!
//! Everything else is generic over [`Kernels`], so that a new device, or Burn's move to a run-time device, is a
//! change of this crate alone.

mod backend;
mod cpu;
mod kernels;
mod plain;

pub use backend::{Cpu, Device, DeviceChoice, DeviceError, cpu_features};
#[cfg(feature = "cuda")]
pub use backend::{Cuda, cuda_device};
pub use kernels::{Kernels, TrainBackend};
